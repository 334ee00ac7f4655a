"""What all programs here share: errors of one line, the device, the ranks of a run, checkpoints on disk.

Without torchrun there is one process, rank 0 of 1, and the functions for several do nothing.
"""

import contextlib
import copy
import ctypes
import datetime
import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

# Read as torch is imported: a thread that waits sleeps soon, as others may need its core (docs/training.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import filelock
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

CHECKPOINT_FORMAT = 3
HELD = []  # locks, which would be released if nothing referred to them


class UserError(ValueError):
    """Bad input. The message is one line that says what was wrong, where, and what to do."""

    def __str__(self):  # nothing that was typed or read may break the line or steer a terminal
        text = super().__str__()
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def first_line(error):
    """What an exception says, on one line of at most 100 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def run(main, when_memory_is_out=lambda: "ask for less at once"):
    """Calls a program's main. Bad input ends it with one line and status 2, ctrl-C with status 130.

    when_memory_is_out: gives the end of that line for want of memory: what takes how much, and what to do.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where it was closed
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack letters, and file names be no UTF-8
    try:
        return main()
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        message, status = "", 1
    except UserError as error:
        message, status = f"error: {error}", 2
    except OSError as error:  # a full disk, a folder that may not be written ...
        message, status = f"error: {error.filename or 'a file'}: {error.strerror or first_line(error)}", 2
    except (MemoryError, RuntimeError) as error:
        said = ("allocate memory", "out of memory", "ALLOC_FAILED")  # a CPU's, CUDA's and cuBLAS's other errors
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(x in str(error) for x in said):
            raise
        asked = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        what = asked[0].lower() if asked else first_line(error)
        message, status = f"error: out of memory ({what}); {when_memory_is_out()}", 2
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(3)  # a mistake that all ranks find is printed once: rank 0 ends, and torchrun then ends the others
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if world_size() > 1:
        os._exit(status)  # to leave a group in good order is to wait for it
    sys.exit(status)


def write_file(path, content):
    """Writes under a temporary name, syncs and renames: `path` holds all of it, or what it held before.

    content: bytes, or a function that writes to the open file it is given. Raises UserError if it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns some errors of the disk into its own
        with contextlib.suppress(OSError):
            temporary.unlink()
        why = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"{path}: cannot be written ({why}); make room, or choose another folder") from None


def write_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_file(path, text.encode(errors="backslashreplace"))  # names of files need not be UTF-8; JSON escapes the same


def size_and_mtime(path):
    """By which a file is taken for the same; None where there is none, as where a link leads nowhere."""
    try:
        about = os.stat(path)
        return about.st_size, about.st_mtime_ns
    except OSError:
        return None


def drop_output(stream):
    """Has what is written to it from now on go nowhere, as whoever read it has gone."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), stream.fileno())


def git(*command):
    """What git says of this code; nothing where there is no git."""
    try:
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True,
                              errors="replace").stdout  # fmt: skip
    except OSError:
        return ""


def lock(folder):
    """Holds a folder until this process ends; raises UserError if another process holds it."""
    HELD.append(filelock.FileLock(Path(folder, ".lock")))
    try:
        HELD[-1].acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{folder}: another run is under way there; wait for it, or choose another --out") from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass


# -------------------------------------------------------------------------------------------------------- device


def pick_device(name="auto", dtype="auto"):
    """(device, dtype to compute in). 'auto' is the accelerator, if any, and bfloat16 where the hardware has it.

    For a GPU it also sets the switches of torch that suit these models.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    known = [accelerator.type, "cpu"] if accelerator else ["cpu"]
    name = known[0] if name == "auto" else name
    if name not in known:
        raise UserError(f"device = '{name}': not on this machine; there is {', '.join(known)}")
    if name == "cuda":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before the first tensor there
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cuda.enable_cudnn_sdp(False)  # on H100: NaN gradients under some masks (pytorch issue 196678)
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(name) else "float32"
    if dtype == "bfloat16" and name == "cuda" and not has_fast_bfloat16(name):
        raise UserError("dtype = 'bfloat16': this GPU would only emulate it; take --dtype=float16, or auto")
    return torch.device(name), getattr(torch, dtype)


def describe_device(device, dtype):
    """How a program computes, in words: 'cpu (2 threads) in bfloat16'."""
    n = torch.get_num_threads()
    threads = f" ({n} thread{'s' * (n > 1)})" if device.type == "cpu" else ""
    return f"{device.type}{threads} in {str(dtype).removeprefix('torch.')}"


def keep_freed_memory():
    """Has the C library keep what is freed. Else the system takes it, and clears new pages for it, at each step."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor has pages of its own, which its end would give back
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor does the heap


def has_fast_bfloat16(device_type):
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities() if device_type == "cpu" else {}
    return cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


def has_compiler(device):
    """Whether torch.compile can make code for this device."""
    if device.type == "cuda":
        return bool(importlib.util.find_spec("triton")) and any(map(shutil.which, ("gcc", "clang", "cc")))
    return any(map(shutil.which, ("g++", "clang++", "cl")))


def prepare_to_compile(device):
    """Sets torch.compile's limits; raises UserError where it could not make code for this device."""
    if not has_compiler(device):
        raise UserError("compile: needs g++ or clang++, and triton on a GPU; install them, or do without: train.py"
                        " --compile=never")  # fmt: skip
    torch._dynamo.config.recompile_limit = 64  # code that all blocks share: lengths of captions, groups, frozen parts
    torch._dynamo.config.optimize_ddp = False  # else DDP splits each block into several graphs


def compile_blocks(model, device):
    """Has each block compiled at its first use; FSDP's hooks stay outside."""
    prepare_to_compile(device)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)


# Dense bfloat16 and float16 matrix products, 1e12 operations a second, by the maker's data sheets.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312,
               "L40S": 362, "L40": 181}  # fmt: skip


def peak_flops(device, dtype):
    """Floating-point operations that the device could do in a second, or None where that is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


# --------------------------------------------------------------------------------------------------------- ranks


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def launcher():
    """The command that started this process, up to the name of the program."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    nodes = f"--nnodes={world_size() // here} (and the rendezvous, on each node) " if here < world_size() else ""
    return f"torchrun {nodes}--nproc_per_node={here}" if world_size() > 1 else "python"


def join(device, timeout):
    """Joins torchrun's process group, if there is one; returns this rank's device. Only rank 0 prints from here on.

    timeout: seconds that a rank waits for the others within a step before the run ends.
    """
    if world_size() == 1:
        return device
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if local > there:
            raise UserError(f"{local} processes on a machine with {there} GPUs; start torchrun with fewer")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"device = '{device.type}': trains in one process; start it without torchrun")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout))
    except ValueError as error:  # a variable of torchrun's is not set
        raise UserError(f"WORLD_SIZE is {world_size()}, but {first_line(error)}; start it by torchrun") from None
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def leave():
    """Every rank must call it: a rank that ends before rank 0 has saved would look like one that has died."""
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


@functools.cache
def patient_group():
    """For waits outside the training step, of any length: while rank 0 saves a large model, say, or draws pictures."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def barrier():
    """Waits until every rank is here."""
    if world_size() > 1:
        dist.barrier(patient_group())


def gather(value):
    """Every rank's value, in a list by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, patient_group())
    return values


def sum_over_ranks(tensor):
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def concat_over_ranks(tensor):
    """The ranks' tensors, of one shape, one after another along the first dimension."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.cat(parts)


def refuse_differences(**mine):
    """Raises UserError on every rank if a value that is given differs from rank 0's."""
    first, *others = gather(mine)
    for other, theirs in enumerate(others, 1):
        differ = [f"{key} is {first[key]!r} on rank 0, {theirs[key]!r} on rank {other}"
                  for key in first if first[key] != theirs[key]]  # fmt: skip
        if differ:
            raise UserError(f"the processes of one run need the same settings: {'; '.join(differ)}")


# ------------------------------------------------------------------------------------------------ a model on many


def replicate(model, device):
    """DDP: every rank has all weights; gradients are averaged while the backward pass still runs.

    With `find_unused_parameters` DDP keeps its first grouping of the gradients. Otherwise a resumed run would regroup
    later than one that was never stopped, and on more than two ranks another grouping adds up in another order.
    """
    ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=True, forward_sync_buffers=False
    )


def shard(model, device, dtype, reshard_blocks, reshard_rest=False, *, broadcast):
    """FSDP2: each block's weights, then the rest, are spread over the ranks and gathered where they are used.

    Blocks are gathered in `dtype`; gradients are summed in float32, and the optimizer's weights are float32 too.
    reshard_blocks, reshard_rest: whether they are spread again right after the forward pass, not after the backward.
    broadcast: rank 0 sends its weights to the others, which need have none (a model on "meta"); else they are not set.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import, so only where it is needed

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


def whole(tensor):
    """A tensor put together again if FSDP has spread it; every rank must call this at the same time."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def without_sync(net, last):
    """The context for a micro-batch: DDP averages the gradients after the last one only."""
    return contextlib.nullcontext() if last or not isinstance(net, DistributedDataParallel) else net.no_sync()


def get_state(model, optimizer=None):
    """-> ({name: weight}, {parameter name: its optimizer state}), the same for any number of ranks.

    Of a sharded model the tensors are whole and on the CPU of rank 0, and every rank must call it.
    """
    if is_sharded(model):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights, state = get_state_dict(model, optimizer or [], options=options)
        return weights, state.get("state", {})
    names = {parameter: name for name, parameter in model.named_parameters()}
    return model.state_dict(), {names[p]: state for p, state in optimizer.state.items()} if optimizer else {}


def set_state(model, weights, optimizer=None, state=None):
    """Undoes `get_state`. The optimizer keeps its settings.

    Of a sharded model rank 0 alone need be given the whole: it sends each rank its share, weight by weight.
    """
    if is_sharded(model):
        from torch.distributed.checkpoint import state_dict as dcp

        options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        dcp.set_model_state_dict(model, dict(weights), options=options)  # it changes what it is given
        if optimizer:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}  # `freeze` may have changed
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


# --------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, kind, **state):
    """Rank 0 writes it, and the others wait: every rank must call it. It is whole, or what was there before stays.

    kind: 'last', to resume from, or 'best', for use. Raises UserError if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        if rank() == 0:
            with open(temporary, "wb") as file:
                torch.save({"nanomusicgen": CHECKPOINT_FORMAT, "kind": kind, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save turns some errors of the disk into its own
        size = temporary.stat().st_size if temporary.is_file() else 0
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        temporary.unlink(missing_ok=True)
        before = "the one before it is whole" if path.exists() else "there is none before it"
        raise UserError(
            f"{path}: cannot be written ({first_line(error)}, {size:,} bytes were, {free:,} are free);"
            f" make room and start again; {before}"
        ) from None
    barrier()


def load_checkpoint(path, kinds=("last", "best")):
    """The dict that `save_checkpoint` wrote; raises UserError for a file that is missing, broken or not ours."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train one with: python train.py config/demo.py")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise UserError(f"{path}: may not be read; change its permissions") from None
    except Exception as error:
        raise UserError(f"{path}: truncated, or not a checkpoint ({first_line(error)}); use another one") from None
    if not isinstance(saved, dict) or "nanomusicgen" not in saved:
        raise UserError(f"{path}: not a checkpoint of nanoMusicGen; give the best.pt of a run")
    if saved["nanomusicgen"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: format {saved['nanomusicgen']}, and this code reads {CHECKPOINT_FORMAT}; train it again"
        )
    if saved.get("kind") not in kinds:
        raise UserError(f"{path}: is a '{saved.get('kind')}' checkpoint, and '{kinds[0]}' is needed; try {kinds[0]}.pt")
    return saved
