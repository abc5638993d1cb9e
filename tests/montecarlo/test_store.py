"""The evidence store: what is found again, what is refused, and that nothing is lost."""

import importlib.util
import os
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

import nope
from montecarlo import Campaign, Conditions, Measurement, Target, decide, engines, measure, sampler
from montecarlo import store as stores
from montecarlo.campaign import AHEAD
from montecarlo.moments import Moments
from montecarlo.provenance import Origin, Series, describe
from montecarlo.sampler import Group
from montecarlo.store import FILE, Store

INIT = nope.init.normal(0.3)
Q, PATTERN = "blocks.0.attn.q", "blocks.0.attn.pattern"


def ask(place=Q, observable="second_moment", init=INIT, **changes):
    return nope.Question(nope.decoder(4, 2, n_ctx=4, d_ff=3, **changes), init, place, observable)


BLOCK = Group.of(ask()).block_size
ASKED = [ask(), ask("ln_final", "kernel_cosine"), ask(PATTERN, "participation")]


def campaign(store, questions=ASKED, blocks=3, **options):
    bounds = [np.full(question.shape, np.inf) for question in questions]
    targets = [Target(q, -b, b, 0.5, 0.5) for q, b in zip(questions, bounds, strict=True)]
    return Campaign(targets, Conditions(), blocks * BLOCK, store=store, **options)


def drawn(directory, questions=ASKED, blocks=3):
    """The moments of questions over some blocks, and how many were recalled and computed."""
    with Store(directory) as store:
        asked = campaign(store, questions, blocks)
        found = [decision.measurement.moments for decision in asked.run()]
        return found, store.recalled, asked.computed


def same_bits(one, two):
    return one.count == two.count and all(
        getattr(one, name).tobytes() == getattr(two, name).tobytes()
        for name in ("mean", "second", "third")
    )


def rows(directory):
    with closing(sqlite3.connect(directory / FILE, 10)) as file:
        return file.execute("SELECT series, number, checksum FROM block ORDER BY 1, 2").fetchall()


def alter(directory, *statements):
    with closing(sqlite3.connect(directory / FILE)) as file:
        for statement in statements:
            file.execute(statement)
        file.commit()


# ---------------------------------------------------------------------------- found again


def test_a_question_asked_again_is_answered_from_the_store(tmp_path):
    """Nothing is computed a second time, and the bits are those of the first."""
    first, recalled, computed = drawn(tmp_path)
    assert (recalled, computed) == (0, 9)
    again, recalled, computed = drawn(tmp_path)
    assert (recalled, computed) == (9, 0)
    assert all(map(same_bits, first, again))


def test_what_is_decided_again_computes_nothing(tmp_path, monkeypatch):
    """However many blocks are now in flight: what is known is taken in before any is sent off."""
    truth = 4 * 0.3**2  # LayerNorm makes |x|^2 = 4 exactly, so E q^2 = d std^2
    bounds = np.full(4, 0.95 * truth), np.full(4, 1.05 * truth)
    targets = [Target(ASKED[0], *bounds, 1e-3, 1e-3)]
    with Store(tmp_path) as store:
        (first,) = Campaign(targets, Conditions(), store=store).run()
    monkeypatch.setattr(sampler, "block", None)
    with Store(tmp_path) as store:
        (again,) = Campaign(targets, Conditions(), store=store).run(in_flight=8)
        assert store.recalled * BLOCK == again.measurement.draws
    assert first.verdict == again.verdict == "CONFIRMED"
    assert same_bits(first.measurement.moments, again.measurement.moments)
    assert decide(ASKED[0], *bounds, 2e-3, workers=1, store=tmp_path).verdict == "CONFIRMED"
    assert measure(ASKED[0], BLOCK, store=tmp_path).draws == BLOCK


def test_more_draws_and_more_questions_compute_only_what_is_missing(tmp_path):
    """A longer run adds blocks, a new question its own; alone or with others, the same bits."""
    drawn(tmp_path, ASKED[:1], blocks=2)
    found, recalled, computed = drawn(tmp_path, blocks=3)
    assert (recalled, computed) == (2, 3 * 3 - 2)
    fresh, *_ = drawn(tmp_path / "another", blocks=3)
    assert all(map(same_bits, found, fresh))
    (alone,), recalled, computed = drawn(tmp_path, ASKED[1:2], blocks=3)
    assert (recalled, computed) == (3, 0)
    assert same_bits(alone, fresh[1])


def test_what_follows_from_recalled_evidence_is_the_same_to_the_last_bit(tmp_path):
    """Standard errors sum over components, in an order that the arrays' layout might change."""
    one, two = (drawn(tmp_path, blocks=2)[0] for _ in range(2))
    for question, fresh, recalled in zip(ASKED, one, two, strict=True):
        pair = Measurement(question, fresh), Measurement(question, recalled)
        assert np.array_equal(*(m.standard_error for m in pair))
        assert np.array_equal(*(m.half_width(0.01) for m in pair), equal_nan=True)


def test_measure_and_decide_use_a_store(tmp_path):
    """A second call takes everything from it: nothing is added."""
    for call in (
        lambda: measure(ASKED, 2 * BLOCK, store=tmp_path)[1].moments,
        lambda: decide(ASKED[0], 0.3, 0.5, store=tmp_path, workers=1).measurement.moments,
    ):
        first, kept = call(), rows(tmp_path)
        assert same_bits(first, call())
        assert rows(tmp_path) == kept


def series(**changes):
    return replace(Series(ask(), Conditions(), Origin("code", "build", "cpu")), **changes)


ODD = np.array([[5e-324, -0.0, np.inf, 1 / 3]])
KEPT = Moments(3, ODD, ODD[None], 7 * ODD[None, None])
OTHERS = {
    "question": {"question": ask("blocks.0.attn.k")},
    "seed": {"conditions": Conditions(1)},
    "dtype": {"conditions": Conditions(dtype="float64")},
    "sources": {"origin": Origin("changed", "build", "cpu")},
    "build": {"origin": Origin("code", "another", "cpu")},
    "device": {"origin": Origin("code", "build", "cuda")},
    "estimator": {"estimator": "conditioned"},
}


def test_rows_are_exact_and_found_by_their_whole_key_only(tmp_path):
    """Subnormal, infinite and negative zero come back; no other key finds them."""
    with Store(tmp_path) as store:
        store.keep(series(), 5, KEPT)
        assert store.recall(series(), 5) is None
        store.commit()
    with Store(tmp_path) as store:
        assert same_bits(store.recall(series(), 5), KEPT)
        assert store.recall(series(), 4) is None
        for name, change in OTHERS.items():
            assert store.recall(series(**change), 5) is None, name


# ------------------------------------------------------------------------------- the key

TEXT = nope.tokens.TextTokens()
DIFFERENT = [
    nope.tokens.GaussianTokens(),
    nope.tokens.GaussianTokens(0.03),
    nope.tokens.EmbeddingTokens(8),
    nope.tokens.EmbeddingTokens(8, exponent=1.0),
    nope.tokens.WithBos(nope.tokens.EmbeddingTokens(8)),
    TEXT,
    replace(TEXT, unit="characters"),
    nope.init.normal(0.1),
    nope.init.normal(np.nextafter(0.1, 1)),
    nope.init.truncated_normal(0.1),
    nope.init.gpt2(),
    nope.init.xavier_uniform(),
    nope.init.xavier_normal(),
    nope.init.kaiming_normal(),
    nope.init.lecun_uniform(),
    nope.init.orthogonal(),
    nope.init.mup(),
    nope.init.torch_default(),
    nope.init.torch_default(packed=False),
    nope.Weights(1),
    *ASKED,
    replace(ASKED[0], given=nope.Weights(1)),
    ask(norm="rmsnorm"),
    ask(eps=1e-5),
    ask(causal=False),
    nope.Question(nope.decoder(4, 2, n_ctx=4), INIT, "embed", "cdf", points=(0.0, 1.0)),
    np.zeros(3),
    np.zeros(3, dtype=np.float32),
    np.zeros((1, 3)),
    np.ones(3),
    ("a, b",),
    ("a", "b"),
    (("a",), "b"),
    None,
    "None",
    "1",
    1,
]


def test_different_values_have_different_descriptions():
    """Every kind of tokens and scheme, and what the parts of a question can be."""
    for one, two in combinations(DIFFERENT, 2):
        assert describe(one) != describe(two)


def test_equal_values_have_equal_descriptions(tmp_path):
    """As == has it: 1 is 1.0, and a text is its content, wherever it lies."""
    assert describe(nope.init.normal(1)) == describe(nope.init.normal(np.float64(1)))
    copies = [tmp_path / "a", tmp_path / "b"]
    for copy in copies:
        copy.write_text("to be or not to be")
    one, two = map(nope.tokens.TextTokens, copies)
    assert one == two
    assert describe(one) == describe(two)


MINE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine:
    x: int = 1
"""


def loaded(path, text):
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("users_own", path)
    module = sys.modules["users_own"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Mine()


def test_a_users_class_counts_with_its_source(tmp_path, monkeypatch):
    """The same file is the same key; a change of it is another."""
    monkeypatch.setitem(sys.modules, "users_own", None)
    texts = [describe(loaded(tmp_path / "mine.py", MINE + extra)) for extra in ("", "", "# 2")]
    assert texts[0] == texts[1] != texts[2]


def test_a_class_of_a_package_counts_with_all_its_sources(tmp_path, monkeypatch):
    """What the class's own module imports may change its bits too; data and other packages not."""
    package = tmp_path / "users_package" / "layers"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)

    def told():
        for name in [name for name in sys.modules if name.startswith("users_package")]:
            monkeypatch.delitem(sys.modules, name)
        return describe(importlib.import_module("users_package.layers.mine").Mine())

    first = told()
    (package.parent / "notes.txt").touch()
    (tmp_path / "other.py").touch()
    assert told() == first
    (package.parent / "rounding.py").write_text("DIGITS = 3")
    assert told() != first


class Opaque:
    """A scheme that text cannot tell."""

    def law(self, weight, architecture):
        return nope.init.Normal(0.3)


def test_what_cannot_be_described_is_computed_and_not_kept(tmp_path):
    """No key, no row: never a row under a key that means something else."""
    questions = [ask(init=Opaque())]
    assert not questions[0].reason_not_applicable
    for _ in range(2):
        _, recalled, computed = drawn(tmp_path, questions, blocks=1)
        assert (recalled, computed) == (0, 1)
    assert rows(tmp_path) == []


def test_notes_are_kept_as_they_are(tmp_path):
    """Any bytes under any key, once committed; a first note stays; a damaged one is refused."""
    with Store(tmp_path) as store:
        store.note("a", b"\x00\xff")
        store.note("b", b"")
        assert store.noted("a") is None
        assert store.patience == 0
        store.settle()
        store.note("a", b"later")
    with Store(tmp_path) as store:
        assert [store.noted(key) for key in "abc"] == [b"\x00\xff", b"", None]
        for value in ("x'01'", "'text'"):
            alter(tmp_path, f"UPDATE note SET content = {value} WHERE key = 'a'")
            with pytest.raises(OSError, match="a damaged note a"):
                store.noted("a")
        with pytest.raises(OSError, match="a damaged note a"):
            store.noted("a")


# ------------------------------------------------------------------------------- refused


def refused(directory):
    """What a run on a store that cannot be used says: one line, in the house form."""
    with pytest.raises(OSError, match="expected") as caught:
        drawn(directory)
    (line,) = str(caught.value).splitlines()
    assert str(directory / FILE) in line
    return line


def other_program(file):
    with closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE recipes (name TEXT)")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


SPOILT = {
    "no database": (lambda file: file.write_text("notes\n" * 1000), "not a database"),
    "another program's": (other_program, "another program's database"),
    "cut in half": (lambda file: (drawn(file.parent), cut(file)), "malformed"),
    "another version": (
        lambda file: (drawn(file.parent), alter(file.parent, "PRAGMA user_version = 99")),
        "one of version 99",
    ),
}


@pytest.mark.parametrize(("spoil", "said"), SPOILT.values(), ids=SPOILT)
def test_a_spoilt_store_is_refused_and_left_as_it_is(tmp_path, spoil, said):
    """Corrupt, foreign or of another version: an error that says so, and not a byte is changed."""
    spoil(tmp_path / FILE)
    content = (tmp_path / FILE).read_bytes()
    assert said in refused(tmp_path)
    assert (tmp_path / FILE).read_bytes() == content


@pytest.mark.parametrize("value", ["zeroblob(length(mean))", "'text'", "7", "x''"])
def test_a_damaged_block_is_refused(tmp_path, value):
    """A number that is no longer what was computed decides nothing, whatever SQLite has for it."""
    drawn(tmp_path)
    alter(tmp_path, f"UPDATE block SET mean = {value} WHERE number = 2")
    kept = rows(tmp_path)
    assert "a damaged block 2" in refused(tmp_path)
    assert rows(tmp_path) == kept


def test_an_empty_file_is_an_empty_store(tmp_path):
    """A process killed before its first commit leaves one."""
    (tmp_path / FILE).touch()
    assert drawn(tmp_path, blocks=1)[2] == 3


@contextmanager
def powerless():
    """Without the rights of root, which may write anywhere."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_read_only_directory_is_refused_before_anything_is_drawn(tmp_path):
    """With a store in it or without; what was there is there."""
    drawn(tmp_path / "kept")
    kept = rows(tmp_path / "kept")
    (tmp_path / "bare").mkdir()
    reachable = {folder: folder.stat().st_mode for folder in [tmp_path, *tmp_path.parents][:-1]}
    try:
        for folder, mode in reachable.items():
            folder.chmod(mode | 0o011)
        for name in ("kept", "bare"):
            (tmp_path / name).chmod(0o555)
            with powerless():
                assert "writable" in refused(tmp_path / name)
            (tmp_path / name).chmod(0o755)
    finally:
        for folder, mode in reachable.items():
            folder.chmod(mode)
    assert rows(tmp_path / "kept") == kept


def test_a_full_disk_loses_nothing_that_was_committed(tmp_path):
    """SQLite's own limit on pages stands in for the disk; with room again the run goes on."""
    drawn(tmp_path, blocks=1)
    kept = rows(tmp_path)
    store = Store(tmp_path)
    store._file.execute("PRAGMA max_page_count = 1")
    for work in (campaign(store, blocks=20).run, store.close):
        with pytest.raises(OSError, match="full; make room"):
            work()
    assert rows(tmp_path) == kept
    _, recalled, computed = drawn(tmp_path, blocks=2)
    assert (recalled, computed) == (3, 3)


def test_a_store_that_stays_locked_is_refused(tmp_path, monkeypatch):
    """After waiting, and without harm to who holds it."""
    drawn(tmp_path, blocks=1)
    monkeypatch.setattr(stores, "BUSY_SECONDS", 0.05)
    with closing(sqlite3.connect(tmp_path / FILE)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert "locked" in refused(tmp_path)


# ------------------------------------------------------------------------ when it is kept


def test_commits_come_together_and_in_time(tmp_path, monkeypatch):
    """The first row at once, the next ones a second later at most, and none is left behind."""
    with Store(tmp_path) as store:
        store.keep(series(), 0, KEPT)
        store.settle()
        assert len(rows(tmp_path)) == 1
        assert store.patience is None
        store.keep(series(), 1, KEPT)
        store.settle()
        assert 0 < store.patience <= stores.COMMIT_SECONDS
        assert len(rows(tmp_path)) == 1
        monkeypatch.setattr(stores, "COMMIT_SECONDS", 0.0)
        store.settle()
        assert len(rows(tmp_path)) == 2
        store.keep(series(), 2, KEPT)
    assert len(rows(tmp_path)) == 3


@contextmanager
def threads():
    with ThreadPoolExecutor(4) as executor:
        yield engines.Running(executor, room=2)


def in_threads(monkeypatch, held):
    """An engine of threads; `held(index)` is called before each block is computed."""
    block = sampler.block

    def waiting(group, questions, index, conditions):
        held(index)
        return block(group, questions, index, conditions)

    monkeypatch.setattr(sampler, "block", waiting)
    monkeypatch.setattr(engines, "engine", lambda *_: threads)


def test_a_block_is_committed_while_a_slow_one_is_waited_for(tmp_path, monkeypatch):
    """The last block does not end until the others are in the file."""
    seen = []

    def held(index):
        deadline = time.monotonic() + 300
        while index == 3 and len(rows(tmp_path)) < 9 and time.monotonic() < deadline:
            time.sleep(0.02)
        seen.append((index, len(rows(tmp_path))))

    with Store(tmp_path) as store:
        in_threads(monkeypatch, held)
        campaign(store, blocks=4).run()
    assert dict(seen)[3] == 9


def test_known_blocks_do_not_pile_up_behind_a_missing_one(tmp_path, monkeypatch):
    """Memory does not grow with the draws, even where a killed run left a hole."""
    blocks = 12 * AHEAD
    fresh, *_ = drawn(tmp_path, ASKED[:1], blocks)
    alter(tmp_path, "DELETE FROM block WHERE number = 1")
    release, piled = threading.Event(), []
    timer = threading.Timer(0.3, release.set)
    timer.start()
    in_threads(monkeypatch, lambda index: release.wait(20))
    with Store(tmp_path) as store:
        asked = campaign(
            store,
            ASKED[:1],
            blocks,
            progress=lambda c: piled.append(len(c.streams[0].waiting)),
        )
        (found,) = asked.run()
    timer.join()
    assert asked.computed == 1
    assert AHEAD <= max(piled) <= 2 * AHEAD + 2
    assert same_bits(found.measurement.moments, fresh[0])


SHARED = f"""
import sys, time
sys.path[:0] = {sys.path!r}
import nope, montecarlo
a = nope.decoder(4, 2, n_ctx=4, d_ff=3)
places = [({Q!r}, "second_moment"), ("ln_final", "kernel_cosine"), ({PATTERN!r}, "participation")]
asked = [nope.Question(a, nope.init.normal(0.3), *place) for place in places]
time.sleep(max(0, float(sys.argv[2]) - time.time()))
montecarlo.measure(asked, 20 * {BLOCK}, device="cpu", store=sys.argv[1])
"""


def test_two_processes_share_a_store(tmp_path):
    """Both finish, every row is there once, and the bits are those of one process."""
    command = [sys.executable, "-c", SHARED, str(tmp_path), str(time.time() + 2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    with closing(sqlite3.connect(tmp_path / FILE)) as file:
        assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    drawn(tmp_path / "alone", blocks=20)
    assert rows(tmp_path) == rows(tmp_path / "alone")
    assert len(rows(tmp_path)) == 60
