"""Suggestions for a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where a known name is near, else the list of known names."""
    names = [str(item) for item in known]
    lowered = {item.lower(): item for item in names}
    near = difflib.get_close_matches(name.lower()[:100], list(lowered), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {lowered[near[0]]!r}?"
    return f"; known here: {', '.join(names)}"
