"""What the theory says of a sweep's cells, asked once: kept beside the evidence of the run.

A forecast lies under a key of all that it depends on: the cell with the scheme that its name
stands for, the tolerance, the sources of `nope`, `theory` and `reports`, the builds of the
libraries.  It is kept as plain arrays and words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np

from montecarlo.provenance import BUILD, describe, digest_of
from montecarlo.store import Store
from reports.cells import Cell, by_setting
from reports.forecasts import Forecast, Progress
from reports.suite import Case
from theory.cache import code_digest
from theory.relations import Region

PART = 256
"""So many settings are asked before what was said of them is committed: a minute or so."""

REPORTS = digest_of(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
"""Of the sources of `reports`, read as this process imported them."""

Ask = Callable[[Sequence[Cell], Progress], Sequence[Forecast]]


def recalled(
    asked: Sequence[Cell], tolerance: float, store: Store | None, ask: Ask, progress: Progress
) -> list[Forecast]:
    """What the theory says of every cell; `ask` is called for those that the store does not know.

    Refusals, which take no time, are asked for again.
    """
    if store is None:
        return [*ask(asked, progress)]
    found = {
        number: one for number, cell in enumerate(asked) if (one := _of(store, cell, tolerance))
    }
    left = [number for number in range(len(asked)) if number not in found]
    settings = by_setting([asked[number] for number in left])
    for first in range(0, len(settings), PART):
        numbers = [left[k] for setting in settings[first : first + PART] for k in setting]
        told = _part_of(progress, len(found) / len(asked), len(numbers) / len(asked))
        answers = ask([asked[number] for number in numbers], told)
        for number, one in zip(numbers, answers, strict=True):
            found[number] = one
            _keep(store, asked[number], tolerance, one)
        store.commit()
    return [found[number] for number in range(len(asked))]


def _part_of(progress: Progress, before: float, share: float) -> Progress:
    """Tells of a part of the work as of the whole."""
    return lambda what, done: progress(what, before + share * done)


def _key(cell: Cell, tolerance: float) -> str | None:
    """What a forecast depends on; None where that cannot be told, and for cells that cannot be.

    It cannot be told where the sources are not those that this process runs, and of a plugin's
    scheme that is no dataclass.
    """
    sources = code_digest()
    if sources is None:
        return None
    try:
        asked = describe((*cell.values, cell.init, tolerance))
    except Exception:  # what a plugin's scheme may raise has no end; the forecast says what
        return None
    return digest_of(part.encode() for part in (asked, sources, REPORTS, BUILD))


def _of(store: Store, cell: Cell, tolerance: float) -> Forecast | None:
    key = _key(cell, tolerance)
    content = None if key is None else store.noted(key)
    return None if content is None else unpacked(content, cell, tolerance)


def _keep(store: Store, cell: Cell, tolerance: float, one: Forecast) -> None:
    key, content = _key(cell, tolerance), packed(one)
    if key is not None and content is not None:
        store.note(key, content)


# --------------------------------------------------------------------------- as plain data


def packed(one: Forecast) -> bytes | None:
    """A forecast as an archive of arrays; None for one without numbers."""
    if one.case is None or one.region is None or one.remainder is None:
        return None
    buffer, region = BytesIO(), one.region
    np.savez_compressed(
        buffer,
        prediction=region.prediction,
        low=region.low,
        high=region.high,
        width=np.array(region.width),
        remainder=one.remainder,
        words=np.array(
            [str(one.case.claim.status), one.case.expected or "", one.reason, one.without]
        ),
    )
    return buffer.getvalue()


def unpacked(content: bytes, cell: Cell, tolerance: float) -> Forecast:
    """The forecast of a cell from what `packed` made of it."""
    with np.load(BytesIO(content), allow_pickle=False) as kept:
        prediction, low, high, width, remainder, words = (
            kept[name] for name in ("prediction", "low", "high", "width", "remainder", "words")
        )
    status, expected, reason, without = words.tolist()
    question = cell.question
    region = Region(question, prediction, low, high, float(width))
    case = Case(
        cell.asserting(question, status, prediction),
        question,
        None if reason else region,
        tolerance,
        expected or None,
        reason,
        without,
    )
    return Forecast(case, region, remainder, reason, without)
