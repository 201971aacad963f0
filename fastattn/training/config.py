"""The settings of a run: plain dataclasses that one YAML file fills, checked before anything is written."""

import codecs
from dataclasses import dataclass, field, fields
from typing import Literal

from fastattn.models.shape import RotaryConfig, Shape

from .messages import UsageError, expect


@dataclass
class Columns:
    """Which columns of a table are read.

    Args:
        text: name of the column with the text
        label: name of the column with the class; null = none
        target: name of the column with the target text; null = none
        rejected: name of the column with a worse answer than target, for task preference; null = none
        messages: name of the column with the messages of a conversation, for task chat, instead of text; null = none
        names: names of the columns if the table has no header line; empty = the first line names them
        delimiter: character between the values; null = a comma in .csv, a tab in .tsv
        encoding: how the characters of the table are stored, such as latin-1 or utf-16
        quoting: whether quotation marks enclose values (csv) or are part of them (none); auto = they enclose values if
            the delimiter is no tab, or if the whole file can be read only so
    """

    text: str = "text"
    label: str | None = None
    target: str | None = None
    rejected: str | None = None
    messages: str | None = None
    names: list[str] = field(default_factory=list)
    delimiter: str | None = None
    encoding: str = "utf-8"
    quoting: Literal["auto", "csv", "none"] = "auto"

    def __post_init__(self):
        if self.delimiter == "\\t":  # as typed in a shell
            self.delimiter = "\t"
        usable = self.delimiter is None or (len(self.delimiter) == 1 and self.delimiter not in '"\r\n')
        expect(usable, "columns.delimiter", "null or one character, no quotation mark or line end", self.delimiter)
        try:
            self.encoding = codecs.lookup(self.encoding).name
            is_text = codecs.lookup(self.encoding)._is_text_encoding
        except LookupError:
            is_text = False
        expect(is_text, "columns.encoding", "the name of an encoding, such as latin-1", self.encoding)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        expect(not twice, "columns.names", "without repeated names", twice[:1])


@dataclass
class DataConfig:
    """Which text is read, and how it becomes tokens.

    Args:
        source: "topics" (reference prose inside Python's standard library), "shakespeare", a text file or folder, or a
            folder of `fastattn data tokenize`; with packed, and for all tasks except lm, documents (docs/data.md)
        target_source: a second text file; its lines are the targets of the lines of source
        unit: the document unit of a text file; a paragraph ends at an empty line
        columns: which columns of a table are read
        packed: task lm reads documents, several per row of block_size tokens, without attention between documents
        tokenizer: one token per character or byte; or words, byte-pair encoding or WordPiece, learnt from the training
            part
        vocab_size: largest vocabulary of a word, bpe or wordpiece tokenizer; ignored by char and byte
        chat_template: how task chat marks messages; auto is the one whose marks the vocabulary has, else chatml
        strip_accents: a word or wordpiece tokenizer drops accents, vowel signs and other marks on letters
        validation_fraction: share of the text for validation, after the training part; documents are drawn at random,
            the same for every seed
        test_fraction: share of the text for the final test, at the end; both are ignored if the source has such a part
        train_limit: read only this many training documents, equally many of each class; null = all
    """

    source: str = "topics"
    target_source: str | None = None
    unit: Literal["line", "paragraph", "file"] = "line"
    columns: Columns = field(default_factory=Columns)
    packed: bool = False
    tokenizer: Literal["char", "byte", "word", "bpe", "wordpiece"] = "char"
    vocab_size: int = 4096
    strip_accents: bool = False
    chat_template: Literal["auto", "chatml", "llama3", "gemma"] = "auto"
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    train_limit: int | None = None

    def __post_init__(self):
        if self.tokenizer in ("bpe", "wordpiece"):
            expect(self.vocab_size > 256, "data.vocab_size", "above 256 (the bytes)", self.vocab_size)
        expect(self.vocab_size > 0, "data.vocab_size", "above 0", self.vocab_size)
        strips = not self.strip_accents or self.tokenizer in ("word", "wordpiece")
        expect(strips, "data.strip_accents", f"false for the tokenizer {self.tokenizer}", self.strip_accents)
        fraction = self.validation_fraction
        expect(0 < fraction < 1, "data.validation_fraction", "above 0 and below 1", fraction)
        expect(0 <= self.test_fraction < 1, "data.test_fraction", "at least 0 and below 1", self.test_fraction)
        held_out = fraction + self.test_fraction
        expect(held_out < 1, "data.validation_fraction + data.test_fraction", "below 1", held_out)
        limit = self.train_limit
        expect(limit is None or limit >= 1, "data.train_limit", "null or at least 1", limit)


@dataclass
class ModelConfig:
    """The shape of the model.

    Args:
        body: body of a classifier; all other tasks use a transformer
        n_layer: number of blocks; a translator has this many in the encoder and in the decoder
        n_head: attention heads per block
        n_kv_head: heads of keys and values, each shared by n_head / n_kv_head heads of queries; null = n_head
        d_model: width, a multiple of n_head
        d_ff: width of the feed-forward block; null = 4 * d_model
        block_size: the most tokens the model sees at once
        head_dim: width of a head; null = d_model / n_head
        dropout: probability of dropping an element
        bias: whether linear layers and norms have biases
        qkv_bias: whether the projections to queries, keys and values have biases; null = as bias
        positions: how the model represents the order of tokens
        rotary: the angles of rotary positions
        window: a token sees this many tokens, itself included, in layers that window_pattern calls S; null = all
        window_pattern: letters S (sliding window) and L (the whole text), repeated over the layers
        norm: LayerNorm or RMSNorm
        norm_weight: whether norms have weights
        norm_first: norm before each sub-layer (pre-norm), not after it
        norm_output: a norm of the output of each sub-layer too; with norm_first false only that one
        norm_eps: added to the variance in norms
        qk_norm: norm of queries and keys, of each head or of all heads together
        attention_softcap: scores become softcap * tanh(score / softcap); 0 = off
        attention_scale: factor of the products of queries and keys; null = 1 / sqrt(head_dim)
        sinks: each head learns a logit that takes part in the softmax of its scores
        logit_softcap: softcap of the output layer's logits; 0 = off
        embedding_scale: multiply token embeddings by sqrt(d_model)
        embedding_norm: a norm on the embeddings
        parallel: attention and the feed-forward block of a block read the same norm
        feed_forward: activation, or gate (swiglu, geglu, geglu_tanh, reglu), of the feed-forward block
        tied: whether the output layer shares the weights of the embedding
        head_transform: masked_lm has a layer with GELU and norm before the output layer, as in BERT
        pooling: a transformer classifier uses the mean of all positions, the first one, or BERT's pooler on the first
        init: how matrices are initialized; gpt2 is normal, with smaller projections into the residual stream
        embedding: token embedding of a classifier, initialized like the rest or by word2vec on the training texts
        checkpointing: recompute activations in the backward pass instead of saving them
    """

    body: Literal["transformer", "lstm", "gru", "cnn", "bag_of_words"] = "transformer"
    n_layer: int = 4
    n_head: int = 4
    n_kv_head: int | None = None
    d_model: int = 128
    d_ff: int | None = None
    block_size: int = 64
    head_dim: int | None = None
    dropout: float = 0.0
    bias: bool = True
    qkv_bias: bool | None = None
    positions: Literal["learned", "sinusoidal", "rotary", "alibi"] = "learned"
    rotary: RotaryConfig = field(default_factory=RotaryConfig)
    window: int | None = None
    window_pattern: str = "S"
    norm: Literal["layer", "rms"] = "layer"
    norm_weight: bool = True
    norm_first: bool = True
    norm_output: bool = False
    norm_eps: float = 1e-5
    qk_norm: Literal["none", "head", "all"] = "none"
    attention_softcap: float = 0.0
    attention_scale: float | None = None
    sinks: bool = False
    logit_softcap: float = 0.0
    embedding_scale: bool = False
    embedding_norm: bool = False
    parallel: bool = False
    feed_forward: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh", "reglu"] = (
        "gelu"
    )
    tied: bool = True
    head_transform: bool = False
    pooling: Literal["mean", "first", "pooler"] = "mean"
    init: Literal["gpt2", "normal", "uniform", "xavier", "he", "nanochat"] = "gpt2"
    embedding: Literal["random", "word2vec"] = "random"
    checkpointing: bool = False

    def __post_init__(self):
        for name in ("n_layer", "n_head", "d_model", "block_size"):
            expect(getattr(self, name) >= 1, f"model.{name}", "at least 1", getattr(self, name))
        divides = self.head_dim is not None or self.d_model % self.n_head == 0
        expect(divides, "model.d_model", f"a multiple of n_head = {self.n_head}", self.d_model)
        shared = self.n_kv_head
        expect(
            shared is None or (shared >= 1 and self.n_head % shared == 0),
            "model.n_kv_head",
            f"null or a divisor of n_head = {self.n_head}",
            shared,
        )
        rotates = self.positions == "rotary" and self.body == "transformer"
        width = self.head_dim or self.d_model // self.n_head
        expect(not rotates or width % 2 == 0, "model.d_model / n_head", "even for rotary positions", width)
        pooled = self.pooling == "mean" or self.body == "transformer"
        expect(pooled, "model.pooling", f"'mean' for the body {self.body}", self.pooling)
        embedded = self.embedding == "random" or self.body != "bag_of_words"
        expect(embedded, "model.embedding", "'random' for the body bag_of_words", self.embedding)
        expect(self.d_ff is None or self.d_ff >= 1, "model.d_ff", "null or at least 1", self.d_ff)
        expect(0 <= self.dropout < 1, "model.dropout", "at least 0 and below 1", self.dropout)
        expect(self.norm_eps > 0, "model.norm_eps", "above 0", self.norm_eps)
        if self.body == "transformer":
            self._check_shape()

    def _check_shape(self):
        """Raise UsageError unless the model's own check passes, whose messages begin with the name of a setting."""
        try:
            Shape(**{f.name: getattr(self, f.name) for f in fields(Shape) if f.name != "layers"})
        except ValueError as error:
            raise UsageError(f"model.{error}") from None


@dataclass
class Rates:
    """Factors of the learning rate of some weights.

    Args:
        embeddings: of token and position embeddings
        head: of the output layer, if it is not the embedding
        matrices: of the matrices of the hidden layers
        vectors: of norms and biases
    """

    embeddings: float = 1.0
    head: float = 1.0
    matrices: float = 1.0
    vectors: float = 1.0

    def __post_init__(self):
        for name, value in vars(self).items():
            expect(0 <= value < float("inf"), f"optim.rates.{name}", "a finite number, at least 0", value)


@dataclass
class OptimConfig:
    """The optimizer and its learning rate: a linear warm-up, then a schedule.

    Args:
        name: momentum and nesterov are sgd with momentum; adamw decays weights, adam adds the decay to gradients; muon
            orthogonalizes the updates of the hidden layers' matrices and takes adamw for all other weights
        schedule: learning rate after the warm-up; noam falls with 1 / sqrt(step); wsd stays, then falls linearly
        learning_rate: highest learning rate, reached after the warm-up
        min_learning_rate: cosine, linear and wsd end at it, noam does not fall below it, constant ignores it
        decay_fraction: share of the steps in which wsd falls, at the end
        rates: factors of the learning rate of some weights
        warmup_steps: steps of the warm-up from 0 to learning_rate
        momentum: momentum of momentum and nesterov
        beta1: decay of the mean of gradients (adam, adamw)
        beta2: decay of the mean of squared gradients (adam, adamw)
        weight_decay: weight decay, of matrices only
        decay_embeddings: whether embeddings are among them
        clip: largest norm of all gradients together; 0 = no clipping
        label_smoothing: share of the target's probability that is spread over all classes, in training only
        ema: decay per step of the moving average of weights that is validated and saved; 0 = no average
    """

    name: Literal["sgd", "momentum", "nesterov", "adam", "adamw", "muon"] = "adamw"
    schedule: Literal["constant", "cosine", "linear", "noam", "wsd"] = "cosine"
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    rates: Rates = field(default_factory=Rates)
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    clip: float = 1.0
    label_smoothing: float = 0.0
    ema: float = 0.0

    def __post_init__(self):
        expect(self.learning_rate > 0, "optim.learning_rate", "above 0", self.learning_rate)
        expect(
            0 <= self.min_learning_rate <= self.learning_rate,
            "optim.min_learning_rate",
            f"from 0 to learning_rate = {self.learning_rate}",
            self.min_learning_rate,
        )
        for name in ("warmup_steps", "weight_decay", "clip"):
            expect(getattr(self, name) >= 0, f"optim.{name}", "at least 0", getattr(self, name))
        expect(0 < self.decay_fraction <= 1, "optim.decay_fraction", "above 0 and at most 1", self.decay_fraction)
        for name in ("momentum", "beta1", "beta2", "label_smoothing", "ema"):
            expect(0 <= getattr(self, name) < 1, f"optim.{name}", "at least 0 and below 1", getattr(self, name))


@dataclass
class TrainConfig:
    """Train a model on text.

    Args:
        task: predict the next token, masked tokens, the class of a document, its translation, the answers of a
            conversation, or which of two answers is better (DPO)
        run: folder to create for config, tokenizer, checkpoints, metrics, loss curve and sample
        start: folder of a run, or of a Hugging Face BERT or GPT-2, to take tokenizer and weights from; null = from
            scratch
        trained: train all weights, only the head, or the head and low-rank updates of the blocks' matrices (LoRA)
        lora_rank: rank of the low-rank updates
        preference_beta: task preference; the smaller, the further the model may leave its start
        layers: which library the layers of the model come from
        steps: optimizer steps
        epochs: passes over the training documents, used instead of steps; null = use steps
        batch_size: sequences per step, over all devices and accumulation steps
        accumulate: number of backward passes per step
        batch_tokens: tokens per step; then accumulate and batch_size follow: the sequences of one backward pass stay,
            batch_size / accumulate, and so many passes are made; null = batch_size decides; lm only
        seed: seed of weights, batches and dropout
        log_every: steps between two rows of metrics.csv
        evaluate_every: steps between two validations, each followed by a checkpoint
        select: criterion for the best checkpoint and for patience; accuracy is for masked_lm and classify, macro_f1
            (the mean of the F1 of all classes) for classify
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
        selectable = {"masked_lm": ("loss", "accuracy"), "classify": ("loss", "accuracy", "macro_f1")}
        allowed = selectable.get(self.task, ("loss",))
        expect(
            self.select in allowed, "select", f"{' or '.join(map(repr, allowed))} for the task {self.task}", self.select
        )
        weighted = self.task == "classify" or self.class_weights == "none"
        expect(weighted, "class_weights", f"'none' for the task {self.task}", self.class_weights)
        if self.task != "classify":
            for name, value in (("body", "transformer"), ("embedding", "random")):
                got = getattr(self.model, name)
                expect(got == value, f"model.{name}", f"{value!r} for the task {self.task}", got)
        if self.task == "lm" and not self.data.packed:  # a plain text has no documents
            for name in ("train_limit", "target_source"):
                got = getattr(self.data, name)
                expect(got is None, f"data.{name}", "null for the task lm without data.packed", got)
        if self.task != "lm":
            windows = self.validation_windows
            expect(windows is None, "validation_windows", f"null for the task {self.task}", windows)
            expect(not self.data.packed, "data.packed", f"false for the task {self.task}", self.data.packed)
        for section, name, default, tasks in (
            ("data.", "chat_template", "auto", ("chat", "preference")), ("data.columns.", "messages", None, ("chat",)),
            ("data.columns.", "rejected", None, ("preference",)),
        ):  # fmt: skip
            got = getattr(self.data if section == "data." else self.data.columns, name)
            expect(self.task in tasks or got == default, section + name, f"left out for the task {self.task}", got)
        expect(self.preference_beta > 0, "preference_beta", "above 0", self.preference_beta)
        started = self.start is not None or self.task != "preference"
        expect(started, "start", "the folder of a run or model for the task preference, its reference", self.start)
        unsharded = self.task != "preference" or self.strategy != "fsdp"
        expect(unsharded, "strategy", "'ddp' for the task preference", self.strategy)
        if self.strategy == "fsdp":
            expect(self.model.body == "transformer", "strategy", f"'ddp' for the body {self.model.body}", "fsdp")
            expect(self.trained != "lora", "trained", "'all' or 'head' with the strategy fsdp", self.trained)
            expect(not self.optim.ema, "optim.ema", "0 with the strategy fsdp", self.optim.ema)
            expect(self.optim.name != "muon", "optim.name", "another one with the strategy fsdp", self.optim.name)
            precisions = "32-true, bf16-mixed or bf16-true"
            expect(self.precision != "16-mixed", "precision", f"{precisions} with the strategy fsdp", self.precision)
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
    """A TrainConfig from nested dicts; the parser has already checked keys and types."""
    if isinstance(values["optim"].get("rates"), dict):
        values = {**values, "optim": {**values["optim"], "rates": Rates(**values["optim"]["rates"])}}
    sections = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig}
    values = {**values, "data": {**values["data"], "columns": Columns(**values["data"]["columns"])}}
    if isinstance(values["model"].get("rotary"), dict):
        values["model"] = {**values["model"], "rotary": rotary_config(values["model"]["rotary"])}
    return TrainConfig(**{k: sections[k](**v) if k in sections else v for k, v in values.items()})


def rotary_config(values):
    """A RotaryConfig from a dict; UsageError if a value is out of range."""
    try:
        return RotaryConfig(**values)
    except ValueError as error:
        raise UsageError(f"model.{error}") from None
