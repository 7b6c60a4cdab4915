"""The whole loop in real processes: it trains, in every layout alike, and follows its ledger."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import Run, Train

LAYOUTS = {
    "one process": (1, []),
    "tensor parallel": (2, ["--tensor-model-parallel-size", "2"]),
    "data parallel": (2, []),
    "pipeline parallel": (2, ["--pipeline-model-parallel-size", "2"]),
    "distributed optimizer": (2, ["--use-distributed-optimizer", "--overlap-grad-reduce"]),
}
STEPS = 8


@pytest.fixture(scope="module")
def runs(train: Train, learning: str) -> dict[str, Run]:
    """One short run a layout, all from the same seed."""
    finished = {}
    for name, (processes, arguments) in LAYOUTS.items():
        finished[name] = train(
            *("--train-iters", str(STEPS), "--eval-interval", str(STEPS), "--eval-iters", "1"),
            # Sketches of other shards have other errors; exact rewards are those of any layout.
            *("--acodm-config", learning, "--acodm-estimator", "exact", *arguments),
            processes=processes,
        )
        assert finished[name].code == 0, finished[name].output
    return finished


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_step_is_recorded_with_weights_on_the_simplex(
    runs: dict[str, Run], layout: str
) -> None:
    steps = runs[layout].steps
    assert [line["iteration"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        domains = line["domains"]
        assert len(domains) == 3
        assert math.isclose(sum(d["weight"] for d in domains.values()), 1.0, abs_tol=1e-9)
        assert sum(d["samples"] for d in domains.values()) == 16
        assert line["consumed_samples"] == 16 * line["iteration"]
        assert 0 < line["mixing_time_s"] < line["step_time_s"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_follow_the_weights_within_a_granule(runs: dict[str, Run], layout: str) -> None:
    steps = runs[layout].steps
    wanted = np.cumsum([[d["weight"] * 16 for d in s["domains"].values()] for s in steps], axis=0)
    drawn = np.cumsum([[d["samples"] for d in s["domains"].values()] for s in steps], axis=0)
    assert np.abs(wanted - drawn).max() <= 2  # a granule is a micro-batch of 2 sequences


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_and_validation_loss_fall(runs: dict[str, Run], layout: str) -> None:
    first, last = runs[layout].validations[0], runs[layout].validations[-1]
    assert last["iteration"] == STEPS
    assert len(last["validation"]) == 3
    for name, loss in last["validation"].items():
        assert loss < first["validation"][name]
    assert runs[layout].steps[-1]["lm_loss"] < runs[layout].steps[0]["lm_loss"]


@pytest.mark.parametrize("layout", ["tensor parallel", "data parallel", "distributed optimizer"])
def test_losses_rewards_and_decisions_do_not_depend_on_the_layout(
    runs: dict[str, Run], layout: str
) -> None:
    for alone, split in zip(runs["one process"].steps[:5], runs[layout].steps[:5], strict=True):
        assert split["lm_loss"] == pytest.approx(alone["lm_loss"], rel=1e-4)
        for name, domain in alone["domains"].items():
            other = split["domains"][name]
            assert other["samples"] == domain["samples"]
            for key in ("weight", "loss", "reward"):
                if domain[key] is None:
                    assert other[key] is None
                else:
                    assert other[key] == pytest.approx(domain[key], rel=1e-4)


def test_rewards_are_measured(runs: dict[str, Run]) -> None:
    rewards = [d["reward"] for d in runs["one process"].steps[-1]["domains"].values()]
    assert all(reward is not None and math.isfinite(reward) for reward in rewards)
    assert len(set(rewards)) == 3


def test_the_run_ends_with_a_table_of_its_domains(runs: dict[str, Run]) -> None:
    output = runs["one process"].output
    for name in runs["one process"].steps[0]["domains"]:
        assert name in output


@pytest.mark.parametrize("policy", ["static", "uniform", "none"])
def test_other_policies_train(train: Train, policy: str) -> None:
    run = train(*("--train-iters", "3", "--eval-interval", "0", "--acodm-policy", policy))
    assert run.code == 0, run.output
    assert [line["iteration"] for line in run.steps] == [1, 2, 3]
    for line in run.steps:
        assert math.isfinite(line["lm_loss"])
        if policy == "uniform":
            assert all(d["weight"] == pytest.approx(1 / 3) for d in line["domains"].values())
        if policy == "static":
            assert len({d["weight"] for d in line["domains"].values()}) == 3


def test_loading_workers_wait_for_decisions_and_load_the_same_samples(
    train: Train, learning: str
) -> None:
    arguments = ("--train-iters", "5", "--eval-interval", "0", "--acodm-config", learning)
    inline = train(*arguments, "--acodm-decision-lag", "0")
    workers = train(*arguments, "--acodm-decision-lag", "0", "--num-workers", "2")
    assert inline.code == 0 and workers.code == 0, inline.output + workers.output
    # Without a lag, workers must wait for each stage.
    for alone, loaded in zip(inline.steps, workers.steps, strict=True):
        assert alone["lm_loss"] == loaded["lm_loss"]
        assert alone["domains"] == loaded["domains"]
