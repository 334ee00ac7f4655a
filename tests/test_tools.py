"""The tools at toy size, and their arithmetic on known cases."""

import dataclasses
import importlib.util
import itertools
import json
import math
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import TOY as SMALL
from models import PIANO, make_model

import common
import config
import data
import train
from config import Settings
from extras.lora import add_lora
from model import Block
from tools import bench, estimate, figures, learn, peers
from tools.estimate import activation_bytes

TOY = "--size tiny --train_batch 1 --train_frames 12 --generate_batch 2 --generate_frames 6 --dtype float32 --repeats 1"


@pytest.fixture
def ceilings(monkeypatch):
    """Fix the ceilings and the commit, so that nothing is measured."""
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: (1e15, 1e9))
    monkeypatch.setattr(bench.common, "git", lambda *words: "abc1234\n")


def test_the_bench_prints_speeds_shares_and_ratios(command, monkeypatch, ceilings):
    for name in ("transformers", "xformers"):  # not installed
        monkeypatch.setitem(sys.modules, name, None)
    status, output = command(bench, *TOY.split(), "--work", "train,generate", "--peers")
    assert status == 0, output
    lines = [line.split() for line in output.splitlines() if line.startswith("  ours  ")]
    assert [line[2] for line in lines] == ["tokens/s", "frames/s"] and "commit abc1234; ceilings" in output
    model = bench.make_model(bench_arguments(), 12, "cpu")[0]
    seconds = 1 * 4 * 12 / float(lines[0][1].replace(",", ""))
    assert float(lines[0][6]) == pytest.approx(100 * model.flops() / seconds / 1e15, abs=0.51)
    assert "26 MB of weights per frame" in output and "first frame after" in output
    assert "x real time for all streams together" in output
    assert "transformers is skipped" in output and "audiocraft is skipped" in output


def test_learning_is_measured_in_turn(dataset, tmp_path, monkeypatch, capsys):
    """All rows train for the same seconds, and MusicLM's loss scores the logits of a peer's decoder."""

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(513, 512)

        def forward(self, sequence, conditions, condition_tensors):
            assert condition_tensors["description"][0].shape[2] == 32
            return self.embed(sequence)

    monkeypatch.setattr(peers, "audiocraft_lm", lambda shape: Decoder())
    monkeypatch.setitem(sys.modules, "transformers", None)
    ticks = itertools.count()
    monkeypatch.setattr(learn.time, "perf_counter", lambda: 0.05 * next(ticks))  # each step takes 0.05 s
    overrides = [*SMALL, f"--data={dataset}", f"--out={tmp_path / 'run'}", "--valid_items=3"]
    learn.bench_learning(["audiocraft", "transformers"], 1.5, torch.device("cpu"), torch.float32, overrides)
    curves = json.loads((tmp_path / "learn.json").read_text())
    assert list(curves) == ["ours", "ours, plain", "audiocraft"]
    for marks in curves.values():
        assert [seconds for seconds, _, _ in marks] == pytest.approx([0.15 * n for n in range(1, 11)], abs=0.051)
        assert [tokens for _, tokens, _ in marks] == sorted(tokens for _, tokens, _ in marks)
        assert all(len(ce_q) == 4 for _, _, ce_q in marks)
        assert sum(marks[-1][2]) < sum(marks[0][2])
    assert "transformers is skipped" in capsys.readouterr().out


def bench_arguments():
    return types.SimpleNamespace(size="tiny", card=1024, activation_checkpointing=False)


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
    times = bench.in_turn({**calls, ("audiocraft", True): fail}, torch.device("cpu"), 3)
    assert times == {("ours", False): (9, [1, 5, 2]), ("transformers", False): (7, [4, 4, 8])}
    assert order == list("abababab")
    assert "audiocraft compiled is skipped: no such operator" in capsys.readouterr().out
    with pytest.raises(ValueError):
        bench.in_turn({("ours", False): fail}, torch.device("cpu"), 3)
    bench.print_table("training", times, 100, "tokens/s", lambda rate: rate / 200)
    output = capsys.readouterr().out
    assert "50.0 tokens/s (20.0 to 100.0)         25 % of ceiling" in output
    assert "25.0 tokens/s (12.5 to 25.0)          ours: 2.00 x" in output


def test_the_ceilings_count_the_operations_and_bytes_that_run(monkeypatch):
    seconds = iter([0.5, 0.25])
    monkeypatch.setattr(bench, "median_of", lambda call, *_: call() is not None and next(seconds))
    product, copy = bench.ceilings(torch.device("cpu"), torch.float32)
    assert product == 2 * 2048**3 / 0.5 and copy == 2 * 2**28 / 0.25


def test_start_up_runs_the_programs(command, monkeypatch, ceilings):
    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda words, **how: started.append(words[1:]))
    status, output = command(bench, "--work", "start", "--repeats", 2)
    assert status == 0 and output.count(" s\n") == 3 and "import torch alone" in output
    assert [words for words in started if "train.py" in words] == 3 * [["train.py", "--help"]]


def test_each_gpu_measurement_runs_in_its_own_process(command, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda words, **how: started.append(words[3:-1]))
    status, output = command(bench, "--gpu", "--repeats", 2)
    assert status == 0 and [" ".join(words) for words in started] == [*bench.ON_GPU]
    for words in started:
        assert set(bench.make_parser().parse_args(words).work.split(",")) <= set(bench.WORK)


def test_a_run_of_train_py_is_measured_by_its_log(command, monkeypatch, ceilings):
    def run(words, **how):
        out = Path(next(word for word in words if word.startswith("--out="))[6:])
        settings = config.load([word for word in words if word.startswith("--")], "")
        assert (settings.segment, settings.steps, settings.parallel) == (0.4, 20, "ddp")
        assert len(data.TokenDataset(settings.data, "train").tracks) == 50
        out.mkdir()
        (out / "metrics.jsonl").write_text('{"tokens_per_s": 1234, "data_wait": 0.5, "mfu": 0.25, "memory": 3.0}\n')

    monkeypatch.setattr(bench.subprocess, "run", run)
    status, output = command(bench, "--work", "run", "--train_frames", 20, "--repeats", 1, "--train_batch", 2)
    assert status == 0 and "1,234 codes in the loss/s  MFU 25.0%, 3.0 GiB, waits for data 50.0%" in output, output


def test_bad_input_is_refused(command):
    if not torch.cuda.is_available():
        status, output = command(bench, "--gpu")
        assert status == 2 and "--gpu: no CUDA device on this machine" in output
    status, output = command(bench, "--work", "trian")
    assert status == 2 and "--work: unknown 'trian'; choose from train" in output
    status, output = command(bench, "--generate_batch", "one")
    assert status == 2 and "invalid numbers value" in output


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", ["all", "none", "lora"])
def test_estimated_activations_are_those_that_autograd_stores(dtype, trained):
    B, S, D, stored = 2, 600, 128, {}  # a CPU's attention stores an S x S matrix in bfloat16 up to 512 positions
    block = Block(D, n_heads=2).requires_grad_(trained == "all")
    if trained == "lora":
        add_lora([block], 4, 4.0, ["qkv", "attn_out", "cross_q", "cross_kv", "cross_out"])
        for name, p in block.named_parameters():
            p.requires_grad_(".lora_" in name)
    x, states, mask = torch.randn(B, S, D, requires_grad=True), torch.randn(B, 4, D), torch.ones(B, 1, 1, 4) > 0
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        is_weight = storage.data_ptr() in weights or not {B, B * S} & {*tensor.shape}  # or a cast of a weight
        if not is_weight:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    is_cast = dtype != torch.float32
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype, enabled=is_cast):
        block(x, states, mask)
    assert sum(stored.values()) == pytest.approx(B * activation_bytes(block, S, dtype.itemsize), rel=0.05)


def test_estimate_of_known_sizes_without_allocation(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    args = ["config/large.py", "--parallel=fsdp", "--dtype=bfloat16", f"--out={tmp_path / 'out'}"]
    status, output = command(estimate, *args, "--processes=8")
    assert status == 0 and "3,252.8M parameters" in output and "codec encodec_24khz:3, K 4, card 1024" in output
    assert not (tmp_path / "out").exists()
    settings = Settings(dim=1024, heads=16, layers=24, codec="musicgen_32khz", data=str(tmp_path), segment=30, steps=10,
                        batch_size=8, dtype="bfloat16")  # fmt: skip
    memory, *_ = estimate.estimate(settings)
    assert memory["weights"] == memory["EMA"] == memory["optimizer"] / 2 == memory["gradients"]
    sharded, *_ = estimate.estimate(dataclasses.replace(settings, parallel="fsdp"), processes=4)
    assert sharded["weights"] == memory["weights"] / 4 and sharded["activations"] == memory["activations"] / 4
    lora = dataclasses.replace(settings, freeze=("embed*", "blocks.*weight", "blocks.*bias"), lora_rank=16)
    lora_memory, lora_lines, *_ = estimate.estimate(lora)
    trained = 1e6 * float(re.search(r"([\d.]+)M trained", lora_lines[0])[1])
    assert memory["gradients"] / 10 > lora_memory["gradients"] == pytest.approx(4 * trained, rel=0.01)
    assert lora_memory["EMA"] == lora_memory["weights"] > memory["weights"], "the EMA copies frozen weights too"
    status, output = command(estimate, "config/demo.py", "--processes=3", "--batch_size=8")
    assert status == 2 and "batch_size = 8 is not a multiple of 3 processes" in output
    assert command(estimate, "--processes=0")[0] == 2


def write_header(path, shapes):
    """Write a safetensors file of float32 zeros, holes in a sparse file."""
    ends = list(itertools.accumulate(4 * math.prod(shape) for shape in shapes.values()))
    header = {name: dict(dtype="F32", shape=shape, data_offsets=[end - 4 * math.prod(shape), end])
              for (name, shape), end in zip(shapes.items(), ends)}  # fmt: skip
    header = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + ends[-1])


def test_a_frozen_t5_costs_memory_and_less_than_1_percent_of_the_operations(command, tmp_path):
    """The size of t5-base, which is assumed without a file, equals that of a file of its shapes."""
    shapes = {"shared.weight": (32128, 768), "encoder.final_layer_norm.weight": (768,), "decoder.x.weight": (9, 9),
              "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 12)}  # fmt: skip
    for layer in [f"encoder.block.{number}.layer" for number in range(12)]:
        shapes |= {f"{layer}.0.SelfAttention.{name}.weight": (768, 768) for name in "qkvo"}
        shapes |= {f"{layer}.{part}.layer_norm.weight": (768,) for part in (0, 1)}
        shapes[f"{layer}.1.DenseReluDense.wi.weight"] = (3072, 768)
        shapes[f"{layer}.1.DenseReluDense.wo.weight"] = (768, 3072)
    write_header(tmp_path / "t5.safetensors", shapes)
    assert estimate.t5_size(tmp_path / "t5.safetensors") == estimate.T5_BASE
    args = ["config/small.py", "--device=cuda", "--text_encoder=t5"]
    status, output = command(estimate, *args)
    assert status == 0 and "assuming t5-base" in output and "text encoder, frozen        0.41 GiB" in output
    assert 0.1 < float(re.search(r"([\d.]+) % of these operations", output)[1]) < 1
    args.append(f"--text_encoder_weights={tmp_path / 't5.safetensors'}")
    assert command(estimate, *args)[1] == output.replace("; without text_encoder_weights, assuming t5-base", "")
    write_header(tmp_path / "t5.safetensors", {"decoder.weight": (2, 2)})
    status, output = command(estimate, *args)
    assert status == 2 and f"{tmp_path / 't5.safetensors'}': not the weights of a T5 encoder" in output


@pytest.mark.parametrize("name", ["small", "large", "finetune", "lora"])
def test_the_options_for_a_gpu_make_the_run_fit(name, command, tmp_path):
    """From scratch, and from the published small: on a GPU of 12 GB, LoRA fits without other options."""
    run = [f"config/{name}.py"]
    if name in ("finetune", "lora"):
        small = Settings(dim=1024, heads=16, layers=24, codec="musicgen_32khz", segment=30.0, text_encoder="t5")
        common.save_checkpoint(tmp_path / "best.pt", "best", settings=vars(small))
        run += [f"--init_from={tmp_path}"]
    status, output = command(estimate, *run, "--device=cuda")
    answers = re.findall(r"  (\d+) GB  yes(?: with)?(.*?)(?: on (\d+) GPUs)?, ([\d.]+) GiB", output)
    assert status == 0 and [size for size, *_ in answers] == ["12", "16", "24", "80"], output
    for size, options, gpus, total in answers:
        n = int(gpus or 1)
        memory = sum(estimate.estimate(config.load([*run, *options.split()], "", n), n)[0].values()) / 2**30
        assert memory == pytest.approx(float(total), abs=0.051) and memory <= float(size) - 1.5
    assert ("config/lora.py needs less" in output) == (name == "finetune")
    if name == "lora":
        assert answers[0][:3] == ("12", "", "")


def test_a_model_that_fits_on_no_number_of_gpus_is_named(command):
    args = ["config/large.py", "--device=cuda", "--batch_size=2", "--micro_batch=2"]
    status, output = command(estimate, *args)
    assert status == 0 and "12 GB  no; use a smaller model" in output and "80 GB  yes with" in output


@pytest.mark.parametrize("gpu", [None, "NVIDIA GeForce RTX 3060", "NVIDIA H200"])
def test_another_device_is_named_first(gpu, command, monkeypatch):
    """An H100 is assumed for several processes without a GPU, and instead of a GPU whose peak is unknown."""
    device = torch.device("cuda") if gpu else None
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: gpu)
    status, output = command(estimate, "config/demo.py", "--processes=2", "--mfu=0.3")
    assert status == 0
    if gpu == "NVIDIA H200":
        assert "assume" not in output.splitlines()[0] and "2 x 989 TFLOP/s (NVIDIA H200" in output
    else:
        assert (
            "no GPU with a known peak on this machine: time assumes 2 x H100 at 30 % of its peak"
            in output.splitlines()[0]
        )
        assert "2 x 989 TFLOP/s (H100" in output


@pytest.mark.parametrize("settings, seconds", [
    ("--short_every=2", 0.1 + 0.2), ("--melody=True --style=True --micro_batch=2", 0.1 + 2 * 0.2),
    ("--text_encoder=t5 --freeze=blocks.1.* --lora_rank=2", None),
])  # fmt: skip
def test_steps_on_a_cpu_are_timed(settings, seconds, dataset, command, monkeypatch):
    """Here an update takes 0.1 s and a pass 0.2 s. A part of the run's step is scaled by its weights and operations."""
    now, training_step = [0.0], train.training_step

    def step(state, micro_batches, *args):
        now[0] += 0.1 + 0.2 * len(micro_batches)
        return training_step(state, micro_batches, *args)

    monkeypatch.setattr(train, "training_step", step)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    args = [*SMALL, f"--data={dataset}", "--steps=7200", *settings.split()]
    status, output = command(estimate, *args)
    assert status == 0 and "time is measured on this machine's CPU" in output.splitlines()[0], output
    step_seconds, hours = map(float, re.search(r"7,200 steps of (\S+) s, timed with .*: (\S+) hours", output).groups())
    assert hours == pytest.approx(2 * step_seconds, rel=0.01, abs=0.051)
    assert seconds is None or step_seconds == pytest.approx(seconds)
    monkeypatch.setattr(estimate, "TIMED_OPERATIONS", 1.0)
    status, output = command(estimate, *args)
    assert status == 0 and "timed with 1 of 4 items, 1 of 2 blocks, cpu" in output, output
    part_seconds = float(re.search(r"steps of (\S+) s", output)[1])
    assert seconds is None or 0.1 + 4 * 0.2 < part_seconds < 2 * (0.1 + 4 * 0.2)


def test_learning_curves_are_drawn(tmp_path, command):
    (tmp_path / "learn.json").write_text(json.dumps({"ours": [[1.0, 1000, [3.0, 4.0]], [2.0, 2000, [2.0, 3.0]]]}))
    status, output = command(figures, tmp_path / "learn.json", tmp_path / "learn.png")
    if importlib.util.find_spec("matplotlib"):
        assert status == 0 and (tmp_path / "learn.png").stat().st_size > 5000
    else:
        assert status == 2 and "needs matplotlib; pip install pillow matplotlib" in output


def test_patterns_and_attention_are_drawn(toy_run, tmp_path, command):
    pytest.importorskip("matplotlib")
    for source in ("patterns", toy_run[0] / "best.pt"):
        status, output = command(figures, source, tmp_path / "a.png")
        assert status == 0 and (tmp_path / "a.png").stat().st_size > 5000, output


@pytest.mark.parametrize("caption", ["a slow piano melody", "a"])
def test_drawn_attention_is_that_of_the_model(caption):
    """The block's cross-attention returns the values, averaged by the drawn weights."""
    model, codes = make_model(layers=1, heads=1), torch.randint(64, (1, 4, 9))
    condition_tensors, outputs = model.conditioner.tokenize([PIANO | {"text": caption}]), []
    hook = model.blocks[0].cross_out.register_forward_hook(lambda module, args, output: outputs.append(args[0]))
    weights, logits = figures.cross_attention(model, codes, condition_tensors)
    hook.remove()
    states, _, _ = model.conditioner(condition_tensors)
    _, values = model.blocks[0].cross_kv(states)[0].chunk(2, dim=1)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    torch.testing.assert_close(weights @ values, outputs[0][0])
    assert torch.equal(logits.nan_to_num(), model.aligned_logits(codes, condition_tensors).nan_to_num())


def test_samples_of_epochs_are_drawn(toy_run, tmp_path, command):
    pytest.importorskip("PIL")
    status, output = command(figures, toy_run[0], tmp_path / "epochs.png")
    assert status == 0, output
    from PIL import Image

    with Image.open(tmp_path / "epochs.png") as sheet:
        assert sheet.size == (800, 3 * 148)  # two epochs and the real music
        assert sheet.convert("L").resize((1, 1)).getpixel((0, 0)) < 200, "the picture must not be blank"
    assert "has no sample with --clip -1" in command(figures, toy_run[0], tmp_path / "epochs.png", "--clip", -1)[1]
    status, output = command(figures, toy_run[0], tmp_path / "epochs.png", "--clip", 7)
    assert status == 2 and "has no sample with --clip 7; train with --samples=8" in output


@pytest.mark.parametrize("suffix", ["wav", "ogg"])
def test_folder_of_samples_is_drawn(suffix, tmp_path, command):
    pytest.importorskip("PIL")
    info = tmp_path / "fast_bells_1.json"
    info.write_text(json.dumps(dict(caption="fast bells", format=suffix)))
    status, output = command(figures, tmp_path, tmp_path / "samples.png")
    assert status == 2 and "cannot be drawn (Error opening" in output
    soundfile.write(tmp_path / f"fast_bells_1.{suffix}", np.random.default_rng(0).normal(0, 0.1, 16000), 16000)
    status, output = command(figures, tmp_path, tmp_path / "samples.png")
    assert status == 0 and (tmp_path / "samples.png").stat().st_size > 5000, output
    info.write_text("{}")
    assert command(figures, tmp_path, tmp_path / "samples.png")[0] == 2
    info.unlink()
    status, output = command(figures, tmp_path, tmp_path / "samples.png")
    assert status == 2 and output.endswith(f"python sample.py ... --out {tmp_path}\n"), "long lines are not cut"


def test_the_checkpoint_that_is_timed_has_16_bytes_a_weight_as_a_runs_own(capsys):
    args = bench.make_parser().parse_args(["--tracks", "4"])
    args.card = 64
    bench.bench_scale(args)
    size = float(re.search(r"a checkpoint of ([\d.]+) GB", capsys.readouterr().out)[1])
    weights = sum(p.numel() for p in bench.make_model(args, 250, "meta")[0].parameters())
    assert size == pytest.approx(16e-9 * weights, rel=0.1)
