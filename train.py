"""Trains a MusicGen, top to bottom: restore -> (train, valid, best, generate, commit) per epoch -> evaluate.

    python train.py config/demo.py                   # text to music on a laptop, in a quarter of an hour
    python train.py config/small.py --data=data/mine --batch_size=16
    python train.py --help                           # every setting

Ctrl-C commits at the next step, and the same command goes on from there, bit for bit.
"""

import copy
import dataclasses
import json
import math
import shlex
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import demo_music
import metrics
from codec import load_codec, write_wav
from config import UserError
from model import MusicLM, load_model, pick_device, read_checkpoint, save_checkpoint

SHAPE_SETTINGS = "dim heads layers pattern delays text_dim text_heads text_layers text_max_tokens segment".split()


def learning_rate(step, s):
    """Linear warm-up, then a cosine from `lr` to `min_lr`."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def validate(model, valid_data, s, T, device, autocast):
    """Cross-entropy per codebook over the held-out segments, float [K]: (with the text, without it)."""
    totals = {"text": 0, "null": 0}
    count = 0
    for batch in valid_data.batches(T, s.micro_batch or s.batch_size, s.valid_items):
        codes, valid = batch.codes.to(device), batch.valid.to(device)
        for name, conditions in (("text", batch.conditions), ("null", [{} for _ in batch.conditions])):
            with autocast():
                ce_sum, counted = model(codes, valid, model.conditioner.prepare(conditions, device))
            totals[name] = totals[name] + ce_sum.cpu().double()
        count = count + counted.cpu().double()
    return (totals["text"] / count).tolist(), (totals["null"] / count).tolist()


def write_samples(folder, model, codec, valid_data, s):
    """The first held-out captions, each as a wav; the same captions and seeds every time."""
    folder.mkdir(parents=True, exist_ok=True)
    captions = [track["caption"] for track in valid_data.tracks[: s.samples]]
    codes = model.generate([{"text": c} for c in captions], model.trained_frames, cfg=s.cfg,
                           temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)  # fmt: skip
    for seed, (caption, wav) in enumerate(zip(captions, codec.decode(codes))):
        write_wav(folder, caption, seed, wav, codec.sample_rate)
    return folder


def append(path, **line):
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def drop_later_lines(path, step):
    """Lines of a log written after the checkpoint that the run goes on from."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(True) if line.endswith("\n")]  # a kill may cut the last
        lines = [line for line in lines if json.loads(line)["step"] <= step]
        path.with_suffix(".tmp").write_text("".join(lines))
        path.with_suffix(".tmp").replace(path)


def record_code(out):
    """The git hash and the changes on top of it, so that a run can be traced to its code."""
    here = dict(cwd=Path(__file__).parent, capture_output=True, text=True)
    commands = (["git", "rev-parse", "HEAD"], ["git", "diff", "HEAD"])
    try:
        (out / "code.diff").write_text("".join(subprocess.run(command, **here).stdout for command in commands))
    except OSError:  # no git on this machine
        pass


def main():
    s = config.load(sys.argv[1:], __doc__)
    device, dtype = pick_device(s.device, s.dtype)
    torch.set_flush_denormal(True)
    torch.manual_seed(s.seed)
    out, last, best = Path(s.out), Path(s.out, "last.pt"), Path(s.out, "best.pt")
    saved = read_checkpoint(last, "last") if last.exists() else None
    if saved and not s.resume:
        raise UserError(f"{last}: a run is there; choose another --out, or remove it, or drop --resume=False")

    # Data
    if s.demo_clips and not Path(s.data, "meta.json").exists():
        demo_music.write_corpus(s.data + "_audio", s.demo_clips)
        data.prepare(f"{s.data}_audio/manifest.jsonl", s.data, s.codec, s.codec_weights)
    train_data, valid_data = data.Tokens(s.data, "train"), data.Tokens(s.data, "valid")
    codec, about = load_codec(s.codec, s.codec_weights).to(device), train_data.meta["codec"]
    if codec.id != about["id"]:
        raise UserError(
            f"{s.data} was prepared with codec {about['id']}, and --codec={s.codec} is {codec.id}; prepare it again"
        )
    unigram = data.unigram_ce(train_data, valid_data).tolist()
    T = round(s.segment * codec.frame_rate)
    tokenizer = Path(s.data, "tokenizer.model").read_bytes()

    # Model
    model = MusicLM(s, about, tokenizer).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [dict(params=matrices, weight_decay=s.weight_decay), dict(params=vectors, weight_decay=0.0)],
        lr=s.lr, betas=(s.beta1, s.beta2), fused=device.type != "mps",
    )  # fmt: skip

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # Restore
    step, best_ce, ce_total, since_log = 0, math.inf, 0.0, 0
    if saved:
        theirs = {
            **dataclasses.asdict(config.Settings()),
            **saved["settings"],
            "codec": saved["codec"]["id"],
            "tokenizer": zlib.crc32(saved["tokenizer"]),
        }
        ours = {**dataclasses.asdict(s), "codec": codec.id, "tokenizer": zlib.crc32(tokenizer)}
        changes = {key: f"{key} was {theirs[key]!r}, is {ours[key]!r}" for key in ours if theirs[key] != ours[key]}
        if contradictions := [changes[key] for key in [*SHAPE_SETTINGS, "codec", "tokenizer"] if key in changes]:
            raise UserError(
                f"{last}: cannot go on with another model ({', '.join(contradictions)}); choose another --out"
            )
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        step, best_ce, ce_total, since_log = (saved[key] for key in ("step", "best_ce", "ce_total", "since_log"))
        print(f"going on from {last} at step {step}" + "".join(f"; {change}" for change in changes.values()))
    out.mkdir(parents=True, exist_ok=True)
    for name in ("metrics.jsonl", "history.jsonl"):
        drop_later_lines(out / name, step)
    data.write_json(out / "config.json", dataclasses.asdict(s))
    record_code(out)

    def refuse_nan():
        if not math.isfinite(float(ce_total) + float(grad_norm)):
            raise UserError(
                f"step {step}: the loss or its gradient is not a number; a lower --lr may help."
                f" {last if last.exists() else 'No checkpoint'} was left untouched"
            )

    def commit():
        refuse_nan()
        save_checkpoint(
            last, "last", model=model.state_dict(), ema=ema.state_dict(), optimizer=optimizer.state_dict(), step=step,
            best_ce=best_ce, ce_total=ce_total, since_log=since_log, settings=dataclasses.asdict(s), codec=about,
            tokenizer=tokenizer,
        )  # fmt: skip

    # A first signal asks for a commit at the next step; a second one ends the program as usual.
    stop = []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    usual = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    parameters = sum(p.numel() for p in model.parameters())
    minutes = train_data.meta["train"]["frames"] / codec.frame_rate / 60
    print(f"{parameters / 1e6:.1f}M parameters on {device} in {str(dtype).removeprefix('torch.')}")
    print(f"{s.data}: {len(train_data.tracks)} tracks, {minutes:.0f} minutes, {len(valid_data.tracks)} tracks held out")
    bar = tqdm(total=s.steps, initial=step, desc="training", file=sys.stdout, mininterval=1, smoothing=0.05)
    clock, frames_done = time.time(), 0

    while step < s.steps:
        # Train
        batch = train_data.batch(0 if s.one_batch else step, s, T)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        model.train()
        codes, valid = batch.codes.to(device), batch.valid.to(device)
        count = model.loss_mask(valid).sum((0, 2)).clamp(min=1)
        size = s.micro_batch or s.batch_size
        for i in range(0, s.batch_size, size):
            inputs = model.conditioner.prepare(batch.conditions[i : i + size], device)
            with autocast():
                ce_sum, _ = model(codes[i : i + size], valid[i : i + size], inputs)
            loss = (ce_sum / count).mean()  # over the whole batch's count, so that micro-batches add up to it
            loss.backward()
            ce_total = ce_total + loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(s.ema_decay, (1 + step) / (10 + step))  # so that the random start is soon forgotten
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        since_log += 1
        frames_done += s.batch_size * T
        bar.update()

        if step % s.log_every == 0 or step == s.steps:
            refuse_nan()
            ce = float(ce_total) / since_log
            speed = frames_done * codec.K / (time.time() - clock)
            append(out / "metrics.jsonl", step=step, ce=ce, lr=learning_rate(step - 1, s),
                   grad_norm=float(grad_norm), tokens_per_s=round(speed))  # fmt: skip
            bar.set_postfix_str(
                f"ce {ce:.3f}, lr {learning_rate(step - 1, s):.1e}, grad {grad_norm:.2f}, {speed:,.0f} tokens/s"
            )
            ce_total, since_log, clock, frames_done = 0.0, 0, time.time(), 0

        if step % s.epoch == 0 or step == s.steps:
            # Valid, with the averaged weights
            refuse_nan()
            ce_q, null_q = validate(ema, valid_data, s, T, device, autocast)
            ce, gain = float(np.mean(ce_q)), float(np.mean(null_q) - np.mean(ce_q))
            append(out / "history.jsonl", step=step, epoch=math.ceil(step / s.epoch), stage="valid", ce=ce,
                   ppl=math.exp(ce), ce_q=ce_q, unigram_q=unigram, gain=gain)  # fmt: skip
            tqdm.write(f"step {step}: valid ce {ce:.3f} (unigram {np.mean(unigram):.3f}), by codebook "
                       + " ".join(f"{q:.2f}" for q in ce_q) + f"; text gains {gain:.3f}", file=sys.stdout)  # fmt: skip
            # Best
            if ce < best_ce:
                best_ce = ce
                save_checkpoint(best, "best", model=ema.state_dict(), settings=dataclasses.asdict(s), codec=about,
                                tokenizer=tokenizer, step=step, ce=ce, ce_q=ce_q, gain=gain)  # fmt: skip
            # Generate, with the best weights
            epoch = math.ceil(step / s.epoch)
            if s.samples and (step == s.steps or (s.generate_every and epoch % s.generate_every == 0)):
                folder = write_samples(out / "samples" / f"step_{step:06d}", load_model(best, device)[0], codec,
                                       valid_data, s)  # fmt: skip
                tqdm.write(f"step {step}: wrote {folder}", file=sys.stdout)
            # Commit
            commit()
            clock, frames_done = time.time(), 0
        elif stop:
            commit()
        if stop:
            bar.close()
            print(f"stopped and committed at step {step}; to go on: python {shlex.join(sys.argv)}")
            sys.exit(128 + stop[0])
    bar.close()
    for number, handler in usual.items():
        signal.signal(number, handler)

    # Evaluate, with the best weights
    summary = read_checkpoint(best, "best")
    print(f"\nbest at step {summary['step']}: valid ce {summary['ce']:.3f}, ppl {math.exp(summary['ce']):.1f};"
          f" conditioning gain ce(null) - ce(text) {summary['gain']:.3f}")  # fmt: skip
    print("codebook   " + "".join(f"{f'q{k + 1}':>8}" for k in range(codec.K)))
    print("valid ce   " + "".join(f"{ce:8.3f}" for ce in summary["ce_q"]))
    print("unigram ce " + "".join(f"{ce:8.3f}" for ce in unigram))
    if s.evaluate and s.evaluate_clips and metrics.attributes_of(train_data):
        history = map(json.loads, (out / "history.jsonl").read_text().splitlines())
        table = next(
            (line["adherence"] for line in history if line["step"] == step and line["stage"] == "evaluate"), None
        )
        if table is None:
            table = metrics.adherence(load_model(best, device)[0], codec, train_data, valid_data, s)
            epoch = math.ceil(step / s.epoch)
            append(out / "history.jsonl", step=step, epoch=epoch, stage="evaluate", adherence=table)
        metrics.print_adherence(table)
    caption = shlex.quote(valid_data.tracks[0]["caption"])
    print(f"\nlisten: {out / 'samples' / f'step_{step:06d}'}")
    print(f"try:    python sample.py {best} {caption} --duration {s.segment:g}")


if __name__ == "__main__":
    config.run(main)
