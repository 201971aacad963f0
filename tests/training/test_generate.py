"""From logits to text: sampling, the end of a text, beam search, streaming."""

import itertools
import math

import pytest

pytest.importorskip("tokenizers", reason="needs the packages of fastattn[train]")
import torch

from fastattn.training.data.tokenizer import ByteTokenizer, CharTokenizer
from fastattn.training.inspect.generate import (
    beam_search,
    check_sampling,
    generate_tokens,
    next_token_probabilities,
    stream_text,
    stream_tokens,
)
from fastattn.training.messages import UsageError


class Chain(torch.nn.Module):
    """A language model whose next token depends on the last one by a table of probabilities."""

    block_size = 64

    def __init__(self, table):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(table).log())

    def forward(self, tokens):
        return self.logits[tokens]


def probabilities(values, **options):
    return next_token_probabilities(torch.tensor([values]).log(), **options)[0].tolist()


def test_probabilities():
    p = [0.5, 0.3, 0.15, 0.05]
    assert probabilities(p) == pytest.approx(p)
    assert probabilities(p, temperature=0) == [1, 0, 0, 0]
    assert probabilities(p, temperature=0.5) == pytest.approx([x * x / sum(y * y for y in p) for x in p])
    assert probabilities(p, top_k=2) == pytest.approx([0.625, 0.375, 0, 0])
    assert probabilities(p, top_k=9) == pytest.approx(p)
    assert probabilities(p, top_p=0.5) == pytest.approx([1, 0, 0, 0])
    assert probabilities(p, top_p=0.51) == pytest.approx([0.625, 0.375, 0, 0])
    assert probabilities(p, top_p=1e-9) == [1, 0, 0, 0]
    assert probabilities(p, top_p=1.0) == pytest.approx(p)
    assert probabilities(p[::-1], top_k=3, top_p=0.7) == pytest.approx([0, 0, 0.375, 0.625])


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 20.0])  # from one dominant token to almost equal ones
@pytest.mark.parametrize("top_p", [0.1, 0.9, 0.999])
def test_top_p_keeps_what_sorting_the_vocabulary_would(scale, top_p):
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * scale
    logits += torch.arange(2000) * 1e-4  # makes all values different
    found = next_token_probabilities(logits, top_p=top_p)
    ordered, index = logits.double().softmax(-1).sort(descending=True)
    kept = ordered * (ordered.cumsum(-1) - ordered < top_p - 1e-6)
    expected = torch.zeros_like(kept).scatter(1, index, kept / kept.sum(-1, keepdim=True))
    torch.testing.assert_close(found.double(), expected, atol=1e-3 / 2000, rtol=2e-3)
    assert ((found > 0).sum(-1) - (expected > 0).sum(-1)).abs().max() <= 1  # in fp32 the set may differ by one token


def test_repetition_penalty_divides_or_multiplies_once():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    got = next_token_probabilities(logits, torch.tensor([[0, 1, 1]]), repetition_penalty=2.0)
    torch.testing.assert_close(got, torch.tensor([[1.0, -2.0, 0.5]]).softmax(-1))
    assert torch.equal(logits, torch.tensor([[2.0, -1.0, 0.5]]))


def test_draws_follow_the_probabilities():
    model = Chain([[0.7, 0.2, 0.1]] * 3)
    drawn = generate_tokens(model, [0], 3000, temperature=1.0, seed=1)
    for token, p in enumerate((0.7, 0.2, 0.1)):
        assert abs(drawn.count(token) / 3000 - p) < 4 * math.sqrt(p * (1 - p) / 3000)
    assert set(generate_tokens(model, [0], 300, temperature=1.0, top_p=0.8)) == {0, 1}


def test_stop_tokens_end_the_text():
    model = Chain([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]).train()
    assert generate_tokens(model, [0], 5, temperature=0) == [1, 2, 0, 1, 2]
    assert generate_tokens(model, [0], 5, temperature=0, stop=(0,)) == [1, 2]
    assert generate_tokens(model, [0], 5, temperature=0, stop=(1,)) == []
    assert model.training


def test_tokens_come_one_by_one():
    model = Chain([[0.5, 0.5]] * 2).train()
    stream = stream_tokens(model, [0], 10**9)
    assert len(list(itertools.islice(stream, 5))) == 5
    stream.close()
    assert model.training


def test_beam_search_finds_what_greedy_misses():
    # 0 -> 1 is more likely than 0 -> 2, but what follows 1 is spread out and what follows 2 is certain
    table = [[0.0, 0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.55, 0.45], [0.0, 0.0, 0.0, 1.0, 0.0], [0.2] * 5, [0.2] * 5]
    model = Chain(table).train()
    assert generate_tokens(model, [0], 2, temperature=0) == [1, 3]
    assert beam_search(model, [0], 2, beams=1) == [1, 3]
    assert beam_search(model, [0], 2, beams=2) == [2, 3]
    assert model.training


@pytest.mark.parametrize("beams", [1, 3, 16])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_wide_beam_is_exhaustive_search(beams, length_penalty):
    torch.manual_seed(beams)
    stop, length = 3, 4
    table = torch.rand(4, 4).softmax(-1)
    model = Chain(table.tolist())

    def score(numbers, ended):
        path = [0, *numbers, *([stop] if ended else [])]
        total = sum(math.log(table[a, b]) for a, b in itertools.pairwise(path))
        return total / (len(path) - 1) ** length_penalty

    candidates = [
        (score(numbers, ended), list(numbers))
        for n in range(length + 1)
        for numbers in itertools.product(range(3), repeat=n)
        for ended in (True, False)
        if (n < length if ended else n == length)
    ]
    found = beam_search(model, [0], length, beams=beams * 16, length_penalty=length_penalty, stop=(stop,))
    assert found == max(candidates)[1]


def test_pieces_of_text():
    tokenizer = ByteTokenizer()
    numbers = tokenizer.encode("aé\U0001f600.")
    pieces = list(stream_text(tokenizer, numbers))
    assert pieces == ["a", "é", "\U0001f600", "."]
    assert "".join(stream_text(tokenizer, numbers[:3])) == "aé"
    assert "".join(stream_text(tokenizer, numbers[:2])) == "a\ufffd"
    letters = CharTokenizer("abc")
    assert list(stream_text(letters, letters.encode("aabbcc"), stop="bc")) == ["a", "a", "b"]
    assert list(stream_text(letters, letters.encode("bcaa"), stop="bc")) == []
    assert "".join(stream_text(letters, letters.encode("aab"), stop="bc")) == "aab"
    assert list(stream_text(letters, [])) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0 and finite, got 0.0"),
        ({"beams": 0}, "beams must be from 1 to 1,000, got 0"),
    ],
)
def test_values_out_of_range(values, message):
    with pytest.raises(UsageError, match=message):
        check_sampling(5, **values)
