"""torchrun on two hosts, which are two network namespaces: they train, one is lost, both resume, as one host would."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lightning_fabric", reason="needs the packages of fastattn[train]")
from training_cases import numbers, table_config, write_table

from fastattn.training.config import OptimConfig
from fastattn.training.runs.checkpoint import choose_checkpoint
from fastattn.training.runs.train import train

REPOSITORY = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments):
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def hosts():
    """Names of two namespaces that are joined by a cable."""
    names = [f"fastattn{os.getpid()}{side}" for side in "ab"]
    made = []
    try:
        try:
            for name in names:
                ip("netns", "add", name)
                made.append(name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
            for name, address in zip(names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                for device in ("cable", "lo"):
                    ip("-n", name, "link", "set", device, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', None) or error}")
        yield names
    finally:
        for name in made:
            kill(name)
            ip("netns", "delete", name)


def kill(host):
    for process in ip("netns", "pids", host).split():
        os.kill(int(process), signal.SIGKILL)


def start(hosts, folder, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "GLOO_SOCKET_IFNAME": "cable"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", ADDRESSES[0], "--master-port", "29500"]
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *launcher, "--node-rank", str(rank), "-m", "fastattn", "train", *options],
            env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=open(folder / f"log{rank}", "w"),
        )
        for rank, host in enumerate(hosts)
    ]  # fmt: skip


def test_two_hosts_train_lose_one_and_resume_like_one_host(tmp_path, hosts):
    write_table(tmp_path / "table.jsonl")
    optim = OptimConfig(learning_rate=5e-3, warmup_steps=2, schedule="constant")  # the same for any number of steps
    changes = {"optim": optim, "evaluate_every": 4, "keep": 3}

    def config(name, **more):
        return table_config("classify", tmp_path / name, tmp_path / "table.jsonl", **changes, **more)

    two = config("two", num_nodes=2, strategy="ddp", steps=100_000)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(two)))
    processes = start(hosts, tmp_path, "--config", str(tmp_path / "config.yaml"))
    while not list((tmp_path / "two" / "checkpoints").glob("step-00000008")):
        assert processes[0].poll() is None, (tmp_path / "log0").read_text()
        time.sleep(0.1)
    kill(hosts[1])
    assert processes[0].wait(120) != 0  # the host that is left ends by itself
    done = choose_checkpoint(tmp_path / "two", needed=("model.safetensors", "state.pt"))[1]["step"]
    resumed = start(hosts, tmp_path, "--resume", str(tmp_path / "two"), "--steps", str(done + 4))
    assert [process.wait(300) for process in resumed] == [0, 0], (tmp_path / "log0").read_text()
    train(config("one", steps=done + 4))
    for name in ("train_loss", "validation_loss"):
        assert numbers(tmp_path / "two", name) == pytest.approx(numbers(tmp_path / "one", name), abs=2e-5)
