"""The prediction: closed forms derived in SymPy, numbers compiled from them.  No torch here.

>>> import theory
>>> theory.formula("attention.logit_second_moment").expr
d**2*sigma**4

`theory.predict(question)` answers a `nope.Question` with values, status and remainder;
`theory.law(question)` is a whole distribution; `theory.derive(architecture, init, place)` gives the
steps; `theory.claims()` lists what the papers say; `theory.formulas()` is the mathematics by name,
and `theory.validity(formula)` says where one of them holds.
"""

from theory.claims import Claim, Setting, claims
from theory.derivation import Derivation, derive
from theory.formula import Formula, Status
from theory.formulas import formula, formulas
from theory.laws import law
from theory.predict import Prediction, predict
from theory.relations import Equals, Identical, Law, Ordered, Rate
from theory.validity import validity

__all__ = [
    "Claim",
    "Derivation",
    "Equals",
    "Formula",
    "Identical",
    "Law",
    "Ordered",
    "Prediction",
    "Rate",
    "Setting",
    "Status",
    "claims",
    "derive",
    "formula",
    "formulas",
    "law",
    "predict",
    "validity",
]
