"""Input tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import sympy as sp

from nope.operations import Embed
from nope.tokens import EmbeddingTokens, GaussianTokens, Tokens, WithBos
from theory.formulas.tokens import collision_matrix
from theory.kernel import Fidelity, Moved, Rule, Traits
from theory.rules import rule_for
from theory.symbols import d, m, n, p_2, sigma_x

SAME = sp.KroneckerDelta(m, n)
R = sp.Function("R")
"""R(m, n): the measured share of a text's windows whose positions m and n are equal."""

COORDINATE = Traits(
    maps=1, isotropic=True, kurtosis=sp.Integer(3), norm_kurtosis=1 + sp.Integer(2) / d
)
"""A coordinate is N(0, sigma_x^2): kurtosis 3 and E|x|^4/(E|x|^2)^2 = 1 + 2/d."""


@rule_for.register
def _(operation: Embed, traits: Mapping[str, Traits], fidelity: Fidelity) -> Rule:
    """K(m, n) = sigma_x^2 P(positions m and n hold the same token)."""
    match operation.tokens:
        case GaussianTokens() | WithBos(GaussianTokens()):  # a BOS is one more, of the weights
            return Rule(
                name="i.i.d. Gaussian tokens",
                statement="Positions are independent, one coordinate has variance sigma_x^2.",
                sources=(),
                expression=sigma_x**2 * SAME,
                assumption="x_m ~ N(0, sigma_x^2 I), independent over positions",
                source="definition",
                traits=replace(COORDINATE, independent=True),
            )
        case EmbeddingTokens():
            return Rule(
                name="rows of an embedding table",
                statement="Two positions hold the same row with probability p_2 = sum_v p_v^2.",
                sources=(),
                expression=sigma_x**2 * (SAME + (1 - SAME) * p_2),
                assumption="rows N(0, sigma_x^2 I), ids i.i.d.",
                source="derived here",
                traits=replace(COORDINATE, repeated=operation.tokens),
            )
        case tokens:
            return Rule(
                name="measured repetition",
                statement="How often positions m and n hold the same token is counted.",
                sources=(),
                expression=sigma_x**2 * R(m, n),
                assumption="rows N(0, sigma_x^2 I); every window of the text equally likely",
                source="counted in the text",
                traits=replace(COORDINATE, repeated=tokens),
                algorithm=partial(_counted, tokens),
            )


def _counted(
    tokens: Tokens,
    kernels: Sequence[np.ndarray],
    dropped: np.ndarray,
    symbols: Mapping[str, float],
    n_ctx: int,
) -> Moved:
    kernel = symbols["sigma_x"] ** 2 * collision_matrix(tokens, n_ctx)
    return Moved(kernel, np.zeros_like(kernel))
