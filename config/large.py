"""MusicGen large (3.3B)."""

from config.small import *

out = "out/large"
dim = 2048
heads = 32
layers = 48
micro_batch = 1
