"""Properties of QLoRA: 4-bit layers that pass gradients on, and the account of memory."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fewer.models import linear_layers, replaced_weights, tiny_llama
from fewer.models.minilm import tiny_bert
from fewer.peft import attach
from fewer.peft.dora import dora
from fewer.peft.lora import LoRALinear, lora, lora_delta, same_linear
from fewer.peft.nf4 import dequantize_nf4, nf4_bits, quantize_nf4, unpack_nibbles
from fewer.peft.qlora import (
    NF4Linear,
    measured_memory,
    model_bytes,
    quantize_model_nf4,
    training_memory,
)
from fewer.peft.sparse_peft import sparse_peft

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model):
    return F.cross_entropy(model(TOKENS[:, :-1])[0], TOKENS[0, 1:])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_4_bit_layer_is_the_linear_layer_of_the_restored_weight(bias, dtype):
    linear = nn.Linear(70, 9, bias=bias).to(dtype)
    layer = NF4Linear(linear)
    restored = dequantize_nf4(quantize_nf4(linear.weight), (9, 70)).to(dtype)
    assert torch.equal(layer.weight, restored)
    assert layer.weight.dtype == dtype
    ours, theirs = (normal(2, 3, 70).to(dtype).requires_grad_() for _ in range(2))
    y, plain = layer(ours), F.linear(theirs, restored, linear.bias)
    assert torch.allclose(y, plain, atol=1e-6 if dtype == torch.float32 else 1e-2)
    direction = normal(2, 3, 9, seed=1).to(dtype)
    y.backward(direction)
    plain.backward(direction)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_the_backward_pass_keeps_the_4_bit_weight_and_no_float_one():
    linear = nn.Linear(64, 48)
    layer, kept = LoRALinear(NF4Linear(linear), rank=2), []
    x = normal(3, 64).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda _: None):
        layer(x)
    assert any(tensor.dtype == torch.uint8 for tensor in kept)
    assert all(t.numel() < 48 * 64 / 2 for t in kept if t.is_floating_point())


def test_the_float_weights_are_gone_for_good():
    model = tiny_llama()
    weights = [weakref.ref(layer.weight) for layer in linear_layers(model).values()]
    before = model_bytes(model)
    quantize_model_nf4(model)
    model(TOKENS)
    gc.collect()
    assert len(weights) == 14
    assert all(weight() is None for weight in weights)
    assert not linear_layers(model)
    # 5440 of the 6480 weights were in linear layers
    assert before - model_bytes(model) > 5440 * (4 - 0.6)


def test_a_quantized_model_is_the_model_with_restored_weights():
    model, quantized = tiny_llama(), tiny_llama()
    quantize_model_nf4(quantized)
    quantize_nothing = tiny_llama()
    with replaced_weights(model, lambda _, w: dequantize_nf4(quantize_nf4(w), tuple(w.shape))):
        assert torch.equal(quantized(TOKENS), model(TOKENS))
    assert torch.equal(quantized.embed_tokens.weight, quantize_nothing.embed_tokens.weight)
    assert not torch.allclose(quantized(TOKENS), quantize_nothing(TOKENS), atol=0.01)


def test_biases_are_kept():
    bert = tiny_bert()
    biases = {name: layer.bias for name, layer in linear_layers(bert).items()}
    quantize_model_nf4(bert)
    assert all(bert.get_submodule(name).bias is bias for name, bias in biases.items())
    assert bert.hidden(TOKENS).isfinite().all()


@pytest.mark.parametrize("method", [lora, dora, sparse_peft])
def test_adapters_train_on_a_4_bit_base_that_stays_as_it_is(method):
    model = tiny_llama()
    quantize_model_nf4(model)
    before, stored = model(TOKENS), copy.deepcopy(model.state_dict())
    attached = attach(model, method(model, rank=2, targets=["q_proj", "v_proj", "up_proj"]))
    assert torch.equal(model(TOKENS), before)
    optimizer = torch.optim.AdamW(attached.parameters(), lr=0.02)
    first = loss_of(model).item()
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    assert loss_of(model).item() < 0.7 * first
    learned = model(TOKENS)
    attached.merge()
    assert torch.allclose(model(TOKENS), learned, atol=1e-4)
    attached.unmerge()
    attached.detach()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(TOKENS), before)


def test_gradients_of_the_adapters_are_those_over_a_float_base_of_the_same_weights():
    model, quantized = tiny_llama(), tiny_llama()
    quantize_model_nf4(quantized)
    for name, layer in linear_layers(model).items():
        layer.weight.data = quantized.get_submodule(name).weight
    gradients = []
    for one in (model, quantized):
        attached = attach(one, lora(one, rank=2, targets=["q_proj", "down_proj"]))
        for parameter in attached.parameters():
            parameter.data += 0.1
        loss_of(one).backward()
        gradients.append([parameter.grad for parameter in attached.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(("size", "codes_kept", "lost"), [(0.02, 0.99, 0.9), (0.2, 0.5, 0.4)])
def test_a_4_bit_weight_cannot_take_a_float_change(size, codes_kept, lost):
    """The second fault of merging: quantized again, the merged weight forgets what was learned.

    A change of a fiftieth of the weights' size is less than half a step nearly everywhere, and
    the nearest level is the old one: all is lost. Of a change of a fifth, half is.
    """
    linear = nn.Linear(256, 256, bias=False)
    linear.weight.data = 0.02 * normal(256, 256)
    base = NF4Linear(linear)
    layer = LoRALinear(base, rank=4)
    layer.B.data = normal(256, 4, seed=1)
    change = lora_delta(layer.A, layer.B, layer.alpha).norm()
    layer.B.data *= size * base.weight.norm() / change
    x = normal(20, 256, seed=2)
    assert torch.allclose(layer.merged()(x), layer(x), atol=1e-5)  # a float layer takes it
    again = NF4Linear(layer.merged())
    old, new = (unpack_nibbles(one.packed, 256 * 256) for one in (base, again))
    assert (old == new).float().mean() > codes_kept
    assert (again(x) - layer(x)).norm() > lost * (layer(x) - base(x)).norm()
    # It is the change that is lost; quantized again as it is, the weight stays what it is.
    unchanged = NF4Linear(same_linear(base, base.weight)).weight
    assert (unchanged - base.weight).norm() < 1e-3 * base.weight.norm()


def test_a_state_dict_fills_another_quantized_model():
    one, two = tiny_llama(seed=0), tiny_llama(seed=1)
    quantize_model_nf4(one)
    quantize_model_nf4(two)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert torch.equal(one(TOKENS), two(TOKENS))
    assert torch.equal(copy.deepcopy(one)(TOKENS), one(TOKENS))


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear, got Embedding"):
        NF4Linear(nn.Embedding(3, 4))
    for model in (nn.Linear(3, 4), nn.Embedding(3, 4)):
        with pytest.raises(ValueError, match="model must have linear layers inside it, got"):
            quantize_model_nf4(model)


def test_bytes_are_counted_once():
    linear = nn.Linear(3, 4)
    assert model_bytes(nn.Sequential(linear, linear)) == model_bytes(linear) == 64
    assert model_bytes(nn.BatchNorm1d(2)) == 4 * 4 * 2 + 8  # buffers too
    assert model_bytes(linear.half()) == 32


@pytest.mark.parametrize(
    ("make", "states"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3), 2),
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9), 1),
        (lambda p: torch.optim.SGD(p, lr=1e-3), 0),
    ],
)
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_account_of_memory_is_what_torch_holds(make, states, method):
    model = tiny_llama(d_model=128, d_ffn=256, n_heads=4, n_kv_heads=4, head_dim=32)
    inside = sum(layer.weight.numel() for layer in linear_layers(model).values())
    total = sum(p.numel() for p in model.parameters())
    frozen_bytes = 4 * total
    if method == "qlora":
        assert all(w.weight.numel() % (64 * 256) == 0 for w in linear_layers(model).values())
        quantize_model_nf4(model)
        means = 4 * 14  # of double quantization, one a matrix
        frozen_bytes = round(nf4_bits() * inside / 8) + means + 4 * (total - inside)
    parameters, trained, frozen = list(model.parameters()), total, 0
    if method != "full":
        attached = attach(model, lora(model, rank=2))
        parameters, trained, frozen = list(attached.parameters()), attached.count(), total
    optimizer = make(parameters)
    loss_of(model).backward()
    optimizer.step()
    account = training_memory(trained, frozen, frozen_bits=8 * frozen_bytes / total, states=states)
    measured = measured_memory(model, optimizer)
    step_counters = 4 * len(parameters) if states == 2 else 0
    assert measured.weights == account.weights
    assert measured.gradients == account.gradients
    assert measured.optimizer == account.optimizer + step_counters


def test_the_account_is_the_papers_780_gb_and_a_48_gb_card():
    llama_65b = 65_000_000_000
    assert sum(training_memory(trained=llama_65b, trained_bits=16)) == 780_000_000_000
    adapters = training_memory(400_000_000, llama_65b, trained_bits=16, frozen_bits=nf4_bits())
    assert sum(adapters) < 48e9
    assert training_memory(10, 6, 16, 4, 1, 8) == (20 + 3, 20, 10)


def test_a_layer_in_4_bits_is_an_eighth_of_its_size():
    linear = nn.Linear(512, 512, bias=False)
    assert model_bytes(linear) / model_bytes(NF4Linear(linear)) == pytest.approx(32 / 4.127, 1e-3)
