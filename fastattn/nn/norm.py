"""LayerNorm and RMSNorm on the fused kernels."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.nn.plain import affine, leaf_call, remember_forward
from fastattn.ops import layer_norm, rms_norm
from fastattn.ops._kinds import is_dtensor
from fastattn.ops._plain_norm import eager_norm
from fastattn.ops._public import ArgumentValueError, Public

# the code that torch.nn runs, unless it has been patched
_TorchLayerNorm, _TorchRMSNorm = torch.nn.LayerNorm, torch.nn.RMSNorm
_LAYER_NORM, _LAYER_NORM_FORWARD = F.layer_norm, torch.nn.LayerNorm.forward
_RMS_NORM, _RMS_NORM_FORWARD = F.rms_norm, torch.nn.RMSNorm.forward


def _apply(op, module, x, *affine):
    dims = module.normalized_shape
    if tuple(x.shape[-len(dims) :]) != tuple(dims):
        raise ArgumentValueError(
            f"Given normalized_shape={list(dims)}, expected input with shape [*, {', '.join(map(str, dims))}],"
            f" but got input of size {list(x.shape)}"
        )
    if len(dims) == 1:  # normalized_shape was set to a list
        return op(x, *affine, module.eps)
    if not dims:
        raise ArgumentValueError(
            "Expected normalized_shape to be at least 1-dimensional, but got normalized_shape = []"
        )
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


@remember_forward
class LayerNorm(torch.nn.LayerNorm):
    """`torch.nn.LayerNorm` on `fastattn.layer_norm`: the same arguments, parameters and results.

    Args:
        normalized_shape: int or several sizes, the last dimensions of the input.
        eps: added to the variance.
        elementwise_affine: whether there is a weight.
        bias: whether there is also a bias.
    Raises:
        ArgumentValueError (a RuntimeError and a ValueError): the input does not end in normalized_shape.
    Source: torch.nn.LayerNorm.
    Example:
        >>> fastattn.nn.LayerNorm(512)(torch.randn(4, 128, 512)).shape
        torch.Size([4, 128, 512])
    """

    @Public("nn.LayerNorm", tensors="input", nested=None).answering
    def forward(self, input: Tensor) -> Tensor:
        """input (..., *normalized_shape) → the same shape, normalised over those last dimensions."""
        replaced = F.layer_norm is not _LAYER_NORM or _TorchLayerNorm.forward is not _LAYER_NORM_FORWARD
        if replaced or input.is_nested is not False:
            recorded = leaf_call(self, input)
            if recorded is not None:
                return recorded
            if replaced or len(self.normalized_shape) > 1:
                return super().forward(input)
            return layer_norm(input, self.weight, self.bias, self.eps)
        if input.shape[-1:] == self.normalized_shape != ():
            weight, bias = affine(self)
            y = eager_norm(input, weight, bias, self.eps, False)
            return layer_norm(input, weight, bias, self.eps) if y is None else y
        return _apply(layer_norm, self, input, self.weight, self.bias)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` on `fastattn.rms_norm`: the same arguments, parameters and results.

    Args:
        normalized_shape: int or several sizes, the last dimensions of the input.
        eps: added to the mean square; None is the epsilon of the accumulator: 2.2e-16 for float64, else 1.19e-7.
        elementwise_affine: whether there is a weight.
    Raises:
        ArgumentValueError (a RuntimeError and a ValueError): the input does not end in normalized_shape.
    Source: torch.nn.RMSNorm.
    Example:
        >>> fastattn.nn.RMSNorm(512)(torch.randn(4, 128, 512)).shape
        torch.Size([4, 128, 512])
    """

    @Public("nn.RMSNorm", tensors="x", nested=None).answering
    def forward(self, x: Tensor) -> Tensor:
        """x (..., *normalized_shape) → the same shape, normalised over those last dimensions."""
        replaced = F.rms_norm is not _RMS_NORM or _TorchRMSNorm.forward is not _RMS_NORM_FORWARD
        if replaced or x.is_nested is not False:
            recorded = leaf_call(self, x)
            if recorded is not None:
                return recorded
            if replaced or len(self.normalized_shape) > 1:
                return super().forward(x)
            return rms_norm(x, self.weight, self.eps)
        if x.shape[-1:] == self.normalized_shape != ():
            weight = self._parameters["weight"] if "weight" in self._parameters else self.weight  # noqa: SIM401  slower
            y = eager_norm(x, weight, None, self.eps, True)
            return rms_norm(x, weight, self.eps) if y is None else y
        return _apply(rms_norm, self, x, self.weight)
