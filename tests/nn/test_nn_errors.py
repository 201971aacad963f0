"""The errors of the layers have the classes of torch.nn's; where they differ, docs/torch-nn.md has a row."""

import pytest
import torch
from nn_oracle import pair, slow_path

from fastattn import nn

E, H, FF, N, L = 16, 4, 24, 3, 6


@pytest.fixture
def x():
    return torch.randn(N, L, E, generator=torch.Generator().manual_seed(0))


MISTAKES = {
    "dimensions of query": (AssertionError, lambda x: ((x[None],) * 3, {})),
    "width of query": (AssertionError, lambda x: ((x[..., :4], x, x), {})),
    "key and value": (AssertionError, lambda x: ((x, x, x[:, :2]), {})),
    "batch": (RuntimeError, lambda x: ((x[:1], x, x), {})),
    "shape of attn_mask": (RuntimeError, lambda x: ((x, x, x), {"attn_mask": torch.zeros(2, 2)})),
    "dtype of attn_mask": (AssertionError, lambda x: ((x, x, x), {"attn_mask": torch.zeros(L, L).int()})),
    "shape of padding": (AssertionError, lambda x: ((x, x, x), {"key_padding_mask": torch.zeros(N, 2)})),
    "both masks": (
        RuntimeError,
        lambda x: ((x, x, x), {"attn_mask": torch.zeros(2, 2), "key_padding_mask": torch.zeros(N, 2)}),
    ),
    "dtype of query": (RuntimeError, lambda x: ((x.double(), x, x), {})),
}


KV = {"kdim": 6, "vdim": 4}
FAULTS = {
    "no in_proj_weight": (AssertionError, {}, lambda module: {"in_proj_weight": None}),
    "no q_proj_weight": (AssertionError, KV, lambda module: {"q_proj_weight": None}),
    "no v_proj_weight": (AssertionError, KV, lambda module: {"v_proj_weight": None}),
    "shape of q_proj_weight": (AssertionError, KV, lambda module: {"q_proj_weight": module.k_proj_weight}),
    "dimensions of k_proj_weight": (AssertionError, KV, lambda module: {"k_proj_weight": module.k_proj_weight[0]}),
    "own weights are off": (AssertionError, {}, lambda module: {"_qkv_same_embed_dim": False}),
    "bias_k alone": (AssertionError, {"add_bias_kv": True}, lambda module: {"bias_v": None}),
    "bias_v alone": (AssertionError, {"add_bias_kv": True}, lambda module: {"bias_k": None}),
    "number of heads": (AssertionError, {}, lambda module: {"num_heads": 3}),
    "no heads": (ZeroDivisionError, {}, lambda module: {"num_heads": 0}),
    "shape of in_proj_weight": (RuntimeError, {}, lambda module: {"in_proj_weight": module.in_proj_weight[:3]}),
    "shape of out_proj": (RuntimeError, {}, lambda module: {"out_proj": torch.nn.Linear(3, E)}),
}  # fmt: skip


LAYERS = {
    "RMSNorm": (E,), "MultiheadAttention": (E, H), "TransformerEncoderLayer": (E, H, FF, 0.0),
    "TransformerDecoderLayer": (E, H, FF, 0.0),
}  # fmt: skip
LAYERS_WITH_CHILDREN = [name for name in LAYERS if name.endswith("Layer")]


def call(module, x):
    inputs = {"MultiheadAttention": 3, "TransformerDecoderLayer": 2}
    out = module(*[x] * next((n for name, n in inputs.items() if name in type(module).__name__), 1))
    return out[0] if isinstance(out, tuple) else out


# a layer, the class in torch, ours
UNCHECKED_BY_TORCH = {
    "a list as query": ("MultiheadAttention", AttributeError, TypeError, lambda x: (([1.0], x, x), {})),
    "no key": ("MultiheadAttention", AttributeError, TypeError, lambda x: ((x, None, x), {})),
    "an array as src": ("TransformerEncoderLayer", AttributeError, TypeError, lambda x: ((x.numpy(),), {})),
    "True as mask": ("TransformerEncoderLayer", AttributeError, TypeError, lambda x: ((x, None, True), {})),
    "a key of one dimension": ("MultiheadAttention", IndexError, AssertionError, lambda x: ((x, x[0, 0], x), {})),
    "an integer mask of a stack": (
        "TransformerDecoderLayer", RuntimeError, AssertionError, lambda x: ((x, x, torch.zeros(L, L).int()), {}),
    ),
}  # fmt: skip


class TestErrors:
    """The error classes are torch's. If two arguments are wrong, torch may name the other one."""

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("call", MISTAKES)
    def test_have_the_classes_of_torch(self, x, call, need_weights):
        kind, make = MISTAKES[call]
        args, kwargs = make(x)
        for module in pair("MultiheadAttention", E, H, batch_first=True):
            with pytest.raises(kind):
                module(*args, need_weights=need_weights, **kwargs)

    @pytest.mark.parametrize("wrong", ["key", "value"])
    def test_width_of_keys(self, x, wrong):
        """An AssertionError if keys have their own width, as in torch, which looks at the weights."""
        for module in pair("MultiheadAttention", E, H, batch_first=True, kdim=6, vdim=4):
            right = {"key": x[..., :6], "value": x[..., :4]}
            module(x, **right)
            with pytest.raises(AssertionError, match="expecting"):
                module(x, **right | {wrong: x[..., :3]})

    @pytest.mark.parametrize("fault", FAULTS)
    def test_of_a_changed_module(self, x, fault):
        kind, options, change = FAULTS[fault]
        for module in pair("MultiheadAttention", E, H, batch_first=True, **options):
            for name, value in change(module).items():
                module._parameters.pop(name, None)
                setattr(module, name, value)
            inputs = (x, x[..., :6], x[..., :4]) if options == KV else (x, x, x)
            with pytest.raises(kind), slow_path():
                module(*inputs)

    @pytest.mark.parametrize("need_weights", [False, True])
    @pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16),
                                        (torch.float16, torch.bool), (torch.bool, torch.float16)])  # fmt: skip
    def test_of_masks_is_decided_by_the_dtype_of_their_sum(self, x, dtypes, need_weights):
        ours, theirs = pair("MultiheadAttention", E, H, batch_first=True)
        padding = torch.arange(L) >= torch.tensor([6, 4, 2])[:, None]
        mask = torch.ones(L, L, dtype=torch.bool).triu(1)
        padding, mask = (
            m if dtype == torch.bool else torch.zeros(m.shape, dtype=dtype).masked_fill_(m, float("-inf"))
            for m, dtype in zip((padding, mask), dtypes, strict=True)
        )
        got = ours(x, x, x, padding, need_weights, mask)
        with slow_path():
            torch.testing.assert_close(got, theirs(x, x, x, padding, need_weights, mask))
        for module in (ours, theirs):
            for wrong in ({"key_padding_mask": padding.half()}, {"attn_mask": mask.half()}):
                with pytest.raises(RuntimeError, match="dtype"), slow_path():
                    module(x, x, x, need_weights=False, **wrong)

    @pytest.mark.parametrize("mistake", UNCHECKED_BY_TORCH)
    def test_where_torch_checks_nothing(self, x, mistake):
        """There, an index, an attribute or a conversion fails."""
        name, expected, kind, make = UNCHECKED_BY_TORCH[mistake]
        modules = pair(
            name, E, H, **({} if name == "MultiheadAttention" else {"dim_feedforward": FF}), batch_first=True
        )
        for module, error in zip(modules, (kind, expected), strict=True):
            if name == "TransformerDecoderLayer":
                library = nn if error is kind else torch.nn
                module = library.TransformerDecoder(module, 1)
            args, kwargs = make(x)
            with pytest.raises(error), slow_path():
                module(*args, **kwargs)

    @pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
    def test_of_norms(self, x, name):
        for shape, given in (((L + 1, E), x), ((N, L, E), x[0]), ((), torch.ones(()))):
            theirs, ours = getattr(torch.nn, name)(shape), getattr(nn, name)(shape)
            with pytest.raises((RuntimeError, ValueError)) as expected:
                theirs(given)
            with pytest.raises(expected.type):
                ours(given)


class TestWeightsThatAreNoTensors:
    @pytest.mark.parametrize("value", [None, [1.0] * E, torch.ones(E).numpy()], ids=["None", "list", "array"])
    @pytest.mark.parametrize("weight", ["linear1.weight", "linear2.weight", "self_attn.in_proj_weight"])
    @pytest.mark.parametrize("name", LAYERS_WITH_CHILDREN)
    def test_are_named(self, x, name, weight, value):
        layer = getattr(nn, name)(*LAYERS[name])
        path, _, label = weight.rpartition(".")
        owner = layer.get_submodule(path)
        delattr(owner, label)
        owner.register_parameter(label, None)
        if value is not None:
            del owner._parameters[label]
            setattr(owner, label, value)
        kind = AssertionError if value is None and "in_proj" in weight else TypeError  # as in torch
        with pytest.raises(kind, match=f"nn.{name}: {weight} must be a tensor, got {type(value).__name__}"):
            call(layer, x)

    @pytest.mark.parametrize("value", [[1.0] * E, torch.ones(E).numpy()], ids=["list", "array"])
    @pytest.mark.parametrize("bias", ["linear2.bias", "self_attn.out_proj.bias", "norm1.bias"])
    @pytest.mark.parametrize("name", LAYERS_WITH_CHILDREN)
    def test_biases(self, x, name, bias, value):
        layer = getattr(nn, name)(*LAYERS[name])
        path, _, label = bias.rpartition(".")
        owner = layer.get_submodule(path)
        del owner._parameters[label]
        setattr(owner, label, value)
        with pytest.raises(TypeError, match="bias must be a tensor"):
            call(layer, x)


class TestSavedTensors:
    """What is saved for the backward: more inputs than in torch.nn, and the biases that a kernel adds."""

    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("name", LAYERS)
    def test_inference_inputs_cannot_be_trained_on(self, name, batch_first):
        ours, theirs = pair(name, *LAYERS[name], **({} if name == "RMSNorm" else {"batch_first": batch_first}))
        with torch.inference_mode():
            x = torch.randn(N, L, E)
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            call(ours, x)
        with torch.no_grad():
            call(ours, x)
        call(ours, x.clone()).sum().backward()
        if batch_first or name == "RMSNorm":
            with slow_path():
                call(theirs, x).sum().backward()
        else:
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                call(theirs, x)

    @pytest.mark.parametrize("changed", ["input", "linear1.bias"])
    @pytest.mark.parametrize("name", LAYERS_WITH_CHILDREN)
    def test_changes_before_the_backward_raise(self, x, name, changed):
        for layer in pair(name, *LAYERS[name], batch_first=True):
            given = x.clone()
            out = call(layer, given)
            with torch.no_grad():
                (given if changed == "input" else layer.get_parameter(changed)).mul_(2)
            if isinstance(layer, getattr(nn, name)):
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    out.sum().backward()
            else:
                out.sum().backward()
