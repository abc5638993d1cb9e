"""Every registered scheme: what it states and what it draws, held to its definition."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from nope import init, plugins
from nope.testing import SchemeContract, contracts_in, uncovered

NORMAL, UNIFORM = 3.0, 1.8


def truncated_moment(k, cut):
    """E x^k of N(0, 1) between -cut and cut, by quadrature."""
    from scipy.integrate import quad

    whole, part = (
        quad(lambda x, k=k: x**k * math.exp(-x * x / 2), -cut, cut, epsrel=1e-13)[0] for k in (0, k)
    )
    return part / whole


def fans(weight):
    return weight.fan_in, weight.fan_out


def zero_biases(matrix):
    """A scheme whose biases start at 0 and whose matrices have `matrix(weight, architecture)`."""
    return lambda weight, architecture: (
        (0.0, None) if weight.role == "bias" else matrix(weight, architecture)
    )


def torch_default(weight, architecture):
    """`MultiheadAttention`: Xavier of one (3d, d) array, biases 0; `Linear`: U(+-fan_in^-1/2)."""
    name = weight.path.split(".")[-1]
    if name in ("b_Q", "b_K", "b_V", "b_O"):
        return 0.0, None
    if name in ("W_Q", "W_K", "W_V"):
        return 2 / (architecture.d_model + 3 * architecture.d_model), UNIFORM
    return 1 / (3 * weight.fan_in), UNIFORM


def additions(architecture):
    """Projections into the stream, as many as residual additions."""
    return sum(w.path.endswith((".W_O", ".W_out")) for w in architecture.weights)


MATRICES = {
    "normal": (init.normal(0.3), lambda w, a: (0.09, NORMAL)),
    "truncated_normal": (
        init.truncated_normal(0.3, 1.5),
        lambda w, a: (
            0.09 * truncated_moment(2, 1.5),
            truncated_moment(4, 1.5) / truncated_moment(2, 1.5) ** 2,
        ),
    ),
    "gpt2": (
        init.gpt2(0.3),
        lambda w, a: (0.09 / (additions(a) if w.path.endswith(("W_O", "W_out")) else 1), NORMAL),
    ),
    "xavier_normal": (init.xavier_normal(2.0), lambda w, a: (8 / sum(fans(w)), NORMAL)),
    "xavier_uniform": (init.xavier_uniform(), lambda w, a: (2 / sum(fans(w)), UNIFORM)),
    "kaiming_normal": (init.kaiming_normal(), lambda w, a: (2 / fans(w)[0], NORMAL)),
    "kaiming_uniform": (
        init.kaiming_uniform("fan_out", "linear"),
        lambda w, a: (1 / fans(w)[1], UNIFORM),
    ),
    "lecun_normal": (init.lecun_normal(), lambda w, a: (1 / fans(w)[0], NORMAL)),
    "lecun_uniform": (init.lecun_uniform(), lambda w, a: (1 / fans(w)[0], UNIFORM)),
    "orthogonal": (
        init.orthogonal(1.5),
        lambda w, a: (2.25 / max(fans(w)), 3 * max(fans(w)) / (max(fans(w)) + 2)),
    ),
    "mup": (init.mup(0.3, 64), lambda w, a: (0.09 * 64 / fans(w)[0], NORMAL)),
}
for name, (scheme, matrix) in MATRICES.items():
    globals()[f"TestScheme_{name}"] = SchemeContract.named(
        name, name=name, scheme=scheme, plain=zero_biases(matrix)
    )


class TestTorchDefault(SchemeContract):
    name = "torch_default"
    plain = staticmethod(torch_default)


class TestJaxLecunNormal(SchemeContract):
    """`VarianceScaling` of a truncated normal, which no registered name has."""

    name = "lecun_normal"
    scheme = init.VarianceScaling(1.0, "fan_in", "truncated_normal")
    plain = staticmethod(
        zero_biases(
            lambda w, a: (
                1 / w.fan_in,
                truncated_moment(4, 2.0) / truncated_moment(2, 2.0) ** 2,
            )
        )
    )


# ---------------------------------------------------------------------------- the registry

CONTRACTS = [*contracts_in(globals()), *plugins.contracts()]


def test_every_scheme_has_a_contract():
    """Of plugins too."""
    assert len(list(SchemeContract.registered())) >= 12
    assert uncovered(SchemeContract, CONTRACTS) == []


def test_a_scheme_without_a_contract_is_named(monkeypatch):
    monkeypatch.setitem(init.SCHEMES, "mine", init.normal)
    (line,) = uncovered(SchemeContract, CONTRACTS)
    assert line.startswith("expected a contract for scheme mine, got none; subclass")


COVERED = {
    "of another type": ("gpt2", init.normal(0.5), False),
    "of other entries": ("normal", init.truncated_normal(0.5), False),
    "of another distribution": ("xavier_normal", init.xavier_uniform(), False),
    "of another fan": ("xavier_normal", init.lecun_normal(), False),
    "of another scale": ("lecun_normal", init.VarianceScaling(2.0, "fan_in", "normal"), False),
    "of no registered name": ("mine", init.normal(0.5), False),
    "of another number": ("normal", init.normal(0.5), True),
    "of another argument": ("kaiming_normal", init.kaiming_normal("fan_out", "tanh"), True),
    "of a whole number": ("normal", init.normal(1), True),
    "of a flag": ("torch_default", init.torch_default(packed=False), True),
}


@pytest.mark.parametrize(("name", "scheme", "covered"), COVERED.values(), ids=COVERED)
def test_a_name_is_covered_by_what_its_constructor_makes(name, scheme, covered):
    contract = SchemeContract.named(name, name=name, scheme=scheme)
    assert list(contract.covers()) == [f"scheme {name}"] * covered


def test_what_no_name_makes_covers_none():
    assert TestJaxLecunNormal.covers() == []


# ---------------------------------------------------------------------- contracts notice errors

STATED = "test_variance_and_kurtosis_are_the_plain_ones"
MOMENTS = "test_drawn_weights_have_the_stated_moments"
CDF = "test_gaussian_weights_are_gaussian"
ONE_LAW = "test_entries_have_one_law"


def failures(matrix, plain=lambda w, a: (0.09, NORMAL), **given):
    """Of a scheme whose matrices have the law `matrix(weight, architecture)`."""
    scheme = type("Made", (Made,), {"matrix": staticmethod(matrix)})()
    given |= {"name": "wrong", "scheme": scheme, "plain": zero_biases(plain)}
    named = SchemeContract.named("wrong", **given)
    return {name: error for name, error in named.failures().items() if name != SURVIVES}


class Made(init.ZeroBiases):
    """A scheme that no `repr` makes again."""


SURVIVES = "test_the_scheme_survives_repr_and_pickle"


def normal(std=0.3):
    return init.Normal(std)


def wrong_at(*paths):
    return lambda w, a: normal(0.31 if w.path in paths else 0.3)


@pytest.mark.parametrize(
    "matrix",
    [
        wrong_at("blocks.0.attn.W_Q"),
        wrong_at("blocks.1.mlp.W_in"),
        lambda w, a: normal(0.3 if a.d_model == 6 else 0.31),
        lambda w, a: normal(0.3 if a.n_residual == 6 else 0.31),
        lambda w, a: init.Uniform(0.3 * 3**0.5) if w.path == "blocks.0.attn.W_K" else normal(),
    ],
)
def test_every_weight_is_looked_at(matrix):
    """In every block, and of another architecture."""
    assert set(failures(matrix, NUMBERS=1)) == {STATED}


@pytest.mark.parametrize("pair", [(0.09, None), 0.09, [0.09, 3.0], (0.09, "3"), (math.nan, 3.0)])
def test_plain_is_a_pair(pair):
    found = failures(lambda w, a: normal(), lambda w, a: pair, NUMBERS=1)
    assert set(found) == {STATED}
    assert str(found[STATED]).startswith("expected `plain` to give a variance and a kurtosis of")


class Drawn(init.Normal):
    """Draws that are not what the law says: `made` of independent Gaussian ones."""

    def draw(self, source, shape):
        return self.made(np.asarray(source.normal(shape, 1.0))) * self.std


class IdenticalRows(Drawn):
    def made(self, g):
        return g[..., :1, :] + 0 * g


class SharedSigns(Drawn):
    """Each row has one sign."""

    def made(self, g):
        return np.sign(g[..., :1]) * np.abs(g)


class SharedScales(Drawn):
    """Neighbours are large together, of signs that are independent; the variance is right."""

    def made(self, g):
        return np.sign(g) * np.abs(g[..., :1, :])


class Checkerboard(Drawn):
    """Not random, but for what rounding could be."""

    kurtosis = 1.0
    gaussian = False

    def made(self, g):
        return np.where(np.indices(g.shape[-2:]).sum(0) % 2, 1.0, -1.0) + 1e-9 * g


class OneGaussianEntry(Drawn):
    """The others are 0 or +-sqrt(3), whose moments are a Gaussian's up to the fifth."""

    def made(self, g):
        three = math.sqrt(3) * np.sign(g) * (np.abs(g) > 0.967421566101701)
        three[..., 0, 0] = g[..., 0, 0]
        return three + 1e-9 * g


class OneOtherEntry(OneGaussianEntry):
    """Of a law that does not call itself Gaussian."""

    gaussian = False


class TwoPercentOff(Drawn):
    def made(self, g):
        return math.sqrt(1.02) * g


WRONG = {
    IdenticalRows: (MOMENTS, "E w_i w_j in a column"),
    SharedSigns: (MOMENTS, "E w_i w_j in a row"),
    SharedScales: (MOMENTS, "E w_i^2 w_j^2 in a column"),
    Checkerboard: (MOMENTS, "the mean of an entry"),
    OneGaussianEntry: (CDF, "to be Gaussian"),
    OneOtherEntry: (ONE_LAW, "to have one law"),
    TwoPercentOff: (MOMENTS, "the second moment on average"),
}


@pytest.mark.parametrize(("law", "check", "words"), [(k, *v) for k, v in WRONG.items()])
def test_draws_that_are_not_as_stated_fail(law, check, words):
    found = failures(lambda w, a: law(0.3), lambda w, a: (0.09, law.kurtosis))
    assert STATED not in found
    assert words in str(found[check])


def test_the_law_itself_passes():
    assert failures(lambda w, a: normal()) == {}


@dataclass(frozen=True)
class Biased(init.Same):
    """States half of the variance it draws."""

    def law(self, weight, architecture):
        return HalfStated(0.3) if weight.role != "bias" else init.Zero()


class HalfStated(init.Normal):
    @property
    def variance(self):
        return self.std**2 / 1.2


def test_a_scheme_that_draws_something_else_fails():
    wrong = SchemeContract.named(
        "wrong",
        name="wrong",
        scheme=Biased(init.Normal(0.3)),
        plain=zero_biases(lambda w, a: (0.09, NORMAL)),
    )
    assert set(wrong.failures()) == {
        "test_drawn_weights_have_the_stated_moments",
        "test_variance_and_kurtosis_are_the_plain_ones",
    }
