"""PyTorch's tools treat our layers like those of torch.nn: each tool runs on both, and the outcomes are compared.

A tool takes a module and its inputs and returns something comparable: tensors, including gradients, and text. What a
tool cannot do with ours is in docs/torch-nn.md, section Tools.
"""

import contextlib
import copy
import functools
import io
import operator
import pickle
import warnings

import pytest
import torch
from nn_oracle import slow_path
from torch._dynamo import compiled_autograd
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as module_hooks
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.module_tracker import ModuleTracker

import fastattn
from fastattn import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecation warnings of the tools themselves

E, H, FF, N, L = 16, 4, 24, 3, 6
LAYER = {"dim_feedforward": FF, "dropout": 0.0, "batch_first": True}
LAYERS = {
    "LayerNorm": (lambda lib: lib.LayerNorm(E), 1),
    "RMSNorm": (lambda lib: lib.RMSNorm(E), 1),
    "MultiheadAttention": (lambda lib: lib.MultiheadAttention(E, H, batch_first=True), 3),
    "TransformerEncoderLayer": (lambda lib: lib.TransformerEncoderLayer(E, H, **LAYER), 1),
    "TransformerDecoderLayer": (
        lambda lib: lib.TransformerDecoderLayer(E, H, activation="gelu", norm_first=True, **LAYER), 2,
    ),
    "Transformer": (lambda lib: lib.Transformer(E, H, 1, 1, **LAYER), 2),
}  # fmt: skip
NAMES_OF_INPUTS = {"MultiheadAttention": ("query", "key", "value"), "Transformer": ("src", "tgt")} | {
    "TransformerEncoderLayer": ("src",), "TransformerDecoderLayer": ("tgt", "memory"),
}  # fmt: skip


def build(name, library):
    torch.manual_seed(0)
    module = LAYERS[name][0](library)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() < 2:  # norms and biases other than 1 and 0
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module


def inputs_of(name):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(N, L, E, generator=generator) for _ in range(LAYERS[name][1])]


def first(out):
    return out[0] if isinstance(out, tuple) else out


def trained(module, inputs, call=None):
    """The output, and the gradients of the inputs and of the parameters, by name, as some tools change their order."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    parameters = dict(sorted(module.named_parameters()))
    out = first((module if call is None else call)(*leaves))
    grads = torch.autograd.grad(out.square().sum(), [*leaves, *parameters.values()], allow_unused=True)
    return [out.detach(), *grads]


def smaller(inputs):
    """Inputs of other sizes, for a tool that recorded with the first ones."""
    return [x[:2, :4].contiguous() for x in inputs]


TOOLS, RECORDERS = {}, {}


def tool(**options):
    """Register a tool under its own name, or one for each value of its single option."""

    def register(function):
        if not options:
            TOOLS[function.__name__] = function
        for argument, values in options.items():
            for value in values:
                TOOLS[f"{function.__name__}-{value}"] = functools.partial(function, **{argument: value})
        return function

    return register


def recorder(*layers):
    """A tool that records layers (only some, if slow) and trains the record on other sizes, against torch.nn."""

    def register(function):
        RECORDERS.update({(function.__name__, layer): function for layer in layers or LAYERS})
        return function

    return register


# ---- what records a module ----


@recorder()
def jit_trace(module, inputs):
    """With its defaults, gradients and a check; saved and loaded."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, inputs), file)
    file.seek(0)
    return trained(torch.jit.load(file), smaller(inputs))


@tool()
def jit_trace_for_inference(module, inputs):
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), inputs)
        return [first(torch.jit.freeze(traced)(*inputs)), first(traced(*smaller(inputs)))]


class Holder(torch.nn.Module):
    """A user's module that contains one of ours."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def hold(module, n_inputs):
    forward = (  # symbolic tracing needs the arguments by name
        lambda self, x: self.module(x),
        lambda self, x, y: self.module(x, y),
        lambda self, x, y, z: self.module(x, y, z)[0],
    )[n_inputs - 1]
    return type("Holder", (Holder,), {"forward": forward})(module)


@tool()
def fx_symbolic_trace(module, inputs):
    graph = torch.fx.symbolic_trace(hold(module, len(inputs)))
    nodes = [f"{node.op} {node.target}" for node in graph.graph.nodes if node.op != "placeholder"]
    return [" ".join(nodes), *trained(graph, smaller(inputs))]


def of_parameters(module):
    """A function of (parameters, *inputs)."""
    return lambda parameters, *inputs: first(torch.func.functional_call(module, parameters, inputs))


@recorder("LayerNorm", "RMSNorm", "TransformerEncoderLayer")
def make_fx_of_a_forward(module, inputs):
    parameters = dict(module.named_parameters())
    graph = make_fx(of_parameters(module), tracing_mode="symbolic")(parameters, *inputs)
    return trained(module, smaller(inputs), lambda *leaves: graph(parameters, *leaves))


@recorder("LayerNorm", "MultiheadAttention", "TransformerEncoderLayer", "TransformerDecoderLayer")
def make_fx_before_autograd(module, inputs):
    parameters, inputs = dict(module.named_parameters()), smaller(inputs)
    graph = make_fx(of_parameters(module), pre_dispatch=True)(parameters, *inputs)
    return trained(module, inputs, lambda *leaves: graph(parameters, *leaves))


@recorder("LayerNorm", "TransformerEncoderLayer")
def make_fx_of_a_training_step(module, inputs):
    def function(parameters, *inputs):
        out = of_parameters(module)(parameters, *inputs)
        leaves = [*inputs, *(parameters[name] for name in sorted(parameters))]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]

    parameters = dict(module.named_parameters())
    leaves, others = ([x.clone().requires_grad_() for x in some] for some in (inputs, smaller(inputs)))
    return make_fx(function, tracing_mode="symbolic")(parameters, *leaves)(parameters, *others)


def exported(module, inputs, **options):
    """Batch and lengths are named dimensions."""
    batch, length, other = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "length", "other"))
    names = NAMES_OF_INPUTS.get(type(module).__name__, ("input" if isinstance(module, torch.nn.LayerNorm) else "x",))
    shapes = {name: {0: batch, 1: other if i else length} for i, name in enumerate(names)}
    inputs = [torch.cat([x, x[:, :2]], 1) if i else x for i, x in enumerate(inputs)]
    return torch.export.export(module, tuple(inputs), dynamic_shapes=shapes, **options)


@recorder()
def export_and_train(module, inputs):
    return trained(exported(module, inputs).module(), smaller(inputs))


@recorder("LayerNorm", "TransformerEncoderLayer")
def export_strictly_and_train(module, inputs):
    return trained(exported(module, inputs, strict=True).module(), smaller(inputs))


@recorder("LayerNorm", "TransformerEncoderLayer")
def export_compile_and_train(module, inputs):
    torch._dynamo.reset()
    return trained(torch.compile(exported(module, inputs).module(), backend="aot_eager"), smaller(inputs))


@recorder("LayerNorm", "TransformerEncoderLayer")
def compile_with_any_size_and_train(module, inputs):
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    trained(module, inputs, compiled)
    return trained(module, smaller(inputs), compiled)


@recorder("TransformerEncoderLayer")
def compiled_backward(module, inputs):
    with compiled_autograd._enable(torch.compile(backend="eager")):
        return trained(module, smaller(inputs))


@pytest.mark.parametrize(("name", "layer"), RECORDERS)
def test_record_trains_as_torch_nn(name, layer):
    got = RECORDERS[name, layer](build(layer, nn), inputs_of(layer))
    with slow_path():
        assert_same(got, trained(build(layer, torch.nn), smaller(inputs_of(layer))))


@pytest.mark.parametrize("layer", ["RMSNorm", "TransformerEncoderLayer"])
def test_exported_program_is_saved_without_training(layer):
    file = io.BytesIO()
    torch.export.save(exported(build(layer, nn).eval(), inputs_of(layer)).run_decompositions(), file)
    file.seek(0)
    got = first(torch.export.load(file).module()(*smaller(inputs_of(layer))))
    with slow_path():
        assert_same([got], [first(build(layer, torch.nn).eval()(*smaller(inputs_of(layer))))])


def test_exported_layer_is_fused_and_draws_anew():
    layer, x = nn.TransformerEncoderLayer(E, H, FF, 0.5, batch_first=True), torch.randn(N, L, E)
    program = torch.export.export(layer, (x,))
    ours = [node.target.name() for node in program.graph.nodes if "fastattn" in str(node.target)]
    assert ours == [f"fastattn::{op}_fwd_native" for op in ("attention", "norm", "activation", "norm")]
    results = []
    for function in (program.module(), program.module(), layer):
        torch.manual_seed(0)
        results.append(function(x))
    assert results[0].equal(results[1])
    torch.testing.assert_close(results[0], results[2])
    assert not results[0].equal(program.module()(x))


def test_recorded_dropout_has_the_gradient_of_its_mask():
    traced = torch.jit.trace(lambda x: fastattn.dropout(x, 0.5), torch.ones(3, 8), check_trace=False)
    x = torch.ones(3, 8, requires_grad=True)
    out = traced(x)
    assert torch.autograd.grad(out.sum(), x)[0].equal(out.detach())
    assert not traced(x).equal(out)


def test_record_without_gradients_warns_when_it_is_differentiated():
    x = torch.randn(N, L, E)
    with torch.no_grad():
        program = torch.export.export(nn.LayerNorm(E), (x,)).module()
    assert not [p for p in program.parameters() if not p.requires_grad]
    with pytest.warns(UserWarning, match="norm_infer: an autograd kernel was not registered"):
        program(x).sum().backward()


@pytest.mark.parametrize("layer", LAYERS)
def test_script_is_refused(layer):
    with pytest.raises((RuntimeError, torch.jit.frontend.FrontendError)):
        torch.jit.script(build(layer, nn))


@torch.library.custom_op("fastattn_test::copy", mutates_args=())
def copy_with_an_option(x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
    return x.clone()


@copy_with_an_option.register_fake
def _(x, y):
    return torch.empty_like(x)


class CopyWithoutTheOption(torch.nn.Module):
    def forward(self, x):
        return copy_with_an_option(x, None)


def test_draft_export_is_refused_by_a_check_of_torch():
    """The check takes an optional tensor that is not given for a changed one, in every operator outside PyTorch."""

    def refuses(module):
        try:
            torch.export.draft_export(module, (torch.randn(N, L, E),))
        except RuntimeError as error:
            assert "does not mutate the argument" in str(error)  # noqa: PT017  torch may repair it
            return True
        return False

    refused = refuses(CopyWithoutTheOption())
    for layer in ("LayerNorm", "TransformerEncoderLayer"):
        assert refuses(build(layer, nn)) == refused
        with fastattn.use_backend("reference"):
            assert not refuses(build(layer, nn))


def test_tracing_warns_of_nothing():
    for layer in LAYERS:
        with warnings.catch_warnings(record=True) as caught:
            torch.jit.trace(build(layer, nn), inputs_of(layer))
        assert not [w.message for w in caught if issubclass(w.category, torch.jit.TracerWarning)]


# ---- derivatives ----


@tool()
def per_sample_gradients(module, inputs):
    def loss(parameters, *inputs):
        return first(torch.func.functional_call(module, parameters, tuple(x[None] for x in inputs))).square().sum()

    parameters = {name: p.detach() for name, p in module.named_parameters()}
    dims = (None,) + (0,) * len(inputs)
    return list(torch.func.vmap(torch.func.grad(loss), in_dims=dims)(parameters, *inputs).values())


@tool()
def ensemble(module, inputs):
    parameters, buffers = torch.func.stack_module_state([copy.deepcopy(module) for _ in range(2)])
    skeleton = copy.deepcopy(module).to("meta")

    def function(parameters, buffers, *inputs):
        return first(torch.func.functional_call(skeleton, (parameters, buffers), inputs))

    dims = (0, 0) + (None,) * len(inputs)
    return [torch.func.vmap(function, in_dims=dims)(parameters, buffers, *inputs).detach()]


@tool()
def jacrev(module, inputs):
    return [torch.func.jacrev(lambda x: first(module(x, *inputs[1:])).sum((0, 1)))(inputs[0])]


@tool()
def functionalize(module, inputs):
    return [torch.func.functionalize(lambda *inputs: first(module(*inputs)))(*inputs).detach()]


@tool()
def batched_gradients(module, inputs):
    out = first(module(*inputs))
    grads = torch.stack([torch.ones_like(out), out.detach()])
    return list(torch.autograd.grad(out, list(module.parameters()), grads, is_grads_batched=True, allow_unused=True))


@tool()
def double_backward(module, inputs):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # torch's flash kernels have none
        leaves = [x.clone().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(first(module(*leaves)).square().sum(), leaves, create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        return list(torch.autograd.grad(total, list(module.parameters()), allow_unused=True))


# ---- hooks and patches ----


def without_out_proj(names):
    """torch.nn never calls out_proj, ours always does (docs/torch-nn.md)."""
    return " ".join(name for name in names if not name.endswith(("out_proj", "NonDynamicallyQuantizableLinear")))


@tool(kind=["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
def hooks_on_all_modules(module, inputs, kind):
    seen = []
    for name, child in module.named_modules():
        getattr(child, f"register_{kind}")(lambda *args, name=name: seen.append(name))
    results = trained(module, inputs)
    return [without_out_proj(seen), *results]


@tool()
def hooks_for_all_modules(module, inputs):
    seen = []

    def note(module, *args):
        seen.append(type(module).__name__)

    handles = [
        module_hooks.register_module_forward_hook(note),
        module_hooks.register_module_forward_pre_hook(note),
        module_hooks.register_module_full_backward_hook(note),
    ]
    try:
        results = trained(module, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [without_out_proj(seen), *results]


@contextlib.contextmanager
def replaced(owner, name, make):
    original = getattr(owner, name)
    setattr(owner, name, make(original))
    try:
        yield
    finally:
        setattr(owner, name, original)


def doubled(function):
    def double(*args, **kwargs):
        out = function(*args, **kwargs)
        return (out[0] * 2, *out[1:]) if isinstance(out, tuple) else out * 2

    return double


PATCHES = [
    "LayerNorm.forward", "RMSNorm.forward", "Dropout.forward", "GELU.forward", "MultiheadAttention.forward",
    "TransformerEncoderLayer.forward", "TransformerEncoderLayer._sa_block", "TransformerEncoderLayer._ff_block",
    "TransformerDecoderLayer.forward", "TransformerDecoderLayer._mha_block", "TransformerEncoder.forward",
    "TransformerDecoder.forward", "functional.layer_norm", "functional.rms_norm", "functional.linear",
    "functional.dropout", "functional.scaled_dot_product_attention", "functional.multi_head_attention_forward",
]  # fmt: skip


@tool(path=PATCHES)
def patch_of_torch_nn(module, inputs, path):
    owner, name = path.split(".")
    with replaced(getattr(torch.nn, owner), name, doubled):
        return trained(module, inputs)


@tool()
def patch_of_every_call(module, inputs):
    seen = []

    def noting(call):
        def noted(self, *args, **kwargs):
            seen.append(type(self).__name__)
            return call(self, *args, **kwargs)

        return noted

    with replaced(torch.nn.Module, "__call__", noting):
        results = trained(module, inputs)
    return [without_out_proj(seen), *results]


@tool()
def patch_of_the_forward_of_an_object(module, inputs):
    for child in module.modules():
        if isinstance(child, torch.nn.LayerNorm | torch.nn.Dropout):
            child.forward = doubled(child.forward)
    return trained(module, inputs)


@tool()
def gradient_hooks(module, inputs):
    counts = []
    parameters = list(module.parameters())
    register_multi_grad_hook(parameters, lambda grads: counts.append(sum(grad is not None for grad in grads)))
    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(lambda p: counts.append(p.grad.numel()))
    first(module(*inputs)).sum().backward()
    return [str(sorted(counts)), *(p.grad for p in parameters)]


@tool()
def function_and_dispatch_modes(module, inputs):
    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Functions(), Operators(), torch.device("cpu"):
        return trained(module, inputs)


@tool()
def module_tracker(module, inputs):
    seen = []
    with ModuleTracker() as tracker:
        for name, child in module.named_modules():
            if not name.endswith("out_proj"):
                child.register_forward_hook(lambda *args: seen.append(str(sorted(tracker.parents))))
        first(module(*inputs)).sum().backward()
    return [" ".join(seen)]


# ---- parameters ----


class Double(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def weights(module):
    return [
        (child, name)
        for child in list(module.modules())
        for name, _ in list(child.named_parameters(recurse=False))
        if "bias" not in name
    ]


@tool()
def parametrizations(module, inputs):
    for child, name in weights(module):
        parametrize.register_parametrization(child, name, Double())
    return trained(module, inputs)


@tool()
def weight_norm(module, inputs):
    for child in list(module.modules()):
        if isinstance(child, torch.nn.Linear):
            torch.nn.utils.weight_norm(child)
    return trained(module, inputs)


@tool()
def pruning(module, inputs):
    for child, name in weights(module):
        prune.l1_unstructured(child, name, 0.3)
    return trained(module, inputs)


@tool()
def swap_tensors(module, inputs):
    module(*inputs)
    for parameter in module.parameters():
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(parameter.detach() * 2))
    return trained(module, inputs)


@tool()
def load_state_dict_by_swapping(module, inputs):
    module(*inputs)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.load_state_dict({name: 2 * value for name, value in module.state_dict().items()})
        module.double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return trained(module, inputs)


@tool()
def load_state_dict_by_assigning(module, inputs):
    state = {name: value.clone() for name, value in module.state_dict().items()}
    module = copy.deepcopy(module).to("meta")
    module.load_state_dict(state, assign=True)
    return trained(module, inputs)


@tool()
def load_state_dict_that_does_not_fit(module, inputs):
    state = module.state_dict()
    state.pop(next(iter(state)))
    state["unknown"] = torch.ones(1)
    with pytest.raises(RuntimeError) as error:
        module.load_state_dict(state)
    return [str(module.load_state_dict(state, strict=False)), str(error.value)]


@tool()
def state_dict_hooks(module, inputs):
    seen = []
    for child in module.modules():
        child.register_state_dict_pre_hook(lambda module, prefix, keep_vars: seen.append(prefix))
        child.register_load_state_dict_post_hook(lambda module, keys: seen.append(type(module).__name__))
    module.load_state_dict(module.state_dict())
    return [" ".join(seen)]


@tool()
def copies(module, inputs):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    twins = (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), copy.copy(module), loaded)
    return [value for twin in twins for value in trained(twin, inputs)]


@tool()
def weights_only_file(module, inputs):
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    module.load_state_dict(torch.load(file, weights_only=True))
    module.share_memory()
    return [str(all(p.is_shared() for p in module.parameters())), *trained(module, inputs)]


@tool()
def names(module, inputs):
    seen = []
    module.apply(lambda child: seen.append(type(child).__name__))
    parameters, modules = ([name for name, _ in found] for found in (module.named_parameters(), module.named_modules()))
    return [" ".join([*seen, *parameters, *modules, *module.state_dict()]), repr(module)]


@tool()
def casts_and_empty_ones(module, inputs):
    results = trained(module.double(), [x.double() for x in inputs])
    results += [str(first(module.bfloat16()(*(x.bfloat16() for x in inputs))).dtype)]
    state = module.float().state_dict()
    empty = copy.deepcopy(module).to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    return [*results, *trained(empty, inputs)]


@tool()
def frozen_parameters(module, inputs):
    module.requires_grad_(False)
    last = list(module.parameters())[-1].requires_grad_()
    return list(torch.autograd.grad(first(module(*inputs)).square().sum(), last))


@tool()
def views_of_one_flat_parameter(module, inputs):
    flat = torch.cat([p.detach().flatten() for p in module.parameters()]).requires_grad_()
    parts = flat.split([p.numel() for p in module.parameters()])
    views = {n: part.view(p.shape) for part, (n, p) in zip(parts, module.named_parameters(), strict=True)}
    out = first(torch.func.functional_call(module, views, tuple(inputs)))
    return list(torch.autograd.grad(out.square().sum(), flat))


@tool()
def averaged_model(module, inputs):
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    return trained(average.module, inputs)


@tool()
def dynamic_quantisation(module, inputs):
    quantised = torch.ao.quantization.quantize_dynamic(module.eval(), {torch.nn.Linear}, torch.qint8)
    kinds = " ".join(type(child).__module__ for child in quantised.modules()).replace("fastattn.nn", "torch.nn")
    return [str(kinds.count("torch.ao")), first(quantised(*inputs)).detach()]


# ---- training ----


@tool(use_reentrant=[False, True])
def checkpointing(module, inputs, use_reentrant):
    leaves = [x.clone().requires_grad_() for x in inputs]
    first(checkpoint(module, *leaves, use_reentrant=use_reentrant)).square().sum().backward()
    return [t.grad for t in (*leaves, *module.parameters())]


@tool()
def selective_checkpointing(module, inputs):
    def policy(context, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if "mm" in str(operator) else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return trained(
        module, inputs, lambda *leaves: checkpoint(module, *leaves, use_reentrant=False, context_fn=contexts)
    )


@tool()
def inference_mode_before_training(module, inputs):
    with torch.inference_mode():
        out = first(module.eval()(*inputs)).clone()
    return [out, *trained(module.train(), inputs)]


@tool()
def detect_anomaly(module, inputs):
    with torch.autograd.detect_anomaly(check_nan=True):
        return trained(module, inputs)


@tool()
def saved_on_cpu(module, inputs):
    with save_on_cpu(), torch.autograd.set_multithreading_enabled(False):
        return trained(module, inputs)


@tool()
def saved_as_copies(module, inputs):
    with saved_tensors_hooks(lambda t: (t.clone(),), operator.itemgetter(0)):
        return trained(module, inputs)


@tool()
def grad_scaler(module, inputs):
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=64.0), torch.optim.SGD(module.parameters(), 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = first(module(*inputs)).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return [p.detach() for p in module.parameters()]


# ---- tensors that are not real ----


@tool()
def fake_tensors(module, inputs):
    with torch._subclasses.FakeTensorMode() as mode:
        parameters = {name: mode.from_tensor(p) for name, p in module.named_parameters()}
        fakes = tuple(mode.from_tensor(x) for x in inputs)
        out = first(torch.func.functional_call(module, parameters, fakes))
        grads = torch.autograd.grad(out.sum(), list(parameters.values()), allow_unused=True)
    return [str([(t.shape, t.dtype) for t in (out, *grads) if t is not None])]


@tool()
def meta_tensors(module, inputs):
    module = copy.deepcopy(module).to("meta")
    first(module(*(x.to("meta") for x in inputs))).sum().backward()
    return [str([(p.grad.shape, p.grad.dtype) for p in module.parameters() if p.grad is not None])]


@tool()
def tensor_subclass(module, inputs):
    class Mine(torch.Tensor):
        pass

    out = first(module(*(x.as_subclass(Mine) for x in inputs)))
    return [type(out).__name__, out.as_subclass(torch.Tensor).detach()]


def outcome(tool, name, library):
    module, inputs = build(name, library), inputs_of(name)
    torch.manual_seed(3)
    with slow_path():
        return tool(module, inputs)


def assert_same(got, expected):
    assert len(got) == len(expected)
    for found, wanted in zip(got, expected, strict=True):
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * (10 + wanted.abs().max().item()))
        else:
            assert found == wanted


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tool", TOOLS)
def test_same_outcome(tool, name):
    assert_same(outcome(TOOLS[tool], name, nn), outcome(TOOLS[tool], name, torch.nn))
