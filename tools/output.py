"""Prepare samples for listening: set their loudness, or write them to a player while they are generated.

Letters: K codebooks.
"""

import math
import sys
import time

import torch

import common
from codec import decode_stream

PEAK = 10 ** (-1 / 20)  # loudest sample, -1 dB of full scale, because lossy formats add some tenths of a dB


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
