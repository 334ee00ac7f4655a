"""What is heard in an audio file, however long: its codes, its chroma, its level, its tempo and its key.

Letters: K codebooks, T frames of the codec, T' frames of chroma.
"""

import tempfile

import numpy as np
import torch

from codec import mel_spectrogram, read_blocks, windows
from conditioning import CHROMA_RATE, chromagram

PIECE, CONTEXT = 30, 1  # seconds that are listened to at once, and on either side of them
ONSET_RATE = 50  # frames a second by which tempo is measured
CLIPPED = 0.99  # of full scale, and above
KEYS = [f"{note} {mode}" for mode in ("major", "minor") for note in "C C# D D# E F F# G G# A A# B".split()]


def own(found, before, rate):
    """What is found of a stretch of audio, [..., T] at `rate` a second, without that of its context."""
    first = round(before * rate)
    return found[..., first : first + PIECE * rate]


def listen(path, codec, spool_folder=None):
    """An audio file -> codes int64 [K, T], chroma [12, T'], and numbers, by name. Needs memory for 30 s of it.

    spool_folder: for a temporary file, where it is longer than a few minutes.

    The numbers: seconds; peak; level, dB below a full-scale square wave; clipped, the share of such samples; tempo in
    beats a minute, 0 where there is none; key, an index of KEYS, -1 where there is none.
    """
    rate, channels, samples, energy, peak, clipped = codec.sample_rate, codec.channels, 0, 0.0, 0.0, 0
    with tempfile.SpooledTemporaryFile(2**24, dir=spool_folder) as spool:  # as the peak is known at the end only
        for block in read_blocks(path, rate, channels):
            spool.write(block.numpy().T.tobytes())
            samples, energy = samples + block.shape[1], energy + float(block.double().square().mean(0).sum())
            peak, clipped = max(peak, float(block.abs().max())), clipped + int((block.abs() > CLIPPED).any(0).sum())
        level, loudest = (energy / samples) ** 0.5, max(1, peak)
        pieces = []
        for before, wav in windows(read_spool(spool, channels, PIECE * rate), PIECE * rate, CONTEXT * rate):
            wav, before = wav / loudest, before / rate
            codes = own(codec.encode(wav[None])[0], before, codec.frame_rate).cpu()
            chroma = own(chromagram(wav.mean(0)[None], rate)[0], before, CHROMA_RATE)
            onsets = own(onset_strength(wav.mean(0) * loudest / max(level, 1e-4), rate), before, ONSET_RATE)
            pieces.append((codes, chroma, onsets))
    codes, chroma, onsets = (torch.cat(parts, dim=-1) for parts in zip(*pieces))
    return dict(codes=codes, chroma=chroma, seconds=samples / rate, peak=peak, level=20 * np.log10(max(level, 1e-6)),
                clipped=clipped / samples, tempo=tempo_of(onsets), key=key_of(chroma))  # fmt: skip


def read_spool(spool, channels, samples):
    """What `listen` wrote, in blocks [channels, samples]."""
    spool.seek(0)
    while raw := spool.read(4 * channels * samples):
        yield torch.from_numpy(np.frombuffer(raw, np.float32).reshape(-1, channels).T.copy())


def chroma_of(blocks, rate):
    """Blocks [channels, any] of one wav at `rate`, as they come -> its chroma [12, T']."""
    pieces = windows(blocks, PIECE * rate, CONTEXT * rate)
    found = [own(chromagram(wav.mean(0)[None], rate)[0], before / rate, CHROMA_RATE) for before, wav in pieces]
    return torch.cat(found, dim=1)


def onset_strength(wav, rate):
    """wav [samples] of level 1 -> the rise of its log-mel spectrogram, ONSET_RATE frames a second (spectral flux)."""
    wav = torch.nn.functional.pad(wav, (0, max(0, 1024 - len(wav))))
    mel = (mel_spectrogram(wav, rate, hop=rate // ONSET_RATE) + 1).log()
    return torch.nn.functional.pad(mel.diff(dim=-1).clamp(min=0).mean(0), (1, 0))


def tempo_of(onsets):
    """Onset strength [T] -> beats a minute from 40 to 240, or 0: the lag of the highest autocorrelation.

    Lags count by how near they are to 120 beats a minute, in octaves (Ellis, Beat Tracking by Dynamic Programming,
    2007); the peak four beats away then tells the tempo more exactly. Less than four seconds have no tempo.
    """
    onsets = onsets.double() - onsets.double().mean()
    if len(onsets) < 4 * ONSET_RATE or not onsets.any():
        return 0.0
    power = torch.fft.rfft(onsets, n=2 * len(onsets)).abs().square()
    correlation = torch.fft.irfft(power)[: len(onsets)] / torch.arange(len(onsets), 0, -1)
    lags = torch.arange(60 * ONSET_RATE // 240, 60 * ONSET_RATE // 40 + 1)
    octaves = (60 * ONSET_RATE / lags / 120).log2()
    beat = int(lags[(correlation[lags] * (-0.5 * octaves.square()).exp()).argmax()])
    if correlation[beat] < 4 / len(onsets) ** 0.5 * correlation[0]:  # noise comes that far by chance
        return 0.0
    beats = 4 if 5 * beat < len(onsets) else 1
    near = torch.arange(beats * beat - beats // 2, beats * beat + beats // 2 + 1)
    return float(beats * 60 * ONSET_RATE / near[correlation[near].argmax()])


def key_matches(chroma):
    """Chroma [12, T'] -> [24], its correlation with the profile of each of KEYS (Krumhansl and Kessler, 1982)."""
    major = [6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88]
    minor = [6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17]
    pitches = chroma.sqrt().mean(1)
    if not pitches.std() > 0:  # silence
        return np.zeros(24)
    profiles = np.array([np.roll(profile, tonic) for profile in (major, minor) for tonic in range(12)])
    return np.corrcoef(pitches, profiles)[0, 1:]


def key_of(chroma):
    """Chroma [12, T'] -> the index in KEYS of the one that matches best, or -1."""
    matches = key_matches(chroma)
    return int(matches.argmax()) if matches.max() > 0.5 else -1
