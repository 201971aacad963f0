"""The processes of a run on one machine: starts them like torchrun, and ends all of them when one dies."""

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

from ..messages import UsageError

GRACE = 30.0  # seconds to finish a step and save, after a signal
SETTLE = 5.0  # seconds to end after another process has died
_PARENT = "FASTATTN_PARENT_PIPE"  # a file descriptor that closes when the parent dies


def needs_processes(config):
    """Whether this process must start those of the run: there are several, and no launcher has started them."""
    from lightning_fabric.plugins import environments as env

    launchers = (env.SLURMEnvironment, env.LSFEnvironment, env.TorchElasticEnvironment, env.MPIEnvironment)
    launched = "LOCAL_RANK" in os.environ or any(launcher.detect() for launcher in launchers)
    return config.devices * config.num_nodes > 1 and not launched


def run_processes(config, command):
    """Run a command once per device of this machine, and wait for all of them.

    A signal is passed on; a process is killed if it has not ended GRACE seconds later, or
    SETTLE seconds after the first failure.

    Args:
        config: TrainConfig.
        command: list of str, the arguments of fastattn.

    Returns:
        0, or the exit code of the first process that failed: 128 + the signal's number if a signal ended it.

    Raises:
        UsageError: there are several machines, and the environment does not say which one this is.
    """
    reader, writer = os.pipe()
    program, options = [sys.executable, "-m", "fastattn", *command], {"pass_fds": [reader], "start_new_session": True}
    processes = [
        subprocess.Popen(program, env={**os.environ, **names, _PARENT: str(reader)}, **options)
        for names in _environments(config)
    ]
    os.close(reader)
    try:
        return _wait(processes)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
        os.close(writer)


def _environments(config):
    """The environment of each process, with the names that torchrun uses."""
    several = config.num_nodes > 1
    node, address, port = (os.environ.get(name) for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"))
    if several and not (node and address and port):
        raise UsageError(
            f"num_nodes is {config.num_nodes}: start with torchrun, or set NODE_RANK, MASTER_ADDR and MASTER_PORT"
        )
    node, address, port = (int(node), address, port) if several else (0, "127.0.0.1", str(_free_port()))
    for local in range(config.devices):
        yield {
            "RANK": str(node * config.devices + local), "LOCAL_RANK": str(local), "GROUP_RANK": str(node),
            "WORLD_SIZE": str(config.devices * config.num_nodes), "LOCAL_WORLD_SIZE": str(config.devices),
            "MASTER_ADDR": address, "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "fastattn",
        }  # fmt: skip


def _free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait(processes):
    ended, alive, code, deadline = queue.Queue(), set(processes), 0, None
    for process in processes:
        threading.Thread(target=lambda p=process: ended.put((p, p.wait())), daemon=True).start()

    def send(number):
        for process in alive:
            process.send_signal(number)

    def pass_on(number, _frame):
        nonlocal deadline
        send(signal.SIGKILL if deadline else number)  # a second signal kills at once
        deadline = deadline or time.monotonic() + GRACE

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while alive:
            try:
                process, ended_with = ended.get(timeout=0.2)
            except queue.Empty:
                if deadline and time.monotonic() > deadline:
                    send(signal.SIGKILL)
                continue
            alive.discard(process)
            if ended_with and not code:
                code = ended_with if ended_with > 0 else 128 - ended_with
                if not deadline:
                    deadline = time.monotonic() + SETTLE
                    send(signal.SIGTERM)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code


def follow_parent():
    """End this process when the one that started it by `run_processes` has died."""
    descriptor = os.environ.pop(_PARENT, None)
    if descriptor is not None:
        threading.Thread(target=_end_with_parent, args=(int(descriptor),), daemon=True).start()


def _end_with_parent(descriptor):
    os.read(descriptor, 1)  # nothing is ever written: this returns at the end of the pipe
    os._exit(1)
