import inspect
import math

import pytest
import torch
import triton
from torch import Tensor

from fewer.kernels.interpreter import interpreted, watched
from fewer.kernels.simple import (
    add_kernel,
    decode_attention_kernel,
    dequantize_matmul_kernel,
    hadamard_kernel,
    matmul_kernel,
    quantize_rows_kernel,
    softmax_kernel,
    split_k_kernel,
)
from fewer.quantization.hadamard import fwht

needs_the_interpreter = pytest.mark.skipif(not interpreted(), reason="only it can be watched")

HALF, SINGLE = torch.float16, torch.float32


def drawn(*shape: int, device: str, dtype: torch.dtype = SINGLE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(device, dtype)


def poison(*shape: int, device: str, dtype: torch.dtype = SINGLE) -> Tensor:
    """An output that nobody has written: NaN, and -128 in bytes."""
    return torch.full(shape, math.nan if dtype.is_floating_point else -128).to(device, dtype)


def strided(x: Tensor, gap: int) -> Tensor:
    """The same rows, with `gap` elements of somebody else between them."""
    return torch.cat([x, torch.full_like(x[:, :1], 1e4).expand(-1, gap)], 1)[:, : x.shape[1]]


def error(y: Tensor, reference: Tensor) -> float:
    """The largest error, as a fraction of the largest number."""
    return float((y.double() - reference).abs().max() / reference.abs().max())


def tolerance(dtype: torch.dtype) -> float:
    return 1e-6 if dtype == SINGLE else 1e-3


# --- each against float64, on shapes that do not fit ----------------------------------------------


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_the_sum_of_vectors_is_that_of_torch(n: int, dtype: torch.dtype, device: str) -> None:
    x, y = drawn(n, device=device, dtype=dtype), drawn(n, device=device, dtype=dtype, seed=1)
    out = poison(n, device=device, dtype=dtype)
    programs = triton.cdiv(n, 64) + 1  # one too many has nothing to do
    assert add_kernel(programs, x, y, out, n, BLOCK=64)[2].equal(x + y)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize(("rows", "cols", "gap"), [(1, 1, 0), (5, 33, 0), (4, 64, 7), (3, 50, 14)])
def test_codes_and_scales_of_rows_are_as_near_as_8_bits_can_be(
    rows: int, cols: int, gap: int, dtype: torch.dtype, device: str
) -> None:
    x = strided(drawn(rows, cols, device=device, dtype=dtype), gap)
    codes, scale = poison(rows, cols, device=device, dtype=torch.int8), poison(rows, device=device)
    _, codes, scale = quantize_rows_kernel(
        rows, x, codes, scale, cols, x.stride(0), BLOCK=triton.next_power_of_2(cols)
    )
    torch.testing.assert_close(scale.double(), x.double().abs().amax(1) / 127)
    assert (codes.abs().amax(1) == 127).all()
    off = (codes.double() - x.double() / scale.double()[:, None]).abs()
    assert float(off.max()) <= 0.5 + 1e-4


def test_a_row_of_zeros_has_codes_of_zero_and_a_finite_scale(device: str) -> None:
    x = torch.zeros(2, 8, device=device)
    x[1, 3] = -1
    codes, scale = poison(2, 8, device=device, dtype=torch.int8), poison(2, device=device)
    _, codes, scale = quantize_rows_kernel(2, x, codes, scale, 8, 8, BLOCK=16)
    assert codes[0].eq(0).all()
    assert scale.isfinite().all()
    assert codes[1].tolist() == [0, 0, 0, -127, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize(("rows", "cols", "gap"), [(1, 1, 3), (3, 100, 0), (4, 128, 5)])
def test_softmax_is_that_of_torch_however_long_the_tile(
    rows: int, cols: int, gap: int, block: int, dtype: torch.dtype, device: str
) -> None:
    x = strided(8 * drawn(rows, cols, device=device, dtype=dtype), gap)
    out = poison(rows, cols, device=device, dtype=dtype)
    out = softmax_kernel(rows, x, out, cols, x.stride(0), BLOCK=block)[1]
    assert error(out, x.double().softmax(1)) < tolerance(dtype)


@pytest.mark.parametrize("rising", [True, False])
def test_softmax_of_large_numbers_does_not_overflow(rising: bool, device: str) -> None:
    x = torch.linspace(-60000, 60000, 77, device=device)[None]
    x = x if rising else x.flip(1)
    out = softmax_kernel(1, x, poison(1, 77, device=device), 77, 77, BLOCK=16)[1]
    assert error(out, x.double().softmax(1)) < 1e-6


@pytest.mark.parametrize("out_dtype", [SINGLE, HALF])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (16, 32, 16), (33, 50, 70), (40, 17, 129)])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_matrix_product_is_that_of_torch_whatever_the_strides(
    m: int, n: int, k: int, transposed: bool, out_dtype: torch.dtype, device: str
) -> None:
    a, b = drawn(m, k, device=device, dtype=HALF), drawn(k, n, device=device, dtype=HALF)
    c = poison(m, n, device=device, dtype=out_dtype)
    if transposed:
        a, b, c = a.T.contiguous().T, b.T.contiguous().T, c.T.contiguous().T
    grid = (triton.cdiv(m, 16), triton.cdiv(n, 32))
    blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}
    strides = [*a.stride(), *b.stride(), *c.stride()]
    c = matmul_kernel(grid, a, b, c, m, n, k, *strides, **blocks)[2]
    assert error(c, a.double() @ b.double()) < tolerance(out_dtype)


def test_the_matrix_product_sums_in_float32(device: str) -> None:
    """In float16, 2048 + 1 is 2048."""
    a, b = torch.ones(1, 4096, device=device).half(), torch.ones(4096, 1, device=device).half()
    c = matmul_kernel(
        (1, 1), a, b, poison(1, 1, device=device), 1, 1, 4096, 4096, 1, 1, 1, 1, 1,
        BLOCK_M=16, BLOCK_N=16, BLOCK_K=16,
    )[2]  # fmt: skip
    assert c.item() == 4096


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize(("m", "n", "groups"), [(1, 1, 1), (5, 40, 3), (33, 16, 2)])
def test_the_product_with_4_bit_weights_is_that_with_the_weights_they_stand_for(
    m: int, n: int, groups: int, group: int, device: str
) -> None:
    k = groups * group
    x = drawn(m, k, device=device, dtype=HALF)
    generator = torch.Generator().manual_seed(n)
    codes = torch.randint(16, (n, k), generator=generator, dtype=torch.uint8).to(device)
    scale = drawn(n, groups, device=device).abs() + 0.5
    zero = drawn(n, groups, device=device) + 8
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    grid = (triton.cdiv(m, 16), triton.cdiv(n, 16))
    y = dequantize_matmul_kernel(
        grid, x, packed, scale, zero, poison(m, n, device=device), m, n, k,
        GROUP=group, BLOCK_M=16, BLOCK_N=16,
    )[4]  # fmt: skip
    w = scale[:, :, None] * (codes.view(n, groups, group) - zero[:, :, None])
    assert error(y, x.double() @ w.view(n, k).double().T) < 1e-3  # w is rounded to float16


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (37, 90)])
def test_programs_that_split_k_add_up_to_the_whole_product(
    n: int, k: int, splits: int, dtype: torch.dtype, device: str
) -> None:
    w, x = drawn(n, k, device=device, dtype=dtype), drawn(k, device=device, dtype=dtype)
    y = torch.zeros(n, device=device)
    grid = (triton.cdiv(n, 16), splits)
    y = split_k_kernel(grid, w, x, y, n, k, BLOCK_N=16, BLOCK_K=32)[2]
    assert error(y, w.double() @ x.double()) < 1e-6


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize(("rows", "n"), [(3, 2), (1, 8), (5, 64), (2, 1024)])
def test_the_transform_is_the_librarys_and_its_own_inverse(
    rows: int, n: int, dtype: torch.dtype, device: str
) -> None:
    x = drawn(rows, n, device=device, dtype=dtype)
    out = poison(rows, n, device=device, dtype=dtype)
    y = hadamard_kernel(rows, x, out, n=n)[1]
    assert error(y, fwht(x.double())) < tolerance(dtype)
    assert error(hadamard_kernel(rows, y, out, n=n)[1], x.double()) < 2 * tolerance(dtype)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (4, 1), (6, 3)])
@pytest.mark.parametrize("tokens", [1, 32, 77])
def test_attention_of_one_query_is_that_of_torch(
    heads: int, group: int, tokens: int, dtype: torch.dtype, device: str
) -> None:
    q = 4 * drawn(heads, 16, device=device, dtype=dtype)
    k = drawn(heads // group, tokens, 16, device=device, dtype=dtype)
    v = drawn(heads // group, tokens, 16, device=device, dtype=dtype, seed=1)
    out = poison(heads, 16, device=device, dtype=dtype)
    out = decode_attention_kernel(heads, q, k, v, out, tokens, group, DIM=16, BLOCK=32)[3]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.double() for x in (q[:, None], *(x.repeat_interleave(group, 0) for x in (k, v))))
    )
    assert error(out, wanted[:, 0]) < tolerance(dtype)


def test_attention_to_far_keys_does_not_overflow(device: str) -> None:
    q, v = torch.full((1, 16), 50.0, device=device), drawn(1, 40, 16, device=device)
    k = torch.linspace(-9, 9, 40, device=device)[None, :, None].expand(1, 40, 16).contiguous()
    out = poison(1, 16, device=device)
    out = decode_attention_kernel(1, q, k, v, out, 40, 1, DIM=16, BLOCK=16)[3]
    torch.testing.assert_close(out[0], v[0, -1])  # the last key is far ahead


# --- any order of the programs gives the same bits ------------------------------------------------


def launches(device: str) -> dict[str, tuple]:
    """A launch of each kernel, of several programs."""
    x, half = drawn(6, 40, device=device), drawn(40, 40, device=device, dtype=HALF)
    codes = torch.arange(800, device=device).reshape(40, 20).to(torch.uint8)
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16}
    short, packed = half[:, :32].contiguous(), codes[:, :16].contiguous()
    out, square = poison(6, 40, device=device), poison(40, 40, device=device)
    k, v = drawn(3, 40, 16, device=device), drawn(3, 40, 16, device=device, seed=1)
    groups = drawn(40, 2, device=device)
    return {
        "add": (add_kernel, 4, (x, x + 1, out, 240), {"BLOCK": 64}),
        "quantize_rows": (
            quantize_rows_kernel, 6,
            (x, poison(6, 40, device=device, dtype=torch.int8), poison(6, device=device), 40, 40),
            {"BLOCK": 64},
        ),
        "softmax": (softmax_kernel, 6, (x, out, 40, 40), {"BLOCK": 16}),
        "matmul": (
            matmul_kernel, (3, 3), (half, half + 1, square, 40, 40, 40, *[40, 1] * 3),
            {**tiles, "BLOCK_K": 16},
        ),
        "dequantize_matmul": (
            dequantize_matmul_kernel, (3, 3),
            (short, packed, groups, groups + 7, square, 40, 40, 32),
            {**tiles, "GROUP": 16},
        ),
        "split_k": (
            split_k_kernel, (3, 3),
            (half.round(), half[0].round(), torch.zeros(40, device=device), 40, 40),
            {"BLOCK_N": 16, "BLOCK_K": 8},
        ),
        "hadamard": (
            hadamard_kernel, 6,
            (x[:, :32].contiguous(), poison(6, 32, device=device)), {"n": 32},
        ),
        "decode_attention": (
            decode_attention_kernel, 6,
            (drawn(6, 16, device=device), k, v, poison(6, 16, device=device), 40, 2),
            {"DIM": 16, "BLOCK": 16},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", launches("cpu"))
def test_the_order_of_the_programs_changes_no_bit(name: str, device: str) -> None:
    """Of split_k as well, with whole numbers: their sums are exact."""
    kernel, grid, arguments, constants = launches(device)[name]
    first = kernel(grid, *arguments, **constants, seed=0)
    assert not any(x.isnan().any() for x in first)
    for seed in (None, 1, 2):
        again = kernel(grid, *arguments, **constants, seed=seed)
        assert all(x.equal(y) for x, y in zip(first, again, strict=True))


# --- no byte is read twice without need -----------------------------------------------------------


@needs_the_interpreter
@pytest.mark.parametrize(
    ("name", "loads"),
    [
        ("add", {"x": 1, "y": 1}),
        ("quantize_rows", {"x": 1}),
        ("softmax", {"x": 2}),  # a sweep for maximum and sum, one for the result
        ("matmul", {"b": 3}),  # by each of the three rows of tiles
        ("split_k", {"w": 1, "x": 3}),  # x by each of the three bands of rows
        ("hadamard", {"x": 1}),
        ("decode_attention", {"k": 2, "v": 2}),  # by both heads of a group
    ],
)
def test_every_element_is_loaded_as_often_as_it_has_to(name: str, loads: dict[str, int]) -> None:
    kernel, grid, arguments, constants = launches("cpu")[name]
    named = zip(inspect.signature(kernel).parameters, arguments, strict=False)
    with watched({n.removesuffix("_ptr"): x for n, x in named if isinstance(x, Tensor)}) as trace:
        cells = grid if isinstance(grid, tuple) else (grid,)
        triton.jit(kernel.__wrapped__)[cells](*arguments, **constants)
    for tensor, times in loads.items():
        assert trace.loads(tensor).eq(times).all()
