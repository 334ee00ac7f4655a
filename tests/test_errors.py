"""Bad input gets one line that says what was wrong, where, and what to do; status 2; and nothing half-written."""

import json
import signal
import sys

import filelock
import numpy as np
import pytest
import soundfile
import torch
from conftest import TOY, Ranks, finish, load, start

import common
import config
import log
import prepare
import sample
import train
from codec import write_audio
from common import UserError
from demo import corpus as demo_corpus
from demo.tiny import WEIGHTS
from tools.estimate import in_one_line

TONE = 0.3 * np.sin(np.arange(32_000) / 10)


def refused(result, *parts):
    status, output = result
    assert status == 2, output
    last = output.strip().splitlines()[-1]
    assert ": error: " in last and "Traceback" not in output
    for part in parts:
        assert part in last, last


def test_the_real_command_line_ends_with_status_2_and_one_line():
    output = finish(start("train.py", "--stepz=3"), status=2)
    assert output == "train.py: error: command line: unknown setting 'stepz'; did you mean 'steps'?\n"


@pytest.mark.parametrize("program", ["train.py", "sample.py", "metrics.py", "-m tools.bench", "-m tools.play"])
def test_threads_that_wait_leave_the_core_to_others(program, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)  # which `import common` has set here
    shown = finish(start(*program.split(), "--help", OMP_DISPLAY_ENV="verbose"))
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch's threads are not libgomp's here")
    assert "GOMP_SPINCOUNT = '1000'" in shown


def test_what_a_terminal_cannot_show_ends_no_program():
    code = "import common; common.run(lambda: print('Fr\\xe9chet'))"
    assert finish(start("-c", code, PYTHONUTF8="0", PYTHONIOENCODING="ascii")) == "Fr\\xe9chet\n"


@pytest.fixture
def music(tmp_path):
    folder = tmp_path / "music"
    folder.mkdir()
    for name in "ab":
        soundfile.write(folder / f"{name}.wav", TONE, 16_000)
    return folder


def test_music_that_cannot_be_prepared(command, music, tmp_path):
    out = tmp_path / "out"

    def preparing(source, *more):
        return command(prepare, source, "--out", out, "--workers", 1, *more)

    def manifest(text):
        path = music / "m.jsonl"
        path.write_text(text)
        return path

    good = '{"path": "a.wav", "caption": "x"}\n'
    refused(preparing(tmp_path / "nowhere"), "nowhere: no such folder or manifest")
    (tmp_path / "empty").mkdir()
    refused(preparing(tmp_path / "empty"), "empty: holds no audio (.aif, .aifc, .aiff, .au, .caf, .flac,")
    refused(preparing(manifest(good + "not json\n")), "m.jsonl, line 2: not JSON")
    refused(preparing(manifest(good + '{"caption": "x"}\n')), 'm.jsonl, line 2: has no "path"')
    refused(preparing(manifest(good + '\n{"path": "c.wav"}\n')), "m.jsonl, line 3", "c.wav: no such file")
    refused(preparing(music, "--tags", "genre,colour"), "--tags: colour is none of genre, title, mood, bpm, key")
    refused(preparing(music, "--codec", "mp3"), "unknown codec 'mp3'")
    assert not out.exists() and not (tmp_path / "out.partial").exists()
    refused(preparing(manifest(good + good)), "names a.wav more than once")
    refused(
        preparing(manifest('{"path": "a.wav", "attributes": ["jazz"]}')), "line 1", '"attributes" must be an object'
    )
    refused(preparing(music / "a.wav"), "neither a folder of audio nor a JSONL manifest")
    refused(preparing(music, "--no-captions", "--valid_fraction", "2"), "--valid_fraction between 0 and 1")
    refused(preparing(music, "--no-captions", "--out", music), "is there already and is no data set")
    assert preparing(music, "--no-captions")[0] == 0
    refused(preparing(music, "--no-captions", "--valid_fraction", "0.3"), "holds other data")


def test_too_few_usable_tracks(command, music, tmp_path):
    (music / "b.wav").write_bytes(b"RIFF")
    refused(command(prepare, music, "--out", tmp_path / "out", "--workers", 1, "--no-captions"),
            "1 usable tracks; at least 2", "b.wav: cannot be read as audio")  # fmt: skip
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_corpus_is_not_written_over_other_files(command, music):
    refused(command(demo_corpus, music), "holds other files")
    refused(command(demo_corpus, music / "a.wav"), "is not a folder")
    assert sorted(path.name for path in music.iterdir()) == ["a.wav", "b.wav"]


def test_two_runs_that_make_one_corpus(tmp_path, command):
    with filelock.FileLock(tmp_path / ".lock"):
        refused(command(demo_corpus, tmp_path, "--clips", 1, "--workers", 1), "another run is under way there; wait")


def test_nothing_to_compile_with(command, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--compile=always"]
    refused(command(train, *args), "compile: needs g++ or clang++", "--compile=never")


def test_without_a_compiler_a_gpu_goes_on_uncompiled(monkeypatch, capsys):
    gpu, run = torch.device("cuda"), config.Settings(steps=1000)
    monkeypatch.setattr(common, "has_compiler", lambda device: True)
    assert train.compiles(run, gpu) and not train.compiles(run, torch.device("cpu"))
    assert train.compiles(config.Settings(compile="always", steps=2), torch.device("cpu"))
    assert not train.compiles(config.Settings(compile="never", steps=1000), gpu) and not capsys.readouterr().out
    monkeypatch.setattr(common, "has_compiler", lambda device: False)
    assert not train.compiles(run, gpu) and "triton or gcc is missing" in capsys.readouterr().out


def test_what_a_compiler_is(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not common.has_compiler(torch.device("cuda")), "without triton"
    monkeypatch.undo()
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not common.has_compiler(torch.device("cuda")) and not common.has_compiler(torch.device("cpu"))


def test_more_memory_than_there_is(dataset, tmp_path):
    """The real allocator of a CPU; a GPU's error, torch.OutOfMemoryError, takes the same way."""
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", f"--dim={2**22}"]
    output = finish(start("train.py", *args), status=2)
    refused(
        (2, output),
        "out of memory (tried to allocate ",
        "GiB by estimate, weights ",
        "; take a smaller --micro_batch or ",
    )


@pytest.mark.parametrize("more, ways", [
    ("", "a smaller --micro_batch or --activation_checkpointing=True or --parallel=fsdp or a smaller model"),
    ("--micro_batch=1 --activation_checkpointing=True --parallel=fsdp", "a smaller model"),
])  # fmt: skip
def test_what_lowers_memory_is_what_is_not_taken_yet(more, ways, dataset, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = [*TOY, f"--data={dataset}", *more.split()]
    assert f"; take {ways}; in samples" in in_one_line(words)
    monkeypatch.setattr("tools.estimate.estimate", lambda *_: [].pop())
    assert in_one_line(words) == f"take {ways}; in samples lower --clip_seconds", "and where there is none left to tell"


def test_a_gpu_says_in_several_ways_that_its_memory_is_out(monkeypatch, capsys):
    for said in ("CUDA error: out of memory\nmore", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):

        def main(said=said):
            raise RuntimeError(said)

        with pytest.raises(SystemExit):
            common.run(main)
        assert f"error: out of memory ({said.splitlines()[0]}); ask for less" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="another"):
        common.run(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_weights_for_another_number_of_codebooks(command, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}", "--codebook_weights=1,2,3"]
    refused(command(train, *args), "codebook_weights: 3 of them, and the codec has 4 codebooks")
    assert not (tmp_path / "out").exists()


def test_a_second_run_in_one_folder_is_refused(command, dataset, tmp_path):
    out = tmp_path / "out"
    args = [*TOY, f"--data={dataset}", f"--out={out}", "--samples=0"]
    first = Ranks(*args, "--steps=100000", "--epoch=5", ranks=1)
    first.wait_for(out / "history.jsonl", 5)
    refused(command(train, *args), f"{out}: another run is under way there", "choose another --out")
    first.send(signal.SIGTERM)
    first.finish(status=128 + signal.SIGTERM)
    step = load(out / "last.pt")["step"]
    assert command(train, *args, f"--steps={step + 1}")[0] == 0


def test_settings_that_the_codec_cannot_serve(command, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}"]
    refused(command(train, *args, "--delays=0,1"), "delays [0, 1]: 4 whole numbers are needed")
    refused(command(train, *args, "--delays=0.5,1,2,3"), "4 whole numbers are needed")
    refused(command(train, *args, "--segment=0.06"), "an item of 3 frames leaves a codebook without a target")
    refused(command(train, *args, "--segment=0.001"), "segment = 0.001: less than a frame of the codec")
    refused(command(train, *args, "--style=True", "--style_seconds=0.001,0.002"), "style_seconds: at most 0.002 s")
    refused(command(train, *args, "--clip_seconds=0.02"), "clip_seconds = 0.02: clips of less than two frames")
    refused(command(train, "config/demo.py", f"--data={tmp_path / 'mistyped'}"), "mistyped: not a prepared data set")
    assert not (tmp_path / "out").exists() and not (tmp_path / "mistyped_audio").exists()


def test_data_of_another_codec(command, own_dataset, tmp_path):
    meta = json.loads((own_dataset / "meta.json").read_text())
    meta["codec"]["id"] = "tiny-K4-00000000"
    (own_dataset / "meta.json").write_text(json.dumps(meta))
    args = [*TOY, f"--data={own_dataset}", f"--out={tmp_path / 'out'}"]
    refused(command(train, *args), "was prepared with codec tiny-K4-00000000")
    refused(command(train, *TOY, f"--data={tmp_path}"), "not a prepared data set", "prepare.py")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_codec(command, toy_run, tmp_path):
    saved, codec = load(toy_run[0] / "best.pt"), load(WEIGHTS)
    saved["codec"]["id"] = "tiny-K4-00000000"
    torch.save(saved, tmp_path / "best.pt")
    args = (tmp_path / "best.pt", "bells", "--device", "cpu", "--out", tmp_path / "out")
    refused(command(sample, *args), "is of codec tiny-K4-00000000", "give --codec_weights")
    torch.save(codec | {"codec_format": 1}, tmp_path / "old.pt")
    refused(command(sample, *args, "--codec_weights", tmp_path / "old.pt"), "not a tiny codec of this version")


def test_a_token_out_of_range_stops_training(command, own_dataset, tmp_path):
    codes = np.load(own_dataset / "train_000.npy")
    codes[:] = 512
    np.save(own_dataset / "train_000.npy", codes)
    args = [*TOY, f"--data={own_dataset}", f"--out={tmp_path / 'out'}"]
    refused(command(train, *args), "holds token 512", "prepare.py check")


def test_settings_that_contradict_the_checkpoint(command, toy_run, dataset):
    out = toy_run[0]
    before = (out / "last.pt").read_bytes()
    args = [*TOY, f"--data={dataset}", f"--out={out}"]
    refused(command(train, *args, "--dim=64", "--layers=1"), "dim was 32, is 64", "layers was 2, is 1", "another --out")
    refused(command(train, *args, "--lora_rank=2"), "lora_rank was 0, is 2", "another --out")
    refused(command(train, *args, "--resume=False"), "holds a run; choose another --out, or remove it")
    assert (out / "last.pt").read_bytes() == before


def test_a_run_that_resumes_on_other_data_says_so(command, own_dataset, tmp_path):
    args = [*TOY, f"--data={own_dataset}", f"--out={tmp_path / 'out'}", "--samples=0"]
    assert "other data" not in command(train, *args)[1]
    meta = json.loads((own_dataset / "meta.json").read_text())
    meta["checksums"]["train_000.npy"] += 1  # as of music that was prepared anew
    (own_dataset / "meta.json").write_text(json.dumps(meta))
    assert f"{own_dataset} holds other data than before" in command(train, *args, "--steps=8")[1]


def test_a_full_disk_leaves_the_checkpoint_before_it(command, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    before = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.tmp").symlink_to("/dev/full")  # every write there says that the disk is full
    refused(command(train, *args, "--steps=8"), f"{tmp_path / 'last.pt'}: cannot be written (", "No space left",
            " are free", "the one before it is whole")  # fmt: skip
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "last.tmp").is_symlink()


def test_a_full_disk_at_a_line_of_the_log(command, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(log, "open", lambda path, mode: open("/dev/full", mode), raising=False)
    refused(command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}"), "No space left on device")


def test_where_nothing_can_be_written(command, dataset, tmp_path):
    (tmp_path / "file").touch()
    refused(command(train, *TOY, f"--data={dataset}", f"--out={tmp_path / 'file'}"), "file: File exists")
    with pytest.raises(UserError, match="clip.wav: cannot be written"):
        write_audio(tmp_path / "file" / "clip.wav", torch.zeros(1, 100), 16_000)


def test_weights_that_cannot_begin_a_run(command, toy_run, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'out'}"]
    refused(command(train, *args, f"--init_from={tmp_path / 'none.pt'}"), "none.pt: no such checkpoint")
    refused(
        command(train, *args, f"--init_from={toy_run[0] / 'best.pt'}", "--dim=64"), "dim was 32, is 64", "same settings"
    )
    saved, other = load(toy_run[0] / "best.pt"), tmp_path / "other.pt"
    name = "blocks.0.up.weight"
    lacking = {key: weight for key, weight in saved["ema"].items() if key != name}
    for ema in (lacking, {**lacking, name: torch.zeros(3, 3)}, {**saved["ema"], "blocks.9.up.weight": torch.zeros(3)}):
        torch.save({**saved, "ema": ema}, other)
        for program, more in ((train, [*args, f"--init_from={other}"]), (sample, [other, "bells"])):
            refused(command(program, *more), "other.pt: its blocks.", "does not fit; use the code and the settings")
    assert not (tmp_path / "out").exists()


def test_a_logger_that_is_not_installed(command, dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    refused(command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}", "--logger=wandb"), "pip install wandb")


def test_devices_that_are_not_there(command, dataset):
    if not torch.cuda.is_available():
        refused(command(train, *TOY, f"--data={dataset}", "--device=cuda"), "device = 'cuda': not on this machine")
    refused(command(train, *TOY, f"--data={dataset}", "--device=abacus"), "device = 'abacus'")


def test_checkpoints_that_are_not(command, toy_run, dataset, tmp_path):
    whole = (toy_run[0] / "best.pt").read_bytes()
    broken = tmp_path / "broken.pt"
    for tenths in range(10):
        broken.write_bytes(whole[: len(whole) * tenths // 10])
        refused(command(sample, broken, "x", "--out", tmp_path / "s"), "broken.pt: truncated, or not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, broken)
    refused(command(sample, broken, "x"), "not a checkpoint of nanoMusicGen")
    refused(command(sample, tmp_path / "none.pt", "x"), "none.pt: no such checkpoint")
    saved = load(toy_run[0] / "best.pt")
    for other in (1, 99):
        torch.save({**saved, "nanomusicgen": other}, broken)
        refused(command(sample, broken, "x"), f"format {other}, and this code reads 3; train it again")
    out = tmp_path / "run"
    out.mkdir()
    torch.save(saved, out / "last.pt")
    refused(command(train, *TOY, f"--data={dataset}", f"--out={out}"), "is a 'best' checkpoint, and 'last' is needed")
    assert not (tmp_path / "s").exists()


class Bomb:
    def __reduce__(self):
        return open, ("bomb_went_off", "w")


def test_a_pickle_bomb_does_not_go_off(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"nanomusicgen": 3, "kind": "best", "ema": Bomb()}, "bomb.pt")
    refused(command(sample, "bomb.pt", "x"), "bomb.pt: truncated, or not a checkpoint")
    assert not (tmp_path / "bomb_went_off").exists()


def test_sampling_requests_that_make_no_sense(command, toy_run, tmp_path):
    best = toy_run[0] / "best.pt"
    for duration in ("0", "-1", "nan", "inf"):
        refused(command(sample, best, "x", "--duration", duration), "must be above 0 seconds")
    soundfile.write(tmp_path / "long.wav", TONE, 16_000)
    args = ("--continue", tmp_path / "long.wav", "--duration", "1")
    refused(command(sample, best, "x", *args), "2.0 s long, and --duration is 1 s", "make --duration longer")
    refused(command(sample, best, "x", "--continue", tmp_path / "no.wav"), "no.wav: cannot be read as audio")
    refused(command(sample, best, "x", "--temperature", "-1"), "--temperature must be 0 or above")
    refused(command(sample, best, "x", "--cfg", "nan"), "--cfg nan: must be a number")
    refused(command(sample, best, "x", "--device", "abacus"), "device = 'abacus': not on this machine")
    soundfile.write(tmp_path / "empty.wav", TONE[:0], 16_000)
    refused(command(sample, best, "x", "--continue", tmp_path / "empty.wav"), "empty.wav: holds no samples")
    (tmp_path / "file").touch()
    refused(command(sample, best, "x", "--out", tmp_path / "file" / "s"), "Not a directory")


def test_a_damaged_log_is_refused_by_name(command, dataset, tmp_path):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--samples=0"]
    assert command(train, *args)[0] == 0
    for content, said in (("{\n", "not JSON"), ("[1]\n", "an object with its step on each line")):
        (tmp_path / "history.jsonl").write_text(content)
        refused(command(train, *args, "--steps=8"), "history.jsonl: ", said)


def test_a_programmers_error_keeps_its_traceback(monkeypatch):
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        common.run(broken)
