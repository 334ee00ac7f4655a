"""The whole program at toy size, mostly by the real command line."""

import contextlib
import copy
import functools
import json
import math
import re
import signal
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TOY, finish, start, without_checksums

import config
import data
import sample
import train
from model import MusicLM, load_model

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "config").glob("[!_]*.py"))
SMALL = (
    "--dim=32 --heads=2 --layers=2 --text_dim=32 --text_heads=2 --text_layers=1 --style_dim=32 --style_heads=2"
    " --style_layers=1 --segment=1 --codec=tiny"
).split()


def lines(path):
    return [json.loads(line) for line in open(path)]


def states_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return a == b


def same_run(a, b, name="last.pt"):
    """Whether two runs' checkpoints are equal bit for bit, but for the name of their folder."""
    states = [torch.load(folder / name, weights_only=True) for folder in (a, b)]
    for saved in states:
        saved["settings"].pop("out")
    return states_equal(*states)


def untimed(path):
    """The lines of a log without what depends on the machine's speed."""
    return [{key: line[key] for key in line if key not in ("tokens_per_s", "data_wait")} for line in lines(path)]


def test_a_run_leaves_what_it_promises(toy_run):
    out, output = toy_run
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    valid = [line for line in lines(out / "history.jsonl") if line["stage"] == "valid"]
    assert [line["step"] for line in valid] == [3, 6] and len(valid[0]["ce_q"]) == 4 and "gain" in valid[0]
    assert json.loads((out / "config.json").read_text())["dim"] == 32
    for part in ("unigram ce", "valid ce", "conditioning gain", "listen:"):
        assert part in output
    model, settings, codec = load_model(out / "best.pt")
    assert settings.dim == 32 and codec["id"].startswith("tiny-K4")
    for step in (3, 6):
        free, continued = sorted((out / "samples" / f"step_{step:06d}").glob("*.wav"))
        assert continued.stem == free.stem + "_continued" and soundfile.info(free).duration == pytest.approx(1.0)


def test_the_demo_makes_its_own_corpus(tmp_path, command):
    args = (*TOY, f"--data={tmp_path / 'demo'}", "--demo_clips=4", "--samples=0")
    finish(start("train.py", "config/demo.py", *args, f"--out={tmp_path / 'out'}"))
    assert len(list((tmp_path / "demo_audio").glob("*.flac"))) == 4 and (tmp_path / "out" / "best.pt").exists()
    assert command(train, "config/demo.py", *args, f"--out={tmp_path / 'again'}")[0] == 0
    assert same_run(tmp_path / "out", tmp_path / "again"), "the start must not depend on who made the corpus"


def test_settings_of_the_optimizer_may_change_on_going_on(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    status, output = command(train, *args, "--steps=8", "--weight_decay=0.3", "--beta1=0.8")
    assert status == 0 and "weight_decay was 0.1, is 0.3" in output
    matrices, vectors = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert matrices["weight_decay"] == 0.3 and vectors["weight_decay"] == 0.0 and matrices["betas"][0] == 0.8


def test_a_finished_run_is_not_measured_twice(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--evaluate_clips=2"]
    first, again = command(train, *args), command(train, *args)
    assert first[0] == again[0] == 0 and "instrument" in again[1] and "generating" not in again[1]
    assert len([line for line in lines(tmp_path / "history.jsonl") if line["stage"] == "evaluate"]) == 1


def test_a_log_line_cut_by_a_kill_is_dropped(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}"]
    assert command(train, *args)[0] == 0
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "ce": 5.')
    assert command(train, *args, "--steps=8")[0] == 0
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def test_stopped_and_started_again_it_ends_bit_for_bit_the_same(dataset, tmp_path):
    common = [*TOY, f"--data={dataset}", "--steps=120", "--epoch=80", "--log_every=3", "--melody=True", "--style=True"]
    whole = start("train.py", *common, f"--out={tmp_path / 'whole'}")
    parts = start("train.py", *common, f"--out={tmp_path / 'parts'}")
    log = tmp_path / "parts" / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 2) and parts.poll() is None:
        time.sleep(0.005)
    parts.send_signal(signal.SIGTERM)
    output = finish(parts, status=128 + signal.SIGTERM)
    stopped = int(re.search(r"committed at step (\d+); to go on: python train.py", output)[1])
    assert 6 <= stopped < 120 and stopped != 80, "the test is about stopping within an epoch"
    assert f"at step {stopped}" in finish(start("train.py", *common, f"--out={tmp_path / 'parts'}"))
    finish(whole)
    for name in ("last.pt", "best.pt"):
        assert same_run(tmp_path / "whole", tmp_path / "parts", name), name
    for name in ("metrics.jsonl", "history.jsonl"):
        assert untimed(tmp_path / "whole" / name) == untimed(tmp_path / "parts" / name), name


def signal_at(monkeypatch, stop):
    """Makes the next run get one SIGTERM while it works on step `stop`."""
    usual, sent = train.learning_rate, []

    def learning_rate(step, s):
        if step == stop - 1 and not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
        return usual(step, s)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_goes_on_bit_for_bit_too(dtype, dataset, tmp_path, command, monkeypatch):
    """For float16 with a loss scale that overflows at first, so that steps are skipped before and after the stop."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**34))
    common = [*TOY, f"--data={dataset}", f"--dtype={dtype}", "--steps=24", "--epoch=12", "--samples=0", "--log_every=5"]
    assert command(train, *common, f"--out={tmp_path / 'whole'}")[0] == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 4)
        status, output = command(train, *common, f"--out={tmp_path / 'parts'}")
        assert status == 128 + signal.SIGTERM and "committed at step 4" in output
    assert command(train, *common, f"--out={tmp_path / 'parts'}")[0] == 0
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (lines(tmp_path / side / "metrics.jsonl") for side in ("whole", "parts"))
    assert [line["ce_q"] for line in whole] == [line["ce_q"] for line in parts]
    if dtype == "float16":
        a = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)
        assert 4 < whole[-1]["skipped"] == a["skipped"] < 20 and a["scaler"]["scale"] < 2.0**34
        assert whole[-1]["ce"] < 6.24 and all(math.isfinite(line["ce"] + line["grad_norm"]) for line in whole)


def test_the_average_of_the_weights_is_unbiased(dataset, tmp_path, command):
    """With every step's weights kept, the average is theirs, each weighing 0.7 of the next; the start has no part."""
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--epoch=1", "--keep_every=1", "--samples=0"]
    assert command(train, *args, "--ema_decay=0.7", "--lr=0.01")[0] == 0
    kept = [torch.load(tmp_path / f"step_{step:06d}.pt", weights_only=True) for step in range(1, 7)]
    weights = torch.tensor([0.7**age for age in reversed(range(6))])
    for name, average in kept[-1]["ema"].items():
        mean = sum(w * saved["model"][name] for w, saved in zip(weights / weights.sum(), kept))
        torch.testing.assert_close(average, mean, rtol=1e-4, atol=1e-6)


def test_the_cycle(dataset, tmp_path, command):
    """Valid, evaluate and generate as often as asked, in this order; what is told again on going on."""
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--steps=10", "--epoch=2", "--evaluate_every=2"]
    args += ["--generate_every=3", "--keep_every=2", "--evaluate_clips=1"]
    assert command(train, *args)[0] == 0
    history = lines(tmp_path / "history.jsonl")
    assert [(line["epoch"], line["stage"]) for line in history] == [
        (1, "valid"), (2, "valid"), (2, "evaluate"), (3, "valid"), (3, "generate"), (4, "valid"), (4, "evaluate"),
        (5, "valid"), (5, "evaluate"), (5, "generate"),
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.glob("step_*.pt")) == ["step_000004.pt", "step_000008.pt"]
    assert torch.load(tmp_path / "step_000004.pt", weights_only=True)["step"] == 4
    for line in history[4], history[9]:
        (clip,) = line["clips"]
        assert {*clip} >= {"caption", "free", "continued", "codec", "reference"}
        sizes = [soundfile.info(tmp_path / clip[key]).duration for key in ("free", "continued", "codec", "reference")]
        assert sizes == [1.0] * 4 and 0 < clip["prompt_seconds"] <= 0.25
    again = command(train, *args, "--steps=11")[1]
    assert all(f"epoch {epoch}, step {2 * epoch}: valid ce" in again for epoch in range(1, 6))
    assert (tmp_path / "index.html").read_text().count("<audio") >= 4


@pytest.mark.parametrize("stage", ["validate", "write_samples"])
def test_a_signal_after_the_commit_that_ends_an_epoch_loses_nothing(stage, dataset, tmp_path, command, monkeypatch):
    """What was not begun yet is made up for on going on."""
    args = [*TOY, f"--data={dataset}", "--generate_every=1"]
    assert command(train, *args, f"--out={tmp_path / 'whole'}")[0] == 0
    module = train if stage == "validate" else sample
    usual = getattr(module, stage)
    monkeypatch.setattr(module, stage, lambda *rest: signal.raise_signal(signal.SIGTERM) or usual(*rest))
    status, output = command(train, *args, f"--out={tmp_path / 'parts'}")
    assert status == 128 + signal.SIGTERM and "stopped and committed at step 3" in output
    done = [line["stage"] for line in lines(tmp_path / "parts" / "history.jsonl")]
    assert done == (["valid"] if stage == "validate" else ["valid", "generate"])
    monkeypatch.setattr(module, stage, usual)
    assert command(train, *args, f"--out={tmp_path / 'parts'}")[0] == 0
    assert same_run(tmp_path / "whole", tmp_path / "parts") and same_run(
        tmp_path / "whole", tmp_path / "parts", "best.pt"
    )
    assert untimed(tmp_path / "whole" / "history.jsonl") == untimed(tmp_path / "parts" / "history.jsonl")


def test_a_finished_run_without_its_best_or_with_fewer_steps_asked(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    assert command(train, *args, "--steps=4")[0] == 0
    assert (tmp_path / "last.pt").read_bytes() == before
    (tmp_path / "best.pt").unlink()
    status, output = command(train, *args)
    assert status == 2 and "best.pt: no such checkpoint" in output
    status, output = command(train, *args, "--steps=9")
    assert status == 0 and torch.load(tmp_path / "best.pt", weights_only=True)["step"] == 9


def test_a_folder_of_a_run_whose_last_is_gone_is_refused(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    (tmp_path / "last.pt").unlink()
    status, output = command(train, *args)
    assert status == 2 and "best.pt: of a run whose last.pt is gone" in output


def test_a_run_that_diverges_stops_before_the_good_weights_are_lost(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    status, output = command(train, *args, "--steps=60", "--epoch=60", "--lr=30")
    assert status == 2 and "a lower --lr may help. The weights were not touched" in output
    assert (tmp_path / "last.pt").read_bytes() == before
    assert command(train, *args, "--steps=8", "--lr=1e-4")[0] == 0


def test_another_tokenizer_is_another_model(dataset, own_dataset, tmp_path, command):
    args = [*TOY, f"--out={tmp_path / 'out'}", "--samples=0"]
    assert command(train, *args, f"--data={dataset}")[0] == 0
    (without_checksums(own_dataset) / "tokenizer.model").write_bytes(data.train_tokenizer([], 300))
    status, output = command(train, *args, f"--data={own_dataset}")
    assert status == 2 and f"the tokenizer is not that of {own_dataset}" in output
    args = [*TOY, f"--out={tmp_path / 'next'}", "--samples=0", f"--data={own_dataset}"]
    args += [f"--init_from={tmp_path / 'out' / 'best.pt'}"]
    for steps in (3, 6):  # begun, and gone on with, by the tokenizer of the run that it began from
        status, output = command(train, *args, f"--steps={steps}")
        assert status == 0 and "not by" in output, output
    saved = [torch.load(tmp_path / run / "last.pt", weights_only=True) for run in ("out", "next")]
    assert saved[0]["tokenizer"] == saved[1]["tokenizer"] and saved[1]["step"] == 6


def test_kept_checkpoints_are_never_written_over(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0", "--keep_every=1"]
    assert command(train, *args)[0] == 0
    kept = {path: path.read_bytes() for path in tmp_path.glob("step_*.pt")}
    assert len(kept) == 2
    assert command(train, *args, "--epoch=2", "--steps=8")[0] == 0
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert (tmp_path / "step_000008.pt").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_loggers_are_told_everything_and_the_past_again(name, dataset, tmp_path, command, monkeypatch):
    told = []

    class SummaryWriter:
        def __init__(self, folder):
            assert folder == tmp_path / "tensorboard"

        def add_scalar(self, key, value, step):
            told.append((key, step))

        def add_audio(self, key, wav, step, sample_rate):
            assert wav.shape == (sample_rate,)
            told.append(("audio", step))

        def flush(self):
            pass

    class Run:
        def log(self, values, step):
            told.extend(("audio" if isinstance(value, Path) else key, step) for key, value in values.items())

    wandb = types.SimpleNamespace(init=lambda **about: Run(), Audio=Path)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", f"--logger={name}", "--evaluate_clips=1"]
    for steps in (6, 8):
        told.clear()
        assert command(train, *args, f"--steps={steps}")[0] == 0
        assert [step for key, step in told if key == "train/ce"] == list(range(1, steps + 1))
    assert [step for key, step in told if key == "valid/ce_q/4"] == [3, 6, 8]
    assert [step for key, step in told if key == "evaluate/fad"] == [6, 8]
    assert [step for key, step in told if key == "audio"] == [3, 6, 8]


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    status, output = command(train, *args, "--steps=12", "--lr=1e25", "--clip=0")
    (said,) = [line for line in output.splitlines() if "error:" in line]
    assert status == 2 and re.search(r"step [789]: loss (nan|inf), gradient norm nan.*last.pt is whole", said)
    assert (tmp_path / "last.pt").read_bytes() == before


def make_step(settings=None):
    """A toy model, what `accumulate` and `update` take besides it, and a batch."""
    s = config.load([*TOY, *(settings or [])], "")
    codec = dict(K=4, card=64, frame_rate=50, dim=8)
    model, ema = (MusicLM(s, codec, data.train_tokenizer([], 300)) for _ in range(2))
    codes, everything = torch.randint(64, (4, 4, 50)), torch.ones(4, 50, dtype=torch.bool)
    batch = data.Batch(codes, everything, everything, [{"text": "bells"}] * 4, [], everything)
    return s, model, ema, train.make_optimizer(model, s), torch.amp.GradScaler("cpu", enabled=False), batch


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 101.0])
def test_weights_and_optimizer_stay_as_they_are_where_a_step_is_bad(loss):
    s, model, ema, optimizer, scaler, batch = make_step()
    inputs = [model.conditioner.prepare(batch.conditions, "cpu")]
    for step, ce in ((1, 4.0), (2, loss)):
        train.accumulate(model, model, batch, inputs, 4, scaler, contextlib.nullcontext)
        before = [p.clone() for p in model.parameters()], copy.deepcopy(optimizer.state_dict()["state"])
        train.update(model, ema, optimizer, scaler, torch.full((4,), ce), step, s)
        same = all(map(torch.equal, before[0], model.parameters()))
        assert same == (step == 2)
    torch.testing.assert_close(optimizer.state_dict()["state"], before[1], rtol=0, atol=0)


def test_hearing_of_a_step_one_step_later_changes_nothing(dataset, tmp_path, command, monkeypatch):
    """As on GPUs, where the host runs ahead: the same log, and a bad step is told of by its number."""
    logs = []
    for name, behind in (("at_once", 0), ("later", 1)):
        monkeypatch.setattr(train, "BEHIND", {"cpu": behind})
        status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path / name}", "--log_every=2")
        assert status == 0, output
        logs.append([json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")])
    timeless = [[{key: value for key, value in line.items() if key not in ("tokens_per_s", "data_wait")}
                 for line in log] for log in logs]  # fmt: skip
    assert timeless[0] == timeless[1] and len(logs[0]) == 3
    status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path / 'bad'}", "--lr=1e30", "--warmup=0")
    assert status == 2 and "step 2: loss" in output and "nothing was saved" in output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_step_waits_for_the_gpu(dtype):
    s, model, ema, _, _, batch = make_step()
    model, ema = model.cuda().train(), ema.cuda()
    optimizer, scaler = train.make_optimizer(model, s), torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    autocast = functools.partial(torch.autocast, "cuda", dtype, enabled=dtype != torch.float32)
    for step in (1, 2, 3):
        if step == 2:
            torch.cuda.set_sync_debug_mode("error")
        inputs = [model.conditioner.prepare(batch.conditions, "cuda")]
        ce_q = train.accumulate(model, model, batch.to("cuda"), inputs, 4, scaler, autocast)
        norm = train.update(model, ema, optimizer, scaler, ce_q, step, s)
        later = train.Later(torch.cat([ce_q, norm[None]]))
    torch.cuda.set_sync_debug_mode("default")
    assert len(later.read()) == 5


def test_a_new_run_may_begin_with_the_weights_of_another(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", "--samples=0"]
    assert command(train, *args, f"--out={tmp_path / 'a'}", "--lr=0.01")[0] == 0
    parent = torch.load(tmp_path / "a" / "best.pt", weights_only=True)
    begin = [*args, f"--out={tmp_path / 'b'}", f"--init_from={tmp_path / 'a' / 'best.pt'}", "--lr=1e-9"]
    status, output = command(train, *begin)
    assert status == 0 and "beginning with the weights of" in output
    child = torch.load(tmp_path / "b" / "last.pt", weights_only=True)
    assert child["step"] == 6
    for name, weight in parent["model"].items():
        torch.testing.assert_close(child["model"][name], weight, rtol=0, atol=1e-6)
    (tmp_path / "a" / "best.pt").unlink()
    assert "going on from" in command(train, *begin, "--steps=8")[1], "the parent is needed only at the start"


def test_micro_batches_add_up_to_the_batch(dataset, tmp_path, command):
    for size in (4, 1):
        args = [*TOY, f"--data={dataset}", f"--out={tmp_path / str(size)}", f"--micro_batch={size}"]
        assert command(train, *args)[0] == 0
    for a, b in zip(lines(tmp_path / "4" / "metrics.jsonl"), lines(tmp_path / "1" / "metrics.jsonl")):
        assert a["ce"] == pytest.approx(b["ce"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    a, b = (torch.load(tmp_path / size / "last.pt", weights_only=True)["model"] for size in "41")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_one_batch_is_learned_by_heart(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--one_batch=True", "--steps=120", "--epoch=120"]
    args += ["--dim=64", "--lr=0.01", "--batch_size=1", "--cfg_dropout=0", "--clip=0"]
    assert command(train, *args)[0] == 0
    log = lines(tmp_path / "metrics.jsonl")
    assert log[0]["ce"] > 6 and log[-1]["ce"] < 0.3


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_trains_a_step(path, dataset, tmp_path, command):
    status, output = command(
        train, path, *SMALL, f"--data={dataset}", f"--out={tmp_path}", "--batch_size=4", "--micro_batch=2", "--steps=1",
        "--epoch=1", "--samples=1", "--evaluate_clips=0", "--valid_items=4", "--device=cpu",
    )  # fmt: skip
    assert status == 0 and (tmp_path / "best.pt").exists(), output


def test_the_caption_probe_runs_at_the_end(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--evaluate_clips=2"]
    status, output = command(train, *args)
    assert status == 0 and re.search(r"cfg 3( +\d\.\d\d){3,}\n", output), output
    (line,) = [line for line in lines(tmp_path / "history.jsonl") if line["stage"] == "evaluate"]
    assert set(line["adherence"]["drums"]) == {"chance", "real", "cfg 3", "cfg 1", "nothing"}


def test_sampling_by_the_command_line(toy_run, tmp_path):
    best = toy_run[0] / "best.pt"
    output = finish(
        start("sample.py", best, "slow bells", "", "--duration", "1.5", "--out", tmp_path, "--top_k", "9999")
    )
    assert "taken as 512" in output and "past the 1 s of training" in output
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == ["no_caption_1.wav", "slow_bells_0.wav"]
    assert soundfile.info(tmp_path / "slow_bells_0.wav").duration == pytest.approx(1.5)


def test_a_seed_gives_the_same_take_in_any_batch_and_a_prompt_is_continued(toy_run, tmp_path, command):
    best = toy_run[0] / "best.pt"
    common = ("--duration", 1, "--out", tmp_path)
    assert command(sample, best, "organ", "fast bells", "--seed", 3, *common)[0] == 0
    first = soundfile.read(tmp_path / "fast_bells_4.wav")[0]
    assert command(sample, best, "fast bells", "--seed", 4, *common)[0] == 0
    again = soundfile.read(tmp_path / "fast_bells_4.wav")[0]
    np.testing.assert_allclose(first, again, atol=1e-3)
    common = ("--duration", 2, "--out", tmp_path)
    assert command(sample, best, "fast bells", "--continue", tmp_path / "organ_3.wav", "--seed", 8, *common)[0] == 0
    assert soundfile.info(tmp_path / "fast_bells_8.wav").duration == pytest.approx(2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_run(dataset, tmp_path, dtype):
    finish(start("train.py", *TOY, f"--data={dataset}", f"--out={tmp_path}", "--device=cuda", f"--dtype={dtype}"))
    log = lines(tmp_path / "metrics.jsonl")
    assert log[-1]["ce"] < log[0]["ce"]
