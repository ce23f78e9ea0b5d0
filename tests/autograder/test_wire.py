"""Plain data crosses the process boundary unchanged, and nothing else crosses it at all."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import os
import socket
import struct
import threading
import time
import tracemalloc
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from autograder import wire
from autograder.strategies import arrange
from autograder.wire import MAX_DEPTH, MAX_TENSORS, MAX_TEXT, Other, WireError, pack, unpack

quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

DTYPES = sorted(wire._travelling(), key=str)


@st.composite
def any_tensor(draw: st.DrawFn) -> Tensor:
    """Every element type, every bit pattern, every number of dimensions, every layout."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    high = 2 if dtype == torch.bool else 256
    size = torch.empty(0, dtype=dtype).element_size()
    raw = rng.integers(0, high, size=math.prod(shape) * size, dtype=np.uint8)
    x = torch.frombuffer(bytearray(raw), dtype=dtype) if raw.size else torch.zeros(0, dtype=dtype)
    x = x.reshape(shape)
    return arrange(x, draw(st.sampled_from(["contiguous", "transposed", "strided"])))


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text()
values = st.recursive(
    scalars | any_tensor(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def identical(a: Any, b: Any) -> bool:
    """Same types all the way down, same bits in every tensor."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.requires_grad == b.requires_grad
        return same and bits(a) == bits(b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(identical(a[k], b[k]) for k in a)
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b) or (math.isnan(a) and math.isnan(b))
    return a == b


def bits(x: Tensor) -> bytes:
    flat = x.detach().clone(memory_format=torch.contiguous_format).flatten()
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


@quick
@given(values)
def test_plain_data_arrives_unchanged(value: Any) -> None:
    assert identical(unpack(pack(value)), value)


@quick
@given(any_tensor())
def test_the_layout_is_kept(x: Tensor) -> None:
    y = unpack(pack(x))
    assert identical(y, x)
    assert y.is_contiguous() if x.is_contiguous() else y.stride() == x.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (2, 0), (3, 1)], ids=str)
def test_the_smallest_tensors_arrive_whatever_their_strides(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    for layout in ("contiguous", "transposed", "strided"):
        x = arrange(torch.zeros(shape).to(dtype), layout)
        assert identical(unpack(pack(x)), x)


def test_equal_values_are_equal_frames() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert pack((x, {"a": 1.5})) == pack((x.clone(), {"a": 1.5}))
    for other in (x.double(), x.t(), x.reshape(3, 2), x + 1, x.requires_grad_()):
        assert pack((other, {"a": 1.5})) != pack((x.detach(), {"a": 1.5}))


def test_every_common_element_type_travels() -> None:
    common = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 bool uint8 int8"
    names = [*common.split(), "int16", "int32", "int64", "uint16", "uint32", "uint64"]
    assert {getattr(torch, name) for name in names} <= wire._travelling().keys()


def test_an_input_that_wants_a_gradient_still_does() -> None:
    assert unpack(pack(torch.zeros(2, requires_grad=True))).requires_grad
    assert not unpack(pack(torch.zeros(2))).requires_grad


def test_a_result_with_a_gradient_arrives_as_a_leaf() -> None:
    x = torch.ones(2, requires_grad=True)
    assert unpack(pack(x * 3)).is_leaf


@pytest.mark.parametrize(
    "x",
    [
        torch.arange(3.0).expand(2, 3),
        torch.arange(9.0).unfold(0, 4, 1),
        torch.arange(1e6)[::1000],
        torch.arange(30.0).as_strided((3, 3), (3, 2)),
    ],
    ids=["expanded", "overlapping", "sparse in memory", "perhaps overlapping"],
)
def test_other_layouts_arrive_contiguous(x: Tensor) -> None:
    y = unpack(pack(x))
    assert torch.equal(x, y)
    assert y.is_contiguous()
    assert len(pack(x)) < 20_000


def test_one_tensor_in_two_places_arrives_as_two() -> None:
    x = torch.zeros(2)
    a, b = unpack(pack([x, x]))
    a += 1
    assert b.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.float32(1.5), 1.5),
        (np.float64("nan"), math.nan),
        (np.int8(-3), -3),
        (np.bool_(True), True),
        (np.array(2.0), torch.tensor(2.0, dtype=torch.float64)),
        (np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1], torch.tensor([[2, 1, 0], [5, 4, 3]])),
        (np.arange(3, dtype=">f4"), torch.arange(3.0)),
        (np.zeros((0, 3)), torch.zeros(0, 3, dtype=torch.float64)),
        (np.str_("text"), "text"),
        (enum.IntEnum("E", "A B")(2), 2),
        (namedtuple("Pair", "a b")(1, 2), (1, 2)),
        (OrderedDict(a=1), {"a": 1}),
        (torch.max(torch.tensor([[1.0, 2.0]]), dim=1), (torch.tensor([2.0]), torch.tensor([1]))),
        (torch.nn.Parameter(torch.ones(1)), torch.ones(1, requires_grad=True)),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_relatives_of_plain_data_arrive_as_plain_data(value: Any, plain: Any) -> None:
    got = unpack(pack(value))
    if isinstance(plain, Tensor):
        plain = plain.to(got.dtype) if not plain.is_floating_point() else plain
    assert identical(got, plain)


class Strange:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/this-should-never-exist",)

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Strange(), "Strange"),
        ((i for i in range(3)), "generator"),
        (lambda x: x, "function"),
        (Strange, "type"),
        ({1, 2}, "set"),
        (1 + 2j, "complex"),
        (b"bytes", "bytes"),
        ({1: 2}, "dict whose keys are not all strings"),
        (2**63, "int of more than 64 bits"),
        (-(10**400), "int of more than 64 bits"),
        (np.array(["a"]), "ndarray"),
        (torch.zeros(2, 2).to_sparse(), "tensor that is sparse"),
        (torch.zeros(2, device="meta"), "tensor that is on the meta device"),
        (torch.zeros(2, dtype=torch.complex128), "tensor that is complex128"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_objects_arrive_as_the_name_of_their_type(value: Any, name: str) -> None:
    got = unpack(pack([value]))[0]
    assert isinstance(got, Other)
    assert type(got).__name__ == name
    assert name in repr(got)
    assert got != value or isinstance(value, Strange)


def test_a_list_that_contains_itself_ends() -> None:
    endless: list[Any] = []
    endless.append(endless)
    got = unpack(pack(endless))
    for _ in range(MAX_DEPTH):
        (got,) = got
    assert type(got).__name__ == "list nested too deeply"


def test_lone_surrogates_are_replaced_for_no_file_could_hold_them() -> None:
    got = unpack(pack({"a\ud800": "\udfffb"}))
    assert got == {"a?": "?b"}


def test_what_is_too_large_is_not_packed() -> None:
    with pytest.raises(WireError, match="larger than 64 MB"):
        pack([torch.zeros(MAX_TENSORS // 2 + 1, dtype=torch.uint8)] * 2)
    with pytest.raises(WireError, match="larger than 2 MB of numbers and text"):
        pack("x" * (MAX_TEXT + 1))
    with pytest.raises(WireError, match="more than 4096 tensors"):
        pack([torch.zeros(1)] * 5000)


def frame(text: Any, blob: bytes = b"") -> bytes:
    """A frame made by hand."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    return wire.LENGTHS.pack(len(text), len(blob)) + text + blob


def header(blob_header: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(blob_header).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = safetensors.torch.save({"0": torch.zeros(2)})
TENSOR = {"tensor": [0, False, None]}
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\0\0\0",
        frame(b"{"),
        frame(b"\xff"),
        frame(b"[" * 100_000 + b"]" * 100_000),
        frame(json.loads("[" * 40 + "]" * 40)),
        frame(b"1" * 5000),
        frame({}),
        frame({"tuple": [], "dict": {}}),
        frame({"tuple": 3}),
        frame({"dict": []}),
        frame({"other": 3}),
        frame({"pickle": "gASV"}),
        frame(TENSOR),
        frame({"tensor": [0]}, ONE),
        frame({"tensor": ["0", False, None]}, ONE),
        frame({"tensor": [True, False, None]}, ONE),
        frame({"tensor": [0, 1, None]}, ONE),
        frame({"tensor": [1, False, None]}, ONE),
        frame({"tensor": [0, True, None]}, safetensors.torch.save({"0": torch.zeros(2).int()})),
        frame([TENSOR, TENSOR], ONE),
        frame(None, ONE),
        frame(TENSOR, b"short"),
        frame(TENSOR, struct.pack("<Q", 2**62) + b"{}"),
        frame(TENSOR, header({"0": F32}, bytes(7))),
        frame(TENSOR, header({"0": F32}, bytes(9))),
        frame(TENSOR, header({"0": F32 | {"dtype": "F33"}}, bytes(8))),
        frame(TENSOR, header({"0": F32 | {"shape": [2**40]}}, bytes(8))),
        frame(TENSOR, header({"0": F32 | {"shape": [-2]}}, bytes(8))),
        frame(TENSOR, header({"0": F32 | {"shape": [2**33, 2**33, 0]}}, bytes(8))),
        frame(TENSOR, header({"0": F32 | {"data_offsets": [8, 0]}}, bytes(8))),
        frame(TENSOR, header({"0": F32 | {"shape": [1] * 1000, "data_offsets": [0, 4]}}, bytes(4))),
        frame([TENSOR, {"tensor": [1, False, None]}], header({"0": F32, "1": F32}, bytes(8))),
        frame("x") + b"more",
    ],
    ids=lambda bad: repr(bad[8:60]),
)
def test_a_malformed_frame_is_a_wire_error(bad: bytes) -> None:
    with pytest.raises(WireError):
        unpack(bad)


@pytest.mark.parametrize(
    "strides",
    [
        *([-1, 1], [1, 1], [2, 0], [0, 1], [100, 50], [2, 10**15], [1, 2**31], [2**70, 1]),
        *([1], [1, 1, 1], ["a", 1], [1.5, 3], [True, 3], [[1], [2]], 7, {}, "ab"),
    ],
    ids=repr,
)
def test_strange_strides_are_a_wire_error(strides: Any) -> None:
    blob = safetensors.torch.save({"0": torch.zeros(3, 3)})
    assert unpack(frame({"tensor": [0, False, [1, 3]]}, blob)).stride() == (1, 3)
    with pytest.raises(WireError):
        unpack(frame({"tensor": [0, False, strides]}, blob))


def test_a_byte_that_is_neither_true_nor_false_becomes_true() -> None:
    blob = header({"0": {"dtype": "BOOL", "shape": [3], "data_offsets": [0, 3]}}, b"\x00\x01\x02")
    got = unpack(frame(TENSOR, blob))
    assert bits(got) == b"\x00\x01\x01"


SAMPLE = pack({"a": [torch.arange(6.0).reshape(2, 3), (1, "two")], "b": torch.tensor(True)})


@quick
@given(st.data())
def test_a_damaged_frame_is_a_value_or_a_wire_error(data: st.DataObject) -> None:
    damaged = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(WireError):
        unpack(bytes(damaged))


@quick
@given(st.integers(0, len(SAMPLE) - 1))
def test_a_truncated_frame_is_a_wire_error(length: int) -> None:
    with pytest.raises(WireError):
        unpack(SAMPLE[:length])


@quick
@given(st.binary(max_size=80), st.binary(max_size=80))
def test_noise_is_a_value_or_a_wire_error(text: bytes, blob: bytes) -> None:
    with contextlib.suppress(WireError):
        unpack(frame(text, blob))


@pytest.fixture
def pair() -> Any:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def soon() -> float:
    return time.monotonic() + 5


def test_frames_follow_each_other_through_a_socket(pair: Any) -> None:
    ours, theirs = pair
    large = torch.arange(1_000_000)
    writer = threading.Thread(target=lambda: [wire.send(theirs, pack(v)) for v in ("a", large, 3)])
    writer.start()
    got = [unpack(wire.receive(ours, soon())) for _ in range(3)]
    writer.join()
    assert identical(got, ["a", large, 3])


def test_a_frame_cut_off_by_the_end_is_a_wire_error(pair: Any) -> None:
    ours, theirs = pair
    theirs.sendall(SAMPLE[:-1])
    theirs.close()
    with pytest.raises(WireError, match="cut off"):
        wire.receive(ours, soon())


def test_the_end_between_frames_is_an_eof(pair: Any) -> None:
    ours, theirs = pair
    theirs.sendall(SAMPLE)
    theirs.close()
    wire.receive(ours, soon())
    with pytest.raises(EOFError):
        wire.receive(ours, soon())


@pytest.mark.parametrize("lengths", [(MAX_TEXT + 1, 0), (2, 2**32 - 1), (2**32 - 1, 2**32 - 1)])
def test_a_frame_that_claims_too_much_is_refused_before_it_is_read(
    pair: Any, lengths: tuple[int, int]
) -> None:
    ours, theirs = pair
    theirs.sendall(wire.LENGTHS.pack(*lengths))
    with pytest.raises(WireError, match="larger than"):
        wire.receive(ours, soon())


def test_memory_is_not_set_aside_for_what_is_only_announced(pair: Any) -> None:
    ours, theirs = pair
    theirs.sendall(wire.LENGTHS.pack(2, MAX_TENSORS) + b"{}")
    theirs.close()
    tracemalloc.start()
    with pytest.raises(WireError):
        wire.receive(ours, soon())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_a_sender_that_trickles_runs_out_of_time(pair: Any) -> None:
    ours, theirs = pair
    stop = threading.Event()

    def trickle() -> None:
        theirs.sendall(wire.LENGTHS.pack(1000, 0))
        while not stop.wait(0.01):
            theirs.sendall(b" ")

    writer = threading.Thread(target=trickle)
    writer.start()
    with pytest.raises(TimeoutError):
        wire.receive(ours, time.monotonic() + 0.1)
    stop.set()
    writer.join()


def test_the_costliest_text_takes_bounded_memory() -> None:
    """A byte of JSON never becomes more than some 40 bytes of Python objects."""
    dense = frame(b"[" + b",".join([b"[]"] * 30_000) + b"]")
    tracemalloc.start()
    unpack(dense)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 * len(dense)
