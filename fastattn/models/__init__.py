"""Small, readable models built from the layers of fastattn.nn."""

from .causal_lm import CausalLM
from .classifier import Classifier
from .kv_cache import KeyValueCache
from .masked_lm import LoadedEncoder, MaskedLM, load_encoder
from .seq2seq import Seq2Seq

__all__ = ["CausalLM", "Classifier", "KeyValueCache", "LoadedEncoder", "MaskedLM", "Seq2Seq", "load_encoder"]
