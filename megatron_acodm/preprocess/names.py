"""Turns domain names into file names."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable

_MAX_LENGTH = 80


def file_names(domains: Iterable[str]) -> dict[str, str]:
    """Map each domain's name to a file name of its own, without an ending.

    Letters, digits, ``.``, ``_`` and ``-`` are kept: "Gutenberg (PG-19)" becomes
    "Gutenberg_PG-19". Names that would meet in one file, or be cut, or vanish, carry a hash of the
    original besides. The result depends on the set of the names alone. Names that differ in case
    only count as equal, because some file systems do not tell them apart.

    Raises:
        ValueError: when two names still end as one.
    """
    plain = {name: re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") for name in set(domains)}
    uses = Counter(safe.lower() for safe in plain.values())
    names = {}
    for name, safe in sorted(plain.items()):
        if uses[safe.lower()] > 1 or not 0 < len(safe) <= _MAX_LENGTH:
            digest = hashlib.sha256(name.encode()).hexdigest()[:8]
            safe = f"{safe[:_MAX_LENGTH]}-{digest}".lstrip("-")
        names[name] = safe
    owners: dict[str, str] = {}
    for name, safe in names.items():
        if (other := owners.setdefault(safe.lower(), name)) != name:
            raise ValueError(
                f"the domains {other!r} and {name!r} would both be stored as {safe!r}; rename one"
            )
    return names
