"""The kill table measures the checks; here it is measured itself, then run on every exercise."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys

import pytest
import torch
from rich.console import Console

from autograder import bounded, killtable
from autograder.battery import battery
from autograder.bounded import Bounded, RanAway
from autograder.candidate import Local
from autograder.compare import CandidateError, Mismatch, expect_close, expect_equal
from autograder.costumes import costumes
from autograder.exercise import Exercise, exercises
from autograder.killtable import KillTable, accept, attack, kill_table
from autograder.mutants import FILENAME
from autograder.strategies import tensors


def halves(x, low=0):
    """Half of x, and the number of elements above low."""
    count = (x > low).sum()
    return x / 2, count


def halving(**options):
    """An exercise without checks."""
    return Exercise(halves, paper="Nobody 2026", difficulty=1, minutes=5, **options)


def add_checks(exercise, *, strong=True, examples=20):
    @exercise.check(points=1, hint="-", examples=examples, x=tensors())
    def twice_the_half_is_the_whole(candidate, x):
        """Twice the half is the whole."""
        expect_close(candidate(x)[0] * 2, x, "the double")

    @exercise.check(points=1, hint="-", examples=examples, x=tensors())
    def the_count_is_right(candidate, x):
        """The count is the number of positive elements."""
        count = candidate(x)[1]
        if strong:
            expect_equal(count, int((x > 0).sum()), "the count")
        elif not 0 <= count <= x.numel():
            raise Mismatch("the count is impossible")

    return exercise


def printed(table):
    console = Console(width=140, force_terminal=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_strong_checks_kill_every_mutant():
    row = attack(add_checks(halving()))
    assert {m.fate for m in row.mutants} == {"killed"}
    assert row.rate == 1.0
    assert row.problems == []


def test_what_weak_checks_let_through_is_listed():
    row = attack(add_checks(halving(), strong=False))
    survivors = [m.name for m in row.mutants if m.fate == "survived"]
    assert "count = (x > low).sum()  ->  count = (x >= low).sum()" in survivors
    assert row.rate < killtable.GOAL
    assert "of the mutants are killed, less than 95%" in row.problems[0]
    table = KillTable([row])
    assert not table.ok
    assert survivors[0] in printed(table)


def test_an_explained_survivor_is_equivalent_and_counts_in_the_raw_rate_only():
    weak = attack(add_checks(halving(), strong=False))
    survivors = {m.name: "the weak check says so" for m in weak.mutants if m.fate == "survived"}
    row = attack(add_checks(halving(equivalent=survivors), strong=False))
    assert row.count("equivalent") == len(survivors) > 0
    assert row.problems == []
    table = KillTable([row])
    assert table.ok
    assert table.rate == 1.0 > table.raw_rate
    assert "the weak check says so" in printed(table)


@pytest.mark.parametrize("thorough", [True, False])
def test_an_equivalent_mutant_that_is_killed_or_gone_is_an_error(thorough):
    killed = "count = (x > low).sum()  ->  count = (x >= low).sum()"
    exercise = add_checks(halving(equivalent={killed: "-", "a = b  ->  a = c": "-"}))
    row = attack(exercise, thorough)
    assert any("the_count_is_right kills it" in e and killed in e for e in row.errors)
    assert any("no longer a mutant: a = b  ->  a = c" in e for e in row.errors)
    assert not KillTable([row]).ok


def test_a_misconception_that_passes_is_an_error():
    exercise = add_checks(halving(), strong=False)
    exercise.misconception("You count zeros.")(lambda x, low=0: (x / 2, (x >= low).sum()))
    row = attack(exercise)
    assert row.misconceptions[0].fate == "survived"
    assert any("passes every check" in problem for problem in row.problems)


def test_a_killed_misconception_is_diagnosed_as_itself():
    exercise = add_checks(halving())

    @exercise.misconception("You lose the sign.")
    def forgets_the_sign(x, low=0):
        return x.abs() / 2, (x > low).sum()

    row = attack(exercise)
    assert row.misconceptions[0].by == ("twice_the_half_is_the_whole",)
    assert row.problems == []
    assert not any("diagnosed" in hint for hint in row.hints)


def test_a_misconception_behind_another_that_behaves_alike_is_a_hint():
    exercise = add_checks(halving())
    exercise.misconception("You count zeros.")(counts_zeros)
    exercise.misconception("You count what is not negative.")(counts_what_is_not_negative)
    row = attack(exercise)
    assert row.errors == []
    assert any("diagnosed as counts_zeros: no check tells them apart" in hint for hint in row.hints)


def counts_zeros(x, low=0):
    return x / 2, (x >= low).sum()


def counts_what_is_not_negative(x, low=0):
    return x / 2, (~(x < low)).sum()


def test_a_misconception_whose_student_reads_anothers_sentence_is_an_error():
    exercise = add_checks(halving())
    exercise.misconception("You forget to halve.")(lambda x, low=0: (x, (x > low).sum()))

    @exercise.misconception("You do neither.")
    def does_neither(x, low=0):
        return x, (x >= low).sum()

    # the first check reads only the halves, where both do the same
    exercise.checks[0] = reads_part(exercise)
    assert any("later check tells them apart" in error for error in attack(exercise).errors)


def reads_part(exercise):
    @exercise.check(points=1, hint="-", examples=20, x=tensors(kinds=["positive"]))
    def the_half_of_positive_numbers_is_right(candidate, x):
        """Positive numbers are halved."""
        expect_close(candidate(x)[0] * 2, x, "the double")

    return exercise.checks.pop()


def test_a_check_that_kills_nothing_of_its_own_is_a_hint_not_an_error():
    exercise = add_checks(halving())

    @exercise.check(points=1, hint="-", examples=5, x=tensors())
    def the_shape_stays(candidate, x):
        """The shape stays."""
        assert candidate(x)[0].shape == x.shape

    @exercise.check(points=1, hint="-", examples=1, x=tensors())
    def all_is_well(candidate, x):
        """All is well."""

    row = attack(exercise)
    assert row.hints == [
        "checks that kill nothing: all_is_well",
        "checks that kill only what another one kills too: the_shape_stays",
    ]
    assert row.problems == []


def test_right_variants_are_accepted_and_wrong_ones_reported_with_their_seed():
    exercise = add_checks(halving())
    exercise.accepts("NumPy")(lambda x, low=0: (x.numpy() / 2, (x.numpy() > low).sum()))
    exercise.accepts("wrong for long tensors")(lambda x, low=0: (x / (2 + (x.numel() > 30)), 0))
    row = accept(exercise, range(5, 8))
    assert {r.variant for r in row.rejections} == {"wrong for long tensors"}
    assert {r.seed for r in row.rejections} <= {5, 6, 7}
    assert any("'wrong for long tensors' is rejected" in problem for problem in row.problems)
    assert "the_count_is_right with seed 5" in printed(KillTable([row]))


@pytest.mark.filterwarnings("ignore:this is a warning")
def test_costumes_are_right_and_really_different(capsys):
    x = torch.tensor([[1.0, -2.0, 5.0], [0.0, 3.0, -1.0]]).t()
    dressed = {how.split()[0]: function(x) for how, function in costumes(halves).items()}
    for half, count in dressed.values():
        assert torch.equal(torch.as_tensor(half), x / 2)
        assert count == 3
    assert "almost there" in capsys.readouterr().err
    assert dressed["prints,"][0].is_contiguous()
    assert isinstance(dressed["returns"], list)
    assert not isinstance(dressed["returns"][0], torch.Tensor)
    assert dressed["computes"][0].dtype == torch.float32
    assert 1 not in dressed["computes"][0].stride()


def test_a_check_that_is_too_strict_rejects_a_costume():
    exercise = halving()

    @exercise.check(points=1, hint="-", examples=5, x=tensors())
    def memory_is_in_order(candidate, x):
        """No student was told that the result must be contiguous."""
        assert candidate(x)[0].is_contiguous()

    rejected = {r.variant.split()[0] for r in accept(exercise, range(2)).rejections}
    assert "computes" in rejected


def from_mutant(source, name="f"):
    namespace = {"torch": torch, "itertools": itertools}
    exec(compile(source, FILENAME, "exec"), namespace)
    return Bounded(namespace[name])


@pytest.mark.parametrize(
    "endless",
    [
        "def f():\n    while True:\n        pass",
        "def f():\n    while True:\n        try: 0 / 0\n        except Exception: pass",
        "def f():\n    return min((i for i in itertools.count()), key=lambda i: i)",
    ],
    ids=["while", "a loop that catches exceptions", "generator"],
)
def test_an_endless_loop_is_stopped(endless, monkeypatch):
    monkeypatch.setattr(bounded, "MAX_LINES", 10_000)
    tracer = sys.gettrace()
    with pytest.raises(RanAway, match="lines in a call"):
        from_mutant(endless)()
    assert sys.gettrace() is tracer


def test_an_endless_loop_in_a_helper_is_stopped_by_processor_time(monkeypatch):
    monkeypatch.setattr(bounded, "MAX_SECONDS", 0.2)
    with pytest.raises(RanAway, match="seconds in a call"):
        Bounded(counts_down)(float("inf"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is bounded on Linux")
def test_a_mutant_that_wants_all_memory_is_an_ordinary_failure():
    with pytest.raises(CandidateError, match="memory"):
        from_mutant("def f():\n    return torch.ones(2**33)")()
    assert from_mutant("def f():\n    return torch.ones(3).sum().item()")() == 3.0


def counts_down(n):
    """Zero, the slow way."""
    while n > 0:
        n -= 1
    return n


def test_an_endless_mutant_counts_as_killed(monkeypatch):
    monkeypatch.setattr(bounded, "MAX_LINES", 10_000)
    exercise = Exercise(counts_down, paper="-", difficulty=1, minutes=1)

    @exercise.check(points=1, hint="-", examples=3, x=tensors(kinds=["positive"]))
    def ends_at_zero(candidate, x):
        """The end is zero."""
        expect_equal(candidate(x.numel()), 0, "the end")

    fates = {mutant.name: mutant.fate for mutant in attack(exercise).mutants}
    assert fates["n -= 1  ->  n += 1"] == "killed"
    assert fates["n -= 1  ->  (removed)"] == "killed"


@pytest.fixture
def registered(monkeypatch):
    exercise = add_checks(halving(), examples=3)
    monkeypatch.setattr(killtable, "exercises", lambda: {"halves": exercise})
    monkeypatch.setattr(killtable, "find", {"halves": exercise}.__getitem__)
    return exercise


def test_the_table_adds_up_its_parts_and_tells_how_far_it_is(registered):
    seen = []
    table = kill_table(seeds=12, jobs=1, progress=lambda *step: seen.append(step))
    assert seen == [(0, 4, ""), *((done, 4, "halves") for done in range(1, 5))]
    (row,) = table.rows
    assert (row.exercise, row.seeds) == ("halves", 12)
    assert len(row.variants) == len(costumes(halves))
    assert table.ok
    exported = json.loads(json.dumps(table.to_json()))
    assert exported["rate"] == exported["raw_rate"] == 1.0
    assert [m["fate"] for m in exported["rows"][0]["mutants"]] == ["killed"] * len(row.mutants)


def test_without_thorough_a_misconception_is_done_with_where_it_is_called_by_its_name():
    exercise = add_checks(halving())
    exercise.misconception("Nothing is right.")(lambda x, low=0: (x + 1, (x > low).sum() + 1))
    (all_of_it,) = attack(exercise).misconceptions
    (quick,) = attack(exercise, thorough=False).misconceptions
    assert (quick.fate, quick.by) == ("killed", all_of_it.by[:1])
    assert len(all_of_it.by) > 1


def test_without_thorough_a_mutant_is_done_with_at_the_first_check_that_fails_it(registered):
    (row,) = kill_table(["halves"], seeds=1, jobs=1, thorough=False).rows
    assert {len(mutant.by) for mutant in row.mutants} == {1}
    assert row.hints == []


@pytest.mark.parametrize(("option", "value"), [("seeds", 0), ("jobs", 0), ("jobs", -2)])
def test_bad_options_are_refused(option, value):
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got {value}"):
        kill_table([], **{"seeds": 1, "jobs": 1, option: value})


def test_the_reference_is_judged_on_the_same_inputs_as_in_a_grade():
    exercise = add_checks(halving())
    assert battery(exercise.checks[0], 0) is battery(exercise.checks[0], killtable.SEED)
    assert Local(exercise.reference)(torch.ones(2))[1] == 2


# Every exercise of the course, on one seed (test_every_exercise.py judges on another). `fewer
# kill-table` does the same with 200.


@pytest.mark.parametrize("name", list(exercises()))
def test_checks_reject_what_is_wrong_and_accept_what_is_right(name):
    exercise = exercises()[name]
    if exercise.decorator is not None:  # kernels take their time, and there it is the same seed
        exercise = dataclasses.replace(exercise, misconceptions=[])
    table = KillTable([attack(exercise, thorough=False), accept(exercise, range(1))])
    assert table.ok, "\n".join([*table.problems(), printed(table)])


def test_parts_are_worked_on_in_other_processes():
    name = "matmul_int8"
    tasks = [(name, range(1)), (name, range(1, 3))]
    parts = [part for _, part in killtable._work(tasks, jobs=2, thorough=False)]
    assert sorted(part.seeds for part in parts) == [1, 2]
    assert parts[0].variants == accept(exercises()[name], range(1)).variants
