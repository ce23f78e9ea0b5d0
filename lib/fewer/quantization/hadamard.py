"""Rotate before quantizing: a Hadamard matrix spreads an outlier over all channels.

Ashkboos et al. 2024, "QuaRot: Outlier-free 4-bit inference in rotated LLMs" (arXiv 2404.00456);
Tseng et al. 2024, "QuIP#" (arXiv 2402.04396), section 3, for the random signs and the bound on the
largest entry.

    X W^T = (X R) (W R)^T,    R = diag(s) H_n / sqrt(n),    s random signs,  R R^T = I

Every entry of H_n is 1 or -1. So a token with one value of 1000 among n = 576 zeros becomes 576
values of 1000 / sqrt(576) = 42: the same energy, a step 24 times finer. The output does not change;
what is rounded does. The signs keep a row that happens to look like a row of H_n from being
gathered into one value. There is a limit: an outlier so far out that even 1 / sqrt(n) of it dwarfs
the other values leaves them too few steps after the rotation as before it.

Sizes. Sylvester: H_2n = [[H_n, H_n], [H_n, -H_n]], the powers of two. For the rest, n = 2^k m, a
Kronecker product H_n = H_{2^k} (x) H_m with a factor of Paley (1933, second construction): for a
prime q = 1 mod 4, m = 2 (q + 1) from the squares mod q. q = 5, 13, 17 and 29 give m = 12, 28, 36
and 60, and SmolLM2's 576 = 16 * 36 and 1536 = 128 * 12. All of these are symmetric, so the
orthonormal transform is its own inverse.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fewer.models import replaced_weights
from fewer.models.hooks import replaced_inputs
from fewer.quantization.validate import require_floating, require_int


def hadamard_factor(n: int) -> int:
    """The m of n = 2^k m, for which H_n = H_{2^k} (x) H_m: 1, or 4 times the odd part of n.

    Args:
        n: a power of two (m = 1), or 2^k m with m = 4p, p odd and 2p - 1 a prime. Multiples of 4
            whose odd part is 3, 7, 9, 15, 19, 27, ... will do; 20 = 4 * 5 will not, since 9 is no
            prime.

    Raises:
        TypeError: n is not an int.
        ValueError: there is no such m.

    Example:
        >>> [hadamard_factor(n) for n in (64, 576, 1536, 14336)]
        [1, 36, 12, 28]
    """
    odd = require_int(n, "n", 1)
    while odd % 2 == 0:
        odd //= 2
    q = 2 * odd - 1
    if odd > 1 and (n % 4 or any(q % d == 0 for d in range(2, math.isqrt(q) + 1))):
        raise ValueError(
            "n must be a power of two, or a multiple of 4 whose odd part p has 2p - 1 prime, "
            f"got {n} = {n // odd} * {odd}"
        )
    return 1 if odd == 1 else 4 * odd


def paley_matrix(m: int) -> Float[Tensor, "m m"]:
    """Paley's second construction: a symmetric m x m matrix of 1 and -1 with orthogonal rows.

        q = m / 2 - 1,    Q[i, j] = 1 if i - j is a square mod q, -1 if not, 0 if i = j

        C = [[0, 1^T],      H = C (x) [[1,  1],  +  I (x) [[ 1, -1],
             [1,  Q ]]                 [1, -1]]            [-1, -1]]

    C is symmetric because -1 is a square mod q, and C C^T = q I.

    Args:
        m: 2 (q + 1) for a prime q with q mod 4 = 1: 12, 28, 36, 60, 76, 84, ...

    Raises:
        TypeError: m is not an int.
        ValueError: m is not such a number.

    Example:
        >>> H = paley_matrix(12)
        >>> torch.equal(H @ H, 12 * torch.eye(12))
        True
    """
    if m == 1 or hadamard_factor(m) != m:
        raise ValueError(f"m must be 2 (q + 1) for a prime q with q mod 4 = 1, got {m}")
    q = m // 2 - 1
    legendre = -torch.ones(q)
    legendre[0] = 0
    legendre[[i * i % q for i in range(1, q)]] = 1
    i = torch.arange(q)
    C = 1 - torch.eye(q + 1)
    C[1:, 1:] = legendre[(i[:, None] - i) % q]
    H2, B = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
    return torch.kron(C, H2) + torch.kron(torch.eye(q + 1), B)


def hadamard_matrix(n: int) -> Float[Tensor, "n n"]:
    """H_n = H_{2^k} (x) H_m: 1 and -1, symmetric, H H = n I.

    For a power of two this is Sylvester's matrix, in its natural order. Otherwise m is
    `hadamard_factor(n)` and H_m is `paley_matrix(m)`; entry [i m + a, j m + b] is H_{2^k}[i, j]
    H_m[a, b].

    Args:
        n: a size that `hadamard_factor` knows.

    Returns:
        float32, [n, n]; divide by sqrt(n) for an orthogonal matrix.

    Raises:
        TypeError: n is not an int.
        ValueError: there is no factor for this n.

    Example:
        >>> hadamard_matrix(4).int().tolist()
        [[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]
    """
    m = hadamard_factor(n)
    H = torch.ones(1, 1) if m == 1 else paley_matrix(m)
    while len(H) < n:
        H = torch.kron(torch.tensor([[1.0, 1], [1, -1]]), H)
    return H


def fwht(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """The fast Walsh-Hadamard transform: x H_n / sqrt(n) along the last dimension, without H_n.

    H_n is `hadamard_matrix(n)`. With n = 2^k m (m from `hadamard_factor`), x is cut into 2^k blocks
    of m values. Each block is multiplied by the small H_m (`paley_matrix`; nothing to do for
    m = 1); then k rounds of butterflies replace two blocks (a, b), 1, 2, 4, ... blocks apart, by
    (a + b, a - b). A row costs n k additions in the butterflies and n (m - 1) in the factor, where
    a product with H_n costs n (n - 1): for 1536 = 128 * 12, 18 n in place of 1535 n.

    Args:
        x: [..., n], any floating type, n a size that `hadamard_factor` knows. It is not modified.

    Returns:
        The shape of x, float32 (float64 for a float64 x). Lengths and angles of rows are kept, and
        a second transform gives x back, both up to rounding.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x is 0-d, or n has no factor.

    Example:
        >>> fwht(torch.tensor([8.0, 0.0, 0.0, 0.0])).tolist()
        [4.0, 4.0, 4.0, 4.0]
    """
    x = require_floating(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension, got a 0-d tensor")
    m = hadamard_factor(x.shape[-1])
    blocks = x.unflatten(-1, (-1, m))
    if m > 1:
        blocks = blocks @ paley_matrix(m).to(x)
    apart = 1
    while apart < blocks.shape[-2]:
        a, b = blocks.unflatten(-2, (-1, 2, apart)).unbind(-3)
        blocks = torch.stack([a + b, a - b], dim=-3).flatten(-4, -2)
        apart *= 2
    return blocks.flatten(-2) / math.sqrt(x.shape[-1])


def random_signs(n: int, seed: int = 0) -> Float[Tensor, "n"]:
    """n random signs, 1.0 or -1.0, the same for the same seed. PyTorch's generator is left alone.

    Example:
        >>> sorted(set(random_signs(100).tolist()))
        [-1.0, 1.0]
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1.0


def hadamard_rotate(
    x: Float[Tensor, "*batch n"], signs: Float[Tensor, "n"]
) -> Float[Tensor, "*batch n"]:
    """x R with R = diag(signs) H_n / sqrt(n), by `fwht`: multiply by the signs, then transform.

    The same function rotates both sides of a linear layer, activations X [tokens, in] and weight
    W [out, in], and leaves the output as it was: (X R) (W R)^T = X W^T.

    Args:
        x: [..., n], any floating type, n a size that `hadamard_factor` knows.
        signs: [n], each 1 or -1.

    Returns:
        The shape of x, float32 (float64 for a float64 x).

    Raises:
        TypeError: x or signs is not a floating-point tensor.
        ValueError: signs has another shape than [n] or other values, x is 0-d, n has no factor.

    Example:
        >>> x, w = torch.tensor([[100.0, 0.1, 0.2, 0.3]]), torch.tensor([[0.1, 1.0, -1.0, 1.0]])
        >>> signs = torch.tensor([1.0, -1.0, 1.0, 1.0])
        >>> hadamard_rotate(x, signs).abs().max().item(), (x @ w.T).item()
        (50.2, 10.2)
        >>> (hadamard_rotate(x, signs) @ hadamard_rotate(w, signs).T).item()
        10.2
    """
    x, signs = require_floating(x, "x"), require_floating(signs, "signs")
    if signs.shape != x.shape[-1:] or (signs.abs() != 1).any():
        raise ValueError(
            f"signs must be {list(x.shape[-1:])} values of 1 or -1, got shape {tuple(signs.shape)}"
        )
    return fwht(x * signs.to(x.dtype))


@contextmanager
def rotated(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """In a `with` block, every linear layer computes (X R) (W R)^T; then the weights are back.

    The model's function stays what it was, up to rounding. What an inner block quantizes, weights
    or inputs, is rotated. Each layer's input is rotated as it comes, which is one transform a
    layer; QuaRot merges most of these rotations into the weights before, and keeps the ones that
    cannot be merged (before o_proj and down_proj). Layers of equal width get equal signs.

    Args:
        model: any module whose linear layers have inputs of a width that `hadamard_factor` knows.
        seed: of the signs.

    Raises:
        ValueError: a width has no factor.

    Example:
        >>> from fewer.models import tiny_llama
        >>> model, tokens = tiny_llama(), torch.tensor([[1, 2, 3]])
        >>> before = model(tokens)
        >>> with rotated(model):
        ...     torch.allclose(model(tokens), before, atol=1e-4)
        True
    """

    def rotate(_: str, x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
        return hadamard_rotate(x, random_signs(x.shape[-1], seed).to(x.device)).to(x.dtype)

    with replaced_weights(model, rotate), replaced_inputs(model, rotate):
        yield
