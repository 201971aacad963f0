"""Rotary position embedding as a module that keeps its tables."""

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.nn.plain import leaf_call
from fastattn.ops import rotary_embedding
from fastattn.ops._kinds import as_number
from fastattn.ops._nested import longest
from fastattn.ops._public import Public
from fastattn.ops._register import is_recorded, needs_reference


def _wait_for_streams(table):
    """Wait for all streams of the device, so that the new tables are written and no kernel still reads the old ones.

    Other streams do not wait for the stream that writes the tables, and the allocator reuses the old tables' memory.
    """
    if table.is_cuda and not torch.compiler.is_compiling():
        torch.cuda.synchronize(table.device)


class RotaryEmbedding(torch.nn.Module):
    """Rotates q, or q and k in one launch, by the angles of their positions: `fastattn.rotary_embedding` with tables.

    The angle of pair d at position p is p * base ** (-2 * d / rotary_dim), computed in float64. The tables stay float32
    when the module is cast, and are not part of the state_dict. They grow when an int position needs more rows. They
    are computed again from rotary_dim and base when these change, and when the module is moved or cast; for other
    angles, pass your own tables to `fastattn.rotary_embedding`. Positions in a tensor must be below max_seqlen: larger
    ones raise ValueError on the CPU, and give NaN on a GPU, where a check would synchronize.

    Args:
        rotary_dim: how many channels of a head rotate, even; head_dim for all.
        max_seqlen: rows of the tables at first.
        base: ratio of the longest to the shortest wavelength.
        interleaved: pairs are channels (2d, 2d + 1) instead of (d, d + rotary_dim / 2).
    Raises:
        ValueError: an argument is out of range, or head_dim is below rotary_dim.
    Source: Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
    Example:
        >>> rotary = fastattn.nn.RotaryEmbedding(64)
        >>> q, k = rotary(torch.randn(4, 8, 128, 64), torch.randn(4, 2, 128, 64))  # (batch, heads, seqlen, head_dim)
        >>> q.shape, k.shape
        (torch.Size([4, 8, 128, 64]), torch.Size([4, 2, 128, 64]))
    """

    _made_for = None  # (rotary_dim, base) of the tables
    _may_be_for_inference = False  # whether a compiler or a copy may have made inference tensors of the tables

    @Public("nn.RotaryEmbedding", numbers="base", integers="rotary_dim max_seqlen", flags="interleaved").answering
    def __init__(
        self,
        rotary_dim: int,
        *,
        max_seqlen: int = 2048,
        base: float = 10000.0,
        interleaved: bool = False,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        base = as_number("nn.RotaryEmbedding", "base", base)
        if rotary_dim < 2 or rotary_dim % 2:
            raise ValueError(f"nn.RotaryEmbedding: rotary_dim must be even and at least 2, got {rotary_dim}")
        if max_seqlen < 1:
            raise ValueError(f"nn.RotaryEmbedding: max_seqlen must be at least 1, got {max_seqlen}")
        if not 0 < base < math.inf:
            raise ValueError(f"nn.RotaryEmbedding: base must be a finite number above 0, got {base}")
        self.rotary_dim, self.base, self.interleaved = rotary_dim, base, interleaved
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._fill(max_seqlen, device)

    def _fill(self, rows, device, in_use=False):
        """Make the tables for `rows` positions and return (cos, sin); in_use: other streams may use the module."""
        with torch.inference_mode(False):  # the tables may be needed for training later
            cos, sin = self._make(rows, device)
        if in_use:
            _wait_for_streams(cos)
        self.cos, self.sin = cos, sin
        self._made_for = self.rotary_dim, self.base
        self._may_be_for_inference = torch.compiler.is_compiling() and not torch.is_grad_enabled()
        return cos, sin

    def _make(self, rows, device):
        pair = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64, device=device)
        inv_freq = self.base ** (-pair / self.rotary_dim)
        angle = torch.outer(torch.arange(rows, dtype=torch.float64, device=device), inv_freq)
        return angle.cos().float(), angle.sin().float()

    def tables(self, end: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) for positions of x below `end`; returned because another thread may replace the buffers."""
        cos: Any = self._buffers["cos"]
        sin: Any = self._buffers["sin"]
        rows = cos.shape[0]
        if (
            end <= rows == sin.shape[0]
            and self._made_for == (self.rotary_dim, self.base)
            and (x.is_meta or not cos.is_meta)
            and not self._are_for_inference_only(cos, sin)
        ):
            return cos, sin
        rows = rows if end <= rows else max(end, 2 * rows)
        device = x.device if cos.is_meta else cos.device
        if torch.compiler.is_exporting() or needs_reference() or is_recorded(x):
            return self._make(rows, device)  # recorded as part of the graph, not stored in the module
        return self._fill(rows, device, in_use=True)

    def _are_for_inference_only(self, cos, sin):
        """Whether the tables are inference tensors (compiled, copied or loaded so), which a backward cannot use."""
        if torch.compiler.is_compiling():  # is_inference() cannot be called here
            return self._may_be_for_inference and torch.is_grad_enabled()
        return (cos.is_inference() or sin.is_inference()) and not torch.is_inference_mode_enabled()

    def __setstate__(self, state):
        super().__setstate__(state)
        self._may_be_for_inference = self.cos.is_inference() or self.sin.is_inference()

    def _apply(self, fn, recurse=True):
        before = self.cos
        super()._apply(fn, recurse)
        # share_memory changes the tensor itself; other functions may make fake or distributed tensors
        if self.cos is not before and type(self.cos) is torch.Tensor:
            self._fill(self.cos.shape[0], self.cos.device)  # a cast must not round them, to_empty must not lose them
        return self

    @Public(
        "nn.RotaryEmbedding", tensors="q k positions", integers="positions", flags="inplace", nested=None, inner={}
    ).answering
    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        *,
        positions: Tensor | int | None = None,
        inplace: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The rotated q, or the pair (q, k) if k is given; shapes and positions as for `fastattn.rotary_embedding`."""
        recorded = leaf_call(self, q, k, positions=positions, inplace=inplace)
        if recorded is not None:
            return recorded
        if q.dim() < 3:
            raise ValueError(
                "nn.RotaryEmbedding: q must be (batch, n_heads, seqlen, head_dim) or (total, n_heads, head_dim), got"
                f" {tuple(q.shape)}"
            )
        if q.size(-1) < self.rotary_dim:  # the op would read the tables as doubled ones, with other angles
            raise ValueError(
                f"nn.RotaryEmbedding: head_dim must be at least rotary_dim {self.rotary_dim}, got {q.size(-1)}"
            )
        seqlen = longest(q) if q.is_nested else q.shape[0 if q.dim() == 3 else -2]
        end = 0 if isinstance(positions, torch.Tensor) else (positions or 0) + seqlen
        cos, sin = self.tables(end, q)
        x = q if k is None else (q, k)
        return rotary_embedding(x, cos, sin, positions=positions, interleaved=self.interleaved, inplace=inplace)

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, max_seqlen={self.cos.shape[0]}, base={self.base}, interleaved={self.interleaved}"
