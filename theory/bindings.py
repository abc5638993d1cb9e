"""The numbers that a question gives to the symbols of the theory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nope.architecture import Architecture
from nope.init import Orthogonal, Scheme, WeightLaw, law_of
from nope.operations import Linear, Mix, Normalise, Operation, Scores, Softmax
from nope.tokens import EmbeddingTokens
from theory.formulas.tokens import power_sum
from theory.symbols import KURTOSIS, PAIR_MOMENT, WEIGHT_STD

Numbers = Mapping[str, float]


def local_bindings(architecture: Architecture, init: Scheme) -> dict[str, Numbers]:
    """For each place the value of every symbol that its rule may read, positions aside."""
    shared = _shared(architecture)
    return {
        operation.place: {**shared, **_own(operation, architecture, init)}
        for operation in architecture.operations
    }


def bindings(architecture: Architecture, init: Scheme, places: Iterable[str] = ()) -> Numbers:
    """The value of every symbol, positions aside, of these places together (of all by default).

    Raises `NotImplementedError` where a symbol has two values, as that for the weights of one
    role may in a stack of unlike layers.
    """
    found = local_bindings(architecture, init)
    values: dict[str, float] = {}
    for place in tuple(places) or architecture.places():
        for name, value in found[place].items():
            if values.setdefault(name, value) != value:
                raise NotImplementedError(
                    f"expected one value of {name} in an architecture, got {values[name]} and "
                    f"{value}; ask layer by layer"
                )
    stds = {values[s.name] for s in WEIGHT_STD.values() if s.name in values}
    if len(stds) == 1:
        (values["sigma"],) = stds
    if "sigma_q" in values and "sigma_k" in values:
        values["s"] = architecture.d_model * values["sigma_q"] * values["sigma_k"]
    if "sigma_v" in values and "sigma_o" in values:
        values["g"] = (architecture.d_model * values["sigma_v"] * values["sigma_o"]) ** 2
        values["kappa"] = values["g"] / values["sigma_x"] ** 2
    return values


def _shared(architecture: Architecture) -> dict[str, float]:
    tokens = architecture.tokens
    values: dict[str, float] = {
        "d": architecture.d_model,
        "H": architecture.n_heads,
        "L": architecture.n_ctx,
        "d_h": architecture.d_model // architecture.n_heads,
        "sigma_x": tokens.std,
    }
    if isinstance(tokens, EmbeddingTokens):
        values |= {"V": tokens.vocabulary, "p_2": power_sum(tokens, 2)}
    return values


def _own(operation: Operation, architecture: Architecture, init: Scheme) -> dict[str, float]:
    """What the operation's own weights, heads and eps give, and those of what it mixes."""
    values = _of_weights(operation, architecture, init)
    match operation:
        case Linear(weight=weight) if weight.role == "mlp_out":
            values["d_ff"] = weight.fan_in
        case Normalise(eps=eps) if eps:
            values["epsilon"] = eps
        case Scores(d_head=d_head):
            values |= {"d_h": d_head, "H": architecture.d_model // d_head}
        case Softmax(inputs=(scores,)):
            values |= _behind_logits(architecture, init, scores)
        case Mix(inputs=(pattern, source)):
            if isinstance(softmax := architecture.places()[pattern], Softmax):
                values |= _behind_logits(architecture, init, softmax.inputs[0])
            of_values = architecture.places()[source]
            values |= _of_weights(of_values, architecture, init)
            heads = (of_values.n_heads if isinstance(of_values, Linear) else None) or 1
            values |= {"d_h": architecture.d_model // heads, "H": heads}
        case _:
            pass
    return values


def _behind_logits(architecture: Architecture, init: Scheme, scores: str) -> dict[str, float]:
    """The moments of the matrices of queries and keys."""
    places = (architecture.places()[place] for place in architecture.places()[scores].inputs)
    return {
        name: value
        for place in places
        for name, value in _of_weights(place, architecture, init).items()
    }


def _of_weights(operation: Operation, architecture: Architecture, init: Scheme) -> dict[str, float]:
    values: dict[str, float] = {}
    for weight in operation.weights:
        if weight.role == "embedding":
            continue  # its law is that of the tokens, sigma_x
        law = law_of(init, weight, architecture)
        symbol = WEIGHT_STD[weight.role].name if weight.role in WEIGHT_STD else "sigma_b"
        values[symbol] = law.variance**0.5
        values |= _fourth_moments(weight.role, law)
    return values


def _fourth_moments(role: str, law: WeightLaw) -> dict[str, float]:
    """The entries' kurtosis, and their pair moment where it is known: independent or Haar.

    Of weights that are 0 those of N(0, 0), as in `WeightLaw.gaussian`.
    """
    kurtosis = 3.0 if law.gaussian else law.kurtosis
    if role not in KURTOSIS:
        return {"kappa_b": kurtosis} if law.independent else {}
    values = {KURTOSIS[role].name: kurtosis}
    if law.independent or isinstance(law, Orthogonal):
        values[PAIR_MOMENT[role].name] = 1.0 if law.independent else kurtosis / 3
    return values
