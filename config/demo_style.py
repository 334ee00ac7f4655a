"""The demo with a style to take after as well: what an excerpt sounds like stands before the sequence.

What a style says is mostly in a clip's first frames, so that half as long items, twice as many of them, teach more.
"""

from config.demo_reference import *

out = "out/demo_style"
style = True
style_dim = 96
style_bins = 128
style_seconds = (1.0, 2.0)
segment = 4.0
batch_size = 4
text_dropout = 0.5
style_dropout = 0.1
steps = 5000
epoch = 1250
