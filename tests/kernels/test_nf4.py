import ptx
import pytest
import torch
from weight_only import SMALL, excess, launch

from fewer.kernels import nf4
from fewer.kernels.nf4 import (
    ORDER,
    WNF4,
    dequantize_for_kernel,
    for_kernel,
    nf4_matmul,
    nf4_matmul_reference,
)
from fewer.peft.nf4 import NF4, dequantize_nf4, nf4_levels, quantize_nf4

pytestmark = pytest.mark.filterwarnings("ignore:.*it is plain torch:UserWarning")


def draw(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, WNF4]:
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randn(m, k, generator=generator).to(device, dtype)
    w = torch.randn(n, k, generator=generator) * torch.logspace(-2, 1, n)[:, None]
    stored = NF4(*(t.to(device) for t in quantize_nf4(w)))
    return x, for_kernel(stored, (n, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("m", "n", "k", "tiles"),
    [
        (1, 70, 1024, {"SPLIT": 2}),
        (3, 64, 576, {"SPLIT": 4, "BLOCK_N": 32}),
        (8, 130, 64, {"SPLIT": 1}),
        (9, 33, 128, {"SPLIT": 3, "BLOCK_N": 16, "BLOCK_M": 16}),
        (17, 40, 512, {"SPLIT": 5, "BLOCK_M": 16, "TILE": 32}),
        (70, 100, 384, {"SPLIT": 1, "BLOCK_M": 64, "BLOCK_N": 128, "TILE": 16}),
        (2, 1, 192, {"SPLIT": 2}),
    ],
)
def test_the_product_is_that_of_float64(
    m: int, n: int, k: int, tiles: dict[str, int], dtype: torch.dtype, device: str
) -> None:
    x, w = draw(m, n, k, dtype, device)
    y, _ = launch(nf4._launch, x, w, n, SMALL | tiles, seed=m)
    assert excess(y, x, dequantize_for_kernel(w, dtype)) <= 1
    assert excess(nf4_matmul_reference(x, w), x, dequantize_for_kernel(w, dtype)) <= 1


def test_every_program_order_gives_the_same_bits(device: str) -> None:
    x, w = draw(3, 70, 1024, torch.float16, device)
    settings = SMALL | {"SPLIT": 4, "TILE": 32}
    first, _ = launch(nf4._launch, x, w, 70, settings)
    for seed in range(4):
        again, _ = launch(nf4._launch, x, w, 70, settings, seed=seed)
        assert torch.equal(first, again)


def test_every_word_is_loaded_once(device: str) -> None:
    x, w = draw(2, 64, 1024, torch.float16, device)
    _, trace = launch(nf4._launch, x, w, 64, SMALL | {"SPLIT": 2})
    if trace is None:
        pytest.skip("only the interpreter counts")
    assert (trace.loads("packed") == 1).all()


@pytest.mark.parametrize(("n", "k"), [(7, 256), (3, 64), (5, 576), (4, 384), (300, 128)])
def test_the_kernel_is_given_what_was_stored_and_no_byte_more(n: int, k: int) -> None:
    stored = quantize_nf4(torch.randn(n, k) * torch.logspace(-2, 1, n)[:, None])
    w = for_kernel(stored, (n, k))
    torch.testing.assert_close(
        dequantize_for_kernel(w), dequantize_nf4(stored, (n, k)), rtol=1e-6, atol=0
    )
    assert sum(t.nbytes for t in w) == sum(t.nbytes for t in stored)


def test_an_outer_scale_of_its_own_for_each_256_blocks(device: str) -> None:
    """At (40, 1024), a row is 16 blocks, and 16 rows share an outer scale."""
    x, w = draw(1, 40, 1024, torch.float16, device)
    assert len(w.absmax_scale) == 3
    settings = SMALL | {"SPLIT": 1}
    y, _ = launch(nf4._launch, x, w, 40, settings)
    louder = w._replace(absmax_scale=w.absmax_scale * torch.tensor([1.0, 2.0, 1.0]).to(device))
    z, _ = launch(nf4._launch, x, louder, 40, settings)
    changed = (y != z)[0]
    assert changed[16:32].all()
    assert not changed[:16].any()
    assert not changed[32:].any()


def test_order_is_a_permutation_whose_pairs_agree_in_sign() -> None:
    assert sorted(ORDER) == list(range(16))
    levels = nf4_levels()[list(ORDER)]
    assert (levels[:8] * levels[8:] >= 0).all()
    assert "mask," not in nf4.SLICES_BF16.value.split("\n", 2)[2]  # which it would need otherwise


@pytest.mark.parametrize(
    ("asm", "dtype"),
    [(nf4.SLICES_BF16, torch.bfloat16), (nf4.SLICES_FP16, torch.float16)],
    ids=["bf16", "fp16"],
)
def test_inline_assembly_looks_up_every_code_as_the_plain_expression_does(
    asm: object, dtype: torch.dtype
) -> None:
    even, odd, both = ptx.pairs_of_words()
    levels = nf4_levels()[list(ORDER)].to(dtype)
    results = ptx.run(asm.value, [both], outputs=4)  # type: ignore[attr-defined]
    for j, result in enumerate(results):
        word, shift = (even, odd)[j // 2], 8 * (j % 2)
        first, second = ptx.halves(result, dtype)
        assert torch.equal(first, levels[word >> shift & 15])
        assert torch.equal(second, levels[word >> shift + 4 & 15])


@pytest.mark.parametrize("shape", [(0, 128), (2, 0, 128), (128,), (2, 3, 128)])
def test_leading_dimensions_stay(shape: tuple[int, ...], device: str) -> None:
    _, w = draw(1, 24, 128, torch.bfloat16, device)
    x = torch.randn(shape, device=device).bfloat16()
    y = nf4_matmul(x, w)
    assert y.shape == (*shape[:-1], 24)
    torch.testing.assert_close(y, nf4_matmul_reference(x, w))


def test_the_operator_is_a_good_citizen_of_torch(device: str) -> None:
    x, w = draw(4, 24, 128, torch.bfloat16, device)
    torch.library.opcheck(nf4._nf4_matmul, (x, *w), test_utils=("test_schema", "test_faketensor"))


def test_what_does_not_fit_is_refused() -> None:
    x, w = draw(1, 24, 128, torch.bfloat16, "cpu")
    with pytest.raises(TypeError, match=r"x must be bfloat16 or float16, got torch.float32"):
        nf4_matmul(x.float(), w)
    with pytest.raises(ValueError, match=r"x must have 128 columns .* got shape \(1, 64\)"):
        nf4_matmul(x[:, :64], w)
    with pytest.raises(ValueError, match=r"multiple of 64 columns, got \(64, 96\)"):
        for_kernel(quantize_nf4(torch.randn(64, 96)), (64, 96))
    with pytest.raises(ValueError, match=r"a matrix of 4096 codes .* got \(32, 64\)"):
        for_kernel(quantize_nf4(torch.randn(64, 64)), (32, 64))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("m", [1, 16, 64, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_full_size(m: int, dtype: torch.dtype) -> None:
    x, w = draw(m, 14336, 4096, dtype, "cuda")
    y = nf4_matmul(x, w)
    assert excess(y, x, dequantize_for_kernel(w, dtype)) <= 1
    assert torch.equal(nf4_matmul(x, w), y)
