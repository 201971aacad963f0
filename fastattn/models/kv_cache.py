"""Keys and values of the tokens a model has read, so that a new token costs one row instead of the whole sequence."""

import torch
import torch.nn.functional as F


class KeyValueCache:
    """The cache of a CausalLM for a batch of equally long sequences.

    Args:
        model: a CausalLM, whose block_size is the most tokens the cache holds.
        batch: number of sequences.
    """

    def __init__(self, model, batch):
        attn = model.blocks[0].self_attn
        weight = attn.out_proj.weight
        shape = (len(model.blocks), batch, attn.num_heads, model.block_size, attn.head_dim)
        self.k = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.v = torch.zeros_like(self.k)
        self.length = 0

    def reorder(self, rows):
        """Row i of the batch becomes row rows[i]; there may be more or fewer of them than before."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]

    def run_blocks(self, blocks, x, use_torch):
        """The blocks of a model on new rows, which see everything cached before them and each other causally.

        Args:
            blocks: pre-norm encoder layers, of torch.nn or fastattn.nn.
            x: (batch, seqlen, d_model), the embedded new tokens.
            use_torch: attention by torch instead of fastattn.attention_decode.
        Returns: like x.
        """
        seqlen = x.shape[1]
        lengths = torch.full(x.shape[:1], self.length, dtype=torch.int32, device=x.device)
        for k_cache, v_cache, block in zip(self.k, self.v, blocks, strict=True):
            attn = block.self_attn
            qkv = F.linear(block.norm1(x), attn.in_proj_weight, attn.in_proj_bias)
            q, k, v = qkv.unflatten(-1, (3, attn.num_heads, attn.head_dim)).permute(2, 0, 3, 1, 4).unbind()
            if use_torch:
                out = self._torch_attention(q, k, v, k_cache, v_cache)
            else:
                from fastattn import attention_decode

                out = attention_decode(q, k_cache, v_cache, k=k, v=v, cache_seqlens=lengths)
            x = x + attn.out_proj(out.transpose(1, 2).flatten(2))
            x = x + block.linear2(block.activation(block.linear1(block.norm2(x))))
        self.length += seqlen
        return x

    def _torch_attention(self, q, k, v, k_cache, v_cache):
        seqlen, end = q.shape[2], self.length + q.shape[2]
        k_cache[:, :, self.length : end] = k
        v_cache[:, :, self.length : end] = v
        mask = torch.ones(seqlen, end, dtype=torch.bool, device=q.device).tril(self.length)
        return F.scaled_dot_product_attention(q, k_cache[:, :, :end], v_cache[:, :, :end], attn_mask=mask)
