"""Runs the work of a GPU on a CUDA device that is not there: shapes, devices and dtypes are real, numbers are not.

    python tests/fake_cuda.py          # JSON: {work: {"waits", "products", "attention"}}, each {what: how often}

`waits` are the places where the host would wait for the device, `products` the dtypes of matrix products, `attention`
the kernels that scaled_dot_product_attention takes on an H100. What raises, as tensors on two devices do, ends it.

FakeTensorMode asks for two things that a CPU build of torch lacks, a device guard and the hooks of "cuda". A few lines
of C++ that do nothing stand in for them, compiled here and loaded before torch.
"""

import collections
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import traceback
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
STAND_IN = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
static const Device DEVICE(DeviceType::CUDA, 0);
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, DEVICE); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
namespace at {
struct Hooks final : CUDAHooksInterface {
  Hooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
};
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
"""


def load_stand_in():
    home = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "stand_in.cpp"), Path(folder, "stand_in.so")
        source.write_text(STAND_IN)
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library, f"-I{home / 'include'}",
                        f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)  # fmt: skip
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(home / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


load_stand_in()
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.inference_mode = lambda mode=True: torch.set_grad_enabled(not mode)  # which FakeTensorMode cannot do on a GPU

import torch.nn.functional as F  # noqa: E402
from models import CODEC, TOKENIZER  # noqa: E402
from torch._subclasses.fake_tensor import (  # noqa: E402
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import generate  # noqa: E402
import metrics  # noqa: E402
import model as model_module  # noqa: E402
import train  # noqa: E402
from codec import encode_long, load_codec  # noqa: E402
from config import Settings  # noqa: E402
from data import Batch  # noqa: E402
from model import MusicLM  # noqa: E402

ATTENTION = collections.Counter()
PRODUCTS = {"aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default"}
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *_, **__: True


def where():
    """The lines of this repository that are being run, the innermost first."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent == ROOT]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-3:])) or "backward"


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    """What scaled_dot_product_attention takes on an H100 without cuDNN's: flash, else the memory-efficient kernel."""
    if not q.is_cuda:
        return real_attention(q, k, v, attn_mask, dropout_p, is_causal, **more)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (q, k, v))
    if not q.dtype == k.dtype == v.dtype or q.shape[-1] % 8:
        ATTENTION[f"math {q.dtype} {k.dtype} {v.dtype} {tuple(q.shape)} {where()}"] += 1
    elif attn_mask is None and q.dtype != torch.float32:
        ATTENTION["flash"] += 1
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]
    else:
        ATTENTION["efficient"] += 1
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=q.dtype) if attn_mask.dtype == torch.bool else attn_mask.to(q.dtype)
        attn_mask = bias.expand(*q.shape[:3], k.shape[2])
    keep = torch.is_grad_enabled()
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, keep, dropout_p, is_causal)[0]


real_attention, F.scaled_dot_product_attention = F.scaled_dot_product_attention, attention


class Watch(TorchDispatchMode):
    """Counts what would make the host wait, and matrix products by dtype."""

    def __init__(self):
        super().__init__()
        self.waits, self.products = collections.Counter(), collections.Counter()
        self.forget()

    def forget(self):
        """What was counted: tables are made, and put on the device, at their first use."""
        for counter in (self.waits, self.products, ATTENTION):
            counter.clear()

    def found(self):
        return dict(waits=dict(self.waits), products=dict(self.products), attention=dict(ATTENTION))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function)
        on_gpu = isinstance(args[0], torch.Tensor) and args[0].is_cuda if args else False
        if name == "aten._local_scalar_dense.default" and isinstance(args[0], FakeTensor):
            if on_gpu:
                self.waits[f"item {where()}"] += 1
            return {torch.bool: False, torch.int64: 1}.get(args[0].dtype, 1.0)
        if name in ("aten.nonzero.default", "aten.masked_select.default") and on_gpu:
            self.waits[f"{name} {where()}"] += 1
        if name.startswith("aten.index") and on_gpu and isinstance(args[1], (list, tuple)):
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or not index.is_cuda):
                    self.waits[f"index {where()}"] += 1
        if name in ("aten._to_copy.default", "aten.copy_.default"):
            to = torch.device(kwargs.get("device") or args[0].device) if "_to" in name else args[0].device
            source = args["copy_." in name].device
            may_go_on = kwargs.get("non_blocking") or args[2:] == (True,)
            if {to.type, source.type} == {"cpu", "cuda"} and not may_go_on:
                self.waits[f"{source.type} to {to.type} {where()}"] += 1
        out = function(*args, **kwargs)
        if name in PRODUCTS and out.is_cuda:
            self.products[str(out.dtype).removeprefix("torch.")] += 1
        return out


def tolist(self):
    """Counted as one wait; the host goes on with ones."""
    WATCHING[-1].waits[f"tolist {where()}"] += 1
    return np.ones(self.shape).tolist()


WATCHING, FakeTensor.tolist = [], tolist


def outside(function):
    """`function`, run with real tensors: what the host computes on the CPU and then reads."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


class HostTable:
    """A pattern's table as the host reads it."""

    def __init__(self, table):
        self.table = outside(table.numpy)()

    def amax(self, dim):
        return self.table.max(dim)

    def __getitem__(self, place):
        return self.table[place]


def pattern(self, T, training=False, device=None):
    found = real_pattern(self, T, training, device)
    return SimpleNamespace(step=HostTable(found.step)) if device == "cpu" else found


real_pattern, MusicLM.pattern = MusicLM.pattern, pattern
model_module.make_pattern = outside(model_module.make_pattern)
generate.condition_groups = outside(generate.condition_groups)
metrics.key_matches = outside(lambda chroma: np.zeros(24))  # which the host computes from what it has read
torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=80 * 2**30)
generate.CUDAGraph = lambda function, *inputs: function  # recording is for a device that is there


@contextlib.contextmanager
def fake_cuda():
    model_module.pattern_on.cache_clear()
    watch = Watch()
    WATCHING.append(watch)
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield watch


def on_device(module):
    """The module with its weights on the device that is not there."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    store[key] = torch.nn.Parameter(new, tensor.requires_grad) if store is part._parameters else new
    return module


def make(**settings):
    """A model on the CPU and a batch of two items for it."""
    s = Settings(dim=64, heads=2, layers=2, text_dim=32, text_heads=2, text_layers=1, segment=0.4, style_dim=32,
                 style_heads=2, style_layers=1, style_bins=16, style_seconds=(0.1, 0.2), batch_size=2,
                 **settings)  # fmt: skip
    model, T = MusicLM(s, CODEC, TOKENIZER), 20
    full = {"text": "a slow piano", "melody": [0, 4, 7], "style": (torch.zeros(CODEC["K"], 8, dtype=torch.int64), 2)}
    full = {name: value for name, value in full.items() if name == "text" or getattr(s, name)}
    everything, conditions = torch.ones(2, T, dtype=torch.bool), [full, {}]
    codes = torch.zeros(2, CODEC["K"], T, dtype=torch.int64)
    return s, model, Batch(codes, everything, everything, model.conditioner.prepare(conditions)), conditions


def training_step(dtype, **settings):
    """Sections 2 to 4 of train.py's loop, the second time."""
    s, model, batch, _ = make(**settings)
    ema = deepcopy(model)
    with fake_cuda() as watch:
        on_device(model).train(), on_device(ema)
        optimizer = train.make_optimizer(model, s)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
        loss_weights = train.codebook_weights(s, model.K).to("cuda")
        for updates in (1, 2):
            watch.forget()
            targets = model.count_targets(batch.scored.sum(0).to("cuda", non_blocking=True)).clamp(min=1)
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                ce_sum, _ = model(*batch.to("cuda"))
            scaler.scale((loss_weights * ce_sum / targets).mean()).backward()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
            torch.cat([(ce_sum / targets).detach(), norm[None]]).tolist()
            scaler.step(optimizer)
            model.conditioner.update()
            train.update_ema(ema, model, s.ema_decay, updates)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
    return watch.found()


def validation(**settings):
    s, model, batch, _ = make(**settings)
    with fake_cuda() as watch:
        autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
        train.validate(on_device(model).eval(), [batch, batch], torch.device("cuda"), autocast)
    return watch.found()


def generation(frames=25, **settings):
    _, model, _, conditions = make(**settings)
    generate.optimize(model, torch.bfloat16)
    waits = []
    with fake_cuda() as watch:
        on_device(model).eval().requires_grad_(False)
        for _ in generate.stream(model, conditions, frames, top_p=0.9):
            waits.append(sum(watch.waits.values()))
    return watch.found() | {"waits by frame": waits}


def evaluation(frames=25, **settings):
    """The clips of metrics.evaluate, and what is heard in them."""
    s, model, _, conditions = make(**settings)
    codec = load_codec("tiny")
    generate.optimize(model, torch.bfloat16)
    with fake_cuda() as watch, contextlib.redirect_stdout(sys.stderr):  # its progress bar
        on_device(model).eval().requires_grad_(False), on_device(codec.model)
        clips = metrics.generate_many(model, conditions, frames, 3.0, s, "clips")
        made = watch.found()
        watch.forget()
        metrics.listen(codec, clips, metrics.features)
        metrics.latent_gaussian(codec, clips)
    return made | {"listening": watch.found()}


def encoding():
    """What prepare.py asks of the codec, for a file longer than a piece."""
    codec = load_codec("tiny")
    with fake_cuda() as watch:
        on_device(codec.model)
        encode_long(codec, torch.zeros(1, 3 * codec.sample_rate), piece=1.0)
    return watch.found()


def mistakes():
    """What the trace must find, one of each kind -> {kind: how often}."""
    found = {}
    with fake_cuda() as watch:
        x, odd = torch.ones(4, 4, device="cuda"), torch.ones(1, 2, 4, 7, device="cuda")
        kinds = {
            "a number is read": lambda: float(x.sum()),
            "numbers are read": lambda: x.tolist(),
            "places are sought": lambda: x.nonzero(),
            "a mask is the index": lambda: x[x > 0],
            "a copy to the device": lambda: torch.ones(4).to("cuda"),
            "a copy from it": lambda: x.cpu(),
            "a product in float32": lambda: x @ x,
            "the slow attention": lambda: F.scaled_dot_product_attention(odd, odd, odd),
        }
        for kind, make in kinds.items():
            watch.forget()
            with contextlib.suppress(DynamicOutputShapeException):  # a shape that depends on numbers
                make()
            found[kind] = sum(map(len, watch.found().values()))
        try:
            x + torch.ones(4, 4)
        except RuntimeError as error:
            found["two devices"] = str(error).count("at least two devices")
    return found


if __name__ == "__main__":
    everything = dict(melody=True, style=True)
    found = {
        "bfloat16": training_step(torch.bfloat16),
        "bfloat16, rope": training_step(torch.bfloat16, positions="rope"),
        "bfloat16, everything": training_step(torch.bfloat16, **everything, activation_checkpointing=True),
        "float16, everything": training_step(torch.float16, **everything),
        "validation": validation(**everything),
        "generation": generation(**everything),
        "evaluation": evaluation(**everything),
        "encoding": encoding(),
        "mistakes": mistakes(),
    }
    print(json.dumps(found, indent=1), flush=True)
    os._exit(0)
