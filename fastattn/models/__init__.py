"""Models built from the layers of fastattn.nn, readable in one sitting."""

from .causal_lm import CausalLM
from .kv_cache import KeyValueCache

__all__ = ["CausalLM", "KeyValueCache"]
