"""Our tokenizers in the file format of the `tokenizers` library, which transformers reads."""

import json

from .tokenizer import (
    BEGIN,
    END,
    END_OF_TEXT,
    MASK,
    PAD,
    UNKNOWN,
    ByteTokenizer,
    CharTokenizer,
)

# role in transformers → our tokens, of which the first that exists has it
_ROLES = {
    "pad_token": (PAD,), "unk_token": (UNKNOWN,), "cls_token": (BEGIN,), "sep_token": (END,), "mask_token": (MASK,),
    "eos_token": (END, END_OF_TEXT),
}  # fmt: skip


def tokenizer_files(tokenizer, block_size, frame):
    """{name: text} of tokenizer.json and tokenizer_config.json.

    Args:
        tokenizer: as from build_tokenizer.
        block_size: the most tokens that the model sees.
        frame: whether texts begin with [CLS] and end with [SEP], as those of an encoder do.
    """
    converted = convert_tokenizer(tokenizer)
    if frame:
        from tokenizers.processors import TemplateProcessing

        numbers = [(name, tokenizer.number_of(name)) for name in (BEGIN, END)]
        converted.post_processor = TemplateProcessing(
            single=f"{BEGIN} $A {END}", pair=f"{BEGIN} $A {END} $B {END}", special_tokens=numbers
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": block_size,
        "clean_up_tokenization_spaces": False,
        **dict(_known(tokenizer)),
    }
    return {
        "tokenizer.json": converted.to_str(pretty=False),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2) + "\n",
    }


def token_settings(tokenizer):
    """{"pad_token_id", "eos_token_id", "bos_token_id": number or None} for a config."""
    known = dict(_known(tokenizer))
    numbers = {role: tokenizer.number_of(known[role]) if role in known else None for role in ("pad_token", "eos_token")}
    return {**{f"{role}_id": number for role, number in numbers.items()}, "bos_token_id": None}


def _known(tokenizer):
    for role, names in _ROLES.items():
        token = next((name for name in names if tokenizer.number_of(name) is not None), None)
        if token is not None:
            yield role, token


def convert_tokenizer(tokenizer):
    """A tokenizers.Tokenizer that encodes and decodes as ours does."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    if isinstance(tokenizer, CharTokenizer):
        converted = Tokenizer(models.WordLevel(dict(tokenizer.numbers), unk_token=UNKNOWN))
        converted.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        converted.decoder = decoders.Fuse()
    elif isinstance(tokenizer, ByteTokenizer):
        names = [*tokenizer.specials, *map(_byte_name, range(256))]
        vocabulary = {name: number for number, name in enumerate(names)}
        converted = Tokenizer(models.BPE(vocabulary, []))
        converted.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        converted.decoder = decoders.ByteLevel()
    else:
        return Tokenizer.from_str(tokenizer.to_json())
    converted.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in tokenizer.specials])
    return converted


def _byte_name(byte):
    """The character for a byte in byte-level vocabularies (Radford et al. 2019): itself, or one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(b not in printable for b in range(byte)))
