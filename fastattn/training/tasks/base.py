"""The interface of a task to the training loop, and the base class of tasks on documents."""

import json
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from ..data.batches import IGNORED, LengthBatches, by_length
from ..data.counts import Counts, check_known, padding_share
from ..data.parts import read_parts
from ..data.text import check_summary, fingerprint
from ..data.tokenizer import BEGIN, END, SPECIALS, build_tokenizer
from ..inspect.attention_maps import attention_maps
from ..messages import UsageError

EVALUATED = 64  # documents per batch of an evaluation


class Task:
    """The interface of a task; `rows` are tuples of CPU tensors whose first dimension is the batch.

    Attributes:
        tokenizer: as from build_tokenizer.
        summary: the content of data.json: source, characters, sha256, and values that decide a model's shape.
        sizes: {part: text}, the size of each part.
        steps_an_epoch: batches per pass over the training part.
        tokens_a_step: average number of tokens per step.
        counts: {part: Counts}, what became of the texts.
    """

    next_command = "fastattn generate {run} --prompt TEXT"  # the next command for a trained model
    unit = "token"  # of the loss
    loss_in = "nats"
    has_accuracy = False  # whether `sums` counts correct predictions
    needs_reference = False  # whether `compare_with` must see the model of config.start
    more_sums = 0  # numbers that `sums` returns after the three of every task
    log_columns = ()  # of metrics.csv that only this task has

    @classmethod
    def without_data(cls, config, tokenizer, summary):
        """A task that can apply a model to new texts, without its training data."""
        task = cls.__new__(cls)
        task.config, task.tokenizer, task.summary = config, tokenizer, summary
        return task

    def train_rows(self, step):
        """The batch of a step, config.batch_size rows: a pure function of (seed, step)."""
        raise NotImplementedError

    def rows(self, part, limit=None, rank=0, world_size=1):
        """Yield this process's batches of a whole part, in a fixed order."""
        raise NotImplementedError

    def inputs(self, rows):
        """The arguments of the model, which then returns the mean loss over `count(rows)` predictions."""
        return rows

    def count(self, rows):
        return rows[-1].numel()

    @staticmethod
    def build_model(config, tokenizer, summary, layers=None):
        """The model of a TrainConfig, on the CPU; `summary`: the content of data.json."""
        raise NotImplementedError

    def initialize(self, model):
        """Change the initial weights of a new model of this task."""

    def compare_with(self, model):
        """Keep what the loss needs of the model of config.start."""

    def check_sample(self):
        """Raise UsageError if `sample` would fail."""

    def sample(self, model):
        """A text that the best model generates at the end of training; "" for none."""
        return ""

    def sums(self, model, rows, device):
        """(summed loss in nats, correct predictions, predictions, *more_sums) of a model in evaluation mode."""
        count = self.count(rows)
        loss = model(*_to(self.inputs(rows), device))
        return loss.double().item() * count, 0, count

    def further_scores(self, sums):
        """{name: score} of the `more_sums` of a whole part, for the log and for config.select."""
        return {}

    def report(self, model, part, **options):
        """Scores of a model on a part: dict for report.json."""
        raise NotImplementedError

    def attention(self, model, text):
        """The last block's attention: (weights (n_head, seqlen_q, seqlen_k), texts of queries, texts of keys)."""
        raise NotImplementedError

    def baseline(self, part):
        """(text, accuracy) of the simplest model on a part; None for a task without one."""
        return

    def token_texts(self, numbers):
        return [self.tokenizer.decode([number]) or self.tokenizer.token_of(number) for number in numbers]


def _to(values, device):
    return tuple(value.to(device) if torch.is_tensor(value) else value for value in values)


def summed_loss_of_logits(logits, targets):
    """(summed cross-entropy in nats, correct predictions, predictions); targets of -100 do not count."""
    wanted = targets != IGNORED
    logits, targets = logits[wanted].float(), targets[wanted]
    loss = F.cross_entropy(logits, targets, reduction="sum").double().item()
    return loss, int((logits.argmax(-1) == targets).sum()), len(targets)


def shape_of(config, layers=None):
    """The arguments of a TrainConfig that all models take."""
    shape = dict(vars(config.model))
    for name in ("body", "pooling", "embedding", "head_transform"):
        del shape[name]
    return {**shape, "label_smoothing": config.optim.label_smoothing, "layers": layers or config.layers}


class DocumentTask(Task):
    """A task on documents in three parts, read in batches of about equal length.

    A source with published parts keeps them; a missing part is drawn from the training part.
    """

    tokenize_targets = False

    @classmethod
    def without_data(cls, config, tokenizer, summary):
        task = super().without_data(config, tokenizer, summary)
        task.specials = {name: task.special(name) for name in SPECIALS}
        return task

    @classmethod
    def on_documents(cls, config, tokenizer, summary, documents):
        """A task of a trained model on other documents: its only part is "all"."""
        task = cls.without_data(config, tokenizer, summary)
        task.parts, task.counts = {"all": documents}, {"all": Counts()}
        task.prepare()
        task.counts["all"].padding = padding_share(task.sides("all"), by_length(task.lengths("all"), EVALUATED))
        return task

    def __init__(self, config, tokenizer=None, expected=None):
        self.config = config
        if config.model.block_size < 3:
            raise UsageError(f"model.block_size must be at least 3 for documents, got {config.model.block_size}")
        self.parts = read_parts(config.data)
        texts = [text for part in self.parts.values() for text in part.texts]
        self.summary = {
            "source": config.data.source,
            "characters": sum(map(len, texts)),
            "sha256": fingerprint(json.dumps(self._content())),
        }
        check_summary(self.summary, expected)
        self.tokenizer = tokenizer or self.learn_tokenizer(config.data)
        self.specials = {name: self.special(name) for name in SPECIALS}
        self.counts = {name: Counts() for name in self.parts}
        self.prepare()
        if empty := [name for name, examples in self.examples.items() if not examples]:
            raise UsageError(f"source {config.data.source!r}: the {empty[0]} part has no documents with text")
        self.sizes = {name: f"{len(self.examples[name]):,} documents" for name in self.examples}
        lengths = self.lengths("train")
        self.train_batches = LengthBatches(lengths, config.batch_size, config.seed)
        self.steps_an_epoch = self.train_batches.batches_an_epoch
        self.tokens_a_step = round(config.batch_size * sum(lengths) / max(1, len(lengths)))
        for name, counts in self.counts.items():
            batches = by_length(self.lengths(name), EVALUATED)
            if name == "train":
                batches = (self.train_batches[step].tolist() for step in range(self.steps_an_epoch))
            counts.padding = padding_share(self.sides(name), batches)
        check_known(config.data.source, self.counts)

    def _content(self):
        """What decides whether the data are the same."""
        pairs = any(part.pairs for part in self.parts.values())
        return [[p.texts, p.labels, p.targets, *([p.pairs] if pairs else [])] for p in self.parts.values()]

    def learn_tokenizer(self, data):
        def texts(parts):
            for part in parts:
                yield from part.texts
                yield from part.pairs or ()
                if self.tokenize_targets:
                    yield from part.targets or ()

        return build_tokenizer(
            data.tokenizer, texts(self.parts.values()), texts([self.parts["train"]]), data.vocab_size, SPECIALS,
            data.strip_accents,
        )  # fmt: skip

    def attention(self, model, text):
        numbers = self.encode(text)
        tokens = torch.tensor([numbers], device=next(model.parameters()).device)
        lengths = torch.tensor([len(numbers)], device=tokens.device)
        blocks = getattr(getattr(model, "encoder", None), "blocks", ())
        maps = attention_maps(model, tokens, lengths, blocks=blocks)
        return maps[-1], self.token_texts(numbers), self.token_texts(numbers)

    def special(self, name):
        number = self.tokenizer.number_of(name)
        if number is None:
            raise UsageError(f"tokenizer: task {self.config.task} needs the token {name}, which is missing")
        return number

    def encode(self, text):
        """Token numbers of a text with begin and end tokens, truncated to block_size."""
        return self.frame(self.tokenizer.encode(text))

    @property
    def longest(self):
        """The most tokens of a text that the model sees, apart from begin and end."""
        return self.config.model.block_size - 2

    def frame(self, numbers):
        return [self.specials[BEGIN], *numbers[: self.longest], self.specials[END]]

    def encode_part(self, name):
        """The framed token numbers of the texts of a part, which are counted."""
        encoded = list(map(self.tokenizer.encode, self.parts[name].texts))
        for numbers in encoded:
            self.counts[name].add(self.tokenizer, (numbers,), self.longest)
        return list(map(self.frame, encoded))

    def prepare(self):
        """Set self.examples: {part: list}, the input of `collate`."""
        raise NotImplementedError

    def lengths(self, part):
        raise NotImplementedError

    def sides(self, part):
        """Lists of lengths, one for each tensor of a batch that is padded."""
        return [self.lengths(part)]

    def collate(self, part, indices, key):
        """The rows of these examples; `key`: two ints that seed random draws."""
        raise NotImplementedError

    def train_rows(self, step):
        return self.collate("train", self.train_batches[step].tolist(), (self.config.seed, step))

    def rows(self, part, limit=None, rank=0, world_size=1):
        for indices in by_length(self.lengths(part), EVALUATED, rank, world_size):
            yield self.collate(part, indices, (0, indices[0]))


@torch.no_grad()
def evaluate_part(model, task, part, *, limit=None, rank=0, world_size=1, autocast=nullcontext, any_rank=None):
    """Losses and correct predictions over a part, without dropout.

    Args:
        model: of the task; its mode does not change.
        task: Task.
        part: "train", "validation" or "test".
        limit: None or the number of windows of text to read.
        rank, world_size: this process's share of the part.
        autocast: returns the context to run the model in.
        any_rank: None, or f(bool) -> bool, true if true on any rank: every rank must run a sharded model equally often.

    Returns:
        (sum of the losses in nats, correct predictions, predictions, *others of the task).
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    totals = [0.0, 0, 0, *[0] * task.more_sums]
    batches = task.rows(part, limit, rank, world_size)
    while True:
        rows = next(batches, None)
        if not (any_rank or bool)(rows is not None):
            break
        with autocast():
            sums = task.sums(model, next(task.rows(part, limit)) if rows is None else rows, device)
        if rows is not None:
            totals = [total + new for total, new in zip(totals, sums, strict=True)]
    model.train(was_training)
    return tuple(totals)
