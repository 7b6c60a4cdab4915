"""Parameters chosen by name, in real processes of other layouts."""

from __future__ import annotations

import pytest
from conftest import Run, Train

STEPS = 2
# Weights that tensor parallelism cuts, and norms and biases of which every rank has a copy.
BY_NAME = ("--acodm-parameters", "decoder.layers.[02].*", "*.linear_fc2.*")
SHORT = ("--train-iters", str(STEPS), "--eval-interval", "0")


def rewards(run: Run) -> list[float]:
    assert run.code == 0, run.output
    assert len(run.steps) == STEPS
    return [d["reward"] for step in run.steps for d in step["domains"].values()]


def test_copies_of_a_parameter_on_tensor_parallel_ranks_count_once(train: Train) -> None:
    exact = (*SHORT, *BY_NAME, "--acodm-estimator", "exact")
    alone = train(*exact)
    split = train(*exact, "--tensor-model-parallel-size", "2", processes=2)
    assert rewards(split) == pytest.approx(rewards(alone), rel=1e-3)


def test_a_pattern_is_matched_against_the_parameters_of_every_pipeline_stage(train: Train) -> None:
    layout = (*SHORT, "--pipeline-model-parallel-size", "2")
    last = train(
        *(*layout, "--acodm-parameters", "decoder.layers.3.mlp.linear_fc2.weight"), processes=2
    )
    assert all(reward is not None for reward in rewards(last))
    beyond = train(*layout, "--acodm-parameters", "decoder.layers.4.*", processes=2)
    assert beyond.code != 0
    assert "'decoder.layers.4.*' matches no parameter; with N from 0 to 3" in beyond.output
