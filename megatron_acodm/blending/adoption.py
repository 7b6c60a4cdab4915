"""Carries a run over to another set of domains, or to other data of theirs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from megatron_acodm.blending import integrity, mapping
from megatron_acodm.blending.ledger import Ledger


def adopt(ledger: Ledger, state: dict[str, Any], sample: int, kept: Collection[str]) -> None:
    """Let ``ledger`` go on where a saved one of other domains was, forgetting what it has decided.

    Samples of the saved ledger from ``sample`` on are decided anew; what was drawn before cannot be
    located any more.

    Args:
        ledger: of the new domains.
        state: ``Ledger.state_dict`` of the old ones.
        sample: number of samples that were trained on, which must end a stage.
        kept: domains whose data has not changed. They go on behind the last of their sequences
            that was drawn; all others start at their first.

    Raises:
        ValueError: when the state is damaged, or has no stage that starts at ``sample``.
    """
    try:
        saved = state["fingerprint"]
        names = list(saved["names"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is not the state of a ledger: {error!r}") from error
    if saved["scheme"] != mapping.SCHEME:
        raise ValueError(
            f"the ledger was saved under scheme {saved['scheme']} of the data order, this is "
            f"scheme {mapping.SCHEME}, which would repeat and skip sequences; use the version that "
            "saved it"
        )
    rows, _ = integrity.verify(state, saved, 2 * len(names) + 2)
    found = np.flatnonzero(rows[:, 0] == sample)
    if len(found) == 0:
        raise ValueError(f"no stage of the saved ledger starts at sample {sample}")
    row = rows[found[0]]
    drawn = dict(zip(names, row[1 + len(names) : -1].tolist(), strict=True))
    ledger.restart_at(
        int(state["base_stage"]) + int(found[0]),
        sample,
        [drawn[name] if name in kept else 0 for name in ledger.names],
        int(row[-1]),
    )
