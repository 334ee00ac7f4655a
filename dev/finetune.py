"""Fine-tune the demo's model on 20 clips of a new instrument and measure it: the table of docs/finetune.md.

    python train.py config/demo.py        # makes the demo's data; the model is demo/demo.pt
    python -m dev.finetune

Trains all weights or LoRA matrices, on the new clips alone or with 10 % of old music, and prints a Markdown table:
adherence, ce and copying for held-out captions of the new instrument and of the demo's corpus. Results are files in
WORK. After an interruption, the same command continues. It took 45 minutes on 1 thread.
"""

import argparse
import functools
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import common
import data
import metrics
import prepare
import train
from dataprep import shards
from demo import corpus
from generate import load_model
from tools import probe, tables
from tools.copying import copied_share

INSTRUMENT = "clarinet"
OLD_CLIPS, OLD_SHARE = 100, 0.1  # clips of the old corpus in the mixed data; their share of its items
VALID_ITEMS = 96  # held-out segments per ce
WEIGHTS = {  # trained weights: arguments of train.py
    "full": ["config/finetune.py", "--lr=1e-4"],
    "LoRA": ["config/lora.py", "--lr=1e-3"],
}
DATA = {"new only": "new", "10 % old": "mixed"}  # training data: its folder in WORK
OPTIONS = "--batch_size=2 --micro_batch=0 --keep_every=1 --samples=0 --evaluate_clips=0".split()
COLUMNS = {"new": ("instrument", "others", "ce", "copied"), "old": ("instrument", "others", "is new", "ce")}


# ----------------------------------------------------------------------------------------------------------- data


def make_data(work, old, clips):
    """Write data sets to WORK: new (20 training clips), mixed, test (held-out clips), probe (clips for the probes)."""
    sets = {"new": (30, 1, 0.3), "test": (clips + 1, 2, 1), "probe": (3 * clips, 3, 0)}
    for name, (size, seed, valid_fraction) in sets.items():
        manifest = corpus.write_corpus(work / f"{name}_audio", size, seed, instrument=INSTRUMENT)
        prepare.prepare(manifest, work / name, valid_fraction=valid_fraction)
    folder = work / "mixed_audio"
    folder.mkdir(exist_ok=True)
    new_tracks, old_tracks = (data.TokenDataset(path, "train").tracks for path in (work / "new", old))
    old_tracks = old_tracks[:: max(1, len(old_tracks) // OLD_CLIPS)][:OLD_CLIPS]
    lines = [describe(track, track["path"]) for track in old_tracks]
    # a track can be listed once, so copies of the new ones are reached by links
    for copy in range(round(len(old_tracks) * (1 / OLD_SHARE - 1) / len(new_tracks))):
        link = folder / f"copy_{copy}"
        if not link.exists():
            link.symlink_to((work / "new_audio").resolve())
        lines += [describe(track, f"{link.name}/{track['name']}") for track in new_tracks]
    common.write_file(folder / "manifest.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines).encode())
    prepare.prepare(folder / "manifest.jsonl", work / "mixed", valid_fraction=0)


def describe(track, path):
    """Return the manifest's entry for a track."""
    return {"path": path, "caption": track["caption"], "attributes": track["metadata"]}


# ----------------------------------------------------------------------------------------------------- experiment


def checkpoint_path(out, step):
    return out / f"step_{step:06d}.pt"


def finetune(out, options, folder, init_from, steps, seed):
    """Train by the command line, and keep the checkpoints after `steps` only."""
    command = [sys.executable, "train.py", *options, *OPTIONS, f"--data={folder}", f"--init_from={init_from}",
               f"--out={out}", f"--seed={seed}", f"--steps={max(steps)}", f"--epoch={math.gcd(*steps)}"]  # fmt: skip
    subprocess.run(command, check=True)
    for path in {*out.glob("*.pt")} - {checkpoint_path(out, step) for step in steps}:
        path.unlink()


class Measurement:
    """The held-out clips, and the probes' real clips, of the new instrument ("new") and of the old corpus ("old")."""

    def __init__(self, work, old, clips, seconds):
        self.codec = shards.load_matching_codec(work / "test", "tiny", "")
        self.T, self.new_clips = round(seconds * self.codec.frame_rate), data.TokenDataset(work / "new", "train")
        self.held_out = {"new": data.TokenDataset(work / "test", "valid"), "old": data.TokenDataset(old, "valid")}
        self.tracks = {name: dataset.tracks[:clips] for name, dataset in self.held_out.items()}
        self.probe_tracks, self.probe_x = {}, {}
        for name, folder in (("new", work / "probe"), ("old", old)):
            dataset = data.TokenDataset(folder, "train")
            self.probe_tracks[name] = dataset.tracks[:: max(1, len(dataset.tracks) // metrics.PROBE_CLIPS)]
            self.probe_x[name] = self.features(self.read_clips(dataset, self.probe_tracks[name]))

    def read_clips(self, dataset, tracks):
        return [metrics.read_clip(dataset, track, self.T) for track in tracks]

    def features(self, clips):
        return torch.cat(metrics.measure_clips(self.codec, clips, probe.features))

    def of_real_clips(self):
        """Return {"new" and "old": {"codes", "x": the probes' features}} of held-out music."""
        clips = {name: self.read_clips(self.held_out[name], tracks) for name, tracks in self.tracks.items()}
        return {name: {"codes": torch.stack(clips[name]), "x": self.features(clips[name])} for name in clips}

    def of_checkpoint(self, checkpoint):
        """Generate clips for the held-out captions: return {"new" and "old": {"ce", "codes", "x"}}."""
        (model, s, _), measured = load_model(checkpoint), {}
        s.valid_items, (device, dtype) = VALID_ITEMS, common.pick_device("cpu")
        autocast = functools.partial(torch.autocast, "cpu", dtype, enabled=dtype != torch.float32)
        for name, dataset in self.held_out.items():
            ce_q, *_ = train.validate(model, data.valid_batches(dataset, model, 8, s), device, autocast)
            measured[name] = {"ce": float(np.mean(ce_q))}
        model = metrics.load(checkpoint, device)
        for name, dataset in self.held_out.items():
            conditions = metrics.read_conditions(dataset, [(track, 0) for track in self.tracks[name]], self.T, s)
            codes = metrics.generate_many(model, conditions, self.T, s.cfg, s, name)
            measured[name] |= {"codes": codes, "x": self.features([*codes])}
        return measured

    def summarize(self, name, x, codes, ce=None):
        """Return the figures of COLUMNS. "others" is the mean over tempo, mode, texture, drums and key."""
        probe_tracks, tracks = self.probe_tracks[name], self.tracks[name]
        attributes = probe.attributes_of(SimpleNamespace(tracks=probe_tracks))
        attributes.pop("instrument", None)
        rates = probe.detection_rates(attributes, probe_tracks, self.probe_x[name], tracks, {"clips": x})
        labels = [track["metadata"]["instrument"] for tracks in self.probe_tracks.values() for track in tracks]
        instruments = probe.Probe(torch.cat([*self.probe_x.values()]), labels, sorted({*labels}))
        return {
            "instrument": instruments.accuracy(x, [track["metadata"]["instrument"] for track in tracks]),
            "is new": instruments.accuracy(x, [INSTRUMENT] * len(x)),
            "others": float(np.mean([rate["clips"] for rate in rates.values()])),
            "ce": ce,
            "copied": copied_share([*codes], self.new_clips),
        }


def print_table(rows):
    """Print a Markdown table: mean ± standard error over seeds."""
    columns = [(name, key) for name in COLUMNS for key in COLUMNS[name]]
    print("| run | " + " | ".join(f"{name}: {key}" for name, key in columns) + " |\n|" + "---|" * (len(columns) + 1))
    for title in rows:
        values = [[row[name][key] for row in rows[title]] for name, key in columns]
        cells = [tables.cell(column) if None not in column else "" for column in values]
        print("| " + " | ".join([title, *cells]) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init_from", type=Path, default="demo/demo.pt", help="the demo's model (default %(default)s)")
    parser.add_argument("--old", type=Path, default="data/demo", help="the demo's data (default %(default)s)")
    parser.add_argument("--work", type=Path, default="out/finetune_study", help="folder (default %(default)s)")
    parser.add_argument("--steps", default="100,300,1000", help="steps to measure after (default %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of training seeds (default %(default)s)")
    parser.add_argument("--clips", type=int, default=200, help="generated clips per measurement (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="seconds of a generated clip (default %(default)s)")
    args = parser.parse_args()
    steps = [int(step) for step in args.steps.split(",")]
    args.work.mkdir(parents=True, exist_ok=True)
    make_data(args.work, args.old, args.clips)
    measurement = Measurement(args.work, args.old, args.clips, args.seconds)

    def measure(name, function, *inputs):
        path = args.work / f"{name}.pt"
        if not path.exists():
            common.write_file(path, functools.partial(torch.save, function(*inputs)))
        return {split: measurement.summarize(split, **values) for split, values in torch.load(path).items()}

    rows = {"real music": [measure("real", measurement.of_real_clips)],
            "step 0": [measure("demo", measurement.of_checkpoint, args.init_from)]}  # fmt: skip
    for seed, weights, title in itertools.product(range(args.seeds), WEIGHTS, DATA):
        run = f"{weights}_{DATA[title]}_{seed}"
        if not all(checkpoint_path(args.work / run, step).exists() for step in steps):
            finetune(args.work / run, WEIGHTS[weights], args.work / DATA[title], args.init_from, steps, seed)
        for step in steps:
            row = measure(f"{run}_{step}", measurement.of_checkpoint, checkpoint_path(args.work / run, step))
            rows.setdefault(f"{weights}, {title}, step {step}", []).append(row)
    print_table(rows)


if __name__ == "__main__":
    common.run(main)
