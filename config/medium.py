"""MusicGen medium (1.5B)."""

from config.small import *

out = "out/medium"
dim = 1536
heads = 24
layers = 48
micro_batch = 2
