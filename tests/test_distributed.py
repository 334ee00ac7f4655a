"""Several processes are one run: the same losses as one process, exact resume, and no rank waits forever."""

import functools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import (
    TOY,
    Ranks,
    finish,
    lines,
    load,
    measure_few_tracks,
    needs_compiler,
    same_run,
    slow,
    start,
    untimed,
)  # fmt: skip

import common
import distributed
import log as run_log
import metrics
from common import UserError
from model import MusicLM


@pytest.fixture(scope="module")
def uneven(dataset, tmp_path_factory):
    """The toy data with short tracks, so that micro-batches and ranks differ in their numbers of targets."""
    folder = Path(shutil.copytree(dataset, tmp_path_factory.mktemp("uneven") / "data"))
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "valid"):
        tracks = lines(folder / f"{split}_000.jsonl")
        for i, track in enumerate(tracks):
            track["frames"] = 20 + 13 * i if i % 3 else track["frames"]
        (folder / f"{split}_000.jsonl").write_text("".join(json.dumps(track) + "\n" for track in tracks))
        meta[split]["frames"] = sum(track["frames"] for track in tracks)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def assert_close(a, b, tolerance):
    """Assert that two state dicts have equal names and shapes, and that tensors differ by at most `tolerance`.

    A tensor with values above 1 may differ by `tolerance` times its largest value.
    """
    assert a.keys() == b.keys()
    for key in a:
        allowed = tolerance * max(1.0, float(b[key].abs().max()))
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=allowed, msg=lambda text, key=key: f"{key}: {text}")


# The same run


WAYS = {
    "1": (1, "--micro_batch=0"),
    "1 in micro-batches": (1, "--micro_batch=1"),
    "2 by ddp": (2, "--parallel=ddp", "--micro_batch=1"),
    "2 by fsdp": (2, "--parallel=fsdp", "--micro_batch=1", "--activation_checkpointing=True"),
    "4 by ddp": (4, "--parallel=ddp"),
    "4 by fsdp": (4, "--parallel=fsdp", "--reshard_after_forward=False"),
}


@pytest.mark.parametrize("names, clips", [
    pytest.param(["1 in micro-batches", "2 by ddp", "2 by fsdp"], 0, id="2"),
    pytest.param(["2 by ddp", "4 by ddp", "4 by fsdp"], 3, marks=slow, id="4, with evaluation"),
])  # fmt: skip
def test_the_run_is_the_same_on_1_2_and_4_processes(names, clips, uneven, tmp_path):
    shared = [*TOY, f"--data={uneven}", "--steps=4", "--epoch=2", "--ema_every=2", "--valid_items=5",
              "--cfg_dropout=0.3", "--merge_text_p=0.5", "--word_dropout=0.2", "--samples=3", "--generate_every=0",
              f"--evaluate_clips={clips}", "--melody=True", "--style=True", "--style_dropout=0.3"]  # fmt: skip
    printed = {}
    for name in ["1", *names]:
        ranks, *more = WAYS[name]
        ranks = Ranks(*shared, f"--out={tmp_path / name}", *more, ranks=ranks, before=measure_few_tracks)
        printed[name] = ranks.finish()
    one = tmp_path / "1"
    (size,) = re.findall(r"([\d.]+M parameters, .*) on 1 x cpu", printed["1"])
    for name in names:
        out = tmp_path / name
        assert f"{size} on {WAYS[name][0]} x cpu" in printed[name]
        for log in ("metrics.jsonl", "history.jsonl"):
            expected, actual = lines(one / log), lines(out / log)
            assert len(expected) == len(actual)
            for a, b in zip(expected, actual):
                for key in {"ce", "grad_norm", "gain", "ce_q1", "ce_q4", "unigram_q2"} & a.keys():
                    assert a[key] == pytest.approx(b[key], abs=1e-5), (name, a["step"], key)
                assert a.get("stage") == b.get("stage") and a.get("clips") == b.get("clips")
                if a.get("stage") == "evaluate":
                    assert a["fad"] == pytest.approx(b["fad"], rel=0.02) and a["adherence"] == b["adherence"]
        a, b = (load(folder / "last.pt") for folder in (one, out))
        assert_close(a["model"], b["model"], 1e-5)
        assert_close(a["ema"], b["ema"], 1e-5)
        assert_close(load(one / "best.pt")["ema"], load(out / "best.pt")["ema"], 1e-5)
        assert a["optimizer"].keys() == b["optimizer"].keys()
        for clip in lines(out / "history.jsonl")[-2]["clips"]:
            assert (out / clip["free"]).exists() and (out / clip["continued"]).exists()


def test_metrics_are_the_same_on_two_processes(toy_run, tmp_path):
    printed = []
    for ranks in (1, 2):
        shutil.copytree(toy_run[0], tmp_path / str(ranks), ignore=shutil.ignore_patterns("*.wav"))
        args = (tmp_path / str(ranks), "--clips=3", "--device=cpu")
        printed.append(Ranks(*args, ranks=ranks, main=metrics.main, before=measure_few_tracks).finish())
    assert all(text.count("Fréchet distance of codec latents") == 1 for text in printed)
    one, two = (json.loads((tmp_path / str(ranks) / "metrics.json").read_text()) for ranks in (1, 2))
    assert one["adherence"] == two["adherence"] and one["fad"] == pytest.approx(two["fad"], rel=0.02)


def start_with_a_high_loss_scale():
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**31)


@slow
def test_float16_skips_the_same_steps_on_every_rank(uneven, tmp_path):
    """Gradients overflow at first, under FSDP on some ranks only.

    One process skips fewer steps, because each of two processes has half the items and twice the loss.
    """
    args = [*TOY, f"--data={uneven}", "--dtype=float16", "--steps=20", "--epoch=20", "--samples=0"]
    logs = []
    for way, ranks in (("ddp", 1), ("ddp", 2), ("fsdp", 2)):
        out = tmp_path / f"{way}_{ranks}"
        Ranks(*args, f"--out={out}", f"--parallel={way}", ranks=ranks, before=start_with_a_high_loss_scale).finish()
        logs.append(lines(out / "metrics.jsonl"))
    one, ddp, fsdp = logs
    assert 4 < one[-1]["skipped"] <= ddp[-1]["skipped"] < 16
    assert [(line["step"], line["skipped"]) for line in ddp] == [(line["step"], line["skipped"]) for line in fsdp]
    assert [line["ce"] for line in ddp] == pytest.approx([line["ce"] for line in fsdp], abs=2e-3)
    assert one[-1]["ce"] == pytest.approx(ddp[-1]["ce"], abs=0.02)


def print_and_run_each_graph():
    """Replace code generation, which takes half a minute, by printing a line for each graph and running it eagerly."""
    trace = torch._dynamo.lookup_backend("aot_eager")  # traces the backward pass ahead, as inductor does

    def backend(graph, inputs):
        print("graph", flush=True)
        return trace(graph, inputs)

    torch.compile = functools.partial(torch.compile, backend=backend)


@slow
@needs_compiler
def test_compiled_blocks_of_several_ranks_accept_captions_of_any_length(dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", "--steps=12", "--epoch=12", "--samples=0", "--word_dropout=0.5", "--layers=3",
            "--cfg_dropout=0.5", "--freeze=embed*,conditioner*,blocks.0.*"]  # fmt: skip
    Ranks(*args, f"--out={tmp_path / 'eager'}").finish()
    eager = [line["ce"] for line in lines(tmp_path / "eager" / "metrics.jsonl")]
    for parallel in ("ddp", "fsdp"):
        more = [f"--out={tmp_path / parallel}", f"--parallel={parallel}", "--compile=always"]
        graphs = Ranks(*args, *more, before=print_and_run_each_graph).finish().count("graph")
        compiled = [line["ce"] for line in lines(tmp_path / parallel / "metrics.jsonl")]
        assert compiled == pytest.approx(eager, abs=1e-4)
        assert graphs <= 12, f"{graphs}: blocks differ in the inputs that have gradients, and in length 1 or any"


def assert_only_rank_0_initializes():
    init_weights = MusicLM.init_weights

    def init(model):
        assert int(os.environ["RANK"]) == 0 or model.embed.weight.is_meta
        init_weights(model)

    MusicLM.init_weights = init


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=slow)])
def test_only_rank_0_initializes_the_weights(parallel, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--samples=0", f"--parallel={parallel}"]
    Ranks(*args, "--style=True", before=assert_only_rank_0_initializes).finish()


@slow
def test_fsdp_continues_after_an_epoch_without_improvement(dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", "--epoch=1", "--samples=0", "--lr=0.05", "--warmup=0", "--parallel=fsdp"]
    runs = []
    for ranks, more in ((1, []), (2, ["--reshard_after_forward=True"]), (2, ["--reshard_after_forward=False"])):
        out = tmp_path / str(len(runs))
        Ranks(*args, f"--out={out}", *more, ranks=ranks).finish()
        runs.append([line["ce"] for line in lines(out / "history.jsonl") if line["stage"] == "valid"])
    one, *two = runs
    assert one == pytest.approx(two[0], rel=1e-4) and one == pytest.approx(two[1], rel=1e-4) and min(one) < one[-1]


@slow
def test_frozen_parameters_may_change_on_resuming(dataset, tmp_path):
    args, runs = [*TOY, f"--data={dataset}", "--samples=0", "--parallel=fsdp"], []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        for more in (["--freeze=blocks.0.*"], ["--steps=9"], ["--steps=12", "--freeze=blocks.1.*,heads*"]):
            Ranks(*args, f"--out={out}", *more, ranks=ranks).finish()
        runs.append([line["ce"] for line in lines(out / "metrics.jsonl")])
    assert len(runs[0]) == 12 and runs[0] == pytest.approx(runs[1], abs=1e-4)


# Stopping and resuming


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=slow)])
def test_a_run_stopped_on_two_processes_resumes_exactly_on_two_and_to_rounding_on_one(parallel, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", "--steps=24", "--epoch=20", f"--parallel={parallel}", "--samples=0"]
    args += ["--melody=True", "--style=True"]
    Ranks(*args, f"--out={tmp_path / 'uninterrupted'}").finish()
    stopped = Ranks(*args, f"--out={tmp_path / 'two'}")
    stopped.wait_for(tmp_path / "two" / "metrics.jsonl", 3)
    stopped.send(signal.SIGTERM)
    printed = stopped.finish(status=128 + signal.SIGTERM)
    step = int(re.search(r"stopped at step (\d+); to resume: torchrun --nproc_per_node=2 train.py", printed)[1])
    assert 3 <= step < 24 and step != 20, "it stops within an epoch"
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for name, ranks in (("one", 1), ("two", 2)):
        assert f"at step {step}" in Ranks(*args, f"--out={tmp_path / name}", ranks=ranks).finish()
    assert same_run(tmp_path / "uninterrupted", tmp_path / "two")
    a, b = (load(tmp_path / name / "last.pt") for name in ("uninterrupted", "one"))
    assert_close(a["model"], b["model"], 1e-4)
    assert_close(a["ema"], b["ema"], 1e-4)


@pytest.mark.parametrize("kills", [1, pytest.param(30, marks=slow)])
def test_a_run_killed_at_random_moments_loses_only_time(kills, dataset, tmp_path):
    """kill -9 of one rank or both, in training, validation or sampling, and every second time while it saves."""
    rng, steps, out, cut = random.Random(0), 6 * kills + 8, tmp_path / "killed", 0
    args = [*TOY, f"--data={dataset}", f"--steps={steps}", "--epoch=2", "--keep_every=5", "--timeout=60"]
    Ranks(*args, f"--out={tmp_path / 'uninterrupted'}").finish()

    def saved_step():
        return load(out / "last.pt")["step"] if (out / "last.pt").exists() else 0

    for kill in range(kills):
        before = saved_step()
        run = Ranks(*args, f"--out={out}")
        run.wait_for(out / "metrics.jsonl", before + 1)
        while kill == 0 and not saved_step():  # there must be a checkpoint to resume from
            time.sleep(0.01)
        while_saving, until = kill % 2 == 0, time.time() + rng.uniform(0, 0.5)
        while time.time() < until + while_saving and not (while_saving and any(out.glob("*.pt.tmp"))):
            time.sleep(0 if while_saving else 0.01)
        for rank in rng.choice([[0, 1], [0], [1]]):
            run.send(signal.SIGKILL, rank)
        cut += any(out.glob("*.pt.tmp"))
        run.wait(60)
        assert saved_step() >= before, "a checkpoint was lost"
        log = [line for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]
        log = [line for line in log if json.loads(line)["step"] <= saved_step()]
        (out / "metrics.jsonl").write_text("".join(f"{line}\n" for line in log))  # for the next `wait_for`
    before = saved_step()
    print(f"{kills} kills up to step {before} of {steps}, {cut} of them while a checkpoint was being written")
    assert f"resuming from {out / 'last.pt'} at step {before}" in Ranks(*args, f"--out={out}").finish()
    assert same_run(tmp_path / "uninterrupted", out)
    for name in ("metrics.jsonl", "history.jsonl"):
        assert untimed(tmp_path / "uninterrupted" / name) == untimed(out / name)
    kept = [f"step_{step:06d}.pt" for step in range(10, steps + 1, 10)]
    assert sorted(path.name for path in out.glob("*.pt")) == ["best.pt", "last.pt", *kept]


# Ranks that fail or wait


def test_a_rank_that_hangs_ends_the_run_within_the_timeout_and_prints_stacks(dataset, tmp_path):
    pair = Ranks(*TOY, f"--data={dataset}", f"--out={tmp_path}", "--steps=100000", "--epoch=100000", "--timeout=3")
    pair.wait_for(tmp_path / "metrics.jsonl", 3)
    pair.send(signal.SIGSTOP, rank=1)
    pair.processes[0].join(60)
    output = pair.output()
    pair.send(signal.SIGKILL)
    assert pair.processes[0].exitcode == 1, output
    assert "Timeout (0:00:03)!" in output and 'train.py", line' in output, output


def test_a_rank_that_dies_ends_the_other(dataset, tmp_path):
    pair = Ranks(*TOY, f"--data={dataset}", f"--out={tmp_path}", "--steps=100000", "--epoch=100000")
    pair.wait_for(tmp_path / "metrics.jsonl", 3)
    pair.send(signal.SIGKILL, rank=1)
    pair.processes[0].join(60)
    assert pair.processes[0].exitcode == 1 and "Traceback" in pair.output()


@slow
def test_a_rank_that_never_starts_ends_the_run_within_the_timeout(dataset, tmp_path):
    launch = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29777")
    output = finish(start("train.py", *TOY, f"--data={dataset}", f"--out={tmp_path}", "--timeout=1", **launch), 1)
    assert "timed out" in output.lower()


def save_slowly():
    save_checkpoint = common.save_checkpoint

    def save(*args, **state):
        time.sleep(2.5)
        save_checkpoint(*args, **state)

    common.save_checkpoint = save


@slow
def test_ranks_wait_for_rank_0_to_save_longer_than_the_timeout_of_a_step(dataset, tmp_path):
    args = ["--timeout=2", "--samples=0", "--steps=3"]
    Ranks(*TOY, f"--data={dataset}", f"--out={tmp_path}", *args, before=save_slowly).finish()


def do_not_sleep():
    time.sleep = lambda seconds: None  # common.run waits for torchrun to end the other ranks


def test_only_rank_0_reads_the_logs_and_all_ranks_get_its_error(dataset, toy_run, tmp_path):
    out = Path(shutil.copytree(toy_run[0], tmp_path / "out"))
    args = (*TOY, f"--data={dataset}", f"--out={out}", "--steps=8", "--samples=0")
    history = (out / "history.jsonl").read_text()
    Ranks(*args, before=refuse_logs_except_on_rank_0).finish()
    assert (out / "history.jsonl").read_text().startswith(history)
    (out / "metrics.jsonl").write_text("{\n")
    assert "metrics.jsonl: not JSON" in Ranks(*args, "--steps=9", before=refuse_logs_except_on_rank_0).finish(status=2)


def refuse_logs_except_on_rank_0():
    if distributed.rank() > 0:
        run_log.read_log = None


def test_ranks_with_different_settings_are_refused(dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}"]
    printed = Ranks(*args, more={1: ("--lr=0.5", "--seed=3")}, before=do_not_sleep).finish(status=2)
    assert "seed is 0 on rank 0, 3 on rank 1; lr is 0.001 on rank 0, 0.5 on" in printed
    assert not (tmp_path / "out").exists()


def test_an_error_of_all_ranks_is_printed_once_under_torchrun(dataset, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run = start(*launch, "train.py", *TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--batch_size=5")
    message = "batch_size = 5 is not a multiple of 2 processes; use --batch_size=4 or --batch_size=6"
    assert finish(run, status=1).count(message) == 1
    assert not (tmp_path / "out").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="8 processes on a machine with 4 GPUs; start torchrun with fewer"):
        distributed.init_distributed(torch.device("cuda"), 60)


def test_world_size_without_torchrun_is_refused(dataset, tmp_path):
    output = finish(start("train.py", *TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", WORLD_SIZE="2"), status=2)
    assert "error: WORLD_SIZE is 2, but" in output and "start it with torchrun" in output and "Traceback" not in output
