"""One YAML file holds a job: the mixture's settings and the arguments of the script."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import Corpus, Train

from megatron_acodm import launch, train
from megatron_acodm.arguments import build_parser
from megatron_acodm.config import AcodmConfig
from megatron_acodm.job_file import config_file, read_arguments
from megatron_acodm.megatron.hosts.manifests import expand_manifests

JOB = """\
mixing: {policy: uniform}
arguments:
  num-layers: 4
  hidden_size: 32
  num-attention-heads: 4
  seq-length: 64
  micro-batch-size: 2
  global-batch-size: 16
  lr: 1e-3
  min-lr: 1.0e-4
  data-path: [0.5, a, 0.5, b]
  train-iters: 2
  overlap-grad-reduce: true
  save:
megatron_lm: {swiglu: true}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(JOB, encoding="utf-8")
    return path


def test_the_trainer_takes_its_section_and_the_command_line_wins(job: Path) -> None:
    words = ["--acodm-config", str(job), "--run-dir", "r", "--train-iters", "7"]
    args = train._parse(build_parser(), words)
    assert (args.num_layers, args.hidden_size, args.lr, args.min_lr) == (4, 32, 1e-3, 1e-4)
    assert args.data_path == ["0.5", "a", "0.5", "b"]
    assert args.train_iters == 7
    assert args.overlap_grad_reduce and not args.sequence_parallel and args.save is None
    assert AcodmConfig.from_yaml(job).mixing.policy == "uniform"


def test_a_script_of_megatron_lm_takes_both_sections(job: Path) -> None:
    args = launch.build_parser().parse_args(["--acodm-config", str(job)])
    words = launch._script_arguments(args, ["--num-layers", "6"])
    assert words[:2] == ["--num-layers", "4"] and words[-2:] == ["--num-layers", "6"]
    assert "--swiglu" in words and "--sequence-parallel" not in words
    without = launch.build_parser().parse_args([])
    assert launch._script_arguments(without, ["--num-layers", "6"]) == ["--num-layers", "6"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arguments: [1]", r"arguments must be a mapping, not \[1\]"),
        ("arguments: {lr: {a: 1}}", r"arguments: lr is \{'a': 1\}; give a value"),
        ("arguments: {bf16: false}", r"bf16 is false, .* \(often no-bf16: true\)"),
        ("arguments: {", "is not valid YAML"),
    ],
)
def test_other_contents_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read_arguments(path, ["arguments"])
    assert str(path) in str(caught.value)


def test_the_config_is_found_however_it_is_given() -> None:
    assert config_file(["--lr", "1", "--acodm-config", "a"]) == "a"
    assert config_file(["--acodm-config=b", "--lr", "1"]) == "b"
    assert config_file(["--acodm-config"]) is None
    assert config_file(["--lr", "1"]) is None


def test_a_missing_job_file_ends_both_ranks_with_one_message(train: Train) -> None:
    run = train("--train-iters", "2", "--acodm-config", "no/such.yaml", processes=2)
    assert run.code != 0
    assert len(re.findall(r"error: rank \d+: cannot read the config no/such", run.output)) == 1


def test_a_manifest_stands_for_its_datasets_and_tokenizer(corpus: Corpus) -> None:
    manifest = str(corpus.manifest)
    words = expand_manifests(["--lr", "1", "--data-path", manifest, "--seed", "3"])
    end = words.index("--seed")
    assert words[:3] == ["--lr", "1", "--data-path"] and len(words[3:end]) == 3
    assert all(Path(f"{prefix}.bin").is_file() for prefix in words[3:end])
    tokenizer = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "256"]
    assert words[end:] == ["--seed", "3", *tokenizer]
    given = ["--tokenizer-type", "X", "--valid-data-path", manifest]
    assert expand_manifests(given)[:3] == given[:3]
    assert "NullTokenizer" not in expand_manifests(given)
    assert expand_manifests(["--load", manifest]) == ["--load", manifest]
    joined = expand_manifests(["--tokenizer-type=X", f"--data-path={manifest}"])
    assert joined[:2] == ["--tokenizer-type=X", "--data-path"] and len(joined) == 5
    overridden = expand_manifests(["--data-path", "no/manifest.json", "--data-path", "1.0", "a"])
    assert overridden == ["--data-path", "1.0", "a"]
