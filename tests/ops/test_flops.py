"""FlopCounterMode counts the products of our ops like those of torch's ops."""

import pytest
import torch
import torch.nn.functional as F
from processes import run_code
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

import fastattn
from fastattn import nn
from fastattn.models import CausalLM, KeyValueCache, kv_cache
from fastattn.ops import _gemm
from fastattn.ops._backends import why_not_available

aten = torch.ops.aten
# torch 2.13 does not count its attention on the CPU, which has the arguments of the GPU one
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda do, q, k, v, *_, **__: (
        flop_counter.sdpa_backward_flop_count(do, q, k, v)
    ),
}


def count(function, *inputs):
    """(forward, forward and backward) for a function of tensors, with its result summed."""
    counts = []
    for backward in (False, True):
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            out = function(*inputs)
            if backward:
                (out[0] if isinstance(out, tuple) else out).sum().backward()
        counts.append(counter.get_total_flops())
    return counts


def leaves(*shapes):
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_attention(n_kv_heads, is_causal):
    tensors = leaves((2, 4, 9, 16), (2, n_kv_heads, 9, 16), (2, n_kv_heads, 9, 16))

    def of(function):
        return count(lambda q, k, v: function(q, k, v, is_causal=is_causal, enable_gqa=True), *tensors)

    expected = [2 * 2 * 4 * 9 * 9 * 32, 2 * 2 * 4 * 9 * 9 * 32 + 2 * 2 * 4 * 9 * 9 * 80]
    assert of(fastattn.scaled_dot_product_attention) == expected
    if n_kv_heads == 4:  # torch repeats the heads on the CPU
        assert of(F.scaled_dot_product_attention) == expected


def test_attention_without_gradients_and_with_unequal_head_dims():
    q, k, v = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 7, 16), torch.randn(2, 4, 7, 8)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fastattn.attention(q, k, v)
        fastattn.attention(q, k, v, softcap=5.0)
    assert counter.get_total_flops() == 2 * (2 * 2 * 4 * 9 * 7 * (16 + 8))


def test_packed_attention_counts_the_pairs_within_sequences():
    tensors = leaves((11, 2, 8), (11, 2, 8), (11, 2, 8))
    ends = torch.tensor([0, 3, 11], dtype=torch.int32)

    def attention(q, k, v):
        return fastattn.attention(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, max_seqlen_q=8, max_seqlen_k=8)

    pairs = 2 * (3 * 3 + 8 * 8)
    assert count(attention, *tensors) == [2 * pairs * 16, 2 * pairs * 16 + 2 * pairs * 40]


def test_lengths_without_values_count_as_the_longest():
    with torch._subclasses.FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, ends = torch.empty(1, 2, 11, 8), torch.empty(3, dtype=torch.int32)
        rest = (None, None, None, None, ends, ends, None, None, 6, 7, -1, -1, False, 0.0, 0.0, 1.0)
        torch.ops.fastattn.attention_fwd.native(q, q, q, *rest, True)
    assert counter.get_total_flops() == 2 * (2 * 2 * 6 * 7) * 16
    with torch._subclasses.FakeTensorMode(), FlopCounterMode(display=False) as counter:
        q, cache, lengths = torch.empty(2, 4, 1, 8), torch.empty(2, 2, 32, 8), torch.empty(2, dtype=torch.int32)
        rest = (lengths, None, None, None, None, None, 0, -1, 0, 0.0, 1.0, 0)
        torch.ops.fastattn.attention_decode_fwd.native(q, cache, cache, *rest)
    assert counter.get_total_flops() == 2 * (2 * 4 * 32) * 16


def test_attention_decode_counts_the_valid_keys():
    q, cache = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 32, 8)
    lengths = torch.tensor([5, 30], dtype=torch.int32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fastattn.attention_decode(q, cache, cache, cache_seqlens=lengths)
    assert counter.get_total_flops() == 2 * 4 * 35 * (8 + 8)


def test_a_layer_on_a_cache_counts_as_its_children(monkeypatch):
    model = CausalLM(50, n_layer=2, n_head=4, n_kv_head=2, d_model=32, block_size=16, feed_forward="swiglu").eval()
    tokens, found = torch.randint(50, (2, 5)), []
    for layers in (kv_cache.read_layers, lambda blocks: None):
        monkeypatch.setattr(kv_cache, "read_layers", layers)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(tokens, cache=KeyValueCache(model, 2))
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("ours", [False, True])
def test_feed_forward(rows, ours, monkeypatch):
    """With our kernel the products are not aten ops."""
    if ours and why_not_available("native", "cpu") is not None:
        pytest.skip(f"no C++ kernels: {why_not_available('native', 'cpu')}")
    monkeypatch.setattr(_gemm, "_has_kernel", ours)
    x, w1, w2 = leaves((rows, 128), (256, 128), (128, 256))
    product = 2 * rows * 128 * 256
    assert count(lambda x, w1, w2: fastattn.feed_forward(x, w1, None, w2, None), x, w1, w2) == [
        2 * product,
        6 * product,
    ]
    assert count(lambda x, w1, w2: F.linear(F.gelu(F.linear(x, w1)), w2), x, w1, w2) == [2 * product, 6 * product]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_cross_entropy(reduction):
    x, weight = leaves((20, 16), (50, 16))
    target, product = torch.randint(50, (20,)), 2 * 20 * 16 * 50

    def ours(x, weight):
        return fastattn.linear_cross_entropy(x, weight, target, reduction=reduction)

    def theirs(x, weight):
        return F.cross_entropy(F.linear(x, weight), target, reduction=reduction)

    assert count(theirs, x, weight) == [product, 3 * product]
    # with a mean the forward computes the gradients; without reduction the backward recomputes the logits
    assert count(ours, x, weight) == ([3 * product] * 2 if reduction == "mean" else [product, 4 * product])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ours(x, weight)
    assert counter.get_total_flops() == product


@pytest.mark.parametrize("name", ["TransformerEncoderLayer", "TransformerDecoderLayer"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_layers_count_as_those_of_torch(name, norm_first):
    inputs = [torch.randn(2, length, 16) for length in ((5, 7) if "Decoder" in name else (5,))]
    counts = [
        count(getattr(library, name)(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first), *inputs)
        for library in (nn, torch.nn)
    ]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_backward_of_a_layer_counts_alone_too(norm_first, batch_first, needs_dx):
    x, counts = torch.randn(2, 5, 16, requires_grad=needs_dx), []
    for library in (nn, torch.nn):
        layer = library.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=batch_first, norm_first=norm_first)
        y = layer(x)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("needs_dmemory", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_the_backward_of_a_decoder_layer_counts_alone_too(norm_first, needs_dmemory):
    x, memory, counts = torch.randn(2, 5, 16), torch.randn(2, 7, 16, requires_grad=needs_dmemory), []
    for library in (nn, torch.nn):
        layer = library.TransformerDecoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first)
        y = layer(x, memory)
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_the_counter_is_imported_by_nobody_but_the_user():
    code = """if True:
        import sys, fastattn, torch
        assert "torch.utils.flop_counter" not in sys.modules
        from torch.utils.flop_counter import flop_registry
        print(torch.ops.fastattn.attention_fwd in flop_registry)
    """
    assert run_code(code, TRITON_INTERPRET="0").strip() == "True"


def test_weights_of_attention_are_a_second_pass():
    layer, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    forward, _ = count(lambda x: layer(x, x, x), x)
    without, _ = count(lambda x: layer(x, x, x, need_weights=False), x)
    assert forward - without == 2 * 2 * 4 * 5 * 5 * 4
