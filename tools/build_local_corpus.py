"""Assembles a small corpus of clearly different domains from text that this machine already has.

The quickstart trains on it, so that a first run needs no download. Records have the Pile's format,
{"text": ..., "meta": {"pile_set_name": ...}}; training and validation documents are disjoint.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import hashlib
import json
import os
import struct
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import zstandard

MIN_DOMAINS = 3
MIN_DOMAIN_BYTES = 64 * 1024
MIN_DOCUMENT_BYTES = 256
MAX_DOCUMENT_BYTES = 32 * 1024
MAX_LINE_CHARACTERS = 2000
MAX_SEEN_LINES_SHARE = 0.5
VALIDATION_SHARE = 0.05

SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
STDLIB = Path(sysconfig.get_paths()["stdlib"])
USR = Path("/usr")


# --- Where documents come from ---------------------------------------------------------------


def find_files(roots: Iterable[Path], patterns: Iterable[str]) -> Iterator[Path]:
    """Yield the files under ``roots`` that match, in an order that mixes folders but is fixed."""
    found: dict[Path, str] = {}
    for root in roots:
        for pattern in patterns:
            for path in root.glob(pattern):
                found[path] = hashlib.sha256(str(path.relative_to(root)).encode()).hexdigest()
    for path in sorted(found, key=lambda path: (found[path], path)):
        if path.is_file() and not path.is_symlink():
            yield path


def read_text(path: Path) -> str:
    """The file's text, or nothing if it can't be read or is not UTF-8 text."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError):
        return ""


def texts(*patterns: str, roots: Iterable[Path] = (SITE_PACKAGES,)) -> Iterator[str]:
    """Yield the text of every matching file."""
    return map(read_text, find_files(roots, patterns))


def standard_library() -> Iterator[str]:
    """Yield the source of the Python standard library's modules, without its tests."""
    apart = {"site-packages", "dist-packages", "test", "tests", "pydoc_data"}
    for path in find_files([STDLIB], ["**/*.py"]):
        if not apart.intersection(path.relative_to(STDLIB).parts):
            yield read_text(path)


def docstrings() -> Iterator[str]:
    """Yield, for each installed module, its docstrings: prose, mathematics and examples."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in find_files([SITE_PACKAGES], ["*/**/*.py"]):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(read_text(path))
        except (SyntaxError, ValueError, RecursionError):
            continue
        nodes = [node for node in ast.walk(tree) if isinstance(node, documented)]
        yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def pydoc_topics() -> Iterator[str]:
    """Yield the chapters of the Python language reference that ``help()`` shows."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    yield from topics.values()


def package_metadata() -> Iterator[str]:
    """Yield the descriptions of the installed packages: their README files."""
    for text in texts("*.dist-info/METADATA"):
        yield text.partition("\n\n")[2]


def unicode_names() -> Iterator[str]:
    """Yield lists of characters with their names, 256 code points a document."""
    for block in range(0, sys.maxunicode, 256):
        lines = []
        for code in range(block, block + 256):
            name = unicodedata.name(chr(code), "")
            # Names made of the code point, and the syllables spelled out, are formulas, not text.
            if name and not name.endswith(f"{code:04X}") and "HANGUL SYLLABLE" not in name:
                lines.append(f"U+{code:04X} {chr(code)} {name}")
        yield "\n".join(lines)


def translations() -> Iterator[str]:
    """Yield the messages of installed programs in the languages they were translated into."""
    for path in find_files([USR / "share/locale", SITE_PACKAGES], ["**/LC_MESSAGES/*.mo"]):
        try:
            yield "\n".join(_translated_messages(path.read_bytes()))
        except (OSError, struct.error, UnicodeDecodeError):
            continue


def _translated_messages(catalog: bytes) -> list[str]:
    """The translations in a compiled gettext catalog (the GNU .mo format)."""
    order = "<" if catalog[:4] == b"\xde\x12\x04\x95" else ">"
    count, _, table = struct.unpack_from(f"{order}III", catalog, 8)
    messages = []
    for i in range(1, count):  # the first entry is the catalog's own header
        length, start = struct.unpack_from(f"{order}II", catalog, table + 8 * i)
        messages.append(catalog[start : start + length].decode("utf-8").replace("\0", "\n"))
    return messages


@dataclass(frozen=True)
class Domain:
    """A kind of text, and how much of it the corpus may hold."""

    produce: Callable[[], Iterable[str]]
    """Yields the domain's documents."""

    share: float = 1.0
    """Its largest size relative to the largest domain's: real corpora are skewed, so is this."""


DOMAINS = {
    "StdLib Python": Domain(standard_library),
    "Docstrings": Domain(docstrings, 0.8),
    "C/C++ Headers": Domain(
        lambda: texts("**/*.h", "**/*.hpp", "**/*.cuh", roots=(SITE_PACKAGES, USR / "include"))
    ),
    "Type Stubs": Domain(lambda: texts("**/*.pyi"), 0.4),
    "PyDoc Topics": Domain(pydoc_topics, 0.4),
    "Package Metadata": Domain(package_metadata, 0.4),
    "Licences": Domain(
        lambda: texts(
            "**/*LICENSE*",
            "**/*LICENCE*",
            "common-licenses/*",
            "doc/*/copyright",
            roots=(SITE_PACKAGES, USR / "share"),
        ),
        0.3,
    ),
    "Unicode Names": Domain(unicode_names, 0.2),
    "Data Tables": Domain(lambda: texts("**/*.csv", "**/*.afm", "**/*.zi", "**/*.tab"), 0.3),
    "CMake Modules": Domain(lambda: texts("**/*.cmake", roots=(SITE_PACKAGES, USR / "share")), 0.2),
    "Translations": Domain(translations, 0.6),
    "Man Pages": Domain(
        lambda: texts("man[1-8]/*.gz", "man[1-8]/*.[1-8]", roots=(USR / "share/man",)), 0.6
    ),
}
"""Domain by name. The order decides which of two near-duplicates stays."""


# --- Which documents stay --------------------------------------------------------------------


@dataclass
class DocumentFilter:
    """Keeps readable documents that mostly say something no earlier document said."""

    _seen: set[str] = field(default_factory=set)

    def clean(self, text: str) -> str | None:
        """The document as it goes into the corpus (cut to a bounded size), or None to drop it."""
        text = _cut(text.replace("\r\n", "\n").strip())
        lines = text.split("\n")
        if len(text.encode()) < MIN_DOCUMENT_BYTES or max(map(len, lines)) > MAX_LINE_CHARACTERS:
            return None
        if "\0" in text or "\ufffd" in text:
            return None
        # Short lines (braces, "else:") recur everywhere and tell nothing about a copy.
        telling = {line.strip() for line in lines if len(line.strip()) >= 20} or set(lines)
        seen = len(telling & self._seen)
        self._seen |= telling
        return text if seen <= MAX_SEEN_LINES_SHARE * len(telling) else None


def _cut(text: str) -> str:
    data = text.encode("utf-8", "replace")
    if len(data) <= MAX_DOCUMENT_BYTES:
        return data.decode()
    return data[: data.rfind(b"\n", 0, MAX_DOCUMENT_BYTES) + 1].decode().strip()


def collect(domains: dict[str, Domain], max_bytes_per_domain: int) -> dict[str, list[str]]:
    """Collect each domain's documents.

    Args:
        domains: what to look for, by domain name.
        max_bytes_per_domain: UTF-8 bytes at which a domain of share 1 is full.

    Returns:
        The documents of every domain that this machine has enough text for.

    Raises:
        ValueError: if fewer than three domains remain.
    """
    document_filter = DocumentFilter()
    corpus: dict[str, list[str]] = {}
    for name, domain in domains.items():
        documents: list[str] = []
        size = 0
        for text in map(document_filter.clean, domain.produce()):
            if text is None:
                continue
            if size + len(text.encode()) > domain.share * max_bytes_per_domain:
                break
            documents.append(text)
            size += len(text.encode())
        if size < MIN_DOMAIN_BYTES or len(documents) < 2:
            print(
                f"note: {name} is left out: this machine has {size:,} bytes of it; at least "
                f"{MIN_DOMAIN_BYTES:,} in two documents are needed"
            )
            continue
        corpus[name] = documents
    if len(corpus) < MIN_DOMAINS:
        raise ValueError(
            f"this machine has text for {len(corpus)} domains ({', '.join(corpus) or 'none'}); at "
            f"least {MIN_DOMAINS} are needed: run inside the virtual environment of `make venv`, "
            "or raise --max-bytes-per-domain"
        )
    return corpus


def split(documents: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split a domain's documents into training and validation by their hash.

    The documents with the lowest hashes, about a twentieth of the bytes and at least one document,
    become validation; at least one remains for training.
    """
    ordered = sorted(set(documents), key=_digest)
    wanted = VALIDATION_SHARE * sum(len(text.encode()) for text in ordered)
    count = size = 0
    while size < wanted and count < len(ordered) - 1:
        size += len(ordered[count].encode())
        count += 1
    return ordered[count:], ordered[:count]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- Writing ---------------------------------------------------------------------------------


def write_records(path: Path, documents: dict[str, list[str]]) -> None:
    """Write ``{domain: documents}`` as shuffled Pile records; the file appears when complete."""
    pairs = [(text, name) for name, texts_ in documents.items() for text in texts_]
    pairs.sort(key=lambda pair: (_digest(pair[0]), pair[1]))
    partial = path.with_name(f".{path.name}.partial")
    with zstandard.open(partial, "wt", encoding="utf-8") as file:
        for text, name in pairs:
            record = {"text": text, "meta": {"pile_set_name": name}}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, path)


def build(output: Path, max_bytes_per_domain: int) -> None:
    """Write ``output/train.jsonl.zst`` and ``output/valid.jsonl.zst`` and print what they hold."""
    corpus = collect(DOMAINS, max_bytes_per_domain)
    parts = {name: split(documents) for name, documents in corpus.items()}
    output.mkdir(parents=True, exist_ok=True)
    write_records(output / "valid.jsonl.zst", {name: valid for name, (_, valid) in parts.items()})
    write_records(output / "train.jsonl.zst", {name: train for name, (train, _) in parts.items()})

    row = "{:<18}{:>12}{:>14}{:>14}{:>14}".format
    print(row("domain", "documents", "bytes", "validation", "bytes"))
    for name, (train, valid) in parts.items():
        sizes = [sum(len(text.encode()) for text in part) for part in (train, valid)]
        print(row(name, f"{len(train):,}", f"{sizes[0]:,}", f"{len(valid):,}", f"{sizes[1]:,}"))


def main() -> None:
    """Parse the command line and build the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for train.jsonl.zst and valid.jsonl.zst"
    )
    parser.add_argument(
        "--max-bytes-per-domain", type=int, default=1_500_000, help="default: %(default)s"
    )
    arguments = parser.parse_args()
    try:
        build(arguments.output, arguments.max_bytes_per_domain)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
