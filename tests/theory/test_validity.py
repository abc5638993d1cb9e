"""Domain of validity: verdicts of the claims, boundaries, simulation, words and refusals."""

import numpy as np
import pytest
from typer.testing import CliRunner

import montecarlo
import nope
import theory
from nope.tokens import GaussianTokens
from reports.cli import app
from theory.boundaries import STREAM, entries, growth, growth_with_floor
from theory.claims import select
from theory.formulas.softmax import Participation, SharedTilt
from theory.references import DEFAULTS, Asked, Better
from theory.validity import decided, validity
from theory.validity import verdict as verdict_of

TOLERANCE = 0.025

# ------------------------------------------------------------------------- three values


def test_decided_is_three_valued():
    """Inside, outside on either side, across either edge, wider than the band, not a number."""
    values = np.array([0.0, 2.0, -2.0, 0.9, -0.9, 0.0, np.nan])
    slack = np.array([0.5, 0.5, 0.5, 0.2, 0.2, 3.0, 0.1])
    found = decided(values, slack, -1.0, 1.0)
    assert np.array_equal(found, [1, 0, 0, *[np.nan] * 4], equal_nan=True)


@pytest.mark.parametrize(
    ("decisions", "expected"),
    [([1, 1], "CONFIRMED"), ([1, np.nan], None), ([np.nan, 0, 1], "REFUTED"), ([], "CONFIRMED")],
)
def test_one_refutation_is_enough_and_confirmation_needs_all(decisions, expected):
    """As for a claim."""
    assert verdict_of(np.array(decisions, dtype=float)) == expected


# --------------------------------------------------------------------- one truth: claims

MEDIUM = {"d_model": 256, "n_heads": 4, "n_ctx": 64, "token_std": 0.02}
SIZES = {
    "large logits": {"d_model": 64, "n_heads": 4, "n_ctx": 32, "std": 1 / 16, "token_std": 0.02},
    "on the edge": {**MEDIUM, "std": 0.0237},
    "moderate": {**MEDIUM, "std": 0.02},
    "small logits": {**MEDIUM, "std": 0.002},
}
CLAIMS = {
    "chi2023.lemma2.printed": ("attention.logit_second_moment_printed", ()),
    "chi2023.property1": ("attention.uniform_participation", ("m",)),
    "chi2023.lemma3.softmax": ("attention.uniform_second_moment", ("m",)),
    "chi2023.residual.softmax": ("residual.second_moment", ("m",)),
    "zuo2025.cosine.softmax": ("cosine.uniform", ("m", "n")),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_claims_expected_verdict_is_the_validity_of_its_formula(case):
    """At each size the same verdict by both routes, all positions and pairs included."""
    sizes = SIZES[case]
    every = np.arange(1, sizes["n_ctx"] + 1)
    given = {
        "d": sizes["d_model"],
        "H": sizes["n_heads"],
        "sigma": sizes["std"],
        "sigma_x": sizes["token_std"],
    }
    verdicts = {}
    for identifier, (name, axes) in CLAIMS.items():
        (claim,) = select(theory.claims(**sizes), [identifier])
        (question,) = claim.questions
        found = validity(name, {**given, **dict.fromkeys(axes, every)}, TOLERANCE)
        assert found.against == Asked(question.place, question.observable)
        assert found.verdict == claim.expected_verdict(question, TOLERANCE), identifier
        verdicts[name] = found.verdict
    del verdicts["attention.logit_second_moment_printed"]
    expected = {"large logits": {"REFUTED"}, "on the edge": {"CONFIRMED", "REFUTED", None}}
    assert set(verdicts.values()) == expected.get(case, {"CONFIRMED"})


# ----------------------------------------------------------------------- every formula

FREE = {"i": 9, "j": 3, "k": 7, "m": [1, 2, 5], "ell": [1, 4], "d": 48}


def somewhere(law):
    """A value for each symbol that has no default, and small sizes."""
    whole = {name: entry.domain.integer for name, entry in law.symbols.items()}
    lacking = {name: 1 if whole[name] else 0.5 for name in law.symbols if name not in DEFAULTS}
    return {**lacking, **{name: FREE[name] for name in FREE if name in law.symbols}}


@pytest.mark.parametrize("name", theory.formulas())
def test_every_formula_works_or_says_in_one_line_why_not(name):
    """What is exact and held against itself agrees; what states nothing to go by is refused."""
    law = theory.formula(name)
    silent = law.status is not theory.Status.EXACT and law.remainder == 0
    if silent and not any(entry.name == name for entry in entries()):
        with pytest.raises(ValueError, match="expected a formula that is exact") as refusal:
            validity(name, somewhere(law))
        assert "\n" not in str(refusal.value)
        return
    found = validity(name, somewhere(law))
    assert found.values.shape == tuple(map(len, found.axes.values()))
    assert np.isfinite(found.error).all()
    if found.basis == "exact":
        assert found.agrees.all()
        assert not found.error.any()
    assert len(found.ranges()) == len(found.where().splitlines())
    assert len(found.table()) == found.values.size
    assert repr(found).startswith(name)


@pytest.mark.parametrize(
    "name",
    [law.name for law in theory.formulas().values() if law.status is theory.Status.PRINTED],
)
def test_what_is_printed_is_never_held_against_itself(name):
    """Every printed formula has an entry."""
    assert any(entry.name == name and entry.against for entry in entries())


def test_a_formula_without_a_better_one_goes_by_its_remainder():
    """remainder <= tolerance times the value, and nothing is refuted."""
    law = theory.formula("depth.half_collapse")
    m = np.array([2, 10, 100, 1000])
    found = validity(law, {"m": m}, 0.03)
    assert np.array_equal(found.agrees, law.remainder_at(m=m) <= 0.03 * law(m=m))
    assert {True, False} == set(found.agrees)
    assert np.array_equal(found.known, found.agrees)


def test_against_a_formula_of_ones_own():
    """1/m against 1/(m + 1): off by 1/(m + 1) of itself."""
    m = theory.formula("attention.uniform_participation").symbols["m"].symbol
    shifted = theory.Formula("shifted", 1 / (m + 1), "Shifted.", theory.Status.EXACT, "test")
    found = validity("attention.uniform_participation", {"m": [1, 3, 9]}, 0.2, Better(shifted))
    assert np.allclose(found.error, [1 / 2, 1 / 4, 1 / 10], rtol=1e-14)
    assert found.agrees.tolist() == [False, False, True]
    assert found.boundary is None


def test_collapse_is_held_against_exact_powers_of_the_cesaro_matrix():
    """1 - (C^ell)_m1 and 1 - cos of rows, by matrix powers; with a residual too."""
    m, size, depth, beta = np.array([2, 5, 9]), 9, 6, 0.7
    mean = np.tril(np.ones((size, size))) / np.arange(1, size + 1)[:, None]
    cases = {"": mean, "_residual": np.eye(size) + beta * mean}
    for suffix, matrix in cases.items():
        power = np.linalg.matrix_power(matrix, depth)
        weight = 1 - power[m - 1, 0] / power[0].sum() if not suffix else None
        unit = power / np.linalg.norm(power, axis=1, keepdims=True)
        over = {"m": m, "ell": depth} | ({"beta": beta} if suffix else {})
        cosine = validity(f"depth.collapse_cosine{suffix}", over | {"n": 3})
        exact = 1 - (unit @ unit[2])[m - 1]
        assert np.allclose(cosine.error.ravel(), np.abs(cosine.values.ravel() - exact), atol=1e-12)
        if weight is not None:
            found = validity("depth.collapse", over)
            assert np.allclose(found.error.ravel(), np.abs(found.values.ravel() - weight))


# ---------------------------------------------------------------------------- boundaries


def test_rates_are_the_first_order_of_participation_and_tilt():
    """m A - 1 and m (A + B_off/(d - 1)) - 1 over s^2, at s = 0.001."""
    m, s, d = np.array([1.0, 2.0, 3.0, 10.0, 300.0]), 1e-3, 65
    symbols = theory.symbols
    plain = Participation.numbers(m, s)
    shared = SharedTilt.numbers(m, s) / (d - 1)
    for rate, numbers in [(growth, m * plain), (growth_with_floor, m * (plain + shared))]:
        expr = rate(symbols.m).subs(symbols.d, d)
        expected = [float(expr.subs(symbols.m, int(position))) for position in m]
        assert np.allclose((numbers - 1) / s**2, expected, rtol=1e-4, atol=1e-6)


SPREADS = np.geomspace(0.03, 1.5, 12)
LENGTHS = [2, 3, 10, 40, 160]
GRIDS = {
    "attention.logit_second_moment_printed": {"d": 12, "H": [1, 2, 4], "L": 4},
    "attention.uniform_participation": {"s": SPREADS, "d": 64, "m": LENGTHS},
    "attention.uniform_second_moment": {"s": SPREADS, "d": 64, "m": LENGTHS},
    "attention.uniform_covariance": {"s": SPREADS, "d": 64, "m": LENGTHS, "n": [1, 3, 40]},
    "residual.second_moment": {"s": SPREADS, "d": 64, "m": LENGTHS, "sigma_x": 0.1},
    "residual.kernel": {"s": SPREADS, "d": 64, "m": LENGTHS, "n": [1, 3, 40], "sigma_x": 0.1},
    "residual.coordinate_variance_printed": {"M_jj": [-0.001, 0.05], "sigma_x": [0.01, 0.1]},
    "attention.floor": {"s": SPREADS, "d": [256, 4096], "m": [2**k for k in range(4, 24)]},
    "attention.breakdown_length_leading": {"s": SPREADS, "d": [2**k for k in range(3, 15)]},
    "cosine.uniform": {"s": SPREADS, "d": 512, "m": LENGTHS, "n": [1, 3, 40]},
    "stream": {"sigma": 0.005, "sigma_x": np.geomspace(1e-4, 0.1, 10), "m": LENGTHS, "n": [1, 9]},
    "residual.cosine": {"s": SPREADS, "d": 512, "m": LENGTHS, "n": [1, 3, 40], "sigma_x": 0.1},
    "cosine.gaussian_pair_expansion": {
        "d": [2**k for k in range(1, 10)],
        "rho": np.linspace(-0.95, 0.95, 14),
    },
    "depth.collapse": {"ell": range(1, 30), "m": LENGTHS},
    "depth.collapse_residual": {"ell": range(1, 60), "m": LENGTHS, "beta": [0.3, 2]},
    "depth.collapse_cosine": {"ell": range(1, 30), "m": [2, 40], "n": [1, 9]},
    "depth.collapse_cosine_residual": {"ell": range(1, 60), "m": [2, 40], "n": [1, 9], "beta": 1},
    "depth.collapse_cosine_random_values": {"ell": range(1, 60), "m": [2, 40], "n": [9], "g": 1},
}
BOUNDED = {
    "stream" if entry.name == "cosine.uniform" and entry.against == STREAM else entry.name: entry
    for entry in entries()
    if entry.boundary is not None
}


@pytest.mark.parametrize("name", BOUNDED)
def test_agreement_ends_at_the_boundary(name):
    """Every decided point is on the side that the boundary says, to within its own remainder.

    At a depth where the boundary says so the collapse agrees; it may agree earlier.
    """
    entry = BOUNDED[name]
    tolerance = 0.0005 if "expansion" in name else TOLERANCE
    found = validity(entry.name, GRIDS[name], tolerance, entry.against)
    boundary = found.boundary
    assert boundary is not None
    with np.errstate(all="ignore"):
        numbers = {key: found.given[key] for key in boundary.symbols}
        end, slack = boundary(**numbers), boundary.remainder_at(**numbers)
        here = boundary.bounded(**{key: found.given[key] for key in boundary.bounded.symbols})
        far = np.broadcast_to(~(np.abs(here - end) <= slack), found.values.shape)
    wrong = (found.inside != found.agrees) & found.known & far
    if name.startswith("depth"):
        wrong &= found.inside
    assert not wrong.any()
    decided_far = found.known & far
    assert {True, False} <= set(found.agrees[decided_far]), "the grid sees one side only"


FLIPS = {
    "participation": ("attention.uniform_participation", None, "s", {"m": 48, "d": 256}),
    "the floor ends 1/m": ("attention.uniform_second_moment", None, "m", {"s": 0.1, "d": 128}),
    "a wide stream hides it": (
        "residual.second_moment",
        None,
        "m",
        {"s": 0.25, "d": 256, "sigma_x": 0.25 / 20**0.5},
    ),
    "kappa": ("cosine.uniform", STREAM, "m", {"s": 0.01, "d": 4096, "sigma_x": 0.01 / 1000**0.5}),
}
FINE = {"s": np.linspace(0.1, 0.2, 26), "m": np.arange(2, 300)}


@pytest.mark.parametrize("case", FLIPS)
def test_agreement_flips_where_the_formula_of_the_boundary_does(case):
    """Along a fine axis both flip once, at values of the axis within a few percent."""
    name, against, axis, given = FLIPS[case]
    found = validity(name, {**given, axis: FINE[axis]}, TOLERANCE, against)
    agrees, inside = found.agrees.ravel(), found.inside.ravel()
    flips = [np.flatnonzero(np.diff(side.astype(int))) for side in (agrees, inside)]
    assert [len(flip) for flip in flips] == [1, 1]
    true, said = (FINE[axis][flip[0]] for flip in flips)
    assert abs(said / true - 1) < 0.05


def test_the_one_over_m_law_ends_at_the_tolerance_times_the_breakdown_length():
    """At small s, where participation alone is within the tolerance: m = tolerance m_*."""
    s, d = 0.02, 128
    length = theory.formula("attention.breakdown_length")(s=s, d=d)
    m = np.unique(np.geomspace(100, 40_000, 60).round())
    better = Better(theory.formula("attention.output_second_moment_finite_head"))
    law = theory.formula("attention.uniform_second_moment")
    found = validity(law, {"s": s, "d": d, "m": m}, TOLERANCE, better)
    last = m[found.agrees.ravel()].max()
    assert abs(last / (TOLERANCE * length) - 1) < 0.12


def test_condensation_is_half_the_logarithm_of_the_length():
    """On its boundary s^2 = (1/2) ln(tolerance m_*/2), at large s."""
    boundary = BOUNDED["attention.breakdown_length_leading"].boundary
    s = 2.6
    d = np.round(boundary(s=s, tolerance=TOLERANCE))
    length = theory.formula("attention.breakdown_length_leading")(s=s, d=d)
    assert abs(0.5 * np.log(TOLERANCE * length / 2) / s**2 - 1) < 0.01


def measured(found, point):
    """The mean at the last of positions and its standard error, from real layers."""
    asked, m = found.against, int(point["m"])
    architecture = nope.decoder(
        int(point["d"]), 4, n_ctx=m, tokens=GaussianTokens(point.get("sigma_x", 0.02)), d_ff=4
    )
    init = nope.init.normal(float(np.sqrt(point["s"] / point["d"])))
    question = nope.Question(architecture, init, asked.place, asked.observable)
    answer = montecarlo.measure(question, draws=point["draws"], seed=7)
    at = (m - 1, m - 2) if answer.mean.ndim == 2 else m - 1
    return answer.mean[at], answer.standard_error[at]


SIMULATED = {
    "participation": ("attention.uniform_participation", None, {"d": 64, "m": 8, "draws": 1000}),
    "floor": ("attention.uniform_second_moment", None, {"d": 32, "m": 48, "draws": 8000}),
    "kappa": ("cosine.uniform", STREAM, {"d": 128, "m": 16, "s": 0.02, "draws": 1000}),
}


@pytest.mark.parametrize("case", SIMULATED)
@pytest.mark.parametrize("side", [True, False], ids=["inside", "outside"])
def test_real_layers_agree_inside_and_not_outside(case, side):
    """Well on either side of the boundary, tolerance 10%: the simulation is six sigma clear."""
    name, against, point = SIMULATED[case]
    tolerance = 0.1
    boundary = validity(name, {"m": point["m"]}, tolerance, against).boundary
    numbers = {"n": point["m"] - 1, **point, "tolerance": tolerance}
    end = boundary(**{key: numbers[key] for key in boundary.symbols})
    factor = 0.6 if side else 1.5
    point = (
        {**point, "s": float(np.sqrt(end * factor))}
        if against is None
        else {**point, "sigma_x": point["s"] / float(np.sqrt(end / factor))}
    )
    over = {key: value for key, value in point.items() if key != "draws"}
    found = validity(name, {**over, "H": 4}, tolerance, against)
    assert found.agrees.all() == side
    assert found.known.all()
    mean, error = measured(found, point)
    value = found.values.item()
    scale = 1 if found.against.scale == "absolute" else value
    gap = abs(mean - value) / scale
    assert (gap + 6 * error / scale < tolerance) if side else (gap - 6 * error / scale > tolerance)


# ------------------------------------------------------------------------ grid and words


def test_the_grid_is_the_product_of_the_axes_in_their_order():
    """Values by plain calls, alias included; m comes last where it was not given."""
    found = validity("attention.floor", {"s": [0.5, 1], "m": [8, 4, 2], "d_model": [64, 32]})
    assert list(found.axes) == ["s", "m", "d"]
    assert found.values.shape == (2, 3, 2)
    law = theory.formula("attention.floor")
    assert found.values[1, 2, 0] == law(s=1, m=2, d=64, g=1)
    assert list(validity("attention.uniform_participation", {"sigma": 0.01}).axes) == ["sigma", "m"]


def test_logits_may_be_given_instead_of_weights():
    """s = d sigma^2 either way."""
    by_weights = validity("residual.second_moment", {"sigma": 0.05, "d": 64, "m": [3, 9]})
    by_logits = validity("residual.second_moment", {"s": 64 * 0.05**2, "d": 64, "m": [3, 9]})
    assert np.allclose(by_weights.error, by_logits.error, rtol=1e-9)


def test_a_deeper_place_is_asked_of_a_deeper_stack():
    """blocks.1 at tiny logits: nearly uniform attention, but over a stream that is alike."""
    over = {"sigma": 0.004, "sigma_x": 0.001, "d": 256, "m": [2, 8]}
    first, second = (
        validity("cosine.uniform", over, against=Asked(f"blocks.{k}.attn_out", "cosine"))
        for k in (0, 1)
    )
    assert first.agrees.all()
    assert (second.decisions == 0).all()


def test_ranges_in_words():
    """Runs at the start, in the middle and at the end; single points; all and none."""
    m = theory.formula("attention.uniform_participation").symbols["m"].symbol
    wave = theory.Formula("wave", (m - 5) ** 2 + 1, "A wave.", theory.Status.EXACT, "test")
    flat = theory.Formula("flat", 0 * m + 1, "Flat.", theory.Status.EXACT, "test")

    def words(tolerance, points=range(1, 10)):
        return validity(wave, {"m": points}, tolerance, Better(flat, "absolute")).where()

    assert words(0.5) == "m = 5"
    assert words(4.5) == "m from 3 to 7"
    assert words(4.5, [9, 7, 6, 1]) == "m from 6 to 7"
    assert words(100) == "every m from 1 to 9"
    assert words(0.5, [1, 2]) == "no m"
    assert words(100, [3]) == "m = 3"
    assert words(4.5, [6, 7, 8]) == "m up to 7"
    assert words(4.5, [1, 2, 4, 5]) == "m from 4"


def test_ranges_along_another_axis_and_undecided_points():
    """One line per point of the other axes; what the remainder leaves open is said."""
    over = {"sigma": [0.005, 0.06], "d": 64, "m": [8, 64]}
    found = validity("attention.uniform_second_moment", over)
    expected = [f"sigma = 0.005 at d = 64, m = {m}" for m in (8, 64)]
    assert found.where("sigma").splitlines() == expected
    s = theory.formula("attention.floor").symbols["s"].symbol
    vague = theory.Formula(
        "vague", 0 * s + 1, "V.", theory.Status.LEADING_ORDER, "test", remainder=s
    )
    lines = validity(vague, {"s": [0.01, 0.02, 0.5]}).ranges()
    assert [str(line) for line in lines] == ["s up to 0.02 (undecided: s = 0.5)"]


def test_the_table_has_a_row_per_point():
    """Axes, value, error, remainder, and agreement that may be None."""
    found = validity("cosine.uniform", {"sigma": [0.005, 0.05], "d": 64, "m": [2, 30]})
    table = found.table()
    assert list(table) == ["sigma", "d", "m", "value", "error", "remainder", "agrees"]
    assert table["m"].tolist() == [2, 30, 2, 30]
    assert np.array_equal(table["error"], found.error.ravel())
    assert [row is True for row in table["agrees"]] == found.agrees.ravel().tolist()


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"q": 1}, "symbols that attention.uniform_participation is a matter of"),
        ({"rho": 0.5}, "symbols that attention.uniform_participation is a matter of"),
        ({"g": 0.5}, "symbols that attention.uniform_participation is a matter of"),
        ({"m": []}, "one or more values for m"),
        ({"m": [[1, 2]]}, "one or more values for m"),
        ({"m": [0, 1]}, "m, positive integer"),
        ({"m": "many"}, "one or more values for m"),
        ({"sigma": float("nan")}, "one or more values for sigma"),
        ({"d": 64, "d_model": 64}, "d once"),
        ({"s": 0.1, "sigma": 0.1}, "s or sigma, got 'both'"),
        ({"d": 10, "H": 4}, "n_heads"),
    ],
)
def test_what_cannot_be_asked_is_refused(over, message):
    """One line: expected, got, remedy."""
    with pytest.raises(ValueError, match=message) as refusal:
        validity("attention.uniform_participation", {"m": 2, **over})
    assert str(refusal.value).startswith("expected ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tolerance", [0, -1, float("nan"), float("inf"), None])
def test_a_tolerance_is_positive_and_finite(tolerance):
    """Zero included: two floats are never equal for a reason."""
    with pytest.raises(ValueError, match="tolerance to be a finite positive number"):
        validity("attention.floor", {"m": 4}, tolerance)


def test_other_refusals():
    """An unknown formula, axis or observable; a symbol without a default."""
    with pytest.raises(LookupError, match=r"attention\.floor"):
        validity("attention.flor")
    with pytest.raises(ValueError, match="an axis of m"):
        validity("attention.uniform_participation", {"m": 4}).where("n")
    with pytest.raises(ValueError, match=r"expected one of .*cdf"):
        Asked("blocks.0.attn_out", "cdf")
    with pytest.raises(ValueError, match="values for rho"):
        validity("cosine.gaussian_pair_expansion")


def test_the_command_shows_the_ranges_and_the_boundary():
    """A row per point of the other symbols; what was compared; where it ends."""
    words = ["formula", "validity", "attention.floor", "--over", "s=1,d=64,m=1000:100000:99000"]
    done = CliRunner().invoke(app, [*words, "--tolerance", "0.1"], env={"COLUMNS": "150"})
    assert done.exit_code == 0, done.output
    assert "m = 100000" in done.stdout
    assert "against attention.output_second_moment_finite_head" in done.stdout
    assert "It ends at m = BreakdownLength(s, d)/tolerance" in done.stdout
