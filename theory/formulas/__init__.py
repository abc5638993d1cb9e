"""The mathematics by subject, for importing.

Each module has a function `formulas()` that yields its `Formula`s.  `formula(name)` finds one,
`formulas()` is all of them by name.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from types import ModuleType

from theory.formula import Formula


def _modules() -> tuple[ModuleType, ...]:
    """Those that take longest to derive are last: a name is looked for in this order."""
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

    return (
        norm,
        attention,
        softmax,
        outputs,
        stream,
        cosine,
        duals,
        depth,
        collapse,
        weingarten,
        kurtosis,
        laws,
        tokens,
        softmax_expansions,
    )


@cache
def _of(module: ModuleType) -> Mapping[str, Formula]:
    return {found.name: found for found in module.formulas()}


def formulas() -> Mapping[str, Formula]:
    """Every formula by name."""
    return {name: found for module in _modules() for name, found in _of(module).items()}


def formula(name: str) -> Formula:
    """The formula called `name`.  Raises `LookupError` with the nearest names."""
    for module in _modules():
        if name in _of(module):
            return _of(module)[name]
    known = formulas()
    near = get_close_matches(name, known, n=3, cutoff=0.3) or list(known)
    raise LookupError(
        f"expected the name of a formula, got {name!r}; did you mean {', '.join(near)}? "
        "theory.formulas() lists them"
    )
