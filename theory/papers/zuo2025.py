"""Zuo, Guerzhoy, Guerzhoy (COLING 2025, arXiv 2501.00073), similarity of nearby positions.

Statements are transcribed from the abstract and the first author's public research code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

import nope
from nope.questions import Question
from theory.claims import Claim, Setting, best_theory
from theory.formula import Status
from theory.formulas import formula
from theory.predict import Prediction, at, predict
from theory.relations import Ordered

PAPER = "Zuo et al. 2025 (arXiv 2501.00073)"


def claims(setting: Setting) -> Iterator[Claim]:
    """The paper's statements at the sizes of `setting`."""
    law = formula("cosine.uniform")
    uniform = setting.question("blocks.0.attn_out", "cosine", attention="uniform")
    yield Claim(
        "zuo2025.cosine",
        "With uniform attention outputs at n < m have cosine sqrt(n/m): neighbours are alike.",
        f"{PAPER}, adjacency",
        Status.LEADING_ORDER,
        uniform,
        uniform_cosine,
        expected=best_theory,
        assumes=("uniform attention", "large d"),
        asserts=("cosine of attn_out",),
    )
    yield Claim(
        "zuo2025.cosine.softmax",
        "With real softmax attention outputs at n < m still have cosine sqrt(n/m).",
        f"{PAPER}, adjacency, taken at its word for softmax layers",
        Status.PRINTED,
        setting.question("blocks.0.attn_out", "cosine"),
        replace(law, status=Status.PRINTED),
        expected=best_theory,
        asserts=("cosine of attn_out",),
        remark="Softmax adds to the diagonal of the kernel only: by e^(s^2) and a floor.",
    )
    yield Claim(
        "zuo2025.monotone",
        "The cosine decays monotonically with distance: for a query m it grows with n < m.",
        f"{PAPER}, monotone decay",
        Status.LEADING_ORDER,
        uniform,
        uniform_cosine,
        relation=Ordered(),
        expected=best_theory,
        assumes=("uniform attention",),
        asserts=("order of cosines of attn_out",),
    )
    tokens = nope.GaussianTokens(setting.token_std)
    means = nope.prefix_means(setting.d_model, n_ctx=setting.n_ctx, tokens=tokens)
    yield Claim(
        "zuo2025.finite_width",
        "Means of the first m and n of i.i.d. Gaussian vectors have the hypergeometric cosine.",
        f"{PAPER}, adjacency at finite width; derived here",
        Status.EXACT,
        Question(means, nope.init.normal(setting.std), "mean", "cosine"),
        formula("cosine.prefix_means"),
        expected=best_theory,
        assumes=("gaussian tokens",),
        asserts=("cosine of prefix means",),
    )
    variants = ("adjacency_score", "adjacency_score.steps")
    yield Claim(
        "zuo2025.score",
        "The adjacency score of attn.z follows the law of a triple of sample cosines.",
        f"{PAPER}, adjacency probability score, inferred from public research code",
        Status.LEADING_ORDER,
        [setting.question("blocks.0.attn.z", name, attention="uniform") for name in variants],
        predict,
        expected=best_theory,
        assumes=("uniform attention", "d_eff = d/2"),
        asserts=("adjacency score of attn.z",),
    )


def uniform_cosine(question: Question) -> Prediction:
    """sqrt(n/m), with what the finite width changes at the place as its remainder."""
    law, best = formula("cosine.uniform"), predict(question)
    values = at(law, question)
    dropped = np.abs(best.values - values) + best.remainder
    return Prediction(values, dropped, Status.LEADING_ORDER, law)
