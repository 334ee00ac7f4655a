"""Small models with all conditions, for the tests of model.py, conditioning.py, data.py and generate.py."""

from functools import partial
from types import SimpleNamespace

import torch

from config import Settings
from data import Batch, count_targets
from model import MusicLM
from patterns import make_pattern
from prepare import train_tokenizer

PATTERNS = ("delay", "parallel", "unrolled")
CODEC = dict(K=4, card=64, frame_rate=50, dim=8)
EXCERPTS = torch.randint(64, (2, 4, 10), generator=torch.Generator().manual_seed(0))
PIANO = {"text": "a slow piano melody", "melody": [0, 4, 12], "style": (EXCERPTS[0], 2)}
ORGAN = {"text": "fast organ chords with drums and a long coda", "melody": [11, 11, 2, 5, 5], "style": (EXCERPTS[1], 3)}
TOKENIZER = train_tokenizer([dict(caption=sample["text"], metadata={}) for sample in (PIANO, ORGAN)] * 5, 400)
SIZES = dict(
    dim=32, heads=2, layers=2, text_dim=32, text_heads=2, text_layers=1, segment=0.4, melody=True, style=True,
    style_dim=16, style_heads=2, style_layers=1, style_bins=8, style_seconds=(0.1, 0.2),
)  # fmt: skip


def make_model(noise=0.2, codec=CODEC, **settings):
    """Make a small model in eval mode. `noise` is added to its weights, so that every path shows in the logits."""
    torch.manual_seed(0)
    model = MusicLM(Settings(**{**SIZES, **settings}), codec, TOKENIZER)
    if "style" in model.conditioner.prepended:
        style = model.conditioner.prepended["style"]
        style.tables.normal_()
        for _ in range(20):
            style(*style.tokenize([(codes, None) for codes in EXCERPTS % codec["card"]]))
            style.vq.update()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * noise)
    return model.eval()


def make_batch(model, B=3, T=12):
    """Make a data.Batch with padding, frames outside the loss, and a sample without conditions."""
    codes = torch.randint(0, model.card, (B, model.K, T))
    not_padding = torch.ones(B, T, dtype=torch.bool)
    not_padding[1:2, 7:] = False
    in_loss = not_padding.clone()
    in_loss[:1, 3:5] = False
    condition_tensors = model.conditioner.tokenize([PIANO, {}, ORGAN][:B])
    targets = count_targets(in_loss, model.pattern(T, training=True))
    return Batch(codes, not_padding, in_loss, condition_tensors, targets)


def make_stub(T, pattern="delay"):
    """Make what data.py reads of a model trained on T frames. Its `tokenize` returns the list of conditions."""
    make = partial(make_pattern, pattern, 4)
    return SimpleNamespace(
        conditioner=SimpleNamespace(tokenize=list), make_pattern=make, trained_frames=T,
        pattern=lambda T, training, device: make(T=T, training=training),
    )  # fmt: skip
