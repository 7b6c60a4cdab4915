"""Two nodes for real: examples/train.sh in two network namespaces, tensor parallel in each node.

A node is a network namespace of its own with a virtual cable between them; where those cannot be
made, two torchruns meet on localhost. Megatron-LM as host needs MEGATRON_LM_PATH.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Corpus
from running import Running

STEPS = 12
CHECKOUT = os.environ.get("MEGATRON_LM_PATH")
HOSTS = ("our trainer", "Megatron-LM")

JOB = """\
arguments:
  num-layers: 4
  hidden-size: 32
  num-attention-heads: 4
  seq-length: 64
  max-position-embeddings: 64
  micro-batch-size: 2
  global-batch-size: 16
  lr: 1.0e-3
  min-lr: 1.0e-4
  lr-decay-style: cosine
  seed: 7
  train-iters: 12
  tensor-model-parallel-size: 2
  distributed-timeout-minutes: 1
  split: "90,10,0"
  num-workers: 1
  eval-interval: 1000
  eval-iters: 1
  log-interval: 1
  save-interval: 4
megatron_lm:
  transformer-impl: local
  no-persist-layer-norm: true
  no-masked-softmax-fusion: true
  no-gradient-accumulation-fusion: true
  no-bias-gelu-fusion: true
  no-bias-dropout-fusion: true
  no-rope-fusion: true
  attention-dropout: 0
  hidden-dropout: 0
  no-create-attention-mask-in-dataloader: true
  distributed-backend: gloo
  exit-signal-handler: true
"""
# A node that is gone is noticed, and another awaited, in seconds.
_PATIENCE = "keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2,join_timeout=90"


class Nodes:
    """Two places to start a torchrun in, and how they reach each other."""

    def __init__(self, prefixes: list[list[str]], addresses: list[str], interfaces: list[str]):
        self.prefixes, self.addresses, self.interfaces = prefixes, addresses, interfaces

    def environment(self, node: int) -> dict[str, str]:
        return {
            "PET_LOCAL_ADDR": self.addresses[node],
            # Both have the name of this machine, by which torchrun would know the first.
            "PET_RDZV_CONF": f"{_PATIENCE},is_host={'false' if node else 'true'}",
            "GLOO_SOCKET_IFNAME": self.interfaces[node],
        }


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    names = [f"acodm{os.getpid()}{side}" for side in "ab"]
    links = [f"ac{os.getpid() % 100000}{side}" for side in "ab"]
    commands = [["netns", "add", name] for name in names]
    commands += [["link", "add", links[0], "netns", names[0], "type", "veth"]]
    commands[-1] += ["peer", "name", links[1], "netns", names[1]]
    addresses = ["10.77.0.1", "10.77.0.2"]
    for name, link, address in zip(names, links, addresses, strict=True):
        commands += [["-n", name, "addr", "add", f"{address}/24", "dev", link]]
        commands += [["-n", name, "link", "set", device, "up"] for device in (link, "lo")]
    try:
        for command in commands:
            subprocess.run(["ip", *command], check=True, capture_output=True)
        yield Nodes([["ip", "netns", "exec", name] for name in names], addresses, links)
    except (OSError, subprocess.CalledProcessError):
        yield Nodes([[], []], ["localhost"] * 2, ["lo"] * 2)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


Start = Callable[..., Running]


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest) -> str:
    if request.param == "Megatron-LM" and CHECKOUT is None:
        pytest.skip("MEGATRON_LM_PATH names no checkout of Megatron-LM")
    return str(request.param)


@pytest.fixture(scope="module")
def start(
    host: str,
    nodes: Nodes,
    corpus: Corpus,
    learning: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Start]:
    """Start examples/train.sh on a node, with its output in a folder."""
    folder = tmp_path_factory.mktemp("job")
    job = folder / "job.yaml"
    job.write_text(Path(learning).read_text(encoding="utf-8") + JOB, encoding="utf-8")
    runs: list[Running] = []

    def run(node: int, output: Path, *, meet: int, **environment: Any) -> Running:
        script = ["bash", str(REPOSITORY / "examples" / "train.sh"), str(job)]
        settings = {
            "PYTHON": sys.executable,
            "NODE0": f"{nodes.addresses[0]}:{meet}",
            "NODES": "2",
            "PROCESSES": "2",
            **nodes.environment(node),
            **{name: str(value) for name, value in environment.items()},
            "MEGATRON_LM_PATH": str(CHECKOUT) if host == "Megatron-LM" else "",
        }
        runs.append(
            Running(
                [*nodes.prefixes[node], *script, str(corpus.manifest.parent), str(output)],
                output / "run",
                folder / f"log{len(runs)}.txt",
                settings,
            )
        )
        return runs[-1]

    yield run
    for running in runs:
        running.close()


@pytest.fixture
def meet() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The steps of a run of all four ranks on one node."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = int(free.getsockname()[1])
    run = start(0, tmp_path_factory.mktemp("undisturbed"), meet=port, NODES=1, PROCESSES=4)
    assert run.wait() == 0, run.output
    assert [line["iteration"] for line in run.steps] == list(range(1, STEPS + 1))
    return run.steps


def _messages(run: Running) -> list[str]:
    return re.findall(r"(?m)^error: rank \d+: .*$", run.output)


def test_two_nodes_train_as_one_does(
    start: Start, undisturbed: list[dict[str, Any]], tmp_path: Path, meet: int
) -> None:
    runs = [start(node, tmp_path, meet=meet) for node in (0, 1)]
    for run in runs:
        assert run.wait() == 0, run.output
    assert runs[0].steps == undisturbed
    rewards = [domain["reward"] for domain in undisturbed[-1]["domains"].values()]
    assert None not in rewards and len(set(rewards)) == 3


def test_a_lost_node_ends_the_other_with_one_message(
    start: Start, tmp_path: Path, meet: int
) -> None:
    runs = [start(node, tmp_path, meet=meet) for node in (0, 1)]
    runs[0].wait_for_step(5)
    runs[1].lose()
    assert runs[0].wait() != 0
    (message,) = _messages(runs[0])
    assert "another rank is gone, or did not answer within 1 minutes" in message
    saved = (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text("utf-8")
    assert f"with --load {tmp_path}/checkpoints, goes on after step {saved}" in message
    assert int(saved) >= 4


def test_a_lost_node_that_comes_back_changes_nothing(
    start: Start, undisturbed: list[dict[str, Any]], tmp_path: Path, meet: int
) -> None:
    runs = [start(node, tmp_path, meet=meet, RESTARTS=2) for node in (0, 1)]
    runs[0].wait_for_step(6)
    runs[1].lose()
    runs.append(start(1, tmp_path, meet=meet, RESTARTS=2))
    for run in (runs[0], runs[2]):
        assert run.wait() == 0, run.output
    assert len(_messages(runs[0])) == 1
    assert runs[0].steps == undisturbed


def test_a_run_for_one_or_two_nodes_goes_on_with_one(
    start: Start, undisturbed: list[dict[str, Any]], tmp_path: Path, meet: int
) -> None:
    runs = [start(node, tmp_path, meet=meet, NODES="1:2", RESTARTS=2) for node in (0, 1)]
    runs[0].wait_for_step(6)
    runs[1].lose()
    assert runs[0].wait() == 0, runs[0].output
    assert [line["iteration"] for line in runs[0].steps] == list(range(1, STEPS + 1))
    for alone, both in zip(runs[0].steps, undisturbed, strict=True):
        assert alone["lm_loss"] == pytest.approx(both["lm_loss"], rel=1e-4)
        for name, domain in both["domains"].items():
            assert alone["domains"][name]["samples"] == domain["samples"]
    info = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert info["train_iters"] == STEPS
