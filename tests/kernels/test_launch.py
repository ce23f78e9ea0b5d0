import json
import warnings
from pathlib import Path

import pytest
import torch

from fewer.kernels import fast_hadamard, flash_decode, launch
from fewer.kernels.split_k import default_settings


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {
        "w4": [
            [{"m": 1, "k": 8192}, {"BLOCK": 16}],
            [{"m": 16, "k": 8192}, {"BLOCK": 32, "num_warps": 8}],
        ]
    }
    (tmp_path / "configs.json").write_text(json.dumps(configs))
    monkeypatch.setattr(launch.resources, "files", lambda _: tmp_path)
    launch._configs.cache_clear()
    launch._stored.cache_clear()
    yield
    launch._configs.cache_clear()
    launch._stored.cache_clear()


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(("m", "block"), [(0, 16), (1, 16), (3, 16), (5, 32), (16, 32), (900, 32)])
def test_the_stored_configuration_of_the_nearest_shape_is_used(m: int, block: int) -> None:
    found = launch.config("w4", {"BLOCK": 64, "num_warps": 4}, m=m, k=4096)
    assert found == {"BLOCK": block, "num_warps": 4 if block == 16 else 8}


@pytest.mark.usefixtures("stored")
def test_what_is_not_stored_has_its_default() -> None:
    default = {"BLOCK": 64}
    assert launch.config("another", default, m=1) == default
    assert launch.config("another", default, m=1) is not default


WEIGHT_ONLY = (set(default_settings(1, 64, 64)), {"m", "n", "k"})
HADAMARD = (set(fast_hadamard.DEFAULT), {"rows", "n"})
ATTENTION = (set(flash_decode.DEFAULT), {"pairs", "rows", "d", "tokens"})
STORED = {
    "decode_attention_16": ATTENTION,
    "decode_attention_4": ATTENTION,
    "decode_attention_8": ATTENTION,
    "hadamard_16": HADAMARD,
    "nf4": WEIGHT_ONLY,
    "w4a16": WEIGHT_ONLY,
    "w4a16_zeros": WEIGHT_ONLY,
    "w8a16": WEIGHT_ONLY,
}


def test_what_is_stored_is_what_kernels_ask_for_and_take() -> None:
    """A misspelt name would mean: never found, or not a constant of the kernel."""
    stored = launch._configs()
    assert stored.keys() == STORED.keys()
    for kernel, entries in stored.items():
        constants, sizes = STORED[kernel]
        assert len({tuple(shape.values()) for shape, _ in entries}) == len(entries)
        for shape, settings in entries:
            assert shape.keys() == sizes
            assert settings.keys() == constants
            assert all(type(value) is int and value > 0 for value in settings.values())


def test_one_is_told_once_of_each_kernel_that_there_is_no_gpu() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for name in ("first kernel", "second kernel", "first kernel"):
            launch.fall_back(name)
    assert [str(w.message).split(" has")[0] for w in told] == ["first kernel", "second kernel"]


def test_more_counters_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be at most 1048576, got 1048577"):
        launch.counters(launch.COUNTERS + 1, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_counters_of_consecutive_launches_are_apart() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    taken = [launch.counters(1 << 19, device) for _ in range(3)]
    assert taken[0].data_ptr() != taken[1].data_ptr()
    assert taken[0].data_ptr() == taken[2].data_ptr()
    assert not any(t.any() for t in taken)
