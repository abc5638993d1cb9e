"""What other packages add: claims, layer kinds and schemes, found by their entry points.

A package says in its `pyproject.toml` what it has, and is found once it is installed:

    [project.entry-points."nope.claims"]
    example = "nope_example.claims:claims"       # of a theory.Setting, gives theory.Claims

    [project.entry-points."nope.layers"]
    example = "nope_example.layers"              # a module that registers a layer kind

    [project.entry-points."nope.schemes"]
    neox = "nope_example.schemes:neox"           # makes a scheme that sweeps call neox

    [project.entry-points."nope.contracts"]
    example = "nope_example.contracts"           # what holds them to their definitions

A module of `nope.layers` defines a layer and its operation as frozen dataclasses and registers,
as it is imported, the operation's torch module (`nope.transformer.apply`), its kernel rule
(`theory.rules.rule_for`) and what else is known of it (`theory.symmetry.dependence`,
`theory.laws.places.vector_of`).  A worker process, ours or Dask's, unpickles a question by
importing the module that defines its layers, and so has registered all it needs: keep what belongs
to one layer in one module, outside the script that is run.

A plugin that does not work is a `Plugin` with a `trouble` in one line; it never raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nope.checks import expect, line
from nope.init import SCHEMES, Scheme

if TYPE_CHECKING:
    from nope.contracts import Contract

GROUPS = CLAIMS, LAYERS, OF_SCHEMES, CONTRACTS = (
    "nope.claims",
    "nope.layers",
    "nope.schemes",
    "nope.contracts",
)


class PluginWarning(UserWarning):
    """A plugin does not work, and is left out."""


@dataclass(frozen=True)
class Plugin:
    """An entry point and what it gave, or in one line why it gave nothing.

    `package` is the distribution that it came with, name and version.
    """

    group: str
    name: str
    package: str
    given: Any = None
    trouble: str = ""

    @classmethod
    def of(cls, entry: EntryPoint) -> Plugin:
        """The entry point itself, nothing imported."""
        assert entry.dist is not None, "what entry_points() finds is of a distribution"
        package = f"{entry.dist.name} {entry.dist.version}"
        return cls(entry.group, entry.name, package, entry)

    def read(self, make: Callable[[Any], Any]) -> Plugin:
        """With what `make` makes of what was given; whatever it raises is the trouble.

        A plugin that ends the program (`SystemExit`) does not end ours.
        """
        if self.trouble:
            return self
        try:
            return replace(self, given=make(self.given))
        except (Exception, SystemExit) as error:
            trouble = (
                f"expected the plugin {self.name} of {self.package} ({self.group}) to work, got "
                f"{line(error)!r}; update or uninstall {self.package.split()[0]}"
            )
            return replace(self, given=None, trouble=trouble)


def installed(group: str) -> list[Plugin]:
    """The entry points of a group by package and name, nothing imported."""
    found = map(Plugin.of, entry_points(group=group))
    return sorted(found, key=lambda plugin: (plugin.package, plugin.name))


def packages() -> dict[str, str]:
    """The version of every package that has plugins, by name."""
    every = (plugin.package for group in GROUPS for plugin in installed(group))
    return dict(package.split() for package in every)


@cache
def load(group: str) -> tuple[Plugin, ...]:
    """The plugins of a group with the objects that they name, imported once a process."""
    return tuple(plugin.read(EntryPoint.load) for plugin in installed(group))


def warn(found: Iterable[Plugin]) -> None:
    """A `PluginWarning` for each that does not work."""
    for plugin in found:
        if plugin.trouble:
            warnings.warn(plugin.trouble, PluginWarning, stacklevel=3)


# ------------------------------------------------------------------ what is registered by name


def layers() -> tuple[Plugin, ...]:
    """The modules of `nope.layers`, whose layer kinds are registered by being imported."""
    return tuple(plugin.read(_module) for plugin in load(LAYERS))


def _module(given: Any) -> ModuleType:
    expect(isinstance(given, ModuleType), "a module", given, "name the module alone")
    return given  # type: ignore[no-any-return]


@cache
def entered() -> tuple[Plugin, ...]:
    """The constructors of `nope.schemes`; those that work are in `nope.init.SCHEMES` from now on.

    One can be called with nothing; of what a sweep varies it is given `std` and `gain` if it has
    parameters of that name.
    """
    return tuple(
        plugin.read(lambda made, name=plugin.name: _enter(name, made))  # type: ignore[misc]
        for plugin in load(OF_SCHEMES)
    )


def _enter(name: str, constructor: Callable[..., Any]) -> Callable[..., Scheme]:
    expect(name not in SCHEMES, "a name of its own", name, "rename the entry point")
    made = constructor()
    expect(isinstance(made, Scheme), "a nope.init.Scheme", made, "give it a law and a hash")
    return SCHEMES.setdefault(name, constructor)


def schemes() -> Mapping[str, Callable[..., Scheme]]:
    """The constructor of every scheme by name, `nope.init`'s and those of plugins."""
    entered()
    return SCHEMES


def registered() -> tuple[Plugin, ...]:
    """Every layer kind and scheme of a plugin, which now is in its registry, or its trouble."""
    return (*layers(), *entered())


def holding() -> tuple[Plugin, ...]:
    """The modules of `nope.contracts`, what they hold being registered."""
    registered()
    return tuple(plugin.read(_module) for plugin in load(CONTRACTS))


def contracts() -> list[type[Contract]]:
    """The contracts of the plugins that work.

    What is installed and cannot be held to its definition is no pass: a suite that holds these
    also asks that no `trouble` is in `registered()` and `holding()`.
    """
    from nope.contracts import contracts_in

    modules = [plugin.given for plugin in holding() if not plugin.trouble]
    return [contract for module in modules for contract in contracts_in(vars(module))]
