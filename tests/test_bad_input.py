"""Every bad input ends in one clear message with the value, the limit and the remedy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ENVIRONMENT, REPOSITORY, TINY_MODEL, Corpus, Train

from megatron_acodm.arguments import acodm_config, build_parser, check_arguments, check_batch
from megatron_acodm.config import AcodmConfig

BASE = [*TINY_MODEL, "--train-iters", "2", "--run-dir", "unused", "--data-path", "unused"]


def _check(*arguments: str, world_size: int = 1) -> None:
    args = build_parser().parse_args([*BASE, *arguments])
    check_arguments(args)
    check_batch(args, world_size)
    acodm_config(args)


@pytest.mark.parametrize(
    ("arguments", "world_size", "message"),
    [
        (("--global-batch-size", "15"), 1, "global batch size 15 is not a multiple of"),
        (("--global-batch-size", "6"), 2, r"2 x 2 = 4; the next that fits is 8"),
        (("--micro-batch-size", "0"), 1, "--micro-batch-size is 0; it must be at least 1"),
        (("--hidden-size", "30"), 1, "--hidden-size 30 is not a multiple of --num-attention-heads"),
        (("--tensor-model-parallel-size", "3"), 3, "--num-attention-heads 4 is not a multiple"),
        (("--pipeline-model-parallel-size", "3"), 3, "--num-layers 4 is not a multiple"),
        (("--sequence-parallel",), 1, "--sequence-parallel needs --tensor-model-parallel-size"),
        (("--min-lr", "1"), 1, "--min-lr is 1.0, above --lr 0.001"),
        (("--num-workers", "-1"), 1, "--num-workers is -1"),
        (("--max-position-embeddings", "8"), 1, "--max-position-embeddings is 8, below"),
        (("--seed", "-1"), 1, "--seed is -1; it must not be negative"),
        (("--lr-warmup-fraction", "1.0"), 1, r"fraction is 1.0; it must lie in \[0, 1\)"),
        (("--make-vocab-size-divisible-by", "0"), 1, "divisible-by is 0; it must be at least 1"),
        (("--split", "abc"), 1, "--split is 'abc'; give up to three shares"),
        (("--ffn-hidden-size", "33", "--tensor-model-parallel-size", "2"), 2, "33 is not a mult"),
        (("--exit-interval", "5"), 1, "--exit-interval saves before it stops"),
        (("--acodm-decision-lag", "-1"), 1, r"decision_lag is -1; it must lie in \[0, 64\]"),
        (("--acodm-depths", "1.5"), 1, r"depths holds 1.5; a depth lies in \(0, 1\]"),
        (("--acodm-kind", "fc3"), 1, "'fc3'; the kinds are fc1, fc2, qkv, proj"),
        (("--acodm-max-weight", "1.5"), 1, r"max_weight is 1.5; it must lie in \[0, 1\]"),
        (("--acodm-save-policy", "p", "--acodm-policy", "odm"), 1, "for policy 'acodm', not 'odm'"),
        (
            ("--acodm-save-policy", "p", "--acodm-policy", "none"),
            1,
            "for policy 'acodm', not 'none'",
        ),
        (("--acodm-load-policy", "p"), 1, "policy_file is for policy 'frozen', not 'acodm'"),
        (("--acodm-config", "no_such.yaml"), 1, "cannot read the config no_such.yaml"),
    ],
)
def test_bad_flags(arguments: tuple[str, ...], world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _check(*arguments, world_size=world_size)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixing: {polcy: acodm}", "unknown key mixing.polcy; the keys here are .*policy"),
        ("mixing: {policy: magic}", "'magic'; the policies are acodm, static, uniform"),
        ("mixing: {agent: {gamma: 2}}", "agent.gamma is 2"),
        (
            "mixing: {agent: {reward: luck}}",
            "agent.reward is .luck.; the rewards are alignment, loss",
        ),
        ("mixing: {weights: {a: 1}}", "mixing.weights is for policy 'static', not 'acodm'"),
        ("mixing: [1, 2]", "mixing. must be a mapping"),
        (
            "mixing: {agent: {gamma: high}}",
            "mixing.agent.gamma is 'high'; it must be of type float",
        ),
        ("mixing: {agent: {replay_batch_size: 2.5}}", "replay_batch_size is 2.5; .* type int"),
        ("mixing: {policy: static, weights: {a: x}}", "mixing.weights.a is 'x'; .* float"),
        ("mixing: {agent: {replay_batch_size: .inf}}", "replay_batch_size is inf; .* type int"),
        ("mixing: {collapse_steps: .nan}", "mixing.collapse_steps is nan; .* type int"),
        ("blending: {decision_lag: true}", "decision_lag is True; it must be of type int"),
        ("mixing: {", "not valid YAML"),
    ],
)
def test_bad_config_files_name_the_file_and_the_key(
    tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        AcodmConfig.from_yaml(path)
    assert str(path) in str(caught.value)


def test_config_file_and_flags_add_up(tmp_path: Path) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(
        "mixing: {policy: uniform, agent: {gamma: 0.5}}\nalignment: {depths: [0.5]}\n",
        encoding="utf-8",
    )
    args = build_parser().parse_args([*BASE, "--acodm-config", str(path)])
    config = acodm_config(args)
    assert config is not None
    assert (config.mixing.policy, config.mixing.agent.gamma) == ("uniform", 0.5)
    assert config.alignment.depths == (0.5,)
    assert AcodmConfig.from_dict(config.to_dict()) == config
    args = build_parser().parse_args(
        [*BASE, "--acodm-config", str(path), "--acodm-policy", "acodm"]
    )
    overridden = acodm_config(args)
    assert overridden is not None and overridden.mixing.policy == "acodm"


def test_an_unknown_flag_ends_every_rank_with_one_message() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += ["-m", "megatron_acodm.train", *BASE, "--no-such-flag"]
    result = subprocess.run(
        command, env=ENVIRONMENT, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert result.returncode != 0
    assert result.stderr.count("unrecognized arguments: --no-such-flag") == 1


@pytest.mark.parametrize("error_file", [None, ""])  # torchrun sets the second with no logs
def test_without_a_file_of_torchruns_every_failure_speaks(
    tmp_path: Path, error_file: str | None
) -> None:
    environment = {**ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    if error_file is not None:
        environment["TORCHELASTIC_ERROR_FILE"] = error_file
    command = [sys.executable, "-c", "from megatron_acodm.door import fail; fail('error: boom')"]
    for _ in range(2):
        result = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert (result.returncode, result.stderr) == (1, "error: boom\n")
    assert not any(tmp_path.iterdir())


def _edit_manifest(corpus: Corpus, folder: Path, keep: int) -> Path:
    shutil.copytree(corpus.manifest.parent, folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["domains"] = manifest["domains"][:keep]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return path


def test_a_single_domain_leaves_nothing_to_decide(
    train: Train, corpus: Corpus, tmp_path: Path
) -> None:
    manifest = _edit_manifest(corpus, tmp_path / "data", keep=1)
    run = train("--train-iters", "2", data=(str(manifest),))
    assert run.code != 0
    assert re.search(r"error: rank 0: .*1 domain.*at least 2.*static", run.output), run.output
    assert "Traceback" not in run.output


def test_a_domain_of_less_than_a_sequence_ends_both_ranks(train: Train, corpus: Corpus) -> None:
    run = train(
        *("--train-iters", "2", "--seq-length", "200000", "--tensor-model-parallel-size", "2"),
        processes=2,
    )
    assert run.code != 0
    assert len(re.findall(r"error: rank \d+: domain .* has no training sequence", run.output)) == 1
    assert "--seq-length" in run.output


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (("no/such/manifest.json",), "no/such/manifest.json"),
        (("0.5", "no/such/prefix", "0.5", "other"), r"no/such/prefix.idx does not exist"),
    ],
)
def test_missing_data_is_named(train: Train, data: tuple[str, ...], message: str) -> None:
    run = train(
        "--train-iters", "2", "--tokenizer-type", "ByteLevelTokenizer", data=data
    )  # fmt: skip
    assert run.code != 0
    assert re.search(f"error: rank 0: .*{message}", run.output), run.output
    assert "Traceback" not in run.output


def test_a_missing_tokenizer_file_is_named(train: Train) -> None:
    run = train(
        *("--train-iters", "2", "--tokenizer-type", "SentencePieceTokenizer"),
        *("--tokenizer-model", "no/such/tokenizer.model"),
    )
    assert run.code != 0
    assert re.search(r"error: rank 0: .*no/such/tokenizer.model", run.output), run.output
    assert "Traceback" not in run.output


def test_processes_that_do_not_fit_the_layout_are_refused(train: Train) -> None:
    run = train("--train-iters", "2", "--tensor-model-parallel-size", "2")
    assert run.code != 0
    assert "1 processes cannot be split into model replicas of 2" in run.output
