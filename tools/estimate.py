"""What a run will take, before it is begun: parameters, operations, memory by part, time. Allocates no weights.

    python -m tools.estimate config/small.py --processes=8
    python -m tools.estimate config/large.py --processes=48 --parallel=fsdp --activation_checkpointing=True --mfu=0.35

--processes, 1 by default, and --mfu, the share of the device's peak that is taken for granted, 0.4 by default, come
before or after the settings of train.py.

Letters: B items that a device holds at once, K codebooks, S sequence steps, D model width.
"""

import argparse
import contextlib
from pathlib import Path

import torch

import common
import config
import data
from codec import describe_codec
from common import PEAK_TFLOPS, UserError, peak_flops
from model import MusicLM, freeze
from prepare import train_tokenizer

VOCABULARY = 1000  # of the captions' tokenizer, where no data is prepared yet
ASSUMED = "H100"  # where this machine's own device is not known


def activation_bytes(s, rows, low):
    """Bytes that autograd keeps of one block for `rows` steps of one item, `low` bytes a number in matrix products.

    The residual stream is in float32 and is kept before each of the three norms. Kept for the products: the norms'
    outputs (3 D), q, k, v, the cross-attention's q (4 D), both attentions' outputs (2 D), and the feed-forward before
    and after its GELU (8 D). Attention keeps no S x S matrix (arXiv:2205.14135).
    """
    return rows * s.dim * (3 * 4 + 17 * low)


def estimate(s, processes=1, mfu=0.4):
    """-> ({part: bytes on each device}, lines to print), from settings alone, or the data set where it is prepared.

    For a GPU: bfloat16 unless the settings say otherwise. Activations that frozen weights need not keep are counted in.
    """
    there = Path(s.data, "meta.json").exists()
    codec = data.read_meta(s.data)["codec"] if there else describe_codec(s.codec)
    tokenizer = data.read_tokenizer(s.data) if there else train_tokenizer([], VOCABULARY)
    device = torch.device("cuda" if torch.cuda.is_available() and s.device in ("auto", "cuda") else "cpu")
    dtype = torch.bfloat16 if s.dtype == "auto" else getattr(torch, s.dtype)
    with torch.device("meta"):
        model = MusicLM(s, codec, tokenizer)
        if not there:
            model.conditioner.text.embed = torch.nn.Embedding(VOCABULARY, s.text_dim)
        freeze(model, s.freeze)
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    matrices = sum(p.numel() for part in (model.blocks, model.heads) for p in part.parameters())
    ranks, low = processes, 4 if dtype == torch.float32 else 2
    shards = ranks if s.parallel == "fsdp" else 1
    B = s.micro_batch or s.batch_size // ranks
    S = model.pattern(model.trained_frames, training=True).S - 1
    block = activation_bytes(s, S + model.conditioner.rows, low)
    kept = (len(model.blocks) * 4 * s.dim * (S + model.conditioner.rows) + block if s.activation_checkpointing
            else len(model.blocks) * block)  # fmt: skip
    copies = 0 if low == 4 else low * matrices
    if shards > 1:  # of the blocks, one by one; two at once, as the next is fetched ahead
        copies = low * (matrices if not s.reshard_after_forward else 2 * matrices // len(model.blocks))
    memory = {
        "weights": 4 * everything / shards,
        "gradients": 4 * trained / shards,
        "optimizer": 8 * trained / shards,
        "EMA": 4 * everything / shards,
        "weights to compute with": copies,
        "activations": B * kept,
        "logits": B * S * model.K * model.card * (2 * 4 + low),  # log-probabilities, and their gradient twice
    }
    flops, peak = model.flops(), peak_flops(device, torch.bfloat16)
    name = torch.cuda.get_device_name(device) if peak else ASSUMED
    peak = peak or 1e12 * PEAK_TFLOPS[ASSUMED]
    hours = flops * s.batch_size * s.steps / (peak * ranks * mfu) / 3600
    lines = [f"{everything / 1e6:,.1f}M parameters, {trained / 1e6:,.1f}M of them trained; codec {codec['name']}, K"
             f" {model.K}, card {model.card}" + ("" if there else f"; {s.data} is not there, so its captions are taken"
             f" to have a vocabulary of {VOCABULARY}"),
             f"{flops / (model.K * model.trained_frames) / 1e9:,.3f} GFLOP a token, forward and backward;"
             f" {flops * s.batch_size / 1e12:,.1f} TFLOP a step of {s.batch_size} x {s.segment:g} s",
             f"memory of each of {ranks} devices, {s.parallel}, {B} items at once in {str(dtype)[6:]}:"]  # fmt: skip
    lines += [f"  {part:24}{size / 2**30:8.2f} GiB" for part, size in memory.items()]
    lines += [f"  {'in all':24}{sum(memory.values()) / 2**30:8.2f} GiB, and what the allocator and the device need",
              f"time: {s.steps:,} steps at {100 * mfu:g} % of {ranks} x {peak / 1e12:g} TFLOP/s ({name}, 16 bits):"
              f" {hours:,.1f} hours, without validation and samples"]  # fmt: skip
    return memory, lines


def in_one_line(words):
    """For a run of train.py with these arguments that has run out of memory: what it takes, and what lowers that."""
    ranks, parts = common.world_size(), ""
    s = config.load(words, __doc__, ranks)
    with contextlib.suppress(Exception):  # there may be no memory for this either
        s.dtype = str(common.pick_device(s.device, s.dtype)[1]).removeprefix("torch.")
        sizes = {part: size / 2**30 for part, size in estimate(s, ranks)[0].items()}
        parts = ", ".join(f"{part} {size:.2f}" for part, size in sizes.items() if size >= 0.01)
        parts = f"training takes, in GiB by estimate, {parts}; "
    ways = {
        "a smaller --micro_batch": (s.micro_batch or s.batch_size // ranks) > 1,
        "--activation_checkpointing=True": not s.activation_checkpointing,
        "--parallel=fsdp": ranks > 1 and s.parallel == "ddp",
        "a smaller model": True,
    }
    return f"{parts}take {' or '.join(way for way, helps in ways.items() if helps)}; in samples lower --clip_seconds"


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
