import math
import random

import pytest
import torch
import torch.nn.functional as F
from allocated import allocated_peak
from cross_entropy_cases import arguments, gradients, plain
from memory_guard import guarded
from oracle import BACKWARD, FP32_EPS, assert_accurate, exact
from processes import run_tests
from torch.testing import assert_close

import fastattn
from fastattn.ops._backends import use_backend, why_not_available, why_not_implemented
from fastattn.ops._loss_chunks import default_chunk_size, least_chunk
from fastattn.ops.linear_cross_entropy import REDUCTIONS

OP = "linear_cross_entropy"
OPTIONS = ("ignore_index", "label_smoothing", "z_loss", "softcap", "reduction")


def check_against_fp64(x, weight, bias, target, chunk_size=None, dloss=None, **options):
    """Loss and gradients keep to the error rule.

    In addition a unit of the subtracted numbers is allowed, logits or probabilities, as PyTorch may be exact by chance.
    """
    inputs = (x, weight, bias)
    loss = fastattn.linear_cross_entropy(x, weight, target, bias=bias, chunk_size=chunk_size, **options)
    assert loss.shape == (target.shape if options.get("reduction") == "none" else ())
    assert loss.dtype == torch.float32
    dloss = torch.randn(loss.shape, device=x.device) if dloss is None else dloss.expand(loss.shape)
    inputs64 = exact(*inputs)
    loss64 = plain(*inputs64, target, **options).view(loss.shape)
    baseline = plain(*inputs, target, **options).view(loss.shape)
    eps = torch.finfo(x.dtype).eps
    logits = F.linear(*inputs64).detach()
    size = max((t.detach().abs().max().item() for t in (logits, loss64) if t.numel()), default=0.0)
    assert_accurate(loss, loss64, baseline, what="loss", slack=eps * size)
    largest_factor = max(t.detach().abs().max().item() for t in (x, weight, dloss) if t.numel())
    grads = (
        gradients(loss, inputs, dloss),
        gradients(loss64, inputs64, dloss.double()),
        gradients(baseline, inputs, dloss),
    )
    names = [n for n, t in zip(("dx", "dweight", "dbias"), inputs, strict=True) if t is not None and t.requires_grad]
    for name, ours, wanted, base in zip(names, *grads, strict=True):
        largest = wanted.abs().max().item() if wanted.numel() else 0.0
        assert_accurate(ours, wanted, base, BACKWARD, name, slack=2 * eps * largest + 4 * FP32_EPS * largest_factor)


@pytest.mark.parametrize("seed", range(24))
def test_options_freely_combined(seed, dtype, backend, device, interpreted):
    pick = random.Random(seed)
    tokens = pick.choice((1, 3, 17, (2, 5), (3, 1, 4), 40))
    vocab = pick.choice((1, 2, 7, 33, 1000, 1025) if interpreted else (1, 2, 7, 33, 1000, 1025, 5003))
    args = arguments(tokens, pick.choice((1, 4, 16, 33)), vocab, dtype, pick.random() < 0.5, device, seed)
    for t in args[:3]:
        if t is not None and pick.random() < 0.2:
            t.requires_grad_(False)
    args[0].requires_grad_(args[0].requires_grad or not args[1].requires_grad)
    target = args[3]
    ignore_index = pick.choice((-100, vocab - 1, 2**40))
    if ignore_index != -100:
        target = torch.where(target < 0, vocab - 1, target)
        target.view(-1)[0] = 0 if vocab > 1 else target.view(-1)[0]
    if (target == ignore_index).all():
        ignore_index = -100
    if pick.random() < 0.3 and ignore_index < 2**31:
        target = target.int()
    check_against_fp64(
        *args[:3],
        target,
        ignore_index=ignore_index,
        label_smoothing=pick.choice((0.0, 0.1, 1.0)),
        z_loss=pick.choice((0.0, 1e-3, 0.1)),
        softcap=pick.choice((0.0, 1.0, 30.0)),
        reduction=pick.choice(REDUCTIONS),
        chunk_size=pick.choice((None, 1, 2, 7, 16, 1000)) if not interpreted else pick.choice((None, 7, 1000)),
    )


def test_large_odd_vocabulary(dtype, backend, device, interpreted):
    vocab = 5003 if interpreted else 50257
    check_against_fp64(*arguments(9, 6, vocab, dtype, True, device), chunk_size=4, label_smoothing=0.1, z_loss=1e-3)


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 6, 11, 12, 13, 100, None])
def test_chunk_boundaries(chunk_size, backend, device):
    """Twelve tokens: chunks that divide them evenly, unevenly, and that hold all."""
    args = arguments(12, 8, 50, biased=True, device=device)
    for reduction in ("mean", "none"):
        check_against_fp64(*args, chunk_size=chunk_size, reduction=reduction)


def test_default_chunk():
    assert default_chunk_size(4096, 512, 50257) * 50257 < 8 * 4096 * 512  # near the size of x if possible
    assert default_chunk_size(2**15, 4096, 128_256) == 1047
    assert default_chunk_size(0, 8, 3) >= 1


@pytest.mark.parametrize(("precision", "dtype", "least"), [
    ("ieee", torch.bfloat16, 2048), ("ieee", torch.float32, 256), ("tf32", torch.float32, 1280),
])  # fmt: skip
def test_chunks_of_a_gpu_are_large_enough_for_its_products(precision, dtype, least):
    """By arithmetic: the bytes of all weights for a chunk take at most a quarter of the time of its products."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = precision
        assert least_chunk("cuda", dtype) == least
        assert least_chunk("cpu", dtype) == 256
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert default_chunk_size(2**14, 768, 50304, least) == least
    assert default_chunk_size(2**15, 8192, 32000, least) == 8389  # x is so large that the logits may be


def test_bf16_over_many_chunks(device):
    """256 chunks that all add to the same weights: an fp32 sum stays accurate where a bf16 sum would stop growing."""
    x, weight, _, target = arguments(1024, 8, 16, torch.bfloat16, device=device)
    x = x.detach().abs()
    dweights = []
    for chunk_size in (4, 1024):
        loss = fastattn.linear_cross_entropy(x, weight, target, chunk_size=chunk_size, reduction="sum")
        dweights.append(torch.autograd.grad(loss, weight)[0].double())
    weight64 = exact(weight)
    expected = torch.autograd.grad(plain(x.double(), weight64, None, target, reduction="sum"), weight64)[0]
    errors = [((d - expected).norm() / expected.norm()).item() for d in dweights]
    assert errors[0] < 1.5 * errors[1] + 1e-3, errors


def test_all_ignored_and_no_tokens(backend, device):
    for tokens in (6, 0):
        x, weight, bias, target = arguments(tokens, 4, 10, biased=True, device=device)
        target.fill_(-100)
        for reduction, expected in (("mean", float("nan")), ("sum", 0.0), ("none", 0.0)):
            loss = fastattn.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction, z_loss=0.1)
            assert_close(loss, torch.full_like(loss, expected), equal_nan=True)
            assert loss.shape == ((tokens,) if reduction == "none" else ())
            if tokens:
                grads = gradients(loss, (x, weight, bias), torch.ones_like(loss))
                assert all((g == 0).all() for g in grads)
                torch_loss = plain(x, weight, bias, target, reduction=reduction)
                assert_close(loss, torch_loss, equal_nan=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_tokens_are_not_computed_on_a_cpu(raw_backend, reduction):
    """What stands in their rows, even NaN, reaches nothing."""
    x, weight, bias, target = arguments(20, 4, 10, biased=True)
    kept = target != -100
    expected = fastattn.linear_cross_entropy(x[kept], weight, target[kept], bias=bias, reduction=reduction)
    expected_grads = gradients(expected, (x, weight, bias), torch.ones_like(expected))
    with torch.no_grad():
        x[~kept] = float("nan")
    loss = fastattn.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction, backend=raw_backend)
    grads = gradients(loss, (x, weight, bias), torch.ones_like(loss))
    assert_close(loss[kept] if reduction == "none" else loss, expected)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert_close(grad, wanted)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_large_logits(label_smoothing, backend, device):
    """Logits of 1e4 with either sign: their size must not cost digits of their differences."""
    for sign in (1, -1):
        x = torch.full((4, 1), 1.0, device=device, requires_grad=True)
        weight = (sign * 1e4 + torch.arange(300.0, device=device)[:, None] % 7).requires_grad_()
        target = torch.tensor([0, 3, 6, 299], device=device)
        check_against_fp64(x, weight, None, target, label_smoothing=label_smoothing)
        loss = fastattn.linear_cross_entropy(x, weight, target, label_smoothing=label_smoothing)
        assert_close(loss.double(), plain(*exact(x, weight), None, target, label_smoothing=label_smoothing))
    x = torch.tensor([[1e4], [-1e4]], device=device)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], device=device, requires_grad=True)
    loss = fastattn.linear_cross_entropy(x, weight, torch.tensor([0, 0], device=device), reduction="none")
    assert loss.tolist() == [0.0, 2e4]


@pytest.mark.parametrize("size", [1e4, -1e6, 1e9, -1e9])
def test_z_loss_of_equal_logits_however_large(size, backend, device):
    """Its gradient has a softmax of its own, which an lse that has lost the logarithm of its sum makes too large."""
    x, target = torch.ones(6, 8, device=device, requires_grad=True), torch.arange(6, device=device)
    weight = torch.full((11, 8), size / 8, device=device, requires_grad=True)
    loss = fastattn.linear_cross_entropy(x, weight, target, z_loss=0.25, reduction="sum")
    lse = size + math.log(11)
    assert_close(loss.item(), 6 * (0.25 * lse**2 + math.log(11)), rtol=1e-6, atol=0)
    (dweight,) = torch.autograd.grad(loss, weight)
    expected = 6 / 11 * (1 + 0.5 * lse) - (torch.arange(11, device=device) < 6).float()
    assert_close(dweight, expected[:, None].expand(11, 8), rtol=1e-5, atol=0)


def test_vocabulary_masked_by_the_bias(backend, device):
    """A bias of -inf removes a token, also whole blocks of tokens."""
    x, weight, _, _ = arguments(5, 4, 3000, device=device)
    bias = torch.full((3000,), float("-inf"), device=device)
    bias[2900:2950] = 0.0
    target = torch.arange(2900, 2905, device=device)
    loss = fastattn.linear_cross_entropy(x, weight, target, bias=bias)
    assert_close(loss, plain(x, weight, bias, target))
    grads = gradients(loss, (x, weight), None)
    assert_close(grads, gradients(plain(x, weight, bias, target), (x, weight), None))


@pytest.mark.parametrize("style", ["transposed", "rows apart", "expanded"])
def test_strides(style, backend, device):
    x, weight, _, target = arguments((6, 10), 16, 40, device=device)
    x = x.detach()
    if style == "transposed":
        x, target = x.transpose(0, 1), target.t()
    elif style == "rows apart":
        x = torch.cat((x, x), -1)[..., :16]
    else:
        x = x[:1].expand(6, 10, 16)
    weight = weight.detach().t().contiguous().t()
    for reduction in REDUCTIONS:
        dloss = torch.randn((), device=device)  # expands with stride 0
        check_against_fp64(
            x.requires_grad_(), weight.requires_grad_(), None, target, chunk_size=7, dloss=dloss, reduction=reduction
        )


def test_targets_that_are_not_contiguous(backend, device):
    x, weight = torch.randn(6, 8, device=device), torch.randn(11, 8, device=device)
    table = torch.arange(18, device=device).view(6, 3) % 11
    got = fastattn.linear_cross_entropy(x, weight, table[:, 1], reduction="none")
    assert_close(got, F.cross_entropy(x @ weight.T, table[:, 1], reduction="none"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(reduction, backend, device):
    """The second time gives the same, and so does the third, which frees the graph; nothing is scaled twice."""
    x, weight, bias, target = arguments(12, 8, 30, biased=True, device=device)
    loss = fastattn.linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction, chunk_size=5)
    dloss = torch.full_like(loss, 3.0)
    results = [torch.autograd.grad(loss, (x, weight, bias), dloss, retain_graph=kept) for kept in (True, True, False)]
    assert_close(results[1], results[0], rtol=0, atol=0)
    assert_close(results[2], results[0], rtol=0, atol=0)
    assert results[0][1].data_ptr() != results[1][1].data_ptr()
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, weight, bias), dloss)


def test_accumulates_over_two_losses(backend, device):
    x, weight, _, target = arguments(12, 8, 30, device=device)
    first, second = (fastattn.linear_cross_entropy(x, weight, target, softcap=s) for s in (0.0, 2.0))
    (first + 2 * second).backward()
    expected = plain(x, weight, None, target) + 2 * plain(x, weight, None, target, softcap=2.0)
    assert_close((x.grad, weight.grad), torch.autograd.grad(expected, (x, weight)))


def test_only_what_is_wanted_is_computed(backend, device):
    x, weight, bias, target = arguments(8, 4, 20, biased=True, device=device)
    calls = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "linear_cross_entropy_fwd" in str(func):
                calls.append(args[-3:])
            return func(*args, **(kwargs or {}))

    def run(*inputs, **options):
        calls.clear()
        with Spy():
            x, weight, bias = inputs
            return fastattn.linear_cross_entropy(x, weight, target, bias=bias, **options)

    run(x, weight, bias, reduction="none")
    run_calls = {"none": list(calls)}
    for name, inputs in {
        "x": (x, weight.detach(), bias.detach()),
        "weight": (x.detach(), weight, None),
        "nothing": (x.detach(), weight.detach(), None),
    }.items():
        run(*inputs)
        run_calls[name] = list(calls)
    with torch.no_grad():
        run(x, weight, bias)
    run_calls["no_grad"] = list(calls)
    nothing, only_x, only_weight = (False, False, False), (True, False, False), (False, True, False)
    expected = {"none": nothing, "x": only_x, "weight": only_weight, "nothing": nothing, "no_grad": nothing}
    if "reference: runs" in fastattn.explain(OP, x, weight, target):
        assert not any(run_calls.values())
    else:
        assert run_calls == {name: [flags] for name, flags in expected.items()}


def test_forward_on_one_backend_backward_on_another(device):
    names = [n for n in ("native", "triton", "reference") if why_not_implemented(OP, n, device) is None]
    x, weight, bias, target = arguments(10, 8, 70, biased=True, device=device)
    results = []
    for forward in names:
        for backward in names:
            with use_backend(forward):
                loss = fastattn.linear_cross_entropy(x, weight, target, bias=bias, softcap=3.0, reduction="none")
            with use_backend(backward):
                results.append((loss, *torch.autograd.grad(loss.square().sum(), (x, weight, bias))))
    for result in results[1:]:
        assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_raw_op_guards_its_rows(raw_backend, device, dtype, interpreted):
    """Rows with NaN between and around them; the gaps are not written either."""
    op = getattr(torch.ops.fastattn.cross_entropy_fwd, raw_backend)
    for cols, offset in ((1, 1), (7, 3), (40, 5), (1500, 0)):
        values = torch.randn(5, cols, device=device).to(dtype)
        target = torch.tensor([0, cols - 1, -1, cols // 2, 0], device=device)
        dloss = torch.randn(5, device=device)
        logits, plain_logits = guarded(values, offset=offset, gap=3), values.clone()
        options = (-1, 0.1, 0.01, 5.0, True)
        assert_close(op(logits, target, dloss, *options), op(plain_logits, target, dloss, *options), rtol=0, atol=0)
        assert_close(logits, plain_logits, rtol=0, atol=0)
        assert (plain_logits[2] == 0).all()
        assert logits.as_strided((5, 3), (cols + 3, 1), logits.storage_offset() + cols).isnan().all()


def test_raw_op_out_of_range_target_is_nan(raw_backend, device):
    op = getattr(torch.ops.fastattn.cross_entropy_fwd, raw_backend)
    logits = torch.randn(4, 9, device=device)
    loss = op(logits, torch.tensor([9, -1, 2**40, 3], device=device), None, -100, 0.0, 0.0, 0.0, True)
    assert loss.isnan().tolist() == logits.isnan().all(1).tolist() == [True, True, True, False]


@pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason=str(why_not_available("native", "cpu")))
def test_peak_memory():
    """Besides inputs and gradients, at most 15 % of what F.linear and F.cross_entropy need, forward and backward."""
    x, weight, _, target = arguments(2048, 16, 50257)

    def step(function):
        return lambda: torch.autograd.grad(function(x, weight), (x, weight))

    ours = allocated_peak(step(lambda x, weight: fastattn.linear_cross_entropy(x, weight, target)))
    unfused = allocated_peak(step(lambda x, weight: F.cross_entropy(F.linear(x, weight), target)))
    assert unfused > 2 * 2048 * 50257 * 4  # the measurement includes the logits and their gradient
    assert ours < 0.15 * unfused, f"{ours / 2**20:.0f} MiB of {unfused / 2**20:.0f}"


@pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason=str(why_not_available("native", "cpu")))
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_instruction_sets(capability):
    selected = "native and not triton and (combined and native-1 or large_logits or guards or masked)"
    run_tests(selected, __file__, FASTATTN_CPU_CAPABILITY=capability)


def test_triton_kernel_compiles_without_spills():
    pytest.importorskip("triton", reason="Triton is not installed")
    from aot import compile_all

    from fastattn.kernels.cross_entropy import TABLE

    sizes = dict.fromkeys(("cols", "logits_stride", "ignore_index"), "i32")
    numbers = dict.fromkeys(("smoothing", "z_loss", "softcap"), "fp32")
    configs = []
    for arch in (80, 90, 100):
        for row, dtype, softcap in zip(TABLE, ("*fp16", "*bf16", "*bf16"), (False, True, True), strict=True):
            configs.append(
                {
                    "module": "fastattn.kernels.cross_entropy",
                    "kernel": "cross_entropy_fwd_kernel",
                    "arch": arch,
                    "num_warps": row.warps,
                    "types": sizes | numbers
                    | {"logits_ptr": dtype, "target_ptr": "*i64", "dloss_ptr": "*fp32", "loss_ptr": "*fp32"},
                    "constants": {"SOFTCAP": softcap, "NEED_GRAD": True, "BLOCK_N": row.block_n},
                }
            )  # fmt: skip
        configs.append(configs[-1] | {"types": configs[-1]["types"] | {"logits_ptr": "*fp32"}})
    for result in compile_all(configs):
        what = {key: result[key] for key in ("arch", "types", "constants", "registers", "stack")}
        assert result["stack"] == 0, f"spills: {what}"
        assert result["registers"] <= 128, what
        assert result.get("LDG.128", 0) >= 2, f"narrow loads: {what}"
        assert result.get("STG.128", 0) >= 1, f"narrow stores: {what}"
