"""Text to token numbers and back: one token a character, or byte-pair encoding."""

import json

from .config import UsageError


class CharTokenizer:
    """One token a character; `characters` in the order of their numbers."""

    def __init__(self, characters):
        self.characters = characters
        self.numbers = {character: number for number, character in enumerate(characters)}
        self.vocab_size = len(characters)

    def encode(self, text):
        if unknown := sorted(set(text) - set(self.numbers)):
            shown = " ".join(map(repr, unknown[:10])) + (" ..." if len(unknown) > 10 else "")
            raise UsageError(f"text: expected the {self.vocab_size} characters of the vocabulary, got also {shown}")
        return [self.numbers[character] for character in text]

    def decode(self, numbers):
        return "".join(self.characters[number] for number in numbers)

    def to_json(self):
        return json.dumps({"type": "characters", "characters": self.characters}, ensure_ascii=True, indent=1)


class BpeTokenizer:
    """Byte-level byte-pair encoding: any text can be encoded, decoding gives it back."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.vocab_size = tokenizer.get_vocab_size()

    @classmethod
    def train(cls, text, vocab_size):
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
        return cls(tokenizer)

    def encode(self, text):
        return self.tokenizer.encode(text).ids

    def decode(self, numbers):
        return self.tokenizer.decode(list(numbers))

    def to_json(self):
        return self.tokenizer.to_str(pretty=False)


def build_tokenizer(kind, text, train_text, vocab_size):
    """A tokenizer for a text.

    Args:
        kind: "char" or "bpe".
        text: the whole text, whose characters make the vocabulary of a character tokenizer.
        train_text: what a byte-pair encoding is learnt from.
        vocab_size: its number of tokens.

    Returns:
        An object with vocab_size, encode(text) -> list of int, decode(numbers) -> text, to_json() -> text.
    """
    if kind == "char":
        return CharTokenizer("".join(sorted(set(text))))
    return BpeTokenizer.train(train_text, vocab_size)


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
            return CharTokenizer(values["characters"])
        from tokenizers import Tokenizer

        return BpeTokenizer(Tokenizer.from_str(content))
    except ImportError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise UsageError(f"{path}: expected a tokenizer, got {type(error).__name__}: {error}") from None
