"""Whether a child module does what its class says and nothing else, so that a fused kernel may stand in for it."""

from torch.nn.modules import module as _torch_module

from fastattn.ops._kinds import odd_kind


def is_plain(module, *classes):
    """True if `module` is exactly of one of `classes` and carries no hook, no forward of its own and plain parameters.

    Parametrizations and LoRA layers are other classes, pruning and sharding are hooks, quantisation may be in the
    parameters.
    """
    if type(module) not in classes:
        return False
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or odd_kind(*state["_parameters"].values())
    )


def hooks_everywhere():
    """True if somebody registered a hook for all modules: then every child has to be called."""
    return bool(
        _torch_module._global_forward_hooks
        or _torch_module._global_forward_pre_hooks
        or _torch_module._global_backward_hooks
        or _torch_module._global_backward_pre_hooks
    )


def dropout_p(module):
    """The probability that a torch.nn.Dropout uses now."""
    return module.p if module.training else 0.0
