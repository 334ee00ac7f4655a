"""The whole program at toy size, mostly by the real command line."""

import json
import re
import signal
import time

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, TOY, finish, start

import sample
import train
from model import load_model

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "config").glob("[!_]*.py"))
SMALL = "--dim=32 --heads=2 --layers=2 --text_dim=32 --text_heads=2 --text_layers=1 --segment=1 --codec=tiny".split()


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
        (wav,) = (out / "samples" / f"step_{step:06d}").glob("*.wav")
        assert soundfile.info(wav).duration == pytest.approx(1.0)


def test_the_demo_makes_its_own_corpus(tmp_path):
    args = (*TOY, f"--out={tmp_path / 'out'}", f"--data={tmp_path / 'demo'}", "--demo_clips=4")
    finish(start("train.py", "config/demo.py", *args))
    assert len(list((tmp_path / "demo_audio").glob("*.flac"))) == 4 and (tmp_path / "out" / "best.pt").exists()


def test_a_finished_run_is_not_measured_twice(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--evaluate=True", "--evaluate_clips=2"]
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
    common = [*TOY, f"--data={dataset}", "--steps=120", "--epoch=80", "--log_every=3"]
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
        a, b = (torch.load(tmp_path / side / name, weights_only=True) for side in ("whole", "parts"))
        for saved in (a, b):
            saved["settings"].pop("out")
        assert states_equal(a, b), name
    for name in ("metrics.jsonl", "history.jsonl"):
        a, b = (lines(tmp_path / side / name) for side in ("whole", "parts"))
        for line in a + b:
            line.pop("tokens_per_s", None)
        assert a == b, name


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
        "--epoch=1", "--samples=1", "--evaluate=False", "--valid_items=4", "--device=cpu",
    )  # fmt: skip
    assert status == 0 and (tmp_path / "best.pt").exists(), output


def test_the_caption_probe_runs_at_the_end(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--evaluate=True", "--evaluate_clips=2"]
    status, output = command(train, *args)
    assert status == 0 and re.search(r"instrument( +\d\.\d\d){5} +\d+%", output), output
    (line,) = [line for line in lines(tmp_path / "history.jsonl") if line["stage"] == "evaluate"]
    assert set(line["adherence"]["drums"]) == {"chance", "real", "cfg 3", "cfg 1", "no text"}


def test_sampling_by_the_command_line(toy_run, tmp_path):
    best = toy_run[0] / "best.pt"
    output = finish(
        start("sample.py", best, "slow bells", "", "--duration", "1.5", "--out", tmp_path, "--top_k", "9999")
    )
    assert "taken as 512" in output and "past the 1 s of training" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["no_caption_1.wav", "slow_bells_0.wav"]
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
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gpu_run(dataset, tmp_path, dtype):
    finish(start("train.py", *TOY, f"--data={dataset}", f"--out={tmp_path}", "--device=cuda", f"--dtype={dtype}"))
    log = lines(tmp_path / "metrics.jsonl")
    assert log[-1]["ce"] < log[0]["ce"]
