"""Lectures 9 and 10: generating with less. The key-value cache, and speculative decoding.

`cost` says what generation costs, in bytes and operations. A cache that forgets is an
`eviction.EvictingCache` with the scores of one paper: `window`, `streaming_llm`, `h2o`,
`streaming_h2o`, `random_eviction`; `sinks` shows why the first tokens matter; `quantized_cache`
keeps tokens in few bits, whatever the policy; `long_stream` reads texts of any length.

`speculative` lets a draft guess and the model judge, exactly; drafts are `prompt_lookup`, `ngram`,
`early_exit` and `model_draft`; `specinfer` judges trees of them. `ragged` is the cache that both
need.
"""

from fewer.inference.cost import (
    LLAMA_70B,
    Machine,
    Work,
    attainable,
    cache_bytes,
    forward_work,
    least_seconds,
    matrix_weights,
    measure_forward,
    measure_machine,
    model_work,
    weight_bytes,
)
from fewer.inference.early_exit import early_exit
from fewer.inference.eviction import EvictingCache, FullCache, gather_tokens, kept_tokens
from fewer.inference.h2o import accumulate_attention, h2o, h2o_scores
from fewer.inference.long_stream import StreamLosses, recomputed_losses, stream_losses
from fewer.inference.model_draft import ModelDraft
from fewer.inference.ngram import NGramDraft, backoff, ngram_counts
from fewer.inference.prompt_lookup import look_up, prompt_lookup
from fewer.inference.quantized_cache import (
    QuantizedCache,
    dequantize_range,
    pack_rows,
    quantize_range,
    unpack_rows,
)
from fewer.inference.ragged import RaggedCache
from fewer.inference.random_eviction import random_eviction, random_scores
from fewer.inference.sinks import first_token_attention, first_value_norm, softmax_off_by_one
from fewer.inference.specinfer import (
    ModelTreeDraft,
    Tree,
    TreeCache,
    draw_children,
    merge_chains,
    merged,
    speculate_tree,
    tree_mask,
    tree_stream,
    verify_candidates,
    verify_tree,
)
from fewer.inference.speculative import (
    Proposal,
    Speculation,
    acceptance_probability,
    acceptance_rate,
    best_draft_length,
    expected_speedup,
    expected_tokens,
    residual_distribution,
    speculate,
    speculative_stream,
    verify_draft,
)
from fewer.inference.streaming_h2o import streaming_h2o
from fewer.inference.streaming_llm import streaming_llm, streaming_llm_scores
from fewer.inference.window import window, window_scores
from fewer.validate import require_floating, require_int

__all__ = [
    "LLAMA_70B",
    "EvictingCache",
    "FullCache",
    "Machine",
    "ModelDraft",
    "ModelTreeDraft",
    "NGramDraft",
    "Proposal",
    "QuantizedCache",
    "RaggedCache",
    "Speculation",
    "StreamLosses",
    "Tree",
    "TreeCache",
    "Work",
    "acceptance_probability",
    "acceptance_rate",
    "accumulate_attention",
    "attainable",
    "backoff",
    "best_draft_length",
    "cache_bytes",
    "dequantize_range",
    "draw_children",
    "early_exit",
    "expected_speedup",
    "expected_tokens",
    "first_token_attention",
    "first_value_norm",
    "forward_work",
    "gather_tokens",
    "h2o",
    "h2o_scores",
    "kept_tokens",
    "least_seconds",
    "look_up",
    "matrix_weights",
    "measure_forward",
    "measure_machine",
    "merge_chains",
    "merged",
    "model_work",
    "ngram_counts",
    "pack_rows",
    "prompt_lookup",
    "quantize_range",
    "random_eviction",
    "random_scores",
    "recomputed_losses",
    "require_floating",
    "require_int",
    "residual_distribution",
    "softmax_off_by_one",
    "speculate",
    "speculate_tree",
    "speculative_stream",
    "stream_losses",
    "streaming_h2o",
    "streaming_llm",
    "streaming_llm_scores",
    "tree_mask",
    "tree_stream",
    "unpack_rows",
    "verify_candidates",
    "verify_draft",
    "verify_tree",
    "weight_bytes",
    "window",
    "window_scores",
]
