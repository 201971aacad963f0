"""`torch.nn.functional.scaled_dot_product_attention` served by our kernels, for code that is not to be edited."""

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.ops._attention_call import Facts
from fastattn.ops._backends import device_name, order, why_not
from fastattn.ops._kinds import nonplain_kind
from fastattn.ops.scaled_dot_product_attention import scaled_dot_product_attention


def _reason(query, key, value, attn_mask):
    """Why a call is left to torch, or None. Arguments that do not fit each other are found later, by the op."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "a graph is traced"
    kind = nonplain_kind(query, key, value, attn_mask)
    if kind is not None:
        return f"{kind} is given"
    wide = query.shape[-1] > 256 or value.shape[-1] > 256
    facts = Facts(device_name(query.device), query.dtype, wide_heads=wide)
    reasons = {name: why_not("attention", name, facts) for name in order(facts.device) if name != "reference"}
    if all(reasons.values()):
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return None


def serve(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor | None, str | None]:
    """(result, None) of a call of torch's function on our kernels, or (None, why it is left to torch)."""
    reason = _reason(query, key, value, attn_mask)
    if reason is not None:
        return None, reason
    try:
        out = scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    except (TypeError, ValueError) as error:
        return None, str(error)
    return out, None


class SdpaPatch:
    """What `patch_sdpa` did: served counts the calls that ran on our kernels, left those that went to torch, by reason.

    A context manager; `undo()` puts back what was there before.

    Example:
        >>> q = torch.randn(2, 8, 100, 64)
        >>> patch = fastattn.patch_sdpa()
        >>> _ = torch.nn.functional.scaled_dot_product_attention(q, q, q)
        >>> patch.undo()
        >>> patch.served, dict(patch.left)
        (1, {})
    """

    def __init__(self):
        self.served = 0
        self.left: Counter[str] = Counter()
        self._before = F.scaled_dot_product_attention
        self._function = self._make()
        F.scaled_dot_product_attention = self._function

    def _make(self):
        def patched_scaled_dot_product_attention(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            enable_gqa: bool = False,
        ) -> Tensor:
            given: tuple[Any, ...] = (query, key, value, attn_mask, dropout_p, is_causal)
            named: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
            out, reason = serve(*given, **named)
            if out is not None:
                self.served += 1
                return out
            if not torch.compiler.is_compiling():
                self.left[str(reason)] += 1
            return self._before(*given, **named)

        return patched_scaled_dot_product_attention

    def undo(self) -> None:
        """Put back the function that was there before; nothing happens the second time.

        Raises:
            RuntimeError: another function has been put there since.
        """
        if self._function is None:
            return
        if F.scaled_dot_product_attention is not self._function:
            raise RuntimeError(
                "patch_sdpa: another function has taken the place of scaled_dot_product_attention: undo that first"
            )
        F.scaled_dot_product_attention, self._function = self._before, None

    remove = undo  # the name that torch.nn.attention.restore_flash_attention_impl calls

    def __enter__(self) -> "SdpaPatch":
        """The patch, which holds since `patch_sdpa` was called."""
        return self

    def __exit__(self, *_: object) -> None:
        """Undo it."""
        self.undo()

    def __str__(self):
        calls = "call" if self.served == 1 else "calls"
        lines = [f"{self.served} {calls} served by fastattn, {self.left.total()} left to torch"]
        return "\n".join([*lines, *(f"  {count} left to torch: {reason}" for reason, count in self.left.items())])


def patch_sdpa() -> SdpaPatch:
    """Let `torch.nn.functional.scaled_dot_product_attention` run on our kernels, in this whole process.

    A call that we cannot serve goes to torch: float64, nested tensors and other subclasses, calls in a graph that
    is traced, and arguments that do not fit, for which torch raises its own error. Code that took the function out of
    torch.nn.functional by name before keeps torch's, and so does what is written in C++.

    Where the installed torch has a registry of implementations, the same switch has a name there:
    `torch.nn.attention.activate_flash_attention_impl("fastattn")`, and `restore_flash_attention_impl()` undoes it.

    Returns: an SdpaPatch; `print` it to see how many calls were served, and why others were not.

    Example:
        >>> q = torch.randn(2, 8, 100, 64)
        >>> with fastattn.patch_sdpa() as patch:
        ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        >>> print(patch)
        1 call served by fastattn, 0 left to torch
    """
    return SdpaPatch()


if hasattr(torch.nn.attention, "register_flash_attention_impl"):
    torch.nn.attention.register_flash_attention_impl("fastattn", register_fn=patch_sdpa)
