"""The one registry of symbols: one name, one meaning, one set of assumptions.

Two SymPy symbols of one name and different assumptions are different, and a `subs` between
them silently does nothing.  So every expression here is written in these objects, and every
call, `subs` and command line goes by name.  `d_model`, `n_heads`, `n_ctx`, `d_head` are
aliases of d, H, L, d_h.

>>> symbol("n_heads")
H
>>> describe(symbol("sigma")).meaning
'standard deviation of every weight matrix'
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import sympy as sp


@dataclass(frozen=True)
class Domain:
    """Where a symbol may lie; `contains` checks numbers and arrays elementwise."""

    text: str
    low: float
    high: float
    integer: bool = False
    open_low: bool = False

    def contains(self, values: Any) -> bool:
        array = np.asarray(values, dtype=float)
        inside = np.isfinite(array) & (array <= self.high)
        inside &= (array > self.low) if self.open_low else (array >= self.low)
        if self.integer:
            inside &= array == np.round(array)
        return bool(inside.all())

    @property
    def assumptions(self) -> Mapping[str, bool]:
        if self.integer:
            return {"integer": True, ("positive" if self.low > 0 else "nonnegative"): True}
        if self.low >= 0:
            return {"positive": True} if self.open_low else {"nonnegative": True}
        return {"real": True}


COUNT = Domain("positive integer", 1, np.inf, integer=True)
WHOLE = Domain("non-negative integer", 0, np.inf, integer=True)
PROBABILITY = Domain("in [0, 1]", 0, 1)
POSITIVE = Domain("positive", 0, np.inf, open_low=True)
NON_NEGATIVE = Domain("non-negative", 0, np.inf)
CORRELATION = Domain("in [-1, 1]", -1, 1)
REAL = Domain("real", -np.inf, np.inf)


@dataclass(frozen=True)
class Described:
    """A symbol with its meaning, unit and domain."""

    symbol: sp.Symbol
    meaning: str
    domain: Domain
    unit: str = "1"
    aliases: tuple[str, ...] = ()
    latex: str = ""

    @property
    def name(self) -> str:
        return str(self.symbol.name)


REGISTRY: dict[str, Described] = {}
_ALIASES: dict[str, str] = {}


def _register(
    name: str,
    meaning: str,
    domain: Domain,
    unit: str = "1",
    aliases: tuple[str, ...] = (),
    latex: str = "",
) -> sp.Symbol:
    created = sp.Symbol(name, **domain.assumptions)
    REGISTRY[name] = Described(created, meaning, domain, unit, aliases, latex)
    _ALIASES.update({name: name, **dict.fromkeys(aliases, name)})
    return created


def symbol(name: str) -> sp.Symbol:
    """The symbol called `name` or aliased so; `LookupError` names the known ones."""
    if name not in _ALIASES:
        known = ", ".join(sorted(_ALIASES))
        raise LookupError(f"expected a registered symbol, got {name!r}; known: {known}")
    return REGISTRY[_ALIASES[name]].symbol


def describe(of: sp.Symbol) -> Described:
    """What the registry says of a symbol; `LookupError` for one that is not registered."""
    entry = REGISTRY.get(of.name)
    if entry is None or entry.symbol != of:
        raise LookupError(f"expected a registered symbol, got {of!r}; use theory.symbols.symbol")
    return entry


d = _register("d", "width of the residual stream", COUNT, "coordinates", ("d_model",))
d_h = _register("d_h", "width of one head, d/H", COUNT, "coordinates", ("d_head",))
d_ff = _register("d_ff", "hidden width of the MLP", COUNT, "coordinates")
H = _register("H", "number of heads", COUNT, "heads", ("n_heads",))
L = _register("L", "number of positions", COUNT, "positions", ("n_ctx",))
m = _register("m", "a position, counted from 1", COUNT, "positions")
n = _register("n", "another position, counted from 1", COUNT, "positions")
i = _register("i", "a position summed over, or the last of a triple j < k < i", COUNT, "positions")
j = _register("j", "a position summed over, or the first of a triple", COUNT, "positions")
k = _register("k", "the middle position of a triple", COUNT, "positions")
sigma = _register("sigma", "standard deviation of every weight matrix", NON_NEGATIVE)
sigma_q = _register("sigma_q", "standard deviation of W_Q", NON_NEGATIVE)
sigma_k = _register("sigma_k", "standard deviation of W_K", NON_NEGATIVE)
sigma_v = _register("sigma_v", "standard deviation of W_V", NON_NEGATIVE)
sigma_o = _register("sigma_o", "standard deviation of W_O", NON_NEGATIVE)
sigma_1 = _register("sigma_1", "standard deviation of W_in of the MLP", NON_NEGATIVE)
sigma_2 = _register("sigma_2", "standard deviation of W_out of the MLP", NON_NEGATIVE)
sigma_b = _register("sigma_b", "standard deviation of the biases", NON_NEGATIVE)
sigma_x = _register("sigma_x", "standard deviation of a token's coordinate", POSITIVE)
eps = _register("epsilon", "what a norm adds to the variance", NON_NEGATIVE, aliases=("eps",))
s = _register("s", "standard deviation of a scaled logit", NON_NEGATIVE)
rho = _register("rho", "correlation of a pair of coordinates", CORRELATION)
a = _register("a", "variance of the first of a Gaussian pair", NON_NEGATIVE)
b = _register("b", "variance of the second of a Gaussian pair", NON_NEGATIVE)
c = _register("c", "covariance of a Gaussian pair", REAL)
d_eff = _register(
    "d_eff",
    "effective width: d over the number of Gaussian maps",
    POSITIVE,
    latex=r"d_{\mathrm{eff}}",
)
ell = _register("ell", "number of layers", WHOLE, "layers", ("n_layers",), r"\ell")
beta = _register("beta", "gain of one layer's branch", REAL)
g = _register("g", "gain of the value path, d^2 sigma_v^2 sigma_o^2", NON_NEGATIVE)
kappa = _register("kappa", "gain over the variance of a token, g/sigma_x^2", NON_NEGATIVE)
n_vocab = _register("V", "number of tokens in the vocabulary", COUNT, "tokens", ("n_vocab",))
p_2 = _register("p_2", "probability that two positions hold the same token", PROBABILITY)
p_3 = _register("p_3", "probability that three positions hold the same token", PROBABILITY)
p_4 = _register("p_4", "probability that four positions hold the same token", PROBABILITY)
alpha = _register("alpha", "exponent of a Zipf law, p_v ~ v^-alpha", NON_NEGATIVE)
x = _register("x", "value of a coordinate", REAL)
v = _register("v", "variance of a coordinate", NON_NEGATIVE)
nu = _register("nu", "degrees of freedom of a chi-square", POSITIVE)
maps = _register("p", "number of independent random maps behind a place", COUNT, "maps")
M_jj = _register("M_jj", "diagonal entry (j, j) of M = W_O W_V", REAL)
M_j2 = _register(
    "M_j2", "sum over i of M_ji^2, M = W_O W_V", NON_NEGATIVE, latex=r"{(M M^{\top})_{jj}}"
)

tolerance = _register(
    "tolerance", "half-width of a band, as a fraction of its scale", POSITIVE, latex=r"\tau"
)

WEIGHT_STD = {
    "query": sigma_q,
    "key": sigma_k,
    "value": sigma_v,
    "output": sigma_o,
    "mlp_in": sigma_1,
    "mlp_out": sigma_2,
}
"""The symbol for the standard deviation of a weight of each role."""

kappa_x = _register("kappa_x", "kurtosis of a coordinate of a vector", POSITIVE)
nu_x = _register("nu_x", "E|x|^4/(E|x|^2)^2 of a vector", POSITIVE)
kappa_w = _register("kappa_w", "kurtosis of a matrix entry", POSITIVE)
theta_w = _register("theta_w", "E w_i^2 w_j^2/(E w^2)^2 of two entries of a column", POSITIVE)
kappa_b = _register("kappa_b", "kurtosis of the biases", POSITIVE)
p_same = _register(
    "p_same", "probability that a key of a row, its own included, is the query's token", PROBABILITY
)


def _of_roles(letter: str, meaning: str, domain: Domain) -> dict[str, sp.Symbol]:
    """A symbol per role, with the index of the role's standard deviation."""
    indices = {role: std.name.removeprefix("sigma_") for role, std in WEIGHT_STD.items()}
    return {
        role: _register(f"{letter}_{index}", f"{meaning}, role {role}", domain)
        for role, index in indices.items()
    }


KURTOSIS = _of_roles("kappa", "kurtosis of a matrix entry", POSITIVE)
"""The symbol for the kurtosis of an entry of each role's matrix."""

PAIR_MOMENT = _of_roles("theta", "E w_i^2 w_j^2/(E w^2)^2 of two entries of a column", POSITIVE)
"""1 for independent entries and a third of the kurtosis for a Haar matrix, by role."""

UNKNOWN = (kappa_x, v)
"""What no question binds: a prediction in them holds only where they cancel."""
