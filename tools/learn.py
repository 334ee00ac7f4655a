"""Measure how fast models learn: held-out cross-entropy by seconds and tokens, beside other programs' MusicGens.

    python -m tools.bench --work learn --peers --seconds 300

All rows get the batches of config/demo.py, the same AdamW, warm-up, cosine over the given seconds, and EMA. Each model
keeps its own initialization. The peers' text states come from our text embedder, trained with them. The rows take turns
after each mark. Reading the batches counts as training time, validation does not.
"""

import dataclasses
import time
from copy import deepcopy
from pathlib import Path

import torch
from tqdm import tqdm

import common
import config
import data
import train
from dataprep import shards
from demo.corpus import prepare_demo
from model import MusicLM
from tools import peers

MARKS = 10  # validations per row


def learn(model, s, train_data, valid_data, seconds, device, dtype):
    """Train for `seconds`; yield (seconds of training, tokens, held-out ce per codebook) at each mark."""
    model.to(device)
    state = train.make_state(model, model, deepcopy(model).eval(), s, device, dtype)
    batches, schedule = data.TrainingBatches(train_data, model, s), dataclasses.replace(s, steps=1000, warmup=30)
    trained, mark = 0.0, 1
    while mark <= MARKS:
        start = time.perf_counter()
        lr = train.learning_rate(int(1000 * min(1, trained / seconds)), schedule)
        train.training_step(state, batches[state.step], lr, s)
        trained += time.perf_counter() - start
        if trained >= mark * seconds / MARKS:
            held_out = data.valid_batches(valid_data, model, 8, s)
            ce_q, *_ = train.validate(state.ema, held_out, device, state.autocast)
            yield trained, state.step * s.batch_size * model.trained_frames * model.K, ce_q
            mark += 1


def bench_learning(names, seconds, device, dtype, overrides=()):
    """Print the table and write learn.json. names: the peers; overrides: --key=value for config/demo.py."""
    s = config.load(["config/demo.py", *overrides], __doc__)
    if s.demo_clips:
        prepare_demo(s.data, s.demo_clips, s.codec, s.codec_weights)
    train_data, valid_data = data.TokenDataset(s.data, "train"), data.TokenDataset(s.data, "valid")
    codec_info = shards.load_matching_codec(s.data, s.codec, s.codec_weights).info()
    tokenizer = shards.read_tokenizer(s.data)
    plain = dataclasses.replace(s, positions="sinusoidal", codebook_weights=())  # MusicGen's own choices
    rows = {}
    for name in ("ours", "ours, plain", *names):
        torch.manual_seed(s.seed)
        settings = s if name == "ours" else plain
        try:
            if name in names:
                model = peers.Learner(name, settings, codec_info, tokenizer)
            else:
                model = MusicLM(settings, codec_info, tokenizer)
        except ImportError as error:
            print(f"{name} is skipped: {error}")
            continue
        rows[name] = learn(model, settings, train_data, valid_data, seconds, device, dtype), []
    for _ in tqdm(range(MARKS), desc="learning"):
        for row, marks in rows.values():
            marks.append(next(row))
    print(f"\nheld-out ce by seconds of training (million tokens in brackets), {s.batch_size} x {s.segment:g} s")
    print(f"{'':16}" + "".join(f"{seconds * mark / MARKS:>14.0f} s" for mark in range(1, MARKS + 1)))
    for name, (_, marks) in rows.items():
        cells = [f"{sum(ce_q) / len(ce_q):.3f} ({tokens / 1e6:.1f})" for _, tokens, ce_q in marks]
        print(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))
    out = Path(s.out).with_name("learn.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    common.write_json(out, {name: marks for name, (_, marks) in rows.items()})
    print(f"wrote {out}")
