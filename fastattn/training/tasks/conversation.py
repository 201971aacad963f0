"""Supervised fine-tuning on conversations: a language model learns to write the answers, and nothing else."""

import json

import torch

from fastattn.models import CausalLM

from ..data.batches import IGNORED, LengthBatches
from ..data.chat import TEMPLATES, choose_template, encode_conversation, encode_question
from ..data.counts import Counts, check_known
from ..data.jinja_template import JinjaTemplate
from ..data.parts import read_parts
from ..data.text import check_summary, fingerprint
from ..data.tokenizer import SPECIALS, build_tokenizer
from ..inspect.attention_maps import attention_maps
from ..inspect.generate import generate_tokens
from ..inspect.scores import language_scores
from ..messages import UsageError
from .base import Task, evaluate_part, shape_of
from .language_modelling import packed_inputs

_ANSWERED = 100  # answers that a report generates and compares


class TemplateTask(Task):
    """A task on texts that a chat template marks up."""

    @classmethod
    def without_data(cls, config, tokenizer, summary):
        task = super().without_data(config, tokenizer, summary)
        task.template = choose_template(config.data.chat_template, tokenizer, summary.get("chat_template"))
        return task

    def _choose_template(self, expected):
        """Set self.template; the run keeps that of a folder. expected: None or the summary of the run."""
        kept = (expected or {}).get("chat_template")
        self.template = choose_template(self.config.data.chat_template, self.tokenizer, kept)
        if isinstance(self.template, JinjaTemplate):
            self.summary["chat_template"] = self.template.stored

    def _make_batches(self, lengths):
        """The training batches of examples with these numbers of tokens."""
        self.batches = LengthBatches(lengths, self.config.batch_size, self.config.seed)
        self.steps_an_epoch = self.batches.batches_an_epoch


class Conversation(TemplateTask):
    """Rows (tokens, targets, numbers of conversations) of block_size tokens with several whole conversations each.

    Attention stays within a conversation, and only the tokens of answers and the marks behind them are targets. What
    remains of a row is padding without targets.
    """

    unit = "token of an answer"
    next_command = "fastattn generate {run} --prompt QUESTION"

    def __init__(self, config, tokenizer=None, expected=None):
        self.config, data = config, config.data
        parts = read_parts(data)
        conversations = {name: self._messages(part) for name, part in parts.items()}
        texts = [content for part in conversations.values() for messages in part for _, content in messages]
        self.summary = {
            "source": data.source,
            "characters": sum(map(len, texts)),
            "sha256": fingerprint(json.dumps(conversations)),
        }
        check_summary(self.summary, expected)
        self.tokenizer = tokenizer or self._learn_tokenizer(texts, conversations["train"])
        self._choose_template(expected)
        self._set_up(conversations)
        check_known(data.source, self.counts)
        self.sizes = {name: f"{len(part):,} conversations" for name, part in conversations.items()}
        lengths = [config.model.block_size] * len(self.tensors["train"][0])
        self._make_batches(lengths)
        self.tokens_a_step = config.batch_size * config.model.block_size

    def _learn_tokenizer(self, texts, train):
        """A tokenizer for the texts, with the marks of the template as tokens."""
        data = self.config.data
        name = "chatml" if data.chat_template == "auto" else data.chat_template
        if name not in TEMPLATES:
            raise UsageError(f"the chat template {name!r} needs --start, a model whose vocabulary has its marks")
        template = TEMPLATES[name]
        around = [piece for pieces in template.before.values() for piece in (*pieces, template.between)]
        learnt = [content for messages in train for _, content in messages]
        specials = [*SPECIALS, *template.marks]
        return build_tokenizer(
            data.tokenizer, [*texts, *around], [*learnt, *around], data.vocab_size, specials, data.strip_accents
        )

    @classmethod
    def on_documents(cls, config, tokenizer, summary, documents):
        """A task of a trained model on other conversations: its only part is "all"."""
        task = cls.without_data(config, tokenizer, summary)
        task._set_up({"all": task._messages(documents)})
        return task

    def _messages(self, documents):
        """[[(role, content), ...], ...] of Documents with conversations, or with questions and answers."""
        if self.config.data.columns.messages is not None:
            return [[tuple(message) for message in json.loads(text)] for text in documents.texts]
        if documents.targets is None:
            raise UsageError(
                f"source {self.config.data.source!r} has no conversations; name their column with "
                "--data.columns.messages, or that of the answers with --data.columns.target"
            )
        pairs = zip(documents.texts, documents.targets, strict=True)
        return [[("user", text), ("assistant", target)] for text, target in pairs]

    def _set_up(self, conversations):
        self.conversations, self.counts, self.tensors = conversations, {}, {}
        for name, part in conversations.items():
            self.counts[name] = Counts()
            encoded = []
            for messages in part:
                numbers, wanted = encode_conversation(self.tokenizer, self.template, messages)
                self.counts[name].add(self.tokenizer, (numbers,), self.config.model.block_size + 1)
                encoded.append((numbers, wanted))
            self.tensors[name] = pack(encoded, self.config.model.block_size)
            tokens = self.tensors[name][2]
            self.counts[name].padding = (tokens < 0).double().mean().item()
            if not int((self.tensors[name][1] != IGNORED).sum()):
                raise UsageError(
                    f"source {self.config.data.source!r}: no answer of the {name} part begins within "
                    f"model.block_size = {self.config.model.block_size} tokens"
                )

    def train_rows(self, step):
        chosen = self.batches[step]
        return tuple(tensor[chosen] for tensor in self.tensors["train"])

    def rows(self, part, limit=None, rank=0, world_size=1):
        size = 16
        for start in range(rank * size, len(self.tensors[part][0]), world_size * size):
            yield tuple(tensor[start : start + size] for tensor in self.tensors[part])

    def count(self, rows):
        return int((rows[1] != IGNORED).sum())

    def inputs(self, rows):
        return packed_inputs(*rows)

    @staticmethod
    def build_model(config, tokenizer, summary, layers=None):
        return CausalLM(tokenizer.vocab_size, **shape_of(config, layers))

    def answer(self, model, messages, **how):
        """The text that the model answers to messages [(role, content)]; how: as for stream_tokens."""
        question = encode_question(self.tokenizer, self.template, messages)
        room = max(1, self.config.model.block_size - len(question))
        end = self.tokenizer.number_of(self.template.end)
        how = {"max_new_tokens": room, "temperature": 0.0, **how}
        new = generate_tokens(model, question, stop=() if end is None else (end,), **how)
        text = self.tokenizer.decode(new)
        return text if end is not None else text.partition(self.template.end)[0]

    def sample(self, model):
        shown = []
        for messages in self.conversations["validation"][:3]:
            last = _last_answer(messages)
            shown.append(f"{messages[last - 1][1] if last else ''}\n  -> {self.answer(model, messages[:last])}\n")
        return "".join(shown)

    def attention(self, model, text):
        numbers = encode_question(self.tokenizer, self.template, [("user", text)])[: self.config.model.block_size]
        maps = attention_maps(model, torch.tensor([numbers], device=next(model.parameters()).device))
        return maps[-1], self.token_texts(numbers), self.token_texts(numbers)

    def report(self, model, part):
        """Scores of the tokens of answers, and how many last answers greedy search writes exactly as they are."""
        total, _, count = evaluate_part(model, self, part)
        compared, exact, examples = self.conversations[part][:_ANSWERED], 0, []
        for messages in compared:
            last = _last_answer(messages)
            written, expected = self.answer(model, messages[:last]), messages[last][1]
            exact += written.strip() == expected.strip()
            if len(examples) < 5:
                question = messages[last - 1][1] if last else ""
                examples.append({"source": question, "written": written, "reference": expected})
        scores = {"answer_tokens": count, **language_scores(total, count, None)}
        return {**scores, "answers": len(compared), "exact_answers": exact / len(compared), "examples": examples}


def _last_answer(messages):
    """The number of the last message of the assistant."""
    return max(number for number, (role, _) in enumerate(messages) if role == "assistant")


def pack(encoded, block_size):
    """Conversations in rows, each whole and in the first row that has room.

    Args:
        encoded: list of (token numbers, whether each is part of an answer); tokens after the first block_size + 1 are
            cut.
    Returns: (tokens, targets, conversations), each (rows, block_size) int64. targets are the next tokens of answers,
        else IGNORED. conversations: numbers from 0 in each row, -1 at padding.
    """
    rows, free = [], []
    for numbers, wanted in encoded:
        numbers, wanted = numbers[: block_size + 1], wanted[: block_size + 1]
        length = len(numbers) - 1
        if length < 1:
            continue
        place = next((i for i, room in enumerate(free) if room >= length), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(block_size)
        rows[place].append((numbers, wanted))
        free[place] -= length
    tokens = torch.zeros(len(rows), block_size, dtype=torch.int64)
    targets, documents = torch.full_like(tokens, IGNORED), torch.full_like(tokens, -1)
    for row, held in enumerate(rows):
        start = 0
        for document, (numbers, wanted) in enumerate(held):
            numbers, wanted = torch.tensor(numbers), torch.tensor(wanted)
            here = slice(start, start + len(numbers) - 1)
            tokens[row, here], documents[row, here] = numbers[:-1], document
            targets[row, here] = numbers[1:].masked_fill(~wanted[1:], IGNORED)
            start = here.stop
    return tokens, targets, documents
