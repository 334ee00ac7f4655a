"""What a run says of itself: metrics.jsonl and history.jsonl, the terminal, and tensorboard or wandb.

metrics.jsonl    a line each few steps: step, epoch, ce, ppl, ce_q1, ppl_q1 ..., lr, grad_norm, tokens_per_s ...
history.jsonl    a line for each stage of an epoch: valid, best, evaluate, generate, commit
"""

import errno
import json
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import common
from common import UserError, first_line


def by_codebook(name, values):
    """One value for each codebook -> {"ce": their mean, "ce_q1", "ce_q2", ...}, as the reference names them."""
    return {name: float(np.mean(values)), **{f"{name}_q{k}": float(value) for k, value in enumerate(values, 1)}}


def with_perplexity(losses):
    """Adds ppl, ppl_q1 ... = exp(ce), exp(ce_q1) ..."""
    return losses | {name.replace("ce", "ppl"): math.exp(min(ce, 700)) for name, ce in losses.items()}


def read_log(path):
    """The lines of a .jsonl log, but for a last one that a kill has cut off."""
    if not path.exists():
        return []
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({first_line(error)}); mend or remove it") from None
    if not all(isinstance(line, dict) and type(line.get("step")) is int for line in found):
        raise UserError(f"{path}: not what a run writes, an object with its step on each line; remove it")
    return found


class Log:
    """Both files of a run, which rank 0 writes. `history` is the same on all ranks."""

    def __init__(self, s, step):
        """Cuts both files back to `step`, where the run resumes, and prints the history that is left.

        An epoch that was not committed there is cut off too: the run does its stages again.
        """
        self.out, self.writer = Path(s.out), None
        if common.rank() == 0 and s.logger:
            self.writer = open_logger(s, step)
        logs = [read_log(self.out / f"{name}.jsonl") for name in ("metrics", "history")]
        metrics_lines, history = common.gather(logs)[0]
        self.history = [line for line in history if line["step"] <= step]
        if not self.is_committed(step):
            self.history = [line for line in self.history if line["step"] < step]
        if common.rank() == 0:
            self.replace("metrics", [line for line in metrics_lines if line["step"] <= step])
            self.replace("history", self.history)
        for line in self.history:
            print(in_words(line))

    def replace(self, name, lines):
        common.write_file(self.out / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())

    def write(self, name, line):
        if common.rank() > 0:
            return
        with open(self.out / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if self.writer:
            stage = line.get("stage", "train")
            self.writer({f"{stage}/{key}": value for key, value in numbers(line).items()}, line["step"])

    def stage(self, name, step, epoch, **found):
        self.history.append(dict(step=step, epoch=epoch, stage=name, **found))
        self.write("history", self.history[-1])
        tqdm.write(in_words(self.history[-1]), file=sys.stdout)

    def is_committed(self, step):
        return any(line["step"] == step and line["stage"] == "commit" for line in self.history)


class Terminal:
    """stdout, whose reader may go. Where that was a program, as `tee`, which ctrl-C ends too, `on_leave` is called.

    Where it was the terminal of a run that goes on without one, what is printed from then on is dropped.
    """

    def __init__(self, stream, on_leave):
        self.stream, self.on_leave = stream, on_leave

    def write(self, text):
        self.unless_gone(self.stream.write, text)

    def flush(self):
        self.unless_gone(self.stream.flush)

    def unless_gone(self, function, *args):
        try:
            function(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            if error.errno == errno.EPIPE:
                self.on_leave()
            common.drop_output(self.stream)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def numbers(line):
    """What a line says in numbers."""
    return {key: line[key] for key in line if isinstance(line[key], (int, float)) and key not in ("step", "epoch")}


def in_words(line):
    found = ", ".join(f"{key} {value:.4g}" for key, value in numbers(line).items())
    return f"epoch {line['epoch']}, step {line['step']}: {line['stage']} {found}"


def open_logger(s, step):
    """A function that takes ({name: number}, step); raises UserError where what `logger` names is not installed."""
    try:
        if s.logger == "wandb":
            import wandb

            name = s.out.strip("/").replace("/", "-")
            return wandb.init(project="nanomusicgen", id=name, name=name, config=vars(s), resume="allow", dir=s.out).log
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(Path(s.out, "tensorboard"), purge_step=step)
        return lambda numbers, step: [writer.add_scalar(name, value, step) for name, value in numbers.items()]
    except ImportError:
        raise UserError(f"logger = '{s.logger}': not installed; pip install {s.logger}") from None
