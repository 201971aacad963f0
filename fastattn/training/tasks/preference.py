"""Direct preference optimisation: a language model learns which of two answers is better."""

import json

import torch

from fastattn.models.preference import PreferenceLM

from ..data.batches import IGNORED, by_length, pad
from ..data.chat import encode_conversation
from ..data.counts import Counts, check_known
from ..data.parts import read_parts
from ..data.text import check_summary, fingerprint
from ..messages import UsageError, warn
from .base import EVALUATED, shape_of
from .conversation import Conversation, TemplateTask


class Preference(TemplateTask):
    """Rows (tokens, targets, reference log-probabilities): (pairs, 2, seqlen), twice, and (pairs, 2).

    The first of two is the chosen answer. The reference is the model of config.start.
    """

    unit = "pair"
    has_accuracy = True
    needs_reference = True
    next_command = "fastattn generate {run} --prompt QUESTION"

    def __init__(self, config, tokenizer=None, expected=None):
        self.config, data = config, config.data
        self.tokenizer = tokenizer
        parts = read_parts(data)
        if any(part.targets is None or part.rejected is None for part in parts.values()):
            raise UsageError(
                f"source {data.source!r} has no pairs of answers; name their columns with --data.columns.target "
                "(the better one) and --data.columns.rejected"
            )
        content = [[part.texts, part.targets, part.rejected] for part in parts.values()]
        self.summary = {
            "source": data.source,
            "characters": sum(len(text) for part in content for column in part for text in column),
            "sha256": fingerprint(json.dumps(content)),
        }
        check_summary(self.summary, expected)
        self._choose_template(expected)
        self._set_up(parts)
        check_known(data.source, self.counts)
        self.sizes = {name: f"{len(pairs):,} pairs" for name, pairs in self.examples.items()}
        lengths = self.lengths["train"]
        self._make_batches(lengths)
        self.tokens_a_step = round(2 * config.batch_size * sum(lengths) / len(lengths))

    @classmethod
    def on_documents(cls, config, tokenizer, summary, documents):
        """A task of a trained model on other pairs: its only part is "all"."""
        task = cls.without_data(config, tokenizer, summary)
        task._set_up({"all": documents})
        return task

    def _set_up(self, parts):
        self.examples, self.lengths, self.reference, self.counts = {}, {}, {}, {}
        for name, part in parts.items():
            self.counts[name] = Counts()
            encoded = [
                (self._encode(name, question, chosen), self._encode(name, question, rejected))
                for question, chosen, rejected in zip(part.texts, part.targets, part.rejected, strict=True)
            ]
            self.examples[name] = [pair for pair in encoded if pair[0] != pair[1]]
            self._report_equal(name, len(encoded))
            self.lengths[name] = [max(len(tokens) for tokens, _ in pair) for pair in self.examples[name]]
            self.reference[name] = torch.zeros(len(self.examples[name]), 2)

    def _report_equal(self, part, pairs):
        """Warn of pairs whose answers are equal, which show no preference; UsageError if a part has no others."""
        left, where = len(self.examples[part]), f"source {self.config.data.source!r}: {part} part"
        within = f"within model.block_size = {self.config.model.block_size} tokens"
        if not left:
            raise UsageError(f"{where}: the two answers of every pair are equal {within}")
        if left < pairs:
            warn(f"{where}: left out {pairs - left} of {pairs} pairs, whose two answers are equal {within}")

    def _encode(self, part, question, answer):
        """(tokens, targets) of a question with an answer, cut at block_size."""
        messages, longest = [("user", question), ("assistant", answer)], self.config.model.block_size
        numbers, wanted = encode_conversation(self.tokenizer, self.template, messages)
        self.counts[part].add(self.tokenizer, (numbers,), longest + 1)
        pairs = list(zip(numbers[1:], wanted[1:], strict=True))[:longest]
        return numbers[:-1][:longest], [number if is_answer else IGNORED for number, is_answer in pairs]

    @torch.no_grad()
    def compare_with(self, model):
        """Keep the log-probabilities of all answers under the reference model."""
        model.eval()
        device = next(model.parameters()).device
        for part in self.examples:
            for indices in by_length(self.lengths[part], EVALUATED):
                tokens, targets, _ = self._collate(part, indices)
                self.reference[part][indices] = model.log_probs(tokens.to(device), targets.to(device)).cpu()

    def _collate(self, part, indices):
        sides = [side for i in indices for side in self.examples[part][i]]
        tokens, targets = pad([side[0] for side in sides], 0), pad([side[1] for side in sides], IGNORED)
        return tokens.unflatten(0, (-1, 2)), targets.unflatten(0, (-1, 2)), self.reference[part][list(indices)]

    def train_rows(self, step):
        return self._collate("train", self.batches[step].tolist())

    def rows(self, part, limit=None, rank=0, world_size=1):
        for indices in by_length(self.lengths[part], EVALUATED, rank, world_size):
            yield self._collate(part, indices)

    def count(self, rows):
        return len(rows[0])

    def inputs(self, rows):
        tokens, targets, reference = rows
        return tokens, targets, None, None, False, reference

    @staticmethod
    def build_model(config, tokenizer, summary, layers=None):
        return PreferenceLM(tokenizer.vocab_size, beta=config.preference_beta, **shape_of(config, layers))

    def sums(self, model, rows, device):
        tokens, targets, reference = (tensor.to(device) for tensor in rows)
        own = model.log_probs(tokens, targets)
        margin = (own - reference).diff(dim=1)[:, 0]
        loss = torch.nn.functional.softplus(model.beta * margin).sum()
        return loss.double().item(), int((own[:, 0] > own[:, 1]).sum()), len(tokens)

    def answer(self, model, messages, **how):
        """As `Conversation.answer`."""
        return Conversation.answer(self, model, messages, **how)

    @torch.no_grad()
    def report(self, model, part):
        """How often the better answer is likelier, and the mean log-probabilities of both."""
        device, pairs = next(model.parameters()).device, []
        for tokens, targets, _ in self.rows(part):
            pairs.append(model.log_probs(tokens.to(device), targets.to(device)).cpu())
        chosen, rejected = torch.cat(pairs).double().unbind(1)
        return {
            "pairs": len(chosen), "preference_accuracy": (chosen > rejected).double().mean().item(),
            "log_prob_chosen": chosen.mean().item(), "log_prob_rejected": rejected.mean().item(),
        }  # fmt: skip
