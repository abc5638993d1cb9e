"""Haar moments: enumeration over finite groups that share them, haarpy, real layers.

A finite group whose average agrees with the Haar average for every polynomial of a degree is
a second route without integrals or randomness: for O(2) the symmetries of a regular polygon,
for O(3) those of the icosahedron (their first invariant harmonic has degree 6).
"""

from functools import cache
from itertools import product

import numpy as np
import pytest
import sympy as sp
import torch

import nope
from nope import transformer
from nope.questions import stream_key
from nope.streams import TorchSource, generator
from theory.formulas import weingarten as haar
from theory.symbols import d

Z = 5.0
ROUNDING = 1e-12
FORMULAS = {found.name.partition(".")[2]: found for found in haar.formulas()}

# ------------------------------------------------------------------------ finite groups


@cache
def dihedral(sides=8):
    """Rotations and reflections of a regular polygon: exact for degrees below `sides`."""
    angles = 2 * np.pi * np.arange(sides) / sides
    cosine, sine = np.cos(angles), np.sin(angles)
    rotations = np.moveaxis(np.array([[cosine, -sine], [sine, cosine]]), -1, 0)
    return np.concatenate([rotations, rotations @ np.diag([1, -1])])


def rotation(axis, angle):
    """Rodrigues: exp of the angle times the cross product with the axis."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@cache
def icosahedral():
    """The 60 rotations of the icosahedron and their negatives: exact up to degree 5."""
    golden = (1 + 5**0.5) / 2
    fifth = rotation(np.array([0, 1, golden]), 2 * np.pi / 5)
    third = rotation(np.array([1, 1, 1]), 2 * np.pi / 3)
    group = {tuple(np.eye(3).round(6).ravel()): np.eye(3)}
    fresh = list(group.values())
    while fresh:
        made = [g @ h for g in fresh for h in (fifth, third)]
        fresh = [g for g in made if tuple(g.round(6).ravel() + 0.0) not in group]
        group |= {tuple(g.round(6).ravel() + 0.0): g for g in fresh}
    rotations = np.array(list(group.values()))
    return np.concatenate([rotations, -rotations])


GROUPS = {1: lambda: np.array([[[1.0]], [[-1.0]]]), 2: dihedral, 3: icosahedral}


def test_the_icosahedral_group_is_one():
    """60 rotations, orthogonal and closed: the products are members again."""
    group = icosahedral()
    assert len(group) == 120
    assert np.abs(group @ group.swapaxes(1, 2) - np.eye(3)).max() < ROUNDING
    products = np.einsum("aij,bjk->abik", group, group).reshape(-1, 1, 9)
    nearest = np.abs(products[::7] - group.reshape(1, -1, 9)).max(2).min(1)
    assert nearest.max() < ROUNDING


def enumerated(group, rows, columns):
    """The group's average of prod_t O[rows[t], columns[t]]."""
    return np.prod([group[:, r, c] for r, c in zip(rows, columns, strict=True)], axis=0).mean()


def index_patterns(size, values):
    """One word per way to tell `size` indices apart with at most `values` values."""
    words = product(range(values), repeat=size)
    return [w for w in words if all(x <= max(w[:t], default=-1) + 1 for t, x in enumerate(w))]


@pytest.mark.parametrize(("dimension", "size"), [(1, 2), (1, 4), (1, 6), (2, 4), (3, 2), (3, 4)])
def test_moments_by_enumeration(dimension, size):
    """Every pattern of rows and columns, in dimensions where Wg itself has poles too."""
    group = GROUPS[dimension]()
    for rows, columns in product(index_patterns(size, dimension), repeat=2):
        found = haar.haar_moment(rows, columns).subs(d, dimension)
        assert abs(float(found) - enumerated(group, rows, columns)) < ROUNDING, (rows, columns)


@pytest.mark.parametrize("columns", ["000000", "000011", "001100", "010101"])
def test_sixth_moments_by_enumeration(columns):
    """Order 6 at d = 2, below the three dimensions that its Wg is defined in."""
    for rows in ("000000", "001111", "011011"):
        indices = [tuple(map(int, word)) for word in (rows, columns)]
        found = haar.haar_moment(*indices).subs(d, 2)
        assert abs(float(found) - enumerated(dihedral(), *indices)) < ROUNDING


def test_odd_moments_vanish():
    """-O is as likely as O."""
    assert haar.haar_moment((1, 1, 2), (1, 1, 1)) == 0


def test_every_row_needs_a_column():
    """A factor without a column is no matrix entry."""
    with pytest.raises(ValueError, match="a column for each of 2 rows"):
        haar.haar_moment((1, 1), (1,))


# ---------------------------------------------------------------------- the calculus


@pytest.mark.parametrize(("size", "count"), [(0, 1), (1, 0), (2, 1), (3, 0), (4, 3), (6, 15)])
def test_pairings_are_counted_by_double_factorials(size, count):
    """All different, each using every index once."""
    found = haar.pairings(size)
    assert len(set(found)) == len(found) == count
    assert all(sorted(sum(pairing, ())) == list(range(size)) for pairing in found)


@pytest.mark.parametrize(("size", "dimension"), [(2, 3), (4, 3), (6, 2)])
def test_gram_counts_indices(size, dimension):
    """G(P, Q) is the number of index words that P and Q both pair equally."""
    words = product(range(dimension), repeat=size)
    equal = np.array([np.array(haar.paired(word)).ravel() for word in words], dtype=int)
    assert (equal.T @ equal == np.array(haar.gram(size, sp.Integer(dimension)))).all()


def test_weingarten_in_closed_form():
    """Collins and Sniady's values of order 2 and 4."""
    assert haar.weingarten(2) == sp.Matrix([[1 / d]])
    below = d * (d - 1) * (d + 2)
    expected = sp.Matrix(3, 3, lambda r, c: (d + 1) / below if r == c else -1 / below)
    assert (haar.weingarten(4) - expected).applyfunc(sp.simplify) == sp.zeros(3, 3)


@pytest.mark.parametrize("size", [2, 4, 6])
def test_haarpy_agrees(size):
    """An independent implementation, by zonal spherical functions, in the symbol d."""
    import haarpy  # slow to import, and only needed here

    words = index_patterns(size, 3)
    for rows, columns in list(product(words, repeat=2))[:: 1 if size < 6 else 997]:
        theirs = haarpy.haar_integral_orthogonal((rows, columns), d)
        assert sp.simplify(haar.haar_moment(rows, columns) - theirs) == 0


# ------------------------------------------------------- one head, by enumeration


def tokens(dimension, rho):
    """Two vectors of squared norm d and inner product d rho, in no special position."""
    frame = np.linalg.qr(np.random.default_rng(dimension).standard_normal((dimension, 2)))[0]
    pair = np.array([[1, rho], [0, np.sqrt(1 - rho**2)]])
    return np.sqrt(dimension) * (frame @ pair).T


def logits(dimension, d_h, rho):
    """l_mn and l_mn' for every pair of group elements W_Q, W_K: `W_Q W_K keys`."""
    group, pair = GROUPS[dimension](), tokens(dimension, rho)
    heads = np.einsum("gij,tj->gti", group, pair)[:, :, :d_h]
    return np.einsum("gi,hti->ght", heads[:, 0], heads) / np.sqrt(d_h)


HEADS = [(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)]


@pytest.mark.parametrize(("dimension", "d_h"), HEADS)
@pytest.mark.parametrize("rho", [0.0, 0.6, -1.0])
def test_logits_by_enumeration(dimension, d_h, rho):
    """Second and fourth moments over all pairs of weights, for one key and for two."""
    first, second = np.moveaxis(logits(dimension, d_h, rho), -1, 0)
    gain = FORMULAS["logit_second_moment"](d=dimension, sigma_q=dimension**-0.5, sigma_k=1.0)
    assert abs((first**2).mean() - gain / dimension) < ROUNDING
    assert abs((first * second).mean() - rho) < ROUNDING
    assert abs((first**4).mean() - FORMULAS["logit_kurtosis"](d=dimension, d_h=d_h)) < 10 * ROUNDING
    pair = FORMULAS["logit_pair_moment"](d=dimension, d_h=d_h, rho=rho)
    assert abs((first**2 * second**2).mean() - pair) < 10 * ROUNDING


@pytest.mark.parametrize(("dimension", "d_h"), HEADS)
@pytest.mark.parametrize("rho", [0.0, 0.6, -1.0])
def test_head_kernels_by_enumeration(dimension, d_h, rho):
    """Mean rho and the stated variance over all weights; none at all for one head."""
    heads = np.einsum("gij,tj->gti", GROUPS[dimension](), tokens(dimension, rho))[:, :, :d_h]
    kernels = np.einsum("gi,gi->g", heads[:, 0], heads[:, 1]) / d_h
    variance = FORMULAS["head_kernel_variance"](d=dimension, d_h=d_h, rho=rho)
    assert abs(kernels.mean() - rho) < ROUNDING
    assert abs(kernels.var() - variance) < 10 * ROUNDING
    assert (np.ptp(kernels) < ROUNDING) == (dimension == d_h)


def test_entry_kurtosis_by_enumeration():
    """1, 3/2, 9/5 at d = 1, 2, 3: a sign, a cosine, a uniform."""
    for dimension, make in GROUPS.items():
        entry = make()[:, 0, -1]
        kurtosis = (entry**4).mean() / (entry**2).mean() ** 2
        assert abs(FORMULAS["entry_kurtosis"](d=dimension) - kurtosis) < ROUNDING


def test_known_limits():
    """Wide layers forget that W is orthogonal: 3 + 6/d_h and (1 + rho^2)/d_h."""
    at = {"d": 10**7, "d_h": 4}
    assert FORMULAS["logit_kurtosis"](**at) == pytest.approx(3 + 6 / 4, rel=1e-6)
    assert FORMULAS["head_kernel_variance"](**at, rho=0.6) == pytest.approx(1.36 / 4, rel=1e-6)
    assert FORMULAS["logit_kurtosis"](d=8, d_h=8) == pytest.approx(3 * 8 / 10, rel=1e-12)


def test_a_variance_gamma_has_the_kurtosis_of_haar_logits_of_gaussian_tokens():
    """Given k, q.k is N(0, |k|^2): E l^4 = 3 E |k|^4/d_h^2 with |k|^2 a chi-square of d_h."""
    chi_square = 1 + sp.Rational(2) / haar.d_h
    expected = 3 * chi_square
    found = FORMULAS["logit_kurtosis_gaussian_tokens"].expr
    assert sp.simplify(found - expected) == 0


# --------------------------------------------------------------------- real layers

DRAWS = 60_000


def sampled(place, scheme=None, **options):
    """A place of a layer of width 8 with four heads, over fresh tokens and weights."""
    architecture = nope.decoder(8, 4, n_ctx=4, d_ff=0, tokens=nope.GaussianTokens(1.0), **options)
    scheme = scheme or nope.init.orthogonal(1.3)
    cpu = torch.device("cpu")

    def source(path):
        return TorchSource(generator(stream_key(0, path), cpu), cpu, torch.float32)

    def weight(asked):
        law = scheme.law(asked, architecture)
        return law.draw(source(asked.path), (DRAWS, *asked.shape))

    drawn = source("embed").normal((DRAWS, 4, 8), 1.0)
    return transformer.evaluate(architecture, [place], drawn, weight)[place].double().numpy()


def assert_mean(draws, expected):
    """The mean over draws, five standard errors allowed."""
    assert abs(draws.mean() - expected) <= Z * draws.std() / np.sqrt(len(draws))


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_normed_logits_of_real_layers(norm):
    """Second moment, kurtosis and the mean over heads at m = n = 3 and m = 3, n = 1."""
    scores = sampled("blocks.0.attn.scores", norm=norm)
    std = 1.3 / 8**0.5
    second = FORMULAS["logit_second_moment"](d=8, sigma_q=std, sigma_k=std)
    fourth = second**2 * FORMULAS["logit_kurtosis"](d=8, d_h=2)
    for n in (0, 2):
        logit = scores[:, :, 2, n]
        assert_mean((logit**2).mean(1), second)
        assert_mean((logit**4).mean(1), fourth)


def test_logits_of_gaussian_tokens_in_real_layers():
    """Without a norm the kurtosis is 6 at d_h = 2; normal weights would give 9.4."""
    scores = sampled("blocks.0.attn.scores", norm_position="none")
    kurtosis = FORMULAS["logit_kurtosis_gaussian_tokens"](d_h=2)
    logit = scores[:, :, 2, 0] / 1.3**2
    assert_mean((logit**2).mean(1), 1.0)
    assert_mean((logit**4).mean(1), kurtosis)


def test_uniform_cosines_of_real_layers():
    """Haar value and output maps leave the prefix means' cosine; normal ones lower it."""
    shape = {"norm_position": "none", "attention": "uniform"}
    expected = FORMULAS["uniform_cosine"](d=8, m=4, n=1)

    def cosines(scheme):
        o = sampled("blocks.0.attn_out", scheme, **shape)
        o /= np.linalg.norm(o, axis=2, keepdims=True)
        return (o[:, 0] * o[:, 3]).sum(1)

    assert_mean(cosines(nope.init.orthogonal()), expected)
    assert expected - cosines(nope.init.normal(1.0)).mean() > 0.02


def test_head_norms_of_real_layers():
    """A head's kernel at rho = 1 is its norm: it fluctuates as stated, the heads' mean does not."""
    q = sampled("blocks.0.attn.q")[:, :, 0] / 1.3
    norms = (q**2).mean(2)
    assert np.abs(norms.mean(1) - 1).max() < 1e-5
    expected = FORMULAS["head_kernel_variance"](d=8, d_h=2, rho=1.0)
    assert_mean(((norms - 1) ** 2).mean(1), expected)
