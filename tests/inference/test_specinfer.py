"""Trees of drafts: what their nodes see, how they are judged, what is kept of them."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fewer.inference.early_exit import early_exit
from fewer.inference.model_draft import ModelDraft
from fewer.inference.prompt_lookup import prompt_lookup
from fewer.inference.specinfer import (
    ModelTreeDraft,
    Tree,
    TreeCache,
    draw_children,
    merge_chains,
    merged,
    speculate_tree,
    tree_mask,
    tree_stream,
    verify_candidates,
    verify_tree,
)
from fewer.inference.speculative import Proposal, speculate, verify_draft
from fewer.models import KVCache, generate, tiny_llama, token_probabilities

TOLERANCE = {"atol": 1e-4, "rtol": 1e-3}
trees = st.integers(0, 8).flatmap(
    lambda n: st.tuples(*(st.integers(-1, i - 1) for i in range(n))).map(list)
)
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def branch(parents, node):
    """The nodes from the text down to `node`."""
    path = []
    while node >= 0:
        path.insert(0, node)
        node = parents[node]
    return path


@given(trees)
def test_a_node_sees_its_ancestors_and_itself(parents):
    mask = tree_mask(parents)
    for node in range(len(parents)):
        assert mask[node].nonzero()[:, 0].tolist() == branch(parents, node)


def test_parents_come_before_their_children():
    with pytest.raises(ValueError, match=r"parents\[1\] must be between -1 and 0, got 1"):
        tree_mask([-1, 1])
    with pytest.raises(ValueError, match=r"parents\[0\] must be between -1 and -1, got -2"):
        tree_mask([-2])


def read_tree(model, cache, text, tokens, parents):
    """The last token of the text and the tree, in one call, after the text's beginning."""
    model(text[None, :-1], cache)
    cache.tree = tree_mask(parents)
    positions = torch.cat([torch.tensor([len(text) - 1]), len(text) - 1 + cache.tree.sum(1)])
    return model(torch.cat([text[-1:], tokens])[None], cache, positions)[0]


@given(trees, st.sampled_from([1, 2, 4]))
@settings(max_examples=25)
def test_one_call_on_a_tree_gives_the_logits_of_every_branch_read_alone(parents, kv_heads):
    model, text = tiny_llama(n_kv_heads=kv_heads), PROMPT[0]
    tokens = torch.randint(64, (len(parents),), generator=torch.Generator().manual_seed(0))
    logits = read_tree(model, TreeCache(), text, tokens, parents)
    for node in range(-1, len(parents)):
        whole = torch.cat([text, tokens[branch(parents, node)]])
        torch.testing.assert_close(logits[node + 1], model(whole[None])[0, -1], **TOLERANCE)


@given(trees, st.data())
@settings(max_examples=25)
def test_of_the_keys_those_of_the_accepted_path_are_kept(parents, data):
    model, text, cache = tiny_llama(), PROMPT[0], TreeCache()
    tokens = torch.randint(64, (len(parents),), generator=torch.Generator().manual_seed(0))
    read_tree(model, cache, text, tokens, parents)
    path = branch(parents, data.draw(st.integers(-1, len(parents) - 1)))
    cache.keep_path(path)
    whole = torch.cat([text, tokens[path]])
    following = torch.tensor([[7, 8, 9]])
    assert cache.next_position.tolist() == [[len(whole)]]
    after = model(following, cache)
    torch.testing.assert_close(
        after[0], model(torch.cat([whole[None], following], 1))[0, -3:], **TOLERANCE
    )
    cache.compact()
    dense = KVCache()
    model(torch.cat([whole[None], following], 1), dense)
    for layer in range(2):
        torch.testing.assert_close(cache.keys[layer], dense.keys[layer], **TOLERANCE)
        torch.testing.assert_close(cache.values[layer], dense.values[layer], **TOLERANCE)


def distributions(seed, *shape):
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.sum(-1, keepdim=True)


@given(st.integers(0, 10_000))
@settings(max_examples=30)
def test_a_chain_is_judged_as_a_draft(seed):
    p, q = distributions(seed, 5, 4), distributions(seed + 1, 4, 4)
    g = torch.Generator().manual_seed(seed)
    tokens, u = torch.randint(4, (4,), generator=g), torch.rand(4, generator=g)
    path, following = verify_tree(p, q, tokens, [-1, 0, 1, 2], u)
    accepted, expected = verify_draft(p, q, tokens, u)
    assert path == list(range(accepted))
    torch.testing.assert_close(following, expected)


def test_a_candidate_is_judged_by_what_the_rejected_ones_left_over():
    p = torch.tensor([0.5, 0.3, 0.2])
    q = F.one_hot(torch.tensor([0, 1, 2]), 3).float()
    tokens = torch.arange(3)
    # 1 is accepted with 0.3 / 0.5, not with 0.3; and the last candidate surely.
    assert verify_candidates(p, q, tokens, torch.tensor([0.6, 0.55, 0.0]))[0] == 1
    assert verify_candidates(p, q, tokens, torch.tensor([0.6, 0.65, 0.99]))[0] == 2
    index, rest = verify_candidates(p, q[:1], tokens[:1], torch.tensor([0.6]))
    assert index is None
    torch.testing.assert_close(rest, torch.tensor([0.0, 0.6, 0.4]))
    assert verify_candidates(p, q[:0], tokens[:0], torch.zeros(0))[1].equal(p)


def test_a_walk_follows_the_accepted_child_not_its_sibling():
    # Node 1 is accepted; node 2 is the child of node 0, node 3 that of node 1.
    p = F.one_hot(torch.tensor([5, 0, 2, 0, 7]), 8).float()
    tokens, parents = torch.tensor([4, 5, 2, 2]), [-1, -1, 0, 1]
    q = F.one_hot(tokens, 8).float()
    path, following = verify_tree(p, q, tokens, parents, torch.full((4,), 0.5))
    assert path == [1, 3]
    assert following.argmax() == 7


def test_candidates_are_drawn_without_replacement():
    q, g = torch.tensor([0.1, 0.0, 0.6, 0.3]), torch.Generator().manual_seed(0)
    firsts = torch.zeros(4)
    for _ in range(300):
        tokens, rows = draw_children(q, 2, g)
        firsts[tokens[0]] += 1
        assert tokens[0] != tokens[1]
        assert rows[0].equal(q)
        rest = q.clone()
        rest[tokens[0]] = 0
        torch.testing.assert_close(rows[1], rest / rest.sum())
    assert (firsts / 300 - q).abs().max() < 0.1
    assert len(draw_children(q, 9)[0]) == 3  # no more are possible


def test_sure_chains_share_their_beginnings_and_drawn_ones_do_not():
    q = torch.full((2, 9), 1 / 9)
    a, b = torch.tensor([1, 2]), torch.tensor([1, 3])
    sure = merge_chains([Proposal(a), Proposal(b), Proposal(a)])
    assert (sure.tokens.tolist(), sure.parents, sure.q) == ([1, 2, 3], [-1, 0, 0], None)
    mixed = merge_chains([Proposal(a, q), Proposal(a, q), Proposal(b)])
    assert mixed.tokens.tolist() == [1, 2, 1, 2, 1, 3]
    assert mixed.parents == [-1, 0, -1, 2, -1, 4]
    assert mixed.q[:4].equal(q.repeat(2, 1))
    assert mixed.q[4:].equal(F.one_hot(b, 9).float())
    empty = merge_chains([Proposal(a[:0])])
    assert (empty.tokens.tolist(), empty.parents) == ([], [])


@pytest.mark.parametrize("widths", [(1,), (3,), (2, 3), (3, 2, 1)])
def test_a_tree_of_a_model_has_its_likeliest_tokens_after_every_node(widths):
    model, text = tiny_llama(seed=5), PROMPT[0]
    draft = ModelTreeDraft(model, widths)
    tree = draft(text)
    size = sum(torch.tensor(widths).cumprod(0).tolist())
    assert len(tree.tokens) == len(tree.parents) == size
    depths = tree_mask(tree.parents).sum(1)
    for node in range(-1, size):
        children = [i for i, parent in enumerate(tree.parents) if parent == node]
        depth = int(depths[node]) if node >= 0 else 0
        assert len(children) == (widths[depth] if depth < len(widths) else 0)
        if children:
            whole = torch.cat([text, tree.tokens[branch(tree.parents, node)]])
            likeliest = model(whole[None])[0, -1].topk(len(children)).indices
            assert tree.tokens[children].equal(likeliest)
    # Asked about a text that goes on otherwise, it has forgotten the tree.
    other = torch.cat([text, torch.tensor([11, 12])])
    assert draft(other).tokens.equal(ModelTreeDraft(model, widths)(other).tokens)
    assert draft(text[:4]).tokens.equal(ModelTreeDraft(model, widths)(text[:4]).tokens)


def test_a_drawn_tree_reports_what_its_nodes_were_drawn_from():
    model, text = tiny_llama(seed=5, vocab_size=7), PROMPT[0] % 7
    tree = ModelTreeDraft(model, (3, 2), 0.9, 0.95)(text, torch.Generator().manual_seed(1))
    for node in range(-1, 3):
        children = [i for i, parent in enumerate(tree.parents) if parent == node]
        whole = torch.cat([text, tree.tokens[branch(tree.parents, node)]])
        q = token_probabilities(model(whole[None])[0, -1], 0.9, 0.95)
        for child in children:
            torch.testing.assert_close(tree.q[child], q, **TOLERANCE)
            q = q.index_fill(0, tree.tokens[child], 0.0)
            q = q / q.sum()


DRAFTS = {
    "the likeliest of another model": lambda m: ModelTreeDraft(tiny_llama(seed=5), (3, 2)),
    "drawn from an early exit": lambda m: ModelTreeDraft(early_exit(m, 1), (3, 2), 1.0, 0.9),
    "merged": lambda m: merged(prompt_lookup, ModelDraft(early_exit(m, 1), 3), ModelDraft(m, 2)),
    "nothing": lambda m: lambda text, generator: Tree(text[:0], []),
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("stopping", [False, True])
def test_greedy_output_of_trees_equals_generate(name, stopping):
    model = tiny_llama()
    stop = [int(generate(model, PROMPT, 9)[0, 8])] if stopping else []
    plain = generate(model, PROMPT, 25, stop=stop)
    done = speculate_tree(model, PROMPT, DRAFTS[name](model), 25, stop=stop)
    assert done.tokens.equal(plain)
    assert done.lengths.tolist() == [plain.shape[1]]
    if name == "merged" and not stopping:
        assert done.calls[0] <= 9  # the model's own two tokens are always in the tree


def test_a_tree_accepts_where_a_chain_is_wrong():
    model = tiny_llama()
    plain = generate(model, PROMPT, 20)
    whole = torch.cat([PROMPT, plain], 1)[0]

    def second_is_right(text, generator=None):
        right = whole[len(text) : len(text) + 1]
        return Tree(torch.cat([(right + 1) % 64, right]), [-1] * (2 * len(right)))

    done = speculate_tree(model, PROMPT, second_is_right, 20)
    assert done.tokens.equal(plain)
    assert done.calls.tolist() == [10]
    assert done.acceptance == 1
    assert done.drafted.tolist() == [20]


def test_a_tree_of_width_1_does_what_the_chain_does():
    model, other = tiny_llama(), tiny_llama(seed=0, n_layers=1)
    chain = speculate(model, PROMPT, ModelDraft(other, 3), 20)
    tree = speculate_tree(model, PROMPT, ModelTreeDraft(other, (1, 1, 1)), 20)
    for ours, theirs in zip(tree, chain, strict=True):
        assert ours.equal(theirs)


def test_bad_arguments_are_named():
    model = tiny_llama()
    with pytest.raises(ValueError, match="tokens must be one row, got 2"):
        next(tree_stream(model, PROMPT.repeat(2, 1), merged(prompt_lookup), 3))
    with pytest.raises(ValueError, match="top_p"):
        next(tree_stream(model, PROMPT, merged(prompt_lookup), 3, top_p=0.0))
    with pytest.raises(ValueError, match=r"widths must be 1 or more for each depth, got \(2, 0\)"):
        ModelTreeDraft(model, (2, 0))
