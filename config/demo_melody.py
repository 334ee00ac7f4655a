"""The demo with a melody to follow as well: its pitch classes stand before the sequence."""

from config.demo_reference import *

out = "out/demo_melody"
melody = True
melody_dropout = 0.1
text_dropout = 0.1
