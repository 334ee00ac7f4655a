"""The tools at toy size, their arithmetic against known cases."""

import contextlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TOY as SMALL
from models import PIANO, make_model

import config
import data
from config import Settings
from model import Block
from tools import bench, figures, learn, peers
from tools import estimate as estimating
from tools.estimate import activation_bytes, estimate

TOY = "--size tiny --train_batch 1 --train_frames 12 --generate_batch 2 --generate_frames 6 --dtype float32 --repeats 1"


@pytest.fixture
def ceilings(monkeypatch):
    """Of a machine that needs no measuring."""
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: (1e15, 1e9))
    monkeypatch.setattr(bench.common, "git", lambda *words: "abc1234\n")


def test_a_bench_prints_what_it_promises(command, monkeypatch, ceilings):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as where they are not installed
    monkeypatch.setitem(sys.modules, "xformers", None)
    status, output = command(bench, *TOY.split(), "--work", "train,generate", "--peers")
    assert status == 0, output
    lines = [line.split() for line in output.splitlines() if line.startswith("  ours  ")]
    assert [line[2] for line in lines] == ["tokens/s", "frames/s"] and "commit abc1234; ceilings" in output
    model = bench.make_model(bench_arguments(), 12, "cpu")[0]
    seconds = 1 * 4 * 12 / float(lines[0][1].replace(",", ""))
    assert float(lines[0][6]) == pytest.approx(100 * model.flops() / seconds / 1e15, abs=0.51)
    assert (
        "26 MB of weights a frame" in output and "x real time, all streams" in output and "first frame after" in output
    )
    assert "transformers is left out" in output and "audiocraft is left out" in output


def test_what_is_learned_is_measured_in_turn(dataset, tmp_path, monkeypatch, capsys):
    """Each row is given the same seconds and batches; what a peer's decoder gives is scored as ours."""

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(513, 512)

        def forward(self, sequence, conditions, condition_tensors):
            assert condition_tensors["description"][0].shape[2] == 32
            return self.embed(sequence)

    monkeypatch.setattr(peers, "audiocraft_lm", lambda shape: Decoder())
    monkeypatch.setitem(sys.modules, "transformers", None)
    overrides = [*SMALL, f"--data={dataset}", f"--out={tmp_path / 'run'}", "--valid_items=3"]
    learn.bench_learning(["audiocraft", "transformers"], 1.5, torch.device("cpu"), contextlib.nullcontext, overrides)
    found = json.loads((tmp_path / "learn.json").read_text())
    assert list(found) == ["ours", "ours, plain", "audiocraft"]
    for marks in found.values():
        assert len(marks) == 10 and 1.5 <= marks[-1][0] < 3 and all(len(ce) == 4 for _, _, ce in marks)
        assert [mark[1] for mark in marks] == sorted(mark[1] for mark in marks)
        assert sum(marks[-1][2]) < sum(marks[0][2])
    assert "transformers is left out" in capsys.readouterr().out


def bench_arguments():
    class Given:
        size, card, activation_checkpointing = "tiny", 1024, False

    return Given


def test_medians_are_taken_in_turn_and_a_peer_may_fail(monkeypatch, capsys):
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def work(name, *seconds):
        seconds = iter(seconds)

        def call():
            order.append(name)
            now[0] += next(seconds)

        return call

    def fail():
        raise ValueError("no such operator")

    calls = {("ours", False): work("a", 9, 1, 5, 2), ("transformers", False): work("b", 7, 4, 4, 8)}
    found = bench.in_turn({**calls, ("audiocraft", True): fail}, torch.device("cpu"), 3)
    assert found == {("ours", False): (9, [1, 5, 2]), ("transformers", False): (7, [4, 4, 8])}
    assert order == list("abababab")
    assert "audiocraft compiled is left out: no such operator" in capsys.readouterr().out
    with pytest.raises(ValueError):
        bench.in_turn({("ours", False): fail}, torch.device("cpu"), 3)
    bench.print_table("training", found, 100, "tokens/s", lambda rate: rate / 200)
    said = capsys.readouterr().out
    assert "50.0 tokens/s (20.0 to 100.0)         25 % of ceiling" in said
    assert "25.0 tokens/s (12.5 to 25.0)          ours: 2.00 x" in said


def test_the_ceilings_are_those_of_what_is_run(monkeypatch):
    seconds = iter([0.5, 0.25])
    monkeypatch.setattr(bench, "median_of", lambda call, *_: call() is not None and next(seconds))
    product, copy = bench.ceilings(torch.device("cpu"), torch.float32)
    assert product == 2 * 2048**3 / 0.5 and copy == 2 * 2**28 / 0.25


def test_start_up_is_that_of_the_programs(command, monkeypatch, ceilings):
    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda words, **how: started.append(words[1:]))
    status, output = command(bench, "--work", "start", "--repeats", 2)
    assert status == 0 and output.count(" s\n") == 3 and "import torch alone" in output
    assert [words for words in started if "train.py" in words] == 3 * [["train.py", "--help"]]


def test_what_is_asked_of_a_gpu_is_run_a_process_each(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda words, **how: started.append(words[3:-1]))
    status, output = command(bench, "--gpu", "--repeats", 2)
    assert status == 0 and [" ".join(words) for words in started] == [*bench.ON_GPU]
    for words in started:
        assert set(bench.make_parser().parse_args(words).work.split(",")) <= set(bench.WORK)


def test_a_run_of_train_py_is_measured_by_its_own_log(command, monkeypatch, ceilings):
    def run(words, **how):
        out = Path(next(word for word in words if word.startswith("--out="))[6:])
        settings = config.load([word for word in words if word.startswith("--")], "")
        assert (settings.segment, settings.steps, settings.parallel) == (0.4, 20, "ddp")
        assert len(data.Tokens(settings.data, "train").tracks) == 50
        out.mkdir()
        (out / "metrics.jsonl").write_text('{"tokens_per_s": 1234, "data_wait": 0.5, "mfu": 0.25, "memory": 3.0}\n')

    monkeypatch.setattr(bench.subprocess, "run", run)
    status, output = command(bench, "--work", "run", "--train_frames", 20, "--repeats", 1, "--train_batch", 2)
    assert status == 0 and "1,234 tokens/s  MFU 25.0%, 3.0 GiB, waits for data 50.0%" in output, output


def test_bad_input_is_refused(command):
    if not torch.cuda.is_available():
        status, output = command(bench, "--gpu")
        assert status == 2 and "--gpu: there is no CUDA device here" in output
    status, output = command(bench, "--work", "trian")
    assert status == 2 and "there is no 'trian'" in output
    status, output = command(bench, "--generate_batch", "one")
    assert status == 2 and "invalid numbers value" in output


@pytest.mark.parametrize("low, dtype", [(4, torch.float32), (2, torch.bfloat16)])
def test_the_estimate_of_activations_is_what_autograd_keeps(low, dtype):
    B, S, s, kept = 2, 200, Settings(dim=128, heads=2), {}
    block = Block(s.dim, s.heads)
    x, states, mask = torch.randn(B, S, s.dim, requires_grad=True), torch.randn(B, 4, s.dim), torch.ones(B, 1, 1, 4) > 0
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if (
            storage.data_ptr() not in weights and B in tensor.shape or B * S in tensor.shape
        ):  # not a weight, nor its cast
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype, enabled=low == 2):
        block(x, states, mask)
    assert sum(kept.values()) == pytest.approx(B * activation_bytes(s, S, low), rel=0.05)


def test_the_estimate_allocates_nothing_and_knows_small(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    args = ["config/large.py", "--parallel=fsdp", "--dtype=bfloat16", f"--out={tmp_path / 'out'}"]
    status, output = command(estimating, *args, "--processes=8")
    assert status == 0 and "3,252.8M parameters" in output and "codec encodec_24khz:3, K 4, card 1024" in output
    assert not (tmp_path / "out").exists()
    settings = Settings(dim=1024, heads=16, layers=24, codec="musicgen_32khz", data=str(tmp_path), segment=30, steps=10,
                        batch_size=8, dtype="bfloat16")  # fmt: skip
    memory, _ = estimate(settings)
    assert memory["weights"] == memory["EMA"] == memory["optimizer"] / 2 == memory["gradients"]
    spread, _ = estimate(Settings(**{**vars(settings), "parallel": "fsdp"}), processes=4)
    assert spread["weights"] == memory["weights"] / 4 and spread["activations"] == memory["activations"] / 4
    frozen, printed = estimate(Settings(**{**vars(settings), "freeze": ("embed*", "blocks.*weight", "blocks.*bias"),
                                           "lora_rank": 16}))  # fmt: skip
    assert frozen["gradients"] < memory["gradients"] / 10 and "M of them trained" in printed[0]
    assert command(estimating, "config/demo.py", "--steps=10", "--mfu", "0.3")[0] == 0
    status, output = command(estimating, "config/demo.py", "--processes=3", "--batch_size=8")
    assert status == 2 and "batch_size = 8 does not divide by 3 processes" in output
    assert command(estimating, "--processes=0")[0] == 2


def test_a_picture_of_how_fast_models_learn(tmp_path, command):
    (tmp_path / "learn.json").write_text(json.dumps({"ours": [[1.0, 1000, [3.0, 4.0]], [2.0, 2000, [2.0, 3.0]]]}))
    status, output = command(figures, tmp_path / "learn.json", tmp_path / "learn.png")
    if importlib.util.find_spec("matplotlib"):
        assert status == 0 and (tmp_path / "learn.png").stat().st_size > 5000
    else:
        assert status == 2 and "needs matplotlib; pip install pillow matplotlib" in output


def test_pictures_of_the_patterns_and_of_the_inside_of_a_model(toy_run, tmp_path, command):
    pytest.importorskip("matplotlib")
    for what in ("patterns", toy_run[0] / "best.pt"):
        status, output = command(figures, what, tmp_path / "a.png")
        assert status == 0 and (tmp_path / "a.png").stat().st_size > 5000, output


def test_the_attention_that_is_drawn_is_that_of_the_blocks(monkeypatch):
    """Its weights, put on the values, give what each block's cross-attention gives."""
    model, codes = make_model(layers=1, heads=1), torch.randint(64, (1, 4, 9))
    inputs, outputs = model.conditioner.prepare([PIANO]), []
    hook = model.blocks[0].cross_out.register_forward_hook(lambda part, given, out: outputs.append(given[0]))
    weights, _ = figures.cross_attention(model, codes, inputs)
    hook.remove()
    states, _, _ = model.conditioner(inputs)
    _, values = model.blocks[0].cross_kv(states)[0].chunk(2, dim=1)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    torch.testing.assert_close(weights @ values, outputs[0][0])


def test_a_picture_of_the_epochs(toy_run, tmp_path, command):
    pytest.importorskip("PIL")
    status, output = command(figures, toy_run[0], tmp_path / "epochs.png")
    assert status == 0, output
    from PIL import Image

    with Image.open(tmp_path / "epochs.png") as sheet:
        assert sheet.size == (800, 3 * 148)  # two epochs and the real music
        assert sheet.convert("L").resize((1, 1)).getpixel((0, 0)) < 200, "it is not blank"
    assert "has no samples of a clip -1" in command(figures, toy_run[0], tmp_path / "epochs.png", "--clip", -1)[1]
    status, output = command(figures, toy_run[0], tmp_path / "epochs.png", "--clip", 7)
    assert status == 2 and "has no samples of a clip 7; train it with --samples=8" in output


@pytest.mark.parametrize("suffix", ["wav", "ogg"])
def test_a_picture_of_a_folder_of_samples(suffix, tmp_path, command):
    pytest.importorskip("PIL")
    about = tmp_path / "fast_bells_1.json"
    about.write_text(json.dumps(dict(caption="fast bells", format=suffix)))
    status, output = command(figures, tmp_path, tmp_path / "samples.png")
    assert status == 2 and "cannot be drawn (Error opening" in output
    soundfile.write(tmp_path / f"fast_bells_1.{suffix}", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    status, output = command(figures, tmp_path, tmp_path / "samples.png")
    assert status == 0 and (tmp_path / "samples.png").stat().st_size > 5000, output
    about.write_text("{}")
    assert command(figures, tmp_path, tmp_path / "samples.png")[0] == 2
    about.unlink()
    status, output = command(figures, tmp_path, tmp_path / "samples.png")
    assert status == 2 and output.endswith(f"sample.py ... --out {tmp_path}\n"), "the whole line, however long"


def test_the_checkpoint_that_is_timed_has_16_bytes_a_weight_as_a_runs_own(capsys):
    args = bench.make_parser().parse_args(["--tracks", "4"])
    args.card = 64
    bench.bench_scale(args)
    size = float(re.search(r"a checkpoint of ([\d.]+) GB", capsys.readouterr().out)[1])
    weights = sum(p.numel() for p in bench.make_model(args, 250, "meta")[0].parameters())
    assert size == pytest.approx(16e-9 * weights, rel=0.1)
