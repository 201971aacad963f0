"""Masks of one row for all queries: the Triton kernels read them only in blocks of keys that have a hidden key."""

import math

import pytest
import torch
from attention_cases import DEVICE, Case

import fastattn
from fastattn import nn

_reason = fastattn.backends()[DEVICE]["triton"]
pytestmark = pytest.mark.skipif(_reason != "available", reason=f"the Triton backend cannot run here: {_reason}")

KEYS = 150  # three blocks of the interpreter
RANGES = {  # visible keys of two batch entries
    "right": ([(0, 150)], [(0, 70)]),
    "left": ([(64, 150)], [(80, 150)]),
    "both": ([(3, 128)], [(64, 128)]),
    "holes": ([(0, 66), (70, 150)], [(5, 20), (128, 129)]),
    "nothing": ([], [(149, 150)]),
}
FEATURES = {
    "plain": {"heads": 1},
    "causal": {"heads": 1, "window_right": 0, "sq": KEYS},
    "window": {"heads": 1, "window_left": 70, "window_right": 9, "sq": 130},
    "grouped": {"heads": 2, "kv_heads": 1, "lengths": [140, 66]},
    "features": {"heads": 1, "softcap": 2.0, "dropout_p": 0.2, "sink": True, "slopes": "heads"},
    "bias": {"heads": 1, "bias": ("queries", "keys")},
}


def key_mask(name):
    mask = torch.zeros(2, 1, 1, KEYS, dtype=torch.bool, device=DEVICE)
    for entry, ranges in enumerate(RANGES[name]):
        for begin, end in ranges:
            mask[entry, ..., begin:end] = True
    return mask


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # from numpy, in the interpreter
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("name", RANGES)
def test_hidden_keys_do_not_matter(name, features):
    """Hidden keys and values do not matter, even if they are NaN."""
    case = Case(batch=2, sk=KEYS, d=16, **({"sq": 70} | FEATURES[features]))
    mask = key_mask(name)[1:] if features == "plain" else key_mask(name)  # shared by both batch entries, or not
    case.replace(mask=mask)
    hidden = ~mask.expand(2, case.call.k.shape[1], 1, KEYS)[:, :, 0]
    case.call.k[hidden] = math.nan
    case.call.v[hidden] = math.inf
    case.check()


@pytest.mark.parametrize("name", RANGES)
def test_the_runs_of_a_mask(name):
    from fastattn.kernels.attention_mask import key_runs

    mask = key_mask(name).expand(2, 3, 5, KEYS)
    found = key_runs(mask, 2, mask.stride(), KEYS).ptr.tolist()
    for row, run in zip(mask[:, 0, 0].tolist(), found, strict=True):
        first = row.index(True) if any(row) else 0
        end = KEYS - row[::-1].index(True) if any(row) else 0
        end_run = next((j for j in range(first, end) if not row[j]), end)
        assert run == [first, end_run, end]


def test_a_padding_mask_costs_what_lengths_cost():
    """The same blocks are read, and the same bits come out."""
    lengths = [150, 70]
    case = Case(batch=2, sk=KEYS, d=16, lengths=lengths)
    with_lengths = case.forward()
    gradients = case.backward(with_lengths)
    case.replace(seqlens_k=None, mask=key_mask("right"))
    with_mask = case.forward()
    for got, expected in zip((*with_mask, *case.backward(with_mask)), (*with_lengths, *gradients), strict=True):
        assert torch.equal(got, expected)


def test_blocks_without_a_hidden_key_do_not_read_the_mask(monkeypatch):
    from fastattn.kernels import attention_call
    from fastattn.kernels.common import Rows

    case = Case(sq=64, sk=128, d=16)
    expected = case.forward()
    gradients = case.backward(expected)
    case.replace(mask=torch.zeros(1, 1, 1, 128, dtype=torch.bool, device=DEVICE))
    runs = torch.tensor([[0, 128, 128]], dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(attention_call, "key_runs", lambda *_: Rows(runs, (0,)))  # "everything is visible"
    got = case.forward()
    for have, want in zip((*got, *case.backward(got)), (*expected, *gradients), strict=True):
        assert torch.equal(have, want)


def encoder(x, hidden):
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, device=DEVICE)
    nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)(x, src_key_padding_mask=hidden)


def decoder(x, hidden):
    layer = nn.TransformerDecoderLayer(16, 2, 32, 0.0, batch_first=True, device=DEVICE)
    layer(x, x, tgt_key_padding_mask=hidden, memory_key_padding_mask=hidden, tgt_is_causal=True)


ENTRIES = {  # what is called, and how many of its attentions have a padding mask
    "MultiheadAttention": (lambda x, hidden: nn.MultiheadAttention(16, 2, batch_first=True, device=DEVICE)(
        x, x, x, key_padding_mask=hidden, need_weights=False), 1),
    "TransformerEncoder": (encoder, 2),
    "TransformerDecoderLayer": (decoder, 2),
    "scaled_dot_product_attention": (lambda x, hidden: fastattn.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], attn_mask=~hidden[:, None, None]), 1),
    "expanded": (lambda x, hidden: fastattn.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], attn_mask=(~hidden)[:, None, None].expand(2, 1, 9, 9)), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_the_padding_mask_of_every_entry_arrives_as_one_row(name, monkeypatch):
    from fastattn.kernels import attention_call

    found, key_runs = [], attention_call.key_runs
    monkeypatch.setattr(attention_call, "key_runs", lambda *call: found.append(key_runs(*call)) or found[-1])
    call, expected = ENTRIES[name]
    hidden = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    hidden[0, 5:] = True
    with fastattn.use_backend("triton"):
        call(torch.randn(2, 9, 16, device=DEVICE), hidden)
    assert [runs.ptr.tolist() for runs in found] == [[[0, 5, 5], [0, 9, 9]]] * expected
