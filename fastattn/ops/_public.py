"""What stands around every public op: it can be overridden, as the functions of torch can.

A plain call pays for one look at the types of its arguments.
"""

import functools

import torch
from torch.overrides import handle_torch_function, has_torch_function

from fastattn.ops._kinds import is_causal_bias

_is_mode_enabled = torch._C._is_torch_function_mode_enabled


def public(takes_pair=False):
    """Let `__torch_function__` of its arguments, or of a mode, take the place of a public op.

    A CausalBias has such a method too, but it knows torch's own attention only: ours reads the class itself.

    Args:
        takes_pair: whether the first argument may be a pair of tensors.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            values = (*args, *kwargs.values()) if kwargs else args
            if takes_pair and values and isinstance(values[0], (tuple, list)):
                values = (*values[0], *values[1:])
            # torch.compile sees modes by the first question only
            if _is_mode_enabled() or has_torch_function(values):
                relevant = tuple(value for value in values if not is_causal_bias(value))
                # torch.compile answers the last question with True even where overriding is turned off
                if _is_mode_enabled() or (torch._C._is_torch_function_enabled() and has_torch_function(relevant)):
                    return handle_torch_function(call, relevant, *args, **kwargs)
            return function(*args, **kwargs)

        return call

    return decorate
