"""A picture of how a run learns: spectrograms of one caption's samples, epoch by epoch, above the real music.

python -m tools.figures out/demo docs/epochs.png --clip 1
"""

import argparse
from pathlib import Path

import soundfile

import common
from codec import draw_spectrogram
from common import UserError
from log import read_log

WIDTH, HEIGHT, LABEL = 800, 130, 18  # pixels


def draw(run, picture, number):
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
    print(f"wrote {picture}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--clip", type=int, default=0, help="which of its samples, from 0")
    args = parser.parse_args()
    try:
        draw(args.run, args.picture, args.clip)
    except ImportError:
        raise UserError("tools.figures: needs Pillow; pip install pillow") from None


if __name__ == "__main__":
    common.run(main)
