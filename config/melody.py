"""MusicGen melody: the recipe of small, with the melody's pitch classes prepended to the sequence.

    python prepare.py MUSIC --out data/music --codec encodec_24khz:3
    python train.py config/melody.py

For the size of the published model, change the import below to `from config.medium import *`.
"""

from config.small import *

out = "out/melody"
melody = True
cfg_dropout = 0.2
text_dropout = 0.1
melody_dropout = 0.1
