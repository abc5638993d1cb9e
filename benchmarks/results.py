"""Results of benchmarks, kept by name in one file beside the machine that they are of."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

FILE = Path(__file__).with_name("results.json")


def machine() -> str:
    """The processor, its cores, the libraries, and how busy others keep it."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    return (
        f"{_processor()}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, load {load:.1f}"
    )


def _processor() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "unknown")


@dataclass(frozen=True)
class Result:
    """Ours and the baseline in the same `unit`, their ratio, and the figure to reach in words."""

    name: str
    ours: float
    baseline: float
    unit: str
    target: str
    ratio: float = field(init=False)
    machine: str = field(default_factory=machine)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.ours / self.baseline)


def keep(results: Iterable[Result], file: Path = FILE) -> None:
    """Put results in the file, each in the place of an older one of its name."""
    known = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    merged = {row["name"]: row for row in (*known, *map(asdict, results))}
    text = json.dumps([merged[name] for name in sorted(merged)], indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def table(results: Iterable[Result]) -> str:
    """The results as a Markdown table."""
    rows = [
        f"| {r.name} | {r.ours:.4g} | {r.baseline:.4g} | {r.unit} | {r.ratio:.3g} | {r.target} |"
        for r in results
    ]
    header = "| | ours | baseline | unit | ratio | target |\n|---|--:|--:|---|--:|---|"
    return "\n".join((header, *rows))
