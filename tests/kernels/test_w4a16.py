import ptx
import pytest
import torch
from weight_only import SMALL, excess, launch

from fewer.kernels import w4a16
from fewer.kernels.w4a16 import (
    W4,
    block_of,
    dequantize_w4,
    pack_w4,
    quantize_w4,
    w4a16_matmul,
    w4a16_matmul_reference,
)
from fewer.quantization import quantize_per_group


def draw(
    m: int, n: int, k: int, group: int, symmetric: bool, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, W4]:
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-2, 1, n)[:, None] + 0.3
    return x, quantize_w4(w.to(device, dtype), group, symmetric)


pytestmark = pytest.mark.filterwarnings("ignore:.*it is plain torch:UserWarning")

SHAPES = [  # m, n, k, group, and what differs from SMALL
    (1, 70, 1024, 128, {"SPLIT": 2}),
    (3, 64, 576, 64, {"SPLIT": 4, "BLOCK_N": 32}),
    (8, 130, 96, 32, {"SPLIT": 1}),
    (9, 33, 160, 16, {"SPLIT": 3, "BLOCK_N": 16, "BLOCK_M": 16}),
    (17, 40, 512, 256, {"SPLIT": 5, "BLOCK_M": 16, "TILE": 32}),
    (70, 100, 384, 128, {"SPLIT": 1, "BLOCK_M": 64, "BLOCK_N": 128, "TILE": 16}),
    (2, 1, 32, 32, {"SPLIT": 2}),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("m", "n", "k", "group", "tiles"), SHAPES)
def test_the_product_is_that_of_float64(
    m: int,
    n: int,
    k: int,
    group: int,
    tiles: dict[str, int],
    symmetric: bool,
    dtype: torch.dtype,
    device: str,
) -> None:
    x, w = draw(m, n, k, group, symmetric, dtype, device)
    y, _ = launch(w4a16._launch, x, w, n, SMALL | tiles, seed=m)
    assert excess(y, x, dequantize_w4(w)) <= 1
    assert excess(w4a16_matmul_reference(x, w), x, dequantize_w4(w)) <= 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_program_order_gives_the_same_bits(symmetric: bool, device: str) -> None:
    x, w = draw(3, 70, 1024, 64, symmetric, torch.float16, device)
    settings = SMALL | {"SPLIT": 4, "TILE": 32}
    first, _ = launch(w4a16._launch, x, w, 70, settings)
    for seed in range(4):
        again, _ = launch(w4a16._launch, x, w, 70, settings, seed=seed)
        assert torch.equal(first, again)


def test_every_word_is_loaded_once(device: str) -> None:
    x, w = draw(2, 128, 1024, 128, True, torch.float16, device)
    _, trace = launch(w4a16._launch, x, w, 128, SMALL | {"SPLIT": 2})
    if trace is None:
        pytest.skip("only the interpreter counts")
    assert (trace.loads("packed") == 1).all()
    assert (trace.stores("out") == 1).all()


def test_rows_of_x_may_be_apart(device: str) -> None:
    x, w = draw(4, 32, 128, 32, True, torch.bfloat16, device)
    wide = torch.full((4, 200), float("nan"), dtype=x.dtype, device=device)
    apart = wide[:, 40:168].copy_(x)
    settings = SMALL | {"SPLIT": 1}
    y, _ = launch(w4a16._launch, apart, w, 32, settings)
    assert torch.equal(y, launch(w4a16._launch, x, w, 32, settings)[0])


def test_columns_behind_the_last_group_count_nothing(device: str) -> None:
    """96 columns in groups of 32 fill three quarters of their block."""
    x, w = draw(1, 16, 96, 32, False, torch.float16, device)
    assert 4 * w.packed.shape[1] == 128
    wide = torch.full((1, 128), float("nan"), dtype=x.dtype, device=device)
    y, _ = launch(w4a16._launch, wide[:, :96].copy_(x), w, 16, SMALL | {"SPLIT": 1})
    assert y.isfinite().all()


def test_a_word_holds_one_code_of_each_slice() -> None:
    codes = torch.randint(16, (3, 512), dtype=torch.uint8)
    w = pack_w4(codes, torch.ones(3, 4).half())
    assert block_of(512, 128, 4) == 512
    for j in range(4):
        assert torch.equal(w.packed.int() >> 4 * j & 15, codes[:, 128 * j : 128 * j + 128].int())


@pytest.mark.parametrize(("k", "group"), [(512, 128), (96, 32), (576, 64), (768, 256), (48, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_unpacked_weights_are_those_that_were_packed(k: int, group: int, symmetric: bool) -> None:
    codes = torch.randint(16, (5, k), dtype=torch.uint8)
    scale = torch.rand(5, k // group).add(0.1).half()
    zero = None if symmetric else torch.randint(16, scale.shape)
    z = 8 if zero is None else zero.repeat_interleave(group, 1)
    wanted = (codes.int() - z) * scale.float().repeat_interleave(group, 1)
    assert torch.equal(dequantize_w4(pack_w4(codes, scale, zero)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_are_rounded_to_the_nearest_multiple_of_the_stored_scale(
    symmetric: bool, dtype: torch.dtype
) -> None:
    w = (torch.randn(20, 256) + 0.5).to(dtype)
    stored = quantize_w4(w, 64, symmetric)
    step = stored.scale.T.float().repeat_interleave(64, 1)
    # At an end of the range the rounded scale may fall short, by 2^-9 of 15 steps.
    assert ((dequantize_w4(stored) - w.float()).abs() <= 0.54 * step).all()
    assert stored.scale.dtype == dtype
    _, scale, _ = quantize_per_group(w, 4, 64, symmetric)
    torch.testing.assert_close(stored.scale.T.float(), scale, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("asm", "dtype"),
    [(w4a16.SLICES_BF16, torch.bfloat16), (w4a16.SLICES_FP16, torch.float16)],
    ids=["bf16", "fp16"],
)
def test_inline_assembly_unpacks_every_word_as_the_plain_expression_does(
    asm: object, dtype: torch.dtype
) -> None:
    low, high, both = ptx.pairs_of_words()
    for j, result in enumerate(ptx.run(asm.value, [both], outputs=4)):  # type: ignore[attr-defined]
        first, second = ptx.halves(result, dtype)
        assert torch.equal(first.long(), (low >> 4 * j & 15) - 8)
        assert torch.equal(second.long(), (high >> 4 * j & 15) - 8)


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (128,), (2, 3, 128)])
def test_leading_dimensions_stay(shape: tuple[int, ...], device: str) -> None:
    _, w = draw(1, 24, 128, 32, True, torch.bfloat16, device)
    x = torch.randn(shape, device=device).bfloat16()
    y = w4a16_matmul(x, w)
    assert y.shape == (*shape[:-1], 24)
    torch.testing.assert_close(y, w4a16_matmul_reference(x, w))


def test_the_operator_is_a_good_citizen_of_torch(device: str) -> None:
    x, w = draw(4, 24, 128, 32, False, torch.bfloat16, device)
    torch.library.opcheck(
        w4a16._w4a16_matmul, (x, *w), test_utils=("test_schema", "test_faketensor")
    )
    compiled = torch.compile(lambda x: w4a16_matmul(x.mT, w) + 1, fullgraph=True, backend="eager")
    not_consecutive = x.mT.contiguous()
    assert torch.equal(compiled(not_consecutive), w4a16_matmul(x, w) + 1)


def test_what_does_not_fit_is_refused() -> None:
    x, w = draw(1, 24, 128, 32, True, torch.bfloat16, "cpu")
    with pytest.raises(TypeError, match=r"x must be torch.bfloat16 .* got torch.float16"):
        w4a16_matmul(x.half(), w)
    with pytest.raises(ValueError, match=r"x must have 128 columns .* got shape \(1, 64\)"):
        w4a16_matmul(x[:, :64], w)
    with pytest.raises(TypeError, match=r"w must be bfloat16 or float16, got torch.float32"):
        quantize_w4(torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"group must divide the 100 columns of w, got 64"):
        quantize_w4(torch.randn(2, 100).half(), 64)
    with pytest.raises(ValueError, match=r"group must be 16, 32, 64, 128 or 256, got 48"):
        quantize_w4(torch.randn(2, 96).half(), 48)
    with pytest.raises(ValueError, match="codes must be between 0 and 15, got 0 to 16"):
        pack_w4(torch.tensor([[0, 16] * 8], dtype=torch.uint8), torch.ones(1, 1).half())
    with pytest.raises(ValueError, match="scale must have a row for each of the 2 rows"):
        pack_w4(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 3).half())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 7, 16, 33, 64, 100])
@pytest.mark.parametrize("symmetric", [True, False])
def test_full_size_and_in_a_cuda_graph(m: int, symmetric: bool) -> None:
    x, w = draw(m, 14336, 4096, 128, symmetric, torch.bfloat16, "cuda")
    y = w4a16_matmul(x, w)
    assert excess(y, x, dequantize_w4(w)) <= 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = w4a16_matmul(x, w)
    for _ in range(3):
        replayed.fill_(float("nan"))
        graph.replay()
        assert torch.equal(replayed, y)
