"""Chat templates in Jinja, as folders of Hugging Face have them, run in Jinja's sandbox."""

import json
import re

from ..files import user_path
from ..messages import UsageError

_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_template(folder):
    """{"source", "variables"} of the chat template in a folder: chat_template.jinja, else tokenizer_config.json.

    Raises:
        UsageError: there is none, or a file is damaged.
    """
    folder = user_path(folder)
    path, alone = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if not folder.is_dir():
        expected = "auto, chatml, llama3, gemma or a folder with tokenizer_config.json"
        raise UsageError(f"data.chat_template must be {expected}, got {str(folder)!r}")
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() or not alone.is_file() else {}
        source = config.get("chat_template")
        if alone.is_file():  # transformers reads it last
            source = alone.read_text(encoding="utf-8")
        elif isinstance(source, list):  # several, by name
            source = {item["name"]: item["template"] for item in source}.get("default")
        tokens = {name: config.get(name) for name in _TOKENS}
    except OSError as error:
        raise UsageError(f"chat template: {str(path)!r} cannot be read: {error.strerror}") from None
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"chat template: {str(path)!r} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(source, str):
        raise UsageError(f"chat template: {str(path)!r} has no chat_template that is a text")
    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in tokens.items()}
    return {"source": source, "variables": {name: token for name, token in tokens.items() if isinstance(token, str)}}


class JinjaTemplate:
    """A chat template with the methods of `chat.Template`.

    Args:
        stored: as from `read_template`.
        marks: the special tokens of the tokenizer; the template must end an answer with one of them.
    Raises:
        UsageError: the package jinja2 is missing, or the template is invalid or ends an answer with no mark.
    """

    def __init__(self, stored, marks):
        try:
            environment = _environment()
        except ImportError:
            raise UsageError("a chat template of a folder needs the package jinja2: run pip install jinja2") from None
        self.stored, self.marks = stored, tuple(mark for mark in marks if mark)
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self.marks, key=len, reverse=True))) + ")")
        self._template = self._call(environment.from_string, stored["source"])
        pieces = self.pieces([("user", "question"), ("assistant", "answer")])
        self.end = next((piece for piece, is_answer in reversed(pieces) if is_answer), None)
        if not self.marks or self.end not in self.marks:
            raise UsageError("the chat template must end an answer with a special token of the tokenizer")

    def pieces(self, messages):
        """[(text, whether it is part of an answer)] of messages [(role, content)]; marks are pieces of their own."""
        whole, found, place = self._render(messages, False), [], 0
        for number, (role, _) in enumerate(messages):
            if role == "assistant":
                before = self._render(messages[:number], True)
                answer = self._render(messages[: number + 1], False)
                if not (whole.startswith(answer) and answer.startswith(before)):
                    raise UsageError(
                        "the chat template changes the beginning of a conversation if more follows, so its "
                        f"answers cannot be told apart: message {number + 1} of {len(messages)}"
                    )
                parts = self._parts(answer[len(before) :])
                last = max((i for i, part in enumerate(parts) if part in self.marks), default=len(parts) - 1)
                found += [(part, False) for part in self._parts(whole[place : len(before)])]
                found += [(part, i <= last) for i, part in enumerate(parts)]
                place = len(answer)
        return found + [(part, False) for part in self._parts(whole[place:])]

    def question_pieces(self, messages):
        """As `pieces`, followed by the pieces that come before the next answer."""
        return [(part, False) for part in self._parts(self._render(messages, True))]

    def _parts(self, text):
        return [part for part in (self._split.split(text) if self.marks else [text]) if part]

    def _render(self, messages, asks):
        named = [{"role": role, "content": content} for role, content in messages]
        return self._call(
            self._template.render, messages=named, add_generation_prompt=asks, **self.stored["variables"]
        )  # fmt: skip

    def _call(self, function, *arguments, **options):
        try:
            return function(*arguments, **options)
        except UsageError:
            raise
        except Exception as error:  # a template is a program: anything may go wrong in it
            text = " ".join(str(error).split())[:200]
            raise UsageError(f"the chat template fails: {type(error).__name__}: {text}") from None


def _environment():
    """Jinja's sandbox with what transformers adds for templates, except the current time."""
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} TEXT {% endgeneration %} is TEXT, because the result shows which tokens are answers."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
    return environment


def _refuse(message):
    raise UsageError(f"the chat template refuses the messages: {' '.join(str(message).split())[:200]}")
