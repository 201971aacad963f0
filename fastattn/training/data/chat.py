"""Conversations: their messages as tokens in the marks of a chat template, and which of the tokens are answers."""

import json
from typing import NamedTuple

from ..messages import UsageError
from .jinja_template import JinjaTemplate, read_template
from .reading import JsonObject, kind_of

ROLES = ("system", "user", "assistant")


class Template(NamedTuple):
    """How messages are written: the pieces of text around them; pieces in `marks` are single tokens if possible.

    begin: before the first message. before: {role: pieces}. end: the mark behind a message, which an answer is
    trained to write. between: behind that mark.
    """

    marks: tuple
    begin: tuple
    before: dict
    end: str
    between: str

    def pieces(self, messages):
        """[(text, whether it is part of an answer)] of messages [(role, content)]; UsageError for another role."""
        found = [(piece, False) for piece in self.begin]
        for role, content in messages:
            if role not in self.before:
                raise UsageError(f"the chat template has no role {role!r}; it has {', '.join(self.before)}")
            found += [(piece, False) for piece in self.before[role]]
            found += [(piece, role == "assistant") for piece in (content, self.end)]
            found.append((self.between, False))
        return found

    def question_pieces(self, messages):
        """As `pieces`, followed by the pieces that come before the next answer."""
        return [*self.pieces(messages), *((piece, False) for piece in self.before["assistant"])]


TEMPLATES = {
    "chatml": Template(
        ("<|im_start|>", "<|im_end|>"), (), {role: ("<|im_start|>", f"{role}\n") for role in ROLES}, "<|im_end|>", "\n"
    ),
    "llama3": Template(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), ("<|begin_of_text|>",),
        {role: ("<|start_header_id|>", role, "<|end_header_id|>", "\n\n") for role in ROLES}, "<|eot_id|>", "",
    ),
    "gemma": Template(
        ("<bos>", "<start_of_turn>", "<end_of_turn>"), ("<bos>",),
        {"user": ("<start_of_turn>", "user\n"), "assistant": ("<start_of_turn>", "model\n")}, "<end_of_turn>", "\n",
    ),
}  # fmt: skip


def choose_template(name, tokenizer, stored=None):
    """The template of a name or a folder; "auto" is the first whose marks the tokenizer has, else chatml.

    Args:
        stored: what a run has kept of the template of a folder (`JinjaTemplate.stored`), instead of reading it.
    Raises:
        UsageError: the folder has no template, or it does not suit the tokenizer.
    """
    if stored is not None or name not in (*TEMPLATES, "auto"):
        return JinjaTemplate(stored or read_template(name), tokenizer.specials)
    if name != "auto":
        return TEMPLATES[name]
    known = (t for t in TEMPLATES.values() if all(tokenizer.number_of(mark) is not None for mark in t.marks))
    return next(known, TEMPLATES["chatml"])


def encode_conversation(tokenizer, template, messages):
    """(token numbers, whether each is part of an answer) of messages [(role, content)].

    Raises:
        UsageError: the template has no such role, or a message holds a mark.
    """
    _check_marks(tokenizer, template, messages)
    return _encode(tokenizer, template, template.pieces(messages))


def encode_question(tokenizer, template, messages):
    """The token numbers of messages and of the pieces before the next answer; errors as encode_conversation."""
    _check_marks(tokenizer, template, messages)
    return _encode(tokenizer, template, template.question_pieces(messages))[0]


def _encode(tokenizer, template, pieces):
    numbers, wanted = [], []
    for piece, is_answer in pieces:
        number = tokenizer.number_of(piece) if piece in template.marks else None
        new = tokenizer.encode(piece) if number is None else [number]
        numbers += new
        wanted += [is_answer] * len(new)
    return numbers, wanted


def _check_marks(tokenizer, template, messages):
    """Raise UsageError if a message holds a mark that would end it or begin another one."""
    marks = [mark for mark in template.marks if tokenizer.number_of(mark) is not None]
    for _, content in messages:
        if mark := next((mark for mark in marks if mark in content), None):
            raise UsageError(f"a message holds {mark!r}, a mark of the chat template: {content[:40]!r}")


def read_messages(value, where):
    """The JSON text [[role, content], ...] of a list of objects with role and content.

    Raises:
        UsageError: it is not such a list, a key is repeated, a role is unknown, or no message is an answer.
    """
    if not isinstance(value, list) or isinstance(value, JsonObject) or not value:
        raise UsageError(f"{where} must be a list of at least one message, got {kind_of(value)}")
    messages = []
    for number, item in enumerate(value, 1):
        message = dict(item) if isinstance(item, JsonObject) else {}
        if not {"role", "content"} <= message.keys():
            raise UsageError(f"{where}, message {number} must be an object with role and content")
        if len(message) < len(item):
            raise UsageError(f"{where}, message {number} has a key more than once")
        if message["role"] not in ROLES:
            raise UsageError(
                f"{where}, message {number}: role must be one of {', '.join(ROLES)}, got {message['role']!r}"
            )
        if not isinstance(message["content"], str):
            got = kind_of(message["content"])
            raise UsageError(f"{where}, message {number}: content must be text, got {got}")
        messages.append([message["role"], message["content"]])
    if not any(role == "assistant" for role, _ in messages):
        raise UsageError(f"{where} has no message of the role assistant")
    return json.dumps(messages, ensure_ascii=False)
