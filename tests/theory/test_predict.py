"""From a question to numbers: closed form and recursion, hand-derived cases, statuses."""

import time
import tracemalloc
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
from scipy.special import ndtr

import nope
import theory
from nope.init import Normal, Zero, normal
from nope.questions import Question, Weights, position_grid
from theory.bindings import bindings
from theory.derivation import derive
from theory.predict import _Predictor
from theory.predict import predict as ask
from theory.propagation import KernelValues

EXACT, LEADING = theory.Status.EXACT, theory.Status.LEADING_ORDER
D, STD, TOKEN = 16, 0.1, 0.5
GAIN = D**2 * STD**4


def layer(n_ctx=5, n_heads=4, d_model=D, **options):
    """A decoder whose tokens have standard deviation TOKEN."""
    tokens = nope.GaussianTokens(TOKEN)
    return nope.decoder(d_model, n_heads, n_ctx=n_ctx, tokens=tokens, **options)


def predicted(architecture, place, observable, std=STD, fidelity="best"):
    return ask(Question(architecture, normal(std), place, observable), fidelity)


M = np.arange(1, 6)
FIRST_LAYER = {
    "embed": TOKEN**2 + 0 * M,
    "blocks.0.ln1": 1.0 + 0 * M,
    "blocks.0.attn.q": D * STD**2 + 0 * M,
    "blocks.0.attn.k": D * STD**2 + 0 * M,
    "blocks.0.attn.v": D * STD**2 + 0 * M,
    "blocks.0.attn.scores": GAIN + 0 * M,
}
UNIFORM = {
    "blocks.0.attn.pattern": 1 / M**2,
    "blocks.0.attn.z": D * STD**2 / M,
    "blocks.0.attn_out": GAIN / M,
    "blocks.0.resid_mid": TOKEN**2 + GAIN / M,
    "blocks.0.ln2": 1.0 + 0 * M,
}


def close(found, expected):
    """Equal but for the rounding of a dozen float64 operations."""
    return np.abs(found - expected).max() <= 16 * 2**-52 * np.abs(expected).max()


@pytest.mark.parametrize("place", FIRST_LAYER)
def test_second_moments_before_attention(place):
    """Tokens, norm, queries, keys, values and scores: exact under softmax too."""
    found = predicted(layer(), place, "second_moment")
    assert found.status is EXACT
    assert not found.remainder.any()
    assert close(found.values, FIRST_LAYER[place])


@pytest.mark.parametrize("place", UNIFORM)
def test_second_moments_after_uniform_attention(place):
    """Exact for every finite width."""
    found = predicted(layer(attention="uniform"), place, "second_moment")
    assert found.status is EXACT
    assert close(found.values, UNIFORM[place])


@pytest.mark.parametrize("place", ["blocks.0.attn.z", "blocks.0.attn_out", "blocks.0.resid_mid"])
def test_a_softmax_taken_as_uniform_is_leading_order(place):
    """The uniform values, with a positive remainder from m = 2 on and the assumption stated."""
    found = predicted(layer(), place, "second_moment", fidelity="uniform")
    assert found.status is LEADING
    assert close(found.values, UNIFORM[place])
    assert (found.remainder[1:] > 0).all()
    assert any("a_mn = 1/m" in line or "s^2" in line for line in found.treatment)


@pytest.mark.parametrize("place", ["blocks.0.attn.z", "blocks.0.attn_out", "blocks.0.resid_mid"])
def test_fidelities_are_nested(place):
    """The cruder ones within their remainders of the finest, which is the best; each named."""
    names = ("uniform", "first_order", "any_temperature")
    crude, first, any_s = (
        predicted(layer(), place, "second_moment", fidelity=name) for name in names
    )
    best = predicted(layer(), place, "second_moment")
    assert [found.fidelity for found in (crude, first, any_s)] == list(names)
    assert best.fidelity == "any_temperature"
    assert np.array_equal(best.values, any_s.values)
    for rough in (crude, first):
        allowed = rough.remainder + any_s.remainder + 1e-15  # nothing is dropped at m = 1
        assert (np.abs(rough.values - any_s.values) <= allowed).all()
    assert any_s.remainder.max() < crude.remainder.max()
    assert (any_s.values[1:] > crude.values[1:]).all()
    assert any_s.values[0] == pytest.approx(crude.values[0], rel=1e-12)
    assert crude.remainder[0] == 0
    for found in (crude, first, any_s):
        assert found.treatment
        assert found.derivation.check() == []


@pytest.mark.parametrize("attention", ["uniform", "softmax"])
def test_a_norms_second_moment_is_exact_whatever_is_in_front(attention):
    """LayerNorm with eps 0 gives |x|^2 = d by definition: nothing upstream can be dropped there."""
    architecture = layer(attention=attention)
    for place in ("blocks.0.ln2", "blocks.0.mlp.pre"):
        assert predicted(architecture, place, "second_moment").status is EXACT, place


def test_exactness_ends_where_cosines_enter_a_sum():
    """The second attention averages LN(y), whose kernel off the diagonal is a mean cosine."""
    architecture = layer(attention="uniform", n_layers=2, d_ff=0)
    for place in ("blocks.1.attn.z", "blocks.1.attn_out", "blocks.1.resid_post"):
        found = predicted(architecture, place, "second_moment")
        assert found.status is LEADING, place
        assert (found.remainder[1:] > 0).all()


def test_mean_second_moment_weighs_pairs_and_positions():
    """Over positions a plain mean; over pairs n <= m a query m counts m times."""
    output = predicted(layer(attention="uniform"), "blocks.0.attn_out", "mean_second_moment")
    assert output.status is EXACT
    assert close(output.values, np.array([GAIN * sum(1 / M) / 5]))
    pattern = predicted(layer(attention="uniform"), "blocks.0.attn.pattern", "mean_second_moment")
    assert close(pattern.values, np.array([sum(m * m**-2.0 for m in M) / 15]))


def test_participation_under_uniform_attention():
    """m entries of 1/m^2 are 1/m, exactly; of a softmax taken as uniform to leading order."""
    found = predicted(layer(attention="uniform"), "blocks.0.attn.pattern", "participation")
    assert found.status is EXACT
    assert close(found.values, 1 / M)
    soft = predicted(layer(), "blocks.0.attn.pattern", "participation", fidelity="uniform")
    assert soft.status is LEADING
    assert close(soft.values, 1 / M)
    assert soft.remainder[0] == 0


KURTOSIS = {
    "embed": 3.0,
    "blocks.0.ln1": 3 * (D - 1) / (D + 1),
    "blocks.0.attn.q": 3.0,
    "blocks.0.attn.scores": 3 + 6 / (D // 4),
    "blocks.0.mlp.pre": 3.0,
}


@pytest.mark.parametrize("place", KURTOSIS)
def test_kurtosis(place):
    """Gaussian tokens, the sphere of a norm, Gaussian maps of it, variance-gamma logits."""
    found = predicted(layer(), place, "kurtosis")
    assert found.status is EXACT
    assert found.values.shape == (5,)
    assert close(found.values, KURTOSIS[place])


def test_kurtosis_without_a_norm():
    """A Gaussian map of raw tokens mixes variances: 3 (1 + 2/d)."""
    found = predicted(layer(norm_position="none"), "blocks.0.attn.q", "kurtosis")
    assert close(found.values, 3 * (1 + 2 / D))


def test_rmsnorm_kurtosis():
    """The whole sphere: 3d/(d + 2)."""
    found = predicted(layer(norm="rmsnorm"), "blocks.0.ln1", "kurtosis")
    assert close(found.values, 3 * D / (D + 2))


@dataclass(frozen=True)
class Biased:
    """Every array Gaussian, biases too."""

    std: float
    bias: float

    def law(self, weight, architecture):
        return Normal(self.bias if weight.role == "bias" else self.std)


def test_biases_add_their_variance():
    """q = W e + b: second moment d sigma^2 + sigma_b^2, the same at every pair of positions."""
    question = Question(layer(bias=True), Biased(STD, 0.3), "blocks.0.attn.q", "kernel")
    found = ask(question)
    assert close(found.values, D * STD**2 * np.eye(5) + 0.09)
    assert found.status is EXACT


def test_kurtosis_with_a_bias_and_without_a_norm():
    """Given x, q ~ N(0, sigma^2 |x|^2 + sigma_b^2): not 3 (1 + 2/d), so that or no answer.

    E v^2/(E v)^2 with v = sigma^2 |x|^2 + sigma_b^2 and Var |x|^2 = 2 d sx^4.
    """
    architecture = layer(bias=True, norm_position="none")
    question = Question(architecture, Biased(STD, 0.3), "blocks.0.attn.q", "kurtosis")
    variance = STD**2 * D * TOKEN**2 + 0.09
    expected = 3 * (1 + STD**4 * 2 * D * TOKEN**4 / variance**2)
    try:
        found = ask(question).values
    except NotImplementedError:
        return
    assert close(found, expected)


def test_kernel_after_uniform_attention():
    """g/max(m, n) over the grid of pairs, sigma_x^2 more on the residual's diagonal."""
    pairs = np.maximum(M[:, None], M)
    for place, extra in (("blocks.0.attn_out", 0.0), ("blocks.0.resid_mid", TOKEN**2)):
        found = predicted(layer(attention="uniform"), place, "kernel")
        assert found.status is EXACT
        assert close(found.values, GAIN / pairs + extra * np.eye(5))


def drawn_cosines(rng, draws=20_000):
    """Cosines of W_O W_V times the prefix means of LN'd tokens, in NumPy, per draw."""
    e = rng.standard_normal((draws, 5, D))
    e -= e.mean(-1, keepdims=True)
    e /= e.std(-1, keepdims=True)
    means = e.cumsum(1) / np.arange(1, 6)[:, None]
    for _ in range(2):
        means = means @ rng.standard_normal((draws, D, D))
    units = means / np.linalg.norm(means, axis=-1, keepdims=True)
    return units @ units.swapaxes(1, 2)


def test_kernel_cosine_is_exact_where_the_kernel_is_and_cosine_is_not():
    """The cosine of the mean kernel is sqrt(n/m) = r; E cos lacks a few r (1 - r^2)/(2d)."""
    expected = np.sqrt(np.minimum(M[:, None], M) / np.maximum(M[:, None], M))
    architecture = layer(attention="uniform")
    of_mean = predicted(architecture, "blocks.0.attn_out", "kernel_cosine")
    mean_of = predicted(architecture, "blocks.0.attn_out", "cosine")
    assert of_mean.status is EXACT
    assert mean_of.status is LEADING
    assert close(of_mean.values, expected)
    off = ~np.eye(5, dtype=bool)
    drawn = drawn_cosines(np.random.default_rng(9))
    error = 5 * drawn.std(0) / np.sqrt(len(drawn))
    assert (np.abs(mean_of.values - drawn.mean(0)) < error + mean_of.remainder)[off].all()
    per_map = expected * (1 - expected**2) / (2 * D)
    assert ((expected - mean_of.values)[off] > 2 * per_map[off]).all()
    assert (mean_of.remainder[off] < 2 * per_map[off]).all()


def test_adjacent_cosine_is_the_first_off_diagonal():
    """n_ctx - 1 entries of the matrix of cosines, with its remainders, at every fidelity."""
    for architecture in (layer(attention="uniform"), layer()):
        for fidelity in ("uniform", "first_order", "best"):
            found, matrix = (
                predicted(architecture, "blocks.0.attn_out", observable, fidelity=fidelity)
                for observable in ("adjacent_cosine", "cosine")
            )
            assert close(found.values, np.diag(matrix.values, 1))
            assert np.allclose(found.remainder, np.diag(matrix.remainder, 1), rtol=1e-9)


def test_cosine_steps_are_differences_of_columns():
    """C(m, n + 1) - C(m, n), the remainders of both."""
    architecture = layer(attention="uniform")
    found = predicted(architecture, "blocks.0.attn_out", "cosine_steps")
    matrix = predicted(architecture, "blocks.0.attn_out", "cosine")
    assert found.values.shape == (5, 4)
    assert close(found.values, matrix.values[:, 1:] - matrix.values[:, :-1])
    assert close(found.remainder, matrix.remainder[:, 1:] + matrix.remainder[:, :-1])


def test_independent_tokens_are_orthogonal_exactly():
    """Before attention the mean cosine of two positions is 0 by symmetry."""
    for place in ("embed", "blocks.0.ln1", "blocks.0.attn.v"):
        found = predicted(layer(), place, "cosine")
        assert found.status is EXACT
        assert close(found.values, np.eye(5))


# ----------------------------------------------------------------- closed form, recursion

GRID = np.arange(1, 10)


@pytest.mark.parametrize("place", ["blocks.0.attn_out", "blocks.0.resid_mid"])
@pytest.mark.parametrize("attention", ["uniform", "softmax"])
def test_closed_kernels_equal_the_recursion_on_arrays(attention, place):
    """The symbolic kernel and the rules applied to arrays give the same numbers."""
    architecture = layer(n_ctx=9, d_ff=8, attention=attention, activation="relu")
    known = dict.fromkeys(architecture.places(), bindings(architecture, normal(STD)))
    found = derive(architecture, None, place)
    positions = (GRID[:, None], GRID[None, :])
    values = [
        KernelValues(found.rules(), known, 9, positions, closed).kernel(place)
        for closed in (found.closed(), {})
    ]
    assert np.abs(values[0] - values[1]).max() <= 1e-9 * np.abs(values[0]).max()


def test_a_grid_sees_the_same_numbers_as_the_whole_matrix():
    """Two layers at 100 positions, 64 of them on the grid: the averages run over all 100."""
    architecture = layer(n_ctx=100, n_layers=2, d_ff=0, attention="uniform")
    question = Question(architecture, normal(STD), "blocks.1.attn_out", "kernel")
    found = derive(architecture, None, question.place)
    every = np.arange(1, 101)
    known = dict.fromkeys(architecture.places(), bindings(architecture, normal(STD)))
    whole = KernelValues(found.rules(), known, 100, (every[:, None], every[None, :]), {}).kernel(
        question.place
    )
    grid = position_grid(100) - 1
    assert len(grid) < 100
    assert close(ask(question).values, whole[np.ix_(grid, grid)])


def exact_two_layers(length, gain, token):
    """K -> K + g C K C' twice, in exact rationals, from K = sx^2 I."""
    kernel = [[token * (r == c) for c in range(length)] for r in range(length)]
    for _ in range(2):
        averaged = [
            [
                sum(kernel[p][q] for p in range(r + 1) for q in range(c + 1)) / ((r + 1) * (c + 1))
                for c in range(length)
            ]
            for r in range(length)
        ]
        kernel = [
            [x + gain * y for x, y in zip(a, b, strict=True)]
            for a, b in zip(kernel, averaged, strict=True)
        ]
    return np.array([[float(x) for x in row] for row in kernel])


def test_two_layers_of_uniform_attention_without_norms():
    """The whole kernel against the matrix recursion in exact rationals: exact at any width."""
    architecture = layer(n_ctx=7, n_layers=2, norm_position="none", d_ff=0, attention="uniform")
    found = predicted(architecture, "blocks.1.resid_post", "kernel", std=0.25)
    gain = Fraction(D) ** 2 * Fraction(1, 4) ** 4
    expected = exact_two_layers(7, gain, Fraction(1, 4))
    assert found.status is EXACT
    assert np.abs(found.values - expected).max() <= 1e-12 * expected.max()


# -------------------------------------------------------- remainders against a simulation


def normalised(x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True))


def simulate(rng, draws, length, width, hidden, std, layers):
    """Pre-LN blocks, uniform attention, exact GELU (no MLP if hidden is 0), plain NumPy."""
    x = TOKEN * rng.standard_normal((draws, length, width))
    places = {"embed": x}

    def mapped(x, fan_out):
        return x @ (std * rng.standard_normal((draws, x.shape[-1], fan_out)))

    for index in range(layers):
        here = f"blocks.{index}"
        v = mapped(normalised(x), width)
        z = v.cumsum(1) / np.arange(1, length + 1)[:, None]
        o = mapped(z, width)
        mid = x + o
        places |= {f"{here}.attn.z": z, f"{here}.attn_out": o, f"{here}.resid_mid": mid}
        x = mid
        if hidden:
            pre = mapped(normalised(mid), hidden)
            post = pre * ndtr(pre)
            out = mapped(post, width)
            x = mid + out
            places |= {f"{here}.ln2": normalised(mid), f"{here}.mlp.post": post}
            places[f"{here}.mlp_out"] = out
        places[f"{here}.resid_post"] = x
    places["ln_final"] = normalised(x)
    return places


SIZES = {"one block with MLP": (24, 1), "two blocks of attention": (0, 2)}
"""Hidden width and number of layers."""


@pytest.fixture(scope="module")
def simulated():
    """Draws by name of SIZES: 8000 at d = 16, weights of 0.2."""
    rng = np.random.default_rng(2)
    return {
        name: simulate(rng, 8000, 4, D, hidden, 0.2, layers)
        for name, (hidden, layers) in SIZES.items()
    }


ATTENTION = ("attn.z", "attn_out", "resid_mid")
CASES = [
    ("one block with MLP", f"blocks.0.{name}")
    for name in (*ATTENTION, "ln2", "mlp.post", "resid_post")
] + [
    ("two blocks of attention", place)
    for place in ("blocks.1.attn.z", "blocks.1.attn_out", "blocks.1.resid_post", "ln_final")
]


def mean_and_error(draws):
    return draws.mean(0), draws.std(0, ddof=1) / np.sqrt(len(draws))


@pytest.mark.parametrize(("sizes", "place"), CASES)
@pytest.mark.parametrize("observable", ["second_moment", "kernel", "cosine"])
def test_predictions_agree_with_a_simulation(simulated, sizes, place, observable):
    """At d = 16: |theory - simulation| <= remainder + 5 standard errors, everywhere."""
    x = simulated[sizes][place]
    gram = x @ x.transpose(0, 2, 1) / x.shape[-1]
    size = np.sqrt(np.einsum("bii->bi", gram))
    per_draw = {
        "second_moment": size**2,
        "kernel": gram,
        "cosine": gram / size[:, :, None] / size[:, None, :],
    }[observable]
    hidden, layers = SIZES[sizes]
    architecture = layer(n_ctx=4, n_layers=layers, d_ff=hidden, attention="uniform")
    found = predicted(architecture, place, observable, std=0.2)
    mean, error = mean_and_error(per_draw)
    excess = np.abs(found.values - mean) - found.remainder - 5 * error
    assert excess.max() <= 1e-12


# ------------------------------------------------------------------------ edges and errors


@pytest.mark.parametrize("attention", ["uniform", "softmax"])
def test_a_single_position(attention):
    """n_ctx = 1: every place has a second moment, at m = 1 attention passes the value through."""
    architecture = layer(n_ctx=1, attention=attention, d_ff=0)
    for place in architecture.places():
        assert predicted(architecture, place, "second_moment").values.shape == (1,)
    found = predicted(architecture, "blocks.0.attn_out", "second_moment")
    assert close(found.values, np.array([GAIN]))


@pytest.mark.parametrize("token", [1.0, 1e-3])
def test_what_is_exact_does_not_depend_on_the_unit(token):
    """A ReLU's kernel is of leading order off the diagonal, whatever the size of its input."""
    architecture = nope.decoder(
        D,
        4,
        n_ctx=3,
        norm_position="none",
        activation="relu",
        attention="uniform",
        tokens=nope.GaussianTokens(token),
    )
    found = predicted(architecture, "blocks.0.mlp_out", "kernel", std=1e-3)
    assert found.status is LEADING
    assert (found.remainder[0, 1:] > 0.01 * found.values[0, 0]).all()


def test_a_remainder_that_is_not_a_number_is_not_exact(monkeypatch):
    """NaN is more than nothing."""

    def broken(predictor):
        return np.ones(5), np.full(5, np.nan)

    monkeypatch.setattr(_Predictor, "_second_moment", broken)
    question = Question(layer(n_heads=2), normal(STD), "embed", "second_moment")
    with suppress(ValueError, FloatingPointError):
        assert ask(question).status is not EXACT


def test_the_smallest_width():
    """d = 2: LayerNorm leaves signs, of kurtosis 1; uniform outputs 4 sigma^4/m."""
    architecture = layer(d_model=2, n_heads=1, attention="uniform")
    assert close(predicted(architecture, "blocks.0.ln1", "kurtosis").values, np.ones(5))
    found = predicted(architecture, "blocks.0.attn_out", "second_moment")
    assert close(found.values, 4 * STD**4 / M)


@pytest.mark.parametrize("observable", ["second_moment", "cosine"])
@pytest.mark.parametrize("place", ["blocks.0.attn_out", "ln_final"])
@pytest.mark.parametrize(("n_ctx", "fidelity"), [(10_000, "uniform"), (3000, "any_temperature")])
def test_thousands_of_positions(n_ctx, fidelity, observable, place):
    """One layer at a length whose n_ctx^2 array is 68 MiB or more: 64 MiB and 10 CPU seconds."""
    architecture = layer(n_ctx=n_ctx, d_ff=0)
    derive(architecture, None, place)
    tracemalloc.start()
    start = time.process_time()
    found = predicted(architecture, place, observable, fidelity=fidelity)
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.isfinite(found.values).all()
    assert peak < 64 * 2**20
    assert seconds < 10


def test_a_prediction_carries_its_derivation_and_formula():
    """The symbolic kernel behind the numbers, and the steps to it, checked."""
    found = predicted(layer(attention="uniform", d_ff=0), "blocks.0.attn_out", "second_moment")
    assert found.derivation.place == "blocks.0.attn_out"
    assert found.derivation.check() == []
    assert found.formula.expr == found.derivation.result
    assert found.formula.status is found.status


@pytest.mark.parametrize("place", ["blocks.0.attn_out", "blocks.0.attn.scores"])
def test_a_place_that_does_not_fit_is_a_lookup_error(place):
    """A missing place, and an observable of the wrong kind of place."""
    observable = "participation" if place.endswith("out") else "cosine"
    with pytest.raises(LookupError, match=place.replace(".", r"\.")):
        predicted(layer(), place, observable)
    with pytest.raises(LookupError, match=r"no place blocks\.7"):
        predicted(layer(), "blocks.7.ln1", "second_moment")


def test_too_few_positions_are_a_lookup_error():
    """A cosine of one position does not exist."""
    with pytest.raises(LookupError, match="needs 2 positions and n_ctx is 1"):
        predicted(layer(n_ctx=1), "embed", "cosine")


@pytest.mark.parametrize(
    ("place", "observable", "reason"),
    [
        ("blocks.0.attn_out", "kurtosis", "closed form"),
        ("blocks.0.attn_out", "adjacency_score.norm", "adjacency_score.norm"),
        ("blocks.0.attn_out", "coordinate_second_moment", "coordinate_second_moment"),
        ("blocks.0.resid_mid", "adjacency_score", "c/Max"),
        ("blocks.0.attn.scores", "participation", "expected a pattern"),
    ],
)
def test_what_is_not_derived_says_so(place, observable, reason):
    """NotImplementedError with the reason."""
    with pytest.raises(NotImplementedError, match=reason):
        predicted(layer(), place, observable)


def test_given_weights_are_not_averaged_over():
    """A question about fixed weights is refused with where to go."""
    question = Question(layer(), normal(STD), "embed", "second_moment", given=Weights(0))
    with pytest.raises(NotImplementedError, match="coordinate_variance"):
        ask(question)


def test_an_unknown_fidelity_is_a_value_error():
    """The error names what there is."""
    question = Question(layer(), normal(STD), "embed", "second_moment")
    with pytest.raises(ValueError, match=r"uniform.*best.*'psychic'"):
        ask(question, fidelity="psychic")


@dataclass(frozen=True)
class Layerwise:
    """A scheme whose variance depends on the layer."""

    def law(self, weight, architecture):
        return Zero() if weight.role == "bias" else Normal(0.1 + 0.1 * ("blocks.1" in weight.path))


def test_a_variance_per_layer():
    """Kernels take each layer's own sigma: d 0.1^2 and d 0.2^2 for the queries of a norm."""
    architecture = layer(n_layers=2, d_ff=0)
    for index, std in enumerate((0.1, 0.2)):
        place = f"blocks.{index}.attn.q"
        found = ask(Question(architecture, Layerwise(), place, "second_moment"))
        assert close(found.values, D * std**2)
        assert found.status is EXACT


def test_different_variances_of_one_role_are_not_one_symbol():
    """A formula in sigma_q cannot mean two layers."""
    architecture = layer(n_layers=2)
    with pytest.raises(NotImplementedError, match="one value of sigma_q"):
        bindings(architecture, Layerwise())
    first = (place for place in architecture.places() if place.startswith("blocks.0"))
    assert bindings(architecture, Layerwise(), first)["sigma_q"] == pytest.approx(0.1, rel=1e-15)


@dataclass(frozen=True)
class Uniformly:
    """Uniform weights, of kurtosis 9/5."""

    def law(self, weight, architecture):
        return Flat()


@dataclass(frozen=True)
class Flat:
    """U(-1/2, 1/2)."""

    variance: float = 1 / 12
    kurtosis: float = 1.8
    independent: bool = True
    gaussian: bool = False

    def draw(self, source, shape):
        raise AssertionError("the theory draws nothing")


def test_kurtosis_takes_that_of_the_weights():
    """Second moments hold for any i.i.d. weights, fourth moments take -6/5 kappa_x/d from 3."""
    architecture = layer()
    moment = Question(architecture, Uniformly(), "blocks.0.attn.q", "second_moment")
    assert close(ask(moment).values, D / 12)
    found = ask(Question(architecture, Uniformly(), "blocks.0.attn.q", "kurtosis"))
    assert close(found.values, 3 - 1.2 * KURTOSIS["blocks.0.ln1"] / D)
    assert close(ask(Question(architecture, Uniformly(), "embed", "kurtosis")).values, 3.0)
