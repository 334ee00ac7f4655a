"""Several processes as one: ranks, collectives, DDP, FSDP, and state dicts of sharded models.

torchrun sets RANK and WORLD_SIZE. Without it there is one process, rank 0 of 1, and the collectives do nothing.
"""

import contextlib
import copy
import datetime
import functools
import os
import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import common
from common import UserError, first_line


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def launch_command():
    """Return the command that started this process, up to the name of the program, without rendezvous options."""
    if world_size() == 1:
        return "python"
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = f"--nnodes={world_size() // per_node} " if per_node < world_size() else ""
    return f"torchrun {nodes}--nproc_per_node={per_node}"


def init_distributed(device, timeout):
    """Join torchrun's process group, if there is one, and return this rank's device. Silence all ranks except rank 0.

    timeout: seconds that a rank waits for the others within a training step before the run ends.
    """
    if world_size() == 1:
        return device
    if device.type == "cuda":
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > gpus:
            raise UserError(f"{processes} processes on a machine with {gpus} GPUs; start torchrun with fewer")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"device = '{device.type}': supports one process only; start it without torchrun")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    except ValueError as error:  # one of torchrun's variables is not set
        raise UserError(f"WORLD_SIZE is {world_size()}, but {first_line(error)}; start it with torchrun") from None
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def cleanup_distributed():
    """Wait for all ranks, because one that ends early looks like a crash, then destroy the process group."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def slow_group():
    """Return a group without a practical timeout, for waits outside the training step, such as saving a large model."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def barrier():
    """Wait until every rank has called this."""
    if world_size() > 1:
        dist.barrier(slow_group())


def gather(value):
    """Return a list of every rank's value, in rank order."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, slow_group())
    return values


def call_on_rank_0(function):
    """Call a function on rank 0 and return its value on every rank. A UserError is raised on every rank too."""
    value = None
    if rank() == 0:
        try:
            value = function()
        except UserError as error:
            value = error
    values = [value]
    if world_size() > 1:
        dist.broadcast_object_list(values, 0, slow_group())
    if isinstance(values[0], UserError):
        raise values[0]
    return values[0]


def sum_over_ranks(tensor):
    """Sum a tensor over all ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def concat_over_ranks(tensor):
    """Concatenate the ranks' tensors, all of one shape, along the first dimension."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def check_same_on_all_ranks(**values):
    """Raise UserError on every rank if a value differs from rank 0's."""
    by_rank = gather(values)
    for rank_number, others in enumerate(by_rank):
        differences = [f"{key} is {value!r} on rank 0, {others[key]!r} on rank {rank_number}"
                       for key, value in by_rank[0].items() if value != others[key]]  # fmt: skip
        if differences:
            raise UserError(f"all processes of a run need the same settings and files: {'; '.join(differences)}")


def save_on_rank_0(path, kind, **content):
    """Write a checkpoint on rank 0 while the others wait. Every rank must call this."""
    if rank() == 0:
        common.save_checkpoint(path, kind, **content)
    barrier()


# ---------------------------------------------------------------------------------------------------- DDP and FSDP


def replicate(model, device):
    """Wrap the model in DDP: every rank has all weights, and averages gradients while backward still runs.

    `find_unused_parameters` keeps DDP's first grouping of gradients into buckets. Otherwise DDP regroups after one
    step, which is another step in a resumed run, and with more than two ranks sums would round differently.
    """
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=True, forward_sync_buffers=False
    )


def shard(model, device, dtype, reshard_blocks, reshard_rest=False, *, broadcast):
    """Shard the model by FSDP2: each block's weights, then the rest, are split over the ranks and gathered for use.

    Blocks are gathered in `dtype`. Gradients are reduced in float32, and the optimizer's weights are float32 too.
    reshard_blocks, reshard_rest: free gathered weights right after the forward pass, instead of after the backward.
    broadcast: rank 0 sends its weights to the others, whose model may be on "meta". Otherwise weights stay unset.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # a slow import

    is_meta = next(model.parameters()).is_meta
    weights = {} if is_meta else model.state_dict()
    mesh = dist.init_device_mesh(device.type, (world_size(),))
    for block in model.blocks:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_blocks)
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_rest)
    if is_meta:
        model.to_empty(device=device)
    if broadcast:
        set_state(model, weights)


def is_sharded(model):
    return hasattr(next(model.parameters()), "full_tensor")


def full_tensor(tensor):
    """Gather a tensor that FSDP has sharded. Every rank must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def no_sync(net, is_last):
    """Return the context for one micro-batch: DDP averages gradients only after the last one."""
    return contextlib.nullcontext() if is_last or not isinstance(net, DistributedDataParallel) else net.no_sync()


def get_state(model, optimizer=None):
    """Return ({name: weight}, {parameter name: optimizer state}), the same for any number of ranks.

    Of a sharded model, the tensors are full and on the CPU of rank 0. Every rank must call this.
    """
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizer or [], options=options)
        return weights, state.get("state", {})
    names = {parameter: name for name, parameter in model.named_parameters()}
    return model.state_dict(), {names[p]: state for p, state in optimizer.state.items()} if optimizer else {}


def set_state(model, weights, optimizer=None, state=None):
    """Load what `get_state` returned. The optimizer keeps its settings, such as weight decay.

    Of a sharded model, only rank 0 needs the full tensors: it sends each rank its shard, weight by weight.
    """
    if is_sharded(model):
        from torch.distributed.checkpoint import state_dict as dcp

        options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        dcp.set_model_state_dict(model, dict(weights), options=options)  # dict(): torch changes its argument
        if optimizer:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            state = {name: state.get(name) or dict(step=torch.zeros(()), exp_avg=torch.zeros(p.shape),
                                                   exp_avg_sq=torch.zeros(p.shape))
                     for name, p in trained.items()}  # fmt: skip
            groups = dcp.get_optimizer_state_dict(model, optimizer)["param_groups"]
            dcp.set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)
        return
    model.load_state_dict(weights)
    if optimizer:
        names = {parameter: name for name, parameter in model.named_parameters()}
        order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        by_number = {number: copy.deepcopy(state[name]) for number, name in enumerate(order) if name in state}
        optimizer.load_state_dict({**optimizer.state_dict(), "state": by_number})
