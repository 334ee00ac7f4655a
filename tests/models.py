"""Small models with all conditions, for the tests of model.py, conditioning.py and generate.py."""

import torch

from config import Settings
from model import MusicLM
from prepare import train_tokenizer

CODEC = dict(K=4, card=64, frame_rate=50, dim=8)
EXCERPTS = torch.randint(64, (2, 4, 10), generator=torch.Generator().manual_seed(0))
PIANO = {"text": "a slow piano melody", "melody": [0, 4, 12], "style": (EXCERPTS[0], 2)}
ORGAN = {"text": "fast organ chords with drums and a long coda", "melody": [11, 11, 2, 5, 5], "style": (EXCERPTS[1], 3)}
TOKENIZER = train_tokenizer([dict(caption=sample["text"], metadata={}) for sample in (PIANO, ORGAN)] * 5, 400)
SIZES = dict(
    dim=32, heads=2, layers=2, text_dim=32, text_heads=2, text_layers=1, segment=0.4, melody=True, style=True,
    style_dim=16, style_heads=2, style_layers=1, style_bins=8, style_seconds=(0.1, 0.2),
)  # fmt: skip


def make_model(lively=True, codec=CODEC, **settings):
    """A small model in eval mode; `lively` gives it weights so large that every path shows in the logits."""
    torch.manual_seed(0)
    model = MusicLM(Settings(**{**SIZES, **settings}), codec, TOKENIZER)
    if "style" in model.conditioner.prepended:
        style = model.conditioner.prepended["style"]
        style.tables.normal_()
        for _ in range(20):
            style(*style.prepare([(codes, None) for codes in EXCERPTS % codec["card"]]))
            style.vq.update()
    if lively:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.2)
    return model.eval()


def make_batch(model, B=3, T=12):
    """(codes, valid, scored, inputs): with padding, frames that do not count, and one sample without conditions."""
    codes = torch.randint(0, model.card, (B, model.K, T))
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1:2, 7:] = False
    scored = valid.clone()
    scored[:1, 3:5] = False
    return codes, valid, scored, model.conditioner.prepare([PIANO, {}, ORGAN][:B])
