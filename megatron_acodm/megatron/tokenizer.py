"""Builds Megatron-Core's own tokenizers from the names that Megatron-LM's flags have."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.tokenizers.text import MegatronTokenizerText

TOKENIZER_TYPES = (
    "SentencePieceTokenizer",
    "HuggingFaceTokenizer",
    "ByteLevelTokenizer",
    "NullTokenizer",
)

_HUGGINGFACE_SIDE_FILES = (
    "added_tokens.json",
    "config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)
"""What else is read beside a tokenizer.json: its class and the special tokens, EOD among them."""


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None = None,
    vocab_size: int | None = None,
) -> MegatronTokenizerText:
    """Build the tokenizer that preprocessing and training share.

    Args:
        tokenizer_type: One of TOKENIZER_TYPES.
        tokenizer_model: A sentencepiece ``.model`` file; for HuggingFaceTokenizer a
            ``tokenizer.json`` or its folder. The other types take none.
        vocab_size: NullTokenizer: the number of ids, to which EOD is added. Otherwise only a
            check: it must be the tokenizer's own size.

    Returns:
        Megatron's tokenizer object, as ``GPTDatasetConfig(tokenizer=...)`` takes it, with an
        end-of-document id ``eod`` in [0, vocab_size).

    Raises:
        ValueError: for an unknown type, a missing or damaged file, a missing package, or a
            tokenizer without an end-of-document token.
    """
    path = resolve_tokenizer_model(tokenizer_type, tokenizer_model)
    if tokenizer_type == "SentencePieceTokenizer":
        tokenizer = _load(path, "sentencepiece")
    elif tokenizer_type == "HuggingFaceTokenizer":
        tokenizer = _build_huggingface(path)
    elif tokenizer_type == "ByteLevelTokenizer":
        tokenizer = _build_byte_level()
    else:
        if vocab_size is None or vocab_size < 1:
            raise ValueError(
                f"NullTokenizer has no vocabulary of its own and --vocab-size is {vocab_size}; "
                "give the number of ids, at least 1"
            )
        return _load(None, "null", vocab_size=vocab_size)
    _check(tokenizer, tokenizer_type, vocab_size)
    return tokenizer


def resolve_tokenizer_model(tokenizer_type: str, tokenizer_model: str | Path | None) -> Path | None:
    """Return the file that defines the tokenizer, None for a type that needs no file.

    Raises:
        ValueError: for an unknown type, a missing file, or a file where none is wanted.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise ValueError(
            f"--tokenizer-type is {tokenizer_type!r}; the types are {', '.join(TOKENIZER_TYPES)}"
        )
    if tokenizer_type in ("ByteLevelTokenizer", "NullTokenizer"):
        if tokenizer_model is not None:
            raise ValueError(
                f"{tokenizer_type} reads no file and --tokenizer-model is {tokenizer_model}; "
                "leave --tokenizer-model out"
            )
        return None
    if tokenizer_model is None:
        raise ValueError(f"{tokenizer_type} needs a file; name it with --tokenizer-model")
    path = Path(tokenizer_model)
    if tokenizer_type == "HuggingFaceTokenizer" and path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"the tokenizer file {path} does not exist; check --tokenizer-model")
    if tokenizer_type == "HuggingFaceTokenizer" and path.name != "tokenizer.json":
        raise ValueError(
            f"--tokenizer-model is {path}; HuggingFaceTokenizer reads a file named "
            "tokenizer.json, or the folder that holds it"
        )
    return path


def tokenizer_files(tokenizer_type: str, tokenizer_model: str | Path | None) -> list[Path]:
    """Return every file that shapes the tokenizer's ids; the first is the one to load it by.

    Raises:
        ValueError: as ``resolve_tokenizer_model``.
    """
    path = resolve_tokenizer_model(tokenizer_type, tokenizer_model)
    if path is None:
        return []
    if tokenizer_type != "HuggingFaceTokenizer":
        return [path]
    beside = (path.with_name(name) for name in _HUGGINGFACE_SIDE_FILES)
    return [path, *(file for file in beside if file.is_file())]


def tokenizer_sha256(tokenizer_type: str, tokenizer_model: str | Path | None) -> str | None:
    """Hash what shapes the tokenizer's ids, so that another one is noticed; None without a file.

    A single file is hashed as ``sha256sum`` does; of several, the names and hashes are hashed.

    Raises:
        ValueError: as ``resolve_tokenizer_model``.
    """
    files = tokenizer_files(tokenizer_type, tokenizer_model)
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    if len(files) < 2:
        return hashes[0] if hashes else None
    lines = [f"{digest} {file.name}\n" for digest, file in zip(hashes, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _build_huggingface(path: Path | None) -> MegatronTokenizerText:
    assert path is not None
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(
            "HuggingFaceTokenizer needs the package transformers, which is not installed; "
            "run: pip install transformers"
        )
    # The folder, because AutoTokenizer takes no file; use_fast, because a tokenizer.json is one.
    return _load(path.parent, "huggingface", use_fast=True)


def _build_byte_level() -> MegatronTokenizerText:
    # Megatron's defaults make byte 0 the end of a document and byte 1 the padding, whose loss
    # GPTDataset masks; both bytes occur in text. Two ids after the bytes collide with nothing.
    # As special tokens, rather than by a larger vocab_size, they are skipped when ids become
    # text. Special tokens are numbered downwards from the end.
    return _load(
        None, "byte-level", vocab_size=256, special_tokens=["<pad>", "<eod>"],
        _eos_id=256, _pad_id=257,
    )  # fmt: skip


def _load(path: Path | None, library: str, **arguments: Any) -> MegatronTokenizerText:
    """Have Megatron load a tokenizer, with the file in the error if it cannot."""
    # Here, because it takes seconds and command lines want TOKENIZER_TYPES at once.
    from megatron.core.tokenizers import MegatronTokenizer

    name = None if path is None else str(path)
    try:
        return MegatronTokenizer.from_pretrained(name, {"library": library}, **arguments)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be read as a {library} tokenizer ({error}); check --tokenizer-model "
            "and --tokenizer-type"
        ) from error


def _check(tokenizer: MegatronTokenizerText, tokenizer_type: str, vocab_size: int | None) -> None:
    if vocab_size is not None and vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"--vocab-size is {vocab_size}, but the {tokenizer_type} has {tokenizer.vocab_size} "
            "ids; leave --vocab-size out"
        )
    # Sentencepiece reports a disabled token as -1, HuggingFace as None.
    if tokenizer.eod is None or not 0 <= tokenizer.eod < tokenizer.vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.path} has no end-of-sequence token (its id is "
            f"{tokenizer.eod}), which ends each document; train the sentencepiece model with one, "
            "or set eos_token in the HuggingFace tokenizer_config.json"
        )
