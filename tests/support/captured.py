"""What a call of a Triton launcher does besides launching, as a capture into a CUDA graph would see it, without a GPU.

The tensors are fake ones on "cuda": they have no values, so reading one, which would wait for the GPU, raises. Every op
of PyTorch that the launcher calls is recorded with the devices of its results: memory on the GPU comes from PyTorch's
allocator, which takes it from the pool of the graph, and anything on the CPU would have to be copied. Kernels are not
launched; launches.py says what Triton's own launcher does. Tests run this file in a process of its own:

    python tests/support/captured.py '[{"call": "norm", "arguments": {...}}, ...]'
"""

import contextlib
import json
import sys

import compilations
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# they wait for the GPU even where no value is read
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2", "item"}


class Recorded(TorchDispatchMode):
    """The ops of a call that a capture would not allow, and the number of tensors that were made."""

    def __init__(self):
        super().__init__()
        self.forbidden, self.made, self.launched = [], 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        results = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        devices = {t.device.type for t in tensors} - {"meta"}  # layouts are computed on meta tensors
        if name in WAITING or devices - {"cuda"}:
            self.forbidden.append(f"{name} on {', '.join(sorted(devices)) or 'no device'}")
        self.made += len(tensors)
        return results


def recorded(case):
    """Return the case with what its launchers did. Its tensors are made before the recording begins."""
    from triton.runtime.jit import JITFunction

    mode, call, launch = Recorded(), compilations.call, JITFunction.run

    def call_recorded(op, **values):
        with mode:
            return call(op, **values)

    compilations.call = call_recorded
    JITFunction.run = lambda kernel, *args, **constants: mode.launched.append(kernel.__name__)
    fault = None
    try:
        with FakeTensorMode(), torch.device("cuda"):
            compilations.CALLS[case["call"]](**case["arguments"])
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    finally:
        compilations.call, JITFunction.run = call, launch
    return {**case, "forbidden": mode.forbidden, "made": mode.made, "launched": mode.launched, "fault": fault}


def main(cases):
    compilations.pretend(90)
    common, call = compilations.kernels("common"), compilations.kernels("attention_call")
    common.device_guard = lambda device: contextlib.nullcontext()
    common._multiprocessors = lambda index: 132
    call.descriptors_fit = lambda *tensors: False  # fake tensors have no address
    print(json.dumps([recorded(case) for case in cases]))


def run(cases):
    """Return the cases with what was recorded, from a separate process."""
    return compilations.run(json.dumps(cases), script=__file__)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
