"""MusicGen medium: width 1536, 24 heads, 48 layers."""

from config.small import *

out = "out/medium"
micro_batch = 2
dim = 1536
heads = 24
layers = 48
