"""The report: one HTML file that needs no network and no scripts."""

from __future__ import annotations

import html
import re
from collections import Counter
from functools import cache
from pathlib import Path

import ziamath
from jinja2 import Environment, PackageLoader, StrictUndefined

from reports import figures
from reports.suite import position_name
from reports.verdicts import Run

FILE = "report.html"
DOUBLE_SUM = r"\\sum_{\\substack{1 \\leq (\w) \\leq (\w)\\\\1 \\leq (\w) \\leq (\w)}}"
LONGEST_TYPESET = 700
"""Longer LaTeX than this is named and not shown: nobody reads it."""


@cache
def typeset(latex: str, size: float = 17.0) -> str:
    """LaTeX as an inline `<svg>`, or as its source where it cannot be typeset."""
    if len(latex) > LONGEST_TYPESET:
        return "<em>(too long to read; ask theory.derive for it)</em>"
    # Two limits under one sum are typeset off the edge: write two sums.
    latex = re.sub(DOUBLE_SUM, r"\\sum_{\1=1}^{\2}\\sum_{\3=1}^{\4}", latex)
    prepared = re.sub(r"\\operatorname\{(\w+)\}", r"\\mathrm{\1}", latex)
    try:
        svg: str = ziamath.Latex(prepared, size=size).svg()
    except Exception:  # the parsers below raise whatever comes up; the source is still readable
        return f"<code>{html.escape(latex)}</code>"
    return svg.replace("<svg ", '<svg class="math" role="img" ', 1)


def number(value: float | None) -> str:
    """Four significant digits, a dash for what is not there."""
    return "-" if value is None else f"{value:.4g}"


def render(run: Run) -> str:
    """The report of a run as HTML."""
    environment = Environment(
        loader=PackageLoader("reports"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(typeset=typeset, number=number, position=position_name)
    template = environment.get_template("report.html.j2")
    counts = Counter(verdict.verdict for verdict in run.verdicts)
    pictures = [figures.svg(verdict) for verdict in run.verdicts]
    command = run.reproduce() if run.info.get("arguments") else None
    entries = list(zip(run.verdicts, pictures, strict=True))
    page = template.render(run=run, entries=entries, counts=counts, command=command)
    return share_glyphs(page)


GLYPH = re.compile(r'<symbol id="(STIX\w+)".*?</symbol>', re.DOTALL)


def share_glyphs(page: str) -> str:
    """The page with each glyph of its formulas drawn once, at the top: a tenth of the size."""
    glyphs = {found.group(1): found.group(0) for found in GLYPH.finditer(page)}
    drawn = f'<svg width="0" height="0" style="position:absolute">{"".join(glyphs.values())}</svg>'
    return GLYPH.sub("", page).replace("<body>", f"<body>\n{drawn}", 1)


def write(run: Run, directory: str | Path) -> Path:
    """Write `report.html` into `directory`; returns the file."""
    target = Path(directory) / FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(run), encoding="utf-8")
    return target
