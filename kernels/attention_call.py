"""The values that travel through the attention kernels, and the plan of a launch.

On the host a call is `Features`, what it asks for besides q, k and v, and a `Form`, its constants. On the device `Span`
says where a sequence stands and `Head` which head of it a program works on. All of them go from function to function
whole, so that a new feature is a field here and a line in the function of attention_tile.py that computes with it.

Triton shapes the split. Constants are one argument, a Form: where a kernel itself builds a NamedTuple, Triton turns
constants into numbers, and in version 3.6 no function can return a None. Integers of which one binary serves all values
are arguments of their own, as in a tuple Triton makes binaries for 1 and for multiples of 16.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton

from fastattn.kernels.attention_config import pick
from fastattn.kernels.common import contiguous, dropout_constants
from fastattn.ops._layout import empty_in_layout

# what varies from call to call without making better code: one binary for all values
UNSPECIALIZED = ["n_heads", "group", "total_q", "total_k", "blocks", "window_left", "window_right", "threshold"]


class Rows(NamedTuple):
    """A (batch, heads, rows, columns) tensor: q, k, v and the like without a stride of columns, which is 1."""

    ptr: Any
    strides: Any


class Features(NamedTuple):
    """What a call asks for besides q, k and v. What is absent is None."""

    scale: Any
    softcap: Any
    rescale: Any  # dropout's factor
    rng_ptr: Any
    bias: Any  # Rows
    mask: Any  # Rows
    slopes: Any  # Rows of ALiBi, strides (from batch entry to batch entry,)
    sink_ptr: Any
    seqlens_k_ptr: Any
    cu_seqlens_q_ptr: Any
    cu_seqlens_k_ptr: Any


class Form(NamedTuple):
    """The constants of a kernel: one binary for each."""

    HEAD_DIM: Any
    HEAD_DIM_V: Any
    BLOCK_D: Any  # head dims, padded to a power of two
    BLOCK_DV: Any
    BLOCK_M: Any
    BLOCK_N: Any
    HAS_LEFT: Any
    HAS_RIGHT: Any
    TOP_LEFT: Any
    SOFTCAP: Any
    NATURAL: Any  # scores are not kept times log2(e)
    FUSED_SCALE: Any  # the scale is applied together with the maximum
    GROUP: Any  # query heads of a key head, in attention_dkdv_kernel
    TMA: Any
    PRECISION: Any


class Span(NamedTuple):
    """A sequence: where its rows lie, how its queries stand to its keys, and how far a window reaches."""

    batch: Any  # which sequence it is
    within: Any  # whether it is one: the rows behind the last packed sequence are none
    index: Any  # in the batch dimension of q, k and v
    first_q: Any  # its first rows there
    first_k: Any
    seqlen_q: Any
    seqlen_k: Any
    length_k: Any  # of the keys, those that may be seen
    off: Any  # query i stands at key i + off
    left: Any
    right: Any


class Head(NamedTuple):
    """A query head of a sequence, with what its scores need."""

    batch: Any
    head: Any
    slope: Any  # of ALiBi, meaningless without it
    slab: Any  # of the random numbers of dropout
    threshold: Any  # below which they drop


class Side(NamedTuple):
    """Rows of a head, to be loaded in tiles: a pointer or TMA descriptor, the step from row to row, rows to be read."""

    source: Any
    stride: Any
    begin: Any
    end: Any


class Blocks(NamedTuple):
    """Blocks that are seen at all, from first to end, and those that are seen in full, from full to end_full."""

    first: Any
    full: Any
    end_full: Any
    end: Any


def rows_of(t):
    """q, k, v, their results or gradients as kernels take them."""
    return Rows(t, t.stride()[:3])


def broadcast_strides(shape, strides):
    """Strides of a (1 or batch, 1 or heads, ...) tensor with 0 where it is broadcast."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def precision(dtype):
    """How fp32 products are computed: as the TF32 switch of PyTorch says."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def descriptors_fit(*tensors):
    """Whether TMA can read these (batch, heads, rows, columns) tensors: addresses, strides multiples of 16 bytes."""
    for t in tensors:
        unit = 16 // t.element_size()
        batch, head, row = t.stride()[:3]
        if t.data_ptr() % 16 or batch % unit or head % unit or row % unit or row == 0:
            return False
    return True


def padded(head_dim):
    """The columns of a tile that holds a head: tl.dot takes no fewer than 16."""
    return max(16, triton.next_power_of_2(head_dim))


class Start(NamedTuple):
    """How a kernel is launched."""

    grid: tuple
    blocks: int  # into which the rows of a head, or all packed rows, are divided
    form: Form
    form_tma: Form | None  # for tensors that TMA can read; None where it must not
    options: dict

    def choose(self, *tensors):
        """The form for these tensors, which the kernel would read with TMA."""
        return self.form_tma if self.form_tma is not None and descriptors_fit(*tensors) else self.form


class Plan:
    """Everything that follows from shapes, strides and options alone, made once for each kind of call.

    q, k, v, bias, mask are (shape, strides) or None; `sequences` is the number of packed sequences or None.
    """

    def __init__(self, q, k, v, bias, mask, dtype, device, fp32_precision, alibi_dims, drops, sequences,
                 window_left, window_right, top_left, softcap, dropout_p, scale):  # fmt: skip
        (batch, self.n_heads, self.total_q, head_dim), (_, self.kv_heads, self.total_k, _) = q[0], k[0]
        head_dim_v = v[0][3]
        self.group = self.n_heads // max(self.kv_heads, 1)
        self.batch, self.sequences = batch, sequences
        self.layouts = [
            (like.shape, like.stride())
            for like in (
                empty_in_layout(torch.empty_strided(*t, device="meta"), last)
                for t, last in ((q, head_dim_v), (q, head_dim), (k, head_dim), (v, head_dim_v))
            )
        ]  # of out, dq, dk, dv
        rows = torch.empty((batch, self.n_heads, self.total_q), device="meta")
        self.lse_layout = (rows.shape, rows.stride())  # empty_strided takes half the time of empty
        self.copies = any(shape[3] != 1 and strides[3] != 1 for shape, strides in (q, k, v))
        self.strides = (q[1][:3], k[1][:3], v[1][:3])
        self.out_strides = self.layouts[0][1][:3]
        self.bias_strides, self.mask_strides = (t and broadcast_strides(*t) for t in (bias, mask))
        self.slopes_strides = (self.n_heads if alibi_dims == 2 else 0,)
        self.drops, threshold, rescale = dropout_constants(drops or None, dropout_p)
        self.numbers = (scale, softcap, rescale)
        self.window = (window_left, window_right, threshold)
        self.sizes = (self.n_heads, self.group, self.total_q, self.total_k)

        reach = self.total_q + self.total_k  # a side as long as this is no limit
        has_left, has_right = 0 <= window_left < reach, 0 <= window_right < reach
        linear = bias is None and not alibi_dims and softcap == 0.0
        self.natural = dtype == torch.float32 or bias is not None or alibi_dims > 0
        extra = not linear or mask is not None or self.drops
        self.kind = (device, dtype, max(head_dim, head_dim_v), bool(extra), has_left or has_right)
        self.form = Form(
            head_dim, head_dim_v, padded(head_dim), padded(head_dim_v), None, None, has_left, has_right, top_left,
            softcap > 0.0, self.natural, linear and not self.natural and scale > 0.0, self.group, False, fp32_precision,
        )  # fmt: skip
        self.starts = {}

    def inputs(self, q, k, v):
        """q, k and v as kernels take them."""
        q_strides, k_strides, v_strides = self.strides
        return Rows(q, q_strides), Rows(k, k_strides), Rows(v, v_strides)

    def start(self, kernel):
        """How one of attention_config.KERNELS is launched."""
        if kernel not in self.starts:
            self.starts[kernel] = self._start(kernel)
        return self.starts[kernel]

    def _start(self, kernel):
        config, tma = pick(kernel, *self.kind)
        block, length, heads = config.block_m, self.total_q, self.n_heads
        if kernel == "dkdv":
            block, length, heads = config.block_n, self.total_k, self.kv_heads
        elif self.form.HAS_LEFT:  # keys before the first window must not be read: a descriptor cannot say so
            tma = False
        blocks = triton.cdiv(length, block)
        if self.sequences is not None and blocks:
            blocks = length // block + self.sequences + 1  # what find_tile counts on
        form = self.form._replace(
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            FUSED_SCALE=self.form.FUSED_SCALE and kernel == "fwd",
            GROUP=self.form.GROUP if kernel == "dkdv" else 1,
        )
        form_tma = form._replace(TMA=True) if tma else None
        return Start((blocks * heads * self.batch,), blocks, form, form_tma, config.options())


plan_for = functools.lru_cache(4096)(Plan)


def geometry(t):
    return None if t is None else (t.shape, t.stride())


def prepare(q, k, v, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, slopes, rng, max_seqlen_q, max_seqlen_k,
            *options):  # fmt: skip
    """(plan, features) for the arguments of the raw ops.

    The longest lengths that a caller promises do not matter: programs find their sequence.
    """
    plan = plan_for(
        geometry(q), geometry(k), geometry(v), geometry(bias), geometry(mask), q.dtype, q.device,
        precision(q.dtype), 0 if slopes is None else slopes.dim(), rng is not None,
        None if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1, *options,
    )  # fmt: skip
    return plan, Features(
        *plan.numbers, contiguous(rng) if plan.drops else None,
        None if bias is None else Rows(bias, plan.bias_strides),
        None if mask is None else Rows(mask, plan.mask_strides),
        None if slopes is None else Rows(slopes.contiguous(), plan.slopes_strides), contiguous(sink),
        contiguous(seqlens_k), contiguous(cu_seqlens_q), contiguous(cu_seqlens_k),
    )  # fmt: skip
