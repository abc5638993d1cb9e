"""The verdict: ask both routes, compare under a stated error rate, write it down.

>>> import reports, theory
>>> claims = theory.claims(d_model=16, n_ctx=4, std=0.1)
>>> run = reports.verify([c for c in claims if c.id == "chi2023.lemma1"], seed=1, workers=1)
>>> {verdict.verdict for verdict in run}
{'CONFIRMED'}
"""

from reports.suite import verify
from reports.sweep import sweep
from reports.verdicts import Run, Verdict

__all__ = ["Run", "Verdict", "sweep", "verify"]
