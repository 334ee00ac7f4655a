"""The listening page of a run, OUT/index.html: one static file that needs no server and no network.

    python -m tools.report out/demo        # rank 0 of train.py does the same after each epoch

It refers to the wavs below OUT by relative paths, and to a spectrogram of each: a .png beside it, made once, where
Pillow is installed. Everything that is read from the run's files is escaped on its way into the page.

Letters: K codebooks.
"""

import argparse
import json
import math
import sys
import time
from html import escape
from pathlib import Path
from urllib.parse import quote

import soundfile
from tqdm import tqdm

import common
from codec import draw_spectrogram
from common import UserError
from log import read_log

FEW = 12  # epochs that a list shows before it folds itself up
CLIPS = {"reference": "reference", "codec": "through the codec", "continued": "continuation", "free": "free generation"}
MEASURES = (  # title, unit, key in the history, {key of a level to compare with: its name}
    ("conditioning gain", "nats, ce(null) − ce(conditioned)", "gain", {}),
    ("caption adherence", "share of clips", "adherence", {"adherence_chance": "chance", "adherence_real": "real"}),
    ("Fréchet audio distance", "codec latents", "fad", {"fad_real": "real against real"}),
    ("chroma similarity", "to the reference", "chroma", {"chroma_chance": "chance"}),
)
OTHERS = (  # title, unit, key in either log
    ("learning rate", "", "lr"),
    ("gradient norm", "before clipping", "grad_norm"),
    ("skipped steps", "so far, float16", "skipped"),
    ("training", "tokens a second", "tokens_per_s"),
    ("MFU", "share of the peak FLOPS", "mfu"),
    ("waiting for data", "share of the time", "data_wait"),
    ("generation", "seconds of music a second", "rtf"),
)

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfa; --ink: #1c1d20; --soft: #62656b; --rule: #e2e1dc;
  --main: #0067a8; --train: #c25a00; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --ink: #e4e4e2; --soft: #9b9ea5; --rule: #303338;
  --main: #6cb2f0; --train: #ef9f58; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 75rem; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 1.5rem; font-weight: 600; line-height: 1.2; }
h2 { margin: 1.8rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--rule); font-size: 1.05rem; }
h3 { margin: 0 0 .35rem; font-size: 1rem; font-weight: 500; }
a { margin-right: .7em; }
p { margin: .2rem 0 .8rem; }
small, p, a, figcaption, dl, ul, table { color: var(--soft); font-size: .82rem; font-weight: 400; }
figure, dl, dd, ul { margin: 0; padding: 0; list-style: none; }
dd, td, .chart b { color: var(--ink); font-weight: 500; }
pre { max-height: 40rem; overflow: auto; font-size: .8rem; overflow-wrap: normal; }
summary { cursor: pointer; padding: .2rem 0; }
.tiles, .cells, .rounds, .charts { display: grid; gap: .8rem 1rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); margin-bottom: .8rem; line-height: 1.3; }
.tiles b { font-size: 1.45rem; font-weight: 600; }
.cells { grid-template-columns: repeat(auto-fill, minmax(min(100%, 14.5rem), 1fr)); margin-bottom: 1.2rem; }
.rounds { grid-template-columns: repeat(auto-fill, minmax(6.5rem, 1fr)); row-gap: 0; }
.rounds details[open] { grid-column: 1 / -1; }
.charts { grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr)); }
.picture { position: relative; overflow: hidden; height: 5.2rem; margin: .15rem 0 .3rem; border-radius: 3px;
  background: #000004; cursor: pointer; }
.picture img { display: block; width: 100%; height: 100%; }
.picture span { position: absolute; inset: 0 auto 0 0; padding: .1rem .25rem; background: #fff3; color: #fff;
  border-right: 1.5px solid #fff; font-size: .72rem; white-space: nowrap; text-shadow: 0 0 3px #000; }
.picture::after { content: ""; position: absolute; inset: 0 auto 0 var(--at, -2px); width: 1.5px; background: #fff; }
audio { display: block; width: 100%; height: 2.1rem; }
.chart figcaption, .chart ul { display: flex; flex-wrap: wrap; gap: 0 .5em; }
.chart i { display: inline-block; width: 1rem; margin-right: .35rem; border-top: 2px solid; vertical-align: .25em; }
.chart li b { display: inline-block; min-width: 3.2em; }
.chart output { margin-left: auto; }
.chart:not(:hover) :is(output, li b, .hair) { visibility: hidden; }
.main i { color: var(--main); } .train i { color: var(--train); } .level i { border-top: 1px dashed; }
svg { display: block; width: 100%; touch-action: pan-y; }
svg text { fill: var(--soft); font-size: 10.5px; }
svg path { stroke: var(--rule); }
svg .hair { stroke: var(--soft); }
svg .line { fill: none; stroke-width: 1px; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
svg .train { stroke: var(--train); }
svg .main { stroke: var(--main); stroke-width: 1.6px; }
svg .level { stroke: var(--soft); stroke-dasharray: 4 3; }
svg .dots { stroke-width: 5px; stroke-linecap: round; }
.scroll { overflow-x: auto; overflow-wrap: normal; margin-bottom: .8rem; }
table { border-collapse: collapse; white-space: nowrap; }
th, td { padding: .18rem .9rem .18rem 0; border-bottom: 1px solid var(--rule); text-align: right; font-weight: 400; }
th:first-child, td:first-child { text-align: left; }
.settings { columns: 17rem; column-gap: 2rem; }
.settings div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--rule); }
.settings dd { text-align: right; }
@media (min-width: 70rem) { .big { grid-column: span 2; grid-row: span 2; } }
@media (max-width: 40rem) { .big text { font-size: 17px; } .cells .free { order: -1; } }
"""

# A folded round is built when it is opened: 300 epochs of players at once would take seconds. One clip plays at a time;
# its picture shows where, and plays from where it is clicked. Under the pointer a chart shows its values.
SCRIPT = """
let playing;
addEventListener('toggle', e => {
  for (const t of e.target.querySelectorAll(':scope > template')) t.outerHTML = t.innerHTML; // its own nodes are mute
}, true);
addEventListener('play', e => { if (playing && playing !== e.target) playing.pause(); playing = e.target; }, true);
addEventListener('timeupdate', e => e.target.parentNode.style.setProperty(
  '--at', 100 * e.target.currentTime / e.target.duration + '%'), true);
addEventListener('click', e => {
  const picture = e.target.closest('.picture'), audio = picture?.parentNode.querySelector('audio');
  if (!picture) return;
  audio.currentTime = e.offsetX / picture.clientWidth * picture.dataset.seconds;
  audio.play();
});
addEventListener('pointermove', e => {
  const chart = e.target.closest('.chart'), svg = chart?.querySelector('svg');
  if (!svg) return;
  const box = svg.getBoundingClientRect(), at = (e.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
  const values = chart.querySelectorAll('li b');
  let nearest = Infinity;
  svg.querySelectorAll('polyline').forEach((line, i) => {
    const { a, e: left } = line.transform.baseVal[0].matrix, far = p => Math.abs(p.x * a + left - at);
    const p = [...line.points].reduce((best, p) => far(p) < far(best) ? p : best);
    values[i].textContent = +(svg.matches('.log') ? 10 ** p.y : p.y).toPrecision(4);
    if (line.matches('.level') || far(p) >= nearest) return;
    nearest = far(p);
    chart.querySelector('output').textContent = 'step ' + p.x.toLocaleString('en');
    svg.querySelector('.hair').style.transform = `translateX(${p.x * a + left}px)`;
  });
});
"""


def inspect(out, paths):
    """{path below `out`: (its seconds or in words why it cannot be played, whether it has a picture)}."""
    found, can_draw = {}, True
    for path in tqdm(paths, desc="spectrograms", unit="wav", file=sys.stdout, delay=2, mininterval=1, leave=False):
        wav, picture = out / path, (out / path).with_suffix(".png")
        try:
            info = soundfile.info(wav)
            if can_draw and not (picture.exists() and picture.stat().st_mtime >= wav.stat().st_mtime):
                draw_spectrogram(wav, picture, info.samplerate)
            found[path] = info.duration, picture.exists()
        except ImportError:
            can_draw = False
            found[path] = info.duration, picture.exists()
        except (soundfile.LibsndfileError, UserError):
            found[path] = "cannot be read" if wav.exists() else "file missing", False
    return found


def ticks(low, high, log=False):
    """Round numbers, about five, the first at most `low` and the last at least `high`."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 2)
        marks = [m * 10.0**p for p in decades for m in ((1,) if high > 30 * low else (1, 2, 5))]
        first = max(i for i, mark in enumerate(marks) if mark <= low)
        return marks[first : max(first + 2, next(i for i, mark in enumerate(marks) if mark >= high) + 1)]
    rough = (high - low) / 4 or abs(high) or 1
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min(m for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.floor(low / step)
    return [i * step for i in range(first, max(math.ceil(high / step), first + 1) + 1)]


def short(number):
    return f"{number:g}" if abs(number) < 1000 else f"{number / 1000:g}k"


def of_stage(history, name):
    return [line for line in history if line.get("stage") == name]


def points(lines, key):
    """[(step, line[key])] for the lines where that is a number."""
    pairs = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    return [(step, value) for step, value in pairs if math.isfinite(value)]


def thin(points, most=300):
    """At most about `most` of the points: the ends, and the lowest and highest of each stretch, so that spikes stay."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    parts = [sorted(points[i : i + size], key=lambda point: point[1]) for i in range(0, len(points), size)]
    return sorted({points[0], points[-1], *(part[0] for part in parts), *(part[-1] for part in parts)})


def chart(title, unit, series, log=False, big=False):
    """Series [(name, look, [(step, value)])] -> an SVG figure, or nothing where nothing was measured.

    A look is main, train, or level: a dashed line at the newest value. The points stand in their own units (or log10 of
    them) under a transform, so that the script can read them.
    """
    scale = math.log10 if log else float
    series = [(name, look, thin([p for p in line if p[1] > 0 or not log])) for name, look, line in series]
    series = [line for line in series if line[2]]
    if all(look == "level" for _, look, _ in series):
        return ""
    last = max(1, *(line[-1][0] for *_, line in series))
    values = [value for *_, line in series for _, value in line]
    marks = ticks(min(values), max(values), log)
    width, height = (560, 390) if big else (280, 170)
    left, right, top, bottom = 42, width - 8, 8, height - 20
    low, high = scale(marks[0]), scale(marks[-1])
    a, d = (right - left) / last, (top - bottom) / (high - low)
    transform = f'transform="matrix({a:.9g} 0 0 {d:.9g} {left} {bottom - low * d:.9g})"'
    drawn, legend = "", ""
    for mark in marks:
        y = bottom + (scale(mark) - low) * d
        drawn += f'<path d="M{left} {y:.1f}H{right}"/>'
        drawn += f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{short(mark)}</text>'
    for mark in (mark for mark in ticks(0, last) if mark <= last):
        anchor = "start" if not mark else "end" if mark > 0.95 * last else "middle"
        label = short(mark) if mark else "step 0"
        drawn += f'<text x="{left + mark * a:.1f}" y="{height - 5}" text-anchor="{anchor}">{label}</text>'
    for name, look, line in series:
        legend += f'<li class="{look}"><i></i>{name} <b></b></li>'
        line = [(0, line[-1][1]), (last, line[-1][1])] if look == "level" else line
        line = [f"{step},{scale(value):.6g}" for step, value in line]
        drawn += f'<polyline class="line {look}" {transform} points="{" ".join(line)}"/>'
        if len(line) <= FEW and look != "level":
            dots = "".join(f"M{point}h0" for point in line)
            drawn += f'<path class="line {look} dots" {transform} d="{dots}"/>'
    return (
        f'<figure class="chart{" big" if big else ""}"><figcaption><b>{title}</b>{unit}<output></output></figcaption>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title} by step"'
        f"{' class=log' if log else ''}>{drawn}"
        f'<path class="hair" d="M0 {top}V{bottom}"/></svg><ul>{legend}</ul></figure>'
    )


def charts(metrics, history):
    """The losses, of all codebooks and of each; then what is measured after an epoch; then how training went."""
    valid = of_stage(history, "valid")
    codebooks = sorted({key.removeprefix("ce") for line in metrics + valid for key in line if key.startswith("ce_q")})
    figures = []
    for suffix in ("", *codebooks):
        lines = [("train", "train", points(metrics, f"ce{suffix}")), ("valid", "main", points(valid, f"ce{suffix}")),
                 ("unigram", "level", points(valid, f"unigram{suffix}"))]  # fmt: skip
        figures.append(chart(f"loss {suffix[1:]}".strip(), "nats", lines, big=not suffix))
    for title, unit, key, levels in MEASURES:
        lines = [(name, "level", points(history, level)) for level, name in levels.items()]
        figures.append(chart(title, unit, [("this run", "main", points(history, key)), *lines]))
    for title, unit, key in OTHERS:
        figures.append(chart(title, unit, [("", "train", points(metrics + history, key))], log=key == "grad_norm"))
    return "".join(figures) or "<p>Nothing is logged yet.</p>"


def with_means(line):
    """A line of the history, with the means over the attributes."""
    line["attributes"] = line.pop("adherence", None)
    if rows := list((line["attributes"] or {}).values()):
        guided = next(column for column in rows[0] if column.startswith("cfg"))
        for key, column in (("adherence", guided), ("adherence_chance", "chance"), ("adherence_real", "real")):
            line[key] = sum(row[column] for row in rows) / len(rows)
    return line


def tiles(s, metrics, history):
    """What one wants to know first: how far the run is, and how good."""
    step, steps, epoch = max((line["step"] for line in metrics + history), default=0), s.get("steps"), s.get("epoch")
    rows = [("progress", f"step {step:,}", "")]
    if steps and epoch:
        far = f"step {step:,} of {steps:,}, epoch {math.ceil(step / epoch)} of {math.ceil(steps / epoch)}"
        rows = [("progress", f"{100 * step / steps:.0f} %", far)]
    if valid := points(of_stage(history, "valid"), "ce"):
        at, best = min(valid, key=lambda point: point[1])
        unigram = "".join(f"nats, unigram {value:.3f}; " for _, value in points(history, "unigram")[-1:])
        rows.append(("best valid ce", f"{best:.3f}", f"{unigram}at step {at:,}"))
    for title, unit, key, levels in MEASURES:
        for _, value in points(history, key)[-1:]:
            beside = [f"{name} {y:.3f}" for level, name in levels.items() for _, y in points(history, level)[-1:]]
            rows.append((title, f"{value:.3f}", ", ".join(beside) or unit))
    return "".join(f"<div><dt>{title}</dt><dd><b>{value}</b></dd>{note}</div>" for title, value, note in rows)


def sample_round(line, found):
    """The clips of a `generate` line: the caption of each, and side by side the wavs that belong to it."""
    articles = f"<p>Epoch {line['epoch']:,}, step {line['step']:,}</p>"
    for clip in line["clips"]:
        cells = ""
        for key, name in CLIPS.items():
            if not (path := clip.get(key)):
                continue
            seconds, has_picture = found[path]
            if isinstance(seconds, str):
                cells += f"<figure><figcaption>{name}</figcaption><p>{seconds}: {escape(path)}</p></figure>"
                continue
            mark, prompt = "", clip.get("prompt_seconds")
            if key == "continued" and prompt:
                mark = f'<span style="width:{min(100, 100 * prompt / seconds):.2f}%">prompt {prompt:g} s</span>'
            files = (path, Path(path).with_suffix(".png").as_posix())
            wav, picture = (quote(file, errors="surrogateescape") for file in files)
            image = f'<img loading="lazy" alt="spectrogram" src="{picture}">' if has_picture else ""
            cells += (
                f'<figure class="{key}"><figcaption>{name}, {seconds:.1f} s</figcaption><div class="picture"'
                f' data-seconds="{seconds:.3f}">{image}{mark}</div>'
                f'<audio controls preload="none" src="{wav}"></audio></figure>'
            )
        caption = escape(clip["caption"]) or "<i>no caption</i>"
        articles += f'<article><h3 dir="auto">{caption} <small>seed {escape(str(clip["seed"]))}</small></h3>'
        articles += f'<div class="cells">{cells}</div></article>'
    return articles


def listen(out, history):
    """The newest round of samples, and the older ones folded up, newest first."""
    rounds = of_stage(history, "generate")
    found = inspect(out, dict.fromkeys(c[key] for line in rounds for c in line["clips"] for key in CLIPS if c.get(key)))
    if not rounds:
        return "<p>history.jsonl names no samples yet.</p>"
    *older, newest = rounds
    text = sample_round(newest, found)
    text += "<p>Pictures: log-mel spectrograms, low frequencies at the bottom, -80 to 0 dB; a click plays.</p>"
    folded = ""
    for line in reversed(older):
        folded += f"<details><summary>epoch {line['epoch']:,}</summary><template>{sample_round(line, found)}"
        folded += "</template></details>"
    if older:
        text += f"<details{' open' if len(older) <= FEW else ''}><summary>earlier rounds: {len(older)}</summary>"
        text += f'<div class="rounds">{folded}</div></details>'
    return text


def table(rows):
    """Rows [{column: number or text}] -> a table of all their columns, in the order of their first appearance."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    cells = [[f"{v:.3f}" if isinstance(v := row.get(c, ""), float) else str(v) for c in columns] for row in rows]
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in cells)
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def measured(history):
    """Tables: caption adherence when it was last measured, and the numbers of every epoch, newest first."""
    rows = {}
    for line in history:
        row = rows.setdefault(line["step"], {"epoch": line.get("epoch")})
        row |= {key: value for key, value in line.items() if isinstance(value, (int, float))}
    if not rows:
        return "<p>Nothing is measured yet.</p>"
    newest = next((line["attributes"] for line in reversed(history) if line["attributes"]), {})
    text = table([{"caption adherence": attribute, **row} for attribute, row in newest.items()]) if newest else ""
    melody = next((line["melody"] for line in reversed(history) if line.get("melody")), {})
    text += table([{"chroma similarity to": name, **row} for name, row in melody.items()]) if melody else ""
    text += f"<details{' open' if len(rows) <= FEW else ''}><summary>epochs: {len(rows)}</summary>"
    return text + table([*rows.values()][::-1]) + "</details>"


def write(out):
    """Writes OUT/index.html, from what the run has left in its folder so far, and returns its path.

    For rank 0 only. Raises UserError where OUT is no run, or one of its logs is damaged.
    """
    out = Path(out)
    if not any((out / name).exists() for name in ("config.json", "metrics.jsonl", "history.jsonl")):
        raise UserError(f"{out}: not a run's folder: no config.json, metrics.jsonl or history.jsonl is there")
    s = json.loads((out / "config.json").read_text(encoding="utf-8")) if (out / "config.json").exists() else {}
    metrics = read_log(out / "metrics.jsonl")
    history = [with_means(line) for line in read_log(out / "history.jsonl")]
    recorded = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(out.glob("code_*.diff"))]
    code = recorded[-1] if recorded else ""
    commit, _, diff = code.partition("\n")
    changed = "with uncommitted changes" if diff.strip() else "no uncommitted changes"
    version = f"git {escape(commit[:10])}, {changed}" if commit else "no git hash was recorded"
    name = escape(out.resolve().name)
    settings = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(value if isinstance(value, str) else json.dumps(value))}</dd></div>"
        for key, value in s.items()
    )
    page = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name} · nanoMusicGen</title><style>{STYLE}</style></head><body>
<h1>{name}</h1><p>{version}; page written {time.strftime("%Y-%m-%d %H:%M")}</p>
<dl class="tiles">{tiles(s, metrics, history)}</dl>
<nav><a href="#listen">Listen</a> <a href="#curves">Curves</a> <a href="#epochs">Metrics per epoch</a>
<a href="#settings">Settings</a> <a href="#code">Code</a></nav>
<h2 id="listen">Listen</h2>{listen(out, history)}
<h2 id="curves">Curves, by step</h2><div class="charts">{charts(metrics, history)}</div>
<h2 id="epochs">Metrics per epoch</h2>{measured(history)}
<h2 id="settings">Settings</h2><dl class="settings">{settings}</dl>
<h2 id="code">Code</h2><p>{version}</p><pre>{escape(code)}</pre>
<script>{SCRIPT}</script></body></html>
"""
    common.write_file(out / "index.html", page.encode(errors="replace"))
    return out / "index.html"


DAMAGE = (ValueError, KeyError, TypeError, AttributeError, StopIteration)  # what `write` raises where a file is damaged


def write_page(out):
    """As `write`, for train.py: a page is not worth a run, so what goes wrong is only said."""
    try:
        write(out)
    except (OSError, *DAMAGE) as error:
        tqdm.write(f"the listening page was not written: {common.first_line(error)}", file=sys.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder")
    run = parser.parse_args().run
    try:
        print(f"wrote {write(run)}")
    except json.JSONDecodeError as error:
        raise UserError(f"{run}/config.json: not JSON ({error}); mend or remove it") from None
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(f"{run}: its config.json or a log is damaged ({common.first_line(error)})") from None


if __name__ == "__main__":
    common.run(main)
