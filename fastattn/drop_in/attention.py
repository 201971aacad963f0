"""Attention: models of transformers get our attention implementation, other modules our kernel where they call torch's.

transformers is not imported here: a model of it can only exist if it is imported already.
"""

import contextlib
import inspect
import logging
import sys
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fastattn.drop_in.change import ON_META, Change, Replaced, change_class, is_foreign, make_class, why_not_take_over
from fastattn.drop_in.guards import names_in
from fastattn.integrations.sdpa import serve

_SDPA = torch.nn.functional.scaled_dot_product_attention
_IMPLEMENTATION = "fastattn"


class _ServeSdpa(TorchFunctionMode):
    """While this mode is active, calls of torch's scaled_dot_product_attention in this thread run on our kernel."""

    only_serves = True

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _SDPA:
            out, _ = serve(*args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)


class SdpaCaller(Replaced):
    """A module that calls torch's scaled_dot_product_attention, on our kernel."""

    def forward(self, *args, **kwargs):
        """The original forward; in a graph that is traced the calls stay torch's."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return super().forward(*args, **kwargs)
        with _ServeSdpa():
            return super().forward(*args, **kwargs)


def find(modules: dict[str, torch.nn.Module]) -> dict[str, Change | str]:
    """A Change or a reason for each model of transformers, and for each other module with attention of its own."""
    library = sys.modules.get("transformers.modeling_utils")
    models = () if library is None else library.PreTrainedModel
    found: dict[str, Change | str] = {}
    inside: set[torch.nn.Module] = set()  # modules of the models of transformers
    for name, module in modules.items():
        if isinstance(module, Replaced):
            inside.update(module.modules() if isinstance(module, models) else ())
        elif isinstance(module, models):
            result = None if module in inside else _recognise_model(module)
            if result is not None:
                found[name] = result
            inside.update(module.modules())
        elif _calls_sdpa(type(module)):
            reason = why_not_take_over(module)
            new_class = None if reason else make_class(SdpaCaller, type(module), "scaled_dot_product_attention")
            what = f"attention (was {type(module).__name__}'s call of torch's)"
            found[name] = reason or change_class(module, new_class, what)
        elif module not in inside and _computes_attention_itself(module):
            found[name] = (
                f"{type(module).__name__} computes attention itself, without torch's scaled_dot_product_attention: call"
                " fastattn.attention in its forward"
            )
    return found


def _configs(model, library):
    """The configs that hold the name of an implementation: of the model, of models in it, and their parts."""
    found: dict[int, Any] = {}
    waiting = [module.config for module in model.modules() if isinstance(module, library.PreTrainedModel)]
    while waiting:
        config = waiting.pop()
        if config is not None and id(config) not in found:
            found[id(config)] = config
            waiting += [getattr(config, part, None) for part in getattr(config, "sub_configs", ())]
    return list(found.values())


def set_implementation(model):
    """Set ours, and return the function that puts the old ones back."""
    import fastattn.integrations.transformers  # noqa: F401  it registers our attention

    library = sys.modules["transformers.modeling_utils"]
    before = [(config, config._attn_implementation_internal) for config in _configs(model, library)]

    def undo():
        for config, name in before:
            config._attn_implementation_internal = name

    try:
        model.set_attn_implementation(_IMPLEMENTATION)
    except BaseException:
        undo()
        raise
    return undo


@contextlib.contextmanager
def _without_warnings():
    logger = logging.getLogger("transformers.modeling_utils")
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def _recognise_model(model):
    """The Change of a model of transformers, a reason, or None if it runs on fastattn already."""
    if model.config._attn_implementation == _IMPLEMENTATION or not any(map(_is_called_attention, model.modules())):
        return None
    if any(parameter.is_meta for parameter in model.parameters()):
        return ON_META
    if getattr(model.config, "output_attentions", False):
        return "config.output_attentions is set, and our attention stores no weights"
    try:
        with _without_warnings():
            undo = set_implementation(model)
    except Exception as error:  # transformers or our integration refuses the model
        return str(error)
    taken = model.config._attn_implementation == _IMPLEMENTATION
    was = {config._attn_implementation for config in _configs(model, sys.modules["transformers.modeling_utils"])}
    undo()
    if not taken and _IMPLEMENTATION not in was:
        return f"{type(model).__name__} has its own attention code, which attn_implementation does not replace"
    was = model.config._attn_implementation
    return Change(
        f"attention, attn_implementation={_IMPLEMENTATION!r} (was {was!r})", lambda: set_implementation(model)
    )


def _functions_of(kind):
    """The functions that the classes of a module define, without those of torch."""
    for cls in kind.__mro__:
        if cls.__module__.partition(".")[0] != "torch":
            for value in cls.__dict__.values():
                function = inspect.unwrap(value) if callable(value) else value
                if isinstance(function, types.FunctionType):
                    yield function


def _calls_sdpa(kind):
    return any(_SDPA.__name__ in names_in(function.__code__) for function in _functions_of(kind))


def _computes_attention_itself(module):
    """Whether it is called attention, and none of its children is."""
    if not is_foreign(module) or isinstance(module, torch.nn.MultiheadAttention):
        return False
    inside = any(_is_called_attention(child) for child in module.modules() if child is not module)
    return _is_called_attention(module) and not inside


def _is_called_attention(module):
    name = type(module).__name__.lower()
    return "attention" in name or "attn" in name
