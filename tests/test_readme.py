"""Every command of the README runs, at toy size and in a folder of its own."""

import concurrent.futures
import re
import shlex
import shutil

import pytest
from conftest import ROOT, TOY, finish, start

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
    for name in ("demo", "mine", "music"):
        shutil.copytree(dataset, folder / "data" / name)
    shutil.copytree(toy_run[0], folder / "out" / "demo")
    shutil.copytree(corpus, folder / "MUSIC")
    for number, path in enumerate(sorted((folder / "MUSIC").glob("*.flac"))):
        path.with_suffix(".txt").write_text(f"piece {number}")
    shutil.copy(folder / "MUSIC" / "clip_00000.flac", folder / "beginning.wav")
    return folder


def test_the_readme_has_its_two_commands():
    assert any(
        line.startswith("pip install -r requirements.txt && python train.py") for line in "\n".join(BLOCKS).splitlines()
    )
    assert any(line.startswith("pip install -r requirements-dev.txt && ") for line in "\n".join(BLOCKS).splitlines())
    assert len(PROGRAMS) >= 8


def run(command, home):
    program, *args = [word for word in shlex.split(command)[1:] if not word.startswith("--nproc_per_node")]
    if program == "train.py" and "--help" not in args:
        args += [*TOY, f"--out=out/{abs(hash(command))}", "--codec=tiny"]
        args += [f"--data={home / 'data' / 'demo'}"] if "data=" not in command else []
    if program == "demo_music.py":
        args += ["--clips", "3"]
    if program == "metrics.py":
        args += ["--clips", "2"]
    if program == "train_codec.py" and args[0] == "train":
        args += ["--steps", "1", "--batch_size", "2", "--valid_every", "1"]
    if program == "data.py" and args[0] == "prepare":
        args += ["--codec", "tiny", "--workers", "1"]
        if "--out" in args:
            args[args.index("--out") + 1] += "_new"
    if program == "train_codec.py" and args[0] == "evaluate":
        args += ["--clips", "2"]
    return finish(start(program, *args, cwd=home, ranks=2 if command.startswith("torchrun") else 1))


@pytest.fixture(scope="module")
def outcomes(home):
    """All commands in their order, two at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        yield {command: pool.submit(run, command, home) for command in PROGRAMS}


@pytest.mark.parametrize("command", PROGRAMS)
def test_command(command, outcomes):
    assert outcomes[command].result()


def test_the_file_map_names_every_file():
    text = (ROOT / "README.md").read_text()
    files = [path.name for path in ROOT.glob("*.py")] + [
        f"config/{path.name}" for path in (ROOT / "config").glob("[!_]*.py")
    ]
    assert [name for name in files if name not in text] == []
