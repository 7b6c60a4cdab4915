"""What a step measures equals a float64 reference, and the host does not notice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from host import SEQUENCE, forward_backward, micro_batches, tiny_model

import megatron_acodm
from megatron_acodm import AcodmConfig, Mixer, RunShape
from megatron_acodm.config import AlignmentConfig, MixingConfig
from megatron_acodm.megatron.measurement import _loss_and_tokens
from megatron_acodm.megatron.model import TrainingModel
from megatron_acodm.megatron.parameters import WeightProbe, _is_part, select_parameters

CONFIG = AlignmentConfig(estimator="exact", depths=(0.5, 1.0), num_probes=3)
RUN = RunShape(train_iters=10, global_batch_size=12, micro_batch_size=2)
SHARE = np.array([2, 1, 3, 0]) / 6  # domain 3 is not drawn
BATCHES = micro_batches(6, seed=3)


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    yield
    megatron_acodm.unpatch()


# Far more numbers than the gradients have: what is left is that two weights share some of them.
SKETCH = dataclasses.replace(CONFIG, estimator="sketch", sketch_size=1 << 20)


def _mixer(model: TrainingModel, config: AlignmentConfig = CONFIG) -> Mixer:
    mixer = megatron_acodm.patch(AcodmConfig(alignment=config), RUN)
    assert mixer is not None
    mixer.bind(["a", "b", "c", "d"], [10] * 4, [2, 1, 3, 0], [None], [0] * 4)
    mixer.attach(model.chunks)
    return mixer


def _measure(
    model: TrainingModel,
    batches: list[torch.Tensor] = BATCHES,
    runs: int = 1,
    config: AlignmentConfig = CONFIG,
) -> Any:
    """Statistics of one whole step of the patched host."""
    mixer = _mixer(model, config)
    with mixer.step(1, 0) as step:
        for _ in range(runs):
            forward_backward(model, batches)
        model.optimizer.step()
    statistics = step.report().statistics
    megatron_acodm.unpatch()
    return statistics


def _reference(model: TrainingModel) -> tuple[np.ndarray, np.ndarray]:
    """Mean gradients ``[4, P]`` and losses ``[4]`` by domain, by plain autograd."""
    by_sequence = _mixer(model).micro_batch_domains(0)
    assert (by_sequence == by_sequence[:, :1]).all()
    domains = by_sequence[:, 0].tolist()
    megatron_acodm.unpatch()
    assert sorted(domains) == [0, 0, 1, 2, 2, 2]
    module = model.chunks[0].module
    layers = getattr(module, "module", module).decoder.layers  # bf16 adds a wrapper
    weights = [layers[i].mlp.linear_fc2.weight for i in (1, 3)]
    gradients = np.zeros((4, sum(weight.numel() for weight in weights)))
    losses = np.zeros(4)
    for domain, text in zip(domains, BATCHES, strict=True):
        positions = torch.arange(SEQUENCE).expand(2, -1)
        loss = module(text[:, :-1], positions, None, labels=text[:, 1:]).mean()
        parts = torch.autograd.grad(loss, weights)
        flat = torch.cat([part.flatten() for part in parts]).double().numpy()
        gradients[domain] += flat / domains.count(domain)
        losses[domain] += loss.item() / domains.count(domain)
    return gradients, losses


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--overlap-grad-reduce",),
        ("--recompute-activations",),
        ("--use-distributed-optimizer",),
    ],
    ids=["plain", "overlapped reduction", "activation recompute", "distributed optimizer"],
)
def test_alignment_and_losses_equal_the_float64_reference(arguments: tuple[str, ...]) -> None:
    model = tiny_model(*arguments)
    gradients, losses = _reference(tiny_model())
    statistics = _measure(model)
    gram = gradients @ gradients.T
    expected = [sum(SHARE[j] * gram[i, j] for j in range(4) if j != i) for i in range(3)]
    scale = np.abs(gram).max()
    np.testing.assert_allclose(statistics.alignment[:3], expected, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(statistics.grad_sq_norm[:3], np.diag(gram)[:3], rtol=1e-4)
    # A first step's gradients are the averages already, but for a domain's own.
    others = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(
        statistics.affinity[:3, :3][others], gram[:3, :3][others], rtol=1e-4, atol=1e-5 * scale
    )
    assert np.diag(statistics.affinity)[:3].tolist() == [0.0] * 3
    assert (statistics.affinity[:3, 3] == 0.0).all() and np.isnan(statistics.affinity[3]).all()
    np.testing.assert_allclose(statistics.loss[:3], losses[:3], rtol=1e-5)
    assert statistics.tokens.tolist() == [64, 32, 96, 0]
    for values in (statistics.alignment, statistics.grad_sq_norm, statistics.loss):
        assert np.isnan(values[3])


def test_bfloat16_gradients_agree_to_their_precision() -> None:
    model = tiny_model("--bf16")
    gradients, _ = _reference(tiny_model("--bf16"))
    statistics = _measure(model)
    gram = gradients @ gradients.T
    expected = [sum(SHARE[j] * gram[i, j] for j in range(4) if j != i) for i in range(3)]
    np.testing.assert_allclose(statistics.alignment[:3], expected, atol=0.01 * np.abs(gram).max())
    np.testing.assert_allclose(statistics.grad_sq_norm[:3], np.diag(gram)[:3], rtol=0.02)


def test_the_loss_scale_and_per_token_losses_do_not_change_the_scores() -> None:
    plain = _measure(tiny_model())
    scaled_model = tiny_model()
    scaled_model.config.grad_scale_func = lambda loss: loss * 1024.0
    scaled = _measure(scaled_model)
    token_model = tiny_model()
    token_model.config.calculate_per_token_loss = True
    per_token = _measure(token_model)
    for other in (scaled, per_token):
        np.testing.assert_allclose(other.alignment, plain.alignment, rtol=1e-4)
        np.testing.assert_allclose(other.grad_sq_norm, plain.grad_sq_norm, rtol=1e-4)
        np.testing.assert_allclose(other.affinity, plain.affinity, rtol=1e-4)


def test_fused_gradient_accumulation_is_read_from_the_growth_of_main_grad() -> None:
    plain = _measure(tiny_model())
    model = tiny_model()
    for selected in select_parameters(model.chunks, 4, CONFIG):
        _fuse_accumulation(selected.parameter)
    fused = _measure(model)
    np.testing.assert_allclose(fused.alignment, plain.alignment, rtol=1e-3)
    np.testing.assert_allclose(fused.loss, plain.loss)


def test_a_sketch_measures_what_the_gradients_do() -> None:
    plain = _measure(tiny_model())
    model = tiny_model()
    for selected in select_parameters(model.chunks, 4, SKETCH):
        _fuse_accumulation(selected.parameter)
    scale = np.nanmax(plain.grad_sq_norm)
    for sketched in (_measure(tiny_model(), config=SKETCH), _measure(model, config=SKETCH)):
        np.testing.assert_allclose(sketched.alignment, plain.alignment, atol=0.01 * scale)
        np.testing.assert_allclose(sketched.grad_sq_norm, plain.grad_sq_norm, rtol=0.01)


def test_a_sketch_of_the_usual_size_ranks_domains_as_their_gradients_do() -> None:
    plain = _measure(tiny_model())
    config = dataclasses.replace(CONFIG, estimator="sketch")
    sketched = _measure(tiny_model(), config=config)
    assert np.argsort(sketched.alignment[:3]).tolist() == np.argsort(plain.alignment[:3]).tolist()


def test_parameters_are_selected_by_megatrons_names() -> None:
    model = tiny_model()

    def names(*patterns: str) -> list[str]:
        config = dataclasses.replace(CONFIG, parameters=patterns)
        return [selected.name for selected in select_parameters(model.chunks, 4, config)]

    assert names("*.layers.[13].mlp.linear_fc2.weight") == [
        "decoder.layers.1.mlp.linear_fc2.weight",
        "decoder.layers.3.mlp.linear_fc2.weight",
    ]
    assert len(names("decoder.layers.*.self_attention.*.weight", "*layers.0.*")) == 4 * 2 + 10
    by_kind = [selected.name for selected in select_parameters(model.chunks, 4, CONFIG)]
    assert by_kind == names("*.layers.[13].mlp.linear_fc2.weight")
    module = model.chunks[0].module
    known = dict(getattr(module, "module", module).named_parameters())
    assert set(names("*")) <= set(known)


def test_weights_selected_by_name_measure_like_those_selected_by_depth() -> None:
    patterns = ("decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.3.mlp.linear_fc2.weight")
    by_name = _measure(tiny_model(), config=dataclasses.replace(CONFIG, parameters=patterns))
    np.testing.assert_array_equal(by_name.alignment, _measure(tiny_model()).alignment)


def test_every_parameter_of_the_layers_can_be_measured() -> None:
    statistics = _measure(tiny_model(), config=dataclasses.replace(CONFIG, parameters=("*",)))
    assert np.isfinite(statistics.alignment[:3]).all()
    assert np.all(statistics.grad_sq_norm[:3] > _measure(tiny_model()).grad_sq_norm[:3])


def test_a_pattern_that_matches_nothing_lists_what_there_is() -> None:
    config = dataclasses.replace(CONFIG, parameters=("*.linear_fc2.weight", "*.fc9"))
    message = r"'\*.fc9' matches no parameter; with N from 0 to 3 .*layers.N.mlp.linear_fc1.weight"
    with pytest.raises(ValueError, match=message):
        select_parameters(tiny_model().chunks, 4, config)


@pytest.fixture
def tensor_parallel(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int, int], None]:
    """Lets Megatron say that this is one of several tensor-parallel ranks."""
    from megatron.core import parallel_state

    def pretend(rank: int, size: int, expert_size: int) -> None:
        for name, value in {
            "get_tensor_model_parallel_rank": rank,
            "get_tensor_model_parallel_world_size": size,
            "get_expert_tensor_parallel_world_size": expert_size,
        }.items():
            monkeypatch.setattr(parallel_state, name, lambda value=value: value)

    return pretend


def _model_with(path: str, **attributes: Any) -> tuple[TrainingModel, torch.nn.Linear]:
    """A model whose first layer has another linear layer, with attributes of its weight."""
    model, added = tiny_model(), torch.nn.Linear(4, 4, bias=False)
    parent, _, name = path.rpartition(".")
    module: torch.nn.Module = model.chunks[0].module.decoder.layers[0].get_submodule(parent)
    module.add_module(name, added)
    for attribute, value in attributes.items():
        setattr(added.weight, attribute, value)
    return model, added


def _contributed(model: TrainingModel, pattern: str) -> list[str]:
    config = dataclasses.replace(CONFIG, parameters=(pattern,))
    return [selected.name for selected in select_parameters(model.chunks, 4, config)]


def test_norms_of_the_heads_of_tensor_parallel_ranks_are_refused(
    tensor_parallel: Callable[[int, int, int], None],
) -> None:
    model, _ = _model_with("self_attention.k_layernorm")
    assert len(_contributed(model, "*.k_layernorm.weight")) == 1
    tensor_parallel(0, 2, 2)
    with pytest.raises(ValueError, match=r"0.*k_layernorm.*with the attention heads; select"):
        _contributed(model, "*.k_layernorm.weight")


@pytest.mark.parametrize(("size", "expert_size"), [(2, 1), (1, 2)])
def test_experts_that_other_ranks_share_than_the_rest_are_refused(
    size: int, expert_size: int, tensor_parallel: Callable[[int, int, int], None]
) -> None:
    model, added = _model_with("mlp.experts", tensor_model_parallel=True)
    added.parallel_mode = None  # type: ignore[assignment]  # TransformerEngine's
    for rank in range(2):  # each has a part
        tensor_parallel(rank, 2, 2)
        assert len(_contributed(model, "*.experts.weight")) == 1
    tensor_parallel(0, size, expert_size)
    message = rf"experts, which {expert_size} tensor-parallel ranks share where {size}.*select"
    with pytest.raises(ValueError, match=message):
        _contributed(model, "*.experts.weight")


def test_a_linear_layer_that_every_tensor_parallel_rank_has_counts_once(
    tensor_parallel: Callable[[int, int, int], None],
) -> None:
    model, added = _model_with("self_attention.linear_kv_down_proj", tensor_model_parallel=True)
    added.parallel_mode = None  # type: ignore[assignment]  # TransformerEngine's
    for rank in range(2):
        tensor_parallel(rank, 2, 2)
        assert len(_contributed(model, "*.linear_kv_down_proj.weight")) == 1 - rank
    added.weight.sequence_parallel = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"kv_down_proj.*under sequence parallelism; select"):
        _contributed(model, "*.linear_kv_down_proj.weight")


def _fuse_accumulation(parameter: Any) -> None:
    """Do what a fused weight-gradient GEMM does: add to main_grad, hand on a dummy gradient."""

    def fused(grad: torch.Tensor) -> torch.Tensor:
        parameter.main_grad.add_(grad)
        parameter.grad_added_to_main_grad = True
        return torch.full_like(grad, float("nan"))

    parameter.register_hook(fused)


def test_all_products_of_the_mean_gradients_are_there_when_asked_for() -> None:
    gradients, _ = _reference(tiny_model())
    asked = dataclasses.replace(CONFIG, gram_interval=1)
    gram = _measure(tiny_model(), config=asked).gram
    expected = gradients @ gradients.T
    np.testing.assert_allclose(
        gram[:3, :3], expected[:3, :3], rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )
    assert np.isnan(gram[3]).all() and np.isnan(gram[:, 3]).all()
    for interval in (0, 2):  # the step measured is the first
        config = dataclasses.replace(CONFIG, gram_interval=interval)
        assert _measure(tiny_model(), config=config).gram is None


def test_probes_see_the_weights_and_their_change() -> None:
    model = tiny_model()
    weights = [model.chunks[0].module.decoder.layers[i].mlp.linear_fc2.weight for i in (0, 2, 3)]
    before = [weight.detach().clone().double() for weight in weights]
    statistics = _measure(model)
    for index, (old, new) in enumerate(zip(before, weights, strict=True)):
        norm = new.detach().double().square().mean().sqrt()
        change = (new.detach().double() - old).square().mean().sqrt()
        assert statistics.weight_norm[index] == pytest.approx(norm.item(), rel=1e-6)
        assert statistics.weight_delta_norm[index] == pytest.approx(change.item(), rel=1e-5)


class _Experts(torch.nn.Module):
    """An MLP without a dense second layer, as in a mixture of experts."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.inner = mlp

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def _mixture_of_experts() -> TrainingModel:
    model = tiny_model()
    for layer in model.chunks[0].module.decoder.layers:
        layer.mlp = _Experts(layer.mlp)
    return model


@pytest.mark.parametrize("policy", ["uniform", "static", "odm", "ado", "pike"])
def test_policies_that_need_no_weight_norms_train_models_without_a_dense_fc2(policy: str) -> None:
    alignment = AlignmentConfig(parameters=("*.linear_proj.weight",), sketch_size=64)
    config = AcodmConfig(mixing=MixingConfig(policy=policy), alignment=alignment)
    mixer = megatron_acodm.patch(config, RUN)
    assert mixer is not None
    mixer.bind(["a", "b", "c"], [100] * 3, None, [None], [0] * 3)
    model = _mixture_of_experts()
    mixer.attach(model.chunks)
    with mixer.step(1, 0) as step:
        forward_backward(model, BATCHES)
        model.optimizer.step()
    statistics = step.report().statistics
    assert len(statistics.weight_norm) == len(statistics.weight_delta_norm) == 0
    assert np.isfinite(statistics.loss).all()
    if policy != "pike":  # losses, tokens and shares; no gradients, no probes
        assert statistics.reduced_bytes == 4 * 3 * 3 + 8 * (5 * 3 + 1)


def test_the_agent_is_refused_where_its_weight_norms_cannot_be_measured() -> None:
    by_name = dataclasses.replace(CONFIG, parameters=("*.linear_proj.weight",))
    with pytest.raises(ValueError, match="layer 1 has no dense weight mlp.linear_fc2.weight"):
        _mixer(_mixture_of_experts(), by_name)


@pytest.mark.parametrize("partition_dim", [0, 1])
def test_probes_of_the_parts_of_a_weight_add_up(partition_dim: int) -> None:
    weight = torch.nn.Parameter(torch.randn(200, 150))
    weight.partition_dim = partition_dim  # type: ignore[attr-defined]
    parts = (range(12_345), range(12_345, 30_000), range(30_000, 30_000))
    probes = [WeightProbe(0, weight, part) for part in (None, *parts)]
    for probe in probes:
        probe.before_update()
    with torch.no_grad():
        weight.add_(torch.randn_like(weight))
    whole, *measured = (probe.after_update() for probe in probes)
    assert 0 < measured[0][2] < whole[2] < weight.numel()
    assert measured[2].tolist() == [0.0] * 3
    torch.testing.assert_close(sum(measured), whole)


class _Quantised(torch.Tensor):
    """A weight that says it lies in another's storage."""


def test_only_weights_that_lie_in_the_buffer_as_they_are_count_as_its_part() -> None:
    storage = torch.zeros(64)
    buffer, weight = storage[16:48], storage[20:36].view(4, 4)
    assert _is_part(weight, buffer)
    assert not _is_part(weight, None)
    assert not _is_part(weight.clone(), buffer)
    assert not _is_part(weight.as_subclass(_Quantised), buffer)
    assert not _is_part(weight.view(torch.int32), buffer)
    assert not _is_part(storage[8:24], buffer) and not _is_part(storage[40:56], buffer)


def test_measuring_does_not_change_the_training_step() -> None:
    plain, measured = tiny_model(), tiny_model()
    forward_backward(plain, BATCHES)
    plain.optimizer.step()
    _measure(measured)
    for left, right in zip(
        plain.chunks[0].parameters(), measured.chunks[0].parameters(), strict=True
    ):
        assert torch.equal(left, right)
    untouched = tiny_model().chunks[0].parameters()
    assert not all(map(torch.equal, untouched, measured.chunks[0].parameters()))


def test_a_gradient_that_is_not_finite_leaves_the_weights_alone() -> None:
    model = tiny_model()
    before = [parameter.clone() for parameter in model.chunks[0].parameters()]
    forward_backward(model, BATCHES)
    next(model.chunks[0].parameters()).main_grad[0, 0] = float("inf")
    succeeded, norm, _ = model.optimizer.step()
    assert not succeeded and not np.isfinite(norm)
    assert all(map(torch.equal, before, model.chunks[0].parameters()))
    forward_backward(model, BATCHES)
    assert model.optimizer.step()[0]
    assert not all(map(torch.equal, before, model.chunks[0].parameters()))


def test_a_step_that_the_host_runs_twice_is_measured_once() -> None:
    once = _measure(tiny_model())
    repeated = _measure(tiny_model(), runs=2)
    np.testing.assert_array_equal(repeated.alignment, once.alignment)
    np.testing.assert_array_equal(repeated.tokens, once.tokens)


def test_a_wrong_number_of_micro_batches_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="5 micro-batches a step on this rank, 6 were planned"):
        _measure(tiny_model(), BATCHES[:5])


def test_a_layer_without_the_wanted_weight_is_named() -> None:
    model = tiny_model()
    layer = model.chunks[0].module.decoder.layers[3]
    del layer.mlp.linear_fc2
    with pytest.raises(ValueError, match=r"layer 4 has no dense weight mlp.linear_fc2.*fc1, qkv"):
        select_parameters(model.chunks, 4, CONFIG)


def test_a_ledger_that_differs_from_rank_0s_ends_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    mixer = _mixer(model)

    def broadcast_of_another_ledger(message: torch.Tensor, src: int, group: Any) -> None:
        message[-1] += 1

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast_of_another_ledger)
    with mixer.step(1, 0) as step:
        forward_backward(model, BATCHES)
        model.optimizer.step()
    with pytest.raises(RuntimeError, match="ledger of rank 0 differs"):
        step.report()
    with pytest.raises(RuntimeError, match="ledger of rank 0 differs"), mixer.step(2, 12):
        forward_backward(model, BATCHES)


def test_a_step_at_another_sample_than_the_ledgers_is_refused() -> None:
    mixer = _mixer(tiny_model())
    message = "a step starts at sample 10, the ledger's at 0 and 12"
    with pytest.raises(RuntimeError, match=message), mixer.step(2, 10):
        pass


def test_forwards_of_other_chunks_of_a_virtual_pipeline_store_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    config = AcodmConfig(mixing=MixingConfig(policy="uniform"), alignment=CONFIG)
    mixer = megatron_acodm.patch(config, RUN)
    assert mixer is not None
    mixer.bind(["a", "b", "c"], [10] * 3, None, [None], [0] * 3)
    mixer.attach(model.chunks)
    measurement = mixer.measurement
    assert measurement is not None
    losses = [torch.tensor([float(10 + i), 32.0]) for i in range(6)]
    with mixer.step(1, 0) as step:
        started_over: list[None] = []
        monkeypatch.setattr(measurement.estimator, "begin_step", lambda: started_over.append(None))
        store: list[Any] = []
        for loss in losses:
            measurement.on_forward(store, 6)  # of the first chunk
            store.append({"lm loss": loss})
            measurement.on_forward(store, 6)  # of the last
            measurement.on_forward(store, 6)  # of the first again
        model.config.finalize_model_grads_func(model.chunks)
    assert not started_over  # or the gradients so far would be lost
    domains = mixer.micro_batch_domains(0)[:, 0]
    statistics = step.report().statistics
    for domain in range(3):
        own = [loss[0] for loss, other in zip(losses, domains, strict=True) if other == domain]
        assert statistics.loss[domain] == pytest.approx(np.mean(own) / 32)
    assert statistics.tokens.sum() == 6 * 32


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"lm loss": torch.tensor([90.0, 30.0])}, [90, 30]),
        ({"lm loss": (90.0, 30)}, [90, 30]),
        ({"lm loss": torch.tensor([90.0, 30.0]), "other": torch.tensor(1.0)}, [90, 30]),
        ({"loss": torch.tensor(3.0)}, [3, 1]),
        (torch.tensor(3.0), [3, 1]),
        (3.0, [3, 1]),
    ],
)
def test_loss_reports_of_the_hosts_there_are(report: Any, expected: list[float]) -> None:
    assert _loss_and_tokens(report).tolist() == expected


@pytest.mark.parametrize(
    "report",
    [
        {"lm loss": torch.ones(4)},
        torch.ones(3),
        {"load balancing loss": torch.tensor(0.1), "loss": torch.tensor(3.0)},
        {},
        None,
    ],
)
def test_other_loss_reports_are_refused(report: Any) -> None:
    with pytest.raises(ValueError, match="report {'lm loss': .loss sum, tokens.}"):
        _loss_and_tokens(report)


def test_a_broken_off_step_can_be_taken_again() -> None:
    model = tiny_model()
    mixer = _mixer(model)
    with pytest.raises(KeyError), mixer.step(1, 0):
        forward_backward(model, BATCHES)
        raise KeyError
    forward_backward(model, BATCHES[:2])  # not a step of the mixer's
    with mixer.step(1, 0) as step:
        forward_backward(model, BATCHES)
        model.optimizer.step()
    np.testing.assert_array_equal(
        step.report().statistics.alignment, _unpatched_measure(tiny_model()).alignment
    )


def _unpatched_measure(model: TrainingModel) -> Any:
    megatron_acodm.unpatch()
    return _measure(model)


@pytest.mark.parametrize(
    ("break_layout", "message"),
    [
        ("experts", "expert parallelism of size 2 is not supported"),
        ("fsdp", "under Megatron's DistributedDataParallel only"),
        ("other weights gathered", "--overlap-param-gather is not supported with these weights"),
        ("no ddp", "the model is wrapped in GPTModel"),
    ],
)
def test_layouts_that_cannot_be_measured_are_refused_at_set_up(
    break_layout: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import parallel_state

    model = tiny_model()
    chunks = model.chunks
    if break_layout == "experts":
        size = "get_expert_model_parallel_world_size"
        monkeypatch.setattr(parallel_state, size, lambda: 2)
    elif break_layout == "fsdp":
        chunks[0].ddp_config.use_megatron_fsdp = True
    elif break_layout == "other weights gathered":  # as with weights in eight bits
        chunks[0].ddp_config.overlap_param_gather = True
        for bucket in chunks[0].bucket_groups[0].buckets:
            bucket.param_data = bucket.grad_data.clone()
    else:
        chunks = [chunks[0].module]
    mixer = megatron_acodm.patch(AcodmConfig(alignment=CONFIG), RUN)
    assert mixer is not None
    mixer.bind(["a", "b", "c", "d"], [10] * 4, [2, 1, 3, 0], [None], [0] * 4)
    with pytest.raises(ValueError, match=message):
        mixer.attach(chunks)


def test_a_loss_that_is_not_finite_is_its_domains_alone() -> None:
    model = tiny_model()
    mixer = _mixer(model)
    measurement = mixer.measurement
    assert measurement is not None
    on_forward, calls = measurement.on_forward, 0

    def on_forward_with_a_nan(store: list[Any], count: int) -> None:
        nonlocal calls
        if calls == 0:
            store[-1]["lm loss"] = store[-1]["lm loss"] * torch.tensor([float("nan"), 1.0])
        calls += 1
        on_forward(store, count)

    measurement.on_forward = on_forward_with_a_nan  # type: ignore[method-assign]
    struck = mixer.micro_batch_domains(0)[0, 0]
    with mixer.step(1, 0) as step:
        forward_backward(model, BATCHES)
    losses = step.report().statistics.loss
    assert np.isnan(losses).tolist() == [domain in (struck, 3) for domain in range(4)]
    assert step.report().statistics.tokens.tolist() == [64, 32, 96, 0]
