import dataclasses
import re

import pytest
from conftest import ROOT

import config
from common import UserError
from config import Settings, check_batch, load


def test_files_then_command_line():
    s = load(["config/demo.py", "--steps=7", "--lr", "1", "--resume=false", "--delays=0,0,1,1"], "")
    assert (s.out, s.steps, s.lr, s.resume, s.delays) == ("out/demo", 7, 1.0, False, (0, 0, 1, 1))
    assert type(s.lr) is float


def test_a_config_file_can_import_another():
    small, medium = load(["config/small.py"], ""), load(["config/medium.py"], "")
    assert medium.dim == 1536 and medium.lr == small.lr != Settings().lr


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("[!_]*.py")), ids=str)
def test_every_config_file_loads(path, toy_run, tmp_path):
    start = [f"--init_from={toy_run[0]}"] if path.stem in ("lora", "finetune") else []
    load([str(path), f"--out={tmp_path}", *start], "")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lerning_rate=1"], "unknown setting 'lerning_rate'"),
        (["--layer=1"], "did you mean 'layers'"),
        (["--steps=many"], "steps must be int, not 'many'"),
        (["--steps=1.5"], "steps must be int, not 1.5"),
        (["--steps"], "--steps: needs a value"),
        (["--resume=1"], "resume must be bool"),
        (["--dim=30", "--heads=4"], r"dim = 30: must be a multiple of 2 \* heads = 8"),
        (["--batch_size=8", "--micro_batch=3"], "micro_batch = 3; use --batch_size=6 or .*=9 or .*=2"),
        (["--cfg_dropout=1.5"], "must be between 0 and 1"),
        (["--samples=-1"], "samples = -1: must be 0 or above"),
        (["--clip=nan"], "clip must be float"),
        (["--segment=1e999"], "segment must be a number below 1,000,000,000,000, not inf"),
        (["--style_seconds=1,1e999"], "style_seconds must be a number below"),
        (["--steps=1000000000000"], "steps must be a number below"),
        ([f"--seed={2**62}"], "seed must be a number below"),
        (["--segment=0"], "must be above 0"),
        (["--lr=1" + 400 * "0"], "lr must be float, not 1000"),
        (["--positions=rotary"], "choose one of sinusoidal, rope"),
        (["--codebook_weights=1,-1,1,1"], "must be a number for each codebook, 0 or above and not all 0"),
        (["--codebook_weights=0,0"], "must be a number for each codebook, 0 or above and not all 0"),
        (["--beta1=1"], "beta1 = 1.0: must be below 1"),
        (["--dim=2", "--heads=1"], "dim = 2: must be 4 or above for sinusoidal positions"),
        (["--timeout=100000000000"], "timeout = 100000000000.0: must be 1e9 seconds or less"),
        (["--out="], "out = '': must be the name of a folder"),
        (["--clip_seconds=-1"], "clip_seconds = -1.0: must be 0 or above"),
        (["--parallel=dpp"], "choose one of ddp, fsdp"),
        (["config/nothing.py"], "no such config file; choose one of config/demo.py"),
    ],
)
def test_invalid_settings_are_refused(argv, message):
    with pytest.raises(UserError, match=message):
        load(argv, "")


def test_the_data_option_disables_the_demo_corpus():
    assert load(["config/demo.py"], "").demo_clips > 0
    assert load(["config/demo.py", "--data=data/music"], "").demo_clips == 0
    assert load(["config/demo.py", "--data=data/music", "--demo_clips=5"], "").demo_clips == 5


def test_errors_in_a_config_file_name_the_file(tmp_path):
    path = tmp_path / "run.py"
    path.write_text("layer = 3\n")
    with pytest.raises(UserError, match=r"run.py: unknown setting 'layer'; did you mean 'layers'"):
        load([str(path)], "")
    path.write_text("layers = 1 +\n")
    with pytest.raises(UserError, match="run.py: SyntaxError"):
        load([str(path)], "")


def test_help_lists_every_setting_with_default_and_comment():
    listed = re.findall(r"--(\w+) +(\S.*?)  +(\S.+)", config.describe_settings())
    assert [name for name, _, _ in listed] == [field.name for field in dataclasses.fields(Settings)]


def test_every_setting_is_used():
    source = "".join(path.read_text() for path in (*ROOT.glob("*.py"), *ROOT.glob("extras/*.py")))
    unused = [name for name in config.FIELDS if not re.search(rf"\b(s|settings)\.{name}\b", source)]
    assert set(unused) <= {"cfg_beta", "temperature", "top_k", "top_p"}, "sample.py reads these by RANGES"


def test_the_nearest_batch_sizes_are_suggested():
    with pytest.raises(
        UserError, match=r"2 processes x micro_batch = 3; use --batch_size=6 or .*12 or --micro_batch=2"
    ):
        check_batch(8, 3, 2)
    check_batch(8, 2, 4)
