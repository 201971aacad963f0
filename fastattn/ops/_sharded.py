"""Ops on DTensors: inputs are redistributed where necessary, then each process runs the op on its local shards.

A raw op never gets a DTensor. A public op names the dimensions of its tensors by letters, as einsum does: the same
letter in two tensors stands for the same positions. On each mesh dimension, either all tensors are sharded along one
letter, or all are replicated. If they are sharded along a letter:

    a tensor that has the letter       is Shard there, and so is its gradient
    an input that does not have it     is Replicate, and its gradient is Partial: each process has a part of the sum
    an output that does not have it    is Partial

Candidates are the letters along which an input is already sharded; the one that moves the fewest elements is chosen.

The first call with a DTensor imports this module, because torch.distributed.tensor takes long to import.
"""

import math

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

ROWS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # the leading dimensions of a tensor that may have any number of them


class ShardedCall:
    """One call of an op on DTensors.

    Args:
        op: name of the op, for messages.
        operands: label -> (tensor or None, letters of its dimensions).
        letters: letters along which the op may be sharded, the preferred ones first.
        divisible: letter -> size that the number of shards must divide, because shards of unequal size would not work.
        plain: labels of operands that may be plain tensors, equal in every process.
        in_place: labels of operands that the op writes and that therefore cannot be redistributed.
    Raises:
        TypeError: an operand that must be a DTensor is a plain tensor.
        ValueError: DTensors are on different meshes, or one of `in_place` has a sharding that the op cannot use.
        RuntimeError: this process is not part of the mesh.
        NotImplementedError: torch.export traces the call.
    """

    def __init__(self, op, operands, letters, *, divisible=None, plain=(), in_place=()):
        self.op, self.in_place, self.divisible = op, in_place, divisible or {}
        self.labels = tuple(operands)
        self.operands = {label: operand for label, operand in operands.items() if operand[0] is not None}
        self.mesh = next(t.device_mesh for t, _ in self.operands.values() if isinstance(t, DTensor))
        self._check(plain)
        self.sizes = {}
        for t, dims in self.operands.values():
            for letter, size in zip(dims, t.shape, strict=True):
                self.sizes[letter] = max(size, self.sizes.get(letter, 0))
        self.chosen = []  # per dimension of the mesh, the letter or None
        for axis in range(self.mesh.ndim):
            self.chosen.append(self._choose(axis, letters))

    def is_sharded_along(self, letter):
        """Whether the op is sharded along this letter."""
        return letter in self.chosen

    def draw_rng(self):
        """(seed, offset): equal in processes that compute the same shard, different in the others."""
        device = next(iter(self.operands.values()))[0].device
        # a random op on DTensors draws the same in all processes: torch ensures it on GPUs, CPUs need equal seeds
        bounds, state = torch.iinfo(torch.int64), torch.empty(2, dtype=torch.int64, device=device)
        rng = torch.randint_like(self._replicated(state), bounds.min, bounds.max).to_local()
        part = 0
        for axis, letter in enumerate(self.chosen):
            if letter is not None:
                part = part * self.mesh.size(axis) + self.mesh.get_local_rank(axis)
        return rng + torch.tensor([0, part], device=rng.device) if part else rng

    def __call__(self, function, outputs):
        """Run the op on the local shards of this process.

        Args:
            function: local tensors in the order of the operands -> a tuple of tensors or None.
            outputs: letters of the dimensions of each result.
        Returns: the results as a tuple of DTensors or None.
        """
        results = function(*(self._local(*self.operands.get(label, (None, ""))) for label in self.labels))
        return tuple(
            None if out is None else self._whole(out, dims) for out, dims in zip(results, outputs, strict=True)
        )

    def _check(self, plain):
        if torch.compiler.is_exporting():
            raise NotImplementedError(
                f"{self.op}: torch.export does not support DTensors; export a model of plain tensors or use"
                " torch.compile"
            )
        if self.mesh.get_coordinate() is None:
            raise RuntimeError(f"{self.op}: this process is not part of the mesh of its DTensors, {self.mesh}")
        for label, (t, _) in self.operands.items():
            if not isinstance(t, DTensor):
                if label not in plain or t.requires_grad:
                    raise TypeError(
                        f"{self.op}: {label} must be a DTensor, like other inputs, got a plain tensor; convert it with"
                        " torch.distributed.tensor.distribute_tensor or DTensor.from_local"
                    )
            elif t.device_mesh != self.mesh:
                raise ValueError(f"{self.op}: all DTensors must be on one mesh, got {self.mesh} and {t.device_mesh}")

    def _choose(self, axis, letters):
        """The letter to shard along on one mesh dimension, or None."""
        used = set()
        for t, dims in self.operands.values():
            used |= {letter for dim, letter in enumerate(dims) if _placements(t, self.mesh)[axis] == Shard(dim)}
        choices = [letter for letter in letters if letter in used and self._may_shard(letter, axis)] + [None]
        costs = [self._cost(axis, letter) for letter in choices]
        if min(costs) == math.inf:
            names = " and ".join(self.in_place)
            have = ", ".join(f"{label} {_placements(t, self.mesh)}" for label, (t, _) in self.operands.items())
            raise ValueError(
                f"{self.op}: {names} are written in place: they must be replicated, or sharded along the batch or the"
                f" heads in a way that the other inputs can follow, got {have}; redistribute them first"
            )
        return choices[costs.index(min(costs))]

    def _may_shard(self, letter, axis):
        parts = self.mesh.size(axis)
        for other, chosen in enumerate(self.chosen):
            if chosen == letter:
                parts *= self.mesh.size(other)
        return self.divisible.get(letter, parts) % parts == 0

    def _cost(self, axis, letter):
        """The number of elements moved by sharding all operands along this letter on one mesh dimension."""
        cost = 0
        for label, (t, dims) in self.operands.items():
            have, want = _placements(t, self.mesh)[axis], self._placement(t, dims, letter)
            if have == want:
                continue
            if label in self.in_place:
                return math.inf
            if not have.is_replicate():  # a replicated tensor is sliced locally
                cost += t.numel() * (2 if have.is_partial() and want.is_replicate() else 1)
        return cost

    def _placement(self, t, dims, letter):
        dim = dims.find(letter) if letter else -1
        # a dimension of size 1 is broadcast
        return Replicate() if dim < 0 or t.shape[dim] == 1 < self.sizes[letter] else Shard(dim)

    def _local(self, t, dims):
        """The local shard of an operand."""
        if t is None:
            return None
        t = t if isinstance(t, DTensor) else self._replicated(t)
        wanted = tuple(self._placement(t, dims, letter) for letter in self.chosen)
        grad = tuple(
            Partial() if letter and placement.is_replicate() else placement
            for letter, placement in zip(self.chosen, wanted, strict=True)
        )
        moves = not t.placements == wanted == grad
        if t.placements != wanted:
            t = t.redistribute(placements=wanted)
        return _ToLocal.apply(t, grad, moves)

    def _whole(self, out, dims):
        """The DTensor of which this process computed a shard."""
        shape = torch.Size(self.sizes.get(letter, size) for letter, size in zip(dims, out.shape, strict=True))
        placements = []
        for letter in self.chosen:
            sharded = Shard(dims.index(letter)) if letter and letter in dims else Partial()
            placements.append(sharded if letter else Replicate())
        return _FromLocal.apply(out, self.mesh, tuple(placements), shape)

    def _replicated(self, t):
        return DTensor.from_local(t, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)


def _placements(t, mesh):
    return t.placements if isinstance(t, DTensor) else (Replicate(),) * mesh.ndim


def _nested_strides(shape, like):
    """Strides of a dense tensor of this shape, with the stride order of `like`."""
    strides = [1] * len(shape)
    for outer, stride in enumerate(like):
        for inner, other in enumerate(like):
            if other < stride or (other == stride and inner > outer):
                strides[outer] *= max(shape[inner], 1)
    return tuple(strides)


# DTensor.to_local and from_local, differentiable any number of times. Those of torch lose the graph of a gradient: in
# some versions always, in others if the gradient is redistributed. They also treat the second-order gradient of a
# Partial as Replicate, although each process has only a part of the sum.


class _ToLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, grad_placements, moves):
        ctx.mesh, ctx.shape, ctx.placements, ctx.moves = x.device_mesh, x.shape, grad_placements, moves
        local = x.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx, grad):
        # torch makes a redistributed tensor contiguous but still records its old strides, and it can record only the
        # strides of dense tensors
        if ctx.moves or 0 in grad.stride():
            grad = grad.contiguous()
        return _FromLocal.apply(grad, ctx.mesh, ctx.placements, ctx.shape), None, None


class _FromLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, mesh, placements, shape):
        ctx.set_materialize_grads(False)
        ctx.placements = placements
        stride = _nested_strides(shape, local.stride())
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    @staticmethod
    def backward(ctx, grad):
        if grad is None:
            return None, None, None, None
        wanted = tuple(Replicate() if placement.is_partial() else placement for placement in ctx.placements)
        if grad.placements != wanted:
            grad = grad.redistribute(placements=wanted)
        return _ToLocal.apply(grad, ctx.placements, True), None, None, None
