"""What torchrun's processes share: a process group, sharded or replicated weights, whole state dicts, a watchdog.

Without torchrun there is one process, rank 0 of 1, and every function here does next to nothing.
"""

import contextlib
import datetime
import functools
import inspect
import os
import sys
import threading
import time
import zlib

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from config import UserError

SIGN_OF_LIFE = 10  # seconds after which a rank that gives none is named


def rank():
    return int(os.environ.get("RANK", 0))


def size():
    return int(os.environ.get("WORLD_SIZE", 1))


def launcher():
    """The command that started this process, up to the name of the program."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size()))
    nodes = f"--nnodes={size() // here} (and the rendezvous, on each node) " if here < size() else ""
    return f"torchrun {nodes}--nproc_per_node={here}" if size() > 1 else "python"


def connect():
    """A new connection to the key-value store of this launch, which torchrun hosts, or else rank 0."""
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(f"WORLD_SIZE is {size()}, yet {', '.join(missing)} not set; use torchrun, or unset WORLD_SIZE")
    host = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=host, wait_for_workers=False, multi_tenant=True)
    return dist.PrefixStore(f"nanomusicgen/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


first_store = functools.cache(connect)


def first_to_say(message, store=None):
    """Whether no other rank has said the same, so that one mistake is not printed by every process."""
    try:
        return size() == 1 or (store or first_store()).add(f"said/{zlib.crc32(message.encode())}", 1) == 1
    except (UserError, RuntimeError):  # nobody hosts the store, or not any more
        return True


def first_to_report(message):
    """As `first_to_say`, of an error that ends this rank, after which the others' lost connections are no news."""
    with contextlib.suppress(UserError, RuntimeError):
        if size() > 1:
            first_store().set("reported", message)
    return first_to_say(message)


def join(device, seconds):
    """Joins the process group, if there is one to join; returns this rank's device. Only rank 0 prints from here on.

    seconds: without progress of any rank, until the watchdog ends the run; 0: never.
    """
    if size() == 1:
        return device
    first_store()
    if seconds:
        watchdog.start(seconds)
    if device.type == "cuda":
        local, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if local > there:
            raise UserError(f"{local} processes on a machine with {there} GPUs; start torchrun with fewer")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise UserError(f"device = '{device.type}': trains in one process; start it without torchrun")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    day = datetime.timedelta(days=1)  # ending a hang is the watchdog's task
    dist.init_process_group(backend, store=first_store(), rank=rank(), world_size=size(), timeout=day)
    if seconds:
        watchdog.name_the_dead()
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return device


def leave():
    """Every rank must call it: a rank that ends before rank 0 has saved would look like one that has died."""
    beat("leaving")
    wait()
    watchdog.stop()
    if dist.is_initialized():
        dist.destroy_process_group()


def exit(status):
    """Ends this process at once if it is one of several: leaving the group in good order would wait for the others."""
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status) if size() > 1 else sys.exit(status)


def refuse_differences(**mine):
    """Raises UserError on every rank if one was started with other settings than rank 0."""
    for other, theirs in enumerate(gather(mine)):
        if other == 0:
            first = theirs
        differ = [f"{key} is {first[key]!r} on rank 0, {theirs[key]!r} on rank {other}"
                  for key in first if first[key] != theirs.get(key)]  # fmt: skip
        if differ:
            raise UserError(f"the processes of one run need the same settings: {'; '.join(differ)}")


def refuse_unshared(folder):
    """Raises UserError on every rank unless all see the same folder: only rank 0 writes there, and all read."""
    mark = gather(folder / f".rank_0_is_here_{time.time_ns()}")[0]
    if rank() == 0:
        mark.touch()
    wait()
    seen = gather(any(mark.exists() or time.sleep(1) for _ in range(10)))  # network folders may lag behind
    if rank() == 0:
        mark.unlink()
    if not all(seen):
        raise UserError(
            f"{folder}: not one folder for all: rank {seen.index(False)} does not see what rank 0 writes;"
            " choose an --out that all share"
        )


# ------------------------------------------------------------------------------------------------ communication


@contextlib.contextmanager
def waiting():
    """A rank that waits here for the others is not to blame for what holds them up."""
    watchdog.waits = True
    yield
    watchdog.waits = False


def gather(value):
    """Every rank's value, in a list by rank."""
    values = [value] * size()
    if size() > 1:
        with waiting():
            dist.all_gather_object(values, value)
    return values


def sum_over_ranks(tensor):
    if size() > 1:
        with waiting():
            dist.all_reduce(tensor)
    return tensor


def wait():
    """Until every rank is here."""
    if size() > 1:
        with waiting():
            dist.barrier()


# ------------------------------------------------------------------------------------------------ weights


def shard(model, device, dtype, reshard_blocks, reshard_rest=False):
    """FSDP2: each block's weights, then the rest, are spread over the ranks and gathered where they are used.

    Blocks are gathered in `dtype`, gradients are summed in float32, and so are the weights that the optimizer has.
    reshard_blocks, reshard_rest: whether they are spread again right after the forward pass, not after the backward.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import, so only where it is needed

    mesh = dist.init_device_mesh(device.type, (size(),))
    low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=low, reshard_after_forward=reshard_blocks)
    rest = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=rest, reshard_after_forward=reshard_rest)


def replicate(model, device):
    """DDP: every rank has all weights; gradients are averaged while the backward pass still runs.

    Without the last option DDP regroups the gradients after its first step. A run that goes on would regroup later than
    one that was never stopped, and on more than two ranks another grouping adds up in another order.
    The buffers need not be sent at each forward pass: they are the same on all ranks, see ResidualVQ.update.
    """
    ids = [device] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its older name
    return DistributedDataParallel(
        model, device_ids=ids, gradient_as_bucket_view=True, find_unused_parameters=True, **{sync: False}
    )


def without_sync(model, apart):
    """The context for micro-batches whose gradients DDP need not reduce yet. FSDP does, to keep them sharded."""
    return model.no_sync() if apart and isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def whole(tensor):
    """A tensor put together again if FSDP has spread it; every rank must call this at the same time."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def share_of(tensor, like):
    """The part of a whole tensor that this rank holds, spread as `like` is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def on_rank_0(tensors):
    """{name: tensor} as whole tensors on rank 0's CPU; empty on the others, which must call it at the same time."""
    found = {}
    for name, tensor in tensors.items():
        beat("saving")
        tensor = whole(tensor)
        if rank() == 0:
            found[name] = tensor.cpu()
    return found


def model_state(model):
    """The state dict `on_rank_0`: the same for any number of ranks and way of spreading."""
    return on_rank_0(model.state_dict())


def load_model_state(model, state):
    """Every rank has the whole `state` and takes its share."""
    shares = {}
    for name, like in model.state_dict().items():
        beat("restoring")
        shares[name] = share_of(state[name], like)
    model.load_state_dict(shares)


def optimizer_state(optimizer):
    """As `model_state`."""
    state = optimizer.state_dict()
    return {**state, "state": {i: on_rank_0(tensors) for i, tensors in state["state"].items()}}


def load_optimizer_state(optimizer, state):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    shares = {}
    for i, of in state["state"].items():
        beat("restoring")
        shares[i] = {key: share_of(value, params[i]) if value.shape == params[i].shape else value
                     for key, value in of.items()}  # fmt: skip
    optimizer.load_state_dict({**optimizer.state_dict(), "state": shares})  # settings are those of this run


# ------------------------------------------------------------------------------------------------ watchdog


class Watchdog:
    """Each rank tells the store how far it is, and ends the run if for too long no rank gets any further.

    Named are the ranks whose own watchdog has fallen silent, as they are dead or stopped; else those that are least
    far, without the ones that wait for others: the one to blame is among them.
    """

    def __init__(self):
        self.step, self.count, self.doing, self.waits = 0, 0, "starting", False
        self.running = self.explaining = False

    def start(self, seconds):
        """seconds: without progress, until the run ends."""
        self.seconds, self.running, self.seen, self.named = seconds, True, {}, set()
        self.store = connect()
        threading.Thread(target=self.watch, daemon=True).start()

    def name_the_dead(self):
        """Has an exception that ends this rank followed by who it comes from. To be called when the group is there,
        as torch's own hook, set then, keeps back what is printed by those before it.
        """
        usual = sys.excepthook

        def explain(kind, error, trace):
            self.explaining = True
            with contextlib.suppress(RuntimeError):
                if isinstance(error, RuntimeError) and self.store.check(["reported"]):
                    exit(2)
            usual(kind, error, trace)
            with contextlib.suppress(RuntimeError):  # the store may be gone as well
                self.explain(error)
            exit(1)

        sys.excepthook = explain

    def stop(self):
        self.running = False

    def post(self, alive):
        self.store.set(f"beat/{rank()}", f"{self.step}\n{self.count}\n{self.doing}\n{int(self.waits)}\n{alive}")

    def look(self):
        """Reads all ranks' beats; notes when each last changed. -> [(step, count, doing, waits)] by rank."""
        beats, now = [], time.monotonic()
        keys = [f"beat/{other}" for other in range(size())]
        if self.store.check(keys):
            texts = self.store.multi_get(keys)
        else:
            texts = [self.store.get(key) if self.store.check([key]) else b"0\n0\nnot there yet\n0\n0" for key in keys]
        for other, text in enumerate(texts):
            step, count, doing, waits, alive = text.decode().split("\n")
            beats.append((int(step), int(count), doing, waits == "1"))
            for key, value in ((("alive", other), alive), (("far", other), (step, count))):
                if self.seen.get(key, (None,))[0] != value:
                    self.seen[key] = (value, now)
        return beats

    def still(self, what, other):
        return time.monotonic() - self.seen[what, other][1]

    def watch(self):
        alive, pause, patience = 0, min(1.0, self.seconds / 4), min(SIGN_OF_LIFE, self.seconds / 2)
        turn = time.monotonic()
        while self.running:
            alive, before, turn = alive + 1, turn, time.monotonic()
            if turn - before > pause + patience:  # this process was suspended, and perhaps all of them
                self.seen.clear()
            try:
                self.post(alive)
                beats = self.look()
            except RuntimeError:
                return self.end("the launcher is gone")
            for other in set(range(size())) - self.named:
                if self.still("alive", other) > SIGN_OF_LIFE and beats[other][2] != "not there yet":
                    self.named.add(other)
                    self.say(f"{self.where(beats, other)}: no sign of life for {SIGN_OF_LIFE} s")
            standstill = min(self.still("far", other) for other in range(size())) > self.seconds
            if standstill and not self.explaining:  # which ends this rank too, and knows better
                silent = [other for other in range(size()) if self.still("alive", other) > patience]
                last = "; ".join(self.where(beats, other) for other in silent or least_far(beats))
                return self.end(f"{last}: no progress for {self.seconds:g} s")
            time.sleep(pause)

    def explain(self, error):
        """After an exception, often that of a connection which a dead rank has closed: who and where."""
        self.look()
        time.sleep(3)
        beats = self.look()
        silent = [other for other in range(size()) if other != rank() and self.still("alive", other) > 2]
        for other in silent:
            self.say(f"{self.where(beats, other)}: has died")
        if not silent:
            self.say(f"{self.where(beats, rank())}: {error}")

    def where(self, beats, other):
        return f"rank {other}, step {beats[other][0]}, {beats[other][2]}"

    def say(self, message):
        if first_to_say(message, self.store):
            print(f"\nwatchdog: {message}", file=sys.stderr, flush=True)

    def end(self, message):
        if self.running:
            self.say(f"{message}; the run ends here, and goes on from the last commit when started again")
            os._exit(1)


def least_far(beats):
    """The ranks to blame for a standstill, given every rank's (step, count, doing, waits)."""
    busy = [other for other, beat in enumerate(beats) if not beat[3]] or range(len(beats))
    least = min(beats[other][:2] for other in busy)
    return [other for other in busy if beats[other][:2] == least]


watchdog = Watchdog()


def beat(doing, step=None):
    """Tells the watchdog that this rank gets on, and with what."""
    if step is not None and step != watchdog.step:
        watchdog.step, watchdog.count = step, 0
    watchdog.count, watchdog.doing = watchdog.count + 1, doing
