"""Text to music in twenty minutes on a laptop, with nothing to download but the packages.

The corpus is synthesised and its captions with it, the codec ships with the repository. Where this departs from
MusicGen (config/demo_reference.py) it is to obey captions sooner: short items, and shorter ones in turn, have more
beginnings, where the caption alone can say what comes; the first codebooks carry what one hears; and rotary positions
carry rhythm (docs/numbers.md).
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
