r"""Fine-tune MusicGen small's published weights on your captions.

    python prepare.py MUSIC --out data/music --codec musicgen_32khz --codec_weights CODEC
    python train.py config/finetune.py --codec_weights=CODEC --init_from=out/imported/best.pt
    python train.py config/finetune.py --codec_weights=CODEC --init_from=out/finetune/best.pt --freeze= --lr=1e-5 \
        --out=out/finetuned

The first run trains only the text embedder, which replaces T5 and starts untrained. The second run trains all weights.
"""

from config.small import *

out = "out/finetune"
codec = "musicgen_32khz"
freeze = ("embed*", "blocks.*", "norm.*", "heads*")
batch_size = 16
micro_batch = 4
steps = 5000
lr = 3e-4
warmup = 200
epoch = 500
ema_every = 1
generate_every = 1
valid_items = 256
