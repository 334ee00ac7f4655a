"""How the `tiny` codec was made, and how to make another.

    python -m demo.corpus data/codec_audio --clips 900 --seed 7      # not the demo's own clips
    python -m demo.train_tiny train data/codec_audio MUSIC ...           # resumes by itself
    python -m demo.train_tiny evaluate demo/tiny.pt FOLDER ...          # held-out figures, Opus beside them

Every batch draws from the folders by their shares, whatever their size. Tracks are held out by a hash of their name.
The losses are spectral only, so phase is learned from the longer windows: the L1 distance of log-mel and of relative
mel spectrograms at six resolutions (as in DAC, arXiv:2306.06546) and of the oscillators' levels, plus the quantizer's
commitment.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import common
from codec import SUFFIXES, load_audio, load_codec, mel_spectrogram
from common import UserError
from demo.tiny import TinyCodec, save_tiny, tone_levels

# (window, mels), a quarter window per hop; the longest tells semitones apart best below some 400 Hz
RESOLUTIONS = [(128, 10), (256, 20), (512, 40), (1024, 80), (2048, 128), (4096, 256)]


def load_folder(folder, valid):
    """Every track of one side of the split: a list of int16 arrays at 16 kHz, mono."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in SUFFIXES]
    held_out = [path for path in paths if zlib.crc32(path.name.encode()) % 20 == 0] or paths[:1]
    paths, tracks = [path for path in paths if (path in held_out) == valid], []
    for path in tqdm(paths, desc=str(folder), file=sys.stdout, mininterval=1):
        wav = load_audio(path, TinyCodec.sample_rate)[0].numpy()
        if len(wav) >= 2 * TinyCodec.sample_rate:
            tracks.append((wav / max(1, np.abs(wav).max()) * 32767).astype(np.int16))
    if not tracks:
        raise UserError(f"{folder}: no {'held-out' if valid else 'training'} audio of two seconds or more; add some")
    return tracks


def draw(tracks, length, rng):
    """One crop of `length` samples, every second of the folder equally likely, at a random level; float32."""
    sizes = np.array([len(track) for track in tracks], dtype=float)
    track = tracks[rng.choice(len(tracks), p=sizes / sizes.sum())]
    start = rng.integers(len(track) - length)
    return track[start : start + length].astype(np.float32) / 32768 * rng.uniform(0.3, 1)


def spectral_loss(output, target):
    """[B, samples] twice -> log-mel L1 in nepers plus every clip's relative mel L1, the mean over RESOLUTIONS."""
    total = 0
    for window, mels in RESOLUTIONS:
        a = mel_spectrogram(output, TinyCodec.sample_rate, window, window // 4, mels)
        b = mel_spectrogram(target, TinyCodec.sample_rate, window, window // 4, mels)
        floor = 1e-4 * window
        relative = (a - b).abs().mean((1, 2)) / (b.mean((1, 2)) + floor)
        total = total + ((a + floor).log() - (b + floor).log()).abs().mean() + relative.mean()
    return total / len(RESOLUTIONS)


def tone_loss(levels, wav):
    """Decoded tone levels [B, T, N] against those of wav [B, samples]: their L1 distance where either is above -60 dB.

    Without it the oscillators stay silent: a wrong tone costs more spectral loss than none.
    """
    floor = math.log(1e-3)
    target = tone_levels(wav).clamp(min=floor).transpose(1, 2)
    return ((levels - target).abs() * ((target > floor) | (levels > floor))).mean()


def distances(output, target):
    """(log-mel L1 in nepers, relative mel L1) at 80 mels and 1024 samples, the figures that README reports."""
    a = mel_spectrogram(output, TinyCodec.sample_rate)
    b = mel_spectrogram(target, TinyCodec.sample_rate)
    return ((a + 0.1).log() - (b + 0.1).log()).abs().mean().item(), ((a - b).abs().sum() / b.sum()).item()


def held_out_clips(tracks, seconds=5, most=40):
    """Crops of the held-out tracks, the same ones every time, float32 [most, samples]."""
    length = min(seconds * TinyCodec.sample_rate, max(map(len, tracks)) - 1)
    rng = np.random.default_rng(0)
    tracks = [track for track in tracks if len(track) > length]
    return torch.from_numpy(np.stack([draw(tracks, length, rng) for _ in range(most)]))


def opus(clip, kbps):
    """One clip [samples] through ffmpeg's Opus encoder and back, at 16 kHz."""
    with tempfile.TemporaryDirectory() as folder:
        a, b, c = (f"{folder}/{name}" for name in ("a.wav", "b.opus", "c.wav"))
        soundfile.write(a, clip.numpy(), TinyCodec.sample_rate)
        quiet = ["ffmpeg", "-v", "error", "-y", "-i"]
        subprocess.run([*quiet, a, "-c:a", "libopus", "-b:a", f"{kbps}k", "-vbr", "off", b], check=True)
        subprocess.run([*quiet, b, "-ar", str(TinyCodec.sample_rate), c], check=True)
        wav = torch.from_numpy(soundfile.read(c, dtype="float32")[0])
    return torch.nn.functional.pad(wav, (0, max(0, len(clip) - len(wav))))[: len(clip)]


def evaluate(args):
    codec = load_codec("tiny", args.weights)
    kbps = codec.K * math.log2(codec.card) * codec.frame_rate / 1000
    print(f"{codec.id}: {kbps:.1f} kbps, {sum(p.numel() for p in codec.model.parameters()) / 1e6:.2f}M parameters")
    for folder in args.folders:
        clips = held_out_clips(load_folder(folder, valid=True))[: args.clips]
        codes = codec.encode(clips[:, None])
        rows = {"tiny": codec.decode(codes)[:, 0]}
        if shutil.which("ffmpeg"):
            rows["opus 6 kbps"] = torch.stack([opus(clip, 6) for clip in clips])
        for name, output in rows.items():
            log_mel, relative = distances(output, clips)
            print(f"{folder:32s} {name:12s} log-mel {log_mel:.3f} nepers   relative mel {relative:.3f}")
        for k in range(codec.K):
            p = torch.bincount(codes[:, k].flatten(), minlength=codec.card) / codes[:, k].numel()
            entropy = -(p * p.clamp(min=1e-12).log2()).sum()
            print(f"{'':32s} codebook {k + 1}: {(p > 0).sum()} of {codec.card} used, entropy {entropy:.2f} bits")


@torch.no_grad()
def revive(quantizer, latents, codes):
    """Unused vectors become frames of the batch, latents [B, D, T] of codes [K, B, T], less what is coded before.

    So do their running sums, which encodec leaves as they are: its new vectors are zero again within the step.
    """
    residual = latents.transpose(1, 2).flatten(0, 1)
    for layer, code in zip(quantizer.vq.layers, codes):
        book = layer._codebook
        unused = book.cluster_size < quantizer.threshold_ema_dead_code
        frames = residual[torch.randint(len(residual), (int(unused.sum()),), device=residual.device)]
        residual = residual - book.embed[code.flatten()]
        book.embed[unused], book.embed_avg[unused], book.cluster_size[unused] = frames, frames, 1.0


def train(args):
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # denormals slow convolutions many times over on CPU
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out = Path(args.out)
    shares = np.array(args.shares or [1] * len(args.folders))
    if len(shares) != len(args.folders) or shares.min() < 0 or not 0 < shares.sum() < math.inf:
        raise UserError(f"shares {shares.tolist()} for {len(args.folders)} folders; give each its share, 0 or more")
    out.mkdir(parents=True, exist_ok=True)
    model = TinyCodec().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.8, 0.99), weight_decay=1e-3)
    step, last = 0, out / "last.pt"
    if last.exists():
        saved = torch.load(last, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"].cpu())
        step = saved["step"]
        print(f"resuming from {last} at step {step}")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {args.steps} steps on {device}")
    train_sets = [load_folder(folder, valid=False) for folder in args.folders]
    valid_sets = [held_out_clips(load_folder(folder, valid=True)).to(device) for folder in args.folders]

    def save():
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state(), step=step)
        torch.save(state, out / "last.tmp")
        (out / "last.tmp").replace(last)
        save_tiny(model, out / "codec.pt", steps=step, folders=[Path(folder).name for folder in args.folders])

    bar = tqdm(total=args.steps, initial=step, desc="training", file=sys.stdout, mininterval=5)
    started, running = time.monotonic(), None
    while step < args.steps:
        warm, progress = min(1, (step + 1) / 500), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        rng = np.random.default_rng([1, step])
        drawn = rng.choice(len(train_sets), args.batch_size, p=shares / shares.sum())
        batch = [draw(train_sets[i], args.length, rng) for i in drawn]
        wav = torch.from_numpy(np.stack(batch)).to(device)
        latents = model.encoder(wav[:, None])
        quantized = model.quantizer(latents, model.frame_rate)
        revive(model.quantizer, latents.detach(), quantized.codes)
        features = model.decoder.features(quantized.quantized)
        reconstruction = spectral_loss(model.decoder.synthesise(features)[:, 0], wav)
        loss = reconstruction + 0.5 * tone_loss(model.decoder.tones(features), wav) + 0.25 * quantized.penalty
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        running = reconstruction.item() if running is None else 0.99 * running + 0.01 * reconstruction.item()
        bar.update()
        bar.set_postfix(loss=f"{running:.3f}", commit=f"{quantized.penalty.item():.3f}", refresh=False)
        if step % args.valid_every == 0 or step == args.steps:
            model.eval()
            with torch.no_grad():
                figures = {}
                for folder, clips in zip(args.folders, valid_sets):
                    codes = model.quantizer.encode(model.encoder(clips[:, None]), model.frame_rate)
                    output = model.decoder(model.quantizer.decode(codes))[:, 0]
                    figures[Path(folder).name] = [round(value, 4) for value in distances(output, clips)]
            model.train()
            line = dict(step=step, seconds=round(time.monotonic() - started), train=round(running, 4), valid=figures)
            tqdm.write(json.dumps(line), file=sys.stdout)
            with open(out / "history.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            save()
    save()
    print(f"wrote {out / 'codec.pt'}: {load_codec('tiny', out / 'codec.pt').id}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("train", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    command.add_argument("folders", nargs="+", help="folders of audio, whose names differ")
    command.add_argument("--shares", type=float, nargs="+", help="of the folders in every batch; equal if not given")
    command.add_argument("--out", default="out/codec", help="where checkpoints, history.jsonl and codec.pt go")
    command.add_argument("--steps", type=int, default=10_000)
    command.add_argument("--batch_size", type=int, default=16)
    command.add_argument("--length", type=int, default=16_000, help="samples in a crop, a multiple of 320")
    command.add_argument("--lr", type=float, default=1e-3)
    command.add_argument("--valid_every", type=int, default=500)
    command.set_defaults(run=train)
    command = commands.add_parser("evaluate")
    command.add_argument("weights", help="a codec.pt")
    command.add_argument("folders", nargs="+")
    command.add_argument("--clips", type=int, default=40, help="held-out clips of each folder, 40 at most (default 40)")
    command.set_defaults(run=evaluate)
    args = parser.parse_args()
    for key, least in dict(steps=0, batch_size=1, length=2560, lr=0, valid_every=1, clips=1).items():
        if not getattr(args, key, least) >= least:
            raise UserError(f"--{key} {getattr(args, key)}: must be {least} or above")
    args.run(args)


if __name__ == "__main__":
    common.run(main)
