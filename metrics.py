"""Does the music follow its caption? A probe listens, beside chance and real music.

    python metrics.py out/demo [--clips 60]

Caption adherence: a ridge regression on pooled features of real clips (decoded from their codes, so that the codec's
own losses are in both) learns to tell each attribute stored with the data set: instrument, tempo, drums ... It is
scored on held-out real clips and on clips generated for the held-out captions.

Letters: N clips, F features, C classes.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
from codec import load_codec, mel_spectrogram
from config import UserError
from model import load_model, pick_device

LARGEST_CLASS_COUNT = 7  # an attribute with more values than this is no class to probe for


def attributes_of(tokens):
    """The attributes to probe: metadata that is text and takes 2 to 7 values -> {name: [values]}."""
    values = {}
    for track in tokens.tracks:
        for key, value in track["metadata"].items():
            if isinstance(value, str):
                values.setdefault(key, set()).add(value)
    return {key: sorted(found) for key, found in values.items() if 2 <= len(found) <= LARGEST_CLASS_COUNT}


def features(wav, sample_rate):
    """wav [N, samples] -> [N, F]: mean and deviation of each mel band, and the autocorrelation of the onsets.

    All clips are brought to one loudness first, so that the probe cannot go by level.
    Onsets are the half-wave rectified rise of the log-mel spectrogram (spectral flux); their autocorrelation over lags
    of 0.1 to 2 s shows the beat whatever its place in the clip.
    """
    wav = 0.1 * wav / wav.square().mean(1, keepdim=True).sqrt().clamp(min=1e-4)
    hop = sample_rate // 50
    mel = (mel_spectrogram(wav, sample_rate, n_fft=1024, hop=hop) + 0.1).log()
    flux = mel.diff(dim=-1).clamp(min=0).mean(1)
    flux = flux - flux.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(flux, n=2 * flux.shape[1]).abs().square()
    correlation = torch.fft.irfft(spectrum)[:, :101]
    correlation = correlation[:, 5:] / correlation[:, :1].clamp(min=1e-8)
    return torch.cat([mel.mean(2), mel.std(2), correlation], dim=1)


class Probe:
    """Ridge regression of one-hot classes on standardised features."""

    def __init__(self, x, labels, classes, penalty=10.0):
        self.classes, self.mean, self.std = classes, x.mean(0), x.std(0) + 1e-6
        x = self.expand(x)
        y = torch.eye(len(classes))[[classes.index(label) for label in labels]]
        self.weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)

    def expand(self, x):
        return torch.cat([(x - self.mean) / self.std, torch.ones(len(x), 1)], dim=1)

    def accuracy(self, x, labels):
        heard = (self.expand(x) @ self.weight).argmax(1)
        return float(np.mean([self.classes[i] == label for i, label in zip(heard, labels)]))


def decoded_features(codec, codes, batch_size=8):
    """codes [N, K, T] -> [N, F] on the CPU."""
    parts = [codec.decode(part)[:, 0] for part in codes.split(batch_size)]
    return torch.cat([features(part, codec.sample_rate).cpu() for part in parts])


def real_features(codec, tokens, tracks, T, name):
    """Features [N, F] of the first T frames of each track, or of all of it if it is shorter."""
    rows = []
    for track in tqdm(tracks, desc=f"listening to {name}", unit="clip", file=sys.stdout, mininterval=1, leave=False):
        codes = torch.from_numpy(tokens.codes(track, 0, T).T.astype(np.int64))
        rows.append(decoded_features(codec, codes[None]))
    return torch.cat(rows)


def adherence(model, codec, train_data, valid_data, s, probe_clips=600):
    """The share of clips in which the probe hears what the caption asked for.

    -> {attribute: {"chance", "real", "cfg 3", "cfg 1", "no text"}}, with the cfg of the settings in the place of 3.
    Every column is over the same first `evaluate_clips` held-out tracks: `real` is their own music, `chance` always
    names their commonest class, `no text` generates without the caption, which is what conditioning has to beat.
    """
    T = model.trained_frames
    known = train_data.tracks[:: max(1, len(train_data.tracks) // probe_clips)]
    asked = valid_data.tracks[: s.evaluate_clips]
    heard = {"real": real_features(codec, valid_data, asked, T, "held-out clips")}
    for name, cfg, text in ((f"cfg {s.cfg:g}", s.cfg, True), ("cfg 1", 1.0, True), ("no text", 1.0, False)):
        conditions = [{"text": track["caption"]} if text else {} for track in asked]
        heard[name] = decoded_features(codec, generate_many(model, conditions, T, cfg, s, name))
    x = real_features(codec, train_data, known, T, "training clips")
    table = {}
    for attribute, classes in attributes_of(train_data).items():
        rows = [i for i, track in enumerate(known) if track["metadata"].get(attribute) in classes]
        asking = [i for i, track in enumerate(asked) if track["metadata"].get(attribute) in classes]
        if not rows or not asking:  # an attribute that only other tracks have
            continue
        probe = Probe(x[rows], [known[i]["metadata"][attribute] for i in rows], classes)
        labels = [asked[i]["metadata"][attribute] for i in asking]
        table[attribute] = {"chance": max(labels.count(c) for c in classes) / len(labels)}
        table[attribute] |= {name: probe.accuracy(clips[asking], labels) for name, clips in heard.items()}
    return table


def generate_many(model, conditions, T, cfg, s, name, batch_size=32):
    """Codes [N, K, T] for N conditions, seeds 0 to N - 1, with a progress bar."""
    codes = []
    bar = tqdm(total=len(conditions) * T, desc=f"generating, {name}", unit="frame", file=sys.stdout, mininterval=1,
               leave=False)  # fmt: skip
    choice = dict(cfg=cfg, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p)
    for first in range(0, len(conditions), batch_size):
        part = conditions[first : first + batch_size]
        progress = functools.partial(
            lambda before, clips, done: bar.update(before + done * clips - bar.n), first * T, len(part)
        )
        seeds = range(first, first + len(part))
        codes.append(model.generate(part, T, seeds=seeds, progress=progress, **choice))
    bar.close()
    return torch.cat(codes)


def print_adherence(table):
    if not table:
        return print("no attribute is known of both the training and the held-out tracks")
    columns = list(next(iter(table.values())))
    print("\ncaption adherence: share of clips in which a probe hears what the caption asks for")
    print(f"{'':12}" + "".join(f"{column:>9}" for column in columns) + f"{'% of real':>11}")
    for attribute, row in table.items():
        share = 100 * row[columns[2]] / max(row["real"], 1e-9)
        print(f"{attribute:12}" + "".join(f"{row[column]:9.2f}" for column in columns) + f"{share:10.0f}%")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, with best.pt in it")
    parser.add_argument("--clips", type=int, default=60, help="held-out captions to generate for")
    parser.add_argument("--cfg", type=float, help="guidance; by default the run's")
    args = parser.parse_args()
    if args.clips < 1:
        raise UserError(f"--clips {args.clips}: must be at least 1")
    device, _ = pick_device()
    model, s, about = load_model(Path(args.run, "best.pt"), device)
    s.evaluate_clips, s.cfg = args.clips, s.cfg if args.cfg is None else args.cfg
    codec = load_codec(s.codec, s.codec_weights).to(device)
    train_data, valid_data = data.Tokens(s.data, "train"), data.Tokens(s.data, "valid")
    if codec.id != about["id"] or train_data.meta["codec"]["id"] != about["id"]:
        raise UserError(
            f"{args.run} was trained on codec {about['id']}, and {s.data} holds {train_data.meta['codec']['id']}"
        )
    if not attributes_of(train_data):
        raise UserError(f"{s.data}: its tracks have no attributes of 2 to {LARGEST_CLASS_COUNT} values to probe for")
    table = adherence(model, codec, train_data, valid_data, s)
    print_adherence(table)
    Path(args.run, "adherence.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    config.run(main)
