"""The residual stream after attention, and its LayerNorm under fixed weights."""

from collections.abc import Iterator

import numpy as np
import sympy as sp

from nope.architecture import decoder
from theory.derivation import derive
from theory.formula import Formula, Status
from theory.formulas.attention import one_sigma
from theory.symbols import M_j2, M_jj, d, m, n, sigma, sigma_x

GAIN = d**2 * sigma**4


def formulas() -> Iterator[Formula]:
    """Kernel, cosine and coordinate variance of y = x + o."""
    architecture = decoder(64, 4, n_ctx=8, d_ff=4, attention="uniform")
    derivation = derive(architecture, None, "blocks.0.resid_mid")
    kernel = one_sigma(derivation.result)
    yield Formula(
        "residual.kernel",
        kernel,
        "Stream and branch are uncorrelated: sigma_x^2 on the diagonal plus the output's kernel.",
        Status.EXACT,
        "chi2023, residual; exact given uniform attention",
        r"\mathbb{E}\langle y_m, y_n\rangle/d",
        derivation=derivation,
    )
    yield Formula(
        "residual.second_moment",
        kernel.subs(n, m),
        "The variance of position m after the residual sum.",
        Status.EXACT,
        "chi2023, residual variance; exact given uniform attention",
        r"\mathbb{E}|y_m|^2/d",
        derivation=derivation,
    )
    normed = derive(architecture, None, "blocks.0.ln2")
    yield Formula(
        "residual.cosine",
        one_sigma(normed.result),
        "Adjacency dilutes once the positions outnumber kappa = d^2 sigma^4/sigma_x^2.",
        Status.LEADING_ORDER,
        "derived here",
        r"\cos(y_m, y_n)",
        remainder=one_sigma(3 / (2 * d) * normed.result * (1 - normed.result**2)),
        derivation=normed,
    )
    total = m * sigma_x**2 + GAIN
    yield Formula(
        "residual.coordinate_variance_printed",
        (m * sigma_x**2 + M_j2) / total,
        "Variance over inputs of coordinate j of LN(y_m) at fixed weights, as recalled.",
        Status.PRINTED,
        "chi2023 Lemma 4, as recalled",
        r"\mathrm{Var}\,\mathrm{LN}(y_m)_j",
    )
    corrected = (m * sigma_x**2 + 2 * sigma_x * M_jj + M_j2) / total
    yield Formula(
        "residual.coordinate_variance",
        corrected,
        "With the cross term: o_m contains e_m itself, so x_m and o_m are correlated.",
        Status.LEADING_ORDER,
        "chi2023 Lemma 4, corrected here",
        r"\mathrm{Var}\,\mathrm{LN}(y_m)_j",
        remainder=sp.Abs(corrected) * 4 * norm_variance(GAIN / total),
    )


def norm_variance(share: sp.Expr) -> sp.Expr:
    """The relative variance 2 tr T^2/(tr T)^2 of |y|^2 for a typical M of Gaussian maps.

    T = (sigma_x + M)(sigma_x + M)' at m = 1, where it is largest, and the branch's `share` s of
    the trace: (2/d) (1 + 4 s (1 - s) + 2 s^2), since tr (M M')^2 = 3 (tr M M')^2/d.  What the
    formula drops is of this order: the norm's fluctuation, and that of tr M M' and tr M.  (Its
    error against the exact integral is half of it on average, at most 3.1 times it: d from 16 to
    128, kappa from 0.1 to 5.)
    """
    return 2 * (1 + 4 * share * (1 - share) + 2 * share**2) / d


def coordinate_variance(M: np.ndarray, token_std: float, position: int) -> np.ndarray:
    """E LN(y_m)_j^2 for every j at fixed M = W_O W_V (columns act), to second order in 1/d.

    y_m = x_m + M mean(e) with e = sqrt(d) P x/|P x| has the exact covariance
    S = sx^2 I + (1/m) [d/(d-1) M P M' + sx c (P M' + M P)],  c = sqrt(d) E|Px| / (sx (d-1)),
    and LN works on P y, of covariance T = P S P.  With Q = |P y|^2/d and tau = tr T / d, the
    delta method for Gaussian y gives
    E (P y)_j^2/Q = T_jj/tau (1 + 2 tr T^2/(d tau)^2) - 2 (T^2)_jj/(d tau^2).  Derived here.
    """
    width, T = len(M), _normed_covariance(M, token_std, position)
    tau = np.trace(T) / width
    squares = np.einsum("ij,ij->i", T, T)
    second_order = 1 + 2 * squares.sum() / (width * tau) ** 2
    return np.asarray(np.diag(T) / tau * second_order - 2 * squares / (width * tau**2))


def norm_fluctuation(M: np.ndarray, token_std: float, position: int) -> float:
    """Relative variance 2 tr T^2/(tr T)^2 of |P y_m|^2 over inputs, T as in coordinate_variance."""
    T = _normed_covariance(M, token_std, position)
    return float(2 * (T * T).sum() / np.trace(T) ** 2)


def _normed_covariance(M: np.ndarray, token_std: float, position: int) -> np.ndarray:
    """T = P S P, the covariance of the centred stream."""
    from scipy.special import gammaln

    width = len(M)
    norm = np.sqrt(2) * np.exp(gammaln(width / 2) - gammaln((width - 1) / 2))
    c = np.sqrt(width) * norm / (width - 1)
    MP = M - M.mean(1, keepdims=True)
    cross = token_std * c * (MP + MP.T)
    S = token_std**2 * np.eye(width) + (width / (width - 1) * MP @ MP.T + cross) / position
    S -= S.mean(1, keepdims=True)
    return np.asarray(S - S.mean(0))
