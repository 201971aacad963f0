"""CausalLM: the published shape, equal weights for both kinds of layers, and that it learns."""

import pytest
import torch
import torch.nn.functional as F

from fastattn.models import CausalLM, KeyValueCache, backbone
from fastattn.training.inspect.generate import beam_search, generate_tokens
from fastattn.training.messages import UsageError

LAYERS = ("torch", "fastattn")


def make_model(layers, *, seed=0, vocab_size=20, **changes):
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 4, "d_model": 32, "block_size": 16, "dropout": 0.0, "bias": True, **changes}
    return CausalLM(vocab_size, layers=layers, **shape)


def random_tokens(*shape, vocab_size=20, seed=1):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False])
def test_same_seed_same_weights_for_both_layers(bias):
    ours, theirs = (make_model(layers, bias=bias, dropout=0.1).state_dict() for layers in LAYERS)
    assert list(ours) == list(theirs)
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("bias", [True, False])
def test_both_layers_give_the_same_loss_and_gradients(bias):
    tokens, targets = random_tokens(3, 16), random_tokens(3, 16, seed=2)
    models = [make_model(layers, bias=bias) for layers in LAYERS]
    losses = [model(tokens, targets) for model in models]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(
            ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("layers", LAYERS)
def test_published_size(layers):
    model = make_model(layers, vocab_size=65, n_layer=4, d_model=128, block_size=64, bias=False)
    assert model.num_parameters() == 795_904
    assert sum(p.numel() for p in model.parameters()) == 795_904 + 64 * 128


@pytest.mark.parametrize("layers", LAYERS)
def test_initialisation(layers):
    model = make_model(layers, vocab_size=200, n_layer=8, d_model=128)
    for name, parameter in model.named_parameters():
        if name.endswith(("out_proj.weight", "linear2.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / 16**0.5, rel=0.05)
        elif parameter.dim() > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05)
        else:
            assert torch.all(parameter == (0 if name.endswith("bias") else 1))


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_no_token_sees_a_later_one(layers, training):
    model = make_model(layers).train(training)
    tokens = random_tokens(2, 16)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 7) % 20
    with torch.no_grad():
        before, after = model(tokens), model(changed)
        shorter = model(tokens[:, :9])
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    torch.testing.assert_close(before[:, :9], shorter, rtol=0, atol=1e-5)
    assert not torch.allclose(before[:, 9:], after[:, 9:], atol=1e-3)


@pytest.mark.parametrize("layers", LAYERS)
def test_loss_is_the_mean_cross_entropy(layers):
    model = make_model(layers)
    tokens, targets = random_tokens(3, 10), random_tokens(3, 10, seed=2)
    log_p = F.log_softmax(model(tokens).double(), -1)
    expected = -log_p.gather(-1, targets[..., None]).mean()
    assert model(tokens, targets).item() == pytest.approx(expected.item(), abs=1e-5)


def test_output_layer_is_the_embedding():
    model = make_model("torch")
    tokens = random_tokens(1, 4, vocab_size=19)
    with torch.no_grad():
        before = model(tokens)
        model.token_embedding.weight[19] += 1.0  # a token that is not in the input
        after = model(tokens)
    assert torch.equal(before[..., :19], after[..., :19])
    assert not torch.allclose(before[..., 19], after[..., 19])


@pytest.mark.parametrize("layers", LAYERS)
def test_dropout_drops_in_training_only(layers):
    model = make_model(layers, dropout=0.3)
    tokens = random_tokens(2, 16)
    torch.manual_seed(3)
    first, second = model(tokens), model(tokens)
    assert not torch.allclose(first, second)
    torch.manual_seed(3)
    assert torch.equal(model(tokens), first)
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_dropout_of_the_embeddings_is_ours_where_nothing_hangs_on_it(monkeypatch):
    calls, original = [], backbone.dropout
    monkeypatch.setattr(backbone, "dropout", lambda *args: calls.append(args) or original(*args))
    tokens = torch.zeros(2, 4, dtype=torch.int64)
    model = make_model("fastattn", dropout=0.3).train()
    model(tokens)
    assert [p for _, p in calls] == [0.3]
    model.eval()(tokens)
    make_model("torch", dropout=0.3).train()(tokens)
    seen = []
    model.train().dropout.register_forward_hook(lambda *_: seen.append(1))
    model(tokens)
    model.dropout = torch.nn.Identity()  # which has no probability
    model(tokens)
    assert (len(calls), len(seen)) == (1, 1)


def test_wrong_sizes_are_told():
    with pytest.raises(ValueError, match="d_model must be a multiple of n_head = 4, got 30"):
        make_model("torch", d_model=30)
    with pytest.raises(ValueError, match="layers must be 'fastattn' or 'torch', got 'jax'"):
        make_model("jax")
    with pytest.raises(ValueError, match="at most block_size = 16 tokens, got 17"):
        make_model("torch")(random_tokens(1, 17))


@pytest.mark.parametrize("layers", LAYERS)
def test_learns_a_tiny_text_by_heart(layers):
    text = random_tokens(1, 17)
    inputs, targets = text[:, :-1], text[:, 1:]
    model = make_model(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = model(inputs, targets).item()
    for _ in range(60):
        loss = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert first == pytest.approx(torch.log(torch.tensor(20.0)).item(), abs=0.3)
    assert loss.item() < 0.05
    assert generate_tokens(model, inputs[0, :3].tolist(), 13, temperature=0) == text[0, 3:16].tolist()


@pytest.mark.parametrize("layers", LAYERS)
def test_cached_logits_are_those_of_the_whole_sequence(layers):
    model = make_model(layers).eval()
    tokens = random_tokens(3, 16)
    with torch.no_grad():
        whole = model(tokens)
        for steps in ([16], [1] * 16, [5, 1, 1, 4, 5]):
            cache = KeyValueCache(model, 3)
            parts = [model(part, cache=cache) for part in tokens.split(steps, 1)]
            torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
        cache = KeyValueCache(model, 3)
        model(tokens[:, :9], cache=cache)
        cache.reorder(torch.tensor([2, 0, 0]))
        rows = tokens[[2, 0, 0]]
        torch.testing.assert_close(model(rows[:, 9:], cache=cache), whole[[2, 0, 0], 9:], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="at most block_size = 16 tokens, got 17"):
            model(tokens[:, :1], cache=cache)


@pytest.mark.parametrize("layers", LAYERS)
def test_generation_with_and_without_cache_is_equal(layers):
    model = make_model(layers)
    for options in ({"temperature": 0}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}):
        with_cache, without = (generate_tokens(model, [1, 2], 30, use_cache=use, **options) for use in (True, False))
        assert with_cache == without  # 32 tokens: twice the window
    with_cache, without = (beam_search(model, [1, 2], 20, beams=3, use_cache=use) for use in (True, False))
    assert with_cache == without


def test_generation_follows_seed_temperature_and_top_k():
    model = make_model("torch").train()
    sampled = generate_tokens(model, [1, 2], 30, temperature=1.0, seed=5)
    assert model.training
    assert len(sampled) == 30
    torch.manual_seed(77)  # the state of the global generator does not matter
    assert generate_tokens(model, [1, 2], 30, temperature=1.0, seed=5) == sampled
    assert generate_tokens(model, [1, 2], 30, temperature=1.0, seed=6) != sampled
    greedy = generate_tokens(model, [1, 2], 30, temperature=0)
    assert generate_tokens(model, [1, 2], 30, temperature=1.0, top_k=1, seed=5) == greedy
    tokens = [1, 2]
    model.eval()
    for _ in range(30):
        tokens.append(model(torch.tensor([tokens[-16:]]))[0, -1].argmax().item())
    assert tokens[2:] == greedy


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "prompt must have at least one token"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be at least 0 and finite, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be at least 0 and finite, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
    ],
)
def test_generation_refuses(changes, message):
    arguments = {"prompt": [1], "max_new_tokens": 5, **changes}
    with pytest.raises(UsageError, match=message):
        generate_tokens(make_model("torch"), **arguments)
