"""Estimate parameters, operations, memory and time of a run, without starting it.

    python -m tools.estimate config/demo.py
    python -m tools.estimate config/small.py --device=cuda
    python -m tools.estimate config/large.py --processes=48 --parallel=fsdp --activation_checkpointing=True --mfu=0.35

Takes the settings of train.py and two options: --processes (default 1), and --mfu (default 0.4), the assumed share of
a GPU's peak. On a CPU, a part of a training step is timed instead, for less than a minute.

Letters: B items in one forward pass of a device, K codebooks, S sequence positions, D model width.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
from pathlib import Path

import safetensors
import torch
from tqdm import tqdm

import common
import config
import data
import distributed
from codec import codec_info
from common import UserError, first_line
from dataprep import shards
from model import MusicLM, freeze
from prepare import train_tokenizer

VOCABULARY = 1000  # assumed vocabulary size if the data set is not prepared yet
CAPTION_TOKENS = 64  # assumed length of a caption for T5
T5_BASE = (109_628_544, 84_934_656, 768)  # of its encoder: weights, weights in matrix products, width
# Dense bfloat16 and float16 matrix products in 1e12 operations/s, from the data sheets.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312,
               "L40S": 362, "L40": 181}  # fmt: skip
DEFAULT_GPU = "H100"  # assumed if this machine's device is not in the table
GPU_SIZES = (12, 16, 24, 80)  # GiB
RESERVE, RESERVED_SHARE = 1.5, 0.1  # GiB, or share of the GPU if that is more: assumed for CUDA and the allocator
TIMED_OPERATIONS, TIMED_WEIGHTS = 3e11, 1e8  # at most, in a step that is timed on a CPU


def peak_flops(device, dtype):
    """Return the device's peak floating-point operations per second, or None if unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for model, peak in PEAK_TFLOPS.items() if model in name), None)


def t5_size(file):
    """Return (weights, weights in matrix products, width) of T5's encoder, from the header of a safetensors file."""
    try:
        with safetensors.safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if name.startswith(("shared.", "encoder."))]
            shapes = {name: opened.get_slice(name).get_shape() for name in names}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        tables = [name for name in names if name.endswith(("shared.weight", "embed_tokens.weight"))]
        products = [name for name in names if len(shapes[name]) == 2 and name not in tables and "_bias" not in name]
        return sum(sizes.values()), sum(map(sizes.get, products)), shapes[tables[0]][1]
    except Exception as error:
        raise UserError(f"text_encoder_weights '{file}': not the weights of a T5 encoder ({first_line(error)}); pass"
                        " t5-base's model.safetensors") from None  # fmt: skip


def build_model(s, device="meta"):
    """Return (MusicLM, `t5_size` or None, codec and assumptions in words). T5 is not loaded: only its projection is."""
    is_prepared, t5, assumed = Path(s.data, "meta.json").exists(), None, ""
    codec = shards.read_meta(s.data)["codec"] if is_prepared else codec_info(s.codec)
    has_tokenizer = is_prepared and s.text_encoder == "own"
    tokenizer = shards.read_tokenizer(s.data) if has_tokenizer else train_tokenizer([], VOCABULARY)
    with torch.device(device):
        model = MusicLM(dataclasses.replace(s, text_encoder="own"), codec, tokenizer)
        if s.text_encoder == "t5":
            has_weights = Path(s.text_encoder_weights).is_file()
            t5 = t5_size(s.text_encoder_weights) if has_weights else T5_BASE
            out = torch.nn.Linear(t5[2], s.dim) if t5[2] != s.dim else torch.nn.Identity()
            model.conditioner.text = torch.nn.ModuleDict({"out": out})
            assumed = "" if has_weights else "; without text_encoder_weights, assuming t5-base"
        elif not is_prepared:  # the vocabulary of a tokenizer without captions is smaller
            model.conditioner.text.embed = torch.nn.Embedding(VOCABULARY, s.text_dim)
            assumed = f"; {s.data} is not prepared, assuming a vocabulary of {VOCABULARY}"
    freeze(model, s.freeze)
    return model, t5, f"codec {codec['name']}, K {model.K}, card {model.card}{assumed}"


def activation_bytes(block, S, itemsize):
    """Return the bytes that autograd stores of one block for one item. itemsize: bytes per number in matrix products.

    float32      the input of each of the 3 norms (3 D)
    products     q, k, v and the cross-attention's q (4 D), attention outputs (2 D), feed-forward before GELU (4 D)
    inputs of trained layers, LoRA included, in products: norm outputs (D each), GELU output (4 D)

    Attention stores no S x S matrix (arXiv:2205.14135).
    """
    layers = (block.qkv, block.cross_q, block.up, block.down)
    inputs = sum(layer.in_features for layer in layers if any(p.requires_grad for p in layer.parameters()))
    return S * (block.down.out_features * (3 * 4 + 10 * itemsize) + inputs * itemsize)


def memory_by_part(model, t5, s, processes):
    """Return {part: bytes on each device}. dtype 'auto' counts as bfloat16.

    The EMA copies all weights, frozen ones too. T5 exists once, without gradients, optimizer and EMA.
    """
    itemsize, n_blocks = 2 if s.dtype == "auto" else getattr(torch, s.dtype).itemsize, len(model.blocks)
    n_weights = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n_cast = sum(p.numel() for part in (model.blocks, model.heads) for p in part.parameters())
    split = processes if s.parallel == "fsdp" else 1
    if split > 1 and s.reshard_after_forward:
        n_cast = 2 * n_cast // n_blocks  # FSDP gathers one block, and prefetches the next
    elif split == 1 and itemsize == 4:
        n_cast = 0
    B = s.micro_batch or s.batch_size // processes
    S = model.pattern(model.trained_frames, training=True).S - 1
    positions = S + model.conditioner.prefix_length
    activations = [activation_bytes(block, positions, itemsize) for block in model.blocks]
    checkpointed = n_blocks * 4 * s.dim * positions + max(activations)  # the input of each, and everything of one
    return {
        "weights": 4 * n_weights / split,
        "gradients": 4 * n_trained / split,
        "optimizer": 8 * n_trained / split,
        "EMA": 4 * n_weights / split,
        "text encoder, frozen": 4 * t5[0] if t5 else 0,
        "cast or gathered weights": itemsize * n_cast,
        "activations": B * (checkpointed if s.activation_checkpointing else sum(activations)),
        "logits": B * S * model.K * model.card * (2 * 4 + itemsize),  # logits, log-probabilities, their gradient
    }


def estimate(s, processes=1):
    """Return ({part: bytes on each device}, lines to print, MusicLM on "meta", `t5_size` or None).

    Reads no more than the data set's metadata and tokenizer, and the header of T5's weights.
    """
    model, t5, words = build_model(s)
    memory, flops = memory_by_part(model, t5, s, processes), model.flops()
    n_weights = sum(p.numel() for p in model.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    B, dtype = s.micro_batch or s.batch_size // processes, "bfloat16" if s.dtype == "auto" else s.dtype
    lines = [f"{n_weights / 1e6:,.1f}M parameters, {n_trained / 1e6:,.1f}M trained; {words}",
             f"{flops / (model.K * model.trained_frames) / 1e9:,.3f} GFLOP per token, forward and backward;"
             f" {flops * s.batch_size / 1e12:,.4g} TFLOP per step of {s.batch_size} x {s.segment:g} s"]  # fmt: skip
    if t5:
        lines.append(f"T5, frozen: {t5[0] / 1e6:,.1f}M weights; with {CAPTION_TOKENS} tokens per caption"
                     f" {100 * t5_share(model, t5):.2f} % of these operations")  # fmt: skip
    lines.append(f"memory per device, {s.parallel} on {processes}, {B} items per pass in {dtype}:")
    lines += [f"  {part:24}{size / 2**30:8.2f} GiB" for part, size in memory.items() if size]
    lines.append(f"  {'total':24}{sum(memory.values()) / 2**30:8.2f} GiB, plus overhead of allocator and device")
    return memory, lines, model, t5


def t5_share(model, t5):
    """Return T5's operations relative to a training step's, 2 per token and weight. t5: from `t5_size`, or None."""
    return 2 * t5[1] * CAPTION_TOKENS / model.flops() if t5 else 0.0


def table_of_gpus(s, processes, model, t5):
    """Return lines: for each of GPU_SIZES, whether training fits, and the first options that make it fit.

    In this order: smaller micro-batches, activation checkpointing, FSDP, more GPUs. model, t5: from `estimate`.
    """
    options, now = [], {}
    counts = [n for n in range(max(2, processes), s.batch_size + 1) if s.batch_size % n == 0]
    for parallel, gpus in [(s.parallel, processes), *(("fsdp", n) for n in counts)]:
        share = s.batch_size // gpus
        sizes = [B for B in range(s.micro_batch or share, 0, -1) if share % B == 0]
        for checkpointing, B in itertools.product(dict.fromkeys([s.activation_checkpointing, True]), sizes):
            option = dict(parallel=parallel, micro_batch=B, activation_checkpointing=checkpointing)
            total = sum(memory_by_part(model, t5, dataclasses.replace(s, **option), gpus).values())
            now = now or option
            changes = [f"--{key}={value}" for key, value in option.items() if value != now[key]]
            changes += [f"on {gpus} GPUs"] * (gpus != processes)
            options.append((total, f"yes{' with' * bool(changes)} {' '.join(changes)}".strip()))
    lines = [f"does training fit? CUDA and the allocator are assumed to need {RESERVE:g} GiB or"
             f" {100 * RESERVED_SHARE:g} % of the GPU, whichever is more:"]  # fmt: skip
    for size in GPU_SIZES:
        usable = 2**30 * (size - max(RESERVE, RESERVED_SHARE * size))
        fitting = (f"{words}, {total / 2**30:.1f} GiB" for total, words in options if total <= usable)
        lines.append(f"  {size} GB  {next(fitting, 'no; use a smaller model or a shorter --segment')}")
    return lines + ["  config/lora.py needs less"] * bool(s.init_from and not s.lora_rank)


def time_on_cpu(s, model, t5):
    """Time training steps of at most TIMED_OPERATIONS: return (seconds of a step of the run, a description).

    Steps with 1 and with 2 passes separate the time of a pass from that of the optimizer's update. If the run's pass is
    larger than TIMED_OPERATIONS, a smaller pass is timed and its time is scaled. model, t5: from `estimate`.
    """
    import train  # here, because train.py imports this file
    from tools import bench

    share, n_weights = TIMED_OPERATIONS / model.flops(), sum(p.numel() for p in model.parameters())
    layers = math.ceil(s.layers * min(1, share, TIMED_WEIGHTS / n_weights))
    B = max(1, min(s.micro_batch or s.batch_size, int(share)))
    part = dataclasses.replace(s, layers=layers, text_encoder="own", freeze=(), compile="never")
    device, dtype = train.setup_device(part)
    timed, _, _ = build_model(part, device)
    is_trained = {name: p.requires_grad for name, p in model.named_parameters()}
    for name, p in timed.named_parameters():
        p.requires_grad_(is_trained.get(name, True))
    state = train.make_state(*train.wrap_model(timed, part, device, dtype, resumes=False), part, device, dtype)
    T, tensors = timed.trained_frames, timed.conditioner.tokenize([bench.CONDITIONS] * B)
    codes, mask = torch.randint(timed.card, (B, timed.K, T)), torch.ones(B, T, dtype=torch.bool)
    batch = data.Batch(codes, mask, mask, tensors, data.count_targets(mask, timed.pattern(T, training=True)))
    seconds = [[], []]  # of steps of 1 and of 2 passes
    for _ in tqdm(range(20), desc="timing training steps", delay=10):
        for passes, times in enumerate(seconds, 1):
            step = functools.partial(train.training_step, state, passes * [batch], 0.0, part)
            times.append(bench.clock(step, device))
        if sum(map(sum, seconds)) > 20:
            break
    one, two = (statistics.median(times[1:] or times) for times in seconds)  # the first is a warm-up
    update = max(0, 2 * one - two) * n_weights / sum(p.numel() for p in timed.parameters())
    passes = (two - one) * model.flops() * s.batch_size / (timed.flops() * B) * (1 + t5_share(model, t5))
    words = f"{B} of {s.batch_size} items, {layers} of {s.layers} blocks, " * (layers < s.layers or B < s.batch_size)
    return update + passes, f"timed with {words}{common.describe_device(device, dtype)}"


def advise_on_memory(arguments):
    """Return advice for a run of train.py that is out of memory: the estimate, and the options that lower it."""
    processes, sizes = distributed.world_size(), ""
    s = config.load(arguments, __doc__, processes)
    with contextlib.suppress(Exception):  # the estimate may run out of memory too
        s.dtype = str(common.pick_device(s.device, s.dtype)[1]).removeprefix("torch.")
        memory = {part: size / 2**30 for part, size in estimate(s, processes)[0].items()}
        sizes = ", ".join(f"{part} {size:.2f}" for part, size in memory.items() if size >= 0.01)
        sizes = f"estimated GiB in training: {sizes}; "
    remedies = {
        "a smaller --micro_batch": (s.micro_batch or s.batch_size // processes) > 1,
        "--activation_checkpointing=True": not s.activation_checkpointing,
        "--parallel=fsdp": processes > 1 and s.parallel == "ddp",
        "a smaller model": True,
    }
    options = " or ".join(option for option, is_useful in remedies.items() if is_useful)
    return f"{sizes}use {options}; if memory ran out while samples were generated, lower --clip_seconds"


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--mfu", type=float, default=0.4)
    args, settings = parser.parse_known_args()
    if args.processes < 1 or not 0 < args.mfu <= 1:
        raise UserError("--processes must be 1 or above, and --mfu above 0 and at most 1")
    s = config.load(settings, __doc__, args.processes)
    _, lines, model, t5 = estimate(s, args.processes)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = s.device if s.device != "auto" else accelerator.type if accelerator else "cpu"
    peak = peak_flops(accelerator, torch.bfloat16) if accelerator and accelerator.type == device else None
    on_cpu = device == "cpu" and args.processes == 1
    if on_cpu:
        print("time is measured on this machine's CPU, memory is estimated for a GPU; for a GPU's time: --device=cuda")
    elif not peak:
        print(f"no GPU with a known peak on this machine: time assumes {args.processes} x {DEFAULT_GPU} at"
              f" {100 * args.mfu:g} % of its peak, memory is estimated for a GPU")  # fmt: skip
    print(*lines, *table_of_gpus(s, args.processes, model, t5), sep="\n", flush=True)
    if on_cpu:
        step, basis = time_on_cpu(s, model, t5)
    else:
        name, peak = (torch.cuda.get_device_name(), peak) if peak else (DEFAULT_GPU, 1e12 * PEAK_TFLOPS[DEFAULT_GPU])
        step = model.flops() * s.batch_size * (1 + t5_share(model, t5)) / (peak * args.processes * args.mfu)
        basis = f"at {100 * args.mfu:g} % of {args.processes} x {peak / 1e12:g} TFLOP/s ({name}, 16 bits)"
    hours = s.steps * step / 3600
    minutes = f" ({60 * hours:.1f} minutes)" if hours < 2 else ""
    print(f"time: {s.steps:,} steps of {step:,.4g} s, {basis}: {hours:,.1f} hours{minutes}, without validation and"
          " samples")  # fmt: skip


if __name__ == "__main__":
    common.run(main)
