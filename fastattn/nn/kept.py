"""What was read from the modules of a layer, kept for its next call until one of them changes.

Reading nine modules takes longer than the arithmetic of a small layer. A layer keeps the result with a description of
what was read: classes, attributes, names of parameters and children, hooks. One call of C compares the modules with it
and returns the parameters that they have now. So nothing can be stale, and nothing here owns a module or a tensor. The
next call itself looks at `requires_grad`, and the C++ op checks shapes, dtypes and strides.
"""

from collections import OrderedDict

import torch

from fastattn.nn.plain import must_call_children
from fastattn.ops._libraries import introspection
from fastattn.ops.layer import ABSENT

_NAME = "_fastattn_kept"  # of the attribute of the layer
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABSENT = ...  # for `unchanged`: there must be no such key
_is_compiling = torch.compiler.is_compiling
_new = tuple.__new__  # a NamedTuple's own takes longer


class Kept:
    """kind: the class of what was read, a NamedTuple whose first fields are lists. rest: its other fields.

    A copy of the layer, or its pickle, has an empty dict instead of this object.
    """

    __slots__ = ("kind", "plan", "rest")

    def __init__(self, kind, rest, plan):
        self.kind, self.rest, self.plan = kind, rest, plan

    def __reduce__(self):
        return OrderedDict, ()  # torch.load(weights_only=True) reads it


def find_kept(layer):
    """What `keep` has stored for a layer, or None if there is nothing or if it may be stale."""
    if _is_compiling():
        return None
    kept = layer.__dict__.get(_NAME)
    if type(kept) is not Kept or must_call_children():
        return None
    lists = _unchanged(layer, kept.plan)
    if lists is None:
        drop_kept(layer)
        return None
    return _new(kept.kind, lists + kept.rest)


def drop_kept(layer):
    """Forget what is stored for a layer."""
    layer.__dict__.pop(_NAME, None)


def keep(layer, value, absent, modules):
    """Store what was read from a layer, if all can be watched.

    Args:
        value: a NamedTuple. Its first fields are lists of parameters of the modules, of None and of `ABSENT`. No other
            field is a list or holds a parameter.
        absent: names that must not become attributes of the layer.
        modules: {module: the names of the attributes that were read}, first the layer itself, and each child after its
            parent. Of each module the class and the names of the parameters and children are watched too, and of the
            others also the hooks and `forward`.
    """
    if _unchanged is None:
        return
    places, owners, parts = _places(modules), {}, []  # owners of parameters
    if places is None:
        return
    for index, (module, names) in enumerate(modules.items()):
        state = module.__dict__
        parameters, children = state["_parameters"], state["_modules"]
        if "weight" in state or "bias" in state:
            return  # a plain attribute instead of a parameter, as in the replicas of DataParallel
        for name, p in parameters.items():
            if p is not None and (type(p) is not torch.nn.Parameter or p in owners):
                return  # a tensor that one call put there for itself, or one that is tied and may not stay so
            owners[p] = index, name
        entries = [part for name in names if name not in children for part in (name, state.get(name, _ABSENT))]
        for name in absent if module is layer else ("forward",):
            entries += name, _ABSENT
        held = (_present(parameters), _present(children), () if module is layer else _HOOKS)
        parts.append((*places[module], type(module), tuple(entries), *held))
    for constant in (None, ABSENT):
        owners[constant] = -1, constant
    lists = [field for field in value if isinstance(field, list)]
    if all(p in owners for field in lists for p in field):
        wanted = tuple(tuple(part for p in field for part in owners[p]) for field in lists)
        layer.__dict__[_NAME] = Kept(type(value), list(value[len(lists) :]), (torch.nn.Parameter, tuple(parts), wanted))


def _present(values):
    """(name, whether there is a value, ...) of parameters or children."""
    return tuple(part for name, value in values.items() for part in (name, value is not None))


def _places(modules):
    """{module: (index of its parent in `modules`, its name there)}, or None if one of them has two places."""
    places = {next(iter(modules)): (0, "")}
    for index, module in enumerate(modules):
        for name, child in module.__dict__["_modules"].items():
            if child in places:
                return None
            if child in modules:
                places[child] = index, name
    return places


_unchanged = getattr(introspection(), "unchanged", None)
