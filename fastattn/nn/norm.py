"""LayerNorm and RMSNorm on the fused kernels."""

import torch

from fastattn.ops import layer_norm, rms_norm
from fastattn.ops._kinds import is_dtensor
from fastattn.ops._public import Public


def _apply(op, module, x, *affine):
    dims = module.normalized_shape
    if tuple(x.shape[-len(dims) :]) != tuple(dims):
        raise RuntimeError(
            f"Given normalized_shape={list(dims)}, expected input with shape [*, {', '.join(map(str, dims))}],"
            f" but got input of size {list(x.shape)}"
        )
    if len(dims) == 1:
        return op(x, *affine, module.eps)
    if type(x) is not torch.Tensor and is_dtensor(x):
        return _apply_sharded(op, module, x, affine)
    flat = x.flatten(-len(dims))
    return op(flat, *(t if t is None else t.flatten() for t in affine), module.eps).view(x.shape)


def _apply_sharded(op, module, x, affine):
    from fastattn.ops._sharded import ROWS, ShardedCall

    rows, cols = ROWS[: x.dim() - len(module.normalized_shape)], "abcdefghijklm"[: len(module.normalized_shape)]
    operands = {"input": (x, rows + cols)} | {
        label: (t, cols) for label, t in zip(("weight", "bias"), affine, strict=False)
    }
    call = ShardedCall(type(module).__name__, operands, rows)
    return call(lambda x, *affine: (_apply(op, module, x, *affine),), (rows + cols,))[0]


class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastattn.layer_norm`: the same arguments, parameters and results.

    Args:
        normalized_shape: int or several sizes, the last dimensions of the input.
        eps: added to the variance.
        elementwise_affine: whether there is a weight.
        bias: whether there is a bias beside the weight.
    Raises:
        RuntimeError: the last dimensions of the input are others.
    Source: torch.nn.LayerNorm.
    """

    @Public("nn.LayerNorm", tensors="input", nested=None).answering
    def forward(self, input):
        if input.is_nested:
            one = len(self.normalized_shape) == 1
            return layer_norm(input, self.weight, self.bias, self.eps) if one else super().forward(input)
        return _apply(layer_norm, self, input, self.weight, self.bias)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastattn.rms_norm`: the same arguments, parameters and results.

    Args:
        normalized_shape: int or several sizes, the last dimensions of the input.
        eps: added to the mean square; None is the epsilon of the accumulator, 1.19e-7 and for float64 2.2e-16.
        elementwise_affine: whether there is a weight.
    Raises:
        RuntimeError: the last dimensions of the input are others.
    Source: torch.nn.RMSNorm.
    """

    @Public("nn.RMSNorm", tensors="x", nested=None).answering
    def forward(self, x):
        if x.is_nested:
            one = len(self.normalized_shape) == 1
            return rms_norm(x, self.weight, self.eps) if one else super().forward(x)
        return _apply(rms_norm, self, x, self.weight)
