"""Shared by the tests: a toy corpus, its data set, a toy run, and functions that start programs."""

import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import hypothesis
import pytest
import torch
import torch._dynamo  # this and the next two: programs import them late, and the forks below start with them in memory
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # noqa: F401

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import config  # noqa: E402
import prepare  # noqa: E402
import train  # noqa: E402
from codec import load_codec  # noqa: E402
from dataprep import shards  # noqa: E402
from demo import corpus as demo_corpus  # noqa: E402
from extras import compiler  # noqa: E402
from model import MusicLM  # noqa: E402
from tools import withhold  # noqa: E402

slow = pytest.mark.slow
needs_compiler = pytest.mark.skipif(not compiler.has_compiler(torch.device("cpu")), reason="needs a C++ compiler")

hypothesis.settings.register_profile("usual", max_examples=25, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("long", max_examples=1000, deadline=None, database=None)
hypothesis.settings.load_profile("usual")

torch.set_num_threads(1)  # a toy model gains nothing from a second thread, and other processes need the core

TOY = (
    "--dim=32 --heads=2 --layers=2 --text_dim=32 --text_heads=2 --text_layers=1 --segment=1 --batch_size=4 --steps=6"
    " --epoch=3 --log_every=1 --warmup=2 --samples=1 --valid_items=4 --evaluate_clips=0 --micro_batch=0 --device=cpu"
    " --dtype=float32 --style_dim=32 --style_heads=2 --style_layers=1 --style_bins=16 --style_seconds=0.2,0.4"
).split()


def pytest_collection_modifyitems(items):
    """Put test_fake_cuda.py first: pytest-xdist gives the first tests to one worker, so that its trace runs once."""
    items.sort(key=lambda item: item.path.name != "test_fake_cuda.py")


# ------------------------------------------------------------------------------------------------------ programs


def start(*words, cwd=ROOT, stdout=subprocess.PIPE, **environment):
    """Start `python WORDS` as a user does, on one thread."""
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=cwd, text=True, errors="replace", stdin=subprocess.DEVNULL,
        stdout=stdout, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )  # fmt: skip


def finish(process, status=0):
    """Wait for a started program, assert its exit status and return its output."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == status, output
    return output


STARTED = []
PROCESS_LOCK = threading.Lock()  # two threads that poll child processes at the same time miss an exit
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest"])


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """Start the fork server where it can import this file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(scope="module", autouse=True)
def kill_remaining_processes():
    yield
    for ranks in STARTED:
        ranks.send(signal.SIGKILL)
    STARTED.clear()


def is_alive(process):
    with PROCESS_LOCK:
        return process.is_alive()


class Ranks:
    """A program's main on several ranks, as torchrun starts it, but in forks of a process that has imported torch."""

    def __init__(self, *args, ranks=2, main=train.main, cwd=ROOT, more=None, before=None):
        """more: {rank: additional arguments}. before: a function that each rank calls first.

        `main` and `before` are pickled, so they are functions of a module, or `functools.partial` of one.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        self.files = [tempfile.NamedTemporaryFile("r", errors="replace") for _ in range(ranks)]
        self.processes = []
        STARTED.append(self)
        for rank in range(ranks):
            launch = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="localhost",
                          MASTER_PORT=port)  # fmt: skip
            launch = {} if ranks == 1 else {key: str(value) for key, value in launch.items()}
            argv = ["train.py", *map(str, args), *(more or {}).get(rank, ())]
            work = (main, argv, launch, self.files[rank].name, cwd, before)
            self.processes.append(FORKS.Process(target=run_rank, args=work))
            with PROCESS_LOCK:
                self.processes[-1].start()

    def output(self, rank=0):
        self.files[rank].seek(0)
        return self.files[rank].read()

    def send(self, number, rank=None):
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if is_alive(process):
                os.kill(process.pid, number)

    def wait(self, seconds=200):
        """Return the exit status of each rank. Fails if one is alive after `seconds`."""
        for process in self.processes:
            multiprocessing.connection.wait([process.sentinel], seconds)
        hung = [process for process in self.processes if is_alive(process)]
        self.send(signal.SIGKILL)
        assert not hung, "\n".join(map(self.output, range(len(self.files))))
        return [process.exitcode for process in self.processes]

    def finish(self, status=0):
        """Wait for all ranks, assert their exit status and return rank 0's output."""
        assert set(self.wait()) == {status}, "\n".join(map(self.output, range(len(self.files))))
        return self.output()

    def wait_for(self, path, lines):
        """Wait until a log has this many lines."""
        while not (path.exists() and len(path.read_text().splitlines()) >= lines):
            assert any(map(is_alive, self.processes)), self.output()
            time.sleep(0.005)


def run_rank(main, argv, launch, path, cwd, before):
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", buffering=1, errors="replace") for descriptor in (1, 2))
    sys.stdin, sys.__stdout__, sys.argv = open(os.devnull), sys.stdout, argv
    os.environ.update(launch)
    os.chdir(cwd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        if before:
            before()
        common.run(main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a program's main in this process: a function of (module, arguments) -> (exit status, output)."""

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            common.run(module.main)
            status = 0
        except SystemExit as stop:
            status = stop.code
        finally:
            common.LOCKS.clear()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.set_flush_denormal(False)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.fixture
def train_toy(command, dataset):
    """Train the toy in this process: a function of (its folder, other settings) -> output. Asserts the exit status."""

    def call(out, *settings, status=0):
        actual, output = command(train, *TOY, f"--data={dataset}", f"--out={out}", *settings)
        assert actual == status, output
        return output

    return call


@pytest.fixture
def withhold_nothing(monkeypatch):
    """Measure everything on the toy's few tracks."""
    measure_few_tracks(monkeypatch.setattr)


def measure_few_tracks(setattr=setattr):
    setattr(shards, "MIN_HELD_OUT", 1)
    setattr(withhold, "MIN_EXAMPLES", 1)
    setattr(withhold, "FRAMES_PER_DIMENSION", 0)


# --------------------------------------------------------------------------------------------------- data and runs


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    demo_corpus.write_corpus(folder, 16, seed=5, workers=1)
    return folder


@pytest.fixture(scope="session")
def dataset(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "toy"
    prepare.prepare(corpus / "manifest.jsonl", folder, workers=1, valid_fraction=0.2)
    return folder


@pytest.fixture
def dataset_copy(dataset, tmp_path):
    """A copy of the data set that a test may change."""
    return Path(shutil.copytree(dataset, tmp_path / "data"))


@pytest.fixture(scope="session")
def toy_run(dataset, tmp_path_factory):
    """The folder of a toy run, started as a user starts it, and its output."""
    out = tmp_path_factory.mktemp("runs") / "toy"
    output = finish(start("train.py", *TOY, f"--data={dataset}", f"--out={out}"))
    return out, output


@pytest.fixture(scope="session")
def all_conditions(toy_run, tmp_path_factory):
    """A best.pt of the toy's sizes with text, melody and style. Only its style codebooks are trained."""
    saved = load(toy_run[0] / "best.pt")
    saved["settings"] |= dict(
        melody=True, style=True, style_dim=32, style_heads=2, style_bins=16, style_seconds=(0.5, 1.0)
    )
    torch.manual_seed(0)
    model = MusicLM(config.Settings(**saved["settings"]), saved["codec"], saved["tokenizer"])
    style = model.conditioner.prepended["style"]
    style.set_codec(load_codec("tiny"))
    for _ in range(10):
        style(*style.tokenize([(torch.randint(512, (4, 50)), None) for _ in range(4)]))
        style.vq.update()
    with torch.no_grad():
        model.heads.weight.mul_(20)
    path = tmp_path_factory.mktemp("conditions") / "all.pt"
    torch.save({**saved, "ema": model.state_dict()}, path)
    return path


@pytest.fixture
def fake_ffmpeg(tmp_path, monkeypatch):
    """Put a program `ffmpeg` on the PATH, which decodes .AU files, whatever their suffix.

    It reports an error before the first sample of "broken" files, and after the last sample of "damaged" files.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ffmpeg").write_text("""#!/bin/sh
        while [ "$1" != -i ]; do shift; done
        case "$2" in *broken*) echo "[in#0 @ 0x55d9] moov atom not found" >&2; echo "second line" >&2; exit 183; esac
        cat "${2#file:}"
        case "$2" in *damaged*) echo "[in#0/mov,mp4 @ 0x55d9] stream 0, offset 0x30: partial file" >&2; esac
    """)
    (folder / "ffmpeg").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


# ----------------------------------------------------------------------------------------------------- comparisons


def lines(path):
    return [json.loads(line) for line in open(path)]


def load(path):
    return torch.load(path, weights_only=True)


def states_equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(states_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(states_equal, a, b))
    return a == b


def same_run(a, b, name="last.pt"):
    """Return whether two runs' checkpoints are equal bit for bit, except for the setting `out`."""
    states = [load(folder / name) for folder in (a, b)]
    for saved in states:
        saved["settings"].pop("out")
    return states_equal(*states)


def untimed(path):
    """Return the lines of a log without the numbers that depend on the machine's speed."""
    return [{key: line[key] for key in line if key not in ("tokens_per_s", "data_wait")} for line in lines(path)]
