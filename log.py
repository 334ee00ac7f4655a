"""The log of a run: metrics.jsonl, history.jsonl, the console, and tensorboard or wandb.

metrics.jsonl    a line every few steps: step, epoch, ce, ppl, ce_q1, ppl_q1 ... (of codebook 1 ...), lr, grad_norm,
                 skipped (steps), tokens_per_s (codes in the loss), data_wait (share of the time), memory (GiB), mfu
history.jsonl    a line for each stage of an epoch: train, valid, best, evaluate, generate, commit
"""

import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import distributed
from common import UserError, first_line


def by_codebook(name, values):
    """[K] values -> {name: their mean, "name_q1": the first, "name_q2": ...}."""
    return {name: float(np.mean(values)), **{f"{name}_q{k}": float(value) for k, value in enumerate(values, 1)}}


def with_perplexity(losses):
    """Add ppl = exp(ce), ppl_q1 = exp(ce_q1), ..."""
    return losses | {name.replace("ce", "ppl"): math.exp(min(ce, 700)) for name, ce in losses.items()}


def error_over_tracks(items):
    """Return (standard error of the sum of the items' gains, or None for one track; number of tracks).

    items: [(track, (gain, frames))]. Items of one track resemble one another, so tracks are the independent units. The
    error is that of a ratio estimator, because tracks have different lengths.
    """
    totals = {}
    for track, (gain, frames) in items:
        if frames:  # a rank without segments has an item of 0 frames
            totals[track] = np.add(totals.get(track, 0), (gain, frames))
    gains, frames = np.transpose([*totals.values()])
    n, residuals = len(gains), gains - frames * gains.sum() / frames.sum()
    return math.sqrt(n / (n - 1) * np.square(residuals).sum()) if n > 1 else None, n


def read_log(path):
    """Read the lines of a .jsonl log, except a last line that a kill cut off."""
    if not path.exists():
        return []
    try:
        text = path.read_text(encoding="utf-8")
        lines = [json.loads(line, parse_constant=lambda name: None) for line in text.split("\n")[:-1]]
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({first_line(error)}); repair or remove it") from None
    if not all(isinstance(line, dict) and type(line.get("step")) is int for line in lines):
        raise UserError(f"{path}: not the log of a run, which has an object with a step on each line; remove it")
    return lines


def numbers(line):
    return {key: line[key] for key in line if isinstance(line[key], (int, float)) and key not in ("step", "epoch")}


def in_words(line):
    values = ", ".join(f"{key} {value:.4g}" for key, value in numbers(line).items())
    return f"epoch {line['epoch']}, step {line['step']}: {line['stage']} {values}"


@dataclass
class Interval:
    """Counters since the last line of metrics.jsonl."""

    start: float = field(default_factory=time.monotonic)
    waited: float = 0.0  # seconds, for data
    targets: float = 0.0  # codes in the loss, of all ranks
    flops: float = 0.0  # floating-point operations, of all ranks

    def rates(self, device, peak):
        """Return the speeds for a line of metrics.jsonl. peak: the devices' operations per second, or None."""
        seconds = time.monotonic() - self.start
        rates = dict(tokens_per_s=round(self.targets / seconds), data_wait=round(self.waited / seconds, 4))
        if device.type == "cuda":
            rates["memory"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)  # GiB, the maximum so far
        return rates | ({"mfu": round(self.flops / seconds / peak, 4)} if peak else {})


class Log:
    """Both files of a run, written by rank 0. `history` is the same on all ranks."""

    def __init__(self, s, step):
        """Cut both files back to `step`, where the run resumes, and print the remaining history.

        An epoch without its commit line is cut off too, because the run repeats its stages.
        """
        self.out, self.writer = Path(s.out), None
        if distributed.rank() == 0 and s.logger:
            from tools.loggers import open_logger

            self.writer = open_logger(s, step)
        self.history = distributed.call_on_rank_0(lambda: self.cut_back(step))
        self.best_ce = next((line["ce"] for line in reversed(self.history) if line["stage"] == "best"), math.inf)
        for line in self.history if step < s.steps else ():
            print(in_words(line))

    def cut_back(self, step):
        metrics_lines, self.history = (read_log(self.out / f"{name}.jsonl") for name in ("metrics", "history"))
        last = step if self.is_committed(step) else step - 1
        self.history = [line for line in self.history if line["step"] <= last]
        self.replace("metrics", [line for line in metrics_lines if line["step"] <= step])
        self.replace("history", self.history)
        return self.history

    def restart(self, step):
        """Start new files. The old files are renamed, for example metrics_until_000500.jsonl."""
        if distributed.rank() == 0:
            for name in ("metrics", "history"):
                kept = self.out / f"{name}_until_{step:06d}.jsonl"
                if not kept.exists():  # already renamed, if a previous resume was killed here
                    (self.out / f"{name}.jsonl").replace(kept)
                self.replace(name, [])
        self.history, self.best_ce = [], math.inf

    def replace(self, name, lines):
        common.write_file(self.out / f"{name}.jsonl", "".join(common.to_json(line) + "\n" for line in lines).encode())

    def write(self, name, line):
        if distributed.rank() > 0:
            return
        with open(self.out / f"{name}.jsonl", "a") as file:
            file.write(common.to_json(line) + "\n")
        if self.writer:
            group = "train" if name == "metrics" else line["stage"].replace("train", "train_epoch")
            self.writer({f"{group}/{key}": value for key, value in numbers(line).items()}, line["step"])

    def stage(self, name, step, epoch, **values):
        """Log one stage of an epoch to history.jsonl and the console."""
        self.history.append(dict(step=step, epoch=epoch, stage=name, **values))
        self.write("history", self.history[-1])
        tqdm.write(in_words(self.history[-1]), file=sys.stdout)

    def is_committed(self, step):
        return any(line["step"] == step and line["stage"] == "commit" for line in self.history)
