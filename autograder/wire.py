"""Plain data between the grader and the process that runs a student's code.

A frame is two lengths (u32, little-endian), a JSON text that holds the structure, and a safetensors
blob that holds the tensors. None, bool, int, float, str and list stand for themselves in the JSON;
the rest is an object with one key that says what it is:

    {"tuple": [...]}   {"dict": {"key": ...}}   {"other": "generator"}
    {"tensor": [number in the blob, requires_grad, strides or null]}

Nothing is ever unpickled, and nothing a sender does leads to anything but a value or a `WireError`:
lengths, depth, dimensions and counts are bounded before they are believed.

Between grader and child each frame has a number (u32) in front of it (`Stream`): an answer has the
number of what it answers. Equal values packed by the same version are equal frames, byte for byte.
"""

from __future__ import annotations

import functools
import json
import math
import socket
import struct
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

MAX_TEXT = 2 << 20  # bytes of JSON; read into Python objects it may take 40 times that
MAX_TENSORS = 64 << 20  # bytes of tensors
MAX_HEADER = 1 << 20  # bytes of the blob that describe the tensors
MAX_COUNT = 4096  # tensors
MAX_DEPTH = 32
MAX_DIMS = 16
LENGTHS = struct.Struct("<II")
NUMBERED = struct.Struct("<III")
PIECE = 1 << 16  # bytes read at a time
TOO_MUCH_TEXT = f"larger than {MAX_TEXT >> 20} MB of numbers and text outside of tensors"
LONG = "int of more than 64 bits"  # torch has no place for it


class WireError(Exception):
    """What arrived is no frame of ours, or what should be sent is too large for one. The message
    continues a sentence: "the answer is ..."."""


class Other:
    """Stands for an object that does not travel. Its class has the name that the object's had."""

    def __repr__(self) -> str:
        return f"<an object of type {type(self).__name__}>"


def pack(value: Any) -> bytes:
    """A frame with ``value`` in it.

    NumPy arrays travel as tensors, NumPy scalars as numbers, subclasses as what they derive from,
    and objects that are no plain data as their type's name (`Other`).

    Tensors keep their strides, except where elements share memory (`Tensor.expand`) or most of it
    is unused: those arrive contiguous.

    Raises:
        WireError: the frame would be larger than `MAX_TEXT` or `MAX_TENSORS`.
    """
    tensors: list[_Stored] = []
    text = _to_json(_plain(value, tensors, 0)).encode()
    if len(text) > MAX_TEXT:
        raise WireError(TOO_MUCH_TEXT)
    blob = _save(tensors) if tensors else b""
    return LENGTHS.pack(len(text), len(blob)) + text + blob


def unpack(frame: bytes) -> Any:
    """The value in a frame.

    Raises:
        WireError: it is not a frame that `pack` makes.
    """
    if len(frame) < LENGTHS.size:
        raise WireError("cut off")
    n_text, n_blob = LENGTHS.unpack_from(frame)
    if len(frame) != LENGTHS.size + n_text + n_blob:
        raise WireError("of another length than it says")
    try:
        tree = json.loads(frame[LENGTHS.size :][:n_text])
        tensors = _load(frame[LENGTHS.size + n_text :]) if n_blob else {}
        value = _restore(tree, tensors, 0)
    except WireError:
        raise
    except Exception as error:  # json and safetensors have many ways to say no
        raise WireError(f"malformed: {error!r}"[:200]) from error
    if tensors:
        raise WireError("malformed: it has more tensors than places for them")
    return value


def send(sock: socket.socket, frame: bytes, until: float | None = None) -> None:
    """Send a frame. Raises TimeoutError when the clock (`time.monotonic`) passes ``until``."""
    _patience(sock, until)
    sock.sendall(frame)


def receive(sock: socket.socket, until: float | None = None) -> bytes:
    """The next frame, whole.

    Raises:
        WireError: the frame claims to be too large, or ends half-way.
        EOFError: the other side is gone.
        TimeoutError: the clock (`time.monotonic`) passed ``until``.
    """
    head = _receive_exactly(sock, LENGTHS.size, until)
    length = _believable(*LENGTHS.unpack(head))
    try:
        return head + _receive_exactly(sock, length, until)
    except EOFError:
        raise WireError("cut off") from None


def _believable(n_text: int, n_blob: int) -> int:
    """The length of what follows, if it is within the bounds."""
    if n_text > MAX_TEXT:
        raise WireError(TOO_MUCH_TEXT)
    if n_blob > MAX_TENSORS + MAX_HEADER:
        raise WireError(f"larger than {MAX_TENSORS >> 20} MB")
    return n_text + n_blob


class Stream:
    """Numbered frames over a socket: many are written at once, and read in large pieces."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._read = bytearray()
        self._taken = 0  # how much of that was handed out

    def send(self, frames: Iterable[tuple[int, bytes]], until: float | None = None) -> None:
        """Send frames with their numbers. Raises TimeoutError as `send` does."""
        data = b"".join([part for number, frame in frames for part in (_NUMBER(number), frame)])
        send(self.sock, data, until)

    def receive(self, until: float | None = None, expected: int | None = None) -> tuple[int, bytes]:
        """The next frame and its number.

        Args:
            expected: the number that it must have, or it is a WireError.

        Raises:
            what `receive` raises.
        """
        if not self.pending():
            self._fill(1, until)
        try:
            if len(self._read) - self._taken < NUMBERED.size:
                self._fill(NUMBERED.size, until)
            number, n_text, n_blob = NUMBERED.unpack_from(self._read, self._taken)
            if expected is not None and number != expected:
                raise WireError("to nothing that was asked")
            size = NUMBERED.size + _believable(n_text, n_blob)
            if len(self._read) - self._taken < size:
                self._fill(size, until)
        except EOFError:
            raise WireError("cut off") from None
        begin = self._taken + NUMBERED.size - LENGTHS.size
        self._taken += size
        with memoryview(self._read) as view:
            return number, bytes(view[begin : self._taken])

    def pending(self) -> bool:
        """Whether more was read than was handed out."""
        return len(self._read) > self._taken

    def _fill(self, count: int, until: float | None) -> None:
        """Read until so many bytes are at hand."""
        while len(self._read) - self._taken < count:
            del self._read[: self._taken]
            self._taken = 0
            _patience(self.sock, until)
            piece = self.sock.recv(PIECE)
            if not piece:
                raise EOFError
            self._read += piece


def _receive_exactly(sock: socket.socket, count: int, until: float | None) -> bytes:
    data = bytearray()
    while len(data) < count:
        _patience(sock, until)
        chunk = sock.recv(min(count - len(data), 1 << 20))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def _patience(sock: socket.socket, until: float | None) -> None:
    sock.settimeout(None if until is None else max(until - time.monotonic(), 1e-4))


class _Stored(NamedTuple):
    """A tensor as it stands in a blob."""

    dtype: str
    shape: list[int]
    data: bytes


def _save(tensors: list[_Stored]) -> bytes:
    """The tensors as safetensors writes them, named by their place: a length, a header of JSON, and
    the data. (Its own `save` takes five times as long for the few numbers of an answer.)"""
    parts, at = [], 0
    for i, (dtype, shape, data) in enumerate(tensors):
        ends = f"[{at},{at + len(data)}]"
        parts.append(f'"{i}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{ends}}}')
        at += len(data)
    header = ("{" + ",".join(parts) + "}").encode()
    header += b" " * (-len(header) % 8)
    return b"".join([_SIZE(len(header)), header, *[x.data for x in tensors]])


_NUMBER = struct.Struct("<I").pack
_SIZE = struct.Struct("<Q").pack
_to_json = json.JSONEncoder(separators=(",", ":")).encode


def _plain(value: Any, tensors: list[_Stored], depth: int) -> Any:
    """What stands in the JSON for ``value``; its tensors are added to ``tensors``."""
    if isinstance(value, np.generic):
        value = value.item() if value.dtype != np.longdouble else float(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int.__int__(value) if _fits(value) else {"other": LONG}
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        if str.__len__(value) > MAX_TEXT:
            raise WireError(TOO_MUCH_TEXT)
        return str.__str__(value)
    if isinstance(value, np.ndarray):
        value = _of_numpy(value)
    if isinstance(value, Tensor):
        return _plain_tensor(value, tensors)
    if isinstance(value, tuple | list | dict):
        if depth >= MAX_DEPTH:
            return {"other": f"{type(value).__name__} nested too deeply"}
        if len(value) > MAX_TEXT // 2:
            raise WireError(TOO_MUCH_TEXT)
    if isinstance(value, tuple | list):
        parts = [_plain(v, tensors, depth + 1) for v in value]
        return {"tuple": parts} if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            return {"other": "dict whose keys are not all strings"}
        items = {str.__str__(k): _plain(v, tensors, depth + 1) for k, v in value.items()}
        return {"dict": items}
    return {"other": type(value).__name__}


def _fits(number: int) -> bool:
    return -(2**63) <= int.__int__(number) < 2**63


def _of_numpy(array: np.ndarray) -> Any:
    """A tensor of the array, or the array itself where torch has no such element type."""
    try:
        if array.dtype == np.longdouble:
            array = array.astype(np.float64)
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    except TypeError:
        return array


def _plain_tensor(x: Tensor, tensors: list[_Stored]) -> dict[str, Any]:
    with torch._C.DisableTorchFunctionSubclass():
        grad = x.requires_grad
        if x.layout != torch.strided or x.is_meta or x.dtype not in _travelling():
            return {"other": f"tensor that is {_oddity(x)}"}
        if len(tensors) == MAX_COUNT:
            raise WireError(f"more than {MAX_COUNT} tensors")
        if x.numel() * x.element_size() + sum(len(t.data) for t in tensors) > MAX_TENSORS:
            raise WireError(f"larger than {MAX_TENSORS >> 20} MB")
        x = x.detach()
        shape = list(x.shape)
        strides = None if x.is_contiguous() else list(x.stride())
        if strides and not _extent(shape, strides):
            strides = None
        dtype, in_numpy = _travelling()[x.dtype]
        plain = x.resolve_conj().resolve_neg().to("cpu")
        if not in_numpy:
            plain = plain.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
        tensors.append(_Stored(dtype, shape, plain.numpy().tobytes()))
    return {"tensor": [len(tensors) - 1, grad, strides]}


def _extent(shape: list[int], strides: list[int]) -> int:
    """How many elements of memory a layout spans; 0 where it is not one that travels: where
    elements may overlap, or more than half of the memory is unused."""
    if len(strides) != len(shape) or not all(type(s) is int and 0 <= s < 2**32 for s in strides):
        return 0
    last = 0  # the farthest element that the dimensions so far reach
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1:
            if stride <= last:
                return 0
            last += (size - 1) * stride
    return last + 1 if last < 2 * math.prod(shape) else 0


def _oddity(x: Tensor) -> str:
    """Why a tensor does not travel, in one word."""
    if x.layout != torch.strided:
        return "sparse"
    return "on the meta device" if x.is_meta else str(x.dtype).removeprefix("torch.")


@functools.cache
def _travelling() -> dict[torch.dtype, tuple[str, bool]]:
    """The element types that this version of safetensors writes and reads: the name it has for
    each, and whether NumPy knows it."""
    found = {}
    for dtype in {d for d in vars(torch).values() if isinstance(d, torch.dtype)}:
        try:
            x = torch.zeros(2, dtype=torch.uint8).repeat(16).view(dtype)
            blob = safetensors.torch.save({"x": x})
            y = safetensors.torch.load(blob)["x"]
        except Exception:
            continue
        header = json.loads(blob[8:][: int.from_bytes(blob[:8], "little")])["x"]
        if y.dtype == dtype and y.shape == x.shape and header["shape"] == list(x.shape):
            found[dtype] = header["dtype"], _in_numpy(x)
    return found


def _in_numpy(x: Tensor) -> bool:
    try:
        return bool(x.numpy().nbytes == x.nbytes)
    except TypeError:
        return False


def _load(blob: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors blob whose header is of a sane size."""
    if len(blob) < 8 or int.from_bytes(blob[:8], "little") > MAX_HEADER:
        raise WireError("malformed: its tensors have no sane header")
    tensors = safetensors.torch.load(blob)
    for name, x in tensors.items():
        if x.dim() > MAX_DIMS:
            raise WireError(f"a tensor of more than {MAX_DIMS} dimensions")
        if x.dtype == torch.bool:  # a byte that is neither 0 nor 1 would be true and false at once
            tensors[name] = x.view(torch.uint8) != 0
    return tensors


def _restore(node: Any, tensors: dict[str, Tensor], depth: int) -> Any:
    """The inverse of `_plain`; each tensor is taken out of ``tensors``, so that none is shared."""
    if depth > MAX_DEPTH + 1:
        raise WireError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(node, int) and not _fits(node):
        return _other(LONG)
    if node is None or isinstance(node, bool | int | float):
        return node
    if isinstance(node, str):
        return _text(node)
    if isinstance(node, list):
        return [_restore(n, tensors, depth + 1) for n in node]
    ((tag, body),) = node.items()
    if tag == "tuple" and isinstance(body, list):
        return tuple(_restore(n, tensors, depth + 1) for n in body)
    if tag == "dict" and isinstance(body, dict):
        return {_text(k): _restore(n, tensors, depth + 1) for k, n in body.items()}
    if tag == "other" and isinstance(body, str):
        return _other(_text(body)[:80].replace("\0", " "))
    if tag == "tensor" and isinstance(body, list):
        return _restore_tensor(body, tensors)
    raise WireError(f"malformed: unknown tag {str(tag)[:20]!r}")


def _restore_tensor(body: list[Any], tensors: dict[str, Tensor]) -> Tensor:
    number, grad, strides = body
    if type(number) is not int or type(grad) is not bool:
        raise WireError("malformed: a tensor is described wrongly")
    x = tensors.pop(str(number))
    if strides is not None:
        extent = _extent(list(x.shape), strides)
        if not extent:
            raise WireError("malformed: a tensor has strange strides")
        # What lies between the elements is always zero.
        x = torch.zeros(extent, dtype=x.dtype).as_strided(x.shape, strides).copy_(x)
    return x.requires_grad_() if grad else x


def _text(text: str) -> str:
    """The text without lone surrogates, which no file could hold."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


@functools.lru_cache(maxsize=256)
def _class(name: str) -> type[Other]:
    return type(name, (Other,), {})


def _other(name: str) -> Other:
    return _class(name)()
