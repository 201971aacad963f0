"""PyTorch's tools treat our layers like those of torch.nn: each tool runs on both, and the outcomes are compared.

The tools of export and traces are in test_tools_records.py, hooks and patches in test_tools_hooks.py.
"""

import copy
import functools
import io
import operator
import pickle
import tempfile

import pytest
import torch
import torch.distributed.checkpoint
from tool_cases import LAYERS, Tools, assert_same_outcome, first, trained, weights
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.utils import parametrize, prune
from torch.utils._debug_mode import DebugMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastattn import nn

pytestmark = pytest.mark.filterwarnings("ignore")  # deprecation warnings of the tools themselves

TOOLS = Tools()
tool = TOOLS.add


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
def gradients_under_vmap(module, inputs):
    out, parameters = first(module(*inputs)), [p for p in module.parameters() if p.requires_grad]
    grads = torch.stack([torch.ones_like(out), out.detach()])
    return list(torch.func.vmap(lambda dy: torch.autograd.grad(out, parameters, dy, retain_graph=True))(grads))


@tool()
def double_backward(module, inputs):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # torch's flash kernels have none
        leaves = [x.clone().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(first(module(*leaves)).square().sum(), leaves, create_graph=True)
        total = sum(grad.square().sum() for grad in grads)
        return list(torch.autograd.grad(total, list(module.parameters()), allow_unused=True))


# ---- parameters ----


class Double(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


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
def spectral_norm(module, inputs):
    for child in list(module.modules()):
        if isinstance(child, torch.nn.Linear):
            torch.nn.utils.parametrizations.spectral_norm(child)
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
def distributed_checkpoint(module, inputs):
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.checkpoint.save(module.state_dict(), checkpoint_id=folder)
        state = {name: torch.zeros_like(value) for name, value in module.state_dict().items()}
        torch.distributed.checkpoint.load(state, checkpoint_id=folder)
    module.load_state_dict(state)
    return [*state, *trained(module, inputs)]


@tool()
def plain_attributes_instead_of_parameters(module, inputs):
    """As some tools for merged or offloaded weights leave them."""
    for child in module.modules():
        for name in list(child._parameters):
            value = child._parameters.pop(name)
            setattr(child, name, None if value is None else value.detach().clone())
    return trained(module, inputs)


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


def test_static_quantisation_does_not_find_our_classes():
    """It stays in float where torch.nn's is converted, and the quantised input is refused."""
    quantization, x = torch.ao.quantization, torch.randn(2, 5, 16)
    for library, works in ((torch.nn, True), (nn, False)):
        for layer, inputs in ((library.LayerNorm(16), [x]), (library.MultiheadAttention(16, 2), [x] * 3)):
            model = quantization.QuantWrapper(layer.eval())
            model.qconfig = quantization.get_default_qconfig("fbgemm")
            observed = quantization.prepare(model.eval())
            observed.quant(x)
            observed.module(*inputs)
            converted = quantization.convert(observed)
            assert (type(converted.module).__module__.startswith("torch.ao")) == works
            if not works:
                quantised = [torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)] * len(inputs)
                with pytest.raises((TypeError, RuntimeError)):
                    converted.module(*quantised)


# ---- training ----


@tool()
def profiler(module, inputs):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, with_flops=True):
        return trained(module, inputs)


@tool()
def debug_mode(module, inputs):
    with DebugMode():
        return trained(module, inputs)


@tool()
def gradients_of_some_inputs(module, inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    first(module(*leaves)).square().sum().backward(inputs=leaves[:1])
    return [leaves[0].grad, *(p.grad for p in module.parameters() if p.grad is not None)]


@tool()
def distributed_data_parallel(module, inputs):
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    group = torch.distributed.group.WORLD  # if it died with the replica, its threads could wait for the GIL forever
    try:
        replica = torch.nn.parallel.DistributedDataParallel(module, find_unused_parameters=True)
        first(replica(*inputs)).square().sum().backward()
        del replica
    finally:
        torch.distributed.destroy_process_group(group)
    return [p.grad for p in module.parameters()]


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


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tool", TOOLS)
def test_same_outcome(tool, name):
    assert_same_outcome(TOOLS[tool], name)
