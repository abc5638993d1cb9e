"""Where the layers run, and in which precision."""

from __future__ import annotations

import torch

DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def resolve_device(name: str = "auto", dtype: str = "float32") -> torch.device:
    """The torch device for `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.

    `auto` picks CUDA, then (in float32) MPS, then the CPU.  Raises `ValueError` for a name
    that is none of these, a device that is not there, or float64 on MPS, which has none.
    """
    if dtype not in DTYPES:
        raise ValueError(f"expected dtype float32 or float64, got {dtype!r}; change dtype")
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available() and dtype == "float32":
            name = "mps"
        else:
            name = "cpu"
    kind, _, index = str(name).partition(":")
    if kind not in DEVICES or (index and not index.isdigit()):
        raise ValueError(f"expected a device of {', '.join(DEVICES)}, got {name!r}; change device")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise ValueError(f"expected device {name} to be there, got {found} CUDA devices; use cpu")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("expected device mps to be there, got none; use cpu")
    if kind == "mps" and dtype == "float64":
        raise ValueError("expected float32 on mps, got float64; use --dtype float32 or cpu")
    return torch.device(name)
