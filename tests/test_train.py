"""The training run, by train.py's own main at toy size: what it leaves, what it survives, what it refuses to do."""

import functools
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
from conftest import ROOT, TOY, Ranks, finish, lines, load, same_run, start, untimed
from models import make_model

import common
import metrics
import prepare
import train
from config import Settings
from generate import load_model

CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "config").glob("[!_]*.py"))
SMALL = (
    "--dim=32 --heads=2 --layers=2 --text_dim=32 --text_heads=2 --text_layers=1 --style_dim=32 --style_heads=2"
    " --style_layers=1 --segment=1 --codec=tiny"
).split()


def stages(out):
    return [(line["step"], line["stage"]) for line in lines(out / "history.jsonl")]


# What a run leaves


def test_a_run_leaves_what_it_promises(toy_run):
    out, output = toy_run
    log = lines(out / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    for line in log + [line for line in lines(out / "history.jsonl") if line["stage"] == "valid"]:
        assert line["ppl"] == math.exp(line["ce"]) and line["ppl_q4"] == math.exp(line["ce_q4"])
        assert line["ce"] == pytest.approx(np.mean([line[f"ce_q{k}"] for k in (1, 2, 3, 4)]))
    assert json.loads((out / "config.json").read_text())["dim"] == 32
    for part in ("unigram_q4", "ce_q4", "ppl_q1", "gain", "listen:", "try:    python sample.py"):
        assert part in output
    before = torch.get_rng_state()
    model, settings, codec = load_model(out / "best.pt")
    assert torch.equal(torch.get_rng_state(), before), "it draws no weights that would be replaced"
    assert settings.dim == 32 and codec["id"].startswith("tiny-K4")
    for step in (3, 6):
        free, continued = sorted((out / "samples" / f"step_{step:06d}").glob("*.wav"))
        assert continued.stem == free.stem + "_continued" and soundfile.info(free).duration == pytest.approx(1.0)


def test_the_cycle_has_the_order_of_the_reference(dataset, tmp_path, command):
    """Valid, best, evaluate, generate as often as asked, commit; what is told again on resuming."""
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--steps=10", "--epoch=2", "--evaluate_every=2"]
    args += ["--generate_every=3", "--keep_every=2", "--evaluate_clips=1"]
    assert command(train, *args)[0] == 0
    told = [(step, stage) for step, stage in stages(tmp_path) if stage != "best"]
    assert told == [
        (0, "valid"), (0, "commit"), (2, "valid"), (2, "commit"), (4, "valid"), (4, "evaluate"), (4, "commit"),
        (6, "valid"), (6, "generate"), (6, "commit"), (8, "valid"), (8, "evaluate"), (8, "commit"),
        (10, "valid"), (10, "evaluate"), (10, "generate"), (10, "commit"),
    ]  # fmt: skip
    history = lines(tmp_path / "history.jsonl")
    ce = [line["ce"] for line in history if line["stage"] == "valid"]
    best = [line["ce"] for line in history if line["stage"] == "best"]
    assert best == [ce[i] for i in range(1, 6) if ce[i] < min(ce[1:i], default=math.inf)]
    assert load(tmp_path / "best.pt")["ce"] == min(ce[1:])
    assert sorted(path.name for path in tmp_path.glob("step_*.pt")) == ["step_000004.pt", "step_000008.pt"]
    assert load(tmp_path / "step_000004.pt")["step"] == 4
    for line in history:
        if line["stage"] == "generate":
            (clip,) = line["clips"]
            assert {*clip} >= {"caption", "free", "continued", "codec", "reference"}
            keys = ("free", "continued", "codec", "reference")
            assert [soundfile.info(tmp_path / clip[key]).duration for key in keys] == [1.0] * 4
            assert 0 < clip["prompt_seconds"] <= 0.25
    again = command(train, *args, "--steps=11")[1]
    assert all(f"epoch {epoch}, step {2 * epoch}: valid ce " in again for epoch in range(6))
    assert (tmp_path / "index.html").read_text().count("<audio") >= 4


def test_a_run_begins_by_guessing(toy_run):
    first = lines(toy_run[0] / "history.jsonl")[0]
    assert (first["step"], first["stage"]) == (0, "valid") and first["ce"] == pytest.approx(math.log(512), rel=0.01)


def test_the_demo_makes_its_own_corpus(tmp_path, command):
    args = (*TOY, f"--data={tmp_path / 'demo'}", "--demo_clips=4", "--samples=0")
    Ranks("config/demo.py", *args, f"--out={tmp_path / 'out'}", ranks=1).finish()
    assert len(list((tmp_path / "demo_audio").glob("*.flac"))) == 4 and (tmp_path / "out" / "best.pt").exists()
    assert command(train, "config/demo.py", *args, f"--out={tmp_path / 'again'}")[0] == 0
    assert same_run(tmp_path / "out", tmp_path / "again"), "the start must not depend on who made the corpus"
    two = (*TOY, f"--data={tmp_path / 'two' / 'demo'}", "--demo_clips=4", "--samples=0", f"--out={tmp_path / 'by two'}")
    Ranks("config/demo.py", *two, ranks=2).finish()
    arrays = [path.relative_to(tmp_path) for path in sorted((tmp_path / "demo").glob("*.npy"))]
    assert all((tmp_path / "two" / path).read_bytes() == (tmp_path / path).read_bytes() for path in arrays) and arrays
    status, printed = command(train, "config/demo.py", *args, "--demo_clips=5", f"--out={tmp_path / 'five'}")
    assert status == 0 and "is of another corpus" in printed and '"clips": 5}); remove it' in printed


def test_the_average_of_the_weights_is_unbiased(dataset, tmp_path, command):
    """With every step's weights kept, the EMA is theirs, each weighing 0.7 of the next; the start has no part."""
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--epoch=1", "--keep_every=1", "--samples=0"]
    assert command(train, *args, "--ema_decay=0.7", "--lr=0.01")[0] == 0
    kept = [load(tmp_path / f"step_{step:06d}.pt") for step in range(1, 7)]
    weights = torch.tensor([0.7**age for age in reversed(range(6))])
    for name, average in kept[-1]["ema"].items():
        mean = sum(w * saved["model"][name] for w, saved in zip(weights / weights.sum(), kept))
        torch.testing.assert_close(average, mean, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("more", ["--epoch=3", "--epoch=100 --steps=2"])
def test_the_average_has_learned_before_it_is_used(more, dataset, tmp_path, command):
    """Its first update takes the weights as they are."""
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--keep_every=1", "--samples=0", "--ema_every=10"]
    assert command(train, *args, *more.split())[0] == 0
    first = load(min(tmp_path.glob("step_*.pt")))
    assert first["ema_updates"] == 1
    assert all(torch.equal(weight, first["ema"][name]) for name, weight in first["model"].items())


def test_any_kept_checkpoint_plays_by_its_averaged_weights(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--keep_every=1", "--samples=0"]
    assert command(train, *args)[0] == 0
    saved, (model, *_) = load(tmp_path / "step_000003.pt"), load_model(tmp_path / "step_000003.pt")
    assert all(torch.equal(weight, saved["ema"][name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_loggers_are_told_what_the_files_are(name, dataset, tmp_path, command, monkeypatch):
    told, opened = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            assert folder == tmp_path / "tensorboard"
            opened.append(purge_step)

        def add_scalar(self, key, value, step):
            told.append((key, step))

    class Run:
        def log(self, values, step):
            told.extend((key, step) for key in values)

    wandb = types.SimpleNamespace(init=lambda **about: opened.append(about) or Run())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", f"--logger={name}", "--evaluate_clips=1"]
    for steps in (6, 8):
        assert command(train, *args, f"--steps={steps}")[0] == 0
    assert [step for key, step in told if key == "train/ce"] == list(range(1, 9))
    assert [step for key, step in told if key == "valid/ce_q4"] == [0, 3, 6, 8]
    assert [step for key, step in told if key == "evaluate/fad"] == [6, 8]
    assert {key for key, _ in told} >= {"train/ppl_q1", "valid/ppl", "valid/unigram_q2", "train/grad_norm"}
    assert opened == [-1, 6] if name == "tensorboard" else opened[1]["resume"] == "allow"


def test_speed_and_mfu_by_a_clock_that_is_known(dataset, tmp_path, command, monkeypatch):
    now, usual = [100.0], torch.nn.utils.clip_grad_norm_

    def two_seconds(*args):
        now[0] += 2
        return usual(*args)

    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", two_seconds)
    monkeypatch.setattr(common, "peak_flops", lambda device, dtype: 1e10)
    status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}", "--log_every=2", "--samples=0")
    assert status == 0, output
    flops = load_model(tmp_path / "best.pt")[0].requires_grad_(True).flops()
    for line in lines(tmp_path / "metrics.jsonl"):  # the one of step 4 counts from step 3, where an epoch ended
        assert line["tokens_per_s"] == 4 * 4 * 50 / 2 and line["data_wait"] == 0
        assert line["mfu"] == pytest.approx(4 * flops / 2 / 1e10, abs=1e-4)


# Learning


def test_the_share_of_padding_is_said(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", "--steps=1", "--epoch=1", "--samples=0"]
    assert "of its items is padding" not in command(train, *args, f"--out={tmp_path / 'a'}")[1]
    _, output = command(train, *args, f"--out={tmp_path / 'b'}", "--segment=14")
    assert re.search(r"\n[45]\d% of its items is padding, as tracks are shorter than 14 s; lower --segment\n", output)


def test_one_batch_is_learned_by_heart(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--one_batch=True", "--steps=120", "--epoch=120"]
    args += ["--dim=64", "--lr=0.01", "--batch_size=1", "--cfg_dropout=0", "--clip=0"]
    assert command(train, *args)[0] == 0
    log = lines(tmp_path / "metrics.jsonl")
    assert log[0]["ce"] > 6 and log[-1]["ce"] < 0.3


def test_micro_batches_add_up_to_the_batch(dataset, tmp_path, command):
    for size in (4, 1):
        args = [*TOY, f"--data={dataset}", f"--out={tmp_path / str(size)}", f"--micro_batch={size}"]
        assert command(train, *args)[0] == 0
    for a, b in zip(lines(tmp_path / "4" / "metrics.jsonl"), lines(tmp_path / "1" / "metrics.jsonl")):
        assert a["ce"] == pytest.approx(b["ce"], rel=1e-5) and a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    a, b = (load(tmp_path / size / "last.pt")["model"] for size in "41")
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_codebook_weights_change_the_gradient_and_not_the_loss_that_is_logged(dataset, tmp_path, command):
    """Doubling all weights changes nothing, as their mean counts; a codebook of weight 0 is not learned."""
    found = {}
    for weights in ("", "1,1,1,1", "2,2,2,2", "4,0,0,0"):
        out = tmp_path / f"w{weights}"
        args = [*TOY, f"--data={dataset}", f"--out={out}", "--samples=0", "--one_batch=True", "--steps=20"]
        assert command(train, *args, f"--codebook_weights={weights}")[0] == 0
        found[weights] = lines(out / "metrics.jsonl")
    same = ("ce", "ce_q1", "ce_q4", "grad_norm")
    for weights in ("1,1,1,1", "2,2,2,2"):
        assert [[line[key] for key in same] for line in found[weights]] == [
            [line[key] for key in same] for line in found[""]
        ]
    plain, first_only = found[""], found["4,0,0,0"]
    assert first_only[0]["ce"] == plain[0]["ce"] and first_only[0]["grad_norm"] != plain[0]["grad_norm"]
    fall = {key: [run[0][key] - run[-1][key] for run in (plain, first_only)] for key in ("ce_q1", "ce_q4")}
    assert min(fall["ce_q1"]) > 0.2 and fall["ce_q4"][0] > 0.2 and abs(fall["ce_q4"][1]) < 0.05, fall


def test_weight_decay_is_for_matrices_only():
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = train.make_optimizer(model, Settings(weight_decay=0.5))
    train.set_learning_rate(optimizer, 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.dim() > 1 else 1.0), msg=name)


@pytest.mark.parametrize("path", CONFIGS)
def test_every_config_trains_a_step(path, dataset, tmp_path, command):
    status, output = command(
        train, path, *SMALL, f"--data={dataset}", f"--out={tmp_path}", "--batch_size=4", "--micro_batch=2", "--steps=1",
        "--epoch=1", "--samples=1", "--evaluate_clips=0", "--valid_items=4", "--device=cpu",
    )  # fmt: skip
    assert status == 0 and (tmp_path / "best.pt").exists(), output


def test_the_caption_probe_runs_at_the_end(dataset, tmp_path, command):
    status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}", "--evaluate_clips=2")
    assert status == 0 and re.search(r"cfg 3( +\d\.\d\d){3,}\n", output), output
    (line,) = [line for line in lines(tmp_path / "history.jsonl") if line["stage"] == "evaluate"]
    assert set(line["adherence"]["drums"]) == {"chance", "real", "cfg 3", "cfg 1", "nothing"}


# Stopping and resuming


def signal_at(monkeypatch, stop):
    """Makes the next run get one SIGTERM while it works on step `stop`."""
    usual, sent = train.learning_rate, []

    def learning_rate(step, s):
        if step == stop - 1 and not sent:
            sent.append(signal.raise_signal(signal.SIGTERM))
        return usual(step, s)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


def test_stopped_in_mid_epoch_and_resumed_it_ends_bit_for_bit_the_same(dataset, tmp_path):
    common = [*TOY, f"--data={dataset}", "--steps=60", "--epoch=40", "--log_every=3", "--melody=True", "--style=True"]
    whole = Ranks(*common, f"--out={tmp_path / 'whole'}", ranks=1)
    parts = Ranks(*common, f"--out={tmp_path / 'parts'}", ranks=1)
    parts.wait_for(tmp_path / "parts" / "metrics.jsonl", 2)
    parts.send(signal.SIGTERM)
    output = parts.finish(status=128 + signal.SIGTERM)
    stopped = int(re.search(r"stopped at step (\d+); to resume: python train.py", output)[1])
    assert 6 <= stopped < 60 and stopped != 40, "the test is about stopping within an epoch"
    assert f"at step {stopped}" in Ranks(*common, f"--out={tmp_path / 'parts'}", ranks=1).finish()
    whole.finish()
    for name in ("last.pt", "best.pt"):
        assert same_run(tmp_path / "whole", tmp_path / "parts", name), name
    for name in ("metrics.jsonl", "history.jsonl"):
        assert untimed(tmp_path / "whole" / name) == untimed(tmp_path / "parts" / name), name


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_training_on_a_cpu_keeps_the_memory_that_it_frees(command, tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(common, "keep_freed_memory", lambda: called.append(True))
    assert command(train, f"--data={tmp_path}", "--device=cpu")[0] == 2 and called
    grow = "import common, torch; from tools.bench import resident; {}; before = resident()\n"
    grow += "tensor = torch.ones(2**25); del tensor; print((resident() - before) // 2**20)"
    kept, given_back = (int(finish(start("-c", grow.format(how)))) for how in ("common.keep_freed_memory()", "pass"))
    assert kept > 100 > 30 > given_back, "of 128 MiB"


def test_a_second_ctrl_c_alone_ends_a_run_at_once():
    signals = []
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        train.request_stop(signals, number, None)
    with pytest.raises(KeyboardInterrupt):
        train.request_stop(signals, signal.SIGINT, None)


def test_a_run_that_ended_while_another_was_starting_is_not_begun_again(
    toy_run, dataset, tmp_path, command, monkeypatch
):
    usual, out = common.lock, tmp_path / "out"

    def lock(folder):  # as the other run ends
        shutil.copytree(toy_run[0], out, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
        usual(folder)

    monkeypatch.setattr(common, "lock", lock)
    status, printed = command(train, *TOY, f"--data={dataset}", f"--out={out}")
    assert status == 2 and "another run has saved there meanwhile; start again" in printed
    assert (out / "last.pt").read_bytes() == (toy_run[0] / "last.pt").read_bytes()


@pytest.mark.parametrize("change", [[], ["--valid_items=3"]])
def test_the_best_on_other_data_is_sought_anew(toy_run, own_dataset, tmp_path, command, change):
    shutil.copytree(toy_run[0], tmp_path / "out")
    lines_of = (tmp_path / "out" / "history.jsonl").read_text().replace('"ce": ', '"ce": 1e-9, "was": ')
    (tmp_path / "out" / "history.jsonl").write_text(lines_of)  # so good that nothing is better
    meta = json.loads((own_dataset / "meta.json").read_text())
    meta["checksums"]["counts.npy"] += not change
    (own_dataset / "meta.json").write_text(json.dumps(meta))
    last = int(load(tmp_path / "out" / "last.pt")["step"])
    args = (*TOY, f"--data={own_dataset}", f"--out={tmp_path / 'out'}", f"--steps={last + 3}", *change)
    assert ("holds other data than before" in command(train, *args)[1]) == (not change)
    assert load(tmp_path / "out" / "best.pt")["step"] == last + 3


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_resumed_run_lets_go_of_the_checkpoint_that_it_began_from(toy_run, dataset, tmp_path, command, monkeypatch):
    """Which it maps: a file that is replaced and still mapped keeps its room on the disk."""
    mapped, usual = [], common.save_checkpoint

    def save_checkpoint(*args, **state):
        mapped.append("last.pt" in Path("/proc/self/maps").read_text())
        usual(*args, **state)

    monkeypatch.setattr(common, "save_checkpoint", save_checkpoint)
    shutil.copytree(toy_run[0], tmp_path / "out")
    more = int(load(tmp_path / "out" / "last.pt")["step"]) + 2
    assert command(train, *TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", f"--steps={more}")[0] == 0
    assert mapped and not any(mapped)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_resumes_bit_for_bit_too(dtype, dataset, tmp_path, command, monkeypatch):
    """For float16 with a loss scale that overflows at first, so that steps are skipped before and after the stop."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**32))
    number = signal.SIGHUP if dtype == "float16" else signal.SIGTERM
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup may have started the tests
    common = [*TOY, f"--data={dataset}", f"--dtype={dtype}", "--steps=24", "--epoch=12", "--samples=0", "--log_every=5"]
    common += ["--melody=True", "--style=True"]
    assert command(train, *common, f"--out={tmp_path / 'whole'}")[0] == 0
    with monkeypatch.context() as patch:
        usual, calls = torch.nn.utils.clip_grad_norm_, []

        def clip(*args):
            calls.append(1)
            if len(calls) == 4:
                signal.raise_signal(number)
                signal.raise_signal(signal.SIGTERM)  # to a process and to its group, as schedulers do
            return usual(*args)

        patch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        status, output = command(train, *common, f"--out={tmp_path / 'parts'}")
        assert status == 128 + number and "stopped at step 4" in output
    assert command(train, *common, f"--out={tmp_path / 'parts'}")[0] == 0
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (untimed(tmp_path / side / "metrics.jsonl") for side in ("whole", "parts"))
    assert whole == parts
    if dtype == "float16":
        saved = load(tmp_path / "whole" / "last.pt")
        assert 4 < whole[-1]["skipped"] == saved["skipped"] < 16 and saved["scaler"]["scale"] < 2.0**32
        assert saved["ema_updates"] == 24 - saved["skipped"]
        assert whole[-1]["ce"] < 6.24 and all(math.isfinite(line["ce"] + line["grad_norm"]) for line in whole)


@pytest.mark.parametrize("stage", ["validate", "write_samples"])
def test_a_signal_while_an_epoch_ends_loses_nothing(stage, dataset, tmp_path, command, monkeypatch):
    args = [*TOY, f"--data={dataset}", "--generate_every=1"]
    assert command(train, *args, f"--out={tmp_path / 'whole'}")[0] == 0
    module = train if stage == "validate" else metrics
    usual, calls = getattr(module, stage), []

    def interrupted(*rest):
        calls.append(1)
        if len(calls) == (2 if stage == "validate" else 1):  # step 0 validates too
            signal.raise_signal(signal.SIGTERM)
        return usual(*rest)

    monkeypatch.setattr(module, stage, interrupted)
    status, output = command(train, *args, f"--out={tmp_path / 'parts'}")
    assert status == 128 + signal.SIGTERM and "stopped at step 3" in output
    monkeypatch.setattr(module, stage, usual)
    assert command(train, *args, f"--out={tmp_path / 'parts'}")[0] == 0
    for name in ("last.pt", "best.pt"):
        assert same_run(tmp_path / "whole", tmp_path / "parts", name)
    assert untimed(tmp_path / "whole" / "history.jsonl") == untimed(tmp_path / "parts" / "history.jsonl")


def die_at(stage):
    setattr(metrics, stage, lambda *rest: os.kill(os.getpid(), signal.SIGKILL))


@pytest.mark.parametrize("stage", ["evaluate", "write_samples"])
def test_what_a_kill_cut_off_is_done_again_once(stage, dataset, tmp_path, command, monkeypatch):
    args = [*TOY, f"--data={dataset}", "--evaluate_every=1", "--evaluate_clips=1", "--keep_every=1"]
    assert command(train, *args, f"--out={tmp_path / 'whole'}")[0] == 0

    dies = functools.partial(die_at, stage)
    Ranks(*args, f"--out={tmp_path / 'parts'}", ranks=1, before=dies).finish(status=-signal.SIGKILL)
    assert load(tmp_path / "parts" / "last.pt")["step"] == 3 and stages(tmp_path / "parts")[-1][1] != "commit"
    assert command(train, *args, f"--out={tmp_path / 'parts'}")[0] == 0
    assert same_run(tmp_path / "whole", tmp_path / "parts") and stages(tmp_path / "whole") == stages(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("step_*.pt"))) == 2


def test_a_run_whose_output_nobody_reads_any_more_saves_and_stops(dataset, tmp_path):
    """As after ctrl-C in `python train.py ... | tee log`, which ends tee first."""
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--steps=100000", "--epoch=50000", "--samples=0"]
    process = start("train.py", *args)
    try:
        assert any("tokens/s" in line for line in process.stdout)  # of the bar, once it has a step to tell of
        process.stdout.close()
        assert process.wait(timeout=240) == 128 + signal.SIGTERM
    finally:
        process.kill()
    last = load(tmp_path / "out" / "last.pt")
    assert 0 < last["step"] < 50000 and last["step"] == lines(tmp_path / "out" / "metrics.jsonl")[-1]["step"]


def test_a_run_without_hangup_goes_on_when_its_terminal_is_closed(dataset, tmp_path):
    """As after `disown`: the terminal's SIGHUP does not reach it, but what it prints has nowhere to go."""
    terminal, side_of_the_run = os.openpty()
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--steps=200", "--epoch=100", "--samples=0"]
    process = start("train.py", *args, stdout=side_of_the_run)
    os.close(side_of_the_run)
    try:
        with open(terminal, errors="replace") as output:
            assert any("step 0: commit" in line for line in output)
        assert process.wait(timeout=240) == 0
    finally:
        process.kill()
    assert load(tmp_path / "out" / "last.pt")["step"] == 200


def test_a_second_ctrl_c_ends_at_once(dataset, tmp_path, command, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *rest: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}")
    assert status == 130 and "interrupted" in output


def test_settings_of_the_optimizer_may_change_on_resuming(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    status, output = command(train, *args, "--steps=8", "--weight_decay=0.3", "--beta1=0.8", "--min_lr=0.0001")
    assert status == 0 and "weight_decay was 0.1, is 0.3" in output and "resuming from" in output
    status, output = command(train, *args, "--steps=9", "--freeze=blocks.0.*")  # whose state is kept as it was
    assert status == 0, output
    assert {"blocks.0.qkv.weight", "blocks.1.qkv.weight"} & load(tmp_path / "last.pt")["optimizer"].keys() == {
        "blocks.1.qkv.weight"
    }


def test_a_finished_run_is_not_measured_twice(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--evaluate_clips=2"]
    first, again = command(train, *args), command(train, *args)
    assert first[0] == again[0] == 0 and "fad" in again[1] and "generating" not in again[1]
    assert len([line for line in lines(tmp_path / "history.jsonl") if line["stage"] == "evaluate"]) == 1
    before = (tmp_path / "last.pt").read_bytes()
    assert command(train, *args, "--steps=4")[0] == 0, "fewer steps than are done: nothing is left to do"
    assert (tmp_path / "last.pt").read_bytes() == before


def test_a_log_line_cut_by_a_kill_is_dropped(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}"]
    assert command(train, *args)[0] == 0
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "ce": 5.1}\n{"step": 8, "ce": 5.')
    assert command(train, *args, "--steps=8")[0] == 0
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == list(range(1, 9))


def test_a_folder_whose_last_is_gone_is_refused(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    (tmp_path / "last.pt").unlink()
    before = (tmp_path / "best.pt").read_bytes()
    status, output = command(train, *args)
    assert status == 2 and "holds a run without last.pt; choose another --out" in output
    assert (tmp_path / "best.pt").read_bytes() == before


def test_a_new_run_may_start_with_the_weights_of_another(dataset, own_dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", "--samples=0"]
    assert command(train, *args, f"--out={tmp_path / 'a'}", "--lr=0.01")[0] == 0
    parent = load(tmp_path / "a" / "best.pt")
    (own_dataset / "tokenizer.model").write_bytes(prepare.train_tokenizer([], 300))
    begin = [*args, f"--data={own_dataset}", f"--out={tmp_path / 'b'}", f"--init_from={tmp_path / 'a' / 'best.pt'}"]
    status, output = command(train, *begin, "--lr=1e-9")
    assert status == 0 and f"not by {own_dataset}'s own tokenizer" in output, output
    child = load(tmp_path / "b" / "last.pt")
    assert child["step"] == 6 and child["tokenizer"] == parent["tokenizer"]
    for name, weight in parent["ema"].items():
        torch.testing.assert_close(child["model"][name], weight, rtol=0, atol=1e-6)
    (tmp_path / "a" / "best.pt").unlink()
    assert "resuming from" in command(train, *begin, "--steps=8")[1], "the parent is needed only at the start"


# Steps that go wrong


def test_a_run_that_diverges_ends_before_the_good_weights_are_lost(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    status, output = command(train, *args, "--steps=60", "--epoch=60", "--lr=30")
    assert status == 2 and re.search(r"step \d+: loss \d{3,}.*The weights were not touched", output)
    status, output = command(train, *args, "--steps=12", "--lr=1e11", "--clip=0")
    (said,) = [line for line in output.splitlines() if "error:" in line]
    assert status == 2 and re.search(r"step [789]: loss (nan|inf).*last.pt is from an earlier step", said)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert command(train, *args, "--steps=8", "--lr=1e-4")[0] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(dtype, dataset, tmp_path, command, monkeypatch):
    """Weights, EMA, the optimizer's state and style's codebooks stay as they were, and the run continues."""
    usual, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, most):
        calls.append(1)
        parameters = list(parameters)
        if len(calls) in (3, 4):
            parameters[0].grad.fill_(math.inf)
        return usual(parameters, most)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", f"--dtype={dtype}", "--epoch=1", "--keep_every=1"]
    status, output = command(train, *args, "--samples=0", "--style=True", "--style_dropout=0", "--cfg_dropout=0")
    assert status == 0, output
    kept = {step: load(tmp_path / f"step_{step:06d}.pt") for step in range(1, 7)}
    for key in ("model", "ema"):
        for name, tensor in kept[2][key].items():
            assert torch.equal(tensor, kept[4][key][name]), name
    for name, state in kept[2]["optimizer"].items():
        assert all(torch.equal(state[key], kept[4]["optimizer"][name][key]) for key in state), name
    assert not torch.equal(kept[4]["model"]["heads.weight"], kept[5]["model"]["heads.weight"])
    moved = "conditioner.prepended.style.vq.counts"
    assert not torch.equal(kept[4]["model"][moved], kept[5]["model"][moved])
    log = {line["step"]: line["skipped"] for line in lines(tmp_path / "metrics.jsonl")}
    assert log[2] == 0 and log[5] == log[6] == 2 and [kept[step]["skipped"] for step in (2, 3, 4)] == [0, 1, 2]


def test_sixteen_skipped_steps_in_a_row_end_the_run(dataset, tmp_path, command, monkeypatch):
    usual, calls = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, most):
        calls.append(1)
        return usual(parameters, most) * (math.nan if len(calls) > 2 and len(calls) != 18 else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--steps=60", "--epoch=60", "--samples=0"]
    status, output = command(train, *args)
    assert status == 2 and re.search(r"step 34: loss [\d.]+, gradient norm nan", output), output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_gpu_run(dataset, tmp_path, dtype):
    finish(start("train.py", *TOY, f"--data={dataset}", f"--out={tmp_path}", "--device=cuda", f"--dtype={dtype}"))
    log = lines(tmp_path / "metrics.jsonl")
    assert log[-1]["ce"] < log[0]["ce"]


def run_on_gpu(out, *words, launch=()):
    """-> ce by step, of a toy run with all conditions and captions of many lengths."""
    more = ["--device=cuda", "--melody=True", "--style=True", "--word_dropout=0.5", "--cfg_dropout=0.5", "--steps=12"]
    finish(start(*launch, "train.py", *TOY, *more, "--epoch=6", "--samples=0", f"--out={out}", *words))
    return [line["ce"] for line in lines(out / "metrics.jsonl")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_compiled_it_takes_captions_of_any_length_and_resumes(dataset, tmp_path):
    eager = run_on_gpu(tmp_path / "eager", f"--data={dataset}", "--compile=never", "--keep_every=1")
    assert run_on_gpu(tmp_path / "compiled", f"--data={dataset}", "--compile=always") == pytest.approx(eager, rel=0.02)
    (tmp_path / "parts").mkdir()
    (tmp_path / "eager" / "step_000006.pt").rename(tmp_path / "parts" / "last.pt")
    assert run_on_gpu(tmp_path / "parts", f"--data={dataset}", "--compile=never") == pytest.approx(eager[6:], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("more", ["--parallel=ddp", "--parallel=fsdp", "--parallel=fsdp --compile=always"])
def test_gpu_two_are_one(more, dataset, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    one = run_on_gpu(tmp_path / "one", f"--data={dataset}", "--compile=never")
    two = run_on_gpu(tmp_path / "two", f"--data={dataset}", "--compile=never", *more.split(), launch=launch)
    assert two == pytest.approx(one, rel=0.02)
