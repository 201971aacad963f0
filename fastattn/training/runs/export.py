"""Writes a trained model for other programs: a folder that transformers loads, or an ONNX file."""

import json
import warnings

import torch

from fastattn.integrations.hugging_face import write_hugging_face
from fastattn.models import CausalLM, Classifier, Seq2Seq

from ..data.tokenizer_export import token_settings, tokenizer_files
from ..files import check_place, new_folder, write_atomic
from ..messages import UsageError

FORMATS = ("hugging_face", "onnx")
ONNX_FILE = "model.onnx"


def export_run(run, folder, kind):
    """Write a model with its tokenizer into a new folder.

    Args:
        run: LoadedRun.
        folder: Path; must not exist.
        kind: one of FORMATS.
    Returns: dict, what was written.
    Raises:
        UsageError: the folder exists, no family of Hugging Face has the model, or a package is missing.
    """
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"export writes a new folder, but {str(folder)!r} exists")
    check_place(folder, "export")
    model = run.model.cpu().float()
    encoder = not isinstance(model, CausalLM)
    with new_folder(folder) as temporary:
        if kind == "onnx":
            facts = {"format": "onnx", "file": ONNX_FILE, "inputs": write_onnx(model, temporary / ONNX_FILE)}
        else:
            facts = {"format": "hugging_face", "model_type": _write_hugging_face(run, model, temporary)}
        labels = run.task.summary.get("labels")
        if labels and kind == "onnx":
            write_atomic(temporary / "labels.json", json.dumps(labels, ensure_ascii=False))
        for name, text in tokenizer_files(run.tokenizer, run.config.model.block_size, encoder).items():
            write_atomic(temporary / name, text)
    return {"folder": str(folder), **facts, "step": run.step}


def _write_hugging_face(run, model, folder):
    settings = token_settings(run.tokenizer)
    if getattr(model, "label_kind", "class") == "number":
        raise UsageError("a BERT of Hugging Face does not scale its number; --format onnx writes any model")
    if labels := run.task.summary.get("labels"):
        if model.label_kind == "classes":
            settings["problem_type"] = "multi_label_classification"
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: number for number, label in enumerate(labels)}
    try:
        return write_hugging_face(model, folder, **settings)
    except ValueError as error:
        raise UsageError(f"{error}; --format onnx writes any model") from None


@torch.no_grad()
def write_onnx(model, path):
    """Write a model as ONNX with any batch and length; returns the names of its inputs.

    Raises:
        UsageError: onnx or onnxscript is missing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"missing package {error.name}: run pip install onnx onnxscript") from None
    longest = model.block_size
    batch = torch.export.Dim("batch", min=1, max=2**16)
    tokens, lengths = torch.zeros(2, min(longest, 5), dtype=torch.int64), torch.full((2,), min(longest, 5))
    if isinstance(model, CausalLM):
        inputs, names = (tokens,), ("tokens",)
    elif isinstance(model, Seq2Seq):
        inputs, names = (tokens, lengths, tokens[:, : min(longest, 4)]), ("source", "lengths", "target")
    else:
        inputs, names = (tokens, lengths), ("tokens", "lengths")
    shapes = tuple(
        {0: batch, 1: torch.export.Dim(f"{name}_length", min=1, max=longest)} if x.dim() == 2 else {0: batch}
        for x, name in zip(inputs, names, strict=True)
    )
    output = "logits" if not isinstance(model, Classifier) else "class_logits"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            model.eval(), inputs, dynamo=True, verbose=False, dynamic_shapes=shapes, input_names=list(names),
            output_names=[output],
        )  # fmt: skip
    program.save(str(path))
    return list(names)
