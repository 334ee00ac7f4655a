"""sample.py by its command line: files, streams, levels, and any mix of conditions."""

import io
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, finish, start

import sample
from common import UserError


@pytest.fixture
def play(command, toy_run, tmp_path):
    """Runs sample.py on the toy (trained on 1 s), for half a second into tmp_path/out: -> what it printed."""

    def call(*args, status=0):
        found, output = command(sample, toy_run[0] / "best.pt", "--duration", 0.5, "--out", tmp_path / "out", *args)
        assert found == status, output
        return output

    return call


def names(folder, pattern="*.wav"):
    return sorted(path.name for path in folder.glob(pattern))


def pcm(path):
    return soundfile.read(path, dtype="int16")[0]


def test_sampling_by_the_command_line(toy_run, tmp_path):
    best = toy_run[0] / "best.pt"
    output = finish(start("sample.py", best, "slow bells", "", "--duration", "1.5", "--out", tmp_path, "--top_k", 9999))
    assert "past the 1 s of training" in output and "no caption: unconditional music" in output
    assert names(tmp_path) == ["no_caption_1.wav", "slow_bells_0.wav"]
    assert soundfile.info(tmp_path / "slow_bells_0.wav").duration == pytest.approx(1.5)


def sine(dbfs, seconds, rate=16_000):
    return 10 ** (dbfs / 20) * torch.sin(2 * math.pi * 997 * torch.arange(round(seconds * rate)) / rate)[None]


def rms(wav):
    """In dB of full scale."""
    return 10 * math.log10(np.square(wav).mean())


def test_levels_reach_the_target_or_stop_at_the_peak(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyloudnorm", None)
    assert rms(sample.set_loudness(sine(-30, 2), 16_000, -23).numpy()) == pytest.approx(-23, abs=0.01)
    assert float(sample.set_loudness(sine(-30, 2), 16_000, 0).abs().max()) == pytest.approx(sample.PEAK, rel=1e-3)
    assert not sample.set_loudness(torch.zeros(2, 100), 16_000, -23).any()


def test_loudness_is_that_of_the_standard_where_pyloudnorm_is_installed(monkeypatch):
    class Meter:
        def __init__(self, rate):
            assert rate == 16_000

        def integrated_loudness(self, wav):
            assert wav.shape == (32_000, 1)
            return -40.0

    monkeypatch.setitem(sys.modules, "pyloudnorm", type(sys)("pyloudnorm"))
    monkeypatch.setattr(sys.modules["pyloudnorm"], "Meter", Meter, raising=False)
    wav = sine(-30, 2)
    torch.testing.assert_close(sample.set_loudness(wav, 16_000, -34), wav * 10 ** (6 / 20))


@pytest.mark.parametrize("suffix, kind", [("wav", "PCM_16"), ("flac", "PCM_16"), ("ogg", "VORBIS"),
                                          ("mp3", "MPEG_LAYER_III")])  # fmt: skip
def test_the_suffix_of_out_or_the_format_decides(play, tmp_path, suffix, kind):
    play("bells", "--out", tmp_path / f"a.{suffix.upper()}")
    play("bells", "--format", suffix)
    for path in (tmp_path / f"a.{suffix.upper()}", tmp_path / "out" / f"bells_0.{suffix}"):
        info = soundfile.info(path)
        assert (info.subtype, info.samplerate) == (kind, 16_000) and info.duration == pytest.approx(0.5)
        assert path.with_suffix(".json").exists() and np.abs(soundfile.read(path)[0]).max() > 0.01
    assert "a file is for one sample" in play("bells", "--n", 2, "--out", tmp_path / f"b.{suffix}", status=2)


def test_clips_are_as_loud_as_asked(play, tmp_path):
    play("bells", "--loudness=-45")
    play("bells", "--loudness", "none", "--seed", 2)
    assert rms(soundfile.read(tmp_path / "out" / "bells_0.wav")[0]) == pytest.approx(-45, abs=0.1)
    assert abs(rms(soundfile.read(tmp_path / "out" / "bells_2.wav")[0]) + 45) > 1


def test_the_json_beside_a_clip_says_what_made_it(play, toy_run, tmp_path):
    play("organ", "--seed", 4, "--out", tmp_path / "organ.wav")
    options = ("--seed", 9, "--cfg", 2, "--temperature", 0.8, "--top_p", 0.9, "--stride", 0.3, "--duration", 1.4)
    options += ("--continue", tmp_path / "organ.wav", "--loudness=-30", "--format", "flac")
    play("slow bells 🔔", "--n", 2, *options)
    about = json.loads((tmp_path / "out" / "slow_bells_10.json").read_text(encoding="utf-8"))
    assert about["caption"] == "slow bells 🔔" and about["seed"] == 10 and about["settings"]["dim"] == 32
    assert about["cfg"] == 2 and about["top_k"] == 250 and about["prompt"] == str(tmp_path / "organ.wav")
    assert is_a_hash(about["code"]) and about["checkpoint"] == str(toy_run[0] / "best.pt")
    first = pcm(tmp_path / "out" / "slow_bells_10.flac").astype(int)
    play(about["caption"], *options, "--seed", about["seed"], "--out", tmp_path / "again")
    np.testing.assert_allclose(pcm(tmp_path / "again" / "slow_bells_10.flac"), first, atol=2)
    play(about["caption"], *options, "--seed", 11, "--out", tmp_path / "again")
    assert np.abs(pcm(tmp_path / "again" / "slow_bells_11.flac").astype(int) - first).max() > 50


def is_a_hash(code):
    return code == "" or len(code.removesuffix("-dirty")) == 40


def test_a_file_is_not_written_over(play, tmp_path):
    play("bells", "--cfg", 1)
    first = pcm(tmp_path / "out" / "bells_0.wav")
    assert "bells_0.wav: is there already; choose another --seed or --out" in play("bells", "--cfg", 5, status=2)
    np.testing.assert_array_equal(pcm(tmp_path / "out" / "bells_0.wav"), first)
    assert "bells_0.json: is there already" in play("bells", "--format", "flac", status=2)
    (tmp_path / "out" / "bells_1.png").write_bytes(b"somebody's")  # in the way of a spectrogram, and of nothing else
    assert "bells_1.png: is there already" in play("bells", "--seed", 1, "--spectrogram", status=2)
    play("bells", "--seed", 1)
    with pytest.raises(UserError, match="bells_0.wav: is there already, by another program meanwhile"):
        sample.write_sample(tmp_path / "out" / "bells_0.wav", None, None, None, {})


def test_odd_requests_get_one_line(play, tmp_path):
    (tmp_path / "folder.wav").mkdir()
    for args, said in (
        (["--out", tmp_path / "a.m4a"], "no format that can be written"),
        (["--out", tmp_path / "folder.wav"], "no format that can be written, or a folder"),
        (["--seed", "99999999999999999999"], "must lie between 0 and 2^62"),
        (["--seed=-1"], "must lie between 0 and 2^62"),
        (["--loudness", "3"], "must be below 0 LUFS"),
        (["--n", 0], "--n and --batch must be 1 or above"),
        (["--file", tmp_path / "none.txt"], "none.txt: No such file"),
    ):
        output = play("bells", *args, status=2)
        assert said in output and output.count("\n") == 1, output
    for stride in ("0", "-1", "1", "nan", "inf"):
        assert "must be above 0 and below the 1 s of training" in play("bells", f"--stride={stride}", status=2)
    assert names(tmp_path, "*") == ["folder.wav"]


def test_audio_shorter_than_a_sample_of_the_codec(play, tmp_path):
    soundfile.write(tmp_path / "tick.wav", np.ones(5) / 2, 192_000)
    assert "tick.wav: too short" in play("bells", "--continue", tmp_path / "tick.wav", status=2)


def test_captions_from_a_file_and_samples_of_each(play, tmp_path):
    (tmp_path / "captions.txt").write_text("\ufefffast bells\r\n\n  \nfast, bells!\n", encoding="utf-8")
    output = play("organ", "--file", tmp_path / "captions.txt", "--n", 2, "--batch", 4, "--seed", 7)
    numbered = [f"{name}.wav" for name in ("fast_bells_10", "fast_bells_11", "fast_bells_12", "fast_bells_9")]
    assert names(tmp_path / "out") == [*numbered, "organ_7.wav", "organ_8.wav"]
    assert output.count("wrote ") == 6
    assert json.loads((tmp_path / "out" / "fast_bells_11.json").read_text())["caption"] == "fast, bells!"
    for content in (b"\n \n", b"Fl\xf6te\n"):
        (tmp_path / "captions.txt").write_bytes(content)
        said = play("--file", tmp_path / "captions.txt", status=2)
        assert ("holds no caption" in said) == (content[:1] == b"\n") and ("is not UTF-8" in said) == (b"F" in content)


def test_a_sample_does_not_depend_on_its_batch(play, tmp_path):
    for batch in (1, 2, 8):
        play("organ", "fast bells", "", "--batch", batch, "--out", tmp_path / str(batch))
    for name in ("organ_0.wav", "fast_bells_1.wav", "no_caption_2.wav"):
        one, two, eight = (pcm(tmp_path / batch / name).astype(int) for batch in "128")
        np.testing.assert_allclose(one, two, atol=3)
        np.testing.assert_allclose(one, eight, atol=3)
        assert np.abs(one).max() > 100


def test_what_the_model_does_not_hear_is_said(play, tmp_path):
    long, odd = "an endless caption " * 3000, "日本の音楽 🎻"
    output = play(long, "", odd, "--n", 2)
    assert output.count("no caption: unconditional music") == 1
    assert output.count("tokens the model hears the first 64") == 1 and len(output) < 5000
    assert "日本の音楽_4.wav" in names(tmp_path / "out") and "no_caption_2.wav" in names(tmp_path / "out")
    play("\udcff broken bytes")


def test_words_that_training_never_met_are_said_once(play, tmp_path):
    output = play("a slow Piano melody", "ÉTUDE with a kazoo", "kazoo, at last", "--n", 1)
    assert output.count("in no caption that the model was trained with: kazoo, last, étude\n") == 1
    assert "trained with" not in play("A SLOW PIANO MELODY", "--seed", 5)


def test_a_small_model_on_a_cpu_takes_bfloat16_only_where_asked_or_compiled(toy_run, monkeypatch):
    monkeypatch.setattr("common.has_fast_bfloat16", lambda device_type: True)
    taken = {}
    for words in ("", "--dtype bfloat16", "--compile"):
        args = sample.parse_arguments([str(toy_run[0] / "best.pt"), "bells", "--device", "cpu", *words.split()])
        taken[words] = sample.load(args)[0].heads.weight.dtype
    assert taken == {"": torch.float32, "--dtype bfloat16": torch.bfloat16, "--compile": torch.bfloat16}


def test_what_was_chosen_for_this_machine_is_said(play):
    assert "on cpu (1 thread) in float32 by Linear\n" in play("bells")


def test_a_spectrogram_beside_each_clip_where_pillow_is(play, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(sample, "draw_spectrogram", lambda path, picture, rate: drawn.append((picture.name, rate)))
    play("bells", "--n", 2, "--spectrogram", "--format", "ogg")
    assert drawn == [("bells_0.png", 16_000), ("bells_1.png", 16_000)]
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        said = play("bells", "--spectrogram", "--seed", 7, status=2)
    assert "--spectrogram: needs Pillow; pip install pillow" in said


def test_interactive_reads_captions_until_an_empty_line(play, tmp_path, monkeypatch):
    for ending in (b"\nnever\n", b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"bells\nFl\xf6te\nbells\n" + ending)))
        out = tmp_path / str(len(ending))
        output = play("first", "--interactive", "--seed", 3, "--out", out)
        assert names(out) == ["bells_4.wav", "bells_6.wav", "first_3.wav", "fl_te_5.wav"]
        assert output.count("caption> ") == 4 and output.count("wrote ") == 4
    assert "for one sample" in play("--interactive", "--stream", status=2)
    monkeypatch.setattr(sys, "stdin", None)  # as of a program that is started without one
    assert "--interactive a stdin; open what is closed" in play("--interactive", status=2)


def test_a_stream_is_the_file_without_loudness(play, tmp_path, monkeypatch):
    args = ("bells", "--duration", 1.4, "--seed", 5)
    play(*args, "--loudness", "none")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "__stdout__", io.TextIOWrapper(raw))
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    said = play(*args, "--stream", "--out", tmp_path / "unused")
    streamed = np.frombuffer(raw.getvalue(), "<i2").astype(int)
    np.testing.assert_allclose(streamed, pcm(tmp_path / "out" / "bells_5.wav"), atol=1)
    assert "first audio after" in said and "x real time" in said
    assert not (tmp_path / "unused").exists()
    assert "one sample of one caption" in play("a", "b", "--stream", status=2)


def test_a_player_that_is_closed_ends_the_stream_quietly(toy_run):
    process = subprocess.Popen(
        [sys.executable, "sample.py", toy_run[0] / "best.pt", "bells", "--duration", "600", "--stream"], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert len(process.stdout.read(6400)) == 6400
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0 and "the player has gone" in said
    assert "Traceback" not in said and "Exception" not in said


def audio(path, seconds, hertz=220.0, rate=16_000, gain=0.3):
    soundfile.write(path, gain * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate), rate)
    return path


def test_any_mix_of_conditions(of_all_conditions, command, tmp_path):
    tune, other = audio(tmp_path / "tune.wav", 0.7, rate=22_050), audio(tmp_path / "other.wav", 3, 523.25)

    def make(name, *args):
        status, output = command(sample, of_all_conditions, "--duration", 1, "--out", tmp_path / f"{name}.wav", *args)
        assert status == 0, output
        return pcm(tmp_path / f"{name}.wav").astype(int), output

    text = ("slow bells",)
    clips = {
        "text": make("text", *text), "melody": make("melody", *text, "--melody", tune),
        "other": make("other_melody", *text, "--melody", other), "alone": make("alone", "--melody", tune),
        "style": make("style", *text, "--style", other),
        "one": make("one", *text, "--style", other, "--style_codebooks", 1),
        "beta": make("beta", *text, "--style", other, "--cfg_beta", 3),
        "all": make("all", *text, "--melody", tune, "--style", other, "--continue", audio(tmp_path / "a.wav", 0.2)),
    }  # fmt: skip
    for i, a in enumerate(clips):
        for b in list(clips)[:i]:
            assert np.abs(clips[a][0] - clips[b][0]).max() > 100, (a, b)
    said = clips["melody"][1]
    assert "tune.wav: resampled from 22050 to 16000 Hz" in said and "tune.wav: repeated to 1 s" in said
    assert "other.wav: cut to 1 s" in clips["other"][1]
    assert "other.wav: its middle 0.5 s are taken" in clips["style"][1]
    assert "no caption: by melody alone" in clips["alone"][1]
    about = json.loads((tmp_path / "all.json").read_text())
    assert about["melody"] == str(tune) and about["style"] == str(other)


def test_a_melody_or_style_that_will_not_do(of_all_conditions, toy_run, command, tmp_path):
    def said(*args, checkpoint=of_all_conditions):
        status, output = command(sample, checkpoint, "x", "--out", tmp_path / "out", "--duration", 1, *args)
        assert status == 2 and "Traceback" not in output
        return output.splitlines()[-1]

    good, silent = audio(tmp_path / "good.wav", 1), audio(tmp_path / "silent.wav", 1, gain=1e-5)
    (tmp_path / "text.wav").write_text("not audio")
    for option in ("--melody", "--style"):
        assert "no.wav: cannot be read as audio" in said(option, tmp_path / "no.wav")
        assert "text.wav: cannot be read as audio" in said(option, tmp_path / "text.wav")
        assert f"{option} {silent}: is silent" in said(option, silent)
        assert "0.050 s long; at least 0.125 s are needed" in said(option, audio(tmp_path / "short.wav", 0.05))
        refusal = said(option, good, checkpoint=toy_run[0] / "best.pt")
        assert "was not trained with it; its conditions are text" in refusal
    assert "no note is heard in it" in said("--melody", audio(tmp_path / "hiss.wav", 1, 7000))
    assert "must be from 1 to training's 6" in said("--style", good, "--style_codebooks", 7)
    assert "--cfg_beta nan: must be a number" in said("--cfg_beta", "nan")
    assert not (tmp_path / "out").exists()
