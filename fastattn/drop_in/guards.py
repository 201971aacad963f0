"""What the code of a module reads besides its own attributes: numbers in a config, in a dict, in a class, in a file.

A check of a module holds for the values of that time. `Recognised` notices when an attribute of the module itself
changes. The values here may change without its notice, so the forward of ours compares them in each call, and runs the
original forward if one has changed. It does the same if a function that the original forward calls was replaced.
"""

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

_NUMBERS = (type(None), bool, int, float, str, torch.dtype)
_CODE = (torch.nn.Module, torch.Tensor, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)
_NEVER_CHANGE = ("torch", "numpy")  # packages
_DEPTH, _MOST_ITEMS, _MOST_FUNCTIONS = 3, 16, 64
_MISSING = object()
_ABSENT = ...  # the value of a Guard: there is no such attribute or item
_LENGTH = (None, "")  # a step of a path: the length


class Guard(NamedTuple):
    """A value that was read. source: the name of a Python module, or None for the torch module itself; path: (whether
    the key is that of an item and not of an attribute, key) for each step, or `_LENGTH`."""

    source: str | None
    path: tuple[tuple[bool | None, Any], ...]
    value: Any


class Call(NamedTuple):
    """A function that may be called. source: the name of its Python module, or None if it is a method."""

    source: str | None
    name: str
    function: Any


def hold(module: torch.nn.Module | None, guards: tuple[Guard, ...]) -> bool:
    """Whether the values are what they were."""
    for source, path, value in guards:
        found: Any = module if source is None else sys.modules.get(source)
        try:
            for is_item, key in path:
                if is_item is None:
                    found = len(found)
                elif is_item:
                    found = found.get(key, _ABSENT) if type(found) is dict else found[key]
                else:
                    found = getattr(found, key, _ABSENT)
        except Exception:  # the code of a config; the original forward may expect its error
            return False
        if type(found) is not type(value) or found != value:
            return False
    return True


def call_the_same(kind: type | None, calls: tuple[Call, ...]) -> bool:
    """Whether functions are what they were; kind: the class of the methods."""
    for source, name, function in calls:
        if getattr(kind if source is None else sys.modules.get(source), name, None) is not function:
            return False
    return True


def calls_of(read: type | Callable) -> tuple[Call, ...]:
    """The functions outside of torch that the forward of a class, or a function, may call, with the forward itself."""
    is_class = isinstance(read, type)
    forward: Any = getattr(read, "forward", read) if is_class else read
    functions = _functions(forward, read.__mro__ if isinstance(read, type) else ())
    found: dict[tuple[str | None, str], Call] = {}
    for function in functions:
        names = {*names_in(function.__code__), "forward"}
        if is_class:
            for name in names:
                value = getattr(read, name, None)
                if _is_one_of(value, functions) and getattr(read, name) is value:  # a classmethod is a new object
                    found[None, name] = Call(None, name, value)
        for python in _files(function, names):
            for name in names & vars(python).keys():
                if _is_one_of(vars(python)[name], functions):
                    found[python.__name__, name] = Call(python.__name__, name, vars(python)[name])
    return tuple(found.values())


def _is_one_of(value, functions):
    return isinstance(value, (types.FunctionType, types.MethodType, property)) and _inner(value) in functions


def _inner(function):
    """The function of a method or property."""
    return getattr(function, "__func__", getattr(function, "fget", function))


def guards_of(read: torch.nn.Module | Callable) -> tuple[Guard, ...]:
    """The Guards of everything that the forward of a module, or a function, may read, as far as its code shows it."""
    is_module = isinstance(read, torch.nn.Module)
    found: dict[tuple[Any, ...], Guard] = {}
    for function in _functions(type(read).forward if is_module else read, type(read).__mro__ if is_module else ()):
        names, keys = set(names_in(function.__code__)), set(_constants(function.__code__))
        names |= {key for key in keys if isinstance(key, str) and key.isidentifier()}
        guards = list(_of_attributes(read, names, keys)) if is_module else []
        if is_module and {"getattr", "hasattr"} & names:
            own = {key for key in keys if isinstance(key, str) and key.isidentifier() and not hasattr(read, key)}
            guards += (Guard(None, ((False, key),), _ABSENT) for key in own)
        for python in _files(function, names):
            for name in names & vars(python).keys():
                guards += _values(python.__name__, vars(python)[name], ((False, name),), names, keys)
        found |= {(guard.source, guard.path): guard for guard in guards}
    return tuple(found.values())


def guards_of_child(module: torch.nn.Module, name: str) -> tuple[Guard, ...]:
    """A Guard of each number that a child of a module has, such as the approximation of a GELU."""
    state = vars(module._modules[name]).items()
    return tuple(
        Guard(None, ((False, name), (False, key)), value)
        for key, value in state
        if isinstance(value, _NUMBERS) and key != "training" and not key.startswith("_")
    )


def _of_attributes(module, names, keys):
    for name in names:
        value = vars(module).get(name, _MISSING)
        if value is _MISSING:
            value = next((vars(kind)[name] for kind in type(module).__mro__ if name in vars(kind)), _MISSING)
            if isinstance(value, (property, staticmethod, classmethod)):
                continue
        elif isinstance(value, _NUMBERS):
            continue  # Recognised.__setattr__ sees their changes
        if value is not _MISSING:
            yield from _values(None, value, ((False, name),), names, keys)


def _attribute(value, name):
    try:
        return getattr(value, name, _MISSING)
    except Exception:  # a property, or a value that a config requires and does not have
        return _MISSING


def _values(source, value, path, names, keys) -> Iterator[Guard]:
    """The Guards of the numbers in a value that the names and keys reach."""
    if isinstance(value, _NUMBERS):
        yield Guard(source, path, value)
        return
    kind = value if isinstance(value, type) else type(value)
    if len(path) > _DEPTH or isinstance(value, _CODE) or kind.__module__.partition(".")[0] in ("torch", "typing"):
        return
    steps: list[tuple[bool, Any, Any]] = []
    may_be_absent: set[Any] = set()
    if isinstance(value, dict):
        steps = [(True, key, value.get(key, _MISSING)) for key in keys]
        may_be_absent = {key for key in keys if isinstance(key, str) and key.isidentifier()}
    elif isinstance(value, (list, tuple)) and len(value) <= _MOST_ITEMS:
        steps = [(True, i, item) for i, item in enumerate(value)]
        if isinstance(value, list):
            yield Guard(source, (*path, _LENGTH), len(value))
    elif hasattr(value, "__dict__") and kind.__module__ != "builtins":
        steps = [(False, name, _attribute(value, name)) for name in names if not name.startswith("__")]
        may_be_absent = keys if {"getattr", "hasattr"} & names else may_be_absent
    for is_item, key, item in steps:
        if item is _MISSING:
            if key in may_be_absent and (is_item or not hasattr(kind, key)):
                yield Guard(source, (*path, (is_item, key)), _ABSENT)
        elif not callable(item) or isinstance(item, type):
            yield from _values(source, item, (*path, (is_item, key)), names, keys)


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names that code uses, with those of functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def _constants(code):
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _constants(constant)
        elif isinstance(constant, (str, int)):
            yield constant


def _files(function, names):
    """The Python modules in which a function looks up names: its own, and imported ones that it names."""
    python = sys.modules.get(function.__module__)
    found = [python] if python is not None and vars(python) is function.__globals__ else []
    for value in map(function.__globals__.get, names):
        if isinstance(value, types.ModuleType) and sys.modules.get(value.__name__) is value:
            package = value.__name__.partition(".")[0]
            if package not in _NEVER_CHANGE and package not in sys.stdlib_module_names:
                found.append(value)
    return found


def _functions(first, kinds):
    """A function and those of Python that it may call, also methods of these classes, without those of torch."""
    waiting, found = [first], {}
    while waiting and len(found) < _MOST_FUNCTIONS:
        function = _inner(waiting.pop())
        if not isinstance(function, types.FunctionType) or function in found:
            continue
        if str(function.__module__).partition(".")[0] == "torch":
            continue
        found[function] = None
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        names = set(names_in(function.__code__))
        methods = [vars(kind)[name] for kind in kinds for name in names & vars(kind).keys()]
        waiting += [*cells, *methods, *(function.__globals__.get(name) for name in names)]
        waiting += (vars(python).get(name) for python in _files(function, names) for name in names)
    return list(found)
