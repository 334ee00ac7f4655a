"""The demo with melody conditioning: pitch classes are prepended to the sequence."""

from config.demo_reference import *

out = "out/demo_melody"
melody = True
melody_dropout = 0.1
text_dropout = 0.1
