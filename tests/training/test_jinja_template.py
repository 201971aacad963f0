"""Chat templates of a folder: the text that transformers would give, which tokens are answers, and what goes wrong."""

import json
import random
import shutil
import sys

import pytest
from training_cases import tiny_config, tiny_model

pytest.importorskip("jinja2", reason="needs the package jinja2")
from fastattn.cli import main
from fastattn.training.config import Columns, DataConfig
from fastattn.training.data.chat import TEMPLATES, choose_template, encode_conversation, encode_question
from fastattn.training.data.jinja_template import JinjaTemplate
from fastattn.training.data.tokenizer import SPECIALS, build_tokenizer
from fastattn.training.messages import UsageError
from fastattn.training.runs.train import train

CHATML = """{%- for message in messages %}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def write_folder(folder, template, **more):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **more}))
    return folder


def byte_tokenizer(name="chatml"):
    return build_tokenizer("byte", [], [], 0, [*SPECIALS, *TEMPLATES[name].marks])


@pytest.mark.parametrize(("name", "source"), [("chatml", CHATML), ("llama3", LLAMA)])
def test_a_template_of_a_folder_has_the_tokens_of_the_one_built_in(tmp_path, name, source):
    tokenizer = byte_tokenizer(name)
    folder = write_folder(tmp_path / "model", source, bos_token={"content": "<|begin_of_text|>"}, eos_token=None)
    ours, theirs = choose_template(name, tokenizer), choose_template(str(folder), tokenizer)
    assert theirs.end == ours.end
    generator = random.Random(0)
    for _ in range(30):
        messages = [("system", "Be brief.")] if generator.random() < 0.5 else []
        for _ in range(generator.randint(1, 3)):
            messages += [
                ("user", "".join(generator.choices("ab \n<|é", k=7))),
                ("assistant", "x" * generator.randint(0, 4)),
            ]
        assert encode_conversation(tokenizer, theirs, messages) == encode_conversation(tokenizer, ours, messages)
        asked = messages[:-1]
        assert encode_question(tokenizer, theirs, asked) == encode_question(tokenizer, ours, asked)


FURTHER = (  # what transformers adds to Jinja
    "{% for m in messages %}{% if m.role == 'none' %}{% continue %}{% endif %}<|im_start|>{{ m.role | tojson }}\n"
    "{% generation %}{{ m.content | tojson }}{% endgeneration %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{{ 'assistant' | tojson }}\n{% endif %}"
)


@pytest.mark.parametrize("source", [CHATML, FURTHER])
def test_the_text_is_that_of_transformers(tmp_path, transformers, source):
    tokenizer = byte_tokenizer()
    template = choose_template(str(write_folder(tmp_path / "model", source)), tokenizer)
    messages = [("user", "a <b> é '"), ("assistant", "c"), ("user", "d"), ("assistant", "e")]
    named = [{"role": role, "content": content} for role, content in messages]
    from transformers.utils.chat_template_utils import render_jinja_template

    expected = render_jinja_template([named], chat_template=source)[0][0]
    assert "".join(piece for piece, _ in template.pieces(messages)) == expected


def test_a_run_keeps_the_template(tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"text": f"{i} and one", "target": f"{i + 1}"} for i in range(60)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = tiny_model(n_layer=1, block_size=96, positions="rotary")
    data = DataConfig(source=str(pairs), columns=Columns(target="target"), tokenizer="byte", chat_template="chatml")
    options = {"task": "chat", "model": model, "sample_tokens": 0, "steps": 4, "evaluate_every": 2}
    assert train(tiny_config(tmp_path / "start", "", data=data, **options)) == 0
    folder = write_folder(tmp_path / "model", CHATML)
    data = DataConfig(source=str(pairs), columns=Columns(target="target"), chat_template=str(folder))
    assert train(tiny_config(tmp_path / "run", "", data=data, start=str(tmp_path / "start"), **options)) == 0
    shutil.rmtree(folder)
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(["generate", str(tmp_path / "run"), "--prompt", "3 and one", "--max_new_tokens", "3"]) == 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--steps", "6"]) == 0
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "a <|im_end|> b"]) == 2
    assert "a message holds '<|im_end|>', a mark of the chat template" in capsys.readouterr().err


@pytest.mark.parametrize(("source", "problem"), [
    ("{% for m in %}", "the chat template fails: TemplateSyntaxError"),
    ("{{ undefined.name.other }}", "the chat template fails: UndefinedError"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "the chat template fails: SecurityError"),
    ("{{ raise_exception('no\\nsystem') }}", "the chat template refuses the messages: no system"),
    ("{% for i in range(999999999) %}x{% endfor %}", "the chat template fails: OverflowError"),
    ("{{ 1 / 0 }}", "the chat template fails: ZeroDivisionError"),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", "must end an answer with a special token"),
    ("", "must end an answer with a special token"),
    ("{{ messages[0].content }}<|im_end|>", "must end an answer with a special token"),
    ("{{ messages | length }}{{ messages[0].content }}<|im_end|>", "cannot be told apart"),
    (None, "has no chat_template that is a text"),
    ([{"name": "tools", "template": "x"}], "has no chat_template that is a text"),
    ([1], "is damaged: TypeError"),
])  # fmt: skip
def test_a_template_that_does_not_work_is_one_line(tmp_path, source, problem):
    with pytest.raises(UsageError, match=problem):
        choose_template(str(write_folder(tmp_path / "model", source)), byte_tokenizer())


def test_folders_without_a_template_are_one_line(tmp_path):
    for name in ("none", "chatlm"):
        with pytest.raises(UsageError, match="must be auto, chatml, llama3, gemma or a folder with tokenizer_config"):
            choose_template(str(tmp_path / name), byte_tokenizer())
    with pytest.raises(UsageError, match=r"tokenizer_config\.json' cannot be read: No such file"):
        choose_template(str(tmp_path), byte_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UsageError, match="is damaged: AttributeError"):
        choose_template(str(tmp_path), byte_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert choose_template(str(tmp_path), byte_tokenizer()).end == "<|im_end|>"
    write_folder(tmp_path, "{{ 1 / 0 }}")  # transformers takes the template of the other file, too
    assert choose_template(str(tmp_path), byte_tokenizer()).end == "<|im_end|>"
    (tmp_path / "tokenizer_config.json").unlink()
    assert choose_template(str(tmp_path), byte_tokenizer()).end == "<|im_end|>"


def test_without_the_package_the_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2.sandbox", None)
    with pytest.raises(UsageError, match="needs the package jinja2: run pip install jinja2"):
        JinjaTemplate({"source": CHATML, "variables": {}}, ("<|im_end|>",))


def test_a_vocabulary_without_the_marks_is_refused(tmp_path, capsys):
    folder = write_folder(tmp_path / "model", CHATML)
    with pytest.raises(UsageError, match="must end an answer with a special token of the tokenizer"):
        choose_template(str(folder), build_tokenizer("byte", [], [], 0, []))
    options = ["--task", "chat", "--data.source", "hangul", "--data.chat_template", str(folder)]
    assert main(["train", *options, "--run", str(tmp_path / "run")]) == 2
    assert "needs --start, a model whose vocabulary has its marks" in capsys.readouterr().err
