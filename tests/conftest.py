"""What the tests share: a toy corpus, its prepared data set, a toy run, and the programs as a user starts them."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import demo_music  # noqa: E402

import data  # noqa: E402

hypothesis.settings.register_profile("usual", max_examples=30, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None, database=None)
hypothesis.settings.load_profile("usual")

torch.set_num_threads(1)  # toys gain nothing from a second, and the processes that tests start need the other core

TOY = (
    "--dim=32 --heads=2 --layers=2 --text_dim=32 --text_heads=2 --text_layers=1 --segment=1 --batch_size=4 --steps=6"
    " --epoch=3 --log_every=1 --warmup=2 --samples=1 --valid_items=4 --evaluate_clips=0 --micro_batch=0 --device=cpu"
    " --dtype=float32 --style_dim=32 --style_heads=2 --style_layers=1 --style_bins=16 --style_seconds=0.2,0.4"
).split()


def start(program, *args, cwd=ROOT, ranks=1, **environment):
    """A program of the repository as its own process, or several by torchrun, each on one thread."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, program, *map(str, args)], cwd=cwd, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
    )  # fmt: skip


def finish(process, status=0):
    """Its output, once it has ended with `status`."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    demo_music.write_corpus(folder, 16, seed=5, workers=1)
    return folder


@pytest.fixture(scope="session")
def dataset(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "toy"
    data.prepare(corpus / "manifest.jsonl", folder, workers=1, valid_fraction=0.2)
    return folder


@pytest.fixture
def own_dataset(dataset, tmp_path):
    """A copy that a test may spoil."""
    return Path(shutil.copytree(dataset, tmp_path / "data"))


def without_checksums(folder):
    """A data set's folder, as it was before there were checksums: what is done to it goes unseen."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["checksums"]
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="session")
def toy_run(dataset, tmp_path_factory):
    """The folder of a toy run made by the real command line, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    output = finish(start("train.py", *TOY, f"--data={dataset}", f"--out={out}"))
    return out, output


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a program's main in this process, as `config.run` would: -> (exit status, what it printed)."""
    import config

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            config.run(module.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.set_flush_denormal(False)
            torch.backends.cuda.enable_flash_sdp(True)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call
