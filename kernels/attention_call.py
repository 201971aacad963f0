"""The values that the attention kernels pass on, and the plan of a launch.

On the host, a call consists of `Features`, its arguments besides q, k and v, and of a `Form`, its constants. On the
device, `Span` is the position of a sequence, and `Head` is the head of it that a program works on. Functions pass these
values on whole. So a new feature needs a field here, and a line in the function of attention_frame.py or
attention_tile.py that computes with it.

The division follows from limits of Triton. All constants are in one argument, a Form, because Triton turns constants
into numbers if a kernel builds a NamedTuple of them. In version 3.6, no function can return a None. Integers for which
one binary serves all values are separate arguments, because in a tuple Triton compiles binaries for 1 and for multiples
of 16.
"""

import functools
import os
from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.kernels import attention_config
from fastattn.kernels.attention_config import pick, splits
from fastattn.kernels.attention_mask import key_runs
from fastattn.kernels.common import DEVICE_MADE, HOST_MADE, Rows, contiguous, dropout_constants
from fastattn.ops._layout import empty_in_layout

LEAST_SCALE = 1e-30  # the smallest scale of scores for which lse / scale is finite
# Integers that vary between calls and do not affect the quality of the code. One binary serves all values.
UNSPECIALIZED = ["n_heads", "group", "total_q", "total_k", "blocks", "window_left", "window_right", "threshold"]


class Features(NamedTuple):
    """The arguments of a call besides q, k and v. Absent ones are None."""

    scale: Any
    softcap: Any
    rescale: Any  # the scale of kept elements
    rng_ptr: Any
    bias: Any  # Rows
    mask: Any  # Rows
    runs: Any  # the result of attention_mask.py for a mask of one row, as Rows with strides (between batch entries,)
    slopes: Any  # the ALiBi slopes as Rows with strides (between batch entries,)
    sink_ptr: Any
    seqlens_k_ptr: Any
    cu_seqlens_q_ptr: Any
    cu_seqlens_k_ptr: Any


class Form(NamedTuple):
    """The constants of a kernel. Each Form is compiled to a binary."""

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
    MASKED: Any  # every tile reads its mask
    KEY_MASK: Any  # the mask is one row for all queries and heads: only edges read it
    NATURAL: Any  # scores are kept unscaled, not times log2(e)
    FUSED_SCALE: Any  # the scale is applied together with the subtraction of the maximum
    GROUP: Any  # query heads per key head, in attention_dkdv_kernel
    DELTA_FIRST: Any  # in attention_dkdv_kernel, the sum of dp begins with -delta
    LSE_FIRST: Any  # and that of the scores with -lse; both are loaded a block ahead
    WITH_DK: Any  # which of dk and dv attention_dkdv_kernel computes
    WITH_DV: Any
    TMA: Any  # 0: loads through pointers; DEVICE_MADE or HOST_MADE: through descriptors
    PRECISION: Any


class Span(NamedTuple):
    """A sequence: its rows, the alignment of its queries to its keys, and the sides of the window."""

    batch: Any  # the index of the sequence
    within: Any  # false for the rows after the last packed sequence
    index: Any  # its index in the batch dimension of q, k and v
    first_q: Any  # its first rows in q and k
    first_k: Any
    seqlen_q: Any
    seqlen_k: Any
    length_k: Any  # the number of keys that may be seen
    off: Any  # query i is aligned with key i + off
    left: Any
    right: Any
    # KEY_MASK: keys before first_seen and from end_seen on are hidden, and keys from first_seen to end_run are visible.
    first_seen: Any
    end_run: Any
    end_seen: Any


class Head(NamedTuple):
    """A query head of a sequence, and the values that its scores need."""

    batch: Any
    head: Any
    slope: Any  # the slope of ALiBi; undefined without ALiBi
    slab: Any  # the slab of the random numbers of dropout
    threshold: Any  # elements whose random number is below it are dropped


class Side(NamedTuple):
    """Rows of a head to load in tiles: a pointer or TMA descriptor, the stride of rows, and the range of rows. `index`
    and `head` give the position of the rows in a descriptor that the host has made."""

    source: Any
    index: Any
    head: Any
    stride: Any
    begin: Any
    end: Any


class Blocks(NamedTuple):
    """Blocks [first, end), which at least one row sees, and blocks [full, end_full), which all rows see."""

    first: Any
    full: Any
    end_full: Any
    end: Any


def rows_of(t):
    """Return q, k or v, or a tensor like them, in the form that kernels read."""
    return Rows(t, t.stride()[:3])


def broadcast_strides(shape, strides):
    """Return the strides of a (1 or batch, 1 or heads, ...) tensor, with 0 for broadcast dimensions."""
    return tuple(0 if size == 1 else stride for size, stride in zip(shape, strides, strict=True))


def exact_products(value):
    """Return the precision of fp32 products if PyTorch does not allow TF32, from FASTATTN_FP32_PRODUCTS."""
    if value not in (None, "", "ieee", "tf32x3"):
        raise ValueError(f"FASTATTN_FP32_PRODUCTS must be ieee or tf32x3, got {value!r}")
    return value or "ieee"


_exact_products = exact_products(os.environ.get("FASTATTN_FP32_PRODUCTS"))


def precision(dtype):
    """Return the precision of products. In fp32 it follows the TF32 switch of PyTorch. "tf32x3" adds up three products
    of parts on the tensor cores, with an error like that of fp32."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else _exact_products


def descriptors_fit(*tensors):
    """Return whether TMA can read (batch, heads, rows, columns) tensors. Addresses and strides must be multiples of 16
    bytes."""
    for t in tensors:
        unit = 16 // t.element_size()
        batch, head, row = t.stride()[:3]
        if t.data_ptr() % 16 or batch % unit or head % unit or row % unit or row == 0:
            return False
    return True


def padded(head_dim):
    """Return the number of columns of a tile that holds a head. tl.dot needs at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


class Start(NamedTuple):
    """The launch of a kernel."""

    grid: tuple
    blocks: int  # the number of blocks of the rows of a head, or of all packed rows
    form: Form
    # The form for tensors that TMA can read and the host does not describe. None without TMA.
    form_tma: Form | None
    # The boxes of the two tensors that are read with TMA if each load reads whole heads, otherwise ().
    boxes: tuple
    options: dict

    def choose(self, whole, *tensors):
        """Return the form for two tensors that the kernel reads with TMA if possible, and their descriptors or None.

        A descriptor of the host takes no scratch memory and no time in each program, but it ends where the tensor ends.
        `whole`: no row of a head is hidden by an argument whose values the host does not know.
        """
        if self.form_tma is None or not descriptors_fit(*tensors):
            return self.form, None, None
        if not whole or not self.boxes or any(0 in t.shape or 0 in t.stride() for t in tensors):
            return self.form_tma, None, None
        made = (TensorDescriptor(t, t.shape, t.stride(), box) for t, box in zip(tensors, self.boxes, strict=True))
        return self.form_tma._replace(TMA=HOST_MADE.value), *made


class Plan:
    """Everything that depends on shapes, strides and options only. It is cached per signature.

    q, k, v, bias and mask are (shape, strides) or None. `sequences` is the number of packed sequences or None.
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
        ]  # those of out, dq, dk and dv
        rows = torch.empty((batch, self.n_heads, self.total_q), device="meta")
        self.lse_layout = (rows.shape, rows.stride())  # empty_strided takes half the time of empty
        self.copies = any(shape[3] != 1 and strides[3] != 1 for shape, strides in (q, k, v))
        self.strides = (q[1][:3], k[1][:3], v[1][:3])
        self.out_strides = self.layouts[0][1][:3]
        self.bias_strides, self.mask_strides = (t and broadcast_strides(*t) for t in (bias, mask))
        rows_of_mask = self.mask_strides and self.mask_strides[1:3]
        # The rows of a mask that has one row per batch entry.
        self.mask_rows = mask[0][0] if rows_of_mask == (0, 0) else None
        self.slopes_strides = (self.n_heads if alibi_dims == 2 else 0,)
        self.drops, threshold, rescale = dropout_constants(drops or None, dropout_p)
        self.numbers = (scale, softcap, rescale)
        self.window = (window_left, window_right, threshold)
        self.sizes = (self.n_heads, self.group, self.total_q, self.total_k)

        reach = self.total_q + self.total_k  # a side of the window that is this long has no effect
        has_left, has_right = 0 <= window_left < reach, 0 <= window_right < reach
        linear = bias is None and not alibi_dims and softcap == 0.0
        self.alibi = alibi_dims > 0
        self.natural = dtype == torch.float32 or bias is not None or self.alibi
        key_mask = self.mask_rows is not None
        masked = mask is not None and not key_mask
        wide = max(head_dim, head_dim_v) > 128  # clearing the rows of hidden keys needs registers
        costly = bias is not None or masked or self.drops or (key_mask and wide)
        if linear and not costly:
            kind = "causal" if has_left or has_right else "full"
        else:
            few = alibi_dims and not costly and not key_mask and head_dim == head_dim_v == padded(head_dim)
            kind = "alibi" if few else "extra"
        self.kind = (device, dtype, max(head_dim, head_dim_v), kind)
        self.form = Form(
            head_dim, head_dim_v, padded(head_dim), padded(head_dim_v), None, None, has_left, has_right, top_left,
            softcap > 0.0, masked, key_mask, self.natural, linear and not self.natural and scale > 0.0, self.group,
            False, False, True, True, 0, fp32_precision,
        )  # fmt: skip
        self.plain = kind != "extra" and not self.natural and scale > LEAST_SCALE
        self.starts = {}

    def inputs(self, q, k, v):
        """Return q, k and v in the form that kernels read."""
        q_strides, k_strides, v_strides = self.strides
        return Rows(q, q_strides), Rows(k, k_strides), Rows(v, v_strides)

    def launches_of_keys(self):
        """The launches that compute dk and dv, for `start`: one for both, or one for each."""
        return ("dv", "dk") if splits(*self.kind) else ("dkdv",)

    def start(self, kernel):
        """Return the launch of one of attention_config.KERNELS, or of dk or dv alone."""
        if kernel not in self.starts:
            self.starts[kernel] = self._start(kernel)
        return self.starts[kernel]

    def _start(self, kernel):
        config, makers = pick(kernel, *self.kind, self.form.KEY_MASK)
        if kernel == "dq" and self.form.HAS_LEFT and self.form.SOFTCAP:  # with both, the limit would spill
            config = config._replace(registers=None)
        block, length, heads = config.block_m, self.total_q, self.n_heads
        of_keys = kernel in ("dkdv", "dk", "dv")
        if of_keys:
            block, length, heads = config.block_n, self.total_k, self.kv_heads
        blocks = triton.cdiv(length, block)
        if self.sequences is not None and blocks:
            blocks = length // block + self.sequences + 1  # find_tile relies on this number
        form = self.form._replace(
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            FUSED_SCALE=self.form.FUSED_SCALE and kernel == "fwd",
            MASKED=self.form.MASKED or (self.form.KEY_MASK and kernel == "dbias"),
            KEY_MASK=self.form.KEY_MASK and kernel != "dbias",
            GROUP=self.form.GROUP if of_keys else 1,
            DELTA_FIRST=of_keys and (self._adds_delta_first() or self._adds_lse_first()),
            LSE_FIRST=of_keys and self._adds_lse_first(),
            WITH_DK=kernel != "dv",
            WITH_DV=kernel != "dk",
        )
        form_tma = form._replace(TMA=DEVICE_MADE.value if makers != HOST_MADE.value else 0) if makers else None
        rows, whole = (config.block_m, True) if of_keys else (config.block_n, self._sees_all_keys())
        boxes = ([1, 1, rows, form.BLOCK_D], [1, 1, rows, form.BLOCK_DV]) if whole and self.sequences is None else ()
        return Start((blocks * heads * self.batch,), blocks, form, form_tma, boxes, config.options())

    def _adds_delta_first(self):
        """Return whether dk and dv take fewer registers if the sum of dp starts at -delta (docs/lab/triton.md).

        They do not with dropout, which scales dp before delta is subtracted. They do not on sm_100 either, because its
        sums are in tensor memory.
        """
        arch, _ = attention_config.architecture(self.kind[0])
        return self.alibi and not self.drops and not self.form.SOFTCAP and arch != 100

    def _adds_lse_first(self):
        """Return whether blocks of 64 queries fit because the sum of the scores starts at -lse (docs/lab/triton.md).

        At other head dims they fit without it. The interpreter, whose architecture is 0, always starts at -lse.
        """
        arch, _ = attention_config.architecture(self.kind[0])
        return self.plain and (arch == 0 or (arch == 90 and 64 < self.kind[2] <= 128))

    def _sees_all_keys(self):
        """Return whether the sizes ensure that some query sees each key."""
        form, (left, right, _) = self.form, self.window
        off = 0 if form.TOP_LEFT else self.total_k - self.total_q
        first = max(off - left, 0) if form.HAS_LEFT else 0
        end = self.total_q + off + right if form.HAS_RIGHT else self.total_k
        return first == 0 and end >= self.total_k and not form.KEY_MASK


plan_for = functools.lru_cache(4096)(Plan)


def geometry(t):
    return None if t is None else (t.shape, t.stride())


def prepare(q, k, v, bias, sink, mask, seqlens_k, cu_seqlens_q, cu_seqlens_k, slopes, rng, max_seqlen_q, max_seqlen_k,
            *options):  # fmt: skip
    """Return (plan, features) for the arguments of the raw ops.

    The maximum lengths that the caller states are not used: programs search for their sequence.
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
        None if plan.mask_rows is None else key_runs(mask, plan.mask_rows, plan.mask_strides, plan.total_k),
        None if slopes is None else Rows(slopes.contiguous(), plan.slopes_strides), contiguous(sink),
        contiguous(seqlens_k), contiguous(cu_seqlens_q), contiguous(cu_seqlens_k),
    )  # fmt: skip
