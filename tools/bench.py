"""How fast training and generation are, beside what the machine can do at best, and beside other programs.

    python -m tools.bench                                 # tiny, on the device that there is
    python -m tools.bench --size small --train_batch 1 --generate_batch 1,4 --generate_frames 50
    python -m tools.bench --compile --peers               # compiled too, and the peers that are installed
    python -m tools.bench --gpu                           # all that one wants to know of a GPU

What is in one table is timed in turn, once each, `--repeats` times over: whatever else the machine does falls on all
alike. Given are medians, and the slowest and quickest of the repeats. The ceilings are the arithmetic of a large
matrix product and the bandwidth of a large copy. The step is that of train.py's loop (of small's EMA, a tenth step's, a
median sees nothing), and the generation generate.py's.

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

import common  # before torch, whose threads it tells how to wait

# isort: split
import numpy as np
import torch

import config
import data
import prepare
import train
from codec import encode_long, load_audio, load_codec
from common import UserError, first_line
from config import Settings
from demo import corpus
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
ON_GPU = (  # each in a process of its own, so that the memory is its own
    "--work train --size small --train_batch 8 --train_frames 1500 --compile --peers",
    "--work train --size medium --train_batch 2 --train_frames 1500 --compile",
    "--work run --size small --train_batch 16 --train_frames 1500",
    "--work run --size medium --train_batch 4 --train_frames 1500",
    "--work generate --size small --generate_batch 1,64 --generate_frames 250 --compile",
    "--work generate --size small --generate_batch 1,64 --generate_frames 50 --peers",
    "--work prepare",
)


# --------------------------------------------------------------------------------------------------- the clock


def clock(call, device):
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
    """{name: callable} -> {name: (seconds of the first call, [those of the others])}, without failing peers."""
    first = {}
    for name, call in calls.items():
        try:
            first[name] = clock(call, device)
        except Exception as error:
            if name[0] not in peers.NAMES:
                raise
            print(f"{name[0]}{' compiled' * name[1]} is left out: {first_line(error)}")
    times = {name: [] for name in first}
    for _ in range(repeats):
        for name in first:
            times[name].append(clock(calls[name], device))
    return {name: (first[name], times[name]) for name in first}


def median_of(call, device, repeats):
    return statistics.median(in_turn({"": call}, device, repeats)[""][1])


def ceilings(device, dtype):
    """(floating-point operations, bytes read and written) a second."""
    n, size = (8192, 2**30) if device.type == "cuda" else (2048, 2**28)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    product, copy = median_of(lambda: a @ b, device, 10), median_of(lambda: target.copy_(source), device, 10)
    return 2 * n**3 / product, 2 * size / copy


def print_table(title, times, units, unit, share_of_ceiling):
    """times: what `in_turn` gives by (name, compiled), `units` done in each call."""
    print(f"\n{title}")
    rates = {row: [units / second for second in seconds] for row, (_, seconds) in times.items()}
    for (name, compiled), (first, _) in times.items():
        slowest, rate, quickest = (f(rates[name, compiled]) for f in (min, statistics.median, max))
        beside = f"{100 * share_of_ceiling(rate):.0f} % of ceiling"
        if name != "ours":
            beside = f"ours: {statistics.median(rates['ours', compiled]) / rate:.2f} x"
        spread = f"({slowest:,.1f} to {quickest:,.1f})"
        name += " compiled" * compiled
        print(f"  {name:22}{rate:12,.1f} {unit} {spread:24}{beside:18}first call {first:.1f} s")


def peak_memory(device):
    """GiB, since the start: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


# ---------------------------------------------------------------------------------------------------- the work


def shape_of(args):
    return dict(**SIZES[args.size], card=args.card, K=K)


def make_model(args, frames, device):
    torch.manual_seed(0)
    sizes = dict(**SIZES[args.size], segment=frames / FRAME_RATE)
    s = Settings(**sizes, activation_checkpointing=args.activation_checkpointing)
    tokenizer = prepare.train_tokenizer([dict(caption=CONDITIONS["text"], metadata={})], 1000)
    with torch.device(device):  # drawn there: a CPU takes half a minute for small
        return MusicLM(s, dict(K=K, card=args.card, frame_rate=FRAME_RATE, dim=64), tokenizer), s


def condition_length(args):
    return len(make_model(args, 100, "meta")[0].conditioner.text.tokenizer.encode(CONDITIONS["text"]))


def rows_of(args, make_peer):
    """{(name, compiled): call} of the peers that are asked for and installed."""
    rows, compiled_too = {}, (False, True)[: 1 + args.compile]
    for name in filter(None, args.peers.split(",")):
        for compiled in compiled_too:
            try:
                rows[name, compiled] = make_peer(name, compiled)
            except ImportError as error:
                print(f"{name} is left out: {error}")
    return rows


def our_training(args, B, device, dtype, compiled):
    """-> (model, a call that does what one turn of train.py's loop does with one micro-batch, on one process).

    The call gives the seconds that the optimizer and the EMA have taken of it.
    """
    T = args.train_frames
    model, s = make_model(args, T, device)
    model.train()
    ema, steps = deepcopy(model), itertools.count(1)
    if compiled:
        common.compile_blocks(model, device)
    optimizer = train.make_optimizer(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    everything = torch.ones(B, T, dtype=torch.bool)
    inputs = model.conditioner.prepare([CONDITIONS] * B)
    batch = data.Batch(torch.randint(args.card, (B, K, T)), everything, everything, inputs).to(device)
    targets = model.count_targets(everything.sum(0).to(device))

    def update(grad_norm):
        step, (*_, norm) = next(steps), grad_norm.tolist()
        if norm < float("inf"):
            scaler.step(optimizer)
            if step % s.ema_every == 0:
                train.update_ema(ema, model, s.ema_decay, step // s.ema_every)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            ce_sum, _ = model(*batch)
        loss = (ce_sum / targets).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        return clock(lambda: update(torch.cat([(ce_sum / targets).detach(), norm[None]])), device)

    return model, step


def write_empty_data(folder, frames, tracks=50):
    """A data set of `tiny` with captions of 1 to 5 clauses, no two alike; its tokens are holes in files, read as 0."""
    codec, per_shard = load_codec("tiny").describe(), max(1, prepare.SHARD_FRAMES // frames)
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
    common.write_json(folder / "meta.json", dict(format=data.DATA_FORMAT, codec=codec, **sizes))


def drawing(args, B):
    """Seconds to draw a batch from files, which a worker does ahead where there is a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        write_empty_data(Path(folder), 30 * FRAME_RATE)
        prepare_text = make_model(args, args.train_frames, "meta")[0].conditioner.prepare
        tokens = data.Tokens(folder, "train")
        steps = data.TrainingSteps(tokens, prepare_text, args.train_frames, Settings(batch_size=B))
        return median_of(lambda: steps[0], torch.device("cpu"), 10)


def bench_run(args, device):
    """train.py itself on every GPU that there is: DDP and FSDP where there are several."""
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
            name = parallel if ranks > 1 else "alone"
            print(f"  {name:22}{line['tokens_per_s']:12,} tokens/s  {on_gpu}waits for data {line['data_wait']:.1%};"
                  f" the whole run {seconds:.0f} s")  # fmt: skip


def bench_training(args, B, device, dtype, product):
    L, T = condition_length(args), args.train_frames
    steps = {}
    for compiled in (False, True)[: 1 + args.compile]:
        model, steps["ours", compiled] = our_training(args, B, device, dtype, compiled)

    def make_peer(name, compiled):
        return peers.training(name, shape_of(args), B, T, L, device, dtype, compiled)

    steps |= rows_of(args, make_peer)
    times, units = in_turn(steps, device, args.repeats), B * K * T
    title = f"training {args.size}: B {B}, T {T}, {str(dtype)[6:]}; ceiling: that of the matrix product"
    print_table(title, times, units, "tokens/s", lambda rate: rate / units * B * model.flops() / product)
    seconds, step = statistics.median(times["ours", args.compile][1]), steps["ours", args.compile]
    optimizer = statistics.median(step() for _ in range(args.repeats)) / seconds
    print(f"  ours: forward and backward {100 - 100 * optimizer:.1f} %, optimizer and average {100 * optimizer:.1f} %,"
          f" drawing the next batch {100 * drawing(args, B) / seconds:.1f} %;"
          f" peak memory of all so far {peak_memory(device):.1f} GiB")  # fmt: skip


def bench_generation(args, B, device, dtype, copy):
    L, T, rows = condition_length(args), args.generate_frames, {}
    for compiled in (False, True)[: 1 + args.compile]:
        model = make_model(args, T, device)[0].eval().requires_grad_(False)
        weights = dtype.itemsize * sum(p.numel() for part in (model.blocks, model.heads) for name, p in
                                       part.named_parameters() if "cross_kv" not in name)  # fmt: skip
        optimize(model, dtype, compiled)
        rows["ours", compiled] = functools.partial(generate, model, [CONDITIONS] * B, T, cfg=CFG, top_k=TOP_K)

    def make_peer(name, compiled):
        return peers.generation(name, shape_of(args), B, T, L, device, dtype, CFG, TOP_K, compiled)

    rows |= rows_of(args, make_peer)
    times = in_turn(rows, device, args.repeats)
    title = (f"generation {args.size}: B {B}, {T} frames, guidance {CFG:g}, {str(dtype)[6:]}; frames/s of one stream;"
             f" ceiling: reading {weights / 1e6:.0f} MB of weights a frame")  # fmt: skip
    print_table(title, times, T, "frames/s", lambda rate: rate * weights / copy)
    seconds = statistics.median(times["ours", args.compile][1])
    first = median_of(lambda: next(stream(model, [CONDITIONS] * B, T, cfg=CFG, top_k=TOP_K)), device, args.repeats)
    print(f"  ours: {B * T / FRAME_RATE / seconds:.1f} x real time, all streams together; first frame after"
          f" {1000 * first:.0f} ms; {T * weights / seconds / 1e9:.1f} GB/s of weights")  # fmt: skip


def bench_prepare(args):
    """`prepare.py` on clips of the demo, beside its codec alone on as many processes, a file at a time."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        clips, audio = args.clips, Path(folder, "audio")
        corpus.write_corpus(audio, clips)
        codec = load_codec("tiny").to("cuda" if torch.cuda.is_available() else "cpu")
        wavs = [load_audio(path, codec.sample_rate, 1) for path in sorted(audio.glob("*.flac"))]
        seconds = sum(wav.shape[1] for wav in wavs) / codec.sample_rate
        workers = os.cpu_count() if codec.device.type == "cpu" else 1
        with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
            shares = [(codec, [wav.numpy() for wav in wavs[i::workers]]) for i in range(workers)]
            alone = max(map(encode_alone, shares) if workers == 1 else pool.map(encode_alone, shares))
        start = time.perf_counter()
        prepare.prepare(audio / "manifest.jsonl", Path(folder, "data"))
        whole = time.perf_counter() - start
    print(f"\nprepare: {clips} clips, {seconds / 60:.0f} minutes")
    print(f"  the codec alone       {seconds / alone:12.0f} x real time")
    print(f"  prepare.py            {seconds / whole:12.0f} x real time, {100 * alone / whole:.0f} % of that")


def encode_alone(share):
    """Seconds that a worker takes."""
    codec, wavs = share
    wavs = [torch.from_numpy(wav) for wav in wavs]
    encode_long(codec, wavs[0])
    start = time.perf_counter()
    for wav in wavs:
        encode_long(codec, wav)
    return time.perf_counter() - start


def bench_scale(args):
    """What grows with the data set and the model: opening `--tracks` tracks of 3 minutes, drawing an item of 30 s from
    them; writing and reading a checkpoint.
    """
    print(f"\nscale: {args.tracks:,} tracks, a model of size {args.size}")
    with tempfile.TemporaryDirectory() as folder:
        write_empty_data(Path(folder), 180 * FRAME_RATE, args.tracks)
        before, start = resident(), time.perf_counter()
        tokens = data.Tokens(folder, "train")
        print(f"  opened in {time.perf_counter() - start:.1f} s and {(resident() - before) / 2**20:,.0f} MiB")
        (model, s), path, T = make_model(args, 250, "cpu"), Path(folder, "last.pt"), 30 * FRAME_RATE
        steps = data.TrainingSteps(tokens, model.conditioner.prepare, T, Settings(batch_size=192))
        numbers = itertools.count()
        drawn = median_of(lambda: steps[next(numbers)], torch.device("cpu"), 10)
        print(f"  an item drawn in {1000 * drawn / 192:.2f} ms")
        optimizer = train.make_optimizer(model, s)
        moments = {name: dict(step=torch.ones(()), exp_avg=torch.ones_like(p), exp_avg_sq=torch.ones_like(p))
                   for name, p in model.named_parameters()}  # fmt: skip
        ema, start = deepcopy(model.state_dict()), time.perf_counter()
        common.save_checkpoint(path, "last", model=model.state_dict(), ema=ema, optimizer=moments)
        size, wrote, start = path.stat().st_size / 1e9, time.perf_counter() - start, time.perf_counter()
        saved = common.load_checkpoint(path)
        common.set_state(model, saved["model"], optimizer, saved["optimizer"])
        print(f"  a checkpoint of {size:.2f} GB written in {wrote:.1f} s, its weights and moments read in"
              f" {time.perf_counter() - start:.1f} s")  # fmt: skip


def resident():
    """Bytes of memory that this process holds; Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def bench_start_up(args):
    """From the shell to the end of --help: Python, torch and every module."""
    here = dict(cwd=Path(__file__).parent.parent, stdout=subprocess.DEVNULL, check=True)
    calls = {program: functools.partial(subprocess.run, [sys.executable, program, "--help"], **here)
             for program in ("train.py", "sample.py")}  # fmt: skip
    calls["import torch alone"] = functools.partial(subprocess.run, [sys.executable, "-c", "import torch"], **here)
    print("\nstart-up")
    for name, (_, seconds) in in_turn(calls, torch.device("cpu"), args.repeats).items():
        print(f"  {name:22}{statistics.median(seconds):12.2f} s")


def numbers(text):
    return [int(part) for part in text.split(",")]


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="train,generate,start", help=f"of {', '.join(WORK)} (default: %(default)s)")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--card", type=int, help="codebook size (default: 1024 for tiny, else 2048)")
    parser.add_argument(
        "--train_batch", type=numbers, default=[8], help="items, or several numbers of them (default 8)"
    )
    parser.add_argument("--train_frames", type=int, default=250, help="frames of each (default 250)")
    parser.add_argument("--generate_batch", type=numbers, default=[1, 4], help="streams at once (default 1,4)")
    parser.add_argument("--generate_frames", type=int, default=500, help="frames of each (default 500)")
    parser.add_argument("--dtype", choices=config.CHOICES["dtype"], default="auto", help="default: as in training")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu")
    parser.add_argument("--compile", action="store_true", help="time compiled code too; its first call compiles it")
    parser.add_argument("--activation_checkpointing", action="store_true", help="as in training")
    parser.add_argument("--peers", nargs="?", default="", const=",".join(peers.NAMES), help="beside transformers and"
                        " audiocraft, where installed, or the one named: all are in memory together")  # fmt: skip
    parser.add_argument("--clips", type=int, default=600, help="of the demo, to prepare (default 600)")
    parser.add_argument("--tracks", type=int, default=400_000, help="of --work scale (default 400,000)")
    parser.add_argument("--seconds", type=float, default=300, help="to learn for, of each (default 300)")
    parser.add_argument("--repeats", type=int, default=5, help="of each, in turn (default 5)")
    parser.add_argument("--gpu", action="store_true", help=f"instead of all that: {'; '.join(ON_GPU)}")
    return parser


def main():
    args = make_parser().parse_args()
    if args.gpu:
        if not torch.cuda.is_available():
            raise UserError("--gpu: there is no CUDA device here; leave it out")
        for words in ON_GPU:
            command = [sys.executable, "-m", "tools.bench", *words.split(), f"--repeats={args.repeats}"]
            subprocess.run(command, cwd=Path(__file__).parent.parent)
        return
    args.card = args.card or (1024 if args.size == "tiny" else 2048)
    if unknown := set(args.work.split(",")) - {*WORK}:
        raise UserError(f"--work: there is no '{unknown.pop()}'; choose of {', '.join(WORK)}")
    if unknown := set(filter(None, args.peers.split(","))) - set(peers.NAMES):
        raise UserError(f"--peers: there is no '{unknown.pop()}'; choose of {' and '.join(peers.NAMES)}")
    device, dtype = common.pick_device(args.device, args.dtype)
    if device.type == "cpu":  # as in train.py
        common.keep_freed_memory()
    product, copy = ceilings(device, dtype)
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else torch.cpu.get_capabilities().get("cpu_name", "a CPU")
    commit = common.git("describe", "--always", "--dirty").strip()
    where = common.describe_device(device, dtype)
    print(f"{name}: {where}, torch {torch.__version__}, commit {commit or 'unknown'}; ceilings:"
          f" matrix product {product / 1e9:,.0f} GFLOP/s, copy {copy / 1e9:,.1f} GB/s read and written")  # fmt: skip
    if "learn" in args.work:
        autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
        learn.bench_learning([*filter(None, args.peers.split(","))], args.seconds, device, autocast)
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
