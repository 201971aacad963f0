"""The settings of a run: plain dataclasses that one YAML file fills, checked before anything is written."""

from dataclasses import dataclass, field
from typing import Literal

from fastattn.models.shape import RotaryConfig

from .messages import UsageError, expect
from .settings import MIXTURE, Columns, DataConfig, ModelConfig, OptimConfig, Rates

__all__ = ["MIXTURE", "Columns", "DataConfig", "ModelConfig", "OptimConfig", "Rates", "TrainConfig", "config_from_dict"]


@dataclass
class TrainConfig:
    """Train a model on text.

    Args:
        task: predict the next token, masked tokens, the label of a document (a class, several, or a number), its
            translation, the answers of a conversation, or which of two answers is better (DPO)
        run: folder to create for config, tokenizer, checkpoints, metrics, loss curve and sample
        start: folder of a run, or of a Hugging Face BERT, GPT-2, Llama or relative of Llama, to take tokenizer and
            weights from; null = from scratch
        trained: train all weights, only the head, or the head and low-rank updates of the blocks' matrices (LoRA)
        lora_rank: rank of the low-rank updates
        preference_beta: task preference; the smaller, the further the model may leave its start
        layers: which library the layers of the model come from
        steps: optimizer steps
        epochs: passes over the training documents, used instead of steps; null = use steps
        batch_size: sequences per step, over all devices and accumulation steps
        accumulate: number of backward passes per step
        batch_tokens: tokens per step; accumulate and batch_size follow from it: a backward pass keeps its batch_size /
            accumulate sequences, and there are as many passes as needed; null = batch_size decides; lm only
        seed: seed of weights, batches and dropout
        log_every: steps between two rows of metrics.csv
        evaluate_every: steps between two validations, each followed by a checkpoint
        select: criterion for the best checkpoint and for patience; accuracy is for masked_lm and classes of documents,
            macro_f1 (the mean of the F1 of all classes) for one or several classes of documents
        class_weights: balanced weighs each class of task classify by documents / (classes * documents of the class)
        validation_windows: number of windows of block_size tokens to validate on; null = the whole split; lm only
        keep: number of newest checkpoints to keep in addition to the best
        patience: validations without a new best before training stops; 0 = never stop early
        sample_prompt: prompt of the sample text at the end; null = a line end or, for tokenizers and documents without
            line ends, the first token of the validation part
        sample_tokens: length of the sample; 0 = no sample
        tensorboard: also write TensorBoard logs
        accelerator: auto uses a GPU if there is one
        devices: number of devices
        num_nodes: number of machines
        strategy: for several devices; ddp keeps all weights on each device, fsdp a shard of them
        precision: number format of parameters and arithmetic
        compile: compile the model with torch.compile
        deterministic: raise an error for operations that are not reproducible
        data: the text and its tokens
        model: the shape of the model
        optim: the optimizer and its learning rate
    """

    task: Literal["lm", "masked_lm", "classify", "translate", "chat", "preference"] = "lm"
    run: str = "runs/char_lm"
    start: str | None = None
    trained: Literal["all", "head", "lora"] = "all"
    lora_rank: int = 8
    preference_beta: float = 0.1
    layers: Literal["fastattn", "torch"] = "fastattn"
    steps: int = 2000
    epochs: float | None = None
    batch_size: int = 12
    accumulate: int = 1
    batch_tokens: int | None = None
    seed: int = 1337
    log_every: int = 10
    evaluate_every: int = 250
    select: Literal["loss", "accuracy", "macro_f1"] = "loss"
    class_weights: Literal["none", "balanced"] = "none"
    validation_windows: int | None = None
    keep: int = 2
    patience: int = 0
    sample_prompt: str | None = None
    sample_tokens: int = 300
    tensorboard: bool = True
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true"] = "32-true"
    compile: bool = False
    deterministic: bool = False
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self):
        counts = (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "evaluate_every",
            "keep",
            "devices",
            "num_nodes",
            "lora_rank",
        )
        for name in counts:
            expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        expect(self.epochs is None or self.epochs > 0, "epochs", "null or above 0", self.epochs)
        self._check_task()
        self._check_labels()
        self._check_answers()
        self._check_strategy()
        windows = self.validation_windows
        expect(windows is None or windows >= 1, "validation_windows", "null or at least 1", windows)
        expect(0 <= self.seed < 2**63, "seed", "at least 0 and below 2**63", self.seed)
        for name in ("patience", "sample_tokens"):
            expect(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        expect(self.trained == "all" or self.start is not None, "trained", "'all' without start", self.trained)
        expect(bool(self.run), "run", "the name of a folder", self.run)
        prompted = self.sample_prompt != "" or not self.sample_tokens
        expect(prompted, "sample_prompt", "at least one character long", "")
        if self.batch_tokens is not None:
            self._count_passes()
        parts = self.accumulate * self.devices * self.num_nodes
        expect(
            self.batch_size % parts == 0,
            "batch_size",
            f"a multiple of accumulate * devices * num_nodes = {parts}",
            self.batch_size,
        )

    def _check_task(self):
        """Raise UsageError for settings that belong to another task."""
        if self.task != "classify":
            for name, value in (("body", "transformer"), ("embedding", "random")):
                got = getattr(self.model, name)
                expect(got == value, f"model.{name}", f"{value!r} for the task {self.task}", got)
        if self.task == "lm" and not self.data.packed:  # a plain text has no documents
            for name in ("train_limit", "target_source"):
                got = getattr(self.data, name)
                expect(got is None, f"data.{name}", "null for the task lm without data.packed", got)
        if self.task != "lm":
            for name, default in (("mixture", None), ("order", "random")):
                got = getattr(self.data, name)
                expect(got == default, f"data.{name}", f"left out for the task {self.task}", got)
            windows = self.validation_windows
            expect(windows is None, "validation_windows", f"null for the task {self.task}", windows)
            expect(not self.data.packed, "data.packed", f"false for the task {self.task}", self.data.packed)

    def _check_labels(self):
        """Raise UsageError for scores and losses that labels of this kind do not have."""
        kind = self.data.columns.label_kind
        selectable = {"class": ("loss", "accuracy", "macro_f1"), "classes": ("loss", "macro_f1"), "number": ("loss",)}
        allowed = {"masked_lm": ("loss", "accuracy"), "classify": selectable[kind]}.get(self.task, ("loss",))
        here = f"for the task {self.task}" + (f" with label_kind {kind}" if kind != "class" else "")
        expect(self.select in allowed, "select", f"{' or '.join(map(repr, allowed))} {here}", self.select)
        one_class = self.task == "classify" and kind == "class"
        expect(one_class or self.class_weights == "none", "class_weights", f"'none' {here}", self.class_weights)
        smoothing = self.optim.label_smoothing
        expect(kind == "class" or not smoothing, "optim.label_smoothing", f"0 {here}", smoothing)

    def _check_answers(self):
        """Raise UsageError for settings of the tasks chat and preference, and of labels."""
        for section, name, default, tasks in (
            ("data.", "chat_template", "auto", ("chat", "preference")), ("data.columns.", "messages", None, ("chat",)),
            ("data.columns.", "rejected", None, ("preference",)), ("data.columns.", "pair", None, ("classify",)),
            ("data.columns.", "label_kind", "class", ("classify",)),
        ):  # fmt: skip
            got = getattr(self.data if section == "data." else self.data.columns, name)
            expect(self.task in tasks or got == default, section + name, f"left out for the task {self.task}", got)
        expect(self.preference_beta > 0, "preference_beta", "above 0", self.preference_beta)
        started = self.start is not None or self.task != "preference"
        expect(started, "start", "the folder of a run or model for the task preference, also its reference", self.start)
        unsharded = self.task != "preference" or self.strategy != "fsdp"
        expect(unsharded, "strategy", "'ddp' for the task preference", self.strategy)

    def _check_strategy(self):
        """Raise UsageError for what cannot be sharded."""
        if self.strategy == "fsdp":
            expect(self.model.body == "transformer", "strategy", f"'ddp' for the body {self.model.body}", "fsdp")
            expect(self.trained != "lora", "trained", "'all' or 'head' with the strategy fsdp", self.trained)
            expect(not self.optim.ema, "optim.ema", "0 with the strategy fsdp", self.optim.ema)
            expect(self.optim.name != "muon", "optim.name", "other than muon with the strategy fsdp", self.optim.name)
            precisions = "32-true, bf16-mixed or bf16-true"
            expect(self.precision != "16-mixed", "precision", f"{precisions} with the strategy fsdp", self.precision)

    def _count_passes(self):
        """Set accumulate and batch_size from batch_tokens; doing it twice changes nothing."""
        at_once, length = max(1, self.batch_size // self.accumulate), self.model.block_size
        expect(self.task == "lm", "batch_tokens", f"null for the task {self.task}", self.batch_tokens)
        whole = self.batch_tokens >= 1 and self.batch_tokens % (at_once * length) == 0
        needed = f"a multiple of {at_once} sequences of model.block_size = {length} tokens, {at_once * length}"
        expect(whole, "batch_tokens", needed, self.batch_tokens)
        self.accumulate = self.batch_tokens // (at_once * length)
        self.batch_size = at_once * self.accumulate


def config_from_dict(values):
    """A TrainConfig from nested dicts; the parser has already checked keys and types, except of whole sections."""
    values = dict(values)
    for section, make, inner, make_inner in (
        ("data", DataConfig, "columns", Columns), ("model", ModelConfig, "rotary", rotary_config),
        ("optim", OptimConfig, "rates", Rates),
    ):  # fmt: skip
        settings = values[section]
        expect(isinstance(settings, dict), section, "a section of settings", settings)
        if inner in settings:  # older runs have no rates
            expect(isinstance(settings[inner], dict), f"{section}.{inner}", "a section of settings", settings[inner])
            settings = {**settings, inner: make_inner(**settings[inner])}
        values[section] = make(**settings)
    return TrainConfig(**values)


def rotary_config(**values):
    """A RotaryConfig of these settings; UsageError if a value is out of range."""
    try:
        return RotaryConfig(**values)
    except ValueError as error:
        raise UsageError(f"model.{error}") from None
