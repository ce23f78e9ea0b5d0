"""What frozen features are good for: a linear probe, and a cosine classifier.

Alain & Bengio 2017, "Understanding intermediate layers using linear classifier probes" (arXiv
1610.01644), for the probe; Gidaris & Komodakis 2018, "Dynamic few-shot visual learning without
forgetting" (arXiv 1804.09458), section 3.2, for the cosine classifier. With features f of a frozen
model:

    linear:   logits = W f + b
    cosine:   logits_c = tau cos(f, w_c),      w_c from training, or the mean of class c's features

The model reads every text once; its features are kept, and training a probe on them takes seconds.
That is the cheap end of fine-tuning, and the first thing to compare any other method with.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def cached_features(
    features: Callable[[Int[Tensor, "batch n"]], Float[Tensor, "batch d"]],
    tokens: Int[Tensor, "texts n"],
    batch: int = 32,
) -> Float[Tensor, "texts d"]:
    """The features of every text, read once, `batch` texts at a time.

    Example:
        >>> cached_features(lambda tokens: tokens.float(), torch.arange(6).view(3, 2), batch=2)
        tensor([[0., 1.],
                [2., 3.],
                [4., 5.]])
    """
    return torch.cat([features(part) for part in tokens.split(batch)])


def linear_probe(
    features: Float[Tensor, "texts d"],
    labels: Int[Tensor, "texts"],
    classes: int,
    decay: float = 1e-2,
    steps: int = 50,
) -> tuple[Float[Tensor, "classes d"], Float[Tensor, "classes"]]:
    """The W and b of least cross-entropy plus decay/2 ||W||^2, by L-BFGS: convex, so one optimum.

    The features are standardized inside (mean 0, variance 1 of each), which makes `decay` mean the
    same for every model; what is returned reads the features as they are.

    Args:
        features: [texts, d], from `cached_features`.
        labels: [texts], 0 to classes - 1.
        classes: how many there are.
        decay: weight decay, above 0, so that there is an optimum where the classes are separable.
        steps: of L-BFGS.

    Returns:
        W [classes, d], b [classes].

    Raises:
        ValueError: decay is not positive.

    Example:
        >>> features = torch.tensor([[1.0, 0.0], [0.9, 5.0], [-1.0, 0.0]])
        >>> labels = torch.tensor([0, 0, 1])
        >>> W, b = linear_probe(features, labels, classes=2)
        >>> (features @ W.T + b).argmax(-1).tolist()
        [0, 0, 1]
    """
    if decay <= 0:
        raise ValueError(f"decay must be above 0, got {decay}")
    mean, spread = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    x = (features - mean) / spread
    W = torch.zeros(classes, x.shape[1], requires_grad=True, device=x.device)
    b = torch.zeros(classes, requires_grad=True, device=x.device)
    optimizer = torch.optim.LBFGS([W, b], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ W.T + b, labels) + decay / 2 * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    W_raw = W.detach() / spread
    return W_raw, b.detach() - W_raw @ mean


def class_means(
    features: Float[Tensor, "texts d"], labels: Int[Tensor, "texts"], classes: int
) -> Float[Tensor, "classes d"]:
    """The mean direction of each class: of features scaled to length 1, and again of length 1.

    So a text with a long feature vector counts no more than one with a short one.

    Args:
        features: [texts, d], none of them zero.
        labels: [texts], 0 to classes - 1 in any order, each class at least once.
        classes: how many there are.

    Returns:
        [classes, d], row c for the texts with the label c.

    Raises:
        ValueError: a class has no text.

    Example:
        >>> class_means(torch.tensor([[2.0, 0.0], [0.0, 9.0]]), torch.tensor([1, 0]), classes=2)
        tensor([[0., 1.],
                [1., 0.]])
    """
    members = F.one_hot(labels, classes).T.to(features)
    if (members.sum(1) == 0).any():
        raise ValueError(f"labels must hold each of the {classes} classes at least once")
    return F.normalize(members @ F.normalize(features, dim=-1), dim=-1)


def cosine_logits(
    features: Float[Tensor, "texts d"], directions: Float[Tensor, "classes d"], tau: float = 10.0
) -> Float[Tensor, "texts classes"]:
    """tau cos(f, w_c): how nearly a text points where a class does, whatever its length.

    Args:
        features: [texts, d].
        directions: [classes, d], such as `class_means`; their lengths do not matter.
        tau: how sharply cosines, which lie in [-1, 1], are told apart.

    Example:
        >>> cosine_logits(torch.tensor([[3.0, 0.0]]), torch.eye(2), tau=10.0).tolist()
        [[10.0, 0.0]]
    """
    return tau * F.normalize(features, dim=-1) @ F.normalize(directions, dim=-1).T
