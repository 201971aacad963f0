"""Prediction of masked tokens from the tokens on both sides, which pretrains an encoder."""

import torch

from fastattn.models import MaskedLM

from ..data.batches import IGNORED, draw_masks, pad
from ..data.tokenizer import BEGIN, END, MASK, PAD
from ..inspect.scores import language_scores
from ..messages import UsageError
from .base import DocumentTask, evaluate_part, shape_of, summed_loss_of_logits


class MaskedLanguageModelling(DocumentTask):
    """Rows (tokens, lengths, targets), with new masks in every epoch; the masks of validation are fixed.

    Documents longer than block_size are cut into pieces.
    """

    unit = "masked token"
    has_accuracy = True
    next_command = "fastattn finetune --start {run} --task classify --data.source SOURCE --run NEW"

    def prepare(self):
        longest = self.longest
        self.examples = {}
        for name, part in self.parts.items():
            encoded = list(map(self.tokenizer.encode, part.texts))
            for numbers in encoded:
                self.counts[name].add(self.tokenizer, (numbers,))
            self.examples[name] = [
                [self.specials[BEGIN], *numbers[start : start + longest], self.specials[END]]
                for numbers in encoded
                for start in range(0, len(numbers), longest)
            ]

    def lengths(self, part):
        return list(map(len, self.examples[part]))

    def collate(self, part, indices, key):
        chosen = [self.examples[part][i] for i in indices]
        tokens, lengths = pad(chosen, self.specials[PAD]), torch.tensor(list(map(len, chosen)))
        specials = list(self.specials.values())
        tokens, targets = draw_masks(tokens, lengths, specials, self.specials[MASK], self.tokenizer.vocab_size, key)
        return tokens, lengths, targets

    def count(self, rows):
        return int((rows[2] != IGNORED).sum())

    @staticmethod
    def build_model(config, tokenizer, summary, layers=None):
        return MaskedLM(tokenizer.vocab_size, head_transform=config.model.head_transform, **shape_of(config, layers))

    def sums(self, model, rows, device):
        tokens, lengths, targets = (tensor.to(device) for tensor in rows)
        return summed_loss_of_logits(model(tokens, lengths), targets)

    @torch.no_grad()
    def fill(self, model, text, best=5):
        """A text with every [MASK] replaced by the likeliest token, and {token: probability} of the best for each.

        Raises:
            UsageError: the text has no [MASK], or more tokens than the model sees.
        """
        first, *others = map(self.tokenizer.encode, text.split(MASK))
        numbers = [*first, *(n for piece in others for n in (self.specials[MASK], *piece))]
        if not others:
            raise UsageError(f"text {text[:40]!r} must have a {MASK}, the place of a token to predict")
        if len(numbers) > self.longest:
            raise UsageError(f"text {text[:40]!r} must have at most {self.longest} tokens, got {len(numbers)}")
        device = next(model.parameters()).device
        tokens = torch.tensor([self.frame(numbers)], device=device)
        chances = model(tokens, torch.tensor([tokens.shape[1]], device=device))[0, 1:-1].float().softmax(-1).cpu()
        chances[:, list(self.specials.values())] = 0  # no text
        filled, found = list(numbers), []
        for place in (i for i, number in enumerate(numbers) if number == self.specials[MASK]):
            values, tokens = chances[place].topk(min(best, chances.shape[1] - len(self.specials)))
            filled[place] = tokens[0].item()
            found.append(dict(zip(map(self.tokenizer.token_of, tokens.tolist()), values.tolist(), strict=True)))
        return self.tokenizer.decode(filled), found

    def report(self, model, part):
        loss, right, count = evaluate_part(model, self, part)
        return {**language_scores(loss, count, None), "accuracy": right / count, "tokens": count}
