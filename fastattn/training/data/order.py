"""The order in which training reads windows of tokens: a pure function of the seed and the step, without any state."""

import numpy as np
import torch

from ..messages import UsageError
from .windows import random_starts

_ROUNDS = 6
_PERIOD = 1000  # rows in which each source has its share


class WindowOrder:
    """The starts of the windows of each step, from one source or several mixed by weight.

    Args:
        sizes: tokens of each source, which lie one after the other; each has more than block_size.
        weights: the share of the rows of each source, exact to 1/1000, whatever its size.
        seed: decides everything.
        batch_size, block_size: windows of a step, and tokens of a window; one more token follows each.
        shuffle: every window of a source is read once before one is read again; else windows are drawn independently.
    """

    def __init__(self, sizes, weights, seed, batch_size, block_size, shuffle):
        self.sizes, self.seed, self.batch_size, self.block_size = np.asarray(sizes), seed, batch_size, block_size
        self.first, self.shuffle = np.cumsum([0, *sizes[:-1]]), shuffle
        self.shares = _shares(weights)

    def starts(self, step):
        """(batch_size,) int64."""
        if not self.shuffle and len(self.sizes) == 1:
            return random_starts(int(self.sizes[0]), self.seed, step, self.batch_size, self.block_size)
        source, number = self._sources(step * self.batch_size + np.arange(self.batch_size))
        sizes = self.sizes[source]
        if not self.shuffle:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, step]))
            return torch.from_numpy(self.first[source] + generator.integers(sizes - self.block_size))
        windows = (sizes - 1) // self.block_size
        epoch, place = number // windows, number % windows
        starts = np.empty(self.batch_size, np.int64)
        for s, e in {*zip(source.tolist(), epoch.tolist(), strict=True)}:
            here = (source == s) & (epoch == e)
            keys = np.random.Generator(np.random.Philox(key=[self.seed, (e << 16) + s])).integers(
                2**64, size=_ROUNDS + 1, dtype=np.uint64
            )
            room = int(self.sizes[s] - 1) % self.block_size + 1  # windows begin elsewhere in each epoch
            windows_of = (int(self.sizes[s]) - 1) // self.block_size
            order = permute(place[here], windows_of, keys[:-1])
            starts[here] = self.first[s] + int(keys[-1]) % room + order * self.block_size
        return torch.from_numpy(starts)

    def _sources(self, rows):
        """(source of each row, how many rows of that source come before it)."""
        source, number = np.empty_like(rows), np.empty_like(rows)
        for period in np.unique(rows // _PERIOD):
            generator = np.random.Generator(np.random.Philox(key=[self.seed, int(period)], counter=[0, 0, 0, 1]))
            pattern = generator.permutation(np.repeat(np.arange(len(self.shares)), self.shares))
            before = np.empty(_PERIOD, np.int64)
            for s, share in enumerate(self.shares):
                before[pattern == s] = period * share + np.arange(share)
            here = rows // _PERIOD == period
            source[here], number[here] = pattern[rows[here] % _PERIOD], before[rows[here] % _PERIOD]
        return source, number


def _shares(weights):
    """The rows of _PERIOD of each source: the largest remainders are rounded up."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * _PERIOD
    shares = np.floor(exact).astype(np.int64)
    for index in np.argsort(shares - exact, kind="stable")[: _PERIOD - shares.sum()]:
        shares[index] += 1
    if not shares.all():
        raise UsageError(f"data.mixture: a weight must be at least 1/{_PERIOD} of their sum, got {min(weights)}")
    return shares


def permute(numbers, n, keys):
    """The places of some numbers in a permutation of 0 to n - 1, which is computed without a table.

    A Feistel network permutes the next power of four; numbers that leave the range are permuted until they return.

    Args:
        numbers: (k,) int64.
        n: at least 1.
        keys: uint64, one per round.
    Returns: (k,) int64.
    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result, outside = numbers.astype(np.uint64), np.ones(len(numbers), dtype=bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        result[outside] = (left << half) | right
        outside = result >= n
    return result.astype(np.int64)


def _mix(x):
    """Spread each bit of uint64 over all bits (the last steps of splitmix64)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
