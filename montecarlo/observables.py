"""Per-draw statistics of a place: what `nope.questions.OBSERVABLES` means, computed.

Everything inside a draw (coordinates, heads, keys) is averaged here; the draw is the unit.
A ratio of means keeps its K means as components, and `value` and `gradient` combine them.
Values arrive as `nope.transformer` makes them; where an observable transforms the inputs, those
of the inputs as drawn and then those of the inputs transformed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nope.questions import Question, coordinate_grid

Components = Callable[..., Tensor]
Combine = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Statistic:
    """`components` maps a place to draws x K x entries; `value` and `gradient` act on K means.

    `aside` says in words what else the K means tell.
    """

    components: Components
    value: Combine = lambda mean: mean[0]
    gradient: Combine = np.ones_like
    aside: Callable[[np.ndarray], str] = lambda mean: ""


def vectors(x: Tensor) -> Float[Tensor, "draws positions d"]:
    """A vector place as one vector per position, heads concatenated."""
    return x.transpose(1, 2).flatten(2) if x.ndim == 4 else x


def is_pairs(question: Question) -> bool:
    """Whether the place holds one number per query and key."""
    return question.operation.axes == "pair"


def power_mean(x: Tensor, question: Question, power: int) -> Float[Tensor, "draws positions"]:
    """Mean of x^power at each position: over coordinates, or over heads and n <= m."""
    if not is_pairs(question):
        return vectors(x).pow(power).mean(-1)
    length = x.shape[-1]
    counts = torch.arange(1, length + 1, device=x.device, dtype=x.dtype)
    return (x.tril().pow(power).sum(-1) / counts).mean(1)


def second_moment(x: Tensor, question: Question) -> Tensor:
    return power_mean(x, question, 2).unsqueeze(1)


def mean_second_moment(x: Tensor, question: Question) -> Tensor:
    rows = power_mean(x, question, 2).cpu().double()
    counts = torch.ones(rows.shape[1], device="cpu", dtype=torch.float64)
    weights = counts.cumsum(0) if is_pairs(question) else counts
    return (rows @ (weights / weights.sum()))[:, None, None]


def coordinate_second_moment(x: Tensor, question: Question) -> Tensor:
    rows, _ = question.shape
    columns = torch.as_tensor(
        coordinate_grid(question.architecture.width(question.place)), device=x.device
    )
    return vectors(x)[:, :rows, columns].square().unsqueeze(1)


def fourth_and_second(x: Tensor, question: Question) -> Tensor:
    return torch.stack([power_mean(x, question, 4), power_mean(x, question, 2)], 1)


def participation(x: Tensor, question: Question) -> Tensor:
    return x.square().sum(-1).mean(1).unsqueeze(1)


def on_grid(x: Tensor, question: Question) -> Float[Tensor, "draws grid d"]:
    index = torch.as_tensor(question.grid - 1, device=x.device)
    return vectors(x).index_select(1, index)


def gram(x: Float[Tensor, "draws n d"]) -> Float[Tensor, "draws n n"]:
    return x @ x.transpose(1, 2)


def normalised(x: Tensor) -> Tensor:
    """x / |x|, 0 for 0; by the largest coordinate first, so that no square leaves the range."""
    largest = x.abs().amax(-1, keepdim=True)
    scaled = x / torch.where(largest == 0, 1, largest)
    size = scaled.norm(dim=-1, keepdim=True)
    return scaled / torch.where(size == 0, 1, size)


def kernel(x: Tensor, question: Question) -> Tensor:
    points = on_grid(x, question)
    return gram(points).unsqueeze(1) / points.shape[-1]


def kernel_and_diagonals(x: Tensor, question: Question) -> Tensor:
    values = kernel(x, question)
    diagonal = values.diagonal(dim1=-2, dim2=-1)
    rows, columns = (diagonal.unsqueeze(axis).expand_as(values) for axis in (-1, -2))
    return torch.cat([values, rows, columns], 1)


def cosine(x: Tensor, question: Question) -> Tensor:
    return gram(normalised(on_grid(x, question))).unsqueeze(1)


def cosine_steps(x: Tensor, question: Question) -> Tensor:
    return cosine(x, question).diff(dim=-1)


def adjacent_cosine(x: Tensor, question: Question) -> Tensor:
    units = normalised(vectors(x))
    return (units[:, :-1] * units[:, 1:]).sum(-1).unsqueeze(1)


def _share(found: Tensor, of: float, compared: Tensor) -> Tensor:
    """found / of, one entry per draw; NaN where a compared value is not finite."""
    finite = compared.flatten(1).isfinite().all(1)
    return torch.where(finite.cpu(), found.cpu().double() / of, torch.nan).reshape(-1, 1, 1)


def score_triples(x: Tensor, question: Question) -> Tensor:
    """Share of j < k < i with C_ij < C_ik, strictly."""
    length = x.shape[-2] if x.ndim == 3 else x.shape[2]
    units = normalised(vectors(x))
    found = torch.stack([ascents(draw) for draw in units])
    return _share(found, length * (length - 1) * (length - 2) / 6, units)


GROUP = 128
"""Rows whose ascents are counted together."""


def ascents(x: Float[Tensor, "n d"]) -> Tensor:
    """The number of triples j < k < i with <x_i, x_j> < <x_i, x_k>, by merge counting.

    Rows i are taken in groups, with the columns that come before the last of them; those from the
    diagonal on are -inf, where they are never above anything.
    """
    counts = []
    for start in range(0, len(x), GROUP):
        products = x[start : start + GROUP] @ x[: start + GROUP].T
        above = torch.ones_like(products, dtype=torch.bool).triu(start)
        counts.append(_ascents(products.masked_fill_(above, -torch.inf)))
    return torch.stack(counts).sum()


def _ascents(rows: Float[Tensor, "m n"]) -> Tensor:
    """Of all j < k in each row.

    At each level blocks of doubling width are sorted and every right half is searched in its
    sorted left half: n log^2 n in each row instead of n^2.
    """
    size, length = rows.shape
    width = 1 << max(length - 1, 1).bit_length()
    values = rows.new_full((size, width), -torch.inf)
    values[:, :length] = rows
    total = torch.zeros((), dtype=torch.int64, device=rows.device)
    half = 1
    while half < width:
        left, right = values.view(size, -1, 2, half).unbind(2)
        total += torch.searchsorted(left.sort(-1).values, right.contiguous()).sum()
        half *= 2
    return total


def score_steps(x: Tensor, question: Question) -> Tensor:
    """Share of neighbours (j, j+1), j+1 < i, with C_ij < C_i,j+1, strictly."""
    length = question.architecture.n_ctx
    cosines = gram(normalised(vectors(x)))
    up = (cosines[:, :, :-1] < cosines[:, :, 1:]).tril(-2)
    return _share(up.sum((1, 2)), (length - 1) * (length - 2) / 2, cosines)


def score_norm(x: Tensor, question: Question) -> Tensor:
    """Share of pairs j < k with -|x_j| < -|x_k|, strictly."""
    length = question.architecture.n_ctx
    sizes = -vectors(x).cpu().double().norm(dim=-1)
    falls = (sizes[:, :, None] < sizes[:, None, :]).triu(1)
    return _share(falls.sum((1, 2)), length * (length - 1) / 2, sizes)


def cdf(x: Tensor, question: Question) -> Tensor:
    """Share of coordinates, or of scores over heads and keys, at or below each point."""
    values = x[:, :, -1].flatten(1) if is_pairs(question) else vectors(x)[:, -1]
    values = values.cpu().double()
    shares = [(values <= point).double().mean(-1) for point in question.points]
    finite = values.isfinite().all(-1, keepdim=True)
    return torch.where(finite, torch.stack(shares, -1), torch.nan).unsqueeze(1)


# --------------------------------------------------------------------------- symmetries

TRANSFORMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "past_reversed": lambda x: torch.cat([x[:, :-1].flip(1), x[:, -1:]], 1),
    "reversed": lambda x: x.flip(1),
    "first_repeated": lambda x: x[:, :1].repeat(1, x.shape[1], 1),
}
"""The transformations of `nope.questions`, on inputs `draws positions d_model`."""

ROUNDING_ERRORS = 2**13
"""A gap of at most this many units of the last place (1e-3 in float32, 2e-12 in float64) is
rounding.

A sum of K terms errs by some sqrt(K) units, and N operations one after the other by sqrt(N K):
1000 for 48 blocks of a dozen operations at d = 1600.  Measured are at most 5 units in one block
of d = 64 and 700 in 48, of thousands of draws.  Only cold attention in several blocks (logits of
standard deviation 250 and up, which amplify what they are given) and cancellation at d = 2 pass
the limit, in less than one draw of a hundred.  The gap that shows an order is of the size of the
branch over the stream, from 1 down to d std^2 over the stream's own std: where that is below
1e-3, only float64 tells it from none.
"""


def gap(
    x: Float[Tensor, "draws positions d"], y: Float[Tensor, "draws positions d"]
) -> Float[Tensor, " draws"]:
    """Largest |x_m - y_m|, in units of the rms norm of all x_m and y_m; 0 for zero vectors."""
    x, y = x.cpu().double(), y.cpu().double()
    size = torch.cat([x, y], 1).square().sum(-1).mean(-1).sqrt()
    largest: Tensor = (x - y).norm(dim=-1).amax(-1)
    return largest / torch.where(size == 0, 1, size)


def broken(x: Tensor, y: Tensor) -> Tensor:
    """Per draw, whether the gap is more than rounding, and the gap."""
    found = gap(x, y)
    beyond = found > ROUNDING_ERRORS * torch.finfo(x.dtype).eps
    return torch.stack([beyond.double(), found], 1).unsqueeze(-1)


def past_permutation(x: Tensor, moved: Tensor, question: Question) -> Tensor:
    return broken(vectors(x)[:, -1:], vectors(moved)[:, -1:])


def permutation(x: Tensor, moved: Tensor, question: Question) -> Tensor:
    return broken(vectors(x).flip(1), vectors(moved))


def equal_tokens(x: Tensor, moved: Tensor, question: Question) -> Tensor:
    repeated = TRANSFORMS["first_repeated"]
    return broken(repeated(vectors(moved)), vectors(moved))


def _first(mean: np.ndarray) -> np.ndarray:
    """The gradient of the first of the means."""
    return np.stack([np.ones_like(mean[0]), *np.zeros_like(mean[1:])])


def _mean_gap(mean: np.ndarray) -> str:
    return f"mean gap {float(mean[1, 0]):.1e}"


def _symmetry(components: Components) -> Statistic:
    return Statistic(components, gradient=_first, aside=_mean_gap)


# -------------------------------------------------------------------------------- ratios


def _ratio_to_square(mean: np.ndarray) -> np.ndarray:
    return np.asarray(mean[0] / mean[1] ** 2)


def _ratio_to_square_gradient(mean: np.ndarray) -> np.ndarray:
    return np.stack([1 / mean[1] ** 2, -2 * mean[0] / mean[1] ** 3])


def _kernel_cosine(mean: np.ndarray) -> np.ndarray:
    return np.asarray(mean[0] / np.sqrt(mean[1] * mean[2]))


def _kernel_cosine_gradient(mean: np.ndarray) -> np.ndarray:
    value, root = _kernel_cosine(mean), np.sqrt(mean[1] * mean[2])
    return np.stack([1 / root, -value / (2 * mean[1]), -value / (2 * mean[2])])


STATISTICS = {
    "second_moment": Statistic(second_moment),
    "mean_second_moment": Statistic(mean_second_moment),
    "coordinate_second_moment": Statistic(coordinate_second_moment),
    "kurtosis": Statistic(fourth_and_second, _ratio_to_square, _ratio_to_square_gradient),
    "participation": Statistic(participation),
    "kernel": Statistic(kernel),
    "kernel_cosine": Statistic(kernel_and_diagonals, _kernel_cosine, _kernel_cosine_gradient),
    "cosine": Statistic(cosine),
    "cosine_steps": Statistic(cosine_steps),
    "adjacent_cosine": Statistic(adjacent_cosine),
    "adjacency_score": Statistic(score_triples),
    "adjacency_score.steps": Statistic(score_steps),
    "adjacency_score.norm": Statistic(score_norm),
    "cdf": Statistic(cdf),
    "past_permutation": _symmetry(past_permutation),
    "permutation": _symmetry(permutation),
    "equal_tokens": _symmetry(equal_tokens),
}
"""How each observable of `nope.questions.OBSERVABLES` is measured."""
