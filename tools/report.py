"""Write the report page of a run, OUT/index.html: a summary, samples to play, curves, metrics, settings and code.

    python -m tools.report out/demo        # train.py does the same after each epoch

The page is one static file, report.html filled in, that needs no server and no network. It links to the clips of the
run and to their spectrograms, which are drawn once if Pillow is installed. All text from the run's files is escaped.
"""

import argparse
import contextlib
import json
import math
import re
import statistics
import sys
import time
from html import escape
from pathlib import Path
from urllib.parse import quote

import soundfile
from tqdm import tqdm

import common
from audio import draw_spectrogram
from common import UserError, first_line
from log import read_log
from tools.summary import lines_of_stage, summarize

TEMPLATE = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
MAX_OPEN = 12  # a list of more epochs is folded
MAX_DOTS = 12  # a curve of at most this many points has a dot at each
CLIPS = {"reference": "reference", "codec": "codec reconstruction", "continued": "continuation", "free": "generated"}
COLUMNS = {"nothing": "no conditions", "own": "given melody", "shuffled": "another melody"}
METRICS = (  # title, unit, key in the history, {key of a value to compare with: its name}
    ("conditioning gain", "nats, ce(unconditional) − ce", "gain", {}),
    ("caption adherence", "share of clips", "adherence", {"adherence_chance": "chance", "adherence_real": "real"}),
    ("Fréchet audio distance", "codec latents", "fad", {"fad_real": "real against real"}),
    ("chroma similarity", "to the reference", "chroma", {"chroma_chance": "chance"}),
    ("copied clips", "share of clips", "copied", {"copied_real": "held-out music"}),
)
TRAINING = (  # title, unit, key in either log
    ("learning rate", "", "lr"),
    ("gradient norm", "before clipping", "grad_norm"),
    ("skipped steps", "total, float16 only", "skipped"),
    ("training speed", "tokens/s", "tokens_per_s"),
    ("MFU", "share of the peak FLOPS", "mfu"),
    ("waiting for data", "share of the time", "data_wait"),
    ("generation speed", "x real time", "rtf"),
)


def summarize_adherence(line):
    """Move the adherence of each attribute in a history line to "attributes", and add the means over the attributes."""
    line["attributes"] = line.pop("adherence", None) or {}
    if rows := list(line["attributes"].values()):
        guided = [column for column in rows[0] if column.startswith("cfg")][0]
        for key, column in (("adherence", guided), ("adherence_chance", "chance"), ("adherence_real", "real")):
            line[key] = statistics.fmean(row[column] for row in rows)
    return line


def points(lines, key):
    """Return [(step, value)] of the lines with a finite number at `key`."""
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [(step, value) for step, value in pairs if math.isfinite(value)]


def thin(points, most=300):
    """Return about `most` of the points: the first, the last, and the extremes of each interval, to keep spikes."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    parts = [sorted(points[i : i + size], key=lambda point: point[1]) for i in range(0, len(points), size)]
    return sorted({points[0], points[-1], *(part[0] for part in parts), *(part[-1] for part in parts)})


def ticks(low, high, log=False):
    """Return about five round numbers for an axis, the first at most `low` and the last at least `high`."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
        marks = [digit * 10.0**power for power in powers for digit in ((1,) if high > 30 * low else (1, 2, 5))]
    else:
        rough = (high - low) / 4 or abs(high) or 1
        power = 10.0 ** math.floor(math.log10(rough))
        step = power * min(digit for digit in (1, 2, 5, 10) if digit * power >= rough)
        marks = [i * step for i in range(math.floor(low / step) - 1, math.ceil(high / step) + 2)]
    first = max(mark for mark in marks if mark <= low)
    last = min(mark for mark in marks if mark >= high and mark > first)
    return [mark for mark in marks if first <= mark <= last]


def format_tick(number):
    return f"{number:g}" if abs(number) < 1000 else f"{number / 1000:g}k"


def chart(title, unit, series, log=False, big=False):
    """Return a chart as an SVG figure, or "" without measured points.

    series: [(name, kind, [(step, value)])]. The kinds are main, train, and level: a dashed line at the newest value.
    The points are written in data units, log10 of the value if `log`, under a transform: the page's script reads them.
    """
    scale = math.log10 if log else float
    series = [(name, kind, thin([p for p in line if p[1] > 0 or not log])) for name, kind, line in series]
    series = [(name, kind, line) for name, kind, line in series if line]
    if all(kind == "level" for _, kind, _ in series):
        return ""
    last_step = max(1, *(line[-1][0] for *_, line in series))
    values = [value for *_, line in series for _, value in line]
    marks = ticks(min(values), max(values), log)
    width, height = (560, 390) if big else (280, 170)
    left, right, top, bottom = 42, width - 8, 8, height - 20
    low, high = scale(marks[0]), scale(marks[-1])
    x_scale, y_scale = (right - left) / last_step, (top - bottom) / (high - low)
    transform = f'transform="matrix({x_scale:.9g} 0 0 {y_scale:.9g} {left} {bottom - low * y_scale:.9g})"'
    drawing, legend = "", ""
    for mark in marks:
        y = bottom + (scale(mark) - low) * y_scale
        drawing += f'<path d="M{left} {y:.1f}H{right}"/>'
        drawing += f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{format_tick(mark)}</text>'
    for mark in (mark for mark in ticks(0, last_step) if mark <= last_step):
        anchor = "start" if not mark else "end" if mark > 0.95 * last_step else "middle"
        label = format_tick(mark) if mark else "step 0"
        drawing += f'<text x="{left + mark * x_scale:.1f}" y="{height - 5}" text-anchor="{anchor}">{label}</text>'
    for name, kind, line in series:
        legend += f'<li class="{kind}"><i></i>{name} <b></b></li>'
        line = [(0, line[-1][1]), (last_step, line[-1][1])] if kind == "level" else line
        coordinates = [f"{step},{scale(value):.6g}" for step, value in line]
        drawing += f'<polyline class="line {kind}" {transform} points="{" ".join(coordinates)}"/>'
        if len(line) <= MAX_DOTS and kind != "level":
            dots = "".join(f"M{point}h0" for point in coordinates)
            drawing += f'<path class="line {kind} dots" {transform} d="{dots}"/>'
    return (
        f'<figure class="chart{" big" if big else ""}"><figcaption><b>{title}</b>{unit}<output></output></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} by step"'
        f"{' class=log' if log else ''}>{drawing}"
        f'<path class="pointer" d="M0 {top}V{bottom}"/></svg><ul>{legend}</ul></figure>'
    )


def charts(metrics, history):
    """Return the charts: the losses, in total and by codebook, then the metrics of an epoch, then the training."""
    valid = lines_of_stage(history, "valid")
    codebooks = sorted({key.removeprefix("ce") for line in metrics + valid for key in line if key.startswith("ce_q")})
    figures = []
    for suffix in ("", *codebooks):
        series = [("train", "train", points(metrics, f"ce{suffix}")), ("valid", "main", points(valid, f"ce{suffix}")),
                  ("unigram", "level", points(valid, f"unigram{suffix}"))]  # fmt: skip
        figures.append(chart(f"loss {suffix[1:]}".strip(), "nats", series, big=not suffix))
    for title, unit, key, levels in METRICS:
        series = [(name, "level", points(history, level)) for level, name in levels.items()]
        figures.append(chart(title, unit, [("this run", "main", points(history, key)), *series]))
    for title, unit, key in TRAINING:
        series = [("this run", "train", points(metrics + history, key))]
        figures.append(chart(title, unit, series, log=key == "grad_norm"))
    return "".join(figures) or "<p>No log lines yet.</p>"


def draw_spectrograms(out, paths):
    """Draw the spectrogram of each clip that has none, or an older one, as a .png next to it."""
    for path in tqdm(paths, desc="spectrograms", unit="clip", file=sys.stdout, delay=2, mininterval=1, leave=False):
        clip, picture = out / path, (out / path).with_suffix(".png")
        with contextlib.suppress(ImportError, OSError, soundfile.LibsndfileError, UserError):  # show it without
            if not picture.exists() or picture.stat().st_mtime < clip.stat().st_mtime:
                draw_spectrogram(clip, picture, soundfile.info(clip).samplerate)


def player(out, path, kind, prompt_seconds):
    """Return the figure of a clip: its picture and audio controls, or the reason why it cannot be played."""
    try:
        seconds = soundfile.info(out / path).duration
    except soundfile.LibsndfileError:
        reason = "cannot be read" if (out / path).exists() else "file missing"
        return f"<figure><figcaption>{CLIPS[kind]}</figcaption><p>{reason}: {escape(path)}</p></figure>"
    picture, image, prompt = Path(path).with_suffix(".png"), "", ""
    if (out / picture).exists():
        image = f'<img loading="lazy" alt="spectrogram" src="{to_url(picture.as_posix())}">'
    if kind == "continued" and prompt_seconds and seconds:
        share = min(1, prompt_seconds / seconds)
        prompt = f'<span style="width:{100 * share:.2f}%">prompt {prompt_seconds:g} s</span>'
    return (
        f'<figure class="{kind}"><figcaption>{CLIPS[kind]}, {seconds:.1f} s</figcaption>'
        f'<div class="picture" data-seconds="{seconds:.3f}">{image}{prompt}</div>'
        f'<audio controls preload="none" src="{to_url(path)}"></audio></figure>'
    )


def to_url(path):
    return quote(path, errors="surrogateescape")


def samples_of_epoch(out, line):
    """Return the samples of a `generate` line: each caption with its clips side by side."""
    html = f"<p>Epoch {line['epoch']:,}, step {line['step']:,}</p>"
    for clip in line["clips"]:
        players = [player(out, clip[kind], kind, clip.get("prompt_seconds")) for kind in CLIPS if clip.get(kind)]
        caption = escape(clip["caption"]) or "<i>no caption</i>"
        html += f'<article><h3 dir="auto">{caption} <small>seed {escape(str(clip["seed"]))}</small></h3>'
        html += f'<div class="cells">{"".join(players)}</div></article>'
    return html


def samples(out, history):
    """Return the samples of the newest epoch, then those of earlier epochs, folded and newest first."""
    lines = lines_of_stage(history, "generate")
    if not lines:
        return "<p>There are no samples yet.</p>"
    paths = [clip[kind] for line in lines for clip in line["clips"] for kind in CLIPS if clip.get(kind)]
    draw_spectrograms(out, dict.fromkeys(paths))
    *earlier, newest = lines
    html = samples_of_epoch(out, newest)
    html += "<p>Pictures: log-mel spectrograms from -80 to 0 dB, low frequencies at the bottom. Click to play.</p>"
    folded = ""
    for line in reversed(earlier):
        folded += f"<details><summary>epoch {line['epoch']:,}</summary>"
        folded += f"<template>{samples_of_epoch(out, line)}</template></details>"
    return html + (fold("earlier epochs", len(earlier), f'<div class="epochs">{folded}</div>') if earlier else "")


def fold(title, number, html):
    return f"<details{' open' if number <= MAX_OPEN else ''}><summary>{title}: {number}</summary>{html}</details>"


def tiles(s, metrics, history):
    """Return the most important numbers: the progress, the best loss and the newest metrics."""
    step, steps, epoch = max((line["step"] for line in metrics + history), default=0), s.get("steps"), s.get("epoch")
    rows = [("progress", f"step {step:,}", "")]
    if steps and epoch:
        note = f"step {step:,} of {steps:,}, epoch {math.ceil(step / epoch)} of {math.ceil(steps / epoch)}"
        rows = [("progress", f"{100 * step / steps:.0f} %", note)]
    if valid := points(lines_of_stage(history, "valid"), "ce"):
        best_step, best = min(valid, key=lambda point: point[1])
        unigram = "".join(f"unigram {value:.3f}, " for _, value in points(history, "unigram")[-1:])
        rows.append(("best validation loss", f"{best:.3f}", f"nats, {unigram}at step {best_step:,}"))
    for title, unit, key, levels in METRICS:
        for _, value in points(history, key)[-1:]:
            newest = [(name, points(history, level)[-1:]) for level, name in levels.items()]
            note = ", ".join(f"{name} {level[0][1]:.3f}" for name, level in newest if level)
            rows.append((title, f"{value:.3f}", note or unit))
    return "".join(f"<div><dt>{title}</dt><dd><b>{value}</b></dd>{note}</div>" for title, value, note in rows)


def table(rows):
    """Return [{column: number or text}] as a table of all columns, in the order of their first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    html = "".join(f"<th>{escape(COLUMNS.get(column, column))}</th>" for column in columns)
    for row in rows:
        cells = [row.get(column, "") for column in columns]
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells]
        html += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<div class="scroll"><table><tr>{html}</table></div>'


def metrics_tables(history):
    """Return tables: the newest adherence to captions and melodies, then the numbers of every epoch, newest first."""
    if not history:
        return "<p>No metrics yet.</p>"
    html = ""
    for title, key in (("caption adherence", "attributes"), ("chroma similarity to", "melody")):
        newest = next((line[key] for line in reversed(history) if line.get(key)), {})
        html += table([{title: name, **row} for name, row in newest.items()]) if newest else ""
    rows = {}
    for line in history:
        row = rows.setdefault(line["step"], {"epoch": line.get("epoch")})
        if line.get("stage") == "train":  # the epoch's means, whose keys are those of the validation
            line = {"step": line["step"], "train_ce": line["ce"]}
        row |= {key: value for key, value in line.items() if isinstance(value, (int, float))}
    return html + fold("epochs", len(rows), table([*rows.values()][::-1]))


def summary(s, history):
    """Return the sentences about the run as a list, under a heading."""
    conditions = "captions" + ", melodies" * bool(s.get("melody")) + ", styles" * bool(s.get("style"))
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in summarize(history, conditions))
    return f'<h2>What this run shows</h2><ul class="summary">{items}</ul>' if items else ""


def make_page(out):
    config = out / "config.json"
    s = json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}
    metrics = read_log(out / "metrics.jsonl")
    history = [summarize_adherence(line) for line in read_log(out / "history.jsonl")]
    diffs = sorted(out.glob("code_*.diff"))
    code = diffs[-1].read_text(encoding="utf-8", errors="replace") if diffs else ""
    commit, _, diff = code.partition("\n")
    changes = "with uncommitted changes" if diff.strip() else "no uncommitted changes"
    settings = {key: value if isinstance(value, str) else json.dumps(value) for key, value in s.items()}
    parts = {
        "name": escape(out.resolve().name),
        "version": f"git {escape(commit[:10])}, {changes}" if commit else "no git commit recorded",
        "time": time.strftime("%Y-%m-%d %H:%M"),
        "summary": summary(s, history),
        "tiles": tiles(s, metrics, history),
        "samples": samples(out, history),
        "charts": charts(metrics, history),
        "metrics": metrics_tables(history),
        "settings": "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in settings.items()),
        "code": escape(code),
    }
    return re.sub(r"<!-- (\w+) -->", lambda match: parts[match[1]], TEMPLATE)


def write(out):
    """Write OUT/index.html and return its path. Call it on rank 0 only.

    Raises UserError if OUT is not a run's folder, or if its config.json or a log is damaged.
    """
    out = Path(out)
    if not any((out / name).exists() for name in ("config.json", "metrics.jsonl", "history.jsonl")):
        raise UserError(f"{out}: not a run's folder: it has no config.json, metrics.jsonl or history.jsonl")
    try:
        page = make_page(out)
    except UserError:
        raise
    except json.JSONDecodeError as error:
        raise UserError(f"{out}/config.json: not JSON ({error}). Repair or remove it") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{out}: config.json or a log is damaged ({first_line(error)}). Repair or remove it") from None
    common.write_file(out / "index.html", page.encode(errors="replace"))
    return out / "index.html"


def write_page(out):
    """Write the page during training, where an error is only printed."""
    try:
        write(out)
    except (OSError, UserError) as error:
        tqdm.write(f"index.html was not written: {error}", file=sys.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the folder of a run, such as out/demo")
    print(f"wrote {write(parser.parse_args().run)}")


if __name__ == "__main__":
    common.run(main)
