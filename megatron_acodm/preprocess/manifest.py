"""Reads, writes and checks ``manifest.json``, the description of a preprocessed corpus."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from megatron.core.tokenizers.text import MegatronTokenizerText

_Record = TypeVar("_Record")

MANIFEST_NAME = "manifest.json"
FORMAT = "megatron-acodm corpus"
VERSION = 2
ABOUT = (
    "A Megatron indexed dataset (.bin, .idx) a domain; prefix and tokenizer.file are relative "
    "to this file. documents include empty_documents, which have no tokens; tokens include one "
    "end-of-document id for each other document; bytes are those of the text in UTF-8, before "
    "tokenization; an input's name is its absolute path, modified its time of last modification in "
    "nanoseconds since 1970. Checked by tools/preprocess_pile.py --verify."
)


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the ids."""

    type: str
    """One of ``megatron_acodm.megatron.tokenizer.TOKENIZER_TYPES``."""
    file: Path | None
    """The copy that lies with the corpus; None for a type without a file."""
    sha256: str | None
    """As ``megatron_acodm.megatron.tokenizer.tokenizer_sha256`` gives it."""
    vocab_size: int
    """Ids, EOD included; it decides the type in which they are stored."""
    eod: int
    """The id after each document."""


@dataclass(frozen=True)
class ManifestDomain:
    """One domain's dataset."""

    name: str
    """As the records have it."""
    prefix: Path
    """Path of the ``.bin`` and the ``.idx`` without these endings."""
    documents: int
    """Documents, empty ones included."""
    empty_documents: int
    """Documents without any text that the tokenizer keeps."""
    tokens: int
    """Ids stored, one EOD for each document that is not empty included."""
    bytes: int
    """Bytes of text in UTF-8, before tokenization."""
    bin_sha256: str
    """Of the ``.bin``."""
    idx_sha256: str
    """Of the ``.idx``."""


@dataclass(frozen=True)
class InputInfo:
    """One file that was read."""

    name: str
    """The absolute path."""
    size: int
    """Bytes, as stored (compressed)."""
    modified: int
    """Time of its last modification when it was read, in nanoseconds since 1970."""
    sha256: str
    """Of those bytes."""


@dataclass(frozen=True)
class SkippedLine:
    """A malformed line that ``--skip-bad-lines`` left out."""

    input: str
    """The file's path, absolute in a manifest."""
    line: int
    """Counted from 1."""
    reason: str
    """What is wrong with it."""


@dataclass(frozen=True)
class Manifest:
    """What a preprocessed corpus holds, and what it was made from."""

    domains: list[ManifestDomain]
    """Sorted by name."""
    tokenizer: TokenizerInfo
    """The tokenizer of every domain."""
    inputs: list[InputInfo]
    """In the order in which they were read."""
    empty_domains: dict[str, int] = field(default_factory=dict)
    """Documents of each domain that has empty ones only, and so no dataset."""
    skipped_count: int = 0
    """Malformed lines left out."""
    skipped_lines: list[SkippedLine] = field(default_factory=list)
    """The first of them."""

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read a manifest and check that the files it names are there, with the right sizes.

        Args:
            path: The ``manifest.json``, or its folder.

        Returns:
            The manifest, its paths absolute.

        Raises:
            ValueError: as ``read``, or when a file that it names is missing or of another size.
        """
        manifest = cls.read(path)
        if problems := manifest.file_problems():
            raise ValueError(
                f"{path} names {problems[0]}; copy the corpus again, or run preprocessing again"
            )
        return manifest

    @classmethod
    def read(cls, path: str | Path) -> Manifest:
        """Read a manifest alone.

        Args:
            path: The ``manifest.json``, or its folder.

        Returns:
            The manifest, its paths absolute.

        Raises:
            ValueError: when it is missing, damaged or of another version.
        """
        path = Path(path)
        if path.is_dir():
            path = path / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(
                f"cannot read {path}: {error.strerror}; tools/preprocess_pile.py writes it last, "
                "when everything else is complete"
            ) from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: {error}; run preprocessing again") from error
        return _from_json(content, path)

    def build_tokenizer(self, tokenizer_model: str | Path | None = None) -> MegatronTokenizerText:
        """Build the corpus's tokenizer.

        Args:
            tokenizer_model: Another copy of its file to use instead of the one with the corpus.

        Raises:
            ValueError: when the file is missing, or is not the one that made the ids.
        """
        from megatron_acodm.megatron.tokenizer import build_tokenizer, tokenizer_sha256

        info = self.tokenizer
        model = tokenizer_model or info.file
        found = tokenizer_sha256(info.type, model)
        if found != info.sha256:
            raise ValueError(
                f"the tokenizer {model} is not the one that the corpus was made with: its sha256 "
                f"is {found}, the manifest's {info.sha256}; use the file {info.file}"
            )
        # Megatron's null tokenizer adds EOD to the size it is given.
        return build_tokenizer(
            info.type, model, info.vocab_size - 1 if info.type == "NullTokenizer" else None
        )

    def to_json(self, directory: Path) -> str:
        """The text of a ``manifest.json`` in ``directory``, which all its paths lie in."""
        content = {"format": FORMAT, "version": VERSION, "about": ABOUT}
        content.update(dataclasses.asdict(self))

        def relative(value: object) -> str:
            assert isinstance(value, Path)
            return value.relative_to(directory).as_posix()

        return json.dumps(content, indent=2, default=relative) + "\n"

    def file_problems(self) -> list[str]:
        """Name the files that are missing or not of the size that they should have."""
        from megatron_acodm.megatron.indexed import dataset_file_sizes

        problems = []
        if self.tokenizer.file is not None and not self.tokenizer.file.is_file():
            problems.append(f"the tokenizer {self.tokenizer.file}, which is missing")
        for domain in self.domains:
            sizes = dataset_file_sizes(
                self.tokenizer.vocab_size, domain.documents, domain.empty_documents, domain.tokens
            )
            for suffix, size in zip((".bin", ".idx"), sizes, strict=True):
                file = Path(f"{domain.prefix}{suffix}")
                found = file.stat().st_size if file.is_file() else None
                if found != size:
                    state = "is missing" if found is None else f"has {found} bytes, not {size}"
                    problems.append(f"the domain {domain.name!r}, whose file {file} {state}")
        return problems


def _from_json(content: Any, path: Path) -> Manifest:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a manifest that tools/preprocess_pile.py wrote")
    if content.get("version") != VERSION:
        raise ValueError(
            f"{path} has version {content.get('version')!r}, this package reads version {VERSION}; "
            "run preprocessing again"
        )
    directory = path.absolute().parent
    try:
        manifest = Manifest(
            domains=[read_record(ManifestDomain, v, directory) for v in content["domains"]],
            tokenizer=read_record(TokenizerInfo, content["tokenizer"], directory),
            inputs=[read_record(InputInfo, v, directory) for v in content["inputs"]],
            empty_domains={k: check_value("int", v) for k, v in content["empty_domains"].items()},
            skipped_count=check_value("int", content["skipped_count"]),
            skipped_lines=[
                read_record(SkippedLine, v, directory) for v in content["skipped_lines"]
            ],
        )
        names = [domain.name for domain in manifest.domains]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"it lists the domains {names}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged: {reason}; run preprocessing again") from error
    return manifest


def read_record(cls: Callable[..., _Record], values: Any, directory: Path) -> _Record:
    """Build a dataclass whose fields are of type int, str or Path, or one of these or None.

    Args:
        cls: The dataclass.
        values: What JSON gave for it; members that it has no field for are passed over.
        directory: What its paths are relative to; they may not lead out of it.

    Raises:
        KeyError: when a member is missing.
        ValueError: when one is of another kind, or a negative number.
        TypeError: when ``values`` is no object.
    """
    arguments = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = values[item.name]
        kind, optional = str(item.type).removesuffix(" | None"), str(item.type).endswith("None")
        if not (optional and value is None):
            value = check_value(kind, value)
            value = directory / value if kind == "Path" else value
        arguments[item.name] = value
    return cls(**arguments)


def check_value(kind: str, value: Any) -> Any:
    """Return ``value``.

    Raises:
        ValueError: when it is not of this kind ("int", "str" or "Path").
    """
    if kind == "int":
        good = type(value) is int and value >= 0
    elif kind == "str":
        good = isinstance(value, str)
    else:
        assert kind == "Path"
        good = isinstance(value, str) and bool(value)
        good = good and not Path(value).is_absolute() and ".." not in Path(value).parts
    if not good:
        raise ValueError(f"{value!r} is not a valid {kind}")
    return value
