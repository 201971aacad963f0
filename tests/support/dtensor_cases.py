"""Computations on DTensors in two processes, compared with one process on plain tensors: what all cases share.

The cases are in dtensor_op_cases.py and dtensor_layer_cases.py. `main` runs all CASES in two processes of gloo and
writes the failures of each process, by case. A placement is written R, S0, S1, ... or P; those of a call as
"x=S0 weight=S1". Inputs that are not named are R.
"""

import datetime
import importlib
import json
import re
import sys
import tempfile
import traceback
import warnings

import pytest
import torch
import torch.nn.functional as F

import fastattn

CASES = {}  # name -> function without arguments, run in every process


def case(name, *arguments):
    """Register a function, which is called with `arguments`, as the case of this name."""

    def register(function):
        assert name not in CASES, name
        CASES[name] = lambda: function(*arguments)
        return function

    return register


def mesh(*shape):
    """The mesh of both processes, created once."""
    from torch.distributed.tensor import init_device_mesh

    shape = shape or (2,)
    if shape not in _meshes:
        names = ("dp", "tp") if len(shape) == 2 else ("tp",)
        _meshes[shape] = init_device_mesh("cpu", shape, mesh_dim_names=names)
    return _meshes[shape]


_meshes = {}
_linear_takes = {}


def placement(text):
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Shard(int(text[1:])) if text[0] == "S" else Partial() if text == "P" else Replicate()


def distribute(tensor, *places, on=None):
    """A DTensor with memory of its own and the given placements, R by default."""
    from torch.distributed.tensor import distribute_tensor

    on = on or mesh()
    placements = [placement(text) for text in places or ("R",) * on.ndim]
    return distribute_tensor(tensor.detach().clone(), on, placements).requires_grad_(tensor.requires_grad)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_close(found, expected, label="", rtol=1e-4, atol=2e-5):
    torch.testing.assert_close(whole(found), whole(expected), rtol=rtol, atol=atol, msg=lambda text: f"{label}: {text}")


def same_gradients(found, expected):
    """Compare the gradients of two modules."""
    expected = dict(expected.named_parameters())
    for name, parameter in found.named_parameters():
        assert_close(parameter.grad, expected[name].grad, name)


def tensors_of(**shapes):
    """Tensors of random numbers that require gradients and are equal in all processes."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def compare(function, tensors, plan, on=None):
    """Check that outputs and gradients of a function of DTensors are those of plain tensors; return the outputs."""
    plain = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    places = dict(entry.split("=") for entry in plan.split())
    sharded = {
        name: distribute(t, *places[name].split(","), on=on) if name in places else distribute(t, on=on)
        for name, t in tensors.items()
    }
    outputs = []
    for inputs in (plain, sharded):
        found = function(**inputs)
        outputs.append(found if isinstance(found, tuple) else (found,))
    generator = torch.Generator().manual_seed(1)
    losses = [0, 0]
    for expected, found in zip(*outputs, strict=True):
        assert_close(found, expected, "output")
        weight = torch.randn(expected.shape, generator=generator)
        losses[0] = losses[0] + (expected * weight).sum()
        losses[1] = losses[1] + (found * distribute(weight, on=on)).sum()
    for loss in losses:
        loss.backward()
    for name, t in plain.items():
        if t.grad is not None:
            assert_close(sharded[name].grad, t.grad, f"gradient of {name}")
    return outputs[1]


def places_of(tensor):
    return ",".join(f"S{p.dim}" if p.is_shard() else "P" if p.is_partial() else "R" for p in tensor.placements)


def distribute_all(module, on=None):
    from torch.distributed.tensor import distribute_module

    return distribute_module(module, on or mesh())


def linear_takes(place):
    """Whether torch's projections, which our layers use, accept an activation that is divided like this."""
    if place not in _linear_takes:
        x, weight = (
            distribute(torch.ones(4, 6, 8), place).requires_grad_(),
            distribute(torch.ones(8, 8)).requires_grad_(),
        )
        try:
            whole(F.linear(x, weight)).sum().backward()
            _linear_takes[place] = True
        except RuntimeError:  # before 2.13 a sequence in parts
            _linear_takes[place] = False
    return _linear_takes[place]


def taken(*places):
    return [place for place in places if linear_takes(place)]


def raises(kind, text):
    return pytest.raises(kind, match=re.escape(text))


def _run(rank, store, results):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    failures = {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            function()
        except pytest.skip.Exception as reason:
            failures[name] = f"skip: {reason}"
        except Exception:
            failures[name] = traceback.format_exc()
    with open(f"{results}.{rank}", "w", encoding="utf-8") as file:
        json.dump(failures, file)
    torch.distributed.destroy_process_group()


def main(results):
    x = torch.randn(2, 3, 4, 8)
    fastattn.layer_norm(fastattn.attention(x, x, torch.nn.Parameter(x))).sum().backward()
    assert "torch.distributed.tensor" not in sys.modules, "a plain call imports what DTensors need"

    for module in ("torch.distributed.fsdp", "torch.distributed.tensor.parallel"):
        importlib.import_module(module)  # once for both processes
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(_run, (f"{folder}/store", results), nprocs=2, start_method="fork")
