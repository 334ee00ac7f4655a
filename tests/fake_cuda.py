"""Trace the work of a GPU without a GPU: shapes, devices and dtypes are real, numbers are not.

    python tests/fake_cuda.py          # prints JSON: {work: {"waits", "products", "attention"}}, each {kind: count}

`waits` are the lines where the host would wait for the device, `products` the dtypes of matrix products, `attention`
the kernels that scaled_dot_product_attention would use on an H100. An operation on tensors of two devices raises.

torch's FakeTensorMode needs a device guard and the hooks of "cuda", which a CPU build of torch lacks. Empty versions in
C++ replace them. They are compiled here and loaded before torch.
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
HOOKS = r"""
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


def load_hooks():
    home = Path(importlib.util.find_spec("torch").origin).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "hooks.cpp"), Path(folder, "hooks.so")
        source.write_text(HOOKS)
        subprocess.run(["g++", "-std=c++20", "-shared", "-fPIC", source, "-o", library, f"-I{home / 'include'}",
                        f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)  # fmt: skip
        for name in ("libc10.so", "libtorch_cpu.so"):
            ctypes.CDLL(str(home / "lib" / name), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))


load_hooks()
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

torch.inference_mode = lambda mode=True: torch.set_grad_enabled(not mode)  # not supported by FakeTensorMode

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
import patterns  # noqa: E402
import train  # noqa: E402
from codec import encode_long, load_codec  # noqa: E402
from config import Settings  # noqa: E402
from data import Batch, count_targets  # noqa: E402
from model import MusicLM  # noqa: E402
from tools import probe  # noqa: E402

ATTENTION = collections.Counter()
PRODUCTS = {"aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default"}
torch.cuda.amp.common.amp_definitely_not_available = lambda: False
torch.cuda.is_bf16_supported = lambda *_, **__: True


def current_lines():
    """Return the lines of this repository that are running, the innermost first."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent in (ROOT, ROOT / "tools")]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames[-3:])) or "backward"


def attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **more):
    """Count the kernel that an H100 uses without cuDNN: flash, else the memory-efficient one, else math."""
    if not q.is_cuda:
        return real_attention(q, k, v, attn_mask, dropout_p, is_causal, **more)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (q, k, v))
    if not q.dtype == k.dtype == v.dtype or q.shape[-1] % 8:
        ATTENTION[f"math {q.dtype} {k.dtype} {v.dtype} {tuple(q.shape)} {current_lines()}"] += 1
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
    """Counts operations for which the host would wait, and matrix products by dtype."""

    def __init__(self):
        super().__init__()
        self.waits, self.products = collections.Counter(), collections.Counter()
        self.reset()

    def reset(self):
        """Discard the counts of a first call, which builds tables and copies them to the device."""
        for counter in (self.waits, self.products, ATTENTION):
            counter.clear()

    def counts(self):
        return dict(waits=dict(self.waits), products=dict(self.products), attention=dict(ATTENTION))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, str(function)
        is_on_gpu = isinstance(args[0], torch.Tensor) and args[0].is_cuda if args else False
        if name == "aten._local_scalar_dense.default" and isinstance(args[0], FakeTensor):
            if is_on_gpu:
                self.waits[f"item {current_lines()}"] += 1
            return {torch.bool: False, torch.int64: 1}.get(args[0].dtype, 1.0)
        if name in ("aten.nonzero.default", "aten.masked_select.default") and is_on_gpu:
            self.waits[f"{name} {current_lines()}"] += 1
        if name.startswith("aten.index") and is_on_gpu and isinstance(args[1], (list, tuple)):
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or not index.is_cuda):
                    self.waits[f"index {current_lines()}"] += 1
        if name in ("aten._to_copy.default", "aten.copy_.default"):
            to = torch.device(kwargs.get("device") or args[0].device) if "_to" in name else args[0].device
            source = args["copy_." in name].device
            is_asynchronous = kwargs.get("non_blocking") or args[2:] == (True,)
            if {to.type, source.type} == {"cpu", "cuda"} and not is_asynchronous:
                self.waits[f"{source.type} to {to.type} {current_lines()}"] += 1
        out = function(*args, **kwargs)
        if name in PRODUCTS and out.is_cuda:
            self.products[str(out.dtype).removeprefix("torch.")] += 1
        return out


def tolist(self):
    """Count one wait and return ones."""
    WATCHING[-1].waits[f"tolist {current_lines()}"] += 1
    return np.ones(self.shape).tolist()


WATCHING, FakeTensor.tolist = [], tolist


def with_real_tensors(function):
    """Wrap a function whose results the host reads: it computes real numbers on the CPU."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return run


class HostTable:
    """A pattern's table as the host reads it."""

    def __init__(self, table):
        self.table = with_real_tensors(table.numpy)()

    def amax(self, dim):
        return self.table.max(dim)

    def __getitem__(self, index):
        return self.table[index]


def pattern(self, T, training=False, device=None):
    real = real_pattern(self, T, training, device)
    return SimpleNamespace(position=HostTable(real.position)) if device == "cpu" else real


real_pattern, MusicLM.pattern = MusicLM.pattern, pattern
patterns.make_pattern = with_real_tensors(patterns.make_pattern)
generate.condition_groups = with_real_tensors(generate.condition_groups)
probe.key_matches = with_real_tensors(lambda chroma: np.zeros(24))
torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=80 * 2**30)
generate.CUDAGraph = lambda function, *inputs: function


@contextlib.contextmanager
def fake_cuda():
    model_module.cached_pattern.cache_clear()
    watch = Watch()
    WATCHING.append(watch)
    with FakeTensorMode(allow_non_fake_inputs=True), watch:
        yield watch


def on_gpu(module):
    """Replace a module's weights by fake ones on the GPU, and return it."""
    for part in module.modules():
        for store in (part._parameters, part._buffers):
            for key, tensor in store.items():
                if tensor is not None:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    store[key] = torch.nn.Parameter(new, tensor.requires_grad) if store is part._parameters else new
    return module


def make(**settings):
    """Return settings, a model on the CPU, a batch of two items for it, and their conditions."""
    s = Settings(dim=64, heads=2, layers=2, text_dim=32, text_heads=2, text_layers=1, segment=0.4, style_dim=32,
                 style_heads=2, style_layers=1, style_bins=16, style_seconds=(0.1, 0.2), batch_size=2,
                 **settings)  # fmt: skip
    model, T = MusicLM(s, CODEC, TOKENIZER), 20
    sample = {"text": "a slow piano", "melody": [0, 4, 7], "style": (torch.zeros(CODEC["K"], 8, dtype=torch.int64), 2)}
    sample = {name: value for name, value in sample.items() if name == "text" or getattr(s, name)}
    mask, conditions = torch.ones(2, T, dtype=torch.bool), [sample, {}]
    codes = torch.zeros(2, CODEC["K"], T, dtype=torch.int64)
    targets = count_targets(mask, patterns.make_pattern("delay", CODEC["K"], T, training=True))
    return s, model, Batch(codes, mask, mask, model.conditioner.tokenize(conditions), targets), conditions


def training_step(dtype, **settings):
    """Trace the second call of train.training_step."""
    s, model, batch, _ = make(**settings)
    ema = deepcopy(model)
    with fake_cuda() as watch:
        on_gpu(model), on_gpu(ema)
        state = train.make_state(model, model, ema, s, torch.device("cuda"), dtype)
        for _ in range(2):
            watch.reset()
            train.training_step(state, [batch], s.lr, s)
    return watch.counts()


def validation(**settings):
    """Trace train.validate on two batches."""
    s, model, batch, _ = make(**settings)
    with fake_cuda() as watch:
        autocast = functools.partial(torch.autocast, "cuda", torch.bfloat16)
        batches = [(batch, ["a"] * len(batch.codes)), (batch, ["b"] * len(batch.codes))]
        train.validate(on_gpu(model).eval(), batches, torch.device("cuda"), autocast)
    return watch.counts()


def generation(frames=25, **settings):
    """Trace generate.stream over two windows, and count the waits up to each frame."""
    _, model, _, conditions = make(**settings)
    generate.optimize(model, torch.bfloat16)
    waits = []
    with fake_cuda() as watch:
        on_gpu(model).eval().requires_grad_(False)
        for _ in generate.stream(model, conditions, frames, top_p=0.9):
            waits.append(sum(watch.waits.values()))
    return watch.counts() | {"waits by frame": waits}


def evaluation(frames=25, **settings):
    """Trace the generation of the clips of metrics.evaluate, and their measurement."""
    s, model, _, conditions = make(**settings)
    codec = load_codec("tiny")
    generate.optimize(model, torch.bfloat16)
    with fake_cuda() as watch, contextlib.redirect_stdout(sys.stderr):  # the progress bar is not JSON
        on_gpu(model).eval().requires_grad_(False), on_gpu(codec.model)
        clips = metrics.generate_many(model, conditions, frames, 3.0, s, "clips")
        generating = watch.counts()
        watch.reset()
        metrics.measure_clips(codec, clips, probe.features)
        metrics.latent_gaussian(codec, clips)
    return generating | {"measuring": watch.counts()}


def encoding():
    """Trace how prepare.py encodes a file of several chunks."""
    codec = load_codec("tiny")
    with fake_cuda() as watch:
        on_gpu(codec.model)
        encode_long(codec, torch.zeros(1, 3 * codec.sample_rate), chunk=1.0)
    return watch.counts()


def mistakes():
    """Make one mistake of each kind, and return {kind: count}, which must be 1 each."""
    counts = {}
    with fake_cuda() as watch:
        x, q = torch.ones(4, 4, device="cuda"), torch.ones(1, 2, 4, 7, device="cuda")
        operations = {
            "read a number": lambda: float(x.sum()),
            "read numbers": lambda: x.tolist(),
            "find indices": lambda: x.nonzero(),
            "index with a mask": lambda: x[x > 0],
            "copy to the device": lambda: torch.ones(4).to("cuda"),
            "copy from the device": lambda: x.cpu(),
            "float32 product": lambda: x @ x,
            "math attention": lambda: F.scaled_dot_product_attention(q, q, q),
        }
        for kind, operation in operations.items():
            watch.reset()
            with contextlib.suppress(DynamicOutputShapeException):  # raised for a shape that depends on numbers
                operation()
            counts[kind] = sum(map(len, watch.counts().values()))
        try:
            x + torch.ones(4, 4)
        except RuntimeError as error:
            counts["two devices"] = str(error).count("at least two devices")
    return counts


if __name__ == "__main__":
    all_conditions = dict(melody=True, style=True)
    trace = {
        "bfloat16": training_step(torch.bfloat16),
        "bfloat16, rope": training_step(torch.bfloat16, positions="rope"),
        "bfloat16, all conditions": training_step(torch.bfloat16, **all_conditions, activation_checkpointing=True),
        "float16, all conditions": training_step(torch.float16, **all_conditions),
        "validation": validation(**all_conditions),
        "generation": generation(**all_conditions),
        "evaluation": evaluation(**all_conditions),
        "encoding": encoding(),
        "mistakes": mistakes(),
    }
    print(json.dumps(trace, indent=1), flush=True)
    os._exit(0)
