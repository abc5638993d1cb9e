"""Each kernel rule by a second route: enumeration of signs, explicit matrices, definitions.

Where a moment is of degree at most five per Gaussian, the Gaussian is replaced by the three
points 0, +-sqrt(3) of weights 2/3, 1/6, 1/6, which have the same moments: enumeration is exact.
"""

from fractions import Fraction
from itertools import product

import pytest
import sympy as sp

import nope
import theory
from nope.operations import Add, Normalise
from theory import symbols
from theory.kernel import J, K, Traits
from theory.rules import rule_for
from theory.symbols import d, d_ff, eps, m, n, sigma_b, sigma_o, sigma_v, sigma_x

SIGNS = (-1, 1)
NODES = {-1: Fraction(1, 6), 0: Fraction(2, 3), 1: Fraction(1, 6)}
"""Nodes in units of sqrt(3)."""
GAUSSIAN = {
    **dict.fromkeys(symbols.KURTOSIS.values(), 3),
    **dict.fromkeys(symbols.PAIR_MOMENT.values(), 1),
}
"""The fourth moments of Gaussian weights."""


def rules(**options):
    """The rules of a decoder, by place, at the end of its last block."""
    architecture = nope.decoder(8, 2, n_ctx=4, **options)
    return theory.derive(architecture, None, "blocks.0.resid_post").rules()


def looked_up(expr, function, matrix):
    return expr.replace(function, lambda row, column: matrix[int(row) - 1, int(column) - 1])


def entry(rule, left, right, first, second=None):
    """A rule's value at positions (left, right) for explicit kernels."""
    expr = rule.expression.subs({m: left, n: right}, simultaneous=True).doit()
    expr = looked_up(expr, K, first)
    return expr if second is None else looked_up(expr, J, second)


def gram(X):
    """The kernel of fixed vectors: rows of X are positions."""
    return X * X.T / X.cols


def pairs(size):
    return product(range(1, size + 1), repeat=2)


X = sp.Matrix([[2, -1, 3], [1, 4, -2], [0, 5, 1]])


@pytest.mark.parametrize("width", [1, 2, 3])
def test_tokens_kernel_is_the_second_moment_of_independent_coordinates(width):
    """E<x_m, x_n>/d over all points of the two-point rule, two positions."""
    rule = rules(d_ff=0)["embed"]
    std = sp.Rational(2, 7)
    states = list(product(SIGNS, repeat=2 * width))
    for left, right in pairs(2):
        rows = {1: slice(0, width), 2: slice(width, 2 * width)}
        total = sum(
            a * b for s in states for a, b in zip(s[rows[left]], s[rows[right]], strict=True)
        )
        expected = std**2 * total / (len(states) * width)
        assert rule.expression.subs({m: left, n: right, sigma_x: std}) == expected


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_token_norm_kurtosis_by_the_three_point_rule(width):
    """E|x|^4/(E|x|^2)^2 = 1 + 2/d."""
    fourth = second = Fraction(0)
    for point in product(NODES, repeat=width):
        weight = sp.prod(NODES[s] for s in point)
        square = 3 * sum(s * s for s in point)
        second += weight * square
        fourth += weight * square**2
    claimed = rules(d_ff=0)["embed"].traits.norm_kurtosis.subs(d, width)
    assert claimed == sp.Rational(fourth / second**2)


@pytest.mark.parametrize(
    ("place", "width", "std"),
    [
        ("blocks.0.attn.q", d, symbols.sigma_q),
        ("blocks.0.attn.k", d, symbols.sigma_k),
        ("blocks.0.attn.v", d, sigma_v),
        ("blocks.0.attn_out", d, sigma_o),
        ("blocks.0.mlp.pre", d, symbols.sigma_1),
        ("blocks.0.mlp_out", d_ff, symbols.sigma_2),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_map_by_enumerating_every_sign_matrix(place, width, std, bias):
    """E <Wx_m + b, Wx_n + b>/fan_out over W, b = +-std equals fan_in std^2 K (+ std_b^2)."""
    rule = rules(bias=bias)[place]
    size, offset = sp.Rational(1, 5), sp.Rational(3, 11)
    offsets = [offset * s for s in SIGNS] if bias else [0]
    for left, right in pairs(3):
        x, y = X.row(left - 1), X.row(right - 1)
        draws = [
            (size * x.dot(w) + b) * (size * y.dot(w) + b)
            for w in product(SIGNS, repeat=3)
            for b in offsets
        ]
        expected = sum(draws) / sp.Integer(len(draws))
        found = entry(rule, left, right, gram(X)).subs({width: 3, std: size, sigma_b: offset})
        assert found == expected


def by_definition(X, epsilon, centring):
    """LayerNorm or RMSNorm of the rows, from their definitions."""
    rows = []
    for row in X.tolist():
        mean = sum(row) / sp.Integer(len(row)) if centring else 0
        centred = [x - mean for x in row]
        scale = sp.sqrt(sum(x * x for x in centred) / sp.Integer(len(row)) + epsilon)
        rows.append([x / scale for x in centred])
    return sp.Matrix(rows)


def norm_rule(kind, epsilon):
    operation = Normalise("norm", ("x",), kind, float(epsilon))
    return rule_for(operation, {"x": Traits(maps=1, isotropic=True)}, "uniform")


@pytest.mark.parametrize("epsilon", [sp.Integer(0), sp.Rational(3, 7)])
def test_rmsnorm_of_fixed_vectors_by_definition(epsilon):
    """For vectors whose norms do not fluctuate the rule is the definition, eps included."""
    rule, normed = norm_rule("rmsnorm", epsilon), by_definition(X, epsilon, centring=False)
    for left, right in pairs(3):
        found = entry(rule, left, right, gram(X)).subs(eps, epsilon)
        assert sp.simplify(found - gram(normed)[left - 1, right - 1]) == 0


@pytest.mark.parametrize("epsilon", [sp.Integer(0), sp.Rational(3, 7)])
def test_layernorm_of_fixed_centred_vectors_by_definition(epsilon):
    """The same for LayerNorm: K is before centring, so (1 - 1/d) K is what is left."""
    centred = sp.Matrix([[2, -1, -1], [1, -4, 3], [0, 5, -5]])
    rule, normed = norm_rule("layernorm", epsilon), by_definition(centred, epsilon, centring=True)
    kernel = gram(centred) * sp.Rational(3, 2)
    for left, right in pairs(3):
        found = entry(rule, left, right, kernel).subs({eps: epsilon, d: 3})
        assert sp.simplify(found - gram(normed)[left - 1, right - 1]) == 0


def test_centring_keeps_one_minus_one_over_d_of_an_isotropic_kernel():
    """E <P s x, P s y>/d over every sign vector s is (1 - 1/d) <x, y>/d: the norm rule's factor."""
    x, y = X.row(0), X.row(1)
    P = sp.eye(3) - sp.ones(3, 3) / 3
    flips = [sp.diag(*s) for s in product(SIGNS, repeat=3)]
    kept = sum((x * s * P * s * y.T)[0] for s in flips) / sp.Integer(3 * len(flips))
    linear = sp.limit(eps * norm_rule("layernorm", 1).expression, eps, sp.oo)
    assert sp.simplify(linear.subs({K(m, n): gram(X)[0, 1], d: 3}) - kept) == 0


@pytest.mark.parametrize(("kind", "sphere"), [("layernorm", d - 1), ("rmsnorm", d)])
def test_norm_kurtosis_by_integrating_a_coordinate_of_the_sphere(kind, sphere):
    """E t^4/(E t^2)^2 with density (1 - t^2)^((N-3)/2) in N = 3, 5, 7 dimensions."""
    t = sp.Symbol("t")
    claimed = norm_rule(kind, 0).traits.kurtosis
    for dimensions in (3, 5, 7):
        density = (1 - t**2) ** ((dimensions - 3) // 2)
        even = [sp.integrate(t**power * density, (t, -1, 1)) for power in (0, 2, 4)]
        (width,) = sp.solve(sphere - dimensions, d)
        assert sp.simplify(claimed.subs(d, width) - even[2] * even[0] / even[1] ** 2) == 0


def cesaro(size):
    return sp.Matrix(size, size, lambda r, c: sp.Rational(1, r + 1) if c <= r else 0)


@pytest.mark.parametrize("attention", ["uniform", "softmax"])
def test_mixing_by_the_cesaro_matrix(attention):
    """K -> A K A' with A_mn = 1/m for n <= m."""
    kernel = sp.Matrix(4, 4, lambda r, c: sp.Rational((r + 2) * (c + 2) + 7 * (r == c), 1 + r + c))
    expected = cesaro(4) * kernel * cesaro(4).T
    rule = rules(attention=attention, d_ff=0)["blocks.0.attn.z"]
    assert all(entry(rule, r, c, kernel) == expected[r - 1, c - 1] for r, c in pairs(4))


def test_causal_mean_by_the_cesaro_matrix():
    """The layer that only averages has the same rule."""
    architecture = nope.prefix_means(8, n_ctx=4)
    rule = theory.derive(architecture, None, "mean").rules()["mean"]
    kernel = sp.Matrix(4, 4, lambda r, c: sp.Rational(1 + r * c, 2 + r + c))
    expected = cesaro(4) * kernel * cesaro(4).T
    assert all(entry(rule, r, c, kernel) == expected[r - 1, c - 1] for r, c in pairs(4))


@pytest.mark.parametrize("heads", [1, 2])
def test_scores_by_enumerating_every_sign_of_both_weight_matrices(heads):
    """E l_mn^2 = K_q(m, m) K_k(n, n) at d = 2 for every head count, m = n included."""
    tokens = ((3, 1), (-2, 5))
    std_q, std_k, d_head = sp.Rational(1, 3), sp.Rational(2, 5), 2 // heads
    matrices = list(product(SIGNS, repeat=4))

    def mapped(x, W):
        return (x[0] * W[0] + x[1] * W[2], x[0] * W[1] + x[1] * W[3])

    def second_moment(x):
        return sp.Rational(sum(y * y for W in matrices for y in mapped(x, W)), 2 * len(matrices))

    rule = rules(attention="softmax", d_ff=0)["blocks.0.attn.scores"]
    K_q = sp.diag(*(std_q**2 * second_moment(x) for x in tokens))
    K_k = sp.diag(*(std_k**2 * second_moment(x) for x in tokens))
    for left, right in pairs(2):
        total = 0
        for W_q, W_k in product(matrices, repeat=2):
            q, k = mapped(tokens[left - 1], W_q), mapped(tokens[right - 1], W_k)
            for head in range(heads):
                at = range(head * d_head, (head + 1) * d_head)
                total += sum(q[c] * k[c] for c in at) ** 2
        squared = sp.Rational(total, d_head * heads * len(matrices) ** 2)
        assert entry(rule, left, right, K_q, K_k) == std_q**2 * std_k**2 * squared


def product_kurtosis(width):
    """E l^4/(E l^2)^2 of a sum of `width` products of independent Gaussians."""
    second = fourth = Fraction(0)
    points = [(p, sp.prod(NODES[s] for s in p)) for p in product(NODES, repeat=width)]
    for (left, one), (right, two) in product(points, repeat=2):
        value = 3 * sum(a * b for a, b in zip(left, right, strict=True))
        second += one * two * value**2
        fourth += one * two * value**4
    return sp.Rational(fourth / second**2)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_logit_kurtosis_by_the_three_point_rule(width):
    """A logit is a sum of d_h products of Gaussians: 3 + 6/d_h."""
    claimed = rules(attention="softmax", d_ff=0)["blocks.0.attn.scores"].traits.kurtosis
    assert claimed.subs({**GAUSSIAN, symbols.d_h: width}) == product_kurtosis(width)
    assert theory.formula("attention.logit_kurtosis")(d_h=width) == float(product_kurtosis(width))


@pytest.mark.parametrize("width", [1, 2, 3])
def test_kurtosis_of_a_map_of_raw_tokens_by_the_three_point_rule(width):
    """Without a norm in front q is a Gaussian with a random variance: 3 (1 + 2/d)."""
    claimed = rules(norm_position="none", d_ff=0)["blocks.0.attn.q"].traits.kurtosis
    assert claimed.subs({**GAUSSIAN, d: width}) == product_kurtosis(width)


def test_residual_by_enumerating_the_branch_weights():
    """E <x + Wz, x' + Wz'>/d over every sign matrix W is K_x + K_branch."""
    rule = rule_for(Add("sum", ("x", "b")), {"x": Traits(), "b": Traits(fresh=True)}, "uniform")
    stream, inner = sp.Matrix([[1, 2], [3, -1]]), sp.Matrix([[4, 1], [-2, 3]])
    maps = [sp.Matrix(2, 2, signs) for signs in product(SIGNS, repeat=4)]
    branch = sum((gram(inner * W) for W in maps), sp.zeros(2, 2)) / len(maps)
    expected = sum((gram(stream + inner * W) for W in maps), sp.zeros(2, 2)) / len(maps)
    for left, right in pairs(2):
        assert entry(rule, left, right, gram(stream), branch) == expected[left - 1, right - 1]


@pytest.mark.parametrize(
    "branch", [nope.CausalMean(), nope.Norm("ln"), nope.Residual(nope.Norm("ln"), "inner")]
)
def test_a_branch_without_weights_of_its_own_is_refused(branch):
    """It is correlated with the stream: a mean of unit tokens makes (1 + 1/4)^2 of 1, not 17/16."""
    body = nope.Residual(branch, "sum", 0.25)
    architecture = nope.Architecture(16, 3, nope.GaussianTokens(1.0), body)
    asked = nope.Question(architecture, nope.init.normal(1.0), "sum", "second_moment")
    with pytest.raises(NotImplementedError, match="odd in weights of its own"):
        theory.predict(asked)


def uniform_layer_moments(length):
    """E<o_m, o_n>/2 and E<y_m, y_n>/2 at d = 2 in units of weights +-1 and tokens +-(1, -1).

    Two coordinates that are centred and of norm sqrt(2) are +-(1, -1): LayerNorm leaves them.
    """
    output, stream = sp.zeros(length, length), sp.zeros(length, length)
    count = 0
    for signs in product(SIGNS, repeat=length):
        means = [Fraction(sum(signs[: k + 1]), k + 1) for k in range(length)]
        for V in product(SIGNS, repeat=4):
            v = (V[0] - V[2], V[1] - V[3])
            for W in product(SIGNS, repeat=4):
                o = (v[0] * W[0] + v[1] * W[2], v[0] * W[1] + v[1] * W[3])
                count += 1
                for r, c in product(range(length), repeat=2):
                    output[r, c] += means[r] * means[c] * (o[0] ** 2 + o[1] ** 2)
                    left = (signs[r] + means[r] * o[0], -signs[r] + means[r] * o[1])
                    right = (signs[c] + means[c] * o[0], -signs[c] + means[c] * o[1])
                    stream[r, c] += left[0] * right[0] + left[1] * right[1]
    return output / (2 * count), stream / (2 * count)


def test_uniform_attention_by_enumerating_tokens_and_weights():
    """At d = 2, n_ctx = 2: E<o_m, o_n>/d = d^2 sigma^4/max(m, n), and the residual's kernel."""
    output, stream = uniform_layer_moments(2)
    architecture = nope.decoder(2, 1, n_ctx=2, d_ff=4, attention="uniform")
    point = {d: 2, sigma_v: 1, sigma_o: 1, sigma_x: 1}
    for place, expected in (("blocks.0.attn_out", output), ("blocks.0.resid_mid", stream)):
        derived = theory.derive(architecture, None, place).result
        for left, right in pairs(2):
            assert derived.subs({m: left, n: right, **point}) == expected[left - 1, right - 1]
