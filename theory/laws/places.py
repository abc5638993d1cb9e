"""From an operation to what is known of the vector behind it, at one position.

`vector_of(operation, network)` is dispatched on the operation's class, like `theory.rules`: to
add a layer kind, register a function that returns one of `theory.laws.vectors`.

Two symmetries make most of this exact.  Given its input, a Gaussian matrix gives independent
Gaussians whose variance only depends on the input's norm, which a norm with eps = 0 fixes.  And
turning all tokens and all matrices that read or write the stream by one rotation (of the
hyperplane that a LayerNorm leaves, if there is one) changes no law: a stream divided by its norm
is uniform on a sphere, at every depth and position.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch

import numpy as np

from nope.init import Orthogonal, WeightLaw, Zero, law_of
from nope.operations import (
    Activate,
    Add,
    Average,
    Embed,
    Linear,
    Mix,
    Multiply,
    Normalise,
    Operation,
    Scores,
    Uniform,
    Weight,
)
from nope.questions import Question
from nope.tokens import GaussianTokens
from theory.formulas import laws
from theory.formulas.tokens import collision_matrix
from theory.laws.law import Family
from theory.laws.variance import (
    RandomVariance,
    cdf_effect,
    chi_square,
    constant,
    either,
    matched,
)
from theory.laws.vectors import (
    Heads,
    Isotropic,
    Normalised,
    OfNorm,
    Rotated,
    Units,
    Vector,
    mixture_family,
)
from theory.predict import Prediction, predict
from theory.symbols import d, d_h, s

STREAM = (Embed, Normalise, Add, Average)
"""What commutes with a rotation of its inputs."""


class Network:
    """The vectors at the places of a question's architecture, at position m."""

    def __init__(self, question: Question, position: int) -> None:
        self.question, self.position = question, position
        self.architecture = question.architecture
        self.places = self.architecture.places()
        self._known: dict[str, Vector] = {}
        self._predicted: dict[str, Prediction] = {}

    def vector(self, place: str) -> Vector:
        """What is known of the vector at `place`."""
        if place not in self._known:
            self._known[place] = vector_of(self.places[place], self)
        return self._known[place]

    def isotropic(self, place: str) -> Isotropic:
        """The vector at `place` as a Gaussian of random variance, if to leading order."""
        return self.isotropic_of(self.vector(place), place)

    def isotropic_of(self, vector: Vector, place: str) -> Isotropic:
        if isinstance(vector, Isotropic):
            return vector
        excess = abs(vector.kurtosis / 3 / (1 + vector.mean_square.central(2)) - 1)
        dropped = max(vector.dropped, vector.norm_dropped) + shape_effect(excess)
        return Isotropic(vector.mean_square, self.width(place), dropped)

    def width(self, place: str) -> int:
        return self.architecture.width(place)

    def law(self, weight: Weight) -> WeightLaw:
        return law_of(self.question.init, weight, self.architecture)

    def predicted(self, place: str) -> Prediction:
        """The kernel calculus' second moment at every position."""
        if place not in self._predicted:
            asked = replace(self.question, place=place, observable="second_moment", points=())
            self._predicted[place] = predict(asked)
        return self._predicted[place]

    def second_moment(self, place: str) -> tuple[float, float]:
        """The same at this position, and its relative remainder."""
        found, at = self.predicted(place), self.position - 1
        return float(found.values[at]), float(found.remainder[at] / found.values[at])

    def norm_spread(self, place: str) -> float:
        """The relative variance of a squared norm, 2/d for each random map that made it."""
        derivation = self.predicted(place).derivation
        assert derivation is not None
        return 2 * derivation.steps[-1].rule.traits.maps / self.architecture.d_model

    def gaussian(self, place: str) -> Isotropic:
        """The leading order that every place has: a Gaussian of the kernel calculus' variance."""
        moment, relative = self.second_moment(place)
        dropped = cdf_effect(1) * relative + cdf_effect(2) * self.norm_spread(place)
        return Isotropic(constant(moment), self.width(place), dropped)

    def turns(self, place: str) -> bool:
        """Whether a rotation of the stream, which `place` is of, changes no law up to there.

        So it is where all matrices are Gaussian or Haar and biases Gaussian, and where nothing
        but matrices leads from what is added and normalised to what is activated and mixed.
        """
        upstream = self.architecture.upstream(place)
        laws = [(weight, self.law(weight)) for o in upstream for weight in o.weights]
        isotropic = all(
            law.gaussian or (isinstance(law, Orthogonal) and weight.role != "bias")
            for weight, law in laws
        )
        stream: set[str] = {place}
        hidden: set[str] = set()
        for operation in upstream:
            if not isinstance(operation, Linear):
                side = stream if isinstance(operation, STREAM) else hidden
                side.update((operation.place, *operation.inputs))
        return isotropic and stream.isdisjoint(hidden)

    def rescaled(self, vector: Isotropic, place: str) -> Isotropic:
        """The vector with the kernel calculus' second moment at `place`."""
        moment, relative = self.second_moment(place)
        variance = vector.variance.scaled(moment / vector.variance.mean)
        return replace(vector, variance=variance, dropped=vector.dropped + cdf_effect(1) * relative)

    def mixes_positions(self, place: str) -> bool:
        """Whether anything upstream looks at other positions."""
        return any(isinstance(o, Mix | Average) for o in self.architecture.upstream(place))

    def seen(self, causal: bool) -> int:
        """How many keys the query at this position sees."""
        return self.position if causal else self.architecture.n_ctx


@singledispatch
def vector_of(operation: Operation, network: Network) -> Vector:
    """What is known of the vector that `operation` produces."""
    raise NotImplementedError(
        f"expected a place whose law is known, got {operation.place}, a {type(operation).__name__}"
        ": its entries are dependent shares; measure it with the observable cdf"
    )


@vector_of.register
def _(operation: Embed, network: Network) -> Vector:
    """N(0, std^2 I) at each position, whether drawn or looked up in a table."""
    return Isotropic(constant(operation.tokens.std**2), network.architecture.d_model)


@vector_of.register
def _(operation: Normalise, network: Network) -> Vector:
    """A point on a sphere by rotation, whatever the stream's norm; with eps the norm comes in."""
    width, source = network.architecture.d_model, operation.inputs[0]
    centring = operation.kind == "layernorm"
    n, dimensions = (width - 1, d - 1) if centring else (width, d)
    if not operation.eps:
        dropped = 0.0 if network.turns(source) else network.isotropic(source).dropped
        return Normalised(n, constant(0.0), dimensions, width, dropped)
    before = network.isotropic(source)
    offset = before.variance.mapped(lambda v: width * operation.eps / v)
    share = operation.eps / (operation.eps + before.variance.mean)
    norm_dropped = share * before.dropped
    dropped = norm_dropped if network.turns(source) else before.dropped
    return Normalised(n, offset, dimensions, width, dropped, norm_dropped)


@vector_of.register
def _(operation: Linear, network: Network) -> Vector:
    """A matrix of the scheme and a bias, on whatever is known of the input."""
    return mapped(operation, network.vector(operation.inputs[0]), network)


def mapped(operation: Linear, before: Vector, network: Network) -> Vector:
    """Given the input x, N(0, sigma_w^2 |x|^2 + sigma_b^2) where weights and biases are Gaussian.

    Others add an excess kurtosis; a Haar matrix turns a vector of constant norm.
    """
    weight, law = operation.weight, network.law(operation.weight)
    product = before.mean_square.scaled(weight.fan_in * law.variance)
    if isinstance(law, Orthogonal) and operation.bias is None and product.freedom == np.inf:
        longer = max(weight.fan_in, weight.fan_out)
        return Rotated(np.sqrt(product.mean), longer, weight.fan_out, before.norm_dropped)
    bias = Zero() if operation.bias is None else network.law(operation.bias)
    variance = product.plus(constant(bias.variance))
    if not variance.mean:
        raise NotImplementedError(
            f"expected weights that are not 0, got {operation.place} with nothing but zeros; "
            "change the initialisation"
        )
    share = product.mean / variance.mean
    excess = share**2 * _excess_kurtosis(law, before, weight)
    if not bias.gaussian:
        excess += (1 - share) ** 2 * abs(bias.kurtosis - 3)
    return Isotropic(variance, weight.fan_out, before.norm_dropped + shape_effect(excess / 3))


def shape_effect(excess: float) -> float:
    """What a kurtosis of 3 (1 + excess) or 3 (1 - excess) that is taken for 3 does to a CDF.

    As a relative variance `excess` of a Gaussian's variance would; the next order is that of a
    third moment 4 excess^2, which a sphere in many dimensions has (its sixth cumulant is
    240/((n + 2)(n + 4)), a sum of uniform weights' about as large), and of a fourth 3 excess^2.
    """
    return cdf_effect(2) * excess + (4 * cdf_effect(3) + 3 * cdf_effect(4)) * excess**2


def _excess_kurtosis(law: WeightLaw, before: Vector, weight: Weight) -> float:
    """|kurtosis - 3| of a coordinate of x W given |x|; (kurtosis - 3) E sum x^4/|x|^4 if i.i.d."""
    if law.gaussian:
        return 0.0
    if isinstance(law, Orthogonal):
        return 6 / (max(weight.fan_in, weight.fan_out) + 2)
    return abs(law.kurtosis - 3) * before.kurtosis / weight.fan_in


@vector_of.register
def _(operation: Average, network: Network) -> Vector:
    """The mean of m Gaussian tokens is Gaussian; of anything else to leading order."""
    averaged = _averaged(operation.inputs[0], network.position, network)
    return averaged if isinstance(averaged, Isotropic) else network.gaussian(operation.place)


@vector_of.register
def _(operation: Mix, network: Network) -> Vector:
    """Given the inputs, N(0, sigma_v^2 |mean of the inputs|^2); one key alone is copied."""
    pattern, values = (network.places[name] for name in operation.inputs)
    scores = pattern if isinstance(pattern, Uniform) else network.places[pattern.inputs[0]]
    assert isinstance(scores, Scores | Uniform)
    count = network.seen(scores.causal)
    if count == 1:
        return network.vector(values.place)
    averaged = isinstance(values, Linear) and _averaged(values.inputs[0], count, network)
    if isinstance(values, Linear) and averaged:
        vector = network.isotropic_of(mapped(values, averaged, network), values.place)
    else:
        vector = network.gaussian(operation.place)
    if isinstance(scores, Uniform):
        return vector
    return _softmax(network.rescaled(vector, operation.place), scores, count, network)


def _softmax(vector: Isotropic, scores: Scores, count: int, network: Network) -> Heads:
    """What a softmax adds to the spread of its output's variance: that of the participation.

    sum_n a_n^2 = (1 + S)/m to first order, S the empirical variance of the query's m logits, of
    mean t = s^2 (1 - 1/m).  E S^2/(E S)^2 is (1 + 2/m) times a third of the logits' kurtosis, so
    that 1 + S has t^2/(1 + t)^2 times that less 1 as its relative variance.  It is as large as
    what it drops in turn.
    """
    logit = logit_family(scores, network)[0].numbers
    square = float(logit.moment(2))
    third = float(logit.moment(4)) / (3 * square**2)
    mean = square * (1 - 1 / count)
    own = (mean / (1 + mean)) ** 2 * ((1 + 2 / count) * third - 1)
    variance = matched(vector.variance.mean, vector.variance.central(2) + own)
    dropped = vector.dropped + cdf_effect(2) * own
    return Heads(variance, vector.width, dropped, own, network.architecture.n_heads)


def _averaged(place: str, count: int, network: Network) -> Vector | None:
    """The mean of `count` vectors, where they are Gaussian tokens, normalised or not.

    Of raw tokens: Gaussian.  Of normalised ones, sqrt(d) R_i u_i with cosines of variance 1/n: a
    squared norm of relative variance 2 (1 - 1/m)/n + Var R^2/(m (E R^2)^2), and as third moment
    8 (1 - 1/m)(1 - 2/m)/n^2, from triangles of cosines, less than the chi-square's that is
    matched to the variance.
    """
    operation, width = network.places[place], network.architecture.d_model
    source = operation if isinstance(operation, Embed) else network.places[operation.inputs[0]]
    if not isinstance(source, Embed) or not isinstance(source.tokens, GaussianTokens):
        return None
    if operation is source:
        return Isotropic(constant(source.tokens.std**2 / count), width)
    vector = network.vector(place)
    if not isinstance(vector, Normalised):
        return None
    rest, square = 1 - 1 / count, vector.mean_square
    spread = 2 * rest / vector.n + square.central(2) / count
    third = 8 * rest * (1 - 2 / count) / vector.n**2
    dropped = cdf_effect(3) * abs(third - 2 * (2 * rest / vector.n) ** 2)
    return OfNorm(matched(square.mean / count, spread), vector.norm_dropped + dropped)


@vector_of.register
def _(operation: Activate, network: Network) -> Vector:
    """phi of a Gaussian of random variance."""
    before = network.isotropic(operation.inputs[0])
    return Units(
        before.variance, operation.function, network.width(operation.place), False, before.dropped
    )


@vector_of.register
def _(operation: Multiply, network: Network) -> Vector:
    """phi(G) U with G and U independent given the input that both were mapped from."""
    opened, linear = (network.places[name] for name in operation.inputs)
    gate = network.places[opened.inputs[0]] if isinstance(opened, Activate) else opened
    if (
        not isinstance(opened, Activate)
        or not isinstance(linear, Linear)
        or gate.inputs != linear.inputs
    ):
        return network.gaussian(operation.place)
    before = network.isotropic(linear.place)
    same = before.variance.mean == network.isotropic(gate.place).variance.mean
    if not same:
        return network.gaussian(operation.place)
    width = network.width(operation.place)
    return Units(before.variance, opened.function, width, True, 2 * before.dropped)


@vector_of.register
def _(operation: Add, network: Network) -> Vector:
    """Given the input, the branch is Gaussian: variances add, as independent ones.

    They are independent where the branch reads the stream through a norm with eps = 0 and the
    stream are tokens or the branch does not mix positions.  Elsewhere their correlation is taken
    to be 1 in the remainder.
    """
    stream, branch = (network.isotropic(name) for name in operation.inputs)
    added = branch.variance.scaled(operation.scale**2)
    variance = stream.variance.plus(added)
    share = added.mean / variance.mean
    dropped = (1 - share) * stream.dropped + share * branch.dropped
    if not _independent(operation, network):
        stream_spread = stream.variance.central(2) + 2 / stream.width
        common = 2 * np.sqrt(stream_spread * added.central(2)) * share * (1 - share)
        dropped += cdf_effect(2) * common
    return Isotropic(variance, stream.width, float(dropped))


def _independent(operation: Add, network: Network) -> bool:
    """Whether the branch's variance is independent of the stream."""
    stream, branch = operation.inputs
    before = {o.place for o in network.architecture.upstream(stream)}
    own = [o for o in network.architecture.upstream(branch) if o.place not in before]
    readers = [o for o in own if before.intersection(o.inputs)]
    normed = all(isinstance(o, Normalise) and not o.eps for o in readers)
    alone = not any(isinstance(o, Mix | Average) for o in own)
    tokens = isinstance(network.places[stream], Embed) and network.turns(branch)
    return normed and (alone or tokens)


# -------------------------------------------------------------------------------- logits


def logit_family(operation: Scores, network: Network) -> tuple[Family, float]:
    """A logit is |q| |k| cos/sqrt(d_h): given V_q and V_k, N(0, V_q V_k chi^2_(d_h)/d_h).

    Of a random key among those that the query at this position sees, itself included; a key that
    holds the query's token has its norm.
    """
    query, key = (network.isotropic(name) for name in operation.inputs)
    norms, dropped = _norms(operation, query, key, network)
    family = mixture_family(norms.times(chi_square(float(operation.d_head))))
    if norms.freedom != np.inf:
        return family, dropped
    density, moments = laws.variance_gamma(d_h, s**2), laws.variance_gamma_moments(d_h, s**2)
    parameters = {"d_h": float(operation.d_head), "s": float(np.sqrt(norms.mean))}
    return replace(family, density=density, moments=moments, parameters=parameters), dropped


def _norms(
    operation: Scores, query: Isotropic, key: Isotropic, network: Network
) -> tuple[RandomVariance, float]:
    """V_q V_k, and what is dropped."""
    seen, dropped = network.seen(operation.causal), query.dropped + key.dropped
    if query.variance.freedom == key.variance.freedom == np.inf:
        return query.variance.times(key.variance), dropped
    if network.mixes_positions(operation.place):
        keys = network.predicted(operation.inputs[1]).values[:seen]
        norms = query.variance.times(RandomVariance(keys, np.full(seen, 1 / seen)))
        spreads = [network.norm_spread(place) for place in operation.inputs]
        return norms, dropped + cdf_effect(2) * (sum(spreads) + 2 * np.sqrt(np.prod(spreads)))
    others = query.variance.times(key.variance)
    if len(query.variance.values) != len(key.variance.values):
        return others, dropped
    own = RandomVariance(query.variance.values * key.variance.values, query.variance.weights)
    same = collision_matrix(network.architecture.tokens, network.architecture.n_ctx)
    return either(others, own, float(same[network.position - 1, :seen].mean())), dropped
