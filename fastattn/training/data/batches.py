"""Batches of documents of unequal length: which of them belong to a step, and how they are padded."""

import math

import numpy as np
import torch

from ..messages import UsageError

IGNORED = -100  # a target that is no target, as in torch.nn.functional.cross_entropy
MASKED = 0.15  # of the tokens are asked for


class LengthBatches:
    """Batches of documents that are about equally long, so that little is padding; another order in every epoch.

    Args:
        lengths: list of int, one a document.
        batch_size: documents of a batch.
        seed: decides the order of every epoch.
        batches_a_group: batches whose documents are sorted by length together.

    Raises:
        UsageError: fewer documents than a batch needs.
    """

    def __init__(self, lengths, batch_size, seed, batches_a_group=32):
        if len(lengths) < batch_size:
            raise UsageError(f"batch_size: expected at most the {len(lengths)} training documents, got {batch_size}")
        self.lengths = np.asarray(lengths)
        self.batch_size, self.seed, self.group = batch_size, seed, batches_a_group * batch_size
        self.batches_an_epoch = len(lengths) // batch_size  # what is left over belongs to another epoch's remainder
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
    """Every document once, shortest first: yields lists of indices; this process takes every world_size-th batch."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for start in range(rank * batch_size, len(order), world_size * batch_size):
        yield order[start : start + batch_size]


def pad(rows, value):
    """Lists of token numbers as one tensor (rows, longest) int64, filled up with `value` on the right."""
    padded = torch.full((len(rows), max(map(len, rows), default=0)), value)
    for row, numbers in zip(padded, rows, strict=True):
        row[: len(numbers)] = torch.as_tensor(numbers)
    return padded


def draw_masks(tokens, lengths, specials, mask_token, vocab_size, key, fraction=MASKED):
    """Hide some tokens of every row and ask for them.

    Of the tokens drawn 80 % become the mask token, 10 % any token, and 10 % stay (Devlin et al. 2019, "BERT", 3.1). At
    least one a row is drawn.

    Args:
        tokens: (batch, seqlen) int64, padded on the right.
        lengths: (batch,) int64.
        specials: list of token numbers that are never drawn and never put in.
        mask_token: number of the mask token.
        vocab_size: number of tokens.
        key: two ints that decide the draw.
        fraction: of the tokens.

    Returns:
        (tokens with some replaced, targets with -100 where nothing is asked for), both like tokens.
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
