"""Fine-tune MusicGen small's published weights with LoRA on a 16 GB GPU.

python train.py config/lora.py --codec_weights=CODEC --init_from=out/imported/best.pt
"""

from config.finetune import *

out = "out/lora"
lora_rank = 16
lora_alpha = 16.0
lora_targets = ("qkv", "attn_out", "cross_q", "cross_kv", "cross_out")
