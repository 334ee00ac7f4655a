"""Overfit one batch to a loss near 0 in a minute: run this first after a change of the code."""

from config.demo import *

out = "out/overfit"
data = "data/overfit"
demo_clips = 40
one_batch = True
cfg_dropout = 0.0
segment = clip_seconds = 2.0
codebook_weights = ()
batch_size = 4

steps = 200
warmup = 10
lr = 2e-3
epoch = 200
valid_items = 4
samples = 1
evaluate_clips = 0
