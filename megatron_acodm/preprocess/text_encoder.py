"""Makes token ids of texts: the very ids of Megatron's tokenizers, sooner."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from megatron_acodm.preprocess.word_encoder import WordEncoder

if TYPE_CHECKING:
    from megatron.core.tokenizers.text import MegatronTokenizerText

TextEncoder = Callable[[str], np.ndarray]
"""Returns the ids of a text that is not empty, without EOD.

Raises:
    ValueError: for a text that the tokenizer cannot read.
"""


def build_text_encoder(
    tokenizer: MegatronTokenizerText, tokenizer_type: str, dtype: np.dtype
) -> TextEncoder:
    """Return the fastest way to a tokenizer's ids that is sure to give what it gives.

    Args:
        tokenizer: As ``build_tokenizer`` makes it.
        tokenizer_type: What it was made of.
        dtype: Of the ids.
    """
    encoder: TextEncoder | None = None
    if tokenizer_type == "ByteLevelTokenizer":
        encoder = lambda text: np.frombuffer(text.encode(), np.uint8).astype(dtype)  # noqa: E731
    elif tokenizer_type == "SentencePieceTokenizer":
        encoder = WordEncoder.for_model(tokenizer.path, dtype)
    elif tokenizer_type == "HuggingFaceTokenizer":
        encoder = _huggingface_encoder(tokenizer, dtype)
    return encoder or _PlainEncoder(tokenizer, tokenizer_type, dtype)


class _PlainEncoder:
    """Asks Megatron's tokenizer."""

    def __init__(
        self, tokenizer: MegatronTokenizerText, tokenizer_type: str, dtype: np.dtype
    ) -> None:
        self._tokenizer, self._type, self._dtype = tokenizer, tokenizer_type, dtype
        self._vocab_size = tokenizer.vocab_size

    def __call__(self, text: str) -> np.ndarray:
        try:
            ids = np.array(self._tokenizer.tokenize(text), dtype=np.int64)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{self._type} cannot read 'text': {error}") from error
        # The null tokenizer takes its ids from the text, where anything may be written.
        if len(ids) and (ids.min() < 0 or ids.max() >= self._vocab_size):
            raise ValueError(f"'text' has ids outside [0, {self._vocab_size})")
        return ids.astype(self._dtype)


def _huggingface_encoder(tokenizer: MegatronTokenizerText, dtype: np.dtype) -> TextEncoder | None:
    """Return an encoder that spares the way through tokens as text; None if that may matter."""
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    wrapped = tokenizer._tokenizer.tokenizer
    for method in ("tokenize", "convert_tokens_to_ids"):
        if getattr(type(wrapped), method) is not getattr(PreTrainedTokenizerFast, method, None):
            return None
    # Megatron has set it up: no truncation, no padding, special tokens in a text are theirs.
    backend = wrapped.backend_tokenizer
    # Only a piece of a vocabulary where each id has a text of its own is found again by its text.
    vocab = backend.get_vocab(with_added_tokens=True)
    if not isinstance(backend.model, BPE) or any(
        backend.id_to_token(number) != token for token, number in vocab.items()
    ):
        return None

    def encode(text: str) -> np.ndarray:
        (encoding,) = backend.encode_batch_fast([text], add_special_tokens=False)
        return np.array(encoding.ids, dtype=dtype)

    return encode
