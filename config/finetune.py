"""Fine-tune all weights of a published MusicGen, of demo/demo.pt, or of another run, on your music.

    python -m tools.convert import hf:facebook/musicgen-small out/musicgen-small
    python prepare.py MUSIC --out data/mine --model out/musicgen-small
    python train.py config/finetune.py --data=data/mine --init_from=out/musicgen-small

Sizes, codec, positions, conditions, segment and sampling settings are those of --init_from. docs/finetune.md compares
this with config/lora.py, on the demo's model.
"""

out = "out/finetune"
data = "data/mine"
init_from = "out/musicgen-small"
batch_size = 4
micro_batch = 1
steps = 1000
lr = 3e-5
warmup = 50
merge_text_p = 0.25
