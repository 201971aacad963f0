"""Generates text with a trained model, token by token: greedy, sampled, or by beam search."""

import torch

from fastattn.models import CausalLM, KeyValueCache, search
from fastattn.ops.layer import WEIGHTS

from ..messages import UsageError, expect

_NUCLEUS = 64  # the number of most likely tokens that are tried first, as they usually reach top_p
MOST_BEAMS = 1000  # the most beams of a search; each is a row of a batch


def check_sampling(
    max_new_tokens, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0, beams=1, seed=0, weights=None
):
    """Raise UsageError if a value is out of range."""
    expect(max_new_tokens >= 1, "max_new_tokens", "at least 1", max_new_tokens)
    expect(0 <= temperature < float("inf"), "temperature", "at least 0 and finite", temperature)
    expect(top_k is None or top_k >= 1, "top_k", "at least 1", top_k)
    expect(top_p is None or 0 < top_p <= 1, "top_p", "above 0 and at most 1", top_p)
    expect(0 < repetition_penalty < float("inf"), "repetition_penalty", "above 0 and finite", repetition_penalty)
    expect(1 <= beams <= MOST_BEAMS, "beams", f"from 1 to {MOST_BEAMS:,}", beams)
    expect(0 <= seed < 2**63, "seed", "at least 0 and below 2**63", seed)
    expect(weights in (None, *WEIGHTS), "weights", " or ".join(map(repr, (None, *WEIGHTS))), weights)


class _NextLogits:
    """The logits after each row of a growing batch, with a cache while the rows fit the model's window.

    When the window moves, every token changes its position, so the whole window is read again. Converted weights belong
    to a cache, which is then filled again for each window.
    """

    def __init__(self, model, use_cache, weights=None):
        self.model, self.weights, self.cache = model, weights, None
        self.use_cache = use_cache and hasattr(model, "blocks")
        self.last = {"last": True} if isinstance(model, CausalLM) else {}  # of a prompt, only the last logits are used
        expect(weights is None or isinstance(model, CausalLM), "weights", "None for this model", weights)

    def __call__(self, tokens):
        """tokens: (batch, n), one more per row than in the last call; returns (batch, vocab_size)."""
        window = tokens[:, -self.model.block_size :]
        keeps = self.use_cache and tokens.shape[1] <= self.model.block_size
        if not keeps and self.weights is None:
            return self.model(window, **self.last)[:, -1]
        if self.cache is None:
            self.cache = self._make_cache(len(tokens))
        if not keeps:
            self.cache.length = 0
        return self.model(window[:, self.cache.length :], cache=self.cache, **self.last)[:, -1]

    def _make_cache(self, batch):
        try:
            return KeyValueCache(self.model, batch, weights=self.weights)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def reorder(self, rows):
        if self.cache is not None:
            self.cache.reorder(rows)


def next_token_probabilities(logits, seen=None, *, temperature=1.0, top_k=None, top_p=None, repetition_penalty=1.0):
    """The probabilities from which the next token is drawn.

    Args:
        logits: (batch, vocab_size), float.
        seen: None or (batch, n) int64, the tokens so far: their logits are divided by the penalty if positive and
            multiplied by it if negative, once for each distinct token (Keskar et al., "CTRL", 2019, section 4.1).
        temperature: divides the logits; 0 keeps only the most likely token.
        top_k: None, or the number of most likely tokens to keep.
        top_p: None, or the probability that the kept tokens must reach, as few as possible (Holtzman et al., "The
            curious case of neural text degeneration", 2019).
        repetition_penalty: 1.0 = none.

    Returns:
        (batch, vocab_size) fp32, rows sum to 1.
    """
    logits = _penalised(logits.float(), seen, repetition_penalty)
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    probabilities, index = _candidates(logits, temperature, top_k, top_p)
    return probabilities if index is None else torch.zeros_like(logits).scatter(1, index, probabilities)


def _candidates(logits, temperature, top_k, top_p):
    """(probabilities, tokens) of the tokens that may be drawn, the most likely first, or (probabilities, None) of all
    tokens.

    A row that drops tokens gives them 0, and the others add up to 1.
    """
    index = None
    if top_k is not None and top_k < logits.shape[-1]:
        logits, index = logits.topk(top_k)
    # The largest becomes 0, so no temperature makes it infinite.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)).softmax(-1)
    if top_p is None or top_p >= 1:
        return probabilities, index
    if index is None:
        return _nucleus(probabilities, top_p)
    return _reach(probabilities, top_p), index


def _draw(probabilities, index, generator):
    """One token of each row by one uniform number: the first token at which the sum of probabilities exceeds it."""
    total = probabilities.cumsum(-1, dtype=torch.float64)
    place = torch.rand(len(total), 1, dtype=torch.float64, device=total.device, generator=generator) * total[:, -1:]
    chosen = torch.searchsorted(total, place, right=True).clamp_max(total.shape[-1] - 1)
    return chosen if index is None else index.gather(1, chosen)


def _penalised(logits, seen, repetition_penalty):
    if repetition_penalty == 1.0 or seen is None:
        return logits
    scores, repetition_penalty = logits.gather(1, seen), min(max(repetition_penalty, 1e-30), 1e30)  # stay finite
    return logits.scatter(1, seen, torch.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty))


def _nucleus(probabilities, top_p):
    """The fewest most likely tokens whose probabilities reach top_p, as `_candidates` returns them.

    A trained model puts most of the probability on few tokens, so a sort of the whole vocabulary is seldom needed.
    """
    vocab_size, n = probabilities.shape[-1], _NUCLEUS
    while True:
        likely, index = probabilities.topk(min(n, vocab_size))
        if n >= vocab_size or bool((likely.sum(-1) >= top_p).all()):
            return _reach(likely, top_p), index
        n *= 8


def _reach(likely, top_p):
    """Rows in falling order without the tokens after those that reach top_p, scaled to a sum of 1."""
    kept = likely.masked_fill(likely.cumsum(-1) - likely >= top_p, 0.0)  # the tokens before it already reach top_p
    return kept / kept.sum(-1, keepdim=True)


@torch.no_grad()
def stream_tokens(model, prompt, max_new_tokens, *, temperature=0.8, top_k=None, top_p=None, repetition_penalty=1.0,
                  stop=(), seed=0, use_cache=True, weights=None):  # fmt: skip
    """Continue a prompt, token by token.

    Args:
        model: a CausalLM; its mode (training or evaluation) does not change.
        prompt: list of int, at least one token; the model sees the last block_size tokens of the text so far.
        max_new_tokens: the most tokens to add.
        temperature, top_k, top_p, repetition_penalty: as for next_token_probabilities.
        stop: tokens that end the text; they are not yielded.
        seed: the same seed gives the same text.
        use_cache: cache keys and values instead of reading all tokens again for each new one.
        weights: None, or "bf16" or "int8": read the weights of the blocks and of the output layer in that dtype, as
            `KeyValueCache` does. They are converted when the first token is asked for; a later change of the model does
            not show in this text, only in that of the next call.

    Yields:
        int: each new token as soon as it is drawn.

    Raises:
        UsageError: the prompt is empty, a value is out of range, or the weights of this model cannot be converted.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed=seed, weights=weights)
    if not prompt:
        raise UsageError("prompt must have at least one token, got an empty text")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.tensor([prompt], device=device)
    try:
        next_logits = _NextLogits(model, use_cache, weights)
        for _ in range(max_new_tokens):
            logits = next_logits(tokens)
            if temperature == 0:  # no probabilities, nothing to draw
                chosen = _penalised(logits.float(), tokens, repetition_penalty).argmax(-1, keepdim=True)
            else:
                penalised = _penalised(logits.float(), tokens, repetition_penalty)
                chosen = _draw(*_candidates(penalised, temperature, top_k, top_p), generator)
            if (number := chosen.item()) in stop:
                return
            yield number
            tokens = torch.cat([tokens, chosen], 1)
    finally:
        model.train(was_training)


def generate_tokens(model, prompt, max_new_tokens, **options):
    """The new tokens of `stream_tokens` as a list; the same arguments and errors."""
    return list(stream_tokens(model, prompt, max_new_tokens, **options))


def stream_text(tokenizer, numbers, stop=None, *, prompt=(), typed=""):
    """Tokens as text, in pieces.

    Args:
        tokenizer: as from `build_tokenizer`.
        numbers: iterable of int.
        stop: None, or a text; the output ends before its first occurrence.
        prompt: the tokens before them.
        typed: the text of the prompt, as its writer gave it.

    Yields:
        str, not empty. Joined, they are what the tokenizer writes for `numbers` after the prompt, with the space
            between them.
    """
    prompt, so_far, shown = list(prompt), [], 0
    for number in numbers:
        so_far.append(number)
        text = _continuation(tokenizer, prompt, so_far, typed)
        if stop and (end := text.find(stop)) >= 0:
            if end > shown:
                yield text[shown:end]
            return
        # Hold back an incomplete character, an apostrophe that may lose the space before it, and text that may become
        # the stop text.
        safe = len(text.rstrip("\ufffd").removesuffix(" '")) - (len(stop) - 1 if stop else 0)
        if safe > shown:
            yield text[shown:safe]
            shown = safe
    if rest := _continuation(tokenizer, prompt, so_far, typed)[shown:]:
        yield rest


def _continuation(tokenizer, prompt, numbers, typed):
    """What the tokenizer writes for `numbers` after the prompt."""
    before, text = tokenizer.decode(prompt), tokenizer.decode([*prompt, *numbers])
    if not before and prompt and not typed[-1:].isspace():  # of unknown words alone: join as after any other word
        first = tokenizer.decode(numbers[:1])
        text = tokenizer.decode(numbers[:1] * 2).removeprefix(first).removesuffix(first) + text
    if text.startswith(before):
        rest = text[len(before) :]
    else:  # WordPiece has removed a space at the end of the prompt
        place, letters = 0, sum(not c.isspace() for c in before)
        while letters and place < len(text):
            letters -= not text[place].isspace()
            place += 1
        rest = text[place:]
    spaced = typed[-1:].isspace() and not before[-1:].isspace()
    return rest.lstrip(" ") if spaced else rest


@torch.no_grad()
def beam_search(model, prompt, max_new_tokens, *, beams=4, length_penalty=1.0, stop=(), use_cache=True,
                weights=None):  # fmt: skip
    """The most likely continuation that a beam of `beams` candidates finds.

    Args:
        model, prompt, max_new_tokens, stop, use_cache, weights: as for stream_tokens.
        beams: number of candidates kept.
        length_penalty: candidates are compared by log-probability / length ** length_penalty.

    Returns:
        list of int: the new tokens, without the stop token.

    Raises:
        UsageError: as for stream_tokens.
    """
    check_sampling(max_new_tokens, beams=beams, weights=weights)
    if not prompt:
        raise UsageError("prompt must have at least one token, got an empty text")
    was_training = model.training
    model.eval()
    tokens = torch.tensor([prompt], device=next(model.parameters()).device)
    try:
        next_logits = _NextLogits(model, use_cache, weights)
        return search.beam_search(
            next_logits, tokens, max_new_tokens, beams=beams, length_penalty=length_penalty, stop=stop
        )[0]
    finally:
        model.train(was_training)
