"""Fine-tuning reads every text equally often, at the learning rates it says it does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewer.models import tiny_llama
from fewer.peft import accuracy, attach, fine_tune, whole


class Seen(nn.Module):
    """Logits that do not depend on the text; it notes which texts it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))
        self.rows: list[int] = []

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.rows += tokens[:, 0].tolist()
        return self.logits.expand(len(tokens), 2)


def seen(texts: int, seed: int = 0, **how: float) -> list[int]:
    model, x = Seen(), torch.arange(texts)[:, None]
    fine_tune(model, model.parameters(), x, torch.zeros(texts).long(), lr=0.1, seed=seed, **how)  # type: ignore[arg-type]
    return model.rows


def test_every_text_is_read_once_before_any_is_read_again():
    rows = seen(texts=10, steps=10, batch=4)
    assert len(rows) == 40
    for epoch in range(4):
        assert sorted(rows[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert rows[:10] != rows[10:20], "in another order"


def test_the_order_depends_on_the_seed_alone():
    assert seen(10, seed=3, steps=5, batch=4) == seen(10, seed=3, steps=5, batch=4)
    assert seen(10, seed=3, steps=5, batch=4) != seen(10, seed=4, steps=5, batch=4)


def test_of_fewer_texts_than_a_batch_all_are_read_each_step():
    rows = seen(texts=3, steps=4, batch=8)
    assert [sorted(rows[i : i + 3]) for i in range(0, 12, 3)] == [[0, 1, 2]] * 4


def test_the_learning_rate_rises_to_its_height_and_falls_to_zero(monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a: (rates.append(self.param_groups[0]["lr"]), step(self, *a))[1],
    )
    seen(texts=4, steps=20, batch=2, warmup=0.2)
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.085])  # 0.1 t/4, under 0.1 (1 - t/20)
    assert rates[3:] == pytest.approx([0.1 * (1 - t / 20) for t in range(3, 20)])


def test_only_the_named_modules_are_trained():
    model = tiny_llama()
    with attach(model, whole("layers.0", "norm")) as attached:
        assert {name.split(".")[0] for name in attached.trained} == {"layers", "norm"}
        moved = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert moved == attached.count()


def test_accuracy_counts_every_text_once_also_in_the_last_short_batch():
    model = nn.Sequential(nn.Embedding.from_pretrained(torch.eye(3)), nn.Flatten())
    x = torch.tensor([[0], [1], [2], [0], [1]])
    assert accuracy(model, x, torch.tensor([0, 1, 2, 1, 0]), batch=2) == 0.6


def test_nothing_to_do_is_refused():
    model, none = Seen(), torch.zeros(0, 1).long()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        seen(texts=3, steps=0)
    with pytest.raises(ValueError, match="max_norm must be above 0, got 0"):
        seen(texts=3, steps=1, max_norm=0)
    with pytest.raises(ValueError, match="at least one text"):
        fine_tune(model, model.parameters(), none, none[:, 0], steps=1, lr=0.1)
    with pytest.raises(ValueError, match="at least one text"):
        accuracy(model, none, none[:, 0])


def test_an_odd_batch_does_not_throw_training_off(monkeypatch):
    class Loud(nn.Module):
        """The logits of one of the texts are a thousand times as loud."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.where(tokens == 0, 1000.0, 1.0) * self.w

    model, found, used = Loud(), [], []
    model.w.register_post_accumulate_grad_hook(lambda w: found.append(w.grad.norm().item()))
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *a: (used.append(model.w.grad.norm().item()), step(self, *a))[1],  # type: ignore[union-attr]
    )
    x, y = torch.arange(8)[:, None], torch.zeros(8).long()
    fine_tune(model, model.parameters(), x, y, steps=8, lr=1e-6, batch=1, max_norm=1.0)
    assert max(found) > 500
    assert min(found) < 1
    assert used == pytest.approx([min(length, 1.0) for length in found], rel=1e-4)
