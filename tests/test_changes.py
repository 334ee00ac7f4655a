"""Each change that the README's "Changing things" describes is one edit in one place, and the changed code trains."""

import functools
import math
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TOY, Ranks, lines

CHANGES = {
    "a pattern": ("patterns.py", """    if name == "parallel":
""", """    if name == "pairs":  # two codebooks at each delay
        position = delay_positions(K, T, [k // 2 for k in range(K)])
        return Pattern(position, S=T + 1 if training else T + int(position[:, 0].max()))
    if name == "parallel":
""", ["--pattern=pairs"]),
    "a block": ("model.py", """        return x + self.down(F.gelu(self.up(self.norm3(x))))
""", """        return x + self.down(F.relu(self.up(self.norm3(x))).square())
""", []),
    "a condition": ("conditioning.py", """        states = self.out(self.norm(x))
""", """        states = self.out(self.norm(x)) + self.out(self.norm(x)).mean(1, keepdim=True)
""", []),
    "the loss": ("train.py", """            loss = (state.loss_weights * ce_sum / targets_per_codebook).mean()
""", """            loss = (ce_sum / targets_per_codebook).square().mean()
""", []),
    "the schedule": ("train.py", """    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
""", """    progress = 0
""", []),
}  # fmt: skip
SOLUTIONS = {"01_pattern": ["--pattern=coarse_first"], "04_min_p": [], "05_rescaled_guidance": []}
FOLDERS = ("config", "dataprep", "demo", "extras", "tools")
SHORT = [*TOY, "--steps=2", "--epoch=2", "--warmup=0", "--valid_items=1", "--samples=0"]


def losses(out):
    """Return [(ce, lr)] of a run of two steps."""
    log = lines(out / "metrics.jsonl")
    assert len(log) == 2 and all(math.isfinite(line["ce"]) for line in log)
    return [(line["ce"], line["lr"]) for line in log]


@pytest.fixture(scope="module")
def unchanged(dataset, tmp_path_factory):
    """The losses of the unchanged code."""
    out = tmp_path_factory.mktemp("unchanged") / "out"
    Ranks(*SHORT, f"--data={dataset}", f"--out={out}", ranks=1).finish()
    return losses(out)


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository's top level, with links to its packages."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in FOLDERS:
        (folder / name).symlink_to(ROOT / name)
    return folder


def main_of(copy):
    names = {path.stem for path in copy.glob("*.py")} | {*FOLDERS}
    for module in [module for module in sys.modules if module.split(".")[0] in names]:
        del sys.modules[module]
    sys.path.insert(0, str(copy))
    import train

    assert train.__file__ == str(copy / "train.py")
    train.main()


def train_copy(copy, dataset, out, *options):
    args = [*SHORT, f"--data={dataset}", f"--out={out}", *options]
    Ranks(*args, ranks=1, main=functools.partial(main_of, copy)).finish()
    return losses(out)


@pytest.mark.parametrize("key", CHANGES)
def test_one_edit_in_one_place_changes_the_training(key, unchanged, copy, dataset, tmp_path):
    name, old, new, options = CHANGES[key]
    source = (copy / name).read_text()
    assert source.count(old) == 1, f"{name} does not contain {old!r} exactly once"
    (copy / name).write_text(source.replace(old, new))
    assert train_copy(copy, dataset, tmp_path / "out", *options) != unchanged


@pytest.mark.parametrize("solution", SOLUTIONS)
def test_a_solution_of_the_exercises_trains_and_samples(solution, unchanged, copy, dataset, tmp_path):
    """The solutions that change sampling do not change training."""
    subprocess.run(["git", "apply", ROOT / "docs" / "solutions" / f"{solution}.diff"], cwd=copy, check=True)
    assert sum((copy / path.name).read_bytes() != path.read_bytes() for path in ROOT.glob("*.py")) == 1
    options = SOLUTIONS[solution]
    is_unchanged = train_copy(copy, dataset, tmp_path / "out", *options, "--samples=1") == unchanged
    assert is_unchanged == (not options)
    assert len(list((tmp_path / "out" / "samples" / "step_000002").glob("*.wav"))) == 2
