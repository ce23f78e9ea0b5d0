"""Speculative decoding: a cheap draft guesses some tokens, the model judges them all in one call.

Leviathan, Kalman, Matias 2023, "Fast inference from transformers via speculative decoding" (arXiv
2211.17192), and at the same time Chen et al. 2023 (arXiv 2302.01318). The model's distribution of
the next token is p, the draft's is q. A drafted token x, drawn from q, is

    accepted with probability   min(1, p(x) / q(x)),
    otherwise replaced by one drawn from   norm(max(0, p - q)),

and the token that comes out is distributed as p, whatever q is. After the first rejection the rest
of the draft is thrown away; if all k tokens are accepted, the same call gives one more, from p.

At temperature 0, p is all on one token, and the rule becomes: accept what the model would have said
itself. A draft that is sure of its tokens (prompt lookup) has such a q.

If each token is accepted with probability a = sum_x min(p(x), q(x)), independently of the others, a
call gives (1 - a^(k+1)) / (1 - a) tokens on average (equation 1 of Leviathan et al.).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fewer.inference.ragged import RaggedCache, ragged_rows
from fewer.models import Llama, token_probabilities
from fewer.validate import require_int


def acceptance_probability(
    p: Float[Tensor, "*batch vocab"],
    q: Float[Tensor, "*batch vocab"],
    tokens: Int[Tensor, "*batch"],
) -> Float[Tensor, "*batch"]:
    """min(1, p(x) / q(x)): how likely each drafted token x is to be accepted.

    Args:
        p: the model's distributions; each sums to 1.
        q: those that the tokens were drawn from.
        tokens: x, one for each distribution.

    Returns:
        Between 0 and 1. 0 where p(x) is 0, even if q(x) is too.

    Raises:
        ValueError: p and q have different shapes.

    Example:
        >>> p, q = torch.tensor([0.25, 0.25, 0.5]), torch.tensor([0.5, 0.25, 0.25])
        >>> [acceptance_probability(p, q, torch.tensor(x)).item() for x in range(3)]
        [0.5, 1.0, 1.0]
    """
    if p.shape != q.shape:
        raise ValueError(f"q must have the shape of p, {tuple(p.shape)}, got {tuple(q.shape)}")
    p_x, q_x = (d.gather(-1, tokens[..., None])[..., 0] for d in (p, q))
    return (p_x / q_x).nan_to_num(nan=0.0).clamp(max=1)


def residual_distribution(
    p: Float[Tensor, "*batch vocab"], q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch vocab"]:
    """norm(max(0, p - q)): what to draw from after a rejection.

    Where q gives too little of p, the rest is made up here, in proportion. Where p = q nothing is
    ever rejected; p is returned for such a row.

    Args:
        p, q: as for `acceptance_probability`.

    Returns:
        Distributions like p: each sums to 1.

    Raises:
        ValueError: p and q have different shapes.

    Example:
        >>> residual_distribution(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.2, 0.2]))
        tensor([0.0000, 0.2500, 0.7500])
    """
    if p.shape != q.shape:
        raise ValueError(f"q must have the shape of p, {tuple(p.shape)}, got {tuple(q.shape)}")
    missing = (p - q).clamp(min=0)
    total = missing.sum(-1, keepdim=True)
    return torch.where(total > 0, missing / total, p)


def verify_draft(
    p: Float[Tensor, "k1 vocab"],
    q: Float[Tensor, "k vocab"],
    tokens: Int[Tensor, "k"],
    u: Float[Tensor, "k"],
) -> tuple[int, Float[Tensor, "vocab"]]:
    """Judge a whole draft: how many of its tokens are accepted, and what the next is drawn from.

    Token i is accepted if `u[i]` is less than its `acceptance_probability` and all before it were
    accepted.

    Args:
        p: k + 1 distributions of the model: before each drafted token, and after the last.
        q: k distributions that the tokens were drawn from.
        tokens: the draft, k token ids; k may be 0.
        u: uniform random numbers in [0, 1).

    Returns:
        accepted: between 0 and k.
        following: the distribution of the token after the accepted ones: the
            `residual_distribution` at the first rejected token, or the last row of p if there is
            none.

    Raises:
        ValueError: p has not one row more than there are tokens, or q has other rows than tokens.

    Example:
        >>> p = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [0.0, 0.0, 1.0]])
        >>> q = torch.tensor([[0.5, 0.5, 0.0], [0.6, 0.2, 0.2]])
        >>> verify_draft(p, q, tokens=torch.tensor([1, 0]), u=torch.tensor([0.9, 0.4]))
        (1, tensor([0.0000, 0.2500, 0.7500]))
    """
    if len(p) != len(tokens) + 1 or len(q) != len(tokens):
        raise ValueError(
            f"p and q must have {len(tokens) + 1} and {len(tokens)} rows for {len(tokens)} tokens, "
            f"got {len(p)} and {len(q)}"
        )
    accepted = u < acceptance_probability(p[:-1], q, tokens)
    n = int(accepted.cumprod(0).sum())
    return n, (p[n] if n == len(tokens) else residual_distribution(p[n], q[n]))


def acceptance_rate(
    p: Float[Tensor, "*batch vocab"], q: Float[Tensor, "*batch vocab"]
) -> Float[Tensor, "*batch"]:
    """a = sum_x min(p(x), q(x)): how likely a token drawn from q is to be accepted.

    It is 1 minus the total variation distance of p and q (section 3.2 of Leviathan et al.).

    Example:
        >>> acceptance_rate(torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.6, 0.2, 0.2])).item()
        0.6
    """
    return torch.minimum(p, q).sum(-1)


def expected_tokens(a: float, k: int) -> float:
    """(1 - a^(k+1)) / (1 - a): the tokens that a call gives on average, between 1 and k + 1.

    Args:
        a: acceptance rate, 0 to 1, the same for all tokens of the draft.
        k: length of the draft, 0 or more.

    Raises:
        TypeError: k is not an int.
        ValueError: an argument out of its range.

    Example:
        >>> expected_tokens(0.5, 1), expected_tokens(0.5, 3), expected_tokens(1.0, 3)
        (1.5, 1.875, 4.0)
    """
    k = require_int(k, "k", 0)
    if not 0 <= a <= 1:
        raise ValueError(f"a must be between 0 and 1, got {a}")
    return k + 1.0 if a == 1 else (1 - a ** (k + 1)) / (1 - a)


def expected_speedup(a: float, k: int, c: float, call: float = 1.0) -> float:
    """How many times faster than plain decoding: expected tokens / (call + k c) (theorem 3.8).

    Times are in units of a plain decoding step of the model.

    Args:
        a, k: as for `expected_tokens`.
        c: time of drafting one token, 0 or more.
        call: time of the model's call on k + 1 tokens. The paper takes it for 1, as if the model
            only waited for its weights; on a CPU it is more, and grows with k.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Example:
        >>> expected_speedup(0.8, 4, c=0.05), expected_speedup(0.2, 4, c=0.25)
        (2.80, 0.62)
    """
    if not c >= 0 or not call > 0:
        raise ValueError(f"c must be 0 or more and call more than 0, got {c} and {call}")
    return expected_tokens(a, k) / (call + k * c)


def best_draft_length(a: float, c: float, longest: int = 32) -> int:
    """The k in 0, ..., longest with the greatest expected speed-up; of equals the smallest.

    0 means that drafting does not pay.

    Args:
        a, c: as for `expected_speedup`.
        longest: 0 or more.

    Raises:
        TypeError: longest is not an int.
        ValueError: an argument out of its range.

    Example:
        >>> best_draft_length(0.8, c=0.05), best_draft_length(0.2, c=0.25)
        (8, 0)
    """
    lengths = range(require_int(longest, "longest", 0) + 1)
    return max(lengths, key=lambda k: expected_speedup(a, k, c))


class Proposal(NamedTuple):
    """What a draft proposes: k tokens (0 or more), and the distribution each was drawn from."""

    tokens: Int[Tensor, "k"]
    q: Float[Tensor, "k vocab"] | None = None  # None: the draft is sure, q is one-hot


class Draft(Protocol):
    """Anything that proposes how a text goes on.

    It gets all tokens of one text and a source of randomness. Each token of its proposal must have
    been drawn from its row of q *given the tokens before it*; to leave out a token because of what
    was drawn (it seems unlikely, say) would make the result another distribution than the model's,
    unless the draft is deterministic.
    """

    def __call__(
        self, text: Int[Tensor, "tokens"], generator: torch.Generator | None, /
    ) -> Proposal: ...


class Round(NamedTuple):
    """What one call of the model did for one row of the batch."""

    row: int
    drafted: int  # tokens that the model was asked about
    judged: int  # those up to and including the first that was rejected
    accepted: int
    tokens: Int[Tensor, "new"]  # said in this round: the accepted ones and the model's own


class Speculation(NamedTuple):
    """The new tokens, as `generate` returns them, and what they cost, for each row.

    Rows that ended early repeat their last token. Tokens accepted after a stop token, or more than
    were asked for, are not among the tokens, but count as accepted.
    """

    tokens: Int[Tensor, "batch new"]
    lengths: Int[Tensor, "batch"]  # new tokens without repetitions
    calls: Int[Tensor, "batch"]  # of the model, the first (which reads the prompt) included
    drafted: Int[Tensor, "batch"]
    judged: Int[Tensor, "batch"]
    accepted: Int[Tensor, "batch"]

    @property
    def tokens_per_call(self) -> float:
        """Over all rows. Plain decoding has 1."""
        return (self.lengths.sum() / self.calls.sum()).item()

    @property
    def acceptance(self) -> float:
        """The share of the judged tokens that was accepted; NaN if none was judged."""
        return (self.accepted.sum() / self.judged.sum()).item()


def speculate(
    model: Llama,
    tokens: Int[Tensor, "batch prompt"],
    draft: Draft | Sequence[Draft],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Speculation:
    """Continue every row of `tokens`, with the help of a draft; arguments of `speculative_stream`.

    The result has the distribution of `generate`'s, and at temperature 0 is the same, as far as the
    rounding of a call on many tokens is that of calls on one.

    Example:
        >>> from fewer.models import tiny_llama
        >>> draft = lambda text, generator: Proposal(text[-2:])  # as if all were said twice
        >>> speculate(tiny_llama(), torch.tensor([[1, 2, 3]]), draft, max_new_tokens=4).tokens.shape
        torch.Size([1, 4])
    """
    rounds = speculative_stream(
        model,
        tokens,
        draft,
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop,
        generator=generator,
    )
    return collect_rounds(rounds, len(tokens))


@torch.no_grad()
def speculative_stream(
    model: Llama,
    tokens: Int[Tensor, "batch prompt"],
    draft: Draft | Sequence[Draft],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[list[Round]]:
    """Yield what each call of the model adds to the rows that have not ended yet.

    Rows accept unequally many tokens and end at different calls; a `RaggedCache` keeps them apart.

    Args:
        model: the language model.
        tokens: prompts of equal length.
        draft: one for all rows, or one a row. A draft that remembers what it has read
            (`ModelDraft`) is right for any text, but quick only if it follows one.
        max_new_tokens, temperature, top_p, stop, generator: as for `stream`. The draft has its own
            temperature.

    Raises:
        ValueError: if an argument is out of its range, or there are not as many drafts as rows.
    """
    require_stream_arguments(max_new_tokens, temperature, top_p)
    drafts = list(draft) if isinstance(draft, Sequence) else [draft] * len(tokens)
    if len(drafts) != len(tokens):
        raise ValueError(f"drafts must be as many as rows ({len(tokens)}), got {len(drafts)}")
    texts, unread, cache = list(tokens), tokens, RaggedCache()
    ends, rows = tokens.shape[1] + max_new_tokens, list(range(len(tokens)))
    while rows:
        proposals = [drafts[row](texts[row], generator) for row in rows]
        asked, positions = ragged_rows(
            [torch.cat([u, x.tokens]) for u, x in zip(unread, proposals, strict=True)],
            [len(texts[row]) - unread.shape[1] for row in rows],
        )
        hidden = model.hidden(asked, cache, positions)[:, unread.shape[1] - 1 :]
        p = token_probabilities(model.logits(hidden), temperature, top_p)
        rounds = []
        for row, (drafted, q), p_row in zip(rows, proposals, p, strict=True):
            k = len(drafted)
            q = F.one_hot(drafted, p.shape[-1]).to(p) if q is None else q
            u = torch.rand(k, generator=generator, device=p.device)
            accepted, following = verify_draft(p_row[: k + 1], q, drafted, u)
            own = torch.multinomial(following, 1, generator=generator)
            new = torch.cat([drafted[:accepted], own])[: ends - len(texts[row])]
            new = until_stop(new, stop)
            texts[row] = torch.cat([texts[row], new])
            rounds.append(Round(row, k, min(accepted + 1, k), accepted, new))
        yield rounds
        going = [i for i, row in enumerate(rows) if goes_on(texts[row], ends, stop)]
        rows = [rows[i] for i in going]
        if rows:
            cache.select(going)
            cache.crop([len(texts[row]) - 1 for row in rows])  # the last is read by the next call
            unread = torch.stack([texts[row][-1:] for row in rows])


def collect_rounds(rounds: Iterable[Iterable[Round]], batch: int) -> Speculation:
    """Put together what a stream of rounds says about each row."""
    of_row: list[list[Round]] = [[] for _ in range(batch)]
    for call in rounds:
        for one in call:
            of_row[one.row].append(one)
    new = [torch.cat([one.tokens for one in mine]) for mine in of_row]
    lengths = torch.tensor([len(row) for row in new])
    longest = int(lengths.max())
    return Speculation(
        torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in new]),
        lengths,
        torch.tensor([len(mine) for mine in of_row]),
        *(
            torch.tensor([sum(getattr(one, name) for one in mine) for mine in of_row])
            for name in ("drafted", "judged", "accepted")
        ),
    )


def until_stop(tokens: Int[Tensor, "n"], stop: Collection[int]) -> Int[Tensor, "_"]:
    """The tokens up to and including the first that is a stop token.

    Example:
        >>> until_stop(torch.tensor([5, 6, 7, 6]), stop={6}).tolist()
        [5, 6]
    """
    found = [i for i, token in enumerate(tokens.tolist()) if token in stop]
    return tokens[: found[0] + 1] if found else tokens


def goes_on(text: Int[Tensor, "tokens"], ends: int, stop: Collection[int]) -> bool:
    """Whether a text is neither `ends` tokens long nor ended by a stop token."""
    return len(text) < ends and int(text[-1]) not in stop


def require_stream_arguments(max_new_tokens: int, temperature: float, top_p: float) -> None:
    """Refuse what `stream` refuses.

    Raises:
        TypeError, ValueError: an argument is out of its range.
    """
    require_int(max_new_tokens, "max_new_tokens", 1)
    if not temperature >= 0:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
