"""Text to music in a quarter of an hour on a laptop, with nothing to download but the packages.

The corpus is synthesised and its captions with it, the codec ships with the repository.
"""

out = "out/demo"
data = "data/demo"
demo_clips = 3000
segment = 8.0
batch_size = 8

dim = 256
heads = 4
layers = 5
text_dim = 128

steps = 1000
warmup = 50
lr = 3e-3
min_lr = 1e-4
epoch = 250
ema_decay = 0.99
valid_items = 96
