"""Fine-tune a published MusicGen, demo/demo.pt, or another run, with LoRA: low-rank matrices next to frozen weights.

    python -m tools.convert import hf:facebook/musicgen-small out/musicgen-small
    python prepare.py MUSIC --out data/mine --model out/musicgen-small
    python train.py config/lora.py --data=data/mine --init_from=out/musicgen-small

T5's projection is frozen too. The text embedder of a model without T5 is trained, except its last layer, and so is a
melody or a style that is added to the model.
"""

from config.finetune import *

out = "out/lora"
freeze = ("embed*", "blocks.*", "norm.*", "heads*", "conditioner.text.out*")
lr = 3e-4
lora_rank = 16
lora_alpha = 16.0
lora_targets = ("qkv", "attn_out", "cross_q", "cross_kv", "cross_out")
