import copy

import pytest
import torch
from jaxtyping import Int
from launched import relative_error
from torch import Tensor

from fewer.kernels import QuantizedKV, dequantize_kv, dequantize_w4, dequantize_w8
from fewer.kernels.generate import (
    GROUP,
    State,
    decode,
    empty_state,
    flush,
    generate_graphed,
    prefill,
    stepper,
)
from fewer.kernels.nf4 import WNF4, dequantize_for_kernel
from fewer.kernels.packed_llama import Weights, pack_model
from fewer.kernels.w4a16 import W4
from fewer.kernels.w8a16 import W8
from fewer.models import KVCache, Llama, generate, tiny_llama
from fewer.models.llama import rotate

pytestmark = pytest.mark.filterwarnings("ignore:.*it is plain torch:UserWarning")

TOLERANCE = 0.02  # of logits in float16, relative; some are off by 0.003


def a_model(device: str, dtype: torch.dtype = torch.float16) -> Llama:
    """Three query heads a key head, as SmolLM2; weights are numbers of this type."""
    sizes = {"d_model": 64, "d_ffn": 128, "n_heads": 6, "n_kv_heads": 2, "head_dim": 32}
    return tiny_llama(seed=3, **sizes).to(device, dtype).requires_grad_(False)


def texts(batch: int, tokens: int, device: str) -> Int[Tensor, "batch tokens"]:
    return torch.randint(64, (batch, tokens), generator=torch.Generator().manual_seed(1)).to(device)


def forced(
    weights: Weights, text: Int[Tensor, "batch tokens"], prompt: int, cache: str
) -> tuple[Tensor, State]:
    """Logits behind the prompt and behind each token after it, and the state at the end."""
    state = empty_state(weights, *text.shape, cache)
    step = stepper(weights, state)
    logits = [prefill(weights, state, text[:, :prompt]).clone()]
    for i in range(prompt, text.shape[1]):
        state.token.copy_(text[:, i : i + 1])
        logits.append(step(i).clone())
    return torch.stack(logits, 1), state


class Rounded(KVCache):
    """The definition: a query of a single token sees whole groups before it through their codes.

    The codes are those of a state, once it is seen that they stand for the keys and values here.
    """

    def __init__(self, state: State, base: float) -> None:
        super().__init__()
        self.state, self.base = state, base

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, v, at = super().update(layer, keys, values, positions)
        old, codes = (k.shape[2] - 1) // GROUP * GROUP, self.state.codes
        if keys.shape[2] > 1 or not old or codes is None:
            return k, v, at
        assert self.state.stored.tolist() == [old] * len(k)
        parts = [x[layer, :, :, : old * x.shape[3] // codes[0].shape[3]] for x in codes[:6]]
        of_layer = QuantizedKV._make([*parts, *codes[6:]])
        rounded_k, rounded_v = dequantize_kv(of_layer)
        steps = of_layer.key_scale.repeat_interleave(GROUP, 2), of_layer.value_scale[..., None]
        exact = rotate(k[:, :, :old], at[:old], self.base), v[:, :, :old]
        for x, rounded, step in zip(exact, (rounded_k, rounded_v), steps, strict=True):
            # Half a step, what the other layers' roundings have made of x, and the float16 of low.
            assert ((x - rounded).abs() <= 0.5 * step + 0.05 * x.std()).all()
        rounded_k = rotate(rounded_k.to(k), -at[:old], self.base)
        k = torch.cat([rounded_k, k[:, :, old:]], 2)
        return k, torch.cat([rounded_v.to(v), v[:, :, old:]], 2), at


@torch.no_grad()
def expected(model: Llama, text: Tensor, prompt: int, cache: KVCache | None = None) -> Tensor:
    """The same logits by the model's own forward pass, in float64."""
    exact, cache = copy.deepcopy(model).double(), KVCache() if cache is None else cache
    logits = [exact(text[:, :prompt], cache)[:, -1:]]
    logits += [exact(text[:, i : i + 1], cache) for i in range(prompt, text.shape[1])]
    return torch.cat(logits, 1)


def dequantized(model: Llama, weights: Weights) -> Llama:
    """The model with what the packed matrices stand for, in float64."""
    model = copy.deepcopy(model).double()
    for block, layer in zip(model.layers, weights.layers, strict=True):
        a, m = block.self_attn, block.mlp
        fused = {
            layer.qkv: (a.q_proj, a.k_proj, a.v_proj),
            layer.o: (a.o_proj,),
            layer.gate_up: (m.gate_proj, m.up_proj),
            layer.down: (m.down_proj,),
        }
        for packed, linears in fused.items():
            parts = unpacked(packed).double().split([linear.out_features for linear in linears])
            for linear, part in zip(linears, parts, strict=True):
                linear.weight = torch.nn.Parameter(part, requires_grad=False)
    return model


def unpacked(w: W4 | W8 | WNF4) -> Tensor:
    if isinstance(w, W4):
        return dequantize_w4(w)
    return dequantize_w8(w) if isinstance(w, W8) else dequantize_for_kernel(w, torch.float16)


def test_in_float32_tokens_and_logits_are_those_of_the_model(device: str) -> None:
    model, text = a_model(device, torch.float32), texts(3, 40, device)
    logits, _ = forced(pack_model(model), text, 30, "torch")
    assert relative_error(logits, expected(model, text, 30)) < 1e-4
    new = generate_graphed(model, text, 50, cache="torch")
    assert torch.equal(new, generate(model, text, 50))


@pytest.mark.parametrize("cache", ["torch", "full"])
@pytest.mark.parametrize("prompt", [1, 63, 64, 65])
def test_a_full_cache_gives_the_logits_of_the_model(cache: str, prompt: int, device: str) -> None:
    model, text = a_model(device), texts(2, prompt + 6, device)
    logits, _ = forced(pack_model(model), text, prompt, cache)
    assert relative_error(logits, expected(model, text, prompt)) < TOLERANCE


@pytest.mark.parametrize("weights", ["w8", "w4", "w4s", "nf4"])
def test_packed_weights_give_the_logits_of_a_model_that_has_them(weights: str, device: str) -> None:
    model, text = a_model(device), texts(2, 24, device)
    packed = pack_model(model, weights)
    logits, _ = forced(packed, text, 16, "full")
    other = expected(dequantized(model, packed), text, 16)
    assert relative_error(logits, other) < TOLERANCE
    assert relative_error(other, expected(model, text, 16)) > 2 * TOLERANCE or weights == "w8"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [(1, 66), (63, 67), (64, 66), (65, 68), (100, 131), (128, 130), (150, 152)],
)
def test_a_quantized_cache_is_read_as_it_is_defined(
    bits: int, prompt: int, tokens: int, device: str
) -> None:
    model, text = a_model(device), texts(2, tokens, device)
    weights, exact = pack_model(model), copy.deepcopy(model).double()
    state = empty_state(weights, *text.shape, f"int{bits}")
    step, cache = stepper(weights, state), Rounded(state, model.config.rope_base)
    prefill(weights, state, text[:, :prompt])
    exact(text[:, :prompt], cache)
    logits, wanted = [], []
    for i in range(prompt, tokens):
        state.token.copy_(text[:, i : i + 1])
        logits.append(step(i).clone())
        wanted.append(exact(text[:, i : i + 1], cache)[:, 0])
    assert relative_error(torch.stack(logits), torch.stack(wanted)) < TOLERANCE / 2
    if bits == 4:  # and it makes a difference to the last one
        assert relative_error(wanted[-1], expected(model, text, prompt)[:, -1]) > TOLERANCE


def test_tokens_that_were_flushed_are_where_those_of_a_prompt_are(device: str) -> None:
    weights, text = pack_model(a_model(device)), texts(2, 129, device)
    _, at_once = forced(weights, text, 129, "int8")
    _, one_by_one = forced(weights, text, 3, "int8")
    assert at_once.stored.tolist() == one_by_one.stored.tolist() == [128, 128]
    assert relative_error(one_by_one.kv[0, :, :, :1], at_once.kv[0, :, :, :1]) < TOLERANCE
    for a, b in zip(stored_kv(one_by_one), stored_kv(at_once), strict=True):
        assert a.abs().max() > 0
        assert relative_error(a[:, :, :128], b[:, :, :128]) < TOLERANCE
        assert not a[:, :, 128:].any()
        assert not b[:, :, 128:].any()


def stored_kv(state: State) -> tuple[Tensor, Tensor]:
    """Keys and values of the first layer, which no attention has an influence on."""
    assert state.codes is not None
    return dequantize_kv(QuantizedKV._make([*(x[0] for x in state.codes[:6]), *state.codes[6:]]))


def test_rows_do_not_see_each_other(device: str) -> None:
    weights, text = pack_model(a_model(device), "w4"), texts(5, 70, device)
    together, _ = forced(weights, text, 62, "int8")
    for i in range(5):
        alone, _ = forced(weights, text[i : i + 1], 62, "int8")
        assert relative_error(together[i : i + 1], alone) < TOLERANCE


def test_a_state_can_be_used_again(device: str) -> None:
    weights, text = pack_model(a_model(device)), texts(2, 140, device)
    state = empty_state(weights, 2, 140, "int4")
    step = stepper(weights, state)
    found = []
    for start in (0, 60, 0):  # in between a text that is shorter, and read less
        prefill(weights, state, text[:, start:120])
        logits = step(120 - start).clone()
        found.append(logits)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_greedy_tokens_are_the_likeliest_of_the_logits(device: str) -> None:
    model, prompts = a_model(device), texts(3, 61, device)
    new = generate_graphed(model, prompts, 12, "w4", "int4")
    assert new.shape == (3, 12)
    text = torch.cat([prompts, new], 1)
    logits, _ = forced(pack_model(model, "w4"), text, 61, "int4")
    assert torch.equal(logits[:, :-1].argmax(-1), new)


def test_what_cannot_be_is_refused(device: str) -> None:
    model = a_model(device)
    weights, text = pack_model(model), texts(2, 100, device)
    state = empty_state(weights, 2, 64)
    with pytest.raises(ValueError, match="weights must be one of full, w8, w4, w4s, nf4, got 'w2'"):
        pack_model(model, "w2")
    with pytest.raises(ValueError, match=r"cache must be one of .* got 'int2'"):
        empty_state(weights, 2, 64, "int2")
    with pytest.raises(ValueError, match=r"prompts must be 2 rows of 1 to 64 tokens, got .*100"):
        prefill(weights, state, text)
    with pytest.raises(ValueError, match=r"prompts must be 2 rows .* got shape \(1, 3\)"):
        prefill(weights, state, text[:1, :3])
    with pytest.raises(ValueError, match="read must be between 1 and 63, got 64"):
        stepper(weights, state)(64)
    with pytest.raises(ValueError, match="new_tokens must be at least 1, got 0"):
        generate_graphed(model, text, 0)
    with pytest.raises(ValueError, match="state must have a quantized cache"):
        flush(state)
    with pytest.raises(TypeError, match="w must be bfloat16 or float16"):
        pack_model(model.float(), "w4")
    float32 = pack_model(model.float())
    with pytest.raises(TypeError, match="q must be float16 or bfloat16"):
        decode(float32, empty_state(float32, 2, 64))
