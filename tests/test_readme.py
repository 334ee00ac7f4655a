"""Every command of the README and the docs runs, at toy size and in a folder of its own."""

import ast
import concurrent.futures
import importlib.util
import re
import runpy
import shlex
import shutil
import signal
import urllib.request

import pytest
import torch
from conftest import ROOT, TOY, Ranks, finish, start

import config
import metrics
import prepare
import sample
import train
from codec import EncodecModel, ResidualVectorQuantizer, SEANetDecoder, SEANetEncoder
from demo import corpus, train_tiny
from tools import bench, convert, estimate, figures, report

MODULES = {
    "train.py": train, "sample.py": sample, "metrics.py": metrics, "prepare.py": prepare, "tools.bench": bench,
    "tools.convert": convert, "tools.estimate": estimate, "tools.report": report, "demo.corpus": corpus,
    "demo.train_tiny": train_tiny, "tools.figures": figures,
}  # fmt: skip
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "demo" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
COMMANDS = [part.strip() for block in BLOCKS for line in block.splitlines() for part in line.split("#")[0].split("&&")]
INLINE = [text for text in re.findall(r"`(python [^`]+)`", TEXT) if not text.endswith(("python -m tools.convert",))]
PROGRAMS = list(dict.fromkeys(c for c in [*COMMANDS, *INLINE] if c.startswith(("python ", "torchrun "))))


def published_codec(folder):
    """A codec of the published layout, small and with random weights."""
    sizes = dict(n_filters=2, dimension=8, ratios=[8, 5, 4, 4], lstm=2, causal=False, true_skip=True)
    quantizer = ResidualVectorQuantizer(dimension=8, n_q=4, bins=512)
    encoder, decoder = (
        part(**sizes, norm="weight_norm", pad_mode="reflect") for part in (SEANetEncoder, SEANetDecoder)
    )
    state = EncodecModel(encoder, decoder, quantizer, [2.2], 32_000, 1).state_dict()
    folder.mkdir(parents=True)
    torch.save({"best_state": state}, folder / "compression_state_dict.bin")


@pytest.fixture(scope="module")
def home(tmp_path_factory, request, dataset, toy_run):
    """The repository by links, with the toy's music, data and run where the README's commands look for them."""
    folder = tmp_path_factory.mktemp("home")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("config", "demo", "tools"):
            (folder / path.name).symlink_to(path)
    (folder / "docs").mkdir()
    for name in ("demo", "mine", "music"):
        shutil.copytree(dataset, folder / "data" / name)
    shutil.copytree(toy_run[0], folder / "out" / "demo")
    every = ("--melody=True", "--style=True", f"--data={dataset}", f"--out={folder / 'out' / 'demo_all'}")
    Ranks(*TOY, *every, "--samples=0", ranks=1).finish()
    for name in ("demo_melody", "demo_style"):
        (folder / "out" / name).symlink_to("demo_all")
    shutil.copytree(request.getfixturevalue("corpus"), folder / "MUSIC")
    for number, path in enumerate(sorted((folder / "MUSIC").glob("*.flac"))):
        if number > 3:  # four are enough
            path.unlink()
        else:
            path.with_suffix(".txt").write_text(f"piece {number}")
    convert.export_lm(*toy_decoder(toy_run), folder / "weights" / "small", "hf")
    published_codec(folder / "weights" / "codec")
    for number, name in enumerate(("beginning.wav", "tune.wav", "excerpt.wav")):
        shutil.copy(folder / "MUSIC" / f"clip_{number:05d}.flac", folder / name)
    (folder / "captions.txt").write_text("fast bells\ncalm strings\n")
    return folder


def toy_decoder(toy_run):
    model, settings, _ = convert.load_model(toy_run[0] / "best.pt")
    return model, model.state_dict(), settings


def parsed(line, home):
    """A command of the README, at toy size -> (its words after python, processes)."""
    words = [word for word in shlex.split(line.partition("|")[0])[1:] if not word.startswith("--nproc_per_node")]
    program, *args = words[1:] if words[0] == "-m" else words
    if program == "train.py" and "--help" not in args:
        args += [*TOY, f"--out=out/{abs(hash(line))}", "--steps=2", "--samples=0"]
        args += ["--codec_weights=", "--codec=tiny"] if "mine32" not in line else []
        args += [f"--data={home / 'data' / 'demo'}"] if "data=" not in line else []
    if program == "sample.py" and "--out" not in args:
        args += ["--out", f"clips/{abs(hash(line))}"]
    if "--stream" in args:
        args += ["--duration", "2"]
    if program == "tools.bench":
        args += "--size tiny --train_batch 1 --train_frames 20 --generate_batch 1 --generate_frames 8".split()
        args += "--dtype float32 --repeats 1 --clips 6 --seconds 0.2 --tracks 40".split()
        args = [word for word in args if word not in ("--compile", "--peers", "--gpu")]
        args += [] if "--work" in args else ["--work", "train,generate"]
    if program == "demo.corpus":
        args += ["--clips", "3", "--workers", "1"]
    if program == "metrics.py":
        args += ["--clips", "2"]
    if program == "demo.train_tiny":
        args += ["--steps", "1", "--batch_size", "2", "--valid_every", "1"] if args[0] == "train" else ["--clips", "2"]
    if program == "prepare.py" and "check" not in args:
        args += ["--workers", "1"] + ([] if "musicgen_32khz" in line else ["--codec", "tiny"])
        args[args.index("--out") + 1] += "" if "mine32" in line else "_new"
    if program == "tools.convert" and args[0] == "import":
        args += TOY[:6]
    if program == "demo.train_tiny" and args[0] == "evaluate":
        args = args[:3] + ["--clips", "2"]
    return program, args, 2 if line.startswith("torchrun") else 1


def test_every_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_has_its_two_commands_and_is_short():
    assert len(README.split()) <= 1800
    said = "\n".join(BLOCKS).splitlines()
    assert any(line.startswith("pip install -r requirements.txt && python train.py") for line in said)
    assert any(line.startswith("pip install -r requirements-dev.txt && ") for line in said)
    assert len(PROGRAMS) >= 25


def test_the_settings_of_every_command_are_ones_that_a_run_could_use(monkeypatch):
    """At their real size, and those of the programs' own docstrings too: `test_command` takes a toy's."""
    monkeypatch.chdir(ROOT)
    usages = [ast.get_docstring(ast.parse(path.read_text())) for path in (*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"))]
    shown = re.findall(r"^    ((?:python|torchrun) .+)", "\n".join(filter(None, usages)), re.M)
    seen = 0
    for line in [*PROGRAMS, *shown]:
        if found := re.match(r"[^#]*?(?:train\.py|tools\.estimate)\b([^#]*)", line):
            processes = re.findall(r"--(?:nproc_per_node|processes)=(\d+)", found[0]) or [1]
            words = shlex.split(found[1])
            config.load([word for word in words if not word.startswith(("--processes", "--mfu", "--help"))], "",
                        int(processes[0]))  # fmt: skip
            seen += 1
    assert seen >= 20


def skip_ceilings():
    bench.ceilings = lambda device, dtype: (1e11, 1e10)


def run(line, home):
    """In forks, to save the start of Python; other tests start the programs for real."""
    program, args, ranks = parsed(line, home)
    if program == "patterns.py":
        assert "codebook 4" in finish(start("patterns.py", cwd=home))
    elif program == "tools.play":
        process = start("-m", program, *args, "--port", 0, cwd=home)
        address = process.stdout.readline().removeprefix("open ").strip()
        assert "nanoMusicGen" in urllib.request.urlopen(address).read().decode()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert "Traceback" not in output and process.returncode in (0, 130)  # 0 where a shell has it ignore ctrl-C
    elif program != "tools.figures" or importlib.util.find_spec("matplotlib"):
        Ranks(*args, ranks=ranks, main=MODULES[program].main, cwd=home, before=skip_ceilings).finish()


@pytest.fixture(scope="module")
def outcomes(home):
    """{command: its future}. Two chains run side by side: one of models imported and codecs made, and the rest."""
    chains = {chain: concurrent.futures.ThreadPoolExecutor(1) for chain in (True, False)}
    chained = ("mine32", "imported", "codec_audio", "weights/", "demo.train_tiny", "tools.bench")
    yield {line: chains[any(word in line for word in chained)].submit(run, line, home) for line in PROGRAMS}
    for chain in chains.values():
        chain.shutdown(cancel_futures=True)


@pytest.mark.parametrize("line", PROGRAMS)
def test_command(line, outcomes):
    outcomes[line].result()


def test_the_lines_of_python_run(home, outcomes, monkeypatch):
    monkeypatch.chdir(home)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    (home / "block.py").write_text(block + "\nassert codes.shape == (2, 4, 400)\n")
    runpy.run_path(str(home / "block.py"))


def test_the_file_map_names_every_file():
    files = [path.relative_to(ROOT).as_posix() for folder in (".", "config", "tools", "demo")
             for path in (ROOT / folder).glob("*.py") if path.name != "__init__.py"]  # fmt: skip
    assert [name for name in files if f"`{name}`" not in README] == []
