"""Caption adherence: a probe, trained on real clips, detects attributes such as instrument, tempo or drums in others.

    attributes = attributes_of(dataset)                 # {"drums": ["no", "yes"], ...}
    Probe(x, labels, classes).accuracy(x2, labels2)     # x: `features` of real clips; x2: of generated clips

Letters: N clips, F features, C classes.
"""

import numpy as np
import torch

from audio import mel_spectrogram
from conditioning import chromagram
from dataprep.analysis import key_matches

MAX_CLASSES = 7  # attributes with more values have no probe


def attributes_of(dataset):
    """Return the attributes to probe, {name: its values}: metadata that is text and has 2 to MAX_CLASSES values."""
    values = {}
    for track in dataset.tracks:
        for key, value in track["metadata"].items():
            if isinstance(value, str):
                values.setdefault(key, set()).add(value)
    return {key: sorted(classes) for key, classes in values.items() if 2 <= len(classes) <= MAX_CLASSES}


def features(wav, sample_rate):
    """Return features [N, F] of wav [N, samples]: mel bands, autocorrelation of the onsets, best matching keys.

    All clips are first brought to the same loudness, so that the probe cannot use it. Mel bands: mean and deviation.
    Onsets are the half-wave rectified rise of the log-mel spectrogram (spectral flux). Their autocorrelation over lags
    of 0.1 to 2 s shows the beat, wherever it starts. Keys: the matches of the best major and of the best minor key.
    """
    keys = torch.tensor(np.array([key_matches(chroma) for chroma in chromagram(wav, sample_rate).cpu()])).to(wav)
    wav = 0.1 * wav / wav.square().mean(1, keepdim=True).sqrt().clamp(min=1e-4)
    hop = sample_rate // 50
    mel = (mel_spectrogram(wav, sample_rate, n_fft=1024, hop=hop) + 0.1).log()
    flux = mel.diff(dim=-1).clamp(min=0).mean(1)
    flux = flux - flux.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(flux, n=max(202, 2 * flux.shape[1])).abs().square()  # lags beyond a short clip are 0
    correlation = torch.fft.irfft(spectrum)[:, :101]
    correlation = correlation[:, 5:] / correlation[:, :1].clamp(min=1e-8)
    return torch.cat([mel.mean(2), mel.std(2), correlation, keys.unflatten(1, (2, 12)).amax(2)], dim=1)


class Probe:
    """Ridge regression of one-hot classes on standardized features x [N, F]."""

    def __init__(self, x, labels, classes, penalty=10.0):
        self.classes, self.mean, self.std = classes, x.mean(0), x.std(0) + 1e-6
        x = self.standardize(x)
        y = torch.eye(len(classes))[[classes.index(label) for label in labels]]
        self.weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)  # [F + 1, C]

    def standardize(self, x):
        """Standardize x [N, F], and append a column of ones for the bias: [N, F + 1]."""
        return torch.cat([(x - self.mean) / self.std, torch.ones(len(x), 1)], dim=1)

    def accuracy(self, x, labels):
        predicted = (self.standardize(x) @ self.weight).argmax(1)
        return float(np.mean([self.classes[i] == label for i, label in zip(predicted, labels)]))


def detection_rates(attributes, train_tracks, train_x, tracks, x):
    """Return the share of clips in which a probe detects the track's attribute: {attribute: {"chance", name ...}}.

    The probes learn from train_x [N, F] of train_tracks. x: {name: features of a clip for each of `tracks`}. "chance"
    always predicts the commonest class. Tracks without one of the classes are left out.
    """
    table = {}
    for attribute, classes in attributes.items():
        train_rows, rows = ([i for i, track in enumerate(split) if track["metadata"].get(attribute) in classes]
                            for split in (train_tracks, tracks))  # fmt: skip
        probe = Probe(train_x[train_rows], [train_tracks[i]["metadata"][attribute] for i in train_rows], classes)
        labels = [tracks[i]["metadata"][attribute] for i in rows]
        chance = max(map(labels.count, classes)) / len(labels)
        table[attribute] = {"chance": chance} | {name: probe.accuracy(x[name][rows], labels) for name in x}
    return table
