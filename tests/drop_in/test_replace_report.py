"""The report of `replace`: undo, all or nothing, and the reasons why modules are left alone."""

import copy

import pytest
import torch
from test_replace_norms import D, Rms

import fastattn
from fastattn.drop_in import norms


class RmsNorm(Rms):
    pass


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(), torch.nn.LayerNorm(D)
        self.linear = torch.nn.Linear(D, D)

    def forward(self, x):
        return x + self.linear(self.norm2(self.norm1(x)))


def model_of_blocks(n=3):
    return torch.nn.Sequential(*(Block() for _ in range(n)))


def classes(model):
    return [type(module) for module in model.modules()]


def test_undo_gives_the_old_bits():
    model, x = model_of_blocks(), torch.randn(5, D)
    before, kinds = model(x), classes(model)
    report = fastattn.replace(model)
    assert len(report.replaced) == 9
    assert classes(model) != kinds
    report.undo()
    assert classes(model) == kinds
    assert torch.equal(model(x), before)
    report.undo()
    assert classes(model) == kinds
    assert len(fastattn.replace(model).replaced) == 9


def test_undo_refuses_if_a_class_was_changed_since():
    model = model_of_blocks()
    report = fastattn.replace(model)
    ours = classes(model)
    model[1].norm2.__class__ = torch.nn.LayerNorm
    changed = classes(model)
    with pytest.raises(RuntimeError, match=r"undo: the class of a module was changed after replace, from LayerNorm"):
        report.undo()
    assert classes(model) == changed != ours


def test_two_reports_are_undone_one_by_one():
    model = model_of_blocks()
    kinds = classes(model)
    first = fastattn.replace(model, only="LayerNorm")
    second = fastattn.replace(model, only=["norms"])
    assert set(first.replaced) == {f"{i}.norm2" for i in range(3)}
    assert set(second.replaced) == {f"{i}.norm1" for i in range(3)}
    first.undo()
    second.undo()
    assert classes(model) == kinds


def test_an_error_in_the_middle_leaves_the_model_as_it_was(monkeypatch):
    model = model_of_blocks()
    kinds, calls = classes(model), []

    def change_class(module, *args):
        change = change_before(module, *args)

        def apply():
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(module)
            return change.apply()

        return change._replace(apply=apply)

    change_before = norms.change_class
    monkeypatch.setattr(norms, "change_class", change_class)
    with pytest.raises(KeyboardInterrupt):
        fastattn.replace(model)
    assert len(calls) == 2
    assert classes(model) == kinds


def test_an_error_in_a_check_is_a_reason():
    class NoCopyNorm(RmsNorm):
        def __deepcopy__(self, memo):
            raise OSError("no")

    class FixedNorm(RmsNorm):
        def __setattr__(self, name, value):
            if name == "__class__":
                raise PermissionError("stays")
            super().__setattr__(name, value)

    model = torch.nn.Sequential(NoCopyNorm(), FixedNorm(), RmsNorm())
    report = fastattn.replace(model)
    assert set(report.replaced) == {"2"}
    assert report.left["0"] == "it cannot be copied for a check: OSError: no"
    assert report.left["1"] == "the check failed: PermissionError: stays"


def test_states_in_which_modules_are_left_alone():
    class Values(torch.Tensor):
        pass

    def patched(module):
        module.forward = lambda x: x

    def parametrized(module):
        torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Tanh())

    def of_another_class(module):
        module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Values))

    def of_integers(module):
        module.weight = torch.nn.Parameter(torch.ones(D, dtype=torch.int8), requires_grad=False)

    def on_meta(module):
        module.to("meta")

    for change, reason in (
        (patched, "forward was replaced on this RmsNorm object"),
        (parametrized, "its parameters are parametrized"),
        (of_another_class, "it has a Values as a parameter"),
        (of_integers, "it has torch.int8 values as a parameter"),
        (on_meta, "its parameters are on the meta device: load the weights first"),
    ):
        module = RmsNorm()
        change(module)
        kind = type(module)
        report = fastattn.replace(torch.nn.Sequential(module))
        assert report.replaced == {}, reason
        assert type(module) is kind
        assert report.left == {"0": reason}


def test_a_class_whose_forward_others_replaced(monkeypatch):
    def forward(self, x):
        return x

    forward.__module__ = "some_library"
    monkeypatch.setattr(Rms, "forward", forward)
    report = fastattn.replace(torch.nn.Sequential(RmsNorm()))
    assert report.left == {"0": "the forward of Rms was replaced by code of some_library"}


def test_a_module_with_two_names():
    model = torch.nn.ModuleDict({"a": RmsNorm(), "b": torch.nn.LayerNorm(D), "c": RmsNorm()})
    model["d"], model["e"] = model["a"], model["b"]
    report = fastattn.replace(model)
    assert set(report.replaced) == {"c"}
    assert report.left == {"a": "the model also has this module at d", "b": "the model also has this module at e"}


def test_a_scripted_module():
    model = torch.nn.Sequential(torch.jit.script(torch.nn.LayerNorm(D)), torch.jit.script(RmsNorm()))
    kinds = classes(model)
    assert fastattn.replace(model).replaced == {}
    assert classes(model) == kinds


def test_nothing_replaced_says_why():
    meta = copy.deepcopy(model_of_blocks()).to("meta")
    assert "the model is on the meta device: load its weights, then call replace" in str(fastattn.replace(meta))
    ours = model_of_blocks(1)
    fastattn.replace(ours)
    assert "0 modules replaced, 0 left alone\n  3 modules are already fastattn's" in str(fastattn.replace(ours))
    nothing = torch.nn.Sequential(torch.nn.ReLU())
    assert "with fastattn.patch_sdpa():" in str(fastattn.replace(nothing))
    filtered = str(fastattn.replace(model_of_blocks(1), only="RMSNorm"))
    assert "only= left out" in filtered


def test_the_text_groups_layers():
    text = str(fastattn.replace(model_of_blocks()))
    assert "9 modules replaced, 0 left alone" in text
    assert str(fastattn.replace(torch.nn.LayerNorm(4))).startswith("1 module replaced, 0 left alone")
    assert "*.norm* (3 modules): now LayerNorm" in text
    assert "*.norm* (3 modules): now RMSNorm (was RmsNorm)" in text


def test_only_takes_kinds():
    model = model_of_blocks(1)
    assert fastattn.replace(model, only="norms").replaced == {"0.norm1": "RMSNorm (was RmsNorm)"}
    with pytest.raises(
        ValueError, match=r"only must name classes among torch\.nn\..*, or kinds among norms, .*'norm'$"
    ):
        fastattn.replace(model, only="norm")


MODES = {
    "no_grad": torch.no_grad, "inference": torch.inference_mode, "meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes_of_the_caller_change_nothing(mode):
    model = model_of_blocks(1)
    with mode():
        report = fastattn.replace(model)
    assert len(report.replaced) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_of_the_caller_changes_nothing(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert len(fastattn.replace(model_of_blocks(1)).replaced) == 3
    finally:
        torch.set_default_dtype(before)


def test_a_model_that_liger_patched():
    """What Liger took over is left alone with a reason, the rest is replaced. Its kernels need a GPU to run."""
    liger = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    from transformers.models.llama import modeling_llama
    from transformers_families import model_of

    model, names = copy.deepcopy(model_of("llama")), dict(vars(modeling_llama))
    try:
        liger.apply_liger_kernel_to_llama(model=model)
        kinds = [type(module) for module in model.modules()]
        report = fastattn.replace(model)
    finally:
        for name, value in names.items():
            setattr(modeling_llama, name, value)
    reasons = {where.rpartition(".")[2]: reason for where, reason in report.left.items()}
    rotary = reasons.pop("self_attn", "rotary embeddings: ")  # with an interpreter of Triton, its function may run
    assert rotary.startswith("rotary embeddings: ")
    assert reasons.keys() == {"input_layernorm", "post_attention_layernorm", "norm", "mlp"}
    assert all(reason.startswith("forward was replaced on this Llama") for reason in reasons.values())
    assert report.replaced["model.layers.0.mlp.up_proj"] == "Linear"
    report.undo()
    assert [type(module) for module in model.modules()] == kinds
