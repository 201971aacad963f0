"""A change of one module, and the classes that modules of other libraries get.

A module stays the same object: only its class becomes a subclass of what it was. The subclass has the name of the
original and a forward of ours, which calls the original forward wherever it cannot serve a call. It is made when it is
needed, so pickle and deepcopy store the original class and the kind of the change instead of it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.drop_in.guards import Call, Guard, call_the_same, calls_of, hold
from fastattn.ops._kinds import FLOAT_DTYPES, nonplain_kind

ON_META = "its parameters are on the meta device: load the weights first"


class Change(NamedTuple):
    """A change of a module that was found possible.

    what: the text about it in the report.
    apply: makes it, and returns the function that takes it back.
    new_class: the class that the module gets, or None if its class stays.
    """

    what: str
    apply: Callable[[], Callable[[], None]]
    new_class: type | None = None


def change_class(module: torch.nn.Module, new_class: type, what: str) -> Change:
    """The Change that gives a module another class."""

    def apply():
        module.__class__, before = new_class, module.__class__

        def undo():
            module.__class__ = before
            module.__dict__.pop("_fastattn", None)

        return undo

    return Change(what, apply, new_class)


class Replaced:
    """The base of the classes that modules of other libraries get; `_fastattn` says what the forward needs to know."""

    _fastattn: Any = None
    _original: type = torch.nn.Module
    _guards: tuple[Guard, ...] = ()

    def __reduce_ex__(self, protocol):
        """The original class and the change, instead of a class that cannot be imported."""
        new, (cls, *args), *state = super().__reduce_ex__(max(protocol, 2))
        if cls is not type(self) or "_fastattn" not in cls.__dict__:
            return (new, (cls, *args), *state)
        return (_new, (cls.__bases__[0], self._original, cls.__dict__["_fastattn"], self._guards), *state)


# Attributes that training modes, hooks of other libraries and replicas set.
_ALL_MODULES_HAVE = frozenset({"training", "forward", "__dict__", "_parameters", "_buffers", "_modules"})


class Recognised(Replaced):
    """The base of the classes whose forward replaces one that a check recognised.

    The check saw the attributes that the module had then. When one of them changes, such as a scale that was 1,
    `_fastattn` becomes None, and the module runs its original forward from then on. Parameters and children may change,
    because the forward reads them.
    """

    def __setattr__(self, name, value):
        if name not in _ALL_MODULES_HAVE and _is_another(getattr(self, name, value), value):
            self.__dict__["_fastattn"] = None
        super().__setattr__(name, value)

    def __delattr__(self, name):
        if name not in _ALL_MODULES_HAVE and name in self.__dict__:
            self.__dict__["_fastattn"] = None  # the class may have a value of this name
        super().__delattr__(name)


def _is_another(old, value):
    if any(isinstance(old, kind) and isinstance(value, kind) for kind in (Tensor, torch.nn.Module)):
        return False
    return old is not value and not (isinstance(value, (int, float, str)) and type(old) is type(value) and old == value)


def has_other_state(module: torch.nn.Module) -> bool:
    """Whether a module has children, buffers or other tensors than its parameters."""
    values = (*module._buffers.values(), *vars(module).values())
    return bool(module._modules) or any(isinstance(value, Tensor) for value in values)


_calls_at_check: dict[tuple, tuple[Call, ...]] = {}  # the arguments of `make_class` -> the functions at its last call


def _new(mixin, original, facts, guards=()):
    """An empty object of a class as it was checked here, or in the process in which it was pickled."""
    key = mixin, original, facts, guards
    kind = _made(*key, _calls_at_check[key]) if key in _calls_at_check else make_class(*key)
    return kind.__new__(kind)


def make_class(mixin: type, original: type, facts: Any, guards: tuple[Guard, ...] = ()) -> type:
    """The subclass of `original` with the forward of `mixin`, which finds `facts`, a hashable value, in `_fastattn`.

    While one of the guards does not hold, the original forward runs. If `mixin` takes its place without calling it, it
    also runs while a function is replaced that it calls, or it itself on the class.
    """
    calls = calls_of(original) if issubclass(mixin, Recognised) else ()
    _calls_at_check[mixin, original, facts, guards] = calls
    return _made(mixin, original, facts, guards, calls)


@functools.cache
def _made(mixin, original, facts, guards, calls: tuple[Call, ...]):

    @functools.wraps(original.forward)  # inspect.signature shows the arguments of the original
    def forward(self, *args, **kwargs):
        if (guards and not hold(self, guards)) or (calls and not call_the_same(original, calls)):
            return original.forward(self, *args, **kwargs)
        return mixin.forward(self, *args, **kwargs)

    names = {name: original.__dict__.get(name) for name in ("__module__", "__doc__")}
    names |= {"__qualname__": original.__qualname__, "_fastattn": facts, "_original": original, "forward": forward}
    names["_guards"] = guards
    names["plain_as"] = vars(mixin).get("plain_as")
    return type(original)(original.__name__, (mixin, original), names)


def is_plain_input(x: Any) -> bool:
    """Whether a value is a tensor that our ops serve here: no subclass, no symbolic value of a tracer."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout is torch.strided and x.dtype in FLOAT_DTYPES


def is_foreign(module: torch.nn.Module) -> bool:
    """Whether the class of a module, before any parametrization, is neither torch's nor ours."""
    kinds = (kind.__module__ for kind in type(module).__mro__)
    module_name = next(name for name in kinds if name != "torch.nn.utils.parametrize")
    return not isinstance(module, Replaced) and module_name.partition(".")[0] not in ("torch", "fastattn")


def why_not_take_over(module: torch.nn.Module) -> str | None:
    """Why a module of another library must be left alone in the state in which it is, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if "forward" in module.__dict__:
        return f"forward was replaced on this {type(module).__name__} object"
    definer = next(cls for cls in type(module).__mro__ if "forward" in cls.__dict__)
    origin = getattr(definer.__dict__["forward"], "__module__", definer.__module__)
    if origin != definer.__module__:
        return f"the forward of {definer.__name__} was replaced by code of {origin}"
    if hasattr(module, "parametrizations"):
        return "its parameters are parametrized"
    parameters = list(module.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return ON_META
    kind = nonplain_kind(*parameters)
    if kind is None and any(p.dtype not in FLOAT_DTYPES for p in parameters):
        kind = next(f"{p.dtype} values" for p in parameters if p.dtype not in FLOAT_DTYPES)
    return kind and f"it has {kind} as a parameter"
