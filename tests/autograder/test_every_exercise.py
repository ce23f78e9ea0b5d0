"""What is asked of every exercise of the course: all correct styles pass, every known mistake is
caught and called by its name, lazy work earns nothing, and what a student reads is fit to be read.

What is special to a lab's exercises is in test_checks_<file>.py.
"""

import re

import pytest
from judged import points_of

import autograder.judge
from autograder.candidate import Local
from autograder.exercise import exercises
from autograder.judge import foreseen, judge, same
from autograder.killtable import remembering
from autograder.wire import pack, unpack

# Kernels take their time in the interpreter: let them answer the same question once.
EXERCISES = [remembering(e) if e.decorator else e for e in exercises().values()]
NAMES = list(exercises())


def every(part):
    """All misconceptions or variants, each with its exercise, as test parameters."""
    return [
        pytest.param(e, item, id=f"{e.name}-{item.name}")
        for e in EXERCISES
        for item in getattr(e, part)
    ]


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    """A few steps towards the simplest counter-example are enough here."""
    monkeypatch.setattr(autograder.judge, "SHRINK_RUNS", 5)
    monkeypatch.setattr(autograder.judge, "KERNEL_SHRINK_RUNS", 1)


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_an_exercise_is_of_the_agreed_size(exercise):
    assert 5 <= exercise.points <= 12
    assert 3 <= len(exercise.checks) <= 6
    assert all(1 <= check.points <= 3 for check in exercise.checks)
    assert len(exercise.misconceptions) >= 3
    assert exercise.variants


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_the_reference_gets_full_points(exercise):
    for seed in (0, 1):
        verdict = judge(exercise, Local(exercise.reference), seed)
        assert verdict.passed, str(verdict)


@pytest.mark.parametrize(("exercise", "variant"), every("variants"))
def test_a_correct_variant_gets_full_points(exercise, variant):
    verdict = judge(exercise, Local(variant.function), seed=1)
    assert verdict.passed, str(verdict)


@pytest.mark.parametrize(("exercise", "misconception"), every("misconceptions"))
def test_a_misconception_is_caught_and_named_and_keeps_the_points_for_refusals(
    exercise, misconception
):
    # Kernels: the seed that students have; test_killtable.py looks at their mutants alone.
    seed = 1 if exercise.decorator is None else 0
    verdict = judge(exercise, Local(misconception.function), seed)
    failed = [result for result in verdict.results if result.status == "failed"]
    assert failed, "no check fails"
    assert {result.misconception for result in failed} == {misconception.name}
    assert verdict.first_failure.diagnosis == misconception.says
    if exercise.decorator is None:  # a kernel refuses nothing
        assert verdict.results[-1].earned == 1, "bad input is refused all the same"


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_the_verdict_shows_the_call_the_result_and_the_hint(exercise):
    mistake = exercise.misconceptions[0]
    verdict = judge(exercise, Local(mistake.function))
    worst = verdict.first_failure
    assert worst.failure.call.startswith(f"{exercise.name}(")
    assert worst.failure.got
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", str(verdict)).split())
    for part in (worst.statement, worst.hint, mistake.says, worst.failure.message):
        assert " ".join(part.split()) in text
    assert "when called as:" in text
    assert "your result:" in text


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_whatever_a_student_reads_is_whole_sentences(exercise):
    texts = [check.statement for check in exercise.checks]
    texts += [check.hint for check in exercise.checks]
    texts += [misconception.says for misconception in exercise.misconceptions]
    for text in texts:
        assert text[0].isupper(), text
        assert text.endswith((".", "?"))
        assert "  " not in text
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_no_hint_holds_code_of_the_solution(exercise):
    source = exercise.source()
    lines = [line.strip() for line in source.split('"""')[-1].splitlines() if len(line.strip()) > 8]
    for check in exercise.checks:
        assert not re.search(r"torch\.|\w\(|\.T\b|>>|<<|return ", check.hint), check.hint
        assert not any(line in check.hint for line in lines)


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_every_call_of_a_check_crosses_to_a_child_as_it_is(exercise):
    for check in exercise.checks:
        for call in foreseen(exercise, check, seed=0):
            args, kwargs = unpack(pack((call.args, call.kwargs)))
            assert same(args, call.args)
            assert same(kwargs, call.kwargs)


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_returning_the_input_or_nothing_earns_nothing_but_pity(exercise):
    def echo(*args, **kwargs):
        return args[0]

    def nothing(*args, **kwargs):
        return None

    for lazy in (echo, nothing):
        # carry_over that gives its values back is right where nothing changes.
        pity = 3 if (exercise.name, lazy) == ("carry_over", echo) else 1
        assert sum(points_of(exercise, lazy).values()) <= pity


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_an_unwritten_stub_is_to_do_and_not_wrong(exercise):
    def stub(*args, **kwargs):
        raise NotImplementedError

    assert judge(exercise, Local(stub)).todo


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_refusing_everything_earns_the_refusals_at_most(exercise):
    def refuses(*args, **kwargs):
        raise ValueError("no")

    refusals = exercise.checks[-1].points if exercise.decorator is None else 0
    assert sum(points_of(exercise, refuses).values()) <= refusals <= 1
