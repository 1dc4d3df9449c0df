"""Data: default corpus, own text, tokenizer, packing, mixing. Only this part knows grain."""

from longcat_jax.data.packing import target_pairs
from longcat_jax.data.pipeline import open_train, open_validation, token_bytes, validation_text
from longcat_jax.data.prepare import SpecialIds, prepare
from longcat_jax.data.records import DataError
from longcat_jax.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DataError",
    "SpecialIds",
    "Tokenizer",
    "load_tokenizer",
    "open_train",
    "open_validation",
    "prepare",
    "target_pairs",
    "token_bytes",
    "validation_text",
]
