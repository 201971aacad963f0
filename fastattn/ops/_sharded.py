"""Ops on DTensors: each process runs the op on its own part, and what belongs together is brought together before.

A raw op knows nothing of DTensors. A public op names the dimensions of its tensors by letters, as einsum does: the same
letter in two tensors stands for the same positions. Per dimension of the mesh, all tensors are then divided along one
letter, or all are whole:

    a tensor with the letter        Shard there, and so is its gradient
    an input without the letter     Replicate, and its gradient is Partial: each process sees a part of the sum
    an output without the letter    Partial

The letter is the one that moves the fewest elements, among those along which an input is divided already.
"""

import math
import sys

import torch

from fastattn.ops._random import draw_rng

ROWS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # leading dimensions, of which a tensor may have any number


def is_dtensor(x):
    """Whether x is a DTensor. Callers ask only if `type(x) is not torch.Tensor`, so that plain calls pay nothing."""
    module = sys.modules.get("torch.distributed.tensor")  # slow to import; without it there are no DTensors
    return module is not None and isinstance(x, module.DTensor)


def numbers(t):
    """The elements of a small tensor as a list."""
    return (t.full_tensor() if type(t) is not torch.Tensor and is_dtensor(t) else t).tolist()


def _nested_strides(shape, like):
    """Strides of a dense tensor of this shape, its dimensions nested as those with the strides `like`."""
    strides = [1] * len(shape)
    for outer, stride in enumerate(like):
        for inner, other in enumerate(like):
            if other < stride or (other == stride and inner > outer):
                strides[outer] *= max(shape[inner], 1)
    return tuple(strides)


def _from_local(local, mesh, placements, shape, stride):
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


class _FromLocal(torch.autograd.Function):
    """DTensor.from_local, differentiable any number of times.

    That of torch loses the graph of a gradient that it has to redistribute. And it takes the gradient of the gradient of
    a Partial for Replicate, where each process has a part of the sum.
    """

    @staticmethod
    def forward(ctx, local, mesh, placements, shape, stride):
        ctx.set_materialize_grads(False)
        ctx.placements = placements
        return _from_local(local, mesh, placements, shape, stride)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return (None,) * 5
        from torch.distributed.tensor import Replicate

        wanted = tuple(Replicate() if p.is_partial() else p for p in ctx.placements)
        if grad.placements != wanted:
            grad = grad.redistribute(placements=wanted)
        return grad.to_local(grad_placements=ctx.placements), None, None, None, None


class ShardedCall:
    """One call of an op on DTensors.

    Args:
        op: name of the op, for messages.
        operands: label -> (tensor or None, letters of its dimensions).
        letters: those that may be divided, the preferred first.
        divisible: letter -> size that the number of parts must divide, where parts of unequal size would not fit.
        plain: labels of operands that may be plain tensors, which then are the same in every process.
        in_place: labels of operands that the op writes, which therefore stay where they are.
    Raises:
        TypeError: a plain tensor stands beside the DTensors.
        ValueError: DTensors lie on different meshes, or one of `in_place` is divided as the op cannot take it.
    """

    def __init__(self, op, operands, letters, *, divisible=None, plain=(), in_place=()):
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        self._dtensor, self._partial, self._replicate, self._shard = DTensor, Partial, Replicate, Shard
        self.op, self.in_place, self.divisible = op, in_place, divisible or {}
        self.operands = {label: operand for label, operand in operands.items() if operand[0] is not None}
        self.labels = tuple(operands)
        self.mesh = next(t.device_mesh for t, _ in self.operands.values() if isinstance(t, DTensor))
        for label, (t, _) in self.operands.items():
            if not isinstance(t, DTensor) and (label not in plain or t.requires_grad):
                raise TypeError(
                    f"{op}: {label} must be a DTensor as other inputs are, got a plain tensor; make it one by"
                    " torch.distributed.tensor.distribute_tensor or DTensor.from_local"
                )
            if isinstance(t, DTensor) and t.device_mesh != self.mesh:
                raise ValueError(f"{op}: all DTensors must be on one mesh, got {self.mesh} and {t.device_mesh}")
        self.sizes = {}
        for t, dims in self.operands.values():
            for letter, size in zip(dims, t.shape, strict=True):
                self.sizes[letter] = max(size, self.sizes.get(letter, 0))
        self.chosen = []  # per dimension of the mesh
        for axis in range(self.mesh.ndim):
            self.chosen.append(self._choose(axis, letters))

    def is_split(self, letter):
        """Whether the op runs on parts along this letter."""
        return letter in self.chosen

    def draw_rng(self):
        """(seed, offset) of this process's part: its own, and that of all processes that compute the same part."""
        device = next(iter(self.operands.values()))[0].device
        if self.mesh.device_type == "cpu":  # torch, too, relies on equal seeds there
            rng = draw_rng(device)
        else:
            bounds = torch.iinfo(torch.int64)
            like = torch.empty(2, dtype=torch.int64, device=device)
            like = self._dtensor.from_local(like, self.mesh, [self._replicate()] * self.mesh.ndim, run_check=False)
            rng = torch.randint_like(like, bounds.min, bounds.max).to_local()
        part = 0
        for axis, letter in enumerate(self.chosen):
            if letter is not None:
                part = part * self.mesh.size(axis) + self.mesh.get_local_rank(axis)
        return rng + torch.tensor([0, part], device=rng.device) if part else rng

    def __call__(self, function, outputs):
        """Run the op.

        Args:
            function: takes the local tensors in the order of the operands, returns a tuple of tensors or None.
            outputs: letters of the dimensions of each result.
        Returns: the results as a tuple of DTensors or None.
        """
        local = [self._local(*self.operands[label]) if label in self.operands else None for label in self.labels]
        return tuple(
            None if out is None else self._wrap(out, dims) for out, dims in zip(function(*local), outputs, strict=True)
        )

    def _choose(self, axis, letters):
        """The letter to divide along on one dimension of the mesh, or None."""
        used = set()
        for t, dims in self.operands.values():
            if isinstance(t, self._dtensor):
                used |= {letter for dim, letter in enumerate(dims) if t.placements[axis] == self._shard(dim)}
        candidates = [letter for letter in letters if letter in used and self._may_split(letter, axis)]
        costs = [self._cost(axis, letter) for letter in (*candidates, None)]
        if min(costs) == math.inf:
            labels = " and ".join(label for label in self.in_place if label in self.operands)
            raise ValueError(
                f"{self.op}: {labels} must be DTensors that are replicated, or divided along the batch or the heads as"
                f" the other inputs allow, got {self._describe()}; redistribute them before the call"
            )
        return (*candidates, None)[costs.index(min(costs))]

    def _may_split(self, letter, axis):
        parts = self.mesh.size(axis)
        for other, chosen in enumerate(self.chosen):
            if chosen == letter:
                parts *= self.mesh.size(other)
        return self.divisible.get(letter, parts) % parts == 0

    def _cost(self, axis, letter):
        """How many elements have to be moved to divide all operands along this letter on this dimension of the mesh."""
        cost = 0
        for label, (t, dims) in self.operands.items():
            have = t.placements[axis] if isinstance(t, self._dtensor) else self._replicate()
            want = self._placement(t, dims, letter)
            if have == want:
                continue
            if label in self.in_place:
                return math.inf
            if not have.is_replicate():  # a whole tensor is cut where it lies
                cost += t.numel() * (2 if have.is_partial() and want.is_replicate() else 1)
        return cost

    def _placement(self, t, dims, letter):
        at = dims.find(letter) if letter else -1
        # a dimension of size 1 is broadcast
        return self._replicate() if at < 0 or t.shape[at] == 1 < self.sizes[letter] else self._shard(at)

    def _local(self, t, dims):
        if not isinstance(t, self._dtensor):
            t = self._dtensor.from_local(t, self.mesh, [self._replicate()] * self.mesh.ndim, run_check=False)
        wanted = tuple(self._placement(t, dims, letter) for letter in self.chosen)
        if t.placements != wanted:
            t = t.redistribute(placements=wanted)
        grad = [
            self._partial() if letter and placement.is_replicate() else placement
            for letter, placement in zip(self.chosen, wanted, strict=True)
        ]
        return t.to_local(grad_placements=grad)

    def _wrap(self, out, dims):
        shape = torch.Size(self.sizes.get(letter, size) for letter, size in zip(dims, out.shape, strict=True))
        placements = tuple(
            self._replicate()
            if letter is None
            else self._shard(dims.index(letter))
            if letter in dims
            else self._partial()
            for letter in self.chosen
        )
        layout = self.mesh, placements, shape, _nested_strides(shape, out.stride())
        # the compiler, which makes no gradients of gradients, knows from_local
        return _from_local(out, *layout) if torch.compiler.is_compiling() else _FromLocal.apply(out, *layout)

    def _describe(self):
        return ", ".join(
            f"{label} {t.placements if isinstance(t, self._dtensor) else 'plain'}"
            for label, (t, _) in self.operands.items()
        )
