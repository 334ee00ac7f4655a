"""sample.py by its command line, and what stands behind it: streaming, loudness, writing audio."""

import dataclasses
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
from checkpoint import save_checkpoint
from conftest import ROOT
from loudness import PEAK_LIMIT, level, loudness, true_peak

import config
import sample
from codec import decode_stream, load_codec, write_audio
from model import MusicLM, load_model


def sine(hertz, dbfs, seconds, rate=48_000, phase=0.0):
    t = np.arange(round(seconds * rate)) / rate
    return 10 ** (dbfs / 20) * np.sin(2 * np.pi * hertz * t + phase)[None]


@pytest.fixture
def play(command, toy_run, tmp_path):
    """Runs sample.py on the toy (trained on 1 s), for half a second into tmp_path/out: -> what it printed."""

    def call(*args, status=0):
        default = () if "--again" in args else (toy_run[0] / "best.pt", "--duration", 0.5)
        found, output = command(sample, *default, "--out", tmp_path / "out", *args)
        assert found == status, output
        return output

    return call


def names(folder, pattern="*.wav"):
    return sorted(path.name for path in folder.glob(pattern))


def pcm(path):
    return soundfile.read(path, dtype="int16")[0]


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_loudness_is_that_of_the_standard(rate):
    """BS.1770-4's own example, and the cases 3 and 5 of EBU Tech 3341, in one channel or two."""
    full = sine(997, 0, 3, rate)
    assert loudness(full, rate) == pytest.approx(-3.01, abs=0.01)
    assert loudness(np.concatenate([full, full]), rate) == pytest.approx(0, abs=0.01)
    for levels in (((-36, 10), (-23, 60), (-36, 10)), ((-26, 20), (-20, 20.1), (-26, 20))):
        wav = np.concatenate([sine(1000, *part, rate) for part in levels], axis=1)
        assert loudness(np.concatenate([wav, wav]), rate) == pytest.approx(-23, abs=0.1)
    assert loudness(sine(40, 0, 3, rate), rate) < loudness(full, rate) - 5, "low tones are heard less"
    assert loudness(sine(6000, 0, 3, rate), rate) > loudness(full, rate) + 3, "high ones more"
    assert loudness(sine(997, -71, 3, rate), rate) == -math.inf


def test_levels_reach_the_target_or_stop_at_the_true_peak():
    between = sine(4000, -10, 2, 16_000, phase=math.pi / 4)  # whose peaks lie between the samples
    assert np.abs(between).max() < 0.23 and true_peak(between[:, 800:-800], 16_000) == pytest.approx(-10, abs=0.2)
    wav, about = level(between, 16_000, -23)
    assert loudness(wav, 16_000) == pytest.approx(-23, abs=0.01) and not about["limited"]
    wav, about = level(between, 16_000, 0)
    assert about["limited"] and true_peak(wav, 16_000) == pytest.approx(PEAK_LIMIT, abs=0.01)
    assert about["reached"] == pytest.approx(loudness(wav, 16_000), abs=0.01)
    clicks = np.zeros((1, 32_000))
    clicks[:, ::4000] = 3.0
    assert np.abs(level(clicks, 16_000, -10)[0]).max() < 0.9
    silence, about = level(np.zeros((2, 100)), 16_000, -23)
    assert not silence.any() and about["gain"] == 0 and about["loudness"] is None
    assert loudness(sine(997, 0, 0.01), 48_000) < -15, "a tick too short for a block counts with the silence after it"


@pytest.mark.parametrize("suffix, kind", [("wav", "PCM_16"), ("flac", "PCM_16"), ("ogg", "VORBIS"),
                                          ("mp3", "MPEG_LAYER_III")])  # fmt: skip
def test_the_suffix_of_out_or_the_format_decides(play, tmp_path, suffix, kind):
    play("bells", "--out", tmp_path / f"a.{suffix.upper()}")
    play("bells", "--format", suffix)
    for path in (tmp_path / f"a.{suffix.upper()}", tmp_path / "out" / f"bells_0.{suffix}"):
        info = soundfile.info(path)
        assert (info.subtype, info.samplerate) == (kind, 16_000) and info.duration == pytest.approx(0.5)
        assert path.with_suffix(".json").exists() and np.abs(soundfile.read(path)[0]).max() > 0.01
    play("bells", "--n", 2, "--out", tmp_path / f"b.{suffix}")
    assert names(tmp_path, "b*") == [f"b_{i}.{ending}" for i in (0, 1) for ending in sorted(["json", suffix])]


def test_long_ogg_files_can_be_written(tmp_path):
    write_audio(tmp_path / "long.ogg", torch.zeros(1, 16_000 * 600), 16_000)
    assert soundfile.info(tmp_path / "long.ogg").duration == 600


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile.SoundFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_audio(tmp_path / "a.wav", torch.zeros(1, 100), 16_000)
    assert names(tmp_path, "*") == []


def test_clips_are_as_loud_as_asked(play, tmp_path):
    play("bells", "--loudness", -35)
    play("bells", "--loudness", 0, "--seed", 1)
    play("bells", "--loudness", "none", "--seed", 2)
    clips = [soundfile.read(tmp_path / "out" / f"bells_{seed}.wav", always_2d=True)[0].T for seed in range(3)]
    about = [json.loads((tmp_path / "out" / f"bells_{seed}.json").read_text())["level"] for seed in range(3)]
    assert loudness(clips[0], 16_000) == pytest.approx(-35, abs=0.1) and not about[0]["limited"]
    assert true_peak(clips[1], 16_000) == pytest.approx(PEAK_LIMIT, abs=0.1) and about[1]["limited"]
    assert about[1]["reached"] == pytest.approx(loudness(clips[1], 16_000), abs=0.1) and about[2] is None


def test_the_json_is_enough_to_make_the_clip_again(play, toy_run, tmp_path):
    play("organ", "--seed", 4, "--out", tmp_path / "organ.wav")
    choice = ("--seed", 9, "--cfg", 2, "--temperature", 0.8, "--top_p", 0.9, "--stride", 0.3, "--duration", 1.4)
    choice += ("--continue", tmp_path / "organ.wav", "--loudness", -30, "--format", "flac")
    play("slow bells 🔔", "--n", 2, *choice)
    beside = tmp_path / "out" / "slow_bells_10.json"
    about = json.loads(beside.read_text(encoding="utf-8"))
    assert about["caption"] == "slow bells 🔔" and about["seed"] == 10 and about["settings"]["dim"] == 32
    assert about["codec"].startswith("tiny-K4-") and about["stride"] == pytest.approx(0.3)
    for key in ("checkpoint_sha256", "prompt_sha256", "torch", "code", "device"):
        assert about[key]
    first = pcm(beside.with_suffix(".flac"))
    assert "is not the one of" not in play("--again", beside, "--out", tmp_path / "again")
    np.testing.assert_allclose(pcm(tmp_path / "again" / "slow_bells_10.flac"), first, atol=2)
    play("--again", beside, "--seed", 11, "--out", tmp_path / "again")
    assert np.abs(pcm(tmp_path / "again" / "slow_bells_11.flac").astype(int) - first).max() > 50
    play("organ", "--seed", 5, "--out", tmp_path / "organ.wav")
    assert "prompt_sha256 is not the one of" in play("--again", beside, "--out", tmp_path / "again")
    for content in ("{", '{"seed": 3}', "[]"):
        beside.write_text(content)
        assert "not the .json of a clip" in play("--again", beside, status=2)
    assert "slow_bells_10.json: not" in play("--again", beside, status=2)


def test_a_clip_made_otherwise_is_not_written_over(play, tmp_path):
    play("bells", "--cfg", 1)
    first = pcm(tmp_path / "out" / "bells_0.wav")
    play("bells", "--cfg", 5)
    play("bells", "--cfg", 1)
    assert names(tmp_path / "out") == ["bells_0.wav", "bells_0_2.wav"]
    np.testing.assert_array_equal(pcm(tmp_path / "out" / "bells_0.wav"), first)
    play("bells", "--out", tmp_path / "a.flac")
    assert json.loads((tmp_path / "a.json").read_text())["format"] == "flac"
    play("--again", tmp_path / "a.json", "--out", tmp_path / "again")
    np.testing.assert_allclose(pcm(tmp_path / "again" / "bells_0.flac"), pcm(tmp_path / "a.flac"), atol=2)


def test_odd_requests_get_one_line(play, tmp_path):
    (tmp_path / "folder.wav").mkdir()
    for args, said in (
        (["--out", tmp_path / "a.m4a"], "is no format that can be written"),
        (["--out", tmp_path / "folder.wav"], "folder.wav: is a folder"),
        (["--seed", "99999999999999999999"], "must lie between 0 and 2^62"),
        (["--seed=-1"], "must lie between 0 and 2^62"),
        (["--style_books", 2], "which is not given"),
        (["--out", "caf\udce9"], "holds bytes that are no text"),
    ):
        output = play("bells", *args, status=2)
        assert said in output and output.count("\n") == 1, output
    play("bells")
    beside = tmp_path / "out" / "bells_0.json"
    assert "give options only" in play("--again", beside, "other caption", status=2)
    about = json.loads(beside.read_text())
    for key, value in (("duration", None), ("caption", None), ("checkpoint", 3), ("seed", "x")):
        beside.write_text(json.dumps({**about, key: value}))
        assert f'"{key}" is {value!r}' in play("--again", beside, status=2)


def test_audio_shorter_than_a_sample_of_the_codec(play, tmp_path):
    soundfile.write(tmp_path / "tick.wav", np.ones(5) / 2, 192_000)
    assert "tick.wav: too short" in play("bells", "--continue", tmp_path / "tick.wav", status=2)


def test_captions_from_a_file_and_takes_of_each(play, tmp_path):
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
    assert "none.txt: cannot be read" in play("--file", tmp_path / "none.txt", status=2)


def test_a_take_does_not_depend_on_its_batch(play, tmp_path):
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


def test_what_cannot_be_written_is_said_before_the_model_is_read(command, tmp_path, monkeypatch):
    def said(*args):
        status, output = command(sample, tmp_path / "no_model.pt", "x", *args)
        assert status == 2 and output.count("\n") == 1
        return output

    assert "no_model.pt: no such checkpoint" in said("--out", tmp_path / "out")
    (tmp_path / "file").touch()
    assert "cannot be written to" in said("--out", tmp_path / "file" / "out")
    assert "cannot be written to" in said("--out", tmp_path / "file" / "clip.mp3")
    monkeypatch.setattr(config.os, "access", lambda path, mode: False)
    assert "may not be written to" in said("--out", tmp_path)
    assert names(tmp_path, "*") == ["file"]
    assert "must lie between -70 and 0 LUFS" in said("--loudness", "3")
    assert "--n and --batch must be 1 or above" in said("--n", "0")


def test_a_spectrogram_beside_each_clip(play, tmp_path):
    play("bells", "--n", 2, "--spectrogram", "--format", "ogg")
    assert names(tmp_path / "out", "*.png") == ["bells_0.png", "bells_1.png"]
    assert (tmp_path / "out" / "bells_0.png").read_bytes().startswith(b"\x89PNG")


def test_interactive_reads_captions_until_an_empty_line(play, tmp_path, monkeypatch):
    for ending in (b"\nnever\n", b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"bells\nFl\xf6te\nbells\n" + ending)))
        output = play("first", "--interactive", "--seed", 3)
        assert names(tmp_path / "out") == ["bells_4.wav", "bells_6.wav", "first_3.wav", "fl_te_5.wav"]
        assert output.count("caption> ") == 4 and output.count("wrote ") == 4
    assert "for one take" in play("--interactive", "--stream", status=2)


def test_windows_go_on_by_the_stride(play, toy_run, monkeypatch):
    model = load_model(toy_run[0] / "best.pt")[0]  # trained on 50 frames
    contexts, usual = [], model.continue_codes

    def watched(context, T, *rest):
        contexts.append(context[:, :, :T].clone())
        return usual(context, T, *rest)

    monkeypatch.setattr(model, "continue_codes", watched)
    for stride, starts in ((None, [0, 50, 75, 100]), (30, [0, 50, 80]), (10, [0, 50, 60, 70, 80, 90, 100])):
        contexts.clear()
        codes = model.generate([{"text": "bells"}], 110, stride=stride)
        kept = 50 - (stride or 25)
        assert codes.shape == (1, 4, 110) and len(contexts) == len(starts)
        for start, context in zip(starts, contexts):
            assert torch.equal(context, codes[:, :, max(0, start - kept) : start])
    assert "0.2 s further each time" in play("bells", "--duration", 1.4, "--stride", 0.2)
    for stride in ("0", "-1", "1", "nan", "inf"):
        assert "must be above 0 and below the 1 s of training" in play("bells", f"--stride={stride}", status=2)


@pytest.mark.parametrize("pattern, steps", [("delay", 4), ("parallel", 1), ("unrolled", 4)])
@pytest.mark.parametrize("prompted", [False, True])
def test_frames_are_streamed_as_soon_as_they_are_final(toy_run, monkeypatch, pattern, steps, prompted):
    trained, settings, codec = load_model(toy_run[0] / "best.pt")
    torch.manual_seed(0)
    tokenizer = trained.conditioner.text.tokenizer.serialized_model_proto()
    model = MusicLM(dataclasses.replace(settings, pattern=pattern, segment=0.4), codec, tokenizer).eval()
    with torch.no_grad():
        model.embed.weight.mul_(5)
    calls, usual = [], model.step
    monkeypatch.setattr(model, "step", lambda *args: calls.append(1) or usual(*args))
    prompt = torch.randint(0, model.card, (1, 4, 5)) if prompted else None
    conditions, choice = [{"text": "bells"}, {}], dict(prompt=prompt, seeds=[3, 4], stride=6)
    whole = model.generate(conditions, 33, **choice)
    calls.clear()
    parts = []
    for part in model.stream(conditions, 33, **choice):
        parts.append(part)
        if len(parts) == 1 and not prompted:
            assert len(calls) == steps
    assert torch.equal(torch.cat(parts, dim=2), whole) and whole.unique().numel() > 20
    assert [part.shape[2] for part in parts] == ([5] + 28 * [1] if prompted else 33 * [1])


def test_decoding_bit_by_bit_leaves_no_seam():
    codec = load_codec("tiny")
    codes = torch.randint(0, 512, (1, 4, 130))
    whole = codec.decode(codes)
    for n in (1, 7, 50):
        for arriving in (1, 50):
            parts = list(decode_stream(codec, codes.split(arriving, dim=2), n))
            torch.testing.assert_close(torch.cat(parts, dim=2), whole, atol=1e-5, rtol=0)
            assert parts[0].shape[2] == n * codec.hop
    for T in (1, 5, 24):
        (wav,) = decode_stream(codec, [codes[:, :, :T]])
        torch.testing.assert_close(wav, codec.decode(codes[:, :, :T]))
    codec.ahead = 2
    seams = torch.cat(list(decode_stream(codec, [codes], 7)), dim=2) - whole
    assert seams.abs().max() > 1e-3


def test_a_stream_is_the_file_without_loudness(play, tmp_path, monkeypatch):
    args = ("bells", "--duration", 1.4, "--seed", 5)
    play(*args, "--loudness", "none")
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "__stdout__", io.TextIOWrapper(raw))
    said = play(*args, "--stream", "--out", tmp_path / "unused")
    streamed = np.frombuffer(raw.getvalue(), "<i2").astype(int)
    np.testing.assert_allclose(streamed, pcm(tmp_path / "out" / "bells_5.wav"), atol=1)
    assert "aplay -f S16_LE -r 16000 -c 1" in said and "first audio after" in said and "x real time" in said
    assert not (tmp_path / "unused").exists()
    assert "one take of one caption" in play("a", "b", "--stream", status=2)


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


@pytest.fixture
def of_all_conditions(toy_run, tmp_path):
    """A best.pt of the toy's sizes, untrained but for its style quantiser, that takes text, melody and style."""
    saved = torch.load(toy_run[0] / "best.pt", weights_only=True)
    saved["settings"] |= dict(
        melody=True, style=True, style_dim=32, style_heads=2, style_bins=16, style_seconds=(0.5, 1.0)
    )
    torch.manual_seed(0)
    model = MusicLM(config.Settings(**saved["settings"]), saved["codec"], saved["tokenizer"])
    style = model.conditioner.prepended["style"]
    style.set_codec(load_codec("tiny"))
    for _ in range(10):
        style(*style.prepare([(torch.randint(512, (4, 50)), None) for _ in range(4)], "cpu"))
        style.update(lambda tensor: tensor, lambda value: [value])
    with torch.no_grad():
        model.heads.weight.mul_(20)
    path = tmp_path / "all.pt"
    saved.pop("nanomusicgen"), saved.pop("kind")
    save_checkpoint(path, "best", **{**saved, "model": model.state_dict()})
    return path


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
        "one": make("one", *text, "--style", other, "--style_books", 1),
        "beta": make("beta", *text, "--style", other, "--cfg_beta", 3),
        "all": make("all", *text, "--melody", tune, "--style", other, "--continue", audio(tmp_path / "a.wav", 0.2)),
    }  # fmt: skip
    for i, a in enumerate(clips):
        for b in list(clips)[:i]:
            assert np.abs(clips[a][0] - clips[b][0]).max() > 100, (a, b)
    assert "tune.wav, 0.7 s: resampled from 22050 to 16000 Hz; repeated to 1 s" in clips["melody"][1]
    assert "other.wav, 3.0 s: cut to 1 s" in clips["other"][1]
    assert "other.wav, 3.0 s: its middle 0.5 s are taken" in clips["style"][1]
    assert "no caption: by melody alone" in clips["alone"][1]
    about = json.loads((tmp_path / "all.json").read_text())
    assert about["melody"] == str(tune) and about["style"] == str(other) and len(about["style_sha256"]) == 64
    status, output = command(sample, "--again", tmp_path / "all.json", "--out", tmp_path / "again.wav")
    assert status == 0, output
    np.testing.assert_allclose(pcm(tmp_path / "again.wav"), clips["all"][0], atol=3)


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
    assert "must be from 1 to the 6 of training" in said("--style", good, "--style_books", 7)
    assert "--cfg_beta nan: must be a number" in said("--cfg_beta", "nan")
    assert not (tmp_path / "out").exists()
