"""What a method costs: operations, memory for activations, and bytes to keep for a task.

Kaplan et al. 2020, "Scaling laws for neural language models" (arXiv 2001.08361), section 2.1, for
the operations of a transformer with N weights in its matrices, L layers and attention width d, that
reads n tokens (a multiplication and an addition are two):

    forward      F  =  2 n N  +  4 n^2 d L           (attention: Q K^T, and its product with V)
    backward     2 n N for the gradients of what the matrices read, 2 n N_trained for those of the
                 trained matrices, and twice its forward for attention, both of whose factors flow
    training     4 n N  +  2 n N_trained  +  12 n^2 d L:   3 F where everything is trained

So a method that trains 0.1% of the weights saves a third of the operations, not 99.9%: gradients
must still flow through the frozen layers. It saves memory: frozen weights need no gradient and no
optimizer states (`qlora.training_memory`), and a frozen linear layer need not keep its input, which
is only good for the gradient of its weight (`saved_activation_bytes` measures what PyTorch keeps).
A linear probe on cached features saves everything: one forward pass a text, once.

And a task is stored as its trained numbers: 100 tasks are 100 models, or one model and 100 small
files.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewer.validate import require_int


def transformer_flops(tokens: int, matrix_weights: int, layers: int, width: int) -> int:
    """F = 2 n N + 4 n^2 d L, the operations of one forward pass over n tokens.

    All n^2 pairs of tokens are counted. A causal model could leave out half; most kernels for short
    texts do not. Norms, activation functions, softmax and the embedding's lookup are left out.

    Args:
        tokens: n, at least 1.
        matrix_weights: N, weights of all linear layers that every token passes.
        layers: L, with attention.
        width: d, of all heads of a layer together.

    Raises:
        TypeError: not an int.
        ValueError: below its least value.

    Example:
        >>> transformer_flops(tokens=10, matrix_weights=1000, layers=2, width=8)
        26400
    """
    require_int(tokens, "tokens", 1)
    require_int(matrix_weights, "matrix_weights", 0)
    require_int(layers, "layers", 0)
    require_int(width, "width", 1)
    return 2 * tokens * matrix_weights + 4 * tokens**2 * width * layers


def training_flops(
    tokens: int, matrix_weights: int, layers: int, width: int, trained_weights: int
) -> int:
    """Operations of one training step on n tokens: the forward pass, and backward

    - for every matrix, trained or frozen, the gradient of what it reads, since the layers below
      need it: as much as its forward product;
    - for every trained matrix, the gradient of its weights: as much once more;
    - for attention twice its forward, whatever is trained: it multiplies Q by K, and its weights by
      V, and both factors of a product need their gradient.

    The first layer is charged like any other, although nobody needs the gradient of its input
    unless something below it is trained (a prompt).

    Args:
        tokens, matrix_weights, layers, width: n, N, L and d as in `transformer_flops`, which counts
            the forward pass: 2 n N for the matrices and 4 n^2 d L for attention. They are those of
            the model with what is attached to it.
        trained_weights: N_trained, how many of the N weights are trained, 0 to N. Trained biases
            and scales cost next to nothing.

    Returns:
        Operations, a multiplication and an addition being two.

    Raises:
        TypeError: not an int.
        ValueError: tokens or width below 1, matrix_weights or layers below 0, trained_weights not
            between 0 and matrix_weights.

    Example:
        >>> forward = transformer_flops(tokens=10, matrix_weights=1000, layers=2, width=8)
        >>> training_flops(10, 1000, 2, 8, trained_weights=1000) / forward
        3.0
        >>> training_flops(10, 1000, 2, 8, trained_weights=0) / forward  # frozen, gradients flow
        2.24...
    """
    forward = transformer_flops(tokens, matrix_weights, layers, width)
    require_int(trained_weights, "trained_weights", 0, matrix_weights)
    frozen = matrix_weights - trained_weights
    return 3 * forward - 2 * tokens * frozen


def saved_activation_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, parameters and buffers not counted.

    Args:
        run: calls the model and returns the loss (or any tensor that needs a gradient).
        model: whose parameters are not counted: they are there anyway.

    Returns:
        Bytes of distinct storages, each counted once.

    Example:
        >>> linear, x = nn.Linear(4, 3), torch.ones(5, 4)
        >>> saved_activation_bytes(lambda: linear(x).sum(), linear)  # x, for the weight's gradient
        80
        >>> linear.weight.requires_grad_(False)[0, 0].shape  # frozen, it is not needed
        torch.Size([])
        >>> saved_activation_bytes(lambda: linear(x).sum(), linear)
        0
    """
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()  # alive until here, so that no storage is used twice
    del loss
    return sum(kept.values())
