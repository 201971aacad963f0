"""Sharding of weights, gradients and optimizer state over processes (FSDP2), and gathering them again."""

from lightning_fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from fastattn.models.backbone import Backbone


def sharded_strategy(processes):
    """The Fabric strategy that shards a model over this number of processes."""
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def _shard(model, mesh):
    """Shard each block, whose weights are gathered while it runs; embeddings, norm and head belong to the root."""
    mesh = mesh["data_parallel"]
    for backbone in model.modules():
        for block in backbone.blocks if isinstance(backbone, Backbone) else ():
            fully_shard(block, mesh=mesh)
            if hasattr(block, "forward_packed"):  # called in place of forward
                register_fsdp_forward_method(block, "forward_packed")
    return fully_shard(model, mesh=mesh)


def gather(values):
    """Nested dicts and lists with full tensors instead of shards; all processes must call it."""
    if isinstance(values, DTensor):
        return values.full_tensor()
    if isinstance(values, dict):
        return {key: gather(value) for key, value in values.items()}
    return [gather(value) for value in values] if isinstance(values, list) else values


def divide(state, optimizer):
    """A gathered Optimizer.state_dict() with its tensors sharded like the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def like(parameter, value):
        if not isinstance(parameter, DTensor) or getattr(value, "shape", None) != parameter.shape:
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    divided = {
        number: {name: like(parameters[number], value) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": divided}
