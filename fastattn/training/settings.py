"""The sections of a run's settings: data, model and optimizer, as plain dataclasses that check themselves."""

import codecs
from dataclasses import dataclass, field, fields
from typing import Literal

from fastattn.models.shape import RotaryConfig, Shape

from .files import user_path
from .messages import UsageError, expect


@dataclass
class Columns:
    """Which columns of a table are read.

    Args:
        text: name of the column with the text
        pair: name of the column with a second text, which task classify reads after the first; null = none
        label: name of the column with the class; null = none
        label_kind: what a label is: a class, several classes, or a number to estimate
        label_separator: character between several classes in one text; a list of JSON needs none
        target: name of the column with the target text; null = none
        rejected: name of the column with a worse answer than target, for task preference; null = none
        messages: name of the column with the messages of a conversation, for task chat, instead of text; null = none
        names: names of the columns if the table has no header line; empty = the first line names them
        delimiter: character between the values; null = a comma in .csv, a tab in .tsv
        encoding: how the characters of the table are stored, such as latin-1 or utf-16
        quoting: whether quotation marks enclose values (csv) or are part of them (none); auto = they enclose values if
            the delimiter is not a tab, or if the whole file can be read only that way
    """

    text: str = "text"
    pair: str | None = None
    label: str | None = None
    label_kind: Literal["class", "classes", "number"] = "class"
    label_separator: str = ","
    target: str | None = None
    rejected: str | None = None
    messages: str | None = None
    names: list[str] = field(default_factory=list)
    delimiter: str | None = None
    encoding: str = "utf-8"
    quoting: Literal["auto", "csv", "none"] = "auto"

    def __post_init__(self):
        for name in ("text", "pair", "label", "target", "rejected", "messages"):
            expect(getattr(self, name) != "", f"columns.{name}", "the name of a column", "")
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
        expect(len(self.label_separator) == 1, "columns.label_separator", "one character", self.label_separator)
        separates = self.label_kind == "classes" or self.label_separator == ","
        expect(separates, "columns.label_separator", "left out unless label_kind is classes", self.label_separator)
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        expect(not twice, "columns.names", "without repeated names", twice[:1])


MIXTURE = "mixture"  # the source of a run with data.mixture


@dataclass
class DataConfig:
    """Which text is read, and how it becomes tokens.

    Args:
        source: "topics" (reference prose inside Python's standard library), "shakespeare", a text file or folder, or a
            folder of `fastattn data tokenize`; with packed, and for all tasks except lm, documents (docs/data.md)
        mixture: folders of `fastattn data shard` or `tokenize` to read instead of source, each with its weight, a share
            of the training rows; null = only source; lm only
        order: training draws windows of tokens independently, or shuffles them: each once before one is read again; lm
            only
        target_source: a second text file; its lines are the targets of the lines of source
        unit: the document unit of a text file; a paragraph ends at an empty line
        columns: which columns of a table are read
        packed: task lm reads documents, several per row of block_size tokens, without attention between documents
        tokenizer: one token per character or byte; or words, byte-pair encoding or WordPiece, learnt from the training
            part
        vocab_size: largest vocabulary of a word, bpe or wordpiece tokenizer; ignored by char and byte
        chat_template: how task chat marks messages: chatml, llama3, gemma, or the template of a folder with
            tokenizer_config.json; auto is the one whose marks the vocabulary has, else chatml
        strip_accents: a word or wordpiece tokenizer drops accents, vowel signs and other marks on letters
        validation_fraction: share of the text for validation, after the training part; documents are drawn at random,
            the same for every seed
        test_fraction: share of the text for the final test, at the end; both are ignored if the source has such a part
        train_limit: read only this many training documents, equally many of each class; null = all
    """

    source: str = "topics"
    mixture: dict[str, float] | None = None
    order: Literal["random", "shuffle"] = "random"
    target_source: str | None = None
    unit: Literal["line", "paragraph", "file"] = "line"
    columns: Columns = field(default_factory=Columns)
    packed: bool = False
    tokenizer: Literal["char", "byte", "word", "bpe", "wordpiece"] = "char"
    vocab_size: int = 4096
    strip_accents: bool = False
    chat_template: str = "auto"
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
        if self.mixture is not None:
            self._check_mixture()
        limit = self.train_limit
        expect(limit is None or limit >= 1, "data.train_limit", "null or at least 1", limit)

    def _check_mixture(self):
        expect(self.source in ("topics", MIXTURE), "data.source", "left out with data.mixture", self.source)
        expect(len(self.mixture) > 0, "data.mixture", "null or at least one folder", self.mixture)
        places = {}
        for folder, weight in self.mixture.items():
            first = places.setdefault(user_path(folder).resolve(), folder)
            if first != folder:
                raise UsageError(f"data.mixture names one folder twice, {first!r} and {folder!r}: give it one weight")
            expect(0 < weight < float("inf"), f"data.mixture[{folder!r}]", "a finite number above 0", weight)
        total = sum(self.mixture.values())
        expect(total < float("inf"), "data.mixture", "weights with a finite sum", self.mixture)
        self.source = MIXTURE


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
        norm_output: also a norm of the output of each sub-layer; with norm_first false it is the only one
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
            orthogonalizes the updates of the hidden layers' matrices and uses adamw for all other weights
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
        decay_embeddings: whether embeddings decay too
        cautious_decay: decay only elements that the step does not move away from 0, whatever the optimizer
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
    cautious_decay: bool = False
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
