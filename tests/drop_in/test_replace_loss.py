"""The output layer of language models: its loss needs no logits, and logits that are read are computed."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from allocated import allocated_peak
from oracle import BACKWARD, assert_accurate

import fastattn
from fastattn.drop_in.logits import DeferredLogits

V, D, BATCH, SEQLEN = 50, 16, 2, 9


class Lm(torch.nn.Module):
    """A language model without layers: the output layer has the weight of the embedding, as in small GPTs."""

    def __init__(self, head=lambda logits: logits, bias=False, vocab=V, d=D):
        super().__init__()
        self.embed, self.lm_head = torch.nn.Embedding(vocab, d), torch.nn.Linear(d, vocab, bias=bias)
        self.mix = torch.nn.Linear(d, d)
        self.embed.weight = self.lm_head.weight
        self.head = head

    def forward(self, tokens):
        return self.head(self.lm_head(self.mix(self.embed(tokens)).tanh()))


TOKENS = torch.randint(V, (BATCH, SEQLEN), generator=torch.Generator().manual_seed(0))
TARGET = torch.where(TOKENS % 7 == 0, -100, TOKENS.flip(1))


def shifted(logits, target=TARGET, **options):
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), target[:, 1:].reshape(-1), **options)


LOSSES = {
    "rows": lambda logits: F.cross_entropy(logits.view(-1, V), TARGET.view(-1)),
    "size": lambda logits: F.cross_entropy(logits.view(-1, logits.size(-1)), TARGET.view(-1)),
    "shift": lambda logits: shifted(logits),
    "ellipsis": lambda logits: F.cross_entropy(
        logits[..., :-1, :].contiguous().view(-1, V), TARGET[..., 1:].contiguous().view(-1)
    ),
    "float": lambda logits: F.cross_entropy(logits.float().flatten(0, 1), TARGET.flatten()),
    "to": lambda logits: F.cross_entropy(logits.to(torch.float32).view(BATCH * SEQLEN, V), TARGET.flatten()),
    "sum": lambda logits: shifted(logits, reduction="sum") / 7,
    "none": lambda logits: shifted(logits, reduction="none").square().mean(),
    "smoothed": lambda logits: shifted(logits, label_smoothing=0.2),
    "ignore 3": lambda logits: F.cross_entropy(logits.view(-1, V), TOKENS.view(-1), ignore_index=3),
    "module": lambda logits: torch.nn.CrossEntropyLoss()(logits.view(-1, V), TARGET.view(-1)),
    "rows of a mask": lambda logits: F.cross_entropy(logits[TARGET > 5], TARGET[TARGET > 5]),
}
HEADS = {
    "plain": lambda logits: logits,
    "softcap": lambda logits: torch.tanh(logits / 3.0) * 3.0,
    "softcap, other form": lambda logits: 3 * (logits * (1 / 3)).tanh(),
    "tanh": lambda logits: logits.tanh(),
    "scale": lambda logits: logits * 0.0625,
    "odd scale": lambda logits: logits / 3,
    "scale and softcap": lambda logits: torch.tanh(logits * 0.5) * 4,
    "bias of a buffer": lambda logits: logits + torch.linspace(-1, 1, V)[None].to(logits.dtype),
    "bias and softcap": lambda logits: torch.tanh((logits + torch.linspace(-1, 1, V).to(logits.dtype)) / 2) * 2,
}
# the loss needs the elements here
OTHER = {
    "temperature": lambda logits: torch.tanh(torch.tanh(logits)),
    "columns": lambda logits: logits.clamp(max=2.0),
    "negative cap": lambda logits: torch.tanh(logits) * -2,
}


def run(model, loss):
    model.zero_grad()
    logits = model(TOKENS)
    value = loss(logits)
    value.backward()
    return value.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, logits


def replaced(model):
    ours = copy.deepcopy(model)
    ours.lm_head.weight = ours.embed.weight
    report = fastattn.replace(ours, only="loss")
    assert report.replaced == {"lm_head": "output layer whose loss needs no logits"}
    return ours


def compare(model, loss, dtype, computed=False):
    exact, exact_grads, _ = run(copy.deepcopy(model).double(), loss)
    model = model.to(dtype)
    value, grads, logits = run(model, loss)
    ours, our_grads, our_logits = run(replaced(model), loss)
    assert isinstance(our_logits, DeferredLogits) or computed
    if not computed:
        assert our_logits._made is None
    slack = torch.finfo(dtype).eps * exact.abs().item()
    assert_accurate(ours, exact, value, slack=slack)
    for name, grad in our_grads.items():
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, f"gradient of {name}")
    assert torch.equal(our_logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss, dtype):
    if dtype == torch.float32 or loss not in ("float", "to"):  # in fp64 these are less exact than the model
        compare(Lm(bias=True), LOSSES[loss], dtype)


@pytest.mark.parametrize("head", HEADS)
def test_what_models_do_to_logits(head):
    compare(Lm(HEADS[head], bias=True), LOSSES["shift"], torch.float32)


def test_a_scale_that_half_precision_rounds_is_applied_to_the_logits():
    compare(Lm(HEADS["scale"]), LOSSES["shift"], torch.bfloat16)
    compare(Lm(HEADS["odd scale"]), LOSSES["shift"], torch.bfloat16, computed=True)


@pytest.mark.parametrize("head", OTHER)
def test_other_losses_compute_the_logits(head):
    compare(Lm(OTHER[head]), LOSSES["shift"], torch.float32, computed=True)


@pytest.mark.parametrize(
    "loss",
    [
        lambda logits: logits.softmax(-1)[..., 0].sum(),
        lambda logits: (logits * torch.linspace(-1, 1, V)).sum(),
        lambda logits: F.cross_entropy(logits.transpose(1, 2), TARGET),
        lambda logits: F.cross_entropy(logits.view(-1, V), TARGET.view(-1), weight=torch.linspace(0.5, 1, V)),
        lambda logits: F.cross_entropy(logits.view(-1, V), F.one_hot(TOKENS.view(-1), V).float()),
        lambda logits: logits[0, :, 3:5].sum() + logits[..., 1].sum() + logits[:, TOKENS[0] % SEQLEN, :].sum(),
        lambda logits: logits.view(-1).sum() + logits.reshape(BATCH, -1)[:, 3].sum(),
        lambda logits: torch.logsumexp(logits, -1).sum() - logits.gather(-1, TOKENS[..., None]).sum(),
    ],
)
def test_reading_the_logits_gives_those_of_the_layer(loss):
    model = Lm(bias=True)
    value, grads, _ = run(model, loss)
    ours, our_grads, _ = run(replaced(model), loss)
    torch.testing.assert_close(ours, value)
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, grads[name])


def test_it_looks_like_a_tensor():
    logits, expected = replaced(model := Lm())(TOKENS), model(TOKENS)
    assert isinstance(logits, torch.Tensor)
    assert (logits.shape, logits.dtype, logits.device, logits.dim()) == (
        expected.shape,
        torch.float32,
        expected.device,
        3,
    )
    assert logits.requires_grad
    assert not logits.is_leaf
    assert len(logits) == BATCH
    assert logits._made is None
    assert torch.equal(logits.detach().argmax(-1), expected.argmax(-1))
    assert repr(logits) == repr(logits.elements())
    assert torch.equal(pickle.loads(pickle.dumps(logits.detach())), expected)
    with torch.no_grad():
        assert not logits.exp().requires_grad
    assert logits.exp().requires_grad


def test_changes_in_place_count():
    def loss(logits):
        logits = logits * 1
        with torch.no_grad():
            logits[..., :5] = 0.0
        return shifted(logits)

    def scaled(logits):
        return shifted((logits + 0.0).div_(2.0))

    def hooked(logits):
        logits = logits * 1
        logits.register_hook(lambda grad: grad * 2)
        return shifted(logits)

    for function in (loss, scaled, hooked):
        model = Lm()
        value, grads, _ = run(model, function)
        ours, our_grads, _ = run(replaced(model), function)
        torch.testing.assert_close(ours, value)
        torch.testing.assert_close(our_grads["mix.weight"], grads["mix.weight"])


def test_a_change_in_place_that_another_view_would_see_raises():
    model = replaced(Lm())
    logits = model(TOKENS)
    view = logits[:, :-1]
    with torch.no_grad():
        view[..., 0] = 7.0
    assert (view[..., 0] == 7).all()
    for read in (torch.sum, LOSSES["rows"]):
        with pytest.raises(RuntimeError, match=r"changed in place: .* clone\(\) them before"):
            read(logits)
    copied = model(TOKENS).clone()
    copied.detach()[..., 0] = 7.0
    assert (copied[..., 0] == 7).all()


def test_reading_under_another_autocast():
    model, ours = (lm := Lm()), replaced(lm)
    logits = ours(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits + 0, model(TOKENS)) is False
    torch.testing.assert_close(logits.elements(), model(TOKENS))
    assert logits.elements().dtype == torch.float32


def test_code_that_only_autograd_sees_gets_gradients():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits * 2

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    model = Lm(HEADS["softcap"], bias=True)
    value, grads, _ = run(model, lambda logits: Twice.apply(logits).square().sum())
    ours, our_grads, _ = run(replaced(model), lambda logits: Twice.apply(logits).square().sum())
    assert torch.equal(ours, value)
    for name, grad in our_grads.items():
        torch.testing.assert_close(grad, grads[name])


def test_reading_after_the_weights_changed_raises():
    model = replaced(Lm())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    logits = model(TOKENS)
    shifted(logits).backward()
    assert logits.argmax(-1).shape == TOKENS.shape
    other = model(TOKENS)
    optimizer.step()
    logits.argmax(-1)  # was read before
    with pytest.raises(RuntimeError, match=r"read logits before optimizer.step\(\)"):
        other.argmax(-1)
    with pytest.raises(RuntimeError, match=r"read logits before optimizer.step\(\)"):
        shifted(other)


def test_when_nothing_is_deferred():
    model = replaced(Lm())
    for change in (
        lambda: model.eval(),
        lambda: model.train().lm_head.register_forward_hook(lambda *args: None),
    ):
        handle = change()
        assert type(model(TOKENS)) is torch.Tensor
    handle.remove()
    with torch.no_grad():
        assert type(model(TOKENS)) is torch.Tensor
    assert type(model(TOKENS)) is DeferredLogits
    torch.nn.utils.parametrize.register_parametrization(model.lm_head, "weight", torch.nn.Identity())
    assert type(model(TOKENS)) is torch.Tensor


def test_a_parametrized_weight_is_computed_once():
    """Each reading of spectral_norm's weight is a step of its power iteration."""
    plain = Lm().train()
    model = copy.deepcopy(plain)
    assert "output layer" in fastattn.replace(model).replaced["lm_head"]
    for lm in (plain, model):
        torch.manual_seed(0)
        torch.nn.utils.parametrizations.spectral_norm(lm.lm_head)
        shifted(lm(TOKENS)).backward()
    ours, theirs = (lm.lm_head.parametrizations.weight for lm in (model, plain))
    assert torch.equal(ours[0]._u, theirs[0]._u)
    torch.testing.assert_close(ours.original.grad, theirs.original.grad)


def test_compiled():
    model = Lm(HEADS["softcap"])
    value, grads, _ = run(model, LOSSES["shift"])
    torch._dynamo.reset()
    ours = replaced(model)
    got, got_grads, logits = run(torch.compile(ours, fullgraph=True, backend="aot_eager"), LOSSES["shift"])
    assert type(logits) is torch.Tensor
    torch.testing.assert_close(got, value)
    torch.testing.assert_close(got_grads["_orig_mod.mix.weight"], grads["mix.weight"])
    compiled_loss = torch.compile(LOSSES["shift"], backend="aot_eager")
    got, got_grads, _ = run(ours, compiled_loss)
    torch.testing.assert_close(got, value)
    torch.testing.assert_close(got_grads["mix.weight"], grads["mix.weight"])


def test_autocast():
    model = Lm(bias=True)

    def loss(logits):
        assert logits.dtype == torch.bfloat16
        return shifted(logits.float())

    def under_autocast(model):
        with torch.autocast("cpu", torch.bfloat16):
            return run(model, loss)

    exact, exact_grads, _ = run(copy.deepcopy(model).double(), LOSSES["shift"])
    value, grads, logits = under_autocast(model)
    ours, our_grads, our_logits = under_autocast(replaced(model))
    assert our_logits._made is None
    assert_accurate(ours, exact, value, slack=0.01)
    for name, grad in our_grads.items():
        assert_accurate(grad, exact_grads[name], grads[name], BACKWARD, f"gradient of {name}", slack=1e-4)
    assert torch.equal(our_logits, logits)


def test_the_loss_of_half_logits_under_autocast():
    """Autocast computes it in fp32."""
    model, tokens = Lm(), torch.randint(20, (2, 7))
    losses = []
    for twin in (model, replaced(copy.deepcopy(model))):
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(F.cross_entropy(twin(tokens).flatten(0, 1), tokens.flatten()))
    assert losses[1].dtype == losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)


def test_memory_of_a_step():
    """At 2048 tokens and 8000 words the logits are 64 MB; the weight and its gradient are 1 MB."""
    model = replaced(Lm(vocab=8000, d=16))
    tokens = torch.randint(8000, (2, 1024))

    def step():
        model.zero_grad(set_to_none=False)
        logits = model(tokens)
        F.cross_entropy(logits[:, :-1].reshape(-1, 8000), tokens[:, 1:].reshape(-1)).backward()
        return ()

    step()
    logits_bytes = 4 * tokens.numel() * 8000
    assert allocated_peak(step) < 0.4 * logits_bytes


def test_linear_layers_that_are_no_output_layers():
    model = torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, V))
    assert fastattn.replace(model, only="loss").replaced == {}


def test_lora_on_the_output_layer():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    ours = replaced(model := Lm())
    found = []
    for lm in (model, ours):
        torch.manual_seed(0)
        lora = peft.get_peft_model(lm, config)
        loss = shifted(lora(TOKENS))
        loss.backward()
        found.append((loss, *[p.grad for p in lora.parameters() if p.requires_grad]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
