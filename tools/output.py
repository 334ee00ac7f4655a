"""Prepare samples for listening: name, decode and scale them, or write them to a player while they are generated.

Letters: K codebooks, T frames.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch

import common
from audio import FORMATS, file_name
from codec import decode_stream
from common import UserError

LOUDNESS = -23  # default in LUFS, as in EBU R 128
PEAK = 10 ** (-1 / 20)  # loudest sample, -1 dB of full scale, because lossy formats add some tenths of a dB
OTHER_OPTIONS = "captions file interactive n batch out format device compile spectrogram code".split()  # of sample.py


def plan_clips(captions, seeds, args, info):
    """Return [(path, content of its .json)] of the clips that sample.py is to generate.

    Clips that exist with the same options are skipped. With --interactive, clips get the next seed whose name is free.
    seeds: an iterator. info: the options. Raises UserError if another file is in the way.
    """
    clips, n_skipped, out = [], 0, Path(args.out)
    for caption in [caption for caption in captions for _ in range(args.n)]:
        for seed in seeds:
            path = out if out.suffix.lower() in FORMATS else out / f"{file_name(caption, seed)}.{args.format or 'wav'}"
            clip = {**info, "caption": caption, "seed": seed}
            suffixes = (path.suffix, ".json", ".png")[: 2 + args.spectrogram]
            existing = next(filter(Path.exists, map(path.with_suffix, suffixes)), None)
            if not (existing and args.interactive):
                break
            print(f"{existing}: exists already; trying the next seed")
        if not existing:
            clips.append((path, clip))
        elif is_complete(path, suffixes, clip, [args.checkpoint, args.prompt, args.melody, args.style]):
            n_skipped += 1
        else:
            raise UserError(f"{existing}: exists already; choose another --seed or --out, or remove it")
    if n_skipped:
        print(f"skipped {n_skipped} of {n_skipped + len(clips)} files, which exist already with the same options")
    return clips


def is_complete(path, suffixes, info, inputs):
    """Return whether a clip's files exist, are newer than the input files, and its .json has the options `info`."""
    try:
        saved = dict(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
        time_written = min(path.with_suffix(suffix).stat().st_mtime for suffix in suffixes)
    except (OSError, ValueError, TypeError):
        return False
    info = json.loads(json.dumps(info))  # lists instead of tuples
    has_same_options = all(saved.get(key) == info[key] for key in info if key not in OTHER_OPTIONS)
    return has_same_options and all(os.stat(file).st_mtime <= time_written for file in inputs if file)


def decode_long(codec, codes):
    """Decode codes [K, T] to wav [channels, samples] on the CPU, in chunks of 10 s to bound the memory."""
    wavs = decode_stream(codec, [codes[None]], n=10 * codec.frame_rate)
    return torch.cat([wav[0].cpu() for wav in wavs], dim=1)


def set_loudness(wav, sample_rate, lufs):
    """Scale wav [channels, samples] to `lufs`, or to a lower level whose peak is PEAK. Silence is unchanged."""
    try:
        import pyloudnorm  # BS.1770-4

        padded = torch.nn.functional.pad(wav, (0, max(0, sample_rate // 2 - wav.shape[1])))  # it needs 0.4 s
        loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(padded.T.numpy())
    except ImportError:
        loudness = 10 * math.log10(max(1e-12, float(wav.square().sum(0).mean())))
    if not math.isfinite(loudness) or wav.abs().max() == 0:
        return wav
    return wav * min(10 ** ((lufs - loudness) / 20), PEAK / float(wav.abs().max()))


def to_pcm(wav):
    """wav [channels, samples] -> interleaved signed 16-bit little-endian samples, an array [samples, channels]."""
    return (32767 * wav.clamp(-1, 1)).round().T.cpu().numpy().astype("<i2")


def write_stream(codec, parts):
    """Decode codes [1, K, any] as they are generated, and write raw samples to stdout."""
    start, blocked, samples = time.monotonic(), 0.0, 0  # blocked: seconds that the player made this program wait
    try:
        for wav in decode_stream(codec, parts):
            pcm, write_start = to_pcm(wav[0]), time.monotonic()
            if not samples:
                print(f"first audio after {write_start - start:.2f} s", flush=True)
            sys.__stdout__.buffer.write(pcm.tobytes())
            sys.__stdout__.flush()
            blocked, samples = blocked + time.monotonic() - write_start, samples + len(pcm)
    except BrokenPipeError:
        common.drop_output(sys.__stdout__)  # otherwise Python reports the pipe again when it exits
        print("the player closed the stream")
    seconds = samples / codec.sample_rate
    print(f"{seconds:.1f} s of music, {seconds / (time.monotonic() - start - blocked):.1f} x real time")
