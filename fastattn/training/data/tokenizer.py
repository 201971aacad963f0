"""Text to token numbers and back: characters, bytes, words, byte-pair encoding and WordPiece.

The last three are trained and stored by the `tokenizers` library. Special tokens have the first numbers, in the order
in which they are named; a tokenizer without them is what a plain language model needs.
"""

import json

from ..messages import UsageError

KINDS = ("char", "byte", "word", "bpe", "wordpiece")
PAD, UNKNOWN, BEGIN, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
END_OF_TEXT = "<|endoftext|>"  # all that GPT-2 has
SPECIALS = (PAD, UNKNOWN, BEGIN, END, MASK)  # what models that read padded sentences need


class CharTokenizer:
    """One token a character; `characters` in the order of their numbers, after the special tokens."""

    def __init__(self, characters, specials=()):
        self.characters = characters
        self.specials = tuple(specials)
        self.tokens = [*self.specials, *characters]
        self.vocab_size = len(self.tokens)
        self.numbers = {token: number for number, token in enumerate(self.tokens)}

    def encode(self, text):
        if unknown := sorted(set(text) - set(self.characters)):
            if UNKNOWN in self.specials:
                return [self.numbers.get(character, self.numbers[UNKNOWN]) for character in text]
            shown = " ".join(map(repr, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
            raise UsageError(
                f"text: expected the {len(self.characters)} characters of the vocabulary, got also {shown}"
            )
        return [self.numbers[character] for character in text]

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
    """One token a byte of the text in UTF-8, after the special tokens: any text can be encoded, nothing is learnt."""

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


class LearntTokenizer:
    """A tokenizer of the `tokenizers` library: words, byte-pair encoding or WordPiece."""

    def __init__(self, tokenizer):
        tokenizer.no_truncation()  # published ones may cut a text at 512 tokens, or fill it up
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, kind, texts, vocab_size, specials=()):
        """Learn from an iterable of texts; `specials` must hold the unknown token unless kind is "bpe".

        Raises:
            UsageError: a word or WordPiece vocabulary without the unknown token, or no room beside special tokens.
        """
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

        if kind != "bpe" and UNKNOWN not in specials:
            raise UsageError(f"tokenizer {kind!r}: expected special tokens with {UNKNOWN}, got {list(specials)}")
        if vocab_size <= len(specials):
            raise UsageError(
                f"data.vocab_size: expected more than the {len(specials)} special tokens, got {vocab_size}"
            )
        options = {"vocab_size": vocab_size, "special_tokens": list(specials), "show_progress": False}
        if kind == "bpe":
            tokenizer = Tokenizer(models.BPE())
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
        elif kind == "wordpiece":
            tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
            tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            tokenizer.decoder = decoders.WordPiece()
            trainer = trainers.WordPieceTrainer(**options)
        else:
            tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
            tokenizer.normalizer = normalizers.Lowercase()
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
            trainer = trainers.WordLevelTrainer(**options)
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, numbers):
        return self.tokenizer.decode(list(numbers))

    def token_of(self, number):
        return self.tokenizer.id_to_token(number)

    def number_of(self, token):
        return self.tokenizer.token_to_id(token)

    def to_json(self):
        return self.tokenizer.to_str(pretty=False)


def needed_specials(kind):
    """The special tokens without which a tokenizer of this kind cannot encode every text."""
    return [UNKNOWN] if kind in ("word", "wordpiece") else []


def build_tokenizer(kind, texts, train_texts, vocab_size, specials=()):
    """A tokenizer for texts.

    Args:
        kind: "char", "byte", "word", "bpe" or "wordpiece".
        texts: iterable of all texts, whose characters make the vocabulary of a character tokenizer.
        train_texts: iterable of those a word, bpe or wordpiece vocabulary is learnt from.
        vocab_size: its greatest number of tokens; the others count theirs.
        specials: names of tokens that stand for no text and are never decoded.

    Returns:
        An object with vocab_size, encode(text) -> list of int, decode(numbers) -> text, token_of(number) -> str,
        number_of(token) -> int or None, to_json() -> text.
    """
    if kind == "char":
        return CharTokenizer("".join(sorted(set().union(*texts))), specials)
    if kind == "byte":
        return ByteTokenizer(specials)
    return LearntTokenizer.train(kind, train_texts, vocab_size, specials)


def load_tokenizer(path):
    """The tokenizer of a run.

    Args:
        path: its tokenizer.json.

    Raises:
        UsageError: unreadable or damaged file.
    """
    try:
        content = path.read_text(encoding="utf-8")
        values = json.loads(content)
        if values.get("type") == "characters":
            return CharTokenizer(values["characters"], values.get("specials", ()))
        if values.get("type") == "bytes":
            return ByteTokenizer(values["specials"])
        from tokenizers import Tokenizer

        return LearntTokenizer(Tokenizer.from_str(content))
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UsageError(f"{path}: expected a tokenizer, got {type(error).__name__}: {error}") from None
