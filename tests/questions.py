"""Questions to a model of 64 ids and 16 positions: what to score, and what to go on from."""

from __future__ import annotations

from megatron_acodm.evaluation.scoring import Continuation, Prompt

CONTINUATIONS = [
    Continuation([7], [3]),
    Continuation([7, 9, 11], [4, 5, 6, 61]),
    Continuation(list(range(14)), [1, 2, 3]),  # fills the context, and predicts one more
    Continuation(list(range(40)), [1, 2, 3]),  # loses its beginning
    Continuation([5], list(range(16))),
    Continuation([7, 9, 11], [4]),
    Continuation([60, 61, 62], [0]),
]
PROMPTS = [
    Prompt([7], 4, ()),
    Prompt([7, 9, 11], 6, ()),
    Prompt(list(range(30)), 5, ()),  # loses its beginning
    Prompt([1, 2], 15 - 2, ()),
]
