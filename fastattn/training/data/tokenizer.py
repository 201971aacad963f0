"""Tokenizers, from text to token numbers and back: characters, bytes, words, byte-pair encoding and WordPiece.

The `tokenizers` library trains and stores the last three. Special tokens have the first numbers, in the given order; a
plain language model needs none.
"""

import json
import unicodedata

from ..messages import UsageError

KINDS = ("char", "byte", "word", "bpe", "wordpiece")
PAD, UNKNOWN, BEGIN, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
END_OF_TEXT = "<|endoftext|>"  # the only special token of GPT-2
SPECIALS = (PAD, UNKNOWN, BEGIN, END, MASK)  # for models that read padded sentences


class CharTokenizer:
    """One token per character; `characters` in the order of their numbers, after the special tokens."""

    exact = True  # decode(encode(text)) is the text, unless tokens are unknown

    def __init__(self, characters, specials=()):
        self.characters = characters
        self.specials = tuple(specials)
        self.tokens = [*self.specials, *characters]
        self.vocab_size = len(self.tokens)
        self.numbers = {token: number for number, token in enumerate(self.tokens)}

    def encode(self, text):
        if unknown := sorted(set(text) - set(self.characters)):
            if (other := self._decomposed(text, unknown)) != text:
                return self.encode(other)
            if UNKNOWN in self.specials:
                return [self.numbers.get(character, self.numbers[UNKNOWN]) for character in text]
            shown = " ".join(map(repr, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
            raise UsageError(
                f"the text has characters that are not among the {len(self.characters)} of the vocabulary: {shown}"
            )
        return [self.numbers[character] for character in text]

    def _decomposed(self, text, unknown):
        """The text with unknown characters decomposed if their parts are known: keyboards write composed ones."""
        parts = {character: unicodedata.normalize("NFD", character) for character in unknown}
        known = {c: new for c, new in parts.items() if set(new) <= self.numbers.keys()}
        return text.translate(str.maketrans(known))

    def decode(self, numbers):
        first = len(self.specials)
        return "".join(self.tokens[number] for number in numbers if number >= first)

    def token_of(self, number):
        return self.tokens[number]

    def number_of(self, token):
        return self.numbers.get(token)

    def to_json(self):
        values = {"type": "characters", "characters": self.characters}
        if self.specials:
            values["specials"] = self.specials
        return json.dumps(values, ensure_ascii=True, indent=1)


class ByteTokenizer:
    """One token per byte of the UTF-8 text, after the special tokens; it can encode any text."""

    exact = True

    def __init__(self, specials=()):
        self.specials = tuple(specials)
        self.vocab_size = len(self.specials) + 256

    def encode(self, text):
        first = len(self.specials)
        return [byte + first for byte in text.encode("utf-8", "surrogatepass")]

    def decode(self, numbers):
        first = len(self.specials)
        return bytes(number - first for number in numbers if number >= first).decode("utf-8", "replace")

    def token_of(self, number):
        first = len(self.specials)
        return self.specials[number] if number < first else f"<{number - first:02x}>"

    def number_of(self, token):
        return self.specials.index(token) if token in self.specials else None

    def to_json(self):
        return json.dumps({"type": "bytes", "specials": self.specials})


def _train_wordpiece(tokenizer, texts, options):
    """Train a WordPiece tokenizer so that equal texts give equal tokens.

    The library numbers the letters inside words in the order of a hash table, which differs from run to run, and merges
    equally frequent pairs in the order of these numbers. So a first run finds these letters, and a second run gets them
    in a fixed order as special tokens. They become ordinary tokens afterwards.
    """
    from tokenizers import Tokenizer, trainers

    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(**options))
    specials, prefix = options["special_tokens"], "##"
    letters = {token for token in tokenizer.get_vocab() if token.startswith(prefix) and len(token) == len(prefix) + 1}
    fixed = sorted(letters - set(specials))
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(**options | {"special_tokens": specials + fixed}))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    return Tokenizer.from_str(json.dumps(state))


class LearntTokenizer:
    """A tokenizer of the `tokenizers` library: words, byte-pair encoding or WordPiece."""

    def __init__(self, tokenizer):
        from tokenizers import decoders

        tokenizer.no_truncation()  # published tokenizers may truncate or pad texts to 512 tokens
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()
        # others lose white space, and some of them case or accents
        self.exact = isinstance(tokenizer.decoder, decoders.ByteLevel) and tokenizer.normalizer is None

    @classmethod
    def train(cls, kind, texts, vocab_size, specials=(), strip_accents=False):
        """Train on an iterable of texts; `specials` must have the unknown token unless kind is "bpe".

        strip_accents: of "word" and "wordpiece", which write everything in lower case, also drop accents and other
        marks on letters.

        Raises:
            UsageError: the unknown token is missing, or vocab_size leaves no room after the special tokens.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        if kind != "bpe" and UNKNOWN not in specials:
            raise UsageError(f"tokenizer {kind!r}: the special tokens must include {UNKNOWN}, got {list(specials)}")
        if vocab_size <= len(specials):
            raise UsageError(
                f"data.vocab_size must be above {len(specials)}, the number of special tokens, got {vocab_size}"
            )
        options = {"vocab_size": vocab_size, "special_tokens": list(specials), "show_progress": False}
        if kind == "bpe":
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
        elif kind == "wordpiece":
            tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=strip_accents)
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
        else:
            tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
            stripped = [normalizers.NFD(), normalizers.StripAccents(), normalizers.NFC()] if strip_accents else []
            tokenizer.normalizer = normalizers.Sequence([*stripped, normalizers.Lowercase()])
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            trainer = trainers.WordLevelTrainer(**options)
        if kind == "wordpiece":
            return cls(_train_wordpiece(tokenizer, list(texts), options))
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def encode(self, text):
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # half of a surrogate pair
            raise UsageError(f"the text is not Unicode text: {text[:40]!a}") from None

    def decode(self, numbers):
        return self.tokenizer.decode(list(numbers))

    def token_of(self, number):
        return self.tokenizer.id_to_token(number)

    def number_of(self, token):
        return self.tokenizer.token_to_id(token)

    @property
    def specials(self):
        added = self.tokenizer.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def to_json(self):
        return self.tokenizer.to_str(pretty=False)


def smallest_vocabulary(kind):
    """The number of tokens that a vocabulary of this kind must exceed."""
    return 256 if kind in ("bpe", "wordpiece") else 0


def needed_specials(kind):
    """The special tokens that a tokenizer of this kind needs to encode any text."""
    return [UNKNOWN] if kind in ("word", "wordpiece") else []


def end_tokens(tokenizer):
    """The numbers of the tokens that end a document, as far as the tokenizer has them."""
    numbers = map(tokenizer.number_of, (END, END_OF_TEXT))
    return tuple(number for number in numbers if number is not None)


def count_unknown(tokenizer, numbers):
    """How many of a list of token numbers are the unknown token."""
    unknown = tokenizer.number_of(UNKNOWN)
    return 0 if unknown is None else numbers.count(unknown)


def build_tokenizer(kind, texts, train_texts, vocab_size, specials=(), strip_accents=False):
    """A tokenizer for texts.

    Args:
        kind: "char", "byte", "word", "bpe" or "wordpiece".
        texts: iterable of all texts; their characters are the vocabulary of a character tokenizer.
        train_texts: iterable of the texts that a word, bpe or wordpiece vocabulary is learnt from.
        vocab_size: its largest number of tokens; ignored by "char" and "byte".
        specials: names of tokens that represent no text and are never decoded.
        strip_accents: whether a word or wordpiece tokenizer drops accents; ignored by the others.

    Returns:
        An object with vocab_size, encode(text) -> list of int, decode(numbers) -> text, token_of(number) -> str,
        number_of(token) -> int or None, to_json() -> text, specials, a tuple of tokens that represent no text, and
        exact: whether decode(encode(text)) is the text.
    """
    if kind == "char":
        characters = set()
        for text in texts:  # one at a time: they may be larger than memory
            characters.update(text)
        return CharTokenizer("".join(sorted(characters)), specials)
    if kind == "byte":
        return ByteTokenizer(specials)
    return LearntTokenizer.train(kind, train_texts, vocab_size, specials, strip_accents)


def read_tokenizer(content):
    """The tokenizer with this to_json()."""
    values = json.loads(content)
    if values.get("type") == "characters":
        return CharTokenizer(values["characters"], values.get("specials", ()))
    if values.get("type") == "bytes":
        return ByteTokenizer(values["specials"])
    from tokenizers import Tokenizer

    return LearntTokenizer(Tokenizer.from_str(content))


def load_tokenizer(path):
    """Load a tokenizer.

    Args:
        path: a tokenizer.json.

    Raises:
        UsageError: the file is unreadable or damaged.
    """
    try:
        return read_tokenizer(path.read_text(encoding="utf-8"))
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UsageError(f"{path} is not a readable tokenizer: {type(error).__name__}: {error}") from None
