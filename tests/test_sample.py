"""sample.py from the command line: files, streams, loudness, and combinations of conditions."""

import io
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, finish, load, start

import sample
from codec import load_codec
from common import UserError
from dataprep.shards import clean_text
from demo.tiny import WEIGHTS
from tools import output


@pytest.fixture
def play(command, toy_run, tmp_path):
    """Run sample.py with the toy model, trained on 1 s: write 0.5 s to tmp_path/out, and return the printed text."""

    def call(*args, status=0):
        actual, printed = command(sample, toy_run[0] / "best.pt", "--duration", 0.5, "--out", tmp_path / "out", *args)
        assert actual == status, printed
        return printed

    return call


def names(folder, pattern="*.wav"):
    return sorted(path.name for path in folder.glob(pattern))


def pcm(path):
    return soundfile.read(path, dtype="int16")[0]


def test_sampling_by_the_command_line(toy_run, tmp_path):
    best = toy_run[0] / "best.pt"
    options = ("--duration", "1.5", "--out", tmp_path, "--top_k", 9999)
    printed = finish(start("sample.py", best, "slow bells", "", *options))
    assert "1.5 s is longer than the 1 s of training" in printed and "no caption: unconditional music" in printed
    assert names(tmp_path) == ["no_caption_1.wav", "slow_bells_0.wav"]
    assert soundfile.info(tmp_path / "slow_bells_0.wav").duration == pytest.approx(1.5)


def make_sine(dbfs, seconds, rate=16_000):
    return 10 ** (dbfs / 20) * torch.sin(2 * math.pi * 997 * torch.arange(round(seconds * rate)) / rate)[None]


def rms(wav):
    """Return the level in dB of full scale."""
    return 10 * math.log10(np.square(wav).mean())


def test_loudness_reaches_the_target_or_is_limited_by_the_peak(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    assert rms(output.set_loudness(make_sine(-30, 2), 16_000, -23).numpy()) == pytest.approx(-23, abs=0.01)
    assert float(output.set_loudness(make_sine(-30, 2), 16_000, 0).abs().max()) == pytest.approx(output.PEAK, rel=1e-3)
    assert not output.set_loudness(torch.zeros(2, 100), 16_000, -23).any()


def test_loudness_is_measured_by_pyloudnorm_if_it_is_installed(monkeypatch):
    class Meter:
        def __init__(self, rate):
            assert rate == 16_000

        def integrated_loudness(self, wav):
            assert wav.shape == (32_000, 1)
            return -40.0

    monkeypatch.setitem(sys.modules, "pyloudnorm", type(sys)("pyloudnorm"))
    monkeypatch.setattr(sys.modules["pyloudnorm"], "Meter", Meter, raising=False)
    wav = make_sine(-30, 2)
    torch.testing.assert_close(output.set_loudness(wav, 16_000, -34), wav * 10 ** (6 / 20))


@pytest.mark.parametrize("suffix, kind", [("wav", "PCM_16"), ("flac", "PCM_16"), ("ogg", "VORBIS"),
                                          ("mp3", "MPEG_LAYER_III")])  # fmt: skip
def test_the_suffix_of_out_or_the_format_sets_the_file_format(play, tmp_path, suffix, kind):
    play("bells", "--out", tmp_path / f"a.{suffix.upper()}")
    play("bells", "--format", suffix)
    for path in (tmp_path / f"a.{suffix.upper()}", tmp_path / "out" / f"bells_0.{suffix}"):
        info = soundfile.info(path)
        assert (info.subtype, info.samplerate) == (kind, 16_000) and info.duration == pytest.approx(0.5)
        assert path.with_suffix(".json").exists() and np.abs(soundfile.read(path)[0]).max() > 0.01
    assert "a file is for one sample" in play("bells", "--n", 2, "--out", tmp_path / f"b.{suffix}", status=2)


def test_files_have_the_requested_loudness(play, tmp_path):
    play("bells", "--loudness=-45")
    play("bells", "--loudness", "none", "--seed", 2)
    assert rms(soundfile.read(tmp_path / "out" / "bells_0.wav")[0]) == pytest.approx(-45, abs=0.1)
    assert abs(rms(soundfile.read(tmp_path / "out" / "bells_2.wav")[0]) + 45) > 1


def test_the_json_next_to_a_file_reproduces_it(play, toy_run, tmp_path):
    play("organ", "--seed", 4, "--out", tmp_path / "organ.wav")
    options = ("--seed", 9, "--cfg", 2, "--temperature", 0.8, "--top_p", 0.9, "--stride", 0.3, "--duration", 1.4)
    options += ("--continue", tmp_path / "organ.wav", "--loudness=-30", "--format", "flac")
    play("slow bells 🔔", "--n", 2, *options)
    info = json.loads((tmp_path / "out" / "slow_bells_10.json").read_text(encoding="utf-8"))
    assert info["caption"] == "slow bells 🔔" and info["seed"] == 10 and info["settings"]["dim"] == 32
    assert {key: info[key] for key in ("cfg", "top_p", "top_k")} == {"cfg": 2, "top_p": 0.9, "top_k": 0}
    assert info["prompt"] == str(tmp_path / "organ.wav")
    assert is_commit(info["code"]) and info["checkpoint"] == str(toy_run[0] / "best.pt")
    first = pcm(tmp_path / "out" / "slow_bells_10.flac").astype(int)
    play(info["caption"], *options, "--seed", info["seed"], "--out", tmp_path / "again")
    np.testing.assert_allclose(pcm(tmp_path / "again" / "slow_bells_10.flac"), first, atol=2)
    play(info["caption"], *options, "--seed", 11, "--out", tmp_path / "again")
    assert np.abs(pcm(tmp_path / "again" / "slow_bells_11.flac").astype(int) - first).max() > 50


def is_commit(code):
    return code == "" or len(code.removesuffix("-dirty")) == 40


def test_files_are_never_overwritten(play, tmp_path, monkeypatch):
    play("bells", "--cfg", 1)
    first = pcm(tmp_path / "out" / "bells_0.wav")
    assert "bells_0.wav: exists already; choose another --seed or --out" in play("bells", "--cfg", 5, status=2)
    np.testing.assert_array_equal(pcm(tmp_path / "out" / "bells_0.wav"), first)
    assert "bells_0.json: exists already" in play("bells", "--format", "flac", status=2)
    (tmp_path / "out" / "bells_1.png").write_bytes(b"another file")  # in the way of a spectrogram only
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: name == "PIL")
        assert "bells_1.png: exists already" in play("bells", "--seed", 1, "--spectrogram", status=2)
    play("bells", "--seed", 1)
    with pytest.raises(UserError, match="bells_0.wav: was written by another program meanwhile"):
        sample.write_sample(tmp_path / "out" / "bells_0.wav", None, None, None, {})


def test_invalid_options_get_one_line(play, tmp_path):
    (tmp_path / "folder.wav").mkdir()
    for args, message in (
        (["--out", tmp_path / "a.m4a"], "a.m4a: this format cannot be written; use a folder, or a file in .wav, .flac"),
        (["--out", tmp_path / "folder.wav"], "folder.wav: an existing folder; use another name"),
        (["--seed", "99999999999999999999"], "must lie between 0 and 2^62"),
        (["--seed=-1"], "must lie between 0 and 2^62"),
        (["--loudness", "3"], "must be below 0 LUFS"),
        (["--n", 0], "--n and --batch must be 1 or above"),
        (["--file", tmp_path / "none.txt"], "none.txt: cannot be read"),
    ):
        printed = play("bells", *args, status=2)
        assert message in printed and printed.count("\n") == 1, printed
    for stride in ("0", "-1", "1", "nan", "inf"):
        assert "must be above 0 and below the 1 s of training" in play("bells", f"--stride={stride}", status=2)
    assert names(tmp_path, "*") == ["folder.wav"]


def test_a_whole_song_is_continued_from_a_time(play, tmp_path):
    """Half of --duration is used, 12 of 25 frames: the same as a file with only this part."""
    song = 0.3 * np.random.default_rng(0).normal(size=70 * 16_000).clip(-1, 1)
    soundfile.write(tmp_path / "song.flac", song, 16_000)
    soundfile.write(tmp_path / "beginning.wav", song[:3840], 16_000)
    soundfile.write(tmp_path / "part.wav", song[62 * 16_000 :][:3840], 16_000)

    def make(name, prompt, *args):
        printed = play("bells", "--out", tmp_path / f"{name}.wav", "--continue", tmp_path / prompt, *args)
        return pcm(tmp_path / f"{name}.wav"), printed

    beginning, part = make("1", "beginning.wav"), make("2", "part.wav")
    assert "cut" not in part[1] and (beginning[0] != part[0]).any()
    clip, printed = make("3", "song.flac")
    np.testing.assert_array_equal(clip, beginning[0])
    assert "song.flac: cut to 0.24 s, from 0 on, because --duration 0.5 includes the prompt" in printed
    for name, time in (("4", "62"), ("5", "1:02"), ("6", "0:01:02.0")):
        clip, printed = make(name, "song.flac", "--from", time)
        np.testing.assert_array_equal(clip, part[0])
        assert f"cut to 0.24 s, from {time} on" in printed
        assert json.loads((tmp_path / f"{name}.json").read_text())["start"] == time
    end, printed = make("7", "song.flac", "--from", "69.8")  # the last 0.2 s are shorter than --duration
    assert "cut" not in printed and len(end) == 8000
    make("8", "song.flac", "--duration", "0.02")


def test_a_moved_run_is_sampled_by_its_folder(toy_run, command, tmp_path):
    folder, out = tmp_path / "moved", tmp_path / "out"
    folder.mkdir()
    saved = load(toy_run[0] / "best.pt")
    saved["settings"]["codec_weights"] = str(tmp_path / "gone" / "codec.pt")
    torch.save(saved, folder / "best.pt")
    shutil.copy(WEIGHTS, folder / "codec.pt")
    args = (folder, "bells", "--duration", 0.1, "--out", out)
    assert command(sample, *args)[0] == 0
    assert json.loads((out / "bells_0.json").read_text())["checkpoint"] == str(folder / "best.pt")
    (folder / "codec.pt").rename(tmp_path / "elsewhere.pt")
    status, printed = command(sample, *args, "--seed", 1)
    assert status == 2 and f"{tmp_path / 'gone' / 'codec.pt'}: no such file" in printed and "--codec_weights" in printed
    assert command(sample, *args, "--seed", 1, "--codec_weights", tmp_path / "elsewhere.pt")[0] == 0
    status, printed = command(sample, tmp_path, "bells", "--out", out)
    assert status == 2 and f"{tmp_path / 'best.pt'}: no such checkpoint" in printed


def test_audio_shorter_than_one_sample_at_the_codecs_rate(play, tmp_path):
    soundfile.write(tmp_path / "tick.wav", np.ones(5) / 2, 192_000)
    assert "tick.wav: too short" in play("bells", "--continue", tmp_path / "tick.wav", status=2)


def test_captions_from_a_file_with_several_samples_each(play, tmp_path):
    (tmp_path / "captions.txt").write_text("\ufefffast bells\r\n\n  \nfast, bells!\n", encoding="utf-8")
    printed = play("organ", "--file", tmp_path / "captions.txt", "--n", 2, "--batch", 4, "--seed", 7)
    numbered = [f"{name}.wav" for name in ("fast_bells_10", "fast_bells_11", "fast_bells_12", "fast_bells_9")]
    assert names(tmp_path / "out") == [*numbered, "organ_7.wav", "organ_8.wav"]
    assert printed.count("wrote ") == 6
    assert json.loads((tmp_path / "out" / "fast_bells_11.json").read_text())["caption"] == "fast, bells!"
    for content in (b"\n \n", b"Fl\xf6te\n"):
        (tmp_path / "captions.txt").write_bytes(content)
        printed = play("--file", tmp_path / "captions.txt", status=2)
        assert ("contains no caption" in printed) == (content[:1] == b"\n")
        assert ("captions.txt: not UTF-8" in printed) == (b"F" in content)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_list_of_captions_has_one_caption_per_line_and_is_read_as_by_prepare(play, tmp_path, encoding):
    lines = ["fast\u2028bells", "slow\x0corgan\x85tune\x1cone", "cal\u200bm\tstrings"]
    for ending in ("\n", "\r\n", "\r"):
        (tmp_path / "list.txt").write_bytes(ending.join(lines).encode(encoding))
        args = sample.parse_arguments(["x", "--file", str(tmp_path / "list.txt")])
        assert sample.read_captions(args) == list(map(clean_text, lines))
    assert sample.read_captions(args)[:2] == ["fast bells", "slow organ tune one"]
    args = sample.parse_arguments(["x", "fast\u2028bells\u200b", "\udcff broken"])
    assert sample.read_captions(args) == ["fast bells", "broken"]


def test_the_typed_one_of_top_k_and_top_p_replaces_the_runs_setting(play, toy_run, tmp_path, command):
    """With the likeliest code only, every seed gives the same music."""
    saved = load(toy_run[0] / "best.pt")

    def make(run, *args):
        saved["settings"] |= run
        torch.save(saved, tmp_path / "run.pt")
        out = tmp_path / f"{len(names(tmp_path, '*'))}"
        args = (tmp_path / "run.pt", "bells", "--n", 2, "--duration", 0.3, "--out", out, *args)
        assert command(sample, *args)[0] == 0
        info = json.loads((out / "bells_0.json").read_text())
        return np.array_equal(pcm(out / "bells_0.wav"), pcm(out / "bells_1.wav")), info["top_k"], info["top_p"]

    assert make({"top_p": 0.9, "top_k": 250}, "--top_k", 1) == (True, 1, 0)
    assert make({"top_p": 1e-9, "top_k": 250}) == (True, 250, 1e-9)
    assert make({"top_p": 1e-9, "top_k": 250}, "--top_k", 0) == (False, 0, 0)
    assert make({"top_p": 0.0, "top_k": 1}) == (True, 1, 0)
    assert make({"top_p": 0.0, "top_k": 1}, "--top_p", 0.99) == (False, 0, 0.99)
    assert make({"top_p": 0.9, "top_k": 1}, "--top_p", 0) == (True, 1, 0)
    printed = play("bells", "--top_k", 5, "--top_p", 0.5, status=2)
    assert "--top_k and --top_p" in printed and printed.count("\n") == 1
    assert "--stride 0.3: not used" in play("bells", "--stride", 0.3, "--cfg_beta", 2, "--seed", 9)
    assert "--cfg_beta 2: not used without --style" in play("bells", "--cfg_beta", 2, "--seed", 10)
    assert "not used" not in play("bells", "--stride", 0.3, "--duration", 1.4, "--seed", 11)
    assert "--stream writes raw samples" in play("bells", "--stream", "--format", "flac", status=2)
    printed = play("bells", "--out", tmp_path / "a.wav", "--format", "flac", status=2)
    assert "--format flac" in printed and not (tmp_path / "a.wav").exists()


def test_a_stopped_list_continues_with_the_same_command(play, tmp_path):
    out = tmp_path / "out"
    args = ("organ", "fast bells", "strings", "--batch", 1)
    play(*args)
    complete = {name: pcm(out / name).astype(int) for name in names(out)}
    for name in ("fast_bells_1", "strings_2"):
        for suffix in (".wav", ".json"):
            (out / f"{name}{suffix}").unlink()
    first = (out / "organ_0.wav").stat().st_mtime_ns
    printed = play(*args, "--device", "cpu")
    assert "skipped 1 of 3 files" in printed and printed.count("wrote ") == 2
    assert (out / "organ_0.wav").stat().st_mtime_ns == first
    for name in complete:
        np.testing.assert_allclose(pcm(out / name), complete[name], atol=3)
    assert "skipped 3 of 3 files" in play(*args) and names(out) == sorted(complete)
    for other in (("--cfg", 2), ("--duration", 0.4), ("--loudness=-30",), ("--temperature", 0.5)):
        assert "organ_0.wav: exists already; choose another --seed or --out" in play(*args, *other, status=2)
    (out / "organ_0.json").write_text("[1]")
    assert "organ_0.wav: exists already" in play(*args, status=2)


def test_files_that_are_older_than_their_checkpoint_are_not_taken_for_complete(toy_run, command, tmp_path):
    shutil.copy(toy_run[0] / "best.pt", tmp_path / "best.pt")
    args = (tmp_path / "best.pt", "bells", "--duration", 0.3, "--out", tmp_path / "bells.wav")
    assert command(sample, *args)[0] == 0 and "skipped 1 of 1" in command(sample, *args)[1]
    os.utime(tmp_path / "best.pt", (2e9, 2e9))  # trained further
    status, printed = command(sample, *args)
    assert status == 2 and "bells.wav: exists already" in printed


def test_interactive_ends_with_q_and_uses_the_next_free_name(play, tmp_path, monkeypatch):
    for ending in ("q", "exit", " QUIT ", ":q", "exit()"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"bells\n{ending}\nnever\n".encode())))
        printed = play("--interactive")
        assert printed.count("wrote ") == 1 and "choose another" not in printed
    assert names(tmp_path / "out") == [f"bells_{seed}.wav" for seed in range(5)]
    assert "bells_3.wav: exists already; trying the next seed" in printed
    seeds = [json.loads((tmp_path / "out" / f"bells_{seed}.json").read_text())["seed"] for seed in range(5)]
    assert seeds == [0, 1, 2, 3, 4]


def test_long_codes_are_decoded_in_parts_that_equal_the_codecs_decoding():
    codec, sizes = load_codec("tiny"), []
    codes = torch.randint(512, (4, 50 * 35), generator=torch.Generator().manual_seed(0))
    expected, decode = codec.decode(codes[None])[0], codec.decode
    codec.decode = lambda codes: sizes.append(codes.shape[2]) or decode(codes)
    torch.testing.assert_close(output.decode_long(codec, codes), expected, atol=1e-4, rtol=0)
    assert len(sizes) > 2 and max(sizes) < 50 * 25


def test_a_sample_does_not_depend_on_its_batch(play, tmp_path):
    for batch in (1, 2, 8):
        play("organ", "fast bells", "", "--batch", batch, "--out", tmp_path / str(batch))
    for name in ("organ_0.wav", "fast_bells_1.wav", "no_caption_2.wav"):
        one, two, eight = (pcm(tmp_path / batch / name).astype(int) for batch in "128")
        np.testing.assert_allclose(one, two, atol=3)
        np.testing.assert_allclose(one, eight, atol=3)
        assert np.abs(one).max() > 100


def test_captions_that_are_empty_or_cut_off_are_reported(play, tmp_path):
    long, odd = "an endless caption " * 3000, "日本の音楽 🎻"
    printed = play(long, "", odd, "--n", 2)
    assert printed.count("no caption: unconditional music") == 1
    assert printed.count("tokens, but the model reads only the first 64") == 1 and len(printed) < 5000
    assert "日本の音楽_4.wav" in names(tmp_path / "out") and "no_caption_2.wav" in names(tmp_path / "out")
    play("\udcff broken bytes")


def test_words_that_no_training_caption_contains_are_reported_once(play, tmp_path):
    printed = play("a slow Piano melody", "ÉTUDE with a kazoo", "kazoo, at last", "--n", 1)
    assert printed.count("words that no training caption contains: kazoo, last, étude\n") == 1
    assert "training caption" not in play("A SLOW PIANO MELODY", "--seed", 5)


def test_a_small_model_on_a_cpu_uses_bfloat16_only_if_requested_or_compiled(toy_run, monkeypatch):
    monkeypatch.setattr("common.has_fast_bfloat16", lambda device_type: True)
    dtypes = {}
    for words in ("", "--dtype bfloat16", "--compile"):
        args = sample.parse_arguments([str(toy_run[0] / "best.pt"), "bells", "--device", "cpu", *words.split()])
        dtypes[words] = sample.load(args)[0].heads.weight.dtype
    assert dtypes == {"": torch.float32, "--dtype bfloat16": torch.bfloat16, "--compile": torch.bfloat16}


def test_device_dtype_and_linear_layers_are_printed(play):
    assert "on cpu (1 thread) in float32, linear layers: Linear\n" in play("bells")


def test_a_spectrogram_next_to_each_file_if_pillow_is_installed(play, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "PIL")
    monkeypatch.setattr(sample, "draw_spectrogram", lambda path, picture, rate: drawn.append((picture.name, rate)))
    play("bells", "--n", 2, "--spectrogram", "--format", "ogg")
    assert drawn == [("bells_0.png", 16_000), ("bells_1.png", 16_000)]
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        printed = play("bells", "--spectrogram", "--seed", 7, status=2)
    assert "--spectrogram: needs Pillow; pip install pillow" in printed
    assert not (tmp_path / "out" / "bells_7.wav").exists()


def test_interactive_reads_captions_until_an_empty_line(play, tmp_path, monkeypatch):
    for ending in (b"\nnever\n", b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"bells\nFl\xf6te\nbells\n" + ending)))
        out = tmp_path / str(len(ending))
        printed = play("first", "--interactive", "--seed", 3, "--out", out)
        assert names(out) == ["bells_4.wav", "bells_6.wav", "first_3.wav", "fl_te_5.wav"]
        assert printed.count("caption> ") == 4 and printed.count("wrote ") == 4
    assert "for one sample" in play("--interactive", "--stream", status=2)
    monkeypatch.setattr(sys, "stdin", None)  # as in a program that was started with stdin closed
    assert "--interactive reads captions from stdin, which is closed; open it" in play("--interactive", status=2)


def test_a_stream_equals_the_file_without_loudness(play, tmp_path, monkeypatch):
    args = ("bells", "--duration", 1.4, "--seed", 5)
    play(*args, "--loudness", "none")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "__stdout__", io.TextIOWrapper(raw))
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    printed = play(*args, "--stream", "--out", tmp_path / "unused")
    streamed = np.frombuffer(raw.getvalue(), "<i2").astype(int)
    np.testing.assert_allclose(streamed, pcm(tmp_path / "out" / "bells_5.wav"), atol=1)
    assert "first audio after" in printed and "x real time" in printed
    assert not (tmp_path / "unused").exists()
    assert "one sample of one caption" in play("a", "b", "--stream", status=2)


@pytest.mark.slow
def test_a_closed_player_ends_the_stream_without_an_error(toy_run):
    process = subprocess.Popen(
        [sys.executable, "sample.py", toy_run[0] / "best.pt", "bells", "--duration", "600", "--stream"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert len(process.stdout.read(6400)) == 6400
    process.stdout.close()
    printed = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0 and "the player closed the stream" in printed
    assert "Traceback" not in printed and "Exception" not in printed


def write_tone(path, seconds, hertz=220.0, rate=16_000, gain=0.3):
    soundfile.write(path, gain * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate), rate)
    return path


def test_combinations_of_conditions(all_conditions, command, tmp_path):
    tune, other = write_tone(tmp_path / "tune.wav", 0.7, rate=22_050), write_tone(tmp_path / "other.wav", 3, 523.25)

    prompt = write_tone(tmp_path / "prompt.wav", 0.2)

    def make(name, *args):
        status, printed = command(sample, all_conditions, "--duration", 1, "--out", tmp_path / f"{name}.wav", *args)
        assert status == 0, printed
        return pcm(tmp_path / f"{name}.wav").astype(int), printed

    text = ("slow bells",)
    clips = {
        "text": make("text", *text), "melody": make("melody", *text, "--melody", tune),
        "other": make("other_melody", *text, "--melody", other), "alone": make("alone", "--melody", tune),
        "style": make("style", *text, "--style", other),
        "one": make("one", *text, "--style", other, "--style_codebooks", 1),
        "beta": make("beta", *text, "--style", other, "--cfg_beta", 3),
        "all": make("all", *text, "--melody", tune, "--style", other, "--continue", prompt),
    }  # fmt: skip
    for i, a in enumerate(clips):
        for b in list(clips)[:i]:
            assert np.abs(clips[a][0] - clips[b][0]).max() > 100, (a, b)
    printed = clips["melody"][1]
    assert "tune.wav: resampled from 22050 to 16000 Hz" in printed and "tune.wav: repeated to 1 s" in printed
    assert "other.wav: cut to 1 s" in clips["other"][1]
    assert "other.wav: using the middle 0.5 s" in clips["style"][1]
    assert "no caption: conditioned on melody" in clips["alone"][1]
    info = json.loads((tmp_path / "all.json").read_text())
    assert info["melody"] == str(tune) and info["style"] == str(other)


def test_prompt_melody_and_style_are_read_by_ffmpeg(fake_ffmpeg, all_conditions, command, tmp_path, monkeypatch):
    tune, rate = 0.3 * np.sin(2 * np.pi * 220 * np.arange(70_000) / 22_050), 22_050
    soundfile.write(tmp_path / "tune.wav", tune, rate, subtype="FLOAT")
    soundfile.write(tmp_path / "tune.m4a", tune, rate, format="AU", subtype="FLOAT")

    def make(name):
        path, out = tmp_path / name, tmp_path / f"{name}.flac"
        args = ("--continue", path, "--from", 1, "--melody", path, "--style", path, "--duration", 1, "--out", out)
        status, printed = command(sample, all_conditions, "bells", *args)
        return status, printed, out

    outs = [make(name)[2] for name in ("tune.wav", "tune.m4a")]
    np.testing.assert_array_equal(*map(pcm, outs))
    outs[1].unlink()
    monkeypatch.setenv("PATH", "")
    status, printed, out = make("tune.m4a")
    assert status == 2 and "tune.m4a: .m4a files are read by ffmpeg, which is not installed" in printed
    assert not out.exists()


def test_an_invalid_melody_or_style_gets_one_line(all_conditions, toy_run, command, tmp_path):
    def error(*args, checkpoint=all_conditions):
        status, printed = command(sample, checkpoint, "x", "--out", tmp_path / "out", "--duration", 1, *args)
        assert status == 2 and "Traceback" not in printed
        return printed.splitlines()[-1]

    good, silent = write_tone(tmp_path / "good.wav", 1), write_tone(tmp_path / "silent.wav", 1, gain=1e-5)
    (tmp_path / "text.wav").write_text("not audio")
    for option in ("--melody", "--style"):
        assert "no.wav: cannot be read as audio" in error(option, tmp_path / "no.wav")
        assert "text.wav: cannot be read as audio" in error(option, tmp_path / "text.wav")
        assert f"{option} {silent}: is silent" in error(option, silent)
        assert "0.050 s long; at least 0.125 s are needed" in error(option, write_tone(tmp_path / "short.wav", 0.05))
        message = error(option, good, checkpoint=toy_run[0] / "best.pt")
        assert "was not trained with it; its conditions are text" in message
    message = error("--melody", write_tone(tmp_path / "hiss.wav", 1, 7000))
    assert "hiss.wav: has no note from C2 to B7 above -60 dBFS; choose another file" in message
    assert "--style_codebooks 7: must be from 1 to 6" in error("--style", good, "--style_codebooks", 7)
    assert "--cfg_beta nan: must be a number" in error("--cfg_beta", "nan")
    assert not (tmp_path / "out").exists()
