"""Measure the speed of training and generation: the share of the machine's ceilings, and the ratio to other programs.

    python -m tools.bench                                 # tiny, on this machine's device
    python -m tools.bench --size small --train_batch 1 --generate_batch 1,4 --generate_frames 50
    python -m tools.bench --compile --peers               # also compiled, and beside the installed peers
    python -m tools.bench --gpu                           # all measurements for a GPU

The rows of one table are timed in turn, `--repeats` times, so that other load on the machine affects all of them
equally. A table gives medians, with the slowest and fastest repeat. The ceilings are the operations of a large matrix
product and the bandwidth of a large copy. Training is timed by train.py's own `training_step`.

Letters: B batch, K codebooks, T frames.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path

import common  # before torch; it sets GOMP_SPINCOUNT
import distributed

# isort: split
import numpy as np
import torch

import config
import data
import prepare
import train
from audio import load_audio
from codec import encode_long, load_codec
from common import UserError, first_line
from config import Settings
from dataprep import shards
from dataprep.analysis import count_cores
from demo import corpus
from extras import compiler
from generate import generate, optimize, stream
from model import MusicLM
from tools import learn, peers

SIZES = {
    "tiny": dict(dim=256, heads=4, layers=6),
    "small": dict(dim=1024, heads=16, layers=24, ema_every=10),
    "medium": dict(dim=1536, heads=24, layers=48, ema_every=10),
}
WORK = ("train", "run", "generate", "prepare", "start", "learn", "scale")
K, FRAME_RATE, CFG, TOP_K = 4, 50, 3.0, 250
CONDITIONS = {"text": "a slow piano melody in a minor key, with drums"}
ON_GPU = (  # each runs in its own process, so that peak memory is measured separately
    "--work train --size small --train_batch 8 --train_frames 1500 --compile --peers",
    "--work train --size medium --train_batch 2 --train_frames 1500 --compile",
    "--work run --size small --train_batch 16 --train_frames 1500",
    "--work run --size medium --train_batch 4 --train_frames 1500",
    "--work generate --size small --generate_batch 1,64 --generate_frames 250 --compile",
    "--work generate --size small --generate_batch 1,64 --generate_frames 50 --peers",
    "--work prepare",
)


# ------------------------------------------------------------------------------------------------------- timing


def clock(call, device):
    """Return the seconds that a call takes, work on the device included."""

    def synchronize():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if device.type == "mps":
            torch.mps.synchronize()

    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def in_turn(calls, device, repeats):
    """{name: callable} -> {name: (seconds of the first call, [seconds of the others])}. Peers that fail are skipped."""
    first = {}
    for name, call in calls.items():
        try:
            first[name] = clock(call, device)
        except Exception as error:
            if name[0] not in peers.NAMES:
                raise
            print(f"{name[0]}{' compiled' * name[1]} is skipped: {first_line(error)}")
    times = {name: [] for name in first}
    for _ in range(repeats):
        for name in first:
            times[name].append(clock(calls[name], device))
    return {name: (first[name], times[name]) for name in first}


def median_of(call, device, repeats):
    return statistics.median(in_turn({"": call}, device, repeats)[""][1])


def ceilings(device, dtype):
    """Return (floating-point operations, bytes read and written) per second."""
    n, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = median_of(lambda: a @ b, device, 10), median_of(lambda: target.copy_(source), device, 10)
    return 2 * n**3 / product, 2 * size / copy


def print_table(title, times, units, unit, share_of_ceiling):
    """Print one row for each (name, compiled) of `times`, from `in_turn`. units: the work of one call."""
    print(f"\n{title}")
    rates = {row: [units / second for second in seconds] for row, (_, seconds) in times.items()}
    for (name, compiled), (first, _) in times.items():
        slowest, rate, fastest = (f(rates[name, compiled]) for f in (min, statistics.median, max))
        comparison = f"{100 * share_of_ceiling(rate):.0f} % of ceiling"
        if name != "ours":
            comparison = f"ours: {statistics.median(rates['ours', compiled]) / rate:.2f} x"
        spread = f"({slowest:,.1f} to {fastest:,.1f})"
        name += " compiled" * compiled
        print(f"  {name:22}{rate:12,.1f} {unit} {spread:24}{comparison:18}first call {first:.1f} s")


def peak_memory(device):
    """Return GiB, the maximum since the start: of tensors on a GPU, otherwise of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


# ---------------------------------------------------------------------------------------------------- measurements


def make_model(args, frames, device):
    """Return (a MusicLM of the size of `args`, trained on `frames` frames, its Settings)."""
    torch.manual_seed(0)
    sizes = dict(**SIZES[args.size], segment=frames / FRAME_RATE)
    s = Settings(**sizes, activation_checkpointing=args.activation_checkpointing)
    tokenizer = prepare.train_tokenizer([dict(caption=CONDITIONS["text"], metadata={})], 1000)
    with torch.device(device):  # initialized there, because a CPU takes 30 s for small
        return MusicLM(s, dict(K=K, card=args.card, frame_rate=FRAME_RATE, dim=64), tokenizer), s


def condition_length(args):
    return len(make_model(args, 100, "meta")[0].conditioner.text.tokenizer.encode(CONDITIONS["text"]))


def peer_rows(args, make_peer):
    """Return {(name, compiled): call} of the peers in --peers that are installed."""
    rows = {}
    for name in filter(None, args.peers.split(",")):
        for compiled in (False, True)[: 1 + args.compile]:
            try:
                rows[name, compiled] = make_peer(name, compiled)
            except ImportError as error:
                print(f"{name} is skipped: {error}")
    return rows


def our_training(args, B, device, dtype, compiled):
    """Return (model, a call that runs train.py's training step on one micro-batch)."""
    T = args.train_frames
    model, s = make_model(args, T, device)
    ema = deepcopy(model)
    if compiled:
        compiler.compile_blocks(model, device)
    state = train.make_state(model, model, ema, s, device, dtype)
    mask = torch.ones(B, T, dtype=torch.bool)
    targets = data.count_targets(mask, model.pattern(T, training=True, device="cpu"))
    tensors = model.conditioner.tokenize([CONDITIONS] * B)
    batch = data.Batch(torch.randint(args.card, (B, K, T)), mask, mask, tensors, targets).to(device)
    return model, lambda: train.training_step(state, [batch], s.lr, s)


def write_empty_data(folder, frames, tracks=50):
    """Write a data set of `tiny` with different captions of 1 to 5 clauses. Its codes are 0, holes in sparse files."""
    codec, per_shard = load_codec("tiny").info(), max(1, prepare.SHARD_FRAMES // frames)
    lines = [dict(name=f"track {i}", path="", caption=", ".join([CONDITIONS["text"]] * (1 + i % 5) + [str(i)]),
                  metadata={}, frames=frames) for i in range(tracks)]  # fmt: skip
    splits = {"train": lines, "valid": lines[:50]}
    for split, all_lines in splits.items():
        for shard, first in enumerate(range(0, len(all_lines), per_shard)):
            path, here = folder / f"{split}_{shard:03d}", all_lines[first : first + per_shard]
            np.lib.format.open_memmap(f"{path}.npy", "w+", "<u2", (len(here) * frames, codec["K"]))
            np.lib.format.open_memmap(f"{path}_melody.npy", "w+", "|u1", (len(here) * frames,))
            Path(f"{path}.jsonl").write_text(
                "".join(json.dumps({**line, "first": i * frames}) + "\n" for i, line in enumerate(here))
            )
    np.save(folder / "counts.npy", np.ones((2, codec["K"], codec["card"]), np.int64))
    (folder / "tokenizer.model").write_bytes(prepare.train_tokenizer(lines[:1000], 1000))
    sizes = {split: dict(tracks=len(lines), frames=len(lines) * frames) for split, lines in splits.items()}
    common.write_json(folder / "meta.json", dict(format=shards.DATA_FORMAT, codec=codec, **sizes))


def seconds_to_draw(args, B):
    """Return the seconds to draw a batch from files. With a GPU, a worker does it ahead."""
    with tempfile.TemporaryDirectory() as folder:
        write_empty_data(Path(folder), 30 * FRAME_RATE)
        model, _ = make_model(args, args.train_frames, "meta")
        batches = data.TrainingBatches(data.TokenDataset(folder, "train"), model, Settings(batch_size=B))
        return median_of(lambda: batches[0], torch.device("cpu"), 10)


def bench_run(args, device):
    """Measure train.py itself on every GPU, by DDP and FSDP if there are several."""
    ranks = torch.cuda.device_count() if device.type == "cuda" else 1
    B, steps = args.train_batch[0], 20 * args.repeats
    print(f"\nrun of train.py {args.size}: {ranks} x {B} items of {args.train_frames} frames, compiled")
    with tempfile.TemporaryDirectory() as folder:
        write_empty_data(Path(folder), args.train_frames)
        for parallel in ("ddp", "fsdp")[: 1 + (ranks > 1)]:
            out = Path(folder, parallel)
            words = [f"--data={folder}", f"--out={out}", "--codec=tiny", f"--segment={args.train_frames / FRAME_RATE}",
                     f"--batch_size={ranks * B}", f"--micro_batch={B}", f"--parallel={parallel}", f"--steps={steps}",
                     f"--epoch={steps}", f"--log_every={steps // 2}", "--compile=always", "--samples=0",
                     "--evaluate_clips=0", f"--dtype={args.dtype}", f"--device={device.type}", "--valid_items=8",
                     *(f"--{key}={value}" for key, value in SIZES[args.size].items())]  # fmt: skip
            launcher = ["torch.distributed.run", f"--nproc_per_node={ranks}"] if ranks > 1 else []
            start = time.perf_counter()
            subprocess.run([sys.executable, *(["-m"] * bool(launcher)), *launcher, "train.py", *words], check=True,
                           cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL)  # fmt: skip
            seconds = time.perf_counter() - start
            line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
            on_gpu = f"MFU {line['mfu']:.1%}, {line['memory']:.1f} GiB, " if "mfu" in line else ""
            name = parallel if ranks > 1 else "one process"
            rate = f"{line['tokens_per_s']:12,} codes in the loss/s"
            print(f"  {name:22}{rate}  {on_gpu}waits for data {line['data_wait']:.1%};"
                  f" the run took {seconds:.0f} s in total")  # fmt: skip


def bench_training(args, B, device, dtype, product):
    """Measure training steps beside the peers'. product: operations per second of a large matrix product."""
    L, T = condition_length(args), args.train_frames
    steps = {}
    for compiled in (False, True)[: 1 + args.compile]:
        model, steps["ours", compiled] = our_training(args, B, device, dtype, compiled)

    def make_peer(name, compiled):
        shape = dict(**SIZES[args.size], card=args.card, K=K)
        return peers.training(name, shape, B, T, L, device, dtype, compiled)

    steps |= peer_rows(args, make_peer)
    times, units = in_turn(steps, device, args.repeats), B * K * T
    title = f"training {args.size}: B {B}, T {T}, {str(dtype)[6:]}; ceiling: a large matrix product"
    print_table(title, times, units, "tokens/s", lambda rate: rate / units * B * model.flops() / product)
    seconds = statistics.median(times["ours", args.compile][1])
    print(f"  ours: drawing the next batch takes {100 * seconds_to_draw(args, B) / seconds:.1f} % of a step;"
          f" peak memory of all rows so far {peak_memory(device):.1f} GiB")  # fmt: skip


def bench_generation(args, B, device, dtype, copy):
    """Measure generation beside the peers'. copy: bytes per second of a large copy."""
    L, T, rows = condition_length(args), args.generate_frames, {}
    for compiled in (False, True)[: 1 + args.compile]:
        model = make_model(args, T, device)[0].eval().requires_grad_(False)
        weights = dtype.itemsize * sum(p.numel() for part in (model.blocks, model.heads) for name, p in
                                       part.named_parameters() if "cross_kv" not in name)  # fmt: skip
        optimize(model, dtype, compiled)
        rows["ours", compiled] = functools.partial(generate, model, [CONDITIONS] * B, T, cfg=CFG, top_k=TOP_K)

    def make_peer(name, compiled):
        shape = dict(**SIZES[args.size], card=args.card, K=K)
        return peers.generation(name, shape, B, T, L, device, dtype, CFG, TOP_K, compiled)

    rows |= peer_rows(args, make_peer)
    times = in_turn(rows, device, args.repeats)
    title = (f"generation {args.size}: B {B}, {T} frames, guidance {CFG:g}, {str(dtype)[6:]}; frames/s per stream;"
             f" ceiling: reading {weights / 1e6:.0f} MB of weights per frame")  # fmt: skip
    print_table(title, times, T, "frames/s", lambda rate: rate * weights / copy)
    seconds = statistics.median(times["ours", args.compile][1])
    first = median_of(lambda: next(stream(model, [CONDITIONS] * B, T, cfg=CFG, top_k=TOP_K)), device, args.repeats)
    print(f"  ours: {B * T / FRAME_RATE / seconds:.1f} x real time for all streams together; first frame after"
          f" {1000 * first:.0f} ms; {T * weights / seconds / 1e9:.1f} GB/s of weights")  # fmt: skip


def bench_prepare(args):
    """Measure `prepare.py` on clips of the demo, and its codec alone with as many processes, one file at a time."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        clips, audio = args.clips, Path(folder, "audio")
        corpus.write_corpus(audio, clips)
        codec = load_codec("tiny").to("cuda" if torch.cuda.is_available() else "cpu")
        wavs = [load_audio(path, codec.sample_rate, 1) for path in sorted(audio.glob("*.flac"))]
        seconds = sum(wav.shape[1] for wav in wavs) / codec.sample_rate
        workers = count_cores() if codec.device.type == "cpu" else 1
        with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
            shares = [(codec, [wav.numpy() for wav in wavs[i::workers]]) for i in range(workers)]
            codec_seconds = max(map(encode_alone, shares) if workers == 1 else pool.map(encode_alone, shares))
        start = time.perf_counter()
        prepare.prepare(audio / "manifest.jsonl", Path(folder, "data"))
        prepare_seconds = time.perf_counter() - start
    print(f"\nprepare: {clips} clips, {seconds / 60:.0f} minutes")
    print(f"  the codec alone       {seconds / codec_seconds:12.0f} x real time")
    print(f"  prepare.py            {seconds / prepare_seconds:12.0f} x real time,"
          f" {100 * codec_seconds / prepare_seconds:.0f} % of the codec's speed")  # fmt: skip


def encode_alone(share):
    """Encode a worker's share of the files and return the seconds."""
    codec, wavs = share
    wavs = [torch.from_numpy(wav) for wav in wavs]
    encode_long(codec, wavs[0])
    start = time.perf_counter()
    for wav in wavs:
        encode_long(codec, wav)
    return time.perf_counter() - start


def bench_scale(args):
    """Measure what grows with data and model: opening tracks of 3 minutes, drawing items of 30 s, and checkpoints."""
    print(f"\nscale: {args.tracks:,} tracks, a model of size {args.size}")
    with tempfile.TemporaryDirectory() as folder:
        write_empty_data(Path(folder), 180 * FRAME_RATE, args.tracks)
        before, start = resident_memory(), time.perf_counter()
        dataset = data.TokenDataset(folder, "train")
        opened, memory = time.perf_counter() - start, (resident_memory() - before) / 2**20
        print(f"  opened in {opened:.1f} s and {memory:,.0f} MiB")
        (model, s), path = make_model(args, 30 * FRAME_RATE, "cpu"), Path(folder, "last.pt")
        batches, numbers = data.TrainingBatches(dataset, model, Settings(batch_size=192)), itertools.count()
        drawn = median_of(lambda: batches[next(numbers)], torch.device("cpu"), 10)
        print(f"  an item drawn in {1000 * drawn / 192:.2f} ms")
        optimizer = train.make_optimizer(model, s)
        moments = {name: dict(step=torch.ones(()), exp_avg=torch.ones_like(p), exp_avg_sq=torch.ones_like(p))
                   for name, p in model.named_parameters()}  # fmt: skip
        ema, start = deepcopy(model.state_dict()), time.perf_counter()
        common.save_checkpoint(path, "last", model=model.state_dict(), ema=ema, optimizer=moments)
        size, wrote, start = path.stat().st_size / 1e9, time.perf_counter() - start, time.perf_counter()
        saved = common.load_checkpoint(path)
        distributed.set_state(model, saved["model"], optimizer, saved["optimizer"])
        print(f"  a checkpoint of {size:.2f} GB written in {wrote:.1f} s, its weights and moments read in"
              f" {time.perf_counter() - start:.1f} s")  # fmt: skip


def resident_memory():
    """Return the bytes of memory that this process uses, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bench_start_up(args):
    """Measure from the shell to the end of --help: starting Python, importing torch and all modules."""
    options = dict(cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL, check=True)
    calls = {program: functools.partial(subprocess.run, [sys.executable, program, "--help"], **options)
             for program in ("train.py", "sample.py")}  # fmt: skip
    calls["import torch alone"] = functools.partial(subprocess.run, [sys.executable, "-c", "import torch"], **options)
    print("\nstart-up")
    for name, (_, seconds) in in_turn(calls, torch.device("cpu"), args.repeats).items():
        print(f"  {name:22}{statistics.median(seconds):12.2f} s")


def numbers(text):
    return [int(part) for part in text.split(",")]


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work", default="train,generate,start", help=f"of {', '.join(WORK)} (default: %(default)s)")
    add("--size", choices=list(SIZES), default="tiny")
    add("--card", type=int, help="codebook size (default: 1024 for tiny, otherwise 2048)")
    add("--train_batch", type=numbers, default=[8], help="items per step; 4,8 makes two tables (default 8)")
    add("--train_frames", type=int, default=250, help="frames per item (default 250)")
    add("--generate_batch", type=numbers, default=[1, 4], help="samples generated together (default 1,4)")
    add("--generate_frames", type=int, default=500, help="frames per sample (default 500)")
    add("--dtype", choices=config.CHOICES["dtype"], default="auto", help="default: as in training")
    add("--device", default="auto", help="cuda, mps or cpu")
    add("--compile", action="store_true", help="measure compiled code too; its first call compiles")
    add("--activation_checkpointing", action="store_true", help="as in training")
    add("--peers", nargs="?", default="", const=",".join(peers.NAMES), help="compare with transformers and audiocraft,"
        " if installed, or with one of them; all are in memory together")  # fmt: skip
    add("--clips", type=int, default=600, help="clips of the demo for --work prepare (default 600)")
    add("--tracks", type=int, default=400_000, help="tracks for --work scale (default 400,000)")
    add("--seconds", type=float, default=300, help="training time of each row of --work learn (default 300)")
    add("--repeats", type=int, default=5, help="timed calls of each row, in turn (default 5)")
    add("--gpu", action="store_true", help=f"run these, each in its own process: {'; '.join(ON_GPU)}")
    return parser


def main():
    args = make_parser().parse_args()
    if args.gpu:
        if not torch.cuda.is_available():
            raise UserError("--gpu: no CUDA device on this machine; run without --gpu")
        for words in ON_GPU:
            command = [sys.executable, "-m", "tools.bench", *words.split(), f"--repeats={args.repeats}"]
            subprocess.run(command, cwd=Path(__file__).parent.parent)
        return
    args.card = args.card or (1024 if args.size == "tiny" else 2048)
    if unknown := set(args.work.split(",")) - {*WORK}:
        raise UserError(f"--work: unknown '{unknown.pop()}'; choose from {', '.join(WORK)}")
    if unknown := set(filter(None, args.peers.split(","))) - set(peers.NAMES):
        raise UserError(f"--peers: unknown '{unknown.pop()}'; choose from {', '.join(peers.NAMES)}")
    device, dtype = common.pick_device(args.device, args.dtype)
    if device.type == "cpu":  # train.py does the same
        common.keep_freed_memory()
    product, copy = ceilings(device, dtype)
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else torch.cpu.get_capabilities().get("cpu_name", "a CPU")
    commit = common.git("describe", "--always", "--dirty").strip()
    where = common.describe_device(device, dtype)
    print(f"{name}: {where}, torch {torch.__version__}, commit {commit or 'unknown'}; ceilings:"
          f" matrix product {product / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:,.1f} GB/s read and written")  # fmt: skip
    if "learn" in args.work:
        learn.bench_learning([*filter(None, args.peers.split(","))], args.seconds, device, dtype)
    if "train" in args.work:
        for B in args.train_batch:
            bench_training(args, B, device, dtype, product)
    if "run" in args.work:
        bench_run(args, device)
    if "generate" in args.work:
        for B in args.generate_batch:
            bench_generation(args, B, device, dtype, copy)
    if "prepare" in args.work:
        bench_prepare(args)
    if "scale" in args.work:
        bench_scale(args)
    if "start" in args.work:
        bench_start_up(args)


if __name__ == "__main__":
    common.run(main)
