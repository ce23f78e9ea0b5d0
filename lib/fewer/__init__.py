"""fewer: fewer bits, fewer weights, fewer trained parameters, fewer tokens, fewer steps.

A library for reading: one lecture topic is one folder, one paper is one file, and every equation
stands beside its line. Import a method from its topic, as in
``from fewer.quantization import quantize_symmetric``.
"""

__version__ = "0.1.0"
