"""SpecInfer: a tree of drafts, judged in one call.

Miao et al. 2024, "SpecInfer: Accelerating LLM serving with tree-based speculative inference and
verification" (arXiv 2305.09781). If the first token of a draft is rejected, all of it is lost. So
propose several next tokens, and several after each of them: a tree, of which `parents[i]` is the
node before node i, or -1 for the text itself. Three things are needed:

* a token sees the text, its ancestors and itself, not the other branches (tree attention, section
  4.2). Then one call gives the model's distribution after every node. Siblings have the same
  position.
* at a node, the candidates x_1, x_2, ... are tried one after the other (multi-step speculative
  sampling, section 4.3): x_i is accepted with probability min(1, p(x_i) / q_i(x_i)); if not,

      p <- norm(max(0, p - q_i))

  and the next is tried. When none is left, the token is drawn from what p has become. It is
  distributed as the p of the beginning, if each x_i was drawn from q_i whatever the earlier ones
  were (q_i itself may depend on them: drawing without replacement is allowed).
* of the keys and values only those of the accepted path are kept.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.inference.model_draft import common_prefix
from fewer.inference.ragged import RaggedCache
from fewer.inference.speculative import (
    Draft,
    Proposal,
    Round,
    Speculation,
    acceptance_probability,
    collect_rounds,
    goes_on,
    require_stream_arguments,
    residual_distribution,
    until_stop,
)
from fewer.models import Llama, token_probabilities


def tree_mask(parents: Sequence[int]) -> Bool[Tensor, "nodes nodes"]:
    """Which nodes of a tree each of its nodes may attend to: its ancestors and itself.

    A row's sum is the node's depth, counted from 1.

    Args:
        parents: of each node, the index of the node before it, or -1 for the text. A parent comes
            before its children.

    Raises:
        ValueError: a parent that does not come before its child.

    Example:
        >>> tree_mask([-1, 0, 0]).int().tolist()  # two siblings after one token
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    mask = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"parents[{node}] must be between -1 and {node - 1}, got {parent}")
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def verify_candidates(
    p: Float[Tensor, "vocab"],
    q: Float[Tensor, "m vocab"],
    tokens: Int[Tensor, "m"],
    u: Float[Tensor, "m"],
) -> tuple[int | None, Float[Tensor, "vocab"]]:
    """Try candidates for one token in their order: which is accepted, and what p has become.

    Candidate i is accepted if `u[i]` is less than its `acceptance_probability`; that ends the
    search. If it is rejected, the `residual_distribution` of p and its q takes the place of p, also
    for judging the next one.

    Args:
        p: the model's distribution.
        q: the distribution each candidate was drawn from.
        tokens: the candidates, m >= 0 of them; there may be equal ones.
        u: uniform random numbers in [0, 1).

    Returns:
        index: of the accepted candidate, its place in `tokens`; None if there is none.
        rest: p after the candidates that were rejected; if all were, what to draw from.

    Example:
        >>> p, q = torch.tensor([0.5, 0.3, 0.2]), torch.eye(3)[:2]  # sure candidates 0 and 1
        >>> verify_candidates(p, q, torch.tensor([0, 1]), u=torch.tensor([0.7, 0.7]))
        (None, tensor([0., 0., 1.]))
        >>> verify_candidates(p, q, torch.tensor([0, 1]), u=torch.tensor([0.7, 0.5]))[0]
        1
    """
    for i, token in enumerate(tokens):
        if u[i] < acceptance_probability(p, q[i], token):
            return i, p
        p = residual_distribution(p, q[i])
    return None, p


def verify_tree(
    p: Float[Tensor, "nodes1 vocab"],
    q: Float[Tensor, "nodes vocab"],
    tokens: Int[Tensor, "nodes"],
    parents: Sequence[int],
    u: Float[Tensor, "nodes"],
) -> tuple[list[int], Float[Tensor, "vocab"]]:
    """Walk down a tree from the text as far as candidates are accepted.

    Args:
        p: the model's distributions: after the text, then after each node.
        q: the distribution that each node was drawn from.
        tokens, parents: of the nodes; a parent comes before its children.
        u: uniform random numbers in [0, 1), one a node.

    Returns:
        path: the accepted nodes, from the text on.
        following: the distribution of the token after them.

    Example:
        >>> p = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 1.0]])
        >>> u, q = torch.tensor([0.7, 0.9]), torch.eye(2)  # sure of 0 and of 1
        >>> verify_tree(p, q, torch.tensor([0, 1]), [-1, -1], u)
        ([1], tensor([0., 1.]))
    """
    node, path = -1, list[int]()
    while True:
        children = [i for i, parent in enumerate(parents) if parent == node]
        index, following = verify_candidates(
            p[node + 1], q[children], tokens[children], u[children]
        )
        if index is None:
            return path, following
        node = children[index]
        path.append(node)


def draw_children(
    q: Float[Tensor, "vocab"], width: int, generator: torch.Generator | None = None
) -> tuple[Int[Tensor, "m"], Float[Tensor, "m vocab"]]:
    """Draw candidates from q one after the other without putting any back.

    Args:
        q: sums to 1.
        width: how many; fewer if q has fewer tokens that are possible.

    Returns:
        tokens: the candidates, all different.
        q: what each was drawn from: q without the earlier ones, normalised.

    Example:
        >>> tokens, rows = draw_children(torch.tensor([0.0, 0.5, 0.5]), width=3)
        >>> tokens.sort().values.tolist(), rows.sum(1).tolist()
        ([1, 2], [1.0, 1.0])
    """
    tokens, rows = [], []
    for _ in range(min(width, int((q > 0).sum()))):
        tokens.append(torch.multinomial(q, 1, generator=generator))
        rows.append(q)
        q = q.index_fill(0, tokens[-1], 0.0)
        q = q / q.sum()
    return torch.cat(tokens), torch.stack(rows)


class Tree(NamedTuple):
    """A tree of drafted tokens; a chain is one too."""

    tokens: Int[Tensor, "nodes"]
    parents: list[int]  # -1: follows the text
    q: Float[Tensor, "nodes vocab"] | None = None  # None: the draft is sure, q is one-hot


class TreeDraft(Protocol):
    """Anything that proposes how a text may go on, in several ways."""

    def __call__(
        self, text: Int[Tensor, "tokens"], generator: torch.Generator | None, /
    ) -> Tree: ...


def merge_chains(chains: Sequence[Proposal]) -> Tree:
    """Several proposals as one tree, the first ones tried first (merge-based, section 3).

    Where chains that are sure of their tokens begin alike they share the nodes. A node that was
    drawn is never shared: its twin, drawn again, is a second candidate, and counts as one.

    Example:
        >>> chains = [Proposal(torch.tensor(ids)) for ids in ([1, 2, 3], [1, 2, 4], [5])]
        >>> tree = merge_chains(chains)
        >>> tree.tokens.tolist(), tree.parents
        ([1, 2, 3, 4, 5], [-1, 0, 1, 1, -1])
    """
    tokens, parents, rows = [], list[int](), []
    known: dict[tuple[int, int], int] = {}  # (parent, token) of sure nodes
    for chain in chains:
        node = -1
        for i, token in enumerate(chain.tokens.tolist()):
            at = (node, token)
            if chain.q is None and at in known:
                node = known[at]
                continue
            tokens.append(token)
            parents.append(node)
            rows.append(None if chain.q is None else chain.q[i])
            node = len(tokens) - 1
            if chain.q is None:
                known[at] = node
    ids = torch.tensor(tokens, dtype=torch.long, device=chains[0].tokens.device)
    drawn = [row for row in rows if row is not None]
    if not drawn:
        return Tree(ids, parents)
    q = F.one_hot(ids, len(drawn[0])).to(drawn[0])
    return Tree(ids, parents, torch.stack([q[i] if r is None else r for i, r in enumerate(rows)]))


def merged(*drafts: Draft) -> TreeDraft:
    """A draft of trees out of drafts of chains, the better ones first.

    Example:
        >>> from functools import partial
        >>> from fewer.inference.prompt_lookup import prompt_lookup
        >>> draft = merged(prompt_lookup, partial(prompt_lookup, longest=1))
        >>> draft(torch.tensor([1, 9, 2, 1, 3, 2, 1]), None).parents
        [-1, 0, 1, -1, 3, 4, 5, 6, 7]
    """

    def draft(text: Int[Tensor, "tokens"], generator: torch.Generator | None = None, /) -> Tree:
        return merge_chains([one(text, generator) for one in drafts])

    return draft


class TreeCache(RaggedCache):
    """A cache for one text and the nodes of a tree at its end, which do not all see each other.

    Attributes:
        tree: which nodes in the cache (columns; they are the last keys) each node that is being
            read (rows; they are the last queries) may attend to. To be set before reading them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tree: Bool[Tensor, "new nodes"] = torch.ones(0, 0, dtype=torch.bool)

    def visible(self, key_positions: Tensor, positions: Tensor) -> Tensor:
        """As `KVCache.visible` (what is earlier) for the text, as `tree` says for its nodes."""
        seen = super().visible(key_positions, positions)
        new, nodes = self.tree.shape
        if new:
            seen[..., -new:, -nodes:] = self.tree.to(seen.device)
        return seen

    def keep_path(self, path: Sequence[int]) -> None:
        """Of the tree's nodes keep those on the path; they become text."""
        nodes = self.tree.shape[1]
        kept = torch.ones_like(self.positions[0], dtype=torch.bool)
        first = kept.shape[1] - nodes
        kept[:, first:] = False
        kept[:, [first + node for node in path]] = True
        self.tree = self.tree[:0, :0]
        self.keep(kept)


class ModelTreeDraft:
    """A tree of what another model says: `widths[d]` candidates after each node at depth d.

    The expansion-based tree of the paper (section 3). The draft reads a whole level in a call, with
    the same tree attention.

    Args:
        model: of the same vocabulary as the model that judges.
        widths: 1 or more for each depth; (3, 2, 1) makes a tree of 3 + 6 + 6 nodes.
        temperature, top_p: as for `ModelDraft`. Candidates are drawn without replacement; at
            temperature 0 they are the likeliest, and sure.

    Example:
        >>> from fewer.models import tiny_llama
        >>> ModelTreeDraft(tiny_llama(), (2, 1))(torch.tensor([1, 2, 3])).parents
        [-1, -1, 0, 1]
    """

    def __init__(
        self,
        model: Llama,
        widths: Sequence[int] = (3, 2, 1),
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be 1 or more for each depth, got {tuple(widths)}")
        self.model, self.widths = model, tuple(widths)
        self.temperature, self.top_p = temperature, top_p
        self.cache = TreeCache()
        self.read = torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def __call__(
        self, text: Int[Tensor, "tokens"], generator: torch.Generator | None = None
    ) -> Tree:
        """Read what is new in the text, then grow the tree a level a call."""
        known = common_prefix(self.read.to(text.device), text[:-1])
        self.cache.crop([known])
        hidden = self.model.hidden(text[None, known:], self.cache)[:, -1:]
        tokens, rows, parents = text[:0], [], list[int]()
        level = [-1]  # the nodes after which the model has just been asked
        for depth, width in enumerate(self.widths):
            after = self.model.logits(hidden[0])
            before = len(parents)
            for node, logits in zip(level, after, strict=True):
                if self.temperature:
                    q = token_probabilities(logits, self.temperature, self.top_p)
                    drawn, drawn_from = draw_children(q, width, generator)
                    rows.append(drawn_from)
                else:
                    drawn = logits.topk(min(width, len(logits))).indices
                tokens = torch.cat([tokens, drawn])
                parents += [node] * len(drawn)
            level = list(range(before, len(parents)))
            if depth + 1 < len(self.widths):  # nobody asks what follows the last
                self.cache.tree = tree_mask(parents)[before:]
                positions = torch.full((len(level),), len(text) + depth, device=text.device)
                hidden = self.model.hidden(tokens[None, before:], self.cache, positions)
        self.cache.keep_path([])
        self.read = text
        return Tree(tokens, parents, torch.cat(rows) if rows else None)


def speculate_tree(
    model: Llama,
    tokens: Int[Tensor, "1 prompt"],
    draft: TreeDraft,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Speculation:
    """Continue one text with the help of trees; as `speculate`, and the same distribution.

    `drafted` counts nodes. `judged` and `accepted` count levels: a level is accepted if one of its
    candidates is.

    Example:
        >>> from fewer.models import generate, tiny_llama
        >>> model, prompt = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> trees = ModelTreeDraft(tiny_llama(), (2, 2))  # the model itself
        >>> done = speculate_tree(model, prompt, trees, 6)
        >>> done.tokens.equal(generate(model, prompt, 6)), done.calls.tolist()
        (True, [2])
    """
    rounds = tree_stream(
        model,
        tokens,
        draft,
        max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        stop=stop,
        generator=generator,
    )
    return collect_rounds(rounds, 1)


@torch.no_grad()
def tree_stream(
    model: Llama,
    tokens: Int[Tensor, "1 prompt"],
    draft: TreeDraft,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop: Collection[int] = (),
    generator: torch.Generator | None = None,
) -> Iterator[list[Round]]:
    """Yield what each call of the model adds; arguments and results as for `speculative_stream`.

    Raises:
        ValueError: if an argument is out of its range, or there are several rows.
    """
    require_stream_arguments(max_new_tokens, temperature, top_p)
    if len(tokens) != 1:
        raise ValueError(f"tokens must be one row, got {len(tokens)}")
    text, unread, cache = tokens[0], tokens[0], TreeCache()
    ends = len(text) + max_new_tokens
    while True:
        tree = draft(text, generator)
        cache.tree = tree_mask(tree.parents)
        depths = cache.tree.sum(1).to(text.device)
        before = torch.arange(len(text) - len(unread), len(text), device=text.device)
        hidden = model.hidden(
            torch.cat([unread, tree.tokens])[None],
            cache,
            torch.cat([before, len(text) + depths - 1]),
        )[0, len(unread) - 1 :]
        p = token_probabilities(model.logits(hidden), temperature, top_p)
        q = F.one_hot(tree.tokens, p.shape[-1]).to(p) if tree.q is None else tree.q
        u = torch.rand(len(tree.tokens), generator=generator, device=p.device)
        path, following = verify_tree(p, q, tree.tokens, tree.parents, u)
        own = torch.multinomial(following, 1, generator=generator)
        cache.keep_path(path)
        new = until_stop(torch.cat([tree.tokens[path], own])[: ends - len(text)], stop)
        text = torch.cat([text, new])
        judged = len(path) + ((path[-1] if path else -1) in tree.parents)
        yield [Round(0, len(tree.tokens), judged, len(path), new)]
        if not goes_on(text, ends, stop):
            return
        unread = new[-1:]
