"""Kinds of tensors that are not plain, dense ones."""

import sys

import torch


def is_causal_bias(value):
    """Whether a value is one of torch's CausalBias masks: a tensor that says what is visible and holds no values."""
    if type(value) is torch.Tensor:
        return False
    # importing the module takes seconds; if nobody did, there is no object of its class
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(value, module.CausalBias)


def is_dtensor(value):
    """Whether a value is a DTensor. Ask only if `type(value) is not torch.Tensor`: plain calls pay nothing."""
    module = sys.modules.get("torch.distributed.tensor")  # as above
    return module is not None and isinstance(value, module.DTensor)


def numbers(t):
    """The elements of a small tensor as a list; those of a DTensor are gathered."""
    return (t.full_tensor() if type(t) is not torch.Tensor and is_dtensor(t) else t).tolist()
