"""Trains a sentencepiece tokenizer on Pile-format text, as much of each domain as of any other."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.preprocess.reader import open_inputs, read_chunks

EOS = "<|endoftext|>"


def sample_documents(inputs: Sequence[str], bytes_per_domain: int) -> dict[str, list[str]]:
    """Read the first documents of every domain, up to ``bytes_per_domain`` of UTF-8 text each.

    Raises:
        ValueError: for a file that can't be read or a malformed line, with its number.
    """
    documents: dict[str, list[str]] = defaultdict(list)
    left: dict[str, int] = defaultdict(lambda: bytes_per_domain)
    for chunk in read_chunks(open_inputs(inputs)):
        for number, line in enumerate(chunk.data.split(b"\n"), start=chunk.first_line):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                domain = record["meta"]["pile_set_name"]
                text = record["text"].encode("utf-8", "replace")
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{chunk.input}, line {number} is not a record of a text and its "
                    f"meta.pile_set_name ({error!r}); correct or remove the line"
                ) from error
            if left[domain] > 0:
                documents[domain].append(text[: left[domain]].decode("utf-8", "ignore"))
                left[domain] -= len(text)
    return dict(documents)


def train(documents: Iterable[str], vocab_size: int, threads: int) -> bytes:
    """Train a byte-pair model under which any text survives encoding and decoding.

    Args:
        documents: the text to learn from.
        vocab_size: pieces, the special ones and the 256 bytes included.
        threads: of the trainer.

    Returns:
        The content of a ``.model`` file. Id 0 ends a document (EOD), 2 is padding; there is no
        beginning-of-document token, as Megatron's datasets use none.

    Raises:
        ValueError: if the text does not yield that many pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            eos_id=0,
            eos_piece=EOS,
            unk_id=1,
            pad_id=2,
            bos_id=-1,
            # Nothing is unknown, and nothing is normalised: code keeps its white space.
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            # Few characters of their own, or those of large scripts would fill the vocabulary.
            character_coverage=0.995,
            split_by_unicode_script=False,
            split_digits=True,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"sentencepiece cannot learn {vocab_size} pieces from this text ({error}); give more "
            "text or lower --vocab-size"
        ) from error
    return model.getvalue()


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Yield non-empty lines: sentencepiece learns within a sentence, and passes over long ones."""
    for document in documents:
        yield from filter(None, document.split("\n"))


def main() -> None:
    """Parse the command line, train, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, help=".jsonl, .jsonl.gz or .jsonl.zst files"
    )
    parser.add_argument("--output", type=Path, required=True, help="the .model file to write")
    parser.add_argument("--vocab-size", type=int, default=8192, help="default: %(default)s")
    parser.add_argument(
        "--bytes-per-domain",
        type=int,
        default=1_000_000,
        help="text to learn from, of each domain at most (default: %(default)s)",
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    try:
        sample = sample_documents(arguments.input, arguments.bytes_per_domain)
        texts = [text for domain in sorted(sample) for text in sample[domain]]
        model = train(texts, arguments.vocab_size, threads=os.cpu_count() or 1)
        partial = arguments.output.with_name(f".{arguments.output.name}.partial")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(model)
        os.replace(partial, arguments.output)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    size = sum(len(text.encode()) for text in texts)
    pieces = sum(map(len, sentencepiece.SentencePieceProcessor(model_proto=model).encode(texts)))
    print(
        f"{arguments.output}: {arguments.vocab_size:,} pieces from {size / 1e6:.1f} MB of "
        f"{len(sample)} domains, {size / max(pieces, 1):.2f} bytes a token, "
        f"{time.perf_counter() - start:.1f} s"
    )


if __name__ == "__main__":
    main()
