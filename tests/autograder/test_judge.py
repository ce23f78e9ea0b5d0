"""The heart of the grader: right work passes, wrong work fails and is told why, always the same."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autograder.battery import battery
from autograder.candidate import Call, Local
from autograder.compare import CandidateDied, expect_close, expect_error
from autograder.exercise import Exercise, exercises
from autograder.judge import check, diagnose, judge, same
from autograder.strategies import tensors
from autograder.verdict import MIME, Verdict


def halves(x, shift=0.0):
    """Halve a tensor; a negative shift is refused."""
    if shift < 0:
        raise ValueError(f"shift must not be negative, got {shift}")
    return x / 2 + shift, 2.0


halving = Exercise(halves, paper="Nobody 2026", difficulty=1, minutes=5)


@halving.check(points=3, hint="Is the sign kept?", x=tensors())
def twice_the_half_is_the_whole(candidate, x):
    """Adding the result to itself gives the input back."""
    half, _ = candidate(x)
    expect_close(half + half, x, "half + half")


@halving.check(points=1, hint="Two.", x=tensors(), shift=st.floats(0, 1))
def the_divisor_is_told(candidate, x, shift):
    """The second value is the divisor."""
    expect_close(candidate(x, shift=shift)[1], 2.0, "the divisor")


@halving.check(points=1, hint="Look at shift.", examples=5, x=tensors())
def bad_input_is_refused(candidate, x):
    """A negative shift raises ValueError."""
    expect_error(candidate, ValueError, x, shift=-1.0)


@halving.misconception("You lose the sign of x.")
def forgets_the_sign(x, shift=0.0):
    if shift < 0:
        raise ValueError("no")
    return x.abs() / 2 + shift, 2.0


@halving.misconception("You halve twice.")
def quarters(x, shift=0.0):
    return x / 4, 2.0


def verdict_of(function, **options):
    return judge(halving, Local(function), **options)


def statuses(verdict):
    return [result.status for result in verdict.results]


def test_the_reference_gets_all_points():
    verdict = verdict_of(halves)
    assert verdict.passed
    assert (verdict.points, verdict.possible, float(verdict)) == (5, 5, 5.0)


@pytest.mark.parametrize(
    "right",
    [
        lambda x, shift=0.0: [x.numpy() / 2 + halves(x, shift)[1] * 0 + shift, np.float64(2)],
        lambda x, shift=0.0: ((x.double() * 0.5 + shift), torch.tensor(2)),
        lambda x, shift=0.0: print("noise") or halves(x.requires_grad_(), shift),
        lambda x, shift=0.0: warnings.warn("noise", stacklevel=1) or halves(x, shift),
        lambda x, shift=0.0: (sys.stderr.write("noise"), halves(x, shift))[1],
        lambda x, shift=0.0: (halves(x.clone(), shift), x.zero_())[0],
    ],
    ids=["numpy-and-list", "float64", "grad", "warns", "stderr", "spoils-its-input"],
)
def test_right_work_in_another_style_passes(right):
    def function(x, shift=0.0):
        if shift < 0:
            raise ValueError("shift")
        return right(x, shift)

    assert verdict_of(function).passed


def test_each_property_is_paid_on_its_own():
    verdict = verdict_of(lambda x, shift=0.0: (x / 2, 3.0))
    assert statuses(verdict) == ["passed", "failed", "failed"]
    assert verdict.points == 3


def test_explaining_does_not_change_the_points():
    for function in (halves, forgets_the_sign, quarters, lambda x, shift=0.0: None):
        told, untold = verdict_of(function), verdict_of(function, explain=False)
        assert statuses(told) == statuses(untold)


def test_a_failure_shows_call_result_and_hint():
    verdict = verdict_of(lambda x, shift=0.0: (x * 0.5 + 1, 2.0))
    failure = verdict.results[0].failure
    assert failure.call.startswith("halves(tensor(")
    assert "half + half" in failure.message
    assert failure.got
    text = str(verdict)
    assert "Is the sign kept?" in text
    assert "Adding the result to itself" in text


def test_counter_examples_are_shrunk():
    # Wrong only where two elements or more are there: the simplest such tensor has exactly two.
    def wrong(x, shift=0.0):
        return (x / 2 if x.numel() < 2 else x / 2 + 1), 2.0

    call = verdict_of(wrong).results[0].failure.call
    assert call.count(",") <= 2, call


def test_a_known_misconception_is_named_and_others_are_not():
    assert verdict_of(forgets_the_sign).results[0].diagnosis == "You lose the sign of x."
    assert verdict_of(quarters).results[0].misconception == "quarters"
    unknown = verdict_of(lambda x, shift=0.0: (x / 3, 2.0))
    assert unknown.results[0].diagnosis == ""


def test_nothing_written_is_todo_and_not_wrong():
    def empty(x, shift=0.0):
        raise NotImplementedError

    verdict = verdict_of(empty)
    assert verdict.todo
    assert verdict.points == 0
    assert verdict.first_failure is None


def test_an_exception_is_reported_as_the_students_own():
    verdict = verdict_of(lambda x, shift=0.0: 1 / 0)
    assert "ZeroDivisionError: division by zero" in verdict.results[0].failure.message


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, "the result is None, expected a tuple (a tensor, a number)"),
        ((1.0,), "expected a tuple (a tensor, a number)"),
        ((torch.ones(2), "2"), "part 2 of the result is a string, expected a number"),
        ((object(), 2.0), "part 1 of the result is an object of type object"),
    ],
)
def test_a_result_of_the_wrong_form_is_told_in_words(returned, told):
    assert told in verdict_of(lambda x, shift=0.0: returned).results[0].failure.message


def test_an_object_equal_to_everything_earns_nothing():
    class Yes(float):
        def __eq__(self, other):
            return True

        def __sub__(self, other):
            return 0.0

        __hash__ = float.__hash__

    class Liar:
        def __getattr__(self, name):
            return lambda *a, **k: True

        def __eq__(self, other):
            return True

        __hash__ = None

    assert verdict_of(lambda x, shift=0.0: (Liar(), Liar())).points == 0
    assert statuses(verdict_of(lambda x, shift=0.0: (x, Yes(3))))[1] == "failed"


def test_a_dead_candidate_fails_the_rest_of_the_exercise():
    class Dies:
        calls = 0

        def foresee(self, calls):
            pass

        def __call__(self, *args, **kwargs):
            self.calls += 1
            if "shift" in kwargs:
                raise CandidateDied("your code ended the process")
            return halves(*args, **kwargs)

    verdict = judge(halving, Dies())
    assert statuses(verdict) == ["passed", "failed", "failed"]
    assert "ended the process" in verdict.results[1].failure.message


def test_the_same_function_and_seed_give_the_same_verdict():
    for seed in (0, 7):
        a, b = verdict_of(quarters, seed=seed), verdict_of(quarters, seed=seed)
        assert a.to_json() == b.to_json()


def test_another_seed_draws_other_inputs():
    item = halving.checks[0]
    a, b = (battery(item, seed) for seed in (0, 1))
    assert len(a) == len(b) == 40
    assert any(
        x["x"].shape != y["x"].shape or not torch.equal(x["x"], y["x"])
        for x, y in zip(a, b, strict=True)
    )


DRAW = """
import sys
sys.path.insert(0, {folder!r})
{extra}
import torch
from hypothesis import strategies as st
from autograder.battery import battery
from autograder.exercise import Exercise, exercises

def f(n, r, s): return n
ex = Exercise(f, paper="", difficulty=1, minutes=1)

@ex.check(points=1, hint="", examples=200, n=st.integers(0, 2**20), r=st.floats(0, 1), s=st.text())
def draws(candidate, n, r, s):
    "Doc."
print(battery(ex.checks[0], 3))
"""


def test_the_inputs_do_not_depend_on_which_modules_are_imported(tmp_path):
    # Hypothesis mixes constants of imported local modules into its draws; a grade must not.
    (tmp_path / "local_constants.py").write_text(
        "N = [987654, 123457, 555555]\nR = [0.123456789, 0.987654321]\nS = 'zebra'\n"
    )
    drawn = [
        subprocess.run(
            [sys.executable, "-c", DRAW.format(folder=str(tmp_path), extra=extra)],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        ).stdout
        for extra in ("", "import local_constants")
    ]
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 1000


def listed(**inputs):
    exercise = Exercise(halves, paper="none", difficulty=1, minutes=1)

    @exercise.check(points=1, hint="", **inputs)
    def works(candidate, **drawn):
        """It works."""
        candidate(torch.tensor([float(sum(drawn.values()))]))

    return exercise, exercise.checks[0]


@given(
    st.lists(st.integers(), min_size=1, max_size=5), st.lists(st.integers(), min_size=1, max_size=4)
)
def test_of_listed_inputs_every_combination_is_asked_once_whatever_the_seed(first, second):
    _, check = listed(a=first, b=second)
    want = [{"a": a, "b": b} for a in first for b in second]
    assert battery(check, 0) == battery(check, 12345) == want
    assert battery(listed()[1], 0) == [{}]


def test_of_listed_inputs_the_first_that_fails_is_shown():
    exercise, _ = listed(a=[1, 2, 3, 4])

    def fails_from_two_on(x):
        if x.item() >= 2:
            raise RuntimeError("too large")
        return x, 2.0

    result = judge(exercise, Local(fails_from_two_on)).results[0]
    assert result.status == "failed"
    assert "2." in result.failure.call


@pytest.mark.parametrize(
    ("inputs", "error", "says"),
    [
        ({"a": [1], "examples": 3}, ValueError, "examples is for strategies"),
        ({"a": []}, ValueError, "a list of inputs is empty"),
        ({"a": [1], "b": st.integers()}, TypeError, "a: a list, beside strategies"),
        ({"a": (1, 2)}, TypeError, "a must be a strategy or a list, got \\(1, 2\\)"),
        ({"a": 3, "b": st.integers()}, TypeError, "a must be a strategy or a list, got 3"),
    ],
)
def test_inputs_that_cannot_be_are_named(inputs, error, says):
    with pytest.raises(error, match=says):
        listed(**inputs)


def test_nobody_can_spoil_the_shared_inputs():
    before = [x["x"].clone() for x in battery(halving.checks[0], 0)]

    def vandal(x, shift=0.0):
        x.fill_(99)
        return x, 2.0

    verdict_of(vandal)
    after = [x["x"] for x in battery(halving.checks[0], 0)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_diagnosis_needs_the_same_behaviour_on_every_failing_call():
    calls = [
        Call((torch.tensor([-1.0]),), {}, (torch.tensor([0.5]), 2.0)),
        Call((torch.tensor([-3.0]),), {}, (torch.tensor([1.5]), 2.0)),
    ]
    assert diagnose(halving, calls).name == "forgets_the_sign"
    calls[1].value = (torch.tensor([1.4]), 2.0)
    assert diagnose(halving, calls) is None
    assert diagnose(halving, []) is None


def test_same_compares_data_and_not_types():
    assert same([torch.tensor([1, 2]), {"a": 1}], (torch.tensor([1.0, 2.0]), {"a": 1.0}))
    assert same(float("nan"), torch.tensor(float("nan")))
    assert not same(torch.zeros(2), torch.zeros(1, 2))
    assert not same((1, 2), (1, 2, 3))
    assert not same("a", 1)
    assert not same({"a": 1}, {"b": 1})


def test_a_verdict_survives_json():
    import json

    verdict = verdict_of(quarters)
    assert Verdict.from_json(json.loads(json.dumps(verdict.to_json()))) == verdict


def test_the_notebook_form_is_a_number_a_card_and_the_data():
    bundle = verdict_of(quarters)._repr_mimebundle_()
    assert float(bundle["text/plain"]) == verdict_of(quarters).points
    assert "You halve twice." in bundle["text/html"]
    assert Verdict.from_json(bundle[MIME]) == verdict_of(quarters)


def test_what_a_student_returns_cannot_inject_markup():
    evil = "<script>alert(1)</script>"

    def wrong(x, shift=0.0):
        raise RuntimeError(evil)

    card = verdict_of(wrong).html()
    assert evil not in card
    assert "&lt;script&gt;" in card


def test_check_names_the_exercises_when_there_is_none_of_that_name():
    with pytest.raises(KeyError, match="quantize_symmetric"):
        check(lambda x: x)


def test_check_wants_the_function_and_not_its_name():
    with pytest.raises(TypeError, match="without the quotes"):
        check("quantize_symmetric")


def test_source_of_a_variant_takes_the_exercises_name():
    source = halving.source(quarters)
    assert source.startswith("def halves(x, shift=0.0):\n    return x / 4")


def test_a_check_without_a_statement_is_refused():
    with pytest.raises(ValueError, match="needs a docstring"):

        @halving.check(points=1, hint="", x=tensors())
        def silent(candidate, x):
            pass


def test_numbers_too_large_for_a_tensor_are_judged_like_any_other():
    assert statuses(verdict_of(lambda x, shift=0.0: (x / 2, 2**70)))[1] == "failed"
    assert not same(2**70, 2)
    assert not same(10**400, 2)


def test_an_object_reads_the_same_every_time():
    def wrong(x, shift=0.0):
        return (i for i in range(3))

    assert verdict_of(wrong).to_json() == verdict_of(wrong).to_json()


@pytest.mark.parametrize("explain", [True, False])
def test_who_refuses_everything_earns_nothing_for_refusing_what_is_wrong(explain):
    def raises(*args, **kwargs):
        raise ValueError("no")

    def picky(x, *args, **kwargs):  # wrong, but it tells good input from bad
        exercises()["sqnr"].reference(x, *args, **kwargs)
        return 0.0

    for name in ("sqnr", "quantize_symmetric", "top_k_mask", "tree_mask"):
        assert judge(exercises()[name], Local(raises), explain=explain).points == 0, name
    refusal = judge(exercises()["sqnr"], Local(picky), explain=explain).results[-1]
    assert refusal.check == "what_cannot_be_compared_is_refused"
    assert refusal.status == "passed"
