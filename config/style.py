"""MusicGen-Style (arXiv:2407.12563): the recipe of small, with the style of an excerpt prepended to the sequence.

python prepare.py MUSIC --out data/music --codec encodec_24khz:3
python train.py config/style.py
"""

from config.small import *

out = "out/style"
style = True
style_dim = 512
style_heads = 8
style_layers = 8
style_bins = 1024
cfg_dropout = 0.1
text_dropout = 0.25
style_dropout = 0.25
cfg_beta = 5.0
