"""Batches of documents of unequal length: which documents a step reads, and how they are padded."""

import math

import numpy as np
import torch

from ..messages import UsageError

IGNORED = -100  # a target that is ignored, as in torch.nn.functional.cross_entropy
MASKED = 0.15  # share of the tokens to predict


class LengthBatches:
    """Batches of documents of similar length, which need little padding; each epoch has its own order.

    Args:
        lengths: list of int, one per document.
        batch_size: documents per batch.
        seed: decides the order in every epoch.
        batches_a_group: number of batches whose documents are sorted by length together.

    Raises:
        UsageError: there are fewer documents than batch_size.
    """

    def __init__(self, lengths, batch_size, seed, batches_a_group=32):
        if len(lengths) < batch_size:
            raise UsageError(f"batch_size must be at most {len(lengths)}, the training documents, got {batch_size}")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.group = batch_size, seed, batches_a_group * batch_size
        self.batches_an_epoch = len(lengths) // batch_size  # an epoch leaves out an incomplete batch, drawn at random
        self._epoch, self._batches = None, None

    def __getitem__(self, step):
        """Indices (batch_size,) int64 of the documents of a step: a pure function of (seed, step)."""
        epoch, number = divmod(step, self.batches_an_epoch)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffle(epoch)
        return self._batches[number]

    def _shuffle(self, epoch):
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        order = generator.permutation(len(self.lengths))[: self.batches_an_epoch * self.batch_size]
        groups = (order[start : start + self.group] for start in range(0, len(order), self.group))
        ordered = np.concatenate([group[np.argsort(self.lengths[group], kind="stable")] for group in groups])
        return generator.permutation(ordered.reshape(-1, self.batch_size), axis=0)


def by_length(lengths, batch_size, rank=0, world_size=1):
    """Yield lists of indices of all documents, shortest first; this process takes every world_size-th list."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(rank * batch_size, len(order), world_size * batch_size):
        yield order[start : start + batch_size]


def pad(rows, value):
    """Lists of token numbers as one tensor (rows, longest) int64, padded with `value` on the right."""
    padded = torch.full((len(rows), max(map(len, rows), default=0)), value)
    for row, numbers in zip(padded, rows, strict=True):
        row[: len(numbers)] = torch.as_tensor(numbers)
    return padded


def draw_masks(tokens, lengths, specials, mask_token, vocab_size, key, fraction=MASKED):
    """Mask some tokens of every row and make them the targets.

    Of the drawn tokens, 80 % become the mask token, 10 % a random token, and 10 % stay (Devlin et al. 2019, "BERT",
    section 3.1). At least one token per row is drawn.

    Args:
        tokens: (batch, seqlen) int64, padded on the right.
        lengths: (batch,) int64.
        specials: list of token numbers that are neither drawn nor used as replacements.
        mask_token: number of the mask token.
        vocab_size: number of tokens.
        key: two ints that seed the draw.
        fraction: share of the tokens to draw.

    Returns:
        (tokens with replacements, targets with -100 where nothing was drawn), both like tokens.
    """
    generator = np.random.Generator(np.random.Philox(key=list(key)))
    usable = (torch.arange(tokens.shape[1]) < lengths[:, None]) & ~torch.isin(tokens, torch.tensor(specials))
    chance = torch.from_numpy(generator.random(tokens.shape)).masked_fill(~usable, math.inf)
    wanted = (usable.sum(1) * fraction).round().clamp(min=1).long()
    drawn = (chance.argsort(1).argsort(1) < wanted[:, None]) & usable
    targets = tokens.masked_fill(~drawn, IGNORED)
    fate = torch.from_numpy(generator.random(tokens.shape))
    words = np.setdiff1d(np.arange(vocab_size), specials)
    others = torch.from_numpy(generator.choice(words, tokens.shape))
    tokens = tokens.masked_fill(drawn & (fate < 0.8), mask_token)
    return torch.where(drawn & (fate >= 0.9), others, tokens), targets
