"""Shared fixtures: a small real corpus in Megatron's format, and training runs in processes."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# A busy machine is no fault, and a run that fails can be had again.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite is the CPU's; see tools/ for GPU checks
REPOSITORY = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

TINY_MODEL = [
    *("--num-layers", "4", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--seq-length", "64", "--micro-batch-size", "2", "--global-batch-size", "16"),
    *("--lr", "1e-3", "--min-lr", "1e-4", "--num-workers", "0", "--log-interval", "1"),
    *("--make-vocab-size-divisible-by", "256"),
]


def _texts() -> dict[str, list[str]]:
    """Real text of three kinds that every Python installation has."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    modules = sorted(stdlib.glob("*.py"))[:40]
    metadata = sorted(Path(sysconfig.get_paths()["purelib"]).glob("*/METADATA"))[:30]
    return {
        "Python Code": [path.read_text(encoding="utf-8")[:4000] for path in modules],
        "Documentation (topics)": [text[:4000] for text in pydoc_data.topics.topics.values()][:40],
        "Package Metadata": [path.read_text(encoding="utf-8")[:2000] for path in metadata],
    }


@pytest.fixture(autouse=True)
def _keep_signals() -> Iterator[None]:
    """Tools that run in this process set handlers of their own."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a small input span many chunks and blocks, as a large one does."""
    monkeypatch.setattr("megatron_acodm.preprocess.reader.CHUNK_BYTES", 5000)
    monkeypatch.setattr("megatron_acodm.preprocess.reader._BLOCK_BYTES", 700)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Real documents and awkward ones, by domain."""
    from preprocessing import make_texts  # not above: it imports torch, before GPUs are hidden

    return make_texts()


@dataclass(frozen=True)
class Corpus:
    """The preprocessed corpus and the text it was made of."""

    manifest: Path
    texts: dict[str, list[str]]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Three domains of real text, tokenized to bytes by the real preprocessing tool."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = _texts()
    records = [
        {"text": text, "meta": {"pile_set_name": name}}
        for name, documents in texts.items()
        for text in documents
    ]
    records.sort(
        key=lambda record: zlib.crc32(record["text"].encode())
    )  # domains mixed, as real ones
    source = folder / "corpus.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    command = [sys.executable, str(REPOSITORY / "tools" / "preprocess_pile.py"), "--input", source]
    command += ["--output-dir", folder / "data", "--workers", "1"]
    command += ["--tokenizer-type", "ByteLevelTokenizer"]
    subprocess.run(list(map(str, command)), check=True, env=ENVIRONMENT, capture_output=True)
    return Corpus(folder / "data" / "manifest.json", texts)


@dataclass(frozen=True)
class Run:
    """A finished training process (or group of them)."""

    code: int
    output: str
    directory: Path

    @property
    def lines(self) -> list[dict[str, Any]]:
        text = (self.directory / "metrics.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "lm_loss" in line]

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "validation" in line]


Train = Callable[..., Run]


@pytest.fixture(scope="session")
def learning(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config under which the agent learns and explores from the third step on."""
    path = tmp_path_factory.mktemp("config") / "learning.yaml"
    path.write_text(
        "mixing:\n  policy: acodm\n  initial_weights: uniform\n  agent: {replay_batch_size: 2, "
        "exploration_fraction: 1.0, actor_lr: 0.01, reward_smoothing: 0.5}\n",
        encoding="utf-8",
    )
    return str(path)


@pytest.fixture(scope="session")
def train(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Run ``megatron_acodm.train``, or a script, on the corpus in ``processes`` real processes."""

    def run(
        *arguments: str,
        processes: int = 1,
        directory: Path | None = None,
        data: tuple[str, ...] | None = None,
        script: Path | None = None,
        timeout: float = 240,
    ) -> Run:
        directory = directory or tmp_path_factory.mktemp("run")
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        program = ["-m", "megatron_acodm.train"] if script is None else [str(script)]
        command = [*launcher, *program, *TINY_MODEL]
        command += ["--run-dir", str(directory), "--data-path", *(data or (str(corpus.manifest),))]
        command += [*arguments]
        result = subprocess.run(
            command,
            env=ENVIRONMENT,
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return Run(result.returncode, result.stdout, directory)

    return run
