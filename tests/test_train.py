"""train.py at toy size: the files of a run, learning, stopping and resuming, steps that go wrong."""

import contextlib
import functools
import gc
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TOY, Ranks, finish, lines, load, same_run, slow, start, states_equal, untimed
from models import make_model

import common
import config
import data
import log
import metrics
import prepare
import train
from config import Settings
from generate import load_model
from patterns import make_pattern
from tools import estimate

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "config").glob("[!_]*.py"))
SMALL = (
    "--dim=32 --heads=2 --layers=2 --text_dim=32 --text_heads=2 --text_layers=1 --style_dim=32 --style_heads=2"
    " --style_layers=1 --segment=1 --codec=tiny"
).split()
CE = ("ce", "ce_q1", "ce_q2", "ce_q3", "ce_q4")


def stages(out):
    return [(line["step"], line["stage"]) for line in lines(out / "history.jsonl")]


def stage_lines(out, stage):
    return [line for line in lines(out / "history.jsonl") if line["stage"] == stage]


# The files of a run


def test_a_run_writes_its_files_and_prints_its_results(toy_run):
    out, output = toy_run
    log = lines(out / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    for line in log + stage_lines(out, "valid"):
        assert line["ppl"] == math.exp(line["ce"]) and line["ppl_q4"] == math.exp(line["ce_q4"])
        assert line["ce"] == pytest.approx(np.mean([line[key] for key in CE[1:]]))
    assert json.loads((out / "config.json").read_text())["dim"] == 32
    for part in ("unigram_q4", "ce_q4", "ppl_q1", "gain", "listen:", "try:    python sample.py"):
        assert part in output
    random_state = torch.get_rng_state()
    model, settings, codec = load_model(out / "best.pt")
    assert torch.equal(torch.get_rng_state(), random_state), "loading initializes no weights"
    assert settings.dim == 32 and codec["id"].startswith("tiny-K4")
    for step in (3, 6):
        free, continued = sorted((out / "samples" / f"step_{step:06d}").glob("*.wav"))
        assert continued.stem == free.stem + "_continued" and soundfile.info(free).duration == pytest.approx(1.0)


def test_the_train_line_of_an_epoch_is_the_mean_of_its_steps(toy_run):
    epochs = stage_lines(toy_run[0], "train")
    assert [line["step"] for line in epochs] == [3, 6]
    for line in epochs:
        steps = [step for step in lines(toy_run[0] / "metrics.jsonl") if step["epoch"] == line["epoch"]]
        assert len(steps) == 3
        for key in CE:
            assert line[key] == pytest.approx(np.mean([step[key] for step in steps]), rel=1e-12)
            assert line[key.replace("ce", "ppl")] == math.exp(line[key])


def test_the_stages_of_an_epoch_run_in_order(tmp_path, train_toy):
    args = ["--epoch=2", "--evaluate_every=2", "--generate_every=3", "--keep_every=2", "--evaluate_clips=1"]
    train_toy(tmp_path, *args, "--steps=10")
    assert [(step, stage) for step, stage in stages(tmp_path) if stage != "best"] == [
        (0, "valid"), (0, "commit"),
        (2, "train"), (2, "valid"), (2, "commit"),
        (4, "train"), (4, "valid"), (4, "evaluate"), (4, "commit"),
        (6, "train"), (6, "valid"), (6, "generate"), (6, "commit"),
        (8, "train"), (8, "valid"), (8, "evaluate"), (8, "commit"),
        (10, "train"), (10, "valid"), (10, "evaluate"), (10, "generate"), (10, "commit"),
    ]  # fmt: skip
    ce = [line["ce"] for line in stage_lines(tmp_path, "valid")]
    best = [line["ce"] for line in stage_lines(tmp_path, "best")]
    assert best == [ce[i] for i in range(1, 6) if ce[i] < min(ce[1:i], default=math.inf)]
    assert load(tmp_path / "best.pt")["ce"] == min(ce[1:])
    assert sorted(path.name for path in tmp_path.glob("step_*.pt")) == ["step_000004.pt", "step_000008.pt"]
    assert load(tmp_path / "step_000004.pt")["step"] == 4
    for line in stage_lines(tmp_path, "generate"):
        (clip,) = line["clips"]
        keys = ("free", "continued", "codec", "reference")
        assert {*clip} >= {"caption", *keys} and 0 < clip["prompt_seconds"] <= 0.25
        assert [soundfile.info(tmp_path / clip[key]).duration for key in keys] == [1.0] * 4
    resumed = train_toy(tmp_path, *args, "--steps=11")
    assert all(f"epoch {epoch}, step {2 * epoch}: valid ce " in resumed for epoch in range(6))
    assert (tmp_path / "index.html").read_text().count("<audio") >= 4


def test_the_first_validation_equals_a_uniform_guess(toy_run):
    first = lines(toy_run[0] / "history.jsonl")[0]
    assert (first["step"], first["stage"]) == (0, "valid") and first["ce"] == pytest.approx(math.log(512), rel=0.01)


def demo_args(folder):
    return "config/demo.py", *TOY, f"--data={folder / 'demo'}", "--demo_clips=4", "--samples=0"


def test_the_demo_synthesizes_its_corpus_once(tmp_path, command):
    args = demo_args(tmp_path)
    Ranks(*args, f"--out={tmp_path / 'out'}", ranks=1).finish()
    assert len(list((tmp_path / "demo_audio").glob("*.flac"))) == 4 and (tmp_path / "out" / "best.pt").exists()
    assert command(train, *args, f"--out={tmp_path / 'again'}")[0] == 0
    assert same_run(tmp_path / "out", tmp_path / "again"), "the weights do not depend on whether the corpus existed"
    status, output = command(train, *args, "--demo_clips=5", f"--out={tmp_path / 'five'}")
    assert status == 0 and "made from corpus" in output and '"clips": 5}. To make it again, remove it' in output


@slow
def test_the_demo_has_the_same_data_on_two_processes(tmp_path):
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        Ranks(*demo_args(folder), f"--out={folder / 'out'}", ranks=ranks).finish()
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / ranks / "demo").glob("*.npy")} for ranks in "12")
    assert one == two and one


def test_the_ema_is_the_unbiased_average_of_the_weights(tmp_path, train_toy):
    """The weights of each step count 0.7 times those of the next; the initial weights do not count."""
    train_toy(tmp_path, "--epoch=1", "--keep_every=1", "--samples=0", "--ema_decay=0.7", "--lr=0.01")
    kept = [load(tmp_path / f"step_{step:06d}.pt") for step in range(1, 7)]
    weights = torch.tensor([0.7**age for age in reversed(range(6))])
    for name, average in kept[-1]["ema"].items():
        mean = sum(w * saved["model"][name] for w, saved in zip(weights / weights.sum(), kept))
        torch.testing.assert_close(average, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("more", ["--epoch=3", "--epoch=100 --steps=2"])
def test_the_ema_is_updated_before_it_is_first_used(more, tmp_path, train_toy):
    train_toy(tmp_path, "--keep_every=1", "--samples=0", "--ema_every=10", *more.split())
    first = load(min(tmp_path.glob("step_*.pt")))
    assert first["ema_updates"] == 1
    assert all(torch.equal(weight, first["ema"][name]) for name, weight in first["model"].items())


def test_a_kept_checkpoint_is_used_with_its_ema_weights(tmp_path, train_toy):
    train_toy(tmp_path, "--keep_every=1", "--samples=0")
    saved, (model, *_) = load(tmp_path / "step_000003.pt"), load_model(tmp_path / "step_000003.pt")
    assert all(torch.equal(weight, saved["ema"][name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_logger_receives_the_numbers_of_both_files(name, tmp_path, train_toy, monkeypatch):
    logged, opened = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "tensorboard"
            opened.append(purge_step)

        def add_scalar(self, key, value, step):
            logged.append((key, step))

    class Run:
        def log(self, values, step):
            logged.extend((key, step) for key in values)

    wandb = types.SimpleNamespace(init=lambda **options: opened.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    for steps in (6, 8):
        train_toy(tmp_path, f"--logger={name}", "--evaluate_clips=1", f"--steps={steps}")
    steps = {key: [step for logged_key, step in logged if logged_key == key] for key, _ in logged}
    assert steps["train/ce"] == list(range(1, 9)) and steps["train_epoch/ce_q4"] == [3, 6, 8]
    assert steps["valid/ce_q4"] == [0, 3, 6, 8] and steps["evaluate/rtf"] == [6, 8]
    assert steps.keys() >= {"train/ppl_q1", "valid/ppl", "valid/unigram_q2", "train/grad_norm"}
    assert opened == [-1, 6] if name == "tensorboard" else opened[1]["resume"] == "allow"


def test_speeds_and_mfu_follow_from_the_clock(tmp_path, train_toy, monkeypatch):
    """Each step takes 2 seconds. The line of step 4 starts at step 3, where an epoch ended."""
    now, clip = [100.0], torch.nn.utils.clip_grad_norm_

    def slow_clip(*args):
        now[0] += 2
        return clip(*args)

    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "Interval", lambda: log.Interval(start=now[0]))  # its default reads the real clock
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", slow_clip)
    monkeypatch.setattr(estimate, "peak_flops", lambda device, dtype: 1e10)
    train_toy(tmp_path, "--log_every=2", "--samples=0")
    flops = load_model(tmp_path / "best.pt")[0].requires_grad_(True).flops()
    targets = int(make_pattern("delay", K=4, T=50, training=True).frame_mask.sum())
    assert targets == 4 * 50 - (0 + 1 + 2 + 3)
    for line in lines(tmp_path / "metrics.jsonl"):
        assert line["tokens_per_s"] == 4 * targets / 2 and line["data_wait"] == 0
        assert line["mfu"] == pytest.approx(4 * flops / 2 / 1e10, abs=1e-4)


def test_a_large_share_of_padding_is_reported(tmp_path, train_toy):
    args = ["--steps=1", "--epoch=1", "--samples=0"]
    assert "of items is padding" not in train_toy(tmp_path / "a", *args)
    output = train_toy(tmp_path / "b", *args, "--segment=14")
    assert re.search(r"\n[45]\d% of items is padding, because tracks are shorter than 14 s; lower --segment\n", output)


# Learning


def test_one_batch_is_overfitted(tmp_path, train_toy):
    args = ["--one_batch=True", "--steps=120", "--epoch=120", "--dim=64", "--lr=0.01", "--batch_size=1", "--clip=0"]
    train_toy(tmp_path, *args, "--cfg_dropout=0")
    log = lines(tmp_path / "metrics.jsonl")
    assert log[0]["ce"] > 6 and log[-1]["ce"] < 0.3


def test_micro_batches_add_up_to_the_batch(tmp_path, train_toy):
    for size in (4, 1):
        train_toy(tmp_path / str(size), f"--micro_batch={size}")
    for a, b in zip(lines(tmp_path / "4" / "metrics.jsonl"), lines(tmp_path / "1" / "metrics.jsonl")):
        assert a["ce"] == pytest.approx(b["ce"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    a, b = (load(tmp_path / size / "last.pt")["model"] for size in "41")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_codebook_weights_change_the_gradient_but_not_the_logged_loss(tmp_path, train_toy):
    """Doubling all weights changes nothing, because they are divided by their mean. Weight 0 stops learning."""
    logs = {}
    for weights in ("", "1,1,1,1", "2,2,2,2", "4,0,0,0"):
        out = tmp_path / f"w{weights}"
        args = ["--samples=0", "--one_batch=True", "--steps=20", "--epoch=20"]
        train_toy(out, *args, f"--codebook_weights={weights}")
        logs[weights] = [{key: line[key] for key in (*CE, "grad_norm")} for line in lines(out / "metrics.jsonl")]
    plain, first_only = logs[""], logs["4,0,0,0"]
    assert logs["1,1,1,1"] == logs["2,2,2,2"] == plain
    assert first_only[0]["ce"] == plain[0]["ce"] and first_only[0]["grad_norm"] != plain[0]["grad_norm"]
    fall = {key: [run[0][key] - run[-1][key] for run in (plain, first_only)] for key in ("ce_q1", "ce_q4")}
    assert min(fall["ce_q1"]) > 0.2 and fall["ce_q4"][0] > 0.2 and abs(fall["ce_q4"][1]) < 0.05, fall


def test_weight_decay_applies_to_matrices_only():
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = train.make_optimizer(model, Settings(weight_decay=0.5, lr=0.1))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.dim() > 1 else 1.0), msg=name)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_trains_a_step(path, dataset, toy_run, tmp_path, command):
    status, output = command(
        train, path, *SMALL, f"--data={dataset}", f"--out={tmp_path}", "--batch_size=4", "--micro_batch=2", "--steps=1",
        "--epoch=1", "--samples=1", "--evaluate_clips=0", "--valid_items=4", "--device=cpu",
        *([f"--init_from={toy_run[0]}"] if "lora" in path or "finetune" in path else []),
    )  # fmt: skip
    assert status == 0 and (tmp_path / "best.pt").exists(), output


def test_a_run_ends_with_an_evaluation_by_the_caption_probe(tmp_path, train_toy, withhold_nothing):
    output = train_toy(tmp_path, "--evaluate_clips=2")
    assert re.search(r"cfg 3( +\d\.\d\d){3,}\n", output), output
    (line,) = stage_lines(tmp_path, "evaluate")
    assert set(line["adherence"]["drums"]) == {"chance", "real", "cfg 3", "cfg 1", "nothing"}


# Stopping and resuming


def send_at(monkeypatch, step, *numbers):
    """Send signals to this process when it begins to train this step, once."""
    learning_rate, remaining = train.learning_rate, [*numbers]

    def send(before, s):
        while before == step - 1 and remaining:
            signal.raise_signal(remaining.pop(0))
        return learning_rate(before, s)

    monkeypatch.setattr(train, "learning_rate", send)


def test_a_run_stopped_within_an_epoch_resumes_bit_for_bit(dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", "--steps=60", "--epoch=40", "--log_every=3", "--melody=True", "--style=True"]
    uninterrupted = Ranks(*args, f"--out={tmp_path / 'a'}", ranks=1)
    stopped = Ranks(*args, f"--out={tmp_path / 'b'}", ranks=1)
    stopped.wait_for(tmp_path / "b" / "metrics.jsonl", 2)
    stopped.send(signal.SIGTERM)
    output = stopped.finish(status=128 + signal.SIGTERM)
    step = int(re.search(r"stopped at step (\d+); to resume: python train.py", output)[1])
    assert 6 <= step < 60 and step != 40, "it stops within an epoch"
    assert f"at step {step}" in Ranks(*args, f"--out={tmp_path / 'b'}", ranks=1).finish()
    uninterrupted.finish()
    for name in ("last.pt", "best.pt"):
        assert same_run(tmp_path / "a", tmp_path / "b", name), name
    for name in ("metrics.jsonl", "history.jsonl"):
        assert untimed(tmp_path / "a" / name) == untimed(tmp_path / "b" / name), name


def test_the_train_line_survives_a_stop_within_its_epoch(tmp_path, train_toy, monkeypatch):
    """A checkpoint of older code has no sums of the epoch: its train line is the mean of the steps after the stop."""
    train_toy(tmp_path / "a", "--samples=0")
    send_at(monkeypatch, 4, signal.SIGTERM)
    assert "stopped at step 4" in train_toy(tmp_path / "b", "--samples=0", status=128 + signal.SIGTERM)
    shutil.copytree(tmp_path / "b", tmp_path / "old")
    saved = load(tmp_path / "old" / "last.pt")
    del saved["epoch_ce"], saved["epoch_steps"]
    torch.save(saved, tmp_path / "old" / "last.pt")
    for name in ("b", "old"):
        assert "at step 4" in train_toy(tmp_path / name, "--samples=0")
    assert same_run(tmp_path / "a", tmp_path / "b")
    assert untimed(tmp_path / "a" / "history.jsonl") == untimed(tmp_path / "b" / "history.jsonl")
    a, old = (load(tmp_path / name / "last.pt") for name in ("a", "old"))
    assert all(states_equal(a[key], old[key]) for key in ("model", "ema", "optimizer", "step", "skipped"))
    (line,) = [line for line in stage_lines(tmp_path / "old", "train") if line["step"] == 6]
    for key in CE:
        steps = lines(tmp_path / "old" / "metrics.jsonl")[4:]
        assert line[key] == pytest.approx(np.mean([step[key] for step in steps]), rel=1e-12)


@slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_training_on_a_cpu_keeps_freed_memory(command, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(common, "keep_freed_memory", lambda: calls.append(True))
    assert command(train, f"--data={tmp_path}", "--device=cpu")[0] == 2 and calls
    code = "import common, torch; from tools.bench import resident_memory; {}; before = resident_memory()\n"
    code += "tensor = torch.ones(2**25); del tensor; print((resident_memory() - before) // 2**20)"
    kept, returned = (int(finish(start("-c", code.format(first)))) for first in ("common.keep_freed_memory()", "pass"))
    assert kept > 100 > 30 > returned, "of 128 MiB"


@pytest.mark.parametrize("numbers, status", [
    ([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM], 128 + signal.SIGTERM),
    ([signal.SIGINT, signal.SIGTERM], 128 + signal.SIGINT),
    ([signal.SIGINT, signal.SIGINT], 130),
])  # fmt: skip
def test_only_a_second_ctrl_c_ends_a_run_without_a_checkpoint(numbers, status, tmp_path, train_toy, monkeypatch):
    send_at(monkeypatch, 2, *numbers)
    output = train_toy(tmp_path, "--samples=0", status=status)
    is_immediate = numbers.count(signal.SIGINT) == 2
    assert ("interrupted" in output) == is_immediate == (not (tmp_path / "last.pt").exists())


def test_a_checkpoint_saved_while_another_run_starts_is_not_overwritten(toy_run, tmp_path, train_toy, monkeypatch):
    lock, out = common.lock, tmp_path / "out"

    def lock_after_the_other_run(folder):
        shutil.copytree(toy_run[0], out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        lock(folder)

    monkeypatch.setattr(common, "lock", lock_after_the_other_run)
    assert f"{out}: another run has saved last.pt meanwhile; run the command again" in train_toy(out, status=2)
    assert (out / "last.pt").read_bytes() == (toy_run[0] / "last.pt").read_bytes()


def test_held_out_tracks_that_were_trained_on_are_counted_and_the_curve_starts_anew(
    toy_run, corpus, tmp_path, train_toy
):
    """Tracks are compared by the hashes of their files: the new data set has other names for the same music."""
    out, data_folder, music = tmp_path / "out", tmp_path / "data", tmp_path / "music" / "renamed"
    shutil.copytree(toy_run[0], out)
    shutil.copytree(corpus, music)
    prepare.prepare(music.parent, data_folder, workers=1, valid_fraction=0.5)
    before = data.TokenDataset(json.loads((out / "config.json").read_text())["data"], "train")
    train_data, after = (data.TokenDataset(data_folder, split) for split in ("train", "valid"))
    known = before.track_hashes() & after.track_hashes()
    assert known and not {track["name"] for track in before.tracks} & {track["name"] for track in after.tracks}
    output = train_toy(out, f"--data={data_folder}", "--steps=9")
    assert f"{len(known)} of {len(after.tracks)} held-out tracks were trained on before" in output
    assert [line["step"] for line in lines(out / "history.jsonl")][0] == 6
    assert [line["step"] for line in lines(out / "metrics.jsonl")] == [7, 8, 9]
    for name in ("history", "metrics"):
        kept = (out / f"{name}_until_000006.jsonl").read_text()
        assert kept == (toy_run[0] / f"{name}.jsonl").read_text(), "nothing is lost"
    assert "trained on before" in train_toy(tmp_path / "tuned", f"--data={data_folder}", f"--init_from={out}")
    trained = load(out / "last.pt")["train_tracks"].tolist()
    assert set(trained) == before.track_hashes() | train_data.track_hashes()


def test_a_finished_run_is_left_alone_when_the_data_change(toy_run, dataset_copy, tmp_path, train_toy):
    out = Path(shutil.copytree(toy_run[0], tmp_path / "out"))
    meta = json.loads((dataset_copy / "meta.json").read_text())
    meta["checksums"]["counts.npy"] += 1
    (dataset_copy / "meta.json").write_text(json.dumps(meta))
    before = {path.name: path.read_bytes() for path in out.glob("*.*") if path.suffix in (".pt", ".jsonl")}
    assert "has changed since" in train_toy(out, f"--data={dataset_copy}")
    assert before == {path.name: path.read_bytes() for path in out.glob("*.*") if path.suffix in (".pt", ".jsonl")}


@pytest.mark.parametrize("change", [[], ["--valid_items=3"]])
def test_changed_validation_data_reset_the_best_loss(toy_run, dataset_copy, tmp_path, train_toy, change):
    out = Path(shutil.copytree(toy_run[0], tmp_path / "out"))
    history = (out / "history.jsonl").read_text().replace('"ce": ', '"ce": 1e-9, "was": ')
    (out / "history.jsonl").write_text(history)  # so that no later loss is lower
    meta = json.loads((dataset_copy / "meta.json").read_text())
    meta["checksums"]["counts.npy"] += not change
    (dataset_copy / "meta.json").write_text(json.dumps(meta))
    output = train_toy(out, f"--data={dataset_copy}", "--steps=9", *change)
    assert (f"{dataset_copy} has changed since {out}/last.pt" in output) == (not change)
    assert load(out / "best.pt")["step"] == 9


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_resumed_run_unmaps_the_checkpoint_it_started_from(toy_run, tmp_path, train_toy, monkeypatch):
    """Otherwise the disk space of the replaced file would not be freed."""
    is_mapped, save_checkpoint = [], common.save_checkpoint
    gc.disable()  # as in a short start, in which the collector does not run by chance

    def save(*args, **state):
        is_mapped.append("last.pt" in Path("/proc/self/maps").read_text())
        save_checkpoint(*args, **state)

    monkeypatch.setattr(common, "save_checkpoint", save)
    try:
        train_toy(shutil.copytree(toy_run[0], tmp_path / "out"), "--steps=8")
    finally:
        gc.enable()
    assert is_mapped and not any(is_mapped)


def test_the_paths_of_a_run_may_begin_with_the_home_folder_or_not_be_utf8(toy_run, tmp_path, train_toy, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    name = os.fsdecode(b"a\xfcs")
    shutil.copytree(toy_run[0], tmp_path / name)
    (tmp_path / "other.py").write_text(f"init_from = '~/{toy_run[0].name}'\nout = '~/run'\n")
    assert config.read_file(tmp_path / "other.py")["out"] == str(tmp_path / "run")
    train_toy(f"~/{name}", "--steps=8")
    output = train_toy(f"~/{name}", "--steps=10")
    assert "resuming from" in output and load(tmp_path / name / "last.pt")["step"] == 10
    (command,) = [line for line in output.splitlines() if line.startswith("try:")]
    assert f"{tmp_path}/a\\xfcs/best.pt' " in command and not Path("~").exists()
    assert load_model(tmp_path / name)[1].out == str(tmp_path / name)


def test_a_best_checkpoint_that_was_removed_is_written_again(toy_run, tmp_path, train_toy):
    out = Path(shutil.copytree(toy_run[0], tmp_path / "out"))
    (out / "best.pt").unlink()
    train_toy(out, "--steps=12", "--lr=1e-9")  # the loss does not improve enough to write it anyway
    assert (9, "generate") in stages(out) and load(out / "best.pt")["step"] in (9, 12)
    assert stages(out).count((9, "best")) == 1


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=slow), "float16"])
def test_a_run_in_16_bits_resumes_bit_for_bit(dtype, tmp_path, train_toy, monkeypatch):
    """The loss scale of float16 overflows at first, so that steps are skipped before and after the stop."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**32))
    number = signal.SIGHUP if dtype == "float16" else signal.SIGTERM
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
    args = [f"--dtype={dtype}", "--steps=24", "--epoch=12", "--samples=0", "--log_every=5", "--melody=True"]
    args += ["--style=True"]
    train_toy(tmp_path / "a", *args)
    send_at(monkeypatch, 4, number, signal.SIGTERM)  # schedulers send one to the process and one to its group
    assert "stopped at step 4" in train_toy(tmp_path / "b", *args, status=128 + number)
    train_toy(tmp_path / "b", *args)
    assert same_run(tmp_path / "a", tmp_path / "b")
    log = untimed(tmp_path / "a" / "metrics.jsonl")
    assert log == untimed(tmp_path / "b" / "metrics.jsonl")
    if dtype == "float16":
        saved = load(tmp_path / "a" / "last.pt")
        assert 4 < log[-1]["skipped"] == saved["skipped"] < 16 and saved["scaler"]["scale"] < 2.0**32
        assert saved["ema_updates"] == 24 - saved["skipped"]
        assert log[-1]["ce"] < 6.24 and all(math.isfinite(line["ce"] + line["grad_norm"]) for line in log)


@pytest.mark.parametrize("stage", ["validate", pytest.param("write_samples", marks=slow)])
def test_a_signal_at_the_end_of_an_epoch_loses_nothing(stage, tmp_path, train_toy, monkeypatch):
    train_toy(tmp_path / "a", "--generate_every=1")
    module, calls = train if stage == "validate" else metrics, []
    function = getattr(module, stage)

    def interrupted(*args):
        calls.append(1)
        if len(calls) == (2 if stage == "validate" else 1):  # the first validation is that of step 0
            signal.raise_signal(signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(module, stage, interrupted)
    output = train_toy(tmp_path / "b", "--generate_every=1", status=128 + signal.SIGTERM)
    assert "stopped at step 3" in output
    monkeypatch.setattr(module, stage, function)
    train_toy(tmp_path / "b", "--generate_every=1")
    for name in ("last.pt", "best.pt"):
        assert same_run(tmp_path / "a", tmp_path / "b", name)
    assert untimed(tmp_path / "a" / "history.jsonl") == untimed(tmp_path / "b" / "history.jsonl")


def die_at(stage):
    setattr(metrics, stage, lambda *args: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("stage", [pytest.param("evaluate", marks=slow), "write_samples"])
def test_the_stages_of_a_killed_epoch_are_repeated(stage, dataset, tmp_path, train_toy):
    args = ["--evaluate_every=1", "--evaluate_clips=1", "--keep_every=1"]
    a, b = tmp_path / "a", tmp_path / "b"
    train_toy(a, *args)
    killed = Ranks(*TOY, f"--data={dataset}", *args, f"--out={b}", ranks=1, before=functools.partial(die_at, stage))
    killed.finish(status=-signal.SIGKILL)
    assert load(b / "last.pt")["step"] == 3 and stages(b)[-1][1] != "commit"
    train_toy(b, *args)
    assert same_run(a, b) and stages(a) == stages(b) and len(list(b.glob("step_*.pt"))) == 2


def test_a_run_whose_reader_ended_saves_and_stops(dataset, tmp_path):
    """As after Ctrl-C in `python train.py ... | tee log`, which ends tee first."""
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--steps=100000", "--epoch=50000", "--samples=0"]
    process = start("train.py", *args)
    try:
        assert any("tokens/s" in line for line in process.stdout)  # the progress bar, after the first step
        process.stdout.close()
        assert process.wait(timeout=240) == 128 + signal.SIGTERM
    finally:
        process.kill()
    last = load(tmp_path / "out" / "last.pt")
    assert 0 < last["step"] < 50000 and last["step"] == lines(tmp_path / "out" / "metrics.jsonl")[-1]["step"]


@slow
def test_a_disowned_run_continues_after_its_terminal_is_closed(dataset, tmp_path):
    """After `disown`, the terminal's SIGHUP does not reach the run, but its output fails."""
    terminal, stdout = os.openpty()
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--steps=200", "--epoch=100", "--samples=0"]
    process = start("train.py", *args, stdout=stdout)
    os.close(stdout)
    try:
        with open(terminal, errors="replace") as output:
            assert any("step 0: commit" in line for line in output)
        assert process.wait(timeout=240) == 0
    finally:
        process.kill()
    assert load(tmp_path / "out" / "last.pt")["step"] == 200


def test_settings_of_the_optimizer_may_change_on_resuming(tmp_path, train_toy):
    train_toy(tmp_path, "--samples=0")
    output = train_toy(tmp_path, "--samples=0", "--steps=8", "--weight_decay=0.3", "--beta1=0.8", "--min_lr=0.0001")
    assert "weight_decay was 0.1, is 0.3" in output and "resuming from" in output
    train_toy(tmp_path, "--samples=0", "--steps=9", "--freeze=blocks.0.*")
    moments = load(tmp_path / "last.pt")["optimizer"]
    assert "blocks.0.qkv.weight" not in moments and "blocks.1.qkv.weight" in moments


def test_a_finished_run_is_not_evaluated_again(tmp_path, train_toy, withhold_nothing):
    train_toy(tmp_path, "--evaluate_clips=2")
    output = train_toy(tmp_path, "--evaluate_clips=2")
    assert "finished at step 6" in output and "--steps" in output and "listen:" in output
    assert not {"fad", "epoch 1,", "generating", "resuming"} & {*re.findall(r"epoch 1,|\w+", output)}
    assert len(stage_lines(tmp_path, "evaluate")) == 1
    before = (tmp_path / "last.pt").read_bytes()
    train_toy(tmp_path, "--evaluate_clips=2", "--steps=4")  # fewer steps than it has
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_log_line_that_a_kill_cut_off_is_dropped(tmp_path, train_toy):
    train_toy(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "ce": 5.1}\n{"step": 8, "ce": 5.')
    train_toy(tmp_path, "--steps=8")
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def test_a_folder_with_best_but_without_last_is_refused(tmp_path, train_toy):
    train_toy(tmp_path, "--samples=0")
    (tmp_path / "last.pt").unlink()
    before = (tmp_path / "best.pt").read_bytes()
    output = train_toy(tmp_path, "--samples=0", status=2)
    assert f"{tmp_path}: holds a run without last.pt; choose another --out or remove the folder" in output
    assert (tmp_path / "best.pt").read_bytes() == before


def test_a_run_may_start_from_the_weights_of_another(dataset_copy, tmp_path, train_toy):
    train_toy(tmp_path / "a", "--samples=0", "--lr=0.01")
    parent = load(tmp_path / "a" / "best.pt")
    (dataset_copy / "tokenizer.model").write_bytes(prepare.train_tokenizer([], 300))
    args = ["--samples=0", f"--data={dataset_copy}", f"--init_from={tmp_path / 'a' / 'best.pt'}"]
    output = train_toy(tmp_path / "b", *args, "--lr=1e-9")
    assert f"using the tokenizer of the checkpoint, not the one in {dataset_copy}" in output
    child = load(tmp_path / "b" / "last.pt")
    assert child["step"] == 6 and child["tokenizer"] == parent["tokenizer"]
    for name, weight in parent["ema"].items():
        torch.testing.assert_close(child["model"][name], weight, rtol=0, atol=1e-6)
    (tmp_path / "a" / "best.pt").unlink()
    assert "resuming from" in train_toy(tmp_path / "b", *args, "--steps=8"), "only a new run needs --init_from"


def test_a_fine_tune_takes_the_model_from_init_from(toy_run, dataset, tmp_path, command):
    """Sizes, codec, positions, conditions, segment and sampling, unless they are typed."""
    words = [f"--data={dataset}", f"--init_from={toy_run[0]}", "--steps=2", "--samples=0", "--valid_items=2",
             "--evaluate_clips=0", "--device=cpu"]  # fmt: skip
    for number, path in enumerate(("config/lora.py", "config/finetune.py", "config/small.py", "config/demo.py")):
        out = tmp_path / str(number)
        more = [f"--out={out}", "--top_k=7", *(["--batch_size=2", "--micro_batch=2"] if number > 1 else [])]
        status, output = command(train, path, *words, *more)
        assert status == 0, output
        saved, parent = load(out / "best.pt")["settings"], load(toy_run[0] / "best.pt")["settings"]
        assert all(saved[key] == parent[key] for key in config.MODEL_SETTINGS)
        assert saved["top_k"] == 7 and saved["cfg"] == (2.0 if "demo" in path else parent["cfg"])
        assert ("dim = 32 (config file: " in output) == (number > 1), "a config file's other sizes are reported"


@pytest.mark.parametrize("condition", ["melody", "style"])
def test_a_condition_can_be_added_to_a_model(toy_run, dataset, tmp_path, command, condition):
    words = [f"--data={dataset}", f"--init_from={toy_run[0]}", f"--out={tmp_path}", "--steps=4", "--samples=0",
             f"--{condition}=True", "--style_dim=32", "--style_seconds=0.2,0.4", "--lr=0.01",
             "--device=cpu"]  # fmt: skip
    status, output = command(train, "config/lora.py", *words, "--valid_items=2", "--evaluate_clips=0")
    assert status == 0, output
    parent, child = load(toy_run[0] / "best.pt")["ema"], load(tmp_path / "last.pt")["model"]
    added = {name for name in child if name not in parent and ".lora_" not in name}
    assert added and all(name.startswith(f"conditioner.prepended.{condition}.") for name in added)
    assert child[f"conditioner.prepended.{condition}.null"].any(), "the new embedder is trained"
    status, output = command(train, "config/lora.py", *words[:1], f"--init_from={tmp_path / 'best.pt'}",
                             f"--out={tmp_path / 'x'}", f"--{condition}=False")  # fmt: skip
    assert status == 2 and f"{condition} was True, is False" in output


def test_the_epoch_follows_the_run_unless_it_is_set(tmp_path):
    demo, out = "config/demo.py", f"--out={tmp_path}"
    for words, epoch in (
        ([demo], 1750), ([demo, "--steps=500"], 100), ([demo, "--steps=500", "--epoch=400"], 400), (["--steps=3"], 1),
        (["--steps=1000"], 200), ([demo, "--steps=20000"], 1750),
    ):  # fmt: skip
        assert config.load([*words, out], "").epoch == epoch
    assert Settings(steps=7).epoch == 2


def test_a_run_is_not_resumed_with_another_model(toy_run, dataset, tmp_path, command):
    """Sizes come from last.pt, so the run would continue with the old model unnoticed."""
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(toy_run[0], other)
    words = ["config/finetune.py", f"--data={dataset}", f"--out={out}", "--steps=2", "--samples=0", "--valid_items=2",
             "--evaluate_clips=0", "--device=cpu"]  # fmt: skip
    assert command(train, *words, f"--init_from={toy_run[0]}")[0] == 0
    status, output = command(train, *words, f"--init_from={other}")
    assert status == 2 and f"started from '{toy_run[0]}', not '{other}'; choose another --out" in output
    assert command(train, *words, f"--init_from={toy_run[0]}/best.pt", "--steps=3")[0] == 0, "the same model"


def test_lora_without_a_model_to_adapt_is_refused(dataset, tmp_path, command):
    status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}", "--lora_rank=2")
    assert status == 2 and "--init_from" in output and "demo/demo.pt" in output
    status, output = command(train, "config/lora.py", f"--data={dataset}", "--init_from=nowhere")
    assert status == 2 and "nowhere: no such checkpoint" in output and "tools.convert import" in output


def test_more_steps_do_not_change_the_epoch_of_a_run(tmp_path, dataset, command):
    words = [*(word for word in TOY if "epoch" not in word), f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    for steps in (4, 7):
        assert command(train, *words, f"--steps={steps}")[0] == 0
    epochs = [line["epoch"] for line in lines(tmp_path / "metrics.jsonl")]
    assert epochs == [1, 2, 3, 4, 5, 6, 7] and json.loads((tmp_path / "config.json").read_text())["epoch"] == 1


def test_the_error_of_the_gain_is_that_of_independent_tracks(toy_run, dataset):
    """Two tracks of one item each; then each item twice, which adds no information; then one track only."""
    (model, s, _), valid = load_model(toy_run[0]), data.TokenDataset(dataset, "valid")
    valid.tracks = valid.tracks[:2]
    s.valid_items = 2
    batches = [*data.valid_batches(valid, model, 1, s)]
    assert len({names[0] for _, names in batches}) == 2
    ce, null_ce, error, tracks = train.validate(model, batches, torch.device("cpu"), contextlib.nullcontext)
    gains = []
    for batch, names in batches:
        alone = train.validate(model, [(batch, names)], torch.device("cpu"), contextlib.nullcontext)
        gains.append((np.mean(np.subtract(alone[1], alone[0]) * batch.targets_per_codebook.numpy()) * model.K,
                      batch.in_loss.sum().item()))  # fmt: skip
        assert alone[2:] == (None, 1)
    (a, n), (b, m) = gains
    targets = sum(batch.targets_per_codebook.sum().item() for batch, _ in batches)
    residual = a - n * (a + b) / (n + m)
    assert tracks == 2 and error == pytest.approx(2 * abs(residual) / targets, rel=1e-3)
    twice = train.validate(model, 2 * batches, torch.device("cpu"), contextlib.nullcontext)
    assert twice[2] == pytest.approx(error, rel=1e-6) and twice[3] == 2


# Steps that go wrong


def test_a_diverging_run_ends_and_keeps_its_checkpoint(tmp_path, train_toy):
    train_toy(tmp_path, "--samples=0")
    before = (tmp_path / "last.pt").read_bytes()
    output = train_toy(tmp_path, "--samples=0", "--steps=60", "--epoch=60", "--lr=30", status=2)
    assert re.search(r"step \d+: ce \d{3,}.*This step did not change the weights", output)
    output = train_toy(tmp_path, "--samples=0", "--steps=12", "--lr=1e11", "--clip=0", status=2)
    (message,) = [line for line in output.splitlines() if "error:" in line]
    assert re.search(r"step [789]: ce (nan|inf).*last.pt, if any, is older", message)
    assert (tmp_path / "last.pt").read_bytes() == before
    train_toy(tmp_path, "--samples=0", "--steps=8", "--lr=1e-4")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=slow), "float16"])
def test_a_step_with_an_infinite_gradient_changes_nothing_and_is_counted(dtype, tmp_path, train_toy, monkeypatch):
    """Weights, EMA, optimizer state and style codebooks stay unchanged, and the run continues."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_infinite(parameters, max_norm):
        calls.append(1)
        parameters = list(parameters)
        if len(calls) in (3, 4):
            parameters[0].grad.fill_(math.inf)
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_infinite)
    args = [f"--dtype={dtype}", "--epoch=1", "--keep_every=1", "--samples=0", "--style=True", "--style_dropout=0"]
    train_toy(tmp_path, *args, "--cfg_dropout=0")
    kept = {step: load(tmp_path / f"step_{step:06d}.pt") for step in range(1, 7)}
    for key in ("model", "ema"):
        for name, tensor in kept[2][key].items():
            assert torch.equal(tensor, kept[4][key][name]), name
    for name, state in kept[2]["optimizer"].items():
        assert all(torch.equal(state[key], kept[4]["optimizer"][name][key]) for key in state), name
    for name in ("heads.weight", "conditioner.prepended.style.vq.counts"):
        assert not torch.equal(kept[4]["model"][name], kept[5]["model"][name])
    skipped = {line["step"]: line["skipped"] for line in lines(tmp_path / "metrics.jsonl")}
    assert skipped[2] == 0 and skipped[5] == skipped[6] == 2
    assert [kept[step]["skipped"] for step in (2, 3, 4)] == [0, 1, 2]
    assert [step for step, stage in stages(tmp_path) if stage == "train"] == [1, 2, 5, 6], "epochs with an update"


def test_16_skipped_steps_in_a_row_end_the_run(tmp_path, train_toy, monkeypatch):
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clip_to_nan(parameters, max_norm):
        calls.append(1)
        return clip(parameters, max_norm) * (math.nan if len(calls) > 2 and len(calls) != 18 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_to_nan)
    output = train_toy(tmp_path, "--steps=60", "--epoch=60", "--samples=0", status=2)
    assert re.search(r"step 34: ce [\d.]+, gradient norm nan", output), output


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_run(dataset, tmp_path, dtype):
    finish(start("train.py", *TOY, f"--data={dataset}", f"--out={tmp_path}", "--device=cuda", f"--dtype={dtype}"))
    log = lines(tmp_path / "metrics.jsonl")
    assert log[-1]["ce"] < log[0]["ce"]


def run_on_gpu(out, *words, launch=()):
    """Train a toy with all conditions and captions of many lengths: return the ce of each step."""
    more = ["--device=cuda", "--melody=True", "--style=True", "--word_dropout=0.5", "--cfg_dropout=0.5", "--steps=12"]
    finish(start(*launch, "train.py", *TOY, *more, "--epoch=6", "--samples=0", f"--out={out}", *words))
    return [line["ce"] for line in lines(out / "metrics.jsonl")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_compiled_blocks_take_captions_of_any_length_and_resume(dataset, tmp_path):
    eager = run_on_gpu(tmp_path / "eager", f"--data={dataset}", "--compile=never", "--keep_every=1")
    assert run_on_gpu(tmp_path / "compiled", f"--data={dataset}", "--compile=always") == pytest.approx(eager, rel=0.02)
    (tmp_path / "parts").mkdir()
    (tmp_path / "eager" / "step_000006.pt").rename(tmp_path / "parts" / "last.pt")
    assert run_on_gpu(tmp_path / "parts", f"--data={dataset}", "--compile=never") == pytest.approx(eager[6:], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("more", ["--parallel=ddp", "--parallel=fsdp", "--parallel=fsdp --compile=always"])
def test_gpu_two_processes_equal_one(more, dataset, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    one = run_on_gpu(tmp_path / "one", f"--data={dataset}", "--compile=never")
    two = run_on_gpu(tmp_path / "two", f"--data={dataset}", "--compile=never", *more.split(), launch=launch)
    assert two == pytest.approx(one, rel=0.02)
