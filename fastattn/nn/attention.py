"""Multi-head attention with the arguments, masks and parameters of torch.nn.MultiheadAttention.

    q, k, v = one packed product for self-attention, two or three otherwise, viewed as (batch, heads, seqlen, head_dim)
    out = out_proj(attention(q, k, v))

Both layouts, (batch, seqlen, d_model) and (seqlen, batch, d_model), reach the op as strided views. out_proj is called
as a module, so its hooks and adapters take effect. While nothing hangs on it, self-attention in training is one call
(self_attention.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import reference
from fastattn._autocast import matmul
from fastattn.nn.masks import attention_masks, check_mask_dtype
from fastattn.nn.plain import leaf_call, remember_forward, torch_attention_is_replaced
from fastattn.nn.self_attention import train_itself
from fastattn.ops import attention
from fastattn.ops._attention_call import attention_call, sharded_call
from fastattn.ops._kinds import is_dtensor
from fastattn.ops._nested import Rows, packed_arguments
from fastattn.ops._public import Public
from fastattn.ops._random import draw_rng
from fastattn.ops.attention import attention_with_rng
from fastattn.ops.linear import linear


def check_dims(query, key, value, key_padding_mask, attn_mask, n_heads):
    """Return whether the inputs are batched; raise AssertionError if their numbers of dimensions do not agree."""
    dims = query.dim()
    if dims not in (2, 3):
        raise AssertionError(f"query should be unbatched 2D or batched 3D tensor but received {dims}-D query tensor")
    kind = "For batched (3-D) `query`" if dims == 3 else "For unbatched (2-D) `query`"
    if key.dim() != dims or value.dim() != dims:
        raise AssertionError(
            f"{kind}, expected `key` and `value` to be {dims}-D but found {key.dim()}-D and {value.dim()}-D"
            " tensors respectively"
        )
    if key_padding_mask is not None and key_padding_mask.dim() != dims - 1:
        raise AssertionError(
            f"{kind}, expected `key_padding_mask` to be `None` or {dims - 1}-D but found"
            f" {key_padding_mask.dim()}-D tensor instead"
        )
    if attn_mask is not None:
        if attn_mask.dim() not in (2, 3):
            raise AssertionError(
                f"{kind}, expected `attn_mask` to be `None`, 2-D or 3-D but found {attn_mask.dim()}-D tensor instead"
            )
        expected = (n_heads, query.shape[0], key.shape[0])
        if dims == 2 and attn_mask.dim() == 3 and tuple(attn_mask.shape) != expected:
            raise AssertionError(f"Expected `attn_mask` shape to be {expected} but got {attn_mask.shape}")
    return dims == 3


def _attention_and_weights(q, k, v, mask, bias, causal, dropout_p):
    """The output of the op, and the weights after dropout, which a second pass over q and k computes."""
    if type(q) is not torch.Tensor and is_dtensor(q):
        _, call = attention_call("MultiheadAttention", q, k, v, mask, bias, causal)
        call = sharded_call("MultiheadAttention", call, bool(causal))
        rng = call.draw_rng() if dropout_p else None

        def function(q, k, v, bias, _, mask, *unused):
            return _local_attention_and_weights(q, k, v, mask, bias, causal, dropout_p, rng)

        return call(function, ("bhse", "bhst"))
    rng = draw_rng(q) if dropout_p else None
    return _local_attention_and_weights(q, k, v, mask, bias, causal, dropout_p, rng)


def _local_attention_and_weights(q, k, v, mask, bias, causal, dropout_p, rng):
    out, lse = attention_with_rng(q, k, v, mask=mask, bias=bias, causal=causal, dropout_p=dropout_p, rng=rng)
    batch, n_heads, seqlen_q, head_dim = q.shape
    seqlen_k = k.shape[2]
    acc = reference.accumulator(q.dtype)
    scores = matmul(q.to(acc), k.to(acc).transpose(-2, -1)) * head_dim**-0.5
    visible = reference.attention_visible(seqlen_q, seqlen_k, mask=mask, causal=causal, device=q.device)
    if bias is not None:
        scores = scores + bias
        visible = visible & (bias != float("-inf"))  # the values of a hidden key do not matter
    empty = lse[..., None] == float("-inf")  # a row that sees no key: weights 0, and no -inf - -inf in the gradient
    scores = torch.where(visible, scores, float("-inf")).masked_fill(empty, 0.0)
    # not exp(scores - lse): next to a large bias, lse has too few digits left for the logarithm of the sum
    weights = torch.softmax(scores, -1).masked_fill(empty, 0.0)
    if dropout_p:
        rows = torch.arange(seqlen_q, device=q.device)
        slabs = torch.arange(batch * n_heads, device=q.device).view(batch, n_heads, 1)
        keep = reference.philox_keep(rng, dropout_p, rows, slabs, seqlen_k)
        weights = torch.where(keep, weights * reference.dropout_scale(dropout_p), 0.0)
    return out, weights


_FLAGS = "need_weights average_attn_weights is_causal"


@remember_forward
class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` on `fastattn.attention`: the same arguments, parameters and masks.

    docs/torch-nn.md lists where it differs from torch, each difference with its reason.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype: as in
            torch.nn.
        strict_torch: follow torch where this class differs on purpose: is_causal needs a mask and is ignored next to
            key_padding_mask, and need_weights=True runs torch's own code.
    Source: torch.nn.MultiheadAttention.
    Example:
        >>> attn = fastattn.nn.MultiheadAttention(64, 8, batch_first=True)
        >>> x = torch.randn(4, 128, 64)
        >>> y, _ = attn(x, x, x, is_causal=True, need_weights=False)
        >>> y.shape
        torch.Size([4, 128, 64])
    """

    strict_torch = False

    @Public("nn.MultiheadAttention", flags="strict_torch").answering
    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        strict_torch: bool = False,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        if strict_torch:
            self.strict_torch = True

    @Public(
        "nn.MultiheadAttention", tensors="query key value key_padding_mask attn_mask", flags=_FLAGS, nested=None
    ).answering
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value.

        Args:
            query: (batch, seqlen_q, embed_dim) if batch_first, else (seqlen_q, batch, embed_dim); unbatched (seqlen_q,
                embed_dim).
            key, value: the same with seqlen_k and kdim or vdim.
            key_padding_mask: (batch, seqlen_k), unbatched (seqlen_k,), bool (True = ignore) or float (added).
            need_weights: also return the weights, after dropout: (batch, seqlen_q, seqlen_k).
            attn_mask: (seqlen_q, seqlen_k) or (batch * num_heads, seqlen_q, seqlen_k), bool or float.
            average_attn_weights: False returns the weights per head, (batch, num_heads, seqlen_q, seqlen_k).
            is_causal: query i sees keys 0 to i; attn_mask is ignored, key_padding_mask still applies.
        Returns: (out like query, weights or None).
        Raises:
            AssertionError, RuntimeError: dimensions, shapes or dtypes do not fit, as in torch.nn.
        """
        nested = not (query.is_nested is key.is_nested is value.is_nested is False)
        arguments = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        if nested and (recorded := leaf_call(self, query, key, value, *arguments)) is not None:
            return recorded
        replaced = torch_attention_is_replaced()
        if (
            replaced
            or type(self).merge_masks is not torch.nn.MultiheadAttention.merge_masks
            or (self.strict_torch and need_weights)
        ):
            if replaced and is_causal and attn_mask is None and not self.strict_torch:
                sizes = (t.shape[1 if self.batch_first and t.dim() == 3 else 0] for t in (query, key))
                attn_mask = torch.ones(*sizes, dtype=torch.bool, device=query.device).triu_(1)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if nested:
            return self._forward_nested(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if query is key is value and not need_weights and type(self) is MultiheadAttention:
            y = train_itself(self, query, key_padding_mask, attn_mask, is_causal)
            if y is not None:
                return y, None
        out, weights = self.attend(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
        return self._project_out(out), weights

    def _project_out(self, out):
        parameters = self.out_proj._parameters  # those of a scripted module have no get
        weight = parameters["weight"] if "weight" in parameters else None  # noqa: SIM401
        if weight is not None and weight.is_meta and not out.is_meta:  # PyTorch returns whatever the memory holds
            raise RuntimeError(f"MultiheadAttention: out_proj.weight must be on {out.device}, but it is on meta")
        return self.out_proj(out)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The input of out_proj, and the weights or None; the arguments are those of `forward`."""
        check_mask_dtype(key_padding_mask, "key_padding_mask")
        check_mask_dtype(attn_mask, "attn_mask")
        batched = check_dims(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        if query.shape[-1] != self.embed_dim:
            raise AssertionError(f"was expecting embedding dimension of {self.embed_dim}, but got {query.shape[-1]}")
        if self.embed_dim % self.num_heads:
            raise AssertionError(f"embed_dim {self.embed_dim} not divisible by num_heads {self.num_heads}")
        if is_causal:
            if self.strict_torch:
                is_causal = self._strict_hint(attn_mask, key_padding_mask)
            if is_causal:
                attn_mask = None
        batch_first = self.batch_first or not batched
        q, k, v = self._project(query, key, value, batched, batch_first)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
        mask, bias, causal, k, v = self._visibility(q, k, v, attn_mask, key_padding_mask, is_causal)
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            out, weights = _attention_and_weights(q, k, v, mask, bias, causal, dropout_p)
            weights = (weights.mean(1) if average_attn_weights else weights).to(q.dtype)
            weights = weights if batched else weights[0]
        else:
            out, weights = attention(q, k, v, mask=mask, bias=bias, causal=causal, dropout_p=dropout_p), None
        out = (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
        return out if batched else out[0], weights

    def _strict_hint(self, attn_mask, key_padding_mask):
        if attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint. You may use the Transformer module method"
                " `generate_square_subsequent_mask` to create this mask."
            )
        return key_padding_mask is None

    def _project(self, query, key, value, batched, batch_first):
        """q, k and v as (batch, heads, seqlen, head_dim) views of the outputs of the linear layers."""
        weight, bias, embed_dim = self.in_proj_weight, self.in_proj_bias, self.embed_dim
        heads = (self.num_heads, embed_dim // self.num_heads)
        if query is key and key is value and self._qkv_same_embed_dim:
            # unbind before permuting: the backward then writes the gradient of the projection in one copy
            projected = linear(query, weight, bias).unflatten(-1, (3, *heads)).unbind(-3)
            return self._heads_first(projected, batched, batch_first)
        if self._qkv_same_embed_dim:
            if key.shape != value.shape:
                raise AssertionError(f"key shape {key.shape} does not match value shape {value.shape}")
            if key is value:
                w_q, w_kv = weight.split((embed_dim, 2 * embed_dim))
                b_q, b_kv = (None, None) if bias is None else bias.split((embed_dim, 2 * embed_dim))
                projected = (linear(query, w_q, b_q), *linear(key, w_kv, b_kv).chunk(2, -1))
            else:
                biases = (None,) * 3 if bias is None else bias.chunk(3)
                projected = map(linear, (query, key, value), weight.chunk(3), biases)
        else:
            if key.shape[:-1] != value.shape[:-1]:
                raise AssertionError(
                    f"key's sequence and batch dims {key.shape[:-1]} do not match value's {value.shape[:-1]}"
                )
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            for label, t, w in zip(("query", "key", "value"), (query, key, value), weights, strict=True):
                if w is None:
                    raise AssertionError(f"use_separate_proj_weight is True but {label[0]}_proj_weight is None")
                if w.shape != (embed_dim, t.shape[-1]):
                    raise AssertionError(
                        f"expecting {label} weights shape of {(embed_dim, t.shape[-1])}, as the last dimension of"
                        f" {label} is {t.shape[-1]}, but got {tuple(w.shape)}"
                    )
            projected = map(linear, (query, key, value), weights, (None,) * 3 if bias is None else bias.chunk(3))
        return self._heads_first((t.unflatten(-1, heads) for t in projected), batched, batch_first)

    @staticmethod
    def _heads_first(projected, batched, batch_first):
        """(batch, heads, seqlen, head_dim) views of tensors whose last two dimensions are heads and head_dim."""
        views = projected if batched else (t[None] for t in projected)
        return [t.transpose(1, 2) if batch_first else t.permute(1, 2, 0, 3) for t in views]

    def _visibility(self, q, k, v, attn_mask, key_padding_mask, is_causal):
        """(mask, bias, causal, k, v) for the op, with bias_k, bias_v and the zero key appended to k and v."""
        seqlen_k = k.shape[2]
        mask = bias = None
        if attn_mask is not None or key_padding_mask is not None:
            mask, bias = attention_masks(
                attn_mask, key_padding_mask, q.shape[0], self.num_heads, q.shape[2], seqlen_k, q.dtype
            )
        causal = "top_left" if is_causal else False
        if self.bias_k is self.bias_v is None and not self.add_zero_attn:
            return mask, bias, causal, k, v
        if (self.bias_k is None) is not (self.bias_v is None):
            raise AssertionError("bias_k and bias_v must be set together")
        if causal:  # every query sees the appended keys, which no causal alignment expresses
            triangle = reference.attention_visible(q.shape[2], seqlen_k, causal=causal, device=q.device)
            mask, causal = triangle if mask is None else triangle & mask, False
        extra_k, extra_v = [k], [v]
        if self.bias_k is not None:
            shape = (1, self.num_heads, 1, k.shape[-1])
            extra_k.append(self.bias_k.view(shape).expand(k.shape[0], -1, -1, -1).to(k.dtype))
            extra_v.append(self.bias_v.view(shape).expand(k.shape[0], -1, -1, -1).to(v.dtype))
        if self.add_zero_attn:
            zero = k.new_zeros(k.shape[0], self.num_heads, 1, k.shape[-1])
            extra_k.append(zero)
            extra_v.append(zero)
        count = len(extra_k) - 1
        mask = None if mask is None else F.pad(mask, (0, count), value=True)
        bias = None if bias is None else F.pad(bias, (0, count))
        return mask, bias, causal, torch.cat(extra_k, 2), torch.cat(extra_v, 2)

    def _forward_nested(
        self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
    ):
        """Jagged tensors, and the strided ones that torch's containers pass, computed without padding."""
        tensors = query, key, value
        reason = None
        if not all(t.is_nested for t in tensors) or len({t.layout for t in tensors}) > 1:
            reason = "query, key and value are not nested tensors of one layout"
        elif any(t.dim() != 3 for t in tensors):
            reason = f"the tensors must have 3 dimensions, got {', '.join(str(t.dim()) for t in tensors)}"
        elif key_padding_mask is not None or attn_mask is not None:
            reason = "a mask was given"
        elif not (self.batch_first and self.bias_k is None and not self.add_zero_attn):
            reason = "it needs batch_first, and neither add_bias_kv nor add_zero_attn"
        elif query.layout is torch.strided and (query is not key or key is not value or self.training):
            reason = "training is enabled" if self.training else "query, key and value are not the same strided tensor"
        if reason is not None:
            raise AssertionError(f"MultiheadAttention does not support NestedTensor outside of its fast path: {reason}")
        q = Rows("MultiheadAttention", "query", query)
        k = q if key is query else Rows("MultiheadAttention", "key", key)
        v = k if value is key else Rows("MultiheadAttention", "value", value)
        if not k.has_lengths_of(v):
            raise AssertionError("key and value must have sequences of the same lengths")
        if need_weights:
            out, weights = self._attend_padded(q, k, v, average_attn_weights, is_causal)
            return q.restore(self._project_out(out)), weights
        views = self._project(q.tensor, k.tensor, v.tensor, batched=False, batch_first=True)
        out = attention(
            *(t[0].transpose(0, 1) for t in views), **packed_arguments(q, k),
            causal="top_left" if is_causal else False, dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return q.restore(self._project_out(out.flatten(1))), None

    def _attend_padded(self, q, k, v, average_attn_weights, is_causal):
        """The rows for out_proj, and the weights (batch, seqlen_q, seqlen_k), 0 at padded positions."""
        padded = {rows: torch.nested.to_padded_tensor(rows.nested, 0.0) for rows in (q, k, v)}
        is_row_q, is_row_k = (
            torch.arange(padded[rows].shape[1], device=padded[rows].device) < rows.offsets.diff()[:, None]
            for rows in (q, k)
        )
        out, weights = self.attend(
            padded[q], padded[k], padded[v], ~is_row_k, True, average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )  # fmt: skip
        is_row_q = is_row_q[..., None] if average_attn_weights else is_row_q[:, None, :, None]
        return out[is_row_q.flatten(1)], weights * is_row_q

    def forward_packed(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, is_causal: bool = False) -> Tensor:
        """Self-attention within each of several packed sequences.

        Args:
            x: (total, embed_dim).
            cu_seqlens: int32 (batch + 1,); sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1].
            max_seqlen: length of the longest sequence.
        Returns: (total, embed_dim).
        """
        heads = (self.num_heads, self.embed_dim // self.num_heads)
        qkv = linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, *heads))
        out = attention(
            *qkv.unbind(1), cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen, causal="top_left" if is_causal else False,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self._project_out(out.flatten(1))
