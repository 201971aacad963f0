"""Seq2Seq: both kinds of layers agree, padding changes nothing, and searches find what they promise."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from model_cases import LAYERS, OPTIONS, VOCAB, assert_both_layers_agree, build, gradients, random_tokens

from fastattn.models import MaskedLM, Seq2Seq, load_encoder

LENGTHS = torch.tensor([9, 12, 1])
BEGIN, END = 1, 18  # the output of `talkative` ends at once, later or never
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
layers = pytest.mark.parametrize("layers", LAYERS)


def targets():
    target_out = random_tokens(3, 16, seed=3)
    target_out[0, 7:] = target_out[2, 15] = -100
    return random_tokens(3, 16, seed=2), target_out


def talkative(layers="fastattn", **options):
    """A model in evaluation mode whose predictions depend clearly on source and target."""
    model = build(Seq2Seq, layers, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.4 / parameter.std())
    return model


@options
def test_both_layers_agree(options):
    source, (target_in, target_out) = random_tokens(3, 12), targets()
    assert_both_layers_agree(
        lambda layers: build(Seq2Seq, layers, **options),
        lambda model, with_targets: model(source, LENGTHS, target_in, target_out if with_targets else None),
    )


@options
@layers
def test_padding_and_later_tokens_change_nothing(layers, options):
    model = build(Seq2Seq, layers, **options).eval()
    source, (target_in, _) = random_tokens(3, 12), targets()
    with torch.no_grad():
        logits = model(source, LENGTHS, target_in)
        assert logits.shape == (3, 16, VOCAB)
        for row, length in enumerate(LENGTHS.tolist()):
            alone = model(source[row : row + 1, :length], LENGTHS[row : row + 1], target_in[row : row + 1, :7])
            torch.testing.assert_close(logits[row, :7], alone[0], rtol=1e-4, atol=1e-5)
        source[1, 0] = (source[1, 0] + 1) % VOCAB
        changed = model(source, LENGTHS, target_in)
        torch.testing.assert_close(changed[[0, 2]], logits[[0, 2]], rtol=0, atol=1e-6)
        assert not torch.allclose(changed[1], logits[1], atol=1e-6)


@layers
def test_loss_is_the_mean_over_targets_that_count(layers):
    model = build(Seq2Seq, layers)
    source, (target_in, target_out) = random_tokens(3, 12), targets()
    expected = F.cross_entropy(model(source, LENGTHS, target_in).flatten(0, 1), target_out.flatten())
    torch.testing.assert_close(model(source, LENGTHS, target_in, target_out), expected)


@layers
@pytest.mark.parametrize("options", [{}, OPTIONS["Llama"]], ids=["default", "Llama"])
def test_checkpointing_is_bit_for_bit_the_same_with_dropout(layers, options):
    results = []
    for checkpointing in (False, True):
        model = build(Seq2Seq, layers, dropout=0.3, checkpointing=checkpointing, **options)
        torch.manual_seed(5)
        results.append(gradients(model, model(random_tokens(3, 12), LENGTHS, *targets())))
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


@layers
@pytest.mark.parametrize("tied", [True, False])
def test_one_embedding_for_source_target_and_output(layers, tied):
    model = build(Seq2Seq, layers, tied=tied)
    assert model.decoder.token_embedding is model.encoder.token_embedding
    names = [name for name, _ in model.named_parameters() if "token_embedding" in name or name.startswith("head")]
    assert names == ["encoder.token_embedding.weight"] + ([] if tied else ["head.weight"])
    with_positions = sum(parameter.numel() for parameter in model.parameters())
    assert model.num_parameters() == with_positions - 2 * 16 * 32


@options
@layers
def test_cached_search_is_the_uncached(layers, options):
    model = talkative(layers, **options)
    source = random_tokens(3, 12)
    arguments = {"begin": BEGIN, "end": END, "max_new_tokens": 8}
    for beams in (1, 3):
        cached, uncached = (
            model.generate(source, LENGTHS, beams=beams, use_cache=use, **arguments) for use in (True, False)
        )
        assert cached == uncached
        alone = [
            model.generate(source[row : row + 1, :length], LENGTHS[row : row + 1], beams=beams, **arguments)[0]
            for row, length in enumerate(LENGTHS.tolist())
        ]
        assert cached == alone


@layers
def test_greedy_takes_the_most_likely_token_until_the_end(layers):
    model, source = talkative(layers, dropout=0.3), random_tokens(4, 12)
    lengths = torch.arange(5, 9)
    found = model.generate(source, lengths, begin=BEGIN, end=END, max_new_tokens=16)
    ended = 0
    for row, numbers in enumerate(found):
        tokens, expected = [BEGIN], []
        while len(expected) < 16:
            logits = model(source[row : row + 1, : lengths[row]], lengths[row : row + 1], torch.tensor([tokens]))
            tokens.append(logits[0, -1].argmax().item())
            if tokens[-1] == END:
                ended += 1
                break
            expected.append(tokens[-1])
        assert numbers == expected
    assert 0 < ended < 4
    assert len(set(map(tuple, found))) > 1
    model.train()  # it stays in this mode, but nothing is dropped
    assert model.generate(source, lengths, begin=BEGIN, end=END, max_new_tokens=16) == found
    assert model.training


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_a_wide_beam_is_exhaustive_search(length_penalty):
    torch.manual_seed(0)
    model = Seq2Seq(4, n_layer=1, n_head=2, d_model=16, block_size=8).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)
    source, lengths, longest, end = torch.randint(4, (8, 5)), torch.randint(1, 6, (8,)), 3, 3
    found = model.generate(
        source, lengths, begin=0, end=end, max_new_tokens=longest, beams=64, length_penalty=length_penalty
    )
    for row in range(8):
        candidates = []
        for n in range(longest + 1):
            texts = list(itertools.product(range(3), repeat=n))
            paths = torch.tensor([[0, *numbers, end] for numbers in texts])[:, : longest + 1]
            many = len(texts), -1
            logits = model(source[row].expand(many), lengths[row].expand(many[0]), paths[:, :-1])
            log_p = logits.log_softmax(-1).gather(-1, paths[:, 1:, None]).sum((1, 2))
            scores = (log_p / (paths.shape[1] - 1) ** length_penalty).tolist()
            candidates += [(score, list(numbers)) for score, numbers in zip(scores, texts, strict=True)]
        assert found[row] == max(candidates)[1]


@layers
def test_learns_to_reverse(layers):
    source = random_tokens(16, 5) % 15 + 3
    lengths = torch.full((16,), 5)
    begin, end = torch.full((16, 1), BEGIN), torch.full((16, 1), END)
    target_in, target_out = torch.cat([begin, source.flip(1)], 1), torch.cat([source.flip(1), end], 1)
    model = build(Seq2Seq, layers, n_layer=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(source, lengths, target_in, target_out)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    for beams in (1, 2):
        found = model.generate(source, lengths, begin=BEGIN, end=END, max_new_tokens=10, beams=beams)
        assert found == source.flip(1).tolist()


def test_a_pretrained_encoder_moves_in():
    pretrained, model = build(MaskedLM), build(Seq2Seq, seed=9)
    assert load_encoder(model, pretrained.state_dict()).missing == []
    source = random_tokens(3, 12)
    assert torch.equal(model.encode(source, LENGTHS), pretrained.encoder(source, lengths=LENGTHS))


def test_wrong_arguments_are_told():
    model, source = build(Seq2Seq), random_tokens(3, 12)
    arguments = {"begin": BEGIN, "end": END, "max_new_tokens": 4}
    for wrong, message in (
        ({"max_new_tokens": 17}, "max_new_tokens must be from 1 to block_size = 16, got 17"),
        ({"max_new_tokens": 0}, "max_new_tokens must be from 1 to block_size = 16, got 0"),
        ({"beams": 0}, "beams must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(source, LENGTHS, **{**arguments, **wrong})
    with pytest.raises(ValueError, match="target_in must have 3 rows like source, got 2"):
        model(source, LENGTHS, random_tokens(2, 4))
    with pytest.raises(ValueError, match="a row may have at most block_size = 16 tokens, got 17"):
        model(source, LENGTHS, random_tokens(3, 17))
    with pytest.raises(ValueError, match="lengths must be from 1 to 12, got 13"):
        model(source, LENGTHS + 1, random_tokens(3, 4))
    with pytest.raises(ValueError, match="d_model must be a multiple of n_head"):
        build(Seq2Seq, d_model=30)
