"""Checksums of a ledger, and what is wrong with a saved one that cannot be used."""

from __future__ import annotations

import json
import zlib
from typing import Any

import numpy as np

from megatron_acodm.blending.mapping import Int64Array

FORMAT = 1
"""Version of a saved ledger's layout."""


def first_link(fingerprint: dict[str, Any]) -> int:
    """The checksum that the chain of stages starts from: that of the ledger's settings."""
    return zlib.crc32(json.dumps(fingerprint, sort_keys=True).encode())


def link(row: Int64Array, previous: int) -> int:
    """The checksum of a stage's row, which also covers all rows before it."""
    return zlib.crc32(row[:-1].data, previous)


def checksum(base_stage: int, rows: Int64Array, carry: Int64Array) -> int:
    """The checksum of all that is saved."""
    return zlib.crc32(rows.data, zlib.crc32(carry.data, base_stage & 0xFFFFFFFF))


def verify(
    state: dict[str, Any], fingerprint: dict[str, Any], row_width: int
) -> tuple[Int64Array, Int64Array]:
    """Check a saved ledger.

    Returns:
        Its rows [stages + 1, row_width] and carry [K], as copies.

    Raises:
        ValueError: when it is of other settings, or damaged; the message says which, or where.
    """
    try:
        version, saved, base_stage = state["format"], state["fingerprint"], state["base_stage"]
        rows, carry = state["rows"].numpy().copy(), state["carry"].numpy().copy()
        if version != FORMAT:
            raise ValueError(f"the ledger was saved in format {version}; this is format {FORMAT}")
        differences = _differences(saved, fingerprint)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not the state of a ledger: {error!r}") from error
    if differences:
        raise ValueError(
            "the ledger was saved under other settings, which mean other samples:\n  "
            + "\n  ".join(differences)
        )
    if rows.ndim != 2 or rows.shape[1] != row_width or len(rows) == 0 or rows.dtype != np.int64:
        raise ValueError(f"the ledger is damaged: its rows are {rows.dtype} {list(rows.shape)}")
    for stage in range(len(rows) - 1):
        expected = link(rows[stage + 1], int(rows[stage, -1]) & 0xFFFFFFFF)
        if expected != rows[stage + 1, -1]:
            raise ValueError(
                f"the ledger is damaged at stage {base_stage + stage}, which starts at sample "
                f"{rows[stage, 0]}: its checksum is {rows[stage + 1, -1]}, its content gives "
                f"{expected}; resume from another checkpoint"
            )
    if state.get("checksum") != checksum(base_stage, rows, carry):
        raise ValueError(
            "the ledger is damaged: every stage is whole, but the checksum of the whole is "
            f"{state.get('checksum')}; resume from another checkpoint"
        )
    return rows, carry


def _differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line for each setting, or domain, in which two fingerprints differ."""
    lines = [
        f"{key}: saved {saved[key]}, now {current[key]}"
        for key in ("granule_size", "seed", "scheme")
        if saved[key] != current[key]
    ]
    before = dict(zip(saved["names"], saved["sizes"], strict=True))
    now = dict(zip(current["names"], current["sizes"], strict=True))
    lines += [f"domain {name!r}: saved, but missing now" for name in before if name not in now]
    lines += [f"domain {name!r}: new, was not saved" for name in now if name not in before]
    lines += [
        f"domain {name!r}: saved with {before[name]} sequences, now has {size}"
        for name, size in now.items()
        if before.get(name, size) != size
    ]
    if not lines and list(before) != list(now):
        lines.append(f"order of the domains: saved {list(before)}, now {list(now)}")
    return lines
