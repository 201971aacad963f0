"""Rotary position embedding with its tables."""

import torch

from fastattn.ops import rotary_embedding
from fastattn.ops._public import Public


class RotaryEmbedding(torch.nn.Module):
    """Rotates q, or q and k in one launch, by the angles of their positions: `fastattn.rotary_embedding` with tables.

    The angle of pair d at position p is p * base ** (-2 * d / rotary_dim), computed in float64. The tables are float32
    whatever dtype the module is cast to, and are not part of the state_dict. They grow when an int position asks for
    more. Positions in a tensor must stay below max_seqlen: on the CPU another one raises ValueError, on a GPU, where a
    check would wait, it gives NaN.

    Args:
        rotary_dim: how many channels of a head rotate, even; head_dim for all.
        max_seqlen: positions that the tables hold at first.
        base: ratio of the longest to the shortest wavelength.
        interleaved: pairs are channels (2d, 2d + 1) instead of (d, d + rotary_dim / 2).
    Raises:
        ValueError: an argument is out of its range, or heads are narrower than rotary_dim.
    Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
    """

    @Public("nn.RotaryEmbedding", numbers="rotary_dim max_seqlen base").answering
    def __init__(self, rotary_dim, *, max_seqlen=2048, base=10000.0, interleaved=False, device=None):
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"RotaryEmbedding: rotary_dim must be even and at least 2, got {rotary_dim}")
        if max_seqlen < 1:
            raise ValueError(f"RotaryEmbedding: max_seqlen must be at least 1, got {max_seqlen}")
        if not base > 0:
            raise ValueError(f"RotaryEmbedding: base must be above 0, got {base}")
        self.rotary_dim, self.base, self.interleaved = rotary_dim, base, interleaved
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._fill(max_seqlen, device)

    def _fill(self, rows, device):
        pair = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=device)
        inv_freq = self.base ** (-pair / self.rotary_dim)
        angle = torch.outer(torch.arange(rows, dtype=torch.float64, device=device), inv_freq)
        self.cos, self.sin = angle.cos().float(), angle.sin().float()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._fill(self.cos.shape[0], self.cos.device)  # a cast must not round them, to_empty must not lose them
        return self

    def forward(self, q, k=None, *, positions=None, inplace=False):
        """The rotated q, with k the pair (q, k); shapes and positions as `fastattn.rotary_embedding` takes them."""
        if q.shape[-1] < self.rotary_dim:  # the op would take the tables for doubled ones, whose angles are others
            raise ValueError(
                f"RotaryEmbedding: head_dim must be at least rotary_dim {self.rotary_dim}, got {q.shape[-1]}"
            )
        if not isinstance(positions, torch.Tensor):
            end = (positions or 0) + q.shape[0 if q.dim() == 3 else -2]
            if end > self.cos.shape[0]:
                self._fill(max(end, 2 * self.cos.shape[0]), self.cos.device)
        x = q if k is None else (q, k)
        return rotary_embedding(
            x, self.cos, self.sin, positions=positions, interleaved=self.interleaved, inplace=inplace
        )

    def extra_repr(self):
        return f"{self.rotary_dim}, max_seqlen={self.cos.shape[0]}, base={self.base}, interleaved={self.interleaved}"
