"""Properties of DoRA."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewer.models import tiny_llama
from fewer.peft import attach
from fewer.peft.dora import DoRALinear, dora, dora_scale, dora_weight, row_norm
from fewer.peft.lora import lora_count, lora_delta
from fewer.peft.qlora import NF4Linear

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
SIZES = st.integers(1, 6)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained_layer(base, detach_norm=True, rank=2):
    layer = DoRALinear(base, rank, alpha=3, detach_norm=detach_norm)
    layer.B.data = normal(*layer.B.shape, seed=1)
    layer.m.data *= 1 + 0.3 * normal(*layer.m.shape, seed=2)
    return layer


@given(SIZES, SIZES, SIZES, st.integers(0, 2**32 - 1))
def test_rows_have_the_length_m_and_the_direction_of_v(out, into, rank, seed):
    W, A, B = normal(out, into, seed=seed), normal(rank, into, seed=seed + 1), normal(out, rank)
    m = normal(out, seed=seed + 2).abs() + 0.1
    adapted = dora_weight(W, A, B, m, alpha=2.5)
    assert torch.allclose(adapted.square().sum(1).sqrt(), m, rtol=1e-4)
    V = W + 2.5 / rank * (B @ A)
    assert torch.allclose(F.cosine_similarity(adapted, V, dim=1), torch.ones(out), atol=1e-4)


@given(SIZES, SIZES, st.floats(-3, 3).map(lambda e: 10**e))
def test_only_the_direction_of_v_counts(out, into, factor):
    W, A, B, m = normal(out, into), normal(1, into, seed=1), normal(out, 1, seed=2), normal(out)
    scaled = dora_weight(factor * W, A, factor * B, m, alpha=1)
    assert torch.allclose(scaled, dora_weight(W, A, B, m, alpha=1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
def test_a_new_adapter_changes_no_bit(bias):
    linear = nn.Linear(7, 5, bias=bias)
    x = normal(3, 7)
    for base in (linear, NF4Linear(linear)):
        layer = DoRALinear(base, rank=2)
        assert torch.equal(layer(x), base(x))
        assert torch.equal(layer.merged().weight, base.weight)
    model = tiny_llama()
    before = model(TOKENS)
    with attach(model, dora(model, rank=2, targets=["q_proj", "down_proj"])):
        assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("detach_norm", [False, True])
def test_the_layer_is_the_linear_layer_of_its_weight_with_the_same_gradients(
    bias, quantized, detach_norm
):
    linear = nn.Linear(7, 5, bias=bias).requires_grad_(False)
    layer = trained_layer(NF4Linear(linear) if quantized else linear, detach_norm)
    x, direction = normal(3, 2, 7, seed=4).requires_grad_(), normal(3, 2, 5, seed=5)
    wanted = [x, layer.A, layer.B, layer.m]
    y = layer(x)
    weight = dora_weight(layer.base.weight, layer.A, layer.B, layer.m, 3, detach_norm)
    plain = F.linear(x, weight, linear.bias)
    assert torch.allclose(y, plain, atol=1e-5)
    gradients = torch.autograd.grad((y * direction).sum(), wanted)
    for ours, theirs in zip(
        gradients, torch.autograd.grad((plain * direction).sum(), wanted), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(layer.merged()(x), y, atol=1e-5)
    assert type(layer.merged()) is nn.Linear


def test_gradients_are_equations_6_and_11_of_the_paper():
    W, A, B = normal(5, 7), normal(2, 7, seed=1), normal(5, 2, seed=2)
    m, G = normal(5, seed=3), normal(5, 7, seed=4)  # G is the gradient of W'
    V = (W + lora_delta(A, B, 2)).detach()
    norm = row_norm(V)[:, None]
    along = (G * V).sum(1, keepdim=True) * V / norm**2  # G's part in the direction of V
    of_v = {True: m[:, None] / norm * G, False: m[:, None] / norm * (G - along)}
    for detach_norm, expected in of_v.items():
        free_B, free_m = B.clone().requires_grad_(), m.clone().requires_grad_()
        weight = dora_weight(W, A, free_B, free_m, 2, detach_norm)
        weight.backward(G)
        assert torch.allclose(free_B.grad, expected @ A.T, atol=1e-4)  # s = 1
        assert torch.allclose(free_m.grad, (G * V / norm).sum(1), atol=1e-5)


def test_detaching_the_norm_keeps_no_matrix_of_the_weights_size():
    linear = nn.Linear(40, 30, bias=False).requires_grad_(False)
    kept = {}
    for detach_norm in (False, True):
        layer, sizes = trained_layer(linear, detach_norm), []

        def keep(tensor, sizes=sizes):
            if tensor.data_ptr() != linear.weight.data_ptr():
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(normal(4, 40))
        kept[detach_norm] = max(sizes)
    assert kept[False] >= 30 * 40 > kept[True]


def test_a_row_of_zeros_stays_one_and_hurts_nobody():
    W = normal(3, 4)
    W[1] = 0
    linear = nn.Linear(4, 3, bias=False)
    linear.weight.data = W
    for detach_norm in (False, True):
        layer = DoRALinear(linear, 2, detach_norm=detach_norm)
        layer(normal(5, 4)).sum().backward()
        assert torch.equal(layer.merged().weight, W)
        assert all(p.grad.isfinite().all() for p in (layer.A, layer.B, layer.m))
    adapted = dora_weight(W, torch.zeros(1, 4), torch.zeros(3, 1), torch.tensor([1.0, 5, 1]), 1)
    assert torch.equal(adapted[1], torch.zeros(4))


def test_training_moves_the_adapter_and_nothing_else():
    model = tiny_llama()
    before, frozen = model(TOKENS), {n: p.detach().clone() for n, p in model.named_parameters()}
    attached = attach(model, dora(model, rank=2))
    start = {name: p.detach().clone() for name, p in attached.trained.items()}
    optimizer = torch.optim.AdamW(attached.parameters(), lr=0.02)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(TOKENS[:, :-1])[0], TOKENS[0, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in attached.trained.items())
    attached.merge()
    attached.unmerge()
    attached.detach()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())
    assert torch.equal(model(TOKENS), before)


def test_it_trains_one_number_an_output_more_than_lora(tmp_path):
    model, fresh = tiny_llama(), tiny_llama()
    attached = attach(model, dora(model, rank=3, targets=["q_proj"]))
    assert attached.count() == lora_count([(32, 16)] * 2, 3) + 2 * 32
    for parameter in attached.parameters():
        parameter.data += 0.1
    attached.save(tmp_path / "dora.safetensors")
    attach(fresh, dora(fresh, 3, targets=["q_proj"], seed=4)).load(tmp_path / "dora.safetensors")
    assert torch.equal(fresh(TOKENS), model(TOKENS))


def test_a_magnitude_of_another_shape_is_refused():
    W, A, B = normal(3, 4), normal(2, 4), normal(3, 2)
    with pytest.raises(ValueError, match=r"m must have shape \(3,\), got \(1, 4\)"):
        dora_scale(W, A, B, normal(1, 4), alpha=1)
    with pytest.raises(ValueError, match=r"m must have shape \(3,\), got \(1,\)"):
        dora_weight(W, A, B, normal(1), alpha=1)


def test_peft_computes_the_same_with_the_same_gradients():
    peft = pytest.importorskip("peft")
    for bias in (False, True):
        linear = nn.Linear(7, 5, bias=bias)
        ours = trained_layer(linear)
        config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], use_dora=True)
        theirs = peft.inject_adapter_in_model(config, nn.Sequential(nn.Linear(7, 5, bias)))
        layer = theirs[0]
        layer.get_base_layer().load_state_dict(linear.state_dict())
        names = {"A": layer.lora_A, "B": layer.lora_B, "m": layer.lora_magnitude_vector}
        for name, module in names.items():
            module["default"].weight.data = getattr(ours, name).data.clone()
        x = normal(4, 7, seed=3)
        assert torch.allclose(ours(x), theirs(x), atol=1e-5)
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
        for name, module in names.items():
            gradient = module["default"].weight.grad
            assert torch.allclose(getattr(ours, name).grad, gradient, rtol=1e-4, atol=1e-4)
        layer.merge()
        assert torch.allclose(layer.get_base_layer().weight, ours.merged().weight, atol=1e-6)
