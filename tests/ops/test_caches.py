"""Cached results never outlive what they depend on: plans, decisions, position tables, keys."""

import copy
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn.models import CausalLM, KeyValueCache
from fastattn.ops import _backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_reason = fastattn.backends()[DEVICE]["triton"]
needs_triton = pytest.mark.skipif(_reason != "available", reason=f"the Triton backend cannot run here: {_reason}")


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def tensors(dtype=torch.float32, heads=2, kv_heads=2, sq=20, sk=24, d=16, dv=16, layout="bhsd"):
    shapes = (1, heads, sq, d), (1, kv_heads, sk, d), (1, kv_heads, sk, dv)
    made = [randn(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(shapes)]
    if layout == "bshd":
        made = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in made]
    elif layout == "offset":  # the same strides at addresses that are not multiples of 16 bytes
        made = [torch.nn.functional.pad(t.flatten(), (1, 0))[1:].view(t.shape) for t in made]
    elif layout == "padded":  # a row stride larger than the row
        made = [torch.nn.functional.pad(t, (0, 3))[..., : t.shape[3]] for t in made]
    elif layout == "expanded":
        made = [t[:, :1].expand(-1, t.shape[1], -1, -1) for t in made]
    return made


BIAS = {"full": (1, 2, 20, 24), "row": (1, 1, 1, 24), "column": (1, 2, 20, 1)}
# each differs from the first in one thing that the key of a plan must contain
KINDS = {
    "plain": ({}, {}),
    **{f"layout {layout}": ({"layout": layout}, {}) for layout in ("bshd", "offset", "padded", "expanded")},
    **{f"dtype {dtype}": ({"dtype": dtype}, {}) for dtype in (torch.bfloat16, torch.float16)},
    **{f"{name} {size}": ({name: size}, {}) for name, size in (("kv_heads", 1), ("sq", 21), ("sk", 23), ("dv", 8))},
    "scale": ({}, {"scale": 1.0}),
    "negative scale": ({}, {"scale": -1.0}),
    "softcap": ({}, {"softcap": 1.0}),
    "causal": ({}, {"causal": True}),
    "top left": ({}, {"causal": "top_left"}),
    "window": ({}, {"window": (1, 1)}),
    "left window": ({}, {"window": (1, -1)}),
    "slopes": ({}, {"alibi_slopes": torch.tensor([0.5, 0.25], device=DEVICE)}),
    "slopes of a batch": ({}, {"alibi_slopes": torch.tensor([[0.25, 0.5]], device=DEVICE)}),
    "lengths": ({}, {"seqlens_k": torch.tensor([7], dtype=torch.int32, device=DEVICE)}),
    **{f"bias {name}": ({}, {"bias": randn(*shape)}) for name, shape in BIAS.items()},
    **{f"mask {name}": ({}, {"mask": randn(*shape) > 0}) for name, shape in BIAS.items()},
    "bias in half precision": ({"dtype": torch.bfloat16}, {"bias": randn(1, 2, 20, 24)}),
}


def gradients(kind):
    inputs, options = KINDS[kind]
    q, k, v = (t.detach().requires_grad_() for t in tensors(**inputs))
    out, lse = fastattn.attention(q, k, v, return_lse=True, backend="triton", **options)
    return out, lse, *torch.autograd.grad(out.float().square().sum(), (q, k, v))


@needs_triton
def test_a_plan_serves_only_calls_of_its_kind(monkeypatch):
    """Each kind of call gives the same bits with the plans of all kinds cached as with its own plan only."""
    from fastattn.kernels import attention_call

    remembered = attention_call.plan_for

    def fresh(*args):
        remembered(*args)
        return attention_call.Plan(*args)

    monkeypatch.setattr(attention_call, "plan_for", fresh)
    alone = {kind: gradients(kind) for kind in KINDS}
    monkeypatch.setattr(attention_call, "plan_for", remembered)
    for kind in KINDS:
        for before, now in zip(alone[kind], gradients(kind), strict=True):
            assert torch.equal(before, now), kind


@needs_triton
def test_a_plan_asks_for_the_precision_of_products_in_every_call(monkeypatch):
    from fastattn.kernels import attention_call

    seen, plan_for = [], attention_call.plan_for
    monkeypatch.setattr(attention_call, "plan_for", lambda *args: seen.append(plan_for(*args)) or seen[-1])
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            fastattn.attention(*tensors(), backend="triton")
            assert precision == seen[-1].form.PRECISION
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def decoded(dtype, page_size, softcap, window, slopes):
    q, cache = randn(2, 4, 1, 16, dtype=dtype), randn(4, 2, 32, 16, dtype=dtype, seed=1)
    options = {"cache_seqlens": torch.tensor([9, 30], dtype=torch.int32, device=DEVICE), "softcap": softcap}
    if page_size is None:
        options["cache_batch_idx"] = torch.tensor([2, 1], dtype=torch.int32, device=DEVICE)
    else:
        cache = cache.view(-1, 2, page_size, 16)
        pages = 32 // page_size
        options["block_table"] = torch.arange(2 * pages, dtype=torch.int32, device=DEVICE).view(2, pages)
    if slopes:
        options["alibi_slopes"] = torch.tensor([0.5, 0.25, 0.125, 1.0], device=DEVICE)
    return fastattn.attention_decode(q, cache, cache, window=window, backend="triton", **options)


@needs_triton
def test_a_plan_of_decode_serves_only_calls_of_its_kind():
    from fastattn.kernels import attention_decode

    calls = [(torch.float32, None, 0.0, None, False), (torch.bfloat16, None, 0.0, None, False)]
    calls += [(torch.float32, 16, 0.0, None, False), (torch.float32, 32, 0.0, None, False)]
    calls += [(torch.float32, None, 1.0, None, False), (torch.float32, None, 0.0, (1, 0), False)]
    calls += [(torch.float32, None, 0.0, None, True)]
    alone = []
    for call in calls:
        attention_decode.plan_for.cache_clear()
        alone.append(decoded(*call))
    for _ in range(2):
        for call, before in zip(calls, alone, strict=True):
            assert torch.equal(before, decoded(*call)), call


def test_decisions_end_when_a_backend_is_registered_or_taken_away(monkeypatch):
    monkeypatch.setattr(_backends, "_override", None)
    monkeypatch.setattr(_backends, "_registered", dict(_backends._registered))
    monkeypatch.setattr(_backends, "_unavailable", dict(_backends._unavailable))
    facts = ("cpu", torch.float32, None, None, None)
    first = _backends.choose("norm", facts)
    if first == "reference":
        pytest.skip("only the reference is here: nothing can be taken away")
    _backends.register_backend("norm", first, lambda facts: "it is Tuesday")
    try:
        assert _backends.choose("norm", facts) != first
        monkeypatch.undo()
        _backends._decisions.clear()
        assert _backends.choose("norm", facts) == first
    finally:
        _backends._decisions.clear()


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


POSITIONS = ("learned", "sinusoidal", "rotary", "alibi")
layers = pytest.mark.parametrize("layers", ["fastattn", "torch"])


def build(positions, layers):
    torch.manual_seed(0)
    return CausalLM(50, n_layer=1, n_head=3, d_model=24, block_size=16, positions=positions, layers=layers).eval()


def on_meta(positions, layers):
    with torch.device("meta"):
        return build(positions, layers)


def emptied(model, positions, layers):
    made = on_meta(positions, layers).to_empty(device="cpu")
    for table in made.buffers():  # possible content of an empty tensor
        assert table.dtype == torch.float32
    made.load_state_dict(model.state_dict())
    return made


def assigned(model, positions, layers):
    made = on_meta(positions, layers)
    made.load_state_dict(model.state_dict(), assign=True)
    return made


def cast_in_inference_mode(model, positions, layers):
    made = build(positions, layers)
    with torch.inference_mode():
        made.bfloat16()
    made.float().load_state_dict(model.state_dict())
    return made


def cast_and_loaded(model, positions, layers):
    made = build(positions, layers).half().float()
    made.load_state_dict(model.state_dict())
    return made


TREATMENTS = (emptied, assigned, cast_in_inference_mode, cast_and_loaded, lambda model, *_: copy.deepcopy(model))


@layers
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("treatment", TREATMENTS, ids=["to_empty", "assign", "inference_mode", "cast", "deepcopy"])
def test_position_tables_survive(treatment, positions, layers):
    """They are not in the state_dict: a model that is built empty, moved or cast, and then loaded, has them too."""
    model, tokens = build(positions, layers), torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(1))
    made = treatment(model, positions, layers)
    assert torch.equal(made(tokens), model(tokens))
    for table, exact in zip(made.buffers(), model.buffers(), strict=True):
        assert torch.equal(table, exact)


@layers
@pytest.mark.parametrize("positions", POSITIONS)
def test_position_tables_are_shared_with_other_processes(positions, layers):
    assert all(table.is_shared() for table in build(positions, layers).share_memory().buffers())


@layers
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("modes", [*itertools.product((torch.no_grad, torch.inference_mode), repeat=2)])
def test_keys_and_values_may_be_added_in_another_mode(modes, positions, layers):
    model, tokens = build(positions, layers), torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    with modes[0]():
        cache = KeyValueCache(model, 2)
        model(tokens[:, :4], cache=cache)
        cache.reorder(torch.tensor([1, 0]))
    with modes[1]():
        logits = model(tokens.flip(0)[:, 4:], cache=cache)
        torch.testing.assert_close(logits, model(tokens.flip(0))[:, 4:])


@layers
def test_a_cache_refuses_another_number_of_sequences(layers):
    model = build("learned", layers)
    with torch.no_grad(), pytest.raises(ValueError, match="KeyValueCache: the cache is for 2 sequences, got 1"):
        model(torch.zeros(1, 4, dtype=torch.int64), cache=KeyValueCache(model, 2))
