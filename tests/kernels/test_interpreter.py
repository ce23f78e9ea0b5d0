import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from fewer.kernels.interpreter import OutOfBounds, Race, Trace, interpreted, on_copies, watched
from fewer.kernels.trace import element_addresses

pytestmark = pytest.mark.skipif(not interpreted(), reason="what the interpreter sees")


# --- out of bounds --------------------------------------------------------------------------------


@on_copies
def copy_from(x_ptr, out_ptr, first, n, step, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + first + step * i, mask=i < n)
    tl.store(out_ptr + i, x, mask=i < n)


def test_a_load_behind_the_end_is_found_and_named() -> None:
    x, out = torch.arange(8.0), torch.zeros(8)
    with pytest.raises(
        OutOfBounds, match=r"program 1 loads 2 of 4 .* the one 1 behind the last of x \(8,\)"
    ):
        copy_from(2, x, out, 2, 8, 1, BLOCK=4)


def test_a_load_before_the_first_is_found_and_named() -> None:
    with pytest.raises(
        OutOfBounds, match=r"program 0 loads 3 of 4 .* the one 3 before the first of x"
    ):
        copy_from(1, torch.arange(8.0), torch.zeros(8), -3, 8, 1, BLOCK=4)


def test_a_load_between_the_rows_of_a_wider_matrix_is_found() -> None:
    x = torch.arange(12.0).reshape(3, 4)[:, :3]
    with pytest.raises(OutOfBounds, match=r"between the elements of x \(strides \(4, 1\)\)"):
        copy_from(1, x, torch.zeros(8), 0, 8, 1, BLOCK=8)


def test_a_store_to_where_only_another_tensor_is_not_is_found() -> None:
    with pytest.raises(OutOfBounds, match=r"program 1 stores 2 of 4 .* behind the last of out"):
        copy_from(2, torch.arange(8.0), torch.zeros(6), 0, 8, 1, BLOCK=4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.float16, torch.int64])
def test_bounds_are_those_of_elements_of_any_size(dtype: torch.dtype) -> None:
    x, out = torch.ones(5).to(dtype), torch.zeros(5).to(dtype)
    assert copy_from(2, x, out, 0, 5, 1, BLOCK=4)[1].equal(x)
    with pytest.raises(OutOfBounds, match="the one 1 behind the last of x"):
        copy_from(2, x, out, 1, 5, 1, BLOCK=4)


def test_an_empty_tensor_may_be_given_but_not_touched() -> None:
    empty = torch.zeros(0)
    assert copy_from(2, empty, empty, 0, 0, 1, BLOCK=4)[1].shape == (0,)
    with pytest.raises(OutOfBounds, match=r"program 0 loads 1 of 1 .* no elements"):
        copy_from(1, empty, empty, 0, 1, 1, BLOCK=4)


def test_without_programs_nothing_happens() -> None:
    x, out = torch.arange(8.0), torch.ones(8)
    assert copy_from(0, x, out, 99, 8, 1, BLOCK=4)[1].equal(out)


@triton.jit
def load_words(x_ptr, out_ptr, first, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    words = tl.load((x_ptr + first).to(tl.pointer_type(tl.int32)) + i)
    tl.store(out_ptr + i, words)


def test_of_a_wide_load_every_byte_must_be_inside() -> None:
    x, out = torch.arange(10, dtype=torch.int8), torch.zeros(2, dtype=torch.int32)
    with watched({"x": x, "out": out}) as trace:
        load_words[(1,)](x, out, 1, BLOCK=2)
    assert trace.loads("x").tolist() == [0] + 8 * [1] + [0]
    assert out.equal(x[1:9].clone().view(torch.int32))
    with watched({"x": x, "out": out}), pytest.raises(InterpreterError, match="1 of 2 elements"):
        load_words[(1,)](x, out, 3, BLOCK=2)


# --- what a masked load leaves open ---------------------------------------------------------------


@on_copies
def sum_masked(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + i, mask=i < n)))
    tl.store(out_ptr + 1, tl.sum(tl.load(x_ptr + i, mask=i < n, other=0.0)))
    tl.store(out_ptr + 2, tl.load(x_ptr, mask=n > 9))
    tl.store(out_ptr + 3, tl.load(x_ptr, mask=n > 9, other=0.0))
    tl.store(out_ptr + 4, tl.max(tl.load(x_ptr + i, mask=i < n)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_forgotten_other_is_infinite_and_not_zero(dtype: torch.dtype) -> None:
    """Not NaN, which a maximum would overlook."""
    inf = float("inf")
    out = sum_masked(1, torch.ones(3).to(dtype), torch.zeros(5), 3, BLOCK=4)[1]
    assert out.tolist() == [inf, 3, inf, 0, inf]


# --- races ----------------------------------------------------------------------------------------


@on_copies
def all_store(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.program_id(0))


@on_copies
def shift(x_ptr, BLOCK: tl.constexpr, BY: tl.constexpr):
    """Program p moves tile p, in place: it reads what program p + 1 writes."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i + BY)
    tl.store(x_ptr + i, x)


@on_copies
def store_twice(out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + 4 - tl.maximum(tl.arange(0, BLOCK), 2), 1.0)


@on_copies
def count(counter_ptr, HOW: tl.constexpr):
    if HOW == "atomic":
        tl.atomic_add(counter_ptr, 1.0)
    elif HOW == "relaxed":
        tl.atomic_add(counter_ptr, 1.0, sem="relaxed")
    else:
        tl.store(counter_ptr, tl.load(counter_ptr) + 1.0)


def test_two_programs_that_store_the_same_element_race() -> None:
    assert all_store(1, torch.ones(4), BLOCK=4)[0].tolist() == [0, 0, 0, 0]
    with pytest.raises(Race, match=r"program 1 stores out\[0\], which program 0 stores"):
        all_store(2, torch.ones(4), BLOCK=4)


def test_where_a_program_is_in_the_grid_is_said() -> None:
    with pytest.raises(Race, match=r"program \(0, 1\) stores out\[0\], which program \(0, 0\)"):
        all_store((3, 2), torch.ones(4), BLOCK=4)
    with pytest.raises(Race, match=r"program \(0, 0, 1\) stores"):
        all_store((1, 1, 2), torch.ones(4), BLOCK=4)


@pytest.mark.parametrize("seed", [None, *range(4)])
def test_a_program_that_loads_what_another_one_stores_races_in_any_order(seed: int | None) -> None:
    x = torch.arange(9.0)
    with pytest.raises(Race, match=r"x\[4\]"):
        shift(2, x, BLOCK=4, BY=1, seed=seed)
    assert shift(2, x, BLOCK=4, BY=0, seed=seed)[0].equal(x)
    assert shift(1, x, BLOCK=4, BY=1, seed=seed)[0].tolist() == [1, 2, 3, 4, 4, 5, 6, 7, 8]


def test_a_tile_that_stores_an_element_twice_is_found() -> None:
    with pytest.raises(Race, match=r"program 0 stores out\[2\] twice"):
        store_twice(1, torch.zeros(4), BLOCK=4)


def test_an_update_in_two_steps_is_lost_and_an_atomic_one_is_not() -> None:
    for how in ("atomic", "relaxed"):
        assert count(5, torch.zeros(1), how)[0].item() == 5
    with pytest.raises(Race, match=r"program 1 loads counter\[0\], which program 0 stores"):
        count(2, torch.zeros(1), "plain")


@on_copies
def read_while_counting(counter_ptr, out_ptr, FIRST: tl.constexpr):
    if tl.program_id(0) == FIRST:
        tl.store(out_ptr, tl.load(counter_ptr))
    else:
        tl.atomic_add(counter_ptr, 1)


@pytest.mark.parametrize("first", [0, 1])
def test_a_plain_load_of_what_another_one_changes_by_an_atomic_races(first: int) -> None:
    with pytest.raises(Race, match=r"counter\[0\], which program 0 (changes|loads)"):
        read_while_counting(2, torch.zeros(1), torch.zeros(1), FIRST=first)


@on_copies
def last_sums(
    x_ptr, part_ptr, counter_ptr, out_ptr, BLOCK: tl.constexpr, SEM: tl.constexpr,
    BARRIER: tl.constexpr, SCOPE: tl.constexpr = "gpu", STORED: tl.constexpr = 4,
):  # fmt: skip
    """Each program doubles its tile; the last to arrive sums all, and sets the counter back."""
    i = tl.arange(0, BLOCK)
    p = tl.program_id(0)
    x = tl.load(x_ptr + p * BLOCK + i)
    tl.store(part_ptr + p * BLOCK + i, 2 * x, mask=i < STORED)
    if BARRIER:
        tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem=SEM, scope=SCOPE)
    if arrived == tl.num_programs(0) - 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for other in range(tl.num_programs(0)):
            total += tl.load(part_ptr + other * BLOCK + i)
        tl.store(out_ptr + i, total)
        tl.store(part_ptr + i, total)
        tl.store(counter_ptr, 0)


def arguments() -> tuple[Tensor, ...]:
    return torch.arange(12.0), torch.zeros(12), torch.zeros(1, dtype=torch.int32), torch.zeros(4)


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
def test_the_last_to_arrive_may_read_what_the_others_stored(seed: int | None) -> None:
    _, _, counter, out = last_sums(3, *arguments(), 4, "acq_rel", BARRIER=True, seed=seed)
    assert out.tolist() == [24, 30, 36, 42]
    assert counter.item() == 0


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("sem", ["relaxed", "acquire", "release"])
def test_the_last_to_arrive_may_not_if_the_counter_orders_nothing(
    sem: str, seed: int | None
) -> None:
    with pytest.raises(Race, match=r"loads part\[\d+\], which program \d stores"):
        last_sums(3, *arguments(), 4, sem, BARRIER=True, seed=seed)


def test_an_atomic_for_the_threads_of_one_program_orders_no_others() -> None:
    with pytest.raises(Race):
        last_sums(3, *arguments(), 4, "acq_rel", BARRIER=True, SCOPE="cta")


def test_what_a_tile_stored_is_not_released_without_a_barrier_of_its_threads() -> None:
    with pytest.raises(Race, match=r"before its atomic, with a tl\.debug_barrier"):
        last_sums(3, *arguments(), 4, "acq_rel", BARRIER=False)
    with pytest.raises(Race):
        last_sums(3, *arguments(), 4, "acq_rel", BARRIER=False, STORED=1)
    # A tile of one element is stored by the thread that does the atomic.
    x, part, counter, out = arguments()
    assert last_sums(3, x, part, counter, out, 1, "acq_rel", BARRIER=False)[3][0] == 6


@on_copies
def publish_then_write(data_ptr, flag_ptr, BLOCK: tl.constexpr, LATE: tl.constexpr):
    """Program 0 reads the data and says so; program 1 waits for it and overwrites them."""
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) == 0:
        x = tl.load(data_ptr + i)
        tl.debug_barrier()
        tl.atomic_xchg(flag_ptr, 1)
        if LATE:
            x = tl.load(data_ptr + i)
        tl.store(data_ptr + BLOCK + i, x)
    else:
        while tl.atomic_cas(flag_ptr, 1, 2) == 0:
            pass
        tl.store(data_ptr + i, 0.0)


def test_what_was_read_before_a_release_may_be_overwritten_after_it_alone() -> None:
    data, flag = torch.arange(8.0), torch.zeros(1, dtype=torch.int32)
    after = publish_then_write(2, data, flag, BLOCK=4, LATE=False)[0]
    assert after.tolist() == [0, 0, 0, 0, 0, 1, 2, 3]
    with pytest.raises(Race, match=r"program 1 stores data\[0\], which program 0 loads"):
        publish_then_write(2, data, flag, BLOCK=4, LATE=True)


def test_a_launch_is_ordered_after_the_one_before() -> None:
    x, out = torch.arange(9.0), torch.zeros(8)
    kernel, copy = triton.jit(shift.__wrapped__), triton.jit(copy_from.__wrapped__)
    counter = torch.zeros(1)
    with watched({"x": x, "out": out, "counter": counter}, seed=3) as trace:
        copy[(2,)](x, out, 1, 8, 1, BLOCK=4)
        kernel[(2,)](x, BLOCK=4, BY=0)
        triton.jit(count.__wrapped__)[(3,)](counter, "atomic")
        triton.jit(count.__wrapped__)[(5,)](counter, "atomic")
        triton.jit(count.__wrapped__)[(1,)](counter, "plain")
        copy[(2,)](out, x, 0, 8, 1, BLOCK=4)
    assert x.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    assert counter.item() == 9
    assert trace.programs == 15
    assert trace.writer("out").tolist() == 4 * [0] + 4 * [1]
    assert trace.writer("x").tolist() == [*4 * [13], *4 * [14], -1]
    assert trace.stores("counter").tolist() == [9]


def test_a_race_in_a_second_launch_is_found_as_well() -> None:
    x = torch.arange(9.0)
    kernel = triton.jit(shift.__wrapped__)
    with watched({"x": x}):
        kernel[(2,)](x, BLOCK=4, BY=0)
        with pytest.raises(InterpreterError, match="Race"):
            kernel[(2,)](x, BLOCK=4, BY=1)


# --- the trace ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 5])
def test_the_trace_counts_what_each_program_did(seed: int | None) -> None:
    x, out = torch.arange(12.0).half(), torch.zeros(10)
    with watched({"x": x, "out": out}, seed) as trace:
        triton.jit(copy_from.__wrapped__)[(3,)](x, out, 1, 9, 1, BLOCK=4)
    assert trace.programs == 3
    assert trace.loads("x").tolist() == [0] + 9 * [1] + 2 * [0]
    assert trace.stores("out").tolist() == 9 * [1] + [0]
    assert trace.reader("x").tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2, -1, -1]
    assert trace.writer("out").tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, -1]
    assert (trace.loaded, trace.stored) == (9 * 2, 9 * 4)


def test_programs_are_counted_along_the_last_axis_first() -> None:
    out = torch.zeros(2, 3, 4)

    @triton.jit
    def mine(out_ptr):
        i = (tl.program_id(0) * 3 + tl.program_id(1)) * 4 + tl.program_id(2)
        tl.store(out_ptr + i, tl.num_programs(1) + i)

    for seed in (None, 1):
        with watched({"out": out}, seed) as trace:
            mine[(2, 3, 4)](out)
        assert trace.writer("out").flatten().tolist() == list(range(24))
        assert out.flatten().tolist() == list(range(3, 27))


def test_what_several_programs_read_is_marked() -> None:
    x, out = torch.arange(4.0), torch.zeros(8)

    @triton.jit
    def read_all(x_ptr, out_ptr):
        tl.store(out_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + tl.arange(0, 4))))

    with watched({"x": x, "out": out}) as trace:
        read_all[(8,)](x, out)
    assert trace.reader("x").tolist() == [-2] * 4
    assert trace.loads("x").tolist() == [8] * 4


def test_programs_run_in_another_order_with_every_seed() -> None:
    @triton.jit
    def arrive(order_ptr, counter_ptr):
        tl.store(order_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))

    def order(seed: int | None) -> tuple[int, ...]:
        out, counter = torch.zeros(6, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with watched({"out": out, "counter": counter}, seed):
            arrive[(6,)](out, counter)
        return tuple(out.tolist())

    assert order(None) == tuple(range(6))
    assert len({order(seed) for seed in range(8)}) > 5
    assert order(3) == order(3)


def test_addresses_are_those_of_the_elements() -> None:
    x = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)[:, ::2].permute(2, 0, 1)
    wanted = [[[x[i, j, k].data_ptr() for k in range(2)] for j in range(2)] for i in range(4)]
    assert element_addresses(x).tolist() == wanted


def test_an_error_leaves_the_interpreter_as_it_was() -> None:
    from triton.runtime.interpreter import interpreter_builder

    names = ("create_masked_load", "create_masked_store", "set_grid_idx", "create_barrier")
    before = [getattr(interpreter_builder, name) for name in names]
    with pytest.raises(Race):
        all_store(2, torch.ones(4), BLOCK=4)
    assert [getattr(interpreter_builder, name) for name in names] == before
    x, out = torch.arange(8.0), torch.zeros(8)
    triton.jit(copy_from.__wrapped__)[(2,)](x, out, 0, 8, 1, BLOCK=4)  # nobody watches
    assert out.equal(x)


def test_only_the_interpreter_can_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="kernels are compiled here"), watched({}):
        pass


def test_a_trace_of_nothing_knows_that_everything_is_outside() -> None:
    trace = Trace({})
    trace.launch((1, 1, 1))
    trace.begin(0)
    with pytest.raises(OutOfBounds, match="no elements"):
        trace.load(np.array([8], np.uint64), np.array([True]), 4)


# --- on copies ------------------------------------------------------------------------------------


def test_a_kernel_on_copies_changes_nothing_that_it_was_given() -> None:
    x, out = torch.arange(4.0), torch.zeros(4)
    after = copy_from(1, x, out, 0, 4, 1, BLOCK=4)
    assert out.tolist() == [0, 0, 0, 0]
    assert after[0].equal(x)
    assert after[1].equal(x)
    assert after[0].data_ptr() != x.data_ptr()


def test_copies_share_memory_where_the_tensors_did() -> None:
    x = torch.arange(8.0)
    with pytest.raises(Race):  # out is x, one further on
        copy_from(2, x[:-1], x[1:], 0, 7, 1, BLOCK=4)
    same, out = copy_from(1, x, x, 4, 4, 1, BLOCK=4)
    assert same.tolist() == out.tolist() == [4, 5, 6, 7, 4, 5, 6, 7]
    assert x.tolist() == list(range(8))


def test_copies_keep_strides_of_zero_as_well() -> None:
    x = torch.ones(1).expand(8)
    assert copy_from(1, x, torch.zeros(8), 0, 8, 0, BLOCK=8)[1].tolist() == 8 * [1]
    with pytest.raises(OutOfBounds):
        copy_from(1, x, torch.zeros(8), 0, 8, 1, BLOCK=8)


def test_tensors_may_be_given_by_name_and_parameters_as_they_are() -> None:
    x, out = torch.nn.Parameter(torch.arange(4.0)), torch.zeros(4)
    after = copy_from(1, out_ptr=out, x_ptr=x, first=0, n=4, step=1, BLOCK=4, num_warps=2)
    assert [a.tolist() for a in after] == [[0, 1, 2, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("grid", "error", "says"),
    [
        (torch.tensor(2), TypeError, "grid must be an int or a tuple of up to three"),
        (torch.tensor([2]), TypeError, "grid must be an int or a tuple of up to three"),
        (torch.zeros(4), TypeError, "grid must be an int"),
        (1.5, TypeError, "grid must be an int .* got 1.5"),
        (lambda meta: (1,), TypeError, "grid must be an int"),
        ((1, 2.0), TypeError, "grid must be an int"),
        ((), ValueError, "one to three numbers"),
        ((1, 1, 1, 1), ValueError, "one to three numbers"),
        (-1, ValueError, "at least 0, got -1"),
    ],
)
def test_a_grid_that_is_none_is_refused(grid: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        copy_from(grid, torch.zeros(4), torch.zeros(4), 0, 4, 1, BLOCK=4)


def test_arguments_that_do_not_fit_are_named() -> None:
    x = torch.zeros(4)
    names = r"copy_from\(grid, x_ptr, out_ptr, first, n, step, BLOCK\)"
    with pytest.raises(TypeError, match=f"missing a required argument: 'BLOCK' in {names}"):
        copy_from(1, x, x, 0, 4, 1)
    with pytest.raises(TypeError, match=f"too many positional arguments in {names}"):
        copy_from(1, x, x, 0, 4, 1, 4, 4)
    with pytest.raises(TypeError, match=f"unexpected keyword argument 'BLOCKS' in {names}"):
        copy_from(1, x, x, 0, 4, 1, 4, BLOCKS=4)
    with pytest.raises(TypeError, match="x_ptr must be a tensor, got 4"):
        copy_from(1, 4, x, 0, 4, 1, BLOCK=4)
    with pytest.raises(TypeError, match="out_ptr must be a tensor, got array"):
        copy_from(1, x, np.zeros(4), 0, 4, 1, BLOCK=4)
    with pytest.raises(TypeError, match=r"n must be a number, got a tensor of shape \(4,\)"):
        copy_from(1, x, x, 0, x, 1, BLOCK=4)
    with pytest.raises(TypeError, match="n must be a number, got '4'"):
        copy_from(1, x, x, 0, "4", 1, BLOCK=4)


@triton.jit
def _fails(x_ptr):
    return tl.load(x_ptr - 1)


@on_copies
def calls(x_ptr):
    tl.store(x_ptr, _fails(x_ptr))


def test_an_error_inside_a_called_function_is_the_error_itself() -> None:
    with pytest.raises(OutOfBounds, match="the one 1 before the first of x"):
        calls(1, torch.zeros(2))


# --- what is mended -------------------------------------------------------------------------------


@on_copies
def in_bfloat16(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr, WHAT: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if WHAT == "add":
        z = x + y
    elif WHAT == "subtract":
        z = x - y
    elif WHAT == "multiply":
        z = x * y
    elif WHAT == "negate":
        z = -x
    elif WHAT == "less":
        z = (x < y).to(tl.bfloat16)
    elif WHAT == "where":
        z = tl.where(x < y, x, y)
    elif WHAT == "integer":
        z = x - 136
    elif WHAT == "maximum":
        z = tl.maximum(x, y)
    tl.store(out_ptr + i, z)


@pytest.mark.parametrize(
    ("what", "wanted"),
    [
        ("add", torch.add),
        ("subtract", torch.sub),
        ("multiply", torch.mul),
        ("negate", lambda x, y: -x),
        ("less", lambda x, y: x < y),
        ("where", torch.minimum),
        ("integer", lambda x, y: x - 136),
        ("maximum", torch.maximum),
    ],
)
def test_bfloat16_is_computed_as_torch_does(what: str, wanted) -> None:
    x, y = (100 * torch.randn(2, 256, generator=torch.Generator().manual_seed(0))).bfloat16()
    out = in_bfloat16(1, x, y, torch.zeros(256).bfloat16(), BLOCK=256, WHAT=what)[2]
    assert out.equal(wanted(x, y).bfloat16())


@on_copies
def cast(x_ptr, out_ptr, BLOCK: tl.constexpr, TO: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x.to(TO))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32, torch.int8])
def test_casts_to_bfloat16_and_back_are_those_of_torch(source: torch.dtype) -> None:
    """Rounded to the nearest, of two the even one; up to infinity and down to the smallest."""
    x = torch.randn(512, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(
        -39, 39, 512
    )
    x[:8] = torch.tensor([float("inf"), float("nan"), 0.0, -0.0, 3.4e38, 257.0, 259.0, -1e-40])
    x = x.to(source) if source.is_floating_point else (97 * torch.arange(512)).to(source)
    out = cast(1, x, torch.zeros(512).bfloat16(), 512, tl.bfloat16)[1]
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    back = cast(1, out, torch.zeros(512), 512, tl.float32)[1]
    torch.testing.assert_close(back, out.float(), rtol=0, atol=0, equal_nan=True)


@on_copies
def along_rows(x_ptr, sum_ptr, max_ptr, run_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(sum_ptr + i, tl.sum(x, axis=1))
    tl.store(max_ptr + i, tl.max(x, axis=1))
    tl.store(run_ptr + at, tl.cumsum(x, axis=1))


def test_sums_and_maxima_of_bfloat16_are_those_of_its_numbers() -> None:
    x = torch.randint(-8, 8, (16, 16), generator=torch.Generator().manual_seed(0)).bfloat16()
    empty = torch.zeros(16).bfloat16()
    _, sums, maxima, running = along_rows(1, x, empty, empty.clone(), x.clone(), 16)
    assert sums.equal(x.sum(1))
    assert maxima.equal(x.amax(1))
    assert running.equal(x.cumsum(1))


@on_copies
def dot(x_ptr, y_ptr, out_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(y_ptr + at)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_of_tiles_is_that_of_torch(dtype: torch.dtype) -> None:
    x, y = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = dot(1, x, y, torch.zeros(16, 16))[2]
    torch.testing.assert_close(out.double(), x.double() @ y.double(), rtol=1e-5, atol=1e-5)


@on_copies
def two_masks(x_ptr, out_ptr, n, BLOCK: tl.constexpr, WAY: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if WAY == 0:
        mask = (i > 0) & (i < n)
    elif WAY == 1:
        mask = (i > 0) and (i < n)
    elif WAY == 2:
        mask = not (i < 1)
    elif WAY == 3:
        mask = i < n
        if mask:
            mask = i < 0
    if n > 2 and n < 9:  # numbers have a truth
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=mask, other=7.0))


def test_a_tile_is_neither_true_nor_false() -> None:
    x, out = torch.arange(4.0), torch.zeros(4)
    assert two_masks(1, x, out, 3, 4, 0)[1].tolist() == [7, 1, 2, 7]
    for way in (1, 2, 3):
        with pytest.raises(TypeError, match="write & for and"):
            two_masks(1, x, out, 3, 4, way)


@on_copies
def index(x_ptr, out_ptr, BLOCK: tl.constexpr, HOW: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    if HOW == "pointer":
        x = x_ptr[i]
    elif HOW == "number":
        x = x_ptr[0]
    elif HOW == "slice":
        x = x_ptr[0:BLOCK]
    elif HOW == "tile":
        x = x[i]
    elif HOW == "element":
        x = x[0]
    elif HOW == "assignment":
        out_ptr[i] = x
    elif HOW == "into a tile":
        x[i] = 0.0
    square = (out_ptr + BLOCK * i)[:, None] + i[None, :]
    tl.store(square, tl.sum(x[None, :, None], axis=0) + 10 * x[None, :])


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("pointer", r"write tl\.load\(x_ptr \+ i\) in place of x_ptr\[i\]"),
        ("number", r"write tl\.load\(x_ptr \+ i\)"),
        ("slice", r"write tl\.load\(x_ptr \+ i\)"),
        ("tile", "a tile is not indexed"),
        ("element", "a tile is not indexed"),
        ("assignment", r"write tl\.store\(x_ptr \+ i, value\)"),
        ("into a tile", "nothing is stored in a tile"),
    ],
)
def test_what_is_indexed_says_what_to_write_in_its_place(how: str, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        index(1, torch.arange(4.0), torch.zeros(4, 4), BLOCK=4, HOW=how)


def test_a_tile_of_numbers_or_of_pointers_may_get_a_new_axis() -> None:
    x = torch.arange(4.0)
    after = index(1, x, torch.zeros(4, 4), BLOCK=4, HOW="")[1]
    assert after.equal(x[:, None] + 10 * x)


def test_kernels_run_whoever_imported_triton_first() -> None:
    """torch.compile does, and then tl.max and the like would be compiled functions."""
    program = """
import triton, triton.language as tl, torch
from fewer.kernels.simple import softmax_kernel
x = torch.randn(2, 6)
assert torch.allclose(softmax_kernel(2, x, torch.zeros(2, 6), 6, 6, BLOCK=4)[1], x.softmax(1))
"""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)
