"""The demo with a style to take after as well: what an excerpt sounds like stands before the sequence."""

from config.demo import *  # noqa: F403

out = "out/demo_style"
style = True
style_dim = 96
style_bins = 128
text_dropout = 0.5
style_dropout = 0.1
