r"""Confidence sequences: intervals that may be looked at as often as one likes.

What can go wrong.  A run looks at its evidence again and again and stops when the answer is
clear.  A fixed-n interval at level alpha is then wrong far more often than alpha, because it
gets a chance at every look.  A confidence sequence bounds the chance that *any* of its
intervals misses the truth, so stopping early costs nothing.  The unit is an independent draw
of weights and inputs; what lies inside a draw is averaged before it comes here.

The tool.  A process that is nonnegative, starts at 1 and does not grow on average ever
reaches 1/alpha with a chance of at most alpha (Ville 1939).  For each mean mu that the draws
might have we take such a process, a bet against mu, and keep the mu whose bet has not yet won
1/alpha.  Two bets are used.

1. Exact, for draws known to lie in [lo, hi].  With xi_i = (mu - x_i)/(hi - mu) >= -1, the bet
   that the mean is below mu with stakes 0 <= l < 1 has the capital

       prod (1 + l xi_i)  >=  exp(l sum xi_i - psi(l) sum xi_i^2),   psi(l) = -log(1-l) - l

   (Fan, Grama and Liu 2015, Proposition 4.1).  It does not grow on average if the mean is mu,
   whatever the law of the draws and their number.  The right-hand side needs their count, mean
   and sum of squares alone, which blocks of any size merge into.  Stakes l_k = .95/1.6^k are
   spread over all scales with capital w_k = 1/((k+1)(k+2)); the interval ends where one of them
   has won: a quadratic in the radius, solved in closed form.  As prod (1 + l xi_i) rises with
   mu, nothing beyond the end comes back (`bounded_half_width`; this is the empirical-Bernstein
   bet of Howard et al. 2021 and Waudby-Smith and Ramdas 2024 with the deviations taken from the
   candidate mean in place of a predictable one; derived here).

   No exact interval is narrower than (hi - lo) log(1/alpha)/n: an event in hiding can move the
   mean by its range times the rate at which it hides.  With log(1/alpha) = 12, cosines within
   2.5% take 1000 draws for that alone, however little they vary, where 300 do by (2).  So each
   is used where it belongs.  Draws that are 0 or 1 (a symmetry held, or not) are judged by (1)
   alone: for rare events (2) is worst.  For draws that average many bounded terms (cosines,
   shares of coordinates) the narrower of both is taken, (1) at `EXACT_SHARE` of the error rate
   and (2) at the rest, which by the union bound is as valid as (2) and does not wait where draws
   are skewed.  When exactness is asked for (`exact`) they are judged by (1) alone.

2. In the limit, for the rest.  For Gaussian draws of known sd, Robbins's normal mixture gives

       |xbar - mu| <= sd z_n / sqrt(n),   z_n = sqrt(2 (1 + 1/(n r)) log(sqrt(n r + 1)/alpha)),

   over all n at once, r set so that z_n is smallest at `TUNED_FOR` draws; by the central limit
   theorem it is asymptotically right for others.  At finite n it is not: sd is estimated, and
   where draws are skewed (mean squares are chi-square like) a low mean comes with a low sd.
   For the t statistic the tail beyond z is, as n grows with e = skew z/sqrt(n) held small,

       exp(-z^2/2 (1 - 2 e/3 + ...) + z^4 (3 - kurt)/(12 n)),  kurt the excess kurtosis

   (Cramer's series of the self-normalised mean; from Shao 1997, Theorem 1.1, derived here).
   For a ratio of means its own skewness, bend included, is meant (`montecarlo.evidence`).
   Student's quantile in place of z answers for the Gaussian part z^4/(4n).  The skewness is
   answered by the widening r that solves r^2 - 2 e r^3/3 = 1,

       r = 1 + e/3 + 5 e^2/18 + ...,

   which takes the kurtosis to be 0.  Right-skewed positive draws have more (gamma draws have
   3 skew^2/2), and then r is wider than need be: the widening of a gamma law itself is
   1 + e/3 + .15 e^2.  The first term left out, 8 e^3/27, changes the tail by exp(8 z^2 e^3/27);
   until that is at most `TAIL_FACTOR` the interval is infinite.  Deep in the tail this waits
   longer, as it must: 64 draws say nothing at 1e-9 about draws of skewness 1/2, however clear
   they look.  Where a band of 2.5% is to be confirmed the wait costs nothing, as skewed draws
   vary more, and many more draws are needed for their variance.

   That leaves a tail at one look of at most 1.7 times the Gaussian's from 256 draws on, and 3
   times at 64, measured by importance sampling down to 1e-9 for chi-square draws of 8 and 128
   degrees.  Looked at from draw `FIRST_LOOK` to 10,000, Gaussian draws of known sd are missed by
   2.4% of sequences at 5% and by .3% at 1%: less than half is spent, and little of that at any
   one look, which leaves room for these factors.  Simulated at 5%, 1% and 0.1% (chi-square,
   log-normal, fourth powers, coins) no more sequences of 2,000 are missed than the rate allows.
   No interval for unbounded draws can do better than such an argument: a rare enough event of
   any size leaves no trace.

Zero sample variance never decides alone.  Where all draws agree up to rounding, an event that
changes the statistic by `size` may have been missed with a probability per draw of
log(1/alpha)/n; that, times the size, is the half-width.

Exact chi-square laws.  Given |x|, the mean square of the d coordinates of W x with Gaussian W
is chi-square with d degrees up to its mean, and so the sum of n draws is with nd if |x| is
fixed (tokens after a norm without eps, or Gaussian tokens themselves), and nowhere else: heads
share weights, later layers have random |x|, softmax mixes.  The sequences do not use it.  It
would spend what the claims at those places assert, and from nd of some thousands on it gives
the same interval: the relative sd is then known, sqrt(2/d), and the widening of the gamma law
is the one above.  The simulations use it, as an exact test of (2).

How the error is shared.  To CONFIRM wrongly, the one position that is out must slip through:
its share is not divided over positions.  To REFUTE wrongly, any position may err: it is.
Bands that hold at all positions, or at all points of a distribution function, come from the
same division.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import special

TUNED_FOR = 256
FIRST_LOOK = 64
"""No look before this many draws."""
LOOK_GROWTH = 1.05
"""The next look comes when the draws have grown by this factor."""
TAIL_FACTOR = 1.2
"""By how much the first neglected term of the skewness may change a tail."""
EXACT_SHARE = 0.1
"""Of the error rate, for the exact sequence where it stands beside the asymptotic one."""
ROUNDING = 16
"""Draws that differ by less than this many units of the last place are the same."""

STAKES = 0.95 / 1.6 ** np.arange(24)
CAPITAL = 1 / (np.arange(1, 25) * np.arange(2, 26))
"""What is bet at each stake; together less than 1."""


def boundary(draws: int, error_rate: float) -> float:
    """z_n of the normal mixture, two-sided, in standard errors."""
    log = -2 * np.log(error_rate)
    spread = (log + np.log1p(log)) / TUNED_FOR * draws
    return float(np.sqrt(2 * (1 + 1 / spread) * (np.log1p(spread) / 2 + log / 2)))


@lru_cache(maxsize=256)
def student(draws: int, z: float) -> float:
    """Student's quantile, for `draws` draws, of the tail that the Gaussian has beyond z."""
    return float(-special.stdtrit(draws - 1, special.ndtr(-z)))


def widening(z: float, draws: int, skewness: np.ndarray) -> np.ndarray:
    """What skewness multiplies the quantile of z by; infinite until its series can be trusted."""
    e = np.abs(skewness) * z / np.sqrt(draws)
    trusted = 8 / 27 * z**2 * e**3 <= np.log(TAIL_FACTOR)
    return np.asarray(np.where(trusted, 1 + e / 3 + 5 / 18 * e**2, np.inf))


def half_width(
    draws: int,
    variance: np.ndarray,
    skewness: np.ndarray,
    error_rate: float,
    size: np.ndarray,
    resolution: float,
) -> np.ndarray:
    """Half the width of the asymptotic confidence sequence after `draws` draws.

    `variance` and `skewness` are per draw; `size` is what an event not yet seen may change the
    statistic by, and `resolution` the relative rounding error of its arithmetic.  Infinite
    before two draws.
    """
    if draws < 2:
        return np.full(np.shape(variance), np.inf)
    z = boundary(draws, error_rate)
    constant = variance <= (ROUNDING * resolution * size) ** 2
    factor = np.where(constant, 1.0, widening(z, draws, skewness))
    width = np.sqrt(variance / draws) * student(draws, z) * factor
    return np.asarray(np.where(constant, size * np.log(1 / error_rate) / draws, width))


def bounded_half_width(
    draws: int,
    mean: np.ndarray,
    variance: np.ndarray,
    bounds: tuple[float, float],
    error_rate: float,
) -> np.ndarray:
    """Half the width of the exact confidence sequence for draws within `bounds`.

    The larger of the distances to the two ends, each at half the error rate.
    """
    low, high = bounds
    second = np.asarray(variance) * (draws - 1) if draws > 1 else np.zeros(np.shape(mean))
    below, above = np.maximum(mean - low, 0.0), np.maximum(high - mean, 0.0)
    radii = [_radius(draws, second, room, error_rate / 2) for room in (below, above)]
    return np.asarray(np.maximum(*radii))


def _radius(draws: int, second: np.ndarray, room: np.ndarray, error_rate: float) -> np.ndarray:
    """The least r at which a bet against the mean lying r away has won; at most `room`.

    `second` is the sum of squares about the sample mean, `room` its distance to the bound.
    A stake l wins at r when, b = room - r being the candidate's distance to the bound,
    l n r/b - psi(l) (second + n r^2)/b^2 = log(1/(w error_rate)).
    """
    stakes, capital = (x.reshape(-1, *[1] * np.ndim(room)) for x in (STAKES, CAPITAL))
    psi = -np.log1p(-stakes) - stakes
    goal = -np.log(error_rate * capital)
    square = draws * (stakes + psi) + goal
    linear = (draws * stakes + 2 * goal) * room
    constant = psi * second + goal * room**2
    root = linear**2 - 4 * square * constant
    # 2c/(b + sqrt) is the smaller root without the cancellation of (b - sqrt)/2a
    found = 2 * constant / np.maximum(linear + np.sqrt(np.maximum(root, 0.0)), np.finfo(float).tiny)
    return np.asarray(np.minimum(np.where(root >= 0, found, room).min(0), room))


def next_look(draws: int) -> int:
    """The number of draws at which to look again."""
    return max(FIRST_LOOK, int(np.ceil(draws * LOOK_GROWTH)))
