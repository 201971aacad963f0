"""Masks of one row for all queries: the Triton kernels read them only in blocks of keys that have a hidden key."""

import math

import pytest
import torch
from attention_cases import DEVICE, Case

import fastattn
import fastattn.models
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


def layer_of(kind, **more):
    return getattr(nn, f"Transformer{kind}Layer")(16, 2, 32, 0.0, batch_first=True, device=DEVICE, **more)


def encoder(x, hidden, **more):
    nn.TransformerEncoder(layer_of("Encoder"), 2, enable_nested_tensor=False)(x, src_key_padding_mask=hidden, **more)


def decoder(x, hidden):
    layer_of("Decoder")(x, x, tgt_key_padding_mask=hidden, memory_key_padding_mask=hidden, tgt_is_causal=True)


def decoders(x, hidden):
    stack = nn.TransformerDecoder(layer_of("Decoder", norm_first=True), 2)
    causal = nn.Transformer.generate_square_subsequent_mask(9, device=DEVICE)
    stack(x, x, tgt_mask=causal, tgt_key_padding_mask=hidden, memory_key_padding_mask=hidden)


def whole(x, hidden):
    model = nn.Transformer(16, 2, 1, 1, 32, 0.0, batch_first=True, device=DEVICE)
    model(x, x, src_key_padding_mask=hidden, tgt_key_padding_mask=hidden, memory_key_padding_mask=hidden)


def replaced(x, hidden):
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, device=DEVICE)
    model = torch.nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    fastattn.replace(model)
    model(x, src_key_padding_mask=hidden)


def patched(x, hidden):
    with fastattn.patch_sdpa():
        torch.nn.functional.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=~hidden[:, None, None])


def packed_varlen(x, hidden):
    from fastattn.integrations.flash_attn import flash_attn_varlen_func

    ends = torch.tensor([0, 5, 14], dtype=torch.int32, device=DEVICE)
    flash_attn_varlen_func(*[x[~hidden].half()[:, None]] * 3, ends, ends, 9, 9, causal=True)


def harness(kind, *more, **shape):
    """A model of fastattn.models on padded tokens."""

    def call(x, hidden):
        shape_of_it = {"d_model": 16, "n_head": 2, "n_layer": 1, "d_ff": 32, "block_size": 9, "dropout": 0.0} | shape
        model = getattr(fastattn.models, kind)(20, *more, **shape_of_it).to(DEVICE)
        tokens, lengths = torch.ones(2, 9, dtype=torch.int64, device=DEVICE), (~hidden).sum(1)
        model(tokens, lengths, *[tokens] * (kind == "Seq2Seq"))

    return call


def hugging_face(kind, causal):
    """A model of transformers with attn_implementation="fastattn" on padded tokens."""

    def call(x, hidden):
        transformers = pytest.importorskip("transformers")
        fastattn.register()
        sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
        config = getattr(transformers, f"{kind}Config")(vocab_size=20, max_position_embeddings=9, **sizes)
        model = getattr(transformers, f"{kind}Model")._from_config(config, attn_implementation="fastattn").to(DEVICE)
        tokens = torch.ones(2, 9, dtype=torch.int64, device=DEVICE)
        model.train()(tokens, attention_mask=(~hidden).long())

    return call


CAUSAL = torch.ones(9, 9, device=DEVICE).triu(1).bool()
ENTRIES = {  # the model that is called, and how many of its attention calls have a padding mask
    "MultiheadAttention": (lambda x, hidden: nn.MultiheadAttention(16, 2, batch_first=True, device=DEVICE)(
        x, x, x, key_padding_mask=hidden, need_weights=False), 1),
    "TransformerEncoder": (encoder, 2),
    "TransformerEncoder, causal": (lambda x, hidden: encoder(x, hidden, mask=CAUSAL), 2),
    "TransformerEncoderLayer": (lambda x, hidden: layer_of("Encoder")(x, src_key_padding_mask=hidden), 1),
    "TransformerDecoder": (decoders, 4),
    "TransformerDecoderLayer": (decoder, 2),
    "Transformer": (whole, 3),
    "replace": (replaced, 1),
    "patch_sdpa": (patched, 1),
    "scaled_dot_product_attention": (lambda x, hidden: fastattn.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], attn_mask=~hidden[:, None, None]), 1),
    "expanded": (lambda x, hidden: fastattn.scaled_dot_product_attention(
        x[:, None], x[:, None], x[:, None], attn_mask=(~hidden)[:, None, None].expand(2, 1, 9, 9)), 1),
    "Classifier": (harness("Classifier", 3), 1),
    "Classifier with rotary positions": (harness("Classifier", 3, positions="rotary"), 1),
    "Classifier with ALiBi": (harness("Classifier", 3, positions="alibi"), 1),
    "MaskedLM": (harness("MaskedLM"), 1),
    "Seq2Seq": (harness("Seq2Seq"), 2),
    "Seq2Seq with a window": (harness("Seq2Seq", positions="rotary", window=4), 2),
    "BERT of transformers": (hugging_face("Bert", False), 1),
    "Llama of transformers": (hugging_face("Llama", True), 1),
    "flash_attn_varlen_func": (packed_varlen, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES)
def test_padding_arrives_as_lengths_from_every_entry(name, monkeypatch):
    """As lengths, as packed sequences, or as a mask of one row, in which a kernel finds the lengths."""
    from fastattn.kernels import attention_fwd

    padded, prepare = [], attention_fwd.prepare

    def look(*call):
        plan, features = prepare(*call)
        assert not plan.form.MASKED, "a mask with a row for each query"
        assert features.bias is None, "a bias with the mask in it"
        if features.runs is not None:
            padded.append(features.runs.ptr[:, 1:].tolist())
        elif features.seqlens_k_ptr is not None:
            padded.append([[length, length] for length in features.seqlens_k_ptr.tolist()])
        elif features.cu_seqlens_k_ptr is not None:
            padded.append([[length, length] for length in features.cu_seqlens_k_ptr.diff().tolist()])
        return plan, features

    monkeypatch.setattr(attention_fwd, "prepare", look)
    call, expected = ENTRIES[name]
    hidden = torch.zeros(2, 9, dtype=torch.bool, device=DEVICE)
    hidden[0, 5:] = True
    with fastattn.use_backend("triton"):
        call(torch.randn(2, 9, 16, device=DEVICE), hidden)
    assert padded == [[[5, 5], [9, 9]]] * expected
