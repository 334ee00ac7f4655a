"""Every command of the README runs, at toy size and in a folder of its own."""

import concurrent.futures
import re
import shlex
import shutil

import bench
import pytest
import torch
from conftest import ROOT, TOY, finish, start

import metrics
import model
import sample
import train
from codec import build_musicgen_32khz

MODULES = {"bench.py": bench, "train.py": train, "sample.py": sample, "metrics.py": metrics, "model.py": model}

BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
COMMANDS = [part.strip() for block in BLOCKS for line in block.splitlines() for part in line.split("#")[0].split("&&")]
PROGRAMS = sorted({command for command in COMMANDS if command.startswith(("python ", "torchrun "))})


@pytest.fixture(scope="module")
def home(tmp_path_factory, corpus, dataset, toy_run):
    """The repository by links, with the toy's music, data and run where the README's commands look for them."""
    folder = tmp_path_factory.mktemp("home")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("config", "tiny"):
            (folder / path.name).symlink_to(path)
    for name in ("demo", "mine", "mine32", "music"):
        shutil.copytree(dataset, folder / "data" / name)
    shutil.copytree(toy_run[0], folder / "out" / "demo")
    every = ("--melody=True", "--style=True", f"--data={dataset}", f"--out={folder / 'out' / 'demo_all'}")
    finish(start("train.py", *TOY, *every))
    for name in ("demo_melody", "demo_style"):
        (folder / "out" / name).symlink_to("demo_all")
    shutil.copytree(corpus, folder / "MUSIC")
    for number, path in enumerate(sorted((folder / "MUSIC").glob("*.flac"))):
        path.with_suffix(".txt").write_text(f"piece {number}")
    finish(start("model.py", "export", toy_run[0] / "best.pt", folder / "weights" / "small"))
    (folder / "weights" / "codec").mkdir()
    state = build_musicgen_32khz(n_filters=2, dimension=8, card=512).state_dict()
    torch.save({"best_state": state}, folder / "weights" / "codec" / "compression_state_dict.bin")
    for number, name in enumerate(("beginning.wav", "tune.wav", "excerpt.wav")):
        shutil.copy(folder / "MUSIC" / f"clip_{number:05d}.flac", folder / name)
    (folder / "captions.txt").write_text("fast bells\ncalm strings\n")
    return folder


def test_the_readme_has_its_two_commands():
    assert any(
        line.startswith("pip install -r requirements.txt && python train.py") for line in "\n".join(BLOCKS).splitlines()
    )
    assert any(line.startswith("pip install -r requirements-dev.txt && ") for line in "\n".join(BLOCKS).splitlines())
    assert len(PROGRAMS) >= 8


def parsed(line, home):
    """A command of the README, at toy size -> (program, arguments, processes)."""
    program, *args = [
        word for word in shlex.split(line.partition("|")[0])[1:] if not word.startswith("--nproc_per_node")
    ]
    if program == "train.py" and "--help" not in args and "--estimate" not in line:
        args += [*TOY, f"--out=out/{abs(hash(line))}", "--codec=tiny", "--codec_weights="]
        args += [f"--data={home / 'data' / 'demo'}"] if "data=" not in line else []
    if "--stream" in args:
        args += ["--duration", "2"]
    if program == "bench.py":
        args += "--size tiny --train_batch 1 --train_frames 20 --generate_batch 1 --generate_frames 8".split()
        args += "--dtype float32 --repeats 1 --clips 6".split()
        args = [word for word in args if word not in ("--compile", "--peers")]
        args += [] if "--work" in args else ["--work", "train,generate"]
    if program == "demo_music.py":
        args += ["--clips", "3"]
    if program == "metrics.py":
        args += ["--clips", "2"]
    if program == "train_codec.py" and args[0] == "train":
        args += ["--steps", "1", "--batch_size", "2", "--valid_every", "1"]
    if program == "data.py" and args[0] == "prepare":
        args += ["--codec", "tiny", "--codec_weights=", "--workers", "1"]
        if "--out" in args:
            args[args.index("--out") + 1] += "_new"
    if program == "train_codec.py" and args[0] == "evaluate":
        args += ["--clips", "2"]
    return program, args, 2 if line.startswith("torchrun") else 1


def here(line):
    """Whether a command runs in this process, to save its start, as other tests start the program for real."""
    program = line.split()[1]
    return line.startswith("python") and program in MODULES and "--stream" not in line and "--interactive" not in line


@pytest.fixture(scope="module")
def outcomes(home):
    """The commands that are processes of their own, while the others run here."""

    def run(line):
        program, args, ranks = parsed(line, home)
        return finish(start(program, *args, cwd=home, ranks=ranks))

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        yield {line: pool.submit(run, line) for line in PROGRAMS if not here(line)}


@pytest.mark.parametrize("line", sorted(PROGRAMS, key=here, reverse=True))
def test_command(line, outcomes, home, command, monkeypatch):
    if not here(line):
        assert outcomes[line].result()
        return
    program, args, _ = parsed(line, home)
    monkeypatch.chdir(home)
    status, output = command(MODULES[program], *args)
    assert status == 0, output


def test_the_file_map_names_every_file():
    text = (ROOT / "README.md").read_text()
    files = [path.name for path in ROOT.glob("*.py")] + [
        f"config/{path.name}" for path in (ROOT / "config").glob("[!_]*.py")
    ]
    assert [name for name in files if name not in text] == []
