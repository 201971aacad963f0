"""The choice of a backend: the automatic choice, the three ways to override it, and the reasons given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn.ops import _backends
from fastattn.ops._backends import BACKENDS, choose, use_backend, why_not_available

ROOT = Path(__file__).resolve().parents[2]
FACTS = ("cpu", torch.float32, None, None, None)
first_of_cpu = next(b for b in BACKENDS if why_not_available(b, "cpu") is None)
needs_native = pytest.mark.skipif(
    why_not_available("native", "cpu") is not None, reason=str(why_not_available("native", "cpu"))
)


@pytest.fixture
def no_override():
    with use_backend("auto"):
        yield


def python(code, **environment):
    """Run code in a fresh interpreter."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.usefixtures("no_override")
class TestChoice:
    @needs_native
    def test_automatic(self):
        assert choose("norm", FACTS) == "native"
        assert choose("norm", ("cpu", torch.float64, None, None, None)) == "reference"
        assert choose("norm", ("cpu", torch.float32, None, torch.float64, None)) == "reference"
        assert choose("norm", ("meta", torch.float32, None, None, None)) == "reference"

    def test_argument_before_context_before_environment(self, monkeypatch):
        monkeypatch.setattr(_backends, "_override", "native")  # as with FASTATTN_BACKEND=native
        with use_backend("reference"):
            assert choose("norm", FACTS) == "reference"
            with use_backend("auto"):
                assert choose("norm", FACTS) == first_of_cpu
            assert choose("norm", FACTS, "reference") == "reference"
            if first_of_cpu == "native":
                assert choose("norm", FACTS, "native") == "native"
        assert _backends._override == "native"

    def test_the_context_ends_with_an_exception(self):
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert choose("norm", FACTS) == first_of_cpu

    def test_results_are_those_of_the_named_backend(self):
        x = torch.randn(3, 50)
        with use_backend("reference"):
            torch.manual_seed(0)
            inside = fastattn.layer_norm(x, dropout_p=0.5)
        torch.manual_seed(0)
        assert torch.equal(inside, fastattn.layer_norm(x, dropout_p=0.5, backend="reference"))

    def test_a_named_backend_that_cannot_serve_raises_with_the_reason(self, monkeypatch):
        monkeypatch.setattr(_backends, "_unavailable", _backends._unavailable | {("triton", "cpu"): "it is Tuesday"})
        monkeypatch.setattr(_backends, "_decisions", {})
        with pytest.raises(ValueError, match=r"norm: backend 'triton' was asked for.*it is Tuesday"):
            fastattn.layer_norm(torch.ones(2, 2), backend="triton")
        with use_backend("triton"), pytest.raises(ValueError, match="it is Tuesday"):
            fastattn.layer_norm(torch.ones(2, 2))

    def test_unknown_names(self):
        with pytest.raises(ValueError, match="backend must be one of native, triton, reference or auto, got 'cpu'"):
            choose("norm", FACTS, "cpu")
        with pytest.raises(ValueError, match="got 'fast'"), use_backend("fast"):
            pass

    def test_a_lost_backend_is_noticed(self, monkeypatch):
        monkeypatch.setattr(_backends, "_unavailable", dict(_backends._unavailable))
        choose("norm", FACTS)
        for name in ("native", "triton"):
            _backends.set_unavailable(name, "cpu", "gone")
        assert choose("norm", FACTS) == "reference"
        assert set(fastattn.backends()["cpu"].values()) == {"gone", "available"}
        monkeypatch.undo()
        _backends._decisions.clear()
        assert choose("norm", FACTS) == first_of_cpu


@pytest.mark.usefixtures("no_override")
class TestExplain:
    def test_every_backend_has_a_line_and_one_runs(self):
        text = fastattn.explain("layer_norm", torch.ones(2, 3, dtype=torch.float64))
        assert text.splitlines()[0] == "norm on cpu, float64"
        for name in ("native", "triton"):
            assert f"  {name}: no: " in text
        assert text.endswith("  reference: runs")
        if first_of_cpu == "native":
            assert "native: no: it supports float32, bfloat16 and float16, got torch.float64" in text

    def test_what_could_run_says_so(self):
        text = fastattn.explain("rms_norm", torch.ones(2, 3))
        assert f"{first_of_cpu}: runs" in text
        if first_of_cpu != "reference":
            assert "reference: could run, but comes later in the order" in text
        text = fastattn.explain("rms_norm", torch.ones(2, 3), backend="reference")
        assert "reference: runs" in text
        assert "reference asked for" in text

    def test_dropout_too(self):
        x = torch.ones(2, 3)
        assert f"{first_of_cpu}: runs" in fastattn.explain("dropout", x, 0.1, residual=x.half())
        with pytest.raises(ValueError, match=r"dropout_p must be between 0 and 1, got 2"):
            fastattn.explain("dropout", x, 2)

    def test_torchs_attention_under_its_own_arguments(self):
        x = torch.ones(2, 3, 4, 8)
        text = fastattn.explain("scaled_dot_product_attention", x, x, x, is_causal=True)
        assert text == fastattn.explain("attention", x, x, x, causal="top_left")
        with pytest.raises(ValueError, match="attn_mask should not be set when is_causal=True"):
            fastattn.explain("scaled_dot_product_attention", x, x, x, torch.ones(4, 4), is_causal=True)

    def test_unknown_op_and_bad_arguments(self):
        with pytest.raises(ValueError, match=r"explain: op must be one of .*layer_norm.*got 'norms'"):
            fastattn.explain("norms", torch.ones(2))
        with pytest.raises(ValueError, match="weight must have shape"):
            fastattn.explain("layer_norm", torch.ones(2, 3), torch.ones(2))


def test_environment():
    code = "import torch, fastattn; print(fastattn.explain('layer_norm', torch.ones(1, 2)))"
    done = python(code, FASTATTN_BACKEND="reference")
    assert done.returncode == 0, done.stderr
    assert "reference: runs" in done.stdout


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FASTATTN_BACKEND", "cpp", "FASTATTN_BACKEND must be one of native, triton, reference or auto, got 'cpp'"),
        (
            "FASTATTN_CPU_CAPABILITY",
            "sse",
            "FASTATTN_CPU_CAPABILITY must be one of default, avx2, avx512, avx512bf16, amx, got 'sse'",
        ),
    ],
)
def test_bad_environment(name, value, message):
    done = python("import fastattn", **{name: value})
    assert done.returncode != 0
    assert message in done.stderr


def test_required_backends():
    """FASTATTN_REQUIRE turns an absent backend into a failure of the whole run."""
    command = "import sys, pytest; sys.exit(pytest.main(['-q', '--collect-only', 'tests/ops/test_backends.py']))"
    done = python(f"import os; os.chdir({str(ROOT)!r}); {command}", FASTATTN_REQUIRE="nativ")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "got 'nativ'" in done.stderr + done.stdout


@needs_native
def test_kernels_run_on_the_threads_of_torch():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.ops.fastattn.parallel_chunks() == 2
        torch.set_num_threads(1)
        assert torch.ops.fastattn.parallel_chunks() == 1
    finally:
        torch.set_num_threads(threads)


def hopper(monkeypatch, capability=(9, 0)):
    """As on a GPU of that capability with every kernel built."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(_backends, "why_not_implemented", lambda op, backend, device: None)
    monkeypatch.setattr(_backends, "_decisions", {})


def attention_facts(**facts):
    from fastattn.ops._attention_call import Facts

    return Facts(**{"device": "cuda", "dtype": torch.bfloat16, "hopper_head_dim": True} | facts)


def test_kernels_that_no_hardware_has_run_are_used_only_where_they_are_named(monkeypatch, no_override):
    hopper(monkeypatch)
    facts = attention_facts()
    assert choose("attention", facts) == "triton"
    assert 'native: not yet run on hardware: name backend="native" to use it' in _backends.explanation(
        "attention", facts
    )
    assert choose("attention", facts, "native") == "native"
    with use_backend("native"):
        assert choose("attention", facts) == "native"
    assert choose("norm", ("cuda", torch.float32)) == "native"  # the order for other ops is unchanged


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": torch.float32}, "it supports bfloat16 and float16, got torch.float32"),
        ({"hopper_head_dim": False}, "it supports head dims 64, 96, 128, 192, 256, equal for q, k and v"),
        ({"unequal_head_dims": True}, "it supports head dims 64, 96, 128, 192, 256, equal for q, k and v"),
        ({"mask": True, "dropout": True}, "it does not support mask, dropout"),
        ({"bias_dtype": torch.float32}, "it does not support bias"),
        ({"alibi": True, "softcap": True, "sink": True}, "it does not support ALiBi, softcap, sink"),
    ],
)
def test_why_not_native_attention_on_cuda(facts, reason, monkeypatch):
    hopper(monkeypatch)
    with pytest.raises(ValueError, match=f"cannot serve this call: {reason}"):
        choose("attention", attention_facts(**facts), "native")


def decode_facts(**facts):
    from fastattn.ops.attention_decode import Facts

    return Facts(**{"device": "cuda", "dtype": torch.bfloat16, "hopper_head_dim": True} | facts)


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"dtype": torch.float32}, "it supports bfloat16 and float16, got torch.float32"),
        ({"hopper_head_dim": False}, "it supports head dims 64, 96, 128, 192, 256, equal for q, k and v"),
        ({"unaligned_strides": True}, "it does not support cache strides that are not multiples of 16 bytes"),
        ({"unaligned_pages": True}, "it does not support page sizes that are not multiples of 64 keys"),
        ({"leftpad": True, "alibi": True}, "it does not support cache_leftpad, ALiBi"),
        ({"softcap": True, "sink": True}, "it does not support softcap, sink"),
    ],
)
def test_why_not_native_attention_decode_on_cuda(facts, reason, monkeypatch, no_override):
    hopper(monkeypatch)
    assert choose("attention_decode", decode_facts()) == "triton"
    assert choose("attention_decode", decode_facts(), "native") == "native"
    with pytest.raises(ValueError, match=f"cannot serve this call: {reason}"):
        choose("attention_decode", decode_facts(**facts), "native")


@pytest.mark.parametrize("above", [True, False])
def test_explain_says_which_head_dims_have_only_a_native_forward(above, monkeypatch):
    hopper(monkeypatch)
    text = _backends.explanation("attention", attention_facts(above_128=above), "native")
    assert ("native has no backward above head dim 128" in text) == above


@pytest.mark.parametrize("backend", ["native", "native_traced", "triton"])
@pytest.mark.parametrize("head_dim", [128, 192])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_who_has_a_backward(backend, head_dim, device):
    from fastattn.ops.attention import _has_backward

    with FakeTensorMode():
        q = torch.empty(1, 1, 1, head_dim, device=device)
    assert _has_backward(backend, q) == (device == "cpu" or head_dim == 128 or backend == "triton")


def on_cuda(*shape, dtype=torch.bfloat16):
    """A tensor without memory that claims to be on a GPU."""
    return torch.empty(*shape, dtype=dtype, device="cuda")


@pytest.fixture
def fake_hopper(monkeypatch, no_override):
    hopper(monkeypatch)
    with FakeTensorMode():
        yield


def test_facts_of_a_decode_call_on_cuda(fake_hopper):
    """The whole path from the arguments to the reason."""
    q, k, lengths = on_cuda(2, 8, 1, 128), on_cuda(2, 2, 320, 128), on_cuda(2, dtype=torch.int32)
    table = on_cuda(2, 1, dtype=torch.int32)
    gap = torch.empty_strided(k.shape, (2 * 320 * 129, 320 * 129, 129, 1), dtype=k.dtype, device="cuda")
    expanded = torch.empty_strided(k.shape, (0, 320 * 128, 128, 1), dtype=k.dtype, device="cuda")
    page, new = on_cuda(2, 2, 48, 128), on_cuda(2, 2, 1, 128)
    for reason, change in {
        'not yet run on hardware: name backend="native"': {},
        "no: it supports head dims": {"v_cache": on_cuda(2, 2, 320, 64)},
        "no: it does not support cache strides": {"v_cache": gap},
        "no: it does not support cache strides that": {"k_cache": expanded},
        "no: it does not support page sizes": {"k_cache": page, "v_cache": page, "block_table": table},
        "no: it does not support cache_leftpad": {"cache_leftpad": lengths},
        "no: it does not support ALiBi, softcap, sink": {
            "alibi_slopes": on_cuda(8, dtype=torch.float32), "softcap": 1.0, "sink": on_cuda(8, dtype=torch.float32),
        },
    }.items():  # fmt: skip
        arguments = {"k_cache": k, "v_cache": k, "cache_seqlens": lengths} | change
        text = fastattn.explain("attention_decode", q, **arguments)
        assert f"native: {reason}" in text
        assert "triton: runs" in text
    with torch.no_grad():
        out = fastattn.attention_decode(
            q, k, on_cuda(2, 2, 320, 128), k=new, v=new, cache_seqlens=lengths, backend="native"
        )
    assert out.shape == q.shape


def test_gradients_of_wide_heads_on_cuda(fake_hopper):
    for head_dim, elsewhere in ((128, False), (192, True), (256, True)):
        q = on_cuda(1, 2, 70, head_dim)
        text = fastattn.explain("attention", q, q, q, backend="native")
        assert "native: runs" in text
        assert ("triton computes the gradients" in text) == elsewhere
    text = fastattn.explain("attention", *[on_cuda(1, 2, 70, 80)] * 3)
    assert "native: no: it supports head dims 64, 96, 128, 192, 256" in text


def test_native_attention_on_another_gpu(monkeypatch):
    hopper(monkeypatch, (8, 6))
    with pytest.raises(ValueError, match=r"it needs a GPU of compute capability 9\.0; this one has 8\.6"):
        choose("attention", attention_facts(), "native")
