"""Lectures 7 and 8: fewer trained parameters. From prompts to adapters to LoRA and after.

`attach` is the one way in which every method gets into a model and out of it again. The two ends of
the map: `probe` (frozen features) and `training.whole` (everything). In between: `bitfit`,
`adapters`, `prompt_tuning`, `prefix_tuning`, `ia3`; then `lora`, `dora`, `nf4` and `qlora` (a base
in 4 bits), `sparse_peft` (a pruned base). `training` trains any of them;
`prompting` puts the task into the text instead; `cost` says what each saves, and what not.
"""

from fewer.peft.adapters import Adapter, adapters, bottleneck, parallel_adapters
from fewer.peft.attach import Attachment, Wrap, attach
from fewer.peft.bitfit import BitFit, bitfit
from fewer.peft.cost import saved_activation_bytes, training_flops, transformer_flops
from fewer.peft.dora import DoRALinear, dora, dora_scale, dora_weight, row_norm
from fewer.peft.ia3 import IA3, fold_input_scale, fold_output_scale, ia3
from fewer.peft.lora import (
    LoRALinear,
    lora,
    lora_count,
    lora_delta,
    lora_merge,
    lora_output,
    lora_rank,
    lora_scale,
    lora_start,
    lora_unmerge,
)
from fewer.peft.nf4 import (
    NF4,
    dequantize_blockwise,
    dequantize_nf4,
    double_quantize,
    dynamic_levels,
    nf4_bits,
    nf4_levels,
    pack_nibbles,
    quantize_blockwise,
    quantize_nf4,
    undo_double_quantize,
    unpack_nibbles,
)
from fewer.peft.prefix_tuning import (
    Prefix,
    ReparameterizedPrefix,
    prefix_tuning,
    reparameterized_prefix,
)
from fewer.peft.probe import cached_features, class_means, cosine_logits, linear_probe
from fewer.peft.prompt_tuning import (
    PromptedEmbedding,
    label_prompt,
    prompt_tuning,
    random_prompt,
    vocabulary_prompt,
)
from fewer.peft.prompting import (
    branched,
    calibrated,
    few_shot_prompt,
    label_scores,
    sequence_log_probability,
)
from fewer.peft.qlora import (
    NF4Linear,
    TrainingMemory,
    measured_memory,
    model_bytes,
    quantize_model_nf4,
    training_memory,
)
from fewer.peft.sparse_peft import SparsePEFTLinear, sparse_peft, sparse_peft_delta
from fewer.peft.training import accuracy, fine_tune, whole
from fewer.validate import require_floating, require_int

__all__ = [
    "IA3",
    "NF4",
    "Adapter",
    "Attachment",
    "BitFit",
    "DoRALinear",
    "LoRALinear",
    "NF4Linear",
    "Prefix",
    "PromptedEmbedding",
    "ReparameterizedPrefix",
    "SparsePEFTLinear",
    "TrainingMemory",
    "Wrap",
    "accuracy",
    "adapters",
    "attach",
    "bitfit",
    "bottleneck",
    "branched",
    "cached_features",
    "calibrated",
    "class_means",
    "cosine_logits",
    "dequantize_blockwise",
    "dequantize_nf4",
    "dora",
    "dora_scale",
    "dora_weight",
    "double_quantize",
    "dynamic_levels",
    "few_shot_prompt",
    "fine_tune",
    "fold_input_scale",
    "fold_output_scale",
    "ia3",
    "label_prompt",
    "label_scores",
    "linear_probe",
    "lora",
    "lora_count",
    "lora_delta",
    "lora_merge",
    "lora_output",
    "lora_rank",
    "lora_scale",
    "lora_start",
    "lora_unmerge",
    "measured_memory",
    "model_bytes",
    "nf4_bits",
    "nf4_levels",
    "pack_nibbles",
    "parallel_adapters",
    "prefix_tuning",
    "prompt_tuning",
    "quantize_blockwise",
    "quantize_model_nf4",
    "quantize_nf4",
    "random_prompt",
    "reparameterized_prefix",
    "require_floating",
    "require_int",
    "row_norm",
    "saved_activation_bytes",
    "sequence_log_probability",
    "sparse_peft",
    "sparse_peft_delta",
    "training_flops",
    "training_memory",
    "transformer_flops",
    "undo_double_quantize",
    "unpack_nibbles",
    "vocabulary_prompt",
    "whole",
]
