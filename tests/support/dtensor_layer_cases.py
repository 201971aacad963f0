"""Layers on DTensors: ours in two processes, those of torch.nn in one."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from dtensor_cases import (
    assert_close,
    case,
    distribute,
    distribute_all,
    linear_takes,
    mesh,
    placement,
    places_of,
    raises,
    same_gradients,
    taken,
    tensors_of,
    whole,
)

from fastattn import nn


def pair(name, *arguments, **options):
    """The same module of torch.nn and of ours."""
    modules = []
    for namespace in (torch.nn, nn):
        torch.manual_seed(3)
        modules.append(getattr(namespace, name)(*arguments, **options))
    return modules


def compare_modules(expected, found, inputs, place, call=None, on=None):
    """Compare outputs and all gradients. place None passes plain tensors. Returns the placements of the output."""
    inputs = [t.detach() for t in inputs]
    call = call or (lambda module, *tensors: module(*tensors))
    plain = [t.clone().requires_grad_() for t in inputs]
    given = [
        t.clone().requires_grad_() if place is None else distribute(t, *place.split(","), on=on).requires_grad_()
        for t in inputs
    ]
    results = []
    for module, tensors in ((expected, plain), (found, given)):
        module.zero_grad()
        out = call(module, *tensors)
        out = out if isinstance(out, tuple) else (out,)
        results.append(out)
        sum(whole(t).square().sum() for t in out if t is not None).backward()
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(b, a, "output")
    for a, b in zip(plain, given, strict=True):
        assert_close(b.grad, a.grad, "gradient of an input")
    same_gradients(found, expected)
    return places_of(results[1][0]) if place is not None else None


SEQUENCES = tuple(tensors_of(a=(4, 6, 8), b=(4, 4, 8)).values())
BATCH_FIRST = {"batch_first": True}
LAYERS = {
    "LayerNorm": (("LayerNorm", 8), {}, 1, None),
    "LayerNorm of two dimensions": (("LayerNorm", (6, 8)), {}, 1, None),
    "RMSNorm": (("RMSNorm", 8), {}, 1, None),
    "MultiheadAttention": (("MultiheadAttention", 8, 2), BATCH_FIRST, 2, lambda m, x, y: m(x, y, y)),
    "MultiheadAttention without weights": (
        ("MultiheadAttention", 8, 2), BATCH_FIRST | {"add_bias_kv": True, "add_zero_attn": True}, 1,
        lambda m, x: m(x, x, x, need_weights=False),
    ),
    "TransformerEncoderLayer": (("TransformerEncoderLayer", 8, 2, 16, 0.0), BATCH_FIRST, 1, None),
    "TransformerEncoderLayer, norm first": (
        ("TransformerEncoderLayer", 8, 2, 16, 0.0, F.gelu), BATCH_FIRST | {"norm_first": True}, 1, None,
    ),
    "TransformerDecoderLayer": (("TransformerDecoderLayer", 8, 2, 16, 0.0), BATCH_FIRST, 2, None),
    "TransformerDecoderLayer, norm first": (
        ("TransformerDecoderLayer", 8, 2, 16, 0.0), BATCH_FIRST | {"norm_first": True}, 2, None,
    ),
    "Transformer": (("Transformer", 8, 2, 1, 1, 16, 0.0), {}, 2, lambda m, x, y: m(x.mT.mT, y[:, :6])),
}  # fmt: skip


def run_layer(arguments, options, count, call):
    sequences = SEQUENCES[:count]
    if arguments[0] == "Transformer":  # the sequence first
        sequences = [t.transpose(0, 1).contiguous() for t in sequences]
    places = ("R", "S0", "S1", "S2")
    for place in places if "Norm" in arguments[0] else taken(*places):
        expected, found = pair(*arguments, **options)
        compare_modules(expected, distribute_all(found), sequences, place, call)


for _name, _arguments in LAYERS.items():
    case(f"distribute_module: {_name}", *_arguments)(run_layer)


@case("distribute_module: evaluation")
def evaluated():
    for norm_first in (False, True):
        expected, found = (
            m.eval() for m in pair("TransformerEncoderLayer", 8, 2, 16, batch_first=True, norm_first=norm_first)
        )
        distribute_all(found)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                for place in taken("R", "S0", "S1"):
                    assert_close(found(distribute(SEQUENCES[0], place)), expected(SEQUENCES[0]))


@case("distribute_module: masks")
def masked():
    expected, found = pair("MultiheadAttention", 8, 2, batch_first=True)
    distribute_all(found)
    x = SEQUENCES[0].detach()
    hidden = torch.ones(6, 6, dtype=torch.bool).triu_(1)
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[1, 4:] = True
    for attn_mask in (hidden, torch.randn(8, 6, 6, generator=torch.Generator().manual_seed(4))):
        for key_padding_mask in (None, padding, padding * -3.0):
            for prepare in (lambda mask: mask, distribute):  # plain tensors are equal in all processes
                for need_weights in (False, True):
                    masks = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask}
                    given = {name: None if mask is None else prepare(mask) for name, mask in masks.items()}
                    for place in taken("S0", "S1"):
                        y = distribute(x, place)
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            wanted = expected(x, x, x, **masks, need_weights=need_weights)
                        got = found(y, y, y, **given, need_weights=need_weights)
                        assert_close(got[0], wanted[0])
                        if need_weights:
                            assert_close(got[1], wanted[1])
    stack = distribute_all(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2))
    causal = torch.nn.Transformer.generate_square_subsequent_mask(6)
    for place in ("R", "S0"):
        x1 = distribute(x, place)
        assert_close(stack(x1, causal), stack(x1, is_causal=True))
        assert_close(stack(x1, distribute(causal)), stack(x1, is_causal=True))


def plans():
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
    )

    sequence, everywhere = placement("S1"), placement("R")
    tensor = {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()}
    norms = {"norm1": SequenceParallel(), "norm2": SequenceParallel()}
    rows = {
        "linear1": ColwiseParallel(input_layouts=sequence),
        "linear2": RowwiseParallel(output_layouts=sequence, use_local_output=False),
    }
    gathered = PrepareModuleInput(
        input_layouts=(sequence,) * 3, desired_input_layouts=(everywhere,) * 3, use_local_output=False
    )
    return {
        "tensor": (tensor, None),
        "tensor, with out_proj": (tensor | {"self_attn.out_proj": RowwiseParallel(input_layouts=everywhere)}, None),
        "sequence": (norms | rows, "S1"),
        "sequence, gathered for attention": (norms | rows | {"self_attn": gathered}, "S1"),
        "norms": (norms, "S1"),
    }


def parallelize(layer, plan, on):
    from torch.distributed.tensor.parallel import parallelize_module

    layer = parallelize_module(layer, on, plan)
    if "norm1" in plan:  # activations are DTensors everywhere
        distribute_all(layer.self_attn, on)
        if "linear1" not in plan:
            distribute_all(layer.linear1, on)
            distribute_all(layer.linear2, on)
    return layer


def run_plan(name, norm_first):
    plan, place = plans()[name]
    if place == "S1" and not linear_takes(place):
        pytest.skip("torch.nn.Linear takes no sequence in parts")
    expected, found = pair("TransformerEncoderLayer", 8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    compare_modules(expected, parallelize(found, plan, mesh()), SEQUENCES[:1], place)


for _name in ("tensor", "tensor, with out_proj", "sequence", "sequence, gathered for attention", "norms"):
    for _norm_first in (False, True):
        case(f"parallelize_module: {_name}, norm_first={_norm_first}", _name, _norm_first)(run_plan)


@case("parallelize_module: SequenceParallel takes plain tensors")
def sequence_parallel_norms():
    from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module

    for name in ("LayerNorm", "RMSNorm"):
        expected, found = (torch.nn.Sequential(module) for module in pair(name, 8))
        parallelize_module(found, mesh(), {"0": SequenceParallel()})
        x = SEQUENCES[0].detach()
        y = found(x.chunk(2, 1)[torch.distributed.get_rank()].contiguous())
        assert places_of(y) == "S1"
        assert_close(y, expected(x))
        whole(y).square().sum().backward()
        expected(x).square().sum().backward()
        same_gradients(found, expected)


def run_feed_forward(gated):
    from torch.distributed.tensor import distribute_module
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    expected = nn.FeedForward(8, 16, activation="silu", gated=gated)
    plan = {"linear1": ColwiseParallel(), "linear2": RowwiseParallel()} | ({"gate": ColwiseParallel()} if gated else {})
    compare_modules(expected, parallelize_module(copy.deepcopy(expected), mesh(), plan), SEQUENCES[:1], None)

    def divide(name, module, _):
        for label, parameter in list(module.named_parameters(recurse=False)):
            place = "S0" if name != "linear2" else "S1" if label == "weight" else "R"
            module.register_parameter(label, torch.nn.Parameter(distribute(parameter, place).detach()))

    found = distribute_module(copy.deepcopy(expected), mesh(), divide)  # without hooks, so that the fused op runs
    for place in ("R", "S0"):
        compare_modules(expected, found, SEQUENCES[:1], place)


for _gated in (False, True):
    case(f"FeedForward, gated={_gated}", _gated)(run_feed_forward)


@case("fully_shard and tensor parallelism together")
def sharded_twice():
    from torch.distributed.fsdp import fully_shard

    if not linear_takes("S1"):
        pytest.skip("torch.nn.Linear takes no sequence in parts")
    for shape in ((1, 2), (2, 1)):
        both = mesh(*shape)
        plan, _ = plans()["sequence"]
        expected, found = pair("TransformerEncoderLayer", 8, 2, 16, 0.0, batch_first=True)
        fully_shard(parallelize(found, plan, both["tp"]), mesh=both["dp"])
        compare_modules(expected, found, SEQUENCES[:1], "S1", on=both["tp"])


@case("torch.compile")
def compiled():
    for place, dropout in zip(taken("S0", "S1"), (0.0, 0.1), strict=False):
        torch.compiler.reset()
        expected, found = pair("TransformerEncoderLayer", 8, 2, 16, dropout, batch_first=True)
        distribute_all(found)
        layer = torch.compile(found, backend="aot_eager", fullgraph=True)
        if dropout:
            layer(distribute(SEQUENCES[0], place)).sum().backward()
        else:
            compare_modules(expected, found, SEQUENCES[:1], place, lambda m, x: (layer if m is found else m)(x))  # noqa: B023


@case("torch.export")
def exported():
    module = distribute_all(nn.LayerNorm(8))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), raises(NotImplementedError, "torch.export does not support DTensors"):
            torch.export.export(module, (distribute(torch.randn(4, 8)),), strict=False)


@case("need_weights after dropout")
def dropped_weights():
    layer = distribute_all(nn.MultiheadAttention(8, 2, 0.5, batch_first=True))
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    for place in taken("R", "S0", "S1"):
        found = distribute(x, place)
        out, weights = layer(found, found, found, average_attn_weights=False)
        value = F.linear(x, whole(layer.in_proj_weight)[16:], whole(layer.in_proj_bias)[16:]).unflatten(-1, (2, 4))
        heads = (whole(weights) @ value.transpose(1, 2)).transpose(1, 2).flatten(2)
        assert_close(out, F.linear(heads, whole(layer.out_proj.weight), whole(layer.out_proj.bias)))
        assert (whole(weights) == 0).any()
