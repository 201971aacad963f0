"""Nested tensors: ops compute the same for each sequence as for it alone, gradients included."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from nested_cases import LAYOUTS, LENGTHS, OTHERS, assert_alike, compiled, heads, nest, parts_of, sequences

import fastattn
from fastattn import nn
from fastattn.integrations.flash_attn import flash_attn_func, flash_attn_with_kvcache

COS, SIN = torch.rand(12, 4), torch.rand(12, 4)
W, B, W1, W2 = torch.randn(8), torch.randn(8), torch.randn(16, 8), torch.randn(8, 16)
HEAD = torch.randn(11, 8)


@pytest.fixture(params=LAYOUTS, ids=str)
def layout(request):
    return request.param


class TestAttention:
    CASES: ClassVar = {
        "self": (LENGTHS, {}),
        "cross": (OTHERS, {}),
        "causal": (LENGTHS, {"causal": True}),
        "causal cross": (OTHERS, {"causal": True}),
        "top left": (OTHERS, {"causal": "top_left"}),
        "window": (OTHERS, {"window": (1, 2), "softcap": 3.0, "scale": 0.3}),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_values_and_gradients(self, case, layout):
        lengths_k, options = self.CASES[case]
        parts = sequences(LENGTHS, 4, 8), sequences(lengths_k, 2, 8, seed=1), sequences(lengths_k, 2, 6, seed=2)
        views, leaves = zip(*(heads(p, layout, requires_grad=True) for p in parts), strict=True)
        if lengths_k is LENGTHS and layout is torch.jagged:  # with the offsets of q, like projections of one input
            offsets = leaves[0].offsets()
            leaves = [torch.nested.nested_tensor_from_jagged(t.values().detach(), offsets) for t in leaves]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            views = [leaf.transpose(1, 2) for leaf in leaves]
        out, lse = fastattn.attention(*views, **options, return_lse=True)
        twins = [[p.clone().requires_grad_() for p in part] for part in parts]
        right = [
            fastattn.attention(*(t.transpose(0, 1)[None] for t in qkv), **options, return_lse=True)
            for qkv in zip(*twins, strict=True)
        ]
        assert out.layout is layout
        assert_alike(out, [o[0] for o, _ in right])
        assert_alike(lse, [lse[0] for _, lse in right])
        found = zip(out.unbind(), lse.unbind(), strict=True)
        total, wanted = (sum((o * 0.3).sum() + m[m.isfinite()].sum() for o, m in results) for results in (found, right))
        grads = torch.autograd.grad(total, leaves)
        flat = torch.autograd.grad(wanted, [t for twin in twins for t in twin], allow_unused=True)
        for i, grad in enumerate(grads):
            want = flat[i * len(LENGTHS) : (i + 1) * len(LENGTHS)]
            assert_alike(grad, [t if layout is torch.jagged else t.transpose(0, 1) for t in want], rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("lengths_k", [LENGTHS, OTHERS], ids=["self", "cross"])
    def test_torch_signature(self, is_causal, lengths_k, layout):
        parts = sequences(LENGTHS, 4, 8), sequences(lengths_k, 4, 8, seed=1), sequences(lengths_k, 4, 6, seed=2)
        views = [heads(p, layout)[0] for p in parts]
        out = fastattn.scaled_dot_product_attention(*views, is_causal=is_causal)
        right = [
            F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in qkv), is_causal=is_causal)
            for qkv in zip(*parts, strict=True)
        ]
        assert_alike(out, right, rtol=1e-4, atol=1e-5)

    def test_the_result_has_the_offsets_of_the_query(self):
        """So that the result can be added to the query."""
        q, _ = heads(sequences(LENGTHS, 4, 8), torch.jagged)
        for out in (fastattn.attention(q, q, q), fastattn.scaled_dot_product_attention(q, q, q)):
            assert out.shape == q.shape
            assert_alike(out + q, [a + b for a, b in zip(out.unbind(), q.unbind(), strict=True)])

    def test_fewer_heads_and_dropout(self, layout):
        q, kv = (heads(sequences(LENGTHS, n, 8), layout)[0] for n in (4, 2))
        out = fastattn.scaled_dot_product_attention(q, kv, kv, enable_gqa=True)
        assert_alike(out, parts_of(fastattn.attention(q, kv, kv)))
        torch.manual_seed(0)
        dropped = fastattn.attention(q, kv, kv, dropout_p=0.5)
        torch.manual_seed(0)
        same = fastattn.scaled_dot_product_attention(q, kv, kv, dropout_p=0.5, enable_gqa=True)
        assert_alike(dropped, parts_of(same))

    def test_a_ragged_batch_of_grids(self):
        """torch treats (batch, ragged, seqlen, head_dim) as having one more batch dimension."""
        parts = sequences((2, 3), 5, 8)
        x = nest(parts, torch.jagged)
        mask = torch.nested.nested_tensor_from_jagged(torch.randn(5, 5, 5), x.offsets())
        for more in ({}, {"is_causal": True}):
            out = fastattn.scaled_dot_product_attention(x, x, x, **more)
            right = F.scaled_dot_product_attention(x, x, x, **more)
            assert_alike(out, right.unbind(), rtol=1e-4, atol=1e-5)
        out = fastattn.scaled_dot_product_attention(x, x, x, mask)
        right = [F.scaled_dot_product_attention(t, t, t, m) for t, m in zip(parts, mask.unbind(), strict=True)]
        assert_alike(out, right, rtol=1e-4, atol=1e-5)

    def test_flash_attn(self):
        x = nest(sequences(LENGTHS, 4, 8), torch.jagged)
        out = flash_attn_func(x, x, x, causal=True)
        assert out.shape == x.shape
        q = x.transpose(1, 2)
        assert_alike(out, parts_of(fastattn.attention(q, q, q, causal=True), transpose=True))
        with pytest.raises(TypeError, match="flash_attn_with_kvcache: q must not be a nested tensor"):
            flash_attn_with_kvcache(x, x, x)

    def test_explain(self, layout):
        q, _ = heads(sequences(LENGTHS, 4, 8), layout)
        packed = torch.cat(sequences(LENGTHS, 4, 8))
        cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
        right = fastattn.explain("attention", *[packed] * 3, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens)
        assert fastattn.explain("attention", q, q, q) == right
        assert fastattn.explain("scaled_dot_product_attention", q, q, q) == right

    def test_mistakes_are_named(self, layout):
        q, _ = heads(sequences(LENGTHS, 4, 8), layout)
        kv, _ = heads(sequences(OTHERS, 4, 8), layout)
        dense = torch.randn(4, 4, 5, 8)
        cu_seqlens = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
        attention, torchs = fastattn.attention, fastattn.scaled_dot_product_attention
        for error, message, call in (
            (ValueError, "packed sequences take neither mask", lambda: attention(q, q, q, mask=dense[0, 0] > 0)),
            (ValueError, "attention: k must be a nested tensor, like q", lambda: attention(q, dense, dense)),
            (ValueError, "attention: q must be a nested tensor, like k", lambda: attention(dense, q, q)),
            (ValueError, "attention: v must have sequences of the same lengths as k", lambda: attention(q, q, kv)),
            (ValueError, "attention: cu_seqlens_q must be None", lambda: attention(q, q, q, cu_seqlens_q=cu_seqlens)),
            (TypeError, "attention: there is no argument attn_mask", lambda: attention(q, q, q, attn_mask=dense)),
            (TypeError, "attention: takes q, k, v by position, got 4", lambda: attention(q, q, q, dense)),
            (ValueError, "scaled_.*: attn_mask must be None for nested", lambda: torchs(q, q, q, dense[0, 0, :5, :5])),
            (ValueError, "scaled_.*: query must be a nested tensor, like key", lambda: torchs(dense, q, q)),
            (TypeError, "attention_decode: q must not be a nested tensor",
             lambda: fastattn.attention_decode(q, dense, dense, cache_seqlens=cu_seqlens[1:])),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                call()
        with pytest.raises(ValueError, match="must have the same number of heads unless enable_gqa"):
            torchs(q, *[heads(sequences(LENGTHS, 2, 8), layout)[0]] * 2)

    def test_other_ragged_dimensions_are_named(self):
        x = nest(sequences(LENGTHS, 4, 8), torch.jagged)  # not transposed
        with pytest.raises(ValueError, match=r"ragged in seqlen, got .*; pass a .* tensor as t.transpose\(1, 2\)"):
            fastattn.attention(x, x, x)
        padded = torch.randn(3, 6, 2, 8)
        gaps = torch.nested.narrow(padded, 1, torch.tensor([0, 1, 2]), torch.tensor([2, 3, 4]), layout=torch.jagged)
        with pytest.raises(ValueError, match=r"without gaps: call its contiguous\(\) first"):
            fastattn.attention(*[gaps.transpose(1, 2)] * 3)
        with pytest.raises(ValueError, match="without gaps"):
            fastattn.layer_norm(gaps)
        whole = gaps.contiguous()
        assert_alike(fastattn.layer_norm(whole), [fastattn.layer_norm(t) for t in gaps.unbind()])


class TestStridedAsInTorch:
    """torch's scaled_dot_product_attention takes strided nested tensors with heads of their own."""

    QUERIES, KEYS = (2, 3, 4), (3, 4, 5)

    @pytest.mark.parametrize("is_causal", [False, True])
    @pytest.mark.parametrize("heads", [None, (2, 3, 4), (1, 3, 1)])
    def test_without_heads_and_with_other_heads_in_every_sequence(self, heads, is_causal):
        leading = [()] * 3 if heads is None else [(count,) for count in heads]
        lists = [
            [torch.randn(*lead, length, 8, requires_grad=True) for lead, length in zip(leading, lengths, strict=True)]
            for lengths in (self.QUERIES, self.KEYS, self.KEYS)
        ]
        out = fastattn.scaled_dot_product_attention(
            *(torch.nested.as_nested_tensor(tensors) for tensors in lists), is_causal=is_causal
        )
        right = [F.scaled_dot_product_attention(*qkv, is_causal=is_causal) for qkv in zip(*lists, strict=True)]
        inputs = [t for tensors in lists for t in tensors]
        grads = torch.autograd.grad(sum((t * t).sum() for t in out.unbind()), inputs)
        for got, want in zip(out.unbind(), right, strict=True):
            torch.testing.assert_close(got, want)
        for got, want in zip(grads, torch.autograd.grad(sum((t * t).sum() for t in right), inputs), strict=True):
            torch.testing.assert_close(got, want)

    def test_what_does_not_fit_is_named(self):
        q = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(1, 3, 8)])
        k = torch.nested.nested_tensor([torch.randn(1, 3, 8), torch.randn(2, 3, 8)])
        flat = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(4, 8)])
        ragged = torch.nested.nested_tensor([torch.randn(2, 3, 8), torch.randn(2, 3, 4)])
        for function, args, message in (
            (
                fastattn.scaled_dot_product_attention,
                (q, k, k),
                "key must have as many heads as query in every sequence",
            ),
            (fastattn.scaled_dot_product_attention, (flat, q, q), "query must be nested .*, got 3 dimensions"),
            (fastattn.scaled_dot_product_attention, (q, flat, flat), "key must be nested .*, got 3 dimensions"),
            (fastattn.attention, (flat, flat, flat), "q must be nested .*, got 3 dimensions"),
            (fastattn.attention, (ragged, ragged, ragged), "q must not be ragged in its last dimension"),
            (fastattn.layer_norm, (ragged,), "x must not be ragged in its last dimension"),
        ):
            with pytest.raises(ValueError, match=f"{function.__name__}: {message}"):
                function(*args)


# an op on rows: (function of x and residual, whether it takes a residual)
ROWS = {
    "layer_norm": lambda x, r: fastattn.layer_norm(x, W, B),
    "layer_norm with residual": lambda x, r: fastattn.layer_norm(x, W, B, residual=r),
    "rms_norm": lambda x, r: fastattn.rms_norm(x, W),
    "rms_norm with residual": lambda x, r: fastattn.rms_norm(x, W, residual=r, return_residual=True)[0],
    "residual stream": lambda x, r: fastattn.layer_norm(x, W, B, residual=r, return_residual=True)[1],
    "feed_forward": lambda x, r: fastattn.feed_forward(x, W1, None, W2, None),
    "gated": lambda x, r: fastattn.feed_forward(x, W1, None, W2, None, activation="silu", w_gate=W1 + 1),
    "add": lambda x, r: fastattn.dropout(x, 0.0, residual=r) if r is x else fastattn.dropout(x, 0.0),
}


class TestRows:
    @pytest.mark.parametrize("name", ROWS)
    def test_values_and_gradients(self, name, layout):
        call, parts = ROWS[name], sequences(LENGTHS, 8)
        x = nest(parts, layout, requires_grad=True)
        out = call(x, x)
        twins = [p.clone().requires_grad_() for p in parts]
        right = [call(t, t) for t in twins]
        assert out.layout is layout
        assert_alike(out, right, rtol=1e-5, atol=1e-6 * max(t.abs().max().item() for t in right if t.numel()))
        (grad,) = torch.autograd.grad(sum((t * t).sum() for t in out.unbind()), x)
        expected = torch.autograd.grad(sum((t * t).sum() for t in right), twins)
        largest = max(t.abs().max().item() for t in expected if t.numel())  # an element may be a sum that cancels
        assert_alike(grad, expected, rtol=1e-4, atol=1e-6 * largest)

    def test_more_dimensions(self):
        x, _ = heads(sequences(LENGTHS, 2, 8), torch.jagged)  # (batch, heads, ragged, 8)
        assert_alike(fastattn.layer_norm(x, W), [fastattn.layer_norm(t, W) for t in x.unbind()])
        x = nest([p.transpose(0, 1) for p in sequences(LENGTHS, 2, 8)], torch.strided)
        assert_alike(fastattn.layer_norm(x, W), [fastattn.layer_norm(t, W) for t in x.unbind()])

    def test_dropout(self, layout):
        x = nest(sequences((40, 60), 8), layout)
        out = fastattn.dropout(x, 0.25, residual=x)
        kept = torch.cat([(o - t) != 0 for o, t in zip(out.unbind(), x.unbind(), strict=True)])
        assert 0.6 < kept.float().mean() < 0.9
        torch.manual_seed(0)
        y = fastattn.layer_norm(x, W, dropout_p=0.5, residual=x)
        torch.manual_seed(0)
        rows = torch.cat(x.unbind())
        assert torch.equal(torch.cat(y.unbind()), fastattn.layer_norm(rows, W, dropout_p=0.5, residual=rows))

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_linear_cross_entropy(self, reduction, layout):
        parts = sequences(LENGTHS, 8)
        targets = [torch.arange(n) % 11 for n in LENGTHS]
        targets[2][1] = -100
        x = nest(parts, layout, requires_grad=True)
        target = nest(targets, layout)
        head = HEAD.clone().requires_grad_()
        loss = fastattn.linear_cross_entropy(x, head, target, reduction=reduction)
        rows, twin = torch.cat(parts).requires_grad_(), HEAD.clone().requires_grad_()
        right = fastattn.linear_cross_entropy(rows, twin, torch.cat(targets), reduction=reduction)
        if reduction == "none":
            assert loss.layout is layout
            assert_alike(loss, right.split(LENGTHS))
            loss, right = sum(t.sum() for t in loss.unbind()), right.sum()
        torch.testing.assert_close(loss, right)
        dx, dhead = torch.autograd.grad(loss, (x, head))
        drows, dtwin = torch.autograd.grad(right, (rows, twin))
        assert_alike(dx, drows.split(LENGTHS))
        torch.testing.assert_close(dhead, dtwin)

    def test_mistakes_are_named(self, layout):
        x, other = nest(sequences(LENGTHS, 8), layout), nest(sequences(OTHERS, 8), layout)
        target = nest([torch.zeros(n, dtype=torch.int64) for n in OTHERS], layout)
        rows = torch.randn(9, 8)
        for error, message, call in (
            (ValueError, "layer_norm: residual must have sequences of the same lengths as x",
             lambda: fastattn.layer_norm(x, residual=other)),
            (ValueError, "layer_norm: residual must be a nested tensor, like x",
             lambda: fastattn.layer_norm(x, residual=rows)),
            (ValueError, "rms_norm: (x must be a nested tensor, like residual|residual must have shape)",
             lambda: fastattn.rms_norm(rows, residual=x)),
            (ValueError, "layer_norm: weight must ", lambda: fastattn.layer_norm(rows, x)),
            (ValueError, "layer_norm: weight must not be a nested tensor", lambda: fastattn.layer_norm(x, x)),
            (ValueError, "layer_norm: weight must have shape", lambda: fastattn.layer_norm(x, W[:3])),
            (ValueError, "linear_cross_entropy: target must have sequences of the same lengths as x",
             lambda: fastattn.linear_cross_entropy(x, HEAD, target)),
            (ValueError, "feed_forward: w1 must", lambda: fastattn.feed_forward(x, x, None, x, None)),
            (TypeError, "layer_norm: there is no argument normalized_shape",
             lambda: fastattn.layer_norm(x, normalized_shape=(8,))),
        ):  # fmt: skip
            with pytest.raises(error, match=message):
                call()
        with pytest.raises(ValueError, match="x must be a nested tensor with at least one sequence, got none"):
            fastattn.layer_norm(torch.nested.nested_tensor([]))
        with pytest.raises(ValueError, match="x must not be ragged in its last dimension"):
            fastattn.layer_norm(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged))


class TestRotary:
    @pytest.mark.parametrize("positions", [None, 2, "nested"])
    def test_each_sequence_begins_anew(self, positions, layout):
        parts = sequences(LENGTHS, 4, 8)
        q, leaf = heads(parts, layout, requires_grad=True)
        k, _ = heads([p[:, :2] for p in parts], layout)
        rows = [torch.arange(n) for n in LENGTHS]
        rows = [row.flip(0) if positions == "nested" else row + (positions or 0) for row in rows]
        given = nest(rows, layout) if positions == "nested" else positions
        out, rotated_k = fastattn.rotary_embedding((q, k), COS, SIN, positions=given)
        twins = [p.clone().requires_grad_() for p in parts]
        right = [
            fastattn.rotary_embedding(t.transpose(0, 1)[None], COS, SIN, positions=p)[0]
            for t, p in zip(twins, rows, strict=True)
        ]
        assert_alike(out, right)
        assert_alike(rotated_k, [t[:2] for t in right])
        (grad,) = torch.autograd.grad(sum((t * t).sum() for t in out.unbind()), leaf)
        want = torch.autograd.grad(sum((t * t).sum() for t in right), twins)
        assert_alike(grad, [t if layout is torch.jagged else t.transpose(0, 1) for t in want])

    def test_the_module_grows_its_tables(self, layout):
        q, _ = heads(sequences((3, 9), 2, 8), layout)
        rotary = nn.RotaryEmbedding(8, max_seqlen=4)
        right = nn.RotaryEmbedding(8)
        assert_alike(rotary(q), [right(t[None])[0] for t in q.unbind()])
        assert_alike(rotary(q, positions=5), [right(t[None], positions=5)[0] for t in q.unbind()])

    def test_mistakes_are_named(self, layout):
        q, _ = heads(sequences(LENGTHS, 4, 8), layout)
        other, _ = heads(sequences(OTHERS, 4, 8), layout)
        for message, more in (
            ("inplace must be False for nested", {"inplace": True}),
            ("positions must be None, an int or nested", {"positions": torch.arange(9)}),
            ("positions must lie within the 12 rows", {"positions": 10}),
        ):
            with pytest.raises(ValueError, match=message):
                fastattn.rotary_embedding(q, COS, SIN, **more)
        with pytest.raises(ValueError, match="k must have sequences of the same lengths as q"):
            fastattn.rotary_embedding((q, other), COS, SIN)
        table = nest([COS], layout)
        for x in (q, torch.ones(1, 4, 3, 8)):
            with pytest.raises(ValueError, match="rotary_embedding: cos "):
                fastattn.rotary_embedding(x, table, table)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiled(requires_grad):
    x = nest(sequences((3, 5, 1), 2, 8), torch.jagged, requires_grad)
    y = torch.nested.nested_tensor_from_jagged(torch.randn(9, 8), x.offsets()).requires_grad_(requires_grad)
    target = torch.nested.nested_tensor_from_jagged(torch.arange(9) % 11, x.offsets())

    def block(x, y, target):
        q = fastattn.rotary_embedding(x.transpose(1, 2), COS, SIN)
        out = fastattn.attention(q, q, q, causal=True) + fastattn.scaled_dot_product_attention(q, q, q)
        y = fastattn.feed_forward(fastattn.layer_norm(y, W, residual=y), W1, None, W2, None)
        return out, y, fastattn.linear_cross_entropy(y, HEAD, target)

    results = [function(x, y, target) for function in (block, lambda *inputs: compiled(block, *inputs))]
    (out, y1, loss), (out2, y2, loss2) = results
    assert_alike(out2, parts_of(out))
    assert_alike(y2, parts_of(y1))
    torch.testing.assert_close(loss2, loss)
    if requires_grad:
        grads = [torch.autograd.grad(o.values().sum() + loss, (x, y)) for o, _, loss in results]
        for got, want in zip(*grads, strict=True):
            assert_alike(got, parts_of(want))
