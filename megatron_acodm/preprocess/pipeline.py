"""Runs preprocessing from end to end: shards, one an input, then the merge and the publication."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_acodm.files import sync
from megatron_acodm.megatron.tokenizer import build_tokenizer
from megatron_acodm.preprocess.encoder import MAX_LISTED_LINES
from megatron_acodm.preprocess.manifest import Manifest, ManifestDomain, TokenizerInfo
from megatron_acodm.preprocess.merge import domain_totals, merge_shards
from megatron_acodm.preprocess.progress import Progress, say
from megatron_acodm.preprocess.publish import (
    TOKENIZER_FOLDER,
    finish_publication,
    publish,
    published_file,
)
from megatron_acodm.preprocess.reader import InputFile, open_inputs
from megatron_acodm.preprocess.resume import (
    finished_shards,
    other_inputs,
    say_touched,
    shortened,
)
from megatron_acodm.preprocess.shard import Shard, ShardBuilder, shard_key
from megatron_acodm.preprocess.workspace import Workspace, remove

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class PreprocessOptions:
    """What to preprocess, and how."""

    inputs: list[str]
    """``.jsonl``, ``.jsonl.gz`` and ``.jsonl.zst`` files, read in this order."""
    output_dir: Path
    """Receives the datasets, a copy of the tokenizer, and the manifest."""
    tokenizer_type: str
    """As ``build_tokenizer`` takes it, like the next two."""
    tokenizer_model: str | None = None
    """File of the tokenizer."""
    vocab_size: int | None = None
    """For NullTokenizer."""
    workers: int = 1
    """Tokenizing processes (of each input's task, with Ray). The output does not depend on it."""
    skip_bad_lines: bool = False
    """Count and list malformed lines instead of stopping at the first."""
    overwrite: bool = False
    """Replace the corpus that the output folder holds, unless it is the one that is asked for."""
    engine: str = "local"
    """Where ``preprocess`` encodes: one of ENGINES."""

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers is {self.workers}; it must be at least 1")
        if self.engine not in ENGINES:
            raise ValueError(f"--engine is {self.engine!r}; the engines are {', '.join(ENGINES)}")


@dataclass(frozen=True)
class Outcome:
    """The corpus that a call left behind."""

    manifest: Manifest
    is_new: bool
    """Whether the call wrote it, rather than found it complete."""


def preprocess(options: PreprocessOptions) -> Outcome:
    """Write one indexed dataset a domain, and the manifest.

    A dataset is, byte for byte, what Megatron-LM's ``tools/preprocess_data.py --append-eod``
    writes for a file with that domain's documents alone. Nothing appears under its final name
    before everything is complete. Inputs that an earlier call with the same options finished are
    not encoded again; a corpus that is complete and unchanged is left as it is.

    Raises:
        ValueError: for options, inputs or records that cannot be used.
        OSError: when reading or writing fails; the file's name is in it.
        WorkerDied: when a process that encodes or merges is killed.
    """
    with _started(options) as run:
        if (complete := run.complete_corpus()) is not None:
            return complete
        run.build(run.inputs)
        return run.merge()


def build_part(options: PreprocessOptions, part: int, parts: int) -> int | None:
    """Build the shards of one of several parts of the inputs, while others build the rest.

    Args:
        options: The same for all parts.
        part: Number of this one, from 0.
        parts: How many there are, as equal as can be.

    Returns:
        Inputs of this part, now finished; None when the corpus is complete already.

    Raises:
        ValueError, OSError, WorkerDied: as ``preprocess``.
    """
    if parts < 1:
        raise ValueError(f"--shard is {part}/{parts}; there must be at least one part")
    if not 0 <= part < parts:
        raise ValueError(
            f"--shard is {part}/{parts}; it counts from 0/{parts} to {parts - 1}/{parts}"
        )
    with _started(options, shared=True) as run:
        run.refuse_merge()
        if run.complete_corpus() is not None:
            return None
        count = len(run.inputs)
        inputs = run.inputs[part * count // parts : (part + 1) * count // parts]
        run.lock(inputs)
        run.build(inputs)
        return len(inputs)


def merge_parts(options: PreprocessOptions) -> Outcome:
    """Merge and publish what ``build_part`` built.

    Raises:
        ValueError, OSError, WorkerDied: as ``preprocess``; ValueError also for missing shards.
    """
    with _started(options) as run:
        if (complete := run.complete_corpus()) is not None:
            return complete
        return run.merge()


@contextmanager
def _started(options: PreprocessOptions, shared: bool = False) -> Iterator[_Run]:
    """Check the options, and lock the output folder."""
    inputs = open_inputs(options.inputs)
    tokenizer = build_tokenizer(options.tokenizer_type, options.tokenizer_model, options.vocab_size)
    with Workspace(options.output_dir, shared) as workspace:
        # The corpus keeps the tokenizer that made it; using the copy makes sure of that.
        copies, sha256 = workspace.copy_tokenizer(options.tokenizer_type, options.tokenizer_model)
        info = TokenizerInfo(
            type=options.tokenizer_type,
            file=copies[0] if copies else None,
            sha256=sha256,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
        )
        yield _Run(options, inputs, info, workspace)


class _Run:
    """The steps that the calls above are made of.

    Args:
        options: As they were given.
        inputs: All of them.
        tokenizer: Its ``file`` is a copy in the workspace.
        workspace: Locked.
    """

    def __init__(
        self,
        options: PreprocessOptions,
        inputs: Sequence[InputFile],
        tokenizer: TokenizerInfo,
        workspace: Workspace,
    ) -> None:
        self._options = options
        self.inputs = inputs
        self._tokenizer = tokenizer
        self._workspace = workspace

    def complete_corpus(self) -> Outcome | None:
        """Return the corpus that the output folder holds, when it is the one that is asked for.

        A publication that was cut short is completed first.

        Raises:
            ValueError: when it is another one, and is not to be replaced.
        """
        folder, is_new = self._workspace.output_dir, finish_publication(self._workspace)
        file = published_file(folder)
        if file is None:
            return None
        try:
            manifest = Manifest.load(folder)
            difference = self._difference(manifest)
        except ValueError as error:
            difference = f"{file.name}, but no complete corpus ({error})"
        if difference is None:
            return Outcome(manifest, is_new)
        if self._options.overwrite:
            return None
        raise ValueError(
            f"{folder} already holds {difference}; pass --overwrite to replace what is there, or "
            "choose another --output-dir"
        )

    def _difference(self, manifest: Manifest) -> str | None:
        """Say how a corpus is another than the one that is asked for; None if it is that."""
        if [info.name for info in manifest.inputs] != [str(item.path) for item in self.inputs]:
            return "a corpus of other inputs"
        if replace(manifest.tokenizer, file=None) != replace(self._tokenizer, file=None):
            return "a corpus of another tokenizer"
        if manifest.skipped_count and not self._options.skip_bad_lines:
            return "a corpus that was made with --skip-bad-lines and has lines left out"
        pairs = list(zip(self.inputs, manifest.inputs, strict=True))
        say_touched(sum(item.is_touched(info) for item, info in pairs))
        for item, info in pairs:
            if not item.is_unchanged(info):
                return f"a corpus that was made before {item.name} was changed"
        return None

    def refuse_merge(self) -> None:
        """Raise a ValueError when a merge or a publication has begun and not ended."""
        workspace = self._workspace
        if workspace.is_merging or workspace.publication.exists():
            raise ValueError(
                f"a merge in {workspace.output_dir} was cut short; run its command again (with "
                f"--merge, or without --shard), or remove {workspace.path} to begin anew"
            )

    def lock(self, inputs: Sequence[InputFile]) -> None:
        """Keep others from building these inputs' shards.

        Raises:
            ValueError: when another run is at one of them.
        """
        items = {shard_key(item.path): item for item in inputs}
        if (busy := self._workspace.lock_shards(list(items))) is not None:
            raise ValueError(
                f"another run is at {items[busy].name}; wait for it, or give each run a --shard of "
                "its own"
            )

    def build(self, inputs: Sequence[InputFile]) -> None:
        """Build the shards of these inputs that are not finished.

        Raises:
            ValueError, OSError: as ``finished_shards`` and ``ShardBuilder.build``.
        """
        finished = self._finished(inputs)
        missing = [item for item in inputs if item.name not in finished]
        if finished:
            say(f"{len(finished)} of {len(inputs)} inputs are done already")
        if not missing:
            return
        builder = ShardBuilder(
            shards=self._workspace.shards,
            tokenizer=self._tokenizer,
            vocab_size=self._options.vocab_size,
            workers=self._options.workers,
            skip_bad_lines=self._options.skip_bad_lines,
        )
        total = sum(item.size for item in inputs)
        done = total - sum(item.size for item in missing)
        with self._telling_what_stays(), closing(Progress("the input", total, done)) as progress:
            if self._options.engine == "ray":
                from megatron_acodm.preprocess.ray_engine import build_on_ray

                build_on_ray(builder, missing, progress)
            else:
                builder.build(missing, progress.add_chunk)
        say(f"encoded {len(missing)} inputs: {progress.summary()}")

    def _finished(self, inputs: Sequence[InputFile]) -> dict[str, Shard]:
        skip = self._options.skip_bad_lines
        return finished_shards(self._workspace, inputs, self._tokenizer, skip)

    def merge(self) -> Outcome:
        """Merge the shards and publish the corpus.

        Raises:
            ValueError: for inputs without a finished shard, or as ``finished_shards``.
        """
        workspace = self._workspace
        finished = self._finished(self.inputs)
        if missing := [item.name for item in self.inputs if item.name not in finished]:
            raise ValueError(
                f"{len(missing)} of {len(self.inputs)} inputs have no finished shard: "
                f"{shortened(missing)}; build them with --shard, or leave --merge out to build and "
                "merge"
            )
        shards = list(finished.values())
        totals = domain_totals(shards)
        others = other_inputs(workspace, self.inputs)
        progress = Progress("the merge", sum(total.tokens for total in totals.values()))
        with self._telling_what_stays(), closing(progress):
            domains = merge_shards(
                workspace,
                shards,
                self._options.workers,
                lambda domain: progress.update(domain.tokens, domain.documents, domain.bytes),
            )
            manifest = self._manifest(shards, domains)
            publish(workspace, manifest)
        if others:
            say(f"removed what was done of {len(others)} other inputs: {shortened(others)}")
        return Outcome(manifest, is_new=True)

    def _manifest(self, shards: list[Shard], domains: list[ManifestDomain]) -> Manifest:
        empty = {n: t.documents for n, t in sorted(domain_totals(shards).items()) if not t.tokens}
        skipped = [line for shard in shards for line in shard.skipped_lines]
        return Manifest(
            domains=domains,
            tokenizer=replace(self._tokenizer, file=self._add_tokenizer()),
            inputs=[shard.input for shard in shards],
            empty_domains=empty,
            skipped_count=sum(shard.skipped_count for shard in shards),
            skipped_lines=skipped[:MAX_LISTED_LINES],
        )

    @contextmanager
    def _telling_what_stays(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            keys = {shard_key(item.path) for item in self.inputs}
            if done := len(self._workspace.finished_shards() & keys):
                say(
                    f"kept: {done} of {len(self.inputs)} inputs are done; the same command goes "
                    "on from there"
                )
            raise

    def _add_tokenizer(self) -> Path | None:
        """Let the copy of the tokenizer be published; return where it will lie."""
        file = self._tokenizer.file
        if file is None:
            return None
        folder = self._workspace.final / TOKENIZER_FOLDER
        remove(folder)
        os.rename(file.parent, folder)
        for copy in folder.iterdir():
            sync(copy)
        return self._workspace.output_dir / TOKENIZER_FOLDER / file.name
