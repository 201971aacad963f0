"""Limits of the CUDA C++ kernels for Hopper: attention, and attention on a cache."""

import torch

HOPPER_HEAD_DIMS = (64, 96, 128, 192, 256)


def why_not_hopper_device(device):
    """Why the native kernels cannot run on a device, or None. On CUDA there are only those for Hopper."""
    if not device.startswith("cuda"):
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0):
        return None
    return f"it needs a GPU of compute capability 9.0; this one has {'.'.join(map(str, capability))}"


def why_not_hopper(dtype, has_tiles, features):
    """Why the CUDA kernels for Hopper cannot serve a call, or None. They have no optional features.

    Args:
        has_tiles: whether all head dims are equal and among HOPPER_HEAD_DIMS.
        features: unsupported feature -> whether the call uses it.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it supports bfloat16 and float16, got {dtype}"
    if not has_tiles:
        return f"it supports head dims {', '.join(map(str, HOPPER_HEAD_DIMS))}, equal for q, k and v"
    unsupported = [name for name, used in features.items() if used]
    return f"it does not support {', '.join(unsupported)}" if unsupported else None
