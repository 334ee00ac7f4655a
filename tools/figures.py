"""The pictures of the docs: how a run learns to play, and how fast models learn.

python -m tools.figures out/demo docs/epochs.png --clip 1      # one caption's samples, epoch by epoch; needs Pillow
python -m tools.figures out/learn.json docs/learn.png          # what tools/learn.py has found; needs matplotlib
"""

import argparse
import json
from pathlib import Path

import soundfile

import common
from codec import draw_spectrogram
from common import UserError, first_line
from log import read_log

WIDTH, HEIGHT, LABEL = 800, 130, 18  # pixels


def draw_learning(found, picture):
    """Held-out ce against seconds and against tokens. found: {name: [(seconds, tokens, ce by codebook)]}."""
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for name, marks in found.items():
        seconds, tokens, ce = zip(*((s, n / 1e6, sum(ce) / len(ce)) for s, n, ce in marks))
        for plot, x, label in zip(plots, (seconds, tokens), ("seconds of training", "million tokens")):
            plot.plot(x, ce, ".-", label=name)
            plot.set(xlabel=label, ylabel="held-out ce" if plot is plots[0] else "")
    plots[1].legend()
    figure.savefig(picture, dpi=100)


def draw_epochs(run, picture, number):
    from PIL import Image, ImageDraw

    rounds = [line for line in read_log(run / "history.jsonl") if line["stage"] == "generate"]
    if not rounds or number >= len(rounds[0]["clips"]):
        raise UserError(f"{run}: has no samples of a clip {number}; train it with --samples={number + 1}")
    shown = [*rounds[:2], *rounds[2:][-1:]]
    clip = rounds[-1]["clips"][number]
    rows = [(f"epoch {line['epoch']}: {clip['caption']}", line["clips"][number]["free"]) for line in shown]
    rows.append(("real music, through the codec", clip["codec"]))
    sheet = Image.new("RGB", (WIDTH, len(rows) * (HEIGHT + LABEL)), "white")
    for row, (title, path) in enumerate(rows):
        draw_spectrogram(run / path, picture, soundfile.info(run / path).samplerate)
        with Image.open(picture) as spectrogram:
            sheet.paste(spectrogram.resize((WIDTH, HEIGHT)), (0, row * (HEIGHT + LABEL) + LABEL))
        ImageDraw.Draw(sheet).text((4, row * (HEIGHT + LABEL) + 3), title, fill="black")
    sheet.save(picture, optimize=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or learn.json")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--clip", type=int, default=0, help="which of its samples, from 0")
    args = parser.parse_args()
    try:
        if args.run.suffix == ".json":
            draw_learning(json.loads(args.run.read_text()), args.picture)
        else:
            draw_epochs(args.run, args.picture, args.clip)
    except ImportError as error:
        raise UserError(f"tools.figures: needs {error.name}; pip install pillow matplotlib") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{args.run}: cannot be drawn ({first_line(error)})") from None
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    common.run(main)
