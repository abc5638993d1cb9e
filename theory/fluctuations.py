"""How far the empirical kernel is from its mean at finite width, and what that adds to the mean.

G(m, n) = <x_m, x_n>/d fluctuates about K(m, n) from one draw of tokens and weights to the next.  To
leading order in the inverse widths all that matters at a pair of positions is the covariance of

    G_mm/K_mm,    G_nn/K_nn,    G_mn/sqrt(K_mm K_nn),

a symmetric 3 x 3 matrix for each pair, arrays of shape (3, 3, ...).  One recursion carries it.
A random map of w outputs adds that of w i.i.d. Gaussian coordinates (`wishart`) over w.  A function
of K that acts on each pair alone, with Jacobian D and Hessian H, takes the covariance C to D C D'
and the mean to f(K) + tr(H C)/2 (the delta method): the 1/d term of the kernel.  A norm leaves the
fluctuation of the correlation; the dual of an activation shrinks it (a dual with positive
coefficients maps the unit disc into itself, and such maps contract atanh rho: Schwarz and Pick).
Units behind weights that are not Gaussian add to C what their fourth cumulants are like
(`Fluctuation.shape`), for that mean alone.

A sum of a stream and a branch weighs both by their shares and adds their product's part.  Since the
branch is made from the stream their fluctuations are correlated: `response` is the derivative of a
place's three entries by those of the stream at its last sum, whose covariance is `origin`.

All derived here; held against real layers by tests/theory/test_fluctuations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

Numbers = Mapping[str, float]
PairFunction = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""From K_mm, K_nn and K_mn of the source to K_mn of the result."""

NEAR = 0.999
"""A larger correlation counts as this one: at 1 that of two equal positions does not fluctuate."""

STEP = 0.02
"""Of a variance, relatively, and of atanh rho, in differences: far above a dual's rounding."""

ROUNDING = 1e-12
"""A norm whose relative variance is less does not fluctuate."""

ENTRIES = ((0, 0), (1, 1), (0, 1))
"""The rows and columns of the three entries: of m and n the first and the second."""


@dataclass(frozen=True, eq=False)
class Gram:
    """A kernel at pairs of positions: K(m, m), K(n, n) and K(m, n), of one shape."""

    mm: np.ndarray
    nn: np.ndarray
    mn: np.ndarray

    @property
    def size(self) -> np.ndarray:
        """sqrt(K_mm K_nn)."""
        return np.asarray(np.sqrt(self.mm) * np.sqrt(self.nn))

    @property
    def absolute(self) -> Gram:
        """Of the entries' absolute values."""
        return Gram(np.abs(self.mm), np.abs(self.nn), np.abs(self.mn))

    @property
    def correlation(self) -> np.ndarray:
        """rho, within `NEAR`; 0 where a variance is."""
        size = self.size
        rho = np.divide(self.mn, size, out=np.zeros(size.shape), where=size > 0)
        return np.asarray(np.clip(rho, -NEAR, NEAR))


@dataclass(frozen=True, eq=False)
class Fluctuation:
    """The covariance at a place: `inherited` of its input and `own` of the last map's `width`
    coordinates, which are independent given the input.

    `shape` has the fourth cumulants of such a coordinate at two positions, 0 if it is Gaussian: to
    leading order those of a Gaussian times the root of a random scale, whose covariance it is.
    """

    inherited: np.ndarray
    own: np.ndarray
    width: float
    response: np.ndarray
    origin: np.ndarray
    shape: np.ndarray | float = 0.0

    @property
    def covariance(self) -> np.ndarray:
        """The whole of it."""
        return np.asarray(self.inherited + self.own)


def begin(covariance: np.ndarray, width: float) -> Fluctuation:
    """A stream at its last sum: everything responds to it from here on."""
    unit = _diagonal(np.ones(covariance.shape[1:]))
    return Fluctuation(covariance, np.zeros_like(covariance), width, unit, covariance)


def _diagonal(entries: np.ndarray) -> np.ndarray:
    """Diagonal matrices (3, 3, ...) of the three entries (3, ...)."""
    unit = np.eye(3).reshape(3, 3, *(1,) * (entries.ndim - 1))
    return np.asarray(unit * entries)


@dataclass(frozen=True, eq=False)
class Second:
    """The second order of a rule's kernel, the sum of its parts' sizes, and for each source the
    absolute Jacobian of the three entries, (3, 3, ...): how errors of the source pass."""

    term: Gram
    size: Gram
    slopes: tuple[np.ndarray, ...]


Entries = tuple[np.ndarray | float, np.ndarray | float, np.ndarray]
"""K_mm, K_nn and K_mn."""


def wishart(first: Entries, second: Entries | None = None) -> np.ndarray:
    """d Cov(G_ab, G_cd) = K_ac J_bd + K_ad J_bc, symmetrised in K and J, at the three entries.

    With J = K that of d i.i.d. Gaussian coordinates.
    """
    K, J = (_square(entries) for entries in (first, second or first))
    shape = np.shape(first[2])

    def entry(a: int, b: int, c: int, d: int) -> np.ndarray:
        pairs = K[a][c] * J[b][d] + K[a][d] * J[b][c] + J[a][c] * K[b][d] + J[a][d] * K[b][c]
        return np.broadcast_to(pairs / 2, shape)

    return np.array([[entry(*row, *column) for column in ENTRIES] for row in ENTRIES])


def _square(entries: Entries) -> tuple[tuple[np.ndarray | float, ...], ...]:
    mm, nn, mn = entries
    return (mm, mn), (mn, nn)


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    return np.asarray(np.einsum("ij...,jk...->ik...", left, right))


def _transposed(matrices: np.ndarray) -> np.ndarray:
    return matrices.swapaxes(0, 1)


def _moved(jacobian: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    return _product(_product(jacobian, covariance), _transposed(jacobian))


# ------------------------------------------------------------------------- the correlation


def to_correlation(rho: np.ndarray) -> np.ndarray:
    """Jacobian from the three entries to (G_mm/K_mm, G_nn/K_nn, correlation)."""
    nothing, unit = np.zeros_like(rho), np.ones_like(rho)
    rows = [[unit, nothing, nothing], [nothing, unit, nothing], [-rho / 2, -rho / 2, unit]]
    return np.array(rows)


def correlation_shift(covariance: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """E r - rho to second order, r = G_mn/sqrt(G_mm G_nn): half the trace with its Hessian.

    -rho (1 - rho^2)/(2 d) for d i.i.d. Gaussian coordinates, as in `cosine.gaussian_pair`.
    """
    return np.asarray(np.subtract(*_shifts(covariance, rho)))


def correlation_shift_error(covariance: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """What the next order may add where coordinates are not Gaussian.

    Of Gaussian ones the two parts of the shift nearly cancel, at all orders.  What is not like
    those of the same norms counts in full, times half the relative variance of a norm.
    """
    norms = (covariance[0, 0] + covariance[1, 1]) / 2
    gaussian = norms / 2 * wishart((1.0, 1.0, rho))
    return np.asarray(norms / 2 * np.abs(_shifts(covariance - gaussian, rho)).sum(0))


def _shifts(covariance: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Of the norms, and of the norms with the inner product."""
    of_norms = 3 * (covariance[0, 0] + covariance[1, 1]) + 2 * covariance[0, 1]
    return np.array([rho * of_norms / 8, (covariance[0, 2] + covariance[1, 2]) / 2])


def correlation_width(covariance: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Var r/(1 - rho^2)^2, the variance of atanh r: 1/d for d i.i.d. Gaussian coordinates."""
    row = to_correlation(rho)[2]
    variance = np.einsum("i...,ij...,j...->...", row, covariance, row)
    return np.asarray(variance / (1 - rho**2) ** 2)


# ------------------------------------------------------------------------------ operations


def tokens(width: float, same: np.ndarray, share: np.ndarray) -> Fluctuation:
    """d i.i.d. Gaussian coordinates, of one token where the positions are the `same`.

    Of two positions a `share` of all ids is equal, and G_mn about 1 then, 0 otherwise: the mean of
    both covariances and the covariance of both means.
    """
    equal = np.where(same, 1.0, share)
    one, two = (wishart((1.0, 1.0, np.full(same.shape, rho))) for rho in (NEAR, 0.0))
    covariance = (equal * one + (1 - equal) * two) / width
    covariance[2, 2] += equal * (1 - equal)
    return begin(covariance, width)


def mapped(
    before: Fluctuation, share: Gram, rho: np.ndarray, own: np.ndarray, width: float, peak: float
) -> Fluctuation:
    """After a linear map that adds its `own`; a bias leaves a share of what was before.

    `peak` is the excess kurtosis of a coordinate given the input over 3, `rho` the correlation of
    the input.
    """
    scale = np.array([share.mm, share.nn, share.mn])
    mean = scale * np.array([np.ones_like(rho), np.ones_like(rho), rho])
    return Fluctuation(
        scale[:, None] * scale * before.covariance,
        own,
        width,
        scale[:, None] * before.response,
        before.origin,
        peak * mean[:, None] * mean,
    )


def added(
    stream: Fluctuation, branch: Fluctuation, kernels: tuple[Gram, Gram], width: float
) -> Fluctuation:
    """y = x + b: shares of both, <x, b> of the branch's last map, and what b has from x.

    Covariances are relative to K_y = K_x + K_b.  The product <x_m, b_n>/d is independent of both
    Gram matrices given the map's input and has covariances K_x K_b/d.
    """
    x, b = kernels
    total = Gram(x.mm + b.mm, x.nn + b.nn, x.mn + b.mn)
    shares = [np.array([k.mm / total.mm, k.nn / total.nn, k.size / total.size]) for k in (x, b)]
    parts = [
        share[:, None] * share * each.covariance
        for share, each in zip(shares, (stream, branch), strict=True)
    ]
    across = wishart(
        *((s[0], s[1], s[2] * k.correlation) for s, k in zip(shares, kernels, strict=True))
    )
    common = shares[0][:, None] * shares[1] * shared(stream, branch)
    whole = parts[0] + parts[1] + 2 * across / width + common + _transposed(common)
    return begin(whole, width)


def shared(first: Fluctuation, second: Fluctuation) -> np.ndarray:
    """The covariance of two places' entries: through the stream, if it is the same one."""
    if first.origin is not second.origin:
        return np.zeros_like(first.origin)
    return _product(_product(first.response, first.origin), _transposed(second.response))


def multiplied(
    gate: Fluctuation, linear: Fluctuation, kernels: tuple[Gram, Gram]
) -> tuple[Fluctuation, Second]:
    """The product of two maps of one place: K_g K_l and the covariance of both.

    Its units' fourth moments are those of the gate's, entry by entry times a Gaussian's.
    """
    ones = np.ones_like(kernels[0].mn)
    means = [np.array([ones, ones, k.correlation]) for k in kernels]
    factors = shared(gate, linear)
    common = means[1][:, None] * means[0] * factors
    inherited = [
        other[:, None] * other * each.inherited
        for other, each in zip(reversed(means), (gate, linear), strict=True)
    ]
    fourth = gate.width * gate.own + means[0][:, None] * means[0]
    fourth = fourth * (wishart((ones, ones, means[1][2])) + means[1][:, None] * means[1])
    mean = means[0] * means[1]
    moved = Fluctuation(
        inherited[0] + inherited[1] + common + _transposed(common),
        (fourth - mean[:, None] * mean) / gate.width,
        gate.width,
        means[1][:, None] * gate.response + means[0][:, None] * linear.response,
        gate.origin,
    )
    mm, nn = (left * right for left, right in zip(*((k.mm, k.nn) for k in kernels), strict=True))
    size = kernels[0].size * kernels[1].size
    term = Gram(mm * factors[0, 0], nn * factors[1, 1], size * factors[2, 2])
    slopes = _diagonal(np.abs(means[1])), _diagonal(np.abs(means[0]))
    return moved, Second(term, term.absolute, slopes)


def curved(
    before: Fluctuation, kernel: Gram, function: PairFunction, own: np.ndarray
) -> tuple[Fluctuation, Second]:
    """After a function of each pair's kernel: a norm, or the dual of an activation.

    Its derivatives are taken by central differences in (K_mm, K_nn, rho), `STEP` wide: on the scale
    of atanh rho, so that no correlation leaves [-1, 1].  `own` is the part of its units, whose
    `shape` bends the mean like a fluctuation and is none.
    """
    rho = kernel.correlation
    turn, bending = to_correlation(rho), before.inherited + before.shape
    values, jacobian, alone, parts = _derivatives(kernel, function, _moved(turn, bending))
    jacobian = _product(jacobian, turn)
    parts[2] += jacobian[2, 2] * correlation_shift(bending, rho)
    mm, nn = values.mm * alone[0], values.nn * alone[1]
    moved = Fluctuation(
        _moved(jacobian, before.inherited),
        own,
        before.width,
        _product(jacobian, before.response),
        before.origin,
    )
    second = Second(
        Gram(mm, nn, values.size * parts.sum(0)),
        Gram(np.abs(mm), np.abs(nn), values.size * np.abs(parts).sum(0)),
        (np.abs(jacobian),),
    )
    return moved, second


def _derivatives(
    kernel: Gram, function: PairFunction, covariance: np.ndarray
) -> tuple[Gram, np.ndarray, np.ndarray, np.ndarray]:
    """Values, relative Jacobian in (K_mm, K_nn, rho), and half the traces with the Hessians.

    The latter of the two diagonal entries, then of the third in parts: of the norms, of rho, and of
    both.  Directions that do not fluctuate are left out: after a norm all but that of rho.
    """
    rho, size = kernel.correlation, kernel.size
    steps = np.array([np.full_like(rho, STEP), np.full_like(rho, STEP), STEP * (1 - rho**2)])
    norms = [0, 1] if np.any(np.abs(covariance[:2, :2].diagonal()) > ROUNDING) else []
    moving = [*norms, 2] if np.any(covariance[2, 2]) else norms
    values = [function(v, v, v) for v in (kernel.mm, kernel.nn)]
    whole = np.sqrt(values[0]) * np.sqrt(values[1])

    def pair(*signs: float) -> np.ndarray:
        up, right, turned = (sign * step for sign, step in zip(signs, steps, strict=True))
        a, b = 1 + up, 1 + right
        covariance = size * np.sqrt(a * b) * (rho + turned)
        return np.asarray(function(kernel.mm * a, kernel.nn * b, covariance) / whole)

    centre, axes = pair(0, 0, 0), np.eye(3)
    jacobian, parts = np.zeros((3, 3, *rho.shape)), np.zeros((3, *rho.shape))
    for axis in moving:
        up, down = (pair(*(sign * axes[axis])) for sign in (1, -1))
        jacobian[2, axis] = (up - down) / (2 * steps[axis])
        second = (up + down - 2 * centre) / steps[axis] ** 2
        parts[axis // 2] += second * covariance[axis, axis] / 2
    for one, other in combinations(moving, 2):
        corners = sum(
            first * second * pair(*(first * axes[one] + second * axes[other]))
            for first in (1, -1)
            for second in (1, -1)
        )
        part = 0 if other == 1 else 2
        parts[part] += corners / (4 * steps[one] * steps[other]) * covariance[one, other]
    alone = np.zeros((2, *rho.shape))
    for axis in norms:
        variance, value = (kernel.mm, kernel.nn)[axis], values[axis]
        ends = (variance * (1 + STEP), variance * (1 - STEP))
        up, down = (function(v, v, v) / value for v in ends)
        jacobian[axis, axis] = (up - down) / (2 * STEP)
        alone[axis] = (up + down - 2) / STEP**2 * covariance[axis, axis] / 2
    return Gram(values[0], values[1], whole * centre), jacobian, alone, parts


# -------------------------------------------------------------------------------- averages


def averaged(
    before: Fluctuation, values: Gram, after: Gram, m: np.ndarray, n: np.ndarray
) -> Fluctuation:
    """After the mean over the prefix: of m.

    Fluctuations of i.i.d. coordinates pass as they are, at the new correlation.  What the
    correlations of normalised vectors have beyond that is averaged as if positions were
    exchangeable (`of_means`), with the correlation that the longer prefix shows.
    """
    rho, at = after.correlation, values.correlation
    covariance = before.covariance
    norms = (covariance[0, 0] + covariance[1, 1]) / 4
    beyond = np.maximum(correlation_width(covariance, at) - norms, 0.0)
    common = _common(values, after, m, n)
    inherited = norms * wishart((1.0, 1.0, rho)) + beyond * _turned(*of_means(common, m, n), rho)
    return replace(
        before,
        inherited=inherited,
        own=np.zeros_like(inherited),
        response=_product(response_of_means(common, m, n), before.response),
        shape=0.0,
    )


def response_of_means(c: np.ndarray, m: np.ndarray, n: np.ndarray) -> np.ndarray:
    """The regression of the entries of two prefix means z on those of the two x at their ends.

    Of i.i.d. Gaussian coordinates, exchangeable with correlation c, where the Gram entries' joint
    covariance is that of `wishart` and <x_a, z_p>/d has mean c + (1 - c)/p [a <= p].
    """
    at, rest = (m, n), 1 - c
    cross = [[c + rest / p * (a <= p) for p in at] for a in at]
    sizes = [np.sqrt(c + rest / p) for p in at]

    def joint(z: tuple[int, int], x: tuple[int, int]) -> np.ndarray:
        (p, q), (a, b) = z, x
        pairs = cross[a][p] * cross[b][q] + cross[a][q] * cross[b][p]
        return np.asarray(pairs / (sizes[p] * sizes[q]))

    of_x = wishart((1.0, 1.0, np.where(m == n, NEAR, c)))
    both = np.array([[joint(z, x) for z in ENTRIES] for x in ENTRIES])
    last = (of_x, both)
    solved = np.linalg.solve(*(np.moveaxis(matrix, (0, 1), (-2, -1)) for matrix in last))
    return np.asarray(np.moveaxis(solved, (-1, -2), (0, 1)))


def _common(values: Gram, after: Gram, m: np.ndarray, n: np.ndarray) -> np.ndarray:
    """c, from K_z(m, n) = v (c + (1 - c)/max(m, n)), which a softmax changes least; 0 at 1."""
    longer, kept = np.maximum(m, n), after.mn / values.size
    return np.asarray(np.clip((longer * kept - 1) / np.maximum(longer - 1, 1), 0.0, NEAR))


def _turned(covariance: np.ndarray, rho: np.ndarray, new: np.ndarray) -> np.ndarray:
    """As many i.i.d. coordinates, entry by entry in norms and correlation, at another one."""
    own, other = (_moved(to_correlation(r), wishart((1.0, 1.0, r))) for r in (rho, new))
    turned = _moved(to_correlation(rho), covariance) / own * other
    back = to_correlation(new)
    back[2, :2] *= -1
    return _moved(back, turned)


def of_means(c: np.ndarray, m: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The relative covariance of prefix means of exchangeable vectors of fixed norm, times d, and
    their correlation.

    Of correlation c, and normalised from i.i.d. Gaussian coordinates: with W their Gram matrix and
    D_p the mean of W_ii over i <= p,

        G_mn = W_mn - (c D_m + c D_n)/2 - (1 - c) D_min(m, n)/max(m, n)

    about k_mn = c + (1 - c)/max(m, n), where d Cov(W_ab, D_p)/2 is the mean of k_ai k_bi over
    i <= p and d Cov(D_p, D_q)/2 = c^2 + (1 - c^2)/max(p, q).
    """
    at, rest = (m, n), 1 - c
    shape = np.broadcast_shapes(np.shape(m), np.shape(n), np.shape(c))

    def k(p: np.ndarray, q: np.ndarray) -> np.ndarray:
        return np.asarray(c + rest / np.maximum(p, q))

    def with_mean(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
        alone = 1 / np.maximum(a, p) + 1 / np.maximum(b, p)
        least = np.minimum(np.minimum(a, b), p)
        return np.asarray(2 * (c**2 + c * rest * alone + rest**2 * least / (p * a * b)))

    means = [[2 * (c**2 + (1 - c**2) / np.maximum(p, q)) for q in at] for p in at]
    pairs = [(at[row], at[column]) for row, column in ENTRIES]
    products = wishart((k(m, m), k(n, n), k(m, n)))
    mixed = [[with_mean(a, b, p) for p in at] for a, b in pairs]
    joint = np.empty((5, 5, *shape))
    for row in range(5):
        for column in range(5):
            inside = row < 3, column < 3
            if inside == (True, True):
                joint[row, column] = products[row, column]
            elif inside == (False, False):
                joint[row, column] = means[row - 3][column - 3]
            else:
                joint[row, column] = mixed[min(row, column)][max(row, column) - 3]
    nothing, shorter = np.zeros(shape), rest / np.maximum(m, n)
    weights = np.zeros((3, 5, *shape))
    for entry, (a, b) in enumerate(ENTRIES):
        size = np.sqrt(k(at[a], at[a]) * k(at[b], at[b]))
        weights[entry, entry] = 1 / size
        if a == b:
            weights[entry, 3 + a] = -k(at[a], at[a]) / size
        else:
            weights[entry, 3] = -(c / 2 + np.where(m <= n, shorter, nothing)) / size
            weights[entry, 4] = -(c / 2 + np.where(m <= n, nothing, shorter)) / size
    rho = np.minimum(k(m, n) / np.sqrt(k(m, m) * k(n, n)), NEAR)
    return _moved(weights, joint), rho


def attended(
    before: Fluctuation,
    kernels: tuple[Gram, Gram, Gram],
    logits: np.ndarray,
    excess: np.ndarray,
    at: tuple[np.ndarray, np.ndarray],
    n_heads: float,
) -> Fluctuation:
    """The correlation's part of the random pattern, added to that of a mean.

    To first order in the logits' variance s^2, a_mn = (1 + l_mn - mean)/m: two queries weigh
    the keys they share with a variance (1 - c)^2 s^2 (1 - min/max)/(max^2 min), one head of H.
    Participations that fluctuate turn it by (2/3) rho^2 X.
    """
    values, _, after = kernels
    m, n = at
    longer, shorter = np.maximum(m, n), np.minimum(m, n)
    spread = 1 - _common(values, after, m, n)
    s2 = logits * spread
    s2 = s2 / (1 + 2 * s2 / 3)
    own = values.size / after.size * spread
    shared_keys = own**2 * s2 * (1 - shorter / longer) / (longer**2 * shorter * n_heads)
    inherited = np.array(before.inherited)
    inherited[2, 2] += shared_keys + 2 / 3 * after.correlation**2 * np.abs(excess)
    return replace(before, inherited=inherited)


# ------------------------------------------------------------------------------- a passage


@dataclass(frozen=True, eq=False)
class Passage:
    """One operation at pairs (m, n): what it reads, and its kernel to leading order, `after`.

    `function` is its kernel as one of its first source's; `numbers` are those of its symbols;
    `excess` is that of the place (`theory.kernel.X`).
    """

    kernels: tuple[Gram, ...]
    fluctuations: tuple[Fluctuation, ...]
    after: Gram
    function: PairFunction
    positions: tuple[np.ndarray, np.ndarray]
    numbers: Numbers
    excess: np.ndarray


Passing = Callable[[Passage], tuple[Fluctuation, Second | None]]
"""The fluctuation after an operation, and the second order of its kernel where it has one."""


def averages(passage: Passage) -> tuple[Fluctuation, None]:
    """Of a prefix mean and of attention; tokens where nothing is read."""
    at, after = passage.positions, passage.after
    if not passage.fluctuations:
        share = np.minimum(after.mn / after.size, 1.0)
        return tokens(passage.numbers["d"], np.equal(*at), share), None
    values = passage.kernels[0]
    mean = averaged(passage.fluctuations[0], values, after, *at)
    if len(passage.kernels) < 3:
        return mean, None
    _, keys, queries = passage.kernels
    logits = queries.size * keys.size
    kernels = values, queries, after
    heads = passage.numbers["H"]
    return attended(mean, kernels, logits, passage.excess, at, heads), None
