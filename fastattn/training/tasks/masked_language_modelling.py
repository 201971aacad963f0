"""Prediction of masked tokens from the tokens on both sides, which pretrains an encoder."""

import torch

from fastattn.models import MaskedLM

from ..data.batches import IGNORED, draw_masks, pad
from ..data.tokenizer import BEGIN, END, MASK, PAD
from ..inspect.scores import language_scores
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

    def report(self, model, part):
        loss, right, count = evaluate_part(model, self, part)
        return {**language_scores(loss, count, None), "accuracy": right / count, "tokens": count}
