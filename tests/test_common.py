"""Several processes are one run: the same losses as one process, exact resume, and an end that is never silent."""

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
from conftest import TOY, Ranks, finish, lines, load, needs_compiler, same_run, start, untimed

import common
import metrics
from common import UserError, load_checkpoint, save_checkpoint
from model import MusicLM

KILLS = int(os.environ.get("KILLS", 2))  # 50 take some minutes
STEPS = int(os.environ.get("STEPS", 4))  # of the same run on 1, 2 and 4 processes


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
    return folder


def close(a, b, tolerance):
    """Two state dicts of the same names and shapes, with all tensors within `tolerance`; large ones, of their size."""
    assert a.keys() == b.keys()
    for key in a:
        allowed = tolerance * max(1.0, float(b[key].abs().max()))
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=allowed, msg=lambda text, key=key: f"{key}: {text}")


# The same run


WAYS = {
    "1": (1, "--micro_batch=0"),
    "1 in micro-batches": (1, "--micro_batch=1", "--evaluate_clips=0"),
    "2 by ddp": (2, "--parallel=ddp", "--micro_batch=1"),
    "4 by ddp": (4, "--parallel=ddp", "--evaluate_clips=0"),
    "2 by fsdp": (2, "--parallel=fsdp", "--micro_batch=1", "--activation_checkpointing=True", "--evaluate_clips=0"),
    "4 by fsdp": (4, "--parallel=fsdp", "--reshard_after_forward=False", "--evaluate_clips=0"),
}


def test_the_same_run_on_1_2_and_4_processes(uneven, tmp_path):
    shared = [*TOY, f"--data={uneven}", f"--steps={STEPS}", f"--epoch={STEPS // 2}", "--ema_every=2", "--valid_items=5",
              "--cfg_dropout=0.3", "--merge_text_p=0.5", "--word_dropout=0.2", "--samples=3", "--generate_every=0",
              "--evaluate_clips=3", "--melody=True", "--style=True", "--style_dropout=0.3"]  # fmt: skip
    printed = {}
    for way, (ranks, *more) in WAYS.items():
        printed[way] = Ranks(*shared, f"--out={tmp_path / way}", *more, ranks=ranks).finish()
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
                for key in {"ce", "grad_norm", "gain", "ce_q1", "ce_q4", "unigram_q2"} & ours.keys():
                    assert ours[key] == pytest.approx(theirs[key], abs=1e-5), (out.name, ours["step"], key)
                assert ours.get("clips") == theirs.get("clips")
                if ours.get("stage") == "evaluate":
                    assert ours["fad"] == pytest.approx(theirs["fad"], rel=0.02)
                    assert ours["adherence"] == theirs["adherence"]
        a, b = (load(folder / "last.pt") for folder in (one, out))
        close(a["model"], b["model"], 1e-5)
        close(a["ema"], b["ema"], 1e-5)
        close(load(one / "best.pt")["ema"], load(out / "best.pt")["ema"], 1e-5)
        assert a["optimizer"].keys() == b["optimizer"].keys()
        for clip in lines(out / "history.jsonl")[-2]["clips"]:
            assert (out / clip["free"]).exists() and (out / clip["continued"]).exists()


def test_metrics_on_two_processes_are_those_of_one(toy_run, tmp_path):
    printed = []
    for ranks in (1, 2):
        shutil.copytree(toy_run[0], tmp_path / str(ranks), ignore=shutil.ignore_patterns("*.wav"))
        args = (tmp_path / str(ranks), "--clips=3", "--device=cpu")
        printed.append(Ranks(*args, ranks=ranks, main=metrics.main).finish())
    assert all(text.count("Fréchet distance of codec latents") == 1 for text in printed)
    one, two = (json.loads((tmp_path / str(ranks) / "metrics.json").read_text()) for ranks in (1, 2))
    assert one["adherence"] == two["adherence"] and one["fad"] == pytest.approx(two["fad"], rel=0.02)


def overflowing_loss_scale():
    torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=2.0**31)


def test_float16_skips_the_same_steps_on_every_rank(uneven, tmp_path):
    """The loss scale begins so high that gradients overflow, with FSDP on some ranks' shards only.

    One process skips fewer steps, as each of two has half the items with twice the loss.
    """

    args = [*TOY, f"--data={uneven}", "--dtype=float16", "--steps=20", "--epoch=20", "--samples=0"]
    logs = []
    for way, ranks in (("ddp", 1), ("ddp", 2), ("fsdp", 2)):
        out = tmp_path / f"{way}_{ranks}"
        Ranks(*args, f"--out={out}", f"--parallel={way}", ranks=ranks, before=overflowing_loss_scale).finish()
        logs.append(lines(out / "metrics.jsonl"))
    one, ddp, fsdp = logs
    assert 4 < one[-1]["skipped"] <= ddp[-1]["skipped"] < 16
    assert [(line["step"], line["skipped"]) for line in ddp] == [(line["step"], line["skipped"]) for line in fsdp]
    assert [line["ce"] for line in ddp] == pytest.approx([line["ce"] for line in fsdp], abs=2e-3)
    assert one[-1]["ce"] == pytest.approx(ddp[-1]["ce"], abs=0.02)


def compile_to_the_same():
    """torch.compile without the half a minute that making code takes: each graph is told of, and run eagerly."""
    trace = torch._dynamo.lookup_backend("aot_eager")  # its backward pass is made ahead, as for inductor

    def backend(graph, inputs):
        print("graph", flush=True)
        return trace(graph, inputs)

    torch.compile = functools.partial(torch.compile, backend=backend)


@needs_compiler
def test_compiled_blocks_of_several_ranks_take_captions_of_any_length(dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", "--steps=12", "--epoch=12", "--samples=0", "--word_dropout=0.5", "--layers=3",
            "--cfg_dropout=0.5", "--freeze=embed*,conditioner*,blocks.0.*"]  # fmt: skip
    Ranks(*args, f"--out={tmp_path / 'eager'}").finish()
    for parallel in ("ddp", "fsdp"):
        more = [f"--out={tmp_path / parallel}", f"--parallel={parallel}", "--compile=always"]
        printed = Ranks(*args, *more, before=compile_to_the_same).finish()
        eager, compiled = (
            [line["ce"] for line in lines(tmp_path / way / "metrics.jsonl")] for way in ("eager", parallel)
        )
        assert compiled == pytest.approx(eager, abs=1e-4)
        graphs = printed.count("graph")
        assert graphs <= 12, f"{graphs}: four kinds of blocks, by what has a gradient, and lengths: one, any"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_rank_0_alone_draws_the_weights(parallel, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--samples=0", "--evaluate_clips=0"]
    Ranks(*args, f"--parallel={parallel}", "--style=True", before=refuse_to_draw_on_rank_1).finish()


def refuse_to_draw_on_rank_1():
    usual = MusicLM.init_weights

    def init_weights(model):
        assert int(os.environ["RANK"]) == 0 or model.embed.weight.is_meta
        usual(model)

    MusicLM.init_weights = init_weights


def test_fsdp_continues_after_an_epoch_without_improvement(dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", "--steps=6", "--epoch=1", "--samples=0", "--lr=0.05", "--warmup=0"]
    found = []
    for ranks, more in ((1, []), (2, ["--reshard_after_forward=True"]), (2, ["--reshard_after_forward=False"])):
        out = tmp_path / str(len(found))
        Ranks(*args, f"--out={out}", "--parallel=fsdp", *more, ranks=ranks).finish()
        found.append([line["ce"] for line in lines(out / "history.jsonl") if line["stage"] == "valid"])
    one, *two = found
    assert one == pytest.approx(two[0], rel=1e-4) and one == pytest.approx(two[1], rel=1e-4) and min(one) < one[-1]


def test_what_is_frozen_may_change_on_resuming(dataset, tmp_path):
    args, found = [*TOY, f"--data={dataset}", "--samples=0", "--parallel=fsdp"], []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        for more in (["--freeze=blocks.0.*"], ["--steps=9"], ["--steps=12", "--freeze=blocks.1.*,heads*"]):
            Ranks(*args, f"--out={out}", *more, ranks=ranks).finish()
        found.append([line["ce"] for line in lines(out / "metrics.jsonl")])
    assert len(found[0]) == 12 and found[0] == pytest.approx(found[1], abs=1e-4)


# Stopping, dying and resuming


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_stopped_on_two_it_resumes_exactly_on_two_and_to_rounding_on_one(parallel, dataset, tmp_path):
    shared = [*TOY, f"--data={dataset}", "--steps=24", "--epoch=20", f"--parallel={parallel}", "--samples=0"]
    shared += ["--melody=True", "--style=True"]
    Ranks(*shared, f"--out={tmp_path / 'whole'}").finish()
    parts = Ranks(*shared, f"--out={tmp_path / 'parts'}")
    parts.wait_for(tmp_path / "parts" / "metrics.jsonl", 3)
    parts.send(signal.SIGTERM)
    printed = parts.finish(status=128 + signal.SIGTERM)
    stopped = int(re.search(r"stopped at step (\d+); to resume: torchrun --nproc_per_node=2 train.py", printed)[1])
    assert 3 <= stopped < 24 and stopped != 20, "the test is about stopping within an epoch"
    shutil.copytree(tmp_path / "parts", tmp_path / "one")
    assert f"at step {stopped}" in Ranks(*shared, f"--out={tmp_path / 'one'}", ranks=1).finish()
    Ranks(*shared, f"--out={tmp_path / 'parts'}").finish()
    assert same_run(tmp_path / "whole", tmp_path / "parts")
    a, c = (load(tmp_path / run / "last.pt") for run in ("whole", "one"))
    close(a["model"], c["model"], 1e-4)
    close(a["ema"], c["ema"], 1e-4)


def test_killed_at_random_moments_it_loses_nothing_but_time(dataset, tmp_path):
    """kill -9 of one rank or of both, in training, validation, sampling or, every second time, in saving."""
    rng, steps, out, cut = random.Random(0), 6 * KILLS + 8, tmp_path / "parts", 0
    shared = [*TOY, f"--data={dataset}", f"--steps={steps}", "--epoch=2", "--keep_every=5", "--timeout=60"]
    Ranks(*shared, f"--out={tmp_path / 'whole'}").finish()

    def saved_step():
        return load(out / "last.pt")["step"] if (out / "last.pt").exists() else 0

    for kill in range(KILLS):
        before = saved_step()
        run = Ranks(*shared, f"--out={out}")
        run.wait_for(out / "metrics.jsonl", before + 1)
        while kill == 0 and not saved_step():  # so that there is something to resume from
            time.sleep(0.01)
        saving, until = kill % 2 == 0, time.time() + rng.uniform(0, 0.5)
        while time.time() < until + saving and not (saving and any(out.glob("*t.tmp"))):
            time.sleep(0 if saving else 0.01)
        victims = rng.choice([[0, 1], [0], [1]])
        for rank in victims:
            run.send(signal.SIGKILL, rank)
        cut += any(out.glob("*t.tmp"))  # last.tmp or best.tmp
        run.wait(60)
        assert saved_step() >= before, "a checkpoint was lost"
        log = [line for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]
        log = [line for line in log if json.loads(line)["step"] <= saved_step()]
        (out / "metrics.jsonl").write_text("".join(f"{line}\n" for line in log))  # for `wait_for` of the next run
    print(f"{KILLS} kills up to step {saved_step()} of {steps}, {cut} of them while a checkpoint was being written")
    before = saved_step()
    assert f"resuming from {out / 'last.pt'} at step {before}" in Ranks(*shared, f"--out={out}").finish()
    assert same_run(tmp_path / "whole", out)
    for name in ("metrics.jsonl", "history.jsonl"):
        assert untimed(tmp_path / "whole" / name) == untimed(out / name)
    kept = [f"step_{step:06d}.pt" for step in range(10, steps + 1, 10)]
    assert sorted(path.name for path in out.glob("*.pt")) == ["best.pt", "last.pt", *kept]


def test_a_rank_that_hangs_ends_the_run_within_the_timeout_with_stacks(dataset, tmp_path):
    endless = ("--steps=100000", "--epoch=100000", "--timeout=3")
    pair = Ranks(*TOY, f"--data={dataset}", f"--out={tmp_path}", *endless)
    pair.wait_for(tmp_path / "metrics.jsonl", 3)
    pair.send(signal.SIGSTOP, rank=1)
    pair.processes[0].join(60)
    output = pair.output()
    pair.send(signal.SIGKILL)
    assert pair.processes[0].exitcode == 1, output
    assert "Timeout (0:00:03)!" in output and 'train.py", line' in output, output


def test_a_rank_that_dies_ends_the_others_at_once(dataset, tmp_path):
    pair = Ranks(*TOY, f"--data={dataset}", f"--out={tmp_path}", "--steps=100000", "--epoch=100000")
    pair.wait_for(tmp_path / "metrics.jsonl", 3)
    pair.send(signal.SIGKILL, rank=1)
    pair.processes[0].join(60)
    assert pair.processes[0].exitcode == 1 and "Traceback" in pair.output()


def test_a_rank_that_never_starts_ends_the_run_within_the_timeout(dataset, tmp_path):
    with_one = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29777")
    output = finish(start("train.py", *TOY, f"--data={dataset}", f"--out={tmp_path}", "--timeout=1", **with_one), 1)
    assert "timed out" in output.lower()


def slow_saves():
    usual = common.save_checkpoint

    def slow(*args, **state):
        time.sleep(2.5 * (common.rank() == 0))
        return usual(*args, **state)

    common.save_checkpoint = slow


def test_a_slow_stage_of_rank_0_alone_is_waited_for(dataset, tmp_path):
    """Longer than the timeout, which is for the steps of training."""

    Ranks(
        *TOY, f"--data={dataset}", f"--out={tmp_path}", "--timeout=2", "--samples=0", "--steps=3", before=slow_saves
    ).finish()


# Mistakes


def test_different_settings_on_different_ranks_are_refused(dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}"]
    printed = Ranks(*args, more={1: ("--lr=0.5", "--seed=3")}).finish(status=2)
    assert "seed is 0 on rank 0, 3 on rank 1; lr is 0.001 on rank 0, 0.5 on" in printed
    assert not (tmp_path / "out").exists()


def test_mistakes_are_said_once_by_torchrun(dataset, tmp_path):
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    odd = start(*launch, "train.py", *TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--batch_size=5")
    message = "batch_size = 5 does not divide by 2 processes; the nearest that fit: --batch_size=4 or --batch_size=6"
    assert finish(odd, status=1).count(message) == 1
    assert not (tmp_path / "out").exists()


def test_what_the_gpus_here_cannot_do_is_said_before_anything_starts(monkeypatch):
    switched = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **how: torch.device("cuda"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", switched.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **how: False)
    assert common.pick_device() == (torch.device("cuda"), torch.float32)
    assert switched == ["high", False] and os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    with pytest.raises(UserError, match="'bfloat16': this GPU would only emulate it; take --dtype=float16"):
        common.pick_device(dtype="bfloat16")
    monkeypatch.setenv("WORLD_SIZE", "8"), monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="8 processes on a machine with 4 GPUs; start torchrun with fewer"):
        common.join(torch.device("cuda"), 60)


def test_a_world_without_a_launcher_is_explained(dataset, tmp_path):
    output = finish(start("train.py", *TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", WORLD_SIZE="2"), status=2)
    assert "error: WORLD_SIZE is 2, but" in output and "start it by torchrun" in output and "Traceback" not in output


# Checkpoints


def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", "last", step=1)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last.pt", "last", step=2)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_a_file_is_whole_or_what_it_was(tmp_path):
    def break_off(file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")  # as torch.save says of a full disk

    for name, before in (("new", None), ("old", b"before")):
        path = tmp_path / name
        if before:
            common.write_file(path, before)
        with pytest.raises(UserError, match=f"{name}: cannot be written .unexpected pos"):
            common.write_file(path, break_off)
        assert (path.read_bytes() if path.exists() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_lock_holds_until_the_process_ends(tmp_path):
    common.lock(tmp_path)
    with pytest.raises(UserError, match="another run is under way there"):
        common.lock(tmp_path)
    common.HELD.clear()
    common.lock(tmp_path)
    common.HELD.clear()
