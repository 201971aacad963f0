"""The attention kernels for the tiles of AMX, with the tiles in software: their bits cannot depend on the processor."""

import emulate_tiles
import pytest
import test_attention_native as all_kernels
import torch
from attention_cases import random_case

from fastattn.ops.attention import _ops

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    reason = emulate_tiles.why_not_available()
    if reason:
        pytest.skip(reason)
    for direction, table in _ops.items():
        op = getattr(emulate_tiles.load(), f"attention_{direction}").native
        for kind in (table, table.direct):
            monkeypatch.setitem(kind, "native", op)


@pytest.mark.parametrize("part", range(4))
def test_random_combinations_of_features(part, monkeypatch):
    for seed in range(part, 100, 4):
        q, k, v, kwargs = random_case(seed, dtypes=(BF16,))
        all_kernels.check(monkeypatch, f"seed {seed}", q, k, v, seed, **kwargs)


def test_fixed_shapes(monkeypatch):
    all_kernels.test_fixed_shapes(BF16, monkeypatch)


def test_what_stands_in_hidden_keys_does_not_matter():
    all_kernels.test_what_stands_in_hidden_keys_does_not_matter(BF16)


@pytest.mark.parametrize("name", ["the same in 16 bits", "a bias summed over everything"])
def test_reruns_and_thread_counts_agree_bit_for_bit(name):
    all_kernels.test_reruns_and_thread_counts_agree_bit_for_bit(name)


@pytest.mark.parametrize("sizes", all_kernels.SIZES_AT_THE_END)
def test_nothing_is_read_past_the_end_of_an_operand(sizes):
    all_kernels.test_nothing_is_read_past_the_end_of_an_operand(sizes, BF16)
