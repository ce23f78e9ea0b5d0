"""Properties of SparsePEFT, and the fault that it mends."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewer.models import linear_layers, tiny_llama
from fewer.peft import attach
from fewer.peft.lora import LoRALinear, lora, lora_count, lora_delta
from fewer.peft.qlora import NF4Linear
from fewer.peft.sparse_peft import SparsePEFTLinear, sparse_peft, sparse_peft_delta

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZES = st.integers(1, 6)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pruned_linear(bias=True, sparsity=0.5):
    linear = nn.Linear(20, 30, bias=bias).requires_grad_(False)
    linear.weight.data = normal(30, 20)
    linear.weight.data *= linear.weight.abs() > linear.weight.abs().quantile(sparsity)
    return linear


def pruned_llama():
    model = tiny_llama()
    for layer in linear_layers(model).values():
        layer.weight.data *= layer.weight.abs() > layer.weight.abs().median()
    return model


def learned(layer):
    layer.B.data = normal(*layer.B.shape, seed=3)
    return layer


def sparsity(weight):
    return (weight == 0).float().mean().item()


@given(SIZES, SIZES, SIZES, st.integers(0, 2**32 - 1))
def test_the_change_is_loras_where_the_mask_is_and_zero_elsewhere(out, into, rank, seed):
    A, B = normal(rank, into, seed=seed), normal(out, rank, seed=seed + 1)
    mask = normal(out, into, seed=seed + 2) > 0
    delta = sparse_peft_delta(A, B, mask, alpha=3)
    assert (delta[~mask] == 0).all()
    assert torch.equal(delta[mask], lora_delta(A, B, 3)[mask])
    assert torch.equal(sparse_peft_delta(A, B, torch.ones_like(mask), 3), lora_delta(A, B, 3))


def test_a_dense_change_destroys_the_sparsity_and_a_masked_one_keeps_every_zero():
    """The first fault of merging, and its cure."""
    linear = pruned_linear()
    dense = learned(LoRALinear(linear, rank=2)).merged().weight
    masked = learned(SparsePEFTLinear(linear, rank=2)).merged().weight
    assert sparsity(linear.weight) == 0.5
    assert sparsity(dense) == 0
    assert torch.equal(masked == 0, linear.weight == 0)
    assert not torch.allclose(masked, linear.weight, atol=0.1)


def test_a_merged_model_is_as_sparse_as_it_was():
    model = pruned_llama()
    zeros = {name: layer.weight == 0 for name, layer in linear_layers(model).items()}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for method, kept in ((sparse_peft, True), (lora, False)):
        with attach(model, method(model, rank=2, targets=targets)) as attached:
            for parameter in attached.parameters():
                parameter.data += 0.1
            output = model(TOKENS)
            attached.merge()
            assert torch.allclose(model(TOKENS), output, atol=1e-3)
            for name, layer in linear_layers(model).items():
                assert torch.equal(layer.weight == 0, zeros[name]) == kept


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_merged_equals_unmerged(bias, quantized):
    base = NF4Linear(pruned_linear(bias)) if quantized else pruned_linear(bias)
    layer = SparsePEFTLinear(base, rank=3, alpha=5)
    x = normal(2, 4, 20, seed=1)
    assert torch.equal(layer(x), base(x))  # as long as B is zero
    assert not torch.allclose(learned(layer)(x), base(x), atol=0.1)
    assert torch.allclose(layer.merged()(x), layer(x), atol=1e-4)
    # NF4 has an exact zero, so the zeros of the pruned weight survive quantization too.
    assert (layer.merged().weight[pruned_linear().weight == 0] == 0).all()


def test_pruned_places_give_no_gradient():
    mask, direction = normal(30, 20) > 0, normal(30, 20, seed=1)
    A = normal(2, 20, seed=2).requires_grad_()
    B = normal(30, 2, seed=3).requires_grad_()
    sparse_peft_delta(A, B, mask, alpha=2).backward(direction)
    assert torch.allclose(A.grad, B.detach().T @ (direction * mask), atol=1e-5)
    assert torch.allclose(B.grad, (direction * mask) @ A.detach().T, atol=1e-5)


def test_training_moves_the_adapter_and_nothing_else(tmp_path):
    model, fresh = pruned_llama(), pruned_llama()
    before, frozen = model(TOKENS), {n: p.detach().clone() for n, p in model.named_parameters()}
    attached = attach(model, sparse_peft(model, rank=2))
    assert attached.count() == lora_count([(32, 16), (16, 16)] * 2, 2)
    optimizer = torch.optim.AdamW(attached.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        logits = model(TOKENS[:, :-1])[0]
        loss = nn.functional.cross_entropy(logits, TOKENS[0, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    attached.save(tmp_path / "sparse.safetensors")
    attach(fresh, sparse_peft(fresh, rank=2, seed=8)).load(tmp_path / "sparse.safetensors")
    assert torch.equal(fresh(TOKENS), model(TOKENS))
    attached.detach()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())
    assert torch.equal(model(TOKENS), before)


def test_a_weight_of_zeros_cannot_learn():
    linear = nn.Linear(4, 3)
    linear.weight.data.zero_()
    layer = learned(SparsePEFTLinear(linear, rank=2))
    assert torch.equal(layer(normal(5, 4)), linear(normal(5, 4)))


def test_masks_that_do_not_fit_are_refused():
    A, B = normal(2, 4), normal(3, 2)
    with pytest.raises(TypeError, match=r"mask must be a bool tensor .* got torch\.float32"):
        sparse_peft_delta(A, B, torch.ones(3, 4), 1)
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 4\) as B A, got \(4,\)"):
        sparse_peft_delta(A, B, torch.ones(4, dtype=torch.bool), 1)
