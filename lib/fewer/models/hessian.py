"""What calibration data says about a layer's inputs: its Hessian, and the Cholesky factor of the
inverse that GPTQ and SparseGPT walk along.

Hassibi & Stork 1992, "Second order derivatives for network pruning: Optimal Brain Surgeon";
Frantar & Alistarh 2022, "Optimal Brain Compression" (arXiv 2208.11580), section 3; Frantar et al.
2023, "GPTQ" (arXiv 2210.17323), step 3. A linear layer with inputs X [tokens, in] and weights W
[out, in], changed by dW, has the output error

    ||X dW^T||^2 = tr(dW H dW^T),    H = X^T X

a quadratic form with the same H for every row of W. (The papers write H = 2 X X^T; the factor
cancels in every formula.) If weight j of a row must change by -(w_j - q_j), the best change of the
weights F after it, and what the change then costs, are

    dw_F = -(w_j - q_j) / [H_F^-1]_jj * [H_F^-1]_j,:        (w_j - q_j)^2 / [H_F^-1]_jj

where H_F keeps the rows and columns j, j+1, ... only. No inverse need be taken at each step:

    (H + lambda I)^-1 = U^T U,  U upper triangular:   [H_F^-1]_jj = U_jj^2,
                                                      [H_F^-1]_j,: = U_jj U_j,j:
"""

import torch
from jaxtyping import Float
from torch import Tensor


def input_hessian(x: Float[Tensor, "*batch in"]) -> Float[Tensor, "in in"]:
    """H = X^T X: how much the squared output error grows with a change of the weights.

    Args:
        x: the layer's inputs, any number of leading dimensions (they are all tokens). float32 and
            float64 are multiplied as they are, smaller types as float32.

    Returns:
        [in, in], symmetric and positive semidefinite; float64 for a float64 x, else float32. The
        Hessian of more data is the sum of the Hessians of its parts.

    Example:
        >>> input_hessian(torch.tensor([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[1.0, 2.0], [2.0, 5.0]]
    """
    x = x.detach().reshape(-1, x.shape[-1])
    x = x if x.dtype == torch.float64 else x.float()
    return x.T @ x


def output_error(
    w: Float[Tensor, "out in"], w_hat: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]
) -> float:
    """The squared output error ||X (W - W_hat)^T||^2 = tr(dW H dW^T), without X; in float64.

    Example:
        >>> w, w_hat = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 2.0]])
        >>> output_error(w, w_hat, 5 * torch.eye(2))
        20.0
    """
    change = w.detach().double() - w_hat.detach().double()
    return ((change @ hessian.double()) * change).sum().item()


def inverse_cholesky(hessian: Float[Tensor, "in in"], damp: float = 0.01) -> Float[Tensor, "in in"]:
    """The upper triangular U with (H + lambda I)^-1 = U^T U and a positive diagonal.

    lambda is `damp` times the mean of H's diagonal. It keeps inputs that hardly occurred in the
    calibration data (or are sums of others) from being thought free to change without bound. An
    all-zero H knows nothing, and counts as the identity.

    Args:
        hessian: H [in, in], symmetric positive semidefinite, of any scale.
        damp: at least 0. The papers use 0.01.

    Returns:
        U [in, in], float64: float32 loses the small eigenvalues of real layers, whose H spans more
        than seven decades.

    Raises:
        ValueError: `hessian` is not a square matrix, holds NaN or infinity, or is not positive
            definite after damping; `damp` is negative.

    Example:
        >>> inverse_cholesky(torch.tensor([[4.0, 0.0], [0.0, 16.0]]), damp=0.0).tolist()
        [[0.5, 0.0], [0.0, 0.25]]
    """
    if hessian.ndim != 2 or hessian.shape[0] != hessian.shape[1]:
        raise ValueError(f"hessian must be a square matrix, got shape {tuple(hessian.shape)}")
    if not torch.isfinite(hessian).all():
        raise ValueError("hessian must be finite, got NaN or infinity among its values")
    if not damp >= 0:
        raise ValueError(f"damp must be at least 0, got {damp}")
    H = hessian.detach().double()
    eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
    H = H + damp * H.diagonal().mean() * eye if H.any() else eye
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        raise ValueError(
            f"hessian must be positive definite after damping, got one that is not at damp={damp}; "
            "a larger damp helps"
        ) from error
