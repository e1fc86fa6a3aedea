"""
One decode step of InfLLM v2 against exact attention over the same blocks: python hub_kernels/infllm_v2/example.py

Needs torch and kernels, and the `build/` that `scripts/build.py` makes.
"""

from pathlib import Path

import torch
from kernels import get_local_kernel


kernel = get_local_kernel(Path(__file__).resolve().parent)
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
query = torch.randn(2, 16, 1, 64, device=device)  # [batch, query heads, new tokens, head size]
key, value = torch.randn(2, 2, 2, 20_000, 64, device=device)  # [batch, key/value heads, all tokens, head size]

output, blocks = kernel.infllm_v2_attention(query, key, value, return_blocks=True)

# The same by hand: attention under a mask that hides the tokens of all other blocks.
allowed = blocks.repeat_interleave(64, -1)[..., : key.shape[2]].repeat_interleave(8, 1)
exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, enable_gqa=True)
print(f"{device}, compiled code: {kernel.is_compiled(query)}")
print(f"{int(blocks[0, 0, 0].sum())} of {blocks.shape[-1]} blocks read")
print(f"largest difference to exact attention over them: {(output - exact).abs().max().item():.0e}")
