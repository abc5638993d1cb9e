"""Results of this project that no paper prints."""

from __future__ import annotations

from collections.abc import Iterator

from theory.claims import Claim, Setting, best_theory
from theory.formula import Status
from theory.formulas import formula

GPT2_EPS = 1e-5


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
