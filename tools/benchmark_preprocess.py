#!/usr/bin/env python3
"""Times tools/preprocess_pile.py against Megatron-LM's preprocess_data.py, and compares the files.

Both get the same text, uncompressed, and the same number of workers, in turns. Megatron-LM's tool
writes one dataset a run, so it gets one file a domain and its times are added up; ours splits the
domains itself, in one run. What a run takes with a single short document is its start-up, which
is also taken off: for as many runs as there were.
"""

from __future__ import annotations

import argparse
import dataclasses
import filecmp
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.preprocess.encoder import parse_record
from megatron_acodm.preprocess.manifest import Manifest
from megatron_acodm.preprocess.reader import open_inputs, read_chunks

_OUR_TOOL = Path(__file__).with_name("preprocess_pile.py")
_PACKAGES = ("megatron-acodm", "megatron-core", "numpy", "sentencepiece", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What processes took."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)

    def without(self, start_up: Cost, runs: int) -> Cost:
        """Take the start-up of some runs off."""
        return Cost(self.wall_s - runs * start_up.wall_s, self.cpu_s - runs * start_up.cpu_s)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The same documents, as both tools want them."""

    whole: Path
    by_domain: dict[str, Path]
    documents: int
    bytes: int
    """Of text, in UTF-8."""


def write_corpus(inputs: Sequence[str], folder: Path) -> Corpus:
    """Write all records to one file, and to one file a domain.

    Raises:
        ValueError: for a file or a record that cannot be read.
    """
    folder.mkdir()
    whole, by_domain, documents, size = folder / "all.jsonl", dict[str, Path](), 0, 0
    with open(whole, "wb") as all_records:
        for chunk in read_chunks(open_inputs(inputs)):
            lines: dict[str, list[bytes]] = {}
            for line in filter(bytes.strip, chunk.data.split(b"\n")):
                domain, text = parse_record(line)
                lines.setdefault(domain, []).append(line + b"\n")
                documents, size = documents + 1, size + len(text.encode())
            for domain, records in lines.items():
                file = by_domain.setdefault(domain, folder / f"{len(by_domain):04d}.jsonl")
                with open(file, "ab") as own_records:
                    own_records.writelines(records)
                all_records.writelines(records)
    if not documents:
        raise ValueError("--input holds no documents; give files with some")
    return Corpus(whole, by_domain, documents, size)


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> Cost:
    """Run a command; its CPU time is that of all its processes.

    Raises:
        ValueError: with the end of what it printed, when it fails.
    """
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            tail = output.read().decode(errors="replace")[-2000:]
            raise ValueError(f"{' '.join(command)} failed ({process.returncode}):\n{tail}")
    return Cost(wall, usage.ru_utime + usage.ru_stime)


class Tools:
    """Both tools, with the same tokenizer and number of workers.

    Args:
        args: The parsed command line.
        folder: For what they write.
    """

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self._args, self._folder = args, folder
        self._script = args.megatron / "tools" / "preprocess_data.py"
        if not self._script.is_file():
            raise ValueError(f"{self._script} does not exist; --megatron is a Megatron-LM checkout")
        self._options = ["--tokenizer-type", args.tokenizer_type, "--workers", str(args.workers)]
        self._options += ["--tokenizer-model", args.tokenizer_model]

    def megatron(self, file: Path, name: str) -> Cost:
        """Have Megatron-LM's tool write one dataset."""
        paths = [str(self._args.megatron.absolute()), os.environ.get("PYTHONPATH", "")]
        command = [self._args.python, str(self._script), "--append-eod", "--input", str(file)]
        command += ["--output-prefix", str(self._prefix(name)), *self._options]
        if self._args.tokenizer_type == "HuggingFaceTokenizer":
            command.append("--tokenizer-hf-use-fast")  # as ours does
        return run(command, os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})

    def ours(self, file: Path, name: str) -> Cost:
        """Have our tool write all datasets of a file."""
        output = self._folder / name
        shutil.rmtree(output, ignore_errors=True)
        command = [sys.executable, str(_OUR_TOOL), "--input", str(file)]
        return run([*command, "--output-dir", str(output), *self._options])

    def different_files(self, corpus: Corpus, name: str) -> list[str]:
        """Return the files of our corpus that are not byte for byte Megatron-LM's."""
        different = []
        for domain in Manifest.load(self._folder / name).domains:
            for suffix in (".bin", ".idx"):
                ours = Path(f"{domain.prefix}{suffix}")
                stem = corpus.by_domain[domain.name].stem
                theirs = Path(f"{self._prefix(stem)}_text_document{suffix}")
                if not filecmp.cmp(ours, theirs, shallow=False):
                    different.append(ours.name)
        return different

    def _prefix(self, name: str) -> Path:
        return self._folder / f"megatron_{name}"


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run both tools in turns; return the figures."""
    tools, corpus = Tools(args, folder), write_corpus(args.input, folder / "input")
    short = folder / "short.jsonl"
    short.write_text(json.dumps({"text": "a", "meta": {"pile_set_name": "short"}}) + "\n")
    runs, rounds = len(corpus.by_domain), []
    for number in range(args.rounds):
        costs = {
            "megatron_start_up": tools.megatron(short, "short"),
            "ours_start_up": tools.ours(short, "ours_short"),
            "megatron": sum(
                (tools.megatron(file, file.stem) for file in corpus.by_domain.values()), Cost()
            ),
            "ours": tools.ours(corpus.whole, "ours"),
        }
        costs["megatron_net"] = costs["megatron"].without(costs["megatron_start_up"], runs)
        costs["ours_net"] = costs["ours"].without(costs["ours_start_up"], 1)
        rounds.append({name: dataclasses.asdict(cost) for name, cost in costs.items()})
        print(f"round {number + 1} of {args.rounds} done", file=sys.stderr)
    return {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "workers": args.workers,
        "versions": _versions(args.megatron),
        "tokenizer": f"{args.tokenizer_type} {Path(args.tokenizer_model).name}",
        "domains": runs,
        "documents": corpus.documents,
        "bytes": corpus.bytes,
        "rounds": rounds,
        "different_files": tools.different_files(corpus, "ours"),
    }


def _versions(megatron: Path) -> dict[str, str]:
    info = (megatron / "megatron" / "core" / "package_info.py").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH) = (\d+)", info, re.MULTILINE))
    return {
        "python": platform.python_version(),
        "megatron-lm checkout": ".".join(
            parts.get(key, "?") for key in ("MAJOR", "MINOR", "PATCH")
        ),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def _print(figures: dict[str, Any]) -> None:
    print(f"{figures['machine']}, {figures['cores']} cores, {figures['workers']} workers")
    print(", ".join(f"{name} {version}" for name, version in figures["versions"].items()))
    print(
        f"{figures['tokenizer']}; {figures['documents']:,} documents, "
        f"{figures['bytes'] / 1e6:,.1f} MB of text in {figures['domains']} domains; medians of "
        f"{len(figures['rounds'])} rounds"
    )
    print(f"{'':30} {'wall s':>8} {'CPU s':>8} {'documents/s':>12} {'MB/s':>7} {'ratio':>7}")
    for label, suffix in (("without start-up", "_net"), ("with start-up", "")):
        for title, tool in (("Megatron-LM", "megatron"), ("ours", "ours")):
            wall, cpu = (
                statistics.median(costs[tool + suffix][unit] for costs in figures["rounds"])
                for unit in ("wall_s", "cpu_s")
            )
            print(
                f"{title + ', ' + label:30} {wall:8.2f} {cpu:8.2f} "
                f"{figures['documents'] / wall:12,.0f} {figures['bytes'] / 1e6 / wall:7.1f} "
                f"{'' if tool == 'megatron' else f'{ratio(figures, suffix):6.2f}x':>7}"
            )
    different = figures["different_files"]
    print(f"files that differ: {', '.join(different)}" if different else "all files are identical")


def ratio(figures: dict[str, Any], suffix: str) -> float:
    """Return the median, over rounds, of how many times as fast ours was."""
    return statistics.median(
        costs["megatron" + suffix]["wall_s"] / costs["ours" + suffix]["wall_s"]
        for costs in figures["rounds"]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status: 1 also for files that differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--megatron", type=Path, required=True, help="a Megatron-LM checkout that runs here"
    )
    parser.add_argument("--input", nargs="+", required=True, help="files in the Pile's format")
    parser.add_argument(
        "--tokenizer-type",
        choices=("SentencePieceTokenizer", "HuggingFaceTokenizer"),
        default="SentencePieceTokenizer",
    )
    parser.add_argument("--tokenizer-model", required=True, help="the .model file, or the folder")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="of either tool"
    )
    parser.add_argument("--rounds", type=int, default=3, help="that medians are over")
    parser.add_argument("--python", default=sys.executable, help="interpreter for Megatron-LM's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    args = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark_preprocess.") as folder:
            figures = measure(args, Path(folder))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    return 1 if figures["different_files"] else 0


if __name__ == "__main__":
    sys.exit(main())
