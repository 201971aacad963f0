"""Tools that record a module, such as export and traces, treat our layers like those of torch.nn."""

import io
import warnings

import pytest
import torch
from nn_oracle import slow_path
from tool_cases import (
    FF,
    LAYERS,
    E,
    H,
    L,
    N,
    Tools,
    assert_same,
    assert_same_outcome,
    build,
    first,
    inputs_of,
    smaller,
    trained,
)
from torch._dynamo import compiled_autograd
from torch.fx.experimental.proxy_tensor import make_fx

import fastattn
from fastattn import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecation warnings of the tools themselves

TOOLS, RECORDERS = Tools(), {}
tool = TOOLS.add


def recorder(*layers):
    """Register a function that records layers (only some, if it is slow) and trains the record on other sizes."""

    def register(function):
        RECORDERS.update({(function.__name__, layer): function for layer in layers or LAYERS})
        return function

    return register


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


@tool()
def quantisation_by_fx(module, inputs):
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig, quantize_fx

    torch.manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Linear(E, E), hold(module, len(inputs))).eval()
    if len(inputs) > 1:
        model = model[1]
    prepared = quantize_fx.prepare_fx(model, QConfigMapping().set_global(default_dynamic_qconfig), tuple(inputs))
    converted = quantize_fx.convert_fx(prepared)
    kinds = sorted({type(child).__name__ for child in converted.modules()})
    return [str(kinds), first(converted(*inputs)).detach()]


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


NAMES_OF_INPUTS = {"MultiheadAttention": ("query", "key", "value"), "Transformer": ("src", "tgt")} | {
    "TransformerEncoderLayer": ("src",), "TransformerDecoderLayer": ("tgt", "memory"),
}  # fmt: skip


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


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tool", TOOLS)
def test_same_outcome(tool, name):
    assert_same_outcome(TOOLS[tool], name)
