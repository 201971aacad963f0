"""The folder of a run and its checkpoints, which stay intact if the process is killed at any moment.

    RUN/config.yaml tokenizer.json data.json metrics.csv loss.png sample.txt tensorboard/
    RUN/report.json report.md report.html confusion.png calibration.png attention.png, and those of one step in
        reports/STEP/
    RUN/checkpoints/step-00000250/{model.safetensors, state.pt, meta.json}

Everything is written under a temporary name, flushed to disk and renamed, so a reader finds all of it or nothing.
meta.json holds the step, the validation loss and the sha256 of the other two files, which reveals damage.
"""

import hashlib
import json
import os
import pickle
import shlex
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model

from ..files import check_place, new_folder, sync, write_atomic
from ..messages import UsageError, warn

RUN_FILES = {
    "config.yaml", "tokenizer.json", "data.json", "metrics.csv", "loss.png", "sample.txt", "report.json", "report.md",
    "report.html", "confusion.png", "calibration.png", "attention.png", "reports", "tensorboard", "checkpoints",
}  # fmt: skip


# names of the summary of data, the type of their values, and that of the items of a list
_SUMMARY = (
    ("source sha256", str, None), ("characters", int, None), ("labels", list, str), ("class_counts", list, int),
    ("mean deviation median", float, None),
)  # fmt: skip


def create_run(run, files, overwrite):
    """Create the folder of a run with its first files; an old run is replaced last.

    A new folder appears at once. One that exists stays and gets config.yaml last, without which it is not a run: it may
    be a mount point, the target of a link, or the current folder.

    Args:
        run: the folder, which check_new_run has accepted.
        files: {name: text}, with config.yaml.
        overwrite: whether to replace an old run.
    """
    check_new_run(run, overwrite)
    run = run.resolve()
    if not run.exists():
        with new_folder(run) as folder:
            _fill(folder, files)
        return
    staging = run / ".new.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        _fill(staging, files)
        last = "config.yaml"
        for path in sorted(run.iterdir(), key=lambda path: path.name != last):
            if path != staging:
                _remove(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in sorted(staging.iterdir(), key=lambda path: path.name == last):
            os.replace(path, run / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    sync(run)


def _fill(folder, files):
    (folder / "checkpoints").mkdir()
    for name, text in files.items():
        write_atomic(folder / name, text)


def check_new_run(run, overwrite):
    """Raise UsageError if `run` exists and may not be replaced, or cannot be created."""
    real = check_place(run, "run")
    if not real.is_dir() or not any(real.iterdir()):
        return
    if foreign := sorted(p.name for p in real.iterdir() if p.name not in RUN_FILES and not p.name.endswith(".tmp")):
        raise UsageError(f"run {str(run)!r} has {foreign[0]!r}, which is not part of a run; name a new folder")
    if not overwrite:
        way_out = "replace it with --overwrite"
        if (real / "config.yaml").exists():
            way_out = f"continue it with --resume {shlex.quote(str(run))} or {way_out}"
        raise UsageError(f"run {str(run)!r} already exists; {way_out}")


def check_run(run):
    """Raise UsageError unless `run` is the folder of a run."""
    if not run.is_dir():
        raise UsageError(f"run {str(run)!r} {'is a file, not a folder' if run.exists() else 'does not exist'}")
    for name in ("config.yaml", "tokenizer.json", "data.json"):
        if not (run / name).is_file():
            raise UsageError(f"{str(run)!r} is not the folder of a run: it has no {name}")


def read_summary(run):
    """The summary of the data that a run was trained on (data.json)."""
    try:
        summary = json.loads((run / "data.json").read_text(encoding="utf-8"))
        summary |= {name: summary[name] for name in ("source", "characters", "sha256")}
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{run / 'data.json'} must hold source, characters and sha256, got {error}") from None
    for names, kind, of in _SUMMARY:
        for name in names.split():
            value = summary.get(name, kind())
            if not isinstance(value, kind) or (of and not all(isinstance(item, of) for item in value)):
                raise UsageError(f"{run / 'data.json'} is damaged: {name} is {value!r}")
    return summary


def save_checkpoint(run, step, model, state, validation, keep):
    """Write a checkpoint, then delete all but the best and the newest ones.

    Args:
        run: the folder of the run.
        step: number of finished steps.
        model: the module whose weights are saved.
        state: the other state that resuming needs, loadable with weights_only=True.
        validation: {"validation_loss": ..., "score": ...}, the best has the lowest score; None if not validated.
        keep: number of newest checkpoints to keep.

    Raises:
        OSError: the checkpoint could not be written; the others are unchanged.
    """
    folder = run / "checkpoints" / f"step-{step:08d}"
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        try:
            save_model(model, str(temporary / "model.safetensors"))
            torch.save(state, temporary / "state.pt")
        except (SafetensorError, RuntimeError) as error:  # they do not raise OSError if the disk is full
            raise OSError(f"checkpoint {str(folder)!r} could not be written: {error}") from error
        shutil.copymode(temporary / "state.pt", temporary / "model.safetensors")  # safetensors makes its file private
        meta = {"step": step, "validation_loss": None, **(validation or {})}
        meta["sha256"] = {name: _flush_and_hash(temporary / name) for name in ("model.safetensors", "state.pt")}
        write_atomic(temporary / "meta.json", json.dumps(meta))
        if folder.exists():  # a damaged checkpoint from before a resume
            _remove(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(folder.parent)
    _rotate(run, keep)


def find_checkpoints(run):
    """Checkpoints of a run, oldest first: [(folder, meta or None if meta.json is damaged)]."""
    found = sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir() and path.name[5:].isdecimal())
    return [(folder, _read_meta(folder)) for folder in found]


def best_checkpoint(run):
    """(folder, meta) of the checkpoint with the lowest score; None if none was validated."""
    validated = [(f, m) for f, m in find_checkpoints(run) if m and m["validation_loss"] is not None]
    return min(validated, key=lambda item: item[1].get("score", item[1]["validation_loss"]), default=None)


def choose_checkpoint(run, which="last", needed=("model.safetensors",)):
    """An undamaged checkpoint of a run; warns of a damaged one and takes the next older good one.

    Args:
        run: the folder of the run.
        which: "last", "best", or a step as text.
        needed: files that must be undamaged.

    Returns:
        (folder, meta), or None if the run has no checkpoint.

    Raises:
        UsageError: there is no such step, or all candidates are damaged.
    """
    found = find_checkpoints(run)
    candidates = found[::-1]
    if which not in ("last", "best"):
        candidates = [(f, m) for f, m in found if which.isdecimal() and f.name == f"step-{int(which):08d}"]
        if not candidates:
            steps = ", ".join(str(int(f.name[5:])) for f, _ in found) or "none"
            raise UsageError(f"checkpoint must be 'best', 'last' or a saved step ({steps}), got {which!r}")
    elif which == "best" and (best := best_checkpoint(run)):
        candidates.sort(key=lambda checkpoint: checkpoint[0] != best[0])  # stable: the best, then newest to oldest
    damages = []
    for folder, meta in candidates:
        damage = _find_damage(folder, meta, needed)
        if damage is None:
            if damages:
                warn(f"checkpoint {damages[0]}; using {folder.name} instead")
            return folder, meta
        damages.append(f"{folder} is damaged ({damage})")
    if damages:
        raise UsageError(f"run {str(run)!r} has no undamaged checkpoint: {'; '.join(damages)}")
    return None


def load_state(folder):
    """The state of a checkpoint; UsageError unless it holds what was saved. Never runs code from the file."""
    try:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"{folder}: state.pt must hold only plain numbers and tensors: {text[:200]}") from None
    needed = {"optimizer", "precision", "step", "best_score", "stale"}
    if not isinstance(state, dict) or not needed <= state.keys():
        raise UsageError(f"{folder}: state.pt must hold {', '.join(sorted(needed))}")
    return state


def remove_leftovers(run):
    """Delete the temporary files of a killed process."""
    for path in [*run.glob(".*.tmp"), *(run / "checkpoints").glob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _rotate(run, keep):
    best = best_checkpoint(run)
    for folder, _ in find_checkpoints(run)[:-keep]:
        if best is None or folder != best[0]:
            _remove(folder)


def _remove(folder):
    """Delete a folder; it is renamed first, so a killed process leaves no partial folder under its name."""
    doomed = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _read_meta(folder):
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        loss = meta["validation_loss"]
        right = isinstance(meta["step"], int) and isinstance(meta["sha256"], dict)
        right &= loss is None or all(isinstance(value, int | float) for value in (loss, meta.get("score", loss)))
        return meta if right else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _find_damage(folder, meta, needed):
    if meta is None:
        return "meta.json missing or unreadable"
    for name in needed:
        if not (folder / name).is_file():
            return f"{name} missing"
        if _hash(folder / name) != meta["sha256"].get(name):
            return f"{name} differs from its sha256"
    return None


def _hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _flush_and_hash(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return _hash(path)
