"""Chi, Fan, Chen, Rudnicky, Ramadge (ACL 2023, arXiv 2305.13571), the attention variance.

Statements are transcribed from secondary sources: the PDF could not be read for this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from nope.facts import gain
from nope.questions import Question, Weights, coordinate_grid, given_weights
from theory.bindings import bindings
from theory.claims import Claim, Setting, best_theory
from theory.formula import Status
from theory.formulas import formula
from theory.formulas.stream import coordinate_variance, norm_fluctuation
from theory.predict import Prediction, position_arrays

PAPER = "Chi et al. 2023 (arXiv 2305.13571)"
TRANSCRIBED = "as transcribed from secondary sources"
ATTENTION = "blocks.0.attn"
GAINS = (gain("value"), gain("output"))
"""What Lemma 3 says of two maps: asserted where attention is uniform, which leaves nothing else to
say but 1/m, and assumed where Lemma 3 is taken at its word for softmax."""

COORDINATE_BAND = 0.05
"""Lemma 4's tolerance.  It speaks of single coordinates, whose variance over inputs takes about
2 (z/room)^2 inputs: where the cross term uses half of a 2.5% band, two million of them."""


def claims(setting: Setting) -> Iterator[Claim]:
    """The paper's statements at the sizes of `setting`."""
    yield from _step_by_step(setting)
    yield from _outputs(setting)
    yield from _lemma4(setting)


def _step_by_step(setting: Setting) -> Iterator[Claim]:
    normed = ("second_moment", "kurtosis")
    laws = {
        "second_moment": formula("layernorm.second_moment"),
        "kurtosis": formula("layernorm.kurtosis"),
    }
    yield Claim(
        "chi2023.layernorm",
        "A LayerNorm output's coordinate has second moment 1 and kurtosis 3(d-1)/(d+1).",
        f"{PAPER}, LayerNorm",
        Status.EXACT,
        [setting.question("blocks.0.ln1", observable) for observable in normed],
        lambda question: laws[question.observable],
        expected=best_theory,
        assumes=("gaussian tokens", "eps 0"),
        asserts=("law of ln1",),
    )
    yield Claim(
        "chi2023.lemma1",
        "A coordinate of a query, key or value has variance d sigma^2.",
        f"{PAPER}, Lemma 1",
        Status.EXACT,
        [setting.question(f"{ATTENTION}.{name}", "second_moment") for name in "qkv"],
        formula("attention.qkv_second_moment"),
        expected=best_theory,
        assumes=("iid zero-mean weights",),
        asserts=("variance of q, k, v", *(gain(role) for role in ("query", "key", "value"))),
    )
    logits = setting.question(f"{ATTENTION}.scores", "mean_second_moment")
    yield Claim(
        "chi2023.lemma2.printed",
        "A scaled logit has variance d^2 sigma^4/H.",
        f"{PAPER}, Lemma 2, {TRANSCRIBED}",
        Status.PRINTED,
        logits,
        formula("attention.logit_second_moment_printed"),
        expected=best_theory,
        asserts=("variance of scores",),
        remark="Contradicts Lemma 1, which gives d^2 sigma^4: a factor H too small.",
    )
    yield Claim(
        "chi2023.lemma2.corrected",
        "A scaled logit has variance s^2 = d^2 sigma^4, whatever the number of heads.",
        f"{PAPER}, Lemma 2, corrected from Lemma 1",
        Status.EXACT,
        logits,
        formula("attention.logit_second_moment"),
        expected=best_theory,
        asserts=("variance of scores",),
    )
    yield Claim(
        "chi2023.property1",
        "Softmax attention is uniform at initialisation: its participation is 1/m.",
        f"{PAPER}, Property 1",
        Status.PRINTED,
        setting.question(f"{ATTENTION}.pattern", "participation"),
        formula("attention.uniform_participation"),
        expected=best_theory,
        assumes=("s^2 << 1",),
        asserts=("sum of squared attention weights",),
        remark="The participation of a softmax over logits of variance s^2 grows by e^(s^2).",
    )


def _outputs(setting: Setting) -> Iterator[Claim]:
    output = formula("attention.uniform_second_moment")
    residual = formula("residual.second_moment")
    spread = "Softmax inflates 1/m by e^(s^2) and adds a floor d^2 sigma^4 s^2/d."
    yield Claim(
        "chi2023.lemma3",
        "With uniform attention an output coordinate at position m has variance d^2 sigma^4/m.",
        f"{PAPER}, Lemma 3",
        Status.EXACT,
        setting.question("blocks.0.attn_out", "second_moment", attention="uniform"),
        output,
        expected=best_theory,
        assumes=("uniform attention",),
        asserts=("variance of attn_out", *GAINS),
    )
    yield Claim(
        "chi2023.lemma3.softmax",
        "With real softmax attention the variance at position m is still d^2 sigma^4/m.",
        f"{PAPER}, Lemma 3, taken at its word for softmax layers",
        Status.PRINTED,
        setting.question("blocks.0.attn_out", "second_moment"),
        replace(output, status=Status.PRINTED),
        expected=best_theory,
        assumes=GAINS,
        asserts=("variance of attn_out",),
        remark=spread,
    )
    yield Claim(
        "chi2023.covariance",
        "With uniform attention outputs at m and n have covariance d^2 sigma^4/max(m, n).",
        f"{PAPER}, Lemma 3, covariance",
        Status.EXACT,
        setting.question("blocks.0.attn_out", "kernel", attention="uniform"),
        formula("attention.uniform_covariance"),
        expected=best_theory,
        assumes=("uniform attention",),
        asserts=("covariance of attn_out", *GAINS),
    )
    yield Claim(
        "chi2023.residual",
        "With uniform attention the stream after it has variance sigma_x^2 + d^2 sigma^4/m.",
        f"{PAPER}, residual variance",
        Status.EXACT,
        setting.question("blocks.0.resid_mid", "second_moment", attention="uniform"),
        residual,
        expected=best_theory,
        assumes=("uniform attention",),
        asserts=("variance of resid_mid", *GAINS),
    )
    yield Claim(
        "chi2023.residual.softmax",
        "With real softmax attention the stream after it has variance sigma_x^2 + d^2 sigma^4/m.",
        f"{PAPER}, residual variance, taken at its word for softmax layers",
        Status.PRINTED,
        setting.question("blocks.0.resid_mid", "second_moment"),
        replace(residual, status=Status.PRINTED),
        expected=best_theory,
        assumes=GAINS,
        asserts=("variance of resid_mid",),
        remark=f"{spread} Wide streams (sigma_x^2 >> d^2 sigma^4) hide both.",
    )


def _lemma4(setting: Setting) -> Iterator[Claim]:
    question = setting.question(
        "blocks.0.ln2",
        "coordinate_second_moment",
        given=Weights(seed=0),
        attention="uniform",
        n_ctx=min(setting.n_ctx, 2),
    )
    kappa = (setting.d_model * setting.std**2 / setting.token_std) ** 2
    size = 2 * kappa**0.5 / (1 + kappa) / setting.d_model**0.5
    cross = (
        f"The cross term 2 sigma_x M_jj has a standard deviation of {size:.2%} of the variance at "
        f"m = 1 (kappa = d^2 sigma^4/sigma_x^2 = {kappa:.3g}).  It is largest at kappa = 1, "
        f"where token_std is {setting.d_model * setting.std**2:.4g}.  Judged at the first "
        "positions, on at most 16 coordinates."
    )
    yield Claim(
        "chi2023.lemma4.printed",
        "At fixed weights LN(y_m)_j has variance (m sx^2 + sum_i M_ji^2)/(m sx^2 + d^2 sigma^4).",
        f"{PAPER}, Lemma 4, as recalled",
        Status.PRINTED,
        question,
        lambda asked: _lemma4_values(asked, "residual.coordinate_variance_printed"),
        band=COORDINATE_BAND,
        expected=second_order_lemma4,
        assumes=("uniform attention", "given weights"),
        asserts=("variance of ln2 over inputs",),
        remark=cross,
    )
    yield Claim(
        "chi2023.lemma4.corrected",
        "At fixed weights LN(y_m)_j has variance "
        "(m sx^2 + 2 sx M_jj + sum_i M_ji^2)/(m sx^2 + d^2 sigma^4).",
        f"{PAPER}, Lemma 4, with the cross term",
        Status.LEADING_ORDER,
        question,
        lambda asked: _lemma4_values(asked, "residual.coordinate_variance", remainder=True),
        band=COORDINATE_BAND,
        expected=second_order_lemma4,
        assumes=("uniform attention", "given weights"),
        asserts=("variance of ln2 over inputs",),
        remark=cross,
    )


# ------------------------------------------------------------------------------- numbers


def _value_map(question: Question) -> np.ndarray:
    """M = W_O W_V acting on columns, of the weights that the question fixes."""
    weights = given_weights(question)
    product: np.ndarray = weights[f"{ATTENTION}.W_V"] @ weights[f"{ATTENTION}.W_O"]
    return product.T


def _lemma4_values(question: Question, name: str, remainder: bool = False) -> Prediction:
    """A form of Lemma 4 on the question's positions and coordinates."""
    law, M = formula(name), _value_map(question)
    known = bindings(question.architecture, question.init)
    coordinates = coordinate_grid(question.architecture.d_model)
    symbols = {
        "d": known["d"],
        "sigma": known["sigma"],
        "sigma_x": known["sigma_x"],
        "m": position_arrays(question)[0],
        "M_jj": np.diag(M)[coordinates],
        "M_j2": (M**2).sum(1)[coordinates],
    }
    values = law(**{symbol: symbols[symbol] for symbol in law.symbols})
    dropped = np.zeros(question.shape)
    if remainder:
        better = second_order_lemma4(question)
        dropped = np.abs(better.values - values) + better.remainder
    return Prediction(values, dropped, law.status, law)


def second_order_lemma4(question: Question) -> Prediction:
    """Lemma 4 from the exact covariance of y and the norm's fluctuation to order 1/d.

    Its remainder is the next order's size: delta^(3/2) of the value, delta the relative
    variance of |y|^2 over inputs, about 6/d.  (Found to hold against the exact integral at
    m = 1 for d from 16 to 256: the error is at most 0.62 of it.)
    """
    M, std = _value_map(question), question.architecture.tokens.std
    coordinates = coordinate_grid(len(M))
    rows = [coordinate_variance(M, std, m + 1)[coordinates] for m in range(question.shape[0])]
    values = np.stack(rows)
    delta = [norm_fluctuation(M, std, m + 1) for m in range(question.shape[0])]
    return Prediction(values, values * np.array(delta)[:, None] ** 1.5, Status.LEADING_ORDER)
