"""Lets ``manifest.json`` stand for its datasets on Megatron-LM's command line."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_acodm.preprocess.manifest import MANIFEST_NAME, Manifest, TokenizerInfo

_FLAGS = ("--data-path", "--train-data-path", "--valid-data-path", "--test-data-path")


def expand_manifests(arguments: Sequence[str]) -> list[str]:
    """Megatron-LM's arguments, with the datasets' prefixes where a manifest was named.

    The tokenizer is the manifest's too, unless the arguments name one.

    Raises:
        ValueError: for a manifest that cannot be read, or whose files are not there.
    """
    words: list[str] = []
    tokenizer: TokenizerInfo | None = None
    flag = ""
    for word in arguments:
        if word.startswith("--"):
            flag = word
        if flag not in _FLAGS or not word.endswith(MANIFEST_NAME):
            words.append(word)
            continue
        manifest = Manifest.load(word)
        words += [str(domain.prefix) for domain in manifest.domains]
        tokenizer = tokenizer or manifest.tokenizer
    if tokenizer is not None and "--tokenizer-type" not in arguments:
        words += _tokenizer_arguments(tokenizer)
    return words


def _tokenizer_arguments(info: TokenizerInfo) -> list[str]:
    if info.file is None:  # bytes, or ids as they are: EOD is the id after the others
        return ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(info.eod)]
    model = info.file
    if info.type == "HuggingFaceTokenizer" and model.is_file():
        model = model.parent  # as transformers wants it
    return ["--tokenizer-type", info.type, "--tokenizer-model", str(model)]
