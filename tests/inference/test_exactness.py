"""Speculation has the model's distribution: every draw is replaced by all its outcomes.

No sampling here. A call of speculation is run once for each combination of what its draws
(`torch.multinomial`) and its acceptances (`torch.rand(...) < a`) can give, with its probability.
The sum over all runs must be the model's own distribution of texts. Given that for one call, it
follows for all, if the calls fit together; small cases are enumerated from end to end.
"""

import itertools
from functools import partial

import pytest
import torch

from fewer.inference.early_exit import early_exit
from fewer.inference.model_draft import ModelDraft
from fewer.inference.ngram import NGramDraft
from fewer.inference.prompt_lookup import prompt_lookup
from fewer.inference.specinfer import (
    ModelTreeDraft,
    Tree,
    merged,
    speculate_tree,
    tree_stream,
)
from fewer.inference.speculative import Proposal, speculate, speculative_stream
from fewer.models import tiny_llama, token_probabilities

SAMPLINGS = [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (0.0, 1.0)]


class Chance:
    """Takes one branch after the other wherever something random is decided."""

    def __init__(self):
        self.plan = []  # (branch taken, number of branches) of each decision, in order

    def choose(self, probabilities):
        """The branch to take now; the weight of the run takes its probability."""
        possible = [i for i, w in enumerate(probabilities) if w > 0]
        if self.at == len(self.plan):
            self.plan.append((0, len(possible)))
        branch = possible[self.plan[self.at][0]]
        self.at += 1
        self.weight *= probabilities[branch]
        return branch

    def runs(self, run):
        """(probability, result) of every possible run."""
        while True:
            self.at, self.weight = 0, 1.0
            result = run()
            yield self.weight, result
            while self.plan and self.plan[-1][0] + 1 == self.plan[-1][1]:
                self.plan.pop()
            if not self.plan:
                return
            taken, branches = self.plan.pop()
            self.plan.append((taken + 1, branches))

    def multinomial(self, p, n, replacement=False, *, generator=None):
        assert n == 1
        if p.ndim == 2:
            return torch.stack([self.multinomial(row, 1) for row in p])
        p = p.double()
        return torch.tensor([self.choose((p / p.sum()).tolist())])

    def rand(self, n, generator=None, device=None):
        return Uniform(self, n)


class Uniform:
    """n uniform numbers that nobody has looked at; all one can do is ask whether they are < a."""

    def __init__(self, chance, n):
        self.chance, self.n = chance, n

    def __getitem__(self, index):
        return Uniform(self.chance, len(index) if isinstance(index, list) else None)

    def __lt__(self, a):
        if self.n is None:
            return self.chance.choose([float(a), 1 - float(a)]) == 0
        return torch.tensor([self.chance.choose([x, 1 - x]) == 0 for x in a.double().tolist()])


def texts_of_chance(monkeypatch, run):
    """The probability of each result of `run`, a tuple of texts."""
    chance, found = Chance(), {}
    with monkeypatch.context() as patched:
        patched.setattr(torch, "multinomial", chance.multinomial)
        patched.setattr(torch, "rand", chance.rand)
        for weight, rows in chance.runs(run):
            texts = tuple(tuple(row.tolist()) for row in rows)
            found[texts] = found.get(texts, 0.0) + weight
    return found


def model_says(model, prompt, n, temperature, top_p):
    """The probability of each possible text of n tokens after the prompt."""
    texts = list(itertools.product(range(model.config.vocab_size), repeat=n))
    whole = torch.cat([prompt.repeat(len(texts), 1), torch.tensor(texts)], 1)
    p = token_probabilities(model(whole)[:, -n - 1 : -1], temperature, top_p).double()
    weights = p.gather(2, whole[:, -n:, None])[..., 0].prod(1).tolist()
    return {text: weight for text, weight in zip(texts, weights, strict=True) if weight}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for text, weight in expected.items():
        assert found[text] == pytest.approx(weight, abs=2e-6)


def assert_first_call_is_exact(monkeypatch, model, stream, n, temperature, top_p):
    """What the first call says, gone on with by the model alone, is distributed as the model."""
    found = {}
    said = texts_of_chance(monkeypatch, lambda: [next(stream())[0].tokens])
    for (text,), weight in said.items():
        if len(text) >= n:
            rest = {(): 1.0}
        else:
            prompt = torch.cat([PROMPT, torch.tensor([text])], 1)
            rest = model_says(model, prompt, n - len(text), temperature, top_p)
        for more, share in rest.items():
            whole = (text + more)[:n]
            found[whole] = found.get(whole, 0.0) + weight * share
    assert_same(found, model_says(model, PROMPT, n, temperature, top_p))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=2, vocab_size=3, n_layers=2).requires_grad_(False)


PROMPT = torch.tensor([[0, 1, 2, 0, 1, 1, 2, 0]])


def skewed(text, generator):
    """Draws from fixed distributions, one of which has a zero."""
    q = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.3, 0.6]])
    return Proposal(torch.multinomial(q, 1, generator=generator)[:, 0], q)


def now_and_then(text, generator):
    """Proposes nothing after token 1, and sure tokens otherwise."""
    return Proposal(text[-2:] if text[-1] != 1 else text[:0])


CHAINS = {
    "fixed distributions": lambda model: skewed,
    "lookup": lambda model: partial(prompt_lookup, length=2),
    "now and then": lambda model: now_and_then,
    "n-grams": lambda model: NGramDraft(2, 2, vocab=3, greedy=False),
    "another model": lambda model: ModelDraft(tiny_llama(seed=4, vocab_size=3, n_layers=1), 2, 1.0),
    "early exit, top-p": lambda model: ModelDraft(early_exit(model, 1), 2, 1.2, 0.8),
}


@pytest.mark.parametrize(("temperature", "top_p"), SAMPLINGS)
@pytest.mark.parametrize("name", CHAINS)
def test_a_call_of_speculation_has_exactly_the_models_distribution(
    monkeypatch, model, name, temperature, top_p
):
    def stream():
        draft = CHAINS[name](model)
        return speculative_stream(model, PROMPT, draft, 3, temperature=temperature, top_p=top_p)

    assert_first_call_is_exact(monkeypatch, model, stream, 3, temperature, top_p)


@pytest.mark.parametrize(("temperature", "top_p"), SAMPLINGS)
@pytest.mark.parametrize("name", ["fixed distributions", "now and then", "n-grams"])
def test_all_calls_together_have_exactly_the_models_distribution(
    monkeypatch, model, name, temperature, top_p
):
    def run():
        draft = CHAINS[name](model)
        return speculate(model, PROMPT, draft, 2, temperature=temperature, top_p=top_p).tokens

    found = {text: w for (text,), w in texts_of_chance(monkeypatch, run).items()}
    assert_same(found, model_says(model, PROMPT, 2, temperature, top_p))


def test_rows_of_a_batch_have_exactly_their_own_independent_distributions(monkeypatch):
    model = tiny_llama(seed=3, vocab_size=2, n_layers=1).requires_grad_(False)
    prompt = torch.tensor([[0, 1, 0], [1, 1, 0]])

    def one(text, generator):
        q = torch.tensor([[0.4, 0.6]])
        return Proposal(torch.multinomial(q, 1, generator=generator)[:, 0], q)

    def run():
        return speculate(model, prompt, [one, now_and_then], 2, temperature=1.0).tokens

    first, second = (model_says(model, row[None], 2, 1.0, 1.0) for row in prompt)
    both = {(a, b): first[a] * second[b] for a in first for b in second}
    assert_same(texts_of_chance(monkeypatch, run), both)


def siblings(text, generator):
    """Two candidates, drawn independently from different distributions, and a sure one after."""
    q = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6]])
    drawn = torch.multinomial(q, 1, generator=generator)[:, 0]
    sure = torch.tensor([2])
    rows = torch.cat([q, torch.tensor([[0.0, 0.0, 1.0]])])
    return Tree(torch.cat([drawn, sure]), [-1, -1, 1], rows)


def without_replacement(model):
    return ModelTreeDraft(tiny_llama(seed=4, vocab_size=3, n_layers=1), (2, 1), 1.0)


TREES = {
    "siblings": lambda model: siblings,
    "sure siblings": lambda model: lambda text, g: Tree(torch.tensor([1, 2, 0, 1]), [-1, -1, 0, 0]),
    "all tokens": lambda model: lambda text, g: Tree(torch.arange(3), [-1] * 3),
    "nothing": lambda model: lambda text, g: Tree(text[:0], []),
    "without replacement": without_replacement,
    "top-p": lambda model: ModelTreeDraft(early_exit(model, 1), (2, 1), 1.0, 0.6),
    "the likeliest": lambda model: ModelTreeDraft(early_exit(model, 1), (2, 2)),
    "merged lookups": lambda model: merged(
        partial(prompt_lookup, length=2), partial(prompt_lookup, length=2, longest=1)
    ),
    "merged, drawn and sure": lambda model: merged(
        lambda text, generator: Proposal(*(x[:1] for x in skewed(text, generator))),
        partial(prompt_lookup, length=1),
        lambda text, generator: Proposal(*(x[:1] for x in skewed(text, generator))),
    ),
}


@pytest.mark.parametrize(("temperature", "top_p"), SAMPLINGS)
@pytest.mark.parametrize("name", TREES)
def test_a_call_on_a_tree_has_exactly_the_models_distribution(
    monkeypatch, model, name, temperature, top_p
):
    def stream():
        draft = TREES[name](model)
        return tree_stream(model, PROMPT, draft, 3, temperature=temperature, top_p=top_p)

    assert_first_call_is_exact(monkeypatch, model, stream, 3, temperature, top_p)


def test_all_calls_on_trees_together_have_exactly_the_models_distribution(monkeypatch, model):
    def run():
        return speculate_tree(model, PROMPT, siblings, 2, temperature=1.0, top_p=0.9).tokens

    found = {text: w for (text,), w in texts_of_chance(monkeypatch, run).items()}
    assert_same(found, model_says(model, PROMPT, 2, 1.0, 0.9))


def test_leaving_out_an_unlikely_draw_changes_the_distribution(monkeypatch, model):
    """The harness sees the commonest mistake: a draft that keeps a drawn token only if it likes it.

    The tokens that are left in are not distributed as q.
    """

    def picky(text, generator):
        tokens, q = skewed(text, generator)
        k = 1 if tokens[0] == 0 else 0
        return Proposal(tokens[:k], q[:k])

    def stream():
        return speculative_stream(model, PROMPT, picky, 2, temperature=1.0)

    with pytest.raises(AssertionError):
        assert_first_call_is_exact(monkeypatch, model, stream, 2, 1.0, 1.0)
