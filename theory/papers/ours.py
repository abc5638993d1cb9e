"""Results of this project that no paper prints."""

from __future__ import annotations

from collections.abc import Iterator

from theory.claims import Claim, Setting, best_theory
from theory.formula import Status
from theory.formulas import formula
from theory.relations import Identical
from theory.symmetry import theorem

GPT2_EPS = 1e-5

SHARE = 0.05
"""A theorem of every draw is judged on its share of exceptions: none in log(1/alpha)/SHARE."""


def claims(setting: Setting) -> Iterator[Claim]:
    """Our own statements at the sizes of `setting`."""
    yield Claim(
        "ours.layernorm.eps",
        "GPT-2's eps of 1e-5 shrinks a LayerNorm output's second moment to v/(v + eps).",
        "derived here",
        Status.LEADING_ORDER,
        setting.question("blocks.0.ln1", "second_moment", eps=GPT2_EPS),
        formula("layernorm.shrinkage"),
        expected=best_theory,
        assumes=("gaussian tokens",),
        asserts=("second moment of ln1 with eps",),
        remark="Against token_std 0.02 the shrinkage is 2.4%, and 4.8% for a logit's variance.",
    )
    yield from _symmetries(setting)


def _symmetries(setting: Setting) -> Iterator[Claim]:
    """What permuting or equating the inputs does; short and without MLPs, which are pointwise."""
    short = {"n_ctx": min(setting.n_ctx, 32), "d_ff": 0}
    two = {**short, "n_layers": 2}
    asked = {
        "past_permutation": (
            "One causal layer's last output does not see the order of its past.",
            setting.question("ln_final", "past_permutation", **short),
        ),
        "past_permutation.two_layers": (
            "Two causal layers do not see it either.",
            setting.question("blocks.1.attn_out", "past_permutation", **two),
        ),
        "permutation": (
            "Without a mask the whole network is permutation-equivariant.",
            setting.question("ln_final", "permutation", causal=False, **two),
        ),
        "equal_tokens": (
            "The mask alone says nothing: where all tokens are equal, all positions are.",
            setting.question("ln_final", "equal_tokens", **two),
        ),
    }
    for name, (statement, question) in asked.items():
        yield Claim(
            f"ours.{name}",
            statement,
            "derived here",
            Status.EXACT,
            question,
            0.0,
            relation=Identical(),
            band=SHARE,
            expected=best_theory,
            asserts=(f"{question.observable} at {question.place}",),
            remark=f"{theorem(question).reason}.",
        )
