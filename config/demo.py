"""Text to music in twenty minutes on a laptop. Downloads nothing except the packages.

The corpus and its captions are synthesized, and the codec is part of the repository. config/demo_reference.py has
MusicGen's choices. This file differs so that a short run follows captions better (docs/numbers.md). Short items contain
more beginnings of music, where the model has only the caption. codebook_weights favours the first codebooks, which
carry the most audible information. Rotary positions help rhythm.
"""

out = "out/demo"
data = "data/demo"
demo_clips = 6000
segment = 4.0
batch_size = 2
short_every = 2

dim = 192
heads = 4
layers = 4
positions = "rope"
text_dim = 128
text_heads = 4
text_layers = 2

codebook_weights = (3.0, 1.5, 0.5, 0.5)
steps = 7000
lr = 1e-3
warmup = 100
epoch = 1750
ema_decay = 0.99
valid_items = 192

clip_seconds = 8.0
evaluate_clips = 200
cfg = 2.0
temperature = 0.9
top_k = 100
