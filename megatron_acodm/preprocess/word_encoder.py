"""Encodes with sentencepiece BPE models, each word of a text only once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

CACHE_BYTES = 1 << 26
"""Memory that the known words of a process may take."""

_protos: Any = sentencepiece_model_pb2  # made when imported: mypy knows nothing of it
_ENTRY_BYTES = 240  # of a word's dict entry, str and bytes, beside their characters and ids
_BLOCK = 1 << 20  # characters that are cut into words at a time, which bounds the memory
_SPACE = "\u2581"  # what sentencepiece makes of a space before it looks for pieces
_MARK = "\0"  # stands between words that are encoded together


class WordEncoder:
    """Returns the ids of texts that are not empty, without EOD.

    BPE makes a piece only of two that lie side by side and are a piece together. So where no
    piece of the vocabulary has one character before another, no piece ever joins the two: cutting
    there changes no id. Cuts are before each run of spaces, and between characters of groups that
    no piece mixes. What lies between cuts is a word here, and most words have been seen before.

    Args:
        processor: With the model.
        proto: The same model.
        dtype: Of the ids.
    """

    def __init__(self, processor: Any, proto: Any, dtype: np.dtype) -> None:
        self._processor, self._dtype = processor, dtype
        self._words = re.compile(_word_pattern(_neighbours(proto)))
        spec = proto.normalizer_spec
        # All that is left of normalization is then the space in front, if even that.
        self._is_plain = not (
            spec.precompiled_charsmap
            or spec.remove_extra_whitespaces
            or proto.trainer_spec.treat_whitespace_as_suffix
        )
        self._prefix = " " if spec.add_dummy_prefix else ""
        bare = type(proto)()
        bare.CopyFrom(proto)
        bare.normalizer_spec.Clear()
        bare.normalizer_spec.name = "identity"
        bare.normalizer_spec.add_dummy_prefix = False
        bare.normalizer_spec.remove_extra_whitespaces = False
        self._bare = sentencepiece.SentencePieceProcessor(model_proto=bare.SerializeToString())
        (self._mark_id,) = self._bare.encode(_MARK)
        self._cache: dict[str, bytes] = {}
        self._cached_bytes = 0
        self._times_strange = 0

    @classmethod
    def for_model(cls, path: str, dtype: np.dtype) -> WordEncoder | None:
        """Return an encoder; None for a model whose words are not sure to be independent."""
        processor = sentencepiece.SentencePieceProcessor(model_file=path)
        proto = _protos.ModelProto.FromString(processor.serialized_model_proto())
        kind = _protos.ModelProto.SentencePiece
        if (
            # The others' choice at a place depends on scores added up since the beginning.
            proto.trainer_spec.model_type != _protos.TrainerSpec.BPE
            # Without, unknown characters side by side are one id, across words too.
            or not proto.trainer_spec.byte_fallback
            or not proto.normalizer_spec.escape_whitespaces
            # An unused piece is taken apart as it was made anywhere in the text.
            or any(piece.type == kind.UNUSED for piece in proto.pieces)
            or any({" ", _MARK} & set(piece.piece) for piece in proto.pieces)
            or any(b == _SPACE != a for a, b in _neighbours(proto))
        ):
            return None
        return cls(processor, proto, dtype)

    def __call__(self, text: str) -> np.ndarray:
        """Return the ids of a text."""
        normal = self._prefix + text if self._is_plain else self._processor.normalize(text)
        if _MARK in normal:
            return np.array(self._processor.encode(text), dtype=self._dtype)
        parts = []
        for words in self._cut(normal):
            if missing := list(set(words).difference(self._cache)):
                if self._are_strange(missing, words):
                    ids = self._bare.encode("".join(words))
                    parts.append(np.array(ids, dtype=self._dtype).tobytes())
                    continue
                if self._cached_bytes > CACHE_BYTES:
                    self._cache, self._cached_bytes = {}, 0
                    missing = list(set(words))
                self._learn(missing)
            parts.append(b"".join(map(self._cache.__getitem__, words)))
        return np.frombuffer(b"".join(parts), dtype=self._dtype)

    def _are_strange(self, missing: list[str], words: list[str]) -> bool:
        """Whether words are mostly new to an encoder that knows many, and not worth learning.

        Such words may never come again, as those of base64; but every fourth time they are learned,
        because they may be a language that has just begun.
        """
        if self._cached_bytes < CACHE_BYTES // 8:
            return False
        if 2 * sum(map(len, missing)) < sum(map(len, words)):
            return False
        self._times_strange += 1
        return self._times_strange % 4 != 0

    def _cut(self, text: str) -> Iterator[list[str]]:
        """Yield the words of a text, a block at a time."""
        start, size = 0, _BLOCK
        while start + size < len(text):
            words = self._words.findall(text, start, start + size)
            last = words.pop()  # the end of the block may have cut it short
            if words:
                yield words
                start, size = start + size - len(last), _BLOCK
            else:
                size *= 2
        yield self._words.findall(text, start)

    def _learn(self, words: list[str]) -> None:
        """Encode words, all at once, into the cache."""
        text = _MARK.join(words)
        ids = np.array(self._bare.encode(text), dtype=self._dtype)
        data, size = ids.tobytes(), self._dtype.itemsize
        ends = np.append(np.flatnonzero(ids == self._mark_id), len(ids)) * size
        starts = np.append(0, ends[:-1] + size)
        slices = map(slice, starts.tolist(), ends.tolist())
        self._cache.update(zip(words, map(data.__getitem__, slices), strict=True))
        self._cached_bytes += _ENTRY_BYTES * len(words) + 4 * len(text) + len(data)


def _neighbours(proto: Any) -> set[tuple[str, str]]:
    """Return the pairs of characters that lie side by side in a piece that text can have."""
    kind = type(proto).SentencePiece
    return {
        pair
        for piece in proto.pieces
        if piece.type in (kind.NORMAL, kind.USER_DEFINED)
        for pair in zip(piece.piece, piece.piece[1:], strict=False)
    }


def _word_pattern(neighbours: set[tuple[str, str]]) -> str:
    """Return the pattern of words: spaces, and characters of one group after them."""
    groups = {chr(code): {chr(code)} for code in range(128)}
    for pair in neighbours:
        if pair[0] != _SPACE:
            first, second = (groups.setdefault(character, {character}) for character in pair)
            first |= second
            groups.update(dict.fromkeys(second, first))
    # Groups of common characters; every other character counts to the group of most.
    of_most = max(groups.values(), key=len)
    common = [groups[character] for character in "\t\n\r0123456789.,"]
    own = {min(group): group for group in common if group is not of_most}
    classes = [re.escape("".join(sorted(own[first]))) for first in sorted(own)]
    alternatives = [f"[^ {_SPACE}{''.join(classes)}]+", *(f"[{item}]+" for item in classes)]
    return rf"[ {_SPACE}]*(?:{'|'.join(alternatives)})|[ {_SPACE}]+"
