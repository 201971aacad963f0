"""Mixtures of experts under `replace`: the products of their forward run on ours, whatever torch function they call."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import BACKWARD, assert_accurate
from replaced_cases import calls_of_linear, run
from torch.utils.checkpoint import checkpoint

import fastattn
from fastattn.drop_in import experts
from fastattn.nn import whole
from fastattn.ops._backends import why_not_available

E, D, FF, ROWS = 3, 16, 24, 18


class Experts(torch.nn.Module):
    """Rows of x go to experts one after the other: the first 5 to expert 0, none to expert 1, the others to 2."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Parameter(torch.randn(E, D, FF)), torch.nn.Parameter(torch.randn(E, D, FF))

    def forward(self, x):
        parts = x.split([5, 0, ROWS - 5])
        return torch.cat(
            [self.expert(part, up, down) for part, up, down in zip(parts, self.up, self.down, strict=True)]
        )

    def expert(self, x, up, down):
        return (x @ up).relu() @ down.t()


class ByLinear(Experts):
    def expert(self, x, up, down):
        return F.linear(torch.mm(x, up).relu(), down, bias=down[:, 0])


class ByName(Experts):
    def expert(self, x, up, down):
        out = x.new_empty(len(x), FF)
        with torch.no_grad():
            torch.matmul(x, up, out=out)
        return F.linear(input=torch.mm(input=x, mat2=up).relu(), weight=down)


class Grouped(Experts):
    def forward(self, x):
        ends = torch.tensor([5, 5, ROWS], dtype=torch.int32)
        return torch._grouped_mm(torch._grouped_mm(x, self.up, offs=ends).relu(), self.down.mT, offs=ends)


class Batched(Experts):
    def forward(self, x):
        x = x.expand(E, -1, -1)
        return torch.bmm(torch.bmm(x, self.up).relu(), self.down.mT)


KINDS = [Experts, ByLinear, Grouped, Batched]


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """Records the products that our op computed, of any size."""
    torch.manual_seed(0)
    return calls_of_linear(monkeypatch, experts)


def exact_run(module, x):
    """In fp64 by the plain products: the grouped one of torch has no fp64."""
    twin = copy.deepcopy(module).double()
    twin.__class__ = {Grouped: Experts}.get(type(module), type(module))
    return run(twin, x.double())


@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients(kind, products):
    module, x = kind(), torch.randn(ROWS, D)
    exact, exact_grads = exact_run(module, x)
    before, grads = run(module, x)
    report = fastattn.replace(module)
    assert report.replaced == {"": f"products of experts (was {kind.__name__})"}
    assert not products
    ours, our_grads = run(module, x)
    assert len(products) == 2 * E
    assert_accurate(ours, exact, before)
    for name, grad in our_grads.items():
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, name)
    report.undo()
    assert type(module) is kind
    assert torch.equal(run(module, x)[0], before)


def test_rows_after_the_last_expert():
    class FirstExperts(Experts):
        def forward(self, x):
            return torch._grouped_mm(x, self.up, offs=torch.tensor([5, 5, 9], dtype=torch.int32))[:9]

    module, x = FirstExperts(), torch.randn(ROWS, D)
    expected = torch.cat([x[:5] @ module.up[0], x[5:9] @ module.up[2]])
    fastattn.replace(module)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kind", [*KINDS, ByName])
def test_calls_that_go_to_torch(kind, products):
    """Calls with another dtype go to torch, and so do wrong shapes, for which torch raises its error."""
    module, x = kind(), torch.randn(ROWS, D)
    plain = copy.deepcopy(module)
    fastattn.replace(module)
    with pytest.raises(RuntimeError) as ours:
        module(x[:, 1:])
    with pytest.raises(RuntimeError) as theirs:
        plain(x[:, 1:])
    assert str(ours.value) == str(theirs.value)
    assert torch.equal(module.bfloat16()(x.bfloat16()), plain.bfloat16()(x.bfloat16()))
    assert not products


class Forward(Experts):
    """A forward that is a function of the module and x."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def both(function):
    """(replaced, plain) modules with this forward."""
    plain = Forward(function)
    module = copy.deepcopy(plain)
    fastattn.replace(module)
    return module, plain


ENDS = torch.tensor([5, 5, ROWS], dtype=torch.int32)
PRODUCTS = {
    "linear": lambda m, x: F.linear(x, m.up[0].t(), m.down[0, 0]),
    "matmul": lambda m, x: x @ m.up[0],
    "grouped": lambda m, x: torch._grouped_mm(x, m.up, offs=ENDS),
    "bmm": lambda m, x: torch.bmm(x.expand(E, -1, -1), m.up),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_checkpoints_inside_and_around(name, products):
    x = torch.randn(ROWS, D)
    module, plain = both(lambda m, x: checkpoint(lambda x: PRODUCTS[name](m, x).relu(), x, use_reentrant=False))
    leaf = x.clone().requires_grad_()
    grads = torch.autograd.grad(module(leaf).sum(), [leaf, module.up])
    assert not products
    torch.testing.assert_close(grads, torch.autograd.grad(plain(leaf).sum(), [leaf, plain.up]))
    module, _ = both(PRODUCTS[name])
    checkpoint(module, leaf, use_reentrant=False).sum().backward()
    assert products
    torch.testing.assert_close(leaf.grad, torch.autograd.grad(module(leaf).sum(), leaf)[0])


@pytest.mark.parametrize("name", PRODUCTS)
def test_autocast_is_that_of_torch(name, products):
    module, plain = both(PRODUCTS[name])
    x = torch.randn(ROWS, D)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, expected = module(x), plain(x)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    assert not products


@pytest.mark.parametrize(
    "function",
    [lambda m, x: F.linear(x, m.up[0].t(), m.up[0, 0, :1]), lambda m, x: F.linear(x, m.up[0].t(), m.down[0, 0, 0]),
     lambda m, x: F.linear(x, m.up[0].t(), m.up[1, :1]), lambda m, x: x[0] @ m.up[0], lambda m, x: x @ m.up,
     lambda m, x: x.view(3, 1, 6, D) @ m.up[:, None], lambda m, x: x[:0] @ m.up[0], lambda m, x: x @ m.up[0, :, 0],
     lambda m, x: x @ m.up[0, :, :1].expand(D, 5), lambda m, x: torch.vmap(lambda w: x @ w)(m.up)],
)  # fmt: skip
def test_other_shapes(function):
    module, plain = both(function)
    x = torch.randn(ROWS, D)
    torch.testing.assert_close(module(x), plain(x))


@pytest.mark.parametrize(
    "function",
    [lambda m, x: torch._grouped_mm(x, m.up, offs=ENDS.long()), lambda m, x: torch._grouped_mm(x, m.up, offs=ENDS[0]),
     lambda m, x: torch._grouped_mm(x, m.up, offs=ENDS[:, None]), lambda m, x: torch.mm(x, m.up[0], torch.float32)],
)  # fmt: skip
def test_errors_are_those_of_torch(function):
    errors = []
    for module in both(function):
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            module(torch.randn(ROWS, D))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


class Mixing(torch.nn.Module):
    """A parameter of three dimensions, and a layer of torch.nn."""

    def __init__(self):
        super().__init__()
        self.prompts = torch.nn.Parameter(torch.randn(2, 5, D))
        self.layer = torch.nn.TransformerEncoderLayer(D, 2, FF, 0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x + self.prompts)


class Attending(Mixing):
    def forward(self, x):
        return self.layer(F.scaled_dot_product_attention(x, x, x) + self.prompts)


@pytest.mark.skipif(why_not_available("native", "cpu") is not None, reason="no C++ kernels")
@pytest.mark.parametrize("kind", [Mixing, Attending])
def test_a_layer_inside_stays_one_call(kind, monkeypatch):
    model, x, calls, original = kind(), torch.randn(2, 5, D), [], whole.train_layer
    assert "" in fastattn.replace(model).replaced
    monkeypatch.setattr(whole, "train_layer", lambda *args: calls.append(args) or original(*args))
    model(x)
    assert len(calls) == 1
    with torch.overrides.BaseTorchFunctionMode():  # it sees what the layer calls
        model(x)
    assert len(calls) == 1


def test_copies_and_compile():
    module, x = Experts(), torch.randn(ROWS, D)
    expected = module(x)
    fastattn.replace(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        torch.testing.assert_close(twin(x), expected)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), expected)
