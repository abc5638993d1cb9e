"""LayerNorm and RMSNorm."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import sympy as sp

from nope.operations import Normalise
from theory import symbols
from theory.fluctuations import Fluctuation, Gram, Passage, Second, curved
from theory.formulas.norm import shrinkage_remainder
from theory.kernel import ZERO, Fidelity, K, Rule, Traits, X
from theory.propagation import LEFT
from theory.rules import rule_for
from theory.symbols import d, m, maps, n

MOST = 0.9
"""Norms that fluctuate more than this count as if they had this relative variance."""


@rule_for.register
def _(operation: Normalise, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """N(m, n) = c K(m, n) / sqrt((c K(m, m) + eps)(c K(n, n) + eps)).

    c = 1 - 1/d is what centring leaves of a variance (1 for RMSNorm).  With eps = 0 the
    diagonal is exactly 1, and so is every i.i.d. token's kernel.  What is dropped off the
    diagonal is E cos - cos E: (1 - rho^2)/(2d) per random map (`cosine.gaussian_pair`), and the
    excess X(m, n) that a softmax adds unless the fidelity is `any_temperature`.  Two tokens of a
    table are one, or point anywhere: E cos is the share of equal ids at any width.  With eps > 0
    the fluctuation of |x|^2 adds `shrinkage_remainder`, and 1 - N(m, m) of it is left.
    """
    before = traits[operation.inputs[0]]
    centring = operation.kind == "layernorm"
    kept = 1 - 1 / d if centring else sp.Integer(1)
    eps = symbols.eps if operation.eps else ZERO
    rho = K(m, n) / sp.sqrt(K(m, m) * K(n, n))
    copies = before.repeated is not None and before.mapped is None
    remainder = ZERO if copies else sp.Abs(rho) * (1 - rho**2) * maps / (2 * d)
    if operation.eps:
        expression = kept * K(m, n) / sp.sqrt((kept * K(m, m) + eps) * (kept * K(n, n) + eps))
        freedom = (sp.Max(d - 1, 1) if centring else d) / maps
        remainder += sp.Abs(rho) * shrinkage_remainder(kept * K(m, m), eps, freedom)
    else:
        expression = rho
    if fidelity == "any_temperature" and not before.independent:
        expression = expression * (1 + X(m, n))
    kurtosis = None
    if before.isotropic and not operation.eps:
        kurtosis = 3 * (d - 1) / (d + 1) if centring else 3 * d / (d + 2)
    return Rule(
        name="LayerNorm" if centring else "RMSNorm",
        statement="The kernel is divided by the root of its diagonal: a norm keeps the cosine.",
        sources=operation.inputs,
        expression=expression,
        assumption="|x|^2/d near its mean (exact on the diagonal when eps = 0)",
        source="derived here; chi2023, section on LayerNorm",
        remainder=remainder,
        traits=Traits(
            maps=before.maps,
            normalised=not operation.eps,
            independent=before.independent,
            repeated=before.repeated,
            slack=(1 - K(m, m)) ** 2 if operation.eps else ZERO,
            centred=centring,
            fresh=before.fresh,
            kurtosis=kurtosis,
            norm_kurtosis=None if operation.eps else sp.Integer(1),
        ),
        fluctuates=partial(_normalises, centring, before.partly_centred, copies),
    )


def _normalises(
    centring: bool, partly_centred: bool, copies: bool, passage: Passage
) -> tuple[Fluctuation, Second]:
    (kernel,), (before,) = passage.kernels, passage.fluctuations
    nothing = np.zeros_like(before.own)
    whole = replace(before, inherited=before.covariance, own=nothing)
    passed, second = curved(whole, kernel, passage.function, nothing)
    if copies:
        term, size = (_of_copies(each, passage.after) for each in (second.term, second.size))
        second = replace(second, term=term, size=size)
    if symbols.eps.name not in passage.numbers:
        return passed, second
    # With an eps, which leaves 1/(1 + eps/v), the orders in the norms fall like their powers.
    left = 1 - 1 / passage.numbers["d"] if centring else 1.0
    norms = (before.covariance[0, 0] + before.covariance[1, 1]) / 2 / left
    series = 1 / (1 - np.minimum(norms, MOST))
    size, after = second.size, passage.after.absolute
    # And no 1/d is left to take of what is centred already: 1 - K of it shows.
    unsure = (1 - left) * partly_centred / LEFT

    def total(beyond: np.ndarray, kept: np.ndarray, mean: np.ndarray) -> np.ndarray:
        return np.asarray(beyond * series + unsure * np.maximum(1 - mean, 0.0) * kept)

    means = after.mm, after.nn, after.size
    parts = zip((size.mm, size.nn, size.mn), (after.mm, after.nn, after.mn), means, strict=True)
    return passed, replace(second, size=Gram(*(total(*part) for part in parts)))


def _of_copies(second: Gram, after: Gram) -> Gram:
    """Of tokens that are one with some probability: relatively as on the diagonal."""
    relative = (second.mm / after.mm + second.nn / after.nn) / 2
    return replace(second, mn=after.mn * relative)
