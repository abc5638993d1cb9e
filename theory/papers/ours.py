"""Results of this project that no paper prints, each held against real layers.

Claims on one layer are asked at the sizes of the setting.  Stacks, tokens and schemes are asked at
small sizes of their own (`Small`), so that a run stays short: what they claim is the calculus,
at any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

import nope
from nope.architecture import Architecture
from nope.facts import gain
from nope.init import Scheme
from nope.layers import Attention, Residual, Sequence
from nope.questions import Question
from theory.claims import Claim, Setting, best_theory
from theory.formula import Status
from theory.formulas import formula
from theory.laws import quantile_points
from theory.predict import at, position_arrays, predict
from theory.relations import Identical, Law, Rate
from theory.symmetry import theorem

SOURCE = "derived here"
GPT2_EPS = 1e-5

BAND = 0.05
"""The tolerance where draws are dear: a stack's second moment varies by sqrt(20/d) per draw."""

SHARE = 0.05
"""A theorem of every draw is judged on its share of exceptions: none in log(1/alpha)/SHARE."""


def claims(setting: Setting) -> Iterator[Claim]:
    """Our own statements, one layer at the sizes of `setting`."""
    yield from _one_layer(setting)
    yield from _laws(setting)
    yield from _rates()
    yield from _stacks(Small.of(setting, 256, 16))
    small = Small.of(setting, 64, 8)
    yield from _depth(small)
    yield from _tokens(small)
    yield from _schemes(small)
    yield from _symmetries(small)


@dataclass(frozen=True)
class Small:
    """Sizes that are drawn in a moment, and no larger than the setting's."""

    d_model: int
    n_heads: int
    n_ctx: int

    @classmethod
    def of(cls, setting: Setting, d_model: int, n_ctx: int) -> Small:
        width = min(setting.d_model, d_model)
        heads = next(h for h in (4, 3, 2, 1) if width % h == 0)
        return cls(width, heads, min(setting.n_ctx, n_ctx))

    @property
    def hot(self) -> Scheme:
        """Weights whose scaled logits have variance s^2 = 1."""
        return nope.init.normal(self.d_model**-0.5)

    def decoder(self, **changes: Any) -> Architecture:
        """A decoder of these sizes, two layers unless told otherwise."""
        options: dict[str, Any] = {"n_layers": 2, "n_ctx": self.n_ctx, **changes}
        return nope.decoder(self.d_model, self.n_heads, **options)


# ---------------------------------------------------------------------------- one layer


def _one_layer(setting: Setting) -> Iterator[Claim]:
    yield Claim(
        "ours.layernorm.eps",
        "GPT-2's eps of 1e-5 shrinks a LayerNorm output's second moment to v/(v + eps).",
        SOURCE,
        Status.LEADING_ORDER,
        setting.question("blocks.0.ln1", "second_moment", eps=GPT2_EPS),
        formula("layernorm.shrinkage"),
        expected=best_theory,
        assumes=("gaussian tokens",),
        asserts=("second moment of ln1 with eps",),
        remark="Against token_std 0.02 the shrinkage is 2.4%, and 4.8% for a logit's variance.",
    )
    asked = {
        "participation": (
            "A softmax over Gaussian logits has the participation A(m, s), averaged over |q|^2.",
            setting.question("blocks.0.attn.pattern", "participation"),
        ),
        "output": (
            "The output's variance is g (A + B_off/d): inflated by e^(s^2), with a floor g s^2/d.",
            setting.question("blocks.0.attn_out", "second_moment"),
        ),
        "cosine": (
            "Outputs at m and n have the cosine of their kernel, and more: queries differ.",
            setting.question("blocks.0.attn_out", "cosine"),
        ),
        "residual.cosine": (
            "The stream after attention has the cosine of tokens plus outputs.",
            setting.question("blocks.0.resid_mid", "cosine"),
        ),
    }
    for name, (statement, question) in asked.items():
        yield _calculus(name, statement, question, assumes=ASSUMED.get(name, ()))


ASSUMED = {"output": (gain("output"),)}
"""What a softmax does to the output's variance is claimed here, W_O's gain is Lemma 1's."""


def _calculus(name: str, statement: str, question: Question, **options: Any) -> Claim:
    """A claim of the kernel calculus at its best fidelity."""
    return Claim(
        f"ours.{name}",
        statement,
        SOURCE,
        Status.LEADING_ORDER,
        question,
        predict,
        expected=best_theory,
        asserts=(f"{question.observable} of {question.place}",),
        **options,
    )


# ----------------------------------------------------------------------- laws and rates

LAWS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "layernorm": ("A LayerNorm output's coordinate is one of a sphere", "blocks.0.ln1", {}),
    "query": ("A query's coordinate is Gaussian", "blocks.0.attn.q", {}),
    "scores": ("A scaled logit is variance-gamma", "blocks.0.attn.scores", {}),
    "output": (
        "An output of uniform attention is a Gaussian mixture",
        "blocks.0.attn_out",
        {"attention": "uniform"},
    ),
    "relu": (
        "A unit after ReLU is a rectified Gaussian",
        "blocks.0.mlp.post",
        {"activation": "relu", "attention": "uniform"},
    ),
    "gelu": (
        "A unit after GELU is a transformed Gaussian, with two branches",
        "blocks.0.mlp.post",
        {"activation": "gelu", "attention": "uniform"},
    ),
}
"""The law's name, what it says, its place, and how the layer differs from the setting's."""


def _laws(setting: Setting) -> Iterator[Claim]:
    """Whole distributions, at the last of a few positions; at width 2 a LayerNorm leaves signs."""
    if setting.d_model < 3 or setting.std < SMALLEST_STD:
        return
    for name, (words, place, changes) in LAWS.items():
        short = {"n_ctx": min(setting.n_ctx, 4), "d_ff": setting.d_model, **changes}
        yield Claim(
            f"ours.law.{name}",
            f"{words}: the share of values at or below each point.",
            SOURCE,
            Status.LEADING_ORDER,
            quantile_points(setting.question(place, "second_moment", **short)),
            predict,
            relation=Law(),
            expected=best_theory,
            asserts=(f"law of {place}",),
        )


SMALLEST_STD = 1e-30
"""Below it the fourth powers in a law's variances leave float64."""

RATE_BAND = 0.1
"""Of the gap, not of the value: at width d the gap is a share (1 - rho^2)/(2d) of it."""


def _rates() -> Iterator[Claim]:
    """How fast infinite width is reached."""
    means = [nope.prefix_means(width, n_ctx=2) for width in (16, 64)]
    yield Claim(
        "ours.rate.cosine",
        "The cosine of two prefix means falls short of sqrt(n/m) by a gap of order 1/d.",
        SOURCE,
        Status.EXACT,
        [Question(layer, nope.init.normal(1.0), "mean", "cosine") for layer in means],
        formula("cosine.prefix_means"),
        band=RATE_BAND,
        relation=Rate(lambda question: at(formula("cosine.uniform"), question)),
        expected=best_theory,
        asserts=("finite width of the cosine of prefix means",),
        remark="Right within 10% of the gap at widths 16 and 64: the exponent is 1 up to 0.15.",
    )


# ------------------------------------------------------------------------------- stacks

STACKS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gelu": ("Four pre-LN blocks with GELU", {"n_layers": 4}),
    "post": ("Two post-LN blocks with ReLU", {"norm_position": "post", "activation": "relu"}),
    "rmsnorm": ("Two pre-RMSNorm blocks with SiLU", {"norm": "rmsnorm", "activation": "silu"}),
    "eps": (
        "Two pre-LN blocks with ReLU, whose eps takes a fifth of the tokens",
        {"activation": "relu", "eps": 1e-4},
    ),
    "swiglu": ("Two pre-LN blocks with a SwiGLU", {"activation": "swiglu"}),
    "scaled": (
        "Two pre-LN blocks with tanh, each branch halved",
        {"activation": "tanh", "residual_scale": 0.5},
    ),
    "one_head": ("Two pre-LN blocks with one head and GELU", {"n_heads": 1}),
}
"""What a stack is called, what it is, and how it differs from two blocks with GELU."""


def _stacks(small: Small) -> Iterator[Claim]:
    """Softmax at s = 1, MLPs and norms: the kernel recursion at any temperature."""
    for name, (words, changes) in STACKS.items():
        options = {**changes}
        heads = options.pop("n_heads", small.n_heads)
        sizes = Small(small.d_model, heads, small.n_ctx)
        architecture = sizes.decoder(**options)
        last = architecture.operations[-1].place
        place = last if last != "ln_final" else architecture.operations[-2].place
        for observable in ("mean_second_moment", "adjacent_cosine"):
            if observable == "mean_second_moment" and options.get("norm_position") == "post":
                continue  # after a LayerNorm it is 1
            what = observable.replace("_", " ")
            yield _calculus(
                f"stack.{name}.{observable}",
                f"{words}, weights of variance 1/d: the {what} follows the kernel recursion.",
                Question(architecture, sizes.hot, place, observable),
                band=BAND if observable == "mean_second_moment" else None,
            )


# -------------------------------------------------------------------------------- depth

LAYERS = 2


def _depth(small: Small) -> Iterator[Claim]:
    """Attention-only stacks of uniform attention: powers of the Cesaro matrix."""
    attention = [Attention(small.n_heads, "uniform", name=f"attn{k}") for k in range(LAYERS)]
    residual = [Residual(layer, f"sum{k}") for k, layer in enumerate(attention)]
    tokens = nope.GaussianTokens(1.0)
    init = nope.init.normal(small.d_model**-0.5)
    bodies = {
        "depth.stack": (
            "Without norm and residual the kernel is that of Cesaro means of Cesaro means.",
            Sequence(tuple(attention)),
            f"attn{LAYERS - 1}_out",
            "depth.stack_kernel",
        ),
        "depth.residual": (
            "With residuals and random values it is the binomial mixture of those kernels.",
            Sequence(tuple(residual)),
            f"sum{LAYERS - 1}",
            "depth.random_value_kernel",
        ),
    }
    for name, (statement, body, place, law) in bodies.items():
        architecture = Architecture(small.d_model, small.n_ctx, tokens, body)
        yield Claim(
            f"ours.{name}",
            statement,
            SOURCE,
            Status.EXACT,
            Question(architecture, init, place, "kernel"),
            partial(_stack_kernel, law),
            band=BAND,
            expected=best_theory,
            assumes=("uniform attention", "no norm"),
            asserts=(f"kernel of {place}",),
        )


def _stack_kernel(law: str, question: Question) -> np.ndarray:
    """A depth formula at unit gain per layer and unit tokens."""
    left, right = position_arrays(question)
    known = {"m": left, "n": right, "ell": LAYERS, "g": 1.0}
    found = formula(law)
    return np.asarray(found(**{name: known[name] for name in found.symbols}))


# ------------------------------------------------------------------------------- tokens


def _tokens(small: Small) -> Iterator[Claim]:
    """Tokens that repeat correlate positions."""
    kinds: Mapping[str, tuple[str, nope.tokens.Tokens]] = {
        "zipf": (
            "Rows of a table under Zipf's law: a constant p_2 is added to every kernel.",
            nope.EmbeddingTokens(64, exponent=1.0),
        ),
        "text": (
            "Bytes of the Python documentation: the measured repetition enters every kernel.",
            nope.TextTokens(),
        ),
        "bos": (
            "A first token of its own, and a uniform vocabulary behind it.",
            nope.WithBos(nope.EmbeddingTokens(16)),
        ),
    }
    for name, (statement, tokens) in kinds.items():
        architecture = small.decoder(n_layers=1, attention="uniform", d_ff=0, tokens=tokens)
        yield _calculus(
            f"tokens.{name}",
            statement,
            Question(architecture, small.hot, "blocks.0.attn_out", "kernel"),
            band=BAND,
        )
        softmax = small.decoder(n_layers=1, d_ff=0, tokens=tokens)
        for observable in ("kernel", "cosine"):
            yield _calculus(
                f"tokens.{name}.softmax.{observable}",
                "A softmax gives copies of a token equal logits, and their queries equal patterns.",
                Question(softmax, small.hot, "blocks.0.attn_out", observable),
                band=BAND if observable == "kernel" else None,
            )


# ------------------------------------------------------------------------------ schemes

SCHEMES: Mapping[str, Scheme] = {
    "xavier_normal": nope.init.xavier_normal(),
    "kaiming_uniform": nope.init.kaiming_uniform(),
    "lecun_normal": nope.init.lecun_normal(),
    "truncated_normal": nope.init.truncated_normal(0.1),
    "orthogonal": nope.init.orthogonal(),
    "mup": nope.init.mup(0.1),
    "torch_default": nope.init.torch_default(),
}

FLAT = "logits have a kurtosis below 3 + 6/d_h, by (kappa_w - 3) kappa_x/d in queries and keys."
KURTOSES: Mapping[str, tuple[str, str]] = {
    "orthogonal": (
        "Haar queries and keys have logits of kurtosis (3 + 6/d_h)(d/(d + 2))^2.",
        "orthogonal.logit_kurtosis",
    ),
    "kaiming_uniform": (f"Under uniform weights {FLAT}", "attention.logit_kurtosis_layernorm"),
    "truncated_normal": (f"Under truncated weights {FLAT}", "attention.logit_kurtosis_layernorm"),
}
"""What finite width makes of a logit's kurtosis, and the formula that says it, by scheme."""


def _schemes(small: Small) -> Iterator[Claim]:
    """The variance per weight is what the leading order needs."""
    for name, scheme in SCHEMES.items():
        architecture = small.decoder(n_layers=1, activation="relu", bias=name == "torch_default")
        yield _calculus(
            f"init.{name}",
            f"Under {name} one block's variance follows from the variance of each weight.",
            Question(architecture, scheme, "blocks.0.resid_post", "second_moment"),
            band=BAND,
        )
    tiny = nope.decoder(16, 2, n_ctx=small.n_ctx, d_ff=0)
    for name, (statement, law) in KURTOSES.items():
        yield Claim(
            f"ours.init.{name}.kurtosis",
            statement,
            SOURCE,
            Status.EXACT,
            Question(tiny, SCHEMES[name], "blocks.0.attn.scores", "kurtosis"),
            formula(law),
            expected=best_theory,
            asserts=("kurtosis of scores",),
        )


# --------------------------------------------------------------------------- symmetries


def _symmetries(small: Small) -> Iterator[Claim]:
    """What permuting or equating the inputs does; without MLPs, which are pointwise."""

    def question(place: str, observable: str, **changes: Any) -> Question:
        return Question(small.decoder(d_ff=0, **changes), small.hot, place, observable)

    asked = {
        "past_permutation": (
            "One causal layer's last output does not see the order of its past.",
            question("ln_final", "past_permutation", n_layers=1),
        ),
        "past_permutation.two_layers": (
            "Two causal layers do not see it either.",
            question("blocks.1.attn_out", "past_permutation"),
        ),
        "permutation": (
            "Without a mask the whole network is permutation-equivariant.",
            question("ln_final", "permutation", causal=False),
        ),
        "equal_tokens": (
            "The mask alone says nothing: where all tokens are equal, all positions are.",
            question("ln_final", "equal_tokens"),
        ),
    }
    for name, (statement, asks) in asked.items():
        holds = theorem(asks).holds
        yield Claim(
            f"ours.{name}",
            statement,
            SOURCE if holds else "what one layer suggests",
            Status.EXACT if holds else Status.PRINTED,
            asks,
            0.0,
            relation=Identical(),
            band=SHARE,
            expected=best_theory,
            asserts=(f"{asks.observable} at {asks.place}",),
            remark=f"{theorem(asks).reason}.",
        )
