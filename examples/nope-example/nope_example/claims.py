"""What is claimed of LayerScale and of GPT-NeoX's scheme, for `nope verify 'example.*'`."""

from collections.abc import Iterator

import numpy as np

from nope import Architecture, Attention, Norm, Question, Residual, Sequence
from nope.init import normal
from nope.tokens import GaussianTokens
from nope_example.layers import SOURCE, LayerScale
from nope_example.schemes import neox
from theory import Claim, Setting
from theory.claims import best_theory

SCALE = 0.1


def scaled_attention(setting: Setting) -> Architecture:
    """x + SCALE attention(LayerNorm(x)), the attention uniform."""
    branch = (Norm("ln1"), Attention(setting.n_heads, "uniform"), LayerScale("scaled", SCALE))
    body = Sequence((Residual(Sequence(branch), "resid_mid"),), "blocks.0")
    return Architecture(setting.d_model, setting.n_ctx, GaussianTokens(setting.token_std), body)


def claims(setting: Setting) -> Iterator[Claim]:
    """The claims at the sizes that the command line asks for."""
    stream = Question(
        scaled_attention(setting), normal(setting.std), "blocks.0.resid_mid", "second_moment"
    )
    attended = setting.d_model**2 * setting.std**4 / np.arange(1, setting.n_ctx + 1)
    yield Claim(
        "example.layerscale",
        "LayerScale adds lambda^2 d^2 sigma^4/m to the variance of the stream.",
        f"{SOURCE}; derived in nope_example.layers",
        "exact",
        stream,
        setting.token_std**2 + SCALE**2 * attended,
        expected=best_theory,
        assumes=("uniform attention",),
        asserts=("variance of resid_mid",),
    )
    yield Claim(
        "example.layerscale.unsquared",
        "LayerScale adds lambda d^2 sigma^4/m to the variance of the stream.",
        "a slip of the pen",
        "printed",
        stream,
        setting.token_std**2 + SCALE * attended,
        expected=best_theory,
        asserts=("variance of resid_mid",),
        remark="A variance scales with the square.",
    )
    yield Claim(
        "example.neox.logits",
        "GPT-NeoX's scheme gives logits of variance 4/25 at every width.",
        "Black et al. 2022 (arXiv 2204.06745), section 2.1; derived here",
        "exact",
        Question(setting.decoder(), neox(), "blocks.0.attn.scores", "mean_second_moment"),
        4 / 25,
        expected=best_theory,
        asserts=("variance of logits",),
    )
