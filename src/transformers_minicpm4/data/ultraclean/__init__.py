"""
UltraClean (MiniCPM4, arXiv 2506.07900, section 3.1; Ultra-FineWeb, arXiv 2505.05427) as functions for `datasets`.
"""

from .card import plot_scores, summarize, write_card
from .classifier import leave_one_source_out, train_classifier
from .decontaminate import ContaminationFilter, NgramDecontaminator
from .deduplicate import (
    DuplicateFilter,
    MinHashSignature,
    TextHash,
    mark_exact_duplicates,
    mark_near_duplicates,
)
from .fasttext_model import ModelFileError
from .language import LanguageTagger
from .mining import mine
from .normalize import DEFAULT_TOKENIZER, load_tokenizer, normalize, to_words, to_words_batch
from .scorer import ColumnError, QualityFilter, QualityScorer
from .shards import process_shards
from .spark import score_with_spark
from .verification import DomainResult, VerificationReport, efficient_verification


__all__ = [
    "DEFAULT_TOKENIZER",
    "ColumnError",
    "ContaminationFilter",
    "DomainResult",
    "DuplicateFilter",
    "LanguageTagger",
    "MinHashSignature",
    "ModelFileError",
    "NgramDecontaminator",
    "QualityFilter",
    "QualityScorer",
    "TextHash",
    "VerificationReport",
    "efficient_verification",
    "leave_one_source_out",
    "load_tokenizer",
    "mark_exact_duplicates",
    "mark_near_duplicates",
    "mine",
    "normalize",
    "plot_scores",
    "process_shards",
    "score_with_spark",
    "summarize",
    "to_words",
    "to_words_batch",
    "train_classifier",
    "write_card",
]
