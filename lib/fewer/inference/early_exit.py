"""Early exit: the first layers of a model, with its own norm and output layer, draft for all of it.

Elhoushi et al. 2024, "LayerSkip" (arXiv 2404.16710), leave the model after its first E layers;
Zhang et al. 2023, "Draft & Verify" (arXiv 2309.08168), leave out layers in between. Either way the
draft needs no weights of its own:

    q = softmax( W_out norm( block_E ... block_1 (embedding) ) )

LayerSkip trains the model for it (layers dropped at random, a loss at every exit). In a model that
was not trained so, the output layer reads something it has never seen: the stream before the last
layers. That is why an early exit of SmolLM2 drafts badly until almost all layers are in, and then
it costs almost as much as the model.
"""

from dataclasses import replace

import torch
from torch import nn

from fewer.models import Llama
from fewer.validate import require_int


def early_exit(model: Llama, layers: int) -> Llama:
    """The model of the first `layers` blocks. It shares all weights with `model`; none is copied.

    Args:
        model: is not modified.
        layers: E, between 1 and the model's number of layers.

    Raises:
        TypeError, ValueError: layers is out of range.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model = tiny_llama(n_layers=3)
        >>> exit = early_exit(model, 2)
        >>> len(exit.layers), exit.layers[0] is model.layers[0]
        (2, True)
    """
    require_int(layers, "layers", 1, len(model.layers))
    with torch.device("meta"):
        shallow = Llama(replace(model.config, n_layers=layers))
    shallow.embed_tokens, shallow.norm = model.embed_tokens, model.norm
    shallow.layers = nn.ModuleList(list(model.layers)[:layers])
    return shallow.train(model.training)
