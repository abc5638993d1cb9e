"""Rates: at which power of the width d a gap closes, from the gaps measured at several widths.

If the gap between a mean and its limit is C d^-p, then for widths a < b

    p = log(gap_a/gap_b) / log(b/a).

With gap_a in [l_a, u_a] and gap_b in [l_b, u_b], p lies between log(l_a/u_b)/log(b/a) and
log(u_a/l_b)/log(b/a).  With more widths it lies in every pair's interval, and their
intersection is all there is to know: eliminating C from log l <= log C - p log d <= log u
(Fourier and Motzkin) leaves one inequality per ordered pair.  Where it is empty no power does.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from montecarlo.evidence import Measurement
from nope.checks import expect


def exponent(
    widths: Sequence[float],
    measured: Sequence[Measurement],
    limits: Sequence[np.ndarray],
    error_rate: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The ends of an interval for p at every entry, each missing with at most `error_rate`.

    `limits` are the values at infinite width.  The measurements share the error rate evenly, and
    like them the interval may be looked at again and again.  An end is infinite where a gap is
    not told from 0, and the lower lies above the upper where no power of d fits.

    Raises `ValueError` for fewer than two widths, or widths that do not rise.
    """
    rising = len(widths) >= 2 and widths[0] > 0 and bool((np.diff(widths) > 0).all())
    expect(rising, "two widths or more, rising", list(widths), "sort them, one of each")
    ends = [
        gap_ends(one.mean - limit, one.half_width(error_rate / len(widths)))
        for one, limit in zip(measured, limits, strict=True)
    ]
    return exponent_of_gaps(widths, *zip(*ends, strict=True))


def gap_ends(gap: np.ndarray, half_width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest size of a gap that is known up to `half_width`."""
    return np.maximum(np.abs(gap) - half_width, 0.0), np.abs(gap) + half_width


def exponent_of_gaps(
    widths: Sequence[float], least: Sequence[np.ndarray], greatest: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The exponents p for which C d^-p lies between `least` and `greatest` at every width."""
    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(widths, dtype=float))
        low, high = np.log(least), np.log(greatest)
    pairs = list(combinations(range(len(widths)), 2))
    lows = [(low[a] - high[b]) / (logs[b] - logs[a]) for a, b in pairs]
    highs = [(high[a] - low[b]) / (logs[b] - logs[a]) for a, b in pairs]
    return np.max(lows, axis=0), np.min(highs, axis=0)
