"""Builds the trainer's GPT, its DDP wrapper, optimizer and learning-rate schedule."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch


class AveragedWeights:
    """The exponential moving average of a model's weights, which validation may use in their place.

    After step t the weights of step s count in proportion to decay^(t - s): a step ``1 / (1 -
    decay)`` ago counts a third of the latest. The initial weights are no part of it.

    Args:
        chunks: the model's chunks on this rank.
        decay: in [0, 1).
    """

    def __init__(self, chunks: list[Any], decay: float) -> None:
        self._decay = decay
        self.parameters = [weight for chunk in chunks for weight in chunk.parameters()]
        self.averages = [weight.detach().float().clone() for weight in self.parameters]

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Take in the weights after step ``iteration``, counted from 1."""
        share = (1 - self._decay) / (1 - self._decay**iteration)
        for average, weight in zip(self.averages, self.parameters, strict=True):
            average.lerp_(weight.float(), share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model have the averages for its weights, and afterwards its own, bit for bit."""
        own = [weight.detach().clone() for weight in self.parameters]
        self._copy(self.averages)
        try:
            yield
        finally:
            self._copy(own)

    def sharded_state(self, model: dict[str, Any]) -> dict[int, Any]:
        """What distributed checkpointing saves, sharded as the ``model``'s own state is."""
        from megatron.core.dist_checkpointing.optimizer import (
            get_param_id_to_sharded_param_map,
            make_sharded_optimizer_tensor,
        )

        weights = get_param_id_to_sharded_param_map(model, self.parameters)
        return {
            i: make_sharded_optimizer_tensor(weight, self.averages[i], "average")
            for i, weight in weights.items()
        }

    def load_state(self, state: dict[int, torch.Tensor]) -> None:
        """Take the averages that were saved."""
        for i, average in state.items():
            self.averages[i].copy_(average)

    @torch.no_grad()
    def _copy(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self.parameters, values, strict=True):
            weight.copy_(value)


@dataclass
class TrainingModel:
    """What Megatron's schedules and checkpoints work on."""

    chunks: list[Any]  # wrapped in Megatron's DDP
    optimizer: Any
    scheduler: Any  # learning rate and weight decay
    config: Any  # TransformerConfig
    args: Namespace  # the run's, kept in checkpoints as Megatron-LM keeps its own
    averages: AveragedWeights | None = None  # for validation

    def sharded_state(self, iteration: int, *, is_loading: bool) -> dict[str, Any]:
        """The state that Megatron's distributed checkpointing saves, or its form to load into."""
        # 0.16.1's distributed optimizer re-shards to another data-parallel size in this format.
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
        }
        model = self.chunks[0].module.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading, metadata=metadata)
        state = {
            "model": model,
            "optimizer": optimizer,
            "opt_param_scheduler": self.scheduler.state_dict(),
            "iteration": iteration,
            "args": self.args,
        }
        if self.averages is not None:
            state["averages"] = self.averages.sharded_state(model)
        return state

    def load_state(self, state: dict[str, Any]) -> int:
        """Take a loaded state; returns its iteration."""
        self.chunks[0].module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])
        if self.averages is not None:
            self.averages.load_state(state["averages"])
        return int(state["iteration"])


def padded_vocab_size(vocab_size: int, divisor: int, tensor_parallel_size: int) -> int:
    """Vocabulary padded as Megatron-LM pads it: each shard is a multiple of the divisor."""
    multiple = divisor * tensor_parallel_size
    return (vocab_size + multiple - 1) // multiple * multiple


def build_model(args: Namespace, vocab_size: int) -> TrainingModel:
    """Build model, optimizer and schedule from the trainer's arguments."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    config = _transformer_config(args)
    args.padded_vocab_size = padded_vocab_size(
        vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size
    )
    args.bias_gelu_fusion = config.bias_activation_fusion  # its GELU is an approximation
    module = build_gpt(args, config)
    if torch.cuda.is_available():
        module.cuda(torch.cuda.current_device())
    if args.bf16:
        from megatron.core.transformer.module import Float16Module

        module = Float16Module(config, module)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=args.overlap_grad_reduce,
        use_distributed_optimizer=args.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # such a step is skipped instead, see below
    )
    chunk = DistributedDataParallel(config, ddp_config, module)
    chunk.broadcast_params()
    optimizer, scheduler = _optimizer(args, chunk)
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    config.no_sync_func = chunk.no_sync
    averages = None
    if args.eval_ema_decay is not None:
        averages = AveragedWeights([chunk], args.eval_ema_decay)
    return TrainingModel([chunk], optimizer, scheduler, config, args, averages)


def _transformer_config(args: Namespace) -> Any:
    from megatron.core.transformer import TransformerConfig

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=args.init_method_std,
        # Initial weights drawn on the CPU do not depend on the tensor-parallel size.
        use_cpu_initialization=args.use_cpu_initialization or not on_gpu,
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        sequence_parallel=args.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=args.bf16,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        recompute_granularity="full" if args.recompute_activations else None,
        recompute_method="uniform" if args.recompute_activations else None,
        recompute_num_layers=1 if args.recompute_activations else None,
    )


def build_gpt(args: Namespace, config: Any, **rotary: Any) -> torch.nn.Module:
    """This rank's part of a GPT, its weights not loaded yet.

    Args:
        args: with Megatron-LM's names; ``padded_vocab_size`` and ``transformer_impl`` among them.
        config: Megatron's TransformerConfig.
        rotary: what ``GPTModel`` takes on rotary embeddings, if not its defaults.
    """
    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )

    if args.transformer_impl == "transformer_engine":
        layer_spec = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    else:
        layer_spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm, normalization=config.normalization
        )
    module = GPTModel(
        config=config,
        transformer_layer_spec=layer_spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        **rotary,
    )
    module.model_type = ModelType.encoder_or_decoder
    return module


def _skip_updates_that_are_not_finite(optimizer: Any) -> None:
    """Make ``step`` leave the weights alone when the gradient norm is NaN or Inf.

    Without a loss scaler Megatron would clip by that norm and so end the model for good. The norm
    is the same on every rank, so all of them skip.
    """
    get_grad_norm, apply_update = optimizer.get_grad_norm, optimizer.step_with_ready_grads
    norm = 0.0

    def remembered_norm() -> float:
        nonlocal norm
        norm = get_grad_norm()
        return norm

    def step_with_ready_grads() -> bool:
        return bool(math.isfinite(norm) and apply_update())

    optimizer.get_grad_norm = remembered_norm
    optimizer.step_with_ready_grads = step_with_ready_grads


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def check_transformer_impl(args: Namespace) -> None:
    """Fill in the number format and the layers that fit this machine.

    Raises:
        ValueError: for layers whose package is not installed.
    """
    on_gpu, has_te = torch.cuda.is_available(), _is_installed("transformer_engine")
    if args.bf16 is None:
        args.bf16 = on_gpu
    if args.transformer_impl is None:
        args.transformer_impl = "transformer_engine" if has_te and on_gpu else "local"
    if args.transformer_impl == "transformer_engine" and not has_te:
        raise ValueError(
            "--transformer-impl transformer_engine needs the package transformer-engine, which is "
            "not installed; use --transformer-impl local"
        )


def check_installation(args: Namespace) -> None:
    """Fill in the defaults that depend on what is installed, and refuse what needs more.

    Raises:
        ValueError: naming the flag and the package that it needs.
    """
    check_transformer_impl(args)
    has_te, has_apex = map(_is_installed, ("transformer_engine", "apex"))
    if args.sequence_parallel and not (has_te or has_apex):
        raise ValueError(
            "--sequence-parallel needs the norms of transformer-engine or apex, neither of which "
            "is installed; remove the flag"
        )
    if args.use_distributed_optimizer and (args.save or args.load) and not (has_te or has_apex):
        raise ValueError(
            "--use-distributed-optimizer with --save or --load needs the fused Adam of "
            "transformer-engine or apex: Megatron-Core cannot restore torch's under it; remove "
            "--use-distributed-optimizer, or the checkpoints"
        )


def _optimizer(args: Namespace, chunk: torch.nn.Module) -> tuple[Any, Any]:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=args.lr,
            min_lr=args.min_lr,
            weight_decay=args.weight_decay,
            adam_beta1=args.adam_beta1,
            adam_beta2=args.adam_beta2,
            adam_eps=args.adam_eps,
            clip_grad=args.clip_grad,
            bf16=args.bf16,
            params_dtype=torch.bfloat16 if args.bf16 else torch.float32,
            use_distributed_optimizer=args.use_distributed_optimizer,
        ),
        [chunk],
    )
    _skip_updates_that_are_not_finite(optimizer)
    # Megatron counts the schedule in samples.
    steps = args.train_samples
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=int(args.lr_warmup_fraction * steps),
        lr_decay_steps=steps,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
    return optimizer, scheduler
