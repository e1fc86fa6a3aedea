"""The operators in Triton, under the names that `ops` calls."""

from .triton_attention import sparse_attention, sparse_attention_backward
from .triton_decode import sparse_attention_decode
from .triton_selection import block_scores, block_scores_decode, compress_keys, select_blocks, update_compressed_keys


__all__ = [
    "block_scores",
    "block_scores_decode",
    "compress_keys",
    "select_blocks",
    "sparse_attention",
    "sparse_attention_backward",
    "sparse_attention_decode",
    "update_compressed_keys",
]
