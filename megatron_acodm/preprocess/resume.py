"""Finds what earlier commands finished that this one can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from megatron_acodm.preprocess.encoder import MAX_LISTED_LINES
from megatron_acodm.preprocess.manifest import TokenizerInfo
from megatron_acodm.preprocess.progress import say
from megatron_acodm.preprocess.reader import InputFile
from megatron_acodm.preprocess.shard import Shard, has_its_files, read_shard, shard_key
from megatron_acodm.preprocess.workspace import Workspace, remove

_NAMED = 5
"""Inputs that a message names; it counts all."""


def finished_shards(
    workspace: Workspace,
    inputs: Sequence[InputFile],
    tokenizer: TokenizerInfo,
    skip_bad_lines: bool,
) -> dict[str, Shard]:
    """Return the finished shards that are what this command would build, by the inputs' names.

    Of their skipped lines they keep the first ones, as many as a manifest lists.

    Args:
        workspace: Holds the shards. When it is merging, the inputs are all of the command.
        inputs: Whose shards are looked for.
        tokenizer: Of this command.
        skip_bad_lines: Whether shards may have left lines out.

    Raises:
        ValueError: when one left lines out that must not be, or when a merge that was cut short
            is of another command.
        OSError: with the file's name, when a record or a touched input cannot be read.
    """
    if workspace.is_merging:
        _check_merged_inputs(workspace, inputs)
    found: list[tuple[InputFile, Shard | None]] = []
    listed = 0
    for item in inputs:
        shard = read_shard(workspace.shards / shard_key(item.path))
        if shard is not None:
            kept = shard.skipped_lines[: max(1, MAX_LISTED_LINES - listed)]
            shard, listed = replace(shard, skipped_lines=kept), listed + len(kept)
        found.append((item, shard))
    say_touched(sum(shard is not None and i.is_touched(shard.input) for i, shard in found))
    finished = {}
    for item, shard in found:
        difference = _difference(workspace, item, shard, tokenizer)
        if shard is not None and difference is None:
            shard.check_skipped(skip_bad_lines)
            finished[item.name] = shard
        elif workspace.is_merging:
            _refuse_merge(workspace, f"what it has of {item.name} {difference or 'is missing'}")
        elif difference is not None:
            say(f"{item.name}: what is done {difference}")
    return finished


def other_inputs(workspace: Workspace, inputs: Sequence[InputFile]) -> list[str]:
    """Return the paths of inputs with a finished shard that are none of these."""
    others = workspace.finished_shards() - {shard_key(item.path) for item in inputs}
    shards = (read_shard(workspace.shards / key) for key in sorted(others))
    return [shard.input.name for shard in shards if shard is not None]


def say_touched(count: int) -> None:
    """Say that inputs are read, which may take long, only to see whether they are the same."""
    if count:
        say(f"checking {count} touched inputs, whose times changed and sizes did not")


def shortened(names: Sequence[str]) -> str:
    """Return the first of some names for a message."""
    return ", ".join([*names[:_NAMED], *(["..."] if len(names) > _NAMED else [])])


def _difference(
    workspace: Workspace, item: InputFile, shard: Shard | None, tokenizer: TokenizerInfo
) -> str | None:
    """Say how what is there is not the shard that would be built."""
    folder = workspace.shards / shard_key(item.path)
    if shard is None:
        return "is damaged, or of another version" if folder.exists() else None
    difference = shard.difference(item, tokenizer)
    # A merge uses the files up, and knows itself what must be there.
    if difference is None and not workspace.is_merging and not has_its_files(shard, folder):
        remove(folder)  # or what is built instead would be taken for a late copy of it
        return "is damaged"
    return difference


def _check_merged_inputs(workspace: Workspace, inputs: Sequence[InputFile]) -> None:
    names = [str(item.path) for item in inputs]
    pairs = zip_longest(workspace.merged_inputs(), names, fillvalue="none")
    for number, (merged, name) in enumerate(pairs, start=1):
        if merged != name:
            _refuse_merge(workspace, f"its input {number} was {merged}, not {name}")


def _refuse_merge(workspace: Workspace, difference: str) -> None:
    raise ValueError(
        f"a merge in {workspace.output_dir} was cut short, and {difference}; run its command "
        f"again, or remove {workspace.path} to begin anew"
    )
