"""Labelled passages of State of the Union addresses: which era, or which party, do they come from?

    train, validation, test, classes = passages(load_minilm().tokenizer, "era")

The split is by address, since a passage may be recognised by its neighbours: all addresses of a
year (some presidents sent a written one besides the speech, with sentences in common) are on one
side. For the party that does not suffice. A president has one party, so whoever knows the president
by his manner and his causes knows the label, having learned nothing of parties. There all addresses
of a president are on one side. (Presidents are known by surname and party: the two Bushes count as
one, the two Roosevelts as two.)

How hard it is: accuracy on the test passages of logistic regression on tf-idf weighted words
(scikit-learn; MiniLM's tokens, defaults otherwise, the penalty chosen on the validation passages),
mean of some seeds and their extremes, beside the share of any one class.

                            share   words   from    to
    era                      25%     68%     63%    74%    5 seeds; the same with all digits made 0
    party                    50%     57%     33%    68%    10 seeds
    party, split by year     50%     56%     50%    66%    10 seeds, not offered here

So eras can be told apart, but not by a few words, nor by the years they mention. Parties hardly can
from a few words of presidents unseen: everything depends on who is in the test set, so one figure
for one seed says little. (Words alone gained nothing measurable from presidents on both sides. A
model that reads more than words might.)
"""

import random
import re
from itertools import chain, pairwise
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

from fewer.data.speeches import Speech, speeches

# Four spans of 60, 60, 57 and 60 addresses.
ERAS = ((1790, 1848), (1849, 1908), (1909, 1964), (1965, 2026))
# From Buchanan on, when the Republicans stood against the Democrats for the first time.
PARTIES, PARTIES_SINCE = ("Democratic", "Republican"), 1857

_CHARACTERS_A_TOKEN = 8  # at most, on average over a passage; English has 4 or 5


class Passages(NamedTuple):
    """Passages of equal length, in random order, with as many of each class as of any other."""

    tokens: Int[Tensor, "passages length"]  # int64, token ids
    labels: Int[Tensor, "passages"]  # int64, indices into the names of the classes
    speeches: tuple[str, ...]  # for each passage the id of its `Speech`


class PassageSplit(NamedTuple):
    """Passages to train on, to choose by and to test on, of different addresses."""

    train: Passages
    validation: Passages
    test: Passages
    classes: tuple[str, ...]


def passages(
    tokenizer: Tokenizer,
    label: Literal["era", "party"] = "era",
    length: int = 64,
    per_speech: int = 8,
    seed: int = 0,
) -> PassageSplit:
    """Draw labelled passages, three fifths to train on, a fifth each to validate and to test.

    A passage begins with a sentence and ends after `length` tokens, wherever that is: there is no
    padding. Passages do not overlap. The salutation that begins an address is left out, and so is
    the layout (all white space is one space). Two tokenizers get the same passages, cut where each
    has its `length` tokens.

    Args:
        tokenizer: of MiniLM or SmolLM2. The tokens that it puts around a text ([CLS] before and
            [SEP] after, or none) are around each passage and count.
        label: "era", four spans of years (`ERAS`), or "party", Democratic or Republican
            (addresses since 1857; Andrew Johnson, National Union, is left out).
        length: tokens of a passage.
        per_speech: passages of each address at most; a short one may have fewer. With 8 of 64
            tokens there are 1,120 + 352 + 352 passages by era. By party there are 832 + 192 + 144
            with seed 0, and other numbers with others, as presidents stayed for longer or shorter.
        seed: decides which addresses, or presidents, are on which side, and which passages are
            drawn. Python's and PyTorch's global generators are left alone.

    Raises:
        ValueError: an argument out of its range, or a length for which some class has no passage.

    Example:
        >>> from tokenizers import models, pre_tokenizers
        >>> words = Tokenizer(models.WordLevel({"the": 0, "union": 1, "?": 2}, unk_token="?"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> train, validation, test, classes = passages(words, "era", length=16, per_speech=2)
        >>> train.tokens.shape, test.labels.bincount().tolist(), classes[0]
        (torch.Size([280, 16]), [22, 22, 22, 22], '1790-1848')
    """
    if label not in ("era", "party"):
        raise ValueError(f'label must be "era" or "party", got {label!r}')
    around = tokenizer.encode("").ids
    if length <= len(around):
        raise ValueError(f"length must be more than {len(around)}, got {length}")
    if per_speech < 1:
        raise ValueError(f"per_speech must be 1 or more, got {per_speech}")

    classes = _by_era() if label == "era" else _by_party()
    rng = random.Random(seed)
    parts: list[list[list[_Row]]] = [[], [], []]  # for each part and class its rows
    for i, groups in enumerate(classes.values()):
        for part, side in zip(parts, _sides(groups, rng), strict=True):
            rows = [
                (row, i, speech.id)
                for speech in side
                for row in _rows(speech, tokenizer, length, per_speech, seed)
            ]
            if not rows:
                raise ValueError(f"length must be shorter than most addresses, got {length}")
            part.append(rows)
    train, validation, test = (_balanced(part, rng) for part in parts)
    return PassageSplit(train, validation, test, tuple(classes))


_Row = tuple[list[int], int, str]  # token ids, label, id of the speech
_Groups = dict[object, list[Speech]]  # addresses that must stay together


def _by_era() -> dict[str, _Groups]:
    """For each era its addresses, those of a year together."""
    return {
        f"{first}-{last}": _grouped([s for s in speeches() if first <= s.year <= last], "year")
        for first, last in ERAS
    }


def _by_party() -> dict[str, _Groups]:
    """For each party its addresses, those of a president together."""
    recent = [s for s in speeches() if s.year >= PARTIES_SINCE]
    return {
        party: _grouped([s for s in recent if s.party == party], "president") for party in PARTIES
    }


def _grouped(members: list[Speech], field: str) -> _Groups:
    groups: _Groups = {}
    for speech in members:
        groups.setdefault(getattr(speech, field), []).append(speech)
    return groups


def _sides(groups: _Groups, rng: random.Random) -> tuple[list[Speech], list[Speech], list[Speech]]:
    """Addresses to train, validate and test on: a fifth of the groups each for the latter two."""
    shuffled = rng.sample(list(groups.values()), len(groups))
    fifth = round(len(groups) / 5)
    test, validation, train = shuffled[:fifth], shuffled[fifth : 2 * fifth], shuffled[2 * fifth :]
    return list(chain(*train)), list(chain(*validation)), list(chain(*test))


def _rows(
    speech: Speech, tokenizer: Tokenizer, length: int, per_speech: int, seed: int
) -> list[list[int]]:
    """At most `per_speech` passages of one address, of `length` tokens each."""
    # Cut the text into stretches that are long enough, so that only those drawn are tokenized.
    text = " ".join(speech.text.split())
    starts = [0]
    for sentence in re.finditer(r"(?<=[.?!] )(?=[A-Z])", text):
        if sentence.start() - starts[-1] >= _CHARACTERS_A_TOKEN * length:
            starts.append(sentence.start())
    stretches = [text[start:end] for start, end in pairwise(starts[1:])]

    around = tokenizer.encode("").ids
    rows: list[list[int]] = []
    for stretch in random.Random(f"{seed} {speech.id}").sample(stretches, len(stretches)):
        ids = tokenizer.encode(stretch, add_special_tokens=False).ids[: length - len(around)]
        row = around[:1] + ids + around[1:]
        if len(row) == length:
            rows.append(row)
        if len(rows) == per_speech:
            break
    return rows


def _balanced(classes: list[list[_Row]], rng: random.Random) -> Passages:
    """As many rows of each class as the smallest has, shuffled."""
    fewest = min(len(rows) for rows in classes)
    rows = [row for of_class in classes for row in rng.sample(of_class, fewest)]
    tokens, labels, ids = zip(*rng.sample(rows, len(rows)), strict=True)
    return Passages(torch.tensor(tokens), torch.tensor(labels), ids)
