"""The Hadamard kernel: against the product with the matrix, in float64."""

import warnings

import pytest
import torch
from launched import launched, relative_error
from torch import Tensor

from fewer.kernels import fast_hadamard as module
from fewer.kernels import launch
from fewer.kernels.fast_hadamard import (
    hadamard,
    hadamard_quantize,
    hadamard_quantize_reference,
    hadamard_reference,
)
from fewer.quantization.hadamard import fwht, hadamard_matrix

TYPES = (torch.bfloat16, torch.float16, torch.float32)
# Rows that fill no tile; n below a line of a tile, below a tile, a tile, and several of them.
SHAPES = [(70, 1), (33, 16), (65, 64), (9, 1024), (2, 4096), (3, 8192), (2, 32768)]


def values(rows: int, n: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Normal numbers, an outlier in the first row."""
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    x[0, n // 3] = 300.0
    return x.to(device, dtype)


def sizes(device: str, rows: int) -> int:
    return rows * 97 if device == "cuda" else rows


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "n"), SHAPES)
def test_rows_are_multiplied_by_the_matrix_and_rounded_once(
    rows: int, n: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = launched(monkeypatch, module, "hadamard_kernel", "out", seed=1)
    x = values(sizes(device, rows), n, dtype, device)
    before = x.clone()
    y = module._launch(x, False, per_processor=2)[0]
    exact = fwht(x.double())
    assert torch.equal(x, before)
    assert y.dtype == dtype
    assert len(kernel.grids) == 1
    # Rounding alone makes the second; a product rounded to 16 bits in between 1.4 times as much.
    # (Tensor cores cut off what float32 additions would round.)
    best = relative_error(exact.to(dtype), exact) if dtype != torch.float32 else 0.0
    assert relative_error(y, exact) <= 1.05 * best + (2e-7 if device == "cpu" else 2e-6)
    if n <= 4096:
        assert (
            relative_error(exact, x.double() @ hadamard_matrix(n).to(x.double()) / n**0.5) < 1e-12
        )


def test_every_number_is_read_and_written_once(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("only the interpreter can be watched")
    kernel = launched(monkeypatch, module, "hadamard_kernel", "out scale")
    for quantize in (False, True):
        module._launch(values(67, 256, torch.float32, device), quantize, per_processor=2)
        trace = kernel.traces[-1]
        assert (trace.loads("x") == 1).all()
        assert (trace.stores("out") == 1).all()
    assert (kernel.traces[-1].stores("scale") == 1).all()


@pytest.mark.parametrize("n", [32, 512, 8192])
@pytest.mark.parametrize("lines", [64, 128])
def test_results_depend_neither_on_the_configuration_nor_on_the_order_of_programs(
    n: int, lines: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = values(sizes(device, 40), n, torch.float16, device)
    expected, codes = hadamard_reference(x), hadamard_quantize_reference(x)
    results = []
    for seed, per_processor, stages in ((0, 3, 1), (1, 3, 2), (2, 1, 3)):
        launched(monkeypatch, module, "hadamard_kernel", "out scale", seed)
        constants = {"LINES": lines, "per_processor": per_processor, "STAGES": stages}
        y = module._launch(x, False, num_warps=lines // 16, **constants)[0]
        results.append((y, *module._launch(x, True, num_warps=lines // 16, **constants)))
    for y, found, scale in results:
        assert all(torch.equal(a, b) for a, b in zip(results[0], (y, found, scale), strict=True))
    torch.testing.assert_close(y, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(scale, codes[1].squeeze(1), rtol=1e-5, atol=0)
    assert (found.int() - codes[0].int()).abs().max() <= 1  # next to a tie


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("rows", "n"), SHAPES)
def test_codes_are_within_half_a_step_of_the_transform(
    rows: int, n: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, module, "hadamard_kernel", "out scale", seed=3)
    x = values(sizes(device, rows), n, dtype, device)
    codes, scale = module._launch(x, True, per_processor=2)
    exact = fwht(x.double())
    torch.testing.assert_close(scale.double(), exact.abs().amax(1) / 127, rtol=1e-4, atol=0)
    step = scale.double()[:, None]
    assert ((codes.double() * step - exact).abs() <= step * 0.51).all()
    assert (codes.abs().amax(1) == 127).all()


def test_a_row_of_zeros_has_codes_of_zero_and_a_scale_of_one(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, module, "hadamard_kernel", "out scale")
    x = values(9, 128, torch.bfloat16, device)
    x[4] = 0
    codes, scale = module._launch(x, True)
    assert not codes[4].any()
    assert scale[4] == 1
    assert (scale[torch.arange(9, device=device) != 4] < 1).all()
    reference = hadamard_quantize_reference(x)
    assert reference[1][4] == 1
    torch.testing.assert_close(scale[:, None], reference[1], rtol=1e-4, atol=0)


def test_rows_need_not_be_consecutive(device: str) -> None:
    x = values(24, 128, torch.float32, device)
    for strided in (x[::3, :64], x[:, ::2], x.T[:, :8], x[:1].expand(5, 128)):
        y = module._launch(strided, False)[0]
        torch.testing.assert_close(y, hadamard_reference(strided), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [hadamard, hadamard_quantize])
def test_wrong_arguments_are_refused(function, device: str) -> None:
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16, got"):
            function(torch.ones(2, 64, device=device).to(dtype))
    for shape in ((2, 96), (3, 65536), (2, 0), ()):
        with pytest.raises(ValueError, match="n must be a power of two up to 32768, got"):
            function(torch.ones(shape, device=device))


def test_any_number_of_dimensions_and_empty_batches_are_taken(device: str) -> None:
    x = torch.randn(2, 3, 5, 32, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(hadamard(x), hadamard_reference(x), rtol=1e-5, atol=1e-5)
        codes, scale = hadamard_quantize(x)
        assert (codes.shape, scale.shape) == (x.shape, (2, 3, 5, 1))
        assert hadamard(x[0, 0, 0]).shape == (32,)
        assert hadamard(x[:, :0]).shape == (2, 0, 5, 32)
        codes, scale = hadamard_quantize(x[:, :0])
        assert (codes.shape, scale.shape) == ((2, 0, 5, 32), (2, 0, 5, 1))
        assert module._launch(x[0, 0, :0], True)[0].shape == (0, 32)


@pytest.mark.parametrize("operator", [module._hadamard, module._hadamard_quantize])
def test_operators_say_of_what_shape_their_results_are(operator, device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for x in (torch.randn(2, 3, 64, device=device), torch.randn(64, 8, device=device).T):
            torch.library.opcheck(operator, (x,), test_utils=("test_schema", "test_faketensor"))


def test_without_a_gpu_the_reference_computes_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "_told", set())
    x = torch.randn(3, 64)
    with pytest.warns(UserWarning, match="hadamard has its kernel on CUDA tensors alone"):
        assert torch.equal(hadamard(x), hadamard_reference(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hadamard(x)


def test_compiled_code_is_one_graph(device: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(lambda x: hadamard(x) + 1, backend="eager", fullgraph=True)
        x = torch.randn(4, 64, device=device)
        torch.testing.assert_close(compiled(x), hadamard(x) + 1)
