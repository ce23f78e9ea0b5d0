import pytest
import torch
from torch import nn

from fewer.models import Classifier, tiny_bert, tiny_llama

BODIES = [tiny_bert, tiny_llama]


@pytest.fixture
def tokens():
    return torch.randint(64, (4, 9), generator=torch.Generator().manual_seed(1))


def classifier(body):
    head = nn.Linear(16, 3)
    nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(0))
    return Classifier(body(), head)


def test_features_are_the_mean_over_tokens_or_the_last_token(tokens):
    bert, llama = classifier(tiny_bert), classifier(tiny_llama)
    by_hand = sum(bert.body(tokens)[:, i] for i in range(9)) / 9
    torch.testing.assert_close(bert.features(tokens), by_hand)
    # The last token's features give its logits, as they do in the language model.
    logits = llama.body.logits(llama.features(tokens))
    torch.testing.assert_close(logits, llama.body(tokens)[:, -1])


@pytest.mark.parametrize("body", BODIES)
def test_each_text_is_classified_by_itself_and_by_all_of_its_tokens(body, tokens):
    model = classifier(body)
    logits = model(tokens)
    assert logits.shape == (4, 3)
    alone = torch.cat([model(row[None]) for row in tokens])
    torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)
    for place in range(9):
        changed = tokens.clone()
        changed[:, place] = (changed[:, place] + 1) % 64
        assert ((model(changed) - logits).abs().amax(1) > 1e-5).all(), place


@pytest.mark.parametrize("body", BODIES)
def test_logits_are_the_head_of_the_features(body, tokens):
    model = classifier(body)
    expected = model.features(tokens) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(tokens), expected)


@pytest.mark.parametrize("body", BODIES)
def test_names_begin_with_body_and_head(body):
    ours, theirs = dict(classifier(body).named_parameters()), dict(body().named_parameters())
    assert set(ours) == {f"body.{name}" for name in theirs} | {"head.weight", "head.bias"}


def test_another_body_is_refused():
    with pytest.raises(TypeError, match="body must be a Bert or a Llama, got Linear"):
        Classifier(nn.Linear(2, 2), nn.Linear(2, 2))
