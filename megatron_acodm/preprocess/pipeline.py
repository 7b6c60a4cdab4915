"""Runs preprocessing from end to end: one pass over the inputs, all domains at once."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_acodm.megatron.indexed import IndexedDatasetWriter, token_dtype
from megatron_acodm.megatron.tokenizer import build_tokenizer, tokenizer_files, tokenizer_sha256
from megatron_acodm.preprocess.encoder import MAX_LISTED_LINES, ChunkEncoder, EncodedChunk
from megatron_acodm.preprocess.manifest import (
    Manifest,
    ManifestDomain,
    SkippedLine,
    TokenizerInfo,
)
from megatron_acodm.preprocess.names import file_names
from megatron_acodm.preprocess.pool import WorkerPool
from megatron_acodm.preprocess.progress import Progress
from megatron_acodm.preprocess.reader import InputFile, open_inputs, read_chunks
from megatron_acodm.preprocess.workspace import TOKENIZER_FOLDER, Workspace

MAX_DOMAINS = 4096
"""More are a mistake in the records, which would otherwise fill the disk with files."""


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
    """Tokenizing processes. The output does not depend on it."""
    skip_bad_lines: bool = False
    """Count and list malformed lines instead of stopping at the first."""
    overwrite: bool = False
    """Replace the corpus that the output folder holds."""


def preprocess(options: PreprocessOptions) -> Manifest:
    """Write one indexed dataset a domain, and the manifest.

    A dataset is, byte for byte, what Megatron-LM's ``tools/preprocess_data.py --append-eod``
    writes for a file with that domain's documents alone. Nothing appears under its final name
    before everything is complete.

    Raises:
        ValueError: for options, inputs or records that cannot be used.
        OSError: when reading or writing fails; the file's name is in it.
        WorkerDied: when a tokenizing process is killed.
    """
    inputs = open_inputs(options.inputs)
    model = options.tokenizer_model
    tokenizer = build_tokenizer(options.tokenizer_type, model, options.vocab_size)
    with Workspace(options.output_dir, options.overwrite) as workspace:
        # The corpus keeps the tokenizer that made it; using the copy makes sure of that.
        copies = _copy_files(tokenizer_files(options.tokenizer_type, model), workspace.path)
        model = str(copies[0]) if copies else None
        info = TokenizerInfo(
            type=options.tokenizer_type,
            file=workspace.output_dir / TOKENIZER_FOLDER / copies[0].name if copies else None,
            sha256=tokenizer_sha256(options.tokenizer_type, model),
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
        )
        corpus = _Corpus(workspace.path, token_dtype(info.vocab_size), options.skip_bad_lines)
        make_encoder = functools.partial(
            ChunkEncoder, options.tokenizer_type, model, options.vocab_size
        )
        with WorkerPool(options.workers, make_encoder) as pool:
            _fill(corpus, pool, inputs)
        files, domains = corpus.finalize(workspace.output_dir)
        files |= {copy: f"{TOKENIZER_FOLDER}/{copy.name}" for copy in copies}
        manifest = Manifest(
            domains=domains,
            tokenizer=info,
            inputs=[item.info for item in inputs],
            empty_domains=corpus.empty_domains(),
            skipped_count=corpus.skipped_count,
            skipped_lines=corpus.skipped_lines,
        )
        workspace.publish(files, manifest)
    return manifest


def _copy_files(files: Iterable[Path], workspace: Path) -> list[Path]:
    folder = workspace / TOKENIZER_FOLDER
    folder.mkdir()
    return [Path(shutil.copyfile(file, folder / file.name)) for file in files]


def _fill(corpus: _Corpus, pool: WorkerPool, inputs: list[InputFile]) -> None:
    progress = Progress(sum(item.size for item in inputs))
    with closing(progress):
        for chunk in pool.map(read_chunks(inputs)):
            corpus.add(chunk)
            parts = chunk.domains.values()
            progress.update(
                chunk.input_bytes,
                sum(len(part.lengths) for part in parts),
                sum(part.bytes for part in parts),
            )


class _Corpus:
    """The datasets that grow in the workspace, and the lines that were left out."""

    def __init__(self, workspace: Path, dtype: np.dtype, skip_bad_lines: bool) -> None:
        self._workspace = workspace
        self._dtype = dtype
        self._skip_bad_lines = skip_bad_lines
        self._writers: dict[str, IndexedDatasetWriter] = {}
        self._bytes: dict[str, int] = {}
        self.skipped_count = 0
        self.skipped_lines: list[SkippedLine] = []

    def add(self, chunk: EncodedChunk) -> None:
        """Append a chunk's documents.

        Raises:
            ValueError: for a malformed line that must not be skipped, or too many domains.
        """
        if chunk.bad_count and not self._skip_bad_lines:
            bad = chunk.bad_lines[0]
            raise ValueError(
                f"{bad.input}, line {bad.line}: {bad.reason}; repair it, or leave such lines out "
                "with --skip-bad-lines"
            )
        self.skipped_count += chunk.bad_count
        self.skipped_lines += chunk.bad_lines[: MAX_LISTED_LINES - len(self.skipped_lines)]
        for name, part in chunk.domains.items():
            if name not in self._writers:
                if len(self._writers) == MAX_DOMAINS:
                    raise ValueError(
                        f"there are more than {MAX_DOMAINS} domains, {name!r} among them; "
                        "'meta.pile_set_name' must name a kind of text, not a document"
                    )
                prefix = self._workspace / f"{len(self._writers):05d}"
                self._writers[name] = IndexedDatasetWriter(prefix, self._dtype)
                self._bytes[name] = 0
            self._writers[name].append(part.tokens, part.lengths)
            self._bytes[name] += part.bytes

    def empty_domains(self) -> dict[str, int]:
        """Documents of each domain that has no tokens; Megatron cannot open an empty dataset."""
        return {n: w.documents for n, w in sorted(self._writers.items()) if not w.tokens}

    def finalize(self, output_dir: Path) -> tuple[dict[Path, str], list[ManifestDomain]]:
        """Complete the datasets.

        Returns:
            Final file name by path, and the domains, sorted by name, as they will lie in
            ``output_dir``.

        Raises:
            ValueError: when there is no document with any text.
        """
        names = file_names(name for name, writer in self._writers.items() if writer.tokens)
        if not names:
            raise ValueError(
                f"the inputs hold no document with any text ({self.skipped_count} malformed lines "
                "were skipped); check --input"
            )
        files, domains = {}, []
        for name, file_name in sorted(names.items()):
            writer = self._writers[name]
            writer.finalize()
            prefix = f"{file_name}_text_document"
            files[writer.bin_path] = prefix + ".bin"
            files[writer.idx_path] = prefix + ".idx"
            domains.append(
                ManifestDomain(
                    name=name,
                    prefix=output_dir / prefix,
                    documents=writer.documents,
                    empty_documents=writer.empty_documents,
                    tokens=writer.tokens,
                    bytes=self._bytes[name],
                )
            )
        return files, domains
