"""Train and evaluate a `tiny` codec.

    python -m demo.corpus data/codec_audio --clips 900 --seed 7      # another seed than the demo's
    python -m demo.train_tiny train data/codec_audio MUSIC ...       # resumes if started again
    python -m demo.train_tiny evaluate demo/tiny.pt FOLDER ...       # losses on held-out tracks, also of Opus

Each batch draws from the folders by their shares, independent of their size. A hash of the name selects held-out
tracks. The loss is the L1 distance of log-mel and of relative mel spectrograms at six resolutions (as in DAC,
arXiv:2306.06546) and of the oscillators' levels, plus the quantizer's commitment loss. The longer windows teach phase.

Letters: B batch, K codebooks, T frames, D width of the latents, N tones.
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
from audio import SUFFIXES, load_audio, mel_spectrogram
from codec import load_codec
from common import UserError
from demo.tiny import SAMPLE_RATE, TinyCodec, save_tiny, tone_levels

# (window, mels), hop is window / 4; the longest window separates semitones below 400 Hz
RESOLUTIONS = [(128, 10), (256, 20), (512, 40), (1024, 80), (2048, 128), (4096, 256)]


def load_folder(folder, valid):
    """Load the held-out (`valid`) or the training tracks of a folder: a list of int16 arrays at 16 kHz, mono."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.suffix.lower() in SUFFIXES]
    held_out = [path for path in paths if zlib.crc32(path.name.encode()) % 20 == 0] or paths[:1]
    paths, tracks = [path for path in paths if (path in held_out) == valid], []
    for path in tqdm(paths, desc=str(folder), file=sys.stdout, mininterval=1):
        wav = load_audio(path, SAMPLE_RATE)[0].numpy()
        if len(wav) >= 2 * SAMPLE_RATE:
            tracks.append((wav / max(1, np.abs(wav).max()) * 32767).astype(np.int16))
    if not tracks:
        raise UserError(f"{folder}: no {'held-out' if valid else 'training'} tracks of 2 s or more; add tracks")
    return tracks


def draw_crop(tracks, length, rng):
    """Draw `length` samples of a track, float32, at a random level. Tracks are drawn in proportion to their length."""
    sizes = np.array([len(track) for track in tracks], dtype=float)
    track = tracks[rng.choice(len(tracks), p=sizes / sizes.sum())]
    start = rng.integers(len(track) - length)
    return track[start : start + length].astype(np.float32) / 32768 * rng.uniform(0.3, 1)


def spectral_loss(output, target):
    """Return log-mel L1 in nepers plus relative mel L1 of two wavs [B, samples], the mean over RESOLUTIONS."""
    total = 0
    for window, mels in RESOLUTIONS:
        a, b = (mel_spectrogram(wav, SAMPLE_RATE, window, window // 4, mels) for wav in (output, target))
        floor = 1e-4 * window
        relative = (a - b).abs().mean((1, 2)) / (b.mean((1, 2)) + floor)
        total = total + ((a + floor).log() - (b + floor).log()).abs().mean() + relative.mean()
    return total / len(RESOLUTIONS)


def tone_loss(levels, wav):
    """Return the L1 distance of decoded tone levels [B, T, N] to those of wav [B, samples], if either is above -60 dB.

    Without this loss the oscillators stay silent, because a wrong tone costs more spectral loss than no tone.
    """
    floor = math.log(1e-3)
    target = tone_levels(wav).clamp(min=floor).transpose(1, 2)
    return ((levels - target).abs() * ((target > floor) | (levels > floor))).mean()


def distances(output, target):
    """Return (log-mel L1 in nepers, relative mel L1) with 80 mels and windows of 1024 samples, for demo/README.md."""
    a, b = (mel_spectrogram(wav, SAMPLE_RATE) for wav in (output, target))
    return ((a + 0.1).log() - (b + 0.1).log()).abs().mean().item(), ((a - b).abs().sum() / b.sum()).item()


def fixed_crops(tracks, seconds=5, n=40):
    """Draw n crops with a fixed seed, float32 [n, samples]."""
    length = min(seconds * SAMPLE_RATE, max(map(len, tracks)) - 1)
    rng = np.random.default_rng(0)
    tracks = [track for track in tracks if len(track) > length]
    return torch.from_numpy(np.stack([draw_crop(tracks, length, rng) for _ in range(n)]))


def recode_as_opus(clip, kbps):
    """Encode a clip [samples] as Opus by ffmpeg, and decode it again at 16 kHz."""
    with tempfile.TemporaryDirectory() as folder:
        original, encoded, decoded = (f"{folder}/{name}" for name in ("original.wav", "encoded.opus", "decoded.wav"))
        soundfile.write(original, clip.numpy(), SAMPLE_RATE)
        ffmpeg = ["ffmpeg", "-v", "error", "-y", "-i"]
        subprocess.run([*ffmpeg, original, "-c:a", "libopus", "-b:a", f"{kbps}k", "-vbr", "off", encoded], check=True)
        subprocess.run([*ffmpeg, encoded, "-ar", str(SAMPLE_RATE), decoded], check=True)
        wav = torch.from_numpy(soundfile.read(decoded, dtype="float32")[0])
    return torch.nn.functional.pad(wav, (0, max(0, len(clip) - len(wav))))[: len(clip)]


def evaluate(args):
    codec = load_codec("tiny", args.weights)
    kbps = codec.K * math.log2(codec.card) * codec.frame_rate / 1000
    print(f"{codec.id}: {kbps:.1f} kbps, {sum(p.numel() for p in codec.model.parameters()) / 1e6:.2f}M parameters")
    for folder in args.folders:
        clips = fixed_crops(load_folder(folder, valid=True))[: args.clips]
        codes = codec.encode(clips[:, None])
        outputs = {"tiny": codec.decode(codes)[:, 0]}
        if shutil.which("ffmpeg"):
            outputs["opus 6 kbps"] = torch.stack([recode_as_opus(clip, 6) for clip in clips])
        for name, output in outputs.items():
            log_mel, relative = distances(output, clips)
            print(f"{folder:32s} {name:12s} log-mel {log_mel:.3f} nepers   relative mel {relative:.3f}")
        for k in range(codec.K):
            p = torch.bincount(codes[:, k].flatten(), minlength=codec.card) / codes[:, k].numel()
            entropy = -(p * p.clamp(min=1e-12).log2()).sum()
            print(f"{'':32s} codebook {k + 1}: {(p > 0).sum()} of {codec.card} used, entropy {entropy:.2f} bits")


@torch.no_grad()
def replace_unused(quantizer, latents, codes):
    """Replace unused codebook vectors by random frames of the batch: latents [B, D, T] with codes [K, B, T].

    Each codebook gets the residual of the codebooks before it. The running sums are set too. encodec does not do that,
    so its replacements become 0 again in the same step.
    """
    residual = latents.transpose(1, 2).flatten(0, 1)
    for layer, code in zip(quantizer.vq.layers, codes):
        codebook = layer._codebook
        unused = codebook.cluster_size < quantizer.threshold_ema_dead_code
        frames = residual[torch.randint(len(residual), (int(unused.sum()),), device=residual.device)]
        residual = residual - codebook.embed[code.flatten()]
        codebook.embed[unused], codebook.embed_avg[unused], codebook.cluster_size[unused] = frames, frames, 1.0


@torch.no_grad()
def validate(model, clips):
    """Return the distances, rounded, of clips [B, samples] to the same clips through the codec."""
    model.eval()
    codes = model.quantizer.encode(model.encoder(clips[:, None]), model.frame_rate)
    output = model.decoder(model.quantizer.decode(codes))[:, 0]
    model.train()
    return [round(value, 4) for value in distances(output, clips)]


def train(args):
    torch.manual_seed(0)
    torch.set_flush_denormal(True)  # denormal numbers make convolutions on a CPU much slower
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shares = np.array(args.shares or [1] * len(args.folders))
    if len(shares) != len(args.folders) or shares.min() < 0 or not 0 < shares.sum() < math.inf:
        raise UserError(f"--shares {shares.tolist()} for {len(args.folders)} folders: pass one of 0 or above for each")
    out, step = Path(args.out), 0
    out.mkdir(parents=True, exist_ok=True)
    model = TinyCodec().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.8, 0.99), weight_decay=1e-3)
    if (last := out / "last.pt").exists():
        saved = torch.load(last, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"].cpu())
        step = saved["step"]
        print(f"resuming from {last} at step {step}")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {args.steps} steps on {device}")
    train_sets = [load_folder(folder, valid=False) for folder in args.folders]
    valid_sets = {Path(folder).name: fixed_crops(load_folder(folder, valid=True)).to(device) for folder in args.folders}

    def save():
        state = dict(model=model.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state(), step=step)
        common.write_file(last, lambda file: torch.save(state, file))
        save_tiny(model, out / "codec.pt", steps=step, folders=list(valid_sets))

    bar = tqdm(total=args.steps, initial=step, desc="training", file=sys.stdout, mininterval=5)
    start, average = time.monotonic(), None
    while step < args.steps:
        warmup, progress = min(1, (step + 1) / 500), step / args.steps
        for group in optimizer.param_groups:
            group["lr"] = args.lr * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        rng = np.random.default_rng([1, step])
        drawn = rng.choice(len(train_sets), args.batch_size, p=shares / shares.sum())
        wav = torch.from_numpy(np.stack([draw_crop(train_sets[i], args.length, rng) for i in drawn])).to(device)
        latents = model.encoder(wav[:, None])
        quantized = model.quantizer(latents, model.frame_rate)
        replace_unused(model.quantizer, latents.detach(), quantized.codes)
        features = model.decoder.features(quantized.quantized)
        reconstruction = spectral_loss(model.decoder.synthesize(features)[:, 0], wav)
        loss = reconstruction + 0.5 * tone_loss(model.decoder.tones(features), wav) + 0.25 * quantized.penalty
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        average = reconstruction.item() if average is None else 0.99 * average + 0.01 * reconstruction.item()
        bar.update()
        bar.set_postfix(loss=f"{average:.3f}", commit=f"{quantized.penalty.item():.3f}", refresh=False)
        if step % args.valid_every == 0 or step == args.steps:
            valid = {name: validate(model, clips) for name, clips in valid_sets.items()}
            line = dict(step=step, seconds=round(time.monotonic() - start), train=round(average, 4), valid=valid)
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
    command.add_argument("folders", nargs="+", help="folders of audio, with different names")
    command.add_argument("--shares", type=float, nargs="+", help="share of each folder in a batch (default: equal)")
    command.add_argument("--out", default="out/codec", help="folder for checkpoints, history.jsonl and codec.pt")
    command.add_argument("--steps", type=int, default=10_000)
    command.add_argument("--batch_size", type=int, default=16)
    command.add_argument("--length", type=int, default=16_000, help="samples per crop, a multiple of 320")
    command.add_argument("--lr", type=float, default=1e-3)
    command.add_argument("--valid_every", type=int, default=500)
    command.set_defaults(run=train)
    command = commands.add_parser("evaluate")
    command.add_argument("weights", help="codec.pt of a training, or demo/tiny.pt")
    command.add_argument("folders", nargs="+")
    command.add_argument("--clips", type=int, default=40, help="held-out crops per folder, 40 at most (default: 40)")
    command.set_defaults(run=evaluate)
    args = parser.parse_args()
    for key, minimum in dict(steps=0, batch_size=1, length=2560, lr=0, valid_every=1, clips=1).items():
        if not (value := getattr(args, key, minimum)) >= minimum:
            raise UserError(f"--{key} {value}: must be {minimum} or above")
    args.run(args)


if __name__ == "__main__":
    common.run(main)
