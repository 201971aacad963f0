"""Side-by-side benchmarks: every candidate of a test is verified, then timed interleaved with the others.

The `compare` fixture runs the candidates of one test round by round in rotating order, so that clock drift and noisy
neighbours affect all of them equally. The candidates of a test are the pytest-benchmark records of one group, so its
tables, --benchmark-json and --benchmark-compare work. The percentages refer to peak rates measured in the same session.
"""

import functools
import importlib.util
import os
import statistics
import time
import types
from pathlib import Path

import pytest
import torch
from measured import facts_of, row_of, write
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.utils import NameWrapper, get_commit_info

import fastattn
from fastattn.ops import _gemm
from fastattn.ops._backends import why_not_on_device

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def backend_of_raw_op(op):
    """The first backend that has a kernel of `op` here: an available library need not have every op."""
    return next(name for name in ("native", "triton") if why_not_on_device(op, name, DEVICE) is None)


class CudaStamp:
    """A point in time of the GPU; pytest-benchmark only computes end - start, so a timer may return an object."""

    __slots__ = ("event",)

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start):
        self.event.synchronize()
        return start.event.elapsed_time(self.event) * 1e-3  # seconds


TIMER = CudaStamp if CUDA else time.perf_counter


def device_name():
    return torch.cuda.get_device_name() if CUDA else f"cpu, {torch.get_num_threads()} threads"


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def pytest_addoption(parser):
    parser.addoption(
        "--cpu-time",
        action="store_true",
        help="measure the processor time of one thread, robust on busy machines",
    )
    parser.addoption(
        "--pictures",
        metavar="DIR",
        type=Path,
        help="write an SVG and a PNG for each benchmark function into DIR, and results.jsonl with all rows",
    )


def pytest_configure(config):
    if config.getoption("--pictures") and importlib.util.find_spec("matplotlib") is None:
        raise pytest.UsageError("--pictures needs matplotlib: run pip install matplotlib")
    global TIMER
    if not config.getoption("--benchmark-compare"):  # the summary below has the same numbers
        config.option.benchmark_quiet = True
    if not CUDA and config.getoption("--cpu-time"):
        TIMER = time.process_time
        torch.set_num_threads(1)
    elif not CUDA and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(config, items):
    """Without timing, leave out what takes PyTorch most of the run on a CPU without bf16 instructions."""
    if not config.getoption("--benchmark-disable") or CUDA or fastattn.cpu_capability() in ("avx512bf16", "amx"):
        return
    reason = "without bf16 instructions PyTorch takes seconds for these products; the smaller widths test the same code"
    files = ("test_layers.py", "test_feed_forward.py")
    for item in items:
        if item.path.name in files and "bf16" in item.name and "-512-" in item.name:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_report_header(config):
    return (
        f"fastattn {fastattn.__version__} on torch {torch.__version__}, {device_name()}: {fastattn.backends()[DEVICE]}"
    )


@pytest.fixture(scope="session")
def flush_cache():
    """Evicts the GPU's L2 cache between rounds."""
    if not CUDA:
        return lambda: None
    cache_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return torch.empty(2 * cache_bytes // 4, dtype=torch.int32, device="cuda").zero_


def fastest(fn, rounds=10):
    fn()
    times = []
    for _ in range(rounds):
        start = TIMER()
        fn()
        times.append(TIMER() - start)
    return min(times)


@functools.cache
def copy_rate(nbytes):
    """Return the bytes per second, read plus written, of a copy that moves `nbytes` and so fits the same CPU caches.

    On a GPU, whose cache is flushed between rounds, the copy is 1 GiB.
    """
    x = torch.ones((2**30 if CUDA else max(nbytes // 2, 4)) // 4, device=DEVICE)
    y = torch.ones_like(x)
    return 2 * x.nbytes / fastest(lambda: y.copy_(x), rounds=30)


@functools.cache
def gemm_rate(dtype):
    """Return the FLOP per second of a large square product: the best of PyTorch and, on a CPU in fp32, oneDNN and ours.

    On a CPU without products of `dtype`, the fp32 rate is returned.
    """
    n = 8192 if CUDA else 1024
    a, b = torch.randn(2, n, n, dtype=dtype, device=DEVICE)
    if dtype == torch.float32:
        products = [torch.matmul]
        if not CUDA:
            products += [_gemm.input_grad]
            if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
                products += [lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")]
        return 2 * n**3 / min(fastest(lambda product=product: product(a, b)) for product in products)
    return max(2 * n**3 / fastest(lambda: a @ b, rounds=3), 0 if CUDA else gemm_rate(torch.float32))


class Candidate:
    def __init__(self, name, fn, node, session, group):
        self.name, self.fn = name, fn
        stand_in = types.SimpleNamespace(name=name, nodeid=f"{node.nodeid}::{name}", warn=node.warn)
        if hasattr(node, "callspec"):
            stand_in.callspec = node.callspec
        options = dict(session.options, group=group, timer=NameWrapper(TIMER))
        self.fixture = BenchmarkFixture(
            stand_in,
            add_stats=session.benchmarks.append,
            logger=session.logger,
            warner=node.warn,
            disabled=False,
            **options,
        )
        self.fixture._mode = "compare"
        self.record = self.fixture._make_stats(1)

    def run_round(self):
        start = TIMER()
        self.fn()
        self.record.update(TIMER() - start)

    def median(self):
        return statistics.median(self.record.stats.data)

    def least(self):
        return min(self.record.stats.data)


def verify_equal(results, tolerance):
    """Check that every candidate's result (a tensor or tensors) equals the first one's."""
    names = list(results)
    for name in names[1:]:
        torch.testing.assert_close(
            results[name],
            results[names[0]],
            rtol=tolerance,
            atol=tolerance,
            check_dtype=False,
            check_stride=False,
            msg=lambda text, name=name: f"{name} differs from {names[0]}: {text}",
        )


def without_compiled(candidates):
    """The candidates of a run without timing. Compiling the others takes most of its time and tests nothing of ours."""
    return candidates and {name: fn for name, fn in candidates.items() if not name.startswith("torch.compile")}


def choose_rounds(candidates, seconds, max_rounds):
    start = time.perf_counter()
    for candidate in candidates:
        candidate.fn()
    synchronize()
    elapsed = max(time.perf_counter() - start, 1e-6)
    return int(min(max_rounds, max(7, seconds * len(candidates) / elapsed)))


@pytest.fixture
def compare(request, flush_cache):
    """compare({"torch": f, "fastattn": g}, verify=..., ...): the first name is the baseline of the ratios.

    Args of the returned function:
        candidates: name -> callable without arguments.
        verify: name -> callable whose result must equal the first one's; the candidates themselves when None.
            With dropout the masks of PyTorch and fastattn differ, so verify passes the same calls with dropout 0.
        tolerance: absolute and relative, for verify.
        nbytes: bytes that a perfect implementation moves.
        flops: operations that it computes; dtype: of the products in them.
    Under --benchmark-disable nothing is timed: the benchmark becomes a test of correctness.
    """
    session = request.config._benchmarksession
    node = request.node

    def run(candidates, *, verify=None, tolerance=1e-4, nbytes=None, flops=None, dtype=torch.float32, seconds=0.4):
        if session.skip:
            pytest.skip("benchmarks are skipped (--benchmark-skip)")
        if session.disabled:
            candidates, verify = without_compiled(candidates), without_compiled(verify)
        verify_equal({name: fn() for name, fn in (verify or candidates).items()}, tolerance)
        if verify or not session.disabled:
            for fn in candidates.values():
                fn()  # compiles and warms up
        if session.disabled:
            return
        group = f"{node.originalname}[{node.callspec.id}]" if hasattr(node, "callspec") else node.name
        timed = [Candidate(name, fn, node, session, group) for name, fn in candidates.items()]
        synchronize()
        for i in range(choose_rounds(timed, seconds, max_rounds=300)):
            first = i % len(timed)
            for candidate in timed[first:] + timed[:first]:
                flush_cache()
                candidate.run_round()

        baseline = timed[0].median()
        for candidate in timed:
            extra, median = candidate.fixture.extra_info, candidate.median()
            extra["implementation"] = candidate.name
            extra["device"] = device_name()
            extra["ratio"] = round(baseline / median, 3)
            extra["ratio_of_minima"] = round(timed[0].least() / candidate.least(), 3)
            if nbytes:
                extra["gb_per_s"] = round(nbytes / median * 1e-9, 2)
                extra["percent_of_copy"] = round(100 * nbytes / median / copy_rate(nbytes), 1)
            if flops:
                extra["gflop_per_s"] = round(flops / median * 1e-9, 1)
                extra["percent_of_gemm"] = round(100 * flops / median / gemm_rate(dtype), 1)

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["torch"] = torch.__version__
    machine_info["fastattn"] = fastattn.__version__
    machine_info["backends"] = fastattn.backends()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["kernels"] = fastattn.cpu_capability()
    machine_info["timer"] = TIMER.__name__
    machine_info["load"] = os.getloadavg()[0]
    if CUDA:
        machine_info["gpu"] = torch.cuda.get_device_name()


def write_rows(folder, records, session):
    """Write results.jsonl and the pictures."""
    from pictures import write_pictures  # needs matplotlib

    facts = facts_of(session.get_machine_info(), get_commit_info()["id"])
    rows = [row_of(record.group, record.extra_info, record.stats.data) | facts for record in records]
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "results.jsonl", rows)
    return [folder / "results.jsonl", *write_pictures(folder, rows)]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    """Print our summary after that of all plugins, so that it is what stays on the screen."""
    yield
    session = getattr(config, "_benchmarksession", None)
    records = [record for record in session.benchmarks if "implementation" in record.extra_info] if session else []
    if records:
        side_by_side(terminalreporter, records)
        if config.getoption("--pictures"):
            written = write_rows(config.getoption("--pictures"), records, session)
            terminalreporter.write_line(f"written: {written[0]} and {len(written) - 1} pictures")


def side_by_side(terminalreporter, records):
    """Print a line for each candidate, grouped by benchmark."""
    write = terminalreporter.write_line
    terminalreporter.section(
        "side by side: median of interleaved rounds, ratio to the first row of a group (of the minima)"
    )
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    note = "; the machine was busy at the end: trust ratios only" if load > 1.3 * cores else ""
    ceilings = (
        f"copy of 128 MiB {copy_rate(2**27) * 1e-9:.1f} GB/s, fp32 GEMM {gemm_rate(torch.float32) * 1e-9:.0f} GFLOP/s"
    )
    write(f"{ceilings}, load {load:.1f} on {cores} cores{note}")
    group = None
    for record in records:
        extra = record.extra_info
        if record.group != group:
            group = record.group
            write(group)
        median = statistics.median(record.stats.data)
        line = f"  {extra['implementation']:24s}{median * 1e6:12.1f} us"
        line += f"{extra['ratio']:8.2f}x ({extra['ratio_of_minima']:.2f}x)"
        if "gb_per_s" in extra:
            line += f"{extra['gb_per_s']:10.1f} GB/s {extra['percent_of_copy']:6.1f} % of copy"
        if "gflop_per_s" in extra:
            line += f"{extra['gflop_per_s']:10.1f} GFLOP/s {extra['percent_of_gemm']:6.1f} % of GEMM"
        write(line)
