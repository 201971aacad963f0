"""The specification: one function per op in plain PyTorch, differentiable any number of times, for any float dtype.

Every backend is tested against these functions in fp64. Half-precision inputs are computed in fp32 and rounded where
the op rounds: at stored intermediates and at the result. Nothing here is tuned.
"""

import torch
import torch.nn.functional as F

from fastattn._autocast import linear, matmul

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_U32 = 0xFFFFFFFF

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


def accumulator(dtype):
    """The dtype used to compute with values of `dtype`: fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def philox4x32(counter, key):
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words.

    Args:
        counter: four tensors that broadcast against each other.
        key: two tensors or ints.
    Returns: four tensors of 32-bit words.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = (
            c0 * _PHILOX_M[0],
            c2 * _PHILOX_M[1],
        )  # 64-bit products; int64 overflow keeps the right bits
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _U32) ^ c1 ^ k0,
            product1 & _U32,
            ((product0 >> 32) & _U32) ^ c3 ^ k1,
            product0 & _U32,
        )
        k0, k1 = (k0 + _PHILOX_W[0]) & _U32, (k1 + _PHILOX_W[1]) & _U32
    return c0, c1, c2, c3


def dropout_threshold(dropout_p):
    """The threshold below which a 16-bit word of the random stream drops its element; 65536 is p = 1."""
    return round(dropout_p * 65536)


def dropout_scale(dropout_p):
    """The factor of kept elements: the reciprocal of the actual keep rate."""
    kept = 65536 - dropout_threshold(dropout_p)
    return 65536 / kept if kept else 0.0


def philox_keep(rng, dropout_p, row, slab, cols):
    """The elements that dropout keeps.

    16-bit word column % 8 of the Philox block with key rng[0] and counter (column // 8, row, slab, rng[1]) decides
    about the element at (slab, row, column). It depends only on the position, so all backends, tiles and threads agree.

    Args:
        rng: int64 (2,), seed and offset (low 32 bits used).
        row, slab: int64 tensors that broadcast against each other (low 32 bits used).
        cols: number of columns.
    Returns: bool (*broadcast(row, slab).shape, cols).
    """
    row, slab = torch.broadcast_tensors(row, slab)
    group = torch.arange(
        cols // 8 + 2, device=rng.device
    )  # at least 2: a recorded graph would be bound to a single one
    seed, offset = rng[0], rng[1]
    words = philox4x32(
        (group, (row & _U32)[..., None], (slab & _U32)[..., None], offset & _U32),
        (seed & _U32, (seed >> 32) & _U32),
    )
    words = torch.stack(words, dim=-1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1)
    keep = (halves >= dropout_threshold(dropout_p)).flatten(-3)
    # with a symbolic number of columns, a slice would compare sizes and bind a recorded graph to the outcome
    return keep[..., torch.arange(cols, device=rng.device) if isinstance(cols, torch.SymInt) else slice(cols)]


def dropout(x, dropout_p, residual=None, rng=None, x_bias=None):
    """residual + dropout(x + x_bias), with x viewed as (rows, columns): columns are its last dimension.

    x + x_bias is not rounded. The result has the dtype of the residual, or of x without one.
    """
    acc = accumulator(x.dtype)
    out = x.to(acc)
    if x_bias is not None:
        out = out + x_bias
    if dropout_p > 0:
        cols = x.shape[-1]
        row = torch.arange(x.numel() // cols if cols else 0, device=x.device)
        keep = philox_keep(rng, dropout_p, row, row >> 32, cols).view(x.shape)
        out = torch.where(keep, out * dropout_scale(dropout_p), 0.0)
    if residual is not None:
        out = out.to(torch.promote_types(acc, residual.dtype)) + residual
    return out.to(x.dtype if residual is None else residual.dtype)


def norm(x, residual=None, weight=None, bias=None, x_bias=None, *, eps, rms, dropout_p=0.0, rng=None):
    """y = norm(r) * weight + bias with r = dropout(x + x_bias) + residual, over the last dimension.

    norm(r) = (r - mean(r)) * rsqrt(var(r) + eps), var biased; for rms: r * rsqrt(mean(r²) + eps).
    Returns: (y, r); y has the dtype of x, r the dtype of the residual, or of x without one.
    Source: torch.nn.functional.layer_norm and rms_norm.
    """
    plain = residual is None and x_bias is None and dropout_p == 0
    r = x if plain else dropout(x, dropout_p, residual, rng, x_bias)
    acc = accumulator(torch.promote_types(x.dtype, r.dtype))
    centered = r.to(acc)
    if not rms:
        centered = centered - centered.mean(-1, keepdim=True)
        centered = centered - centered.mean(-1, keepdim=True)  # corrects the rounding error of a large mean
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(x.dtype), r


def feed_forward(
    x, w1, b1, w2, b2, *, activation="gelu", w_gate=None, b_gate=None, dropout_p=0.0, rng=None, linear=linear
):
    """y = w2·dropout(act(w1·x + b1)) + b2; gated: w2·dropout(act(w_gate·x + b_gate) ∘ (w1·x + b1)) + b2."""
    acc = accumulator(x.dtype)
    up = linear(x, w1, b1).to(acc)
    if w_gate is None:
        hidden = ACTIVATIONS[activation](up)
    else:
        hidden = ACTIVATIONS[activation](linear(x, w_gate, b_gate).to(acc)) * up
    return linear(dropout(hidden, dropout_p, rng=rng).to(x.dtype), w2, b2)


def rotary_embedding(x, cos, sin, *, rotary_dim=None, positions=None, offset=0, interleaved=False):
    """Rotate pairs of the first rotary_dim channels of x by the angles of its positions; copy the other channels.

        y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin

    A pair (x1, x2) is (x[d], x[d + rotary_dim / 2]), or interleaved (x[2d], x[2d + 1]). The gradient uses -sin.

    Args:
        x: (batch, n_heads, seqlen, head_dim) or packed (total, n_heads, head_dim).
        cos, sin: (rows, rotary_dim / 2), row p for position p; or (batch or 1, seqlen, rotary_dim / 2), one per token.
            With rotary_dim columns they have a number for each channel: cos1 and sin1 in y1, cos2 and sin2 in y2.
        rotary_dim: 2 * cos.shape[-1] if None.
        positions: integers (seqlen,), (batch or 1, seqlen) or packed (total,); None counts from `offset`. A position
            outside the tables gives NaN.
    Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
    """
    rotary_dim = 2 * cos.shape[-1] if rotary_dim is None else rotary_dim
    acc = accumulator(x.dtype)
    columns = rotary_dim if cos.shape[-1] == rotary_dim else rotary_dim // 2
    cos, sin = (t[..., :columns].to(acc) for t in (cos, sin))
    if positions is not None:
        inside = ((positions >= 0) & (positions < cos.shape[0]))[..., None]
        row = torch.where(inside[..., 0], positions, 0)
        cos, sin = (torch.where(inside, t[row], float("nan")) for t in (cos, sin))
    elif cos.dim() == 2:
        seqlen = x.shape[0 if x.dim() == 3 else 2]
        cos, sin = (t[offset : offset + seqlen] for t in (cos, sin))
    cos, sin = (t.unsqueeze(-2 if x.dim() == 3 else -3) for t in (cos, sin))

    def pairs(t):
        return t.unflatten(-1, (-1, 2) if interleaved else (2, -1)).unbind(-1 if interleaved else -2)

    x1, x2 = (t.to(acc) for t in pairs(x[..., :rotary_dim]))
    (cos1, cos2), (sin1, sin2) = (pairs(t) if t.shape[-1] == rotary_dim else (t, t) for t in (cos, sin))
    y = torch.stack((x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2), -1 if interleaved else -2).flatten(-2)
    return torch.cat((y, x[..., rotary_dim:].to(acc)), -1).to(x.dtype)


def linear_cross_entropy(
    x, weight, target, *, bias=None, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean",
    linear=linear,
):  # fmt: skip
    """F.cross_entropy(s, target) + z_loss * logsumexp(s)², s = x·weightᵀ + bias, capped by softcap * tanh(s / softcap).

    An ignored token has loss and gradient 0. The mean is over the others; without any it is NaN with gradient 0.
    Returns: shape () or, for reduction "none", that of target; in the dtype of the accumulator.
    """
    logits = linear(x, weight, bias).to(accumulator(x.dtype)).view(target.numel(), weight.shape[0])
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    labels = target.reshape(-1).long()
    # F.cross_entropy(reduction="none"), whose label_smoothing and whose shape in a decomposition exporters get wrong
    logp = F.log_softmax(logits, -1)
    loss, _ = torch.ops.aten.nll_loss_forward(logp, labels, None, 0, ignore_index)
    kept = labels != ignore_index
    if label_smoothing:
        spread = -logp.mean(-1)
        loss = (1 - label_smoothing) * loss + torch.where(kept, label_smoothing * spread, 0.0)
    if z_loss:
        # torch.logsumexp would save its value, and next to logits of 1e9 that has lost the logarithm of the sum
        peak = logits.detach().amax(-1, keepdim=True) if logits.shape[-1] else logits.new_zeros(len(logits), 1)
        peak = torch.where(peak.isfinite(), peak, 0.0)
        lse = peak[:, 0] + (logits - peak).exp().sum(-1).log()
        loss = loss + torch.where(kept, z_loss * lse.square(), 0.0)
    if reduction == "none":
        return loss.view(target.shape)
    if reduction == "sum":
        return loss.sum()
    count = kept.sum()
    return torch.where(count > 0, loss.sum() / count.clamp_min(1), float("nan"))


def attention_visible(seqlen_q, seqlen_k, *, mask=None, causal=False, window=(-1, -1), seqlens_k=None, device=None):
    """The keys that each query sees: bool, broadcastable to (batch, heads, seqlen_q, seqlen_k).

    Key j is visible to query i iff i + off - left <= j <= i + off + right (a negative side is unlimited; causal means
    right = 0), j < seqlens_k[batch] and mask is True. off = 0 for causal="top_left", otherwise length_k - seqlen_q.
    """
    i, j, off = _positions(seqlen_q, seqlen_k, causal, seqlens_k, device)
    left, right = window
    right = 0 if causal else right
    visible = torch.ones(1, 1, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if seqlens_k is not None:
        visible = visible & (j < seqlens_k.view(-1, 1, 1, 1))
    if left >= 0:
        visible = visible & (j >= i + off - left)
    if right >= 0:
        visible = visible & (j <= i + off + right)
    return visible if mask is None else visible & mask


def _positions(seqlen_q, seqlen_k, causal, seqlens_k, device):
    i = torch.arange(seqlen_q, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)
    length_k = seqlen_k if seqlens_k is None else seqlens_k.view(-1, 1, 1, 1).long()
    return i, j, (0 if causal == "top_left" else length_k - seqlen_q)


def attention(
    q, k, v, *, mask=None, bias=None, causal=False, window=(-1, -1), seqlens_k=None, cu_seqlens_q=None,
    cu_seqlens_k=None, alibi_slopes=None, softcap=0.0, sink=None, dropout_p=0.0, scale=None, rng=None, first_slab=0,
    need_low=False,
):  # fmt: skip
    """softmax(scores) · v with every feature of `fastattn.attention`, which documents the arguments.

        s = scale * q·k;  s = softcap * tanh(s / softcap);  s = s + bias - slope * |i + off - j|;  -inf where invisible
        lse = log(sum_j exp(s) [+ exp(sink)]);  p = exp(s - lse);  out = (p ∘ keep * dropout_scale) · v

    A row that sees no key has out 0, lse -inf (or the sink) and gradients 0. Keys that no query sees have
    no effect, even if they are NaN. `first_slab` is the Philox slab of batch 0, head 0.
    Returns: (out, lse), lse in the dtype of the accumulator; with need_low (out, lse, rounding error of lse).
    """
    if cu_seqlens_q is not None:
        return _attention_packed(
            q, k, v, cu_seqlens_q, cu_seqlens_k, seqlens_k, bias=bias, mask=mask, causal=causal, window=window,
            alibi_slopes=alibi_slopes, softcap=softcap, sink=sink, dropout_p=dropout_p, scale=scale, rng=rng,
            need_low=need_low,
        )  # fmt: skip
    batch, n_heads, seqlen_q, head_dim = q.shape
    seqlen_k, group = k.shape[2], n_heads // max(k.shape[1], 1)
    acc = accumulator(q.dtype)
    scale = max(head_dim, 1) ** -0.5 if scale is None else scale
    if seqlens_k is not None:
        seqlens_k = seqlens_k.clamp(0, seqlen_k)
    visible = attention_visible(
        seqlen_q, seqlen_k, mask=mask, causal=causal, window=window, seqlens_k=seqlens_k, device=q.device
    ).expand(batch, n_heads, seqlen_q, seqlen_k)

    seen = visible.any(-2)[..., None]  # a NaN in an invisible key must not spread through 0 * NaN
    k = torch.where(seen, k.to(acc).repeat_interleave(group, 1), 0.0)
    v = torch.where(seen, v.to(acc).repeat_interleave(group, 1), 0.0)
    s = matmul(q.to(acc), k.transpose(-2, -1)) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    if alibi_slopes is not None:
        i, j, off = _positions(seqlen_q, seqlen_k, causal, seqlens_k, q.device)
        s = s - alibi_slopes[..., None, None] * (i + off - j).abs()
    s = torch.where(visible, s, float("-inf"))  # fp64 with an fp64 bias, which may be too large for fp32

    row_max = s.detach().amax(-1, keepdim=True) if seqlen_k else s.new_full((*s.shape[:-1], 1), float("-inf"))
    if sink is not None:
        sink = sink.to(s.dtype).view(1, -1, 1, 1)
        row_max = torch.maximum(row_max, sink.detach())
    row_max = torch.where(row_max == float("-inf"), 0.0, row_max)
    e = torch.exp(s - row_max)
    total = e.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - row_max)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = row_max + torch.log(total)
    if lse.dtype != acc:
        lse = lse.clamp(torch.finfo(acc).min, torch.finfo(acc).max)  # finite: only an empty row has -inf
    lse = torch.where(empty, float("-inf"), lse).to(acc)
    p = e / total
    if dropout_p > 0:
        slab = first_slab + torch.arange(batch * n_heads, device=q.device).view(batch, n_heads, 1)
        keep = philox_keep(rng, dropout_p, torch.arange(seqlen_q, device=q.device), slab, seqlen_k)
        p = torch.where(keep, p * dropout_scale(dropout_p), 0.0)
    out = matmul(p, v.to(p.dtype)).to(q.dtype)
    if not need_low:
        return out, lse.squeeze(-1)
    low = torch.where(empty, 0.0, row_max - lse + torch.log(total)).to(acc)
    return out, lse.squeeze(-1), low.squeeze(-1)


def _attention_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, seqlens_k, *, alibi_slopes, need_low, **options):
    """Compute each sequence: q (total_q, heads, head_dim), k and v (total_k, kv_heads, ...); lse (heads, total_q).

    Rows after the last sequence have no keys and no sink: out 0, lse -inf.
    """
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outs, lses = [], []  # lses: with their rounding errors if need_low

    def append(rows_q, rows_k, **options):
        q_b, k_b, v_b = (t[rows].transpose(0, 1)[None] for t, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
        out, *lse = attention(q_b, k_b, v_b, need_low=need_low, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(torch.cat(lse))

    for b in range(len(ends_q) - 1):
        slopes = alibi_slopes if alibi_slopes is None or alibi_slopes.dim() == 1 else alibi_slopes[b]
        append(
            slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2]), alibi_slopes=slopes, first_slab=b * q.shape[1],
            seqlens_k=None if seqlens_k is None else seqlens_k[b : b + 1], **options,
        )  # fmt: skip
    append(slice(ends_q[-1], None), slice(0, 0))
    return torch.cat(outs), *torch.cat(lses, dim=-1)


def cache_append(cache, new, cache_seqlens, block_table=None, cache_batch_idx=None):
    """Write new (batch, kv_heads, seqlen_new, last) into the cache in place, after the valid keys of each sequence.

    The cache is (cache_batch, kv_heads, max_seqlen, last), or with block_table (num_pages, kv_heads, page_size, last).
    """
    batch, _, seqlen_new, _ = new.shape
    row = torch.arange(batch, device=new.device) if cache_batch_idx is None else cache_batch_idx.long()
    position = cache_seqlens.long()[:, None] + torch.arange(seqlen_new, device=new.device)
    if block_table is None:
        row = row[:, None]
    else:
        row = block_table.long().gather(1, position // cache.shape[2])
        position = position % cache.shape[2]
    cache[row, :, position] = new.transpose(1, 2)


def attention_decode(
    q, k_cache, v_cache, *, k=None, v=None, cache_seqlens, block_table=None, cache_batch_idx=None, cache_leftpad=None,
    causal=True, window=(-1, -1), softcap=0.0, alibi_slopes=None, sink=None, scale=None,
):  # fmt: skip
    """`attention` on the keys and values of a cache, after appending k and v; see `fastattn.attention_decode`.

    The sequence of row b is cache[b], cache[cache_batch_idx[b]] or the concatenated pages block_table[b]. Its first
    cache_seqlens[b] (+ new) keys are valid; of these, keys before cache_leftpad[b] are invisible.
    Returns: (out, lse), lse in the dtype of the accumulator.
    """
    seqlens_k = cache_seqlens
    if k is not None:
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache_append(cache, new, cache_seqlens, block_table, cache_batch_idx)
        seqlens_k = cache_seqlens + k.shape[2]
    keys, values = k_cache, v_cache
    if block_table is not None:
        pages = block_table.long().clamp(0, k_cache.shape[0] - 1)  # entries after the last valid page are not used
        keys, values = (cache[pages].transpose(1, 2).flatten(2, 3) for cache in (k_cache, v_cache))
    elif cache_batch_idx is not None:
        keys, values = (cache[cache_batch_idx.long()] for cache in (k_cache, v_cache))
    mask = None
    if cache_leftpad is not None:
        mask = (torch.arange(keys.shape[2], device=q.device) >= cache_leftpad[:, None])[:, None, None]
    return attention(
        q, keys, values, mask=mask, causal=causal, window=window, seqlens_k=seqlens_k, alibi_slopes=alibi_slopes,
        softcap=softcap, sink=sink, scale=scale,
    )  # fmt: skip
