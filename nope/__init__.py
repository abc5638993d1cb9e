"""The subject: what a transformer without positional encodings is, and what can be asked of it.

An architecture is data, a question is an architecture, an initialisation, a place and an
observable.  `theory` predicts the answer, `montecarlo` measures it, `reports` compares.

>>> import nope
>>> question = nope.Question(
...     nope.decoder(64, 4, n_ctx=8), nope.init.normal(0.02), "blocks.0.attn.q", "second_moment"
... )
>>> question.shape, question.reason_not_applicable
((8,), None)

The torch layers are in `nope.transformer`, imported only when asked for.
"""

from nope import init
from nope.architecture import Architecture, decoder, prefix_means
from nope.layers import MLP, Attention, CausalMean, Norm, Residual, Sequence
from nope.questions import OBSERVABLES, Question, Weights
from nope.tokens import EmbeddingTokens, GaussianTokens, TextTokens, WithBos

__all__ = [
    "MLP",
    "OBSERVABLES",
    "Architecture",
    "Attention",
    "CausalMean",
    "EmbeddingTokens",
    "GaussianTokens",
    "Norm",
    "Question",
    "Residual",
    "Sequence",
    "TextTokens",
    "Weights",
    "WithBos",
    "decoder",
    "init",
    "prefix_means",
]
