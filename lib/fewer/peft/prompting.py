"""In-context learning: the task is put into the text, and nothing is trained.

Brown et al. 2020, "Language models are few-shot learners" (arXiv 2005.14165), section 2; Zhao et
al. 2021, "Calibrate before use" (arXiv 2102.09690), for how much wording, choice and order of the
exemplars decide, and for the cure (`calibrated`); Lu et al. 2022, "Fantastically ordered prompts
and where to find them" (arXiv 2104.08786), for the order.

A label is scored by the log-probability that the model gives to its tokens after the prompt:

    score_c  =  sum_i  log p(c_i | prompt, c_1, ..., c_{i-1})

and the largest score wins. A model says some labels more readily than others whatever the text
says. Contextual calibration measures that with a text that says nothing ("N/A") and takes it off:

    score_c - score_c(N/A)
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fewer.models import KVCache, Llama


def few_shot_prompt(
    exemplars: list[tuple[str, str]],
    text: str,
    template: str = "Text: {text}\nLabel: {label}",
    instruction: str = "",
) -> str:
    """The instruction, the exemplars with their labels, and the text whose label is wanted.

    Parts are separated by an empty line. The last one ends where the label would begin, without the
    blank before it: tokenizers put that blank into the label's first token.

    Args:
        exemplars: (text, label) pairs; none for zero-shot. Their order matters to the model.
        text: the text to label.
        template: with {text} and {label}, the label last.
        instruction: what is asked for; left out if empty.

    Raises:
        ValueError: template has no {text}, or does not end in {label}.

    Example:
        >>> print(few_shot_prompt([("We won.", "good")], "We lost.", instruction="Good or bad?"))
        Good or bad?
        <BLANKLINE>
        Text: We won.
        Label: good
        <BLANKLINE>
        Text: We lost.
        Label:
    """
    if "{text}" not in template or not template.endswith("{label}"):
        raise ValueError(f"template must hold {{text}} and end in {{label}}, got {template!r}")
    front = template.removesuffix("{label}")
    shown = [front.replace("{text}", t) + label for t, label in exemplars]
    asked = front.replace("{text}", text).rstrip(" ")
    return "\n\n".join([*([instruction] if instruction else []), *shown, asked])


def sequence_log_probability(
    logits: Float[Tensor, "m vocab"], tokens: Int[Tensor, "m"]
) -> Float[Tensor, ""]:
    """sum_i log p(token_i), where row i of the logits is what the model said *before* token i.

    p is the softmax of a row. Row and token of the same number belong together: nothing is shifted.

    Args:
        logits: [m, vocab], any floating type and size: a token that is next to impossible has a
            finite log-probability too, such as -500. Half precision is computed in float32.
        tokens: [m], the tokens that came.

    Returns:
        The sum (natural logarithm), 0-d, at most 0, float32 (float64 for float64 logits).

    Raises:
        ValueError: logits and tokens disagree on m.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 0.0]])  # even odds, twice
        >>> round(sequence_log_probability(logits, torch.tensor([0, 1])).exp().item(), 4)
        0.25
    """
    if logits.shape[:1] != tokens.shape:
        raise ValueError(f"logits must have a row a token ({len(tokens)}), got {len(logits)}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).gather(1, tokens[:, None]).sum()


def branched(cache: KVCache) -> KVCache:
    """A second cache that goes on from where the first one is; neither changes the other.

    The tensors are shared: `KVCache.update` makes new ones and never writes into the old.
    """
    branch = KVCache()
    branch.keys, branch.values = [*cache.keys], [*cache.values]
    branch.positions = [*cache.positions]
    return branch


@torch.no_grad()
def label_scores(
    model: Llama,
    prompt: Int[Tensor, "*texts n"],
    labels: list[list[int]],
    cache: KVCache | None = None,
) -> Float[Tensor, "*texts classes"]:
    """log p(label | prompt) of every label.

    A prompt is read once, whatever the number of labels.

    Args:
        model: a language model.
        prompt: token ids, at least one; of several prompts of equal length, a row each.
        labels: the token ids of each label, at least one each. With the prompts of
            `few_shot_prompt`, tokenize them with the blank in front: " good".
        cache: what all prompts begin with (instruction and exemplars), read already, as one row. It
            is not modified.

    Returns:
        [..., classes], at most 0. A label of more tokens has more factors below 1; where labels
        differ in length, compare log-probabilities a token, or `calibrated` scores.

    Example:
        >>> from fewer.models import tiny_llama
        >>> scores = label_scores(tiny_llama(), torch.tensor([1, 2, 3]), [[4], [5, 6]])
        >>> scores.shape, bool((scores < 0).all())
        (torch.Size([2]), True)
    """
    rows = prompt.reshape(-1, prompt.shape[-1])
    read = branched(cache) if cache is not None else KVCache()
    read.keys, read.values = (
        [x.expand(len(rows), -1, -1, -1) for x in kept] for kept in (read.keys, read.values)
    )
    said = model.logits(model.hidden(rows, read)[:, -1:])  # about the token after the prompt
    scores = []
    for label in labels:
        tokens = torch.tensor(label, device=prompt.device)
        logits = said
        if len(label) > 1:
            first = tokens[:-1].expand(len(rows), -1)
            logits = torch.cat([said, model(first, branched(read))], dim=1)
        scores.append(torch.stack([sequence_log_probability(row, tokens) for row in logits]))
    return torch.stack(scores, dim=-1).view(*prompt.shape[:-1], len(labels))


def calibrated(
    scores: Float[Tensor, "*texts classes"], content_free: Float[Tensor, "classes"]
) -> Float[Tensor, "*texts classes"]:
    """Contextual calibration: how much more a label is said after this text than after none.

    Args:
        scores: [..., classes], log-probabilities from `label_scores`.
        content_free: [classes], those after the same prompt with "N/A" as its text (or the log of
            mean probabilities over several such texts).

    Returns:
        [..., classes]: equal scores for a text that says nothing.

    Example:
        >>> calibrated(torch.tensor([-1.0, -3.0]), torch.tensor([-0.5, -4.0])).tolist()
        [-0.5, 1.0]
    """
    return scores - content_free
