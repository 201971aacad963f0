"""The header of a run names the package, the versions and the backends. The fixtures run a test on each backend.

FASTATTN_REQUIRE=native,triton makes an absent backend a failure instead of a skip.
"""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    # must be set before the kernels are imported, so that they run on CPU tensors
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastattn
from fastattn.ops._backends import BACKENDS, use_backend, why_not, why_not_available

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreter

    interpreter.speed_up()

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _triton_version():
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__ + (" (interpreter)" if os.environ.get("TRITON_INTERPRET") == "1" else "")


def pytest_report_header():
    lines = [
        f"fastattn {fastattn.__version__} from {os.path.dirname(fastattn.__file__)}",
        f"torch {torch.__version__}, triton {_triton_version()}, {torch.get_num_threads()} threads",
    ]
    for device in DEVICES:
        states = (f"{name}: {why_not_available(name, device) or 'available'}" for name in BACKENDS)
        lines.append(f"backends on {device}: " + "; ".join(states))
    return lines


def pytest_configure():
    for name in filter(None, os.environ.get("FASTATTN_REQUIRE", "").split(",")):
        if name not in BACKENDS:
            raise pytest.UsageError(f"FASTATTN_REQUIRE: expected names among {', '.join(BACKENDS)}, got {name!r}")
        reasons = [why_not_available(name, device) for device in DEVICES]
        if None not in reasons:
            raise pytest.UsageError(f"FASTATTN_REQUIRE={name}, but it is not available: {'; '.join(reasons)}")


SEED = 8191  # no test uses this seed: a draw after torch.manual_seed(0) must differ from a draw before it


def pytest_collectstart(collector):
    """A test file is imported with the same random state in every run, alone or with others."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def same_numbers_in_every_run():
    """Each test starts with the same random state."""
    torch.manual_seed(SEED)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def _need(backend, device, op):
    """Skip if a backend cannot run the op that the test module names, or fail if FASTATTN_REQUIRE names the backend."""
    reason = why_not(op, backend, (device, torch.float32)) if op else why_not_available(backend, device)
    if reason is not None:
        required = backend in os.environ.get("FASTATTN_REQUIRE", "").split(",") and device == DEVICES[-1]
        # on the CPU every backend has every op; on a GPU some ops have no native kernel even in a complete build
        absent = device == "cpu" or why_not_available(backend, device) is not None
        (pytest.fail if required and absent else pytest.skip)(reason)


@pytest.fixture(params=BACKENDS)
def backend(request, device):
    """Runs the test once on every backend that can run OP of its module, with that backend selected."""
    _need(request.param, device, getattr(request.module, "OP", None))
    with use_backend(request.param):
        yield request.param


@pytest.fixture(params=("native", "triton"))
def raw_backend(request, device):
    """The name of each backend with raw ops, for tests that call raw ops."""
    _need(request.param, device, getattr(request.module, "OP", None))
    return request.param


@pytest.fixture
def interpreted(request, device):
    """Whether the backend under test is Triton's interpreter: slow, and its bfloat16 stores truncate."""
    names = {"backend", "raw_backend"} & set(request.fixturenames)
    return device == "cpu" and any(request.getfixturevalue(name) == "triton" for name in names)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request, interpreted):
    if interpreted and request.param == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates bfloat16 where a device rounds")
    return request.param
