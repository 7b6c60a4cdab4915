"""Lets ``manifest.json`` stand for its datasets on Megatron-LM's command line."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_acodm.preprocess.manifest import MANIFEST_NAME, Manifest, TokenizerInfo

_FLAGS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")


def expand_manifests(arguments: Sequence[str]) -> list[str]:
    """Megatron-LM's arguments, with the datasets' prefixes where a manifest was named.

    The tokenizer is the manifest's too, unless the arguments name one. Of a flag that is given
    several times the last counts, as with argparse; the others are left out.

    Raises:
        ValueError: for a manifest that cannot be read, or whose files are not there.
    """
    words: list[str] = []
    tokenizer: TokenizerInfo | None = None
    for flag, values in _last_of_each(arguments):
        words.append(flag)
        for value in values:
            if flag in _FLAGS and value.endswith(MANIFEST_NAME):
                manifest = Manifest.load(value)
                words += [str(domain.prefix) for domain in manifest.domains]
                tokenizer = manifest.tokenizer
            else:
                words.append(value)
    named = any(word.partition("=")[0] == "--tokenizer-type" for word in arguments)
    if tokenizer is not None and not named:
        words += _tokenizer_arguments(tokenizer)
    return words


def _last_of_each(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each word that begins with ``--`` and what follows it; of data paths the last ones."""
    found: list[tuple[str, list[str]]] = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        if flag in _FLAGS:
            found = [(name, values) for name, values in found if name != flag]
            found.append((flag, [value] if equals else []))
        elif word.startswith("--") or not found:
            found.append((word, []))
        else:
            found[-1][1].append(word)
    return found


def _tokenizer_arguments(info: TokenizerInfo) -> list[str]:
    if info.file is None:  # bytes, or ids as they are: EOD is the id after the others
        return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(info.eod)]
    model = info.file
    if info.type == "HuggingFaceTokenizer" and model.is_file():
        model = model.parent  # as transformers wants it
    return ["--tokenizer-type", info.type, "--tokenizer-model", str(model)]
