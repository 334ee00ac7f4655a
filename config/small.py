"""MusicGen small: width 1024, 16 heads, 24 layers, with the published 24 kHz EnCodec at K = 4.

    python prepare.py MUSIC --out data/music --codec encodec_24khz:3
    python train.py config/small.py

The end of docs/training.md lists the differences from the paper and from audiocraft.
"""

out = "out/small"
data = "data/music"
codec = "encodec_24khz:3"
segment = 30.0
batch_size = 192
micro_batch = 8

dim = 1024
heads = 16
layers = 24
text_dim = 512
text_heads = 8
text_layers = 4
text_max_tokens = 128

cfg_dropout = 0.3
merge_text_p = 0.25
word_dropout = 0.3

steps = 1_000_000
lr = 1e-4
warmup = 4000
ema_every = 10
epoch = 2000
valid_items = 2048
generate_every = 25
