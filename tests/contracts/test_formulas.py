"""Every formula against a plain number: loops, enumeration, quadrature or a simulation.

The counterparts are written from the definitions; none uses `theory` for its numbers.  Where one
is a mean over random weights or ids of a few values, all of them are enumerated.
"""

import itertools
import math
from fractions import Fraction
from functools import cache, partial

import numpy as np
import pytest
import sympy as sp
from numpy.polynomial.hermite_e import hermegauss
from scipy import integrate, optimize, special, stats
from scipy.special import roots_genlaguerre

import theory
from nope import plugins
from theory.formula import Formula, Status
from theory.symbols import d, m
from theory.testing import Draws, FormulaContract, contracts_in, uncovered

PLAIN = {}
"""By formula: the attributes of its contract."""


def held(*names, **attributes):
    """The decorated function is the plain counterpart of the formulas called `names`."""

    def keep(plain):
        PLAIN.update({name: {"plain": plain, **attributes} for name in names})
        return plain

    return keep


def grid(**values):
    """All combinations, as points."""
    every = list(itertools.product(*values.values()))
    return {name: [point[k] for point in every] for k, name in enumerate(values)}


def points(*every, names):
    """Points written one by one, values in the order of `names`."""
    return {name: [point[k] for point in every] for k, name in enumerate(names.split())}


def generator(*seed):
    return np.random.default_rng(seed)


# ----------------------------------------------------------------------------- expectations


@cache
def normal_nodes(count):
    nodes, weights = hermegauss(count)
    return nodes, weights / weights.sum()


def chi_square_nodes(freedom, count=40):
    """Of chi^2 of `freedom` degrees, over its mean."""
    nodes, weights = roots_genlaguerre(count, freedom / 2 - 1)
    return 2 * nodes / freedom, weights / weights.sum()


def normals(dimensions, count):
    """Gauss's rule for independent standard normals: points (size, dimensions) and weights."""
    nodes, weights = normal_nodes(count)
    z = np.stack(np.meshgrid(*[nodes] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    w = np.stack(np.meshgrid(*[weights] * dimensions, indexing="ij"), -1).reshape(-1, dimensions)
    return z, w.prod(1)


NODES = {1: 60, 2: 60, 3: 40, 4: 20}


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def softmax_mean(function, m, s):
    """E f(a, z) over a = softmax(s z), z_n ~ N(0, 1) independent, n = 1..m."""
    z, weights = normals(m, NODES[m])
    return weights @ function(softmax(s * z), z)


def of_head(function, m, s, d_h):
    """The same where each query has logits of its own size, s |q|/sqrt(d_h)."""
    sizes, weights = chi_square_nodes(d_h)
    pairs = zip(sizes, weights, strict=True)
    return sum(w * softmax_mean(function, m, s * math.sqrt(u)) for u, w in pairs)


def normed(x, centred=True):
    """LayerNorm, or RMSNorm, of each vector."""
    x = x - x.mean(-1, keepdims=True) if centred else x
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True))


# ------------------------------------------------------------------------ norms and spheres


@held("layernorm.second_moment")
def _():
    x = normed(generator(0).normal(size=(50, 6)))
    return np.mean(x**2)


def sphere_kurtosis(n):
    """Of a coordinate of a uniform point on the sphere: t = 2 B - 1, B a Beta variable."""
    half = (n - 1) / 2
    law = stats.beta(half, half, loc=-1, scale=2) if n > 1 else stats.rademacher
    return law.moment(4) / law.moment(2) ** 2


@held("layernorm.kurtosis", points={"d": [3, 4, 9, 64]})
def _(d):
    return sphere_kurtosis(d - 1)


@held("rmsnorm.kurtosis", "orthogonal.entry_kurtosis", points={"d": [2, 3, 8, 64]})
def _(d):
    return sphere_kurtosis(d)


@held("layernorm.shrinkage_exact", rounding=1e-7, points=grid(d=[2, 5, 64], epsilon=[0.1, 2.0],
                                                             sigma_x=[0.5, 1.3]))  # fmt: skip
@held("layernorm.shrinkage", points=grid(d=[24, 64], epsilon=[0.1, 2.0], sigma_x=[0.5, 1.3]))
def _(d, epsilon, sigma_x):
    """E v/(v + eps), v = sigma_x^2 chi^2_(d-1)/d the variance of a token's coordinates."""

    def shrunk(chi):
        v = sigma_x**2 * chi / d
        return v / (v + epsilon) * stats.chi2(d - 1).pdf(chi)

    return sum(integrate.quad(shrunk, *ends)[0] for ends in [(0, 1), (1, d), (d, np.inf)])


# ---------------------------------------------------------------------- maps and fourth moments


def entry_law(kurtosis):
    """The values -c, 0, c of variance 1 and this kurtosis: c^2 = kurtosis."""
    share = 1 / kurtosis
    return np.sqrt(kurtosis) * np.array([-1.0, 0.0, 1.0]), np.array(
        [share / 2, 1 - share, share / 2]
    )


def independent(rows, columns, kurtosis):
    """All matrices of three-valued independent entries of variance 1, with probabilities."""
    values, shares = entry_law(kurtosis)
    size = rows * columns
    W = np.array(list(itertools.product(values, repeat=size))).reshape(-1, rows, columns)
    return W, np.array(list(itertools.product(shares, repeat=size))).prod(1)


def rotations(columns):
    """Haar matrices of 2 rows, entries of variance 1: rotations, and reflected ones."""
    angle = np.arange(24) * 2 * np.pi / 24
    rows = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    W = np.concatenate([rows, rows * np.array([1, -1])[None, :, None]], 2).transpose(2, 0, 1)
    return math.sqrt(2) * W[:, :, :columns], np.full(48, 1 / 48)


def matrices(columns, kappa, theta):
    """Two rows, independent entries (theta = 1) or Haar."""
    return independent(2, columns, kappa) if theta == 1 else rotations(columns)


def quartic(x, W, shares):
    """E y_a y_b y_c y_d of y = x W for each x: (points, columns, columns, columns, columns)."""
    y = np.einsum("pi,wij->pwj", x, W)
    return np.einsum("w,pwa,pwb,pwc,pwd->pabcd", shares, y, y, y, y, optimize=True)


ANGLES = np.arange(16) * 2 * np.pi / 16
TOKENS = {
    "layernorm": (np.array([[1.0, -1.0], [-1.0, 1.0]]), np.full(2, 0.5)),
    "rmsnorm": (math.sqrt(2) * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1), np.full(16, 1 / 16)),
    "tokens": normals(2, 8),
}
"""Tokens of width 2 of each kind, with their probabilities: Gauss's rules are exact for powers."""


def logit_kurtosis(tokens, d, d_h, m, kappa_q, kappa_k, theta_q, theta_k):
    """Over the m keys of a query, its own among them."""
    x, shares = TOKENS[tokens]
    q, k = (quartic(x, *matrices(d_h, *law)) for law in ((kappa_q, theta_q), (kappa_k, theta_k)))
    each = np.einsum("pabcd,qabcd->pq", q, k) / d_h**2
    own, other = shares @ np.diagonal(each), shares @ each @ shares
    fourth = own / m + other * (1 - 1 / m)
    gram = np.square(np.sum(x**2, 1))  # E q_a^2 k_a^2, summed over a, of a token and itself
    size = np.sum(x**2, 1)
    second = (shares @ gram / m + (shares @ size) ** 2 * (1 - 1 / m)) * 1.0
    return fourth / second**2


def uniform_kurtosis(tokens, d, m, kappa_v, kappa_o, theta_v, theta_o):
    """Of a coordinate of W_O' W_V' (mean of m tokens)."""
    x, shares = TOKENS[tokens]
    every = [np.array(list(itertools.product(part, repeat=m))) for part in (range(len(x)), shares)]
    means, weights = x[every[0].astype(int)].mean(1), every[1].prod(1)
    v = np.einsum("p,pabcd->abcd", weights, quartic(means, *matrices(2, kappa_v, theta_v)))
    W, chances = matrices(1, kappa_o, theta_o)
    w = W[:, :, 0]
    fourth = np.einsum("abcd,w,wa,wb,wc,wd->", v, chances, w, w, w, w, optimize=True)
    second = weights @ np.sum(means**2, 1) * 2
    return fourth / second**2


INDEPENDENT, HAAR = (1.7, 1.0), (1.5, 0.5)
"""Kurtosis and pair moment of 2 by 2 matrices: independent entries, and Haar's (n = 2)."""


def laws_of(*letters, **sizes):
    """Points with each combination of laws for the matrices of `letters`, width 2."""
    kinds = list(itertools.product([INDEPENDENT, HAAR, (3.0, 1.0)], repeat=len(letters)))
    found = {f"kappa_{letter}": [k[i][0] for k in kinds] for i, letter in enumerate(letters)}
    found |= {f"theta_{letter}": [k[i][1] for k in kinds] for i, letter in enumerate(letters)}
    found |= {name: [values[i % len(values)] for i in range(len(kinds))]
              for name, values in sizes.items()}  # fmt: skip
    return found | {"d": [2] * len(kinds)}


for kind in TOKENS:
    held(f"attention.logit_kurtosis_{kind}", points=laws_of("q", "k", m=[1, 2, 5], d_h=[1, 2]))(
        partial(logit_kurtosis, kind)
    )
    held(f"attention.uniform_kurtosis_{kind}", points=laws_of("v", "o", m=[1, 2]))(
        partial(uniform_kurtosis, kind)
    )

VECTORS = np.array([[1.0, 2.0], [0.5, -1.0], [3.0, 0.3]])
CHANCES = np.array([0.2, 0.5, 0.3])
MEAN_SQUARE = CHANCES @ np.mean(VECTORS**2, 1)
SHAPE = {
    "nu_x": CHANCES @ np.sum(VECTORS**2, 1) ** 2 / (2 * MEAN_SQUARE) ** 2,
    "kappa_x": CHANCES @ np.mean(VECTORS**4, 1) / MEAN_SQUARE**2,
}
"""A random vector of width 2, and its moments."""
OF_VECTOR = laws_of("w") | {name: [value] * 3 for name, value in SHAPE.items()}


@held("linear.coordinate_kurtosis", points=OF_VECTOR)
def _(d, kappa_w, theta_w, nu_x, kappa_x):
    fourth = CHANCES @ quartic(VECTORS, *matrices(1, kappa_w, theta_w))[:, 0, 0, 0, 0]
    return fourth / (d * MEAN_SQUARE) ** 2


@held("linear.norm_kurtosis", points=OF_VECTOR)
def _(d, kappa_w, theta_w, nu_x, kappa_x):
    y = quartic(VECTORS, *matrices(2, kappa_w, theta_w))
    fourth = CHANCES @ np.einsum("paabb->p", y)
    return fourth / (2 * d * MEAN_SQUARE) ** 2


# ----------------------------------------------------------------------- attention's moments


@held("attention.qkv_second_moment", points=grid(d=[2, 4, 6], sigma=[0.3, 1.1]))
def _(d, sigma):
    """Over all signs of the weights, of a token with |e|^2 = d."""
    e = normed(np.arange(1.0, d + 1) ** 2)
    signs = np.array(list(itertools.product([-sigma, sigma], repeat=d)))
    return np.mean((signs @ e) ** 2)


@held("attention.logit_second_moment", points=grid(d=[2, 4], sigma=[0.3, 1.1]))
def _(d, sigma, d_h=2):
    """Over all signs of two maps' weights, of two tokens with |e|^2 = d."""
    signs = np.array(list(itertools.product([-sigma, sigma], repeat=d * d_h)))
    maps = signs.reshape(-1, d, d_h)
    e, f = normed(generator(1).normal(size=(2, d)))
    q, k = (np.einsum("i,wia->wa", x, maps) for x in (e, f))
    return np.mean((q @ k.T) ** 2) / d_h


@held("attention.logit_second_moment_printed")
def _(d, sigma, H):
    """d^3 sigma^4/H^2 over the square of the scale sqrt(d/H)."""
    return d**3 * sigma**4 / H**2 / (d / H)


@held("attention.logit_kurtosis")
def _(d_h):
    """A logit is |q| z/sqrt(d_h), z ~ N(0, 1)."""
    return stats.chi2(d_h).moment(2) / d_h**2 * stats.norm.moment(4)


@held("attention.uniform_participation")
def _(m):
    return math.fsum((1 / m) ** 2 for _ in range(m))


def shared_prefix(m, n):
    """sum over i <= m, j <= n of [i = j]/(mn)."""
    return sum(i == j for i in range(m) for j in range(n)) / (m * n)


@held("attention.uniform_covariance")
def _(d, sigma, m, n):
    """Two maps multiply a kernel by d sigma^2 each."""
    return (d * sigma**2) ** 2 * shared_prefix(m, n)


@held("attention.uniform_second_moment")
def _(d, sigma, m):
    return (d * sigma**2) ** 2 * shared_prefix(m, m)


SOFTMAX = grid(m=[1, 2, 3], s=[0.0, 0.4, 1.3])
MEANS = {
    "participation": lambda a, z: (a**2).sum(1),
    "participation_second_moment": lambda a, z: (a**2).sum(1) ** 2,
    "tilt": lambda a, z: (a * z).sum(1) ** 2,
    "tilt_shared": lambda a, z: (a * z).sum(1) ** 2 - ((a * z) ** 2).sum(1),
    "weighted_square": lambda a, z: (a * z**2).sum(1),
    "entropy": lambda a, z: -special.xlogy(a, a).sum(1),
}
for mean, function in MEANS.items():
    held(f"attention.{mean}", points=SOFTMAX, rounding=3e-6)(partial(softmax_mean, function))


@held("attention.participation_shared", points=SOFTMAX, rounding=3e-6)
def _(m, s):
    """n a_ni tends to e^(l_i) over its mean."""
    return softmax_mean(lambda a, z: (a * np.exp(s * z - s**2 / 2)).sum(1), m, s)


@held("attention.participation_finite_head", rounding=3e-6,
      points=points((2, 0.5, 1), (3, 0.4, 4), (2, 1.2, 8), names="m s d_h"))  # fmt: skip
def _(m, s, d_h):
    return of_head(MEANS["participation"], m, s, d_h)


@held("attention.participation_expansion", points=grid(m=[2, 3, 4], s=[0.1, 0.3]))
def _(m, s):
    return softmax_mean(MEANS["participation"], m, s)


def averaging_over_tilt(m, s):
    """A/B at any real m: the integrals of 1/S^2 = int t e^(-t S) dt, x = ln t, by quadrature."""
    nodes, weights = normal_nodes(150)
    x, step = np.linspace(-45, 12, 6001, retstep=True)
    u = np.exp(np.minimum(x[:, None] + s * nodes, 30))
    damped = np.exp(-u) * weights
    phi, first, one, two = (
        (damped * part).sum(1) for part in (1, u * nodes, u**2, u**2 * nodes**2)
    )
    power = np.exp((m - 2) * np.log(np.maximum(phi, 1e-300)))
    A = step * np.sum(m * one * phi * power)
    B = step * np.sum(m * two * phi * power + m * (m - 1) * first**2 * power)
    return A / B


def breakdown(s, d):
    if d <= 2:
        return 1.0

    def excess(x):
        return math.log((d - 1) * averaging_over_tilt(math.exp(x), s))

    return math.exp(optimize.brentq(excess, 0, 30, xtol=1e-12))


held("attention.breakdown_length", rounding=1e-5,
     points=points((1.0, 2), (1.5, 8), (0.7, 64), names="s d"))(breakdown)  # fmt: skip
held("attention.breakdown_length_leading", rounding=1e-5,
     points=points((0.3, 64), (0.5, 512), names="s d"))(breakdown)  # fmt: skip


@held("attention.floor", points=points((16, 0.7, 3000, 0.6), (8, 2.0, 2000, 0.5), names="d g m s"))
def _(d, g, m, s):
    """Wide heads over LN'd tokens: sum_n a_n^2, and what distinct keys share along the query."""
    z = generator(2).normal(size=(2000, m))
    a = softmax(s * z)
    shared = (a * z).sum(1) ** 2 - ((a * z) ** 2).sum(1)
    return Draws(g * ((a**2).sum(1) + shared / d))


# ------------------------------------------------------------------- layers of softmax attention


def layer(d, d_h, m, s, count, tokens=normed, heads=1):
    """Tokens e, (draws, m + 1, d), and the patterns of queries m and m + 1, by head."""
    draw = generator(d, d_h, m, heads).normal
    e = tokens(draw(size=(count, m + 1, d)))
    q, k = (draw(scale=math.sqrt(s / d), size=(count, heads, d, d_h)) for _ in range(2))
    queries = np.einsum("cni,chia->chna", e[:, -2:], q)
    logits = np.einsum("chna,chia,cmi->chnm", queries, k, e, optimize=True) / math.sqrt(d_h)
    logits[:, :, 0, -1] = -np.inf
    return e, softmax(logits)


@held("attention.output_second_moment_finite_head",
      points=points((4, 2, 0.8, 3, 0.7), (3, 1, 1.3, 2, 1.1), names="d d_h g m s"))  # fmt: skip
def _(d, d_h, g, m, s):
    e, pattern = layer(d, d_h, m, s, 100_000)
    z = np.einsum("cm,cmi->ci", pattern[:, 0, 0], e)
    return Draws(g * np.mean(z**2, 1))


@held(
    "attention.output_kernel",
    points=points((24, 8, 0.8, 5, 6, 0.6), (16, 16, 1.3, 8, 7, 0.5), names="d d_h g m n s"),
)
def _(d, d_h, g, m, n, s):  # fmt: skip
    e, pattern = layer(d, d_h, min(m, n), s, 8000)
    assert abs(n - m) == 1
    one, two = (np.einsum("cm,cmi->ci", pattern[:, 0, row], e) for row in (0, 1))
    return Draws(g * np.mean(one * two, 1))


@held("attention.output_second_moment",
      points=points((24, 0.8, 5, 0.6), (40, 1.3, 7, 0.8), names="d g m s"))  # fmt: skip
def _(d, g, m, s):
    e, pattern = layer(d, d, m, s, 4000)
    return Draws(g * np.mean(np.einsum("cm,cmi->ci", pattern[:, 0, 0], e) ** 2, 1))


@held("attention.output_second_moment_gaussian_tokens",
      points=points((24, 0.8, 5, 0.6), (40, 1.3, 7, 0.5), names="d g m s"))  # fmt: skip
def _(d, g, m, s):
    """Wide heads: the logits of other keys along a fixed direction of length s."""
    draw = generator(d, m).normal
    z = draw(size=(20_000, m, d))
    size = np.linalg.norm(draw(size=(20_000, d)), axis=1) / math.sqrt(d)
    a = softmax(s * size[:, None] * z[:, :, 0])
    return Draws(g * np.mean(np.einsum("cm,cmi->ci", a, z) ** 2, 1))


@held(
    "attention.root_bias",
    widest=0.3,
    points=points((1, 2, 4, 0.7), (4, 3, 8, 0.9), (2, 2, 16, 1.2), names="H m d_h s"),
)
def _(H, m, d_h, s):  # fmt: skip
    draw = generator(H, m, d_h)
    u = draw.chisquare(d_h, size=(60_000, H, 1)) / d_h
    a = softmax(s * np.sqrt(u) * draw.normal(size=(60_000, H, m)))
    P = np.mean((a**2).sum(2), 1)
    return Draws((P / of_head(MEANS["participation"], m, s, d_h)) ** -0.5 - 1)


@held("attention.adjacent_cosine",
      points=points((4, 24, 6, 5, 0.6), (2, 16, 8, 3, 0.4), names="H d d_h m s"))  # fmt: skip
def _(H, d, d_h, m, s):
    count = 3000
    e, pattern = layer(d, d_h, m, s, count, heads=H)
    draw = generator(3, d).normal
    values = np.einsum("cmi,chia->chma", e, draw(size=(count, H, d, d_h)))
    z = np.einsum("chnm,chma->cnha", pattern, values).reshape(count, 2, d)
    o = z @ draw(size=(count, d, d))
    one, two = o[:, 0], o[:, 1]
    return Draws(np.sum(one * two, 1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1))


# ---------------------------------------------------------------------------------- the stream


@held("residual.kernel", points=points((48, 4, 3, 0.15, 0.6), (8, 5, 5, 0.3, 0.8),
                                       names="d m n sigma sigma_x"))  # fmt: skip
def _(d, sigma, sigma_x, m, n):
    return sigma_x**2 * (m == n) + (d * sigma**2) ** 2 * shared_prefix(m, n)


@held("residual.second_moment")
def _(d, sigma, sigma_x, m):
    return sigma_x**2 + (d * sigma**2) ** 2 * shared_prefix(m, m)


@held("residual.cosine", points=points((48, 4, 3, 0.15, 0.6), (32, 2, 6, 0.2, 1.1),
                                        names="d m n sigma sigma_x"))  # fmt: skip
def _(d, m, n, sigma, sigma_x):
    """E cos of x + W_O' W_V' (mean of LN'd tokens)."""
    count, draw = 3000, generator(d, m, n).normal
    x = draw(size=(count, max(m, n), d))
    e = normed(x)
    means = np.stack([e[:, :m].mean(1), e[:, :n].mean(1)], 1)
    branch = means @ draw(scale=sigma, size=(count, d, d)) @ draw(scale=sigma, size=(count, d, d))
    y = sigma_x * x[:, [m - 1, n - 1]] + branch
    return Draws(np.sum(y[:, 0] * y[:, 1], 1) / np.linalg.norm(y, axis=2).prod(1))


@held("residual.coordinate_variance_printed")
def _(M_j2, d, m, sigma, sigma_x):
    return (m * sigma_x**2 + M_j2) / (m * sigma_x**2 + (d**2) * (sigma**4))


WIDE, STD = 160, 0.06
GAIN = generator(4).normal(scale=STD, size=(WIDE, WIDE)) @ generator(5).normal(
    scale=STD, size=(WIDE, WIDE)
)
COORDINATE = int(np.argmax(np.diag(GAIN)))
"""Of all coordinates that in which the token itself counts most."""


@held("residual.coordinate_variance", widest=0.3, points={
    "M_jj": [GAIN[COORDINATE, COORDINATE]] * 2, "M_j2": [(GAIN[COORDINATE] ** 2).sum()] * 2,
    "d": [WIDE] * 2, "sigma": [STD] * 2, "sigma_x": [0.5, 1.0], "m": [1, 2],
})  # fmt: skip
def _(M_jj, M_j2, d, m, sigma, sigma_x):
    """Over inputs at fixed M = GAIN, which acts on columns."""
    x = generator(6, m).normal(size=(20_000, m, d))
    y = sigma_x * x[:, -1] + normed(x).mean(1) @ GAIN.T
    return Draws(normed(y)[:, COORDINATE] ** 2)


# ------------------------------------------------------------------------------------- cosines


@held("cosine.uniform")
def _(m, n):
    return shared_prefix(m, n) / math.sqrt(shared_prefix(m, m) * shared_prefix(n, n))


def mean_cosine(d, rho):
    """E cos(x, rho x + c g): g is (g_1, and a chi of d - 1 degrees) along x and across it."""
    if abs(rho) == 1:
        return rho
    sizes, of_sizes = chi_square_nodes(d, 60)
    across, of_across = chi_square_nodes(d - 1, 60)
    g, of_g = normal_nodes(80)
    rest = math.sqrt(1 - rho**2)
    along = rho * np.sqrt(d * sizes)[:, None, None] + rest * g[None, :, None]
    length = np.sqrt(along**2 + rest**2 * (d - 1) * across)
    return np.einsum("abc,a,b,c->", along / length, of_sizes, of_g, of_across)


RHO = points((4, 0.3), (9, -0.8), (16, 0.95), (6, 1.0), names="d rho")
held("cosine.gaussian_pair", points=RHO, rounding=1e-5)(mean_cosine)
held("cosine.gaussian_pair_expansion", points=RHO, rounding=1e-5)(mean_cosine)


@held("cosine.prefix_means", "orthogonal.uniform_cosine", rounding=1e-5,
      points=points((5, 2, 7), (9, 6, 5), (16, 3, 3), names="d m n"))  # fmt: skip
def _(d, m, n):
    return mean_cosine(d, math.sqrt(min(m, n) / max(m, n)))


@held("cosine.triple_probability", points=points((64, 12, 3, 6), (100, 30, 10, 12),
                                                 names="d_eff i j k"))  # fmt: skip
def _(d_eff, i, j, k):
    """Prefix means of i.i.d. Gaussian vectors of d_eff coordinates."""
    x = generator(i, j, k).normal(size=(10_000, 3, d_eff)) * np.sqrt([[j], [k - j], [i - k]])
    first, second, third = (normed(part, centred=False) for part in x.cumsum(1).swapaxes(0, 1))
    return Draws(((third * first).sum(1) < (third * second).sum(1)).astype(float))


# ---------------------------------------------------------------------- Gaussian pairs: duals

SMOOTH = {
    "gelu": lambda x: x * special.ndtr(x),
    "gelu_tanh": lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x * special.expit(x),
    "tanh": np.tanh,
    "erf": special.erf,
}
PAIRS = points((1.0, 1.0, 0.3), (0.5, 0.8, -0.4), (0.9, 0.9, 0.9), (1.2, 0.2, 0.0), names="a b c")


def gaussian_pair(function, a, b, c):
    """E f(X) f(Y) by Gauss's rule; Y given X is N(c X/a, b - c^2/a)."""
    (x, y), weights = (lambda z, w: (z.T, w))(*normals(2, 140))
    other = c / math.sqrt(a) * x + math.sqrt(max(b - c**2 / a, 0)) * y
    return weights @ (function(math.sqrt(a) * x) * function(other))


for activation, function in SMOOTH.items():
    held(f"dual.{activation}", points=PAIRS, rounding=1e-7)(partial(gaussian_pair, function))


@held("dual.identity", points={"c": [-0.5, 0.0, 0.7]})
def _(c):
    return gaussian_pair(lambda x: x, 1.0, 1.0, c)


@held("dual.relu", points=PAIRS, rounding=1e-7)
def _(a, b, c):
    """E max(Y, 0) given X = x is mu Phi(mu/t) + t phi(mu/t); the rest is quadrature over x > 0."""
    t = math.sqrt(max(b - c**2 / a, 1e-30))

    def integrand(x):
        mu = c * x / a
        return x * (mu * special.ndtr(mu / t) + t * stats.norm.pdf(mu / t)) * math.exp(
            -(x**2) / (2 * a)
        )  # fmt: skip

    return integrate.quad(integrand, 0, 12 * math.sqrt(a))[0] / math.sqrt(2 * math.pi * a)


# --------------------------------------------------------------------------------------- depth


def averages(size):
    """The Cesaro matrix C."""
    return np.array([[1 / (m + 1) if n <= m else 0.0 for n in range(size)] for m in range(size)])


def power(m, n, ell, beta=None):
    """(C^ell)_mn, or that of I + beta C."""
    size = max(m, n)
    C = averages(size) if beta is None else np.eye(size) + beta * averages(size)
    return np.linalg.matrix_power(C, ell)[m - 1, n - 1]


def kernel(ell, size, step):
    K = np.eye(size)
    for _ in range(ell):
        K = step(K, averages(size))
    return K


def random_values(ell, size, g):
    return kernel(ell, size, lambda K, C: K + g * C @ K @ C.T)


def rows_apart(M, m, n):
    """1 - cos of two rows, without cancellation."""
    one, two = (row / np.linalg.norm(row) for row in (M[m - 1], M[n - 1]))
    return np.sum((one - two) ** 2) / 2


held("depth.cesaro_power", points=grid(m=[1, 4, 7], n=[1, 3], ell=[0, 1, 4]))(power)
held("depth.residual_power", points=grid(m=[1, 4, 7], n=[1, 3], ell=[0, 1, 4], beta=[0.5, -0.4]),
     rounding=1e-8)(power)  # fmt: skip


@held("depth.two_layer_weight")
def _(m, n):
    return power(m, n, 2)


@held("depth.residual_eigenvalue")
def _(m, ell, beta):
    return power(m, m, ell, beta)


@held("depth.first_token_weight")
def _(m, ell):
    return power(m, 1, ell)


@held("depth.first_token_weight_residual", points=grid(m=[1, 5], ell=[0, 3], beta=[0.3, 1.4]))
def _(m, ell, beta):
    return power(m, 1, ell, beta) / (1 + beta) ** ell


@held("depth.two_layer_covariance")
def _(m, n):
    return kernel(2, max(m, n), lambda K, C: C @ K @ C.T)[m - 1, n - 1]


@held("depth.stack_kernel")
def _(m, n, ell):
    return kernel(ell, max(m, n), lambda K, C: C @ K @ C.T)[m - 1, n - 1]


@held("depth.random_value_kernel")
def _(m, n, ell, g):
    return random_values(ell, max(m, n), g)[m - 1, n - 1]


@held("depth.collapse", points=grid(m=[2, 5], ell=[6, 10]))
def _(m, ell):
    return math.fsum(np.linalg.matrix_power(averages(m), ell)[m - 1, 1:])


@held("depth.collapse_residual", points=grid(m=[2, 5], ell=[16, 24], beta=[0.8, 2.0]), widest=0.5)
def _(m, ell, beta):
    """The share that is on other tokens than the first."""
    share = (np.eye(m) + beta * averages(m)) / (1 + beta)
    return math.fsum(np.linalg.matrix_power(share, ell)[m - 1, 1:])


@held("depth.collapse_cosine", points=grid(m=[5, 3], n=[2, 4], ell=[14, 16]))
def _(m, n, ell):
    return rows_apart(np.linalg.matrix_power(averages(5), ell), m, n)


@held("depth.collapse_cosine_residual", widest=0.5,
      points=grid(m=[5], n=[2, 4], ell=[40, 60], beta=[0.8, 2.0]))  # fmt: skip
def _(m, n, ell, beta):
    return rows_apart(np.linalg.matrix_power(np.eye(5) + beta * averages(5), ell), m, n)


@held("depth.collapse_cosine_random_values", points=grid(m=[4], n=[2, 3], ell=[40], g=[2, 4]))
def _(m, n, ell, g):
    """In rationals: the cosine is 1 to sixteen digits."""
    C = np.array([[Fraction(int(j <= i), i + 1) for j in range(m)] for i in range(m)])
    K = np.array([[Fraction(int(i == j)) for j in range(m)] for i in range(m)])
    for _ in range(ell):
        K = K + g * C @ K @ C.T
    square = K[m - 1, n - 1] ** 2 / (K[m - 1, m - 1] * K[n - 1, n - 1])
    return float(1 - square) / (1 + math.sqrt(square))


def missing_summed(m, beta=None):
    """The sum over depths of what is not yet on the first token."""
    C = averages(m) if beta is None else (np.eye(m) + beta * averages(m)) / (1 + beta)
    row, total = np.eye(m)[m - 1], 0.0
    for _ in range(4000):
        total += math.fsum(row[1:])
        row = row @ C
    return total


held("depth.collapse_depth", points={"m": [1, 2, 9, 40]})(missing_summed)
held("depth.collapse_depth_residual", points=grid(m=[1, 2, 9], beta=[0.3, 2.0]))(missing_summed)


@held("depth.half_collapse", points={"m": [40, 200]})
def _(m):
    """Between the depths where the first token has less and more than half: on the line."""
    weights, row = [], np.eye(m)[m - 1]
    while not weights or weights[-1] < 0.5:
        weights.append(row[0])
        row = row @ averages(m)
    return np.interp(0.5, weights[-2:], [len(weights) - 2, len(weights) - 1])


# -------------------------------------------------------------------------------------- tokens

VOCABULARIES = [np.array([0.5, 0.3, 0.2]), np.array([0.7, 0.3]), np.array([0.6, 0.2, 0.1, 0.1])]


def of_vocabulary(size, *orders, **values):
    """Points with the p_k of a vocabulary each, and other values."""
    found = grid(vocabulary=VOCABULARIES[:size], **values)
    sums = {f"p_{k}": [float(np.sum(p**k)) for p in found["vocabulary"]] for k in orders}
    return {name: every for name, every in found.items() if name != "vocabulary"} | sums


def over_ids(function, length, p_2):
    """E f(ids) over independent ids of the vocabulary with this p_2, all enumerated."""
    p = min(VOCABULARIES, key=lambda each: abs(np.sum(each**2) - p_2))
    every = itertools.product(range(len(p)), repeat=length)
    return math.fsum(p[list(ids)].prod() * function(np.array(ids)) for ids in every)


def equal(ids):
    return (ids[:, None] == ids[None, :]).astype(float)


def centring(size):
    return np.eye(size) - 1 / size


@held("tokens.collision_uniform")
def _(V):
    return sum(i == j for i in range(V) for j in range(V)) / V**2


@held("tokens.collision_zipf")
def _(V, alpha):
    p = np.arange(1.0, V + 1) ** -alpha
    return np.sum((p / p.sum()) ** 2)


@held("tokens.uniform_kernel")
def _(m, n, p_2, sigma_x):
    total = sum(1.0 if i == j else p_2 for i in range(m) for j in range(n))
    return sigma_x**2 * total / (m * n)


@held("tokens.uniform_cosine", widest=0.5, points=of_vocabulary(3, 2, 3, m=[6, 4], n=[5]))
def _(m, n, p_2, p_3):
    """Given the ids, rows are orthogonal: cos of the counts."""

    def cosine(ids):
        one, two = (np.bincount(part, minlength=4) for part in (ids[:m], ids[:n]))
        return one @ two / math.sqrt((one @ one) * (two @ two))

    return over_ids(cosine, max(m, n), p_2)


@held("tokens.tilt", points=of_vocabulary(3, 2, 3, m=[1, 2, 5]))
def _(m, p_2, p_3):
    def centred(ids):
        return np.sum((centring(m) @ equal(ids) @ centring(m)) ** 2) / m**2

    return over_ids(centred, m, p_2)


@held("tokens.reweighting", points=of_vocabulary(3, 2, 3, m=[1, 2, 5]), rounding=1e-8)
def _(m, p_2, p_3):
    def weighted(ids):
        N = equal(ids)
        diagonal = np.diag(centring(m) @ N @ centring(m))
        return (diagonal - diagonal.mean()) @ N.sum(1) / m**2

    return over_ids(weighted, m, p_2)


@held("tokens.shared_tilt", rounding=1e-8, points=of_vocabulary(3, 2, 3, 4, m=[4, 6], n=[2, 3]))
def _(m, n, p_2, p_3, p_4):
    def tilted(ids):
        N = equal(ids)
        cross = N[:m, :n]
        return N[m - 1, n - 1] * np.trace(centring(m) @ cross @ centring(n) @ cross.T) / (m * n)

    return over_ids(tilted, m, p_2)


@held("tokens.shared_reweighting", rounding=1e-8, points=of_vocabulary(3, 2, 3, m=[4, 5], n=[2, 4]))
def _(m, n, p_2, p_3):
    def weighted(ids):
        N = equal(ids)
        D = [np.diag(centring(k) @ N[:k, :k] @ centring(k)) for k in (m, n)]
        one, two = (part - part.mean() for part in D)
        return np.sum((one[:, None] + two[None, :]) * N[:m, :n]) / (2 * m * n)

    return over_ids(weighted, m, p_2)


# ----------------------------------------------------------------------------- orthogonal maps


def kept(d, d_h, order):
    """E (|q|^2/d)^order of d_h coordinates of a point on the sphere of radius sqrt(d)."""
    return 1.0 if d == d_h else stats.beta(d_h / 2, (d - d_h) / 2).moment(order)


@held("orthogonal.logit_second_moment")
def _(d, sigma_q, sigma_k):
    """W = sqrt(d) sigma O; of one head: <q, k>^2 is |q|^2 |k|^2/d_h on average, over d_h."""
    d_h = max(1, d // 2)
    size = d * kept(d, d_h, 1)
    return (d * sigma_q**2 * size) * (d * sigma_k**2 * size) / d_h / d_h


HEADS = points((4, 2), (4, 4), (6, 1), (9, 3), names="d d_h")


@held("orthogonal.logit_kurtosis", points=HEADS)
def _(d, d_h):
    """|q| |k| cos/sqrt(d_h), cos of a uniform direction in d_h dimensions."""
    second, fourth = (kept(d, d_h, order) ** 2 for order in (1, 2))
    return fourth / second**2 * (sphere_kurtosis(d_h) if d_h > 1 else 1.0)


@held("orthogonal.logit_kurtosis_gaussian_tokens")
def _(d_h):
    """Haar maps turn Gaussian vectors into Gaussian vectors: products of d_h pairs."""
    return stats.chi2(d_h).moment(2) / d_h**2 * stats.norm.moment(4)


def crossed(d, rho):
    """E (r e)^2 (r f)^2, r uniform on the unit sphere, |e|^2 = |f|^2 = d, <e, f> = d rho."""
    (x, y), weights = (lambda z, w: (z.T, w))(*normals(2, 20))
    gaussian = weights @ (x**2 * (rho * x + math.sqrt(1 - rho**2) * y) ** 2)
    return gaussian * d**2 / (stats.chi2(d).moment(2))


@held("orthogonal.logit_pair_moment", points=HEADS | {"rho": [0.3, -0.7, 0.0, 1.0]})
def _(d, d_h, rho):
    """The query's direction u is uniform in its head, so K u is a uniform row."""
    length = d**2 * kept(d, d_h, 2)
    return length * crossed(d, rho) / d_h**2


@held(
    "orthogonal.head_kernel_variance",
    rounding=1e-8,
    points=points((4, 1, 0.3), (5, 4, -0.7), (6, 6, 0.5), (3, 2, 1.0), names="d d_h rho"),
)
def _(d, d_h, rho):  # fmt: skip
    """Of heads of one coordinate, of all but one, and of all: one row r decides."""
    if d_h == d:
        return 0.0
    second, mean = crossed(d, rho), rho  # of (r e)(r f)
    variance = second - mean**2
    assert d_h in (1, d - 1)
    return variance / d_h**2


# ---------------------------------------------------------------------------------------- laws


@held("law.gaussian")
def _(v, x):
    return stats.norm.pdf(x, scale=math.sqrt(v))


def sphere_density(n, x):
    half = (n - 1) / 2
    return stats.beta.pdf(x, half, half, loc=-math.sqrt(n), scale=2 * math.sqrt(n))


@held("law.layernorm", points=points((4, 0.3), (9, -1.4), (5, 2.5), names="d x"))
def _(d, x):
    return sphere_density(d - 1, x)


@held("law.rmsnorm", points=points((4, 0.3), (9, -1.4), (5, 2.5), names="d x"))
def _(d, x):
    return sphere_density(d, x)


@held(
    "law.variance_gamma",
    rounding=1e-6,
    points=points((3.0, 0.7, 0.4), (8.5, 1.2, -2.0), (64.0, 0.3, 0.1), names="nu v x"),
)
def variance_gamma(nu, v, x):  # fmt: skip
    """A normal density averaged over its variance v chi^2_nu/nu."""

    def integrand(t):
        return stats.norm.pdf(x, scale=math.sqrt(v * t)) * stats.chi2.pdf(nu * t, nu) * nu

    return sum(integrate.quad(integrand, *ends)[0] for ends in [(0, 0.2), (0.2, 1), (1, np.inf)])


@held("law.logit", rounding=1e-6, points=points((4, 0.7, 0.4), (16, 1.2, -2.0), names="d_h s x"))
def _(d_h, s, x):
    return variance_gamma(d_h, s**2, x)


@held("law.relu", points=points((0.7, 0.4), (1.2, -0.3), (0.3, 1.1), names="v x"))
def _(v, x):
    return stats.norm.pdf(x, scale=math.sqrt(v)) if x > 0 else 0.0


@held("law.tanh", rounding=1e-6, points=points((0.7, 0.4), (1.2, -0.8), names="v x"))
def _(v, x, step=1e-5):
    """The slope of P(tanh X <= x), by central differences."""
    above, below = (stats.norm.cdf(math.atanh(y), scale=math.sqrt(v)) for y in (x + step, x - step))
    return (above - below) / (2 * step)


# ---------------------------------------------------------------------------- the registry

for name, attributes in PLAIN.items():
    contract = FormulaContract.named(name, name=name, **attributes)
    globals()[contract.__name__] = contract
CONTRACTS = [*contracts_in(globals()), *plugins.contracts()]


def test_every_formula_has_a_contract():
    """And no counterpart is left of one that is gone."""
    assert uncovered(FormulaContract, CONTRACTS) == []
    assert set(PLAIN) <= set(theory.formulas())


def formula(name="mine.mean", expr=d / m, **changes):
    given = {
        "statement": "A mean of m.",
        "status": Status.EXACT,
        "source": "definition",
        "left": "x",
    }
    return Formula(name, expr, **(given | changes))


def test_a_formula_without_a_contract_is_named(monkeypatch):
    registered = {**theory.formulas(), "mine.mean": formula()}
    monkeypatch.setattr("theory.testing.formulas", lambda: registered)
    assert uncovered(FormulaContract, CONTRACTS) == [
        "expected a contract for formula mine.mean, got none; subclass "
        "theory.testing.FormulaContract with its `plain`"
    ]


NUMBER, REMAINDER = "test_it_is_the_plain_number", "test_the_remainder_fits_the_status"


@pytest.mark.parametrize(
    ("changes", "plain", "caught"),
    [
        ({}, lambda d, m: d / m, set()),
        ({}, lambda d, m: d / (m + 1), {NUMBER}),
        ({}, lambda d, m: Draws(np.full(10, d / m) + 1e-7), {NUMBER}),
        ({"status": Status.LEADING_ORDER, "remainder": d / m**2 / 4},
         lambda d, m: d / m + d / m**2 / 5, set()),
        ({"status": Status.LEADING_ORDER, "remainder": d / m**2 / 4},
         lambda d, m: d / m + d / m**2 / 3, {NUMBER}),
        ({"status": Status.LEADING_ORDER, "remainder": 2 * d / m}, lambda d, m: d / m,
         {NUMBER, REMAINDER}),
        ({"status": Status.LEADING_ORDER}, lambda d, m: d / m, {REMAINDER}),
        ({"remainder": d / m**2}, lambda d, m: d / m, {NUMBER, REMAINDER}),
        ({}, lambda d, m: math.inf, {NUMBER}),
        ({"expr": d * sp.exp(-40 * m)}, lambda d, m: d * math.exp(-40 * m) / 3, {NUMBER}),
        ({"statement": "no sentence"}, lambda d, m: d / m, {"test_symbols_are_documented"}),
        ({}, lambda d, m: Draws(generator(7).normal(d / m, 3 * d / m, 10)), {NUMBER}),
    ],
)  # fmt: skip
def test_a_wrong_formula_fails_in_the_check_that_is_about_it(changes, plain, caught):
    mine = FormulaContract.named("mine", name="mine.mean", plain=plain, formula=formula(**changes))
    assert set(mine.failures()) == caught
