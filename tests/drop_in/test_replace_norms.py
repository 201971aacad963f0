"""Norms of other libraries: taken over if, and only if, they compute a LayerNorm or an RMSNorm."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import BACKWARD, assert_accurate
from replaced_cases import run

import fastattn

D = 24
FLOATS = (torch.float32, torch.bfloat16)


class Rms(torch.nn.Module):
    """The norm of Llama: xhat is rounded, then multiplied by the weight."""

    def __init__(self, d=D, eps=1e-6):
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(d)), eps

    def xhat(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x):
        return self.weight * self.xhat(x).to(x.dtype)


class RoundsLast(Rms):
    """The norm of gpt-oss and OLMo 2."""

    def forward(self, x):
        return (self.weight * self.xhat(x)).to(x.dtype)


class OnePlus(Rms):
    """The norm of Gemma."""

    def __init__(self, d=D, eps=1e-6):
        super().__init__(d, eps)
        torch.nn.init.zeros_(self.weight)

    def forward(self, x):
        xhat = self.xhat(x)
        return (xhat * (1.0 + self.weight.to(xhat.dtype))).type_as(x)


class LikeWeight(Rms):
    """The norm of T5: the result has the dtype of the weight."""

    def forward(self, x):
        xhat = self.xhat(x)
        return self.weight * (xhat.to(self.weight.dtype) if self.weight.dtype in (torch.bfloat16,) else xhat)


class Nameless(torch.nn.Module):
    """No weight, eps in the code, no attribute that says the size."""

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:])


class NamelessNorm(Nameless):
    pass


class OfFunctional(torch.nn.Module):
    """The norm of nanoGPT: an optional bias, eps in the code."""

    def __init__(self, d=D, bias=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(d))
        self.bias = torch.nn.Parameter(torch.zeros(d)) if bias else None

    def forward(self, input):
        return F.layer_norm(input, self.weight.shape, self.weight, self.bias, 1e-5)


class Shifted(torch.nn.Module):
    """The parameters have other names, and the other order."""

    def __init__(self, d=D):
        super().__init__()
        self.beta, self.gamma, self.epsilon = (
            torch.nn.Parameter(torch.zeros(d)),
            torch.nn.Parameter(torch.ones(d)),
            1e-3,
        )

    def forward(self, x):
        return F.layer_norm(x, self.gamma.shape, self.gamma, self.beta, self.epsilon)


class Subclass(torch.nn.LayerNorm):
    """A subclass like that of timm."""

    def __init__(self, d=D):
        super().__init__(d, eps=1e-6)

    def forward(self, x):
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class ChannelsFirst(Subclass):
    """The norm of ConvNeXt: (batch, channels, height, width)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS = {
    "rms": (Rms, "RMSNorm"), "rounds last": (RoundsLast, "RMSNorm"), "one plus": (OnePlus, "RMSNorm"),
    "like weight": (LikeWeight, "RMSNorm"), "nameless": (NamelessNorm, "RMSNorm"),
    "functional": (OfFunctional, "LayerNorm"), "no bias": (lambda: OfFunctional(bias=False), "LayerNorm"),
    "shifted": (Shifted, "LayerNorm"),
    "subclass": (Subclass, "LayerNorm"), "channels first": (ChannelsFirst, "LayerNorm"),
    "other eps": (lambda: Rms(eps=0.3), "RMSNorm"),
}  # fmt: skip


@pytest.fixture(params=NORMS)
def case(request):
    make, kind = NORMS[request.param]
    norm = make()
    for parameter in norm.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    shape = (3, D, 4, 5) if request.param == "channels first" else (3, 7, D)
    return norm, kind, torch.randn(shape) + 0.5


@pytest.mark.parametrize(("weights", "inputs"), [(w, x) for w in FLOATS for x in FLOATS], ids=str)
def test_results_and_gradients(case, weights, inputs):
    norm, kind, x = case
    norm = norm.to(weights)
    x = x.to(inputs)
    try:
        before, grads = run(norm, x)
    except RuntimeError:
        pytest.skip("its own forward does not take these dtypes")
    exact, exact_grads = run(copy.deepcopy(norm).double(), x.double())
    report = fastattn.replace(norm)
    assert report.replaced == {"": f"{kind} (was {type(norm).__name__})"}
    ours, our_grads = run(norm, x)
    assert_accurate(ours, exact, before)
    for name, grad in our_grads.items():
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, f"gradient of {name}")
    report.undo()
    assert torch.equal(run(norm, x)[0], before)


def test_half_of_the_model_in_autocast(case):
    norm, _, x = case
    with torch.autocast("cpu", torch.bfloat16):
        expected = norm(x), norm(x.bfloat16())
        fastattn.replace(norm)
        for got, want in zip((norm(x), norm(x.bfloat16())), expected, strict=True):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got, want, atol=0.05, rtol=0.02)


def test_our_kernel_runs(case):
    norm, _, x = case
    fastattn.replace(norm)
    with torch.profiler.profile() as profile, torch.no_grad():
        norm(x)
    assert any("fastattn" in event.key for event in profile.key_averages())


def test_it_stays_the_same_object_with_the_same_class_name(case):
    norm, _, x = case
    kind, state, parameters = type(norm), copy.deepcopy(norm.state_dict()), list(norm.parameters())
    fired = []
    norm.register_forward_hook(lambda *args: fired.append(True))
    norm.eval()
    report = fastattn.replace(norm)
    assert isinstance(norm, kind)
    assert type(norm).__name__ == kind.__name__
    assert all(a is b for a, b in zip(norm.parameters(), parameters, strict=True))
    assert list(norm.state_dict()) == list(state)
    assert not norm.training
    norm(x)
    assert fired
    assert fastattn.replace(norm).replaced == {}
    report.undo()
    assert type(norm) is kind


def test_copies(case):
    norm, _, x = case
    for parameter in norm.parameters():
        parameter.data = parameter.data.clone()
    expected_class = type(norm)
    fastattn.replace(norm)
    expected = norm(x)
    file = io.BytesIO()
    torch.save(norm, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(norm),
        copy.copy(norm),
        pickle.loads(pickle.dumps(norm)),
        torch.load(file, weights_only=False),
    ):
        assert type(twin) is type(norm)
        assert type(twin) is not expected_class
        assert torch.equal(twin(x), expected)


def test_compiled_and_traced(case):
    norm, _, x = case
    fastattn.replace(norm)
    expected, grads = run(norm, x)
    torch._dynamo.reset()
    got, got_grads = run(torch.compile(norm, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(got, expected)
    for a, b in zip(got_grads.values(), grads.values(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.jit.trace(norm, (x,))(x), expected)
    if type(norm).__name__ != "LikeWeight":  # its forward branches on a dtype, which fx cannot trace
        torch.testing.assert_close(torch.fx.symbolic_trace(norm)(x), expected)
    torch.testing.assert_close(torch.func.functional_call(norm, dict(norm.named_parameters()), (x,)), expected)


def test_calls_that_go_to_the_original():
    norm = OfFunctional()
    fastattn.replace(norm)
    x = torch.randn(3, D)
    torch.testing.assert_close(norm(input=x), norm(x))
    with pytest.raises(RuntimeError, match="normalized_shape"):  # torch's own message
        norm(torch.randn(3, D + 1))
    with pytest.raises(TypeError):
        norm(x, x)


def test_a_module_in_float16():
    norm, x = Rms().half(), torch.randn(3, D).half()
    expected = norm(x)
    assert len(fastattn.replace(norm).replaced) == 1
    torch.testing.assert_close(norm(x), expected)


def test_eps_is_read_at_each_call():
    norm = Rms()
    fastattn.replace(norm)
    norm.variance_epsilon = 0.5
    torch.testing.assert_close(norm(torch.ones(2, D)), torch.full((2, D), 1.5**-0.5))


class Clipped(Rms):
    def forward(self, x):
        return super().forward(x).clamp(max=1.5)


class ClippedInput(Rms):
    def forward(self, x):
        return super().forward(x.clamp(-1000, 1000))


class NoGradientOfVariance(Rms):
    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon).detach()


class DropsInTraining(Rms):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class OneMinus(Rms):
    def forward(self, x):
        return (2.0 - self.weight) * self.xhat(x)


class PartialRms(Rms):
    def forward(self, x):
        wide = x.float()
        part = wide[..., : D // 2].square().mean(-1, keepdim=True)
        return self.weight * (wide * torch.rsqrt(part + self.variance_epsilon)).to(x.dtype)


class UnbiasedNorm(OfFunctional):
    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6) + self.bias


class RaisesNorm(Rms):
    def forward(self, x):
        raise NotImplementedError


class CountsCalls(Rms):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class TwoOutputsNorm(Rms):
    def forward(self, x):
        return super().forward(x), x


class ByRank(Rms):
    def forward(self, x):
        return super().forward(x) * (1 if x.dim() == 3 else 2)


class ByGradient(Rms):
    def forward(self, x):
        return super().forward(x) * (1 if torch.is_grad_enabled() else 2)


class WithoutNan(Rms):
    def forward(self, x):
        return super().forward(torch.nan_to_num(x))


class ClippedInHalf(Rms):
    def forward(self, x):
        return super().forward(x if x.dtype == torch.float32 else x.clamp(-5e3, 5e3))


@pytest.mark.parametrize(
    "kind",
    [
        ByRank,
        ByGradient,
        WithoutNan,
        ClippedInHalf,
        Clipped,
        ClippedInput,
        NoGradientOfVariance,
        DropsInTraining,
        OneMinus,
        PartialRms,
        UnbiasedNorm,
        RaisesNorm,
        TwoOutputsNorm,
        CountsCalls,
    ],
)
def test_what_computes_something_else_is_left_alone(kind):
    norm = type(f"{kind.__name__}Norm", (kind,), {})()
    state = torch.get_rng_state()
    report = fastattn.replace(norm)
    assert report.replaced == {}
    assert set(report.left) == {""}
    assert isinstance(norm, kind)
    assert type(norm).__mro__[1] is kind
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_that_are_no_norms_are_not_mentioned():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gamma = torch.nn.Parameter(torch.ones(D))

        def forward(self, x):
            return x * self.gamma

    model = torch.nn.Sequential(
        Scale(), torch.nn.BatchNorm1d(D), torch.nn.PReLU(D), torch.nn.GroupNorm(2, D), Nameless()
    )
    report = fastattn.replace(model)
    assert report.replaced == report.left == {}
