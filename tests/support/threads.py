"""Runs a function with several numbers of threads, which must not change its bits."""

import torch
from torch.utils._pytree import tree_leaves


def same_bits(function, counts=(1, 2, 3, 8)):
    """Check that a function gives the same bits with each number of threads, and return its first result.

    Args:
        function: () -> a tensor, or lists, tuples and dicts of tensors.
        counts: numbers of threads; a repeated number also repeats the call.
    """
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    first, *others = ([t for t in tree_leaves(result) if t is not None] for result in results)
    for count, other in zip(counts[1:], others, strict=True):
        assert len(other) == len(first)
        assert all(map(torch.equal, other, first)), f"{count} threads"
    return results[0]
