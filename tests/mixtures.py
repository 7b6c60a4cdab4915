"""A hypothesis strategy for domain weights."""

from __future__ import annotations

from hypothesis import strategies as st


@st.composite
def mixtures(draw, num_domains: int):
    """Weights [K]: ordinary, with zeros, one-hot, or spread over many orders of magnitude."""
    kind = draw(st.sampled_from(["plain", "zeros", "one-hot", "extreme"]))
    if kind == "one-hot":
        hot = draw(st.integers(0, num_domains - 1))
        return [float(k == hot) for k in range(num_domains)]
    value = {
        "plain": st.floats(0.01, 1.0),
        "zeros": st.sampled_from([0.0, 0.3, 1.0]),
        "extreme": st.sampled_from([1e-12, 1e-7, 1e-3, 1.0]),
    }[kind]
    raw = draw(st.lists(value, min_size=num_domains, max_size=num_domains))
    if sum(raw) == 0:
        raw[0] = 1.0
    return [x / sum(raw) for x in raw]
