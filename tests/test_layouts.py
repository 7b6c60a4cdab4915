"""Scores and losses equal a float64 reference in every parallel layout, in real processes."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ENVIRONMENT
from host import start_megatron
from layout_worker import SKETCH_SIZE, WEIGHTS, Case, measure
from reference_gpt import DOMAINS, Scores, reference_scores

WORKER = Path(__file__).with_name("layout_worker.py")
TIMEOUT_S = 600  # of all cases of a number of processes


def _cases() -> list[Case]:
    tp, pp, dp, cp = {"tensor": 2}, {"pipeline": 2}, {"data": 2}, {"context": 2}
    vpp = {"pipeline": 2, "virtual": 2}
    sp = {"tensor": 2, "sequence_parallel": True, "patterns": WEIGHTS}
    scaled = {"loss_scale": 1024.0}
    masked, tokens = {"masked": True}, {"masked": True, "per_token": True}
    full, selective = {"recompute": "full"}, {"recompute": "selective"}
    # With biases, Megatron-Core 0.16.1 never comes back from the backward pass of such an MLP.
    mlp = {"recompute": "mlp", "biases": False, "patterns": WEIGHTS}
    optimizer, overlap = {"distributed_optimizer": True}, {"overlap_grad_reduce": True}
    gather = {**optimizer, **overlap, "overlap_param_gather": True}
    fused, bf16 = {"fused_accumulation": True}, {"bf16": True}
    one, two = {"micro_batches": 1}, {"micro_batches": 2}
    last = {"patterns": ("decoder.layers.[23].mlp.linear_fc2.weight",)}
    layouts: dict[str, list[dict[str, Any]]] = {
        "1 process": [{}],
        "1 process, 1 micro-batch": [one],
        "1 process, 2 micro-batches": [two],
        "1 process, untied output layer": [{"untied": True}],
        "1 process, bf16": [bf16],
        "1 process, loss scale 1024": [scaled],
        "1 process, masked": [masked],
        "1 process, masked, per-token loss": [tokens],
        "1 process, bf16, loss scale 1024, masked, per-token loss": [bf16, scaled, tokens],
        "1 process, fused accumulation": [fused],
        "1 process, overlapped reduction": [overlap],
        "1 process, full recompute": [full],
        "1 process, selective recompute": [selective],
        "1 process, recompute of MLPs": [mlp],
        "TP 2": [tp],
        "TP 2, bf16, loss scale 1024": [tp, bf16, scaled],
        "TP 2, untied output layer, 2 micro-batches": [tp, two, {"untied": True}],
        "TP 2, fused accumulation": [tp, fused],
        "TP 2, sequence parallel": [sp],
        "TP 2, sequence parallel, full recompute": [sp, full],
        "TP 2, sequence parallel, selective recompute, bf16": [sp, selective, bf16],
        "TP 2, sequence parallel, masked, per-token loss": [sp, tokens],
        "PP 2": [pp],
        "PP 2, 1 micro-batch": [pp, one],
        "PP 2, untied output layer, 2 micro-batches": [pp, two, {"untied": True}],
        "PP 2, bf16, loss scale 1024": [pp, bf16, scaled],
        "PP 2, masked": [pp, masked],
        "PP 2, masked, per-token loss": [pp, tokens],
        "PP 2, full recompute": [pp, full],
        "PP 2, selected weights on the last stage": [pp, last],
        "VPP 2x2": [vpp],
        "VPP 2x2, 2 micro-batches": [vpp, two],
        "VPP 2x2, bf16, loss scale 1024": [vpp, bf16, scaled],
        "VPP 2x2, masked, per-token loss": [vpp, tokens],
        "VPP 2x2, selective recompute": [vpp, selective],
        "VPP 2x2, fused accumulation": [vpp, fused],
        "DP 2": [dp],
        "DP 2, 1 micro-batch": [dp, one],
        "DP 2, 3 micro-batches": [dp, {"micro_batches": 3}],
        "DP 2, bf16, loss scale 1024": [dp, bf16, scaled],
        "DP 2, masked": [dp, masked],
        "DP 2, masked, per-token loss, loss scale 1024": [dp, tokens, scaled],
        "DP 2, distributed optimizer": [dp, optimizer],
        "DP 2, distributed optimizer, overlapped reduction": [dp, optimizer, overlap],
        "DP 2, overlapped reduction and gathering": [dp, gather],
        "DP 2, overlapped reduction and gathering, bf16": [dp, gather, bf16],
        "DP 2, overlapped reduction, fused accumulation": [dp, overlap, fused],
        "CP 2": [cp],
        "CP 2, masked, loss scale 1024": [cp, masked, scaled],
        "CP 2, masked, per-token loss": [cp, tokens],
        "CP 2, distributed optimizer, overlapped reduction": [cp, optimizer, overlap],
        "PP 4": [{"pipeline": 4}],
        "TP 2, PP 2": [tp, pp],
        "TP 2, VPP 2x2, sequence parallel": [vpp, sp],
        "TP 2, DP 2": [tp, dp],
        "TP 2, DP 2, sequence parallel, distributed optimizer": [sp, dp, optimizer],
        "PP 2, DP 2": [pp, dp],
        "PP 2, DP 2, masked, per-token loss, 2 micro-batches": [pp, dp, tokens, two],
        "TP 2, DP 2, sequence parallel, overlapped reduction and gathering": [sp, dp, gather],
        "VPP 2x2, DP 2, overlapped reduction": [vpp, dp, overlap],
        "VPP 2x2, DP 2, overlapped reduction and gathering": [vpp, dp, gather],
        "CP 2, DP 2, masked": [cp, dp, masked],
        "TP 2, CP 2, masked, per-token loss": [tp, cp, tokens],
    }
    mixed = {"mixed": True, "patterns": WEIGHTS}
    layouts |= {
        f"mixed micro-batches, {name}": [*settings, mixed]
        for name, settings in {
            "1 process": [{}],
            "1 process, bf16, loss scale 1024": [bf16, scaled],
            "1 process, masked": [masked],
            "1 process, masked, per-token loss": [tokens],
            "1 process, full recompute": [full],
            "1 process, recompute of MLPs": [mlp],
            "TP 2": [tp],
            "TP 2, sequence parallel": [sp],
            "TP 2, sequence parallel, full recompute": [sp, full],
            "PP 2": [pp],
            "PP 2, masked, per-token loss": [pp, tokens],
            "VPP 2x2": [vpp],
            "VPP 2x2, masked": [vpp, masked],
            "DP 2": [dp],
            "DP 2, masked, per-token loss": [dp, tokens],
            "TP 2, DP 2, masked": [tp, dp, masked],
        }.items()
    }
    return [
        Case(name, **{key: value for setting in settings for key, value in setting.items()})
        for name, settings in layouts.items()
    ]


CASES = _cases()


# Relative to the largest squared gradient norm of a domain. Float32 sums in another order; bfloat16
# has 8 bits, and the reference none of its roundings. The sketches have so many numbers that those
# of different parameters hardly meet.
TOLERANCES = {
    ("exact", "fp32"): 5e-6,
    ("exact", "bf16"): 0.02,
    ("sketch", "fp32"): 1e-3,
    ("sketch", "bf16"): 0.02,
    ("captured", "fp32"): 1e-3,
    ("captured", "bf16"): 0.02,
}
LOSS_TOLERANCE = {"fp32": 1e-6, "bf16": 3e-3}

Measured = Callable[[Case], list[dict[str, Any]]]


def _run_worker(cases: list[Case], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each rank reports, by case; of a case that ended the worker, reports are missing."""
    processes = cases[0].world_size
    (folder / "cases.json").write_text(
        json.dumps([dataclasses.asdict(case) for case in cases]), encoding="utf-8"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--nproc-per-node", str(processes)]
    with open(folder / "output", "w", encoding="utf-8") as output:
        worker = subprocess.Popen(
            [*command, str(WORKER), str(folder)],
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            worker.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:  # cases that did not come to an end fail
            worker.terminate()
            worker.wait()
    reports: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            report = json.loads(line)
            reports[report["case"]].append(report)
    return reports


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What each rank reports of a case; the worker starts once for each number of processes.

    It runs the cases of the selected tests.
    """
    selected = dict.fromkeys(
        item.callspec.params["case"]
        for item in request.session.items
        if item.path == Path(__file__) and hasattr(item, "callspec")
    )

    @functools.cache
    def of_processes(processes: int) -> tuple[dict[str, list[dict[str, Any]]], Path]:
        folder = tmp_path_factory.mktemp(f"layouts_{processes}_")
        cases = [case for case in selected if case.world_size == processes]
        return _run_worker(cases, folder), folder

    @functools.cache
    def of_case(case: Case) -> list[dict[str, Any]]:
        if case.world_size == 1:
            start_megatron()
            return [measure(case)]
        reports, folder = of_processes(case.world_size)
        errors = [report["error"] for report in reports[case.name] if "error" in report]
        if len(reports[case.name]) < case.world_size:
            errors.append((folder / "output").read_text(encoding="utf-8")[-5000:])
        if errors:
            pytest.fail("\n".join(errors))
        return reports[case.name]

    return of_case


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring in a model of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _reference(case: Case, domains: tuple[int, ...]) -> Scores:
    return reference_scores(
        domains,
        case.patterns,
        context=case.context,
        masked=case.masked,
        per_token=case.per_token,
        tied=not case.untied,
        biases=case.biases,
        dtype=torch.bfloat16 if case.bf16 else torch.float32,
    )


def _case_name(value: Case | str) -> str:
    return value.name if isinstance(value, Case) else value


@pytest.mark.parametrize(
    ("case", "estimator"),
    [(case, estimator) for case in CASES for estimator in case.estimators],
    ids=_case_name,
)
def test_every_rank_reports_the_references_scores(
    case: Case, estimator: str, measured: Measured
) -> None:
    reports = measured(case)
    expected = _reference(case, tuple(reports[0]["domains"]))
    dtype = "bf16" if case.bf16 else "fp32"
    scale = np.nanmax(expected.grad_sq_norm)
    tolerance = TOLERANCES[estimator, dtype] * scale
    for report in reports:
        scores = {name: np.array(values) for name, values in report[estimator].items()}
        np.testing.assert_array_equal(scores["tokens"], expected.tokens)
        np.testing.assert_allclose(scores["loss"], expected.loss, rtol=LOSS_TOLERANCE[dtype])
        np.testing.assert_allclose(scores["alignment"], expected.alignment, rtol=0, atol=tolerance)
        for name in ("grad_sq_norm", "gram"):
            np.testing.assert_allclose(
                scores[name], getattr(expected, name), rtol=0, atol=tolerance
            )


@pytest.mark.parametrize(
    ("case", "estimator"),
    [(case, kind) for case in CASES if not case.masked for kind in case.estimators],
    ids=_case_name,
)
def test_the_averages_of_a_first_step_are_the_references_gradients(
    case: Case, estimator: str, measured: Measured
) -> None:
    reports = measured(case)
    expected = _reference(case, tuple(reports[0]["domains"]))
    unit = 1.0  # or, where the host sums over tokens, those of a sequence
    if case.per_token:
        unit = expected.tokens.sum() / case.samples
    gram = np.nan_to_num(expected.gram)  # a domain that was not drawn has no average
    tolerance = TOLERANCES[estimator, "bf16" if case.bf16 else "fp32"] * gram.max()
    for report in reports:
        actual = np.array(report[estimator]["average_gram"]) / unit**2
        np.testing.assert_allclose(actual, gram, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.data == 2 and case.micro_batches == 3], ids=_case_name
)
def test_among_the_cases_a_rank_lacks_a_domain_and_the_step_another(
    case: Case, measured: Measured
) -> None:
    first, second = (set(report["rank_domains"]) for report in measured(case))
    assert first | second == {0, 1, 2}
    assert 1 not in first or 1 not in second


@pytest.mark.parametrize("case", CASES, ids=_case_name)
def test_probes_see_the_weights_that_all_ranks_will_have(case: Case, measured: Measured) -> None:
    for report in measured(case):
        (norms, changes), expected = report["probes"], report["norms"]
        assert min(expected[1]) > 0.0
        np.testing.assert_allclose(norms, expected[0], rtol=1e-6)
        np.testing.assert_allclose(changes, expected[1], rtol=1e-5)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.overlap_param_gather], ids=_case_name
)
def test_ranks_own_what_their_optimizers_update(case: Case, measured: Measured) -> None:
    reports = measured(case)
    for report in reports:
        assert report["owned"] == report["updated"]
    assert len({json.dumps(report["owned"]) for report in reports}) > 1


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.name.startswith("DP 2, ") and case.overlap_grad_reduce],
    ids=_case_name,
)
def test_what_a_step_reduces_is_what_the_docs_say(case: Case, measured: Measured) -> None:
    probes = 4
    rows_and_losses = 4 * (DOMAINS * SKETCH_SIZE + 3 * DOMAINS)
    products = 8 * (2 * DOMAINS**2 + 5 * DOMAINS + 3 * probes + 1)  # with averages, and of all
    late = 8 * 3 * probes if case.overlap_param_gather else 0
    for report in measured(case):
        assert report["reduced_bytes"] == rows_and_losses + products + late
