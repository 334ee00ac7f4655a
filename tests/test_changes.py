"""Each place that the README's "Changing things" names: one change there, made to a copy, and the copy trains."""

import functools
import math
import shutil
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
    "the loss": ("train.py", """                loss = (ce_sum / targets).mean()
""", """                loss = (ce_sum / targets * torch.tensor([3.0, 1.5, 0.5, 0.5], device=device)).mean()
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


@pytest.mark.parametrize("what", CHANGES)
def test_one_change_in_one_place(what, usual, dataset, tmp_path):
    name, old, new, options = CHANGES[what]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    for folder in ("config", "demo", "tools"):
        (copy / folder).symlink_to(ROOT / folder)
    source = (copy / name).read_text()
    assert source.count(old) == 1, f"{name} no longer holds {old!r}"
    (copy / name).write_text(source.replace(old, new))
    Ranks(
        *SHORT,
        f"--data={dataset}",
        f"--out={tmp_path / 'out'}",
        *options,
        ranks=1,
        main=functools.partial(main_of, copy),
    ).finish()
    changed = lines(tmp_path / "out" / "metrics.jsonl")
    assert len(changed) == 2 and all(math.isfinite(line["ce"]) for line in changed)
    assert [(line["ce"], line["lr"]) for line in usual] != [(line["ce"], line["lr"]) for line in changed]
