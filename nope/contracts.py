"""Contracts: an object is held against its plain counterpart by checks that it inherits.

A contract is a class.  A subclass names the object and gives the counterpart, a method `plain`
that is written from the definition and shares nothing with the object; each method `test_*` it
inherits is one check.  pytest collects every subclass whose name begins with `Test`; `check()`
runs the same checks without pytest.

What is registered (layer kinds, schemes, formulas, ...) has a contract: `registered` are the
entries of a kind, `covers` those that a contract holds, and `uncovered` says which have none.
`nope.testing`, `theory.testing`, `montecarlo.testing` and `reports.testing` have the contracts of
each kind; this module is what they share, without torch.

>>> class Halves(Contract):
...     def test_twice_a_half_is_one(self):
...         assert 2 * self.plain() == 1
>>> Halves.named("a float", plain=lambda: 0.5).check()
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property
from statistics import NormalDist
from types import FunctionType, ModuleType
from typing import Any, ClassVar, Self

import numpy as np

import nope.layers
import nope.tokens
from nope import plugins
from nope.architecture import Architecture
from nope.checks import line
from nope.init import Scheme, law_of, normal
from nope.layers import ACTIVATIONS, ATTENTION_KINDS, MLP, NORMS, Attention, Layer, Norm, Sequence
from nope.operations import Operation
from nope.sources import NumpySource
from nope.tokens import UNITS, GaussianTokens, TextTokens, Tokens

ERROR_RATE = 1e-9
"""The probability that a statistical check fails though the object is right."""


class Contract:
    """Checks for a subclass to inherit: every method `test_*`, which takes no argument."""

    @classmethod
    def registered(cls) -> Iterable[str]:
        """Everything that should have a contract of this kind, as in `covers`."""
        return ()

    @classmethod
    def covers(cls) -> Iterable[str]:
        """The registered entries that this contract holds, such as `scheme normal`."""
        return ()

    @classmethod
    def named(cls, name: str, /, **attributes: Any) -> type[Self]:
        """A subclass from the row of a table; plain functions are taken as they are.

        >>> Contract.named("cosine.uniform", plain=len).__name__
        'Test_cosine_uniform'
        """
        members = {key: _static(value) for key, value in attributes.items()}
        return type("Test_" + re.sub(r"\W+", "_", name), (cls,), members)

    @classmethod
    def check(cls) -> None:
        """Run every check; the first that fails raises `AssertionError`."""
        for error in cls.failures().values():
            raise error

    @classmethod
    def failures(cls) -> dict[str, AssertionError]:
        """The checks that fail, by name; any other error is raised."""
        found = {}
        for name in dir(cls):
            if name.startswith("test_"):
                try:
                    getattr(cls(), name)()
                except AssertionError as error:
                    found[name] = error
        return found


def _static(value: Any) -> Any:
    return staticmethod(value) if isinstance(value, FunctionType) else value


def uncovered(kind: type[Contract], contracts: Iterable[type[Contract]]) -> list[str]:
    """A line for each registered entry of a kind that none of `contracts` covers.

    >>> class Fruit(Contract):
    ...     @classmethod
    ...     def registered(cls):
    ...         return ["fruit pear"]
    >>> uncovered(Fruit, [])
    ['expected a contract for fruit pear, got none; subclass nope.contracts.Fruit with its `plain`']
    """
    covered, broken = set[str](), []
    for contract in contracts:
        try:
            covered.update(contract.covers())
        except Exception as error:  # of one package: it hides no other's
            broken.append(
                f"expected {contract.__module__}.{contract.__qualname__} to say what it covers, "
                f"got {type(error).__name__}: {error}; mend its `covers`"
            )
    where = f"{kind.__module__}.{kind.__qualname__}"
    missing = [entry for entry in kind.registered() if entry not in covered]
    return [
        *broken,
        *(
            f"expected a contract for {entry}, got none; subclass {where} with its `plain`"
            for entry in missing
        ),
    ]


def contracts_in(namespace: Mapping[str, Any]) -> list[type[Contract]]:
    """The contracts of a module that pytest would collect, given its `vars()`."""
    return [
        value
        for name, value in namespace.items()
        if name.startswith("Test") and isinstance(value, type) and issubclass(value, Contract)
    ]


# ---------------------------------------------------------------------- checks of several kinds


def assert_survives(value: object) -> None:
    """A frozen value equals what its `repr` builds and what a worker process receives of it."""
    remedy = "use @dataclass(frozen=True) in a module"
    for what, copied in (("repr", _rebuilt), ("pickle", _unpickled)):
        wanted = f"expected a {what} that makes it again"
        try:
            copy = copied(value)
            same, hashed = copy == value, hash(copy) == hash(value)
        except Exception as error:  # of whatever kind: the value cannot be made again
            raise AssertionError(f"{wanted}, got {value!r} ({line(error)}); {remedy}") from error
        assert same, f"{wanted}, equal to {value!r}, got {copy!r}; {remedy}"
        assert hashed, f"expected the hash of {value!r} to depend on its fields; {remedy}"


def _rebuilt(value: object) -> object:
    """What the `repr` builds, of the classes in it and of NumPy's numbers."""
    return eval(repr(value), {"np": np, "inf": math.inf, "nan": math.nan, **dict(_types(value))})


def _unpickled(value: object) -> object:
    return pickle.loads(pickle.dumps(value))


def _types(value: object) -> Iterator[tuple[str, type]]:
    """The classes that a `repr` names."""
    if isinstance(value, tuple):
        for item in value:
            yield from _types(item)
    if is_dataclass(value):
        yield type(value).__qualname__, type(value)
        for field in fields(value):
            yield from _types(getattr(value, field.name))


def assert_close(found: Any, expected: Any, rounding: float, what: str) -> None:
    """Equal up to `rounding` of the largest expected number; infinities and NaNs in place."""
    assert not np.iscomplexobj(found), f"expected {what} real, got complex numbers"
    found, expected = np.asarray(found, dtype=float), np.asarray(expected, dtype=float)
    same = f"expected {what} of shape {expected.shape}, got {found.shape}"
    assert found.shape == expected.shape, same
    finite = np.isfinite(expected)
    equal = (found == expected) | (np.isnan(found) & np.isnan(expected))
    for index in map(tuple, np.argwhere(np.where(finite, ~np.isfinite(found), ~equal))):
        wanted = f"finite {what}" if finite[index] else f"{what} to be {expected[index]}"
        where = f" at {tuple(map(int, index))}" if index else ""
        raise AssertionError(f"expected {wanted}, got {found[index]}{where}")
    scale = max(np.abs(expected[finite]).max(initial=0.0), np.finfo(float).tiny)
    gap = np.abs(found[finite] - expected[finite]).max(initial=0.0) / scale
    assert gap <= rounding, f"expected {what} to {rounding:.0e}, got a gap of {gap:.2g}"


def half_width(draws: np.ndarray, error_rate: float = ERROR_RATE) -> np.ndarray:
    """z standard errors of the mean over the first axis, z for all entries together.

    Bonferroni's: a Gaussian mean leaves it with probability `error_rate` at any entry.
    """
    z = NormalDist().inv_cdf(1 - error_rate / 2 / draws[0].size)
    return np.asarray(z * draws.std(0, ddof=1) / math.sqrt(len(draws)))


def distance(count: int, error_rate: float = ERROR_RATE) -> float:
    """How far an empirical CDF of so many draws may be from its own: Massart's bound (1990)."""
    return float(np.sqrt(np.log(2 / error_rate) / (2 * count)))


# ------------------------------------------------------------------------------- simulations


class Simulated(Contract):
    """A layer alone over random tokens, and the same in NumPy, one draw at a time.

    `layer` is anything with `operations(scope, source)`.  `plain(x, weights)` is given the
    vectors x_m of one draw, (n_ctx, d_model), and the weights' arrays by path, and returns what
    is at each of the layer's places: vectors (n_ctx, width), heads side by side, and pairs
    (n_heads, n_ctx, n_ctx), finite or -inf.  Tokens that are rows of a table also need `embed`.
    """

    layer: ClassVar[Layer] = Sequence(())
    d_model: ClassVar[int] = 8
    n_ctx: ClassVar[int] = 5
    tokens: ClassVar[Tokens] = GaussianTokens(1.0)
    init: ClassVar[Scheme] = normal(0.4)
    seed: ClassVar[int] = 0

    def plain(self, x: np.ndarray, weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """The values by place; x itself is at `embed`."""
        raise NotImplementedError(f"expected {type(self).__name__} to have a `plain`; write it")

    def embed(self, drawn: np.ndarray, weights: Mapping[str, np.ndarray]) -> np.ndarray:
        """The vectors x_m of what the tokens' `draw` gave: itself, unless these are ids."""
        return drawn

    @property
    def architecture(self) -> Architecture:
        """The layer with its tokens."""
        return Architecture(self.d_model, self.n_ctx, self.tokens, self.layer)

    @property
    def places(self) -> Iterable[str]:
        """The places that are compared."""
        return self.architecture.places()

    @classmethod
    def operations(cls) -> tuple[Operation, ...]:
        """What the layer is made of, the embedding among it."""
        return Architecture(cls.d_model, cls.n_ctx, cls.tokens, cls.layer).operations

    def draws(self, count: int) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Pairs of what the tokens' `draw` gives for one input, and all weights."""
        source = NumpySource(np.random.default_rng(self.seed))
        network = self.architecture
        laws = [(w, law_of(self.init, w, network)) for w in network.weights]
        for _ in range(count):
            weights = {weight.path: law.draw(source, weight.shape) for weight, law in laws}
            yield self.tokens.draw(source, 1, self.n_ctx, self.d_model)[0], weights

    def values(
        self, drawn: np.ndarray, weights: Mapping[str, np.ndarray]
    ) -> Mapping[str, np.ndarray]:
        """The plain values of one draw by place, `embed` among them.

        `AssertionError` unless they are at the layer's places, at all of those that the contract
        compares, and finite or -inf.
        """
        x = self.embed(drawn, weights)
        found: Any = self.plain(x, weights)
        given = f"expected `plain` to give arrays by place, got {type(found).__name__}"
        assert isinstance(found, Mapping), f"{given}; return a dictionary"
        needed, known = self._wanted
        unlike = (needed - set(found)) | (set(found) - known)
        assert not unlike, (
            f"expected `plain` to give {sorted(needed)}, got {sorted(map(str, found))}; "
            f"mend {sorted(map(str, unlike))}"
        )
        return {place: _plain(value, place) for place, value in {"embed": x, **found}.items()}

    @cached_property
    def _wanted(self) -> tuple[set[str], set[str]]:
        """The places that `plain` has to give, and all that it may: not the tokens' own."""
        return set(self.places) - {"embed"}, set(self.architecture.places()) - {"embed"}


def _plain(value: Any, place: str) -> np.ndarray:
    """What `Simulated.plain` gave at a place, finite or -inf, as an array."""
    array = _real(value, place)
    largest = array.max(initial=0.0)  # nan if any is
    assert largest < math.inf, f"expected `plain` finite or -inf at {place}, got {largest}; mend it"
    return array


def _real(value: Any, what: str) -> np.ndarray:
    """As an array of float64, of anything that holds real numbers."""
    try:
        array = np.asarray(value)
    except Exception as error:  # of a library whose arrays are not NumPy's
        raise AssertionError(f"expected numbers of {what}, got {line(error)}; use NumPy") from error
    kind = f"expected real numbers of {what}, got {array.dtype}"
    assert array.dtype.kind in "iuf", f"{kind}; give an array of floats"
    return array.astype(float, copy=False)


def entries(kind: str, classes: Iterable[type]) -> list[str]:
    """How classes are registered: `kind` and name, in order; `object` is any dispatch's default."""
    return sorted(f"{kind} {_named(each)}" for each in classes if each is not object)


def _named(each: type) -> str:
    """The name of a class, with the module unless it is one of `nope`: others may have the name.

    >>> _named(Norm), _named(NumpySource), _named(int)
    ('Norm', 'NumpySource', 'builtins.int')
    """
    ours = each.__module__.partition(".")[0] == "nope"
    return each.__name__ if ours else f"{each.__module__}.{each.__qualname__}"


def defined_in(module: ModuleType) -> list[type]:
    """The dataclasses of a module that its own package defines, there or in another module."""
    package = module.__name__.partition(".")[0]
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and is_dataclass(value)
        and value.__module__.partition(".")[0] == package
    ]


NAMED: Mapping[type, tuple[str, Iterable[str]]] = {
    Norm: ("kind", NORMS),
    Attention: ("kind", ATTENTION_KINDS),
    MLP: ("activation", ACTIVATIONS),
    TextTokens: ("unit", UNITS),
}
"""Layers and tokens that are several, by the names that a field of theirs has."""


def kinds() -> list[str]:
    """Layers and tokens, ours and of plugins' modules, and their names where they have several.

    >>> [kind for kind in kinds() if "Norm" in kind]
    ['layer Norm', 'layer Norm layernorm', 'layer Norm rmsnorm']
    """
    added = [plugin.given for plugin in plugins.layers() if not plugin.trouble]
    found = {each for module in (nope.layers, nope.tokens, *added) for each in defined_in(module)}
    classes = sorted((each for each in found if _kind(each)), key=_named)
    return [
        entry
        for each in classes
        for entry in (
            f"{_kind(each)} {_named(each)}",
            *(f"{_kind(each)} {_named(each)} {name}" for name in NAMED.get(each, ("", ()))[1]),
        )
    ]


def _kind(part: type) -> str:
    """What a class is: a layer, tokens, or neither."""
    if hasattr(part, "operations"):
        return "layer"
    return "tokens" if hasattr(part, "draw") and hasattr(part, "weights") else ""


def kinds_of(layer: Layer, tokens: Tokens) -> list[str]:
    """Which of the `kinds` a layer over tokens is, and what is in it."""
    found = []
    for part in (*_parts(layer), tokens):
        entry = f"{_kind(type(part))} {_named(type(part))}"
        field, _ = NAMED.get(type(part), ("", ()))
        found += [entry, *([f"{entry} {getattr(part, field)}"] if field else [])]
    return found


def _parts(layer: Any) -> Iterator[Any]:
    """The layer and those in it."""
    yield layer
    for inner in (*getattr(layer, "layers", ()), *filter(None, [getattr(layer, "branch", None)])):
        yield from _parts(inner)
