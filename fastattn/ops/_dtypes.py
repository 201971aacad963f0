"""The dtypes of the kernels."""

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def why_not_dtypes(*dtypes):
    """Why the kernels cannot serve tensors of these dtypes, or None. A dtype of None means that there is no tensor."""
    for dtype in dtypes:
        if dtype is not None and dtype not in FLOATS:
            return f"it supports float32, bfloat16 and float16, got {dtype}"
    return None
