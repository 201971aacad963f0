"""`replace`: finds what can be replaced in a model, then changes it, all or nothing."""

from collections.abc import Iterable

import torch

from fastattn.drop_in import attention, experts, feed_forward, linear, loss, norms, padding, rotary, torch_nn
from fastattn.drop_in.change import Change, Replaced
from fastattn.drop_in.report import Report

KINDS = {
    "norms": norms.find, "attention": attention.find, "loss": loss.find, "feed_forward": feed_forward.find,
    "linear": linear.find, "experts": experts.find, "rotary": rotary.find,
}  # fmt: skip


def replace(
    model: torch.nn.Module,
    *,
    only: str | type[torch.nn.Module] | Iterable[str | type[torch.nn.Module]] | None = None,
    padding_free: bool = False,
) -> Report:
    """Make a model of any library use our kernels, in place.

    The modules stay the same objects with the same parameters, buffers, hooks and modes, so optimizers, references to
    them and checkpoints stay valid; only their class changes. A module of another library is taken over only if a check
    on small random numbers shows that its forward computes what ours does. docs/models.md lists what is replaced.

    Args:
        model: any torch.nn.Module.
        only: what to replace: classes of torch.nn that fastattn.nn has, or their names, and the kinds "norms",
            "attention", "loss", "feed_forward", "linear", "experts" and "rotary"; None = everything.
        padding_free: let models of transformers and stacks of torch.nn.TransformerEncoder leave out the padding: the
            real tokens of a padded batch pass through all layers as one packed row. The outputs at padding are then 0.
    Returns: a printable Report with the dicts `replaced` and `left`, by module name, and the method `undo`.
    Raises:
        TypeError: model is not a module.
        ValueError: `only` has an entry that is none of these.
        An error in the middle leaves the model as it was.
    Example:
        >>> model = torch.nn.TransformerEncoderLayer(64, 8)
        >>> print(fastattn.replace(model))  # doctest: +ELLIPSIS
        4 modules replaced, 0 left alone
        ...
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"replace: model must be a torch.nn.Module, got {type(model).__name__}")
    classes, kinds = _wanted(only)
    names = _names(model)
    modules = {others[0]: module for module, others in names.items()}
    found: dict[str, Change | str] = torch_nn.find(modules, classes)
    report, changes = Report(), {}
    finders = [KINDS[kind] for kind in kinds] + ([padding.find] if padding_free else [])
    for find in finders:
        for name, result in find(modules).items():
            found[name] = _combined(found.get(name), result)
            if find is padding.find and isinstance(result, str) and found[name] != result:
                report.advice.append(f"padding is kept in {name or 'the model'}: {result}")
    for name, result in found.items():
        module = modules[name]
        if len(names[module]) > 1:
            result = f"the model also has this module at {' and '.join(names[module][1:])}"
        if isinstance(result, Change):
            changes[name] = module, result
        else:
            report.left[name] = result
    _apply(changes, report)
    if not changes:
        report.advice += _advice(model, report, only)
    return report


def _combined(before, now):
    """One result of two kinds for a module: a Change overrides a reason, and only one Change may set the class."""
    if not isinstance(before, Change):
        return now
    if not isinstance(now, Change) or (before.new_class and now.new_class):
        return before

    def apply():
        undo = before.apply()
        try:
            undo_second = now.apply()
        except BaseException:
            undo()
            raise

        def undo_both():
            undo_second()
            undo()

        return undo_both

    return Change(f"{before.what}, {now.what}", apply, before.new_class or now.new_class)


def _wanted(only):
    """(classes of torch.nn, names of kinds) that `only` lists."""
    if only is None:
        return tuple(torch_nn.CLASSES), tuple(KINDS)
    wanted = tuple(only) if isinstance(only, (tuple, list, set)) else (only,)
    by_name = {kind.__name__: kind for kind in torch_nn.CLASSES}
    kinds = tuple(entry for entry in wanted if isinstance(entry, str) and entry in KINDS)
    classes = tuple(by_name.get(e, e) if isinstance(e, str) else e for e in wanted if e not in kinds)
    for entry in classes:
        if entry not in torch_nn.CLASSES:
            known = ", ".join(f"torch.nn.{name}" for name in by_name)
            raise ValueError(
                f"replace: only must name classes among {known}, or kinds among {', '.join(KINDS)}, got {entry!r}"
            )
    return classes, kinds


def _names(model):
    """The names of every module, in the order of the model."""
    names: dict[torch.nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def _apply(changes, report):
    try:
        for name, (module, change) in changes.items():
            report._undo.append(change.apply())
            if change.new_class is not None:
                report._classes[module] = change.new_class
            report.replaced[name] = change.what
    except BaseException:
        report._classes.clear()
        report.undo()
        raise


def _advice(model, report, only):
    """Why nothing was replaced, and what to do; empty if the report has reasons for single modules."""
    ours = sum(isinstance(module, (Replaced, *torch_nn.CLASSES.values())) for module in model.modules())
    if ours:
        return [f"{ours} modules are already fastattn's"]
    if any(parameter.is_meta for parameter in model.parameters()):
        return ["the model is on the meta device: load its weights, then call replace"]
    if only is not None:
        return ["only= left out all other kinds of modules: replace(model) looks for all of them"]
    if report.left:
        return []
    return [
        "no module computes what a layer of fastattn does. Where functions call torch's scaled_dot_product_attention,"
        " run the model in `with fastattn.patch_sdpa():`"
    ]
