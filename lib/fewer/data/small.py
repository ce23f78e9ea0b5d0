"""Two small classification sets without a download: digits as images and as curves."""

import random
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class LabelledSplit(NamedTuple):
    """Inputs (float32) and labels (int64, 0 to 9) to train on and to test on."""

    x_train: Float[Tensor, "train features"]
    y_train: Int[Tensor, "train"]
    x_test: Float[Tensor, "test features"]
    y_test: Int[Tensor, "test"]


def digits() -> LabelledSplit:
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels.

    A fixed quarter of each class is for testing.
    Each pixel is standardised with the mean and standard deviation of the training images; the
    pixels that are always blank stay zero. Source: Alpaydin & Kaynak, 1998, UCI Machine Learning
    Repository.

    Example:
        >>> x_train, y_train, x_test, y_test = digits()
        >>> x_train.shape, x_test.shape
        (torch.Size([1347, 64]), torch.Size([450, 64]))
    """
    # scikit-learn takes a second to import, so only here.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import StandardScaler

    x, y = load_digits(return_X_y=True)
    x_train, x_test, y_train, y_test = train_test_split(x, y, stratify=y, random_state=0)
    scaler = StandardScaler().fit(x_train)
    return _tensors(scaler.transform(x_train), y_train, scaler.transform(x_test), y_test)


def mnist1d(seed: int = 42) -> LabelledSplit:
    """MNIST-1D: 5,000 noisy, shifted and stretched curves of 40 points; a fifth is for testing.

    Greydanus & Kobak, "Scaling Down Deep Learning with MNIST-1D", 2020, arXiv:2011.14439. Generated
    here, not
    downloaded: the same seed gives the same set. The authors' set has the seed 42.

    Args:
        seed: between 0 and 2**32 - 1. The global random states of Python and NumPy are left as they
            were.

    Example:
        >>> x_train, y_train, x_test, y_test = mnist1d()
        >>> x_train.shape, x_test.shape
        (torch.Size([4000, 40]), torch.Size([1000, 40]))
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
    import numpy as np
    from mnist1d.data import get_dataset_args, make_dataset

    args = get_dataset_args()
    args.seed = seed
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        made = make_dataset(args)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
    return _tensors(made["x"], made["y"], made["x_test"], made["y_test"])


def _tensors(x_train, y_train, x_test, y_test) -> LabelledSplit:  # type: ignore[no-untyped-def]
    def inputs(x):  # type: ignore[no-untyped-def]
        return torch.as_tensor(x, dtype=torch.float32)

    def labels(y):  # type: ignore[no-untyped-def]
        return torch.as_tensor(y, dtype=torch.int64)

    return LabelledSplit(inputs(x_train), labels(y_train), inputs(x_test), labels(y_test))
