"""RotaryEmbedding: its tables, their growth and dtype, and the rotation of q and k."""

import copy
import io
import threading
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn.nn import RotaryEmbedding
from fastattn.ops._register import is_recorded


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_tables(rows, rotary_dim, base=10000.0):
    angle = torch.outer(torch.arange(rows).double(), base ** (-torch.arange(0, rotary_dim, 2).double() / rotary_dim))
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("base", [10000.0, 5e5])
def test_tables_are_exact_to_fp32(base):
    rotary = RotaryEmbedding(64, max_seqlen=100_000, base=base)
    for table, exact in zip((rotary.cos, rotary.sin), exact_tables(100_000, 64, base), strict=True):
        assert table.dtype == torch.float32
        assert (table - exact).abs().max() <= 2**-24


@pytest.mark.parametrize("interleaved", [False, True])
def test_is_the_op_on_its_tables(interleaved):
    rotary = RotaryEmbedding(12, max_seqlen=20, interleaved=interleaved)
    q, k = randn(2, 4, 7, 16), randn(2, 1, 7, 16, seed=1)
    for positions in (None, 5, torch.arange(7).flip(0), torch.tensor([[3], [11]]) + torch.arange(7)):
        want = fastattn.rotary_embedding((q, k), rotary.cos, rotary.sin, positions=positions, interleaved=interleaved)
        got = rotary(q, k, positions=positions)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        assert torch.equal(rotary(q, positions=positions), want[0])
    packed = q[0].transpose(0, 1)
    assert torch.equal(rotary(packed), rotary(q[:1])[0].transpose(0, 1))
    copy = q.clone()
    assert rotary(copy, inplace=True) is copy
    assert torch.equal(copy, rotary(q))


def test_tables_grow():
    rotary = RotaryEmbedding(8, max_seqlen=4)
    large = RotaryEmbedding(8, max_seqlen=100)
    for seqlen, positions in ((4, None), (5, None), (3, 40), (1, 60)):
        x = randn(1, 2, seqlen, 8)
        assert torch.equal(rotary(x, positions=positions), large(x, positions=positions))
    assert rotary.cos.shape == (86, 4)  # 4, 8, 43, twice that
    assert torch.equal(rotary(randn(86, 2, 8)), large(randn(86, 2, 8)))
    with pytest.raises(ValueError, match="within the 86 rows of cos, got 86 to 86"):
        rotary(randn(1, 2, 1, 8), positions=torch.tensor([86]))


def test_casts_keep_the_tables():
    exact = RotaryEmbedding(32).cos
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), RotaryEmbedding(32))
    for cast in (torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double, lambda m: m.to(torch.float16)):
        cast(model)
        assert torch.equal(model[1].cos, exact)
        assert model[1].cos.dtype == torch.float32
    x = randn(1, 2, 4, 32).bfloat16()
    assert model[1](x).dtype == torch.bfloat16


def test_is_not_in_the_state_dict_and_survives_meta():
    with torch.device("meta"):
        rotary = RotaryEmbedding(16, max_seqlen=9)
    assert rotary.cos.is_meta
    assert not rotary.state_dict()
    assert torch.equal(rotary.to_empty(device="cpu").cos, RotaryEmbedding(16, max_seqlen=9).cos)


def test_repr():
    assert repr(RotaryEmbedding(8, max_seqlen=3)) == "RotaryEmbedding(8, max_seqlen=3, base=10000.0, interleaved=False)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim must be even and at least 2, got 7"),
        ({"rotary_dim": 0}, "rotary_dim must be even and at least 2, got 0"),
        ({"rotary_dim": 8, "max_seqlen": 0}, "max_seqlen must be at least 1, got 0"),
        ({"rotary_dim": 8, "base": 0.0}, "base must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=f"RotaryEmbedding: {message}"):
        RotaryEmbedding(**arguments)


def test_base_may_be_a_tensor_of_one_number():
    for base in (torch.tensor(500.0), torch.tensor([[500.0]])):
        assert RotaryEmbedding(8, max_seqlen=3, base=base).cos.equal(RotaryEmbedding(8, max_seqlen=3, base=500.0).cos)


@pytest.mark.parametrize("shape", [(), (3,), (8,), (5, 8)])
def test_too_few_dimensions_are_refused(shape):
    rotary = RotaryEmbedding(8)
    for arguments in ((torch.ones(shape),), (torch.ones(2, 5, 8), torch.ones(shape))):
        with pytest.raises(ValueError, match=r"^nn.RotaryEmbedding: "):
            rotary(*arguments)


def test_compile_without_a_graph_break():
    torch._dynamo.reset()
    rotary = RotaryEmbedding(8, max_seqlen=16)
    compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True, dynamic=True)
    for seqlen in (3, 9, 16):
        q, k = randn(2, 4, seqlen, 8).requires_grad_(), randn(2, 2, seqlen, 8, seed=1)
        torch.testing.assert_close(compiled(q, k), rotary(q, k))


@pytest.mark.parametrize("interleaved", [False, True])
def test_heads_narrower_than_rotary_dim_are_refused(interleaved):
    """Tables that are twice too wide look like doubled ones and would rotate by wrong angles."""
    rotary = RotaryEmbedding(16, max_seqlen=8, interleaved=interleaved)
    with pytest.raises(ValueError, match="RotaryEmbedding: head_dim must be at least rotary_dim 16, got 8"):
        rotary(torch.randn(1, 2, 4, 8))


def grow_in_inference_mode(rotary, x):
    with torch.inference_mode():
        rotary(x)


def cast_in_inference_mode(rotary, x):
    with torch.inference_mode():
        rotary.half().float()


def built_in_inference_mode(rotary, x):
    with torch.inference_mode():
        return RotaryEmbedding(8, max_seqlen=4)


def copied_in_inference_mode(rotary, x):
    with torch.inference_mode():
        return copy.deepcopy(rotary)


def sine_made_in_inference_mode(rotary, x):
    with torch.inference_mode():
        rotary.sin = rotary.sin.clone()


def loaded_in_inference_mode(rotary, x):
    file = io.BytesIO()
    torch.save(rotary, file)
    file.seek(0)
    with torch.inference_mode():
        return torch.load(file, weights_only=False)


def grow_without_gradients(rotary, x):
    with torch.no_grad():
        rotary(x)


def grow_under_autocast(rotary, x):
    with torch.autocast("cpu", torch.bfloat16):
        rotary(x)


def grow_on_fake_tensors(rotary, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        rotary(mode.from_tensor(x))


def grow_under_forward_ad(rotary, x):
    with forward_ad.dual_level():
        rotary(forward_ad.make_dual(x, x))


def grow_in_a_trace(rotary, x):
    traced = torch.jit.trace(rotary, (x,), check_trace=False)
    assert torch.equal(traced(2 * x), rotary(2 * x))


def grow_in_an_fx_trace(tracing_mode):
    def grow(rotary, x):
        recorded = make_fx(lambda x: rotary(x), tracing_mode=tracing_mode, _allow_non_fake_inputs=True)(x)
        assert torch.equal(recorded(2 * x), rotary(2 * x))

    return grow


def grow_in_an_export(strict):
    def grow(rotary, x):
        exported = torch.export.export(rotary, (x,), strict=strict).module()
        assert torch.equal(exported(2 * x), rotary(2 * x))

    return grow


def grow_compiled(mode):
    def grow(rotary, x):
        torch._dynamo.reset()
        compiled = torch.compile(rotary, backend="aot_eager", fullgraph=True)
        with mode():
            assert torch.equal(compiled(x), rotary(x))

    return grow


def grow_a_functional_call(rotary, x):
    torch.func.functional_call(rotary, dict(rotary.named_buffers()), (x,))


def assigned_from_meta(rotary, x):
    with torch.device("meta"):
        rotary = RotaryEmbedding(8, max_seqlen=4)
    rotary.load_state_dict({}, assign=True)
    return rotary


def cast_by_swapping(rotary, x):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return rotary.bfloat16()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def rotated_by_other_angles(rotary, x):
    rotary.base = 10.0
    assert torch.equal(rotary(x), RotaryEmbedding(8, base=10.0)(x))
    assert torch.equal(rotary(x[:, :, :3]), RotaryEmbedding(8, base=10.0)(x[:, :, :3]))
    rotary.base = 10000.0


HISTORIES = {
    "inference_mode": grow_in_inference_mode,
    "inference_mode cast": cast_in_inference_mode,
    "inference_mode built": built_in_inference_mode,
    "inference_mode copy": copied_in_inference_mode,
    "inference_mode load": loaded_in_inference_mode,
    "sine for inference": sine_made_in_inference_mode,
    "no_grad": grow_without_gradients,
    "autocast": grow_under_autocast,
    "fake": grow_on_fake_tensors,
    "func.grad": lambda rotary, x: torch.func.grad(lambda x: rotary(x).sum())(x),
    "jacrev": lambda rotary, x: torch.func.jacrev(rotary)(x[:, :1, :, :]),
    "vmap": lambda rotary, x: torch.func.vmap(rotary)(x.expand(3, *x.shape)),
    "functionalize": lambda rotary, x: torch.func.functionalize(rotary)(x),
    "forward AD": grow_under_forward_ad,
    "functional_call": grow_a_functional_call,
    "jit.trace": grow_in_a_trace,
    "make_fx real": grow_in_an_fx_trace("real"),
    "make_fx symbolic": grow_in_an_fx_trace("symbolic"),
    "export": grow_in_an_export(False),
    "export strict": grow_in_an_export(True),
    "compile": grow_compiled(torch.enable_grad),
    "compile inference_mode": grow_compiled(torch.inference_mode),
    "meta": assigned_from_meta,
    "swap": cast_by_swapping,
    "base": rotated_by_other_angles,
    "replica": lambda rotary, x: rotary._replicate_for_data_parallel()(x),
}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("seqlen", [3, 10, 30])
@pytest.mark.parametrize("history", HISTORIES)
def test_trains_right_whatever_was_before(history, seqlen):
    """The tables hold exact numbers that a backward may use, however and wherever they were computed or grew."""
    rotary = RotaryEmbedding(8, max_seqlen=4)
    made = HISTORIES[history](rotary, randn(1, 2, 10, 8))
    rotary = made if isinstance(made, RotaryEmbedding) else rotary
    x = randn(1, 2, seqlen, 8, seed=1).requires_grad_()
    y, (dx,) = rotary(x), torch.autograd.grad(rotary(x).square().sum(), x)
    torch.testing.assert_close(y, RotaryEmbedding(8)(x))
    torch.testing.assert_close(dx, 2 * x)  # a rotation keeps the length
    for table, exact in zip((rotary.cos, rotary.sin), exact_tables(len(rotary.cos), 8), strict=True):
        assert type(table) is torch.Tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(table)
        assert not table.is_inference()
        assert (table - exact).abs().max() <= 2**-24


@pytest.mark.parametrize("seqlen", [3, 10])
@pytest.mark.parametrize("history", [name for name in HISTORIES if "inference_mode" in name])
def test_trains_compiled_after_inference_mode(history, seqlen):
    """The compiler cannot ask whether the tables are inference tensors, which no backward accepts."""
    rotary = RotaryEmbedding(8, max_seqlen=4)
    made = HISTORIES[history](rotary, randn(1, 2, 10, 8))
    rotary = made if isinstance(made, RotaryEmbedding) else rotary
    compiled, x = torch.compile(rotary, backend="aot_eager", fullgraph=True), randn(1, 2, seqlen, 8).requires_grad_()
    (dx,) = torch.autograd.grad(compiled(x).square().sum(), x)
    torch.testing.assert_close(dx, 2 * x)


def test_is_a_leaf_of_a_symbolic_trace():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rotary = RotaryEmbedding(8, max_seqlen=4)

        def forward(self, q, k):
            q, k = self.rotary(q, k, positions=2)
            return self.rotary(q + k, inplace=True)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["rotary", "rotary"]
    for seqlen in (3, 10):
        q, k = randn(1, 2, seqlen, 8), randn(1, 2, seqlen, 8, seed=1)
        torch.testing.assert_close(traced(q, k), model(q, k))
    # the message comes from the tracer and depends on what it traces first
    with pytest.raises(ValueError, match=r"co_varnames|symbolically traced"):
        torch.fx.symbolic_trace(model.rotary)


def test_threads_may_let_it_grow():
    rotary, large, wrong = RotaryEmbedding(8, max_seqlen=1), RotaryEmbedding(8, max_seqlen=4000), []

    def work(seed):
        for seqlen in torch.randint(1, 4000, (60,), generator=torch.Generator().manual_seed(seed)).tolist():
            x = randn(1, 1, 1, 8)
            if not torch.equal(rotary(x, positions=seqlen), large(x, positions=seqlen)):
                wrong.append(seqlen)
            if seqlen % 7 == 0:
                rotary.cos, rotary.sin = rotary.cos[:1], rotary.sin[:1]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_captured_graph_is_a_record(monkeypatch):
    """Kernels in a capture run only at replay, so tables that they compute hold nothing until then."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert is_recorded(types.SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(fastattn.nn.rotary, "is_recorded", lambda x: True)
    rotary, x = RotaryEmbedding(8, max_seqlen=4), randn(1, 2, 10, 8)
    assert torch.equal(rotary(x), RotaryEmbedding(8)(x))
    assert rotary.cos.shape[0] == 4


def test_tables_that_grow_are_ready_before_other_streams_see_them(monkeypatch):
    rotary, waited = RotaryEmbedding(8, max_seqlen=4), []

    def wait(table):
        waited.append((table.shape[0], rotary.cos.shape[0]))

    monkeypatch.setattr(fastattn.nn.rotary, "_wait_for_streams", wait)
    for seqlen in (3, 10, 10, 4):
        rotary(randn(1, 2, seqlen, 8))
    assert waited == [(10, 4)]  # only once, while the module still had the old tables


def test_waiting_for_streams_is_for_gpus(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    fastattn.nn.rotary._wait_for_streams(torch.ones(1))
    assert not calls
    fastattn.nn.rotary._wait_for_streams(types.SimpleNamespace(is_cuda=True, device="cuda:1"))
    assert calls == ["cuda:1"]
