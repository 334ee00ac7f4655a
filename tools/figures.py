"""The pictures of the docs, which need Pillow and matplotlib.

python -m tools.figures out/demo docs/epochs.png --clip 1      # one caption's samples, epoch by epoch
python -m tools.figures out/tempi docs/tempi.png               # what sample.py has made, caption by caption
python -m tools.figures out/learn.json docs/learn.png          # what tools/learn.py has found
python -m tools.figures patterns docs/grids.png                # how codebooks are interleaved
python -m tools.figures out/demo/best.pt docs/inside.png       # which words a model hears when, and how sure it is
"""

import argparse
import json
from pathlib import Path

import soundfile
import torch

import common
from codec import draw_spectrogram
from common import UserError, first_line
from generate import generate, load_model
from log import read_log
from patterns import make_pattern

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
    rounds = [line for line in read_log(run / "history.jsonl") if line["stage"] == "generate"]
    if not rounds or not 0 <= number < len(rounds[0]["clips"]):
        raise UserError(f"{run}: has no samples of a clip {number}; train it with --samples={number + 1}")
    shown = [*rounds[:2], *rounds[2:][-1:]]
    clip = rounds[-1]["clips"][number]
    rows = [(f"epoch {line['epoch']}: {clip['caption']}", run / line["clips"][number]["free"]) for line in shown]
    draw_sheet([*rows, ("real music, through the codec", run / clip["codec"])], picture)


def draw_samples(folder, picture):
    abouts = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not abouts:
        raise UserError(
            f"{folder}: neither a run nor a folder of samples; make some with: sample.py ... --out {folder}"
        )
    draw_sheet([(about["caption"], path.with_suffix(f".{about['format']}")) for path, about in abouts.items()], picture)


def draw_sheet(rows, picture):
    """Spectrograms one below the other; rows: (title, audio file)."""
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (WIDTH, len(rows) * (HEIGHT + LABEL)), "white")
    for row, (title, path) in enumerate(rows):
        draw_spectrogram(path, picture, soundfile.info(path).samplerate)
        with Image.open(picture) as spectrogram:
            sheet.paste(spectrogram.resize((WIDTH, HEIGHT)), (0, row * (HEIGHT + LABEL) + LABEL))
        ImageDraw.Draw(sheet).text((4, row * (HEIGHT + LABEL) + 3), title, fill="black")
    sheet.quantize().save(picture, optimize=True)


def draw_grids(picture, K=4, T=8):
    """The sequences of K codebooks and T frames, a column for each step: the frame that each codebook has there."""
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(3, 1, figsize=(9, 5), layout="constrained")
    for plot, name in zip(plots, ("parallel", "delay", "unrolled")):
        pattern = make_pattern(name, K, T)
        frames = pattern.build(torch.arange(T).expand(1, K, T), special=-1)[0]
        plot.imshow(frames.float().masked_fill(frames < 0, torch.nan), cmap="viridis", aspect="auto", vmin=-2)
        for k, row in enumerate(frames.tolist()):
            for step, frame in enumerate(row):
                plot.text(step, k, frame if frame >= 0 else "·", ha="center", va="center", fontsize=7,
                          color="white" if 0 <= frame < T / 2 else "black")  # fmt: skip
        plot.set(title=f"{name}: {pattern.S} steps", yticks=range(K), yticklabels=[f"q{k + 1}" for k in range(K)])
    plots[-1].set(xlabel="sequence step; the number is the frame, · the special token")
    figure.savefig(picture, dpi=100)


def cross_attention(model, codes, inputs):
    """How much each step attends to each token of the text: the mean over blocks and heads, [S, L] of one item."""
    seen, hooks = [], []
    for block in model.blocks:
        for part in (block.cross_q, block.cross_kv):
            hooks.append(part.register_forward_hook(lambda part, given, out: seen.append(out)))
    logits = model.aligned_logits(codes, inputs)
    for hook in hooks:
        hook.remove()
    weights = []
    for block, q, kv in zip(model.blocks, seen[::2], seen[1::2]):
        (q,), (k, _) = block.split(q, 1), block.split(kv, 2)
        weights.append((q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3).mean(1)[0])
    return torch.stack(weights).mean(0), logits


@torch.no_grad()
def draw_inside(checkpoint, picture, caption):
    """What one item's own music makes of a model: its attention to the caption, and the entropy of what comes next."""
    from matplotlib import pyplot

    model, _, _ = load_model(checkpoint)
    conditions = [{"text": caption}]
    codes, inputs = generate(model, conditions, model.trained_frames), model.conditioner.prepare(conditions)
    attention, logits = cross_attention(model, codes, inputs)
    tokens = model.conditioner.text.tokenizer.encode(caption, out_type=str)
    seconds = codes.shape[2] / model.frame_rate
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 5.5), sharex=True, layout="constrained")
    above.imshow(attention[-codes.shape[2] :, : len(tokens)].T, aspect="auto", cmap="magma",
                 extent=(0, seconds, len(tokens) - 0.5, -0.5))  # fmt: skip
    above.set(yticks=range(len(tokens)), yticklabels=[token.replace("\u2581", " ") for token in tokens],
              title="attention to the tokens of the caption, mean of blocks and heads")  # fmt: skip
    log_p = logits[0].log_softmax(2)
    entropy = -(log_p.exp() * log_p).sum(2)
    for k, line in enumerate(entropy):
        known = line[~line.isnan()]
        below.plot(torch.arange(len(line)) / model.frame_rate, line, label=f"q{k + 1}: {known.mean():.2f}", lw=0.9)
    below.set(xlabel="seconds", ylabel="nats", title="entropy of the next code, by codebook")
    below.legend(ncols=len(entropy), loc="upper center", fontsize=8)
    below.set_ylim(top=1.25 * float(entropy.nan_to_num().max()))
    figure.savefig(picture, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", type=Path, help="a run's folder, one of samples, a best.pt, learn.json, or: patterns")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--clip", type=int, default=0, help="which of its samples, from 0")
    parser.add_argument("--caption", default="a slow piano melody in D minor, with drums", help="for best.pt")
    args = parser.parse_args()
    try:
        if str(args.what) == "patterns":
            draw_grids(args.picture)
        elif args.what.suffix == ".json":
            draw_learning(json.loads(args.what.read_text()), args.picture)
        elif args.what.suffix == ".pt":
            draw_inside(args.what, args.picture, args.caption)
        elif not (args.what / "history.jsonl").exists():
            draw_samples(args.what, args.picture)
        else:
            draw_epochs(args.what, args.picture, args.clip)
    except ImportError as error:
        raise UserError(f"tools.figures: needs {error.name}; pip install pillow matplotlib") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, soundfile.LibsndfileError) as error:
        raise UserError(f"{args.what}: cannot be drawn ({first_line(error)})") from None
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    common.run(main)
