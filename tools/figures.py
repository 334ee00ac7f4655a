"""Draw the pictures of the docs. Needs Pillow and matplotlib.

    python -m tools.figures out/demo docs/epochs.png --clip 1      # spectrograms of one caption's samples, by epoch
    python -m tools.figures out/tempi docs/tempi.png               # spectrograms of a folder written by sample.py
    python -m tools.figures out/learn.json docs/learn.png          # learning curves, measured by tools/learn.py
    python -m tools.figures patterns docs/grids.png                # the codebook patterns
    python -m tools.figures out/demo/best.pt docs/inside.png       # attention to the caption, entropy of the codes

Letters: K codebooks, T frames, S sequence positions, L condition length.
"""

import argparse
import json
import math
from pathlib import Path

import soundfile
import torch

import common
from audio import draw_spectrogram
from common import UserError, first_line
from generate import generate, load_model
from log import read_log
from patterns import make_pattern

WIDTH, HEIGHT, LABEL_HEIGHT = 800, 130, 18  # pixels


def draw_learning(curves, picture):
    """Plot held-out ce by seconds and by tokens. curves: {name: [(seconds, tokens, ce per codebook)]}."""
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
    for name, marks in curves.items():
        seconds, tokens, ce = zip(*((s, n / 1e6, sum(ce_q) / len(ce_q)) for s, n, ce_q in marks))
        plots[0].plot(seconds, ce, ".-")
        plots[1].plot(tokens, ce, ".-", label=name)
    plots[0].set(xlabel="seconds of training", ylabel="held-out ce")
    plots[1].set(xlabel="million tokens")
    plots[1].legend()
    figure.savefig(picture, dpi=100)


def draw_epochs(run, picture, number):
    """Draw sample `number` of the first two epochs and the last one, above the real music."""
    epochs = [line for line in read_log(run / "history.jsonl") if line["stage"] == "generate"]
    if not epochs or not 0 <= number < len(epochs[0]["clips"]):
        raise UserError(f"{run}: has no sample with --clip {number}; train with --samples={number + 1}")
    clip = epochs[-1]["clips"][number]
    rows = [(f"epoch {line['epoch']}: {clip['caption']}", run / line["clips"][number]["free"])
            for line in [*epochs[:2], *epochs[2:][-1:]]]  # fmt: skip
    draw_spectrograms([*rows, ("real music, through the codec", run / clip["codec"])], picture)


def draw_samples(folder, picture):
    """Draw all samples in a folder written by sample.py."""
    infos = {path: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    if not infos:
        raise UserError(f"{folder}: no run and no samples; make some with: python sample.py ... --out {folder}")
    rows = [(info["caption"], path.with_suffix(f".{info['format']}")) for path, info in infos.items()]
    draw_spectrograms(rows, picture)


def draw_spectrograms(rows, picture):
    """Draw one spectrogram per row (title, audio file)."""
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (WIDTH, len(rows) * (HEIGHT + LABEL_HEIGHT)), "white")
    for row, (title, path) in enumerate(rows):
        top = row * (HEIGHT + LABEL_HEIGHT)
        draw_spectrogram(path, picture, soundfile.info(path).samplerate)
        with Image.open(picture) as spectrogram:
            sheet.paste(spectrogram.resize((WIDTH, HEIGHT)), (0, top + LABEL_HEIGHT))
        ImageDraw.Draw(sheet).text((4, top + 3), title, fill="black")
    sheet.quantize().save(picture, optimize=True)


def draw_patterns(picture, K=4, T=8):
    """Draw each pattern as a table of K codebooks and S positions, filled with frame numbers."""
    from matplotlib import pyplot

    figure, plots = pyplot.subplots(3, 1, figsize=(9, 5), layout="constrained")
    for plot, name in zip(plots, ("parallel", "delay", "unrolled")):
        pattern = make_pattern(name, K, T)
        frames = pattern.build(torch.arange(T).expand(1, K, T), special=-1)[0]
        plot.imshow(frames.float().masked_fill(frames < 0, torch.nan), cmap="viridis", aspect="auto", vmin=-2)
        for k, row in enumerate(frames.tolist()):
            for position, frame in enumerate(row):
                plot.text(position, k, frame if frame >= 0 else "·", ha="center", va="center", fontsize=7,
                          color="white" if 0 <= frame < T / 2 else "black")  # fmt: skip
        plot.set(title=f"{name}: {pattern.S} positions", yticks=range(K), yticklabels=[f"q{k + 1}" for k in range(K)])
    plots[-1].set(xlabel="sequence position; numbers are frames, · is the special token")
    figure.savefig(picture, dpi=100)


def cross_attention(model, codes, condition_tensors):
    """Return attention weights [S, L] of one item to its text, the mean over blocks and heads, and aligned logits."""
    queries = []
    hooks = [block.cross_q.register_forward_hook(lambda *call: queries.append(call[-1])) for block in model.blocks]
    logits = model.aligned_logits(codes, condition_tensors)
    for hook in hooks:
        hook.remove()
    states, mask, _ = model.conditioner(condition_tensors)
    weights = 0
    for block, query in zip(model.blocks, queries):
        (q,), (k, _) = block.split_heads(query, 1), block.split_heads(block.cross_kv(states), 2)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
        weights = weights + scores.softmax(-1)[0].mean(0) / len(model.blocks)
    return weights, logits


@torch.no_grad()
def draw_model(checkpoint, picture, caption):
    """Generate music for a caption, and draw the attention to the caption and the entropy of the predicted codes."""
    from matplotlib import pyplot

    model, _, _ = load_model(checkpoint)
    T, conditions = model.trained_frames, [{"text": caption}]
    attention, logits = cross_attention(model, generate(model, conditions, T), model.conditioner.tokenize(conditions))
    tokens = model.conditioner.text.tokenizer.encode(caption, out_type=str)
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(9, 5.5), sharex=True, layout="constrained")
    top.imshow(attention[-T:, : len(tokens)].T, aspect="auto", cmap="magma",
               extent=(0, T / model.frame_rate, len(tokens) - 0.5, -0.5))  # fmt: skip
    top.set(yticks=range(len(tokens)), yticklabels=[token.replace("\u2581", " ") for token in tokens],
            title="attention to the tokens of the caption, mean of blocks and heads")  # fmt: skip
    log_p = logits[0].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    for k, curve in enumerate(entropy):
        bottom.plot(torch.arange(T) / model.frame_rate, curve, label=f"q{k + 1}: {curve.nanmean():.2f}", lw=0.9)
    bottom.set(xlabel="seconds", ylabel="nats", title="entropy of the next code, by codebook")
    bottom.legend(ncols=len(entropy), loc="upper center", fontsize=8)
    bottom.set_ylim(top=1.25 * float(entropy.nan_to_num().max()))
    figure.savefig(picture, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a run or of samples, best.pt, learn.json, or: patterns")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--clip", type=int, default=0, help="number of the sample, from 0, for a run's folder")
    parser.add_argument("--caption", default="a slow piano melody in D minor, with drums", help="for best.pt")
    args = parser.parse_args()
    try:
        if str(args.source) == "patterns":
            draw_patterns(args.picture)
        elif args.source.suffix == ".json":
            draw_learning(json.loads(args.source.read_text()), args.picture)
        elif args.source.suffix == ".pt":
            draw_model(args.source, args.picture, args.caption)
        elif (args.source / "history.jsonl").exists():
            draw_epochs(args.source, args.picture, args.clip)
        else:
            draw_samples(args.source, args.picture)
    except ImportError as error:
        raise UserError(f"tools.figures: needs {error.name}; pip install pillow matplotlib") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, soundfile.LibsndfileError) as error:
        raise UserError(f"{args.source}: cannot be drawn ({first_line(error)}); check the file or folder") from None
    print(f"wrote {args.picture}")


if __name__ == "__main__":
    common.run(main)
