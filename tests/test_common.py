"""common.py: the device, files that are complete or unchanged, locks, checkpoints, errors of one line."""

import builtins
import contextlib
import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
from common import UserError, load_checkpoint, save_checkpoint


def test_a_gpu_without_fast_bfloat16_uses_float32(monkeypatch):
    switches = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: torch.device("cuda"))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", switches.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switches.append)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that it is restored after the test
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **options: False)
    assert common.pick_device() == (torch.device("cuda"), torch.float32)
    assert switches == ["high", False] and os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    with pytest.raises(UserError, match="'bfloat16': this GPU only emulates it; use --dtype=float16 or --dtype=auto"):
        common.pick_device(dtype="bfloat16")


def test_an_interrupted_save_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "last.pt", "last", step=1)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last.pt", "last", step=2)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 1


def test_a_failed_write_leaves_the_old_file_or_none(tmp_path):
    def write_half(file):
        file.write(b"half")
        raise RuntimeError("unexpected pos 704 vs 598")  # torch.save's message when the disk is full

    for name, before in (("new", None), ("old", b"before")):
        path = tmp_path / name
        if before:
            common.write_file(path, before)
        message = f"{name}: cannot be written .unexpected pos.* 4 bytes were written, .* are free.*Free disk space"
        with pytest.raises(UserError, match=message):
            common.write_file(path, write_half)
        assert (path.read_bytes() if path.exists() else None) == before
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_lock_is_held_until_it_is_released(tmp_path):
    common.lock(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: in use by another run; wait for it, or choose another --out"):
        common.lock(tmp_path)
    common.LOCKS.clear()
    common.lock(tmp_path)
    common.LOCKS.clear()


@pytest.mark.parametrize("message", [
    "CUDA error: out of memory\nmore", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate",
])  # fmt: skip
def test_each_message_of_a_gpu_without_free_memory_is_recognized(message, capsys):
    def main():
        raise RuntimeError(message)

    with pytest.raises(SystemExit):
        common.run(main)
    first_line = message.splitlines()[0]
    assert f"error: out of memory ({first_line}); use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("another"), ZeroDivisionError()])
def test_an_error_of_the_code_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        common.run(main)


def test_a_home_folder_is_expanded_as_a_shell_does_for_a_word(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    for word, expanded in (
        ("~", "/home/ann"), ("~/x y", "/home/ann/x y"), ("--out=~/x", "/home/ann/x"), ("--out=~", "/home/ann"),
        ("--out=x~/y", None), ("x/~", None), ("~ slow piano", None), ("--try=a ~/b", None), ("~nobody-here/x", None),
    ):  # fmt: skip
        prefix = "--out=" if expanded and word.startswith("--") else ""
        assert common.expand_home(word) == (prefix + expanded if expanded else word)
    monkeypatch.setattr(sys, "argv", ["program.py", "--out=~/x", "~/y"])
    common.run(lambda: None)
    assert sys.argv == ["program.py", "--out=/home/ann/x", "/home/ann/y"], "of every program"


def test_a_printed_command_can_be_pasted_into_a_shell():
    words = ["out/my run/best.pt", 'it\'s "slow"', "$HOME `x` \\", "a\nb\t'", os.fsdecode(b"a\xfcs/1"), "", "*"]
    command = common.quote("printf", "%s\\0", *words)
    assert command.isprintable()
    assert subprocess.check_output(["bash", "-c", command]).split(b"\0")[:-1] == [os.fsencode(word) for word in words]


def test_programs_run_in_a_notebook_and_leave_it_as_it_was(tmp_path, monkeypatch):
    """A notebook's stdout is no file, and its process runs the next program too."""
    stdout, handler = io.StringIO(), signal.getsignal(signal.SIGINT)
    assert not hasattr(stdout, "reconfigure")
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)

    def main():
        common.lock(tmp_path)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout = io.StringIO()
        if fails:
            raise UserError("bad")

    for fails in (True, False, False):
        with pytest.raises(SystemExit) if fails else contextlib.nullcontext():
            common.run(main)
        assert sys.stdout is stdout and signal.getsignal(signal.SIGINT) == handler and not common.LOCKS


def test_the_recorded_diff_has_only_changes_of_this_code(tmp_path, monkeypatch):
    folder, secret = tmp_path / "code", tmp_path / "keys.py"
    folder.mkdir()
    files = (secret, folder / "train.py", folder / "keys.env")

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a", *words], cwd=tmp_path, check=True)

    for path in files:
        path.write_text("before\n")
    git("init", "-q"), git("add", "."), git("commit", "-q", "-m", "a")
    for path in files:
        path.write_text(f"CHANGE of {path.name}\n")
    monkeypatch.setattr(common, "__file__", str(folder / "common.py"))
    commit, *diff = common.describe_code().decode().split("\n")
    assert len(commit) == 40 and "+CHANGE of train.py" in diff and "keys" not in "".join(diff)
    (folder / "train.py").write_text("\xe9 a line\n" * 200_000)
    assert len(common.describe_code()) == 10**6
    (folder / "train.py").write_text("before\n")
    assert common.describe_code() == f"{commit}\n".encode()


def test_json_has_null_for_numbers_that_it_lacks(tmp_path):
    value = {"a": [1.5, math.inf, {"b": -math.inf}], "c": math.nan, "d": "NaN"}
    common.write_json(tmp_path / "a.json", value)
    for text in ((tmp_path / "a.json").read_text(), common.to_json(value)):
        assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None, {"b": None}], "c": None, "d": "NaN"}


def test_a_checkpoint_may_have_a_name_that_is_not_utf8(tmp_path):
    path = Path(tmp_path, os.fsdecode(b"a\xfcs"), "best.pt")
    path.parent.mkdir()
    save_checkpoint(path, "best", step=3, data=str(path))
    assert load_checkpoint(path)["data"] == load_checkpoint(path.parent)["data"] == str(path)
