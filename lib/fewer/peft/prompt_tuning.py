"""Prompt tuning: learn the embeddings of a few tokens that no vocabulary has.

Lester, Al-Rfou & Constant 2021, "The power of scale for parameter-efficient prompt tuning" (arXiv
2104.08691), section 2. p vectors P [p, d] are put in front of the embedded text; the model is
frozen and P is all that learns:

    [P; E(x_1), ..., E(x_n)]                               p d trained numbers

Where P starts matters (section 3.2, in the order in which the paper found them to be better):
random numbers; the embeddings of words of the vocabulary; those of the class names ("label").
Long prompts cost what long texts cost: every token attends to p more.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from fewer.peft.attach import Wrap

TOKEN_EMBEDDINGS = ("embed_tokens", "embed.tokens")  # as Llama and as Bert call it


def random_prompt(
    embedding: Float[Tensor, "vocab d"], length: int, generator: torch.Generator
) -> Float[Tensor, "p d"]:
    """Uniform numbers as large as the embeddings are: in [-s, s] with s^2 / 3 their mean square.

    (The paper's [-0.5, 0.5] is for T5, whose embeddings are large.)

    Args:
        embedding: [vocab, d].
        length: p, at least 1.
        generator: a generator on the CPU.

    Returns:
        [p, d], the type of embedding.

    Example:
        >>> random_prompt(torch.ones(10, 4), 3, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 4])
    """
    s = (3 * embedding.float().square().mean()).sqrt().cpu()
    numbers = torch.rand(length, embedding.shape[1], generator=generator) * 2 - 1
    return (s * numbers).to(embedding)


def vocabulary_prompt(
    embedding: Float[Tensor, "vocab d"], length: int, generator: torch.Generator
) -> Float[Tensor, "p d"]:
    """The embeddings of p different tokens, drawn at random.

    The paper draws from the 5,000 most common ones. Byte-pair vocabularies are built from the most
    common pairs upwards, so we draw from the first 5,000 of the vocabulary.

    Args:
        embedding: [vocab, d].
        length: p, between 1 and the size of the vocabulary.
        generator: a generator on the CPU.

    Returns:
        [p, d], a copy.

    Example:
        >>> embedding = torch.eye(4)
        >>> vocabulary_prompt(embedding, 4, torch.Generator()).sum(0).tolist()  # each row once
        [1.0, 1.0, 1.0, 1.0]
    """
    common = min(len(embedding), max(5000, length))
    rows = torch.randperm(common, generator=generator)[:length]
    return embedding[rows.to(embedding.device)].clone()


def label_prompt(
    embedding: Float[Tensor, "vocab d"], labels: list[list[int]], length: int
) -> Float[Tensor, "p d"]:
    """The embeddings of the class names' tokens, the names one after another.

    If that is fewer than p tokens, the names are gone through again and again, from the first one,
    until there are p; if it is more, the first p are used.

    Args:
        embedding: [vocab, d].
        labels: the token ids of each class name, at least one id in all.
        length: p, at least 1.

    Returns:
        [p, d], a copy.

    Raises:
        ValueError: there are no ids.

    Example:
        >>> label_prompt(torch.tensor([[0.0], [1.0], [2.0]]), [[2], [1, 0]], length=4).tolist()
        [[2.0], [1.0], [0.0], [2.0]]
    """
    ids = [token for name in labels for token in name]
    if not ids:
        raise ValueError("labels must hold at least one token id, got none")
    repeated = [ids[i % len(ids)] for i in range(length)]
    return embedding[torch.tensor(repeated, device=embedding.device)]  # such an index copies


class PromptedEmbedding(nn.Module):
    """A token embedding that puts the learned vectors in front of every row."""

    def __init__(self, base: nn.Module, prompt: Float[Tensor, "p d"]) -> None:
        super().__init__()
        self.base = base
        self.prompt = nn.Parameter(prompt.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The embedding itself, for an output layer that is tied to it."""
        weight = self.base.weight
        assert isinstance(weight, Tensor)
        return weight

    def forward(self, tokens: Int[Tensor, "batch n"]) -> Float[Tensor, "batch p+n d"]:
        return torch.cat([self.prompt.expand(len(tokens), -1, -1), self.base(tokens)], dim=1)


def prompt_tuning(
    model: nn.Module,
    length: int,
    start: str = "vocabulary",
    labels: list[list[int]] | None = None,
    seed: int = 0,
) -> dict[str, Wrap]:
    """p trained vectors in front of the text a `Llama` or a `Bert` reads, for `attach`.

    The model then returns p more positions than it was given tokens, first those of the prompt. It
    reads whole texts; to generate with a cache, let it read the prompt once, unattached.

    Args:
        model: its token embedding is wrapped.
        length: p, at least 1.
        start: "random", "vocabulary" or "label", as the paper's three.
        labels: for "label": the token ids of each class name.
        seed: of the first two.

    Raises:
        ValueError: length below 1, another start, or "label" without labels.

    Example:
        >>> from fewer.models import tiny_llama
        >>> from fewer.peft import attach
        >>> model = tiny_llama()  # d = 16
        >>> with attach(model, prompt_tuning(model, length=5)) as attached:
        ...     attached.count(), model(torch.tensor([[1, 2, 3]])).shape
        (80, torch.Size([1, 8, 64]))
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if start not in ("random", "vocabulary", "label"):
        raise ValueError(f"start must be 'random', 'vocabulary' or 'label', got {start!r}")
    if start == "label" and not labels:
        raise ValueError("labels must be given for start='label', got none")

    def wrap(base: nn.Module) -> PromptedEmbedding:
        embedding, generator = base.weight, torch.Generator().manual_seed(seed)
        assert isinstance(embedding, Tensor)
        if start == "random":
            prompt = random_prompt(embedding, length, generator)
        elif start == "vocabulary":
            prompt = vocabulary_prompt(embedding, length, generator)
        else:
            prompt = label_prompt(embedding, labels or [], length)
        return PromptedEmbedding(base, prompt)

    return {name: wrap for name, _ in model.named_modules() if name.endswith(TOKEN_EMBEDDINGS)}
