"""Builds shards: reads inputs one after another while worker processes encode their chunks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_acodm.preprocess.encoder import ChunkEncoder, EncodedChunk
from megatron_acodm.preprocess.manifest import TokenizerInfo
from megatron_acodm.preprocess.pool import WorkerPool
from megatron_acodm.preprocess.reader import Chunk, InputFile
from megatron_acodm.preprocess.shard import ShardWriter


@dataclass(frozen=True)
class ShardBuilder:
    """What every shard of a corpus is built with; travels to other machines."""

    shards: Path
    """Folder of the shards."""
    tokenizer: TokenizerInfo
    """The tokenizer; its ``file`` is the copy to load."""
    vocab_size: int | None
    """As ``build_tokenizer`` takes it."""
    workers: int
    """Tokenizing processes."""
    skip_bad_lines: bool
    """Count and list malformed lines instead of stopping at the first."""

    def build(
        self, inputs: Mapping[int, InputFile], on_chunk: Callable[[EncodedChunk], None]
    ) -> None:
        """Build the shards of some inputs, in this order.

        The chunks of an input are encoded while the last ones of the input before it still are,
        so that the workers stay busy. What is wrong with an input is raised when its turn comes:
        all shards before it are finished by then.

        Args:
            inputs: By number.
            on_chunk: Called for each chunk that is written.

        Raises:
            ValueError: for an input or a record that cannot be used.
            OSError: when reading or writing fails; the file's name is in it.
            WorkerDied: when a tokenizing process is killed.
        """
        file = self.tokenizer.file
        make_encoder = partial(
            ChunkEncoder, self.tokenizer.type, None if file is None else str(file), self.vocab_size
        )
        origins, failures = deque[int](), dict[int, Exception]()

        def chunks() -> Iterator[Chunk]:
            for index, item in inputs.items():
                try:
                    for chunk in item.chunks():
                        origins.append(index)
                        yield chunk
                except (ValueError, OSError) as error:
                    failures[index] = error
                    return

        with WorkerPool(self.workers, make_encoder) as pool:
            results = pool.map(chunks())
            result: Any = next(results, None)
            for index, item in inputs.items():
                with ShardWriter(self.shards, index, self.tokenizer, self.skip_bad_lines) as writer:
                    while origins and origins[0] == index:
                        origins.popleft()
                        writer.add(result)
                        on_chunk(result)
                        result = next(results, None)
                    if index in failures:
                        raise failures[index]
                    writer.complete(item.info)
