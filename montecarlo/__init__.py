"""The measurement: real layers drawn, observed and decided on.  Never imports `theory`.

>>> import nope, montecarlo
>>> question = nope.Question(
...     nope.decoder(16, 2, n_ctx=4), nope.init.normal(0.1), "blocks.0.attn.q", "second_moment"
... )
>>> measured = montecarlo.measure(question, draws=2000, seed=1)
>>> measured.mean.shape, bool(abs(measured.mean - 0.16).max() < 0.01)
((4,), True)
"""

from montecarlo.campaign import Campaign
from montecarlo.decide import decide, measure
from montecarlo.evidence import Decision, Measurement, Target
from montecarlo.plan import Plan, plan
from montecarlo.rates import exponent
from montecarlo.sampler import Conditions
from montecarlo.split import split

__all__ = [
    "Campaign",
    "Conditions",
    "Decision",
    "Measurement",
    "Plan",
    "Target",
    "decide",
    "exponent",
    "measure",
    "plan",
    "split",
]
