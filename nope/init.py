"""Initialisation schemes as data: per weight a variance, a kurtosis and a way to draw.

A scheme maps a `Weight` of an `Architecture` to a `WeightLaw`.  The theory reads `variance`,
`kurtosis`, `independent` and `gaussian`; a sampler calls `draw` with a `Source` of its own
numbers, so this module needs neither torch nor a random number generator.

>>> from nope import decoder
>>> architecture = decoder(768, 12, n_ctx=4, n_layers=12)
>>> law = gpt2().law(architecture.weights[3], architecture)
>>> architecture.weights[3].path, round(law.variance * 24 / 0.02**2, 12)
('blocks.0.attn.W_O', 1.0)
>>> round(torch_default().law(architecture.weights[0], architecture).variance * 768, 12)
0.5
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from nope.architecture import Architecture
from nope.checks import expect, expect_choice, expect_count, expect_finite, expect_flag
from nope.operations import Linear, Weight
from nope.sources import Source

Distribution = Literal["normal", "uniform", "truncated_normal"]
Fan = Literal["fan_in", "fan_out", "fan_avg"]

# --------------------------------------------------------------------------------- laws


@runtime_checkable
class WeightLaw(Protocol):
    """The law of one weight array with identically distributed zero-mean entries."""

    @property
    def variance(self) -> float:
        """E w^2."""

    @property
    def kurtosis(self) -> float:
        """E w^4 / (E w^2)^2."""

    @property
    def independent(self) -> bool:
        """Whether the entries are independent."""

    @property
    def gaussian(self) -> bool:
        """Whether the entries are independent and Gaussian (0 counts as N(0, 0))."""

    def draw(self, source: Source, shape: tuple[int, ...]) -> Any:
        """Fresh arrays; leading axes are independent draws."""


LARGEST_STD = 1e70
"""Beyond it the fourth powers of weights leave float64."""


@dataclass(frozen=True)
class Normal:
    """w ~ N(0, std^2)."""

    std: float
    kurtosis: ClassVar[float] = 3.0
    independent: ClassVar[bool] = True
    gaussian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        expect_finite("the weights' std", self.std)
        expect(abs(self.std) < LARGEST_STD, f"std below {LARGEST_STD:g}", self.std, "lower it")

    @property
    def variance(self) -> float:
        return self.std**2

    def draw(self, source: Source, shape: tuple[int, ...]) -> Any:
        return source.normal(shape, self.std)


@dataclass(frozen=True)
class Uniform:
    """w ~ U(-bound, bound): variance bound^2/3."""

    bound: float
    kurtosis: ClassVar[float] = 9 / 5
    independent: ClassVar[bool] = True
    gaussian: ClassVar[bool] = False

    def __post_init__(self) -> None:
        expect_finite("the weights' bound", self.bound)

    @property
    def variance(self) -> float:
        return self.bound**2 / 3

    def draw(self, source: Source, shape: tuple[int, ...]) -> Any:
        return source.uniform(shape, self.bound)


@dataclass(frozen=True)
class TruncatedNormal:
    """w ~ N(0, std^2) conditioned on |w| <= cut std: `std` is that before the truncation."""

    std: float
    cut: float = 2.0
    independent: ClassVar[bool] = True
    gaussian: ClassVar[bool] = False

    def __post_init__(self) -> None:
        expect_finite("the weights' std", self.std)
        expect_finite("the cut, in standard deviations,", self.cut, positive=True)

    @property
    def variance(self) -> float:
        return self.std**2 * self._moment(1)

    @property
    def kurtosis(self) -> float:
        return self._moment(2) / self._moment(1) ** 2

    def _moment(self, k: int) -> float:
        """E (w/std)^2k = (2k - 1)!! P(k + 1/2, cut^2/2) / P(1/2, cut^2/2).

        P is the regularised lower incomplete Gamma function, the distribution function of
        (w/std)^2/2 under k more pairs of degrees of freedom; for k = 1 this is
        1 - 2 cut phi(cut)/erf(cut/sqrt(2)), phi the normal density, without its cancellation.
        """
        from scipy.special import gammainc

        half = self.cut**2 / 2
        whole = math.prod(range(1, 2 * k, 2))
        return float(whole * gammainc(k + 0.5, half) / gammainc(0.5, half))

    def draw(self, source: Source, shape: tuple[int, ...]) -> Any:
        return source.truncated_normal(shape, self.std, self.cut)


@dataclass(frozen=True)
class Orthogonal:
    """gain times a Haar matrix, `fan_in` by `fan_out`: W W' or W'W, the smaller, is gain^2 I.

    The longer side n = max(fan_in, fan_out) holds unit vectors: an entry has variance
    gain^2/n and, a coordinate of the sphere in n dimensions, kurtosis 3n/(n + 2).
    Source: Saxe et al. 2014; moments derived in `theory.formulas.weingarten`.
    """

    fan_in: int
    fan_out: int
    gain: float = 1.0
    independent: ClassVar[bool] = False
    gaussian: ClassVar[bool] = False

    def __post_init__(self) -> None:
        expect_finite("the gain", self.gain)

    @property
    def variance(self) -> float:
        return self.gain**2 / max(self.fan_in, self.fan_out)

    @property
    def kurtosis(self) -> float:
        longer = max(self.fan_in, self.fan_out)
        return 3 * longer / (longer + 2)

    def draw(self, source: Source, shape: tuple[int, ...]) -> Any:
        """Raises `ValueError` unless the last two axes are (fan_in, fan_out)."""
        size = (self.fan_in, self.fan_out)
        expect(tuple(shape[-2:]) == size, f"a shape that ends in {size}", shape, "draw it whole")
        return self.gain * source.orthogonal(shape)


@dataclass(frozen=True)
class Zero:
    """w = 0: biases, in every scheme but torch's defaults."""

    variance: ClassVar[float] = 0.0
    kurtosis: ClassVar[float] = math.nan
    independent: ClassVar[bool] = True
    gaussian: ClassVar[bool] = True

    def draw(self, source: Source, shape: tuple[int, ...]) -> Any:
        return source.zeros(shape)


OF_VARIANCE: Mapping[str, Callable[[float], WeightLaw]] = {
    "normal": lambda variance: Normal(math.sqrt(variance)),
    "uniform": lambda variance: Uniform(math.sqrt(3 * variance)),
    "truncated_normal": lambda variance: TruncatedNormal(
        math.sqrt(variance / TruncatedNormal(1.0).variance)
    ),
}
"""The law of a distribution that has a given variance; truncated at two standard deviations."""

# ------------------------------------------------------------------------------ schemes


@runtime_checkable
class Scheme(Protocol):
    """An initialisation: the law of each weight of an architecture."""

    def __hash__(self) -> int: ...

    def law(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        """The law of `weight` in `architecture`."""


def law_of(scheme: Scheme, weight: Weight, architecture: Architecture) -> WeightLaw:
    """The scheme's law of a weight; an embedding has the tokens' law, whatever the scheme."""
    if weight.role == "embedding":
        return Normal(architecture.tokens.std)
    return scheme.law(weight, architecture)


class ZeroBiases(ABC):
    """A scheme that starts every bias at 0 and leaves the matrices to `matrix`."""

    def law(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        return Zero() if weight.role == "bias" else self.matrix(weight, architecture)

    @abstractmethod
    def matrix(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        """The law of a matrix."""


@dataclass(frozen=True)
class Same(ZeroBiases):
    """Every matrix has the same law, every bias is 0."""

    entries: Normal | TruncatedNormal | Uniform

    def matrix(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        return self.entries


@dataclass(frozen=True)
class GPT2(ZeroBiases):
    """N(0, std^2); projections into the stream divided by sqrt(number of residual additions).

    Source: Radford et al. 2019, section 2.3.
    """

    std: float = 0.02

    def __post_init__(self) -> None:
        expect_finite("the weights' std", self.std)

    def matrix(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        into_stream = weight.role in ("output", "mlp_out")
        return Normal(
            self.std / math.sqrt(architecture.n_residual or 1) if into_stream else self.std
        )


FANS: Mapping[str, Callable[[Weight], float]] = {
    "fan_in": lambda weight: weight.fan_in,
    "fan_out": lambda weight: weight.fan_out,
    "fan_avg": lambda weight: (weight.fan_in + weight.fan_out) / 2,
}

GAINS_SQUARED: Mapping[str, float] = {
    "linear": 1.0,
    "relu": 2.0,
    "tanh": 25 / 9,
    "selu": 9 / 16,
}
"""What Kaiming's rule multiplies the variance by: `torch.nn.init.calculate_gain`, squared."""


@dataclass(frozen=True)
class VarianceScaling(ZeroBiases):
    """Every matrix has variance scale/fan, `mode` naming the fan; every bias is 0.

    The common form of Xavier's (Glorot and Bengio 2010), Kaiming's (He et al. 2015) and LeCun's
    (1998) rules.  `truncated_normal` has its variance after the truncation, as in JAX.
    """

    scale: float
    mode: Fan
    distribution: Distribution

    def __post_init__(self) -> None:
        expect_finite("scale", self.scale)
        expect_choice("mode", self.mode, tuple(FANS))
        expect_choice("distribution", self.distribution, tuple(OF_VARIANCE))

    def matrix(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        return OF_VARIANCE[self.distribution](self.scale / FANS[self.mode](weight))


@dataclass(frozen=True)
class Haar(ZeroBiases):
    """Every matrix `gain` times a Haar matrix (all heads of W_Q are one), every bias 0."""

    gain: float = 1.0

    def __post_init__(self) -> None:
        expect_finite("the gain", self.gain)

    def matrix(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        return Orthogonal(weight.fan_in, weight.fan_out, self.gain)


@dataclass(frozen=True)
class MuP(ZeroBiases):
    """Every matrix N(0, std^2 base_width/fan_in), every bias 0.

    Source: Yang et al. 2022, Tensor Programs V, tables 3 and 8, hidden weights.
    """

    std: float
    base_width: int

    def __post_init__(self) -> None:
        expect_finite("the weights' std", self.std)
        expect_count("base_width", self.base_width)

    def matrix(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        return Normal(self.std * math.sqrt(self.base_width / weight.fan_in))


@dataclass(frozen=True)
class TorchDefault:
    """What `torch.nn.MultiheadAttention` and `torch.nn.Linear` draw when left alone.

    `Linear` (W_O, W_in, W_out and the MLP's biases): U(+-1/sqrt(fan_in)), variance
    1/(3 fan_in).  W_Q, W_K, W_V: Xavier uniform, of the one `packed` (3d, d) array, so
    variance 1/(2d), or of each alone, 1/d, as where kdim or vdim is not d.  Attention's
    biases: 0.
    """

    packed: bool = True

    def __post_init__(self) -> None:
        expect_flag("packed", self.packed)

    def law(self, weight: Weight, architecture: Architecture) -> WeightLaw:
        role = _matrix_role(weight, architecture)
        if weight.role == "bias" and role in ("query", "key", "value", "output"):
            return Zero()
        if role in ("query", "key", "value"):
            stacked = (3 if self.packed else 1) * weight.fan_out
            return OF_VARIANCE["uniform"](2 / (weight.fan_in + stacked))
        return Uniform(1 / math.sqrt(weight.fan_in))


def _matrix_role(weight: Weight, architecture: Architecture) -> str:
    """The role of a weight, and for a bias that of the matrix it is added to."""
    if weight.role != "bias":
        return weight.role
    maps = (o for o in architecture.operations if isinstance(o, Linear))
    role = next((o.weight.role for o in maps if o.bias == weight), "")
    expect(bool(role), "a bias of this architecture", weight.path, "see architecture.weights")
    return role


# ------------------------------------------------------------------------- constructors


def normal(std: float) -> Scheme:
    """Every weight matrix N(0, std^2), biases 0.  Raises `ValueError` for a negative std."""
    return Same(Normal(std))


def truncated_normal(std: float = 0.02, cut: float = 2.0) -> Scheme:
    """N(0, std^2) conditioned on |w| <= cut std (BERT: 0.02 and 2), biases 0.

    `torch.nn.init.trunc_normal_` takes absolute bounds: this is a = -cut std, b = cut std, and
    its default a = -2, b = 2 at std = 0.02 cuts at 100 standard deviations, which is no cut.
    The variance is smaller than std^2: 0.774 std^2 at a cut of 2.
    """
    return Same(TruncatedNormal(std, cut))


def gpt2(std: float = 0.02) -> Scheme:
    """GPT-2's: N(0, std^2), with std / sqrt(2 n_layers) for projections into the stream."""
    return GPT2(std)


def xavier_normal(gain: float = 1.0) -> Scheme:
    """N(0, 2 gain^2/(fan_in + fan_out)), biases 0.  Source: Glorot and Bengio 2010."""
    return _xavier(gain, "normal")


def xavier_uniform(gain: float = 1.0) -> Scheme:
    """U(+-gain sqrt(6/(fan_in + fan_out))), variance as `xavier_normal`, biases 0."""
    return _xavier(gain, "uniform")


def kaiming_normal(mode: Fan = "fan_in", nonlinearity: str = "relu") -> Scheme:
    """N(0, gain^2/fan), gain^2 = 2 for a ReLU (see `GAINS_SQUARED`), biases 0.

    Source: He et al. 2015.
    """
    return _kaiming(mode, nonlinearity, "normal")


def kaiming_uniform(mode: Fan = "fan_in", nonlinearity: str = "relu") -> Scheme:
    """U(+-gain sqrt(3/fan)), variance as `kaiming_normal`, biases 0."""
    return _kaiming(mode, nonlinearity, "uniform")


def lecun_normal() -> Scheme:
    """N(0, 1/fan_in), biases 0.  Source: LeCun et al. 1998.

    JAX's function of this name truncates at two standard deviations and corrects the variance:
    that is `VarianceScaling(1.0, "fan_in", "truncated_normal")`.
    """
    return VarianceScaling(1.0, "fan_in", "normal")


def lecun_uniform() -> Scheme:
    """U(+-sqrt(3/fan_in)), variance 1/fan_in, biases 0."""
    return VarianceScaling(1.0, "fan_in", "uniform")


def orthogonal(gain: float = 1.0) -> Scheme:
    """Haar matrices times `gain`, as `torch.nn.init.orthogonal_`, biases 0.  See `Orthogonal`."""
    return Haar(gain)


def mup(std: float = 0.02, base_width: int = 256) -> Scheme:
    """muP's hidden weights: N(0, std^2 base_width/fan_in), so `std` where fan_in = base_width.

    The rest of muP is no initialisation: logits scaled by 1/d_head instead of 1/sqrt(d_head)
    and the multiplier of the readout belong to the architecture, learning rates per matrix to
    the optimiser.  Source: Yang et al. 2022, Tensor Programs V, tables 3 and 8.
    """
    return MuP(std, base_width)


def torch_default(packed: bool = True) -> Scheme:
    """What `torch.nn` draws when left alone; see `TorchDefault`."""
    return TorchDefault(packed)


def _xavier(gain: float, distribution: Distribution) -> Scheme:
    expect_finite("the gain", gain)
    return VarianceScaling(gain**2, "fan_avg", distribution)


def _kaiming(mode: Fan, nonlinearity: str, distribution: Distribution) -> Scheme:
    expect_choice("nonlinearity", nonlinearity, tuple(GAINS_SQUARED))
    return VarianceScaling(GAINS_SQUARED[nonlinearity], mode, distribution)


SCHEMES: dict[str, Callable[..., Scheme]] = {
    scheme.__name__: scheme
    for scheme in (
        normal,
        truncated_normal,
        gpt2,
        xavier_normal,
        xavier_uniform,
        kaiming_normal,
        kaiming_uniform,
        lecun_normal,
        lecun_uniform,
        orthogonal,
        mup,
        torch_default,
    )
}
"""The registered schemes: what sweeps know by name, and what goes through the contract."""
