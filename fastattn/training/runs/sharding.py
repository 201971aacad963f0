"""Weights, gradients and optimizer state divided among processes (FSDP2): to shards, and back to whole tensors."""

from lightning_fabric.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from fastattn.models.backbone import Backbone


def sharded_strategy(processes):
    """The Fabric strategy that divides a model among so many processes."""
    return ModelParallelStrategy(_shard, data_parallel_size=processes, tensor_parallel_size=1)


def _shard(model, mesh):
    """A block's weights are whole while it runs and sharded otherwise; embeddings, norm and head are the root's."""
    mesh = mesh["data_parallel"]
    for backbone in model.modules():
        for block in backbone.blocks if isinstance(backbone, Backbone) else ():
            fully_shard(block, mesh=mesh)
            if hasattr(block, "forward_packed"):  # called in place of forward
                register_fsdp_forward_method(block, "forward_packed")
    return fully_shard(model, mesh=mesh)


def gather(values):
    """Nested dictionaries and lists with whole tensors in place of shards; all processes must call it."""
    if isinstance(values, DTensor):
        return values.full_tensor()
    if isinstance(values, dict):
        return {key: gather(value) for key, value in values.items()}
    return [gather(value) for value in values] if isinstance(values, list) else values


def divide(state, optimizer):
    """What Optimizer.state_dict() returned when it was gathered, with tensors sharded as the parameters are now."""
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
