"""Tokens of a text and the two ways they are read: random windows to learn from, consecutive ones to evaluate on."""

import numpy as np
import torch

from .config import UsageError
from .text import fingerprint, read_text, split_text
from .tokenizer import build_tokenizer


class TextData:
    """The splits of a text as token numbers.

    Args:
        config: DataConfig, says which text and how to cut it.
        tokenizer: None builds one from the text.
        expected: None or the summary of the text that a run was trained on.

    Raises:
        UsageError: no usable text, characters unknown to the tokenizer, or another text than expected.
    """

    def __init__(self, config, tokenizer=None, expected=None):
        text = read_text(config.source)
        self.summary = {"source": config.source, "characters": len(text), "sha256": fingerprint(text)}
        if expected and expected["sha256"] != self.summary["sha256"]:
            raise UsageError(
                f"text {config.source!r}: expected the {expected['characters']} characters this run was trained on "
                f"(sha256 {expected['sha256']}), got {len(text)} (sha256 {self.summary['sha256']})"
            )
        parts = split_text(text, config.validation_fraction, config.test_fraction)
        if tokenizer is None:
            tokenizer = build_tokenizer(
                config.tokenizer, [text], parts["train"].splitlines(keepends=True), config.vocab_size
            )
        self.tokenizer = tokenizer
        if not config.test_fraction:
            del parts["test"]
        self.splits = {name: to_tokens(tokenizer, part) for name, part in parts.items()}

    def check_lengths(self, block_size):
        """Raises UsageError unless every split holds a window of block_size tokens and the one that follows it."""
        for name, tokens in self.splits.items():
            if len(tokens) <= block_size:
                raise UsageError(
                    f"text {self.summary['source']!r}: expected more than block_size = {block_size} tokens "
                    f"in the {name} split, got {len(tokens)}"
                )


def to_tokens(tokenizer, text, piece=2**20):
    """The text as int32 tensor (tokens,), encoded by pieces of so many characters: a list of all would not fit."""
    starts = range(0, max(1, len(text)), piece)
    return torch.cat([torch.tensor(tokenizer.encode(text[s : s + piece]), dtype=torch.int32) for s in starts])


def random_batch(tokens, seed, step, batch_size, block_size):
    """The batch of a step, a pure function of (seed, step): nothing to save, the same on any number of devices.

    Args:
        tokens: (n,) int32, n > block_size.
        seed, step: at least 0.
        batch_size, block_size: sequences, tokens in each.

    Returns:
        inputs, targets: (batch_size, block_size) int64, targets shifted by one token.
    """
    # a counter-based generator: (seed, step) is its key, so no two steps share a stream
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    starts = torch.from_numpy(generator.integers(len(tokens) - block_size, size=batch_size))
    rows = tokens[starts[:, None] + torch.arange(block_size + 1)].long()
    return rows[:, :-1], rows[:, 1:]


def window_batches(tokens, block_size, limit=None, rank=0, world_size=1, windows_a_batch=64):
    """All consecutive non-overlapping windows of a split, in batches; the tail shorter than a window is left out.

    Args:
        tokens: (n,) int32.
        block_size: tokens in a window.
        limit: None or the number of windows to read.
        rank, world_size: this process takes every world_size-th batch.
        windows_a_batch: windows in a batch.

    Yields:
        inputs, targets: (windows, block_size) int64, targets shifted by one token.
    """
    n_windows = (len(tokens) - 1) // block_size
    n_windows = n_windows if limit is None else min(n_windows, limit)
    inputs = tokens[: n_windows * block_size].view(n_windows, block_size)
    targets = tokens[1 : n_windows * block_size + 1].view(n_windows, block_size)
    for start in range(rank * windows_a_batch, n_windows, world_size * windows_a_batch):
        yield inputs[start : start + windows_a_batch].long(), targets[start : start + windows_a_batch].long()
