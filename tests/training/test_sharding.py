"""FSDP2: the losses of one process, complete checkpoints that resume on any number of processes, and torchrun."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_cases import (
    assert_same_run,
    can_fork,
    free_port,
    numbers,
    table_config,
    tiny_model,
    train_two,
    weights,
    write_table,
)

from fastattn.models import CausalLM
from fastattn.training.config import OptimConfig
from fastattn.training.messages import UsageError
from fastattn.training.runs.sharding import _shard, divide, gather
from fastattn.training.runs.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not can_fork, reason="this system cannot fork")


@pytest.fixture
def table(tmp_path):
    write_table(tmp_path / "table.jsonl")
    return tmp_path / "table.jsonl"


def config(name, tmp_path, table, task="lm", **changes):
    optim = OptimConfig(learning_rate=5e-3, min_learning_rate=5e-4, warmup_steps=2, clip=0.5)
    changes = {"layers": "fastattn", "steps": 4, "evaluate_every": 2, "optim": optim, **changes}
    return table_config(task, tmp_path / name, table, **changes)


def sharded(*arguments, **changes):
    return config(*arguments, devices=2, strategy="fsdp", **changes)


def assert_same_losses(first, second):
    for name in ("train_loss", "grad_norm", "validation_loss"):
        assert numbers(second, name) == pytest.approx(numbers(first, name), abs=2e-5)
    assert max(numbers(first, "grad_norm")) > 0.5  # clipping takes effect


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("lm", {}),
        ("translate", {}),
        ("lm", {"layers": "torch"}),
        ("lm", {"model": tiny_model(n_kv_head=1, positions="rotary", feed_forward="swiglu", tied=False)}),
        ("lm", {"model": tiny_model(checkpointing=True), "accumulate": 2}),
        ("classify", {"trained": "head", "optim": OptimConfig(name="nesterov", warmup_steps=2, clip=0.5)}),
    ],
)
def test_two_sharded_processes_give_the_losses_of_one(tmp_path, table, task, changes):
    if "trained" in changes:
        train(config("start", tmp_path, table, task))
        changes["start"] = str(tmp_path / "start")
    train(config("one", tmp_path, table, task, **changes))
    train_two(sharded("two", tmp_path, table, task, **changes))
    assert_same_losses(tmp_path / "one", tmp_path / "two")
    one, two = (weights(tmp_path / name, 4) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in two.items():
        assert value.shape == one[name].shape
        torch.testing.assert_close(value, one[name], rtol=0, atol=2e-4)


def test_checkpoints_are_whole_and_resume_on_any_number_of_processes(tmp_path, table):
    """Continued from step 2 of 4: by two sharded processes bit for bit, by others up to rounding."""
    train_two(sharded("whole", tmp_path, table))
    train(config("alone", tmp_path, table))
    for name, source in (("again", "whole"), ("ddp", "whole"), ("one", "whole"), ("from_one", "alone")):
        shutil.copytree(tmp_path / source, tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints" / "step-00000004")
    train_two(sharded("again", tmp_path, table), resume=True)
    train_two(config("ddp", tmp_path, table, devices=2, strategy="ddp"), resume=True)
    train(config("one", tmp_path, table), resume=True)
    train_two(sharded("from_one", tmp_path, table), resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "again", 4)
    for name in ("ddp", "one", "from_one"):
        assert_same_losses(tmp_path / "whole", tmp_path / name)
    state = torch.load(tmp_path / "whole" / "checkpoints" / "step-00000004" / "state.pt", weights_only=True)
    expected = torch.load(tmp_path / "alone" / "checkpoints" / "step-00000004" / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"] == expected["optimizer"]["param_groups"]
    for number, values in expected["optimizer"]["state"].items():
        for name, value in values.items():
            assert type(state["optimizer"]["state"][number][name]) is torch.Tensor
            assert state["optimizer"]["state"][number][name].shape == value.shape


@pytest.fixture
def mesh():
    """A mesh of this process alone: parameters are sharded as usual, into one part."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,), mesh_dim_names=("data_parallel",))
    torch.distributed.destroy_process_group()


class Recorder(TorchDispatchMode):
    """Records which of our ops are called, and the kinds of tensors they get."""

    def __init__(self):
        super().__init__()
        self.names, self.kinds = set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "fastattn":
            self.names.add(function.name().partition("::")[2].partition(".")[0])
            self.kinds |= {type(value) for value in arguments if torch.is_tensor(value)}
        return function(*arguments, **(options or {}))


def test_our_ops_meet_whole_tensors(mesh):
    shape = vars(tiny_model())
    model = CausalLM(11, **{name: shape[name] for name in ("n_layer", "n_head", "d_model", "block_size")})
    tokens = torch.randint(11, (2, 16))
    expected = model(tokens, tokens)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    _shard(model, mesh)
    assert {type(parameter) for parameter in model.parameters()} == {DTensor}
    with Recorder() as seen:
        loss = model(tokens, tokens)
        loss.backward()
    assert len(seen.names) > 3
    assert not any(issubclass(kind, DTensor) for kind in seen.kinds)
    assert torch.equal(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name])


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizer_state_is_gathered_and_divided_again(mesh, kind):
    model = _shard(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)), mesh)

    def stepped():
        optimizer = kind(model.parameters(), **({"momentum": 0.9} if kind is torch.optim.SGD else {}))
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return optimizer

    state = gather(stepped().state_dict())
    tensors = [value for values in state["state"].values() for value in values.values()]
    assert {type(value) for value in tensors} == {torch.Tensor}
    other = stepped()
    other.load_state_dict(divide(state, other))
    again = other.state_dict()
    moments = [value for values in again["state"].values() for value in values.values() if value.dim()]
    assert len(moments) >= 4
    assert {type(value) for value in moments} == {DTensor}
    for number, values in gather(again)["state"].items():
        for name, value in values.items():
            assert torch.equal(value, state["state"][number][name])


def test_torchrun_starts_sharded_training(tmp_path, table):
    train(config("one", tmp_path, table, task="classify"))
    run = sharded("run", tmp_path, table, task="classify")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(run)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command = [*launcher, "-m", "fastattn", "train", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_same_losses(tmp_path / "one", tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"optim": OptimConfig(ema=0.9)}, "optim.ema must be 0 with the strategy fsdp, got 0.9"),
        ({"trained": "lora"}, "trained must be 'all' or 'head' with the strategy fsdp, got 'lora'"),
        ({"precision": "16-mixed"}, "precision must be .* with the strategy fsdp, got '16-mixed'"),
        (
            {"task": "classify", "model": tiny_model(body="lstm")},
            "strategy must be 'ddp' for the body lstm, got 'fsdp'",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused(tmp_path, table, changes, expected):
    with pytest.raises(UsageError, match=f"^{expected}$"):
        sharded("run", tmp_path, table, **changes)


def test_torchrun_with_another_number_of_processes_is_refused(tmp_path, table, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UsageError, match=r"devices \* num_nodes must be 4, the number of processes that torchrun started, got 2 \* 1"
    ):
        train(sharded("run", tmp_path, table))
