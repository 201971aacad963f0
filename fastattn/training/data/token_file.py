"""Token files, read through a memory map, so that a text may be larger than memory.

NAME.tokens    little-endian int32 numbers, one after the other
"""

import numpy as np
import torch

from ..files import replacing
from ..messages import UsageError

SUFFIX = ".tokens"


def write_tokens(path, chunks):
    """Write token numbers as a stream; the file gets its name when it is complete.

    Args:
        path: path of the file.
        chunks: iterable of lists or arrays of int.

    Returns:
        Number of tokens written.
    """
    count = 0
    with replacing(path) as file:
        for chunk in chunks:
            numbers = np.asarray(chunk, dtype="<i4")
            file.write(numbers.tobytes())
            count += len(numbers)
    return count


def open_tokens(path):
    """The tokens of a file as a memory-mapped int32 tensor (tokens,).

    Raises:
        UsageError: the file does not exist, or its size is not a multiple of 4 bytes.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"token file {str(path)!r} cannot be read: {error.strerror}") from None
    if size % 4:
        raise UsageError(f"token file {str(path)!r}: the size must be a multiple of 4 bytes, got {size}")
    if not size:
        return torch.empty(0, dtype=torch.int32)
    return torch.from_file(str(path), shared=False, size=size // 4, dtype=torch.int32)
