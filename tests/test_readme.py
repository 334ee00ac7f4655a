"""Every command of the README runs, at toy size and in a folder of its own."""

import concurrent.futures
import re
import shlex
import shutil

import pytest
import torch
from conftest import ROOT, TOY, finish, start

from codec import build_musicgen_32khz

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


def run(command, home):
    command = command.partition("|")[0]  # a player
    program, *args = [word for word in shlex.split(command)[1:] if not word.startswith("--nproc_per_node")]
    if program == "train.py" and "--help" not in args and "--estimate" not in command:
        args += [*TOY, f"--out=out/{abs(hash(command))}", "--codec=tiny", "--codec_weights="]
        args += [f"--data={home / 'data' / 'demo'}"] if "data=" not in command else []
    if "--stream" in args:
        args += ["--duration", "2"]
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
    return finish(start(program, *args, cwd=home, ranks=2 if command.startswith("torchrun") else 1))


@pytest.fixture(scope="module")
def outcomes(home):
    """All commands, two at a time, but first those that make what others need."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        makers = [command for command in PROGRAMS if "model.py import" in command]
        first = {command: pool.submit(run, command, home) for command in makers}
        concurrent.futures.wait(first.values())
        yield first | {command: pool.submit(run, command, home) for command in PROGRAMS if command not in first}


@pytest.mark.parametrize("command", PROGRAMS)
def test_command(command, outcomes):
    assert outcomes[command].result()


def test_the_file_map_names_every_file():
    text = (ROOT / "README.md").read_text()
    files = [path.name for path in ROOT.glob("*.py")] + [
        f"config/{path.name}" for path in (ROOT / "config").glob("[!_]*.py")
    ]
    assert [name for name in files if name not in text] == []
