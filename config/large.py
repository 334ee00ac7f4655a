"""MusicGen large: width 2048, 32 heads, 48 layers, with the dropout and gradient clipping of its recipe."""

from config.small import *

out = "out/large"
parallel = "fsdp"
micro_batch = 4
dim = 2048
heads = 32
layers = 48
cfg_dropout = 0.2
word_dropout = 0.2
clip = 3.0
