"""Several processes are one run: the same losses as one process, exact resume, and an end that is never silent."""

import concurrent.futures
import json
import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import distributed
import numpy as np
import pytest
import torch
from checkpoint import save_checkpoint
from conftest import ROOT, TOY, finish, start, without_checksums
from test_train import lines, same_run, untimed

import train
from config import UserError, check_sizes

KILLS = int(os.environ.get("KILLS", 1))  # 50 take about ten minutes


@pytest.fixture(scope="module")
def uneven(dataset, tmp_path_factory):
    """The toy data with short tracks, so that micro-batches and ranks differ in how many positions count."""
    folder = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("uneven") / "data"))
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "valid"):
        tracks = lines(folder / f"{split}_000.jsonl")
        for i, track in enumerate(tracks):
            track["frames"] = 20 + 13 * i if i % 3 else track["frames"]
        (folder / f"{split}_000.jsonl").write_text("".join(json.dumps(track) + "\n" for track in tracks))
        meta[split]["frames"] = sum(track["frames"] for track in tracks)
    (folder / "meta.json").write_text(json.dumps(meta))
    return without_checksums(folder)


def close(a, b, tolerance):
    """Two state dicts of the same names and shapes, with all tensors within `tolerance`; large ones, of their size."""
    assert a.keys() == b.keys()
    for key in a:
        allowed = tolerance * max(1.0, float(b[key].abs().max()))
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=allowed, msg=lambda text, key=key: f"{key}: {text}")


WAYS = {
    "1": (1, "--micro_batch=0"),
    "1 in micro-batches": (1, "--micro_batch=1"),
    "2 by ddp": (2, "--parallel=ddp", "--micro_batch=1"),
    "4 by ddp": (4, "--parallel=ddp", "--evaluate_clips=0"),
    "2 by fsdp": (2, "--parallel=fsdp", "--micro_batch=1", "--activation_checkpointing=True"),
    "4 by fsdp": (4, "--parallel=fsdp", "--reshard_after_forward=False", "--evaluate_clips=0"),
}


def test_the_same_run_on_1_2_and_4_processes(uneven, tmp_path, command):
    common = [*TOY, f"--data={uneven}", "--steps=20", "--epoch=10", "--ema_every=2", "--valid_items=5",
              "--cfg_dropout=0.3", "--merge_text_p=0.5", "--word_dropout=0.2", "--samples=3", "--generate_every=0",
              "--evaluate_clips=3", "--melody=True", "--style=True", "--style_dropout=0.3"]  # fmt: skip
    runs = {way: start("train.py", *common, f"--out={tmp_path / way}", *more, ranks=ranks)
            for way, (ranks, *more) in WAYS.items() if ranks > 1}  # fmt: skip
    printed = {way: command(train, *common, f"--out={tmp_path / way}", *more)[1]
               for way, (ranks, *more) in WAYS.items() if ranks == 1}  # fmt: skip
    printed |= {way: finish(run) for way, run in runs.items()}
    one, *others = (tmp_path / way for way in WAYS)
    (count,) = re.findall(r"([\d.]+M parameters) on 1 x cpu", printed["1"])
    for out in others:
        assert f"{count} on {WAYS[out.name][0]} x cpu" in printed[out.name]
        for log in ("metrics.jsonl", "history.jsonl"):
            a, b = lines(one / log), lines(out / log)
            if "--evaluate_clips=0" in WAYS[out.name]:
                a = [line for line in a if line.get("stage") != "evaluate"]
            assert len(a) == len(b)
            for ours, theirs in zip(a, b):
                for key in {"ce", "grad_norm", "gain"} & ours.keys():
                    assert ours[key] == pytest.approx(theirs[key], abs=5e-6), (out.name, ours["step"], key)
                for key in {"ce_q", "unigram_q"} & ours.keys():
                    assert ours[key] == pytest.approx(theirs[key], abs=1e-5), (out.name, ours["step"], key)
                assert ours.get("clips") == theirs.get("clips")
                if ours.get("stage") == "evaluate":
                    assert ours["fad"] == pytest.approx(theirs["fad"], rel=0.02)
                    assert ours["adherence"] == theirs["adherence"]
        for name in ("last.pt", "best.pt"):
            a, b = (torch.load(folder / name, weights_only=True) for folder in (one, out))
            close(a["model"], b["model"], 1e-5)
        a, b = (torch.load(folder / "last.pt", weights_only=True) for folder in (one, out))
        close(a["ema"], b["ema"], 1e-5)
        assert a["optimizer"]["state"].keys() == b["optimizer"]["state"].keys()
        for clip in lines(out / "history.jsonl")[-1]["clips"]:
            assert (out / clip["free"]).exists() and (out / clip["continued"]).exists()


def wait_for(path, count, process):
    """Until a log has `count` lines."""
    while not (path.exists() and len(path.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_stopped_on_two_it_goes_on_exactly_on_two_and_to_rounding_on_one(dataset, tmp_path, command):
    """With FSDP; that DDP goes on exactly is part of the next test."""
    common = [*TOY, f"--data={dataset}", "--steps=60", "--epoch=40", "--parallel=fsdp", "--samples=0"]
    whole = start("train.py", *common, f"--out={tmp_path / 'whole'}", ranks=2)
    parts = start("train.py", *common, f"--out={tmp_path / 'parts'}", ranks=2)
    wait_for(tmp_path / "parts" / "metrics.jsonl", 3, parts)
    parts.send_signal(signal.SIGTERM)
    printed = parts.communicate(timeout=60)[0]
    stopped = int(re.search(r"committed at step (\d+); to go on: torchrun --nproc_per_node=2 train.py", printed)[1])
    assert 3 <= stopped < 60 and stopped != 40, "the test is about stopping within an epoch"
    shutil.copytree(tmp_path / "parts", tmp_path / "one")
    on_two = start("train.py", *common, f"--out={tmp_path / 'parts'}", ranks=2)
    status, printed = command(train, *common, f"--out={tmp_path / 'one'}")
    assert status == 0 and f"at step {stopped}" in printed
    for process in (whole, on_two):
        finish(process)
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    a, c = (torch.load(tmp_path / side / "last.pt", weights_only=True) for side in ("whole", "one"))
    close(a["model"], c["model"], 1e-4)
    close(a["ema"], c["ema"], 1e-4)


def test_killed_at_random_moments_it_loses_nothing_but_time(dataset, tmp_path):
    """kill -9 of one rank, of all, or of torchrun too, in training, validation, sampling or saving."""
    rng, steps, out, cut = random.Random(0), 10 * KILLS + 20, tmp_path / "parts", 0
    common = [*TOY, f"--data={dataset}", f"--steps={steps}", "--epoch=2", "--keep_every=5", "--watchdog=20"]
    whole = start("train.py", *common, f"--out={tmp_path / 'whole'}", ranks=2)
    printed = concurrent.futures.ThreadPoolExecutor(1).submit(whole.communicate)  # a full pipe would hold it up

    def committed():
        return torch.load(out / "last.pt", weights_only=True)["step"] if (out / "last.pt").exists() else 0

    for kill in range(KILLS):
        before, log = committed(), out / "metrics.jsonl"
        log.unlink(missing_ok=True) if not before else log.write_text(  # without what the last kill left uncommitted
            "".join(log.read_text().splitlines(keepends=True)[:before])
        )
        run = start("train.py", *common, f"--out={out}", ranks=2)
        while not (log.exists() and len(log.read_text().splitlines()) > before) and run.poll() is None:
            time.sleep(0.01)
        while kill == 0 and not committed() and run.poll() is None:  # so that there is something to go on from
            time.sleep(0.01)
        saving, until = kill % 2 == 0, time.time() + rng.uniform(0, 1)
        while run.poll() is None and time.time() < until + saving and not (saving and any(out.glob("*t.tmp"))):
            time.sleep(0 if saving else 0.01)
        workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split() if run.poll() is None else []
        for victim in rng.choice([workers, workers[:1], workers[1:]]):
            os.kill(int(victim), signal.SIGKILL)
        if rng.random() < 0.5 and run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
        run.communicate(timeout=60)
        cut += any(out.glob("*t.tmp"))  # last.tmp or best.tmp
        assert committed() >= before, "a commit was lost"
    print(f"{KILLS} kills up to step {committed()} of {steps}, {cut} of them while a checkpoint was being written")
    before, last = committed(), start("train.py", *common, f"--out={out}", ranks=2)
    said, _ = last.communicate()
    assert last.returncode == 0 and before and f"going on from {out / 'last.pt'} at step {before}" in said
    assert printed.result() and whole.returncode == 0
    assert same_run(tmp_path / "whole", out)
    for name in ("metrics.jsonl", "history.jsonl"):
        assert untimed(tmp_path / "whole" / name) == untimed(out / name)
    kept = [f"step_{step:06d}.pt" for step in range(10, steps + 1, 10)]
    assert sorted(path.name for path in out.glob("*.pt")) == ["best.pt", "last.pt", *kept]


def start_pair(*args, second=(), ranks=(0, 1), cwd=(ROOT, ROOT)):
    """Two ranks without torchrun, which would take half a minute to kill a stopped one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launch = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    return [start(ROOT / "train.py", *args, *(second if rank else ()), cwd=cwd[rank], RANK=str(rank), **launch)
            for rank in ranks]  # fmt: skip


@pytest.mark.parametrize("number, said", [
    (signal.SIGSTOP, r"watchdog: rank 1, step \d+, .*: no progress for 3 s; the run ends here"),
    (signal.SIGKILL, r"watchdog: rank 1, step \d+, .*: has died"),
])  # fmt: skip
def test_a_rank_that_hangs_or_dies_ends_the_run_by_name(dataset, tmp_path, number, said):
    endless = ("--steps=100000", "--epoch=100000", "--watchdog=3")
    pair = start_pair(*TOY, f"--data={dataset}", f"--out={tmp_path}", *endless)
    wait_for(tmp_path / "metrics.jsonl", 3, pair[0])
    pair[1].send_signal(number)
    output = finish(pair[0], status=1)
    assert re.search(said, output), output
    pair[1].kill()
    pair[1].communicate()


def test_a_rank_that_never_starts_ends_the_run_by_name_and_a_suspended_job_does_not(dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", "--steps=100000", "--epoch=100000"]
    (alone,) = start_pair(*args, f"--out={tmp_path / 'alone'}", "--watchdog=4", ranks=[0])
    pair = start_pair(*args, f"--out={tmp_path / 'pair'}", "--watchdog=8")
    log = tmp_path / "pair" / "metrics.jsonl"
    wait_for(log, 3, pair[0])
    for process in pair:
        process.send_signal(signal.SIGSTOP)
    time.sleep(10)
    for process in pair:
        process.send_signal(signal.SIGCONT)
    wait_for(log, len(lines(log)) + 100, pair[0])
    for process in pair:
        process.send_signal(signal.SIGTERM)
    assert "stopped and committed" in finish(pair[0], status=128 + signal.SIGTERM)
    finish(pair[1], status=128 + signal.SIGTERM)
    assert "watchdog: rank 1, step 0, not there yet: no progress for 4 s; the run ends" in finish(alone, status=1)


def test_the_ranks_to_blame_are_those_that_wait_for_none():
    steps = [(7, 3, "optimizer", True), (7, 2, "forward and backward", False), (7, 3, "optimizer", True)]
    assert distributed.least_far(steps) == [1]
    assert distributed.least_far([(8, 1, "", True), (7, 9, "", True)]) == [1], "all wait: the one that is behind"
    assert distributed.least_far([(0, 0, "not there yet", False), (0, 5, "starting", False)]) == [0]


def test_float16_skips_the_same_steps_on_every_rank(uneven, tmp_path):
    """The loss scale begins so high that gradients overflow, with FSDP on some ranks' shards only.

    One process skips fewer steps, as each of two has half the items with twice the loss.
    """
    program = tmp_path / "overflowing.py"
    program.write_text(f"""
import functools, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**34)
import config, distributed, train
config.run(train.main, distributed.first_to_say, distributed.exit)
""")
    args = [*TOY, f"--data={uneven}", "--dtype=float16", "--steps=20", "--epoch=20", "--samples=0"]
    runs = [start(program, *args, f"--out={tmp_path / str(i)}", f"--parallel={way}", ranks=ranks)
            for i, (way, ranks) in enumerate((("ddp", 1), ("ddp", 2), ("fsdp", 2)))]  # fmt: skip
    for run in runs:
        finish(run)
    one, ddp, fsdp = (lines(tmp_path / str(i) / "metrics.jsonl") for i in range(3))
    assert 4 < one[-1]["skipped"] <= ddp[-1]["skipped"] < 19
    assert [(line["step"], line["skipped"]) for line in ddp] == [(line["step"], line["skipped"]) for line in fsdp]
    assert [line["ce"] for line in ddp] == pytest.approx([line["ce"] for line in fsdp], abs=2e-3)
    assert one[-1]["ce"] == pytest.approx(ddp[-1]["ce"], abs=0.01)


def test_fsdp_goes_on_after_an_epoch_without_improvement(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", "--steps=6", "--epoch=1", "--samples=0", "--lr=0.5", "--warmup=0"]
    runs = [start("train.py", *args, "--parallel=fsdp", f"--reshard_after_forward={resharding}",
                  f"--out={tmp_path / str(resharding)}", ranks=2) for resharding in (True, False)]  # fmt: skip
    assert command(train, *args, f"--out={tmp_path / 'one'}")[0] == 0
    for run in runs:
        finish(run)
    one, *two = ([line["ce"] for line in lines(tmp_path / out / "history.jsonl")] for out in ("one", "True", "False"))
    assert one == pytest.approx(two[0], rel=1e-3) and one == pytest.approx(two[1], rel=1e-3) and min(one) < one[-1]


def test_an_error_that_one_rank_meets_is_one_line(dataset, tmp_path, command):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    (tmp_path / "history.jsonl").write_text("{\n")
    printed = finish(start("train.py", *args, ranks=2), status=1).partition("torch/distributed/elastic")[0]
    assert printed.count("history.jsonl: not JSON") == 1 and "rank0" not in printed and "watchdog" not in printed


def test_ranks_that_see_other_data_or_another_folder_are_refused(dataset, tmp_path):
    homes = [tmp_path / "0", tmp_path / "1"]
    for home in homes:
        shutil.copytree(dataset, home / "data")
    args = [*TOY, "--data=data", "--out=out", "--device=cpu"]
    unshared = start_pair(*args, cwd=homes)
    printed = "".join(finish(process, status=2) for process in unshared)
    assert "out: not one folder for all: rank 1 does not see what rank 0 writes" in printed
    np.save(homes[1] / "data" / "counts.npy", np.load(dataset / "counts.npy") + 1)
    printed = "".join(finish(process, status=2) for process in start_pair(*args, cwd=homes))
    assert "the processes of one run need the same settings: content_of_the_data is" in printed


def test_metrics_on_two_processes_are_those_of_one(toy_run, tmp_path):
    for ranks in (1, 2):
        shutil.copytree(toy_run[0], tmp_path / str(ranks), ignore=shutil.ignore_patterns("*.wav"))
    runs = [start("metrics.py", tmp_path / str(ranks), "--clips=3", "--device=cpu", ranks=ranks) for ranks in (1, 2)]
    printed = [finish(run) for run in runs]
    assert all(text.count("Fréchet distance of codec latents") == 1 for text in printed)
    one, two = (json.loads((tmp_path / str(ranks) / "metrics.json").read_text()) for ranks in (1, 2))
    assert one["adherence"] == two["adherence"] and one["fad"] == pytest.approx(two["fad"], rel=0.02)


def test_a_long_save_is_seen_to_go_on(tmp_path):
    before = distributed.watchdog.count
    save_checkpoint(tmp_path / "last.pt", "last", model={str(i): torch.zeros(9) for i in range(20)})
    assert distributed.watchdog.count > before + 20 and distributed.watchdog.doing == "saving"


def test_different_settings_on_different_ranks_are_refused(dataset, tmp_path):
    pair = start_pair(*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", second=("--lr=0.5", "--seed=3"))
    printed = "".join(finish(process, status=2) for process in pair)
    assert "seed is 0 on rank 0, 3 on rank 1; lr is 0.001 on rank 0, 0.5 on" in printed
    assert not (tmp_path / "out").exists()


def test_mistakes_are_said_once_by_torchrun(dataset, tmp_path):
    odd = start("train.py", *TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--batch_size=5", ranks=2)
    message = "batch_size = 5 does not divide by 2 processes; the nearest that fit: --batch_size=4 or --batch_size=6"
    assert finish(odd, status=1).count(message) == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        UserError, match=r"2 processes x micro_batch = 3; .* --batch_size=6 or .*=12 or --micro_batch=2"
    ):
        check_sizes(8, 3, 2)
