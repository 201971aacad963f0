"""Nested tensors: an op runs on their rows, and its result gets the same nested structure.

Both layouts are supported. The rows of a jagged tensor are its values; those of a strided one are copied together.
"""

import itertools

import torch

from fastattn.ops._kinds import is_nested


class Rows:
    """The rows of a nested tensor, and how to make a nested tensor of a result.

    Args:
        name, label: names of the op and the argument, for messages.
        nested: (batch, ..., last) with one ragged dimension, which must not be the last.
        last: number of dimensions of a row: 1, or 0 for a tensor with one number per row.
    """

    def __init__(self, name, label, nested, last=1):
        self.nested = nested
        self.is_jagged = nested.layout is torch.jagged
        if self.is_jagged:
            _check_gaps(name, label, nested)
            if last and nested._ragged_idx == nested.dim() - 1:
                raise ValueError(f"{name}: {label} must not be ragged in its last dimension, got {nested.shape}")
            self.tensor, self.max_seqlen = nested.values(), nested._maybe_max_seqlen
            return
        sequences = _sequences(name, label, nested, last)
        self.shapes = [sequence.shape[: sequence.dim() - last] for sequence in sequences]
        self.tensor = torch.cat([t.reshape(-1, *t.shape[t.dim() - last :]) for t in sequences])
        self.max_seqlen = max(shape.numel() for shape in self.shapes)

    @property
    def offsets(self):
        """The index of the first row of each sequence, and the total."""
        if self.is_jagged:
            return self.nested.offsets()
        return _offsets([shape.numel() for shape in self.shapes], self.nested.device)

    def restore(self, rows):
        """Return a result with these rows as a nested tensor."""
        if not self.is_jagged:
            parts = rows.split([shape.numel() for shape in self.shapes])
            return torch.nested.as_nested_tensor(
                [part.view(*shape, *part.shape[1:]) for part, shape in zip(parts, self.shapes, strict=True)]
            )
        return _as_jagged(rows, self.nested, self.nested._ragged_idx)

    def has_lengths_of(self, other):
        """Whether the sequences of both have the same lengths."""
        if self.is_jagged != other.is_jagged:
            return False
        if self.is_jagged:
            return self.offsets is other.offsets or torch.equal(self.offsets, other.offsets)
        return self.shapes == other.shapes


def _check_gaps(name, label, nested):
    if nested.lengths() is not None:
        raise ValueError(f"{name}: {label} must be a nested tensor without gaps: call its contiguous() first")


def _sequences(name, label, nested, last=1):
    """The sequences of a strided nested tensor. Raise unless their last dimensions agree."""
    sequences = nested.unbind()
    if not sequences:
        raise ValueError(f"{name}: {label} must be a nested tensor with at least one sequence, got none")
    ends = {tuple(t.shape[t.dim() - last :]) for t in sequences}
    if len(ends) > 1:
        raise ValueError(f"{name}: {label} must not be ragged in its last dimension, got {sorted(ends)}")
    return sequences


def _offsets(lengths, device):
    return torch.tensor([0, *lengths], device=device).cumsum(0)


def _as_jagged(values, like, ragged_dim):
    return torch.nested.nested_tensor_from_jagged(
        values, like.offsets(), jagged_dim=ragged_dim, min_seqlen=like._maybe_min_seqlen,
        max_seqlen=like._maybe_max_seqlen,
    )  # fmt: skip


def check_nested(name, given, labels):
    """Raise unless the arguments in `labels` are nested or None, and no other argument is nested."""
    nested = [label for label, t in given.items() if is_nested(t)]
    for label in nested:
        if label not in labels:
            raise ValueError(f"{name}: {label} must not be a nested tensor")
    for label in labels:
        if label not in nested and given.get(label) is not None:
            like = nested[0] if nested else "another argument"
            raise ValueError(f"{name}: {label} must be a nested tensor, like {like}")


def on_rows(*labels, last=(1, 1)):
    """A function for Public(nested=) that runs the op on the rows of the arguments `labels`, which need equal lengths.

    Args:
        labels: the first is required. Results get its structure, or that of the last if they have one number per row.
        last: number of dimensions of a row, for the first argument and for the others.
    """

    def serve(name, function, given):
        check_nested(name, given, labels)
        rows = {
            label: Rows(name, label, given[label], last[label != labels[0]])
            for label in labels
            if given.get(label) is not None
        }
        first = rows[labels[0]]
        for label, other in rows.items():
            if not other.has_lengths_of(first):
                raise ValueError(f"{name}: {label} must have sequences of the same lengths as {labels[0]}")
        out = function(**given | {label: other.tensor for label, other in rows.items()})
        if isinstance(out, tuple):
            return tuple(first.restore(t) for t in out)
        if not isinstance(out, torch.Tensor) or not out.dim():
            return out
        return (first if out.dim() == first.tensor.dim() else rows[labels[-1]]).restore(out)

    return serve


def longest(nested):
    """An upper bound of the sequence lengths of a nested (batch, heads, seqlen, head_dim)."""
    if nested.layout is not torch.jagged:
        return max((t.shape[-2] for t in nested.unbind()), default=0)
    known = nested._maybe_max_seqlen
    return nested.values().shape[nested._ragged_idx - 1] if known is None else known


class Sequences:
    """Nested (batch, heads, seqlen, ...) as packed sequences: `tensor` (total, heads, ...) and `cu_seqlens`.

    If the sequences of a strided tensor differ in their number of heads, each head becomes a sequence.
    """

    def __init__(self, name, label, nested):
        self.nested = nested
        self.is_jagged = nested.layout is torch.jagged
        if nested.dim() < 4 - self.is_jagged or (self.is_jagged and nested._ragged_idx != 2):
            form = tuple(nested.shape) if self.is_jagged else f"{nested.dim()} dimensions"
            raise ValueError(
                f"{name}: {label} must be nested (batch, heads, seqlen, head_dim), ragged in seqlen, got {form}; pass a"
                " (batch, seqlen, heads, head_dim) tensor as t.transpose(1, 2)"
            )
        if self.is_jagged:
            _check_gaps(name, label, nested)
            self.tensor = nested.values().transpose(0, 1)
            self.offsets = nested.offsets()
            self.max_seqlen = nested._maybe_max_seqlen
            return
        parts = _sequences(name, label, nested)
        self.heads = [part.shape[0] for part in parts]
        if len(set(self.heads)) > 1:
            parts = [head[None] for part in parts for head in part]
        self.lengths = [part.shape[1] for part in parts]
        self.tensor = torch.cat([part.transpose(0, 1) for part in parts])
        self.offsets = _offsets(self.lengths, nested.device)
        self.max_seqlen = max(self.lengths)

    def restore(self, packed):
        """Return a result (total, heads, ...) as a nested tensor (batch, heads, seqlen, ...)."""
        if self.is_jagged:
            return _as_jagged(packed, self.nested, 1).transpose(1, 2)
        parts = [part.transpose(0, 1) for part in packed.split(self.lengths)]
        if len(set(self.heads)) > 1:
            heads = iter(parts)
            parts = [torch.cat([next(heads) for _ in range(count)]) for count in self.heads]
        return torch.nested.as_nested_tensor(parts)

    def has_heads_of(self, other):
        """Whether corresponding sequences have equally many heads, or all sequences of each tensor do."""
        if self.is_jagged or other.is_jagged:
            return True
        return self.heads == other.heads or len(set(self.heads)) == len(set(other.heads)) == 1


def sequences_of(name, given, *labels):
    """The `Sequences` of the arguments `labels`. The last two must have the same lengths."""
    check_nested(name, given, labels)
    found = [Sequences(name, label, given[label]) for label in labels]
    for label, other in zip(labels[1:], found[1:], strict=True):
        if not found[0].has_heads_of(other):
            raise ValueError(f"{name}: {label} must have as many heads as {labels[0]} in every sequence")
    for a, b in itertools.pairwise(found[-2:]):
        if a.offsets is not b.offsets and not torch.equal(a.offsets, b.offsets):
            raise ValueError(f"{name}: {labels[-1]} must have sequences of the same lengths as {labels[-2]}")
    return found


def packed_arguments(q, k):
    """The arguments of `attention` that describe the packed sequences of q and k, each `Sequences` or `Rows`."""
    offsets_q, offsets_k = q.offsets, k.offsets
    cu_seqlens_q = offsets_q.to(torch.int32)
    return {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_q if offsets_k is offsets_q else offsets_k.to(torch.int32),
        "max_seqlen_q": q.max_seqlen,
        "max_seqlen_k": k.max_seqlen,
    }


def packed_attention(name, function, given):
    """For Public(nested=): run or explain `attention` on packed sequences."""
    q, k, v = sequences_of(name, given, "q", "k", "v")
    for label in ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"):
        if given.get(label) is not None:
            raise ValueError(f"{name}: {label} must be None for nested tensors, which hold their lengths")
    out = function(**given | packed_arguments(q, k) | {"q": q.tensor, "k": k.tensor, "v": v.tensor})
    if isinstance(out, tuple):
        return q.restore(out[0]), q.restore(out[1].transpose(0, 1))
    return q.restore(out) if isinstance(out, torch.Tensor) else out
