"""Block sizes, warps and stages of the attention kernels. They come from a table; there is no search at run time.

A key is (architecture, kernel, bytes per element, head_dim). Its row has one Launch for each kind of call. "full" calls
have no mask, and "causal" calls have a causal mask or a window. "alibi" calls have ALiBi without mask, bias and
dropout, and a head dim that needs no padding. "extra" calls have other features that need registers. Architecture 86
stands for all that have about 100 KB of shared memory. AMD's GPUs have 64 KB: they use its rows with at most AMD_STAGES
stages. Nothing has run on them: the kernels compile, but no call chooses them.
"""

import functools

import torch

from fastattn.kernels.attention_table import TABLE
from fastattn.kernels.common import DEVICE_MADE, HOST_MADE, Launch

KERNELS = ("fwd", "dkdv", "dq", "dbias")
HEAD_DIMS = (32, 64, 128, 256)
AMD, AMD_STAGES = "amd", 2
PREPROCESS = Launch(64, 0, 4)
# The keys per block of these rows in calls with a mask of one row. With 64, the loop that reads the mask would spill.
KEY_MASK_BLOCKS = {(80, "dq", 2, 64): 32, (80, "fwd", 2, 128): 32}
# Few large blocks, because the interpreter needs time per program and per operation.
INTERPRETED = Launch(64, 64, 4, 2)


def architecture(device):
    """Return (the table's architecture, who may make TMA descriptors). The interpreter has architecture 0.

    The second value is 0 without TMA, DEVICE_MADE if both host and device may make them, otherwise HOST_MADE. On all
    architectures that use the rows of 86, products read registers. There, a descriptor that the device makes would save
    nothing and need registers.
    """
    if device.type == "cpu":
        return 0, 0
    if torch.version.hip:
        return AMD, 0
    major, minor = torch.cuda.get_device_capability(device)
    if major in (9, 10):
        return 10 * major, DEVICE_MADE.value
    if major == 8 and minor in (0, 7):
        return 80, 0
    return 86, HOST_MADE.value if major > 10 else 0


def table_key(arch, kernel, element_size, head_dim):
    """Return the key of the row for a head dim: the row of the next larger one of HEAD_DIMS."""
    if element_size == 4:
        arch = 80  # fp32 products run on the same units on all architectures, so they have one set of rows
    elif arch == AMD:
        arch = 86
    return arch, kernel, element_size, next(d for d in HEAD_DIMS if head_dim <= d)


@functools.cache
def splits(device, dtype, head_dim, kind):
    """Whether dk and dv of a kind of call take a launch each, because the sums of both would leave few registers."""
    arch, _ = architecture(device)
    if not arch:
        return head_dim > 128 and kind != "extra"  # so that the interpreter tests both ways
    row = TABLE.get(table_key(arch, "dk", dtype.itemsize, head_dim))
    return row is not None and getattr(row, kind) is not None


@functools.cache
def pick(kernel, device, dtype, head_dim, kind, key_mask):
    """Return (Launch, who may make TMA descriptors) for a kind of call, a field of Variants. The second is as in
    `architecture`."""
    arch, makers = architecture(device)
    row = INTERPRETED
    if arch:
        key = table_key(arch, kernel, dtype.itemsize, head_dim)
        row = getattr(TABLE[key], kind) or TABLE[key].extra
        if key_mask and kind != "extra":
            row = row._replace(block_n=KEY_MASK_BLOCKS.get(key, row.block_n))
    if arch == AMD:
        row = row._replace(stages=min(row.stages, AMD_STAGES))
    return row, makers if dtype.itemsize == 2 else 0
