"""The mathematics by subject, for importing.

Each module has a function `formulas()` that yields its `Formula`s.  `formula(name)` finds one,
`formulas()` is all of them by name.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache

from theory.formula import Formula


@cache
def formulas() -> Mapping[str, Formula]:
    """Every formula by name."""
    from theory.formulas import (
        attention,
        collapse,
        cosine,
        depth,
        duals,
        kurtosis,
        laws,
        norm,
        outputs,
        softmax,
        softmax_expansions,
        stream,
        tokens,
        weingarten,
    )

    modules = (
        norm,
        attention,
        softmax,
        softmax_expansions,
        outputs,
        stream,
        cosine,
        duals,
        depth,
        collapse,
        tokens,
        weingarten,
        kurtosis,
        laws,
    )
    return {found.name: found for module in modules for found in module.formulas()}


def formula(name: str) -> Formula:
    """The formula called `name`.  Raises `LookupError` with the nearest names."""
    known = formulas()
    if name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.3) or list(known)
        raise LookupError(
            f"expected the name of a formula, got {name!r}; did you mean {', '.join(near)}? "
            "theory.formulas() lists them"
        )
    return known[name]
