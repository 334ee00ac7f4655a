"""MusicGen small with the choices by which the demo learns sooner: as much music a step, in shorter items.

Found on synthesised music, checked on recordings at a tenth of this size for an hour of CPU (docs/numbers.md). No
GPU has trained it.
"""

from config.small import *  # noqa: F403

out = "out/small_modern"
segment = 15.0
batch_size = 384
micro_batch = 16
short_every = 2
positions = "rope"
codebook_weights = (3.0, 1.5, 0.5, 0.5)
condition_lr = 0.5
clip_seconds = 30.0
