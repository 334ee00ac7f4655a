"""The demo with style conditioning: the embedding of an excerpt is prepended to the sequence.

The style matters most in the first frames of an item, so items are half as long and twice as many.
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
