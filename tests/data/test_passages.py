"""Passages of addresses with a small tokenizer of words; no model is needed."""

import random
import re
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from fewer.data import ERAS, PARTIES_SINCE, passages, speeches

SPEECH = {speech.id: speech for speech in speeches()}


@pytest.fixture(scope="module")
def words():
    """A tokenizer that knows every word and mark of the addresses, and puts nothing around them."""
    vocabulary = {word for s in speeches() for word in re.findall(r"\w+|[^\w\s]+", s.text)}
    ids = {word: i for i, word in enumerate(["[CLS]", "[SEP]", "?!", *sorted(vocabulary)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="?!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.fixture(scope="module", params=["era", "party"])
def drawn(request, words):
    """A label and the split that it gives."""
    return request.param, passages(words, request.param)


def class_of(label, speech):
    if label == "party":
        return speech.party if speech.year >= PARTIES_SINCE else None
    return next(f"{first}-{last}" for first, last in ERAS if first <= speech.year <= last)


def text_of(tokenizer, row):
    return " ".join(tokenizer.id_to_token(i) for i in row)


def test_shapes_types_and_equal_numbers_of_every_class(drawn):
    for part in drawn[1][:3]:
        n = len(part.labels)
        assert part.tokens.shape == (n, 64)
        assert part.tokens.dtype == part.labels.dtype == torch.int64
        assert len(part.speeches) == n
        counts = part.labels.bincount()
        assert len(counts) == len(drawn[1].classes)
        assert (counts == counts[0]).all()
    train, validation, test = (len(part.labels) for part in drawn[1][:3])
    assert train > validation + test
    assert min(validation, test) > 0.1 * train


def test_a_label_is_that_of_the_address_and_the_passage_is_in_it(drawn, words):
    label, split = drawn
    for part in split[:3]:
        for y, name in zip(part.labels.tolist(), part.speeches, strict=True):
            assert split.classes[y] == class_of(label, SPEECH[name])
        for row, name in list(zip(part.tokens.tolist(), part.speeches, strict=True))[:20]:
            whole = " ".join(re.findall(r"\w+|[^\w\s]+", SPEECH[name].text))
            passage = text_of(words, row)
            assert passage[0].isupper()
            assert whole.index(passage) > 0  # in it, and not its first words


def test_no_year_is_on_two_sides_by_era_and_no_president_by_party(drawn):
    label, split = drawn
    sides = [
        {
            SPEECH[name].year if label == "era" else (SPEECH[name].president, SPEECH[name].party)
            for name in part.speeches
        }
        for part in split[:3]
    ]
    assert all(sides)
    assert len(set.union(*sides)) == sum(map(len, sides))
    if label == "party":  # more than one president of each party to learn from
        assert min(Counter(party for _, party in sides[0]).values()) > 1


def test_no_passage_is_there_twice_and_none_overlaps_another(drawn, words):
    rows = [row for part in drawn[1][:3] for row in part.tokens.tolist()]
    assert len({tuple(row) for row in rows}) == len(rows)
    sentences = Counter(
        sentence
        for row in rows
        for sentence in set(text_of(words, row).split(" . "))
        if len(sentence) > 120
    )
    # A few sentences are said again by later presidents, word by word; overlaps would be hundreds.
    assert sum(n > 1 for n in sentences.values()) < 5


def test_no_address_gives_more_than_per_speech(words):
    split = passages(words, per_speech=3)
    counts = Counter(name for part in split[:3] for name in part.speeches)
    assert max(counts.values()) == 3
    assert len(counts) > 200


def test_rows_are_shuffled_so_that_the_first_few_are_of_every_class(drawn):
    for part in drawn[1][:3]:
        assert len(set(part.labels[:40].tolist())) == len(drawn[1].classes)


def test_the_same_seed_draws_the_same_and_leaves_the_global_generators_alone(drawn, words):
    label, first = drawn
    states = random.getstate(), torch.get_rng_state()
    again = passages(words, label)
    other = passages(words, label, seed=1)
    assert random.getstate() == states[0]
    assert torch.get_rng_state().equal(states[1])
    for a, b in zip(first[:3], again[:3], strict=True):
        assert a.tokens.equal(b.tokens)
        assert a.labels.equal(b.labels)
        assert a.speeches == b.speeches
    assert set(other.test.speeches) != set(first.test.speeches)


def test_special_tokens_go_around_every_passage_and_count(words):
    plain = passages(words, length=14, per_speech=2)
    with_special = Tokenizer.from_str(words.to_str())
    with_special.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    around = passages(with_special, length=16, per_speech=2)
    for a, b in zip(plain[:3], around[:3], strict=True):
        assert (b.tokens[:, 0] == 0).all()
        assert (b.tokens[:, -1] == 1).all()
        assert (b.tokens[:, 1:-1] > 1).all()
        assert b.tokens.shape[1] == a.tokens.shape[1] + 2


def test_two_tokenizers_get_the_same_passages(words):
    letters = Tokenizer(models.WordLevel({"?!": 0}, unk_token="?!"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    a, b = passages(words, per_speech=2), passages(letters, per_speech=2)
    for one, other in zip(a[:3], b[:3], strict=True):
        assert one.speeches == other.speeches
        assert one.labels.equal(other.labels)


@pytest.mark.parametrize("label", ["era", "party"])
def test_words_tell_eras_apart_though_not_fully_and_parties_hardly(words, label):
    """Naive Bayes. Labels that belong to other passages would give 25%."""
    split = passages(words, label)
    counts = torch.zeros(len(split.classes), words.get_vocab_size())
    for y, row in zip(split.train.labels, split.train.tokens, strict=True):
        counts[y] += row.bincount(minlength=counts.shape[1])
    log_p = (counts + 0.5).log() - (counts + 0.5).sum(1, keepdim=True).log()
    guesses = log_p[:, split.test.tokens].sum(-1).argmax(0)
    accuracy = (guesses == split.test.labels).float().mean()
    low, high = (0.5, 0.8) if label == "era" else (0.3, 0.75)
    assert low < accuracy < high


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": "president"}, "label must be .*got 'president'"),
        ({"length": 0}, "length must be more than 0, got 0"),
        ({"per_speech": 0}, "per_speech must be 1 or more, got 0"),
        ({"length": 10_000}, "length must be shorter than most addresses, got 10000"),
    ],
)
def test_wrong_arguments_are_refused_by_name(words, arguments, message):
    with pytest.raises(ValueError, match=message):
        passages(words, **arguments)
