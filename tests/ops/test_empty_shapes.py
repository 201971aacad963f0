"""Every op with sizes that are 0, one or two at a time, forward and backward.

Outputs and gradients equal those of PyTorch if it has the op, otherwise those of the reference: nothing crashes, a sum
over nothing is 0, and there is NaN only where PyTorch has it.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from op_cases import leaf
from torch.testing import assert_close

import fastattn


def emptied(sizes, most=2):
    """(name, the sizes) with up to `most` of the sizes set to 0, in all combinations."""
    for count in range(1, most + 1):
        for names in itertools.combinations(sizes, count):
            yield " and ".join(names), sizes | dict.fromkeys(names, 0)


def results(function, inputs):
    """Outputs, and gradients of the inputs for incoming gradients of 1."""
    torch.manual_seed(0)
    inputs = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [t for t in inputs if t.requires_grad]
    if not wanted or not torch.is_grad_enabled():
        return outputs
    grads = torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs], allow_unused=True)
    return *outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True))


def check(what, function, expected, inputs):
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            pairs = zip(results(function, inputs), results(expected, inputs), strict=True)
            for number, (a, b) in enumerate(pairs):
                assert_close(a, b, equal_nan=True, msg=lambda text, n=number: f"{what}, tensor {n}: {text}")


def by_backend(name, function):
    def call(*inputs):
        with fastattn.use_backend(name):
            return function(*inputs)

    return call


# the arguments of `attention` besides q, k and v, made from the sizes: (keyword arguments, more inputs by name)
SCORES = ("batch", "heads", "queries", "keys")


def bias_over(*dims):
    """A bias with an own value for each index of `dims`, broadcast over the other dimensions."""
    return lambda sizes: {"bias": leaf(*(sizes[dim] if dim in dims else 1 for dim in SCORES))}


FEATURES = {
    "plain": lambda sizes: {},
    "causal": lambda sizes: {"causal": True},
    "a window": lambda sizes: {"causal": "top_left", "window": (1, 0)},
    "a mask": lambda sizes: {"mask": torch.arange(sizes["keys"]).expand(sizes["queries"], sizes["keys"]) != 1},
    "a bias": bias_over(*SCORES),
    "a bias of keys": bias_over("keys"),
    "a bias of rows": bias_over("heads", "queries"),
    "one bias": bias_over(),
    "a bias of a batch": bias_over("heads", "queries", "keys"),
    "a sink": lambda sizes: {"sink": leaf(sizes["heads"])},
    "lengths": lambda sizes: {"seqlens_k": torch.full((sizes["batch"],), sizes["keys"] // 2, dtype=torch.int32)},
    "ALiBi and softcap": lambda sizes: {"alibi_slopes": torch.full((sizes["heads"],), 0.5), "softcap": 2.0},
    "dropout": lambda sizes: {"dropout_p": 0.5},
}
SIZES = {"batch": 2, "heads": 2, "queries": 3, "keys": 5, "head_dim": 8, "head_dim_v": 16}


def qkv(batch, heads, queries, keys, head_dim, head_dim_v):
    return (
        leaf(batch, heads, queries, head_dim), leaf(batch, heads, keys, head_dim),
        leaf(batch, heads, keys, head_dim_v, seed=1),
    )  # fmt: skip


@pytest.mark.parametrize("feature", FEATURES)
def test_attention(feature, raw_backend, interpreted):
    if interpreted and feature not in ("plain", "a bias of keys", "a bias of rows", "a sink", "lengths"):
        pytest.skip("some features are enough in the interpreter")
    for what, sizes in emptied(SIZES, 2 if feature == "plain" and not interpreted else 1):
        options = FEATURES[feature](sizes)
        learned = [name for name, value in options.items() if getattr(value, "requires_grad", False)]

        def call(q, k, v, *more, options=options, learned=learned):
            more = dict(zip(learned, more, strict=True))
            return fastattn.attention(q, k, v, **options | more, return_lse=True)

        check(
            what,
            by_backend(raw_backend, call),
            by_backend("reference", call),
            (*qkv(**sizes), *(options[name] for name in learned)),
        )


@pytest.mark.parametrize("option", ["plain", "causal", "mask", "bias", "gqa"])
def test_scaled_dot_product_attention(option, backend, interpreted):
    if interpreted and option not in ("plain", "gqa"):
        pytest.skip("some options are enough in the interpreter")
    for what, sizes in emptied(SIZES, 2 if option == "plain" and not interpreted else 1):
        q, k, v = qkv(**sizes)
        pairs = sizes["queries"], sizes["keys"]
        options = {
            "plain": {}, "causal": {"is_causal": True}, "gqa": {"enable_gqa": True},
            "mask": {"attn_mask": torch.ones(pairs, dtype=torch.bool).tril()}, "bias": {"attn_mask": leaf(*pairs)},
        }[option]  # fmt: skip
        if option == "gqa":
            q = torch.cat((q, q), 1)
        check(
            what, lambda *t, o=options: fastattn.scaled_dot_product_attention(*t, **o),
            lambda *t, o=options: F.scaled_dot_product_attention(*t, **o), (q, k, v),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("lengths_q", "lengths_k"),
    [((), ()), ((0,), (0,)), ((0, 0), (4, 0)), ((3, 0, 2), (0, 0, 0)), ((0, 3), (4, 0)), ((3, 0), (4, 2))],
)
def test_packed_sequences(lengths_q, lengths_k, backend, interpreted):
    """The last two rows belong to no sequence."""
    ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
    full, rows_q, rows_k = {"heads": 2, "head_dim": 8, "head_dim_v": 16}, sum(lengths_q) + 2, sum(lengths_k) + 2
    for what, sizes in (("none", full), *emptied({} if interpreted else full, 1)):
        heads, head_dim, head_dim_v = sizes.values()
        for options in ({}, {"causal": True, "sink": torch.zeros(heads), "dropout_p": 0.5}):

            def call(q, k, v, options=options):
                where = {"cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
                return fastattn.attention(q, k, v, **where, **options, return_lse=True)

            inputs = leaf(rows_q, heads, head_dim), leaf(rows_k, heads, head_dim), leaf(rows_k, heads, head_dim_v)
            check(what, call, by_backend("reference", call), inputs)


@pytest.mark.parametrize("form", ["plain", "new keys", "pages", "rows"])
def test_attention_decode(form, backend):
    names = {"batch": 2, "heads": 2, "queries": 3, "head_dim": 8, "head_dim_v": 16}
    names |= {"plain": {"capacity": 5}, "new keys": {"new": 2}, "pages": {"pages": 2}, "rows": {"capacity": 5}}[form]
    for what, sizes in emptied(names, 1):
        batch, heads, queries, head_dim, head_dim_v, _ = sizes.values()
        capacity, rows, options = sizes.get("capacity", 5), batch, {}
        if form == "pages":
            capacity, rows = 16, 3
            options["block_table"] = torch.arange(sizes["pages"], dtype=torch.int32).expand(batch, -1)
        elif form == "rows":
            rows, options["cache_batch_idx"] = 3, torch.arange(batch, dtype=torch.int32)
        length = min(capacity, 3) if sizes.get("pages") != 0 else 0
        if "new" in sizes:
            options |= {
                "k": leaf(batch, heads, sizes["new"], head_dim),
                "v": leaf(batch, heads, sizes["new"], head_dim_v),
            }
        options = {name: t.detach() for name, t in options.items()}
        lengths = torch.full((batch,), length, dtype=torch.int32)

        def call(q, k_cache, v_cache, lengths=lengths, options=options):
            k_cache, v_cache = k_cache.clone(), v_cache.clone()
            out, lse = fastattn.attention_decode(q, k_cache, v_cache, cache_seqlens=lengths, return_lse=True, **options)
            return out, lse, k_cache, v_cache

        caches = leaf(rows, heads, capacity, head_dim).detach(), leaf(rows, heads, capacity, head_dim_v).detach()
        check(what, call, by_backend("reference", call), (leaf(batch, heads, queries, head_dim).detach(), *caches))


# --- the other ops: (sizes, (sizes) -> (function, expected, inputs))


def layer_norm(rows, cols):
    return (
        fastattn.layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        (leaf(2, rows, cols), leaf(cols), leaf(cols)),
    )  # fmt: skip


def rms_norm(rows, cols):
    return fastattn.rms_norm, lambda x, w: F.rms_norm(x, x.shape[-1:], w), (leaf(2, rows, cols), leaf(cols))


def fused_norm(rows, cols):
    def call(x, weight, bias, x_bias, residual):
        return fastattn.layer_norm(
            x, weight, bias, x_bias=x_bias, residual=residual, dropout_p=0.5, return_residual=True
        )

    return (
        call,
        by_backend("reference", call),
        (leaf(rows, cols), *(leaf(cols, seed=n) for n in range(3)), leaf(rows, cols)),
    )


def dropout(rows, cols):
    def call(x, residual):
        return fastattn.dropout(x, 0.5, residual=residual)

    return call, by_backend("reference", call), (leaf(2, rows, cols), leaf(2, rows, cols))


def feed_forward(rows, d_model, d_ff, d_out):
    def call(x, w1, b1, w2, b2):
        return fastattn.feed_forward(x, w1, b1, w2, b2)

    def expected(x, w1, b1, w2, b2):
        return F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)

    return call, expected, (leaf(2, rows, d_model), leaf(d_ff, d_model), leaf(d_ff), leaf(d_out, d_ff), leaf(d_out))


def gated_feed_forward(rows, d_model, d_ff, d_out):
    def call(x, w1, b1, w2, w_gate, b_gate):
        options = {"activation": "silu", "dropout_p": 0.5, "recompute": True}
        return fastattn.feed_forward(x, w1, b1, w2, None, w_gate=w_gate, b_gate=b_gate, **options)

    return call, by_backend("reference", call), (
        leaf(rows, d_model), leaf(d_ff, d_model), leaf(d_ff), leaf(d_out, d_ff), leaf(d_ff, d_model), leaf(d_ff),
    )  # fmt: skip


def linear_cross_entropy(reduction, ignored, **options):
    def case(tokens, d_model, vocab):
        target = torch.arange(tokens) % max(vocab, 1)
        target = torch.full_like(target, -100) if ignored or not vocab else target

        def call(x, weight, bias):
            return fastattn.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction, **options)

        def expected(x, weight, bias):
            return F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)

        return (
            call,
            by_backend("reference", call) if options else expected,
            (leaf(tokens, d_model), leaf(vocab, d_model), leaf(vocab)),
        )

    return case


def rotary(pair):
    def case(batch, heads, tokens):
        angles = torch.arange(tokens)[:, None] / torch.arange(1, 5)

        def call(*x):
            return fastattn.rotary_embedding(x if pair else x[0], angles.cos(), angles.sin())

        return call, by_backend("reference", call), [leaf(batch, h, tokens, 8) for h in (heads, 2)[: 1 + pair]]

    return case


NORM, BLOCK, LOSS, ROTARY = (
    {"rows": 3, "cols": 8}, {"rows": 3, "d_model": 4, "d_ff": 8, "d_out": 5}, {"tokens": 3, "d_model": 4, "vocab": 7},
    {"batch": 2, "heads": 2, "tokens": 3},
)  # fmt: skip
CASES = {
    "layer_norm": (NORM, layer_norm),
    "rms_norm": (NORM, rms_norm),
    "a norm with everything": (NORM, fused_norm),
    "dropout": (NORM, dropout),
    "feed_forward": (BLOCK, feed_forward),
    "gated feed_forward": (BLOCK, gated_feed_forward),
    "rotary_embedding": (ROTARY, rotary(False)),
    "rotary_embedding of a pair": (ROTARY, rotary(True)),
}
CASES |= {
    f"linear_cross_entropy, {reduction}{', all ignored' if ignored else ''}": (
        LOSS, linear_cross_entropy(reduction, ignored)
    )
    for reduction in ("mean", "sum", "none")
    for ignored in (False, True)
}  # fmt: skip
CASES["linear_cross_entropy with everything"] = (
    LOSS, linear_cross_entropy("mean", False, label_smoothing=0.1, z_loss=0.1, softcap=3.0)
)  # fmt: skip


@pytest.mark.parametrize("op", CASES)
def test_other_ops(op, backend):
    sizes, case = CASES[op]
    for what, some in (*emptied(sizes), ("none", sizes)):
        check(what, *case(**some))
