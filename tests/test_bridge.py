"""Megatron-Bridge's own ``pretrain`` under a policy: the installed package, on the CPU.

Without it the runs are skipped. What of it is replaced while it is imported says
``bridge_pretrain.py``.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ENVIRONMENT, REPOSITORY, Corpus
from running import Running
from test_launch import Trained, _domain_of

from megatron_acodm import AcodmConfig, bridge
from megatron_acodm.config import MixingConfig
from megatron_acodm.megatron.compat import UnsupportedHostError
from megatron_acodm.megatron.hosts import megatron_bridge
from megatron_acodm.megatron.hosts.refusals import unsupported

SCRIPT = REPOSITORY / "tests" / "bridge_pretrain.py"
STEPS = 6


# Without Megatron-Bridge ----------------------------------------------------------------------


def _container(**changes: Any) -> SimpleNamespace:
    container = SimpleNamespace(
        train=SimpleNamespace(train_iters=6, global_batch_size=16, micro_batch_size=2,
                              rampup_batch_size=None, skip_train=False),
        model=SimpleNamespace(expert_model_parallel_size=1, cuda_graph_impl="none", seq_length=64),
        dataset=SimpleNamespace(dataloader_type="single", random_seed=7, mock=False),
        ddp=SimpleNamespace(overlap_param_gather=True, use_megatron_fsdp=False),
        dist=SimpleNamespace(use_torch_fsdp2=False),
        checkpoint=SimpleNamespace(save=None, load=None, ckpt_format="torch_dist"),
    )  # fmt: skip
    for path, value in changes.items():
        section, name = path.split("__")
        setattr(getattr(container, section), name, value)
    return container


def test_a_container_is_read_by_megatrons_names() -> None:
    progress = SimpleNamespace(step=3, consumed_train_samples=48)
    args = megatron_bridge.arguments(_container(train__rampup_batch_size=[4, 4, 16]), progress)
    assert (args.iteration, args.curr_iteration, args.consumed_train_samples) == (3, 3, 48)
    shape = megatron_bridge.run_shape(args)
    assert (shape.train_iters, shape.seed, shape.rampup_batch_size) == (6, 7, (4, 4, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"dataset__dataloader_type": "cyclic"}, "use dataset.dataloader_type single"),
        ({"dataset__mock": True}, "dataset.mock is True: mock data has no domains; give dataset."),
        ({"model__expert_model_parallel_size": 2}, "model.expert_model_parallel_size is 2"),
        ({"model__cuda_graph_impl": "local"}, "use model.cuda_graph_impl none"),
        ({"dist__use_torch_fsdp2": True}, "dist.use_torch_fsdp2 is True"),
        ({"checkpoint__ckpt_format": "zarr"}, "use checkpoint.ckpt_format torch_dist"),
        ({"checkpoint__save": "msc://x"}, "checkpoint.save must be a folder"),
        ({"train__skip_train": True}, "train.skip_train is True"),
    ],
)
def test_refusals_name_the_containers_fields(changes: dict[str, Any], message: str | None) -> None:
    args = megatron_bridge.arguments(_container(**changes), None)
    found = unsupported(args, AcodmConfig(), megatron_bridge._name)
    assert (not found) if message is None else message in found[0]


def test_a_call_without_the_package_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedHostError, match="install megatron-bridge"):
        bridge.prepare(AcodmConfig())
    bridge.prepare(None)


def test_only_an_agent_can_be_saved() -> None:
    uniform = AcodmConfig(mixing=MixingConfig(policy="uniform"))
    with pytest.raises(ValueError, match="save_policy is for policy 'acodm', not 'uniform'"):
        bridge.prepare(uniform, save_policy="agent")


# With it --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed() -> None:
    """Skips what needs the package where it cannot be imported, saying why."""
    try:
        from megatron.bridge.package_info import __version__  # noqa: F401
    except ImportError as error:
        if "megatron.bridge" in str(error):
            pytest.skip("megatron-bridge is not installed")
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], env=ENVIRONMENT, capture_output=True, text=True
    )
    if result.returncode != 0:
        pytest.skip(f"megatron-bridge: {result.stderr.strip().splitlines()[-1]}")


class Pretrain:
    """Runs the script on the corpus."""

    def __init__(self, corpus: Corpus, config: str, folder: Path) -> None:
        domains = json.loads(corpus.manifest.read_text(encoding="utf-8"))["domains"]
        self._prefixes = [str(corpus.manifest.parent / domain["prefix"]) for domain in domains]
        self._config, self._folder, self._count = config, folder, 0

    def __call__(
        self,
        *settings: str,
        processes: int = 1,
        mixed: bool = True,
        environment: dict[str, str] | None = None,
        run_dir: Path | None = None,
    ) -> Trained:
        self._count += 1
        run_dir = run_dir or self._folder / f"run{self._count}"
        command, own = self._command(processes, settings, run_dir if mixed else None)
        result = subprocess.run(
            command,
            env={**ENVIRONMENT, **own, **(environment or {})},
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return Trained(result.returncode, result.stdout, run_dir)

    def start(self, folder: Path, port: int, *settings: str) -> Running:
        """Begin one of two nodes of a process each, which meet on ``port``."""
        command, environment = self._command(1, settings, folder / "metrics")
        at = command.index("localhost:0")
        command[at : at + 1] = [f"localhost:{port}", "--nnodes", "2"]
        log = folder / f"log{len(list(folder.glob('log*')))}.txt"
        return Running(command, folder / "metrics", log, environment)

    def _command(
        self, processes: int, settings: Sequence[str], run_dir: Path | None
    ) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(SCRIPT)]
        command += [str(self._folder / "cache"), *self._prefixes, *settings]
        path = f"{REPOSITORY}:{os.environ.get('PYTHONPATH', '')}"
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": path}
        if run_dir is not None:
            environment |= {"ACODM_CONFIG": self._config, "RUN_DIR": str(run_dir)}
        return command, environment


@pytest.fixture(scope="module")
def pretrain(
    installed: None, corpus: Corpus, learning: str, tmp_path_factory: pytest.TempPathFactory
) -> Pretrain:
    return Pretrain(corpus, learning, tmp_path_factory.mktemp("bridge"))


@pytest.fixture(scope="module")
def undisturbed(pretrain: Pretrain, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("undisturbed")
    run = pretrain(
        f"checkpoint.save={folder}", "checkpoint.save_interval=4",
        environment={"RECORD_TO": str(folder / "tokens.jsonl")}, run_dir=folder / "metrics",
    )  # fmt: skip
    assert run.code == 0, run.output
    return run


def _saving(folder: Path) -> list[str]:
    return [f"checkpoint.save={folder}", f"checkpoint.load={folder}"]


def test_the_installed_package_has_what_is_replaced(installed: None) -> None:
    """The contract: each symbol, and each parameter that the patches go by."""
    code = (
        "import bridge_pretrain; bridge_pretrain.prepare_bridge()\n"
        "from megatron_acodm import AcodmConfig, bridge\n"
        "from megatron_acodm.megatron import compat\n"
        "paths = []\n"
        "bridge.prepare(AcodmConfig())\n"
        "host = bridge._prepared\n"
        "patched = {p: compat.host_symbol(p)[2] for p in host.replacements}\n"
        "bridge.prepare(None)\n"
        "print(all(compat.host_symbol(p)[2] is f.__wrapped__ for p, f in patched.items()))\n"
        "print(len(patched))"
    )
    path = f"{REPOSITORY}:{REPOSITORY / 'tests'}"
    result = subprocess.run(
        [sys.executable, "-c", code], env={**ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-2] == "True" and int(result.stdout.split()[-1]) >= 12


def test_what_is_trained_is_what_the_metrics_say(undisturbed: Trained, corpus: Corpus) -> None:
    texts = {name: "\0".join(docs).encode() for name, docs in corpus.texts.items()}
    tokens = undisturbed.run_dir.parent / "tokens.jsonl"
    lines = tokens.read_text(encoding="utf-8").splitlines()
    batches = [[_domain_of(row, texts) for row in json.loads(line)] for line in lines]
    assert len(batches) == STEPS * 8 and all(len(set(batch)) == 1 for batch in batches)
    for number, step in enumerate(undisturbed.steps):
        trained = Counter(name for batch in batches[8 * number :][:8] for name in batch)
        told = {name: entry["samples"] for name, entry in step["domains"].items()}
        assert {name: count for name, count in told.items() if count} == dict(trained)


def test_losses_add_up_and_the_hosts_line_shows_the_mixture(undisturbed: Trained) -> None:
    steps = [step for step in undisturbed.steps if step["iteration"] != 2]
    for step, printed in zip(steps, undisturbed.printed_losses, strict=True):
        assert step["lm_loss"] == pytest.approx(float(printed), rel=1e-5)
    assert undisturbed.output.count("| mixing (ms): ") == STEPS
    first, last = (
        [entry["weight"] for entry in step["domains"].values()]
        for step in (undisturbed.steps[0], undisturbed.steps[-1])
    )
    assert first == pytest.approx([1 / 3] * 3) and last != pytest.approx([1 / 3] * 3)


def test_a_crash_before_a_checkpoint_is_announced_resumes_bit_for_bit(
    pretrain: Pretrain, undisturbed: Trained, tmp_path: Path
) -> None:
    saving, run_dir = [*_saving(tmp_path), "checkpoint.save_interval=2"], tmp_path / "metrics"
    crashed = pretrain(*saving, environment={"CRASH_AT_SAVE": "4"}, run_dir=run_dir)
    assert crashed.code != 0
    assert (tmp_path / "iter_0000004" / "acodm").is_dir(), crashed.output
    resumed = pretrain(*saving, run_dir=run_dir)
    assert resumed.code == 0, resumed.output
    assert "from step 3 on" in resumed.output
    assert resumed.steps == undisturbed.steps
    assert not list(tmp_path.glob(".acodm*"))


def test_an_asynchronous_save_and_retention(
    pretrain: Pretrain, undisturbed: Trained, tmp_path: Path
) -> None:
    saving, run_dir = _saving(tmp_path), tmp_path / "metrics"
    first = pretrain(
        *saving, "checkpoint.save_interval=4", "train.exit_interval=4",
        environment={"ASYNC": "1"}, run_dir=run_dir,
    )  # fmt: skip
    assert first.code == 0, first.output
    assert (tmp_path / "iter_0000004" / "acodm").is_dir()
    resumed = pretrain(*saving, "checkpoint.most_recent_k=1", run_dir=run_dir)
    assert resumed.code == 0, resumed.output
    assert resumed.steps == undisturbed.steps
    assert [path.name for path in tmp_path.glob("iter_*")] == ["iter_0000006"]


def test_our_checkpoints_load_without_us_and_plain_ones_with_us(
    pretrain: Pretrain, undisturbed: Trained, tmp_path: Path
) -> None:
    ours = undisturbed.run_dir.parent
    load = f"checkpoint.load={ours}"
    plain = pretrain(load, "checkpoint.ckpt_step=4", f"checkpoint.save={tmp_path}", mixed=False)
    assert plain.code == 0, plain.output
    assert len(plain.printed_losses) == 2
    resumed = pretrain(
        f"checkpoint.load={tmp_path}", "train.train_iters=8",
        "scheduler.override_opt_param_scheduler=true",  # which else refuses a longer run
    )  # fmt: skip
    assert resumed.code == 0, resumed.output
    assert [step["iteration"] for step in resumed.steps] == [7, 8]


@pytest.mark.parametrize(
    "layout",
    [
        ("model.tensor_model_parallel_size=2",),
        ("model.pipeline_model_parallel_size=2", "model.virtual_pipeline_model_parallel_size=2"),
        ("ddp.use_distributed_optimizer=true", "ddp.overlap_grad_reduce=true"),
        (
            "ddp.use_distributed_optimizer=true",
            "ddp.overlap_grad_reduce=true",
            "ddp.overlap_param_gather=true",
        ),
    ],
    ids=["tensor", "virtual pipeline", "data, distributed optimizer", "data, gathered late"],
)
def test_layouts_of_two_processes(
    pretrain: Pretrain, undisturbed: Trained, layout: tuple[str, ...]
) -> None:
    run = pretrain(*layout, processes=2)
    assert run.code == 0, run.output
    steps = [step for step in run.steps if step["iteration"] != 2]
    for step, printed in zip(steps, run.printed_losses, strict=True):
        assert step["lm_loss"] == pytest.approx(float(printed), rel=1e-5)
    drawn = [[e["samples"] for e in step["domains"].values()] for step in run.steps[:2]]
    assert drawn == [
        [e["samples"] for e in step["domains"].values()] for step in undisturbed.steps[:2]
    ]
    assert all(entry["reward"] is not None for entry in run.steps[-1]["domains"].values())


def test_what_does_not_work_is_refused_before_the_model_is_built(pretrain: Pretrain) -> None:
    run = pretrain("dataset.dataloader_type=cyclic", "model.pipeline_model_parallel_size=2",
                   "dist.use_decentralized_pg=true", "dist.use_gloo_process_groups=false",
                   processes=2)  # fmt: skip
    assert run.code != 0
    assert "dataset.dataloader_type is 'cyclic'" in run.output
    assert "dist.use_decentralized_pg must be False" in run.output
    assert "number of parameters" not in run.output


def test_a_lost_node_ends_the_other_with_one_message(pretrain: Pretrain, tmp_path: Path) -> None:
    """On one node torchrun's SIGTERM would be faster: this version never heeds it."""
    settings = [*_saving(tmp_path), "checkpoint.save_interval=3"]
    settings += ["train.train_iters=400", "scheduler.lr_decay_iters=400"]
    with socket.socket() as free:
        free.bind(("", 0))
        port = int(free.getsockname()[1])
    nodes = [pretrain.start(tmp_path, port, *settings)]
    try:
        _wait_for_listener(port)  # it holds torchrun's store, without which the other would end
        nodes.append(pretrain.start(tmp_path, port, *settings))
        nodes[0].wait_for_step(5)
        nodes[1].lose()
        assert nodes[0].wait(90) != 0
    finally:
        for node in nodes:
            node.close()
    messages = re.findall(r"(?m)^error: rank \d+: .*$", nodes[0].output)
    assert len(messages) == 1, nodes[0].output
    assert re.search("another rank is gone, or did not answer", messages[0]), messages
    assert re.search(r"goes on after step \d+$", messages[0]), messages


def _wait_for_listener(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as client:
            if client.connect_ex(("localhost", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"nothing listens at {port}")


def test_the_container_is_what_a_run_is_told_by() -> None:
    """Every name that the shared loop and the records ask for is one that a container has."""
    known = dict(megatron_bridge._every_path())
    asked = ("train_iters", "save", "load", "seq_length", "global_batch_size", "micro_batch_size",
             "seed", "lr", "num_layers", "hidden_size", "num_attention_heads", "tensorboard_dir",
             "tensorboard_log_interval", "async_save")  # fmt: skip
    assert set(asked) <= known.keys()
