"""Feed-forward blocks of other libraries: gated ones, and plain ones with dropout on the hidden layer.

y = down(dropout(act(gate(x)) · up(x)))  or  y = down(dropout(act(up(x)))), perhaps with another dropout of y

gate and up may be one layer whose output is cut in two. Blocks without a gate and without that dropout are left alone:
our op takes the time of torch's there (benchmarks/test_feed_forward.py).
"""

import copy
import itertools
from typing import NamedTuple

import torch

from fastattn import reference
from fastattn._autocast import autocast_dtype
from fastattn.drop_in.change import (
    Change,
    Recognised,
    Replaced,
    change_class,
    is_plain_input,
    make_class,
    why_not_take_over,
)
from fastattn.drop_in.guards import guards_of, guards_of_child
from fastattn.drop_in.linear import is_linear
from fastattn.drop_in.recognise import computes_the_same, halves_of, quiet, randomise, run
from fastattn.nn.plain import dropout_p, is_plain, must_call_children
from fastattn.ops import feed_forward
from fastattn.ops.feed_forward import ACTIVATIONS

_D_MODEL, _D_FF, _ROWS = 6, 10, 7  # the sizes of the twin


class Block(NamedTuple):
    """What a feed-forward block computes.

    gate, up, down: the names of its layers; gate is None without one. If gate and up are the same layer, its output is
        cut in two, and the half for the gate comes first or not (gate_first).
    hidden_dropout, output_dropout: the names of its dropouts, or None.
    others: (name, class) of each other child; the activation is among them.
    """

    gate: str | None
    up: str
    down: str
    activation: str
    gate_first: bool = True
    hidden_dropout: str | None = None
    output_dropout: str | None = None
    others: tuple[tuple[str, type], ...] = ()

    def halves(self, weight):
        """(gate, up) of a weight or bias that holds both."""
        halves = weight.unflatten(0, (2, -1)).unbind()
        return halves if self.gate_first else halves[::-1]


class FeedForward(Recognised):
    """A feed-forward block of another library on our op."""

    def forward(self, *args, **kwargs):
        """(..., d_model) → (..., d_model); a block or weights that are not plain run the original forward."""
        terms = None if kwargs or len(args) != 1 else self._terms(args[0])
        if terms is None:
            return super().forward(*args, **kwargs)
        y = feed_forward(args[0], *terms[0], **terms[1])
        block = self._fastattn
        return y if block.output_dropout is None else getattr(self, block.output_dropout)(y)

    def _terms(self, x):
        """The arguments of `feed_forward` after x, or None if a child was changed, has hooks, or x does not fit."""
        block, children = self._fastattn, self._modules
        if block is None:
            return None
        layers = [children.get(name) for name in (block.gate or block.up, block.up, block.down)]
        dropout = children.get(block.hidden_dropout) if block.hidden_dropout else None
        if not (
            is_plain_input(x)
            and all(is_plain(layer, torch.nn.Linear) for layer in layers)
            and (dropout is None or is_plain(dropout, torch.nn.Dropout))
            and all(type(children.get(name)) is kind and is_plain(children[name], kind) for name, kind in block.others)
            and not must_call_children()
        ):
            return None
        gate, up, down = layers
        if x.shape[-1:] != up.weight.shape[1:]:
            return None
        tensors = [up.weight, up.bias, down.weight, down.bias]
        if autocast_dtype(x) is None and any(t is not None and t.dtype != x.dtype for t in (*tensors, gate.weight)):
            return None
        options = {"activation": block.activation, "dropout_p": dropout_p(dropout) if dropout is not None else 0.0}
        if block.gate == block.up:
            options["w_gate"], tensors[0] = block.halves(up.weight)
            if up.bias is not None:
                options["b_gate"], tensors[1] = block.halves(up.bias)
        elif block.gate is not None:
            options["w_gate"], options["b_gate"] = gate.weight, gate.bias
        return tensors, options


class _Cosine(torch.nn.Module):
    """Stands for a dropout in a twin in training: it shows where the dropout is, and draws no random numbers."""

    def forward(self, x):
        return x.cos() if self.training else x


def _written_out(block, twin, x):
    """The output of a twin, whose dropouts are `_Cosine`, by the formula."""
    up, hidden = getattr(twin, block.up)(x), None
    act = reference.ACTIVATIONS[block.activation]
    if block.gate is None:
        hidden = act(up)
    elif block.gate != block.up:
        hidden = act(getattr(twin, block.gate)(x)) * up
    else:
        gate, up = up.chunk(2, -1) if block.gate_first else up.chunk(2, -1)[::-1]
        hidden = act(gate) * up
    if block.hidden_dropout:
        hidden = getattr(twin, block.hidden_dropout)(hidden)
    y = getattr(twin, block.down)(hidden)
    return getattr(twin, block.output_dropout)(y) if block.output_dropout else y


def _candidates(module):
    """The blocks that the children of a module could form: gated ones, and those with dropout on the hidden layer."""
    linears = [name for name, child in module._modules.items() if is_linear(child)]
    dropouts = [name for name, child in module._modules.items() if type(child) is torch.nn.Dropout]
    others = tuple((n, type(c)) for n, c in module._modules.items() if n not in linears and n not in dropouts)
    sizes = {name: (module._modules[name].in_features, module._modules[name].out_features) for name in linears}
    for names in itertools.permutations(linears) if len(linears) in (2, 3) else ():
        up, down = names[-2:]
        (d_in, d_ff), (d_hidden, d_out) = sizes[up], sizes[down]
        if d_in != d_out or (len(names) == 3 and sizes[names[0]] != sizes[up]):
            continue
        if len(names) == 3 and d_ff == d_hidden:
            forms = [(names[0], True)]
        else:
            forms = [(None, True)] if d_ff == d_hidden else [(up, True), (up, False)] if d_ff == 2 * d_hidden else []
        for (gate, first), activation in itertools.product(forms, ACTIVATIONS):
            for hidden, output in itertools.permutations([*dropouts, None, None], 2):
                if set(dropouts) == {hidden, output} - {None} and (gate or hidden):
                    yield Block(gate, up, down, activation, first, hidden, output, others)


def _twin(module, block, dropout):
    """A copy with small random layers; `dropout()` stands for each of its dropouts."""
    packed = 2 if block.gate == block.up else 1
    device = module._modules[block.up].weight.device
    twin = copy.copy(module)  # shares all but the children with the module
    twin.__dict__["_modules"] = dict(module._modules)
    for name in {block.gate or block.up, block.up, block.down}:
        bias = module._modules[name].bias is not None
        sizes = (_D_FF, _D_MODEL) if name == block.down else (_D_MODEL, packed * _D_FF)
        twin._modules[name] = torch.nn.Linear(*sizes, bias=bias, device=device)
    for name in (block.hidden_dropout, block.output_dropout):
        if name:
            twin._modules[name] = dropout()
    for name, _ in block.others:
        twin._modules[name] = copy.copy(module._modules[name])
    randomise(twin)
    return twin


def find(modules: dict[str, torch.nn.Module]) -> dict[str, Change | str]:
    """A Change for each feed-forward block that can become faster, and a reason for each whose state prevents that."""
    found = {name: recognise(module) for name, module in modules.items()}
    return {name: result for name, result in found.items() if result is not None}


def recognise(module: torch.nn.Module) -> Change | str | None:
    """A Change, the reason why a block of the right layers is left alone, or None for other modules."""
    if isinstance(module, (Replaced, torch.nn.Sequential)) or not 2 <= len(module._modules) <= 6 or _has_own(module):
        return None
    blocks = list(_candidates(module))
    if not blocks:
        return None
    reason = why_not_take_over(module)
    if reason is not None:
        return reason
    try:
        with quiet(next(module.parameters()).device):
            return _recognise(module, blocks)
    except Exception as error:  # the module's own code, which runs in the check
        return f"the check failed: {type(error).__name__}: {error}"


def _has_own(module):
    """Whether a module has parameters or buffers of its own, or children with children or with other parameters."""
    if any(t is not None for t in (*module._parameters.values(), *module._buffers.values())):
        return True
    return any(
        child is None or child._modules or (not is_linear(child) and child._parameters)
        for child in module._modules.values()
    )


def _find_block(module, blocks):
    """(the block that a module computes, the input of the check), or None."""
    x = torch.randn(2, _ROWS, _D_MODEL, device=next(module.parameters()).device, dtype=torch.float32)
    for _, same_layers in itertools.groupby(blocks, lambda block: (block.gate is None, block.up, block.down)):
        same_layers = list(same_layers)
        twin = _twin(module, same_layers[0], _Cosine)
        results = [(training, run(twin.train(training), x)) for training in (True, False)]
        if any(y is None or y.shape != x.shape for _, y in results):
            continue
        for block in same_layers:
            if all(_close(y, _written_out(block, twin.train(training), x)) for training, y in results):
                return block, x
    return None


def _close(y, expected):
    return (y - expected).abs().max().item() <= 1e-5 * expected.abs().max().item()


def _recognise(module, blocks):
    found = _find_block(module, blocks)
    if found is None:
        return None
    block, x = found
    children = (guards_of_child(module, name) for name, _ in block.others)
    guards = (*guards_of(module), *itertools.chain.from_iterable(children))
    new_class = make_class(FeedForward, type(module), block, guards)
    twin = _twin(module, block, lambda: torch.nn.Dropout(0.0))

    def become():
        twin.__class__ = new_class

    if not computes_the_same(twin, become, x, halves_of(module)):
        return "our op gives different numbers from its forward"
    what = f"{'gated ' if block.gate else ''}feed-forward, {block.activation} (was {type(module).__name__})"
    return change_class(module, new_class, what)
