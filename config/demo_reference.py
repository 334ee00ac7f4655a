"""The demo with MusicGen's choices, for the same amount of music: sinusoidal positions, long items, equal weights."""

from config.demo import *

out = "out/demo_reference"
positions = "sinusoidal"
codebook_weights = ()
segment = 8.0
short_every = 0
steps = 3500
epoch = 875
valid_items = 96
cfg = 3.0
