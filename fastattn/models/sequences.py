"""Which tokens of a batch attend to which, and their positions, in one object for all blocks of a model."""

import torch
import torch.nn.functional as F

from fastattn import reference
from fastattn.ops import attention

from .shape import Scores

_PLAIN = Scores()


def attention_weights(q, k, mask, scores, sink):
    """(batch, n_head, seqlen_q, seqlen_k): softmax of the scores; mask as from `Sequences.mask_of`."""
    scale = q.shape[-1] ** -0.5 if scores.scale is None else scores.scale
    s = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    if scores.softcap:
        s = scores.softcap * torch.tanh(s / scores.softcap)
    s = s.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else s + mask
    if sink is None:
        return s.softmax(-1)
    column = sink.to(s.dtype)[:, None, None].expand(*s.shape[:2], s.shape[2], 1)
    return torch.cat([s, column], -1).softmax(-1)[..., :-1]


def torch_attention(q, k, v, mask, scores=_PLAIN, sink=None, dropout_p=0.0):
    """Attention of q to k and v as PyTorch computes it; mask as from `Sequences.mask_of`."""
    if scores.softcap or sink is not None:
        weights = F.dropout(attention_weights(q, k, mask, scores, sink), dropout_p)
        return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask if mask.dtype == torch.bool else mask.to(q.dtype), dropout_p=dropout_p,
        scale=scores.scale, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


class Sequences:
    """The sequences in rows of tokens, in the forms that the layers of fastattn.nn, torch.nn and `Block` take.

    Args:
        layers: "fastattn" or "torch".
        tokens: (batch, seqlen), for its shape and device.
        causal: whether a token sees only itself and earlier tokens.
        lengths: None or (batch,) int64: the rest of each row is padding that no token sees.
        cu_seqlens: None or (n + 1,) int32: document d is tokens cu_seqlens[d] to cu_seqlens[d + 1] of the concatenated
            rows and stays within a row; a token sees only its own document, and positions restart at each document.
        start: position of the first token, which is the number of cached tokens before it.
        rotary, local_rotary: None or a RotaryEmbedding; the second is that of layers with a window, if they have one.
        alibi_slopes: None or (n_head,).
    """

    def __init__(self, layers, tokens, *, causal=False, lengths=None, cu_seqlens=None, start=0, rotary=None,
                 local_rotary=None, alibi_slopes=None):  # fmt: skip
        self.seqlen, self.device = tokens.shape[1], tokens.device
        self.use_torch, self.causal, self.cu_seqlens, self.start = layers == "torch", causal, cu_seqlens, start
        self.lengths = None if lengths is None else lengths.to(torch.int32)
        self.padding = None  # (batch, seqlen) bool, True at padding, as in torch.nn
        if lengths is not None:
            self.padding = torch.arange(self.seqlen, device=self.device) >= self.lengths[:, None]
        self.rotary, self.local_rotary = rotary, local_rotary
        self.alibi_slopes = None if alibi_slopes is None else alibi_slopes.float()
        self.flat = cu_seqlens is not None and not self.use_torch  # attention takes all rows as one
        self.positions, self._document, self._masks = start, None, {}
        if cu_seqlens is not None:
            token = torch.arange(tokens.numel(), dtype=torch.int32, device=self.device)
            document = torch.searchsorted(cu_seqlens[1:], token, right=True)
            self.positions = (token - cu_seqlens[document]).view(tokens.shape)
            self._document = document.view(tokens.shape)

    @property
    def mask(self):
        """The mask of layers without a window."""
        return self.mask_of(None)

    def mask_of(self, window):
        """The attn_mask of scaled_dot_product_attention, for these tokens as queries of themselves and the cache.

        Bool, True = attend, or float with ALiBi; broadcasts to (batch, n_head, seqlen, start + seqlen).
        """
        if window not in self._masks:
            self._masks[window] = self._make_mask(window)
        return self._masks[window]

    def _make_mask(self, window):
        end = self.start + self.seqlen
        mask = torch.ones(self.seqlen if self.causal or window else 1, end, dtype=torch.bool, device=self.device)
        if self.causal:
            mask = mask.tril(self.start)
        if window is not None:
            mask = mask.triu(self.start - window + 1)
            mask = mask if self.causal else mask.tril(self.start + window - 1)
        if self.lengths is not None:
            mask = mask & ~self.padding[:, None, None]
        if self._document is not None:
            mask = mask & (self._document[:, None, :, None] == self._document[:, None, None])
        if self.alibi_slopes is not None:
            key = torch.arange(end, device=self.device)
            distance = (key[self.start :, None] - key).abs()
            mask = torch.where(mask, -self.alibi_slopes[:, None, None] * distance, -torch.inf)
        return mask

    def rotate(self, q, k, local=False):
        """Rotate q and k, (batch, heads, seqlen, head_dim) or flat (tokens, heads, head_dim), by their positions.

        local: whether the layer has a window, for which there may be another rotary embedding.
        """
        if self.rotary is None:
            return q, k
        rotary = self.local_rotary if local and self.local_rotary is not None else self.rotary
        positions = self.positions
        if not self.use_torch:
            return rotary(q, k, positions=positions.flatten() if self.flat else positions)
        where = {"offset": positions} if isinstance(positions, int) else {"positions": positions}
        tables = rotary.tables(0, q)  # block_size rows, which the positions do not exceed
        return tuple(reference.rotary_embedding(x, *tables, **where) for x in (q, k))

    def attend(self, q, k, v, dropout_p, scores=_PLAIN, sink=None):
        """Attention of q to k and v of these tokens; shapes as for `rotate`, k and v may have fewer heads.

        scores: Scores; sink: None or (n_head,).
        """
        if self.use_torch:
            plain = self.lengths is None and self.cu_seqlens is None and self.alibi_slopes is None
            if plain and self.causal and scores.window is None and not scores.softcap and sink is None:
                return F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    dropout_p=dropout_p,
                    is_causal=True,
                    scale=scores.scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
            return torch_attention(q, k, v, self.mask_of(scores.window), scores, sink, dropout_p)
        which = {"seqlens_k": self.lengths}
        if self.flat:
            which = {"cu_seqlens_q": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens,
                     "max_seqlen_q": self.seqlen, "max_seqlen_k": self.seqlen}  # fmt: skip
        elif self.lengths is not None and not self.causal and (self.alibi_slopes is not None or scores.window):
            which = {"mask": ~self.padding[:, None, None]}  # seqlens_k would measure distances from the last key
        return attention(
            q, k, v, causal="top_left" if self.causal else False, dropout_p=dropout_p, alibi_slopes=self.alibi_slopes,
            window=self.window(scores), softcap=scores.softcap, scale=scores.scale, sink=sink, **which,
        )  # fmt: skip

    def window(self, scores):
        """The window of `fastattn.attention`, or None."""
        if scores.window is None:
            return None
        return scores.window - 1, 0 if self.causal else scores.window - 1

    def layer_masks(self, n_head):
        """(mask, padding, is_causal) for an encoder layer of torch.nn or fastattn.nn."""
        if not self.use_torch:
            return None, self.padding, self.causal
        if self._document is not None:
            return ~self.mask.expand(-1, n_head, -1, -1).flatten(0, 1), None, False
        return ~self.mask if self.causal else None, self.padding, self.causal
