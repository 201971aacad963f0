"""Checks that the modules and functions of torch.nn are unpatched, so that fused kernels may replace them."""

import operator
import types

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.modules import module as _torch_module

from fastattn.ops import scaled_dot_product_attention
from fastattn.ops._kinds import nonplain_kind

_torch_nn = types.SimpleNamespace(**vars(torch.nn))  # torch's own classes, even if the names are rebound later

_ours = []  # (class, its original forward)


def remember_forward(cls):
    """Class decorator: the fused layers may replace the class while its forward is the original one."""
    _ours.append((cls, cls.forward))
    return cls


def is_plain(module, *classes):
    """True if the type of `module` is one of `classes`, with no hook, no forward set on it, and plain parameters.

    Parametrizations and LoRA layers have other classes, pruning and sharding use hooks, and quantisation may be in the
    parameters. `must_call_children` checks what holds for all modules of a class. A class that computes the same as one
    of `classes` names it in `plain_as`, which its subclasses do not inherit.
    """
    if type(module) not in classes and vars(type(module)).get("plain_as") not in classes:
        return False
    state = module.__dict__
    parameters = state["_parameters"]
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or (parameters and nonplain_kind(*parameters.values()))
    )


def affine(module) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of a Linear or LayerNorm.

    Reading a parameter as an attribute calls Module.__getattr__, which takes about 0.8 us.
    """
    parameters = module.__dict__["_parameters"]
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return module.weight, module.bias  # parametrized, or plain attributes as in the replicas of DataParallel


def _watch(*names):
    """A function that returns whether one of these functions of torch.nn has been replaced, other than by ours.

    Args:
        names: attribute paths in torch.nn, such as "functional.linear" or "Linear.forward".
    """
    get = operator.attrgetter(*names)
    originals = get(_torch_nn)

    def replaced():
        found = get(_torch_nn)
        if found == originals:
            return False
        # torch.export and make_fx replace Module.__call__ to record which module an operator came from
        ignored = "Module.__call__" if get_proxy_mode() is not None else None
        return any(
            now is not before and now is not scaled_dot_product_attention and name != ignored
            for name, now, before in zip(names, found, originals, strict=True)
        )

    replaced._dynamo_marked_constant = True  # torch.compile evaluates it while tracing
    return replaced


_ATTENTION = (
    "MultiheadAttention.forward",
    "MultiheadAttention.merge_masks",
    "functional.multi_head_attention_forward",
    "functional.scaled_dot_product_attention",
)
torch_attention_is_replaced = _watch(*_ATTENTION)
torch_linear_is_replaced = _watch("Linear.forward", "functional.linear")
_torch_is_replaced = _watch(
    *_ATTENTION, "Module.__call__", "Module._call_impl", "Dropout.forward", "GELU.forward", "LayerNorm.forward",
    "Linear.forward", "ReLU.forward", "SiLU.forward", "functional.dropout", "functional.layer_norm",
    "functional.linear",
)  # fmt: skip


def must_call_children():
    """True if a global hook or patched code observes or changes what all modules do."""
    if (
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
        or _torch_is_replaced()
    ):
        return True
    for cls, forward in _ours:  # noqa: SIM110  any() on a generator takes twice as long
        if cls.forward is not forward:
            return True
    return False


def is_traced() -> bool:
    """Whether a compiler, a tracer or a transform records this call: the code must not depend on values then."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def leaf_call(module, *args, **options):
    """The call of a torch.nn module as symbolic tracing (torch.fx) records it; None if no argument is symbolic.

    Also None for the module being traced, whose own forward is to be recorded.
    """
    for value in (*args, *options.values()):
        if isinstance(value, Proxy):
            tracer = value.tracer
            if module is tracer.root:
                return None
            return tracer.create_proxy("call_module", tracer.path_of_module(module), args, options)
    return None


def dropout_p(module):
    """The current probability of a torch.nn.Dropout: 0 in evaluation mode."""
    return module.p if module.training else 0.0
