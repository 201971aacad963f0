"""How many tokens linear_cross_entropy takes at a time: large products, and few logits in memory."""

import math

import torch

_CPU_CHUNK = 256  # each chunk reads all weights: 10 % of its time at this size, more below
# The first table says roughly how many operations a GPU performs in the time of one byte of memory. _WEIGHTS_SHARE is
# the time that a chunk may spend on reading the weights twice and on the sums of their gradients, as a share of the
# time of its products. See docs/lab/linear-cross-entropy.md.
_OPERATIONS_PER_BYTE = {"half": 250, "tf32": 120, "fp32": 20}
_WEIGHTS_SHARE = 0.25


def least_chunk(device_type, dtype):
    """The fewest tokens per chunk whose products take far longer than reading the weights for them."""
    if device_type == "cpu":
        return _CPU_CHUNK
    kind = "half" if dtype.itemsize == 2 else "fp32"
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        kind = "tf32"
    weight_bytes = 2 * dtype.itemsize + 8  # per weight: read twice, and the fp32 sum of its gradient read and written
    tokens = weight_bytes * _OPERATIONS_PER_BYTE[kind] / (6 * _WEIGHTS_SHARE)  # 6 operations per weight and token
    return max(_CPU_CHUNK, math.ceil(tokens / 256) * 256)


def default_chunk_size(tokens, d_model, vocab, least=_CPU_CHUNK):
    """Tokens per chunk: enough for efficient products, otherwise so that the logits are about as large as x."""
    return max(math.ceil(tokens * d_model / max(vocab, 1)), least)
