"""Translation of documents into other texts: another language, a spelling, a summary."""

import torch

from fastattn.models import Seq2Seq

from ..data.batches import IGNORED, by_length, pad
from ..data.tokenizer import BEGIN, END, PAD
from ..inspect.attention_maps import attention_maps
from ..inspect.scores import translation_scores
from ..messages import UsageError
from .base import DocumentTask, evaluate_part, shape_of


class Translation(DocumentTask):
    """Rows (source, source lengths, begin token + target, target + end token).

    Both languages share one vocabulary.
    """

    tokenize_targets = True
    unit = "target token"

    def prepare(self):
        if any(part.targets is None for part in self.parts.values()):
            raise UsageError(
                f"source {self.config.data.source!r} has no targets; name their column with "
                "--data.columns.target or their file with --data.target_source"
            )
        self.examples = {name: list(map(self._example, *self._encoded(name))) for name in self.parts}

    def _encoded(self, name):
        """Token numbers of the texts and of the targets of a part, which are counted."""
        part = self.parts[name]
        encoded = [list(map(self.tokenizer.encode, texts)) for texts in (part.texts, part.targets)]
        for pair in zip(*encoded, strict=True):
            self.counts[name].add(self.tokenizer, pair, self.longest)
        return encoded

    def _example(self, source, target):
        target_framed = self.frame(target)
        if len(target) > self.longest:  # a target that was cut does not end here
            target_framed[-1] = target[self.longest]
        return self.frame(source)[1:], target_framed

    def lengths(self, part):
        return [len(source) + len(target) for source, target in self.examples[part]]

    def sides(self, part):
        return [list(map(len, side)) for side in zip(*self.examples[part], strict=True)]

    def collate(self, part, indices, key):
        sources, targets = zip(*(self.examples[part][i] for i in indices), strict=True)
        lengths = torch.tensor(list(map(len, sources)))
        target_in = pad([target[:-1] for target in targets], self.specials[PAD])
        return pad(sources, self.specials[PAD]), lengths, target_in, pad([t[1:] for t in targets], IGNORED)

    def count(self, rows):
        return int((rows[3] != IGNORED).sum())

    @staticmethod
    def build_model(config, tokenizer, summary, layers=None):
        return Seq2Seq(tokenizer.vocab_size, **shape_of(config, layers))

    def translate(self, model, texts, *, beams=1, length_penalty=1.0):
        """The model's translations of the texts, a list of str. The translation of a text without tokens is ""."""
        device = next(model.parameters()).device
        encoded = [self.encode(text)[1:] for text in texts]
        lengths = list(map(len, encoded))
        result = [""] * len(texts)
        for indices in by_length(lengths, 64):
            indices = [i for i in indices if lengths[i] > 1]  # more than the mark at the end
            if not indices:
                continue
            written = model.generate(
                pad([encoded[i] for i in indices], self.specials[PAD]).to(device),
                torch.tensor([lengths[i] for i in indices], device=device),
                begin=self.specials[BEGIN], end=self.specials[END], beams=beams, length_penalty=length_penalty,
                max_new_tokens=min(self.config.model.block_size - 1, 2 * max(lengths[i] for i in indices) + 10),
            )  # fmt: skip
            for i, numbers in zip(indices, written, strict=True):
                result[i] = self.tokenizer.decode(numbers)
        return result

    def sample(self, model):
        part = self.parts["validation"].select(range(min(5, len(self.parts["validation"]))))
        written = self.translate(model, part.texts)
        return "".join(f"{text}\n  -> {target}\n" for text, target in zip(part.texts, written, strict=True))

    def attention(self, model, text):
        """The decoder's attention to the source while it generates the translation."""
        device = next(model.parameters()).device
        source, target = self.encode(text)[1:], self.encode(self.translate(model, [text])[0])[:-1]
        tokens, lengths, target_in = (torch.tensor(x, device=device) for x in ([source], [len(source)], [target]))
        maps = attention_maps(
            model, tokens, lengths, target_in, blocks=model.decoder.blocks, name="multihead_attn"
        )  # fmt: skip
        return maps[-1], self.token_texts(target), self.token_texts(source)

    def report(self, model, part, *, beams=1):
        loss, _, count = evaluate_part(model, self, part)
        documents = self.parts[part]
        written = self.translate(model, documents.texts, beams=beams)
        examples = [
            {"source": source, "written": text, "reference": target}
            for source, text, target in list(zip(documents.texts, written, documents.targets, strict=True))[:5]
        ]
        scores = translation_scores(written, documents.targets)
        return {"loss": loss / count, "beams": beams, **scores, "examples": examples}
