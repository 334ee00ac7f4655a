"""How fast models learn: held-out cross-entropy against seconds and tokens, beside other programs' MusicGens.

    python -m tools.bench --work learn --peers --seconds 300

All rows see the batches of config/demo.py, the same AdamW, warm-up, cosine over the seconds given, and EMA; each has
its own initialisation. The peers' text states come from an embedder like ours, trained with them. The rows take turns,
a mark at a time; reading the batches counts, validation does not.
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
from demo.corpus import prepare_demo
from model import MusicLM
from tools import peers

MARKS = 10  # validations of each row


def learn(model, s, train_data, valid_data, seconds, device, autocast):
    """Trains for so many seconds; yields (seconds of training, tokens, held-out ce by codebook) at each mark."""
    T, trained, step, mark = model.trained_frames, 0.0, 0, 1
    model.train().to(device)
    ema = deepcopy(model).eval()
    optimizer, weights = train.make_optimizer(model, s), train.codebook_weights(s, model.K).to(device)
    steps = data.TrainingSteps(train_data, model.conditioner.prepare, T, s)
    thousandths = dataclasses.replace(s, steps=1000, warmup=30)
    while mark <= MARKS:
        start = time.perf_counter()
        (batch,), scored_items = steps[step]
        with autocast():
            ce_sum, _ = model(*batch.to(device))
        loss = (weights * ce_sum / model.count_targets(scored_items.to(device)).clamp(min=1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip)
        train.set_learning_rate(optimizer, train.learning_rate(int(1000 * min(1, trained / seconds)), thousandths))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        train.update_ema(ema, model, s.ema_decay, step + 1)
        loss.item()
        step, trained = step + 1, trained + time.perf_counter() - start
        if trained >= mark * seconds / MARKS:
            held_out = data.valid_batches(valid_data, model.conditioner.prepare, T, 8, s)
            yield trained, step * s.batch_size * T * model.K, train.validate(ema, held_out, device, autocast)[0]
            mark += 1


def bench_learning(names, seconds, device, autocast, overrides=()):
    """Prints the table, and writes learn.json. names: the peers; overrides: --key=value for config/demo.py."""
    s = config.load(["config/demo.py", *overrides], __doc__)
    if s.demo_clips:
        prepare_demo(s.data, s.demo_clips, s.codec, s.codec_weights)
    train_data, valid_data = data.Tokens(s.data, "train"), data.Tokens(s.data, "valid")
    codec, tokenizer = data.load_codec(s.data, s.codec, s.codec_weights).describe(), data.read_tokenizer(s.data)
    # MusicGen's own choices
    plain = dataclasses.replace(s, positions="sinusoidal", codebook_weights=())
    rows = {}
    for name in ("ours", "ours, plain", *names):
        torch.manual_seed(s.seed)
        settings = s if name == "ours" else plain
        try:
            if name in names:
                model = peers.Learner(name, settings, codec, tokenizer)
            else:
                model = MusicLM(settings, codec, tokenizer)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        rows[name] = learn(model, settings, train_data, valid_data, seconds, device, autocast), []
    for _ in tqdm(range(MARKS), desc="learning"):
        for row, found in rows.values():
            found.append(next(row))
    print(f"\nheld-out ce after so many seconds of training (and million tokens), {s.batch_size} x {s.segment:g} s")
    print(f"{'':16}" + "".join(f"{seconds * mark / MARKS:>14.0f} s" for mark in range(1, MARKS + 1)))
    for name, (_, found) in rows.items():
        cells = [f"{sum(ce) / len(ce):.3f} ({tokens / 1e6:.1f})" for _, tokens, ce in found]
        print(f"{name:16}" + "".join(f"{cell:>16}" for cell in cells))
    out = Path(s.out).with_name("learn.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    common.write_json(out, {name: found for name, (_, found) in rows.items()})
    print(f"wrote {out}")
