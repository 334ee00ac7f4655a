"""Analyse an audio file of any length: codes, chroma, melody, level, tempo and key.

Letters: K codebooks, T frames of the codec, T' chroma frames.
"""

import contextlib
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import torch

from audio import mel_spectrogram, read_blocks, uncancelled_channel
from codec import windows
from conditioning import CHROMA_RATE, SILENCE, chromagram, strongest

WINDOW, CONTEXT = 30, 1  # seconds analysed together; seconds of context before and after them
ONSET_RATE = 50  # onset frames per second
CLIPPED = 0.99  # samples above this share of full scale count as clipped
KEYS = [f"{note} {mode}" for mode in ("major", "minor") for note in "C C# D D# E F F# G G# A A# B".split()]


def count_cores():
    """Return how many cores this process may use: those of its affinity, and at most its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max": no quota
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


def analyse_track(path, melody_from, codec, folder):
    """Return what the cache stores: codes uint16 [T, K], melody uint8 [T], frames (T) and the numbers of `analyse`.

    melody_from: the file whose melody is stored, the track itself or a stem.
    """
    analysis = analyse(path, codec, folder)
    chroma = analysis.pop("chroma")
    if melody_from != path:
        chroma = chroma_of(read_blocks(melody_from, codec.sample_rate, codec.channels), codec.sample_rate)
    codes = analysis["codes"].T.numpy().astype(np.uint16)
    notes = np.append(strongest(chroma), SILENCE)  # a stem may be shorter than its track
    index = ((np.arange(len(codes)) + 0.5) * CHROMA_RATE / codec.frame_rate).astype(int)
    melody = notes[index.clip(max=len(notes) - 1)].astype(np.uint8)
    return {**analysis, "codes": codes, "melody": melody, "frames": len(codes)}


def analyse(path, codec, folder=None):
    """Encode and analyse an audio file in windows of 30 s, so that its length does not affect the memory needed.

    folder: for a temporary file, which a file of more than a few minutes needs.

    Returns codes int64 [K, T], chroma [12, T'] and numbers, by name: seconds; peak; level in dB, 0 for a full-scale
    square wave; clipped, the share of clipped samples; cancels, whether the mix of the channels is unusable, see
    `uncancelled_channel`; tempo in beats per minute, or 0; key, an index of KEYS, or -1.
    """
    rate, channels = codec.sample_rate, codec.channels
    samples, energy, peak, clipped = 0, 0.0, 0.0, 0
    with tempfile.SpooledTemporaryFile(2**24, dir=folder) as file:  # the peak of all samples scales each window
        for block in read_blocks(path, rate, channels):
            file.write(block.numpy().T.tobytes())
            samples, peak = samples + block.shape[1], max(peak, float(block.abs().max()))
            energy += float(block.double().square().mean(0).sum())
            clipped += int((block.abs() > CLIPPED).any(0).sum())
        rms, scale = (energy / samples) ** 0.5, max(1, peak)
        side, results = uncancelled_channel(path), []
        for before, wav in windows(stored_blocks(file, channels, WINDOW * rate), WINDOW * rate, CONTEXT * rate):
            wav, before = wav / scale, before / rate
            codes = trim_context(codec.encode(wav[None])[0], before, codec.frame_rate).cpu()
            mono = wav.mean(0) if side is None else wav[side % channels]
            chroma = trim_context(chromagram(mono[None], rate)[0], before, CHROMA_RATE)
            onsets = trim_context(onset_strength(mono * scale / max(rms, 1e-4), rate), before, ONSET_RATE)
            results.append((codes, chroma, onsets))
    codes, chroma, onsets = (torch.cat(parts, dim=-1) for parts in zip(*results))
    return dict(codes=codes, chroma=chroma, seconds=samples / rate, peak=peak, level=20 * np.log10(max(rms, 1e-6)),
                clipped=clipped / samples, cancels=side is not None, tempo=tempo_of(onsets),
                key=key_of(chroma))  # fmt: skip


def stored_blocks(file, channels, samples):
    """Yield the wav in the temporary file of `analyse`, in blocks [channels, samples]."""
    file.seek(0)
    while content := file.read(4 * channels * samples):
        yield torch.from_numpy(np.frombuffer(content, np.float32).reshape(-1, channels).T.copy())


def trim_context(frames, before, rate):
    """Drop the context from frames [..., any] of a window, at `rate` frames/s, that starts `before` seconds early."""
    first = round(before * rate)
    return frames[..., first : first + WINDOW * rate]


def chroma_of(blocks, rate):
    """Return the chroma [12, T'] of a wav at `rate`, given in consecutive blocks [channels, any]."""
    parts = [trim_context(chromagram(wav.mean(0)[None], rate)[0], before / rate, CHROMA_RATE)
             for before, wav in windows(blocks, WINDOW * rate, CONTEXT * rate)]  # fmt: skip
    return torch.cat(parts, dim=1)


def onset_strength(wav, rate):
    """Return the spectral flux, ONSET_RATE frames per second, of wav [samples] with an RMS of 1."""
    wav = torch.nn.functional.pad(wav, (0, max(0, 1024 - len(wav))))
    mel = (mel_spectrogram(wav, rate, hop=rate // ONSET_RATE) + 1).log()
    return torch.nn.functional.pad(mel.diff(dim=-1).clamp(min=0).mean(0), (1, 0))


def tempo_of(onsets):
    """Estimate the tempo of onset strengths [frames]: 40 to 240 beats per minute, or 0 if there is none.

    The beat is the lag with the highest autocorrelation, weighted by its distance from 120 beats per minute in octaves
    (Ellis, Beat Tracking by Dynamic Programming, 2007). The peak at 4 times this lag refines it. Needs 4 s or more.
    """
    onsets = onsets.double() - onsets.double().mean()
    if len(onsets) < 4 * ONSET_RATE or not onsets.any():
        return 0.0
    power = torch.fft.rfft(onsets, n=2 * len(onsets)).abs().square()
    correlation = torch.fft.irfft(power)[: len(onsets)] / torch.arange(len(onsets), 0, -1)
    lags = torch.arange(60 * ONSET_RATE // 240, 60 * ONSET_RATE // 40 + 1)
    octaves = (60 * ONSET_RATE / lags / 120).log2()
    beat = int(lags[(correlation[lags] * (-0.5 * octaves.square()).exp()).argmax()])
    if correlation[beat] < 4 / len(onsets) ** 0.5 * correlation[0]:  # noise reaches this by chance
        return 0.0
    beats = 4 if 5 * beat < len(onsets) else 1
    nearby = torch.arange(beats * beat - beats // 2, beats * beat + beats // 2 + 1)
    return float(beats * 60 * ONSET_RATE / nearby[correlation[nearby].argmax()])


def key_matches(chroma):
    """Correlate chroma [12, T'] with the profile of each of KEYS: float [24] (Krumhansl and Kessler, 1982)."""
    major = [6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88]
    minor = [6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17]
    pitches = chroma.sqrt().mean(1)
    if not pitches.std() > 0:  # silence
        return np.zeros(24)
    profiles = np.array([np.roll(profile, tonic) for profile in (major, minor) for tonic in range(12)])
    return np.corrcoef(pitches, profiles)[0, 1:]


def key_of(chroma):
    """Estimate the key of chroma [12, T']: an index of KEYS, or -1 if none fits well."""
    matches = key_matches(chroma)
    return int(matches.argmax()) if matches.max() > 0.5 else -1
