"""Turns chunks of Pile-format lines into token ids by domain; runs in the worker processes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megatron_acodm.megatron.indexed import token_dtype
from megatron_acodm.megatron.tokenizer import build_tokenizer
from megatron_acodm.preprocess.manifest import SkippedLine
from megatron_acodm.preprocess.reader import Chunk
from megatron_acodm.preprocess.text_encoder import build_text_encoder

MAX_LISTED_LINES = 1000
"""Malformed lines that are listed; all are counted."""

_MAX_REASON = 200


@dataclass(frozen=True)
class DomainTokens:
    """Consecutive documents of one domain."""

    tokens: np.ndarray
    """[sum(lengths)] ids in the stored dtype, one document after another, EOD included."""
    lengths: np.ndarray
    """[documents] int32; 0 for a document without any text that the tokenizer keeps."""
    bytes: int
    """Bytes of their text in UTF-8."""


@dataclass(frozen=True)
class EncodedChunk:
    """What became of a chunk."""

    input_bytes: int
    """Bytes of the (compressed) file read for it."""
    domains: dict[str, DomainTokens]
    """By name, in the order of appearance."""
    bad_count: int
    """Malformed lines."""
    bad_lines: list[SkippedLine]
    """The first MAX_LISTED_LINES of them."""


@dataclass
class _Documents:
    tokens: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    bytes: int = 0


class ChunkEncoder:
    """Parses and tokenizes chunks, as Megatron-LM's preprocessing does with ``--append-eod``.

    A document's ids are what Megatron's tokenizer makes of its text, and EOD; a document without
    any ids gets no EOD either.

    Args:
        tokenizer_type: As ``build_tokenizer`` takes it, like the next two.
        tokenizer_model: File of the tokenizer.
        vocab_size: For NullTokenizer.
    """

    def __init__(
        self, tokenizer_type: str, tokenizer_model: str | None, vocab_size: int | None
    ) -> None:
        # The workers are the parallelism; each tokenizer starting threads would only add to it.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        tokenizer = build_tokenizer(tokenizer_type, tokenizer_model, vocab_size)
        dtype = token_dtype(tokenizer.vocab_size)
        self._text_encoder = build_text_encoder(tokenizer, tokenizer_type, dtype)
        self._none = np.array([], dtype=dtype)
        self._eod = np.array([tokenizer.eod], dtype=dtype)

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Encode a chunk's lines; blank lines hold no record and are passed over."""
        domains: dict[str, _Documents] = {}
        bad_count = 0
        bad_lines: list[SkippedLine] = []
        for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
            if not line.strip():
                continue
            try:
                domain, text = parse_record(line)
                ids, size = self._encode(text)
            except ValueError as error:
                bad_count += 1
                if len(bad_lines) < MAX_LISTED_LINES:
                    bad_lines.append(SkippedLine(chunk.input, number, str(error)[:_MAX_REASON]))
                continue
            documents = domains.setdefault(domain, _Documents())
            documents.tokens += (ids, self._eod) if len(ids) else ()
            documents.lengths.append(len(ids) + (len(ids) > 0))
            documents.bytes += size
        parts = {
            name: DomainTokens(
                np.concatenate((self._none, *documents.tokens)),
                np.array(documents.lengths, dtype=np.int32),
                documents.bytes,
            )
            for name, documents in domains.items()
        }
        return EncodedChunk(chunk.input_bytes, parts, bad_count, bad_lines)

    def _encode(self, text: str) -> tuple[np.ndarray, int]:
        """Return the ids of a document's text, without EOD, and its bytes."""
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ValueError(
                f"'text' has half a surrogate pair at character {error.start + 1}, which is no text"
            ) from error
        ids = self._text_encoder(text) if text else self._none
        return ids, size


def parse_record(line: bytes) -> tuple[str, str]:
    """Return the domain and the text of a record.

    Raises:
        ValueError: saying in a few words what is wrong with the line.
    """
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"not JSON that can be read: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"the record is {_kind(record)}, not an object")
    text = _member(record, "text", "'text'")
    meta = record.get("meta")
    if not isinstance(meta, dict):
        missing = "there is no 'meta'" if "meta" not in record else f"'meta' is {_kind(meta)}"
        raise ValueError(f"{missing}, so no 'meta.pile_set_name': the domain is not known")
    domain = _member(meta, "pile_set_name", "'meta.pile_set_name'")
    if not domain.strip() or not _is_unicode(domain):
        raise ValueError(f"'meta.pile_set_name' is {domain!a}, which is no name")
    return domain, text


def _member(record: dict[str, Any], key: str, name: str) -> str:
    if key not in record:
        raise ValueError(f"there is no {name}")
    value = record[key]
    if not isinstance(value, str):
        raise ValueError(f"{name} is {_kind(value)}, not a string")
    return value


def _is_unicode(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


_KINDS = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}


def _kind(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), "a number")
