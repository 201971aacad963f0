"""Feed-forward blocks of other libraries: taken over if, and only if, they compute what our op does, and it pays."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import BACKWARD, assert_accurate
from replaced_cases import run

import fastattn

D, FF = 12, 20
ACTIVATIONS = {
    "silu": torch.nn.SiLU, "gelu": torch.nn.GELU, "gelu_tanh": lambda: torch.nn.GELU("tanh"), "relu": torch.nn.ReLU,
}  # fmt: skip


class Gated(torch.nn.Module):
    """The block of Llama and Gemma."""

    def __init__(self, activation="silu", bias=False, p=0.0, ff=FF):
        super().__init__()
        self.up, self.gate = torch.nn.Linear(D, ff, bias=bias), torch.nn.Linear(D, ff, bias=bias)
        self.down, self.act, self.drop = (
            torch.nn.Linear(ff, D, bias=bias),
            ACTIVATIONS[activation](),
            torch.nn.Dropout(p),
        )

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class NoDropout(Gated):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        del self.drop


class Square(NoDropout):
    """A block whose layers all have the same shape: only their values tell them apart."""

    def __init__(self):
        super().__init__(ff=D, bias=True)


class DropsHidden(Gated):
    """The block of T5."""

    def forward(self, hidden_states):
        return self.down(self.drop(F.gelu(self.gate(hidden_states)) * self.up(hidden_states)))


class DropsOutput(Gated):
    def forward(self, x):
        return self.drop(super().forward(x))


class Packed(torch.nn.Module):
    """The block of Phi-3, whose gate is the first half. In the other form the gate is the second half."""

    def __init__(self, bias=False, first=True, p=0.0):
        super().__init__()
        self.gate_up, self.down = torch.nn.Linear(D, 2 * FF, bias=bias), torch.nn.Linear(FF, D, bias=bias)
        self.act, self.first, self.drop = torch.nn.SiLU(), first, torch.nn.Dropout(p)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        gate, up = (gate, up) if self.first else (up, gate)
        return self.down(self.drop(up * self.act(gate)))


class Plain(torch.nn.Module):
    """With dropout of the hidden layer; the activation is in the code."""

    def __init__(self, p=0.0):
        super().__init__()
        self.fc1, self.drop, self.fc2 = torch.nn.Linear(D, FF), torch.nn.Dropout(p), torch.nn.Linear(FF, D)

    def forward(self, x):
        return self.fc2(self.drop(F.relu(self.fc1(x)).square()))


BLOCKS = {
    "silu": NoDropout, "gelu": lambda: NoDropout("gelu", bias=True), "gelu_tanh": lambda: NoDropout("gelu_tanh"),
    "relu": lambda: NoDropout("relu"), "square": Square, "drops hidden": lambda: DropsHidden("gelu"),
    "drops output": lambda: DropsOutput(bias=True), "packed": Packed, "packed, bias": lambda: Packed(bias=True),
    "packed, gate last": lambda: Packed(first=False, bias=True), "plain": Plain,
}  # fmt: skip


@pytest.fixture(params=BLOCKS)
def block(request):
    return BLOCKS[request.param]()


def is_served(block, x):
    with torch.profiler.profile() as profile:
        block(x)
    return any("fastattn::activation" in e.key or "_FeedForward" in e.key for e in profile.key_averages())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_and_gradients(block, dtype):
    x = torch.randn(3, 5, D)
    exact, exact_grads = run(copy.deepcopy(block).double(), x.double())
    block, x, kind, state = block.to(dtype), x.to(dtype), type(block), list(block.state_dict())
    before, grads = run(block, x)
    assert not is_served(block, x)
    report = fastattn.replace(block)
    assert "feed-forward" in report.replaced[""]
    assert is_served(block, x)
    assert list(block.state_dict()) == state
    ours, our_grads = run(block, x)
    assert_accurate(ours, exact, before)
    for name, grad in our_grads.items():
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, f"gradient of {name}")
    report.undo()
    assert type(block) is kind
    assert torch.equal(run(block, x)[0], before)


def test_autocast(block):
    x = torch.randn(3, 5, D)
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(x)
        fastattn.replace(block)
        ours = block(x)
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, atol=0.02, rtol=0.05)


DROPOUTS = (
    lambda p: DropsHidden("gelu", p=p), lambda p: DropsOutput(p=p), Plain, lambda p: Packed(p=p),
)  # fmt: skip


@pytest.mark.parametrize("make", DROPOUTS)
def test_dropout(make):
    """Dropout has the child's rate in training and is off in evaluation; each call reads the child's state."""
    block, x = make(0.5), torch.randn(400, D)
    expected = block.eval()(x)
    fastattn.replace(block)
    torch.testing.assert_close(block(x), expected)
    block.train()
    first, second = block(x), block(x)
    assert not torch.equal(first, second)
    outputs = torch.stack([block(x) for _ in range(200)])
    torch.testing.assert_close(outputs.mean((0, 1)), expected.mean(0), atol=0.05, rtol=0.2)
    block.drop.p = 0.0
    if not isinstance(block, Plain):
        torch.testing.assert_close(block(x), expected)


def test_children_that_were_changed_are_called(block):
    fastattn.replace(block)
    x, down = torch.randn(3, D), block.fc2 if isinstance(block, Plain) else block.down
    expected, fired = block(x), []
    handle = down.register_forward_hook(lambda module, args, y: fired.append(True) or y + 1)
    torch.testing.assert_close(block(x), expected + 1)
    assert fired
    handle.remove()
    if "act" in block._modules:
        block.act = torch.nn.Tanh()
        assert not is_served(block, x)
    with pytest.raises(RuntimeError, match="shapes"):
        block(torch.randn(3, D + 1))


def test_copies_and_tools(block):
    x = torch.randn(3, D)
    fastattn.replace(block)
    expected, grads = run(block, x)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(twin) is type(block)
        assert torch.equal(twin(x), expected)
    torch._dynamo.reset()
    got, got_grads = run(torch.compile(block, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(got, expected)
    for a, b in zip(got_grads.values(), grads.values(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), expected)


class Reversed(NoDropout):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) + self.up(x))


class WithResidual(NoDropout):
    def forward(self, x):
        return x + super().forward(x)


class OtherActivation(NoDropout):
    def __init__(self):
        super().__init__()
        self.act = torch.nn.Mish()


class Doubled(NoDropout):
    def forward(self, x):
        return super().forward(x) * (2.0 if self.training else 1.0)


class Limited(NoDropout):
    """The block of some mixtures of experts."""

    def forward(self, x):
        return self.down(self.act(self.gate(x)).clamp(max=10) * self.up(x).clamp(-10, 10))


class WithoutAutocast(NoDropout):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float())


class PlainWithoutDropout(Plain):
    def __init__(self):
        super().__init__()
        self.drop = torch.nn.Identity()


class Functional(NoDropout):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, self.training)


@pytest.mark.parametrize(
    "kind",
    [Reversed, WithResidual, OtherActivation, Doubled, Limited, WithoutAutocast, PlainWithoutDropout, Functional],
)
def test_what_is_left_alone(kind):
    block, state = kind(), torch.get_rng_state()
    assert fastattn.replace(block, only="feed_forward").replaced == {}
    assert type(block) is kind
    assert torch.equal(torch.get_rng_state(), state)


def test_reasons():
    block = NoDropout()
    block.forward = block.forward
    assert fastattn.replace(block).left == {"": "forward was replaced on this NoDropout object"}
    assert "meta device" in fastattn.replace(NoDropout().to("meta")).left[""]
