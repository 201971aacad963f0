"""Rotary application under `replace`: what the modules compute afterwards, and what is left alone."""

import copy
import functools
import io
import sys

import pytest
import rotary_modules
import torch
from rotary_functions import apply_rotary, count_calls
from rotary_modules import (
    CLASSES,
    Attention,
    Backwards,
    Complex,
    Interleaved,
    OneByOne,
    Packed,
    Partial,
    Scaled,
    Sorted,
    Swapped,
    case,
    run,
    same_bits,
)

import fastattn
from fastattn.drop_in import rotary, rotary_forms
from fastattn.ops._backends import why_not_available

HEADS, D = 3, 8


@pytest.fixture
def served(monkeypatch):
    return count_calls(monkeypatch)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kind", CLASSES)
def test_values_gradients_and_undo(kind, rows, served):
    module, *given = case(kind, rows)
    expected = run(module, *given)
    report = fastattn.replace(module, only="rotary")
    assert report.replaced[""].startswith("rotary embeddings, ")
    assert ("interleaved" in report.replaced[""]) == (kind in (Interleaved, Sorted, OneByOne, Complex))
    got = run(module, *given)
    calls = 2 if kind is OneByOne else 1
    assert len(served) == calls
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    report.undo()
    assert type(module) is kind
    assert same_bits(run(module, *given), expected)
    assert len(served) == calls


@pytest.mark.parametrize("kind", CLASSES)
def test_bfloat16(kind, served):
    """The error is at most that of the original."""
    module, *given = case(kind)
    exact = run(module, *given)[0]
    module, *given = case(kind, dtype=torch.bfloat16)
    theirs = run(module, *given)[0]
    fastattn.replace(module, only="rotary")
    ours = run(module, *given)[0]
    assert served
    assert (ours - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()


def test_other_functions_are_left_alone():
    module, *given = case(Scaled)
    expected = run(module, *given)
    report = fastattn.replace(module, only="rotary")
    assert report.left == {"": "rotary embeddings: apply_rotary_and_scale computes no rotation that our op has"}
    assert same_bits(run(module, *given), expected)


@pytest.mark.parametrize("kind", [Attention, Swapped, Packed, Backwards])
def test_tables_whose_halves_differ(kind, served):
    """Each channel is turned by its own number, in the gradient too."""
    module, x, cos, sin = case(kind)
    given = x, cos + torch.linspace(0, 1, D), sin * torch.linspace(1, 2, D)
    expected = run(module, *given)
    fastattn.replace(module, only="rotary")
    for ours, theirs in zip(run(module, *given), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert served


@pytest.mark.parametrize("kind", CLASSES)
def test_no_value_is_read(kind, served):
    """On a GPU, each of these operators would wait for the device."""
    module, *given = case(kind)
    fastattn.replace(module, only="rotary")
    with fastattn.use_backend("reference"), torch.autograd.profiler.profile() as profile:
        module(*given).sum().backward()
    assert served
    names = {event.name for event in profile.function_events}
    assert "aten::cat" in names
    assert not names & {f"aten::{name}" for name in ("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero")}


def test_tables_that_change(served):
    """Values read from the tables are not reused after a change or for other tensors."""
    module, x, cos, sin = case()
    original = copy.deepcopy(module)
    fastattn.replace(module, only="rotary")
    for change in (lambda: None, lambda: cos.neg_(), lambda: sin[1].zero_(), lambda: cos.copy_(sin)):
        change()
        torch.testing.assert_close(module(x, cos, sin), original(x, cos, sin))
    torch.testing.assert_close(module(x, cos, cos), original(x, cos, cos))  # a different sin
    assert len(served) == 5
    with torch.inference_mode():
        cos, sin = cos.clone(), sin.clone()
        for _ in range(2):
            torch.testing.assert_close(module(x, cos, sin), original(x, cos, sin))
            cos.neg_()


CALLS = {
    "double": lambda m, x, c, s: m.double()(x.double(), c.double(), s.double()),
    "autocast": lambda m, x, c, s: _autocast(m, x, c, s),
    "tables with gradients": lambda m, x, c, s: m(x, c.clone().requires_grad_(), s),
    "one table for rows that broadcast": lambda m, x, c, s: m(x[:1], c, s),
    "tables in fp64": lambda m, x, c, s: m(x, c.double(), s.double()),
    "no tokens": lambda m, x, c, s: m(x[:, :0], c[:, :0], s[:, :0]),
    "no rows": lambda m, x, c, s: m(x[:0], c[:0], s[:0]),
    "vmap": lambda m, x, c, s: torch.vmap(m)(x[None], c[None], s[None]),
}


def _autocast(module, *given):
    with torch.autocast("cpu", torch.bfloat16):
        return module(*given)


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_the_function_of_the_module_serves(name, served):
    module, *given = case()
    ours = copy.deepcopy(module)
    fastattn.replace(ours, only="rotary")
    assert torch.equal(CALLS[name](ours, *given), CALLS[name](module, *given))
    assert not served


def test_names_that_are_patched_later(monkeypatch, served):
    """The copy of forward reads the current global names, and a function put there is checked like the first."""
    module, *given = case()
    plain = copy.deepcopy(module)
    fastattn.replace(module, only="rotary")

    def apply_another(q, k, cos, sin):
        return q * cos[:, None], k * sin[:, None]

    assert rotary.forms_of(apply_another) == "computes no rotation that our op has"
    served.clear()
    monkeypatch.setattr(rotary_modules, "apply_rotary", apply_another)
    assert torch.equal(module(*given), plain(*given))
    assert not served
    monkeypatch.setattr(Attention, "forward", lambda self, x, cos, sin: x)
    assert module(*given) is given[0]


SCALE = 1.0


def apply_rotary_times_scale(q, k, cos, sin):
    return apply_rotary(q, k, cos * SCALE, sin * SCALE)


class TimesScale(Attention):
    def forward(self, x, cos, sin):
        q, k = apply_rotary_times_scale(*self.projected(x), cos, sin)
        return q @ k.mT


def test_a_number_of_the_file_that_changes_later(monkeypatch, served):
    module, *given = case(TimesScale)
    plain = copy.deepcopy(module)
    fastattn.replace(module, only="rotary")
    served.clear()
    torch.testing.assert_close(module(*given), plain(*given))
    assert len(served) == 1
    monkeypatch.setattr(sys.modules[__name__], "SCALE", 2.0)
    assert torch.equal(module(*given), plain(*given))
    assert len(served) == 1


def test_decorators_and_keywords():
    module, x, cos, sin = case()
    expected = module(hidden=x, cos=cos, sin=sin, scale=2.0)
    fastattn.replace(module, only="rotary")
    torch.testing.assert_close(module(hidden=x, cos=cos, sin=sin, scale=2.0), expected)


def test_copies_and_files(served):
    module, *given = case()
    before = list(module.state_dict())
    fastattn.replace(module, only="rotary")
    assert list(module.state_dict()) == before
    expected = module(*given)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        served.clear()
        assert torch.equal(twin(*given), expected)
        assert served
        assert type(twin) is type(module)


def test_compiled_and_exported(served):
    module, *given = case()
    expected = module(*given)
    fastattn.replace(module, only="rotary")
    torch._dynamo.reset()
    got = torch.compile(module, backend="aot_eager", fullgraph=True)(*given)
    torch.testing.assert_close(got, expected)
    exported = torch.export.export(module, tuple(given)).module()(*given)
    torch.testing.assert_close(exported, expected)
    assert not served


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant, served):
    module, x, *tables = case()
    x.requires_grad_()
    fastattn.replace(module, only="rotary")
    expected = run(module, x, *tables)
    module.zero_grad()
    out = torch.utils.checkpoint.checkpoint(module, x, *tables, use_reentrant=use_reentrant)
    out.backward(torch.linspace(-1, 1, out.numel()).view(out.shape))
    assert same_bits([out, *(p.grad for p in module.parameters())], expected)
    assert len(served) == 3


def test_another_device(monkeypatch):
    """There, the function and our kernel must agree on small random numbers, once."""
    asked = []

    def agrees_on(function, device):
        asked.append(device)
        return function is apply_rotary

    monkeypatch.setattr(rotary, "agrees_on", agrees_on)
    monkeypatch.setattr(rotary, "_device_of", lambda module: "cuda")
    assert fastattn.replace(Attention(), only="rotary").replaced
    reason = "gives other numbers than our op on cuda, or our op has no kernel there"
    assert fastattn.replace(Packed(), only="rotary").left == {"": f"rotary embeddings: apply_rotary_packed {reason}"}
    assert asked == ["cuda", "cuda"]


def test_a_device_without_a_kernel():
    module, *given = case()
    fastattn.replace(module, only="rotary")
    out = module.to("meta")(*(t.to("meta") for t in given))
    assert out.shape == (2, HEADS, 5, 5)
    assert not rotary_forms.agrees_on(apply_rotary, "meta")


@pytest.mark.parametrize("kind", [Attention, Partial, Interleaved, Sorted, Complex])
def test_on_triton(kind, served):
    """The Triton kernel, in the interpreter: the same tables without a copy, and gradients."""
    reason = why_not_available("triton", "cpu")
    if reason:
        pytest.skip(reason)
    module, x, cos, sin = case(kind)
    expected = run(module, x, cos, sin)
    fastattn.replace(module, only="rotary")
    with fastattn.use_backend("triton"):
        got = run(module, x, cos, sin)
    assert served
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def hidden(function):
    """A decorator that keeps the function where its closure does not show it."""
    wrapped = functools.wraps(function)(lambda *args, **kwargs: wrapped.__wrapped__(*args, **kwargs))
    return wrapped


class Hidden(Attention):
    forward = hidden(Attention.forward)


class Empty(Attention):
    """A module whose forward has a closure with an empty cell."""

    def made():
        def forward(self, x, cos, sin):
            q, k = apply_rotary(*self.projected(x), cos, sin)
            return q @ k.mT if self.training or nothing else q

        if not forward:
            nothing = None
        return forward

    forward = made()


class Odd(Attention):
    """A module in which the name of a rotation is something that cannot be called with tensors."""

    def forward(self, x, cos, sin):
        return x if apply_rotary_never is None else apply_rotary_never


apply_rotary_never = None


@pytest.mark.parametrize(("kind", "replaced"), [(Hidden, 0), (Empty, 1), (Odd, 0)])
def test_unusual_forwards(kind, replaced):
    module, *given = case(kind)
    expected = module(*given)
    report = fastattn.replace(module, only="rotary")
    assert (len(report.replaced), report.left) == (replaced, {})
    torch.testing.assert_close(module(*given), expected)


def test_a_function_that_the_rotation_calls_may_be_replaced(served, monkeypatch):
    module, *given = case()
    fastattn.replace(module, only="rotary")
    plain = copy.deepcopy(module)
    plain.__class__ = Attention
    assert "turn_half" in apply_rotary.__code__.co_names
    monkeypatch.setattr(sys.modules[apply_rotary.__module__], "turn_half", lambda x: x * 2)
    assert torch.equal(module(*given), plain(*given))
    assert not served
