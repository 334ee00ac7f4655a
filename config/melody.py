"""MusicGen melody: small's recipe with the melody's pitch classes before the sequence.

    python prepare.py MUSIC --out data/music --codec encodec_24khz:3
    python train.py config/melody.py

For the published model's size, begin the file with `from config.medium import *`.
"""

from config.small import *

out = "out/melody"
melody = True
cfg_dropout = 0.2
text_dropout = 0.1
melody_dropout = 0.1
