"""Tokenizes Pile-format files into one Megatron indexed dataset a domain, plus manifest.json."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_acodm.help_format import HelpFormatter
from megatron_acodm.megatron.tokenizer import TOKENIZER_TYPES
from megatron_acodm.preprocess.manifest import MANIFEST_NAME, Manifest
from megatron_acodm.preprocess.pool import WorkerDied
from megatron_acodm.preprocess.progress import say

_PRINTED_LINES = 10


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter
    )
    parser.add_argument(
        "--input",
        nargs="+",
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
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES)
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
        help="replace another corpus in --output-dir, once the new one is complete; one that is "
        "already as this command would make it is left alone (to make it anew, delete its "
        "manifest.json)",
    )
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: encode each --input as a task of --workers CPUs on the Ray cluster that "
        "RAY_ADDRESS names, whose nodes all see the files (default: %(default)s)",
    )
    steps = parser.add_mutually_exclusive_group()
    steps.add_argument(
        "--shard",
        type=_part,
        metavar="I/N",
        help="only encode the I-th of N parts of --input, I from 0 to N - 1, while other "
        "processes encode the rest",
    )
    steps.add_argument(
        "--merge", action="store_true", help="only merge what --shard made, when all of it is there"
    )
    steps.add_argument(
        "--verify",
        action="store_true",
        help="only read the corpus in --output-dir again and tell what is not as it was made",
    )
    return parser


def _part(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 0/8")
    return int(part), int(parts)


def _parse(arguments: Sequence[str] | None) -> dict[str, Any]:
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    options["inputs"] = options.pop("input")
    needed = {"--input": options["inputs"], "--tokenizer-type": options["tokenizer_type"]}
    if options["verify"] and any(needed.values()):
        parser.error("--verify takes what it needs from the manifest: leave --input and so on out")
    if not options["verify"] and (missing := [flag for flag, value in needed.items() if not value]):
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if options["engine"] == "ray" and (options["shard"] or options["merge"]):
        parser.error("--engine ray spreads the inputs itself: leave --shard and --merge out")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    options = _parse(arguments)
    # Megatron warns on import about packages that only a GPU run uses.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    # The batch system's way to stop a job: clean up as after Ctrl-C.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return _verify(options) if options["verify"] else _run(options)
    except (ValueError, WorkerDied) as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        place = error.filename or options["output_dir"]
        say(f"error: {place}: {error.strerror or error}")
        return 1
    except _Terminated:
        say("terminated")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT


class _Terminated(BaseException):
    """SIGTERM has come."""


def _terminate(*_: object) -> None:
    raise _Terminated


def _show(lines: list[str]) -> None:
    """Print the result of what is done, which stands even if no one reads this."""
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(options: dict[str, Any]) -> int:
    # Late, because Megatron takes seconds, which --help and a typing mistake need not wait for.
    from megatron_acodm.preprocess.pipeline import (
        PreprocessOptions,
        build_part,
        merge_parts,
        preprocess,
    )

    start = time.monotonic()
    shard, merge, _ = (options.pop(step) for step in ("shard", "merge", "verify"))
    parsed = PreprocessOptions(**options)
    if shard:
        count = build_part(parsed, *shard)
        done = "the corpus is complete already"
        if count is not None:
            done = f"{count} inputs are done; run --merge when all parts are"
        _show([f"--shard {shard[0]}/{shard[1]}: {done}"])
        return 0
    outcome = merge_parts(parsed) if merge else preprocess(parsed)
    manifest_file = parsed.output_dir / MANIFEST_NAME
    if outcome.is_new:
        end = f"wrote {manifest_file} and its datasets in {time.monotonic() - start:.1f} s"
    else:
        end = f"{manifest_file} and its datasets were complete already; nothing was done"
        if parsed.overwrite:
            end += " (to make them anew, delete that file)"
    _show([*_summary(outcome.manifest), end])
    return 0


def _verify(options: dict[str, Any]) -> int:
    from megatron_acodm.preprocess.verify import verify

    start = time.monotonic()
    found = verify(options["output_dir"], options["workers"])
    lines = [f"not compared: {reason}" for reason in found.unread_inputs]
    lines += [f"differs: {difference}" for difference in found.differences]
    if found.differences:
        _show(lines)
        say(f"error: {len(found.differences)} differences from the manifest")
        return 1
    domains = found.manifest.domains
    lines.append(
        f"{sum(d.tokens for d in domains):,} tokens of {sum(d.documents for d in domains):,} "
        f"documents in {len(domains)} domains are as they were made "
        f"({time.monotonic() - start:.1f} s)"
    )
    _show(lines)
    return 0


def _summary(manifest: Manifest) -> list[str]:
    width = max(len("domain"), *(len(domain.name) for domain in manifest.domains))
    lines = [f"{'domain':{width}} {'documents':>12} {'tokens':>16} {'MB of text':>12}"]
    for domain in manifest.domains:
        lines.append(
            f"{domain.name:{width}} {domain.documents:12,} {domain.tokens:16,} "
            f"{domain.bytes / 1e6:12,.1f}"
        )
    documents = sum(domain.documents for domain in manifest.domains)
    size = sum(domain.bytes for domain in manifest.domains) / 1e6
    tokens = sum(domain.tokens for domain in manifest.domains)
    lines.append(f"{'total':{width}} {documents:12,} {tokens:16,} {size:12,.1f}")
    for name, count in manifest.empty_domains.items():
        lines.append(f"left out: domain {name!r}, whose {count:,} documents are all empty")
    if manifest.skipped_count:
        lines.append(
            f"skipped {manifest.skipped_count:,} malformed lines, listed in manifest.json:"
        )
        for bad in manifest.skipped_lines[:_PRINTED_LINES]:
            lines.append(f"  {bad.input}, line {bad.line}: {bad.reason}")
        if manifest.skipped_count > _PRINTED_LINES:
            lines.append("  ...")
    return lines


if __name__ == "__main__":
    sys.exit(main())
