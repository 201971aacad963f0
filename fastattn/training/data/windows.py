"""The tokens of a text, read in random windows for training and in consecutive ones for evaluation."""

import io

import numpy as np
import torch

from ..config import DataConfig
from ..messages import expect
from .text import check_summary, fingerprint, read_text, split_text
from .tokenizer import build_tokenizer, needed_specials


class TextData:
    """The splits of a text as token numbers.

    Args:
        config: DataConfig, which names the text and the split.
        tokenizer: None builds one from the text.
        expected: None or the summary of the text that a run was trained on.

    Raises:
        UsageError: the text is unusable or not the expected one, has characters unknown to the tokenizer, or the config
            has settings of documents.
    """

    def __init__(self, config, tokenizer=None, expected=None):
        default = DataConfig()
        settings = [("unit", config.unit, default.unit)]
        settings += [
            (f"columns.{name}", value, getattr(default.columns, name)) for name, value in vars(config.columns).items()
        ]
        for name, got, usual in settings:
            expect(got == usual, f"data.{name}", "left out for a text; --data.packed true reads documents", got)
        text = read_text(config.source)
        self.summary = {"source": config.source, "characters": len(text), "sha256": fingerprint(text)}
        check_summary(self.summary, expected)
        parts = split_text(text, config.validation_fraction, config.test_fraction)
        if tokenizer is None:
            tokenizer = build_tokenizer(
                config.tokenizer,
                [text],
                io.StringIO(parts["train"], newline="\n"),
                config.vocab_size,
                needed_specials(config.tokenizer),
                config.strip_accents,
            )
        self.tokenizer = tokenizer
        if not config.test_fraction:
            del parts["test"]
        self.splits = {name: to_tokens(tokenizer, part) for name, part in parts.items()}


def to_tokens(tokenizer, text, piece=2**20):
    """The text as int32 tensor (tokens,), encoded in chunks of about `piece` characters to save memory.

    A chunk ends with a line if it has a line end, so that no word is cut in two.
    """
    chunks, start = [], 0
    while start < len(text) or not chunks:
        end = start + piece
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        chunks.append(torch.tensor(tokenizer.encode(text[start:end]), dtype=torch.int32))
        start = end
    return torch.cat(chunks)


def random_starts(n_tokens, seed, step, batch_size, block_size):
    """The starts of the windows of a step, a pure function of (seed, step): no state to save, equal on all devices.

    Args:
        n_tokens: tokens in the text, more than block_size.
        seed, step: at least 0.
        batch_size, block_size: number of windows, and tokens in each; one more token follows each.

    Returns:
        (batch_size,) int64.
    """
    # a counter-based generator keyed by (seed, step): no two steps share a stream
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    return torch.from_numpy(generator.integers(n_tokens - block_size, size=batch_size))


def window_starts(n_tokens, block_size, limit=None, rank=0, world_size=1, windows_a_batch=64):
    """The starts of all consecutive non-overlapping windows, in batches; an incomplete last window is left out.

    Args:
        n_tokens: tokens in the text.
        block_size: tokens in a window; one more token follows each.
        limit: None or the largest number of windows.
        rank, world_size: this process takes every world_size-th batch.
        windows_a_batch: windows in a batch.

    Yields:
        (windows,) int64.
    """
    n_windows = (n_tokens - 1) // block_size
    n_windows = n_windows if limit is None else min(n_windows, limit)
    for start in range(rank * windows_a_batch, n_windows, world_size * windows_a_batch):
        yield torch.arange(start, min(start + windows_a_batch, n_windows)) * block_size
