"""
The exact parts of UltraChat v2 and of the RL data recipe (MiniCPM4, arXiv 2506.07900, sections 3 and 4), as functions
for `datasets`: each adds its verdict and its reason, dropping is a step of its own.
"""

from .code_filter import CodeFilter, check_code, extract_code
from .constraints import ConstraintChecker, KeepPassing, OutputsChecker, check_constraints, validate_constraint
from .difficulty import DifficultyFilter, pass_at_k
from .generation import (
    PROMPTS,
    ChatGenerator,
    PipelineGenerator,
    TrackGenerator,
    generate_until,
    render_prompt,
    sample_and_keep,
)
from .long_context import LongContextPacker
from .reasons import reason_counts
from .retrieval import BM25Index
from .semantic_dedup import find_semantic_duplicates, semantic_deduplicate
from .tool_calls import ToolCallFilter, check_tool_calls


__all__ = [
    "PROMPTS",
    "BM25Index",
    "ChatGenerator",
    "CodeFilter",
    "ConstraintChecker",
    "DifficultyFilter",
    "KeepPassing",
    "LongContextPacker",
    "OutputsChecker",
    "PipelineGenerator",
    "ToolCallFilter",
    "TrackGenerator",
    "check_code",
    "check_constraints",
    "check_tool_calls",
    "extract_code",
    "find_semantic_duplicates",
    "generate_until",
    "pass_at_k",
    "reason_counts",
    "render_prompt",
    "sample_and_keep",
    "semantic_deduplicate",
    "validate_constraint",
]
