"""Formulas as objects: calls, names, domains, forms, and numbers against high precision."""

import random
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import sympy as sp
from sympy.parsing.sympy_parser import parse_expr

import theory
from theory import symbols
from theory.formula import Formula, Numeric, Status, compile_number_form, hypergeometric
from theory.symbols import REGISTRY, d, m, n, sigma

NAMES = sorted(theory.formulas())
DIGITS = 40
GUARD = 80
PROMISE = 1e-9
"""Number forms are asked for nine digits: far below any band, far above float64's rounding."""

COVARIANCE = theory.formula("attention.uniform_covariance")


def test_scalars_give_a_scalar():
    """d^2 sigma^4/max(m, n) at one point."""
    value = COVARIANCE(d=8, sigma=0.5, m=2, n=3)
    assert np.ndim(value) == 0
    assert value == 64 * 0.0625 / 3


def test_arrays_broadcast():
    """A column of m against a row of n gives the whole kernel."""
    every = np.arange(1, 6)
    table = COVARIANCE(d=8, sigma=0.5, m=every[:, None], n=every)
    assert table.shape == (5, 5)
    assert all(table[r - 1, c - 1] == 4.0 / max(r, c) for r in every for c in every)


def test_a_constant_formula_is_callable():
    """LayerNorm's second moment has no symbols and is 1."""
    assert theory.formula("layernorm.second_moment")() == 1.0


def test_a_symbol_that_cancels_still_broadcasts():
    """The value has the shape of all that was passed, whether the expression varies with it."""
    constant = Formula("x", 0 * m + sp.Integer(3), "", Status.EXACT, "", remainder=1 / m)
    assert constant(m=np.arange(1, 4)).tolist() == [3.0, 3.0, 3.0]


@pytest.mark.parametrize("alias", ["d", "d_model"])
def test_aliases_name_the_same_symbol(alias):
    """d_model is d."""
    assert theory.formula("layernorm.kurtosis")(**{alias: 5}) == 3 * 4 / 6


def test_the_aliases_of_heads_and_positions():
    """n_heads is H, n_ctx is L, d_head is d_h, eps is epsilon."""
    pairs = {"n_heads": "H", "n_ctx": "L", "d_head": "d_h", "eps": "epsilon", "d_model": "d"}
    assert all(symbols.symbol(alias).name == name for alias, name in pairs.items())
    printed = theory.formula("attention.logit_second_moment_printed")
    assert printed(d_model=4, n_heads=2, sigma=1) == printed(d=4, H=2, sigma=1) == 8


GOOD = {"d": 8, "sigma": 0.5, "m": 2, "n": 3}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sigmma": 1}, "sigmma"),
        ({"H": 2}, "'H'"),
        ({"d_model": 8}, "d_model"),
        ({"m": 0}, "m positive integer"),
        ({"m": 1.5}, "m positive integer"),
        ({"n": -3}, "n positive integer"),
        ({"sigma": -0.1}, "sigma non-negative"),
        ({"sigma": float("nan")}, "sigma non-negative"),
        ({"sigma": float("inf")}, "sigma non-negative"),
        ({"sigma": "large"}, "numbers for sigma.*large"),
        ({"m": np.arange(0, 100)}, "m positive integer, got an array of 100"),
    ],
)
def test_wrong_symbols_are_named(changes, named):
    """Unknown, foreign, doubled and out-of-domain symbols raise ValueError with their name."""
    with pytest.raises(ValueError, match=named):
        COVARIANCE(**{**GOOD, **changes})


def test_a_missing_symbol_is_named():
    """What was left out is in the message, what was given is not called missing."""
    with pytest.raises(ValueError, match="got none for n, sigma"):
        COVARIANCE(d=8, m=2)


@pytest.mark.parametrize("correlation", [-1.0001, 1.0001, np.nan])
def test_correlations_lie_in_their_interval(correlation):
    """rho beyond 1 is refused."""
    with pytest.raises(ValueError, match=r"rho in \[-1, 1\]"):
        theory.formula("cosine.gaussian_pair")(d=3, rho=correlation)


def test_subs_goes_by_name():
    """Numbers and expressions replace the registered symbol."""
    assert COVARIANCE.subs(d_model=4, sigma=sp.Rational(1, 2)) == 1 / sp.Max(m, n)
    assert COVARIANCE.subs(n=m) == d**2 * sigma**4 / m
    with pytest.raises(ValueError, match="'H'"):
        COVARIANCE.subs(H=3)


@pytest.mark.parametrize("name", NAMES)
def test_every_symbol_is_registered_and_documented(name):
    """Meaning, unit and domain of each symbol, the object being the registry's own."""
    formula = theory.formula(name)
    free = formula.expr.free_symbols | formula.remainder.free_symbols
    assert {entry.symbol for entry in formula.symbols.values()} == free
    for key, entry in formula.symbols.items():
        assert REGISTRY[key] is entry
        assert entry.meaning
        assert entry.unit
        assert entry.domain.text


@pytest.mark.parametrize("name", NAMES)
def test_every_formula_says_how_true_it_is(name):
    """A status, a statement, a source; a remainder where and only where something is dropped."""
    formula = theory.formula(name)
    assert isinstance(formula.status, Status)
    assert formula.name == name
    assert formula.statement.endswith(".")
    assert formula.source
    if formula.status is Status.EXACT:
        assert formula.remainder == 0


@pytest.mark.parametrize("name", NAMES)
def test_latex_and_mathml(name):
    """A notebook gets display mathematics, a page presentation MathML."""
    formula = theory.formula(name)
    names = {entry.symbol: entry.latex for entry in REGISTRY.values() if entry.latex}
    left, _, right = formula.latex().partition(" = ")
    assert left == formula.left
    assert right == sp.latex(formula.expr, symbol_names=names)
    assert formula._repr_latex_() == f"$\\displaystyle {formula.latex()}$"
    assert formula.mathml().startswith("<m")


@pytest.mark.parametrize("name", NAMES)
def test_python_source_round_trips(name):
    """Parsing the source with the registry's symbols gives the same expression."""
    formula = theory.formula(name)
    known = {key: entry.symbol for key, entry in REGISTRY.items()}
    known |= {type(call).__name__: type(call) for call in formula.expr.atoms(Numeric)}
    parsed = parse_expr(formula.python(), local_dict=known)
    assert parsed.free_symbols == formula.expr.free_symbols
    assert parsed == formula.expr or sp.simplify(parsed - formula.expr) == 0


MODERATE = {"ell": (0, 12), "d_h": (8, 128), "H": (1, 16)}
"""Whole numbers that are small in any network: layers, a head's width, heads."""


def random_point(formula, rng, large):
    """Numbers in the symbols' domains, ordered where they must be: j < k < i, |c| <= sqrt(ab)."""
    point = {}
    for name, entry in formula.symbols.items():
        if name in MODERATE:
            point[name] = rng.randint(*MODERATE[name])
        elif entry.domain.integer:
            point[name] = rng.choice([100_000, 99_999]) if large else rng.randint(2, 900)
        elif name in ("rho", "c"):
            point[name] = rng.uniform(-0.99, 0.99)
        elif name == "d_eff":
            point[name] = 1e5 if large else rng.uniform(2, 900)
        elif name == "p_2":
            point[name] = rng.uniform(0.01, 0.99)
        else:
            point[name] = rng.uniform(0.01, 1.5)
    if "c" in point and "a" in point:
        point["c"] *= (point["a"] * point["b"]) ** 0.5
    if "p_3" in point:
        third = rng.uniform(1.5, 2)  # Jensen and Hoelder: p_2^2 to p_2^(3/2)
        point["p_3"] = point["p_2"] ** third
        if "p_4" in point:  # p_3^2/p_2 to p_3^(4/3)
            point["p_4"] = point["p_2"] ** rng.uniform(4 * third / 3, 2 * third - 1)
    if "k" in point:
        ordered = rng.sample(range(1, 900), 3)
        point.update(zip("jki", sorted(ordered), strict=True))
    return point


def high_precision(expr, point):
    """The expression at the floats as they are, in many more digits than they have.

    (As fractions they would be raised to the powers of a width, exactly.)
    """
    known = {
        symbols.symbol(name): sp.Integer(value) if value == int(value) else sp.Float(value, GUARD)
        for name, value in point.items()
    }
    return float(sp.N(expr.subs(known), DIGITS))


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("name", NAMES)
def test_numbers_equal_high_precision_evaluation(name, large):
    """The compiled number form against SymPy at 40 digits, widths up to 100000 included."""
    formula, rng = theory.formula(name), random.Random(f"{name} {large}")
    for _ in range(3):
        point = random_point(formula, rng, large)
        expected = high_precision(formula.expr, point)
        assert abs(formula(**point) - expected) <= PROMISE * abs(expected)


@pytest.mark.parametrize("name", [k for k in NAMES if theory.formula(k).remainder != 0])
def test_remainders_equal_high_precision_evaluation(name):
    """The remainder is an expression like any other; relative to the formula's own size."""
    formula, rng = theory.formula(name), random.Random(name)
    for _ in range(3):
        point = random_point(formula, rng, large=False)
        expected = high_precision(formula.remainder, point)
        size = abs(high_precision(formula.expr, point)) + expected
        found = formula.remainder_at(**point)
        assert found >= 0
        assert abs(found - expected) <= PROMISE * size


def gauss_series(width, z):
    """2F1(1/2, 1/2; c; z) by its own terms, exact rationals: they fall faster than k!/c^k."""
    term = total = Fraction(1)
    for k in range(40):
        term *= Fraction(2 * k + 1, 2) ** 2 / ((Fraction(width) + k) * (k + 1)) * Fraction(z)
        total += term
    return float(total)


@pytest.mark.parametrize("width", [400.5, 1e4, 1e6])
@pytest.mark.parametrize("z", [0.0, 0.5, 0.95, 0.999999, 1.0])
def test_hypergeometric_where_scipy_overflows(width, z):
    """2F1(1/2, 1/2; c; z) at large c against its power series in exact rationals."""
    assert abs(hypergeometric(0.5, 0.5, width, z) - gauss_series(width, z)) <= PROMISE


def test_number_forms_keep_an_acos_at_one_real():
    """A correlation of 1 + 1 ulp gives 0, not NaN."""
    (form, symbol) = compile_number_form(sp.acos(symbols.rho), (symbols.rho,)), 1 + 2.0**-52
    assert form(symbol) == 0.0


def test_an_unknown_formula_is_answered_with_its_neighbours():
    """A typo in the name is answered by the right one."""
    with pytest.raises(LookupError, match=r"cosine\.gaussian_pair\b"):
        theory.formula("cosine.gausian_pair")


def test_a_hopeless_name_is_answered_with_all():
    """Nothing near: the list."""
    with pytest.raises(LookupError, match=r"layernorm\.kurtosis"):
        theory.formula("zzzzzzzz")


def test_unregistered_symbols_are_refused():
    """A formula in a user's own Symbol fails with the remedy when its symbols are asked for."""
    stray = Formula("stray", sp.Symbol("d") * 2, "", Status.EXACT, "")
    with pytest.raises(LookupError, match=r"theory\.symbols\.symbol"):
        _ = stray.symbols


def test_theory_imports_neither_torch_nor_matplotlib():
    """A fresh interpreter that imports theory, lists formulas and claims has loaded neither."""
    script = (
        "import sys, theory; theory.formulas(); theory.claims();"
        "print(sorted({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
