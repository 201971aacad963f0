"""Which tokens of a batch attend to which, and their positions, in one object for all blocks of a model."""

import torch
import torch.nn.functional as F

from fastattn import reference
from fastattn.ops import attention


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
        rotary: None or a RotaryEmbedding.
        alibi_slopes: None or (n_head,).
    """

    def __init__(self, layers, tokens, *, causal=False, lengths=None, cu_seqlens=None, start=0, rotary=None,
                 alibi_slopes=None):  # fmt: skip
        self.seqlen, self.device = tokens.shape[1], tokens.device
        self.use_torch, self.causal, self.cu_seqlens, self.start = layers == "torch", causal, cu_seqlens, start
        self.lengths = None if lengths is None else lengths.to(torch.int32)
        self.padding = None  # (batch, seqlen) bool, True at padding, as in torch.nn
        if lengths is not None:
            self.padding = torch.arange(self.seqlen, device=self.device) >= self.lengths[:, None]
        self.rotary = rotary
        self.alibi_slopes = None if alibi_slopes is None else alibi_slopes.float()
        self.flat = cu_seqlens is not None and not self.use_torch  # attention takes all rows as one
        self.positions, self._document, self._mask = start, None, None
        if cu_seqlens is not None:
            token = torch.arange(tokens.numel(), dtype=torch.int32, device=self.device)
            document = torch.searchsorted(cu_seqlens[1:], token, right=True)
            self.positions = (token - cu_seqlens[document]).view(tokens.shape)
            self._document = document.view(tokens.shape)

    @property
    def mask(self):
        """The attn_mask of scaled_dot_product_attention, for these tokens as queries of themselves and the cache.

        Bool, True = attend, or float with ALiBi; broadcasts to (batch, n_head, seqlen, start + seqlen).
        """
        if self._mask is None:
            end = self.start + self.seqlen
            mask = torch.ones(self.seqlen if self.causal else 1, end, dtype=torch.bool, device=self.device)
            if self.causal:
                mask = mask.tril(self.start)
            if self.lengths is not None:
                mask = mask & ~self.padding[:, None, None]
            if self._document is not None:
                mask = mask & (self._document[:, None, :, None] == self._document[:, None, None])
            if self.alibi_slopes is not None:
                key = torch.arange(end, device=self.device)
                distance = (key[self.start :, None] - key).abs()
                mask = torch.where(mask, -self.alibi_slopes[:, None, None] * distance, -torch.inf)
            self._mask = mask
        return self._mask

    def rotate(self, q, k):
        """Rotate q and k, (batch, heads, seqlen, head_dim) or flat (tokens, heads, head_dim), by their positions."""
        if self.rotary is None:
            return q, k
        positions = self.positions
        if not self.use_torch:
            return self.rotary(q, k, positions=positions.flatten() if self.flat else positions)
        where = {"offset": positions} if isinstance(positions, int) else {"positions": positions}
        tables = self.rotary.tables(0, q)  # block_size rows, which the positions do not exceed
        return tuple(reference.rotary_embedding(x, *tables, **where) for x in (q, k))

    def attend(self, q, k, v, dropout_p):
        """Attention of q to k and v of these tokens; shapes as for `rotate`, k and v may have fewer heads."""
        if self.use_torch:
            simple = self.lengths is None and self.cu_seqlens is None and self.alibi_slopes is None
            mask = None if simple else self.mask if self.mask.dtype == torch.bool else self.mask.to(q.dtype)
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=simple and self.causal,
                enable_gqa=q.shape[1] != k.shape[1],
            )  # fmt: skip
        which = {"seqlens_k": self.lengths}
        if self.flat:
            which = {"cu_seqlens_q": self.cu_seqlens, "cu_seqlens_k": self.cu_seqlens,
                     "max_seqlen_q": self.seqlen, "max_seqlen_k": self.seqlen}  # fmt: skip
        elif self.lengths is not None and self.alibi_slopes is not None and not self.causal:
            which = {"mask": ~self.padding[:, None, None]}  # seqlens_k would measure distances from the last key
        return attention(
            q, k, v, causal="top_left" if self.causal else False, dropout_p=dropout_p, alibi_slopes=self.alibi_slopes,
            **which,
        )  # fmt: skip

    def layer_masks(self, n_head):
        """(mask, padding, is_causal) for an encoder layer of torch.nn or fastattn.nn."""
        if not self.use_torch:
            return None, self.padding, self.causal
        if self._document is not None:
            return ~self.mask.expand(-1, n_head, -1, -1).flatten(0, 1), None, False
        return ~self.mask if self.causal else None, self.padding, self.causal
