"""Fine-tuning on conversations: answers alone are learnt, packed conversations stay apart, answers are generated."""

import json
import random

import pytest
import torch
import torch.nn.functional as F
from training_cases import TEXT, numbers, tiny_config, tiny_model

from fastattn.cli import main
from fastattn.models import CausalLM
from fastattn.training.config import Columns, DataConfig
from fastattn.training.data.batches import IGNORED
from fastattn.training.data.chat import TEMPLATES, choose_template, encode_conversation, encode_question
from fastattn.training.data.tokenizer import SPECIALS, build_tokenizer
from fastattn.training.runs.train import train
from fastattn.training.tasks.conversation import Conversation, pack

COLOURS = {"sky": "blue", "grass": "green", "blood": "red", "snow": "white"}
QUESTIONS = ["What colour is {}?", "{} is which colour?", "Tell me the colour of {}."]


def write_chats(path, n=240):
    """Conversations of one or two questions; some begin with a system message."""
    generator, rows = random.Random(0), []
    for _ in range(n):
        system = {"role": "system", "content": f"Answer in one word. {generator.randrange(7)}"}
        messages = [system] if generator.random() < 0.3 else []
        for _ in range(generator.randint(1, 2)):
            thing = generator.choice(list(COLOURS))
            messages.append({"role": "user", "content": generator.choice(QUESTIONS).format(thing)})
            messages.append({"role": "assistant", "content": COLOURS[thing]})
        rows.append({"messages": messages})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def chat_config(tmp_path, tokenizer="char", **changes):
    write_chats(tmp_path / "chats.jsonl")
    data = DataConfig(
        source=str(tmp_path / "chats.jsonl"), tokenizer=tokenizer, columns=Columns(messages="messages"),
        validation_fraction=0.2, test_fraction=0.2,
    )  # fmt: skip
    model = tiny_model(block_size=160, d_model=32, positions="rotary")
    options = {"task": "chat", "data": data, "model": model, "sample_tokens": 0, "layers": "fastattn", **changes}
    return tiny_config(tmp_path / "run", "", **options)


@pytest.mark.parametrize("name", TEMPLATES)
def test_only_answers_and_their_end_are_wanted(name):
    messages = [("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e f")]
    for specials in ([*SPECIALS, *TEMPLATES[name].marks], SPECIALS):
        text = "".join(piece for role in TEMPLATES[name].before.values() for piece in role) + "abcdef \n<|>_"
        tokenizer = build_tokenizer("char", [text, *TEMPLATES[name].marks], [], 0, specials)
        template = choose_template(name, tokenizer)
        tokens, wanted = encode_conversation(tokenizer, template, messages)
        ends = [template.end] if template.end in specials else list(template.end)
        names = [tokenizer.token_of(n) for n, w in zip(tokens, wanted, strict=True) if w]
        assert names == ["c", *ends, "e", " ", "f", *ends]
        question = encode_question(tokenizer, template, messages[:3])
        assert tokens[: len(question)] == question
        assert (tokens[len(question)], wanted[len(question) - 1 : len(question) + 1]) == (
            tokenizer.number_of("e"),
            [0, 1],
        )
    assert choose_template("auto", tokenizer) is TEMPLATES["chatml"]


def test_auto_is_the_template_whose_marks_the_vocabulary_has():
    for name, template in TEMPLATES.items():
        tokenizer = build_tokenizer("byte", [], [], 0, template.marks)
        assert choose_template("auto", tokenizer) is TEMPLATES[name]


def test_rows_hold_every_conversation_once():
    generator = torch.Generator().manual_seed(0)
    encoded = []
    for length in torch.randint(1, 40, (50,), generator=generator).tolist():
        tokens = torch.randint(1, 99, (length,), generator=generator).tolist()
        encoded.append((tokens, [token % 3 == 0 for token in tokens]))
    tokens, targets, documents = pack(encoded, 24)
    found = []
    for row in range(len(tokens)):
        for document in range(int(documents[row].max()) + 1):
            here = documents[row] == document
            found.append((tokens[row][here].tolist(), targets[row][here].tolist()))
    expected = []
    for all_tokens, all_wanted in encoded:
        kept, wanted = all_tokens[:25], all_wanted[:25]
        expected.append((kept[:-1], [n if w else IGNORED for n, w in zip(kept[1:], wanted[1:], strict=True)]))
    assert sorted(found) == sorted(pair for pair in expected if pair[0])
    assert (targets[documents < 0] == IGNORED).all()
    assert (documents >= 0).double().mean() > 0.7


def test_the_loss_of_packed_rows_is_that_of_separate_conversations(tmp_path):
    task = Conversation(chat_config(tmp_path))
    model = CausalLM(task.tokenizer.vocab_size, n_layer=2, n_head=2, d_model=16, block_size=160).eval()
    rows = task.tensors["validation"]
    loss, total, count = model(*task.inputs(rows)), 0.0, 0
    for messages in task.conversations["validation"]:
        tokens, wanted = (torch.tensor(x) for x in encode_conversation(task.tokenizer, task.template, messages))
        losses = F.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")
        total, count = total + losses[wanted[1:]].sum(), count + int(wanted[1:].sum())
    assert task.count(rows) == count
    torch.testing.assert_close(loss, total / count, rtol=1e-4, atol=1e-5)


def test_a_model_learns_to_answer(tmp_path, capsys):
    config = chat_config(tmp_path, "word", steps=250, batch_size=8, evaluate_every=50, sample_tokens=10, log_every=10)
    assert train(config) == 0
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exact_answers"] > 0.8
    assert main(["generate", str(tmp_path / "run"), "--prompt", "What colour is snow?", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "white\n"
    assert main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "chats.jsonl"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answers"] == 100


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_a_language_model_learns_from_pairs(tmp_path, trained):
    (tmp_path / "text.txt").write_text(TEXT + "<|im_start|>user assistant system\n<|im_end|>")
    model = tiny_model(block_size=64, positions="rotary")
    data = DataConfig(source=str(tmp_path / "text.txt"), tokenizer="byte")
    first = tiny_config(tmp_path / "lm", "", data=data, model=model, steps=2, evaluate_every=2, sample_tokens=0)
    assert train(first) == 0
    rows = [{"text": f"{i} and one", "target": f"{i + 1}"} for i in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(source=str(tmp_path / "pairs.jsonl"), columns=Columns(target="target"), tokenizer="byte")
    config = tiny_config(
        tmp_path / "chat", "", task="chat", data=data, model=model, start=str(tmp_path / "lm"), trained=trained,
        steps=20, sample_tokens=5,
    )  # fmt: skip
    assert train(config) == 0
    losses = numbers(tmp_path / "chat", "validation_loss")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "line 1: column 'messages' must be a list of at least one message, got a str"),
        ({"messages": []}, "must be a list of at least one message"),
        ({"messages": {"role": "user", "content": "x"}}, "must be a list of at least one message, got an object"),
        ({"messages": [[5]]}, "message 1 must be an object with role and content"),
        ({"messages": [[["role", "user"], ["content", "x"]]]}, "message 1 must be an object with role and content"),
        ('{"messages": [{"role": "user", "content": "x", "content": "y"}]}', "message 1 has a key more than once"),
        ({"messages": [{"role": "user"}]}, "message 1 must be an object with role and content"),
        ({"messages": ["hello"]}, "message 1 must be an object"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1: role must be one of system, user, assistant"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "message 1: content must be text, got a list"),
        ({"messages": [{"role": "user", "content": "x"}]}, "has no message of the role assistant"),
        ({"chat": []}, "no column 'messages' among chat"),
    ],
)
def test_bad_conversations_are_one_line(tmp_path, capsys, row, message):
    (tmp_path / "bad.jsonl").write_text(row if isinstance(row, str) else json.dumps(row))
    arguments = ["--task", "chat", "--data.source", str(tmp_path / "bad.jsonl"), "--run", str(tmp_path / "run")]
    assert main(["train", *arguments, "--data.columns.messages", "messages"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_conversations_are_split_into_conversations(tmp_path, capsys):
    """Counted are the characters of messages. What changes or encodes texts refuses them: it would read their JSON."""
    rows = [
        {"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "yes"}]} for i in range(40)
    ]
    source, output = tmp_path / "chats.jsonl", tmp_path / "split"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ["--columns.messages", "messages", "--output", str(output)]
    assert main(["data", "split", str(source), *columns]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(part["characters"] for part in report.values()) == sum(len(f"q{i}yes") for i in range(40))
    written = [json.loads(line) for part in output.iterdir() for line in part.read_text().splitlines()]
    assert sorted(written, key=rows.index) == rows
    for what in ("clean", "tokenize", "shard", "vectorize"):
        assert main(["data", what, str(source), *columns[:-1], str(tmp_path / "new")]) == 2
        assert "columns.messages must be left out" in capsys.readouterr().err
        assert not (tmp_path / "new").exists()
