"""Checks of settings: each raises ValueError with the value, the limit and the remedy."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ValueError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise ValueError(message)


def require_in_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless ``low <= value <= high``."""
    require(low <= value <= high, f"{name} is {value}; it must lie in [{low:g}, {high:g}]")
