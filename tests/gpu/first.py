"""One call of each family of kernels, forward and backward, against PyTorch: what to run first on a new GPU.

    python tests/gpu/first.py           every family with every backend that is available, as a table (about 2 minutes)
    python tests/gpu/first.py --rows    Triton's attention for every row of its table instead, head dim 32 first

`pytest tests/gpu` runs the same calls, and prints the same table at the end. The exit code is 1 if a result is wrong.
A result is right if its largest error against fp64 is at most 5 times that of the reference in PyTorch in the same
dtype, plus two roundings.
"""

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

import fastattn
from fastattn.ops._backends import Answer, Question

BACKENDS = ("native", "triton")
BF16 = torch.bfloat16
COMPUTES_NOTHING = "PyTorch's own product of two matrices is wrong here"
Inputs = dict[str, torch.Tensor]


class Family(NamedTuple):
    """A public call: the shapes of its inputs, those that get no gradient, and the function of inputs and backend."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    call: Callable[..., torch.Tensor]
    fixed: Callable[[], Inputs] = dict
    dtype: torch.dtype = BF16
    grad: bool = True


class Row(NamedTuple):
    """A line of the table. `seconds` includes compilation. The result is right if `failure` is empty."""

    family: str
    backend: str
    seconds: float
    error: float
    allowed: float
    failure: str


def attention(name, head_dim=64, seqlen=200, heads=4, kv_heads=2, dtype=BF16, fixed=dict, **options):
    shapes = {"q": (2, heads, seqlen, head_dim), "k": (2, kv_heads, seqlen, head_dim)}
    return Family(name, shapes | {"v": shapes["k"]}, lambda **x: fastattn.attention(**x, **options), fixed, dtype)


def slopes():
    return {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625])}


def packed():
    ends = torch.tensor([0, 7, 150, 200], dtype=torch.int32)
    return {"cu_seqlens_q": ends, "cu_seqlens_k": ends}


def cache():
    return {"cache_seqlens": torch.tensor([3, 250], dtype=torch.int32)}


def pages():
    return cache() | {"block_table": torch.randperm(8, generator=torch.Generator().manual_seed(0)).int().view(2, 4)}


def target():
    return {"target": torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(0))}


def decode(name, keys, fixed, options=None, **new):
    shapes = {"q": (2, 4, 1, 64), "k_cache": keys, "v_cache": keys, **new}
    return Family(name, shapes, lambda **x: fastattn.attention_decode(**x, **(options or {})), fixed, grad=False)


def tables():
    angles = torch.arange(50 * 32.0).view(50, 32)
    return {"cos": angles.cos(), "sin": angles.sin()}


def rotary(x, cos, sin, backend, **options):
    return fastattn.rotary_embedding(x, cos.float(), sin.float(), backend=backend, **options)


CACHE = (2, 2, 256, 64)
ROW = {"x": (65, 1000), "residual": (65, 1000), "weight": (1000,)}
FAMILIES = (
    attention("attention"),
    attention("attention, causal, head dim 128", 128, causal=True),
    attention("attention, window, head dim 40", 40, causal=True, window=(50, 0)),
    attention("attention, head dim 256", 256),
    attention("attention, dropout and softcap", dropout_p=0.2, softcap=5.0),
    attention("attention, fp32", 32, dtype=torch.float32),
    attention("attention, packed", causal=True, fixed=packed)._replace(
        shapes={"q": (200, 4, 64), "k": (200, 2, 64), "v": (200, 2, 64)}
    ),
    attention("attention, deterministic", causal=True, deterministic=True),
    decode("attention on a cache", CACHE, cache),
    decode("attention on a cache with new keys", CACHE, cache, k=(2, 2, 1, 64), v=(2, 2, 1, 64)),
    decode("attention on pages", (8, 2, 64, 64), pages, {"num_splits": 3}),
    Family("layer_norm", ROW | {"bias": (1000,)}, lambda **x: fastattn.layer_norm(**x, dropout_p=0.2)),
    Family("layer_norm, wide", {"x": (5, 20000), "weight": (20000,)}, lambda **x: fastattn.layer_norm(**x)),
    Family("rms_norm", ROW, lambda **x: fastattn.rms_norm(**x)),
    Family("dropout", {"x": (65, 1000), "residual": (65, 1000)}, lambda **x: fastattn.dropout(**x, dropout_p=0.3)),
    Family("rotary_embedding", {"x": (2, 4, 50, 64)}, rotary, tables),
    Family("rotary_embedding in place", {"x": (2, 4, 50, 64)}, lambda x, **o: rotary(x * 1, inplace=True, **o), tables),
    Family("feed_forward", {"x": (65, 64), "w1": (128, 64), "b1": (128,), "w2": (64, 128), "b2": (64,)},
           lambda **x: fastattn.feed_forward(**x, activation="gelu", dropout_p=0.1)),
    Family("linear_cross_entropy", {"x": (300, 64), "weight": (1000, 64)},
           lambda **x: fastattn.linear_cross_entropy(**x), target),
)  # fmt: skip


def rows_of_the_table() -> Iterator[Family]:
    """A call for each row of the table of Triton's attention: the four kinds of call, both sizes of elements."""
    kinds = {"full": {}, "causal": {"causal": True}, "extra": {"causal": True, "softcap": 5.0, "dropout_p": 0.1},
             "alibi": {"causal": True, "softcap": 5.0, "fixed": slopes}}  # fmt: skip
    for head_dim in (32, 64, 128, 256):
        for dtype in (BF16, torch.float16, torch.float32):
            for kind, options in kinds.items():
                name = f"attention, head dim {head_dim}, {kind}, {str(dtype).removeprefix('torch.')}"
                yield attention(name, head_dim, 300, dtype=dtype, **options)


def inputs(family: Family, device: str, dtype: torch.dtype) -> Inputs:
    """Random inputs, the same values in every dtype as far as it can hold them."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in family.shapes.items():
        scale = 1 / math.sqrt(shape[-1]) if name.startswith("w") and len(shape) > 1 else 1.0
        values = (torch.randn(shape, generator=generator) * scale).to(family.dtype)
        made[name] = values.to(device, dtype).requires_grad_(family.grad)
    return made | {name: t.to(device) for name, t in family.fixed().items()}


def results(family: Family, device: str, dtype: torch.dtype, backend: str) -> list[torch.Tensor]:
    """The output and the gradients of all inputs, in fp64 on the CPU."""
    given = inputs(family, device, dtype)
    torch.manual_seed(1)  # dropout drops the same elements with every backend
    out = family.call(**given, backend=backend)
    found = [out]
    if family.grad:
        weights = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape).to(out.dtype)
        wanted = [t for t in given.values() if t.requires_grad]
        found += torch.autograd.grad((out * weights).sum(), wanted)
    return [t.detach().double().cpu() for t in found]


def compare(family: Family, backend: str, device: str) -> Row:
    """Run a family with a backend and compare it with the reference, in its dtype and in fp64."""
    started = time.perf_counter()
    try:
        got = results(family, device, family.dtype, backend)
        seconds = time.perf_counter() - started
        exact = results(family, device, torch.float64, "reference")
        baseline = results(family, device, family.dtype, "reference")
    except Exception as error:  # a line of the report, whatever a driver or compiler raises
        return Row(family.name, backend, time.perf_counter() - started, math.nan, math.nan, f"{error!r}"[:300])
    worst, failure = (0.0, 0.0), ""
    for number, (ours, true, theirs) in enumerate(zip(got, exact, baseline, strict=True)):
        error = (ours - true).abs().max().item()
        allowed = (
            5 * (theirs - true).abs().max().item() + 2 * (true.to(family.dtype).double() - true).abs().max().item()
        )
        if not error <= allowed and not failure:  # NaN is wrong too
            failure, worst = f"result {number}: error {error:.2e}, allowed {allowed:.2e}", (error, allowed)
        elif not failure and error * worst[1] >= worst[0] * allowed:
            worst = (error, allowed)
    return Row(family.name, backend, seconds, *worst, failure)


def computes(device: str) -> bool:
    """Whether the device computes at all: PyTorch's own product of integers, whose trace is known.

    The calls are compared with the reference on the same device, so launches that do nothing would pass unnoticed.
    """
    x = torch.arange(64.0).view(8, 8).to(device)
    return (x @ x).trace().item() == sum((8 * i + j) * (8 * j + i) for i in range(8) for j in range(8))


def available(device: str) -> list[str]:
    reasons = fastattn.backends()[device]
    return [name for name in BACKENDS if reasons[name] == "available"]


def refused(family: Family, backend: str, device: str) -> str:
    """Why the backend does not serve the family on this device, such as Hopper's kernels on another GPU, or ""."""
    try:
        with torch.no_grad():
            family.call(**inputs(family, device, family.dtype), backend=Question(backend))
    except Answer as answer:
        found = re.search(rf"{backend}: (?!runs)(.*)", str(answer))
        return found[1] if found else ""
    except ValueError as error:
        return str(error)
    return ""


def environment(device: str) -> str:
    """One line that names the machine."""
    gpu = "no GPU" if device == "cpu" else torch.cuda.get_device_name()
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "not installed"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {version}"
    return f"{gpu}, {versions}, fastattn {fastattn.__version__}"


def table(rows: list[Row], device: str) -> str:
    """The report: one line per call."""
    lines = [environment(device), "", f"{'call':44} {'backend':8} {'s':>6} {'error':>9} {'allowed':>9}"]
    for row in rows:
        numbers = f"{row.seconds:6.1f} {row.error:9.1e} {row.allowed:9.1e}"
        lines.append(f"{row.family:44} {row.backend:8} {numbers} {row.failure or 'right'}")
    wrong = sum(bool(row.failure) for row in rows)
    return "\n".join([*lines, "", f"{len(rows) - wrong} right, {wrong} wrong"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", action="store_true", help="every row of the table of Triton's attention")
    parser.add_argument("--device", default="cuda", help="cuda; cpu tests this file")
    options = parser.parse_args(arguments)
    if not computes(options.device):
        print(f"{environment(options.device)}: {COMPUTES_NOTHING}")
        return 1
    rows = []
    for family in rows_of_the_table() if options.rows else FAMILIES:
        for backend in ["triton"] if options.rows else available(options.device):
            if not refused(family, backend, options.device):
                rows.append(compare(family, backend, options.device))
                print(rows[-1].family, backend, rows[-1].failure or "right", flush=True)
    print("\n" + table(rows, options.device))
    return int(not rows or any(row.failure for row in rows))


if __name__ == "__main__":
    sys.exit(main())
