"""Kernels without a GPU: Triton's interpreter, with an eye on every byte that a program touches.

A Triton kernel is the program of one tile; a launch runs it for every cell of a grid, in no order
that one could rely on. The interpreter (TRITON_INTERPRET=1) runs the programs one by one on the
CPU, so whatever depends on an order comes out as if all were well. `watched` sees what a GPU would
not forgive:

    a program loads or stores outside of the tensors that it was given      OutOfBounds
    a program touches what another one stores, and nothing orders the two   Race (see `trace`)

What a masked load does not load, and says nothing of by `other`, is infinite there: on a GPU it is
anything. And where the interpreter itself is wrong, or its words are, it is mended here: bfloat16,
the truth of a tile, an index, an early import.
"""

import dataclasses
import functools
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewer.kernels.trace import OutOfBounds, Race, Trace

if not torch.cuda.is_available():  # read by triton.jit, wherever a kernel is defined
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

__all__ = ["OutOfBounds", "Race", "Trace", "interpreted", "on_copies", "watched"]

LAUNCH_OPTIONS = ("num_warps", "num_stages")  # of the compiler; the interpreter has no use for them


def interpreted() -> bool:
    """Whether kernels run in the interpreter: TRITON_INTERPRET=1, which we set without a GPU."""
    return bool(triton.knobs.runtime.interpret)


@contextmanager
def watched(tensors: Mapping[str, Tensor], seed: int | None = None) -> Iterator[Trace]:
    """While it is open, kernels that run in the interpreter may touch these tensors alone.

    Args:
        tensors: by the names that errors call them.
        seed: of the order in which the programs of a launch run; None: as the grid counts them.

    Yields:
        The `Trace` of what the programs touched.

    Raises:
        RuntimeError: kernels do not run in the interpreter.
        OutOfBounds, Race: see there. (Within Triton's InterpreterError, as its cause.)

    Example:
        >>> @triton.jit
        ... def double(x_ptr, n, BLOCK: tl.constexpr):
        ...     i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        ...     tl.store(x_ptr + i, 2 * tl.load(x_ptr + i, i < n), i < n)
        >>> x = torch.arange(6.0)
        >>> with watched({"x": x}) as trace:
        ...     double[(2,)](x, 6, BLOCK=4)
        >>> x.tolist(), trace.writer("x").tolist()
        ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0, 0, 0, 0, 1, 1])
    """
    if not interpreted():
        raise RuntimeError(
            "kernels are compiled here; only the interpreter (TRITON_INTERPRET=1) can be watched"
        )
    builder = interpreter.interpreter_builder
    trace = Trace(tensors)
    generator = None if seed is None else np.random.default_rng(seed)
    order: Sequence[int] = ()

    def load(ptrs: Any, mask: Any, other: Any, *rest: Any) -> Any:
        trace.load(ptrs.data, mask.data, _bytes(ptrs))
        if other is None:
            other = _undefined(ptrs)
        return originals["create_masked_load"](ptrs, mask, other, *rest)

    def store(ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        trace.store(ptrs.data, mask.data, _bytes(ptrs))
        return originals["create_masked_store"](ptrs, value, mask, *rest)

    def rmw(op: Any, ptr: Any, value: Any, mask: Any, sem: Any, scope: Any) -> Any:
        trace.atomic(ptr.data, mask.data, _bytes(ptr), **_orders(sem, scope))
        return originals["create_atomic_rmw"](op, ptr, value, mask, sem, scope)

    def cas(ptr: Any, compare: Any, value: Any, sem: Any, scope: Any) -> Any:
        trace.atomic(ptr.data, np.ones_like(ptr.data, bool), _bytes(ptr), **_orders(sem, scope))
        return originals["create_atomic_cas"](ptr, compare, value, sem, scope)

    def barrier() -> Any:
        trace.barrier()
        return originals["create_barrier"]()

    def set_grid_idx(x: int, y: int, z: int) -> None:
        nonlocal order
        grid = builder.grid_dim
        number = (x * grid[1] + y) * grid[2] + z
        if number == 0:
            trace.launch(grid)
            order = range(math.prod(grid))
            if generator is not None:
                order = generator.permutation(order).tolist()
        trace.begin(order[number])
        originals["set_grid_idx"](*(int(i) for i in np.unravel_index(order[number], grid)))

    watching = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_rmw": rmw,
        "create_atomic_cas": cas,
        "create_barrier": barrier,
        "set_grid_idx": set_grid_idx,
    }
    originals = {name: getattr(builder, name) for name in watching}
    for name, function in watching.items():
        setattr(builder, name, function)
    try:
        yield trace
    finally:
        for name, function in originals.items():
            setattr(builder, name, function)


def _undefined(pointers: Any) -> Any:
    """What a load without `other` has where its mask is off: on a GPU anything, here infinity, or
    the largest integer. (NaN would not do: `tl.max` overlooks it.)"""
    kind = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(kind)
    value: float = np.inf
    if kind == tl.bfloat16:
        value = 0x7F80  # the bits of infinity
    elif dtype.kind != "f":
        value = 1 if dtype.kind == "b" else np.iinfo(dtype).max >> (dtype.kind == "u")
    return interpreter.TensorHandle(np.full(pointers.data.shape, value, dtype), kind)


def _bytes(pointers: Any) -> int:
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


def _orders(sem: Any, scope: Any) -> dict[str, bool]:
    """What an atomic operation orders, between programs."""
    wide = "CTA" not in str(scope).upper()  # else it is for the threads of one program
    names = str(sem).upper()
    return {"acquire": wide and "ACQUIRE" in names, "release": wide and "RELEASE" in names}


def on_copies(kernel: Callable[..., None]) -> Callable[..., tuple[Tensor, ...]]:
    """Make a Triton kernel a function: from memory before a launch to memory after it.

    Call it with the grid (a number of programs, or up to three), then the kernel's own arguments.
    It launches the kernel on copies of the tensors and returns the copies, all of them and in
    order. Strides stay, and tensors that share memory share it in their copies. In the interpreter
    the launch is `watched`; `seed` there is the order of the programs.

    Raises:
        TypeError: the grid or an argument is of no type that a kernel can take, or one is missing
            or unknown.
        ValueError: the grid has more than three numbers, or one below 0.
        OutOfBounds, Race: see there.

    Example:
        >>> @on_copies
        ... def add_one(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
        ...     i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        ...     tl.store(out_ptr + i, tl.load(x_ptr + i) + 1, i < n)
        >>> x, out = torch.arange(4.0), torch.zeros(4)
        >>> add_one(1, x, out, 4, BLOCK=4)[1].tolist(), out.tolist()
        ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0])
        >>> add_one(2, x, out, 4, BLOCK=4)
        Traceback (most recent call last):
        fewer.kernels.trace.OutOfBounds: program 1 loads 4 of 4 elements outside of its ...
    """
    jitted: list[Any] = []

    @functools.wraps(kernel)
    def launch(
        grid: int | Sequence[int], *arguments: Any, seed: int | None = None, **constants: Any
    ) -> tuple[Tensor, ...]:
        cells = _require_grid(grid)
        options = {name: constants.pop(name) for name in LAUNCH_OPTIONS if name in constants}
        before = _require_arguments(kernel, arguments, constants)
        after = _copies(before, "cpu" if interpreted() else "cuda")
        if not jitted:
            jitted.append(triton.jit(kernel))
        if 0 not in cells:
            _run(jitted[0], cells, after, options, seed)
        return tuple(
            after[name].to(x.device) for name, x in before.items() if isinstance(x, Tensor)
        )

    return launch


def _run(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Mapping[str, Any],
    options: Mapping[str, int],
    seed: int | None,
) -> None:
    if not interpreted():
        kernel[grid](**arguments, **options)
        return
    tensors = {n.removesuffix("_ptr"): x for n, x in arguments.items() if isinstance(x, Tensor)}
    try:
        with watched(tensors, seed), np.errstate(all="ignore"):
            kernel[grid](**arguments)
    except InterpreterError as error:
        cause: BaseException = error
        while isinstance(cause, InterpreterError) and cause.__cause__:  # out of a called function
            cause = cause.__cause__
        raise cause from None


def _require_grid(grid: Any) -> tuple[int, ...]:
    cells = (grid,) if isinstance(grid, int) else grid
    if not isinstance(cells, tuple | list) or not all(isinstance(n, int) for n in cells):
        raise TypeError(
            f"grid must be an int or a tuple of up to three, got {grid!r}: kernel(grid, *arguments)"
        )
    if not 1 <= len(cells) <= 3 or min(cells) < 0:
        raise ValueError(f"grid must be one to three numbers of at least 0, got {grid!r}")
    return tuple(cells)


def _require_arguments(
    kernel: Callable[..., None], arguments: Sequence[Any], constants: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments by their names, in the order of the kernel's."""
    signature = inspect.signature(kernel)
    try:
        bound = signature.bind(*arguments, **constants)
    except TypeError as error:
        names = ", ".join(["grid", *signature.parameters])
        raise TypeError(f"{error} in {kernel.__name__}({names})") from None
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if name.endswith("_ptr"):
            if not isinstance(value, Tensor | None):
                raise TypeError(f"{name} must be a tensor, got {value!r}")
        elif isinstance(value, Tensor):
            raise TypeError(f"{name} must be a number, got a tensor of shape {tuple(value.shape)}")
        elif not isinstance(value, int | float) and not _is_constant(signature.parameters[name]):
            raise TypeError(f"{name} must be a number, got {value!r}")
    return bound.arguments


def _is_constant(parameter: inspect.Parameter) -> bool:
    return "constexpr" in str(parameter.annotation)


def _copies(values: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Copies of the tensors: of the whole memory behind them, each piece of memory once."""
    copied: dict[int, torch.UntypedStorage] = {}

    def copy(x: Tensor) -> Tensor:
        memory = x.untyped_storage()
        where = memory.data_ptr()
        if where not in copied:
            bytes_ = torch.empty(0, dtype=torch.uint8, device=x.device).set_(memory)
            copied[where] = bytes_.to(device, copy=True).untyped_storage()
        empty = torch.empty(0, dtype=x.dtype, device=device)
        return empty.set_(copied[where], x.storage_offset(), tuple(x.shape), x.stride())

    return {name: copy(x) if isinstance(x, Tensor) else x for name, x in values.items()}


def _mend_bfloat16() -> None:
    """The interpreter holds bfloat16 as bits, in uint16, and computes with those: widen them.

    Each operation is done in float32 and its result rounded to the nearest, as on a GPU.
    """
    builder, Handle = interpreter.interpreter_builder, interpreter.TensorHandle
    cast = builder.cast_impl

    def narrow(x: Any) -> bool:
        return isinstance(x, Handle) and x.dtype.scalar == tl.bfloat16

    def cast_impl(source: Any, target: Any) -> Any:
        if narrow(source):
            bits = source.data.astype(np.uint32) << 16
            source = Handle(bits.view(np.float32), tl.float32)
        if target.scalar != tl.bfloat16:
            return cast(source, target)
        rounded = torch.tensor(source.data.astype(np.float32)).bfloat16().view(torch.int16)
        return Handle(rounded.numpy().view(np.uint16), tl.bfloat16)

    def widened(compute: Callable[..., Any]) -> Callable[..., Any]:
        def computed(*arguments: Any) -> Any:
            if not any(narrow(x) for x in arguments):
                return compute(*arguments)
            result = compute(*(cast_impl(x, tl.float32) if narrow(x) else x for x in arguments))
            if result.data.dtype == bool:  # of a comparison
                return Handle(result.data, tl.int1)
            # The last one is what a product is added to, and has the type of the result.
            last = [x for x in arguments if isinstance(x, Handle)][-1]
            return cast_impl(result, tl.bfloat16) if narrow(last) else result

        return computed

    reduced = interpreter.ReduceScanOpInterface.apply

    def apply(self: Any, tile: Any) -> Any:
        if isinstance(tile, tl.tensor) and tile.dtype == tl.bfloat16:
            return reduced(self, tile.to(tl.float32)).to(tl.bfloat16)
        return reduced(self, tile)

    interpreter.ReduceScanOpInterface.apply = apply
    builder.cast_impl = cast_impl
    builder.get_bf16 = lambda x: cast_impl(builder.get_fp32(x), tl.bfloat16)  # not there in 3.6
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_dot"):
        setattr(builder, name, widened(getattr(builder, name)))


def _mend_truth() -> None:
    """A tile is neither true nor false: `a and b` of two masks would be b, without a word.

    And a single number is one, in range(): Triton 3.6 fails there with numpy 2.4.
    """
    patch = interpreter._patch_lang_tensor

    def truth(x: Any) -> bool:
        if sys._getframe(1).f_globals["__name__"] == "triton.language.semantic":
            return True  # it says `if other` for `if other is not None`
        if x.handle.data.size != 1:
            raise TypeError(
                "a tile is neither true nor false: write & for and, | for or, ~ for not, with "
                "brackets around comparisons, of which one at a time; tl.where for if"
            )
        return bool(x.handle.data.item())

    def index(x: Any) -> int:
        return x.handle.data.item()

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        for name, method in (("__bool__", truth), ("__index__", index)):
            (scope[0].set_attr if scope else setattr)(tensor, name, method)

    interpreter._patch_lang_tensor = patched


def _mend_indices() -> None:
    """x_ptr[i], which is right everywhere but in Triton, fails there in words that help nobody."""
    patch, get = interpreter._patch_lang_tensor, tl.tensor.__getitem__

    def getitem(x: Any, index: Any) -> Any:
        parts = index if isinstance(index, tuple | list | tl.tuple) else (index,)
        if x.dtype.is_ptr() and not x.type.is_block():
            raise TypeError(
                "pointers are not indexed: write tl.load(x_ptr + i) in place of x_ptr[i]"
            )
        if not all(isinstance(part, slice | None) for part in map(_value, parts)):
            raise TypeError(
                "a tile is not indexed, but for a new axis, as in x[:, None]: its elements come "
                "from tl.load with their own pointers, or tl.where and tl.sum pick some"
            )
        return get(x, index, _semantic=interpreter.interpreter_semantic)

    def setitem(x: Any, index: Any, value: Any) -> None:
        if x.dtype.is_ptr():
            raise TypeError(
                "pointers are not indexed: write tl.store(x_ptr + i, value) in place of "
                "x_ptr[i] = value"
            )
        raise TypeError("nothing is stored in a tile: write tl.where(mask, value, x) for a new one")

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        for name, method in (("__getitem__", getitem), ("__setitem__", setitem)):
            (scope[0].set_attr if scope else setattr)(tensor, name, method)

    interpreter._patch_lang_tensor = patched


def _value(x: Any) -> Any:
    return x.value if isinstance(x, tl.constexpr) else x


def _mend_early_import() -> None:
    """Who imports triton before us (as torch.compile does) has tl.max and others compiled."""
    mended: dict[int, Any] = {}
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("triton.language")]
    for holder in [*modules, tl.tensor]:
        for name, value in list(vars(holder).items()):
            if isinstance(value, triton.JITFunction):
                setattr(holder, name, mended.setdefault(id(value), triton.jit(value.fn)))


def _spare_it_work() -> None:
    """More than half of the interpreter's time goes into what nobody needs here.

    At each launch and each call of tl.sum and its like it looks through all of Triton for what it
    has to replace: remember what it finds, and have each function look once a launch. It makes a
    table of types whenever it looks one up. And it asks of each sum and product of integers whether
    it overflows: a GPU does not, and an address that is wrong for it is out of bounds.
    """
    found: dict[Any, list[tuple[str, Any]]] = {}
    types: dict[str, np.dtype] = {}
    ready: set[Any] = set()  # functions that this launch has called
    builder, look_up = interpreter.interpreter_builder, interpreter._get_np_dtype
    begin_launch = builder.set_grid_dim

    def patch(holder: Any, builder: Any, *scope: Any) -> None:
        if holder not in found:
            members = inspect.getmembers(holder)
            found[holder] = [(name, value) for name, value in members if tl.core.is_builtin(value)]
        for name, value in found[holder]:
            if getattr(holder, name) is value:  # it is not replaced yet
                interpreter._patch_attr(holder, name, value, builder, *scope)

    def np_dtype(kind: Any) -> np.dtype:
        if kind.name not in types:
            types[kind.name] = look_up(kind)
        return types[kind.name]

    def set_grid_dim(*grid: int) -> None:
        ready.clear()
        begin_launch(*grid)

    def call(function: Any, *arguments: Any, **constants: Any) -> Any:
        if function not in ready:
            interpreter._patch_lang(function.fn)
            ready.add(function)
        try:
            return function.rewrite()(*arguments, **constants)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    interpreter._patch_builtin = patch
    interpreter._get_np_dtype = np_dtype
    interpreter.InterpretedFunction.__call__ = call
    builder.set_grid_dim = set_grid_dim
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


_mend_bfloat16()
_mend_truth()
_mend_indices()
_spare_it_work()
if interpreted():
    _mend_early_import()
