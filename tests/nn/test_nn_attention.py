"""MultiheadAttention against torch.nn's: masks, layouts, dtypes, weights, errors."""

import random

import pytest
import torch
from nn_oracle import compare, padding_mask, pair, score_mask, slow_path

import fastattn
from fastattn import nn, reference

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched")

E, H, N, L, S = 16, 4, 3, 5, 7
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}


def cases():
    """A seeded sample of all combinations of options; every value of each option occurs many times."""
    draw = random.Random(0)
    for index in range(100):
        yield {
            "index": index,
            "dtype": draw.choice(list(DTYPES)),
            "batched": draw.random() < 0.8,
            "batch_first": draw.random() < 0.5,
            "form": draw.choice(["self", "self", "kv", "qkv", "kdim", "qk"]),
            "attn_mask": draw.choice([None, None, "bool", "float", "causal"]),
            "per_head": draw.random() < 0.4,
            "padding": draw.choice([None, "bool", "float"]),
            "is_causal": draw.random() < 0.5,
            "need_weights": draw.random() < 0.4,
            "average": draw.random() < 0.5,
            "train": draw.random() < 0.5,
            "bias": draw.random() < 0.7,
            "bias_kv": draw.random() < 0.2,
            "zero": draw.random() < 0.2,
        }


@pytest.mark.parametrize("case", list(cases()), ids=lambda c: f"{c['index']}-{c['dtype']}-{c['form']}")
def test_matrix(case):
    generator = torch.Generator().manual_seed(case["index"])
    dtype, form = DTYPES[case["dtype"]], case["form"]
    kdim, vdim = (12, 20) if form == "kdim" else (None, None)
    ours, theirs = pair(
        "MultiheadAttention", E, H, 0.0, case["bias"], case["bias_kv"], case["zero"], kdim, vdim, case["batch_first"],
        dtype=dtype, seed=case["index"],
    )  # fmt: skip
    for module in (ours, theirs):
        module.train(case["train"])
    seqlen_k = L if form in ("self", "qk") else S

    def embed(length, width):
        x = torch.randn(N, length, width, generator=generator).to(dtype)
        return x[0] if not case["batched"] else x if case["batch_first"] else x.transpose(0, 1).contiguous()

    inputs = {"query": embed(L, E)}
    if form in ("kv", "qkv", "kdim"):
        inputs["key"] = embed(S, kdim or E)
    if form in ("qkv", "kdim", "qk"):
        inputs["value"] = embed(seqlen_k, vdim or E)
    heads = N * H if case["batched"] else H
    shape = (heads, L, seqlen_k) if case["per_head"] else (L, seqlen_k)
    inputs["attn_mask"] = score_mask(generator, shape, case["attn_mask"], dtype)
    mask = padding_mask(generator, N, seqlen_k, case["padding"], dtype)
    inputs["key_padding_mask"] = mask if mask is None or case["batched"] else mask[0]
    # torch hides the appended keys from a causal hint, and only then; in ours they are visible under every mask
    appended = case["bias_kv"] or case["zero"]
    options = {
        "is_causal": case["is_causal"] and case["attn_mask"] == "causal" and not appended,
        "need_weights": case["need_weights"],
        "average_attn_weights": case["average"],
    }

    def call(module, query, key=None, value=None, **masks):
        key = query if key is None else key
        return module(query, key, key if value is None else value, **masks, **options)

    # with a hint ours ignores the mask, so the mask gets no gradient
    constant = ("attn_mask",) if options["is_causal"] else ()
    compare(ours, theirs, call, inputs, case["dtype"] == "autocast", constant)


@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch_and_no_keys(batch_first):
    ours, theirs = pair("MultiheadAttention", E, H, batch_first=batch_first)
    empty = torch.randn(0, L, E) if batch_first else torch.randn(L, 0, E)
    with slow_path():
        assert ours(empty, empty, empty)[0].shape == theirs(empty, empty, empty)[0].shape == empty.shape
    query = torch.randn(N, L, E)
    keys = torch.randn(N, 0, E) if batch_first else torch.randn(0, L, E)
    out, weights = ours(query, keys, keys)
    torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))
    assert weights.shape[-1] == 0


def test_output_and_weights_shapes():
    ours, theirs = pair("MultiheadAttention", E, H, add_bias_kv=True, add_zero_attn=True)
    query, key = torch.randn(L, N, E), torch.randn(S, N, E)
    for average in (True, False):
        for batched in (True, False):
            q, k = (query, key) if batched else (query[:, 0], key[:, 0])
            with slow_path():
                expected = theirs(q, k, k, average_attn_weights=average)
            got = ours(q, k, k, average_attn_weights=average)
            assert [t.shape for t in got] == [t.shape for t in expected]
    assert ours(query, key, key, need_weights=False)[1] is None


def test_projections_reach_the_op_without_copies(monkeypatch):
    """Self-attention passes views of the packed projection to the op, in both layouts."""
    seen = []

    def spy(q, k, v, **options):
        seen.append((q, k, v))
        return fastattn.attention(q, k, v, **options)

    monkeypatch.setattr("fastattn.nn.attention.attention", spy)
    for batch_first in (True, False):
        module = nn.MultiheadAttention(E, H, batch_first=batch_first)
        x = torch.randn(N, L, E)
        with torch.no_grad():  # in training one node computes all
            module(x, x, x, need_weights=False)
    assert seen
    for q, k, v in seen:
        assert q.shape[1:] == (H, q.shape[2], E // H)
        assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1
        assert all(t.stride(-1) == 1 for t in (q, k, v))


def test_padding_mask_stays_small(monkeypatch):
    """key_padding_mask becomes a (batch, 1, 1, seqlen_k) mask, even with an attn_mask; no tensor is batch × L × S."""
    seen = []

    def spy(q, k, v, *, mask, bias, **options):
        seen.append((mask, bias))
        return fastattn.attention(q, k, v, mask=mask, bias=bias, **options)

    monkeypatch.setattr("fastattn.nn.attention.attention", spy)
    generator = torch.Generator().manual_seed(0)
    module, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(N, L, E)
    module.out_proj.requires_grad_(False)  # otherwise one node computes all
    padding = padding_mask(generator, N, L, "bool")
    for kind in (None, "bool", "float"):
        module(x, x, x, padding, False, score_mask(generator, (L, L), kind))
        mask, bias = seen[-1]
        assert mask.shape == (N, 1, 1, L)
        assert torch.equal(mask[:, 0, 0], ~padding)
        assert bias is None if kind is None else bias.shape == (1, 1, L, L)
    module(x, x, x, padding, False, score_mask(generator, (L, L), "causal"), is_causal=True)
    assert seen[-1][0].shape == (N, 1, 1, L)
    assert seen[-1][1] is None


class TestDropout:
    def test_weights_are_those_of_the_output(self):
        """In training, the weights returned by need_weights, times v, are the output."""
        module = nn.MultiheadAttention(E, H, 0.5, batch_first=True, dtype=torch.float64)
        x = torch.randn(N, L, E, dtype=torch.float64)
        out, weights = module(x, x, x, average_attn_weights=False)
        v = x @ module.in_proj_weight[2 * E :].T + module.in_proj_bias[2 * E :]
        heads = weights @ v.view(N, L, H, -1).transpose(1, 2)
        torch.testing.assert_close(module.out_proj(heads.transpose(1, 2).flatten(2)), out)
        assert (weights == 0).any()
        assert not torch.allclose(weights.sum(-1), torch.ones(()).double())

    def test_one_seed_one_output(self):
        module = nn.MultiheadAttention(E, H, 0.5)
        x = torch.randn(L, N, E)
        torch.manual_seed(3)
        with_weights = module(x, x, x)[0]
        torch.manual_seed(3)
        without = module(x, x, x, need_weights=False)[0]
        other = module(x, x, x, need_weights=False)[0]
        torch.testing.assert_close(with_weights, without)
        assert not torch.equal(other, without)

    def test_rate(self):
        module = nn.MultiheadAttention(E, H, 0.3)
        x = torch.randn(64, 8, E)
        weights = module(x, x, x, average_attn_weights=False)[1]
        dropped = (weights == 0).double().mean().item()
        assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / weights.numel()) ** 0.5
        kept = weights[weights != 0].sum() / weights.shape[:3].numel()
        assert abs(kept.item() - 1) < 0.05

    def test_evaluation_has_none(self):
        ours, theirs = pair("MultiheadAttention", E, H, 0.9)
        x = torch.randn(L, N, E)
        with slow_path():
            torch.testing.assert_close(ours.eval()(x, x, x), theirs.eval()(x, x, x))

    def test_gradient_through_dropped_weights(self):
        module = nn.MultiheadAttention(4, 2, 0.4, dtype=torch.float64)
        x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)

        def run(x):
            torch.manual_seed(5)
            return module(x, x, x)

        assert torch.autograd.gradcheck(run, x)

    def test_mask_is_the_shared_philox_layout(self):
        module = nn.MultiheadAttention(E, H, 0.5)
        x = torch.randn(L, N, E)
        torch.manual_seed(9)
        rng = torch.randint(torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max, (2,))
        torch.manual_seed(9)
        weights = module(x, x, x, average_attn_weights=False)[1]
        slab = torch.arange(N * H).view(N, H, 1)
        assert torch.equal(weights != 0, reference.philox_keep(rng, 0.5, torch.arange(L), slab, L))


def errors():
    x, y = torch.randn(L, N, E), torch.randn(S, N, E)
    dims = {"3-D query, 2-D key": (x, x[0], x[0]), "2-D query, 3-D key": (x[0], x, x)}
    for name, qkv in dims.items():
        yield name, AssertionError, "expected `key` and `value` to be", qkv, {}
    yield "4-D query", AssertionError, "query should be unbatched 2D or batched 3D", (x[None],) * 3, {}
    yield "embedding", AssertionError, "was expecting embedding dimension of 16, but got 8", (x[..., :8], x, x), {}
    yield "key and value", AssertionError, "key shape .* does not match value shape", (x, y, x), {}
    shapes = {
        "padding dims": (AssertionError, "expected `key_padding_mask` to be `None` or 2-D", (S,), None),
        "padding batch": (AssertionError, r"Expected key_padded_mask.shape\[0\] to be 3", (N + 1, S), None),
        "padding length": (AssertionError, r"Expected key_padded_mask.shape\[1\] to be 7", (N, S + 1), None),
        "mask dims": (AssertionError, "expected `attn_mask` to be `None`, 2-D or 3-D", None, (N, H, L, S)),
        "mask 2-D": (RuntimeError, "The shape of the 2D attn_mask is", None, (S, L)),
        "mask 3-D": (RuntimeError, "The shape of the 3D attn_mask is", None, (N, L, S)),
    }
    for name, (kind, text, padding, mask) in shapes.items():
        masks = {"key_padding_mask": padding, "attn_mask": mask}
        masks = {k: None if v is None else torch.zeros(v, dtype=torch.bool) for k, v in masks.items()}
        yield name, kind, text, (x, y, y), masks
    for name in ("key_padding_mask", "attn_mask"):
        mask = torch.zeros((N, S) if name == "key_padding_mask" else (L, S), dtype=torch.int64)
        yield (
            f"int {name}",
            AssertionError,
            f"only bool and floating types of {name} are supported",
            (x, y, y),
            {name: mask},
        )
    for dtype in (torch.float64, torch.bfloat16):
        mask = torch.zeros(L, S, dtype=dtype)
        yield (
            f"{dtype} mask on fp32",
            RuntimeError,
            "Expected attn_mask dtype to be bool or float",
            (x, y, y),
            {"attn_mask": mask, "need_weights": False},
        )
    unbatched = {"attn_mask": torch.zeros(H + 1, L, S)}
    yield (
        "unbatched 3-D mask",
        AssertionError,
        "Expected `attn_mask` shape to be",
        (x[:, 0], y[:, 0], y[:, 0]),
        unbatched,
    )


@pytest.mark.parametrize(("kind", "text", "qkv", "masks"), [pytest.param(*e[1:], id=e[0]) for e in errors()])
def test_errors_are_those_of_torch(kind, text, qkv, masks):
    ours, theirs = pair("MultiheadAttention", E, H)
    with pytest.raises(kind, match=text):
        ours(*qkv, **masks)
    with slow_path(), pytest.raises(kind, match=text):
        theirs(*qkv, **masks)


def test_constructor_errors():
    for module in (nn.MultiheadAttention, torch.nn.MultiheadAttention):
        for sizes in ((0, 1), (4, 0), (-4, 2)):
            with pytest.raises(ValueError, match="must be greater than 0"):
                module(*sizes)
        with pytest.raises(AssertionError, match="divisible"):
            module(10, 3)


def test_merge_masks_is_an_override_point():
    """torch's fast path calls merge_masks; so does a subclass of ours that overrides it."""
    asked = []

    class Merging(nn.MultiheadAttention):
        def merge_masks(self, attn_mask, key_padding_mask, query):
            asked.append(True)
            return super().merge_masks(attn_mask, key_padding_mask, query)

    module, x = Merging(E, H, batch_first=True).eval(), torch.randn(N, L, E)
    plain = nn.MultiheadAttention(E, H, batch_first=True).eval()
    plain.load_state_dict(module.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module(x, x, x)[0], plain(x, x, x)[0])
    assert asked
