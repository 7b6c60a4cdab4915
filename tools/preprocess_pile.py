"""Tokenizes Pile-format files into one Megatron indexed dataset a domain, plus manifest.json."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_acodm.megatron.tokenizer import TOKENIZER_TYPES
from megatron_acodm.preprocess.manifest import MANIFEST_NAME, Manifest
from megatron_acodm.preprocess.pool import WorkerDied

_PRINTED_LINES = 10


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help='.jsonl, .jsonl.gz or .jsonl.zst files of {"text": ..., "meta": {"pile_set_name": '
        "...}} lines",
    )
    parser.add_argument(
        "--output-dir",
        required=True,
        type=Path,
        help="receives <domain>_text_document.bin and .idx, tokenizer/ and manifest.json",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="tokenizing processes (default: one a core, %(default)s); the output does not "
        "depend on it",
    )
    parser.add_argument("--tokenizer-type", required=True, choices=TOKENIZER_TYPES)
    parser.add_argument(
        "--tokenizer-model",
        metavar="FILE",
        help="a sentencepiece .model, or a HuggingFace tokenizer.json or its folder",
    )
    parser.add_argument("--vocab-size", type=int, help="for NullTokenizer: ids without EOD")
    parser.add_argument(
        "--skip-bad-lines",
        action="store_true",
        help="leave malformed lines out, and list them, instead of stopping at the first",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace the corpus in --output-dir, once the new one is complete",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    options = vars(_parser().parse_args(arguments))
    options["inputs"] = options.pop("input")
    # Megatron warns on import about packages that only a GPU run uses.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    # The batch system's way to stop a job: clean up as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        _run(options)
    except (ValueError, WorkerDied) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        place = error.filename or options["output_dir"]
        print(f"error: {place}: {error.strerror}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _run(options: dict[str, Any]) -> None:
    # Late, because Megatron takes seconds, which --help and a typing mistake need not wait for.
    from megatron_acodm.preprocess.pipeline import PreprocessOptions, preprocess

    start = time.monotonic()
    manifest = preprocess(PreprocessOptions(**options))
    _print_summary(manifest, options["output_dir"], time.monotonic() - start)


def _print_summary(manifest: Manifest, output_dir: Path, elapsed: float) -> None:
    width = max(len("domain"), *(len(domain.name) for domain in manifest.domains))
    print(f"{'domain':{width}} {'documents':>12} {'tokens':>16} {'MB of text':>12}")
    for domain in manifest.domains:
        print(
            f"{domain.name:{width}} {domain.documents:12,} {domain.tokens:16,} "
            f"{domain.bytes / 1e6:12,.1f}"
        )
    documents = sum(domain.documents for domain in manifest.domains)
    size = sum(domain.bytes for domain in manifest.domains) / 1e6
    tokens = sum(domain.tokens for domain in manifest.domains)
    print(f"{'total':{width}} {documents:12,} {tokens:16,} {size:12,.1f}")
    for name, count in manifest.empty_domains.items():
        print(f"left out: domain {name!r}, whose {count:,} documents are all empty")
    if manifest.skipped_count:
        print(f"skipped {manifest.skipped_count:,} malformed lines, listed in manifest.json:")
        for bad in manifest.skipped_lines[:_PRINTED_LINES]:
            print(f"  {bad.input}, line {bad.line}: {bad.reason}")
        if manifest.skipped_count > _PRINTED_LINES:
            print("  ...")
    print(
        f"wrote {output_dir / MANIFEST_NAME} and its datasets in {elapsed:.1f} s: "
        f"{documents / elapsed:,.0f} documents/s, {size / elapsed:,.1f} MB/s"
    )


if __name__ == "__main__":
    sys.exit(main())
