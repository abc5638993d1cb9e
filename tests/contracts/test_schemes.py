"""Every registered scheme: what it states and what it draws, held to its definition."""

import math
from dataclasses import dataclass

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
        lambda w, a: (0.09 / (6 if w.path.split("_")[-1] in ("O", "out") else 1), NORMAL),
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
