"""The dtypes of the kernels, and what several ops say about a call that they cannot serve."""

from typing import NamedTuple

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not_dtypes(*dtypes):
    """Why the kernels cannot serve tensors of these dtypes, or None. A dtype of None means that there is no tensor."""
    for dtype in dtypes:
        if dtype is not None and dtype not in FLOATS:
            return f"it supports float32, bfloat16 and float16, got {dtype}"
    return None


class WeightFacts(NamedTuple):
    """The properties of a call with weight matrices that decide which backends can serve it.

    nonplain: the kind of a weight that is not a plain tensor, such as a quantized one, or None.
    """

    device: str
    dtype: torch.dtype
    nonplain: str | None = None


def why_not_weights(facts):
    """Why the kernels cannot serve a call with these WeightFacts, or None."""
    return why_not_dtypes(facts.dtype) or (f"it needs plain weights, got {facts.nonplain}" if facts.nonplain else None)


def why_not_triton_attention(facts, *dtypes):
    """Why Triton's kernels of attention cannot serve a call on tensors of these dtypes, or None."""
    return "it supports head dims up to 256" if facts.wide_heads else why_not_dtypes(*dtypes)
