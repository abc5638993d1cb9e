"""Stacks of uniform attention: exact matrix powers, enumeration, quadrature, high precision."""

from fractions import Fraction
from functools import cache
from itertools import product

import mpmath
import numpy as np
import pytest
import sympy as sp

from theory.formula import Status
from theory.formulas import collapse, depth
from theory.formulas.depth import (
    CesaroPower,
    Harmonic,
    RandomValueKernel,
    ResidualPower,
    StackKernel,
    cesaro_power_exact,
    exact,
)
from theory.symbols import ell, g, i, j, m, n

SIZE, DEEPEST = 12, 6
PROMISE = 1e-9
FORMULAS = {
    formula.name.removeprefix("depth."): formula
    for module in (depth, collapse)
    for formula in module.formulas()
}
EVERY = np.arange(1, SIZE + 1)
PAIRS = list(product(range(1, SIZE + 1), repeat=2))


def identity(size):
    return [[Fraction(row == column) for column in range(size)] for row in range(size)]


def times(left, right):
    return [
        [sum(map(Fraction.__mul__, row, col)) for col in zip(*right, strict=True)] for row in left
    ]


def transposed(matrix):
    return [list(column) for column in zip(*matrix, strict=True)]


def layer(gain, size=SIZE, keep=1):
    """keep I + gain C, typed in from the definition."""
    return [
        [keep * (m == n) + gain * Fraction(n <= m, m) for n in range(1, size + 1)]
        for m in range(1, size + 1)
    ]


@cache
def power(gain, ell, keep=1):
    """(keep I + gain C)^ell by multiplying."""
    if ell == 0:
        return identity(SIZE)
    return times(power(gain, ell - 1, keep), layer(gain, keep=keep))


def rational(value):
    return sp.Rational(value.numerator, value.denominator)


def is_exactly(call, matrix):
    """call(m, n) in rationals against every entry."""
    return all(exact(call(row, col)) == rational(matrix[row - 1][col - 1]) for row, col in PAIRS)


def as_floats(matrix):
    return np.array(matrix, dtype=float)


def is_close(found, expected, promise=PROMISE):
    return bool((np.abs(found - expected) <= promise * np.abs(expected)).all())


# --- exact values -------------------------------------------------------------------------


@pytest.mark.parametrize("layers", range(DEEPEST + 1))
def test_cesaro_powers_are_matrix_powers(layers):
    """Every entry up to 12, zeros above the diagonal and the identity at depth 0 included."""
    assert is_exactly(lambda m, n: CesaroPower(m, n, layers), power(Fraction(1), layers, keep=0))
    assert cesaro_power_exact(12, 5, layers) == rational(power(Fraction(1), layers, 0)[11][4])


@pytest.mark.parametrize("gain", [Fraction(1, 2), Fraction(-3, 4), Fraction(7, 3)])
@pytest.mark.parametrize("layers", [0, 1, 2, 3, DEEPEST])
def test_residual_powers_are_matrix_powers(layers, gain):
    """(I + beta C)^ell, negative gains included; the eigenvalues are its diagonal."""
    expected = power(gain, layers)
    assert is_exactly(lambda m, n: ResidualPower(m, n, layers, rational(gain)), expected)
    eigenvalue = FORMULAS["residual_eigenvalue"].subs(ell=layers, beta=rational(gain))
    assert all(eigenvalue.subs(m, row) == rational(expected[row - 1][row - 1]) for row in EVERY)


@pytest.mark.parametrize("layers", range(DEEPEST + 1))
def test_stack_kernels_are_matrix_products(layers):
    """C^ell C'^ell."""
    weights = power(Fraction(1), layers, keep=0)
    expected = times(weights, transposed(weights))
    assert is_exactly(lambda m, n: StackKernel(m, n, layers), expected)


@pytest.mark.parametrize("layers", [0, 1, 3])
def test_random_values_by_every_choice_of_signs(layers):
    """One coordinate, value maps +-1/2: the mean of M M' over all 2^ell signs, g = 1/4."""
    total = [[Fraction(0)] * SIZE for _ in range(SIZE)]
    for signs in product([1, -1], repeat=layers):
        mixing = identity(SIZE)
        for sign in signs:
            mixing = times(layer(Fraction(sign, 2)), mixing)
        kernel = times(mixing, transposed(mixing))
        total = [
            [a + b for a, b in zip(*rows, strict=True)] for rows in zip(total, kernel, strict=True)
        ]
    expected = [[entry / 2**layers for entry in row] for row in total]
    quarter = sp.Rational(1, 4)
    assert is_exactly(lambda m, n: RandomValueKernel(m, n, layers, quarter), expected)


def test_two_layers_in_harmonic_numbers():
    """C C C' C' and C C in closed form, either order of the positions."""
    covariance, weight = FORMULAS["two_layer_covariance"], FORMULAS["two_layer_weight"]
    square = power(Fraction(1), 2, keep=0)
    assert is_exactly(lambda m, n: covariance.subs(m=m, n=n), times(square, transposed(square)))
    assert is_exactly(lambda m, n: weight.subs(m=m, n=n), square)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, DEEPEST])
def test_powers_in_harmonic_numbers(layers):
    """Newton's identities on differences of harmonic numbers, n <= m."""
    closed = depth.cesaro_power_in_harmonic_numbers(layers)
    expected = power(Fraction(1), layers, keep=0)
    for row, col in PAIRS:
        if col <= row:
            assert exact(closed.subs({m: row, n: col})) == rational(expected[row - 1][col - 1])


@pytest.mark.parametrize(("row", "col", "layers"), [(1, 1, 1), (7, 3, 2), (12, 1, 5), (9, 9, 3)])
def test_moment_integrals_by_quadrature(row, col, layers):
    """The integral forms, Laguerre's polynomial included, to 20 digits."""
    gain = sp.Rational(-3, 4)
    for call in (CesaroPower(row, col, layers), ResidualPower(row, col, layers, gain)):
        integral = call.rewrite(sp.Integral)
        (inner,) = integral.atoms(sp.Integral)
        (variable, low, high) = inner.limits[0]
        integrand = sp.lambdify(variable, inner.function, "mpmath")
        with mpmath.workdps(40):
            value = mpmath.quad(integrand, [int(low), mpmath.mpf(10) ** -6, 0.01, 0.3, int(high)])
            found = sp.N(integral.xreplace({inner: sp.Float(value, 40)}), 40)
        assert abs(found - sp.N(exact(call), 40)) < sp.Float(10) ** -20


def test_one_layer_is_one_over_the_longer_prefix():
    """Depth 1: 1/m below the diagonal, kernel 1/max."""
    assert all(
        exact(StackKernel(row, col, 1)) == sp.Rational(1, max(row, col)) for row, col in PAIRS
    )


@pytest.mark.parametrize("kind", [CesaroPower, StackKernel])
def test_one_position_and_no_depth(kind):
    """A single token keeps all its weight at any depth; depth 0 is the identity."""
    assert [exact(kind(1, 1, layers)) for layers in (0, 1, 50)] == [1, 1, 1]
    assert exact(kind(1, 2, 0)) == exact(kind(2, 1, 0)) == 0


@pytest.mark.parametrize("call", [CesaroPower(m, 2, 3), ResidualPower(3, 2, 1, 0.5)])
def test_exact_refuses_what_is_not_exact(call):
    """A symbol or a float is named."""
    with pytest.raises(ValueError, match="expected whole positions and rational gains, got"):
        exact(call)


@pytest.mark.parametrize(("changes", "named"), [({"m": 0}, "m to"), ({"ell": -1}, "ell to")])
def test_exact_powers_refuse_wrong_positions_and_depths(changes, named):
    """Positions count from 1, depths from 0."""
    with pytest.raises(ValueError, match=named):
        cesaro_power_exact(**{"m": 3, "n": 2, "ell": 1, **changes})


# --- floats -------------------------------------------------------------------------------


def alternating(row, col, eigenvalue):
    """The spectral sum in Python's integers and fractions."""
    total, sign, choices = Fraction(0), 1, 1
    for step in range(row - col + 1):
        total += sign * choices * eigenvalue(col + step)
        sign, choices = -sign, choices * (row - col - step) // (step + 1)
    for step in range(1, col):
        total = total * (row - step) / step
    return float(total)


FAR = [(200, 1), (200, 2), (200, 57), (200, 199), (200, 200), (131, 7), (64, 60), (1000, 998)]


@pytest.mark.parametrize(("row", "col"), FAR)
@pytest.mark.parametrize("layers", [0, 1, 2, 6, 30])
def test_floats_against_rationals_where_the_alternating_sum_drowns(row, col, layers):
    """C^ell and (I + beta C)^ell to nine digits, beta = 3/4."""
    gain = Fraction(3, 4)
    powers = alternating(row, col, lambda j: Fraction(1, j) ** layers)
    residual = alternating(row, col, lambda j: (1 + gain / j) ** layers)
    assert is_close(FORMULAS["cesaro_power"](m=row, n=col, ell=layers), powers)
    found = FORMULAS["residual_power"](m=row, n=col, ell=layers, beta=float(gain))
    assert is_close(found, residual)


def test_a_negative_gain_rounds_relative_to_the_positive_one():
    """beta = -1/2 at 40 layers: the error is nine digits of the value at +1/2."""
    residual = FORMULAS["residual_power"]
    for row, col in FAR[:6]:
        expected = alternating(row, col, lambda j: (1 - Fraction(1, 2 * j)) ** 40)
        scale = residual(m=row, n=col, ell=40, beta=0.5)
        assert abs(residual(m=row, n=col, ell=40, beta=-0.5) - expected) <= PROMISE * scale


@pytest.mark.parametrize("layers", [1, 7, 50])
def test_newtons_identities_equal_cumulative_sums_at_ten_thousand(layers):
    """A whole row of C^ell walked down by cumulative sums, without a matrix or a zeta."""
    last = 10_000
    every = np.arange(1, last + 1)
    row = (every == last).astype(float)
    for _ in range(layers):
        row = (row / every)[::-1].cumsum()[::-1]
    assert is_close(FORMULAS["cesaro_power"](m=last, n=every, ell=layers), row)


@pytest.mark.parametrize("layers", [0, 1, 3, 50])
def test_matrices_equal_formulas_entry_by_entry(layers):
    """Cumulative sums over whole matrices against the elementwise number forms."""
    size, gain = 60, 0.7
    at = {"m": np.arange(1, size + 1)[:, None], "n": np.arange(1, size + 1), "ell": layers}
    matrices = {
        "cesaro_power": depth.cesaro_power_matrix(size, layers),
        "stack_kernel": depth.stack_kernel_matrix(size, layers),
        "residual_power": depth.residual_power_matrix(size, layers, gain),
        "random_value_kernel": depth.random_value_kernel_matrix(size, layers, gain),
    }
    gains = {"residual_power": {"beta": gain}, "random_value_kernel": {"g": gain}}
    for name, matrix in matrices.items():
        assert is_close(FORMULAS[name](**at, **gains.get(name, {})), matrix), name


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_matrices_against_rationals(layers):
    """The same four in exact arithmetic."""
    gain = Fraction(1, 4)
    weights, mixing = power(Fraction(1), layers, keep=0), power(gain, layers)
    kernel = identity(SIZE)
    for _ in range(layers):
        step = times(
            times(layer(Fraction(1), keep=0), kernel), transposed(layer(Fraction(1), keep=0))
        )
        kernel = [
            [a + gain * b for a, b in zip(*rows, strict=True)]
            for rows in zip(kernel, step, strict=True)
        ]
    assert is_close(depth.cesaro_power_matrix(SIZE, layers), as_floats(weights))
    assert is_close(depth.residual_power_matrix(SIZE, layers, 0.25), as_floats(mixing))
    stacked = as_floats(times(weights, transposed(weights)))
    assert is_close(depth.stack_kernel_matrix(SIZE, layers), stacked)
    assert is_close(depth.random_value_kernel_matrix(SIZE, layers, 0.25), as_floats(kernel))


def test_every_argument_broadcasts():
    """Depths along one axis, positions along two, gains along a fourth."""
    residual = FORMULAS["residual_power"]
    depths, gains = np.arange(4)[:, None, None, None], np.array([-0.5, 0.0, 2.0])
    found = residual(m=EVERY[:, None, None], n=EVERY[:, None], ell=depths, beta=gains)
    assert found.shape == (4, SIZE, SIZE, 3)
    for layers, (index, gain) in product(range(4), enumerate(gains)):
        expected = as_floats(power(Fraction(gain), layers))
        assert (
            np.abs(found[layers, :, :, index] - expected).max() <= PROMISE * np.abs(expected).max()
        )
    weights = FORMULAS["cesaro_power"](m=EVERY[:, None], n=EVERY, ell=np.arange(3)[:, None, None])
    assert is_close(weights[2], FORMULAS["two_layer_weight"](m=EVERY[:, None], n=EVERY))
    kernels = FORMULAS["stack_kernel"](m=EVERY[:, None], n=EVERY, ell=np.arange(3)[:, None, None])
    assert is_close(kernels[2], FORMULAS["two_layer_covariance"](m=EVERY[:, None], n=EVERY))


@pytest.mark.parametrize(("row", "col"), [(1, 1), (10_000, 1), (9_999, 10_000), (100_000, 7)])
def test_two_layer_covariance_at_high_precision(row, col):
    """The number form of the harmonic numbers, by digamma, to nine digits."""
    low, high = min(row, col), max(row, col)
    with mpmath.workdps(40):
        first, last = mpmath.harmonic(low), mpmath.harmonic(high)
        expected = (2 * low + low * last - (low + 1) * first) / (low * high)
    assert is_close(FORMULAS["two_layer_covariance"](m=row, n=col), float(expected))


def test_adjacent_cosines_of_random_and_scalar_values():
    """THEORY's b = 1/2, three layers: .215 against .372, both at positions 12 and 11."""
    scalar = depth.residual_power_matrix(12, 3, 0.5)
    random = depth.random_value_kernel_matrix(12, 3, 0.5)
    cosines = [
        kernel[11, 10] / np.sqrt(kernel[11, 11] * kernel[10, 10])
        for kernel in (random, scalar @ scalar.T)
    ]
    assert np.abs(np.array(cosines) - [0.215, 0.372]).max() < 5e-4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"n_ctx": 0}, "n_ctx to be a whole number of at least 1, got 0"),
        ({"ell": -1}, "ell to be a whole number of at least 0, got -1"),
        ({"ell": 1.5}, "ell to be a whole number"),
        ({"gain": -0.5}, "gain to be a finite non-negative"),
        ({"gain": float("nan")}, "gain to be a finite"),
    ],
)
def test_matrices_refuse_wrong_sizes(arguments, named):
    """One line that names the argument."""
    with pytest.raises(ValueError, match=named):
        depth.random_value_kernel_matrix(**{"n_ctx": 3, "ell": 2, "gain": 0.5, **arguments})


# --- collapse -----------------------------------------------------------------------------

DEEP = 80
GAINS = [None, "1/10", "1/2", "2", "10"]


def compiled(expr):
    """A closed expression at mpmath's precision; arrays of its numbers broadcast."""
    free = sorted(expr.free_symbols, key=str)
    form = sp.lambdify(free, expr, "mpmath")
    return lambda values: form(*(values[symbol.name] for symbol in free))


def precise(fraction):
    return mpmath.mpf(sp.Rational(fraction).p) / sp.Rational(fraction).q


def prefix_means(matrix):
    return matrix.cumsum(axis=0) / EVERY[:, None]


def precise_identity():
    return np.array([[mpmath.mpf(row == col) for col in range(SIZE)] for row in range(SIZE)])


def scalar_powers(gain):
    """Rows of C^ell (gain None) or (I + gain C)^ell, scaled to sum to 1, at every depth."""
    matrix = precise_identity()
    for _ in range(DEEP + 1):
        yield matrix
        step = prefix_means(matrix)
        matrix = step if gain is None else (matrix + gain * step) / (1 + gain)


def random_kernels(gain):
    kernel = precise_identity()
    for _ in range(DEEP + 1):
        yield kernel
        kernel = kernel + gain * prefix_means(prefix_means(kernel).T)


def missing_cosine(kernel):
    size = np.array([mpmath.sqrt(entry) for entry in np.diag(kernel)])
    return 1 - kernel / np.outer(size, size)


def holds_at_every_depth(name, truths, **gain):
    """What is dropped is below the remainder at 100 digits; the last remainder is small."""
    formula = FORMULAS[f"collapse{name}"]
    assert formula.status is Status.LEADING_ORDER
    positions = precise_identity().cumsum(axis=0).sum(axis=1)
    law, bound = compiled(formula.expr), compiled(formula.remainder)
    for layers, truth in enumerate(truths):
        at = {"m": positions[:, None], "n": positions, "ell": mpmath.mpf(layers), **gain}
        value, remainder = law(at), bound(at)
        assert (abs(value - truth) <= remainder + mpmath.mpf(10) ** -90).all(), layers
    return bool((remainder <= abs(value) / 100).all())


@pytest.mark.parametrize("gain", GAINS)
def test_missing_weight_and_cosine_are_within_their_remainders(gain):
    """Depths 0 to 80, all pairs up to 12; from a gain of 2 on the leading order leads there."""
    with mpmath.workdps(100):
        number = None if gain is None else precise(gain)
        name, at = ("", {}) if gain is None else ("_residual", {"beta": number})
        weights = list(scalar_powers(number))
        leads = [
            holds_at_every_depth(name, (1 - rows[:, :1] for rows in weights), **at),
            holds_at_every_depth(
                f"_cosine{name}", (missing_cosine(rows @ rows.T) for rows in weights), **at
            ),
        ]
    assert all(leads) or gain in ("1/10", "1/2")


@pytest.mark.parametrize("gain", [*GAINS[1:], "1000"])
def test_missing_cosine_of_random_values_is_within_its_remainder(gain):
    """The same for K -> K + g C K C'; at g = 1000 it is a stack without residual."""
    with mpmath.workdps(100):
        truths = map(missing_cosine, random_kernels(precise(gain)))
        leads = holds_at_every_depth("_cosine_random_values", truths, g=precise(gain))
    assert leads or gain in ("1/10", "1/2")


@pytest.mark.parametrize("gain", ["1/10", "1/2", "2"])
def test_first_token_weights_are_the_matrices_first_columns(gain):
    """Normalised to rows that sum to 1."""
    with mpmath.workdps(30):
        for number, name, at in [
            (None, "first_token_weight", {}),
            (precise(gain), "first_token_weight_residual", {"beta": float(sp.Rational(gain))}),
        ]:
            expected = [row[:, 0].astype(float) for row in scalar_powers(number)]
            found = FORMULAS[name](m=EVERY, ell=np.arange(DEEP + 1)[:, None], **at)
            assert is_close(found, np.array(expected))


@pytest.mark.parametrize("gain", [None, Fraction(1, 2), Fraction(3)])
def test_collapse_depths_by_first_step_analysis(gain):
    """T_1 = 0, T_m = 1 + (1-q) T_m + q (T_1 + ... + T_m)/m, q the chance of a move in a layer."""
    chance = Fraction(1) if gain is None else gain / (1 + gain)
    depths = [Fraction(0)]
    for position in range(2, SIZE + 1):
        # q T_m (1 - 1/m) = 1 + q (T_1 + ... + T_(m-1))/m
        rest = 1 + chance * sum(depths) / position
        depths.append(rest * position / (chance * (position - 1)))
    formula = FORMULAS["collapse_depth" if gain is None else "collapse_depth_residual"]
    at = {} if gain is None else {"beta": rational(gain)}
    found = [exact(formula.subs(m=int(position), **at)) for position in EVERY]
    assert found == [rational(value) for value in depths]


def test_collapse_depths_are_sums_of_the_missing_weight():
    """The left side as it is written, summed to depth 80 (what is left is below 1e-14)."""
    with mpmath.workdps(30):
        total = sum(1 - rows[:, 0] for rows in scalar_powers(mpmath.mpf(3)))
    found = FORMULAS["collapse_depth_residual"](m=EVERY, beta=3)
    assert np.abs(found - total.astype(float)).max() < 1e-12


def weight_of_the_first_token(position, layers):
    """(C^ell)_m1 at real ell: E (1 - e^-U)^(m-1), U of the Gamma(ell) law, by quadrature."""
    middle = mpmath.log(position) + 1

    def integrand(u):
        survival = (position - 1) * mpmath.log1p(-mpmath.exp(-u))
        return mpmath.exp(survival + (layers - 1) * mpmath.log(u) - u - mpmath.loggamma(layers))

    return mpmath.quad(
        integrand, [1e-9, middle / 3, middle, 2 * middle, 5 * middle, 15 * middle + 60]
    )


@pytest.mark.parametrize("position", [2, 3, 5, 12, 100, 10_000, 10**8])
def test_half_collapse_is_within_its_remainder(position):
    """Half of the weight arrives between the formula less and plus its remainder."""
    formula = FORMULAS["half_collapse"]
    middle, spread = formula(m=position), formula.remainder_at(m=position)
    early, late = (weight_of_the_first_token(position, middle + side) for side in (-spread, spread))
    assert early < 0.5 < late
    assert spread < 1 / np.log(position)


# --- as SymPy objects ---------------------------------------------------------------------


def test_summation_indices_do_not_catch_arguments():
    """A call may have the registered i and j as positions."""
    call = StackKernel(j, i, 2).rewrite(sp.Sum)
    assert exact(call.subs({j: 5, i: 3})) == exact(StackKernel(5, 3, 2))
    call = CesaroPower(j, i, 2).rewrite(sp.Sum)
    assert exact(call.subs({j: 5, i: 3})) == exact(CesaroPower(5, 3, 2))


@pytest.mark.parametrize("call", [CesaroPower(m, n, ell), RandomValueKernel(m, n, ell, g)])
def test_a_power_of_a_printed_sum_is_in_brackets(call):
    """The sum itself is printed, and a square does not fall on its last factor alone."""
    shown = sp.latex(call)
    assert shown == sp.latex(call.rewrite(sp.Sum))
    assert sp.latex(call**2) == rf"\left({shown}\right)^{{2}}"


def test_harmonic_numbers():
    """Exact, in SymPy's own terms, to 40 digits and in floats; brackets kept in products."""
    every = [Fraction(0)]
    for k in range(1, 40):
        every.append(every[-1] + Fraction(1, k))
    assert all(exact(Harmonic(k)) == rational(value) for k, value in enumerate(every))
    assert Harmonic(m).rewrite(sp.harmonic) == sp.harmonic(m)
    assert abs(sp.N(Harmonic(39), 40) - rational(every[39])) < sp.Float(10) ** -38
    assert is_close(Harmonic.numbers(np.arange(1.0, 40)), np.array(every[1:], dtype=float))
    assert sp.latex(2 * Harmonic(m) ** 2) == "2 H_{m}^{2}"
    assert sp.N(Harmonic(m)) == Harmonic(m)


def test_evalf_uses_the_number_form():
    """SymPy's own route to numbers."""
    call = ResidualPower(9, 2, 3, sp.Rational(1, 2))
    assert abs(sp.N(call) - exact(call)) < PROMISE


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_formulas_say_how_true_they_are(name):
    """Registered symbols, a statement, a source, a remainder exactly where something is dropped."""
    formula = FORMULAS[name]
    assert formula.symbols
    assert formula.statement.endswith(".")
    assert formula.source
    assert formula.left
    assert (formula.remainder != 0) == (formula.status is Status.LEADING_ORDER)
