"""Estimate parameters, operations, memory and time of a run, without starting it and without allocating weights.

    python -m tools.estimate config/small.py --processes=8
    python -m tools.estimate config/large.py --processes=48 --parallel=fsdp --activation_checkpointing=True --mfu=0.35

Takes the settings of train.py and two options: --processes (default 1), and --mfu (default 0.4), the assumed share of
the device's peak.

Letters: B items in one forward pass of a device, K codebooks, S sequence positions, D model width.
"""

import argparse
import contextlib
from pathlib import Path

import torch

import common
import config
import distributed
from codec import codec_info
from common import UserError
from dataprep import shards
from model import MusicLM, freeze
from prepare import train_tokenizer

VOCABULARY = 1000  # assumed vocabulary size if the data set is not prepared yet
# Dense bfloat16 and float16 matrix products in 1e12 operations/s, from the data sheets.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312,
               "L40S": 362, "L40": 181}  # fmt: skip
DEFAULT_GPU = "H100"  # assumed if this machine's device is not in the table


def peak_flops(device, dtype):
    """Return the device's peak floating-point operations per second, or None if unknown."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for model, peak in PEAK_TFLOPS.items() if model in name), None)


def activation_bytes(D, S, itemsize):
    """Return the bytes that autograd stores of one block for one item. itemsize: bytes per number in matrix products.

    In float32, the residual stream before each of the 3 norms (3 D). For the products, the norms' outputs (3 D), q, k,
    v and the cross-attention's q (4 D), both attentions' outputs (2 D), and the feed-forward layer before and after its
    GELU (8 D). Attention stores no S x S matrix (arXiv:2205.14135).
    """
    return S * D * (3 * 4 + 17 * itemsize)


def estimate(s, processes=1, mfu=0.4):
    """Return ({part: bytes on each device}, lines to print). Reads no more than the data set's metadata and tokenizer.

    dtype 'auto' counts as bfloat16. Activations of frozen layers are counted, although autograd may not store them.
    """
    is_prepared = Path(s.data, "meta.json").exists()
    codec = shards.read_meta(s.data)["codec"] if is_prepared else codec_info(s.codec)
    tokenizer = shards.read_tokenizer(s.data) if is_prepared else train_tokenizer([], VOCABULARY)
    with torch.device("meta"):
        model = MusicLM(s, codec, tokenizer)
        if not is_prepared:  # the vocabulary of a tokenizer without captions is smaller
            model.conditioner.text.embed = torch.nn.Embedding(VOCABULARY, s.text_dim)
        freeze(model, s.freeze)
    dtype = torch.bfloat16 if s.dtype == "auto" else getattr(torch, s.dtype)
    itemsize, n_blocks = dtype.itemsize, len(model.blocks)
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
    activations = n_blocks * activation_bytes(s.dim, positions, itemsize)
    if s.activation_checkpointing:  # the input of each block, and everything of one block
        activations = n_blocks * 4 * s.dim * positions + activations // n_blocks
    memory = {
        "weights": 4 * n_weights / split,
        "gradients": 4 * n_trained / split,
        "optimizer": 8 * n_trained / split,
        "EMA": 4 * n_weights / split,
        "cast or gathered weights": itemsize * n_cast,
        "activations": B * activations,
        "logits": B * S * model.K * model.card * (2 * 4 + itemsize),  # logits, log-probabilities, their gradient
    }
    device = torch.device("cuda" if torch.cuda.is_available() and s.device in ("auto", "cuda") else "cpu")
    flops, peak = model.flops(), peak_flops(device, torch.bfloat16)
    gpu = torch.cuda.get_device_name(device) if peak else DEFAULT_GPU
    peak = peak or 1e12 * PEAK_TFLOPS[DEFAULT_GPU]
    hours = flops * s.batch_size * s.steps / (peak * processes * mfu) / 3600
    assumption = "" if is_prepared else f"; {s.data} is not prepared, assuming a vocabulary of {VOCABULARY}"
    lines = [f"{n_weights / 1e6:,.1f}M parameters, {n_trained / 1e6:,.1f}M trained; codec {codec['name']}, K {model.K},"
             f" card {model.card}{assumption}",
             f"{flops / (model.K * model.trained_frames) / 1e9:,.3f} GFLOP per token, forward and backward;"
             f" {flops * s.batch_size / 1e12:,.1f} TFLOP per step of {s.batch_size} x {s.segment:g} s",
             f"memory per device, {s.parallel} on {processes}, {B} items per pass in {str(dtype)[6:]}:"]  # fmt: skip
    lines += [f"  {part:24}{size / 2**30:8.2f} GiB" for part, size in memory.items()]
    lines += [f"  {'total':24}{sum(memory.values()) / 2**30:8.2f} GiB, plus overhead of allocator and device",
              f"time: {s.steps:,} steps at {100 * mfu:g} % of {processes} x {peak / 1e12:g} TFLOP/s ({gpu}, 16 bits):"
              f" {hours:,.1f} hours, without validation and samples"]  # fmt: skip
    return memory, lines


def advise_on_memory(arguments):
    """Return advice for a run of train.py that is out of memory: the estimate, and the options that lower it."""
    processes, sizes = distributed.world_size(), ""
    s = config.load(arguments, __doc__, processes)
    with contextlib.suppress(Exception):  # the estimate needs memory too
        s.dtype = str(common.pick_device(s.device, s.dtype)[1]).removeprefix("torch.")
        memory = {part: size / 2**30 for part, size in estimate(s, processes)[0].items()}
        sizes = ", ".join(f"{part} {size:.2f}" for part, size in memory.items() if size >= 0.01)
        sizes = f"estimated GiB in training: {sizes}; "
    helps = {
        "a smaller --micro_batch": (s.micro_batch or s.batch_size // processes) > 1,
        "--activation_checkpointing=True": not s.activation_checkpointing,
        "--parallel=fsdp": processes > 1 and s.parallel == "ddp",
        "a smaller model": True,
    }
    options = " or ".join(option for option, is_useful in helps.items() if is_useful)
    return f"{sizes}use {options}; if it happened while generating samples, lower --clip_seconds"


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--mfu", type=float, default=0.4)
    args, settings = parser.parse_known_args()
    if args.processes < 1 or not 0 < args.mfu <= 1:
        raise UserError("--processes must be 1 or above, and --mfu above 0 and at most 1")
    print("\n".join(estimate(config.load(settings, __doc__, args.processes), args.processes, args.mfu)[1]))


if __name__ == "__main__":
    common.run(main)
