"""What the CUDA C++ kernels for Hopper take, of attention and of attention on a cache."""

import torch

HOPPER_HEAD_DIMS = (64, 96, 128, 192, 256)


def hopper_refuses_device(device):
    """Why the native kernels cannot run on a device, or None: on CUDA there are those for Hopper."""
    if not device.startswith("cuda"):
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability == (9, 0):
        return None
    return f"it takes GPUs of compute capability 9.0, this one has {'.'.join(map(str, capability))}"


def hopper_refuses(dtype, has_tiles, **features):
    """Why the CUDA kernels for Hopper, which serve the plain cases, cannot take a call, or None.

    Args:
        has_tiles: whether the head dims, all the same, are among HOPPER_HEAD_DIMS.
        features: what they do not serve, and whether it is wanted.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, got {dtype}"
    if not has_tiles:
        return f"it takes head dims {', '.join(map(str, HOPPER_HEAD_DIMS))}, the same for q, k and v"
    refused = [name.replace("_", " ") for name, wanted in features.items() if wanted]
    return f"it takes no {', no '.join(refused)}" if refused else None
