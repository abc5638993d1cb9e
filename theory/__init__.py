"""The prediction: closed forms derived in SymPy, numbers compiled from them.  No torch here.

>>> import theory
>>> theory.formula("attention.logit_second_moment").expr
d**2*sigma**4

`theory.predict(question)` answers a `nope.Question` with values, status and remainder;
`theory.derive(architecture, init, place)` gives the steps; `theory.claims()` lists what the papers
say; `theory.formulas()` is the mathematics by name.
"""

from theory.claims import Claim, Setting, claims
from theory.derivation import Derivation, derive
from theory.formula import Formula, Status
from theory.formulas import formula, formulas
from theory.predict import Prediction, predict
from theory.relations import Equals, Identical, Ordered
from theory.validity import validity

__all__ = [
    "Claim",
    "Derivation",
    "Equals",
    "Formula",
    "Identical",
    "Ordered",
    "Prediction",
    "Setting",
    "Status",
    "claims",
    "derive",
    "formula",
    "formulas",
    "predict",
    "validity",
]
