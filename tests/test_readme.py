"""Every command of the README and the docs runs, at toy size and in a temporary folder."""

import ast
import functools
import importlib.util
import re
import runpy
import shlex
import shutil
import signal
import urllib.request
import uuid

import pytest
import torch
from conftest import ROOT, TOY, Ranks, slow, start

import config
import metrics
import prepare
import sample
import train
from audio import write_audio
from demo import corpus, train_tiny
from tools import bench, convert, estimate, figures, report

MAINS = {
    "train.py": train.main, "sample.py": sample.main, "metrics.py": metrics.main, "prepare.py": prepare.main,
    "tools.bench": bench.main, "tools.convert": convert.main, "tools.estimate": estimate.main,
    "tools.report": report.main, "tools.figures": figures.main, "demo.corpus": corpus.main,
    "demo.train_tiny": train_tiny.main,
    "patterns.py": functools.partial(runpy.run_path, "patterns.py", run_name="__main__"),
}  # fmt: skip
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_commands(text):
    """Return the commands that a page starts programs with, in its bash blocks and in the text."""
    block_lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).splitlines()
    commands = [part.strip() for line in block_lines for part in line.split("#")[0].split("&&")]
    commands += [command for command in re.findall(r"`(python [^`]+)`", text) if command != "python -m tools.convert"]
    return [command for command in commands if command.startswith(("python ", "torchrun "))]


COMMANDS = {page.relative_to(ROOT).as_posix(): dict.fromkeys(read_commands(page.read_text())) for page in PAGES}
ALL_COMMANDS = list(dict.fromkeys(command for commands in COMMANDS.values() for command in commands))


@pytest.fixture(scope="module")
def home(tmp_path_factory, request, dataset, toy_run):
    """A folder with links to the code, and with music, data and runs where the commands expect them."""
    folder = tmp_path_factory.mktemp("home")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("config", "dataprep", "demo", "extras", "tools"):
            (folder / path.name).symlink_to(path)
    (folder / "docs").mkdir()
    for name in ("demo", "mine", "music"):
        shutil.copytree(dataset, folder / "data" / name)
    shutil.copytree(toy_run[0], folder / "out" / "demo")
    both = ("--melody=True", "--style=True", f"--data={dataset}", f"--out={folder / 'out' / 'demo_both'}")
    Ranks(*TOY, *both, "--samples=0", ranks=1).finish()
    for name in ("demo_melody", "demo_style"):
        (folder / "out" / name).symlink_to("demo_both")
    shutil.copytree(request.getfixturevalue("corpus"), folder / "MUSIC")
    for number, path in enumerate(sorted((folder / "MUSIC").glob("*.flac"))):
        if number < 4:
            path.with_suffix(".txt").write_text(f"track {number}")
        else:
            path.unlink()
    toys = ROOT / "tests" / "musicgen_text"
    shutil.copytree(toys / "mono", folder / "published")
    shutil.copy(toys / "spiece.model", folder / "published")
    tone = torch.sin(torch.arange(60 * 16_000) / 9)[None] / 3
    write_audio(folder / "song.mp3", tone, 16_000)
    for number, name in enumerate(("beginning.wav", "tune.wav", "excerpt.wav")):
        shutil.copy(folder / "MUSIC" / f"clip_{number:05d}.flac", folder / name)
    (folder / "captions.txt").write_text("fast bells\ncalm strings\n")
    return folder


TOY_OPTIONS = {
    "metrics.py": "--clips 2", "demo.corpus": "--clips 3 --workers 1", "demo.train_tiny evaluate": "--clips 2",
    "demo.train_tiny train": "--steps 1 --batch_size 2 --valid_every 1", "tools.convert import": "--segment=1",
    "tools.bench": "--size tiny --train_batch 1 --train_frames 20 --generate_batch 1 --generate_frames 8"
    " --dtype float32 --repeats 1 --clips 6 --seconds 0.2 --tracks 40",
}  # fmt: skip


FINETUNE = "--steps=2 --segment=1 --batch_size=2 --samples=0 --valid_items=2 --evaluate_clips=0 --device=cpu".split()


def at_toy_size(command):
    """Return the program of a command, its arguments at toy size, and the number of processes."""
    words = [word for word in shlex.split(command.partition("|")[0])[1:] if not word.startswith("--nproc_per_node")]
    program, *args = words[1:] if words[0] == "-m" else words
    args = ["published" if word.startswith("hf:facebook/musicgen") else word for word in args]
    if program == "train.py" and "--init_from" in command:  # sizes and codec are those of the model
        args += FINETUNE
    elif program == "train.py" and "--help" not in args:
        args += [*TOY, f"--out=out/{uuid.uuid4().hex}", "--steps=2", "--samples=0", "--codec_weights=", "--codec=tiny"]
        args += ["--data=data/demo"] if "data=" not in command else []
    if program == "sample.py":
        args += ["--out", f"clips/{uuid.uuid4().hex}"] if "--out" not in args else []
        args += ["--duration", "2"] if "--stream" in args else []
    if program == "tools.bench":
        args = [word for word in args if word not in ("--compile", "--peers", "--gpu")]
        args += ["--work", "train,generate"] if "--work" not in args else []
    if program == "prepare.py" and "check" not in args:
        args += ["--workers", "1", "--replace", *(["--codec", "tiny"] if "--model" not in command else [])]
    key = " ".join([program, *args[:1]])
    args += TOY_OPTIONS.get(key, TOY_OPTIONS.get(program, "")).split()
    return program, args, 2 if command.startswith("torchrun") else 1


def skip_ceilings():
    bench.ceilings = lambda device, dtype: (1e11, 1e10)


def play(args, home):
    """Start the player, load its page and stop it."""
    process = start("-m", "tools.play", *args, "--port", 0, cwd=home)
    address = process.stdout.readline().removeprefix("open ").strip()
    assert "nanoMusicGen" in urllib.request.urlopen(address).read().decode()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "Traceback" not in output and process.returncode in (0, 130)  # 0 if the shell makes it ignore Ctrl-C


@pytest.mark.parametrize("page", [
    pytest.param(page, marks=slow if page in ("docs/numbers.md", "docs/scale.md", "demo/README.md") else ())
    for page, commands in COMMANDS.items() if commands
])  # fmt: skip
def test_the_commands_of_a_page_run(page, home):
    """In the order of the page, because each may use the files of the commands before it."""
    for folder in ("out/musicgen-small", "out/lora", "out/songs", "out/clarinet", "out/clarinet_lora", "exported"):
        shutil.rmtree(home / folder, ignore_errors=True)  # of another page
    for command in COMMANDS[page]:
        program, args, ranks = at_toy_size(command)
        if program == "tools.play":
            play(args, home)
        elif program != "tools.figures" or importlib.util.find_spec("matplotlib"):
            output = Ranks(*args, ranks=ranks, main=MAINS[program], cwd=home, before=skip_ceilings).finish()
            assert program != "patterns.py" or "codebook 4" in output


def test_the_python_block_of_the_readme_runs(home, monkeypatch):
    monkeypatch.chdir(home)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (home / "block.py").write_text(block + "\nassert codes.shape == (2, 4, 400)\n")
    runpy.run_path(str(home / "block.py"))


def test_every_command_has_valid_settings(monkeypatch):
    """At full size, and the commands of the programs' docstrings too."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(config, "inherit", lambda values, *_: values)  # the checkpoints are not there
    usages = [ast.get_docstring(ast.parse(path.read_text())) for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"))]
    usages = re.findall(r"^    ((?:python|torchrun) .+)", "\n".join(filter(None, usages)), re.M)
    tested = 0
    for command in [*ALL_COMMANDS, *usages]:
        if match := re.match(r"[^#]*?(?:train\.py|tools\.estimate)\b([^#]*)", command):
            processes = re.findall(r"--(?:nproc_per_node|processes)=(\d+)", match[0]) or [1]
            words = shlex.split(match[1])
            settings = [word for word in words if not word.startswith(("--processes", "--mfu", "--help"))]
            config.load(settings, "", int(processes[0]))
            tested += 1
    assert tested >= 20


def test_every_link_has_a_target():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short_and_names_the_commands_of_users_and_developers():
    assert len(README.split()) <= 1800 and len(ALL_COMMANDS) >= 25
    assert re.search(r"^pip install -r requirements.txt && python train.py", README, re.M)
    assert re.search(r"^pip install -r requirements-dev.txt && ", README, re.M)


def test_the_file_map_lists_every_file():
    files = [path.relative_to(ROOT).as_posix() for folder in (".", "config", "dataprep", "demo", "extras", "tools")
             for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]  # fmt: skip
    assert [name for name in files if f"`{name}`" not in README] == []
