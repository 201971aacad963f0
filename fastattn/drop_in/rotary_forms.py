"""Which rotation does a function compute? Its parameters say what it takes; random numbers say what it does with them.

No call asks for the values of tables: a form says which of their numbers turns which channel, whatever the numbers are.
So on a GPU nothing waits for the device.
"""

import functools
import inspect
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.drop_in.change import is_plain_input
from fastattn.drop_in.recognise import close, quiet
from fastattn.ops.rotary import rotate_tokens

_BATCH, _SEQLEN, _HEADS, _DIM = 2, 5, (3, 1), 8  # of a check
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")
_PARAMETERS = {
    "q": "q", "xq": "q", "query": "q", "k": "k", "xk": "k", "key": "k", "x": "x", "tensor": "x", "hidden_states": "x",
    "cos": "cos", "sin": "sin", "freqs_cis": "turn", "freqs_ci": "turn",
}  # fmt: skip
_SIGNATURES = {
    (*tensors, *tables)
    for tensors in (("q", "k"), ("x",))
    for tables in (("cos", "sin"), ("sin", "cos"), ("turn",))
}  # fmt: skip


class Form(NamedTuple):
    """What a function of rotary application computes.

    parameters: its names of tensors and tables. roles: what each is: "q" and "k", or "x" alone; "cos" and "sin", or
        complex numbers, "turn".
    layout: "bhsd", "bshd" or packed, "shd".
    rank: the number of dimensions of the tables: (tokens, columns), (batch, tokens, columns), or those of the tensors,
        with one head.
    tables: they have a number for each pair of channels ("half"), a number for each channel ("full"), or as many of
        which only the first half is read ("first").
    interleaved: whether the pairs are neighbours, or the channels d and d + rotary_dim / 2.
    backwards: the angles are negative.
    sorts: the pairs are neighbours, and then d and d + rotary_dim / 2, in the result and in the tables.
    partial: tables of fewer channels than q leave the other channels as they are.
    mixed: q in half precision and tables in fp32 give the dtype of q.
    swaps: with unsqueeze_dim=2, the layout is "bshd" instead of "bhsd".
    """

    parameters: tuple[str, ...]
    roles: tuple[str, ...]
    layout: str
    rank: int
    tables: str
    interleaved: bool
    backwards: bool = False
    sorts: bool = False
    partial: bool = False
    mixed: bool = False
    swaps: bool = False


def _columns(form, tables):
    """(cos, sin), real, as the function takes them."""
    if form.roles[-1] == "turn":
        return torch.view_as_real(tables[0]).unbind(-1)
    cos, sin = tables if form.roles[-1] == "sin" else tables[::-1]
    if form.tables == "first":
        cos, sin = (t[..., : t.shape[-1] // 2] for t in (cos, sin))
    return cos, sin


def _split(form, given):
    """(tensors, tables) of the arguments of a call."""
    count = sum(role in "qkx" for role in form.roles)
    return given[:count], given[count:]


def _fits(form, xs, tables):
    """Whether a call has the shapes and dtypes of the form."""
    x, table, is_complex = xs[0], tables[0], form.roles[-1] == "turn"
    if is_complex:
        if type(table) is not Tensor or table.dtype != torch.complex64 or table.is_conj():
            return False
    elif not all(map(is_plain_input, tables)) or table.dtype != tables[-1].dtype or table.shape != tables[-1].shape:
        return False
    if not all(map(is_plain_input, xs)) or not (x.is_cpu or x.is_cuda) or x.dtype not in _DTYPES or not x.numel():
        return False
    if any(t.dtype != x.dtype for t in xs) or any(t.device != x.device for t in (*xs, *tables)):
        return False
    real = torch.float32 if is_complex else table.dtype
    if (real != x.dtype and not (form.mixed and real == torch.float32)) or any(t.requires_grad for t in tables):
        return False
    return _fits_in_shape(form, [t.shape for t in xs], table.shape)


def _axes(form):
    """The dimensions of the tables."""
    return {2: "sd", 3: "bsd"}.get(form.rank, form.layout)


def _fits_in_shape(form, shapes, table):
    if any(len(shape) != len(form.layout) for shape in shapes) or len(table) != form.rank:
        return False
    first, *others = ({**dict(zip(form.layout, shape, strict=True)), "h": 1} for shape in shapes)
    if any(sizes != first for sizes in others):
        return False
    for axis, size in zip(_axes(form)[:-1], table, strict=False):
        if size != first[axis] and (axis != "b" or size != 1):
            return False
    width = table[-1] * (2 if form.tables == "half" else 1)
    return width % 2 == 0 and (width == first["d"] or (form.partial and 0 < width < first["d"]))


def rotated(form: Form, *given: Any) -> tuple[Tensor, ...] | None:
    """The tensors of a call rotated by our op, or None if it does not serve the call."""
    xs, tables = _split(form, given)
    if not _fits(form, xs, tables):
        return None
    cos, sin = _columns(form, tables)
    if form.rank == 4:
        cos, sin = (t.squeeze(form.layout.index("h")) for t in (cos, sin))
    if form.sorts:
        xs = tuple(x.unflatten(-1, (-1, 2)).mT.flatten(-2) for x in xs)
    swapped = form.layout == "bshd"
    out = rotate_tokens(
        tuple(x.transpose(1, 2) for x in xs) if swapped else xs,
        cos.detach(),
        -sin.detach() if form.backwards else sin.detach(),
        tables[0].shape[-1] * (2 if form.tables == "half" else 1),
        interleaved=form.interleaved,
    )
    if out is None:
        return None
    return tuple(t.transpose(1, 2) for t in out) if swapped else out


def _example(form, width, dtype, table_dtype, device=_CPU, size=(_BATCH, _SEQLEN)):
    """Random arguments; cos and sin are no cosine and sine, so that only the formula fits."""
    make = functools.partial(torch.randn, dtype=torch.float32, device=device)
    sizes = {"b": size[0], "s": size[1], "h": 1, "d": width // 2 if form.tables == "half" else width}
    axes, made = _axes(form), []
    for role, heads in zip(form.roles, (*_HEADS, 0, 0), strict=False):
        if role in "qkx":
            shape = [heads if axis == "h" else _DIM if axis == "d" else sizes[axis] for axis in form.layout]
            made.append(make(shape).to(dtype).requires_grad_())
        elif role == "turn":
            made.append(torch.view_as_complex(make([*(sizes[axis] for axis in axes), 2])))
        else:
            made.append(make([sizes[axis] for axis in axes]).to(table_dtype))
    return made


def _results(function, form, given, dtype):
    """(outputs, and in fp32 the gradients if they are recorded) of a function, or None if it gives something else."""
    try:
        out = function(*given)
    except Exception:  # of a function that takes tables of another form
        return None
    xs, _ = _split(form, given)
    out = out if isinstance(out, tuple) else (out,)
    if [t.shape if isinstance(t, Tensor) else None for t in out] != [x.shape for x in xs]:
        return None
    if dtype != torch.float32 or not torch.is_grad_enabled():
        return out
    if not all(t.requires_grad for t in out):
        return None
    weights = [torch.linspace(-1, 1, t.numel(), device=t.device).view(t.shape) for t in out]
    return *out, *torch.autograd.grad(out, xs, weights, allow_unused=True)


def _agrees(function, form, width=_DIM, dtype=torch.float32, table_dtype=None, device=_CPU, size=(_BATCH, _SEQLEN)):
    """Whether a function gives what our op gives, with gradients in fp32."""
    given = _example(form, width, dtype, table_dtype or dtype, device, size)
    trial = form._replace(partial=True, mixed=True)
    theirs = _results(function, form, given, dtype)
    ours = theirs and _results(functools.partial(rotated, trial), form, given, dtype)
    return bool(ours) and all(close(a, b, dtype) for a, b in zip(ours, theirs, strict=True))


def _inputs(parameters, roles):
    """The forms that differ in what they take."""
    is_complex = roles[-1] == "turn"
    ranks = {"bhsd": (3, 2, 4), "bshd": (3, 2, 4), "shd": (2,)}
    for layout, tables in itertools.product(ranks, ("half",) if is_complex else ("full", "half")):
        for rank in ranks[layout]:
            yield Form(parameters, roles, layout, rank, tables, False)


def _formulas(form) -> Iterator[Form]:
    """The forms that take the same and differ in what they compute."""
    for tables, interleaved, backwards in itertools.product(
        ("full", "first") if form.tables == "full" else ("half",), (False, True), (False, True)
    ):
        found = form._replace(tables=tables, interleaved=interleaved, backwards=backwards)
        yield from (found,) if interleaved else (found, found._replace(sorts=True))


def _find(function, parameters, roles):
    """(the forms that fit, whether the function takes any example)."""
    found, takes = [], False
    for form in _inputs(parameters, roles):
        if _results(function, form, _example(form, _DIM, torch.float32, torch.float32), torch.float32) is not None:
            takes = True
            found += itertools.islice((f for f in _formulas(form) if _agrees(function, f)), 1)
    return found, takes


def _raised(function, form):
    """The name of the error that a function raises for an example, or None."""
    try:
        function(*_example(form, _DIM, torch.float32, torch.float32))
    except Exception as error:
        return type(error).__name__
    return None


@functools.cache
def forms_of(function: Any) -> tuple[Form, ...] | str:
    """The forms that a function computes, found by running it on small random numbers on the CPU, or why none fits."""
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    roles = [_PARAMETERS.get(name) for name in names]
    count = next((n for n in (4, 3, 2) if tuple(roles[:n]) in _SIGNATURES), 0)
    if not count:
        return "takes other arguments than one or two tensors and their cos and sin"
    given = tuple(names[:count]), tuple(roles[:count])
    with quiet(_CPU):
        forms, takes = _find(function, *given)
        if not forms:
            errors = [None] if takes else [_raised(function, form) for form in _inputs(*given)]
            if all(errors):
                return f"raises {errors[0]} for small tensors on the CPU"
            return "computes no rotation that our op has"
        if not all(_agrees(function, form, dtype=torch.bfloat16) for form in forms):
            return "gives other numbers than our op in bfloat16"
        if not all(_agrees_elsewhere(function, form) for form in forms):
            return "gives other numbers than our op for other lengths or without gradients"
        return tuple(_with_options(function, form, "unsqueeze_dim" in names) for form in forms)


def _agrees_elsewhere(function, form):
    """With one token, with many, and without gradients."""
    with torch.no_grad():
        return all(_agrees(function, form, size=size) for size in ((1, 1), (2, 1), (1, 40)))


def _with_options(function, form, unsqueezes):
    mixed = form.roles[-1] == "turn" or _agrees(function, form, dtype=torch.bfloat16, table_dtype=torch.float32)
    partial = not form.sorts and _agrees(function, form, _DIM // 2)
    swapped = form._replace(layout="bshd")
    swaps = unsqueezes and form.layout == "bhsd" and _agrees(functools.partial(function, unsqueeze_dim=2), swapped)
    return form._replace(partial=partial, mixed=mixed, swaps=swaps)


@functools.cache
def agrees_on(function: Any, device_type: str) -> bool:
    """Whether a function gives on a GPU what our kernel gives there, in fp32 and in bfloat16."""
    if device_type != "cuda":
        return False
    device = torch.device(device_type)
    with quiet(device):
        return all(
            _agrees(function, form, dtype=dtype, device=device)
            for form in forms_of(function)
            for dtype in (torch.float32, torch.bfloat16)
        )
