"""Questions: shapes, what is judged, how positions are labelled, and when there is no answer."""

import dataclasses
import math
import pickle

import numpy as np
import pytest

import nope
from nope.questions import OBSERVABLES, coordinate_grid, given_weights, position_grid, stream_key

POINTS = (-0.1, 0.0, 0.25)


def ask(observable, place="blocks.0.attn.q", n_ctx=5, d_model=8, **changes):
    architecture = nope.decoder(d_model, 2, n_ctx=n_ctx, **changes)
    points = POINTS if observable == "cdf" else ()
    return nope.Question(architecture, nope.init.normal(0.1), place, observable, points=points)


def where(observable):
    return "blocks.0.attn.pattern" if "vector" not in OBSERVABLES[observable].on else "ln_final"


SHAPES = {  # observable: array shape and number of judged entries at n_ctx = 5, d_model = 8
    "second_moment": ((5,), 5),
    "mean_second_moment": ((1,), 1),
    "coordinate_second_moment": ((2, 8), 16),
    "kurtosis": ((5,), 5),
    "participation": ((5,), 4),
    "cdf": ((3,), 3),
    "kernel": ((5, 5), 15),
    "kernel_cosine": ((5, 5), 10),
    "cosine": ((5, 5), 10),
    "cosine_steps": ((5, 4), 6),
    "adjacent_cosine": ((4,), 4),
    "adjacency_score": ((1,), 1),
    "adjacency_score.steps": ((1,), 1),
    "adjacency_score.norm": ((1,), 1),
    "past_permutation": ((1,), 1),
    "permutation": ((1,), 1),
    "equal_tokens": ((1,), 1),
}


def test_every_observable_has_a_stated_shape():
    """The table above is the whole list."""
    assert set(SHAPES) == set(OBSERVABLES)


@pytest.mark.parametrize("observable", OBSERVABLES)
def test_shape_mask_and_labels_agree(observable):
    """The array's shape, the mask of judged entries and the labels count the same entries."""
    question = ask(observable, where(observable))
    shape, judged = SHAPES[observable]
    assert question.shape == shape
    assert question.judged.shape == shape
    assert question.judged.sum() == judged
    assert len(question.positions) == judged


@pytest.mark.parametrize("observable", ["cosine", "kernel_cosine", "kernel"])
def test_pairs_are_labelled_m_n_with_n_before_m(observable):
    """A symmetric matrix is judged once: (m, n) with n < m, and n = m for a kernel."""
    pairs = ask(observable).positions
    last = 1 if observable == "kernel" else 0
    assert pairs == [[m, n] for m in range(1, 6) for n in range(1, m + last)]


def test_steps_are_labelled_by_query_and_first_key():
    """cosine_steps has (m, n) for the step from n to n + 1 < m."""
    assert ask("cosine_steps").positions == [[m, n] for m in range(1, 6) for n in range(1, m - 1)]


def test_positions_count_from_one():
    """Label m belongs to array index m - 1; participation has nothing to say at m = 1."""
    assert ask("second_moment").positions == [1, 2, 3, 4, 5]
    assert ask("adjacent_cosine").positions == [1, 2, 3, 4]
    assert ask("participation", "blocks.0.attn.pattern").positions == [2, 3, 4, 5]
    assert ask("adjacency_score").positions == ["all"]


def test_coordinates_are_labelled_by_position_and_coordinate():
    """Two positions, at most 16 coordinates, both counted from 1 and spread to the ends."""
    question = ask("coordinate_second_moment", "ln_final", d_model=40)
    assert question.shape == (2, 16)
    assert question.positions[0] == [1, 1]
    assert question.positions[15] == [1, 40]
    assert question.positions[-1] == [2, 40]
    assert len({tuple(p) for p in question.positions}) == 32


@pytest.mark.parametrize("d_model", [1, 2, 16, 17, 768])
def test_coordinate_grid_has_distinct_coordinates_that_exist(d_model):
    """At most 16 of 0 .. d_model - 1, increasing."""
    grid = coordinate_grid(d_model)
    assert len(grid) == min(d_model, 16)
    assert grid[0] == 0
    assert grid[-1] == d_model - 1
    assert (np.diff(grid) > 0).all()


@pytest.mark.parametrize("n_ctx", [1, 2, 64, 65, 512, 10_000])
def test_position_grid_is_small_log_spaced_and_has_both_ends(n_ctx):
    """At most 64 increasing positions from 1 to n_ctx; all of them where they fit."""
    grid = position_grid(n_ctx)
    assert 1 <= len(grid) <= 64
    assert grid[0] == 1
    assert grid[-1] == n_ctx
    assert (np.diff(grid) > 0).all()
    if n_ctx <= 64:
        assert grid.tolist() == list(range(1, n_ctx + 1))
    else:  # neighbours differ by one step of the log grid, or by 1 where that is less
        ratio = n_ctx ** (1 / 63)
        assert (grid[1:] <= np.maximum(grid[:-1] + 1, (grid[:-1] + 0.5) * ratio + 0.5)).all()


def test_the_grid_carries_the_labels():
    """At 512 positions a matrix observable is labelled by grid positions, not indices."""
    question = ask("cosine", n_ctx=512)
    grid = question.grid.tolist()
    assert question.shape == (len(grid), len(grid))
    assert question.positions == [[m, n] for m in grid for n in grid if n < m]
    assert question.positions[-1][0] == 512


NOT_APPLICABLE = {
    "no such place": (("cosine", "blocks.3.ln1"), {}, "no place blocks.3.ln1"),
    "uniform scores": (
        ("second_moment", "blocks.0.attn.scores"),
        {"attention": "uniform"},
        "no place blocks.0.attn.scores",
    ),
    "cosine of a pattern": (
        ("cosine", "blocks.0.attn.pattern"),
        {},
        "cosine is not defined on blocks.0.attn.pattern: it needs a vector place",
    ),
    "participation of a vector": (("participation",), {}, "it needs a pair place"),
    "pairs of one position": (("cosine",), {"n_ctx": 1}, "needs 2 positions and n_ctx is 1"),
    "neighbours of one position": (("adjacent_cosine",), {"n_ctx": 1}, "needs 2 positions"),
    "triples of two positions": (("adjacency_score",), {"n_ctx": 2}, "needs 3 positions"),
    "steps of two positions": (("cosine_steps",), {"n_ctx": 2}, "needs 3 positions"),
    "participation of one position": (
        ("participation", "blocks.0.attn.pattern"),
        {"n_ctx": 1},
        "needs 2 positions",
    ),
}


@pytest.mark.parametrize(
    ("asked", "changes", "reason"), NOT_APPLICABLE.values(), ids=NOT_APPLICABLE
)
def test_questions_without_an_answer_say_why(asked, changes, reason):
    """The reason is given, and asking for the answer raises `LookupError` with it."""
    question = ask(*asked, **changes)
    assert reason in question.reason_not_applicable
    with pytest.raises(LookupError, match=r"expected a question with an answer, but .*; places:"):
        question.require_applicable()


@pytest.mark.parametrize("observable", OBSERVABLES)
def test_at_the_least_number_of_positions_there_is_something_to_judge(observable):
    """`least` positions are enough, and one fewer is refused: never a vacuous question."""
    least = OBSERVABLES[observable].least
    question = ask(observable, where(observable), n_ctx=least)
    assert question.reason_not_applicable is None
    assert question.judged.any()
    if least > 1:
        fewer = ask(observable, where(observable), n_ctx=least - 1)
        assert "positions" in fewer.reason_not_applicable


def test_points_label_a_distribution_function():
    """Every point is judged, and its label is the point."""
    assert ask("cdf").positions == list(POINTS)


@pytest.mark.parametrize(
    ("observable", "points", "message"),
    [
        ("cdf", (), "expected points for cdf"),
        ("cosine", (0.0,), "expected no points for cosine"),
        ("cdf", (1.0, 0.0), "in increasing order"),
        ("cdf", (0.0, 0.0), "in increasing order"),
        ("cdf", (0.0, math.nan), "finite numbers"),
        ("cdf", (0.0, math.inf), "finite numbers"),
        ("cdf", [0.0, 1.0], "a tuple"),
    ],
)
def test_points_are_asked_for_where_they_mean_something(observable, points, message):
    """`ValueError` for points that are missing, superfluous, or not a list of points."""
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ask("kernel"), observable=observable, points=points)


def test_unknown_observables_are_refused():
    """`ValueError` with the observables there are."""
    with pytest.raises(ValueError, match=r"expected an observable of .*kurtosis.*, got 'median'"):
        ask("median")


def test_questions_are_values():
    """Frozen, equal, hashable and picklable: they key the evidence and travel to workers."""
    one, two = ask("cosine"), ask("cosine")
    assert one.judged.any()  # fills the caches
    assert one == two
    assert hash(one) == hash(two)
    assert pickle.loads(pickle.dumps(one)) == two
    assert one != dataclasses.replace(one, given=nope.Weights(0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.place = "embed"


@pytest.mark.parametrize("seed", [-1, 1.0, True, None])
def test_the_seed_of_given_weights_is_a_whole_number(seed):
    """`ValueError` for a seed that is none."""
    with pytest.raises(ValueError, match="expected the weights' seed"):
        nope.Weights(seed)


def fixed(place, seed=3, **changes):
    return given_weights(
        dataclasses.replace(ask("kernel", place, **changes), given=nope.Weights(seed))
    )


def test_given_weights_depend_on_seed_and_path_only():
    """Another place, or bias, changes no array; another seed or path changes every one."""
    scores, output = fixed("blocks.0.attn.scores"), fixed("ln_final", bias=True)
    assert set(scores) == {"blocks.0.attn.W_Q", "blocks.0.attn.W_K"}
    for path, array in scores.items():
        assert np.array_equal(array, fixed("blocks.0.attn.scores")[path])
        assert np.array_equal(array, output[path])
        assert not np.array_equal(array, fixed("blocks.0.attn.scores", seed=4)[path])
    assert not np.array_equal(*scores.values())


def test_given_weights_have_the_scheme_law():
    """64 x 64 weights have the scheme's variance to 5 standard errors, and biases are 0."""
    arrays = fixed("ln_final", d_model=64, bias=True)
    query = arrays["blocks.0.attn.W_Q"]
    assert query.shape == (64, 64)
    assert abs(query.var() / 0.1**2 - 1) <= 5 * math.sqrt(2 / query.size)
    assert not arrays["blocks.0.attn.b_Q"].any()


def test_given_weights_need_a_condition():
    """A question that fixes no weights has none to give."""
    with pytest.raises(ValueError, match=r"expected a question with given=Weights\(seed\)"):
        given_weights(ask("kernel"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"architecture": None}, "an Architecture, got None"),
        ({"init": "normal"}, "a Scheme, got 'normal'"),
        ({"place": None}, "the name of a place, got None"),
        ({"given": 3}, "given to be None or Weights, got 3"),
        ({"given": nope.init}, "given to be None or Weights, got <module .*"),
    ],
)
def test_parts_of_another_type_are_refused(changes, expected):
    """At construction, not where they are first used."""
    with pytest.raises(ValueError, match=f"expected {expected}; "):
        dataclasses.replace(ask("kernel"), **changes)
    with pytest.raises(ValueError, match=r"expected GaussianTokens\(\) .*, got 3; change tokens"):
        nope.decoder(4, 2, n_ctx=4, tokens=3)


def test_stream_keys_are_256_bits_and_keep_labels_apart():
    """Joining labels in another way gives another key."""
    keys = [
        stream_key(1, 2, "a"),
        stream_key(12, "a"),
        stream_key(1, "2a"),
        stream_key(1, "2", "b"),
    ]
    assert len(set(keys)) == 4
    assert all(0 <= key < 2**256 for key in keys)
    assert max(keys) >= 2**128
    assert stream_key(5, "x") == stream_key(5, "x")
