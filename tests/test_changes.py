"""Each place that the README's "Changing things" names: one change there, made to a copy, and the copy trains."""

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
        step = delay_steps(K, T, [k // 2 for k in range(K)])
        return Pattern(step, S=T + 1 if training else T + int(step[:, 0].max()))
    if name == "parallel":
""", ["--pattern=pairs"]),
    "a block": ("model.py", """        return x + self.down(F.gelu(self.up(self.norm3(x))))
""", """        return x + self.down(F.relu(self.up(self.norm3(x))).square())
""", []),
    "a condition": ("conditioning.py", """        states = self.out(self.norm(x))
""", """        states = self.out(self.norm(x)) + self.out(self.norm(x)).mean(1, keepdim=True)
""", []),
    "the loss": ("train.py", """                loss = (loss_weights * ce_sum / targets).mean()
""", """                loss = (ce_sum / targets).square().mean()
""", []),
    "the schedule": ("train.py", """    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
""", """    progress = 0
""", []),
}  # fmt: skip


SHORT = [*TOY, "--steps=2", "--epoch=2", "--warmup=0", "--valid_items=1", "--samples=0"]


@pytest.fixture(scope="module")
def usual(dataset, tmp_path_factory):
    """The log of the code as it is."""
    out = tmp_path_factory.mktemp("usual") / "out"
    Ranks(*SHORT, f"--data={dataset}", f"--out={out}", ranks=1).finish()
    return lines(out / "metrics.jsonl")


def main_of(copy):
    ours = {path.stem for path in copy.glob("*.py")} | {"config", "demo", "tools"}
    for module in [module for module in sys.modules if module.split(".")[0] in ours]:
        del sys.modules[module]
    sys.path.insert(0, str(copy))
    import train

    assert train.__file__ == str(copy / "train.py")
    train.main()


def copy_of_the_repository(folder):
    folder.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    for name in ("config", "demo", "tools"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def train(copy, dataset, out, *options):
    """The log of two steps of the copy."""
    args = [*SHORT, f"--data={dataset}", f"--out={out}", *options]
    Ranks(*args, ranks=1, main=functools.partial(main_of, copy)).finish()
    found = lines(out / "metrics.jsonl")
    assert len(found) == 2 and all(math.isfinite(line["ce"]) for line in found)
    return [(line["ce"], line["lr"]) for line in found]


@pytest.mark.parametrize("what", CHANGES)
def test_one_change_in_one_place(what, usual, dataset, tmp_path):
    name, old, new, options = CHANGES[what]
    copy = copy_of_the_repository(tmp_path / "copy")
    source = (copy / name).read_text()
    assert source.count(old) == 1, f"{name} no longer holds {old!r}"
    (copy / name).write_text(source.replace(old, new))
    assert train(copy, dataset, tmp_path / "out", *options) != [(line["ce"], line["lr"]) for line in usual]


@pytest.mark.parametrize("solution, options", [
    ("01_pattern", ["--pattern=coarse_first"]), ("04_min_p", []), ("05_rescaled_guidance", []),
])  # fmt: skip
def test_a_worked_solution_of_the_exercises_applies_trains_and_samples(solution, options, usual, dataset, tmp_path):
    copy = copy_of_the_repository(tmp_path / "copy")
    subprocess.run(["git", "apply", ROOT / "docs" / "solutions" / f"{solution}.diff"], cwd=copy, check=True)
    assert sum((copy / path.name).read_bytes() != path.read_bytes() for path in ROOT.glob("*.py")) == 1
    losses = train(copy, dataset, tmp_path / "out", *options, "--samples=1")
    assert (losses == [(line["ce"], line["lr"]) for line in usual]) == (not options), "sampling changes no training"
    assert len(list((tmp_path / "out" / "samples" / "step_000002").glob("*.wav"))) == 2
