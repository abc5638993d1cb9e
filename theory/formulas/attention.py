"""One attention layer over i.i.d. tokens: derived by the kernel calculus, and what is printed.

All weights have one standard deviation sigma here, as in the papers; `theory.derive` keeps
them apart.
"""

from collections.abc import Iterator

import sympy as sp

from nope.architecture import decoder
from nope.layers import AttentionKind
from theory.derivation import derive
from theory.formula import Formula, Status
from theory.symbols import WEIGHT_STD, H, d, d_h, m, n, sigma


def one_sigma(expr: sp.Expr) -> sp.Expr:
    """The expression with every weight's standard deviation called sigma."""
    return expr.subs(dict.fromkeys(WEIGHT_STD.values(), sigma))


def derived(
    name: str, place: str, statement: str, source: str, left: str, diagonal: bool = False
) -> Formula:
    """The kernel at a place of a one-layer decoder with uniform attention (softmax for scores)."""
    kind: AttentionKind = "softmax" if "scores" in place else "uniform"
    derivation = derive(decoder(64, 4, n_ctx=8, d_ff=0, attention=kind), None, place)
    kernel = derivation.result.subs({n: m}) if diagonal else derivation.result
    return Formula(
        name, one_sigma(kernel), statement, Status.EXACT, source, left, derivation=derivation
    )


def formulas() -> Iterator[Formula]:
    """Moments of queries, keys, values, logits, patterns and outputs."""
    yield derived(
        "attention.qkv_second_moment",
        "blocks.0.attn.v",
        "A coordinate of a query, key or value is N(0, d sigma^2).",
        "chi2023 Lemma 1",
        r"\mathbb{E}\,q_m^2",
        diagonal=True,
    )
    yield derived(
        "attention.logit_second_moment",
        "blocks.0.attn.scores",
        "A scaled logit has variance s^2 = d^2 sigma^4, whatever the number of heads.",
        "chi2023 Lemma 2, corrected here",
        r"\mathbb{E}\,l_{mn}^2",
    )
    yield Formula(
        "attention.logit_second_moment_printed",
        d**2 * sigma**4 / H,
        "The scaled logit's variance as printed: d^3 sigma^4/H^2 before the scale 1/sqrt(d/H).",
        Status.PRINTED,
        "chi2023 Lemma 2, as transcribed from secondary sources",
        r"\mathbb{E}\,l_{mn}^2",
    )
    yield Formula(
        "attention.logit_kurtosis",
        3 + 6 / d_h,
        "A scaled logit is a sum of d_h products of Gaussians: symmetric variance-gamma.",
        Status.EXACT,
        "derived here, for Gaussian weights",
        r"\mathbb{E}\,l_{mn}^4/(\mathbb{E}\,l_{mn}^2)^2",
    )
    yield Formula(
        "attention.uniform_participation",
        1 / m,
        "Uniform attention over m positions has a sum of squared weights of 1/m.",
        Status.PRINTED,
        "chi2023 Property 1",
        r"\mathbb{E}\sum_n a_{mn}^2",
    )
    yield derived(
        "attention.uniform_covariance",
        "blocks.0.attn_out",
        "Outputs of uniform attention share a prefix: the covariance is the longer one's variance.",
        "chi2023, covariance",
        r"\mathbb{E}\langle o_m, o_n\rangle/d",
    )
    yield derived(
        "attention.uniform_second_moment",
        "blocks.0.attn_out",
        "The output of uniform attention is a mean of m values: its variance falls as 1/m.",
        "chi2023 Lemma 3",
        r"\mathbb{E}|o_m|^2/d",
        diagonal=True,
    )
