"""The preprocessing benchmark gives both tools the same text and tells whether they agree."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from preprocessing import record
from tiny_tokenizer import train_sentencepiece

from megatron_acodm.preprocess.manifest import Manifest
from megatron_acodm.preprocess.pipeline import PreprocessOptions, preprocess

TEXTS = {"A": ["one of a kind", "", "the end."], "B": ["for x in y: pass", "naïve"]}

# Copies what our tool wrote before, and spoils one file: only that there is a difference matters.
STAND_IN = """
import argparse, pathlib, shutil
parser = argparse.ArgumentParser()
for flag in ("--input", "--output-prefix", "--tokenizer-type", "--tokenizer-model", "--workers"):
    parser.add_argument(flag, required=True)
parser.add_argument("--append-eod", action="store_true", required=True)
args = parser.parse_args()
name = "B" if "naïve" in open(args.input, encoding="utf-8").read() else "A"
for suffix in (".bin", ".idx"):
    source = pathlib.Path(__file__).parents[2] / "corpus" / f"{name}_text_document{suffix}"
    target = shutil.copy(source, f"{args.output_prefix}_text_document{suffix}")
    if (name, suffix) == ("B", ".bin"):
        open(target, "ab").write(b"x")
"""


@pytest.fixture
def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "benchmark_preprocess.py"
    spec = importlib.util.spec_from_file_location("benchmark_preprocess", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclasses
    spec.loader.exec_module(module)
    return module


def write_input(folder: Path) -> Path:
    file = folder / "input.jsonl"
    rows = [record(text, name) for name, texts in TEXTS.items() for text in texts]
    rows.insert(1, rows.pop())  # domains mixed
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_both_get_every_document_once(benchmark: ModuleType, tmp_path: Path) -> None:
    corpus = benchmark.write_corpus([str(write_input(tmp_path))], tmp_path / "split")
    assert corpus.documents == 5
    assert corpus.bytes == sum(len(text.encode()) for texts in TEXTS.values() for text in texts)
    lines = {name: file.read_bytes().splitlines() for name, file in corpus.by_domain.items()}
    texts = {name: [json.loads(line)["text"] for line in own] for name, own in lines.items()}
    assert texts == {"A": TEXTS["A"], "B": TEXTS["B"][::-1]}
    whole = corpus.whole.read_bytes().splitlines()
    assert sorted(whole) == sorted(line for own in lines.values() for line in own)


def test_start_up_is_taken_off_for_every_run(benchmark: ModuleType) -> None:
    cost = benchmark.Cost(10.0, 20.0).without(benchmark.Cost(1.0, 3.0), runs=4)
    assert (cost.wall_s, cost.cpu_s) == (6.0, 8.0)
    figures = {
        "rounds": [
            {"megatron": {"wall_s": wall}, "ours": {"wall_s": 2.0}} for wall in (4.0, 6.0, 60.0)
        ]
    }
    assert benchmark.ratio(figures, "") == 3.0


def test_the_time_of_processes_that_a_command_starts_counts(benchmark: ModuleType) -> None:
    work = "sum(range(20_000_000))"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{work}'])"
    cost = benchmark.run([sys.executable, "-c", child])
    assert cost.cpu_s > 0.1
    with pytest.raises(ValueError, match=r"failed \(3\):\nwhat went wrong"):
        benchmark.run([sys.executable, "-c", "print('what went wrong'); exit(3)"])


def test_a_file_that_differs_is_named(
    benchmark: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, model = write_input(tmp_path), train_sentencepiece(tmp_path / "tiny")
    folder = tmp_path / "corpus"
    preprocess(PreprocessOptions([str(source)], folder, "SentencePieceTokenizer", str(model)))
    assert {domain.name for domain in Manifest.load(folder).domains} == {"A", "B"}
    for name, content in {
        "tools/preprocess_data.py": STAND_IN,
        "megatron/core/package_info.py": "MAJOR = 0\nMINOR = 16\nPATCH = 1\n",
    }.items():
        file = tmp_path / "checkout" / name
        file.parent.mkdir(parents=True)
        file.write_text(content, encoding="utf-8")

    command = ["--megatron", str(tmp_path / "checkout"), "--input", str(source), "--rounds", "1"]
    command += ["--tokenizer-model", str(model), "--workers", "1"]
    assert benchmark.main([*command, "--json", str(tmp_path / "figures.json")]) == 1
    assert "files that differ: B_text_document.bin\n" in capsys.readouterr().out
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["different_files"] == ["B_text_document.bin"]
    assert figures["versions"]["megatron-lm checkout"] == "0.16.1"
    assert (figures["documents"], figures["domains"], len(figures["rounds"])) == (5, 2, 1)

    command[1] = str(tmp_path)
    assert benchmark.main(command) == 1
    assert "--megatron is a Megatron-LM checkout" in capsys.readouterr().err
