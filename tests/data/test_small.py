import pickle
import random

import numpy as np
import pytest
import torch

from fewer.data import digits, mnist1d


@pytest.fixture(scope="module", params=[digits, mnist1d])
def made(request):
    """A function that makes a set, and a set it has made."""
    return request.param, request.param()


def test_types_and_sizes_agree_and_every_class_is_on_both_sides(made):
    x_train, y_train, x_test, y_test = made[1]
    assert x_train.dtype == x_test.dtype == torch.float32
    assert y_train.dtype == y_test.dtype == torch.int64
    assert len(x_train) == len(y_train)
    assert len(x_test) == len(y_test)
    assert x_train.shape[1:] == x_test.shape[1:]
    assert set(y_train.tolist()) == set(y_test.tolist()) == set(range(10))


def test_the_same_call_gives_the_same_bits(made):
    assert all(a.equal(b) for a, b in zip(made[0](), made[1], strict=True))


def test_digits_are_standardised_by_the_training_images_alone():
    x_train, _, x_test, _ = digits()
    torch.testing.assert_close(x_train.mean(0), torch.zeros(64), atol=1e-5, rtol=0.0)
    deviation = x_train.std(0, correction=0)
    blank = deviation == 0
    assert 0 < blank.sum() < 10
    assert (x_train[:, blank] == 0).all()
    torch.testing.assert_close(
        deviation[~blank], torch.ones(int((~blank).sum())), atol=1e-4, rtol=0
    )
    assert (x_test.mean(0).abs() > 1e-3).any()
    assert x_test.isfinite().all()


def test_no_image_is_in_both_halves():
    x_train, _, x_test, _ = digits()
    assert torch.cdist(x_test, x_train).min() > 0


def test_the_labels_belong_to_the_inputs(made):
    """Nearest class mean: far above the 10% of shuffled labels."""
    x_train, y_train, x_test, y_test = made[1]
    means = torch.stack([x_train[y_train == c].mean(0) for c in range(10)])
    accuracy = (torch.cdist(x_test, means).argmin(1) == y_test).float().mean()
    assert accuracy > (0.85 if made[0] is digits else 0.2)


def test_another_seed_gives_other_curves():
    assert not mnist1d(1).x_train.equal(mnist1d(2).x_train)


def test_curves_are_made_silently_and_leave_the_global_random_states_alone(capfd):
    before = random.getstate(), pickle.dumps(np.random.get_state())  # noqa: NPY002
    mnist1d(0)
    assert (random.getstate(), pickle.dumps(np.random.get_state())) == before  # noqa: NPY002
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match=f"seed must be between 0 and 2.*got {seed}"):
        mnist1d(seed)
