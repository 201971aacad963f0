"""The attention of Hugging Face transformers on our kernels: `attn_implementation="fastattn"`.

    import fastattn.integrations.transformers  # or: fastattn.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fastattn")  # or: set_attn_implementation

Importing this module registers two functions under that name. `attention_mask` says which keys a query sees: it reads
the mask function that transformers composed (causal, sliding window, chunks, packed documents) and the padding, and
returns a `VisibleKeys`, which says the same in the arguments of `fastattn.attention`. `attention_forward` hands these
on. A mask of seqlen_q × seqlen_k values is made only where no argument says the same.
What is served, and what is refused: docs/models.md.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
except ImportError as error:
    raise ImportError("fastattn.integrations.transformers needs transformers 4.57 or newer") from error

from fastattn.integrations import transformers_versions as versions
from fastattn.ops.attention import attention

_NAME = 'attn_implementation="fastattn"'
_aten: Any = torch.ops.aten

# arguments of a model's forward or of its loss that reach every attention function and say nothing about attention
_ELSEWHERE = frozenset(
    [
        "cache_position", "ignore_index", "logits_to_keep", "max_length_k", "max_length_q", "num_items_in_batch",
        "output_hidden_states", "output_router_logits", "position_embeddings", "position_ids", "return_dict",
        "shift_labels", "use_cache",
    ]
)  # fmt: skip


class Visible(NamedTuple):
    """Which keys a query sees, in the arguments of `attention`.

    n_keys: no query sees the keys from this index on, so they are cut off.
    padding: bool (batch, 1, 1, n_keys), or None if every key is real, or if lengths or documents alone express it.
    cu_seqlens: the documents of the rows of the batch, which are concatenated. If they come from the padding alone,
        `padding` holds the same. A call with a bias uses that, because packed sequences take no bias.
    """

    n_keys: int
    causal: bool | str = False
    window: tuple[int, int] | None = None
    lengths: Tensor | None = None
    padding: Tensor | None = None
    cu_seqlens: Tensor | None = None


class VisibleKeys(Tensor):
    """A bool mask (batch, 1, seqlen_q, seqlen_k) whose elements are computed only when an operation reads them.

    A model can use it like any other mask.
    """

    visible: Visible
    dense: Callable[[], Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, shape, device, visible, dense):
        """An empty tensor of that shape; `dense` makes the mask that it stands for."""
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.visible, mask.dense = visible, dense
        return mask

    def __repr__(self, *, tensor_contents=None):
        """Leave out the elements, because printing would compute them."""
        return f"VisibleKeys(shape={tuple(self.shape)}, {self.visible})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Keep views that change nothing without elements. Give everything else the mask with its elements."""
        if func in (_aten.detach.default, _aten.alias.default) or _is_whole_slice(func, *args):
            mask = args[0]
            return cls(mask.shape, mask.device, mask.visible, mask.dense)
        args, kwargs = tree_map_only(cls, lambda mask: mask.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)


def _is_whole_slice(func, t=None, dim=0, start=None, end=None, step=1):
    if func is not _aten.slice.Tensor or step != 1:
        return False
    size = t.shape[dim]
    return (start in (None, 0) or start <= -size) and (end is None or end >= size)


class _Pattern(NamedTuple):
    """The visible keys that a mask function of transformers describes: the intersection of all fields that are not
    None.

    left, right: how many keys before and after its own position a query sees.
    chunk: (size, left_padding): only keys of its own chunk, counted from the first real key.
    documents: (batch, seqlen), the document of each position; positions: (batch, seqlen), those that chunks count.
    """

    left: int | None = None
    right: int | None = None
    chunk: tuple[int, Tensor] | None = None
    documents: Tensor | None = None
    positions: Tensor | None = None

    def narrowed(self, left=None, right=None):
        sides = ((self.left, left), (self.right, right))
        left, right = (min((side for side in pair if side is not None), default=None) for pair in sides)
        return self._replace(left=left, right=right)


def _read(function, pattern):
    """`pattern`, narrowed by a mask function of transformers; None if the function has an unknown form."""
    if function is masking_utils.causal_mask_function:
        return pattern.narrowed(right=0)
    if function is not None and function is versions.bidirectional_mask_function:
        return pattern
    code = getattr(function, "__code__", None)
    if code is None or function.__module__ != masking_utils.__name__:
        return None
    given = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()), strict=True))
    match function.__qualname__.partition(".")[0]:
        case "and_masks":
            for part in given["mask_functions"]:
                pattern = _read(part, pattern) if pattern is not None else None
            return pattern
        case "sliding_window_overlay":
            return pattern.narrowed(left=given["sliding_window"] - 1)
        case "sliding_window_bidirectional_overlay":
            return pattern.narrowed(left=given["sliding_window"], right=given["sliding_window"])
        case "chunked_overlay":
            return pattern._replace(chunk=(given["chunk_size"], given["left_padding"]))
        case "packed_sequence_mask_function":
            return pattern._replace(documents=given["packed_sequence_mask"])
        case "remap_positions_for_packed_sequence":
            # Distances within a document are those of the rows. Only chunks need the positions themselves.
            return _read(given["mask_function"], pattern._replace(positions=given["position_ids"]))
    return None


def _chunks(pattern, index):
    """(batch or 1, len(index)): the chunk of each position of the sequence."""
    size, left_padding = pattern.chunk
    index = index[None] if pattern.positions is None else pattern.positions[:, index]
    return (index - left_padding[:, None]) // size


def _starts(*labels):
    """The starts of the documents of a packed batch, and the end of the last: one starts at each row and where a label
    changes."""
    labels = torch.broadcast_tensors(*labels)
    batch, seqlen = labels[0].shape
    begins = labels[0].new_ones(batch, seqlen, dtype=torch.bool)
    begins[:, 1:] = torch.stack([label.diff(dim=1) != 0 for label in labels]).any(0)
    starts = begins.flatten().nonzero().flatten().int()
    return torch.cat([starts, starts.new_tensor([batch * seqlen])])


def _visible(pattern, padding, batch, n_queries, n_keys, q_offset, kv_offset, device):
    """The Visible of a pattern and a padding (batch, keys of the sequence), or None if only a mask can say it."""
    if pattern.positions is not None and pattern.documents is None:
        return None
    first = q_offset - kv_offset  # the key at which the first query stands
    causal = pattern.right == 0
    if causal and 0 <= first <= n_keys - n_queries:
        n_keys = first + n_queries
    if (causal or pattern.left is not None or pattern.right is not None) and first != n_keys - n_queries:
        return None
    square = causal and n_queries == n_keys
    window = None
    if pattern.left is not None or (pattern.right is not None and not causal):
        window = (-1 if pattern.left is None else pattern.left, -1 if pattern.right is None else pattern.right)
    visible = Visible(n_keys, causal, window)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + n_keys]
        padding = None if padding.all() else padding
    labels = [] if pattern.documents is None else [pattern.documents]
    if pattern.chunk is not None:
        chunks = _chunks(pattern, torch.arange(kv_offset, kv_offset + n_keys, device=device))
        if n_queries == 1:  # it sees only the keys of its chunk
            own = (chunks == chunks[:, first : first + 1]).expand(batch, -1)
            padding = own if padding is None else own & padding
        elif (chunks != chunks[:, :1]).any():
            labels.append(chunks)
    if labels and not square:
        return None
    if padding is not None:
        if not labels and not (window and not causal):
            lengths = padding.sum(1, dtype=torch.int32)
            if (padding == (torch.arange(n_keys, device=device) < lengths[:, None])).all() and (square or not causal):
                # Lengths would align a query with the end of its row. Aligned top-left, it keeps its place.
                return visible._replace(causal="top_left" if causal else False, lengths=lengths)
        steps = padding.int().diff(dim=1, prepend=padding.new_zeros(len(padding), 1).int())
        in_one_piece = square and bool(((steps == 1).sum(1) <= 1).all())
        if labels and not in_one_piece:
            return None
        if not labels:
            visible = visible._replace(padding=padding[:, None, None])
        if in_one_piece:  # the padding becomes separate documents that no query sees
            labels.append(padding.int())
    if labels:
        visible = visible._replace(cu_seqlens=_starts(*(label.expand(batch, -1) for label in labels)))
    return visible


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask function that is registered: the visible keys, in the simplest form that the call allows.

    Args: those of `transformers.masking_utils.sdpa_mask`, with the same meaning.
    Returns: a `VisibleKeys` (batch, 1, q_length, kv_length); a bool mask of that shape where a part of the mask
        function is unknown, where no argument of `attention` says it, and while a graph is traced; None for a plain
        causal batch in a graph.
    """
    given: dict[str, Any] = {
        "batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset,
        "kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask, "device": device,
    }  # fmt: skip
    dense = partial(versions.dense_mask, **given, **kwargs, allow_is_causal_skip=False)
    if versions.is_tracing(attention_mask):  # a graph cannot choose by values
        plain = mask_function is masking_utils.causal_mask_function and attention_mask is None
        if allow_is_causal_skip and plain and not isinstance(q_offset, Tensor) and q_length == kv_length:
            return None
        return dense()
    # One new token with a static cache. On a GPU the model is compiled, so it gets a mask whose shape does not change.
    if not allow_is_causal_skip and q_length == 1 and torch.device(device).type != "cpu":
        return dense()
    pattern = _read(mask_function, _Pattern())
    padding = versions.padding_mask(attention_mask, kv_length, kv_offset)
    visible = None
    if pattern is not None:
        visible = _visible(
            pattern, padding, batch_size, q_length, kv_length, int(q_offset), int(kv_offset), torch.device(device)
        )
    if visible is None:
        return dense()
    lazily = partial(versions.mask_of_known_pattern, **given, **kwargs, allow_is_causal_skip=False)
    return VisibleKeys((batch_size, 1, q_length, kv_length), device, visible, lazily)


def _without_mask(module, query, key, is_causal, sliding_window):
    """The Visible of a call without a mask. As for SDPA, several queries are causal if the module is, and top-left."""
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    n_queries, n_keys = query.shape[2], key.shape[2]
    causal = bool(is_causal) and n_queries > 1
    visible = Visible(min(n_queries, n_keys) if causal else n_keys, "top_left" if causal else False)
    if sliding_window is None or sliding_window >= visible.n_keys:
        return visible
    if not causal and not (n_queries == 1 and is_causal):
        raise ValueError(
            f"{_NAME}: sliding_window={sliding_window} without an attention mask must come with is_causal=True: how"
            " far a query sees to its right is unknown"
        )
    return visible._replace(window=(sliding_window - 1, 0))


def _with_mask(attention_mask, bias, query, key):
    """(Visible, mask, bias) of a call with a mask of any kind and perhaps a position bias."""
    if attention_mask.dim() != 4:
        raise ValueError(
            f"{_NAME}: attention_mask must be (batch, heads or 1, seqlen_q, seqlen_k), got shape"
            f" {tuple(attention_mask.shape)}"
        )
    everything = Visible(key.shape[2])
    if not isinstance(attention_mask, VisibleKeys):
        if attention_mask.dtype == torch.bool:
            return everything, attention_mask, bias
        return everything, None, attention_mask if bias is None else bias + attention_mask
    if attention_mask.shape[2:] != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"{_NAME}: attention_mask must be for {query.shape[2]} queries and {key.shape[2]} keys, got"
            f" {tuple(attention_mask.shape)}"
        )
    visible = attention_mask.visible
    if visible.cu_seqlens is None:
        return visible, visible.padding, bias
    if bias is None:
        return visible._replace(padding=None), None, None
    # Packed sequences take no bias.
    if visible.padding is not None:
        return visible._replace(cu_seqlens=None), visible.padding, bias
    return everything, attention_mask.dense(), bias


def _packed(visible, query, cu_seq_lens_q, cu_seq_lens_k):
    """`visible` with the documents that the caller names."""
    same = cu_seq_lens_q is cu_seq_lens_k  # on a GPU, looking at the numbers would wait for them
    if cu_seq_lens_q is None or cu_seq_lens_k is None or not (same or torch.equal(cu_seq_lens_q, cu_seq_lens_k)):
        raise ValueError(
            f"{_NAME}: cu_seq_lens_q and cu_seq_lens_k must be given together and equal, got {cu_seq_lens_q} and"
            f" {cu_seq_lens_k}"
        )
    if query.shape[0] != 1 or visible.lengths is not None:
        raise ValueError(
            f"{_NAME}: cu_seq_lens_q must come with a batch of 1 and without padding, got {query.shape[0]} rows"
        )
    return visible._replace(cu_seqlens=cu_seq_lens_q.int())


def _refuse(kwargs, packed):
    """Raise for an argument that would change the result and is not supported."""
    for label, value in kwargs.items():
        if value is None or value is False or label in _ELSEWHERE or (label == "seq_idx" and packed):
            continue
        advice = '; use attn_implementation="eager"' if label == "output_attentions" else ""
        raise ValueError(f"{_NAME}: the argument {label} is not supported, got {type(value).__name__}{advice}")


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that is registered: `fastattn.attention` under the arguments of transformers.

    Args:
        module: its `is_causal` counts if nothing else says whether the call is causal.
        query: (batch, n_heads, seqlen_q, head_dim); key, value: (batch, n_kv_heads, seqlen_k, head_dim or another).
        attention_mask: what `attention_mask` returned, a bool mask, or a float one that is added to the scores, with 4
            dimensions. is_causal and sliding_window count only without it: it says the same.
        dropout: of the attention weights.
        s_aux: (n_heads,), the sinks. position_bias: added to the scores. Both get a gradient.
        cu_seq_lens_q, cu_seq_lens_k: (documents + 1,), the packed documents of a batch of 1.
    Returns: (batch, seqlen_q, n_heads, head_dim_v), and None for the attention weights.
    Raises:
        ValueError: an argument would change the result and is not supported, or `attention` refuses the call.
    """
    options: dict[str, Any] = {"softcap": softcap, "sink": s_aux, "dropout_p": dropout, "scale": scaling}
    if attention_mask is None:
        visible, mask, bias = _without_mask(module, query, key, is_causal, sliding_window), None, position_bias
    else:
        visible, mask, bias = _with_mask(attention_mask, position_bias, query, key)
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if mask is not None or bias is not None:
            raise ValueError(f"{_NAME}: cu_seq_lens_q must come without padding, a mask and a position bias")
        visible = _packed(visible, query, cu_seq_lens_q, cu_seq_lens_k)
    _refuse(kwargs, visible.cu_seqlens is not None)
    if visible.n_keys < key.shape[2]:
        key, value = key[:, :, : visible.n_keys], value[:, :, : visible.n_keys]
        bias = None if bias is None else bias[..., : visible.n_keys]
    if visible.cu_seqlens is not None:
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        out = attention(
            q, k, v, causal=visible.causal, window=visible.window, cu_seqlens_q=visible.cu_seqlens,
            cu_seqlens_k=visible.cu_seqlens, **options,
        )  # fmt: skip
        return out.unflatten(0, (query.shape[0], query.shape[2])), None
    if query.shape[0] != key.shape[0]:  # learned queries stand for every row
        query = query.expand(key.shape[0], -1, -1, -1)
    out = attention(
        query, key, value, mask=mask, bias=bias, causal=visible.causal, window=visible.window,
        seqlens_k=visible.lengths, **options,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("fastattn", attention_forward)
AttentionMaskInterface.register("fastattn", versions.for_installed_version(attention_mask))
