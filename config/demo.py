"""Text to music in a quarter of an hour on a laptop, with nothing to download but the packages.

The corpus is synthesised and its captions with it, the codec ships with the repository.
"""

out = "out/demo"
data = "data/demo"
demo_clips = 3000
segment = 8.0
batch_size = 2

dim = 192
heads = 4
layers = 4
text_dim = 128
text_heads = 4
text_layers = 2

steps = 3500
lr = 1e-3
warmup = 100
epoch = 875
ema_decay = 0.99
valid_items = 96

temperature = 0.9
top_k = 100
