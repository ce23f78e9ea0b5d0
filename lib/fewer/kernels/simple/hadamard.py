"""The fast Walsh-Hadamard transform of a row, in registers.

Pease 1968, "An adaptation of the fast Fourier transform for parallel processing" (JACM 15), for the
form in which all steps are the same. With H_1 = [1] and H_2n = [[H_n, H_n], [H_n, -H_n]], of n^2
sums and differences n log2 n are enough:

    repeat log2 n times:   x = [x_0 + x_1, x_2 + x_3, ..., x_0 - x_1, x_2 - x_3, ...]

Each repetition does one bit of the index and moves it to the front, so that after log2 n of them
every bit is done, and back where it was. Divided by sqrt n, the transform keeps lengths and is its
own inverse.
"""

import triton.language as tl

from fewer.kernels.interpreter import on_copies


@on_copies
def hadamard_kernel(x_ptr, out_ptr, n: tl.constexpr):
    """out = H x / sqrt(n) of each row; program r has row r.

    H is the Hadamard matrix in Sylvester's order: H_1 = [1], and H_2n = [[H_n, H_n], [H_n, -H_n]].
    So H_2 x = [x_0 + x_1, x_0 - x_1]. It takes no product with a matrix, but log2 n times the step

        x = [x_0 + x_1, x_2 + x_3, ..., x_0 - x_1, x_2 - x_3, ...]

    Launched with one program for each row. It loads the row once, does all steps in registers, in
    float32, and stores once. `tl.split` takes a tile [a, 2] apart into two of [a], and `tl.join`
    does the reverse; `tl.reshape` and `tl.trans` are those of torch.

    Args:
        x_ptr: to [rows, n], float32 or float16, contiguous, row by row.
        out_ptr: to [rows, n] of the same type, to be written.
        n: length of a row, a power of two of at least 2.

    Example:
        >>> import torch
        >>> x = torch.tensor([[4.0, 2.0, 0.0, 0.0]])
        >>> hadamard_kernel(1, x, torch.zeros(1, 4), n=4)[1].tolist()
        [[3.0, 1.0, 3.0, 1.0]]
    """
    at = tl.program_id(0) * n + tl.arange(0, n)
    x = tl.load(x_ptr + at).to(tl.float32)
    done = 1
    while done < n:
        even, odd = tl.split(tl.reshape(x, (n // 2, 2)))
        x = tl.reshape(tl.trans(tl.join(even + odd, even - odd)), (n,))
        done *= 2
    tl.store(out_ptr + at, x / n**0.5)
