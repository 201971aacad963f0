"""Models built from the layers of fastattn.nn, readable in one sitting."""

from .causal_lm import CausalLM

__all__ = ["CausalLM"]
