"""Proxy mode in real processes: a small model's run saves its policy, a larger one is driven."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Corpus, Run, Train

STEPS = ("--train-iters", "6", "--eval-interval", "0")
LARGER = ("--num-layers", "6", "--hidden-size", "64", "--acodm-policy", "frozen")


@pytest.fixture(scope="module")
def policy(train: Train, learning: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "kept" / "proxy"
    run = train(*STEPS, "--acodm-config", learning, "--acodm-save-policy", str(path))
    assert run.code == 0, run.output
    return path


@pytest.fixture(scope="module")
def target(train: Train, policy: Path) -> Run:
    run = train(*STEPS, *LARGER, "--acodm-load-policy", str(policy), processes=2)
    assert run.code == 0, run.output
    return run


def test_the_policy_says_what_it_was_learned_in(policy: Path) -> None:
    text = policy.with_suffix(".json").read_text(encoding="utf-8")
    provenance = json.loads(text)["state"]["provenance"]
    assert provenance["iteration"] == 6
    assert provenance["num_layers"] == 4
    assert provenance["config"]["mixing"]["policy"] == "acodm"


def test_a_deeper_and_wider_model_is_driven_without_gradients(target: Run) -> None:
    assert len(target.steps) == 6
    weights = []
    for step in target.steps:
        domains = step["domains"].values()
        assert sum(d["weight"] for d in domains) == pytest.approx(1.0)
        assert all(d["reward"] is None for d in domains)
        # Losses, tokens, shares and probes: no gradient travels.
        assert step["alignment_bytes"] < 1000
        weights.append([d["weight"] for d in domains])
    assert weights[0] == weights[1]  # before anything was seen, with a lag of 1
    assert weights[2] != weights[1]


def test_a_driven_run_resumes_bit_for_bit(
    train: Train, policy: Path, target: Run, tmp_path: Path
) -> None:
    common = (*STEPS, *LARGER, "--acodm-load-policy", str(policy))
    saved = tmp_path / "checkpoints"
    first = train(*common, "--save", str(saved), "--exit-interval", "3", processes=2)
    assert first.code == 0, first.output
    directory = tmp_path / "run"
    shutil.copytree(first.directory, directory)
    rest = train(*common, "--load", str(saved), directory=directory, processes=2)
    assert rest.code == 0, rest.output
    for whole, parts in zip(target.steps, rest.steps, strict=True):
        assert parts["domains"] == whole["domains"]
        assert parts["lm_loss"] == whole["lm_loss"]


def test_a_policy_of_other_domains_is_refused(train: Train, policy: Path, corpus: Corpus) -> None:
    domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
    run = train(
        *(*STEPS, *LARGER, "--tokenizer-type", "ByteLevelTokenizer"),
        *("--acodm-load-policy", str(policy)),
        data=tuple(str(corpus.manifest.parent / domain["prefix"]) for domain in domains[:2]),
        processes=2,
    )
    assert run.code != 0
    assert "is of other domains; only there:" in run.output
