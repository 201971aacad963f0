"""Rotary application in attention of other libraries: a function such as (q, k, cos, sin) that their forward calls.

The tables come from the model, so llama3, YaRN, dynamic and M-RoPE scaling stay what they are. The forward of a module
that was taken over is a copy of the original whose global names are those of the original, but for the function.
"""

import functools
import types
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastattn.drop_in.change import Change, Replaced, change_class, is_foreign, make_class, why_not_take_over
from fastattn.drop_in.guards import call_the_same, calls_of, guards_of, hold, names_in
from fastattn.drop_in.rotary_forms import agrees_on, forms_of, rotated
from fastattn.nn.plain import is_traced


def _bound(form, args, named):
    """The arguments of a call in the order of the form, or None if they are other ones."""
    count = len(form.parameters)
    missing = form.parameters[len(args) :]
    if len(args) > count or not named.keys() >= set(missing):
        return None
    return (*args, *(named[name] for name in missing))


def _serve(form, args, named):
    """The result of a call on our op, or None if it does not serve the call."""
    given = _bound(form, args, named)
    if given is None or named.keys() - {*form.parameters, "unsqueeze_dim"}:
        return None
    dim = named.get("unsqueeze_dim", 1)
    if dim == 2 and form.swaps:
        form = form._replace(layout="bshd")
    elif dim != 1:
        return None
    out = rotated(form, *given)
    return out if out is None or len(out) == 2 else out[0]


class Rotate:
    """Stands in the place of a function of rotary application, whose current object it calls where ours does not serve.

    names: the global names of the original forward.
    """

    def __init__(self, names: dict[str, Any], name: str):
        self.names, self.name = names, name

    def __call__(self, *args, **named):
        function = self.names[self.name]
        forms = forms_of(function)
        if (
            not isinstance(forms, str)
            and _is_as_checked(function)
            and _may_run(function, args or tuple(named.values()))
        ):
            for form in forms:
                found = _serve(form, args, named)
                if found is not None:
                    return found
        return function(*args, **named)


@functools.cache
def _guards_of(function):
    """The numbers that a function reads in its file, and the functions that it calls, as they are at its check."""
    return guards_of(function), calls_of(function)


def _is_as_checked(function):
    guards, calls = _guards_of(function)
    return hold(None, guards) and call_the_same(None, calls)


def _may_run(function, values):
    """Whether the device of a call is the CPU, or one on which the function was found to agree with our kernel."""
    first = values[0] if values else None
    return isinstance(first, Tensor) and (first.is_cpu or agrees_on(function, first.device.type))


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


def _rotary_names(function: types.FunctionType) -> Iterator[str]:
    """The global names of functions of rotary application that the code of a function uses."""
    for name in sorted(set(names_in(function.__code__))):
        value = function.__globals__.get(name)
        called = callable(value) and isinstance(value, Hashable) and not isinstance(value, type)
        if called and "rot" in name and "apply" in name:
            yield name


def find(modules: dict[str, torch.nn.Module]) -> dict[str, Change | str]:
    """A Change for each module whose forward applies rotary embeddings that our op has, and a reason for each other."""
    found = {name: recognise(module) for name, module in modules.items()}
    return {name: result for name, result in found.items() if result is not None}


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
    found = {name: _recognise_function(inner.__globals__[name], module) for name in names}
    others = ", ".join(f"{name} {forms}" for name, forms in found.items() if isinstance(forms, str))
    taken = {
        name: forms[0].interleaved or forms[0].sorts for name, forms in found.items() if not isinstance(forms, str)
    }
    if not taken:
        return f"rotary embeddings: {others}"
    kinds = sorted({"interleaved" if interleaved else "half-split" for interleaved in taken.values()})
    what = f"rotary embeddings, {' and '.join(kinds)} (was {', '.join(taken)} of {type(module).__name__})"
    kind: Any = type(module)
    new_class = make_class(RotaryCaller, kind, tuple(taken))
    return change_class(module, new_class, f"{what}, but {others}" if others else what)


def _device_of(module):
    return next((p.device.type for p in module.parameters() if not p.is_cpu), "cpu")


def _recognise_function(function, module):
    """The forms of a function, or why a module with it is left alone."""
    _guards_of(function)  # what it reads at the check
    forms, device = forms_of(function), _device_of(module)
    if not isinstance(forms, str) and device != "cpu" and not agrees_on(function, device):
        return f"gives other numbers than our op on {device}, or our op has no kernel there"
    return forms
