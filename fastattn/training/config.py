"""What a user may set: plain dataclasses, one YAML file, checked before anything is touched."""

from dataclasses import dataclass, field
from typing import Literal

from .messages import expect


@dataclass
class Columns:
    """Which columns of a table are read.

    Args:
        text: name of the column with the text
        label: name of the column with the class, null = none
        target: name of the column with the target text, null = none
        names: names of the columns of a table that has no header line, empty = the first line names them
    """

    text: str = "text"
    label: str | None = None
    target: str | None = None
    names: list[str] = field(default_factory=list)


@dataclass
class DataConfig:
    """Which text, and how it becomes tokens.

    Args:
        source: "topics" (reference prose inside Python's standard library), "shakespeare", a text file or folder, or a
            folder of `fastattn data tokenize`; with packed, and for all tasks but lm: documents (docs/data.md)
        target_source: a second text file whose lines are the targets of those of the first
        unit: what is one document of a text file; a paragraph ends at an empty line
        columns: which columns of a table
        packed: lm reads documents, several in a row of block_size tokens, with no attention from one to another
        tokenizer: one token a character or a byte; words, byte-pair encoding or WordPiece learnt from the training part
        vocab_size: greatest number of tokens of a word, bpe or wordpiece tokenizer; the others count theirs
        validation_fraction: part of the text for validation, after the training part; of documents: drawn, whatever
            the seed the same
        test_fraction: part of the text for the final test, at the end; both only where the source has no such part
        train_limit: read so many training documents only, as many of every class; null = all
    """

    source: str = "topics"
    target_source: str | None = None
    unit: Literal["line", "paragraph", "file"] = "line"
    columns: Columns = field(default_factory=Columns)
    packed: bool = False
    tokenizer: Literal["char", "byte", "word", "bpe", "wordpiece"] = "char"
    vocab_size: int = 4096
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    train_limit: int | None = None

    def __post_init__(self):
        if self.tokenizer in ("bpe", "wordpiece"):
            expect(self.vocab_size > 256, "data.vocab_size", "more than the 256 bytes", self.vocab_size)
        expect(self.vocab_size > 0, "data.vocab_size", "more than 0", self.vocab_size)
        expect(0 < self.validation_fraction < 1, "data.validation_fraction", "0 < x < 1", self.validation_fraction)
        expect(0 <= self.test_fraction < 1, "data.test_fraction", "0 <= x < 1", self.test_fraction)
        held_out = self.validation_fraction + self.test_fraction
        expect(held_out < 1, "data", "validation_fraction + test_fraction below 1", held_out)
        limit = self.train_limit
        expect(limit is None or limit >= 1, "data.train_limit", "null or at least 1", limit)


@dataclass
class ModelConfig:
    """The shape of the model.

    Args:
        body: of a classifier; every other task has a transformer
        n_layer: number of blocks; of a translator, in the encoder and in the decoder each
        n_head: attention heads of a block
        n_kv_head: heads of keys and values, each shared by n_head / n_kv_head heads of queries; null = n_head
        d_model: width, a multiple of n_head
        d_ff: width of the feed-forward block, null = 4 * d_model
        block_size: tokens the model sees at once
        dropout: probability of dropping an element
        bias: whether linear layers and norms have biases
        positions: how the model knows the order of tokens
        norm_first: norms before each sub-layer (pre-norm), not after it
        feed_forward: activation, or gate (swiglu, geglu, reglu), of the feed-forward block
        tied: the output layer's weights are the embedding's
        norm_eps: what norms add to the variance
        head_transform: a masked_lm has a layer with GELU and norm before the output layer, as BERT
        pooling: a classifier of a transformer takes the mean of all positions, or the first, or BERT's layer on that
        init: how matrices start; gpt2 is normal with smaller projections into the residual stream
        embedding: how the token embedding of a classifier starts: like the rest, or from word2vec of the training texts
        checkpointing: compute activations again in the backward pass instead of keeping them
    """

    body: Literal["transformer", "lstm", "gru", "cnn", "bag_of_words"] = "transformer"
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None
    d_model: int = 128
    d_ff: int | None = None
    block_size: int = 64
    dropout: float = 0.0
    bias: bool = True
    positions: Literal["learned", "sinusoidal", "rotary", "alibi"] = "learned"
    norm_first: bool = True
    feed_forward: Literal["gelu", "gelu_tanh", "relu", "silu", "swiglu", "geglu", "reglu"] = "gelu"
    tied: bool = True
    norm_eps: float = 1e-5
    head_transform: bool = False
    pooling: Literal["mean", "first", "pooler"] = "mean"
    init: Literal["gpt2", "normal", "uniform", "xavier", "he"] = "gpt2"
    embedding: Literal["random", "word2vec"] = "random"
    checkpointing: bool = False

    def __post_init__(self):
        for name in ("n_layer", "n_head", "d_model", "block_size"):
            expect(getattr(self, name) >= 1, f"model.{name}", "at least 1", getattr(self, name))
        expect(self.d_model % self.n_head == 0, "model.d_model", f"a multiple of n_head = {self.n_head}", self.d_model)
        shared = self.n_kv_head
        expect(
            shared is None or (shared >= 1 and self.n_head % shared == 0),
            "model.n_kv_head",
            f"null or a divisor of n_head = {self.n_head}",
            shared,
        )
        rotates = self.positions == "rotary" and self.body == "transformer"
        width = self.d_model // self.n_head
        expect(not rotates or width % 2 == 0, "model.d_model / n_head", "an even number for rotary positions", width)
        pooled = self.pooling == "mean" or self.body == "transformer"
        expect(pooled, "model.pooling", f"mean for the body {self.body}", self.pooling)
        embedded = self.embedding == "random" or self.body != "bag_of_words"
        expect(embedded, "model.embedding", "random for the body bag_of_words", self.embedding)
        expect(self.d_ff is None or self.d_ff >= 1, "model.d_ff", "null or at least 1", self.d_ff)
        expect(0 <= self.dropout < 1, "model.dropout", "0 <= x < 1", self.dropout)
        expect(self.norm_eps > 0, "model.norm_eps", "more than 0", self.norm_eps)


@dataclass
class OptimConfig:
    """Which optimizer, and its learning rate: a linear warm-up, then a schedule.

    Args:
        name: momentum and nesterov are sgd with momentum; adamw decays weights, adam adds the decay to gradients
        schedule: after the warm-up; noam falls with 1 / sqrt(step)
        learning_rate: the highest, reached after the warm-up
        min_learning_rate: cosine and linear reach it in the last step, noam falls no further, constant ignores it
        warmup_steps: steps from 0 to the highest
        momentum: of momentum and nesterov
        beta1: decay of the mean of gradients, of adam and adamw
        beta2: decay of the mean of squared gradients, of adam and adamw
        weight_decay: on matrices only
        clip: largest norm of all gradients together, 0 = no clipping
        label_smoothing: part of the target's probability that is spread over all classes, in training only
        ema: decay a step of the average of weights that is validated and saved, 0 = the weights themselves
    """

    name: Literal["sgd", "momentum", "nesterov", "adam", "adamw"] = "adamw"
    schedule: Literal["constant", "cosine", "linear", "noam"] = "cosine"
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0

    def __post_init__(self):
        expect(self.learning_rate > 0, "optim.learning_rate", "more than 0", self.learning_rate)
        expect(
            0 <= self.min_learning_rate <= self.learning_rate,
            "optim.min_learning_rate",
            f"0 to learning_rate = {self.learning_rate}",
            self.min_learning_rate,
        )
        for name in ("warmup_steps", "weight_decay", "clip"):
            expect(getattr(self, name) >= 0, f"optim.{name}", "at least 0", getattr(self, name))
        for name in ("momentum", "beta1", "beta2", "label_smoothing", "ema"):
            expect(0 <= getattr(self, name) < 1, f"optim.{name}", "0 <= x < 1", getattr(self, name))


@dataclass
class TrainConfig:
    """Train a model on text.

    Args:
        task: next token, tokens under a mask, class of a document, or translation of a document
        run: folder to create: config, tokenizer, checkpoints, metrics, loss curve, sample
        start: folder of a run to take tokenizer and weights from, or of a BERT or GPT-2 of Hugging Face; null = anew
        trained: all weights, the head only, or low-rank additions to the blocks' matrices beside the head (LoRA)
        lora_rank: rank of those
        layers: who supplies the layers of the model
        steps: optimizer steps
        epochs: passes over the training documents in place of steps, null = steps counts
        batch_size: sequences of a step, over all devices and accumulation steps
        accumulate: backward passes a step is divided into
        seed: decides weights, batches and dropout
        log_every: steps between two rows of metrics.csv
        evaluate_every: steps between two validations; a checkpoint follows each
        select: what the best checkpoint and patience go by; accuracy is for masked_lm and classify
        validation_windows: windows of block_size tokens to validate on, null = the whole split; lm only
        keep: newest checkpoints to keep beside the best
        patience: validations without a new best before training stops, 0 = never
        sample_prompt: text that the sample at the end continues
        sample_tokens: length of that sample, 0 = none
        tensorboard: write TensorBoard logs beside metrics.csv
        accelerator: auto takes a GPU when there is one
        devices: number of devices
        num_nodes: number of machines
        strategy: for several devices; ddp keeps all weights on each, fsdp a part of them
        precision: number format of parameters and arithmetic
        compile: compile the model with torch.compile
        deterministic: refuse operations that are not reproducible
        data: the text and its tokens
        model: the shape of the model
        optim: the optimizer and its learning rate
    """

    task: Literal["lm", "masked_lm", "classify", "translate"] = "lm"
    run: str = "runs/char_lm"
    start: str | None = None
    trained: Literal["all", "head", "lora"] = "all"
    lora_rank: int = 8
    layers: Literal["fastattn", "torch"] = "fastattn"
    steps: int = 2000
    epochs: float | None = None
    batch_size: int = 12
    accumulate: int = 1
    seed: int = 1337
    log_every: int = 10
    evaluate_every: int = 250
    select: Literal["loss", "accuracy"] = "loss"
    validation_windows: int | None = None
    keep: int = 2
    patience: int = 0
    sample_prompt: str = "\n"
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
        expect(self.epochs is None or self.epochs > 0, "epochs", "null or more than 0", self.epochs)
        expect(
            self.select == "loss" or self.task in ("masked_lm", "classify"), "select", "loss for this task", self.select
        )
        if self.task != "classify":
            for name, value in (("body", "transformer"), ("embedding", "random")):
                got = getattr(self.model, name)
                expect(got == value, f"model.{name}", f"{value} for the task {self.task}", got)
        if self.task == "lm" and not self.data.packed:
            for name in ("train_limit", "target_source"):  # not ignored in silence: a plain text has no documents
                got = getattr(self.data, name)
                expect(got is None, f"data.{name}", "null for task lm without data.packed", got)
        if self.strategy == "fsdp":
            expect(self.model.body == "transformer", "strategy", f"ddp for the body {self.model.body}", "fsdp")
            expect(self.trained != "lora", "trained", "all or head with the strategy fsdp", self.trained)
            expect(not self.optim.ema, "optim.ema", "0 with the strategy fsdp", self.optim.ema)
            expect(self.precision != "16-mixed", "precision", "another with the strategy fsdp", self.precision)
        windows = self.validation_windows
        expect(windows is None or windows >= 1, "validation_windows", "null or at least 1", windows)
        expect(0 <= self.seed < 2**63, "seed", "0 <= seed < 2**63", self.seed)
        for name in ("patience", "sample_tokens"):
            expect(getattr(self, name) >= 0, name, "at least 0", getattr(self, name))
        expect(self.trained == "all" or self.start is not None, "trained", "'all' without start", self.trained)
        expect(bool(self.run), "run", "a folder name", self.run)
        expect(self.sample_prompt or not self.sample_tokens, "sample_prompt", "at least one character", "")
        parts = self.accumulate * self.devices * self.num_nodes
        expect(
            self.batch_size % parts == 0,
            "batch_size",
            f"a multiple of accumulate * devices * num_nodes = {parts}",
            self.batch_size,
        )


def config_from_dict(values):
    """A TrainConfig from nested dictionaries whose keys and types a parser has already checked."""
    sections = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig}
    values = {**values, "data": {**values["data"], "columns": Columns(**values["data"]["columns"])}}
    return TrainConfig(**{k: sections[k](**v) if k in sections else v for k, v in values.items()})
