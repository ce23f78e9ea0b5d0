"""The cost model against what PyTorch counts, and prompting against plain reading."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fewer.models import KVCache, linear_layers, tiny_bert, tiny_llama
from fewer.peft import (
    attach,
    branched,
    calibrated,
    few_shot_prompt,
    label_scores,
    lora,
    saved_activation_bytes,
    training_flops,
    transformer_flops,
    whole,
)

TOKENS = torch.randint(0, 64, (1, 12), generator=torch.Generator().manual_seed(0))


def matrix_weights(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in linear_layers(model).values())


def counted(run) -> int:
    # The math backend: the counter does not know the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_forward_operations_are_those_that_torch_counts(make):
    model = make()
    width = next(layer for n, layer in linear_layers(model).items() if "q" in n).out_features
    n = TOKENS.shape[1]
    ours = transformer_flops(n, matrix_weights(model), len(model.layers), width)
    with torch.no_grad():
        assert counted(lambda: model.hidden(TOKENS)) == ours


def test_training_operations_are_those_that_torch_counts():
    """Everything trained costs 3 F; LoRA on all layers 2 F and a little, though it trains 1%."""
    model = tiny_llama(n_layers=3)
    n, weights, width = TOKENS.shape[1], matrix_weights(model), 32
    # Autograd leaves out what the formula charges for the first layer: the gradient of its input,
    # and with LoRA on q and v alone that of its keys.
    for wraps, trained in ((whole("layers"), weights), (lora(model, rank=1), None)):
        with attach(model, wraps) as attached:
            own = attached.count() if trained is None else 0
            trained = trained if trained is not None else own
            step = counted(lambda: model.hidden(TOKENS).sum().backward())
            ours = training_flops(n, weights + own, 3, width, trained)
            readers = [getattr(model.layers[0].self_attn, f"{x}_proj") for x in "qkv"]
            first = sum(p.numel() for r in readers for p in r.parameters())
            assert ours - 2 * n * first - 2 * n * n * width <= step <= ours


def test_freezing_saves_a_third_of_the_operations_at_most():
    full = training_flops(64, 10_000, 4, 32, 10_000)
    frozen = training_flops(64, 10_000, 4, 32, 0)
    assert 2 / 3 <= frozen / full < 1


def test_frozen_layers_keep_fewer_activations():
    model = tiny_llama(n_layers=3)
    kept = {}
    for name, wraps in (("full", whole("layers")), ("lora", lora(model, rank=1))):
        with attach(model, wraps):
            kept[name] = saved_activation_bytes(lambda: model.hidden(TOKENS).sum(), model)
    assert 0 < kept["lora"] < kept["full"]


def test_weights_are_not_counted_among_the_activations():
    """A frozen layer keeps its weight, for the gradient of its input; it is there anyway."""
    frozen = nn.Linear(50, 50).requires_grad_(False)
    x = torch.ones(1, 50, requires_grad=True)
    assert saved_activation_bytes(lambda: frozen(x).sum(), frozen) == 0


def test_each_kept_storage_is_counted_once():
    x = torch.ones(100, requires_grad=True)
    y = x * 2  # one storage, saved three times
    assert saved_activation_bytes(lambda: (y * y * y.exp()).sum(), nn.Identity()) >= 400
    assert saved_activation_bytes(lambda: y.square().sum() + y.square().sum(), nn.Identity()) == 400


# --- prompting ------------------------------------------------------------------------------------


def test_a_label_scores_what_the_whole_text_says_about_its_tokens():
    model, prompt = tiny_llama().eval(), torch.tensor([3, 1, 4, 1, 5])
    labels = [[9], [2, 6], [5, 3, 5]]
    scores = label_scores(model, prompt, labels)
    for label, score in zip(labels, scores, strict=True):
        text = torch.cat([prompt, torch.tensor(label)])
        said = model(text[None])[0].log_softmax(-1)
        want = sum(said[len(prompt) - 1 + i, token] for i, token in enumerate(label))
        torch.testing.assert_close(score, want)


def test_exemplars_read_beforehand_give_the_same_scores_and_stay_as_they_are():
    model, shared = tiny_llama().eval(), torch.tensor([7, 8, 9])
    cache = KVCache()
    model(shared[None], cache)
    before = [keys.clone() for keys in cache.keys]
    for text in (torch.tensor([3, 1]), torch.tensor([4, 1, 5])):
        whole_text = label_scores(model, torch.cat([shared, text]), [[9], [2, 6]])
        torch.testing.assert_close(label_scores(model, text, [[9], [2, 6]], cache), whole_text)
    assert all(torch.equal(a, b) for a, b in zip(before, cache.keys, strict=True))
    assert branched(cache).next_position == 3


def test_several_prompts_are_scored_as_each_alone():
    model, labels = tiny_llama().eval(), [[9], [2, 6]]
    prompts, cache = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]]), KVCache()
    model(torch.tensor([[7, 8]]), cache)
    for read in (None, cache):
        together = label_scores(model, prompts, labels, read)
        alone = torch.stack([label_scores(model, prompt, labels, read) for prompt in prompts])
        torch.testing.assert_close(together, alone)


def test_all_labels_of_a_small_vocabulary_share_a_probability_of_one():
    model = tiny_llama().eval()
    scores = label_scores(model, torch.tensor([1, 2]), [[token] for token in range(64)])
    torch.testing.assert_close(scores.exp().sum(), torch.tensor(1.0))


def test_a_prompt_holds_its_parts_in_order_and_ends_where_the_label_begins():
    prompt = few_shot_prompt(
        [("a {label} b", "x"), ("c", "y")], "d", template="{text} => {label}", instruction="Say."
    )
    assert prompt == "Say.\n\na {label} b => x\n\nc => y\n\nd =>"
    assert few_shot_prompt([], "d", template="{text} => {label}") == "d =>"


@pytest.mark.parametrize("template", ["Text: {label}", "{label}: {text}", "{text}"])
def test_a_template_without_its_places_is_refused(template):
    with pytest.raises(ValueError, match="template must hold"):
        few_shot_prompt([], "text", template)


def test_calibration_leaves_nothing_of_a_text_that_says_nothing():
    free = torch.tensor([-0.1, -5.0])
    assert calibrated(free.expand(3, 2), free).tolist() == [[0, 0]] * 3
