"""Bad input ends a program with status 2 and one line: the problem, the place, the remedy. No half-written files."""

import json
import signal
import sys

import filelock
import numpy as np
import pytest
import soundfile
import torch
from conftest import TOY, Ranks, finish, load, slow, start

import config
import log
import prepare
import sample
import train
from audio import write_audio
from common import UserError
from demo import corpus as demo_corpus
from demo.tiny import WEIGHTS
from extras import compiler
from tools.estimate import advise_on_memory

TONE = 0.3 * np.sin(np.arange(32_000) / 10)


def assert_refused(result, *parts):
    """Assert that (status, output) is an error of one line that contains these parts."""
    status, output = result
    assert status == 2, output
    message = output.strip().splitlines()[-1]
    assert ": error: " in message and "Traceback" not in output
    for part in parts:
        assert part in message, message


# Programs


def test_an_unknown_setting_is_refused_in_one_line():
    output = finish(start("train.py", "--stepz=3"), status=2)
    assert output == "train.py: error: command line: unknown setting 'stepz'; did you mean 'steps'?\n"


@pytest.mark.parametrize("program", [
    "train.py", *(pytest.param(name, marks=slow) for name in ("sample.py", "metrics.py", "-m tools.bench",
                                                              "-m tools.play")),
])  # fmt: skip
def test_waiting_threads_sleep(program, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # `import common` has set it in this process
    output = finish(start(*program.split(), "--help", OMP_DISPLAY_ENV="verbose"))
    if "GOMP_SPINCOUNT" not in output:
        pytest.skip("torch's threads are not libgomp's here")
    assert "GOMP_SPINCOUNT = '1000'" in output


def test_letters_that_a_terminal_lacks_are_escaped():
    code = "import common; common.run(lambda: print('Fr\\xe9chet'))"
    assert finish(start("-c", code, PYTHONUTF8="0", PYTHONIOENCODING="ascii")) == "Fr\\xe9chet\n"


# Music and corpora


@pytest.fixture
def music(tmp_path):
    folder = tmp_path / "music"
    folder.mkdir()
    for name in "ab":
        soundfile.write(folder / f"{name}.wav", TONE, 16_000)
    return folder


def test_unusable_music_is_refused(command, music, tmp_path):
    out = tmp_path / "out"

    def prepare_music(source, *more):
        return command(prepare, source, "--out", out, "--workers", 1, *more)

    def manifest(text):
        path = music / "m.jsonl"
        path.write_text(text)
        return path

    good = '{"path": "a.wav", "caption": "x"}\n'
    assert_refused(prepare_music(tmp_path / "nowhere"), "nowhere: no such folder or manifest")
    (tmp_path / "empty").mkdir()
    assert_refused(prepare_music(tmp_path / "empty"), "empty: contains no audio files (.aif, .aifc, .aiff, .au, .caf,")
    assert_refused(prepare_music(manifest(good + "not json\n")), "m.jsonl, line 2: not JSON")
    assert_refused(prepare_music(manifest(good + '{"caption": "x"}\n')), 'm.jsonl, line 2: has no "path"')
    assert_refused(prepare_music(manifest(good + '\n{"path": "c.wav"}\n')), "m.jsonl, line 3", "c.wav: no such file")
    assert_refused(prepare_music(music, "--tags", "genre,colour"), "--tags: unknown tag colour. Choose from genre,")
    assert_refused(prepare_music(music, "--codec", "mp3"), "unknown codec 'mp3'")
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    assert_refused(prepare_music(manifest(good + good)), "lists a.wav more than once")
    no_object = manifest('{"path": "a.wav", "attributes": ["jazz"]}')
    assert_refused(prepare_music(no_object), "line 1", '"attributes" must be an object')
    assert_refused(prepare_music(music / "a.wav"), "neither a folder of audio nor a JSONL manifest")
    assert_refused(prepare_music(music, "--no-captions", "--valid_fraction", "2"), "--valid_fraction between 0 and 1")
    assert_refused(prepare_music(music, "--no-captions", "--out", music), "--out ", "which is not part of a data set")
    assert prepare_music(music, "--no-captions")[0] == 0
    assert_refused(prepare_music(music, "--no-captions", "--valid_fraction", "0.3"), "contains other data")


def test_fewer_than_2_usable_tracks_are_refused(command, music, tmp_path):
    (music / "b.wav").write_bytes(b"RIFF")
    assert_refused(command(prepare, music, "--out", tmp_path / "out", "--workers", 1, "--no-captions"),
                   "1 usable tracks, but at least 2", "b.wav: cannot be read as audio")  # fmt: skip
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_corpus_does_not_replace_other_files(command, music):
    assert_refused(command(demo_corpus, music), "holds other files")
    assert_refused(command(demo_corpus, music / "a.wav"), "is not a folder")
    assert sorted(path.name for path in music.iterdir()) == ["a.wav", "b.wav"]


def test_two_programs_cannot_write_one_corpus(tmp_path, command):
    with filelock.FileLock(tmp_path / ".lock"):
        result = command(demo_corpus, tmp_path, "--clips", 1, "--workers", 1)
        assert_refused(result, f"{tmp_path}: in use by another run; wait for it")


# Compilers and memory


def test_compilation_without_a_compiler_is_refused(command, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--compile=always"]
    assert_refused(command(train, *args), "compile: needs g++ or clang++", "--compile=never")


def test_long_runs_on_a_gpu_are_compiled_if_there_is_a_compiler(monkeypatch, capsys):
    gpu, cpu, s = torch.device("cuda"), torch.device("cpu"), config.Settings(steps=1000)
    monkeypatch.setattr(compiler, "has_compiler", lambda device: True)
    assert compiler.is_enabled(s, gpu) and not compiler.is_enabled(s, cpu)
    assert compiler.is_enabled(config.Settings(compile="always", steps=2), cpu)
    assert not compiler.is_enabled(config.Settings(compile="never", steps=1000), gpu) and not capsys.readouterr().out
    monkeypatch.setattr(compiler, "has_compiler", lambda device: False)
    assert not compiler.is_enabled(s, gpu) and "triton or gcc is missing" in capsys.readouterr().out


def test_a_gpu_needs_triton_and_every_device_a_compiler(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not compiler.has_compiler(torch.device("cuda")), "without triton"
    monkeypatch.undo()
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not compiler.has_compiler(torch.device("cuda")) and not compiler.has_compiler(torch.device("cpu"))


@slow
def test_a_model_larger_than_the_memory_is_refused_with_an_estimate(dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", f"--dim={2**22}"]
    output = finish(start("train.py", *args), status=2)
    assert_refused((2, output), "out of memory (tried to allocate ", "estimated GiB in training: weights ",
                   "; use a smaller --micro_batch or ")  # fmt: skip


@pytest.mark.parametrize("settings, options", [
    ("", "a smaller --micro_batch or --activation_checkpointing=True or --parallel=fsdp or a smaller model"),
    ("--micro_batch=1 --activation_checkpointing=True --parallel=fsdp", "a smaller model"),
])  # fmt: skip
def test_out_of_memory_advice_lists_only_options_that_would_help(settings, options, dataset, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = [*TOY, f"--data={dataset}", *settings.split()]
    advice = f"use {options}; if memory ran out while samples were generated, lower --clip_seconds"
    assert advise_on_memory(arguments).endswith(f"; {advice}")
    monkeypatch.setattr("tools.estimate.estimate", lambda *_: [].pop())  # fails, as without any free memory
    assert advise_on_memory(arguments) == advice


# Settings and data


def test_a_wrong_number_of_codebook_weights_is_refused(command, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--codebook_weights=1,2,3"]
    assert_refused(command(train, *args), "codebook_weights: 3 numbers, but the codec has 4 codebooks; pass 4")
    assert not (tmp_path / "out").exists()


def test_settings_that_do_not_fit_the_codec_are_refused(command, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}"]
    assert_refused(command(train, *args, "--delays=0,1"), "delays [0, 1]: pass 4 integers of 0 or above")
    assert_refused(command(train, *args, "--delays=0.5,1,2,3"), "pass 4 integers of 0 or above")
    for segment, frames in (("0.06", 3), ("0.001", 0)):
        message = f"segment = {segment}: {frames} frames leave a codebook without a target; use a longer segment"
        assert_refused(command(train, *args, f"--segment={segment}"), message)
    seconds = command(train, *args, "--style=True", "--style_seconds=0.001,0.002")
    assert_refused(seconds, "style_seconds: 0.002 s is shorter than one frame of the codec; use longer ones")
    assert_refused(
        command(train, *args, "--clip_seconds=0.02"), "clip_seconds = 0.02, segment = 1: fewer than 2 frames of the"
    )
    short = ("--segment=0.02", "--pattern=parallel")  # clip_seconds = 0 means segment
    assert_refused(command(train, *args, *short), "segment = 0.02: fewer than 2 frames")
    assert_refused(command(train, "config/demo.py", f"--data={tmp_path / 'mistyped'}"),
                   "mistyped: not a prepared data set")  # fmt: skip
    assert not (tmp_path / "out").exists() and not (tmp_path / "mistyped_audio").exists()


def test_data_of_another_codec_are_refused(command, dataset_copy, tmp_path):
    meta = json.loads((dataset_copy / "meta.json").read_text())
    meta["codec"]["id"] = "tiny-K4-00000000"
    (dataset_copy / "meta.json").write_text(json.dumps(meta))
    args = [*TOY, f"--data={dataset_copy}", f"--out={tmp_path / 'out'}"]
    assert_refused(command(train, *args), "was prepared with codec tiny-K4-00000000", "pass the same --codec and")
    assert_refused(command(train, *TOY, f"--data={tmp_path}"), "not a prepared data set", "prepare.py")
    assert not (tmp_path / "out").exists()


def test_a_code_out_of_range_ends_training(command, dataset_copy, tmp_path):
    codes = np.load(dataset_copy / "train_000.npy")
    codes[:] = 512
    np.save(dataset_copy / "train_000.npy", codes)
    args = [*TOY, f"--data={dataset_copy}", f"--out={tmp_path / 'out'}"]
    assert_refused(command(train, *args), "has code 512, but tiny ends at 511", "prepare.py check")


def test_resuming_on_changed_data_is_reported(dataset_copy, tmp_path, train_toy):
    args = [f"--data={dataset_copy}", "--samples=0"]
    assert "has changed since" not in train_toy(tmp_path / "out", *args)
    meta = json.loads((dataset_copy / "meta.json").read_text())
    meta["checksums"]["train_000.npy"] += 1
    (dataset_copy / "meta.json").write_text(json.dumps(meta))
    output = train_toy(tmp_path / "out", *args, "--steps=8")
    assert f"{dataset_copy} has changed since {tmp_path / 'out'}/last.pt, so results will differ" in output


# Folders and disks


def test_a_second_run_in_one_folder_is_refused(command, dataset, tmp_path):
    out = tmp_path / "out"
    args = [*TOY, f"--data={dataset}", f"--out={out}", "--samples=0"]
    first = Ranks(*args, "--steps=100000", "--epoch=5", ranks=1)
    first.wait_for(out / "history.jsonl", 5)
    assert_refused(command(train, *args), f"{out}: in use by another run", "choose another --out")
    first.send(signal.SIGTERM)
    first.finish(status=128 + signal.SIGTERM)
    step = load(out / "last.pt")["step"]
    assert command(train, *args, f"--steps={step + 1}")[0] == 0


def test_a_full_disk_keeps_the_last_checkpoint(command, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    before, temporary = (tmp_path / "last.pt").read_bytes(), tmp_path / "last.pt.tmp"
    temporary.symlink_to("/dev/full")  # every write to it fails, as on a full disk
    message = f"{tmp_path / 'last.pt'}: cannot be written (No space left on device). Free disk space or choose another"
    assert_refused(command(train, *args, "--steps=8"), message, "an older file of this name is unchanged")
    assert (tmp_path / "last.pt").read_bytes() == before and not temporary.is_symlink()


def test_a_full_disk_while_logging_is_reported(command, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    assert_refused(command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}"), "No space left on device")


def test_a_file_instead_of_a_folder_is_refused(command, dataset, tmp_path):
    (tmp_path / "file").touch()
    assert_refused(command(train, *TOY, f"--data={dataset}", f"--out={tmp_path / 'file'}"), "file: File exists")
    with pytest.raises(UserError, match="clip.wav: cannot be written"):
        write_audio(tmp_path / "file" / "clip.wav", torch.zeros(1, 100), 16_000)


def test_a_damaged_log_is_refused(command, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    for content, message in (("{\n", "not JSON"), ("[1]\n", "an object with a step on each line; remove it")):
        (tmp_path / "history.jsonl").write_text(content)
        assert_refused(command(train, *args, "--steps=8"), "history.jsonl: ", message)


def test_a_logger_that_is_not_installed_is_refused(command, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert_refused(command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}", "--logger=wandb"),
                   "logger = 'wandb': not installed; pip install wandb")  # fmt: skip


def test_a_device_that_the_machine_lacks_is_refused(command, dataset):
    if not torch.cuda.is_available():
        assert_refused(command(train, *TOY, f"--data={dataset}", "--device=cuda"), "device = 'cuda': not on this mach")
    assert_refused(command(train, *TOY, f"--data={dataset}", "--device=abacus"), "device = 'abacus'", "; choose ")


# Checkpoints


def test_a_checkpoint_of_another_codec_is_refused(command, toy_run, tmp_path):
    saved, codec = load(toy_run[0] / "best.pt"), load(WEIGHTS)
    saved["codec"]["id"] = "tiny-K4-00000000"
    torch.save(saved, tmp_path / "best.pt")
    args = (tmp_path / "best.pt", "bells", "--device", "cpu", "--out", tmp_path / "out")
    assert_refused(command(sample, *args), "tiny-K4-00000000", "--codec_weights")
    torch.save(codec | {"codec_format": 1}, tmp_path / "old.pt")
    assert_refused(command(sample, *args, "--codec_weights", tmp_path / "old.pt"), "not a tiny codec of this version")


def test_settings_that_contradict_the_checkpoint_are_refused(command, toy_run, dataset):
    out = toy_run[0]
    before = (out / "last.pt").read_bytes()
    args = [*TOY, f"--data={dataset}", f"--out={out}"]
    for settings, *changes in (
        (["--dim=64", "--layers=1"], "dim was 32, is 64", "layers was 2, is 1"),
        (["--lora_rank=2"], "lora_rank was 0, is 2"),
    ):
        assert_refused(command(train, *args, *settings), "last.pt: a different model", *changes, "another --out")
    assert_refused(command(train, *args, "--resume=False"), "holds a run; choose another --out or remove the folder")
    assert (out / "last.pt").read_bytes() == before


def test_weights_that_do_not_fit_are_refused(command, toy_run, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}"]
    assert_refused(command(train, *args, f"--init_from={tmp_path / 'none.pt'}"), "none.pt: no such checkpoint")
    best, other = toy_run[0] / "best.pt", tmp_path / "other.pt"
    assert_refused(command(train, *args, f"--init_from={best}", "--dim=64"), "dim was 32, is 64",
                   "use the settings of the checkpoint, or choose another --init_from")  # fmt: skip
    saved, name = load(best), "blocks.0.up.weight"
    incomplete = {key: weight for key, weight in saved["ema"].items() if key != name}
    for ema in (incomplete, {**incomplete, name: torch.zeros(3, 3)}, {**saved["ema"], "blocks.9.up": torch.zeros(3)}):
        torch.save({**saved, "ema": ema}, other)
        for program, more in ((train, [*args, f"--init_from={other}"]), (sample, [other, "bells"])):
            message = "does not fit the model; use the code and settings of its training"
            assert_refused(command(program, *more), "other.pt: blocks.", message)
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_not_a_checkpoint_is_refused(command, toy_run, dataset, tmp_path):
    complete, broken = (toy_run[0] / "best.pt").read_bytes(), tmp_path / "broken.pt"
    for tenths in range(10):
        broken.write_bytes(complete[: len(complete) * tenths // 10])
        result = command(sample, broken, "x", "--out", tmp_path / "s")
        assert_refused(result, "broken.pt: truncated or not a checkpoint", "use another one")
    torch.save({"weights": torch.zeros(3)}, broken)
    assert_refused(command(sample, broken, "x"), "not a nanoMusicGen checkpoint; pass the best.pt of a run")
    assert_refused(command(sample, tmp_path / "none.pt", "x"), "none.pt: no such checkpoint")
    saved = load(toy_run[0] / "best.pt")
    for other in (1, 99):
        torch.save({**saved, "nanomusicgen": other}, broken)
        message = f"checkpoint format {other}, but this code reads format 3; train it again"
        assert_refused(command(sample, broken, "x"), message)
    out = tmp_path / "run"
    out.mkdir()
    torch.save(saved, out / "last.pt")
    result = command(train, *TOY, f"--data={dataset}", f"--out={out}")
    assert_refused(result, "last.pt: a 'best' checkpoint; pass a 'last' one")
    assert not (tmp_path / "s").exists()


class Bomb:
    def __reduce__(self):
        return open, ("bomb_went_off", "w")


def test_a_checkpoint_runs_no_code(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"nanomusicgen": 3, "kind": "best", "ema": Bomb()}, "bomb.pt")
    assert_refused(command(sample, "bomb.pt", "x"), "bomb.pt: truncated or not a checkpoint")
    assert not (tmp_path / "bomb_went_off").exists()


# Sampling


def test_impossible_requests_to_sample_are_refused(command, toy_run, tmp_path):
    best = toy_run[0] / "best.pt"
    for duration in ("0", "-1", "nan", "inf"):
        assert_refused(command(sample, best, "x", "--duration", duration), "must be above 0 seconds")
    soundfile.write(tmp_path / "long.wav", TONE, 16_000)
    for time in ("2", "0:02", "1:00:00", "9" * 6):
        late = command(sample, best, "x", "--continue", tmp_path / "long.wav", "--from", time)
        assert_refused(late, "long.wav: only 2.0 s long", "--from")
    for time in ("-1", "1:75", "a minute", "1:2:3:4", "nan", "9" * 400, ""):
        no_time = command(sample, best, "x", "--continue", tmp_path / "long.wav", f"--from={time}")
        assert_refused(no_time, f"--from {time}: not a time", "0:45")
    assert_refused(command(sample, best, "x", "--from", "1"), "--from 1: needs --continue")
    missing = command(sample, best, "x", "--continue", tmp_path / "no.wav")
    assert_refused(missing, "no.wav: cannot be read as audio")
    assert_refused(command(sample, best, "x", "--temperature", "-1"), "--temperature -1.0: must be a number from 0 to")
    assert_refused(command(sample, best, "x", "--cfg", "nan"), "--cfg nan: must be a number")
    assert_refused(command(sample, best, "x", "--device", "abacus"), "device = 'abacus': not on this machine")
    soundfile.write(tmp_path / "empty.wav", TONE[:0], 16_000)
    empty = command(sample, best, "x", "--continue", tmp_path / "empty.wav")
    assert_refused(empty, "empty.wav: contains no samples")
    (tmp_path / "file").touch()
    assert_refused(command(sample, best, "x", "--out", tmp_path / "file" / "s"), "Not a directory")
