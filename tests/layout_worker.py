"""Measures one step of a real Megatron run in many parallel layouts, one after the other.

Started by torchrun with a folder: ``cases.json`` there says what to run, and each rank writes what
it measured beside it.
"""

from __future__ import annotations

import functools
import gc
import json
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from reference_gpt import (
    DOMAINS,
    HEADS,
    HIDDEN,
    LAYERS,
    MICRO_BATCH_SIZE,
    SEQUENCE,
    VOCABULARY,
    initial_weight,
    sample,
)

import megatron_acodm
from megatron_acodm import AcodmConfig, RunShape
from megatron_acodm.config import AlignmentConfig, BlendingConfig
from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.megatron.parameters import _owned
from megatron_acodm.megatron.shim import install_cpu_shim

WEIGHTS = (
    "decoder.layers.0.self_attention.linear_qkv.weight",
    "decoder.layers.[13].mlp.linear_fc2.weight",
    "decoder.layers.2.mlp.linear_fc1.weight",
)
"""At least one in each layer, so on each stage; cut along either dimension."""

COPIES = ("decoder.layers.1.mlp.linear_fc2.bias", "decoder.layers.2.input_layernorm.*")
"""Every tensor-parallel rank has these."""

WEIGHT_OF_DOMAINS = [2, 1, 3, 0]  # of six micro-batches; the last domain is not drawn
LEARNING_RATE = 0.01
SKETCH_SIZE = 1 << 18  # what is left is that numbers of different parameters meet


@dataclass(frozen=True)
class Case:
    """A layout and settings of the host; what is not named is off."""

    name: str
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # model chunks a pipeline stage
    context: int = 1
    data: int = 1
    micro_batches: int = 6  # on each data-parallel rank
    patterns: tuple[str, ...] = (*WEIGHTS, *COPIES)
    bf16: bool = False
    loss_scale: float = 1.0
    per_token: bool = False
    masked: bool = False
    untied: bool = False
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    fused_accumulation: bool = False
    recompute: str | None = None
    biases: bool = True
    mixed: bool = False  # a micro-batch's sequences are of several domains

    @property
    def world_size(self) -> int:
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def samples(self) -> int:
        return self.micro_batches * self.data * MICRO_BATCH_SIZE

    @property
    def estimators(self) -> list[str]:
        return ["captured"] if self.mixed else ["exact", "sketch"]


class SequenceParallelNorm(torch.nn.LayerNorm):
    """Takes its place in a layer spec: Megatron's torch norms refuse sequence parallelism."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(hidden_size, eps)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


def _transformer_config(case: Case) -> Any:
    from megatron.core.transformer import TransformerConfig

    recompute: dict[str, Any] = {
        None: {},
        "full": {"recompute_method": "uniform", "recompute_num_layers": 1},
        "selective": {},  # of Megatron's choice: the attention's core
        "mlp": {"recompute_modules": ["mlp"]},
    }[case.recompute]
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    return TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        tensor_model_parallel_size=case.tensor,
        pipeline_model_parallel_size=case.pipeline,
        virtual_pipeline_model_parallel_size=case.virtual if case.virtual > 1 else None,
        # As Megatron-LM demands of an interleaved schedule on two stages: in a batch, what is sent
        # to the next stage and to the previous one, the same rank, could not be told apart.
        overlap_p2p_comm=case.virtual > 1,
        batch_p2p_comm=case.virtual == 1,
        # Not the context-parallel size: Megatron's own attention refuses it. Each rank takes its
        # part of a sequence for a whole one; what is summed and scaled is the same.
        sequence_parallel=case.sequence_parallel,
        calculate_per_token_loss=case.per_token,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=case.bf16,
        add_bias_linear=case.biases,
        recompute_granularity="selective" if case.recompute == "mlp" else case.recompute,
        **recompute,
    )


def _layer_spec(case: Case, config: Any, vp_stage: int | None) -> Any:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    spec = get_gpt_layer_local_spec()
    if not case.sequence_parallel:
        return spec
    spec.submodules.input_layernorm = SequenceParallelNorm
    spec.submodules.pre_mlp_layernorm = SequenceParallelNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules([spec] * layers, layer_norm=SequenceParallelNorm)


def _chunk(case: Case, config: Any, vp_stage: int | None) -> torch.nn.Module:
    """A stage's model chunk with the reference's weights, in Megatron's DDP."""
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.module import Float16Module

    stage = {"ignore_virtual": False, "vp_stage": vp_stage}
    module = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(case, config, vp_stage),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=not case.untied,
        vp_stage=vp_stage,
    )
    _set_weights(case, module)
    wrapped = Float16Module(config, module) if case.bf16 else module
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=case.overlap_grad_reduce,
        overlap_param_gather=case.overlap_param_gather,
        use_distributed_optimizer=case.distributed_optimizer,
        bucket_size=2000,  # a chunk has several, so that some are reduced before the others
    )
    return DistributedDataParallel(config, ddp_config, wrapped)


def _set_weights(case: Case, module: Any) -> None:
    from megatron.core import parallel_state

    first_layer = module.decoder.layers[0].layer_number - 1
    rank = parallel_state.get_tensor_model_parallel_rank()
    for local_name, parameter in module.named_parameters():
        name = re.sub(
            r"layers\.(\d+)", lambda match: f"layers.{int(match[1]) + first_layer}", local_name
        )
        if name == "output_layer.weight" and not case.untied:
            name = "embedding.word_embeddings.weight"
        shape, dim = list(parameter.shape), 0
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        if is_cut:
            dim = parameter.partition_dim
            shape[dim] *= case.tensor
        whole = initial_weight(name, shape)
        parameter.data.copy_(whole.chunk(case.tensor, dim)[rank] if is_cut else whole)


def _fuse_accumulation(parameter: Any) -> None:
    """Do what a fused weight-gradient GEMM does: add to main_grad, hand on a dummy gradient."""

    def fused(grad: torch.Tensor) -> torch.Tensor:
        parameter.main_grad.add_(grad)
        parameter.grad_added_to_main_grad = True
        return torch.full_like(grad, float("nan"))

    parameter.register_hook(fused)


@dataclass
class Host:
    """Megatron's model, optimizer and configuration on this rank."""

    case: Case
    chunks: list[Any]
    optimizer: Any
    config: Any

    @classmethod
    def build(cls, case: Case) -> Host:
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config = _transformer_config(case)
        stages = range(case.virtual) if case.virtual > 1 else [None]
        chunks = [_chunk(case, config, stage) for stage in stages]
        if case.fused_accumulation:
            for chunk in chunks:
                for name, parameter in chunk.named_parameters():
                    if re.search(r"layers\.\d+\..*linear.*\.weight", name):
                        _fuse_accumulation(parameter)
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=0.0,
                weight_decay=0.0,
                bf16=case.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=case.distributed_optimizer,
                overlap_param_gather=case.overlap_param_gather,
            ),
            chunks,
        )
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = lambda loss: loss * case.loss_scale
        if case.overlap_grad_reduce:  # as Megatron-LM sets it up
            config.no_sync_func = [chunk.no_sync for chunk in chunks]
            config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
            if len(chunks) == 1:
                config.no_sync_func, config.grad_sync_func = chunks[0].no_sync, None
        return cls(case, chunks, optimizer, config)

    def step(self, domains: list[int]) -> None:
        """A training step over samples 0, 1, ... of the given domains."""
        from megatron.core.pipeline_parallel import get_forward_backward_func

        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        iterators = [self._micro_batches(domains) for _ in self.chunks]
        get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks,
            num_microbatches=self.case.micro_batches,
            seq_length=SEQUENCE,
            micro_batch_size=MICRO_BATCH_SIZE,
            forward_only=False,
        )
        self.optimizer.step()

    def learn_from_now_on(self) -> None:
        """Let steps change the weights."""
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE

    def probed_weights(self) -> dict[int, torch.Tensor]:
        """This rank's part of each layer's fc2 weight, when all ranks have those of each other."""
        if self.case.overlap_param_gather:
            for chunk in self.chunks:
                chunk.start_param_sync(force_sync=True)
        return {
            layer.layer_number - 1: layer.mlp.linear_fc2.weight.detach().double().clone()
            for chunk in self.chunks
            for layer in getattr(chunk.module, "module", chunk.module).decoder.layers
        }

    def parts_of_weights(self) -> tuple[list[list[int]], list[list[int]]]:
        """Which numbers of each weight this rank owns, by us and by the optimizer's own map."""
        owned, updated = [], []
        optimizers = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        for chunk in self.chunks:
            for name, weight in chunk.named_parameters():
                if not re.search(r"layers\.\d+\..*linear.*\.weight", name):
                    continue
                part = _owned(weight, self.chunks)
                owned.append([part.start, part.stop] if part else [])
                found: list[int] = []
                for optimizer in optimizers:
                    if weight in optimizer.model_param_gbuf_map:
                        own = optimizer._get_model_param_range_map(weight)["param"]
                        found = [own.start, own.end]
                updated.append(found)
        return owned, updated

    def _micro_batches(self, domains: list[int]) -> Iterator[list[torch.Tensor]]:
        """Tokens, labels and masks of this rank's micro-batches, dealt as Megatron's sampler."""
        from megatron.core import parallel_state

        rank, size = MICRO_BATCH_SIZE * parallel_state.get_data_parallel_rank(), MICRO_BATCH_SIZE
        part = parallel_state.get_context_parallel_rank()
        for start in range(rank, len(domains), size * self.case.data):
            samples = [sample(i, domains[i], self.case.masked) for i in range(start, start + size)]
            yield [
                torch.stack(field).chunk(self.case.context, dim=1)[part]
                for field in zip(*samples, strict=True)
            ]

    def _forward_step(self, iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
        from megatron_acodm.megatron.losses import loss_func

        tokens, labels, mask = next(iterator)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        output = model(tokens, positions, None, labels=labels)
        return output, functools.partial(loss_func, mask, by_sequence=self.case.mixed)


def _acodm_config(case: Case, estimator: str) -> AcodmConfig:
    return AcodmConfig(
        alignment=AlignmentConfig(
            estimator=estimator,
            parameters=case.patterns,
            sketch_size=SKETCH_SIZE,
            gram_interval=1,
        ),
        blending=BlendingConfig(
            granule="sequence" if case.mixed else "micro-batch", minimum_quota=0
        ),
    )


def measure(case: Case) -> dict[str, Any]:
    """What each estimator measures of the same step, on initialised parallel groups.

    Returns:
        ``domains`` of the step's samples, ``rank_domains`` of those that this rank draws, and a
        dict of statistics for each estimator.
    """
    host = Host.build(case)
    run = RunShape(
        train_iters=10, global_batch_size=case.samples, micro_batch_size=MICRO_BATCH_SIZE
    )
    measured: dict[str, Any] = {}
    for estimator in case.estimators:
        mixer = megatron_acodm.patch(_acodm_config(case, estimator), run)
        assert mixer is not None
        try:
            names = ["a", "b", "c", "d"][:DOMAINS]
            mixer.bind(names, [100] * DOMAINS, WEIGHT_OF_DOMAINS, [None], [0] * DOMAINS)
            mixer.attach(host.chunks)
            domains = mixer.ledger.locate(np.arange(case.samples))[0].tolist()
            if estimator == case.estimators[-1]:  # each measures the same weights
                before = host.probed_weights()
                host.learn_from_now_on()
            with mixer.step(1, 0) as step:
                host.step(domains)
            statistics = step.report().statistics
            measured["domains"] = domains
            measured["rank_domains"] = mixer.micro_batch_domains(0).flatten().tolist()
            measured[estimator] = {
                name: getattr(statistics, name).tolist()
                for name in ("alignment", "grad_sq_norm", "gram", "loss", "tokens")
            }
            measured["reduced_bytes"] = statistics.reduced_bytes
            measured[estimator]["average_gram"] = _average_gram(mixer)
        finally:
            megatron_acodm.unpatch()
    measured["probes"] = [statistics.weight_norm.tolist(), statistics.weight_delta_norm.tolist()]
    measured["norms"] = _norms(before, host.probed_weights())
    if case.overlap_param_gather:
        measured["owned"], measured["updated"] = host.parts_of_weights()
    return measured


def _norms(before: dict[int, torch.Tensor], after: dict[int, torch.Tensor]) -> list[list[float]]:
    """Root mean squares of each layer's whole weight and of its change."""
    from megatron.core import parallel_state

    sums = torch.zeros(3, LAYERS, dtype=torch.float64)
    for layer, weight in after.items():
        sums[0, layer] = weight.square().sum()
        sums[1, layer] = (weight - before[layer]).square().sum()
        sums[2, layer] = weight.numel()
    dist.all_reduce(sums, group=parallel_state.get_model_parallel_group())
    return (sums[:2] / sums[2]).sqrt().tolist()


def _average_gram(mixer: Mixer) -> list[list[float]]:
    """Products of the averages after a first step, which are that step's mean gradients."""
    from megatron.core import parallel_state

    assert mixer.averages is not None
    mean = mixer.averages.mean.double()
    products = mean @ mean.T
    dist.all_reduce(products, group=parallel_state.get_model_parallel_group())
    return products.tolist()


def _start_groups(case: Case, store: Any, rank: int) -> None:
    from megatron.core import parallel_state, tensor_parallel

    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=case.world_size,
        timeout=timedelta(seconds=30),
    )
    parallel_state.initialize_model_parallel(
        case.tensor,
        case.pipeline,
        case.virtual if case.virtual > 1 else None,
        context_parallel_size=case.context,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1234)


def _stop_groups() -> None:
    """Also close the connections, so that ranks that wait for one that failed do so no longer."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    gc.collect()


def main(folder: Path) -> None:
    """Run the folder's cases, each in groups of its own, and write a line a case."""
    install_cpu_shim()
    store, rank, _ = next(iter(dist.rendezvous("env://")))
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    with open(folder / f"{rank}.jsonl", "w", encoding="utf-8", buffering=1) as file:
        for values in cases:
            case = Case(**{**values, "patterns": tuple(values["patterns"])})
            _start_groups(case, dist.PrefixStore(case.name, store), rank)
            try:
                result = measure(case)
            except Exception:
                result = {"error": traceback.format_exc()}
            _stop_groups()
            file.write(json.dumps({"case": case.name, **result}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
