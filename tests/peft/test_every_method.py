"""What every way of attaching trained parameters must do, whatever the method and the model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fewer.models import tiny_bert, tiny_llama
from fewer.peft.adapters import adapters, parallel_adapters
from fewer.peft.attach import Wrap, attach
from fewer.peft.bitfit import bitfit
from fewer.peft.dora import dora
from fewer.peft.ia3 import ia3
from fewer.peft.lora import lora
from fewer.peft.prefix_tuning import prefix_tuning
from fewer.peft.prompt_tuning import prompt_tuning
from fewer.peft.training import whole

MODELS = {"llama": tiny_llama, "bert": tiny_bert}
METHODS: dict[str, Callable[[nn.Module], dict[str, Wrap]]] = {
    "bitfit": bitfit,
    "ia3": ia3,
    "adapters": lambda model: adapters(model, 4),
    "parallel adapters": lambda model: parallel_adapters(model, 4),
    "prompt": lambda model: prompt_tuning(model, 3),
    "prefix": lambda model: prefix_tuning(model, 3, reparameterize=None),
    "prefix, reparameterized": lambda model: prefix_tuning(model, 3, reparameterize=(4, 8)),
    "lora": lambda model: lora(model, rank=2, alpha=4.0, targets=targets(model)),
    "dora": lambda model: dora(model, rank=2, alpha=4.0, targets=targets(model)),
    "full": lambda model: {
        name: copy.deepcopy for name, module in model.named_children() if list(module.parameters())
    },
}
START_AS_THE_MODEL = ("bitfit", "ia3", "adapters", "parallel adapters", "lora", "dora", "full")
MERGEABLE = ("ia3", "lora", "dora")
TOKENS = torch.tensor([[5, 3, 8, 1, 9], [2, 7, 7, 4, 6]])


def targets(model: nn.Module) -> tuple[str, ...]:
    return ("q_proj", "v_proj") if hasattr(model, "embed_tokens") else ("query", "value")


def hidden(model: nn.Module) -> Tensor:
    """The last positions of what the model computes: those that every method has."""
    return model.hidden(TOKENS)[:, -TOKENS.shape[1] :]  # type: ignore[operator]


def trained_for(steps: int, model: nn.Module, wraps: dict[str, Wrap]):  # type: ignore[no-untyped-def]
    """An attachment after some real steps of an optimizer on a loss that has no optimum nearby."""
    attached = attach(model, wraps)
    optimizer = torch.optim.Adam(attached.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (hidden(model) - 3).square().mean().backward()
        optimizer.step()
    return attached


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]().eval()


@pytest.mark.parametrize("method", METHODS)
def test_training_moves_the_output_and_nothing_that_is_frozen(method: str, model: nn.Module):
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    before = hidden(model).detach()
    attached = trained_for(3, model, METHODS[method](model))
    assert not torch.allclose(hidden(model), before, atol=1e-3)
    assert all(p.grad is not None for p in attached.parameters()), "a trained one gets no gradient"
    attached.detach()
    for name, p in frozen.items():
        assert torch.equal(parameters[name], p), name
        assert parameters[name].grad is None, name


@pytest.mark.parametrize("method", METHODS)
def test_detaching_restores_the_model_bit_for_bit(method: str, model: nn.Module):
    modules, before = dict(model.named_modules()), hidden(model).detach()
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    trained_for(2, model, METHODS[method](model)).detach()
    assert torch.equal(hidden(model), before)
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads


@pytest.mark.parametrize("method", START_AS_THE_MODEL)
def test_nothing_changes_at_step_zero(method: str, model: nn.Module):
    before = hidden(model)
    with attach(model, METHODS[method](model)):
        torch.testing.assert_close(hidden(model), before, atol=2e-6, rtol=0)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in START_AS_THE_MODEL])
def test_a_prompt_or_prefix_changes_the_function_from_the_start(method: str, model: nn.Module):
    before = hidden(model)
    with attach(model, METHODS[method](model)):
        assert not torch.allclose(hidden(model), before, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_saved_parameters_load_into_a_fresh_base(method: str, model: nn.Module, tmp_path):
    attached = trained_for(2, model, METHODS[method](model))
    trained = hidden(model).detach()
    attached.save(tmp_path / "task.safetensors")
    fresh = copy.deepcopy(model)
    attached.detach()
    fresh = MODELS["llama" if hasattr(model, "embed_tokens") else "bert"]().eval()
    other = attach(fresh, METHODS[method](fresh))
    other.load(tmp_path / "task.safetensors")
    assert torch.equal(hidden(fresh), trained)


@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_equals_unmerged_and_unmerging_is_exact(method: str, model: nn.Module):
    attached = trained_for(3, model, METHODS[method](model))
    trained = hidden(model).detach()
    modules = len(list(model.modules()))
    attached.merge()
    assert len(list(model.modules())) < modules, "a merged model has no wrappers"
    torch.testing.assert_close(hidden(model), trained, atol=2e-5, rtol=1e-4)
    attached.unmerge()
    assert torch.equal(hidden(model), trained)


def test_a_part_trained_as_it_is_does_not_stand_in_the_way_of_merging(model: nn.Module):
    last = (
        "norm"
        if hasattr(model, "norm")
        else next(n for n, _ in model.named_modules() if "norm" in n)
    )
    attached = trained_for(2, model, METHODS["lora"](model) | whole(last))
    trained = hidden(model).detach()
    attached.merge()
    torch.testing.assert_close(hidden(model), trained, atol=2e-5, rtol=1e-4)
    attached.unmerge()
    assert torch.equal(hidden(model), trained)


def test_a_reparameterized_prefix_folds_into_keys_and_values(model: nn.Module):
    attached = trained_for(3, model, METHODS["prefix, reparameterized"](model))
    trained = hidden(model).detach()
    attached.merge()
    torch.testing.assert_close(hidden(model), trained)
    assert not any("p_small" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_the_base_of_every_wrapper_is_the_models_own_module(method: str, model: nn.Module):
    """Else a copy of the model would be trained, or kept in memory, without anybody noticing."""
    own = {id(p) for p in model.parameters()}
    with attach(model, METHODS[method](model)) as attached:
        trained = {id(p) for p in attached.parameters()}
        assert {id(p) for p in model.parameters()} == own | trained
        assert not own & trained


@pytest.mark.parametrize("method", ["bitfit", "adapters", "lora", "prefix"])
def test_two_attachments_share_a_base_in_turns(method: str, model: nn.Module):
    first = trained_for(2, model, METHODS[method](model))
    one = hidden(model).detach()
    first.detach()
    second = trained_for(4, model, METHODS[method](model))
    two = hidden(model).detach()
    assert not torch.allclose(one, two)
    second.detach()
    first.attach_again()
    assert torch.equal(hidden(model), one)
    with pytest.raises(RuntimeError, match="detach"):
        second.attach_again()
    first.detach()
    second.attach_again()
    assert torch.equal(hidden(model), two)


def test_a_prefixed_llama_generates_the_same_with_a_cache_as_without():
    model = tiny_llama().eval()
    from fewer.models import KVCache

    with attach(model, prefix_tuning(model, 3, reparameterize=None)):
        whole = model(TOKENS)
        cache = KVCache()
        parts = [
            model(TOKENS[:, :2], cache),
            model(TOKENS[:, 2:3], cache),
            model(TOKENS[:, 3:], cache),
        ]
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)


def test_a_file_of_another_method_or_rank_is_refused_and_nothing_changes(tmp_path):
    model = tiny_llama()
    with attach(model, lora(model, rank=2, alpha=4.0)) as small:
        small.save(tmp_path / "small")
    attached = attach(model, lora(model, rank=3, alpha=4.0))
    before = [p.detach().clone() for p in attached.parameters()]
    with pytest.raises(ValueError, match=r"wanted \(3, 16\), got \(2, 16\)"):
        attached.load(tmp_path / "small")
    assert all(torch.equal(a, b) for a, b in zip(before, attached.parameters(), strict=True))


def test_names_that_are_no_modules_or_lie_inside_each_other_are_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="layers\\.9"):
        attach(model, {"layers.9": copy.deepcopy})
    with pytest.raises(ValueError, match="overlap"):
        attach(model, {"layers.0": copy.deepcopy, "layers.0.mlp": copy.deepcopy})


def test_what_cannot_be_folded_says_so():
    model = tiny_llama()
    with attach(model, adapters(model, 2)) as attached, pytest.raises(TypeError, match="Adapter"):
        attached.merge()
