"""Eight kernels to write oneself, from a sum of vectors to attention over a cache.

Each is called as a function, `kernel(grid, *arguments, **constants)`: it runs on copies of the
tensors, in Triton's interpreter where there is no GPU, and returns the tensors as they are then
(see `fewer.kernels.interpreter.on_copies`). Names that end in _ptr are pointers to the first
element of a tensor; names in capitals are known when the kernel is compiled. Kernels made for speed
are one folder up.
"""

from fewer.kernels.interpreter import on_copies
from fewer.kernels.simple.add import add_kernel
from fewer.kernels.simple.decode_attention import decode_attention_kernel
from fewer.kernels.simple.dequantize_matmul import dequantize_matmul_kernel
from fewer.kernels.simple.hadamard import hadamard_kernel
from fewer.kernels.simple.matmul import matmul_kernel
from fewer.kernels.simple.quantize_rows import quantize_rows_kernel
from fewer.kernels.simple.softmax import softmax_kernel
from fewer.kernels.simple.split_k import split_k_kernel

__all__ = [
    "add_kernel",
    "decode_attention_kernel",
    "dequantize_matmul_kernel",
    "hadamard_kernel",
    "matmul_kernel",
    "on_copies",
    "quantize_rows_kernel",
    "softmax_kernel",
    "split_k_kernel",
]
