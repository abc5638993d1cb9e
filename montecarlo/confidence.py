r"""Confidence sequences: intervals that may be looked at as often as one likes.

What can go wrong.  A run looks at its evidence again and again and stops when the answer is
clear.  A fixed-n interval at level alpha is then wrong far more often than alpha, because it
gets a chance at every look.  A confidence sequence bounds the chance that *any* of its
intervals misses, so stopping early costs nothing.

Which one.  For n draws with mean xbar and standard deviation sd, Robbins's normal mixture
gives, over all n at once,

    |xbar - mu| <= sd z_n / sqrt(n),   z_n = sqrt(2 (1 + 1/(n r)) log(sqrt(n r + 1)/alpha)),

with r set so that z_n is smallest at `TUNED_FOR` draws.  It is exact for Gaussian draws of
known sd, and by the central limit theorem asymptotically right for others.  Three things
make it honest at a few dozen draws:

- sd is estimated: z_n is replaced by the Student quantile of the same tail.
- Per-draw statistics are skewed (mean squares are chi-square like).  Johnson's expansion of
  the t statistic moves its quantile by skew (2 z^2 + 1)/(6 sqrt(n)); both sides are widened by
  it.  Where that is more than `SKEW_LIMIT` of z the expansion means little, and the interval
  is infinite: wait for more draws.
- Zero sample variance never decides alone.  Where all draws agree up to rounding, an event
  that changes the statistic by its own size may have been missed with a probability per draw
  of log(1/alpha)/n; that, times the size, is the half-width.

How the error is shared.  To CONFIRM wrongly, the one position that is out must slip through:
its share is not divided over positions.  To REFUTE wrongly, any position may err: it is.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

TUNED_FOR = 256
FIRST_LOOK = 64
"""No look before this many draws."""
LOOK_GROWTH = 1.1
"""The next look comes when the draws have grown by this factor."""
SKEW_LIMIT = 0.25
ROUNDING = 16
"""Draws that differ by less than this many units of the last place are the same."""


def boundary(draws: int, error_rate: float) -> float:
    """z_n of the normal mixture, two-sided, in standard errors."""
    log = -2 * np.log(error_rate)
    spread = (log + np.log1p(log)) / TUNED_FOR * draws
    return float(np.sqrt(2 * (1 + 1 / spread) * (np.log1p(spread) / 2 + log / 2)))


def half_width(
    draws: int,
    variance: np.ndarray,
    skewness: np.ndarray,
    error_rate: float,
    size: np.ndarray,
    resolution: float,
) -> np.ndarray:
    """Half the width of the confidence sequence after `draws` draws.

    `variance` and `skewness` are per draw; `size` is the magnitude of the statistic and
    `resolution` the relative rounding error of its arithmetic.  Infinite before two draws.
    """
    if draws < 2:
        return np.full(np.shape(variance), np.inf)
    z = boundary(draws, error_rate)
    quantile = stats.t.isf(stats.norm.sf(z), draws - 1)
    shift = np.abs(skewness) * (2 * z**2 + 1) / (6 * np.sqrt(draws))
    width = np.sqrt(variance / draws) * (quantile + shift)
    width = np.where(shift > SKEW_LIMIT * z, np.inf, width)
    constant = variance <= (ROUNDING * resolution * size) ** 2
    return np.where(constant, size * np.log(1 / error_rate) / draws, width)


def next_look(draws: int) -> int:
    """The number of draws at which to look again."""
    return max(FIRST_LOOK, int(np.ceil(draws * LOOK_GROWTH)))
