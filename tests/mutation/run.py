"""Change one operator or number of the statistics module at a time, and ask its tests.

    make mutants                        all, with the score and the survivors in results.md
    python -m tests.mutation WORD ...   those of functions whose names contain one of the words

cosmic-ray makes the mutants.  One that the tests do not kill is explained in `SURVIVORS`, by what
it makes of its line, or in `CHOICES`: the exit status is 1 where one is not.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import SequenceMatcher
from hashlib import blake2b
from itertools import count, takewhile
from pathlib import Path
from queue import SimpleQueue

from nope.checks import expect
from tests.planted.run import NOTICED, ROOT, SILENT, Answer, ask, copy

MODULE = Path("montecarlo/confidence.py")
TESTS = "tests/montecarlo/test_confidence.py tests/montecarlo/test_false_alarms.py"
TABLE = Path(__file__).with_name("results.md")
AT_ONCE = min(2, os.cpu_count() or 1)
UNREADABLE = 2
"""pytest's exit status where a module raises as it is imported."""

NOBODYS = re.compile(
    r"core/(ReplaceBinaryOperator_\w+_(Bit\w+|[LR]Shift|Mod)"
    r"|ReplaceUnaryOperator_\w+_Invert"
    r"|ReplaceComparisonOperator_\w+_(Is|IsNot))$"
)
"""Operators that nobody writes by mistake among real numbers: bits, remainders, identity."""

CHOICES: Mapping[str, str] = {
    "TUNED_FOR": "a choice: with any value the sequence is valid, and as narrow nearby",
    "FIRST_LOOK": "a choice: the error rates hold from there on as well",
    "ROUNDING": "a choice: draws are as equal within one unit of the last place more or less",
}
"""Why the next number would do for a constant as well."""

CACHE = "a cache of another size holds the same numbers"
OVERWRITTEN = "where draws are constant the last line puts another width in its place"
EDGE = "only where both sides are equal, and there either answer will do"
ONE = "of one draw this is 0 or not a number, and either excludes nothing"
OUTSIDE = "a mean lies outside by rounding alone; the other end's radius is the larger"
SURVIVORS: Mapping[str, str] = {
    "trusted = 8 / 27 * z**2 * e**3 < np.log(TAIL_FACTOR)": EDGE,
    "constant = variance < (ROUNDING * resolution * size) ** 2": EDGE,
    "(without @lru_cache(maxsize=256))": "without its cache a function has the same numbers",
    "@lru_cache(maxsize= 257)": CACHE,
    "@lru_cache(maxsize= 255)": CACHE,
    "factor = np.where(constant, 2.0, widening(z, draws, skewness))": OVERWRITTEN,
    "factor = np.where(constant, 0.0, widening(z, draws, skewness))": OVERWRITTEN,
    "second = np.asarray(variance) * (draws - 1) if draws > 2 else np.zeros(np.shape(mean))": (
        "two draws exclude nothing within the bounds, however near they are"
    ),
    "second = np.asarray(variance) * (draws - 1) if draws > 0 else np.zeros(np.shape(mean))": ONE,
    "second = np.asarray(variance) * (draws - 1) if draws >= 1 else np.zeros(np.shape(mean))": ONE,
    "second = np.asarray(variance) * (draws - 1) if draws != 1 else np.zeros(np.shape(mean))": (
        "no draws at all have no mean to put an interval around"
    ),
    "return np.asarray(np.minimum(np.where(root > 0, found, room).min(0), room))": EDGE,
    "below, above = np.maximum(mean - low, -1.0), np.maximum(high - mean, 0.0)": OUTSIDE,
    "below, above = np.maximum(mean - low, 0.0), np.maximum(high - mean, -1.0)": OUTSIDE,
    "stakes, capital = (x.reshape(- 2, *[1] * np.ndim(room)) for x in (STAKES, CAPITAL))": (
        "NumPy takes any number below 0 for the length that is left"
    ),
}
"""Why a line as mutated is as good as the line that was meant."""


@dataclass(frozen=True)
class Mutant:
    """The module with one change: what it makes of which line, in which function or constant."""

    code: str
    where: str
    before: str
    after: str

    @property
    def told(self) -> str:
        return f"{self.where}: {self.before} -> {self.after}"


def mutants() -> Iterator[Mutant]:
    """Every mutant that cosmic-ray makes of the module, one that two operators make once."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / MODULE).read_text()
    seen = {source}
    for name in sorted(operator_names()):
        operator = get_operator(name)
        if NOBODYS.match(name) or operator.arguments():
            continue
        made = (mutate_code(source, operator(), occurrence) for occurrence in count())
        for code in takewhile(lambda code: code is not None, made):
            if code not in seen:
                seen.add(code)
                yield mutant(source, code)


def mutant(source: str, code: str) -> Mutant:
    """A mutant by the lines that differ from the source."""
    old, new = source.splitlines(), code.splitlines()
    changes = SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    _, i, j, first, last = next(change for change in changes if change[0] != "equal")
    before, after = (" ".join(" ".join(lines).split()) for lines in (old[i:j], new[first:last]))
    return Mutant(code, owner(source, i + 1), before, after or f"(without {before})")


def owner(source: str, line: int) -> str:
    """The function or constant whose lines hold a line."""
    for node in ast.parse(source).body:
        last = node.end_lineno or node.lineno
        begin = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        if begin <= line <= last:
            return str(getattr(node, "name", "")) or ast.unparse(node).split(" ")[0]
    return "module"


def killed(found: Mutant, roots: SimpleQueue[Path]) -> Answer:
    """What the tests say of a mutant, in one of the copies."""
    root = roots.get()
    try:
        (root / MODULE).write_text(found.code)
        return ask([f"pytest {TESTS}"], root)
    finally:
        roots.put(root)


def kills(answer: Answer) -> bool:
    """A test failed, or the module could not be imported; no answer in time is none."""
    return answer.status in (NOTICED, UNREADABLE)


def digest() -> str:
    """Of the module that the table is about."""
    return blake2b((ROOT / MODULE).read_bytes(), digest_size=8).hexdigest()


def why(found: Mutant) -> str | None:
    """Why a mutant is no error; None where nobody has said."""
    return SURVIVORS.get(found.after) or CHOICES.get(found.where)


def table(asked: Sequence[Mutant], survived: Sequence[Mutant]) -> str:
    """The score, and each survivor with why."""
    lines = [
        "# Mutants of the statistics module",
        "",
        f"`make mutants` wrote this.  Of {len(asked)} mutants that cosmic-ray makes of",
        f"`{MODULE}` (`{digest()}`) its tests kill {len(asked) - len(survived)}: "
        f"{1 - len(survived) / len(asked):.1%}.  Operators that nobody writes by mistake among",
        "real numbers (bits, shifts, remainders, identity) are left out.  Those that live:",
        "",
        "| in | line | mutated | why no test can tell |",
        "|---|---|---|---|",
    ]
    for found in survived:
        cells = (f"`{found.where}`", f"`{found.before}`", f"`{found.after}`")
        lines.append(f"| {' | '.join(cells)} | {why(found) or '**unexplained**'} |")
    return "\n".join(lines) + "\n"


def main(words: Sequence[str]) -> int:
    """Run them, print what lives and write the table; 1 where something is not explained."""
    asked = [m for m in mutants() if not words or any(word in m.where for word in words)]
    expect(bool(asked), "a word of a function's name", list(words), f"see {MODULE}")
    survived = []
    with ExitStack() as stack, ThreadPoolExecutor(AT_ONCE) as pool:
        roots: SimpleQueue[Path] = SimpleQueue()
        for _ in range(AT_ONCE):
            roots.put(stack.enter_context(copy()))
        clean = ask([f"pytest {TESTS}"], root := roots.get())
        roots.put(root)
        expect(clean.status == SILENT, "tests that pass without a mutant", clean.words, "mend them")
        for found, answer in zip(asked, pool.map(lambda m: killed(m, roots), asked), strict=True):
            told = "killed" if kills(answer) else "SURVIVED"
            print(f"{told:9} {answer.seconds:5.1f} s  {found.told}", flush=True)
            survived += [found] * (not kills(answer))
    unexplained = [found.told for found in survived if why(found) is None]
    print(f"{len(asked) - len(survived)} of {len(asked)} killed; unexplained: {unexplained}")
    if not words:
        TABLE.write_text(table(asked, survived))
    return NOTICED if unexplained else SILENT
