import ptx
import pytest
import torch
from weight_only import SMALL, excess, launch

from fewer.kernels import w8a16
from fewer.kernels.w8a16 import (
    W8,
    dequantize_w8,
    pack_w8,
    quantize_w8,
    w8a16_matmul,
    w8a16_matmul_reference,
)
from fewer.quantization import quantize_per_group

pytestmark = pytest.mark.filterwarnings("ignore:.*it is plain torch:UserWarning")


def draw(
    m: int, n: int, k: int, group: int | None, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, W8]:
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-2, 1, n)[:, None]
    return x, quantize_w8(w.to(device, dtype), group)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "tiles"),
    [
        (1, 70, 1024, 128, {"SPLIT": 2}),
        (1, 70, 1024, None, {"SPLIT": 2, "TILE": 64}),
        (3, 64, 576, 64, {"SPLIT": 4, "BLOCK_N": 32}),
        (8, 130, 100, None, {"SPLIT": 1}),
        (9, 33, 48, 16, {"SPLIT": 3, "BLOCK_N": 16, "BLOCK_M": 16}),
        (17, 40, 512, 256, {"SPLIT": 5, "BLOCK_M": 16, "TILE": 32}),
        (70, 100, 384, 128, {"SPLIT": 1, "BLOCK_M": 64, "BLOCK_N": 128, "TILE": 16}),
        (2, 1, 7, None, {"SPLIT": 2}),
    ],
)
def test_the_product_is_that_of_float64(
    m: int,
    n: int,
    k: int,
    group: int | None,
    tiles: dict[str, int],
    dtype: torch.dtype,
    device: str,
) -> None:
    x, w = draw(m, n, k, group, dtype, device)
    y, _ = launch(w8a16._launch, x, w, n, SMALL | tiles, seed=m)
    assert excess(y, x, dequantize_w8(w)) <= 1
    assert excess(w8a16_matmul_reference(x, w), x, dequantize_w8(w)) <= 1


def test_every_program_order_gives_the_same_bits(device: str) -> None:
    x, w = draw(3, 70, 1024, 64, torch.float16, device)
    settings = SMALL | {"SPLIT": 4, "TILE": 32}
    first, _ = launch(w8a16._launch, x, w, 70, settings)
    for seed in range(4):
        assert torch.equal(first, launch(w8a16._launch, x, w, 70, settings, seed=seed)[0])


def test_every_word_is_loaded_once(device: str) -> None:
    x, w = draw(2, 128, 512, 128, torch.float16, device)
    _, trace = launch(w8a16._launch, x, w, 128, SMALL | {"SPLIT": 2})
    if trace is None:
        pytest.skip("only the interpreter counts")
    assert (trace.loads("packed") == 1).all()


@pytest.mark.parametrize(("k", "groups"), [(512, 4), (96, 3), (576, 1), (48, 3), (5, 1)])
def test_unpacked_weights_are_those_that_were_packed(k: int, groups: int) -> None:
    codes = torch.randint(-128, 128, (6, k)).to(torch.int8)
    scale = torch.rand(6, groups).add(0.1).half()
    wanted = codes * scale.float().repeat_interleave(k // groups, 1)
    assert torch.equal(dequantize_w8(pack_w8(codes, scale)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [None, 64])
def test_weights_are_rounded_to_the_nearest_multiple_of_the_stored_scale(
    group: int | None, dtype: torch.dtype
) -> None:
    w = torch.randn(20, 256).to(dtype)
    stored = quantize_w8(w, group)
    step = stored.scale.T.float().repeat_interleave(group or 256, 1)
    # A scale that was rounded down, by up to 2^-9, leaves the largest out of reach of code 127.
    reach = 127 * step
    inside = (dequantize_w8(stored) - w.float()).abs() <= 0.501 * step
    assert (inside | (w.float().abs() > reach)).all()
    assert ((w.float().abs() - reach) <= 127 * 2**-8 * step).all()
    _, scale, _ = quantize_per_group(w, 8, group or 256)
    torch.testing.assert_close(stored.scale.T.float(), scale, rtol=2**-8, atol=0)


@pytest.mark.parametrize(
    ("asm", "dtype"),
    [(w8a16.SLICES_BF16, torch.bfloat16), (w8a16.SLICES_FP16, torch.float16)],
    ids=["bf16", "fp16"],
)
def test_inline_assembly_unpacks_every_word_as_the_plain_expression_does(
    asm: object, dtype: torch.dtype
) -> None:
    low, high, both = ptx.pairs_of_words()
    for j, result in enumerate(ptx.run(asm.value, [both], outputs=2)):  # type: ignore[attr-defined]
        first, second = ptx.halves(result, dtype)
        assert torch.equal(first.long(), (low >> 8 * j & 255).to(torch.int8).long())
        assert torch.equal(second.long(), (high >> 8 * j & 255).to(torch.int8).long())


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (128,), (2, 3, 128)])
def test_leading_dimensions_stay(shape: tuple[int, ...], device: str) -> None:
    _, w = draw(1, 24, 128, 32, torch.bfloat16, device)
    x = torch.randn(shape, device=device).bfloat16()
    y = w8a16_matmul(x, w)
    assert y.shape == (*shape[:-1], 24)
    torch.testing.assert_close(y, w8a16_matmul_reference(x, w))


def test_the_operator_is_a_good_citizen_of_torch(device: str) -> None:
    x, w = draw(4, 24, 128, 32, torch.bfloat16, device)
    torch.library.opcheck(
        w8a16._w8a16_matmul, (x, *w), test_utils=("test_schema", "test_faketensor")
    )


def test_what_does_not_fit_is_refused() -> None:
    x, w = draw(1, 24, 128, None, torch.bfloat16, "cpu")
    with pytest.raises(TypeError, match=r"x must be torch.bfloat16 .* got torch.float16"):
        w8a16_matmul(x.half(), w)
    with pytest.raises(ValueError, match=r"x must have 128 columns .* got shape \(1, 64\)"):
        w8a16_matmul(x[:, :64], w)
    with pytest.raises(TypeError, match=r"w must be bfloat16 or float16, got torch.float32"):
        quantize_w8(torch.randn(2, 64))
    with pytest.raises(ValueError, match=r"group must divide the 100 columns of w, got 64"):
        quantize_w8(torch.randn(2, 100).half(), 64)
    with pytest.raises(TypeError, match=r"codes must be int8, got torch.uint8"):
        pack_w8(torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 1).half())
    with pytest.raises(ValueError, match="scale must have a row for each of the 2 rows"):
        pack_w8(torch.zeros(2, 64, dtype=torch.int8), torch.ones(2, 3).half())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 16, 64, 100])
@pytest.mark.parametrize("group", [None, 128])
def test_full_size(m: int, group: int | None) -> None:
    x, w = draw(m, 14336, 4096, group, torch.bfloat16, "cuda")
    y = w8a16_matmul(x, w)
    assert excess(y, x, dequantize_w8(w)) <= 1
    assert torch.equal(w8a16_matmul(x, w), y)
