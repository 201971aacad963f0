"""The masks of torch.nn (True = ignore, float = added) in the form of the attention op (True = attend, bias)."""

import torch

from fastattn.ops._kinds import is_causal_bias
from fastattn.ops._register import is_recorded, needs_reference


def check_mask_dtype(mask, name):
    """Raise AssertionError unless the mask is None, bool or float."""
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        raise AssertionError(
            f"only bool and floating types of {name} are supported (bool: True = ignore), got {mask.dtype}"
        )


def as_float_mask(mask, dtype):
    """The mask as torch.nn passes it to user code: 0 and -inf in `dtype` if it was bool."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))


def _in_range(mask):
    """The mask minus half of each row's maximum, in rows whose maximum is near the limits of the dtype.

    This changes no weight, and it leaves a finite number in every row of the sum of two finite masks.
    """
    if mask.shape[-1] == 0:
        return mask
    finite = torch.finfo(mask.dtype)
    top = mask.detach().amax(-1, keepdim=True)
    return mask - torch.where((top.abs() > finite.max * finite.eps / 4) & top.isfinite(), top / 2, 0.0)


def attention_masks(attn_mask, key_padding_mask, batch, n_heads, seqlen_q, seqlen_k, dtype):
    """Both masks of a MultiheadAttention as arguments of the attention op.

    One mask and one bias need no tensor of batch × seqlen_q × seqlen_k. So a bool attn_mask given with a bool
    key_padding_mask becomes a bias of its own small shape; only two float masks have to be added.

    Args:
        attn_mask: (seqlen_q, seqlen_k) or (batch * n_heads, seqlen_q, seqlen_k), bool or float, or None.
        key_padding_mask: (batch, seqlen_k), bool or float, or None.
        dtype: of the projected query.
    Returns: (mask, bias), views that broadcast to (batch, n_heads, seqlen_q, seqlen_k), or None.
    Raises:
        RuntimeError: attn_mask is a CausalBias or has the wrong shape, or the sum of the masks is neither float32 nor
            `dtype`.
        AssertionError: key_padding_mask has the wrong shape.
    """
    if attn_mask is not None:  # checked first, as in torch
        if is_causal_bias(attn_mask):
            raise RuntimeError(
                "attn_mask must be a bool or float tensor, got a CausalBias, which holds no values: use is_causal=True"
            )
        expected = (seqlen_q, seqlen_k) if attn_mask.dim() == 2 else (batch * n_heads, seqlen_q, seqlen_k)
        if tuple(attn_mask.shape) != expected:
            raise RuntimeError(
                f"The shape of the {attn_mask.dim()}D attn_mask is {attn_mask.shape}, but should be {expected}"
                " (bool: True = ignore)."
            )
    bools, floats = [], []
    if key_padding_mask is not None:
        for dim, size in enumerate((batch, seqlen_k)):
            if key_padding_mask.shape[dim] != size:
                raise AssertionError(
                    f"Expected key_padded_mask.shape[{dim}] to be {size}, but got {key_padding_mask.shape[dim]}; it is"
                    " (batch, keys), True = ignore"
                )
        (bools if key_padding_mask.dtype == torch.bool else floats).append(key_padding_mask[:, None, None, :])
    if attn_mask is not None:
        attn_mask = attn_mask[None, None] if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, n_heads))
        if attn_mask.dtype == torch.bool and bools:
            attn_mask = as_float_mask(attn_mask, dtype)
        (bools if attn_mask.dtype == torch.bool else floats).append(attn_mask)
    mask = bools[0].logical_not() if bools else None
    if not floats:
        return mask, None
    of_sum = floats[0].dtype
    if bools or len(floats) == 2:  # torch adds the masks, a bool one as 0 and -inf in `dtype`
        of_sum = torch.promote_types(of_sum, floats[1].dtype if len(floats) == 2 else dtype)
    if of_sum not in (torch.float32, dtype):
        raise RuntimeError(
            f"Expected attn_mask dtype to be bool or float32 or to match query dtype {dtype}, got {of_sum}"
        )
    floats = [t if t.dtype == of_sum else t.to(of_sum) for t in floats]
    return mask, floats[0] if len(floats) == 1 else _in_range(floats[0]) + _in_range(floats[1])


def is_causal_mask(mask, hint, size):
    """The is_causal that a stack passes to its layers.

    Without a hint the mask is compared with the causal one in every call, once for all layers. The answer is not
    cached, because some writes leave no trace on a tensor (`mask.data`, numpy arrays that share its memory). The mask
    is not read if its values may differ when the result is used, or if it needs a gradient. Only speed depends on this.

    Args:
        mask: (size, size), bool or float; anything else is not a causal mask; or None.
        hint: the user's is_causal: True, False or None.
    """
    if hint is not None or mask is None:
        return hint is True
    if (
        torch.compiler.is_compiling()
        or mask.shape != (size, size)
        or type(mask) not in (torch.Tensor, torch.nn.Parameter)
        or mask.requires_grad
        or mask.is_meta
        or needs_reference()
        or is_recorded(mask)
    ):
        return False
    return torch.ops.fastattn.is_causal_mask.default(mask)
