"""Train on labelled texts whatever an attachment left trainable. Nothing here knows a method.

AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101), its learning rate warmed up and then falling
linearly to zero. Every method gets the same batches for a seed; what differs between methods is
what is trained, and the learning rate, to which they are very unequally sensitive.
"""

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn

from fewer.peft.attach import Wrap
from fewer.progress import track


def whole(*names: str) -> dict[str, Wrap]:
    """Train modules as they are: a head beside any method, or everything (full fine-tuning).

    A copy is trained, and the original put aside. `whole("body", "head")` is full fine-tuning of a
    `Classifier`; `bitfit(model.body)` with `whole("head")` is BitFit with a new head.

    Args:
        names: dotted names of the modules.

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.peft import attach
        >>> model = tiny_llama()
        >>> everything = whole(*(name for name, _ in model.named_children()))
        >>> with attach(model, everything) as attached:
        ...     attached.count()
        6480
    """
    return dict.fromkeys(names, copy.deepcopy)


def fine_tune(
    model: nn.Module,
    parameters: Iterable[nn.Parameter],
    x: Int[Tensor, "texts n"],
    y: Int[Tensor, "texts"],
    *,
    steps: int,
    lr: float,
    batch: int = 16,
    warmup: float = 0.1,
    weight_decay: float = 0.0,
    max_norm: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Train `parameters` so that the model's logits name the labels; the rest stays.

    Texts are drawn without replacement until all have been read, then again in another order.

    Args:
        model: maps tokens [batch, n] to logits [batch, classes], such as a `Classifier` with
            something attached.
        parameters: what is trained, such as `Attachment.parameters()`.
        x, y: token ids and labels, on the model's device.
        steps: of the optimizer, at least 1.
        lr: the learning rate after warming up.
        batch: texts a step; of fewer texts all.
        warmup: the share of the steps in which the learning rate rises to lr.
        weight_decay: of AdamW.
        max_norm: gradients longer than this, all taken together, are scaled down to it. One odd
            batch can otherwise throw a run off at a rate that is good for all the others.
        seed: of the order of texts. PyTorch's generator is left alone.
        progress: show a progress bar on stderr.

    Returns:
        The loss of each step, in nats.

    Raises:
        ValueError: steps below 1, max_norm not above 0, or no text.

    Example:
        >>> head = nn.Sequential(nn.Embedding(4, 2), nn.Flatten(), nn.Linear(2, 2))
        >>> x, y = torch.tensor([[0], [1], [2], [3]]), torch.tensor([0, 1, 1, 0])
        >>> losses = fine_tune(head, head.parameters(), x, y, steps=200, lr=0.1, batch=4)
        >>> losses[-1] < 0.1, accuracy(head, x, y)
        (True, 1.0)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    if len(x) == 0:
        raise ValueError("x must hold at least one text, got none")
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay)
    generator = torch.Generator().manual_seed(seed)
    losses, order = [], torch.empty(0, dtype=torch.long)
    for t in track(range(steps), "train", progress=progress):
        if len(order) < min(batch, len(x)):
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        rows, order = order[:batch].to(x.device), order[batch:]
        rising = (t + 1) / max(warmup * steps, 1)
        optimizer.param_groups[0]["lr"] = lr * min(rising, 1 - t / steps)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def accuracy(
    model: nn.Module, x: Int[Tensor, "texts n"], y: Int[Tensor, "texts"], batch: int = 64
) -> float:
    """The fraction of texts whose largest logit is that of their label.

    Raises:
        ValueError: there is no text.
    """
    if len(x) == 0:
        raise ValueError("x must hold at least one text, got none")
    answers = torch.cat([model(part).argmax(-1) for part in x.split(batch)])
    return (answers == y).double().mean().item()
