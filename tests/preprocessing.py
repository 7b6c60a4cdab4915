"""Builds inputs for preprocessing, runs it, and reads its output with stock Megatron."""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
import os
import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_acodm.preprocess.manifest import Manifest
from megatron_acodm.preprocess.pipeline import PreprocessOptions, preprocess
from megatron_acodm.preprocess.shard import shard_key
from megatron_acodm.preprocess.workspace import FOLDER_NAME

TOOL = Path(__file__).resolve().parent.parent / "tools" / "preprocess_pile.py"
BYTES = "ByteLevelTokenizer"
BYTE_FLAGS = ["--tokenizer-type", BYTES, "--workers", "2"]
Texts = dict[str, list[str]]


def load_main() -> Callable[[list[str]], int]:
    """The command line tool's ``main``."""
    spec = importlib.util.spec_from_file_location("preprocess_pile", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def make_texts() -> Texts:
    """Real documents and awkward ones, by domain."""
    topics = list(pydoc_data.topics.topics.values())
    code = Path(os.__file__).read_text(encoding="utf-8").split("\n\n\n")
    awkward = [
        "",
        "naïve 漢字 😀 \u2028 \x85 \r\n end ",
        "\x00\x01\x7f",
        "\n",
        "",
        "x" * 40_000,
        " ",
    ]
    return {"Gutenberg (PG-19)": topics[:30], "Python Code": code[:40], "Odd/../ones": awkward}


def identity(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written, and not when it is read."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def record(text: Any = "some text", domain: Any = "A") -> dict[str, Any]:
    return {"text": text, "meta": {"pile_set_name": domain}}


def records(texts: Texts) -> list[dict[str, Any]]:
    """The documents with their domains mixed, each domain's in order."""
    rows = itertools.zip_longest(*([record(text, name) for text in texts[name]] for name in texts))
    return [item for row in rows for item in row if item is not None]


def write(path: Path, lines: list[Any]) -> str:
    """Write records (or raw lines, as bytes) in the compression that the path's ending names."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    data = b"".join(line + b"\n" for line in raw)
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = zstandard.ZstdCompressor().compress(data)
    path.write_bytes(data)
    return str(path)


def run(inputs: str | list[str], output: Path, **options: Any) -> Manifest:
    names = [inputs] if isinstance(inputs, str) else inputs
    options.setdefault("tokenizer_type", BYTES)
    return preprocess(PreprocessOptions(names, output, **options)).manifest


def documents(prefix: Path) -> list[list[int]]:
    """What stock Megatron reads from a dataset, by document."""
    data = IndexedDataset(str(prefix))
    bounds = data.document_indices
    return [
        [int(token) for sequence in range(first, last) for token in data[sequence]]
        for first, last in itertools.pairwise(bounds.tolist())
    ]


def published(folder: Path) -> dict[str, bytes]:
    """What ``contents`` finds under final names."""
    found = contents(folder)
    return {name: data for name, data in found.items() if not name.startswith(FOLDER_NAME)}


def shard_folder(output: Path, name: str) -> Path:
    """Where an unfinished corpus has the shard of an input."""
    return output / FOLDER_NAME / "shards" / shard_key(Path(name).absolute())


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)}
