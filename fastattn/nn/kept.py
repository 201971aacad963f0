"""What was read from the modules of a layer, kept for its next call until one of them changes.

Reading nine modules takes longer than the arithmetic of a small layer. A layer keeps the result together with every
object from which it was made: classes, attributes, parameters, children, hooks. One call of C compares all of them by
identity, so nothing can be stale but the insides of a tensor (its `data`, `requires_grad`): the next call reads
`requires_grad` again, and the C++ op checks shapes, dtypes and strides.
"""

import torch

from fastattn.nn.plain import must_call_children
from fastattn.ops._libraries import introspection

_NAME = "_fastattn_kept"  # of the attribute of the layer
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ABSENT = ...  # for `unchanged`: there must be no such key
_is_compiling = torch.compiler.is_compiling


class Kept:
    """value: what was read. A copy of the layer, or its pickle, has None instead of this object."""

    __slots__ = ("layer", "value", "watched")

    def __init__(self, layer, value, watched):
        self.layer, self.value, self.watched = layer, value, watched

    def __reduce__(self):
        return type(None), ()


def find_kept(layer):
    """What `keep` has stored for a layer, or None if there is nothing or if it may be stale."""
    if _is_compiling():
        return None
    kept = layer.__dict__.get(_NAME)
    if kept is None or kept.layer is not layer or must_call_children():
        return None
    if not _unchanged(kept.watched):
        drop_kept(layer)
        return None
    return kept.value


def drop_kept(layer):
    """Forget what is stored for a layer."""
    layer.__dict__.pop(_NAME, None)


def keep(layer, value, absent, modules):
    """Store what was read from a layer, if all can be watched.

    Args:
        value: any object.
        absent: names that must not become attributes of the layer.
        modules: {module: the names of the attributes that were read}, with the layer itself. Of each module the class,
            the parameters and the children are watched too, and of the others also the hooks and `forward`.
    """
    if _unchanged is None:
        return
    objects, entries, sizes = [], [], []
    for module, names in modules.items():
        state = module.__dict__
        parameters, children = state["_parameters"], state["_modules"]
        if not all(type(p) is torch.nn.Parameter for p in parameters.values() if p is not None):
            return  # a tensor that one call put there for itself
        if "weight" in state or "bias" in state:
            return  # a plain attribute instead of a parameter, as in the replicas of DataParallel
        objects += module, type(module), state
        entries += state, "_parameters", parameters, state, "_modules", children
        sizes += state, "_parameters", len(parameters), state, "_modules", len(children)
        for name in names:
            if name not in children:
                entries += state, name, state.get(name, _ABSENT)
        for held in (parameters, children):
            for name, one in held.items():
                entries += held, name, one
        if module is not layer:
            entries += state, "forward", _ABSENT
            for name in _HOOKS:
                sizes += state, name, 0
    for name in absent:
        entries += layer.__dict__, name, _ABSENT
    layer.__dict__[_NAME] = Kept(layer, value, (tuple(objects), tuple(entries), tuple(sizes)))


_unchanged = getattr(introspection(), "unchanged", None)
