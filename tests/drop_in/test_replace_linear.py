"""Linear layers of torch.nn and of other libraries on our product: taken over if they compute what it does."""

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from oracle import BACKWARD, assert_accurate
from replaced_cases import calls_of_linear, run
from torch.nn.utils import prune

import fastattn
from fastattn.drop_in import linear as drop_in
from fastattn.drop_in.linear import LINEAR

D, OUT = 12, 20


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(fastattn.ops.linear, "_LEAST", 0)
    torch.manual_seed(0)


@pytest.fixture
def calls(monkeypatch):
    """The calls of our op by the modules."""
    return calls_of_linear(monkeypatch, drop_in)


class Conv1D(torch.nn.Module):
    """The layer of transformers, with a weight of shape (d_in, d_out)."""

    def __init__(self, n_out=OUT, n_in=D, bias=True):
        super().__init__()
        self.n_out = n_out
        self.weight = torch.nn.Parameter(torch.randn(n_in, n_out))
        self.bias = torch.nn.Parameter(torch.randn(n_out)) if bias else None

    def forward(self, x):
        shape = (*x.shape[:-1], self.n_out)
        rows = x.reshape(-1, x.shape[-1])
        return (rows @ self.weight if self.bias is None else torch.addmm(self.bias, rows, self.weight)).view(shape)


class Own(torch.nn.Module):
    """A linear layer written out, with other names."""

    def __init__(self):
        super().__init__()
        self.shift, self.matrix = torch.nn.Parameter(torch.randn(OUT)), torch.nn.Parameter(torch.randn(OUT, D))

    def forward(self, inputs):
        return inputs @ self.matrix.T + self.shift


LAYERS = {
    "Linear": lambda: torch.nn.Linear(D, OUT), "no bias": lambda: torch.nn.Linear(D, OUT, bias=False),
    "Conv1D": Conv1D, "Conv1D without bias": lambda: Conv1D(bias=False), "square Conv1D": lambda: Conv1D(D),
    "own": Own,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, D), (1, D), (3, D), (0, D), (D,)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients(name, shape, dtype, calls):
    layer, x = LAYERS[name]().to(dtype), torch.randn(shape, dtype=dtype)
    exact, exact_grads = run(copy.deepcopy(layer).double(), x.double())
    before, grads = run(layer, x)
    kind, state = type(layer), list(layer.state_dict())
    report = fastattn.replace(layer, only="linear")
    assert report.replaced == {"": "Linear" if kind is torch.nn.Linear else f"Linear (was {kind.__name__})"}
    assert list(layer.state_dict()) == state
    calls.clear()
    ours, our_grads = run(layer, x)
    assert len(calls) == 1
    assert_accurate(ours, exact, before)
    for name, grad in our_grads.items():
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, name)
    report.undo()
    assert type(layer) is kind
    assert torch.equal(run(layer, x)[0], before)


class Scaled(Own):
    def forward(self, inputs):
        return 2 * super().forward(inputs)


class InTraining(Own):
    def forward(self, inputs):
        return super().forward(inputs) * (2.0 if self.training else 1.0)


class Rectified(Own):
    def forward(self, inputs):
        return super().forward(inputs).relu()


class OtherBias(Own):
    def forward(self, inputs):
        return inputs @ self.matrix.T - self.shift


class Pair(Own):
    def forward(self, inputs):
        return super().forward(inputs), None


class Table(Own):
    """A weight that is used like an embedding's."""

    def forward(self, index):
        return self.matrix[index]


class ThreeParameters(Own):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(OUT))


class Clamped(Own):
    def forward(self, inputs):
        return super().forward(inputs).clamp(-1000, 1000)


class WithoutNan(Own):
    def forward(self, inputs):
        return super().forward(inputs).nan_to_num()


class OnlyInThreeDimensions(Own):
    def forward(self, inputs):
        return super().forward(inputs) if inputs.dim() == 3 else -super().forward(inputs)


class Logging(Own):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, inputs):
        self.log.append(inputs.shape)
        return super().forward(inputs)


class MaskedByAnAttribute(Own):
    def __init__(self):
        super().__init__()
        self.mask = torch.tensor(1.0)

    def forward(self, inputs):
        return super().forward(inputs) * self.mask


@pytest.mark.parametrize(
    "kind",
    [Scaled, InTraining, Rectified, OtherBias, Pair, Table, ThreeParameters, Clamped, WithoutNan, OnlyInThreeDimensions,
     Logging, MaskedByAnAttribute],
)  # fmt: skip
def test_what_computes_something_else_is_left_alone(kind):
    layer, state = kind(), torch.get_rng_state()
    assert fastattn.replace(layer).replaced == {}
    assert type(layer) is kind
    assert torch.equal(torch.get_rng_state(), state)
    assert not getattr(layer, "log", None)


def test_reasons():
    class Subclass(torch.nn.Linear):
        pass

    quantised, parametrized = torch.nn.Linear(D, OUT), torch.nn.Linear(D, OUT)
    quantised.weight = torch.nn.Parameter(torch.ones(OUT, D, dtype=torch.int8), requires_grad=False)
    torch.nn.utils.parametrizations.weight_norm(parametrized)
    model = torch.nn.ModuleDict(
        {"a": Subclass(D, OUT), "b": quantised, "c": parametrized, "d": torch.nn.Linear(D, OUT, device="meta"),
         "e": torch.nn.MultiheadAttention(D, 2), "f": Conv1D().to("meta"), "g": torch.nn.Bilinear(D, D, 3)}
    )  # fmt: skip
    report = fastattn.replace(model, only="linear")
    assert report.replaced == {}
    assert report.left == {
        "a": "Subclass is a subclass of torch.nn.Linear",
        "b": "it has torch.int8 values as a parameter",
        "c": "its parameters are parametrized",
        "d": "its parameters are on the meta device: load the weights first",
        "f": "its parameters are on the meta device: load the weights first",
    }


def test_layers_of_torch_that_are_ours_as_a_whole():
    model = torch.nn.TransformerEncoderLayer(D, 2, OUT)
    assert "linear1" not in fastattn.replace(model).replaced
    assert type(model.linear1) is torch.nn.Linear


def test_a_layer_of_fastattn_with_replaced_linears_stays_fused(monkeypatch):
    module = sys.modules["fastattn.nn.feed_forward"]
    calls, original = [], module.feed_forward
    monkeypatch.setattr(
        module, "feed_forward", lambda *args, **options: calls.append(args) or original(*args, **options)
    )
    layer, x = fastattn.nn.FeedForward(D, OUT), torch.randn(3, D)
    expected = layer(x)
    layer.linear1.__class__ = LINEAR
    assert torch.equal(layer(x), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("inside", [fastattn.nn.FeedForward, lambda *sizes: GatedBlock()])
def test_a_class_made_from_a_replaced_one_keeps_its_forward(inside):
    block, x = inside(D, OUT), torch.randn(3, D)
    fastattn.replace(block)
    child = next(m for m in block.modules() if isinstance(m, torch.nn.Linear))
    child.__class__ = LINEAR
    expected = block(x)
    seen = []

    class Observed(LINEAR):
        def forward(self, input):
            seen.append(input)
            return super().forward(input)

    child.__class__ = Observed
    torch.testing.assert_close(block(x), expected)
    assert len(seen) == 1


class GatedBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = (torch.nn.Linear(*s) for s in ((D, OUT), (D, OUT), (OUT, D)))

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_kinds_one_after_the_other():
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, D), "ff": GatedBlock(), "head": torch.nn.Linear(D, 5)})
    model["head"].weight = model["embed"].weight
    first = fastattn.replace(model, only="linear")
    assert set(first.replaced) == {"ff.up", "ff.gate", "ff.down", "head"}
    second = fastattn.replace(model)
    assert set(second.replaced) == {"ff", "head"}
    assert second.replaced["ff"].startswith("gated feed-forward, silu")
    second.undo()
    first.undo()
    assert type(model["head"]) is torch.nn.Linear


def test_hooks_copies_and_tied_weights(calls):
    model = torch.nn.Sequential(torch.nn.Linear(D, D), torch.nn.Linear(D, D), Conv1D(D, D))
    model[1].weight, fired = model[0].weight, []
    model[0].register_forward_hook(lambda *_: fired.append("forward"))
    model[2].register_full_backward_hook(lambda *_: fired.append("backward"))
    x = torch.randn(4, D)
    expected, grads = run(model, x)
    fastattn.replace(model)
    fired.clear()
    got, got_grads = run(model, x)
    assert fired == ["forward", "backward"]
    torch.testing.assert_close((got, got_grads), (expected, grads))
    model[0]._forward_hooks.clear()
    model[2]._backward_hooks.clear()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(twin(x), got)
        assert len(calls) == 3
        assert [type(layer) for layer in twin] == [type(layer) for layer in model]
        assert twin[0].weight is twin[1].weight


@pytest.mark.parametrize("kind", [lambda: torch.nn.Linear(D, OUT), Conv1D], ids=["Linear", "Conv1D"])
def test_compiled_exported_traced(kind):
    layer, x = kind(), torch.randn(2, 5, D)
    expected, grads = run(layer, x)
    fastattn.replace(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, x), (expected, grads))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), expected)
    if isinstance(layer, torch.nn.Linear):  # the forward of Conv1D reads sizes, which torch.fx does not record
        torch.testing.assert_close(torch.fx.symbolic_trace(torch.nn.Sequential(layer))(x), expected)


@pytest.mark.parametrize("kind", [lambda: torch.nn.Linear(D, OUT), Conv1D], ids=["Linear", "Conv1D"])
def test_transforms(kind):
    layer, x = kind(), torch.randn(4, D)
    plain = copy.deepcopy(layer)
    fastattn.replace(layer)
    for function in (
        lambda m: torch.func.jvp(m, (x,), (x.cos(),)),
        lambda m: torch.vmap(m)(x[:, None]),
        lambda m: torch.func.jacrev(m)(x[:1]),
        lambda m: torch.func.functional_call(m, {"weight": m.weight.sin()}, (x,)),
        lambda m: torch.autograd.functional.hessian(lambda x: m(x).square().sum(), x[:1]),
    ):
        torch.testing.assert_close(function(layer), function(plain))


def test_changes_after_it():
    """A layer that is quantised, parametrized, pruned or run under autocast later behaves like the original."""
    x = torch.randn(8, D)

    def autocast(layer):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    def parametrized(layer):
        torch.nn.utils.parametrizations.spectral_norm(layer.eval())
        return layer(x)

    def pruned(layer):
        prune.l1_unstructured(layer, "weight", 0.5)
        return layer(x)

    for change in (autocast, parametrized, pruned):
        plain = torch.nn.Linear(D, OUT)
        ours = copy.deepcopy(plain)
        fastattn.replace(ours)
        torch.manual_seed(0)
        expected = change(plain)
        torch.manual_seed(0)
        got = change(ours)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


class CastsWeights(Own):
    def forward(self, inputs):
        return F.linear(inputs, self.matrix.to(inputs.dtype), self.shift.to(inputs.dtype))


class WithoutAutocast(Own):
    def forward(self, inputs):
        with torch.autocast("cpu", enabled=False):
            return F.linear(inputs.float(), self.matrix.float(), self.shift.float())


def test_casts_of_the_original_layer(calls):
    x = torch.randn(4, D)
    for kind, dtype, autocast in ((CastsWeights, torch.bfloat16, False), (CastsWeights, torch.float64, False),
                                  (WithoutAutocast, torch.float32, True)):  # fmt: skip
        plain = kind()
        layer = copy.deepcopy(plain)
        fastattn.replace(layer)
        calls.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            got, expected = layer(x.to(dtype)), plain(x.to(dtype))
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        assert not calls


@pytest.mark.parametrize("shape", [(), (1,), (1, OUT), (4, OUT)], ids=str)
@pytest.mark.parametrize("kind", [lambda: torch.nn.Linear(D, OUT), Conv1D], ids=["Linear", "Conv1D"])
def test_a_bias_that_is_broadcast(kind, shape):
    layer, x = kind(), torch.randn(4, D)
    layer.bias = torch.nn.Parameter(torch.randn(shape))
    plain = copy.deepcopy(layer)
    layer.bias = torch.nn.Parameter(torch.randn(OUT))
    fastattn.replace(layer)
    layer.bias = torch.nn.Parameter(plain.bias.detach().clone())
    torch.testing.assert_close(run(layer, x), run(plain, x))


def test_patched_functions_of_torch(monkeypatch, calls):
    layer, x = torch.nn.Linear(D, OUT), torch.randn(4, D)
    fastattn.replace(layer)
    monkeypatch.setattr(F, "linear", lambda *args: "patched")
    assert layer(x) == "patched"
    assert not calls
