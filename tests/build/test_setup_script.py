"""Which PyTorch scripts/setup_env.sh installs and what it prints, with stand-ins for pip and nvidia-smi."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "setup_env.sh"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
FROM_CPU_INDEX = f"--index-url {CPU_INDEX} --timeout 10 --retries 0 torch==2.13.0"

# the venv's python: pip records its arguments; everything else runs without the packages of this environment
PYTHON = """#!/bin/bash
if [ "$1 $2" != "-m pip" ]; then
  PYTHONPATH={site} exec {python} -S "$@"
fi
shift 2
[ "$1" = --version ] && exit
echo "${{*#--disable-pip-version-check}}" | tr -s ' ' >> {log}
case "$*" in *{index}*) if [ -n "$CPU_INDEX_SAYS" ]; then echo "$CPU_INDEX_SAYS"; exit 1; fi;; esac
mkdir -p {site}/torch {site}/torch-2.14.1.dist-info
echo "Version: 2.14.1" > {site}/torch-2.14.1.dist-info/METADATA
cp {folder}/torch.py {site}/torch/__init__.py
"""
TORCH = """
import types, warnings
version = types.SimpleNamespace(cuda={cuda!r})
class cuda:
    def is_available():
        if {warning!r}:
            warnings.warn({warning!r})
        return {seen}
    device_count = lambda: 2
    get_device_name = lambda index: f"GPU {{index}}"
"""


@pytest.fixture
def setup(tmp_path):
    """setup(gpu=..., cuda=..., ...) -> (exit code, everything printed, the calls of pip install)."""

    def run(*, gpu=False, cuda=None, seen=False, warning="", **environment):
        venv, tools, log = tmp_path / "venv", tmp_path / "tools", tmp_path / "log"
        for folder in (venv / "bin", tools):
            folder.mkdir(parents=True, exist_ok=True)
        (tmp_path / "torch.py").write_text(TORCH.format(cuda=cuda, seen=seen, warning=warning))
        script = PYTHON.format(
            site=tmp_path / "site", python=sys.executable, log=log, index=CPU_INDEX, folder=tmp_path
        )  # fmt: skip
        for path, text in (
            (venv / "bin/python", script),
            (tools / "nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n"),
            (tools / "uname", "#!/bin/sh\necho Linux\n"),
        ):
            path.write_text(text)
            path.chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FASTATTN_")}
        environment = {
            **inherited, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "FASTATTN_VENV": str(venv), **environment,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(SCRIPT), "--torch-only"], env=environment, capture_output=True, text=True, timeout=600
        )
        calls = log.read_text().splitlines() if log.exists() else []
        return done.returncode, done.stdout + done.stderr, [call.removeprefix("install ").strip() for call in calls]

    return run


def test_without_a_gpu_the_cpu_build_is_taken(setup):
    code, told, calls = setup()
    assert (code, calls) == (0, [FROM_CPU_INDEX]), told
    assert f"no GPU here, so the CPU build: pip install torch==2.13.0 --index-url {CPU_INDEX} (about 200 MB)" in told
    assert "PyTorch 2.14.1" in told


@pytest.mark.parametrize("said", ["No matching distribution found for torch==2.13.0", "ResolutionImpossible: for help"])
def test_an_index_out_of_reach_leaves_the_default_one(setup, said):
    code, told, calls = setup(CPU_INDEX_SAYS=f"ERROR: {said}")
    assert (code, calls) == (0, [FROM_CPU_INDEX, "torch==2.13.0"]), told
    assert (
        "that index cannot be reached; the default index gives a build with CUDA on most machines (about 3 GB)" in told
    )


def test_a_download_that_breaks_off_does_not_become_one_of_gigabytes(setup):
    code, told, calls = setup(CPU_INDEX_SAYS="ReadTimeoutError: Read timed out.")
    assert (code, calls) == (1, [FROM_CPU_INDEX]), told
    assert "ReadTimeoutError" in told


@pytest.mark.parametrize("gpu", [False, True])
def test_a_named_torch_may_have_options_of_pip(setup, gpu):
    wanted = f"torch==2.13.0+cpu  --index-url {CPU_INDEX}"
    code, told, calls = setup(gpu=gpu, FASTATTN_TORCH=wanted)
    assert (code, calls) == (0, [" ".join(wanted.split())]), told
    assert ("it is a build without CUDA" in told) == gpu


def test_with_a_gpu_the_newest_torch_and_what_it_sees(setup):
    code, told, calls = setup(gpu=True, cuda="13.0", seen=True)
    assert (code, calls) == (0, ["torch>=2.11"]), told
    assert "(a download of about 3 GB)" in told
    assert "it sees GPU 0 GPU 1" in told


def test_with_a_driver_that_is_too_old_the_reason_and_the_way_out(setup):
    code, told, calls = setup(gpu=True, cuda="13.0", warning="The NVIDIA driver on your system\nis too old")
    assert (code, calls) == (0, ["torch>=2.11"]), told
    assert "nvidia-smi lists a GPU, but this PyTorch sees none: The NVIDIA driver on your system is too old" in told
    assert "FASTATTN_TORCH set to a build for your driver" in told


def test_a_torch_that_is_there_is_kept(setup):
    setup()
    code, told, calls = setup(FASTATTN_TORCH="torch==2.12.0")
    assert (code, calls) == (0, [FROM_CPU_INDEX]), told
