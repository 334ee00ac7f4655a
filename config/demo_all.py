"""The demo with text, melody and style, any of which may be given or left out."""

from config.demo_style import *

out = "out/demo_all"
melody = True
text_dropout = 0.5
melody_dropout = 0.5
style_dropout = 0.5
steps = 3500
epoch = 875
