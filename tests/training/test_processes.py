"""Several processes: the same steps as one, and if one ends, all end with its exit code."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
from training_cases import can_fork, column, free_port, numbers, table_config, tiny_config, train_two, write_table

from fastattn.cli import main
from fastattn.training.config import OptimConfig
from fastattn.training.messages import UsageError
from fastattn.training.runs import processes
from fastattn.training.runs.devices import check_devices
from fastattn.training.runs.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
needs_fork = pytest.mark.skipif(not can_fork, reason="this system cannot fork")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "table.jsonl"
    write_table(path)
    return path


def config(run, table, task="classify", **changes):
    optim = OptimConfig(learning_rate=5e-3, min_learning_rate=5e-4, warmup_steps=2, schedule="cosine")
    return table_config(task, run, table, **{"steps": 7, "evaluate_every": 3, "optim": optim, **changes})


def assert_same(one, two):
    assert column(two, "learning_rate") == column(one, "learning_rate")
    for name in ("train_loss", "validation_loss"):
        assert numbers(two, name) == pytest.approx(numbers(one, name), abs=2e-5)


@needs_fork
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    ("task", "length"),
    [("classify", {"epochs": 0.7}), ("translate", {"epochs": 1.0, "patience": 2}), ("lm", {"epochs": 2.0})],
)
def test_two_processes_take_the_steps_of_one(tmp_path, table, strategy, task, length):
    one = config(tmp_path / "one", table, task, **length)
    two = config(tmp_path / "two", table, task, **length, devices=2, strategy=strategy)
    one.data.order = two.data.order = "shuffle" if task == "lm" else "random"
    train(one)
    train_two(two)
    assert_same(tmp_path / "one", tmp_path / "two")
    steps = [yaml.safe_load((tmp_path / run / "config.yaml").read_text())["steps"] for run in ("one", "two")]
    assert steps[0] == steps[1] != 7


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def test_the_command_starts_its_processes_itself(tmp_path, table):
    """One fastattn train with --devices 2 and --epochs, and the name of the run as torchrun lets it pass."""
    train(config(tmp_path / "one", table, epochs=0.5))
    wanted = dataclasses.asdict(config(tmp_path / "other", table, epochs=0.5, devices=2, strategy="ddp"))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(wanted))
    command = [sys.executable, "-m", "fastattn", "train", "--config", str(tmp_path / "config.yaml")]
    done = subprocess.run(
        [*command, "--run_folder", str(tmp_path / "two")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "one", tmp_path / "two")


SLEEP = "import time; print('ready', flush=True); time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"


def start(*programs):
    """Starts processes that run these programs, and waits until those that sleep have begun to."""

    def heed_interrupts():  # a shell makes what it starts in the background ignore SIGINT, and processes inherit that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    options = {"stdout": subprocess.PIPE, "text": True, "preexec_fn": heed_interrupts}
    found = [subprocess.Popen([sys.executable, "-c", program], **options) for program in programs]
    for process, program in zip(found, programs, strict=True):
        if SLEEP in program:
            assert process.stdout.readline() == "ready\n"
    return found


@pytest.fixture
def no_patience(monkeypatch):
    monkeypatch.setattr(processes, "SETTLE", 0.3)
    monkeypatch.setattr(processes, "GRACE", 0.3)


@pytest.mark.parametrize("other", [SLEEP, STUBBORN, "pass"])
@pytest.mark.parametrize(
    ("program", "code"),
    [("import sys; sys.exit(7)", 7), ("1 / 0", 1), ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_a_process_that_dies_ends_the_others_with_its_exit_code(no_patience, program, code, other):
    started = start(other, program)
    assert processes._wait(started) == code
    assert all(process.poll() is not None for process in started)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("program", "code"), [(SLEEP, 128), (STUBBORN.replace("TERM", "INT"), 137)])
def test_a_signal_always_ends_the_run(monkeypatch, number, program, code):
    """This includes a signal that the processes ignore. Python ends with the signal's number."""
    monkeypatch.setattr(processes, "GRACE", 60 if code == 128 else 0.3)  # a busy machine ends a process late
    program = program.replace("SIGINT", number.name)
    started = start(program, program)
    previous = signal.getsignal(number)

    def send():
        while signal.getsignal(number) == previous:  # until _wait passes it on
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=send)
    killer.start()
    assert processes._wait(started) == (code + number if code == 128 else code)
    killer.join()
    assert signal.getsignal(number) == previous


def test_all_processes_end_with_zero():
    assert processes._wait(start("pass", "pass")) == 0


def test_a_process_ends_with_its_parent():
    reader, writer = os.pipe()
    program = f"from fastattn.training.runs.processes import follow_parent; follow_parent(); {SLEEP}"
    child = subprocess.Popen(
        [sys.executable, "-c", program], env={**environment(), processes._PARENT: str(reader)}, pass_fds=[reader],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout.readline() == "ready\n"
    assert child.poll() is None
    os.close(writer)  # as when the parent dies
    assert child.wait(60) == 1
    os.close(reader)


def test_several_machines_need_a_launcher(tmp_path, table, monkeypatch):
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    two_hosts = config(tmp_path / "run", table, devices=1, num_nodes=2, strategy="ddp")
    assert processes.needs_processes(two_hosts)
    with pytest.raises(UsageError, match="num_nodes is 2: start with torchrun, or set NODE_RANK"):
        processes.run_processes(two_hosts, [])
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    (second,) = processes._environments(two_hosts)
    assert (second["RANK"], second["LOCAL_RANK"], second["WORLD_SIZE"]) == ("1", "0", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert not processes.needs_processes(two_hosts)
    monkeypatch.delenv("LOCAL_RANK")
    assert not processes.needs_processes(config(tmp_path / "run", table))


def test_a_mistake_is_one_line_from_several_processes_too(tmp_path, table, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    options = "--devices 2 --strategy ddp --batch_size 4 --task classify --data.columns.label nothing --accelerator cpu"
    assert main(["train", *options.split(), "--data.source", str(table), "--run", str(tmp_path / "run")]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if "fastattn" in line]
    assert len(errors) == 1
    assert "no column 'nothing' among text, label, target" in errors[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NODE_RANK": "first"}, "the environment variable NODE_RANK must be a whole number, got 'first'"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "the environment variable MASTER_PORT must be a whole number"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK is set, but WORLD_SIZE is not"),
    ],
)
def test_wrong_variables_of_a_launcher_are_refused(monkeypatch, variables, message):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        check_devices(tiny_config("run", "", devices=2, strategy="ddp"))
    if "MASTER_PORT" in variables:  # Kubernetes sets it so for a service with the name master
        check_devices(tiny_config("run", ""))
