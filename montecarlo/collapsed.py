"""The collapsed sampler: images of L tokens from L rows of normals instead of fan_in.

**The law.**  Let X (L x d) hold the inputs of a map as rows, and W (d x d') have independent
N(0, s^2) entries, independent of X.  Factor X = R Q, R (L x r) lower triangular, Q (r x d) with
orthonormal rows, r = min(L, d); both are functions of X alone.  Given X, the columns of W are
independent N(0, s^2 I_d), so those of G = Q W are independent N(0, s^2 Q Q') = N(0, s^2 I_r):

    X W = R (Q W) = R G,    G an r x d' matrix of independent N(0, s^2), independent of X.

That is an equality in law *given X*, of the whole L x d' matrix, coordinates and heads included:
no limit and no moment matching.  It reads X through R R' = X X' only, the Gram matrix, which fixes
R up to the signs of its columns, and these leave the law of R G alone; so X may have equal, zero or
dependent rows.  Queries, keys and values read one X: W_Q, W_K, W_V are independent, hence so are
Q W_Q, Q W_K, Q W_V given X, and one R serves all three.

**Through a network.**  Apply this to the maps in order of computation.  Each time, all values so
far are functions of the inputs and of earlier weights, of which W is independent; given them the
law of X W is that of R G; whatever follows is a function of what was drawn.  By induction the
joint law of all places is that of the real layers, as long as no weight is used at two places
(a second use would have to be drawn given the first) and none is given.  Biases are added as drawn,
and a weight that is not Gaussian or has fan_in <= L is drawn itself.

**What is lost.**  The coupling of two looks at one draw: R of permuted rows is another R, so a
symmetry, which compares two inputs under the same weights, is left to the real sampler.  And equal
rows have equal images to rounding only, where a strict comparison of tied cosines is a toss.

R is that of a Householder QR of X': R R' is the Gram matrix of rows within rounding of X's,
whatever their rank.  (A Cholesky factor of X X' squares the condition number, so it would need
float64 and a way out for equal tokens, and it takes longer: 3.1 ms against 2.3 at d = 4096,
L = 128, and 11.9 against 6.4 at d = 768, L = 512, on the CPU that the benchmarks name.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nope.architecture import Architecture
from nope.checks import expect, expect_choice
from nope.init import Scheme, law_of
from nope.operations import Linear, Weight
from nope.questions import Question

SAMPLERS = ("real", "collapsed", "auto")

STRICT = ("adjacency_score", "adjacency_score.steps", "adjacency_score.norm")
"""Observables that count strict inequalities, and so see whether equal tokens are exactly equal."""


def factor(x: Float[Tensor, "draws rows d"]) -> Float[Tensor, "draws rows rank"]:
    """R of X = R Q: lower triangular, `rank` = min(rows, d), R R' = X X'."""
    R: Tensor = torch.linalg.qr(x.transpose(1, 2), mode="r").R
    return R.transpose(1, 2)


@dataclass
class Collapsed:
    """A `nope.transformer.Product`: R G for Gaussian weights, x W for the others.

    `draw` gives entries of a weight's law, in one array of a shape per draw, from the stream of
    its path.
    """

    architecture: Architecture
    init: Scheme
    draw: Callable[[Weight, tuple[int, ...]], Tensor]
    factors: dict[str, Tensor] = field(default_factory=dict)

    def __call__(self, x: Tensor, linear: Linear) -> Tensor:
        rows, weight = x.shape[1], linear.weight
        if not collapses(weight, rows, self.architecture, self.init):
            return torch.bmm(x, self.draw(weight, weight.shape))
        G = self.draw(weight, (rows, weight.fan_out))
        return torch.bmm(self._factor(x, linear.inputs[0]), G)

    def _factor(self, x: Tensor, place: str) -> Tensor:
        """That of the place's values; the maps that read one place follow each other."""
        if place not in self.factors:
            self.factors = {place: factor(x)}
        return self.factors[place]


def collapses(weight: Weight, rows: int, architecture: Architecture, init: Scheme) -> bool:
    """Whether a map of so many tokens is drawn as R G: a Gaussian one that is wider than long."""
    law: Any = law_of(init, weight, architecture)
    return rows < weight.fan_in and law.independent and law.gaussian


# ------------------------------------------------------------------------- when it is used


def reason_not_collapsed(question: Question) -> str | None:
    """Why a question needs the real sampler, or None."""
    tokens = question.architecture.tokens
    uses = Counter(weight.path for weight in question.architecture.weights)
    if question.given is not None:
        return "its weights are given"
    if question.kind.transform is not None:
        return f"{question.observable} looks at the same weights twice"
    if max(uses.values(), default=1) > 1:
        return f"{max(uses, key=uses.__getitem__)} is used at more than one place"
    if question.observable in STRICT and tokens.weights(question.architecture.d_model):
        return f"{question.observable} compares tokens that may be equal"
    return None


def chosen(question: Question, sampler: str, device: str, inputs: int = 1) -> str:
    """The sampler that answers a question: `real`, `collapsed`, or where `auto` what is faster.

    Raises `ValueError` for another name, and where `collapsed` cannot answer.
    """
    expect_choice("sampler", sampler, SAMPLERS)
    reason = reason_not_collapsed(question)
    if sampler == "auto":
        faster = pays(question.architecture, question.init, device, inputs)
        return "collapsed" if reason is None and faster else "real"
    allowed = sampler == "real" or reason is None
    expect(allowed, "a question for the collapsed sampler", reason, "use sampler='auto' or 'real'")
    return sampler


NORMAL = 240
"""What drawing a normal takes, in floating point operations of a matrix product.

400 million normals and 96 billion operations a second on one thread of the machine that the
benchmarks name; elsewhere a wrong figure costs time only."""
FACTOR = 3
"""How much longer an operation of a QR takes than one of a product."""
CALL = 2**17
"""What starting a QR takes, in operations."""
MARGIN = 1.5
"""The collapsed sampler is used where it is expected to be so many times as fast."""


def pays(architecture: Architecture, init: Scheme, device: str, inputs: int = 1) -> bool:
    """Whether all maps take less time collapsed.  Nothing is known of accelerators."""
    real, collapsed = (
        cost(architecture, init, sampler, inputs) for sampler in ("real", "collapsed")
    )
    return device == "cpu" and real > MARGIN * collapsed


def cost(architecture: Architecture, init: Scheme, sampler: str, inputs: int = 1) -> float:
    """What the maps take in one draw of the weights, in operations of a product."""
    rows = inputs * architecture.n_ctx
    factors: dict[str, float] = {}
    total = 0.0
    for linear in (o for o in architecture.operations if isinstance(o, Linear)):
        weight, drawn = linear.weight, linear.weight.fan_in
        if sampler == "collapsed" and collapses(weight, rows, architecture, init):
            factors[linear.inputs[0]] = CALL + FACTOR * 2.0 * weight.fan_in * rows**2
            drawn = rows
        total += drawn * weight.fan_out * (NORMAL + 2.0 * rows)
    return total + sum(factors.values())
