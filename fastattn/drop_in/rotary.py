"""Rotary application in attention of other libraries: a function (q, k, cos, sin) that their forward calls by name.

The tables come from the model, so llama3, YaRN, dynamic and M-RoPE scaling stay what they are. The forward of a module
that was taken over is a copy of the original whose global names are those of the original, but for the function.
"""

import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastattn.drop_in.change import (
    Change,
    Replaced,
    change_class,
    is_foreign,
    is_plain_input,
    make_class,
    why_not_take_over,
)
from fastattn.drop_in.recognise import close, quiet
from fastattn.nn.plain import is_traced
from fastattn.ops import rotary_embedding

_BATCH, _SEQLEN, _HEADS, _DIM = 2, 5, (3, 1), 8  # of a check
_TABLES = ("doubled", "repeated", "half")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Form(NamedTuple):
    """What a function of rotary application computes.

    tables: how cos and sin hold the numbers of each pair of channels: once ("half"), again in the other half of the
        channels ("doubled"), or in two neighbours ("repeated").
    interleaved: whether the pairs are neighbours, or the channels d and d + rotary_dim / 2.
    packed: q and k are (tokens, heads, channels), not (batch, heads, tokens, channels).
    partial: tables of fewer channels than q leave the other channels as they are.
    mixed: q in half precision and tables in fp32 give the dtype of q.
    swaps: with unsqueeze_dim=2, q and k are (batch, tokens, heads, channels).
    """

    tables: str
    interleaved: bool
    packed: bool
    partial: bool = False
    mixed: bool = False
    swaps: bool = False


def _once(table, tables):
    """One number for each pair of channels, or None if the table has two."""
    if tables == "half":
        return table
    if table.shape[-1] % 2:
        return None
    halves = table.chunk(2, -1) if tables == "doubled" else (table[..., ::2], table[..., 1::2])
    return halves[0] if torch.equal(*halves) else None


def _rows(cos, sin, form):
    """(cos, sin, positions) with a row for each token, as our op takes them, or None."""
    once = tuple(_once(t, form.tables) for t in (cos, sin))
    if any(t is None for t in once):
        return None
    positions = None
    if cos.dim() == 3 and len(cos) > 1:
        positions = torch.arange(len(cos) * cos.shape[1], device=cos.device).view(cos.shape[:2])
    return *(t.detach().reshape(-1, t.shape[-1]).contiguous() for t in once), positions


_kept: Any = WeakIdKeyDictionary()  # cos -> (sin, versions, form, rows): all layers get the same tables


def _kept_rows(cos, sin, form):
    if cos.is_inference() or sin.is_inference():  # they count no changes
        return _rows(cos, sin, form)
    state, found = (cos._version, sin._version, form), _kept.get(cos)
    if found is None or found[0]() is not sin or found[1] != state:
        found = _kept[cos] = weakref.ref(sin), state, _rows(cos, sin, form)
    return found[2]


def _fits(form, q, k, cos, sin):
    """Whether a call has the shapes and dtypes of the form."""
    if not all(map(is_plain_input, (q, k, cos, sin))) or not q.is_cpu or not cos.is_cpu or not sin.is_cpu:
        return False  # on a GPU, looking at the tables would wait for them
    if k.dtype != q.dtype or q.dtype not in _DTYPES or cos.dtype != sin.dtype or cos.requires_grad or sin.requires_grad:
        return False
    if cos.dtype != q.dtype and not (form.mixed and cos.dtype == torch.float32):
        return False
    if q.dim() != (3 if form.packed else 4) or cos.dim() != q.dim() - 1 or cos.shape != sin.shape or not q.numel():
        return False
    if form.packed:
        leads, same = (q.shape[:1],), q.shape[::2] == k.shape[::2]
    else:
        batch, seqlen = q.shape[0], q.shape[2]
        leads, same = ((batch, seqlen), (1, seqlen)), batch == k.shape[0] and q.shape[2:] == k.shape[2:]
    width = cos.shape[-1] * (2 if form.tables == "half" else 1)
    fits = width == q.shape[-1] or (form.partial and 0 < width < q.shape[-1])
    return same and fits and cos.shape[:-1] in leads


def _rotated(form, q, k, cos, sin):
    """(q, k) rotated by our op, or None if it does not serve the call."""
    rows = _kept_rows(cos, sin, form) if _fits(form, q, k, cos, sin) else None
    if rows is None:
        return None
    return rotary_embedding((q, k), *rows[:2], positions=rows[2], interleaved=form.interleaved)


def _swapped(*tensors):
    """(batch, tokens, heads, channels) <-> (batch, heads, tokens, channels)."""
    return tuple(t.transpose(1, 2) for t in tensors)


def _serve(form, q, k, cos, sin, rest, named):
    """(q, k) rotated by our op, or None if it does not serve the call."""
    if rest or named.keys() - {"unsqueeze_dim"} or not isinstance(q, Tensor) or not isinstance(k, Tensor):
        return None
    dim = named.get("unsqueeze_dim", 1)
    if dim == 1:
        return _rotated(form, q, k, cos, sin)
    if dim != 2 or not form.swaps or not q.dim() == k.dim() == 4:
        return None
    found = _rotated(form, *_swapped(q, k), cos, sin)
    return found and _swapped(*found)


class Rotate:
    """Stands in the place of a function of rotary application, whose current object it calls where ours does not serve.

    names: the global names of the original forward.
    """

    def __init__(self, names: dict[str, Any], name: str):
        self.names, self.name = names, name

    def __call__(self, q, k, cos, sin, *rest, **named):
        function = self.names[self.name]
        form = form_of(function)
        found = _serve(form, q, k, cos, sin, rest, named) if isinstance(form, Form) else None
        return function(q, k, cos, sin, *rest, **named) if found is None else found


class _Names(dict):
    """The global names of a function, some of them others. The rest is looked up at each use, so patches count."""

    def __init__(self, under: dict[str, Any], own: dict[str, Any]):
        kept = ("__name__", "__package__", "__builtins__")
        super().__init__({name: under[name] for name in kept if name in under} | own)
        self.under = under

    def __missing__(self, name):
        return self.under[name]


def _holds(cell, value):
    try:
        return cell.cell_contents is value
    except ValueError:  # it is empty
        return False


def _innermost(function):
    """A function without its decorators, or None if a decorator hides it."""
    while hasattr(function, "__wrapped__"):
        if not any(_holds(cell, function.__wrapped__) for cell in getattr(function, "__closure__", None) or ()):
            return None
        function = function.__wrapped__
    return function if isinstance(function, types.FunctionType) else None


@functools.cache
def _with_ours(function: types.FunctionType, names: tuple[str, ...]) -> types.FunctionType:
    """A copy of a function and its decorators in which these global names are ours."""
    inner, under, closure = getattr(function, "__wrapped__", None), function.__globals__, function.__closure__
    if inner is None:
        found: dict[str, Any] = _Names(under, {name: Rotate(under, name) for name in names})
    else:
        found, ours = under, _with_ours(inner, names)
        cells = [types.CellType(ours) if _holds(cell, inner) else cell for cell in closure or ()]
        closure = tuple(cells)
    copy = types.FunctionType(function.__code__, found, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


class RotaryCaller(Replaced):
    """A module whose forward applies rotary embeddings by the functions named in `_fastattn`, on our kernel."""

    def forward(self, *args, **kwargs):
        """The original forward; in a graph that is traced, its functions stay as they are."""
        if is_traced():
            return super().forward(*args, **kwargs)
        return _with_ours(self._original.forward, self._fastattn)(self, *args, **kwargs)


def _example(form, width, dtype, table_dtype):
    """Random (q, k, cos, sin); cos and sin are no cosine and sine, so that only the formula fits."""
    lead = (_SEQLEN,) if form.packed else (_BATCH, _SEQLEN)
    tables = []
    for _ in range(2):
        t = torch.randn(*lead, width // 2, dtype=torch.float32).to(table_dtype)
        if form.tables != "half":
            t = torch.cat([t, t], -1) if form.tables == "doubled" else t.repeat_interleave(2, -1)
        tables.append(t)
    shapes = [(_SEQLEN, n, _DIM) if form.packed else (_BATCH, n, _SEQLEN, _DIM) for n in _HEADS]
    return *(torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_() for shape in shapes), *tables


def _agrees(function, form, width=_DIM, dtype=torch.float32, table_dtype=None):
    """Whether a function gives what our op gives, with gradients in fp32."""
    given = _example(form, width, dtype, table_dtype or dtype)
    trial = form._replace(partial=True, mixed=True)
    results = []
    for rotate in (function, functools.partial(_rotated, trial)):
        try:
            out = rotate(*given)
        except Exception:  # of a function that takes tables of another form
            return False
        if not (isinstance(out, tuple) and len(out) == 2 and all(isinstance(t, Tensor) for t in out)):
            return False
        grads = ()
        if dtype == torch.float32:
            if not all(t.requires_grad for t in out):
                return False
            weights = [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in out]
            grads = torch.autograd.grad(out, given[:2], weights, allow_unused=True)
        results.append((*out, *grads))
    return all(close(ours, theirs, dtype) for theirs, ours in zip(*results, strict=True))


def _raised(function, form):
    try:
        function(*_example(form, _DIM, torch.float32, torch.float32))
    except Exception as error:
        return f"raises {type(error).__name__} for small tensors on the CPU"
    return None


def _failure(function):
    """Why a function takes none of the examples, or None if it takes one."""
    forms = [Form(tables, False, packed) for packed, tables in itertools.product((False, True), _TABLES)]
    raised = [_raised(function, form) for form in forms]
    return raised[0] if all(raised) else None


def _by_swapping(function, q, k, cos, sin):
    return _swapped(*function(*_swapped(q, k), cos, sin, unsqueeze_dim=2))


@functools.cache
def form_of(function: Any) -> Form | str:
    """The form that a function computes, found by running it on small random numbers, or why none fits."""
    try:
        first = list(inspect.signature(function).parameters)[:4]
    except (TypeError, ValueError):
        first = []
    if first != ["q", "k", "cos", "sin"]:
        return "takes other arguments than q, k, cos and sin"
    with quiet(torch.device("cpu")):
        failed = _failure(function)
        if failed is not None:
            return failed
        for packed in (False, True):
            for tables in _TABLES:
                for interleaved in (False, True):
                    form = Form(tables, interleaved, packed)
                    if not _agrees(function, form):
                        continue
                    if not _agrees(function, form, dtype=torch.bfloat16):
                        return "gives other numbers than our op in bfloat16"
                    partial = _agrees(function, form, _DIM // 2)
                    mixed = _agrees(function, form, dtype=torch.bfloat16, table_dtype=torch.float32)
                    swaps = not packed and _agrees(lambda *given: _by_swapping(function, *given), form)
                    return form._replace(partial=partial, mixed=mixed, swaps=swaps)
    return "computes no rotation that our op has"


def _rotary_names(function: types.FunctionType) -> Iterator[str]:
    """The global names of functions of rotary application that the code of a function uses."""
    for name in sorted(set(function.__code__.co_names)):
        value = function.__globals__.get(name)
        called = callable(value) and isinstance(value, Hashable) and not isinstance(value, type)
        if called and "rot" in name and "apply" in name:
            yield name


def find(modules: dict[str, torch.nn.Module]) -> dict[str, Change | str]:
    """A Change for each module whose forward applies rotary embeddings that our op has, and a reason for each other."""
    found = {name: recognise(module) for name, module in modules.items()}
    return {name: result for name, result in found.items() if result is not None}


def _is_on_a_gpu(module):
    return any(not parameter.is_cpu for parameter in module.parameters())


def recognise(module: torch.nn.Module) -> Change | str | None:
    """A Change, the reason why a module that applies rotary embeddings is left alone, or None for other modules."""
    if not is_foreign(module):
        return None
    inner = _innermost(type(module).forward)
    names = tuple(_rotary_names(inner)) if inner is not None else ()
    if inner is None or not names:
        return None
    reason = why_not_take_over(module)
    if reason is not None:
        return reason
    if _is_on_a_gpu(module):
        return "rotary embeddings: on a GPU, a look at the tables would wait for it"
    forms = {name: form_of(inner.__globals__[name]) for name in names}
    others = ", ".join(f"{name} {form}" for name, form in forms.items() if isinstance(form, str))
    pairs = {name: form.interleaved for name, form in forms.items() if isinstance(form, Form)}
    if not pairs:
        return f"rotary embeddings: {others}"
    kinds = sorted({"interleaved" if interleaved else "half-split" for interleaved in pairs.values()})
    what = f"rotary embeddings, {' and '.join(kinds)} (was {', '.join(pairs)} of {type(module).__name__})"
    kind: Any = type(module)
    new_class = make_class(RotaryCaller, kind, tuple(pairs))
    return change_class(module, new_class, f"{what}, but {others}" if others else what)
