"""common.py: the device, files that are complete or unchanged, locks, checkpoints, errors of one line."""

import os

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
