"""What is special to the exercises of lab 11, kernels in Triton's interpreter; what holds for all
is in test_every_exercise.py."""

import inspect

import pytest
import torch
import triton.language as tl
from judged import points_of

from autograder.build import _solution_cell, released
from autograder.candidate import Local
from autograder.checks import kernels
from autograder.compare import CandidateError
from autograder.demo import as_cell
from autograder.exercise import Exercise, exercises, find
from autograder.judge import foreseen, judge
from autograder.killtable import remembering
from autograder.mutants import mutants
from autograder.wire import pack, unpack
from fewer.kernels.interpreter import OutOfBounds, on_copies

LAB = [remembering(value) for value in vars(kernels).values() if isinstance(value, Exercise)]
NAMES = [exercise.name for exercise in LAB]
ADD = LAB[NAMES.index("add_kernel")]


def lost(name, function):
    """The names of the checks that ``function`` fails."""
    return [c for c, points in points_of(LAB[NAMES.index(name)], function).items() if not points]


# --- one mistake costs one check -----------------------------------------------------------------

COSTS = {  # of each check one mistake, where there is one that costs no other
    "quantize_rows_kernel": {
        "cuts_off": "each_code_is_the_nearest",
        "infinite_padding": "a_row_may_be_shorter_than_the_tile",
        "x_without_gaps": "rows_of_x_may_lie_apart",
    },
    "softmax_kernel": {
        "sum_is_not_corrected": "a_row_of_several_tiles",
        "zeros_in_the_padding": "a_row_may_end_within_a_tile",
        "x_without_gaps": "rows_of_x_may_be_apart",
        "no_maximum": "no_exponential_overflows",
    },
    "matmul_kernel": {
        "last_step_only": "products_are_summed_along_k",
        "no_mask": "sizes_may_end_within_a_tile",
        "without_strides": "matrices_may_be_stored_by_columns",
        "half_sums": "sums_are_float32",
    },
    "dequantize_matmul_kernel": {
        "high_half_first": "a_byte_has_two_codes",
        "zero_after_the_scale": "a_weight_is_scale_times_distance_from_zero",
        "one_scale_for_a_row": "each_group_has_its_own_scale",
        "no_mask": "tokens_and_rows_may_end_within_a_tile",
    },
    "split_k_kernel": {
        "all_of_k": "several_programs_share_the_rows",
        "drops_the_rest": "tiles_need_not_come_out_even",
        "no_mask": "both_sizes_may_end_within_a_tile",
        "half_sums": "products_are_summed_in_float32",
    },
    "hadamard_kernel": {
        "not_divided": "lengths_stay",
        "same_pairs_again": "signs_are_those_of_the_matrix",
        "one_row_for_all": "every_row_has_a_program",
        "steps_in_half": "steps_are_in_float32",
    },
    "decode_attention_kernel": {
        "scores_are_not_scaled": "weights_are_the_softmax_of_scores",
        "values_are_not_corrected": "tokens_may_take_several_tiles",
        "padding_has_weight": "tokens_may_end_within_a_tile",
        "heads_take_turns": "heads_share_keys",
        "starts_at_zero": "large_scores_do_not_overflow",
    },
}


@pytest.mark.parametrize("name", list(COSTS))
def test_one_mistake_costs_one_check(name):
    mistakes = {m.name: m.function for m in LAB[NAMES.index(name)].misconceptions}
    found = {m: lost(name, mistakes[m]) for m in COSTS[name]}
    assert found == {m: [check] for m, check in COSTS[name].items()}


# --- mistakes that are no misconception, and other ways to be right ------------------------------


@on_copies
def reads_one_too_far(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i <= n)
    y = tl.load(y_ptr + i, mask=i <= n)
    tl.store(out_ptr + i, x + y, mask=i < n)


@on_copies
def adds_what_is_not_there(x_ptr, out_ptr, cols, row_stride, BLOCK: tl.constexpr):
    """Loads with a mask, and counts what the mask leaves out: on a GPU it may be anything."""
    row = tl.program_id(0)
    largest = -float("inf")
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * row_stride + col, mask=col < cols).to(tl.float32)
        largest = tl.maximum(largest, tl.max(x))
    total = 0.0
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * row_stride + col, mask=col < cols, other=-float("inf"))
        total += tl.sum(tl.exp(x.to(tl.float32) - largest))
    for start in range(0, cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * row_stride + col, mask=col < cols).to(tl.float32)
        tl.store(out_ptr + row * cols + col, tl.exp(x - largest) / total, mask=col < cols)


@on_copies
def loads_adds_and_stores(w_ptr, x_ptr, y_ptr, n, k, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, k, tl.num_programs(1) * BLOCK_K):
        col = start + tl.arange(0, BLOCK_K)
        inside = (row[:, None] < n) & (col[None, :] < k)
        w = tl.load(w_ptr + row[:, None] * k + col[None, :], mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + col, mask=col < k, other=0.0).to(tl.float32)
        total += tl.sum(w * x[None, :], axis=1)
    y = tl.load(y_ptr + row, mask=row < n)
    tl.store(y_ptr + row, y + total, mask=row < n)


@on_copies
def overwrites_its_input(x_ptr, out_ptr, n: tl.constexpr):
    at = tl.program_id(0) * n + tl.arange(0, n)
    x = tl.load(x_ptr + at).to(tl.float32)
    done = 1
    while done < n:
        even, odd = tl.split(tl.reshape(x, (n // 2, 2)))
        x = tl.reshape(tl.trans(tl.join(even + odd, even - odd)), (n,))
        tl.store(x_ptr + at, x)
        done *= 2
    tl.store(out_ptr + at, x / n**0.5)


FALLS = [
    ("add_kernel", reads_one_too_far, "vectors_end_where_they_end"),
    ("softmax_kernel", adds_what_is_not_there, "a_row_may_end_within_a_tile"),
    ("split_k_kernel", loads_adds_and_stores, "several_programs_share_the_rows"),
    ("hadamard_kernel", overwrites_its_input, "lengths_stay"),
]


@pytest.mark.parametrize(("name", "kernel", "check"), FALLS, ids=[f[1].__name__ for f in FALLS])
def test_what_only_looks_right_on_a_cpu_is_not_accepted(name, kernel, check):
    assert check in lost(name, kernel)


def test_plain_torch_is_right_if_it_is_right():
    def softmax_kernel(grid, x, out, cols, row_stride, BLOCK, seed=None):
        return x, x[:, :cols].double().softmax(1)

    assert lost("softmax_kernel", softmax_kernel) == []


# --- a kernel as an exercise ---------------------------------------------------------------------


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_memory_crosses_to_a_child_with_its_strides(exercise):
    for check in exercise.checks:
        for call in foreseen(exercise, check, seed=0):
            for before, after in zip(call.args, unpack(pack(call.args)), strict=True):
                if isinstance(before, torch.Tensor) and min(before.shape) > 1:
                    assert after.stride() == before.stride()


def points_in_a_child(zygote, exercise, source):
    with zygote.child() as child:
        child.run_cell(source, exercise.name)
        child.guard(exercise.name)
        candidate = child.candidate(exercise.name)
        points = judge(exercise, candidate, explain=False).points
        assert candidate.live == 0 or points < exercise.points
    return points


@pytest.mark.parametrize("exercise", LAB, ids=NAMES)
def test_the_solution_gets_full_points_in_a_child(exercise, zygote):
    source = _solution_cell(exercise).source
    assert "\n@on_copies\ndef " in source
    assert points_in_a_child(zygote, exercise, source) == exercise.points


@pytest.mark.parametrize("name", ["add_kernel", "hadamard_kernel"])
def test_a_variant_gets_full_points_in_a_child_and_a_mistake_what_it_deserves(name, zygote):
    exercise = LAB[NAMES.index(name)]
    variant, mistake = exercise.variants[0].function, exercise.misconceptions[0].function
    deserved = judge(exercise, Local(mistake), explain=False).points
    assert points_in_a_child(zygote, exercise, as_cell(exercise, variant)) == exercise.points
    assert points_in_a_child(zygote, exercise, as_cell(exercise, mistake)) == deserved


def test_a_stub_is_to_do(zygote):
    exercise = ADD
    cell = _solution_cell(exercise)
    stub = released(_notebook(cell)).cells[0].source
    assert "raise NotImplementedError" in stub
    assert "tl.store" not in stub
    with zygote.child() as child:
        child.run_cell(stub, exercise.name)
        assert judge(exercise, child.candidate(exercise.name)).todo


def _notebook(cell):
    from nbformat.v4 import new_notebook

    return new_notebook(cells=[cell])


BORROWED = [
    "from fewer.kernels.simple import add_kernel as library\n"
    "def add_kernel(*args, **kwargs):\n    return library(*args, **kwargs)",
    # A kernel that ran once is known to the interpreter in a form of its own.
    "import torch, triton\n"
    "from fewer.kernels.simple import add_kernel as library\n"
    "library(1, torch.zeros(2), torch.zeros(2), torch.zeros(2), 2, BLOCK=2)\n"
    "kernel = triton.jit(library.__wrapped__)\n"
    "def add_kernel(grid, x, y, out, n, BLOCK):\n"
    "    kernel[(grid,)](x, y, out, n, BLOCK=BLOCK)\n"
    "    return x, y, out",
]


@pytest.mark.parametrize("cell", BORROWED, ids=["the function", "the kernel in it"])
def test_the_librarys_kernel_may_not_be_borrowed(cell, zygote):
    exercise = ADD
    with zygote.child() as child:
        child.run_cell(cell, exercise.name)
        assert judge(exercise, child.candidate(exercise.name), explain=False).passed
        child.guard(exercise.name)
        verdict = judge(exercise, child.candidate(exercise.name), explain=False)
        assert verdict.points == 0
        assert "what you are asked to write" in verdict.first_failure.failure.message
        child.guard(None)
        assert judge(exercise, child.candidate(exercise.name), explain=False).passed


def test_a_failure_in_a_kernel_shows_the_students_line_and_the_tutors_sentence(zygote):
    exercise = ADD
    cell = _solution_cell(exercise).source.replace("mask=inside", "mask=i <= n")
    with zygote.child() as child:
        child.run_cell(cell, exercise.name)
        verdict = judge(exercise, child.candidate(exercise.name))
    failed = [result for result in verdict.results if result.status == "failed"]
    assert {result.misconception for result in failed} == {"one_too_many"}
    lines = cell.splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "x = tl.load(" in line)
    assert f"line {number}: {lines[number - 1].strip()}" in failed[1].failure.trace


def first_failure(name, mistake):
    exercise = LAB[NAMES.index(name)]
    (wrong,) = (m.function for m in exercise.misconceptions if m.name == mistake)
    return judge(exercise, Local(wrong)).first_failure.failure


def test_the_card_shows_what_a_kernel_wrote_and_not_what_it_was_given():
    failure = first_failure("hadamard_kernel", "second_minus_first")
    assert failure.got.startswith("tensor([[")  # out alone
    both = first_failure("quantize_rows_kernel", "loses_the_sign").got
    assert both.count("tensor(") == 2  # codes and scale
    assert "int8" in both


def test_the_card_shows_the_call_that_is_wrong_and_not_the_one_it_is_compared_with():
    failure = first_failure("decode_attention_kernel", "heads_take_turns")
    assert failure.call.startswith("decode_attention_kernel(4,")
    failure = first_failure("dequantize_matmul_kernel", "one_scale_for_a_row")
    assert "tensor of shape (16, 32)" in failure.call  # x, of two groups


def test_what_is_not_written_is_said_to_be_nan():
    @on_copies
    def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.load(x_ptr + i, mask=i < n)

    failure = judge(ADD, Local(add_kernel)).first_failure.failure
    assert "out is NaN in" in failure.message


def test_grading_always_interprets(zygote):
    with zygote.child() as child:
        child.run_cell("from fewer.kernels.interpreter import interpreted", "1")
        assert [answer.value for answer in child.calls("interpreted", [pack(((), {}))])] == [True]


def test_misconceptions_and_variants_are_written_without_the_decorator():
    for exercise in LAB:
        for item in [*exercise.misconceptions, *exercise.variants]:
            plain = inspect.unwrap(item.function)
            assert plain is not item.function
            assert exercise.source(item.function).startswith(f"@on_copies\ndef {exercise.name}(")
            assert exercise.source(plain).startswith(f"def {exercise.name}(")


def test_a_slip_that_is_not_in_the_reference_is_refused():
    exercise = Exercise(
        exercises()["add_kernel"].reference, "-", difficulty=1, minutes=1, decorator=on_copies
    )
    for right in ("no such code", "tl.load"):
        with pytest.raises(ValueError, match="times in add_kernel"):
            exercise.slip("wrong", "-", (right, "x"))
    exercise.slip("wrong", "You take the difference.", ("x + y", "x - y"))
    x, y = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    out = exercise.misconceptions[0].function(1, x, y, torch.zeros(3), 3, BLOCK=4)[2]
    assert out.tolist() == [0, -1, -2]


def test_the_interpreter_finds_the_source_of_mutants():
    """Else it would run them otherwise than the reference: it rewrites what it can read."""
    exercise = find("hadamard_kernel")
    for mutant in mutants(inspect.unwrap(exercise.reference)):
        lines = inspect.getsource(mutant.function)
        assert lines.startswith("def hadamard_kernel(")
        assert inspect.getsourcefile(mutant.function) == mutant.function.__code__.co_filename


def test_a_kernel_outside_of_its_tensors_raises_in_a_notebook_as_in_grading():
    wrong = {m.name: m.function for m in find("add_kernel").misconceptions}["no_mask"]
    x = torch.zeros(3)
    with pytest.raises(OutOfBounds):
        wrong(1, x, x, x, 3, BLOCK=4)
    with pytest.raises(CandidateError, match="OutOfBounds"):
        Local(wrong)(1, x, x, x, 3, BLOCK=4)
