"""MaskedLM and Classifier: both kinds of layers agree, padding changes nothing, pretrained weights are transferred."""

import pytest
import torch
import torch.nn.functional as F
from model_cases import LAYERS, OPTIONS, VOCAB, assert_both_layers_agree, build, gradients, random_tokens

from fastattn.models import Classifier, MaskedLM, load_encoder
from fastattn.models.classifier import BODIES

LENGTHS = torch.tensor([9, 16, 1])
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
layers = pytest.mark.parametrize("layers", LAYERS)
bodies = pytest.mark.parametrize("body", BODIES)
transformer_options = {
    name: {key: value for key, value in changes.items() if key != "tied"} for name, changes in OPTIONS.items()
}


def masked_targets():
    targets = random_tokens(3, 16, seed=2)
    targets[torch.rand(3, 16, generator=torch.Generator().manual_seed(3)) < 0.7] = -100
    return targets.masked_fill(torch.arange(16) >= LENGTHS[:, None], -100)


@options
def test_masked_lm_of_both_layers_agrees(options):
    tokens, targets = random_tokens(3, 16), masked_targets()
    valid = torch.arange(16) < LENGTHS[:, None]
    assert_both_layers_agree(
        lambda layers: build(MaskedLM, layers, **options),
        lambda model, with_targets: (
            model(tokens, LENGTHS, targets if with_targets else None) if with_targets else model(tokens, LENGTHS)[valid]
        ),
    )


@pytest.mark.parametrize("tied", [True, False])
def test_masked_lm_with_a_transform_of_both_layers_agrees(tied):
    tokens, targets = random_tokens(3, 16), masked_targets()
    changes = {"head_transform": True, "norm_first": False, "norm_eps": 1e-3, "label_smoothing": 0.1, "tied": tied}
    assert_both_layers_agree(
        lambda layers: build(MaskedLM, layers, **changes),
        lambda model, with_targets: (
            model(tokens, LENGTHS, targets) if with_targets else model(tokens, torch.tensor([16, 16, 16]))
        ),
    )
    model = build(MaskedLM, "torch", **changes).eval()
    x = torch.randn(2, 32)
    weight = model.encoder.token_embedding.weight if tied else model.head.weight
    y = F.layer_norm(F.gelu(F.linear(x, model.head.dense.weight, model.head.dense.bias)), (32,), eps=1e-3)
    torch.nn.init.normal_(model.head.bias)
    torch.testing.assert_close(model.head(x, model.encoder.token_embedding), y @ weight.T + model.head.bias)


@options
@layers
def test_padding_does_not_change_a_masked_lm(layers, options):
    model = build(MaskedLM, layers, **options).eval()
    tokens = random_tokens(3, 16)
    with torch.no_grad():
        logits = model(tokens, LENGTHS)
        for row, length in enumerate(LENGTHS.tolist()):
            alone = model(tokens[row : row + 1, :length], LENGTHS[row : row + 1])
            torch.testing.assert_close(logits[row, :length], alone[0], rtol=1e-4, atol=1e-5)
        changed = torch.where(torch.arange(16) < LENGTHS[:, None], tokens, (tokens + 3) % VOCAB)
        torch.testing.assert_close(model(changed, LENGTHS)[0, :9], logits[0, :9], rtol=0, atol=1e-6)
        changed[0, 8] = (changed[0, 8] + 1) % VOCAB  # a token sees the tokens after it
        assert not torch.allclose(model(changed, LENGTHS)[0, 0], logits[0, 0], atol=1e-5)


@layers
def test_masked_lm_predicts_at_the_chosen_positions_alone(layers):
    model, targets = build(MaskedLM, layers), masked_targets()
    tokens = random_tokens(3, 16)
    expected = F.cross_entropy(model(tokens, LENGTHS).flatten(0, 1), targets.flatten())
    seen = []
    model.head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    torch.testing.assert_close(model(tokens, LENGTHS, targets), expected)
    assert seen == [(targets != -100).sum().item()]


@layers
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_to_predict_costs_nothing(layers, tied):
    model = build(MaskedLM, layers, tied=tied, label_smoothing=0.1)
    loss = model(random_tokens(2, 5), torch.tensor([5, 2]), torch.full((2, 5), -100))
    assert loss.item() == 0
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@layers
def test_checkpointing_an_encoder_is_bit_for_bit_the_same_with_dropout(layers):
    results = []
    for checkpointing in (False, True):
        model = build(MaskedLM, layers, dropout=0.3, checkpointing=checkpointing, norm_first=False)
        torch.manual_seed(5)
        results.append(gradients(model, model(random_tokens(3, 16), LENGTHS, masked_targets())))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def classifier(body, layers="fastattn", n_classes=5, **changes):
    return build(Classifier, layers, n_classes, body=body, **changes)


@bodies
def test_classifier_of_both_layers_agrees(body):
    tokens, targets = random_tokens(3, 16), torch.tensor([0, 4, 2])
    for pooling in ("mean", "first", "pooler") if body == "transformer" else ("mean",):
        assert_both_layers_agree(
            lambda layers, pooling=pooling: classifier(body, layers, pooling=pooling),
            lambda model, with_targets: model(tokens, LENGTHS, targets if with_targets else None),
        )


@pytest.mark.parametrize("options", transformer_options.values(), ids=transformer_options)
def test_transformer_classifier_of_both_layers_agrees(options):
    tokens, targets = random_tokens(3, 16), torch.tensor([0, 4, 2])
    assert_both_layers_agree(
        lambda layers: classifier("transformer", layers, **options),
        lambda model, with_targets: model(tokens, LENGTHS, targets if with_targets else None),
    )


@bodies
@layers
def test_padding_does_not_change_a_classifier(layers, body):
    model = classifier(body, layers)
    tokens, targets = random_tokens(3, 16), torch.tensor([1, 0, 3])
    logits = model(tokens, LENGTHS)
    assert logits.shape == (3, 5)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(tokens[row : row + 1, :length], LENGTHS[row : row + 1])
        torch.testing.assert_close(logits[row], alone[0], rtol=1e-4, atol=1e-5)
    changed = torch.where(torch.arange(16) < LENGTHS[:, None], tokens, (tokens + 3) % VOCAB)
    torch.testing.assert_close(model(changed, LENGTHS), logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(model(tokens, LENGTHS, targets), F.cross_entropy(logits, targets))


def test_bag_of_words_counts_each_token_once():
    model = classifier("bag_of_words")
    torch.nn.init.normal_(model.bias)
    tokens = torch.tensor([[3, 7, 3, 3, 0, 9], [0, 0, 19, 5, 5, 5]])
    weight = model.token_embedding.weight
    expected = torch.stack([weight[[0, 3, 7]].sum(0), weight[[0, 19]].sum(0)]) + model.bias
    torch.testing.assert_close(model(tokens, torch.tensor([5, 3])), expected)
    assert model.num_parameters() == VOCAB * 5 + 5


def test_convolutions_take_the_maximum_over_windows():
    model = classifier("cnn", d_model=8)
    tokens = random_tokens(1, 6)
    x, maxima = F.pad(model.token_embedding(tokens)[0], (0, 0, 2, 2)), []
    for conv, first, last in zip(model.convolutions, (1, 1, 0), (7, 7, 6), strict=True):
        width = conv.kernel_size[0]  # windows centred on a token; an even width has one more token after it
        windows = [(conv.weight * x[at : at + width].T).sum((1, 2)) + conv.bias for at in range(first, last)]
        maxima.append(torch.stack(windows).amax(0).relu())
    torch.testing.assert_close(model(tokens, torch.tensor([6])), model.head(torch.cat(maxima))[None])


@pytest.mark.parametrize("body", ["lstm", "gru"])
def test_recurrent_states_are_averaged_in_both_directions(body):
    model = classifier(body, n_layer=1)
    tokens = random_tokens(1, 4)
    states, _ = model.rnn(model.token_embedding(tokens))
    assert states.shape == (1, 4, 64)
    torch.testing.assert_close(model(tokens, torch.tensor([4])), model.head(states.mean(1)))


@bodies
def test_a_classifier_learns(body):
    """The class is which of two tokens a text contains, at any position."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, VOCAB, (64, 12), generator=generator)
    lengths, targets = torch.randint(1, 13, (64,), generator=generator), torch.arange(64) % 2
    tokens[torch.arange(64), (torch.rand(64, generator=generator) * lengths).long()] = targets
    model = classifier(body, n_classes=2, n_layer=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(30):
        optimizer.zero_grad()
        model(tokens, lengths, targets).backward()
        optimizer.step()
    assert (model(tokens, lengths).argmax(1) == targets).float().mean() > 0.95


@bodies
def test_classifier_dropout_and_label_smoothing_act_in_training_only(body):
    tokens, targets = random_tokens(3, 16), torch.tensor([1, 0, 3])
    model = classifier(body, dropout=0.5, label_smoothing=0.2)
    if body != "bag_of_words":
        assert not torch.equal(model(tokens, LENGTHS), model(tokens, LENGTHS))
    else:
        expected = F.cross_entropy(model(tokens, LENGTHS), targets, label_smoothing=0.2)
        torch.testing.assert_close(model(tokens, LENGTHS, targets), expected)
    model.eval()
    expected = F.cross_entropy(model(tokens, LENGTHS), targets)
    torch.testing.assert_close(model(tokens, LENGTHS, targets), expected)


def test_initialisation_of_each_body():
    # uniform within 1/sqrt(32), as torch.nn initialises it
    assert classifier("lstm").rnn.weight_hh_l0.abs().max() > 0.15
    assert classifier("lstm", init="normal").rnn.weight_hh_l0.std().item() == pytest.approx(0.02, rel=0.1)
    for body in BODIES[1:]:
        assert classifier(body).token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)
    assert classifier("transformer").encoder.blocks[0].linear2.weight.std().item() == pytest.approx(0.01, rel=0.1)


@layers
def test_pretrained_encoder_moves_into_a_classifier(layers):
    pretrained, model = build(MaskedLM, layers, tied=False), build(Classifier, layers, 5, seed=9)
    before = model.head.weight.clone()
    result = load_encoder(model, pretrained.state_dict())
    assert set(result.loaded) == {name for name in model.state_dict() if name.startswith("encoder.")}
    assert result.missing == []
    assert result.unused == ["head.weight"]
    tokens = random_tokens(3, 16)
    assert torch.equal(model.encoder(tokens, lengths=LENGTHS), pretrained.encoder(tokens, lengths=LENGTHS))
    assert torch.equal(model.head.weight, before)
    deeper = build(Classifier, layers, 5, n_layer=3)
    result = load_encoder(deeper, pretrained.state_dict())
    assert result.missing == [name for name in deeper.state_dict() if name.startswith("encoder.blocks.2.")]


def test_what_does_not_fit_an_encoder_is_told_and_changes_nothing():
    model = build(Classifier, "torch", 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    longer = build(MaskedLM, "torch", block_size=17).state_dict()
    with pytest.raises(ValueError, match=r"position_embedding.weight must have shape \(16, 32\), got \(17, 32\)"):
        load_encoder(model, longer)
    with pytest.raises(ValueError, match="the state has no encoder, only head"):
        load_encoder(model, {"head.weight": torch.zeros(5, 32)})
    with pytest.raises(ValueError, match="the model must have an encoder"):
        load_encoder(classifier("gru"), longer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"body": "mlp"}, "body must be 'transformer' or .*, got 'mlp'"),
        ({"pooling": "max"}, "pooling must be 'mean' or 'first' or 'pooler', got 'max'"),
        ({"body": "gru", "pooling": "first"}, "pooling must be 'mean' with the body 'gru', got 'first'"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and below 1, got -0.1"),
    ],
)
def test_wrong_classifiers_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        build(Classifier, "torch", 5, **changes)


def test_tokens_without_a_batch_are_told():
    with pytest.raises(ValueError, match=r"tokens must have shape \(batch, seqlen\), got \(5,\)"):
        classifier("transformer")(random_tokens(1, 5)[0], torch.tensor([5]))


@bodies
def test_wrong_lengths_are_told(body):
    model = classifier(body)
    with pytest.raises(ValueError, match="a row may have at most block_size = 16 tokens, got 17"):
        model(random_tokens(1, 17), torch.tensor([17]))
    for lengths, message in (
        ([4, 0], "lengths must be from 1 to 4, got 0"),
        ([5, 1], "lengths must be from 1 to 4, got 5"),
        ([4], r"lengths must have shape \(2,\), one length per row, got \(1,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(random_tokens(2, 4), torch.tensor(lengths))
