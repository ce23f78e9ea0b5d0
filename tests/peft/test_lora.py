"""Properties of LoRA."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fewer.models import tiny_llama
from fewer.models.minilm import tiny_bert
from fewer.peft import attach
from fewer.peft.lora import (
    LoRALinear,
    lora,
    lora_count,
    lora_delta,
    lora_merge,
    lora_output,
    lora_scale,
    lora_start,
    lora_unmerge,
)
from fewer.peft.qlora import NF4Linear

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
SIZES = st.integers(1, 6)
SEEDS = st.integers(0, 2**32 - 1)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomized(attached, seed=1):
    """Trained parameters as if after training: B is no longer zero."""
    for i, parameter in enumerate(attached.trained.values()):
        parameter.data += 0.3 * normal(*parameter.shape, seed=seed + i).to(parameter)
    return attached


def bases(bias):
    """A float layer and a 4-bit one of the same weight."""
    linear = nn.Linear(6, 10, bias=bias)
    linear.weight.data = normal(10, 6)
    return linear, NF4Linear(linear)


def next_token_loss(model):
    logits = model(TOKENS[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), TOKENS[:, 1:].flatten())


@given(SIZES, SIZES, SIZES, st.floats(-20, 20), st.booleans(), SEEDS)
def test_the_output_is_that_of_the_sum_of_outer_products(out, into, rank, alpha, stable, seed):
    A, B, x = normal(rank, into, seed=seed), normal(out, rank, seed=seed + 1), normal(2, 3, into)
    scale = alpha / (rank**0.5 if stable else rank)
    delta = scale * sum(torch.outer(B[:, k], A[k]) for k in range(rank))
    assert torch.allclose(lora_delta(A, B, alpha, stable), delta, atol=1e-4)
    assert torch.allclose(lora_output(x, A, B, alpha, stable), x @ delta.T, atol=1e-3)
    assert torch.allclose(lora_output(x[0, 0], A, B, alpha, stable), delta @ x[0, 0], atol=1e-3)


def test_the_output_takes_the_narrow_way_and_keeps_no_matrix_of_the_weights_size():
    A, B = normal(2, 40).requires_grad_(), normal(30, 2).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()), lambda _: None):
        lora_output(normal(5, 40).requires_grad_(), A, B, alpha=4)
    assert kept
    assert max(kept) <= 5 * 40


def test_rank_stabilized_updates_do_not_shrink_as_the_rank_grows():
    def size(rank, stable):
        A, B = normal(rank, 200), normal(100, rank, seed=1)
        return lora_output(normal(50, 200, seed=2), A, B, 16, stable).std().item()

    assert size(256, stable=True) == pytest.approx(size(4, stable=True), rel=0.2)
    assert size(256, stable=False) == pytest.approx(size(4, stable=False) / 8, rel=0.2)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 12])
def test_merged_equals_unmerged_on_float_and_4_bit_layers(bias, stable, rank):
    for base in bases(bias):
        layer = LoRALinear(base, rank, alpha=5, rank_stabilized=stable)
        layer.B.data = normal(10, rank, seed=1)
        x, merged = normal(3, 4, 6, seed=2), layer.merged()
        assert type(merged) is nn.Linear
        assert torch.allclose(merged(x), layer(x), atol=1e-5)
        assert not torch.allclose(merged(x), base(x), atol=0.1)
        assert not merged.weight.requires_grad


def test_merging_does_not_touch_the_base():
    linear, _ = bases(True)
    layer = LoRALinear(linear)
    layer.B.data.fill_(1.0)
    before = copy.deepcopy(linear.state_dict())
    merged = layer.merged()
    merged.weight.data.zero_()
    assert all(torch.equal(linear.state_dict()[name], before[name]) for name in before)


@pytest.mark.parametrize("tiny", [tiny_llama, tiny_bert])
def test_a_new_adapter_changes_no_bit_of_the_output(tiny):
    model = tiny()
    before = model.hidden(TOKENS)
    targets = ["q_proj", "down_proj"] if tiny is tiny_llama else ["query", "mlp.down"]
    with attach(model, lora(model, rank=2, targets=targets)):
        assert torch.equal(model.hidden(TOKENS), before)


def test_only_b_learns_at_the_first_step_and_a_zero_too_would_learn_never():
    layer = LoRALinear(nn.Linear(4, 3), rank=2)
    layer(normal(5, 4)).square().sum().backward()
    assert layer.A.grad.abs().max() == 0
    assert layer.B.grad.abs().min() > 0
    layer.A.data.zero_()
    layer.zero_grad()
    layer(normal(5, 4)).square().sum().backward()
    assert layer.A.grad.abs().max() == layer.B.grad.abs().max() == 0


def test_a_begins_uniform_as_wide_as_the_inputs_ask():
    A, B = lora_start(torch.zeros(3, 400), rank=50, seed=0)
    assert A.shape == (50, 400)
    assert A.abs().max() <= 0.05
    assert A.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.02)
    assert A.mean().abs() < 1e-3
    assert torch.equal(B, torch.zeros(3, 50))


def test_a_seed_decides_all_and_every_layer_has_its_own_numbers():
    model = tiny_llama()
    state = torch.get_rng_state()
    wraps = lora(model, rank=2, targets=["q_proj"], seed=5)
    first = attach(model, wraps)
    first.detach()
    second = attach(model, wraps)
    second.merge()
    assert torch.equal(torch.get_rng_state(), state)
    one, two = (first.trained[f"layers.{i}.self_attn.q_proj.A"] for i in (0, 1))
    assert torch.equal(one, second.trained["layers.0.self_attn.q_proj.A"])
    assert not torch.equal(one, two)
    other = lora(model, rank=2, targets=["q_proj"], seed=6)["layers.0.self_attn.q_proj"]
    assert not torch.equal(one, other(tiny_llama().layers[0].self_attn.q_proj).A)


def test_training_moves_the_adapter_and_nothing_else():
    model = tiny_llama()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters()}
    attached = attach(model, lora(model, rank=2, targets=["q_proj", "v_proj", "up_proj"]))
    optimizer = torch.optim.AdamW(attached.parameters(), lr=0.02, weight_decay=0.1)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = next_token_loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.abs().max() > 0 for p in attached.parameters())
    attached.detach()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters())


def test_unmerging_an_attachment_is_exact_where_subtracting_is_not():
    model = tiny_llama()
    before = model(TOKENS)
    attached = randomized(attach(model, lora(model, rank=2, targets=["q_proj", "o_proj"])))
    learned = model(TOKENS)
    attached.merge()
    assert torch.allclose(model(TOKENS), learned, atol=1e-4)
    attached.unmerge()
    assert torch.equal(model(TOKENS), learned)
    attached.detach()
    assert torch.equal(model(TOKENS), before)

    W, A, B = normal(50, 40), normal(4, 40, seed=1), normal(50, 4, seed=2)
    back = lora_unmerge(lora_merge(W, A, B, 8), A, B, 8)
    assert torch.allclose(back, W, atol=1e-5)
    assert not torch.equal(back, W)


def test_two_adapters_take_turns_on_one_base():
    model = tiny_llama()
    first = randomized(attach(model, lora(model, rank=2, seed=0)), seed=1)
    one = model(TOKENS)
    first.detach()
    second = randomized(attach(model, lora(model, rank=3, seed=1)), seed=50)
    two = model(TOKENS)
    second.detach()
    first.attach_again()
    assert torch.equal(model(TOKENS), one)
    first.detach()
    second.attach_again()
    assert torch.equal(model(TOKENS), two)
    assert not torch.allclose(one, two, atol=0.01)


def test_a_saved_adapter_loads_into_a_fresh_base(tmp_path):
    model, fresh = tiny_llama(), tiny_llama()
    attached = randomized(attach(model, lora(model, rank=2)))
    attached.save(tmp_path / "adapter.safetensors")
    loaded = attach(fresh, lora(fresh, rank=2, seed=9))
    assert not torch.equal(fresh(TOKENS), model(TOKENS))
    loaded.load(tmp_path / "adapter.safetensors")
    assert torch.equal(fresh(TOKENS), model(TOKENS))


@pytest.mark.parametrize("rank", [1, 4])
def test_the_count_is_the_papers(rank):
    model = tiny_llama()
    attached = attach(model, lora(model, rank, targets=["q_proj", "v_proj", "down_proj"]))
    # q [32, 16], v [16, 16], down [16, 24] in two layers
    assert attached.count() == 2 * rank * ((32 + 16) + (16 + 16) + (16 + 24))
    assert lora_count([(32, 16), (16, 16), (16, 24)] * 2, rank) == attached.count()
    d_model, matrices = 12288, 2 * 96
    assert lora_count([(d_model, d_model)] * matrices, rank) == 2 * matrices * d_model * rank


def test_targets_are_whole_ends_of_names():
    bert = tiny_bert()
    assert all(name.endswith("attention.output") for name in lora(bert, targets=["output"]))
    wraps = lora(bert, targets=["query", "mlp.up"])
    assert {".".join(name.split(".")[2:]) for name in wraps} == {"attention.query", "mlp.up"}
    two = nn.ModuleDict({"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2)})
    assert list(lora(two, targets=["proj"])) == ["proj"]
    for target in ("proj", "quer", "norm", "mlp"):  # part of a name, or no linear layer
        with pytest.raises(ValueError, match=f"targets must name linear .* got '{target}'"):
            lora(bert, targets=[target])
    with pytest.raises(TypeError, match="targets must be a collection of names"):
        lora(bert, targets="query")


def test_factors_that_do_not_fit_are_refused():
    A, B, W = normal(2, 4), normal(3, 2), normal(3, 4)
    with pytest.raises(ValueError, match=r"same r of at least 1, got shapes \(2, 4\) and \(2, 3\)"):
        lora_delta(A, B.T, 1)
    with pytest.raises(ValueError, match="same r"):
        lora_output(normal(4), A[:0], B[:, :0], 1)
    with pytest.raises(ValueError, match=r"x must have 4 features, got shape \(5, 3\)"):
        lora_output(normal(5, 3), A, B, 1)
    with pytest.raises(ValueError, match=r"W must have shape \(3, 4\) as B A, got \(4, 3\)"):
        lora_merge(W.T, A, B, 1)
    with pytest.raises(ValueError, match=r"W must have shape \(3, 4\) as B A, got \(4,\)"):
        lora_merge(W[0], A, B, 1)  # would broadcast
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        lora_scale(16, 0)
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        LoRALinear(nn.Linear(4, 3), rank=0)


def test_an_adapter_has_the_type_of_its_base():
    layer = LoRALinear(nn.Linear(4, 3).bfloat16(), rank=2)
    layer.B.data.fill_(0.5)
    assert layer(normal(2, 4).bfloat16()).dtype == layer.A.dtype == torch.bfloat16
    assert layer.merged().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("stable", [False, True])
def test_peft_computes_the_same_and_merges_to_the_same(stable):
    peft = pytest.importorskip("peft")
    ours, theirs = tiny_llama(), tiny_llama()
    attached = randomized(attach(ours, lora(ours, 3, 5, ["q_proj", "up_proj"], 0, stable)))
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "up_proj"], use_rslora=stable
    )
    theirs = peft.inject_adapter_in_model(config, theirs).eval()
    for name in attached.wrappers:
        layer = theirs.get_submodule(name)
        layer.lora_A["default"].weight.data = attached.trained[f"{name}.A"].data.clone()
        layer.lora_B["default"].weight.data = attached.trained[f"{name}.B"].data.clone()
    assert torch.allclose(ours(TOKENS), theirs(TOKENS), atol=1e-5)
    next_token_loss(ours).backward()
    next_token_loss(theirs).backward()
    for name in attached.wrappers:
        layer = theirs.get_submodule(name)
        gradient = layer.lora_A["default"].weight.grad
        assert torch.allclose(attached.trained[f"{name}.A"].grad, gradient, atol=1e-6)
        layer.merge()
        merged = attached.wrappers[name].merged()
        assert torch.allclose(layer.get_base_layer().weight, merged.weight, atol=1e-6)


def test_peft_begins_with_an_a_as_wide_as_ours():
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(400, 3))
    torch.manual_seed(0)
    layer = peft.inject_adapter_in_model(peft.LoraConfig(r=50, target_modules=["0"]), model)[0]
    A = layer.lora_A["default"].weight
    assert A.std().item() == pytest.approx(LoRALinear(nn.Linear(400, 3), 50).A.std().item(), 0.03)
