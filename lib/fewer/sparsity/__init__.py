"""Lectures 4 and 5: fewer weights. Pruning a trained network, and training a sparse one.

Masks (bool, True = kept): `magnitude` (by threshold and count, per layer, per row),
`global_pruning`, `structured` (N:M, blocks), `channels` (layers that shrink). Pruning in training:
`schedule`, `straight_through`. Storage: `packing`, `csr`, `bitmap`, `two_four`, `storage` (what
each costs). With calibration data: `wanda`, `sparsegpt`. Sparse from the start: `erdos_renyi`
(densities), `static`, `set`, `rigl`, `lottery`, `sparse_training`, `flops`. `validate` says what
all of them refuse.
"""

from fewer.sparsity.bitmap import decode_bitmap, encode_bitmap, matvec_bitmap, require_bitmap
from fewer.sparsity.channels import channel_norms, shrink_channels
from fewer.sparsity.csr import csr_rows, decode_csr, encode_csr, matvec_csr, require_columns
from fewer.sparsity.erdos_renyi import (
    capped_densities,
    connection_counts,
    er_densities,
    erk_densities,
    layer_sizes,
    uniform_densities,
)
from fewer.sparsity.flops import forward_flops, pruning_step_flops, rigl_step_flops, step_flops
from fewer.sparsity.global_pruning import global_masks
from fewer.sparsity.lottery import lottery_ticket, prune_surviving, rewind
from fewer.sparsity.magnitude import (
    magnitude_mask,
    number_kept,
    row_mask,
    threshold_mask,
    top_k_mask,
)
from fewer.sparsity.packing import pack_bits, stored_bytes, unpack_bits
from fewer.sparsity.rigl import drop_fraction, rigl_update
from fewer.sparsity.schedule import apply_masks, cubic_sparsity, prune_gradually
from fewer.sparsity.set import carry_over, drop_smallest, grow_largest, set_update
from fewer.sparsity.sparse_training import (
    Network,
    SparseRun,
    accuracies,
    carry_over_parameter,
    initial_network,
    logits,
    random_masks,
    rewire_gradual,
    rewire_rigl,
    rewire_set,
    train_sparse,
)
from fewer.sparsity.sparsegpt import prune_sparsegpt, sparsegpt_block
from fewer.sparsity.static import mlp_parameters, random_mask, small_dense_widths
from fewer.sparsity.storage import break_even_sparsity, storage_bits
from fewer.sparsity.straight_through import masked_weight, sr_ste_gradient, ste, straight_through
from fewer.sparsity.structured import block_mask, n_m_mask
from fewer.sparsity.two_four import (
    columns_2_4,
    decode_2_4,
    encode_2_4,
    matvec_2_4,
    require_values_2_4,
)
from fewer.sparsity.validate import (
    require_code_bits,
    require_codes,
    require_dims,
    require_finite,
    require_floating,
    require_groups,
    require_int,
    require_layers,
    require_mask,
    require_number,
    require_pair,
    require_scores,
    require_sparsity,
)
from fewer.sparsity.wanda import wanda_mask, wanda_scores

__all__ = [
    "Network",
    "SparseRun",
    "accuracies",
    "apply_masks",
    "block_mask",
    "break_even_sparsity",
    "capped_densities",
    "carry_over",
    "carry_over_parameter",
    "channel_norms",
    "columns_2_4",
    "connection_counts",
    "csr_rows",
    "cubic_sparsity",
    "decode_2_4",
    "decode_bitmap",
    "decode_csr",
    "drop_fraction",
    "drop_smallest",
    "encode_2_4",
    "encode_bitmap",
    "encode_csr",
    "er_densities",
    "erk_densities",
    "forward_flops",
    "global_masks",
    "grow_largest",
    "initial_network",
    "layer_sizes",
    "logits",
    "lottery_ticket",
    "magnitude_mask",
    "masked_weight",
    "matvec_2_4",
    "matvec_bitmap",
    "matvec_csr",
    "mlp_parameters",
    "n_m_mask",
    "number_kept",
    "pack_bits",
    "prune_gradually",
    "prune_sparsegpt",
    "prune_surviving",
    "pruning_step_flops",
    "random_mask",
    "random_masks",
    "require_bitmap",
    "require_code_bits",
    "require_codes",
    "require_columns",
    "require_dims",
    "require_finite",
    "require_floating",
    "require_groups",
    "require_int",
    "require_layers",
    "require_mask",
    "require_number",
    "require_pair",
    "require_scores",
    "require_sparsity",
    "require_values_2_4",
    "rewind",
    "rewire_gradual",
    "rewire_rigl",
    "rewire_set",
    "rigl_step_flops",
    "rigl_update",
    "row_mask",
    "set_update",
    "shrink_channels",
    "small_dense_widths",
    "sparsegpt_block",
    "sr_ste_gradient",
    "ste",
    "step_flops",
    "storage_bits",
    "stored_bytes",
    "straight_through",
    "threshold_mask",
    "top_k_mask",
    "train_sparse",
    "uniform_densities",
    "unpack_bits",
    "wanda_mask",
    "wanda_scores",
]
