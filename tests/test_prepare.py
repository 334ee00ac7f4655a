"""prepare.py: used and skipped files, captions and metadata, the cache, the splits and the report."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import time
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mutagen
import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from conftest import ROOT, Ranks, finish, start

import audio
import common
import demo.corpus as demo_corpus
import prepare
from audio import load_audio
from codec import load_codec
from common import UserError
from conditioning import chromagram, draw_conditions, merge_text, strongest
from config import Settings
from data import TokenDataset
from dataprep.analysis import KEYS, analyse, analyse_track, count_cores, key_of, onset_strength, tempo_of
from dataprep.report import DEMO_FIGURES, check, compare, find_damage, measure_reconstruction, print_verdict
from dataprep.shards import MIN_HELD_OUT, clean_text, propose_fraction, split_tracks, text_of
from dataprep.tracks import find_tracks, read_tags
from demo import tiny

TONE = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * 22_050) / 22_050)


def tracks_of(folder):
    """Return the tracks of both splits."""
    return [track for split in ("train", "valid") for track in TokenDataset(folder, split).tracks]


def test_shards_contain_the_codes_of_the_codec(corpus, dataset):
    codec = load_codec("tiny")
    manifest = {entry["path"]: entry for entry in map(json.loads, open(corpus / "manifest.jsonl"))}
    for split in ("train", "valid"):
        tokens = TokenDataset(dataset, split)
        for track in tokens.tracks:
            expected = codec.encode(load_audio(corpus / track["name"], 16_000)[None])[0].T.numpy()
            assert (tokens.codes(track) == expected).mean() > 0.999
            assert track["caption"] == manifest[track["name"]]["caption"]
            assert track["metadata"] == manifest[track["name"]]["attributes"]
    meta = json.loads((dataset / "meta.json").read_text())
    assert meta["train"]["tracks"] + meta["valid"]["tracks"] == 16 and meta["codec"]["id"] == codec.id


def test_melody_from_a_stem(tmp_path):
    low, high = (0.3 * np.sin(2 * np.pi * hertz * np.arange(64_000) / 16_000) for hertz in (220, 329.63))
    for name, wav in (("mix", low), ("stem", high[:32_000]), ("other", low)):
        soundfile.write(tmp_path / f"{name}.wav", wav, 16_000)
    lines = [dict(path="mix.wav", caption="x", melody_from="stem.wav"), dict(path="other.wav", caption="y")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare.prepare(tmp_path / "m.jsonl", tmp_path / "out", workers=1)
    melodies = {}
    for tokens in (TokenDataset(tmp_path / "out", "train"), TokenDataset(tmp_path / "out", "valid")):
        melodies |= {Path(track["name"]).stem: tokens.melody(track, 0, 200) for track in tokens.tracks}
        assert "melody_from" not in tokens.tracks[0]["metadata"]
    assert set(melodies["mix"][:15]) == {4} and set(melodies["mix"][17:]) == {12} and set(melodies["other"]) == {9}
    (tmp_path / "m.jsonl").write_text(json.dumps({**lines[0], "melody_from": "gone.wav"}))
    with pytest.raises(UserError, match="line 1: melody_from .*gone.wav: no such file"):
        prepare.prepare(tmp_path / "m.jsonl", tmp_path / "more")


def test_a_folder_of_many_formats_lists_its_bad_files(tmp_path):
    music = tmp_path / "music"
    (music / "deep").mkdir(parents=True)
    soundfile.write(music / "a.wav", TONE, 22_050)
    soundfile.write(music / "b.flac", np.stack([TONE, TONE * 0.5], 1), 44_100)
    soundfile.write(music / "deep" / "c.mp3", np.tile(TONE, 2), 48_000)
    soundfile.write(music / "d.ogg", TONE, 22_050)
    soundfile.write(music / "e.opus", np.tile(TONE, 2), 48_000, format="OGG", subtype="OPUS")
    soundfile.write(music / "silent.wav", 0 * TONE, 22_050)
    soundfile.write(music / "short.wav", TONE[:5000], 22_050)
    soundfile.write(music / "nan.wav", np.where(TONE > 0.29, np.nan, TONE).astype(np.float32), 22_050, subtype="FLOAT")
    (music / "corrupt.wav").write_bytes(b"RIFF no audio")
    (music / "notes.pdf").write_bytes(b"not music")
    (music / "a.txt").write_text("a pure\ntone\n")
    (music / "b.json").write_text('{"caption": "two tones", "genre": "test"}')
    prepare.prepare(music, tmp_path / "out", workers=1, valid_fraction=0.2)
    tracks = {t["name"]: t for t in tracks_of(tmp_path / "out")}
    assert set(tracks) == {"a.wav", "b.flac", "deep/c.mp3", "d.ogg", "e.opus"}
    assert tracks["a.wav"]["caption"] == "a pure tone" and tracks["a.wav"]["frames"] == 100
    assert tracks["b.flac"]["metadata"] == {"genre": "test"} and tracks["b.flac"]["frames"] == 50
    reasons = {json.loads(line)["path"].split("/")[-1]: json.loads(line)["reason"]
               for line in open(tmp_path / "out" / "skipped.jsonl")}  # fmt: skip
    assert set(reasons) == {"silent.wav", "short.wav", "nan.wav", "corrupt.wav"}
    assert "silent" in reasons["silent.wav"] and "shorter than" in reasons["short.wav"]
    assert "not numbers" in reasons["nan.wav"] and "cannot be read" in reasons["corrupt.wav"]


def test_added_tracks_move_no_track_to_the_other_split():
    tracks = [dict(name=f"{i}.wav") for i in range(300)]
    held_out = prepare.split_tracks(tracks, 0.1)
    assert 10 < len(held_out) < 60
    assert prepare.split_tracks(tracks[:150], 0.1) == held_out & {track["name"] for track in tracks[:150]}
    assert len(prepare.split_tracks(tracks[:2], 0.0)) == 1 == len(prepare.split_tracks(tracks[:2], 1.0))


def test_a_killed_preparation_resumes_with_the_same_result(corpus, dataset, tmp_path):
    out, args = tmp_path / "out", (corpus / "manifest.jsonl", "--workers", 1, "--valid_fraction", 0.2)
    run = Ranks(*args, "--out", out, ranks=1, main=prepare.main)
    while len(done := list(tmp_path.glob("encoded/*/*/*.npz"))) < 3:
        assert run.processes[0].is_alive(), run.output()
    run.send(signal.SIGKILL)
    run.wait()
    assert not out.exists() and len(done) < 16
    done[0].write_bytes(done[0].read_bytes()[:-9])  # truncated, so it is encoded again
    mtimes = {path: path.stat().st_mtime_ns for path in done[1:]}
    Ranks(*args, "--out", out, ranks=1, main=prepare.main).finish()
    assert {path: path.stat().st_mtime_ns for path in mtimes} == mtimes
    assert same_data(out, dataset)
    assert "out: already prepared" in Ranks(*args, "--out", out, ranks=1, main=prepare.main).finish()


def same_data(a, b):
    files = [[*folder.glob("train_*"), *folder.glob("valid_*"), *folder.glob("*.npy"), folder / "tokenizer.model"]
             for folder in (a, b)]  # fmt: skip
    contents = [{path.name: path.read_bytes() for path in paths} for paths in files]
    return contents[0] == contents[1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_prepares_the_same_data(corpus, dataset, tmp_path, ranks):
    args = (corpus / "manifest.jsonl", "--out", tmp_path / "out", "--valid_fraction", 0.2, "--workers", 1)
    assert "wrote" in Ranks(*args, ranks=ranks, main=prepare.main).finish()
    assert same_data(tmp_path / "out", dataset)


def test_music_is_encoded_once_when_captions_and_names_change(tmp_path, monkeypatch, capsys):
    music, out, encoded = make_folder(tmp_path), tmp_path / "data" / "out", []

    def record_and_analyse(path, *args):
        encoded.append(Path(path).name)
        return analyse_track(path, *args)

    monkeypatch.setattr(prepare, "analyse_track", record_and_analyse)
    prepare.prepare(music, out, workers=1)
    assert sorted(encoded) == ["0.wav", "1.wav", "2.wav", "3.wav"]
    encoded.clear()
    (music / "0.txt").write_text("another caption")
    (music / "1.wav").unlink()
    os.rename(music / "2.wav", music / "moved.wav")
    with pytest.raises(UserError, match="--out .*out: contains other data. Add --replace to overwrite it"):
        prepare.prepare(music, out, workers=1)
    prepare.prepare(music, out, workers=1, replace=True, vocab_size=300, valid_fraction=0.5)
    tracks = {t["name"]: t["caption"] for t in tracks_of(out)}
    assert set(tracks) == {"0.wav", "moved.wav", "3.wav"} and tracks["0.wav"] == "another caption"
    soundfile.write(music / "new.wav", TONE * 0.2, 22_050)
    prepare.prepare(music, tmp_path / "data" / "second", workers=1, captions=False)
    assert encoded == ["new.wav"]
    assert "wrote" in capsys.readouterr().out


def test_an_interruption_before_the_final_rename_leaves_no_damage(corpus, tmp_path, monkeypatch):
    write_json = common.write_json

    def stop(path, value):
        write_json(path, value)
        if path.name == "meta.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(corpus / "manifest.jsonl", tmp_path / "out", workers=1)
    (tmp_path / "out.partial" / ".DS_Store").write_bytes(b"")
    monkeypatch.setattr(common, "write_json", write_json)
    prepare.prepare(corpus / "manifest.jsonl", tmp_path / "out", workers=1)
    assert find_damage(tmp_path / "out") == []


def test_windows_do_not_change_the_analysis(tmp_path, monkeypatch):
    """A stereo file of another sample rate, which blocks and windows do not divide evenly."""
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", rng.uniform(-1, 1, (90_000, 2)), 22_050)
    codec, wav = load_codec("tiny"), load_audio(tmp_path / "a.wav", 16_000)
    expected = analyse(tmp_path / "a.wav", codec)
    assert torch.equal(expected["codes"], codec.encode(wav[None])[0]) and expected["seconds"] == wav.shape[1] / 16_000
    assert torch.equal(strongest(expected["chroma"]), strongest(chromagram(wav, 16_000)[0]))
    assert expected["level"] == pytest.approx(10 * wav.square().mean().log10().item(), abs=1e-3)
    blocks, read = [], soundfile.SoundFile.read

    def record_and_read(*args, **options):
        blocks.append(read(*args, **options))
        return blocks[-1]

    monkeypatch.setattr("dataprep.analysis.WINDOW", 1)
    monkeypatch.setattr(audio.read_blocks, "__defaults__", (1, 1))
    monkeypatch.setattr(soundfile.SoundFile, "read", record_and_read)
    analysis = analyse(tmp_path / "a.wav", codec)
    lengths = [len(block) for block in blocks[20:-20]]  # between the excerpts of `uncancelled_channel`
    assert lengths == [22_050] * 4 + [1800] and max(map(len, blocks)) == 22_050, "reads at most one block at a time"
    assert torch.equal(analysis["codes"], expected["codes"]) and torch.equal(analysis["chroma"], expected["chroma"])
    assert analysis["tempo"] == expected["tempo"] and analysis["key"] == expected["key"]


def test_tempo_and_key_of_the_demo_corpus():
    """The tempo is right, half or double in nearly all clips. The key is right in most."""
    ratios, keys = [], []
    for index in range(40):
        wav, attributes = demo_corpus.make_clip(3, index)
        wav = torch.from_numpy(wav)
        tempo = tempo_of(onset_strength(wav / wav.square().mean().sqrt(), 16_000))
        ratios.append(tempo / attributes["bpm"])
        keys.append(KEYS[key_of(chromagram(wav[None], 16_000)[0])] == with_sharps(attributes["key"]))
    assert sum(abs(ratio - 1) < 0.02 for ratio in ratios) >= 26
    assert sum(min(abs(ratio / octave - 1) for octave in (0.5, 1, 2)) < 0.02 for ratio in ratios) >= 38
    assert sum(keys) >= 26
    assert tempo_of(torch.zeros(400)) == tempo_of(torch.rand(100)) == 0 and key_of(torch.zeros(12, 9)) == -1


def test_demo_captions_name_their_key_and_all_keys_differ_in_notes():
    for index in range(100):
        attributes = demo_corpus.draw_attributes(np.random.default_rng([3, index]))
        caption = attributes["caption"]
        assert attributes["key"] in caption and not re.search(r"\ba [aeiouE]", caption), attributes
    notes = {frozenset((tonic + step) % 12 for step in scale) for tonic in demo_corpus.TONICS.values()
             for scale in demo_corpus.SCALES.values()}  # fmt: skip
    assert len(notes) == 6, "keys with the same notes cannot be distinguished"


def with_sharps(key):
    tonic, mode = key.split()
    return f"{dict(Db='C#', Eb='D#', Gb='F#', Ab='G#', Bb='A#').get(tonic, tonic)} {mode}"


def test_check_reports_problems(dataset_copy, capsys):
    assert check(dataset_copy) == 0 and "no damage" in capsys.readouterr().out
    train = np.load(dataset_copy / "train_000.npy")
    train[300, 2] = 512
    np.save(dataset_copy / "train_000.npy", train)
    assert check(dataset_copy) == 2
    printed = capsys.readouterr().out
    assert "code 512 at frame" in printed and "train_000.npy: missing, or changed since it was prepared" in printed
    for damaged in ("[3]", '{"path": "a.wav"}', '{"reason": "\xff'):
        (dataset_copy / "skipped.jsonl").write_text(damaged, encoding="latin-1")
        assert check(dataset_copy) == 3
        printed = capsys.readouterr().out
        assert "skipped.jsonl: damaged, so the skipped files are unknown" in printed
        assert "skipped.jsonl: missing, or changed since it was prepared" in printed
    meta = json.loads((dataset_copy / "meta.json").read_text())
    for suffix in (".npy", "_melody.npy", ".jsonl"):  # valid becomes a copy of train
        shutil.copy(dataset_copy / f"train_000{suffix}", dataset_copy / f"valid_000{suffix}")
    (dataset_copy / "meta.json").write_text(json.dumps({**meta, "valid": meta["train"]}))
    assert check(dataset_copy) == 2 + 5 + meta["train"]["tracks"]
    assert "is the same music as" in capsys.readouterr().out


# The verdict and the codec


def test_the_proposed_fraction_holds_out_what_it_promises():
    for n in (*range(2, 60), 300, 5000):
        tracks = [dict(name=f"album {n}/{i}.mp3") for i in range(n)]
        fraction, held_out = propose_fraction(tracks)
        assert len(split_tracks(tracks, fraction)) == held_out and 0 < fraction <= 1
        assert held_out == (MIN_HELD_OUT if n >= 20 else max(1, n // 3)) <= n / 2


def test_a_command_line_with_the_proposed_fraction_ends_the_warning(command, tmp_path):
    music, args = tmp_path / "music", ("--out", tmp_path / "out", "--workers", 1)
    music.mkdir()
    for number in range(21):
        soundfile.write(music / f"{number}.wav", TONE[: 22_050 + 100 * number], 22_050)
    status, printed = command(prepare, music, *args)
    proposal = re.search(r"held-out tracks: \d\. .*with (--valid_fraction) (\S+) (--replace), .* 10 of 21\n", printed)
    assert status == 0 and proposal, printed
    assert command(prepare, "check", tmp_path / "out")[1].count(proposal[0]) == 1
    _, printed = command(prepare, music, *args, *proposal.groups())
    assert len(TokenDataset(tmp_path / "out", "valid").tracks) == 10 and "held-out tracks:" not in printed


@pytest.mark.parametrize("minutes, n_train, n_valid, caption, n_skipped, lines", [
    (14, 17, 1, "", 5, ["fine-tune demo/demo.pt", "not to train from scratch", "held-out tracks: 1.",
                        "holds out 6 of 18 (to hold out 10, add tracks up to 20)",
                        "no text can steer the model. Write captions into NAME.txt", "skipped: 5 of 23"]),
    (9, 40, 10, "x", 0, ["enough to try the commands, too little to train on"]),
    (300, 7, 2, "x", 1, ["enough to try the commands, too little to train on"]),
    (300, 50, 10, "x", 6, ["fine-tune demo/demo.pt", "small model from scratch"]),
    (6001, 50, 10, "x", 0, ["enough to train from scratch"]),
    (14, 2, 1, "x", 0, ["too little to train on", "noisy. Add music (to hold out 10, add tracks up to 20)"]),
])  # fmt: skip
def test_the_verdict_names_what_the_data_is_enough_for(capsys, minutes, n_train, n_valid, caption, n_skipped, lines):
    tracks = [dict(name=f"{number}.wav", caption=caption, metadata={}) for number in range(n_train + n_valid)]
    splits = {split: SimpleNamespace(tracks=part, ends=[minutes * 30 * 50], frame_rate=50)
              for split, part in (("train", tracks[n_valid:]), ("valid", tracks[:n_valid]))}  # fmt: skip
    print_verdict(splits, "tiny", n_skipped)
    printed = capsys.readouterr().out
    assert all(line in printed for line in lines), printed
    assert ["held-out" in printed, "no captions" in printed, "skipped" in printed] == [
        n_valid < 10, not caption, n_skipped == 5]  # fmt: skip


def test_the_codec_is_compared_with_the_music_and_check_prints_it_without_either(dataset_copy, capsys):
    """The toy corpus is like the demo's, so its figures are near those that the report compares with."""
    meta = json.loads((dataset_copy / "meta.json").read_text())
    names, errors, shares = zip(*meta["reconstruction"])
    reference = [float(number) for number in re.findall(r"[\d.]+", DEMO_FIGURES)]
    assert len(set(names)) == 8 and set(names) <= {track["name"] for track in tracks_of(dataset_copy)}
    assert np.mean(errors) == pytest.approx(reference[0], abs=0.6)
    assert np.mean(shares) == pytest.approx(reference[1] / 100, abs=0.2)
    assert check(dataset_copy) == 0
    printed = capsys.readouterr().out
    assert f"codec: mean spectral error {np.mean(errors):.1f} dB" in printed and names[np.argmax(errors)] in printed
    assert "16 kHz mono: nothing above 8 kHz, no stereo; not trained on voices" in printed
    for changed in ({**meta, "reconstruction": []}, {key: meta[key] for key in meta if key != "reconstruction"}):
        (dataset_copy / "meta.json").write_text(json.dumps(changed))
        assert check(dataset_copy) == 0
        assert "codec: not compared with this music" in capsys.readouterr().out


@pytest.mark.parametrize("rate", [16_000, 32_000])
def test_a_gain_of_6_db_is_a_distance_of_6_db_at_any_rate(rate):
    wav = torch.randn(2, rate, generator=torch.Generator().manual_seed(0))
    assert compare(wav, wav, rate) == (0, 1)
    assert compare(wav, wav / 2, rate) == (pytest.approx(6.02, abs=0.1), 1)


def test_the_figures_do_not_depend_on_the_level_or_length_of_a_track_and_moved_files_are_left_out(tmp_path):
    """A track with a peak above 1 is encoded at a peak of 1. The excerpt is the middle one."""
    codec, rng = load_codec("tiny"), np.random.default_rng(0)
    wav = np.convolve(rng.uniform(-1, 1, 20 * 16_000), [0.5, 0.5], "same")
    wav /= np.abs(wav).max()
    tracks, files = [], {}
    for name, samples in (("a", wav), ("b", 2 * wav), ("short", wav[:100])):
        soundfile.write(tmp_path / f"{name}.wav", samples, 16_000, subtype="DOUBLE")
        analysis = analyse_track(tmp_path / f"{name}.wav", tmp_path / f"{name}.wav", codec, tmp_path)
        files[name] = tmp_path / f"{name}.npz"
        np.savez(files[name], **analysis)
        tracks.append(dict(name=name, path=str(tmp_path / f"{name}.wav"), frames=analysis["frames"]))
    a, b, short = measure_reconstruction(tracks, files, codec)
    middle = torch.from_numpy(wav[120_000:200_000]).float()[None]
    assert a[1:] == b[1:] and a[0] == "a" and short[0] == "short"
    assert a[1] == pytest.approx(compare(middle, codec.decode(codec.encode(middle[None]))[0], 16_000)[0], abs=0.1)
    (tmp_path / "a.wav").rename(tmp_path / "moved.wav")
    assert [name for name, *_ in measure_reconstruction(tracks, files, codec)] == ["b", "short"]


def test_the_codec_of_a_model_is_used(command, toy_run, tmp_path):
    """The run, trained with weights at a relative path, was moved. Its weights lie next to the checkpoint."""
    music, run = make_folder(tmp_path), tmp_path / "run"
    saved = torch.load(toy_run[0] / "best.pt", weights_only=True)
    weights = torch.load(tiny.WEIGHTS, weights_only=True)
    next(value for name, value in weights["model"].items() if name.endswith("bias")).add_(0.01)
    run.mkdir()
    torch.save(weights, run / "changed.pt")
    saved["settings"]["codec_weights"] = "weights/changed.pt"
    saved["codec"] = load_codec("tiny", run / "changed.pt").info()
    torch.save(saved, run / "best.pt")
    status, printed = command(prepare, music, "--out", tmp_path / "out", "--model", run, "--workers", 1)
    assert status == 0, printed
    assert TokenDataset(tmp_path / "out", "train").meta["codec"] == saved["codec"] != load_codec("tiny").info()
    (run / "changed.pt").rename(tmp_path / "elsewhere.pt")
    more = ("--codec_weights", tmp_path / "elsewhere.pt", "--replace")
    assert command(prepare, music, "--out", tmp_path / "out", "--model", run, "--workers", 1, *more)[0] == 0
    shutil.copy(tiny.WEIGHTS, run / "changed.pt")
    for args, words in ((["--model", run / "best.pt"], [f"--model {run}", "needs codec", "--codec_weights"]),
                        (["--model", run, "--codec", "tiny"], ["Omit --codec"]),
                        (["--model", tmp_path / "none"], ["none: no such checkpoint"])):  # fmt: skip
        status, printed = command(prepare, music, "--out", tmp_path / "other", *args)
        assert status == 2 and len(printed.splitlines()) == 1 and all(word in printed for word in words), printed


# Inputs of users


def make_folder(tmp_path, **sidecars):
    """Write 4 short tracks with captions, the first with the sidecars {suffix: bytes} instead. Return the folder."""
    music = tmp_path / "music"
    music.mkdir()
    for number in range(4):
        soundfile.write(music / f"{number}.wav", TONE * (1 - number / 10), 22_050)
        (music / f"{number}.txt").write_text(f"plain tone {number}")
    if sidecars:
        (music / "0.txt").unlink()
    for suffix, content in sidecars.items():
        (music / f"0.{suffix}").write_bytes(content)
    return music


def tracks_in(music):
    return {Path(track["name"]).name: track for track in find_tracks(music)}


@pytest.mark.parametrize("content, caption", [
    ("calm ♪".encode(), "calm ♪"),
    ("calm ♪".encode("utf-8-sig"), "calm ♪"),
    ("calm ♪".encode("utf-16"), "calm ♪"),
    ("a\u200b \ufeffslow\x07\n\ttone\u2028now".encode(), "a slow tone now"),
    ("\u200b".encode(), ""),
])  # fmt: skip
def test_captions_are_decoded_and_cleaned(tmp_path, content, caption):
    assert tracks_in(make_folder(tmp_path, txt=content))["0.wav"]["caption"] == caption


@pytest.mark.parametrize("content", ["caf\xe9".encode("latin-1"), "calm".encode("utf-16-le"), b"\x00\x01"])
def test_captions_in_other_encodings_raise_an_error_with_the_file_name(tmp_path, content):
    music = make_folder(tmp_path, txt=content)
    with pytest.raises(UserError, match=r"not UTF-8.*/0\.txt; do iconv -f "):
        tracks_in(music)
    (music / "manifest.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"not UTF-8.*/manifest\.jsonl; do iconv -f "):
        tracks_in(music / "manifest.jsonl")


def test_one_error_names_all_unusable_captions_and_its_command_converts_them(command, tmp_path):
    music = make_folder(tmp_path, json=b"{")
    texts = {"1": ("voilà, l'été", "windows-1252"), "2 b": ("ça", "windows-1252"), "3": ("café", "utf-16-le")}
    os.rename(music / "2.wav", music / "2 b.wav")
    for name, (caption, encoding) in texts.items():
        (music / f"{name}.txt").write_bytes(caption.encode(encoding))
    status, printed = command(prepare, music, "--out", tmp_path / "out")
    assert status == 2 and printed.count("\n") == 1 + printed.count("hidden") + printed.count("not used"), printed
    assert all(f"{name}.txt" in printed for name in texts) and "0.json: not JSON" in printed, printed
    for loop in re.findall(r"for f in .*?; done", printed):
        subprocess.run(["bash", "-ec", loop], check=True)
    (music / "0.json").unlink()
    tracks = tracks_in(music)
    assert {name: tracks[f"{name}.wav"]["caption"] for name in texts} == {
        name: caption for name, (caption, _) in texts.items()}  # fmt: skip


def test_hidden_files_and_those_of_systems_are_counted_but_not_used(tmp_path, capsys):
    music = make_folder(tmp_path)
    for name in ("._0.wav", "._0.txt", "._1.json", "._2.mp3", ".Trash-1000/files/7.wav", "__MACOSX/1.wav",
                 ".ipynb_checkpoints/0-checkpoint.wav", "@eaDir/1.wav", "a/.hidden/8.wav"):  # fmt: skip
        (music / name).parent.mkdir(parents=True, exist_ok=True)
        (music / name).write_bytes(b"\x00\x05\x16\x07\xff")
    assert sorted(tracks_in(music)) == ["0.wav", "1.wav", "2.wav", "3.wav"]
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "not searched: 9," in printed
    shutil.copytree(music, tmp_path / ".cache" / "music")
    assert len(tracks_in(tmp_path / ".cache" / "music")) == 4, "the folder itself was chosen by the user"


def test_captions_that_almost_match_are_used_and_the_others_are_named(tmp_path, capsys):
    music = make_folder(tmp_path)
    for track, sidecar in (("Café", "Cafe\u0301.txt"), ("b", "b.wav.txt"), ("c", "C.TXT"), ("d", "d.wav.json")):
        soundfile.write(music / f"{unicodedata.normalize('NFC', track)}.wav", TONE, 22_050)
        text = f"caption of {track}"
        (music / sidecar).write_text(json.dumps({"caption": text}) if sidecar.endswith("json") else text)
    soundfile.write(music / "UP.wav", TONE, 22_050)
    soundfile.write(music / "up.wav", TONE, 22_050)
    (music / "up.txt").write_text("belongs to one of two")
    unused = ["0_caption.txt", "metadata.csv", "README.txt", "table.parquet", "b.caption"]
    for name in unused:
        (music / name).write_text("file_name,text\n0.wav,a tone\n")
    tracks = tracks_in(music)
    for name in ("Café", "b", "c", "d"):
        assert tracks[f"{name}.wav"]["caption"] == f"caption of {name}"
    assert tracks["up.wav"]["caption"] == "belongs to one of two" and tracks["UP.wav"]["caption"] == ""
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and all(name in printed for name in unused) and "up.txt" not in printed, printed
    lines = [{"path": name} for name in ("Café.wav", "b.wav", "0.wav")]
    (music / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert [track["caption"] for track in tracks_in(music / "m.jsonl").values()] == [
        "caption of Café", "caption of b", "plain tone 0"]  # fmt: skip


def test_invisible_letters_are_removed_without_a_blank_except_joiners_that_scripts_need():
    assert clean_text("melan\u00adcholic vio\u00adlin") == "melancholic violin"
    assert clean_text("wo\u2060rd mu\u200bsic\ufeff le\u200eft in\u200cvisible \u200d") == "word music left invisible"
    for text in ("می\u200cخواهم", "क्\u200dष", "👩\u200d🎤 sings"):
        assert clean_text(text) == text


@pytest.mark.parametrize("name", ["prefix", "folder", "manifest"])
def test_files_of_one_song_stay_in_one_split(command, tmp_path, name):
    music = tmp_path / "music"
    for song in range(4):
        for part in range(5):
            path = music / f"song{song}" / f"{part}.wav" if name == "folder" else music / f"song{song}_{part:03d}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, TONE[: 22_050 + 1000 * song + 100 * part], 22_050)
    lines = [dict(path=path.name, group=path.name[:5]) for path in music.glob("*.wav")]
    (tmp_path / "music" / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source, options = (music / "m.jsonl", ()) if name == "manifest" else (music, ("--group", name))
    args = ("--workers", 1, "--valid_fraction", 0.5)
    if name == "prefix":
        status, printed = command(prepare, music, "--out", tmp_path / "leaking", *args)
        assert status == 0 and "songs seem to be in both splits, for example song" in printed and "--group" in printed
    status, printed = command(prepare, source, "--out", tmp_path / "out", *args, *options)
    assert status == 0 and "both splits" not in printed, printed
    songs = [{track["name"][:5] for track in TokenDataset(tmp_path / "out", split).tracks}
             for split in ("train", "valid")]  # fmt: skip
    assert all(songs) and not songs[0] & songs[1] and len(songs[0] | songs[1]) == 4


def test_numbered_names_are_no_songs_and_one_group_cannot_be_split(command, tmp_path):
    music, args = make_folder(tmp_path), ("--workers", 1, "--valid_fraction", 0.5, "--replace")
    for number in range(4):
        os.rename(music / f"{number}.wav", music / f"clip_{number:05d}.wav")
    status, printed = command(prepare, music, "--out", tmp_path / "out", *args)
    assert status == 0 and "both splits" not in printed, printed
    status, printed = command(prepare, music, "--out", tmp_path / "out", *args, "--group", "folder")
    assert status == 2 and "--group" in printed.splitlines()[-1], printed


def test_a_manifest_decides_the_split_and_lengths_are_limited(command, tmp_path):
    music, out = make_folder(tmp_path), tmp_path / "out"
    soundfile.write(music / "long.wav", np.tile(TONE, 3), 22_050)
    for held_out in ("0.wav", "3.wav"):
        lines = [dict(path=path.name, split="valid" if path.name == held_out else "train", caption="x")
                 for path in music.glob("*.wav")]  # fmt: skip
        (music / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
        status, printed = command(prepare, music / "m.jsonl", "--out", out, "--workers", 1, "--replace",
                                  "--valid_fraction", 0.9, "--max_seconds", 5)  # fmt: skip
        assert status == 0, printed
        assert [track["name"] for track in TokenDataset(out, "valid").tracks] == [held_out]
        assert len(TokenDataset(out, "train").tracks) == 3 and "6.00 s long, longer than 5" in printed
        assert all(track["metadata"] == {} for track in tracks_of(out))
    for split, message in (("dev1", 'line 1: "split" must be "train" or "valid"'), ("train", '"split"')):
        lines = [dict(path=f"{number}.wav", split=split) for number in range(4)]
        (music / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
        status, printed = command(prepare, music / "m.jsonl", "--out", tmp_path / "more")
        assert status == 2 and message in printed and len(printed.splitlines()) == 1, printed


def test_channels_that_cancel_are_reported(tmp_path, capsys):
    music = make_folder(tmp_path)
    for name, gain in (("inverted", -1), ("almost", -0.97), ("wide", -0.2)):
        soundfile.write(music / f"{name}.wav", np.stack([TONE, gain * TONE], 1), 22_050)
    prepare.prepare(music, tmp_path / "out", workers=1)
    levels = {track["name"]: track["level"] for track in tracks_of(tmp_path / "out")}
    assert levels["inverted.wav"] == pytest.approx(levels["0.wav"], abs=0.1) == levels["almost.wav"]
    (line,) = [line for line in capsys.readouterr().out.split("\n") if "Channels cancel" in line]
    assert "2 tracks" in line and "almost.wav" in line and "inverted.wav" in line


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs an affinity")
def test_as_many_workers_as_usable_cores():
    code = "import os; from dataprep.analysis import count_cores; os.sched_setaffinity(0, {CORE}); print(count_cores())"
    core = min(os.sched_getaffinity(0))
    assert finish(start("-c", code.replace("CORE", str(core)))) == "1\n"
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))


def test_audiocraft_sidecars_are_read(tmp_path):
    entry = {"description": "a warm pad", "title": None, "moods": ["calm", "warm"], "bpm": "", "genre": "ambient"}
    track = tracks_in(make_folder(tmp_path, json=json.dumps(entry).encode("utf-8-sig")))["0.wav"]
    assert track["caption"] == "a warm pad" and track["metadata"] == {"moods": "calm, warm", "genre": "ambient"}
    with pytest.raises(UserError, match='0.json: "caption" must be text, or a list of texts, not 7'):
        (tmp_path / "music" / "0.json").write_text('{"caption": 7}')
        tracks_in(tmp_path / "music")


def test_unicode_line_separators_do_not_end_a_manifest_line(tmp_path):
    music = make_folder(tmp_path)
    lines = [json.dumps(dict(path=f"{number}.wav", caption="one\u2028two\u0085"), ensure_ascii=False)
             for number in range(4)]  # fmt: skip
    (music / "m.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    assert [track["caption"] for track in tracks_in(music / "m.jsonl").values()] == ["one two"] * 4


def test_one_of_several_captions_is_drawn_for_each_item(tmp_path):
    several = {"caption": ["a slow tone", "a sad sound"]}
    music = make_folder(tmp_path, json=json.dumps(several).encode())
    prepare.prepare(music, tmp_path / "out", workers=1, valid_fraction=0)
    texts, settings = Counter(), Settings(segment=1.0, batch_size=4, cfg_dropout=0.0)
    for split in ("train", "valid"):
        tokens = TokenDataset(tmp_path / "out", split)
        for step in range(30):
            draws = [tokens.draw_items(step, settings.batch_size, 50, settings) for _ in range(2)]
            first, again = ([item.choices["text"] for item in items] for items in draws)
            assert first == again, "a pure function of the step"
            texts.update(first)
    assert texts["a slow tone"] > 5 and texts["a sad sound"] > 5 and texts["plain tone 1"] > 5
    assert set(texts) == {*several["caption"], *(f"plain tone {number}" for number in (1, 2, 3))}


def test_non_utf8_names_and_long_captions(tmp_path, capsys):
    music = make_folder(tmp_path, txt=b"long words " * 600)
    os.rename(music / "1.wav", os.fsencode(music) + b"/caf\xe9.wav")
    (music / "2.txt").write_text("\u200b\u200d")
    prepare.prepare(music, tmp_path / "out", workers=1)
    tracks = tracks_of(tmp_path / "out")
    assert len(tracks) == 4 and "caf\udce9.wav" in [track["name"] for track in tracks]
    printed = capsys.readouterr().out
    assert "1 of 4 texts have more than 64 tokens and are cut" in printed
    assert "--text_max_tokens=" in printed and "most frequent words: long, words" in printed
    assert check(tmp_path / "out") == 0


def test_padding_of_short_tracks_is_reported(tmp_path, capsys):
    prepare.prepare(make_folder(tmp_path), tmp_path / "out", workers=1, valid_fraction=0)
    seconds = [track["frames"] / 50 for track in TokenDataset(tmp_path / "out", "train").tracks]
    share = sum(s * (1 - s / 8) for s in seconds) / sum(seconds)  # tracks are drawn in proportion to their length
    printed = capsys.readouterr().out
    assert f"padding: {100 * share:.0f} % of training items of 8 s" in printed and "with a lower --segment" in printed
    assert TokenDataset(tmp_path / "out", "train").padding_share(10) == 0


def test_case_and_width_of_letters_do_not_change_tokens(tmp_path):
    tokenizer = prepare.train_tokenizer([dict(caption="slow piano without drums", metadata={})] * 9, 400)
    encode = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).encode
    assert encode("slow piano without drums") == encode("SLOW Piano Without ｄｒｕｍｓ")
    assert len(encode("slow piano without drums")) == 4, "whole words"


def test_unusable_captions_are_reported_before_encoding(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "encode_all", lambda *args: pytest.fail("encoded first"))
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *args: (_ for _ in ()).throw(UserError("no tokenizer")))
    with pytest.raises(UserError, match="no tokenizer"):
        prepare.prepare(make_folder(tmp_path), tmp_path / "out", workers=1)


def test_every_audio_file_is_used_or_listed(tmp_path):
    music = make_folder(tmp_path)
    for name in ("a.aiff", "b.AIF", "c.WAVE", "d.au"):
        kind = "WAV" if name == "c.WAVE" else "AU" if name == "d.au" else "AIFF"
        soundfile.write(music / name, TONE * 0.5, 22_050, format=kind)
    (music / "e.m4a").write_bytes(b"mp4")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    soundfile.write(elsewhere / "f.wav", TONE * 0.3, 22_050)
    (music / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(music)  # a cycle of links
    prepare.prepare(music, tmp_path / "out", workers=1)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["train"]["tracks"] + meta["valid"]["tracks"] == 9
    (skipped,) = map(json.loads, open(tmp_path / "out" / "skipped.jsonl"))
    assert skipped["path"].endswith("e.m4a")
    assert "ffmpeg" in skipped["reason"] and "convert" in skipped["reason"]  # with ffmpeg and without


def test_m4a_files_are_encoded_where_ffmpeg_is_installed(fake_ffmpeg, tmp_path, capsys):
    music, out = make_folder(tmp_path), tmp_path / "out"
    tracks = {"a.m4a": TONE * 0.5, "b.aac": TONE * 0.3, "damaged.wma": TONE}
    for name, wav in tracks.items():
        soundfile.write(music / name, wav, 22_050, format="AU", subtype="FLOAT")
    (music / "manifest.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in tracks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")
        with pytest.raises(UserError, match="0 usable tracks.*a.m4a: .*ffmpeg"):
            prepare.prepare(music / "manifest.jsonl", out, workers=1)
        prepare.prepare(music, out, workers=1)
    assert sum(1 for _ in open(out / "skipped.jsonl")) == 3
    prepare.prepare(music / "manifest.jsonl", tmp_path / "listed", workers=1)
    meta = json.loads((tmp_path / "listed" / "meta.json").read_text())
    assert (meta["train"]["tracks"], meta["valid"]["tracks"]) == (1, 1)
    (skipped,) = map(json.loads, open(tmp_path / "listed" / "skipped.jsonl"))
    assert skipped["path"].endswith("damaged.wma") and "partial file" in skipped["reason"]
    with pytest.raises(UserError, match="--replace"):  # not "already prepared": more files can be read now
        prepare.prepare(music, out, workers=1)
    capsys.readouterr()
    prepare.prepare(music, out, workers=1, replace=True)
    prepare.prepare(music, out, workers=1)
    assert "already prepared" in capsys.readouterr().out and sum(1 for _ in open(out / "skipped.jsonl")) == 1


@pytest.mark.parametrize("channels, left, right", [
    (6, [0, 2, 4], [1, 2, 5]), (3, [0, 2], [1, 2]), (4, [0, 2], [1, 3]), (8, [0, 2, 4, 6], [1, 2, 5, 7]),
])  # fmt: skip
def test_surround_channels_stay_on_their_side(tmp_path, channels, left, right):
    """Each channel is a tone. A stereo channel contains the tones of its side, without clipping."""
    hertz = 300 + 200 * np.arange(channels)
    wav = 0.9 * np.sin(2 * np.pi * hertz * np.arange(16_000)[:, None] / 16_000)
    soundfile.write(tmp_path / "a.wav", wav, 16_000)
    power = np.abs(np.fft.rfft(load_audio(tmp_path / "a.wav", 16_000, 2).numpy())) ** 2
    tones = [[i for i in range(channels) if power[side, hertz[i]] > 0.01 * power[side].max()] for side in (0, 1)]
    assert tones == [left, right]
    assert load_audio(tmp_path / "a.wav", 16_000, 2).abs().max() <= 1


def tag(path, **tags):
    file = mutagen.File(path, easy=True)
    if file.tags is None:
        file.add_tags()
    for key, value in tags.items():
        file[key] = value
    file.save()


def test_tags_of_mp4_files_are_read():
    """tone.m4a was written by ffmpeg, and tmpo, initialkey and MOOD by mutagen."""
    names = ["genre", "title", "bpm", "key", "mood", "artist", "album"]
    assert read_tags(ROOT / "tests" / "tone.m4a", names) == {
        "genre": "Ambient", "title": "Tone in A", "bpm": "120", "key": "Am", "mood": "calm", "artist": "Nobody",
    }  # fmt: skip


def test_uncaptioned_tracks_use_tags_folders_tempo_and_key(tmp_path, capsys):
    music, clicks = tmp_path / "music", np.zeros(10 * 22_050)
    (music / "hot_jazz" / "007").mkdir(parents=True)
    for beat in range(20):
        clicks[beat * 11_025 :][:2000] += 0.5 * np.hanning(2000) * np.sin(np.arange(2000) * 0.3)
    soundfile.write(music / "hot_jazz" / "007" / "a.mp3", clicks, 22_050)
    tag(music / "hot_jazz" / "007" / "a.mp3", genre="Swing", title="Night\u200b Walk", artist="Someone")
    soundfile.write(music / "b.flac", clicks, 22_050)
    tag(music / "b.flac", bpm="60", mood=["calm", "warm"], initialkey="Am", artist="Someone")
    with soundfile.SoundFile(music / "c.wav", "w", 22_050, 1) as file:
        file.genre, file.artist = "Polka", "Someone"
        file.write(0.5 * clicks)
    soundfile.write(music / "d.wav", TONE, 22_050)
    (music / "d.txt").write_text("written by hand")
    prepare.prepare(music, tmp_path / "out", workers=1)
    tracks = {Path(t["name"]).name: t for t in tracks_of(tmp_path / "out")}
    a, b, c = (tracks[name]["metadata"] for name in ("a.mp3", "b.flac", "c.wav"))
    assert list(a.items())[:4] == [("genre", "Swing"), ("title", "Night Walk"), ("folder", "hot jazz"),
                                   ("tempo", "medium, 120 bpm")]  # fmt: skip
    assert b == {"mood": "calm, warm", "key": "Am", "tempo": "slow, 60 bpm"}, "a tag overrides the estimate"
    assert c["genre"] == "Polka" and c["tempo"] == "medium, 120 bpm"
    assert tracks["d.wav"]["metadata"] == {} and tracks["d.wav"]["caption"] == "written by hand"
    assert "tempo" in tracks["a.mp3"]["measured"] and tracks["b.flac"]["measured"] == []
    assert "captions: 1 of 4 tracks; the other 3 use metadata: " in (printed := capsys.readouterr().out)
    assert "tempo (3, 2 estimated)" in printed and "Someone" not in str(tracks)
    prepare.prepare(music, tmp_path / "named", workers=1, tags=["artist"])
    tracks = tracks_of(tmp_path / "named")
    assert sum(t["metadata"].get("artist") == "Someone" for t in tracks) == 3
    prepare.prepare(music, tmp_path / "no_text", workers=1, captions=False)
    tracks = tracks_of(tmp_path / "no_text")
    assert len(tracks) == 4 and not any(t["metadata"] for t in tracks)
    assert "captions: 1 of 4 tracks; the other 3 have no text" in capsys.readouterr().out
    with pytest.raises(UserError, match="--tags: unknown tag colour. Choose from genre, title, mood"):
        prepare.prepare(music, tmp_path / "more", tags=["colour"])


def test_metadata_replaces_a_missing_caption():
    settings, rng = Settings(cfg_dropout=0.0), np.random.default_rng(0)
    texts = {draw_conditions("", {"genre": "jazz", "bpm": 90}, 50, 50, rng, settings)["text"] for _ in range(20)}
    assert texts == {"genre: jazz. bpm: 90", "bpm: 90. genre: jazz"}
    assert draw_conditions("a tone", {"genre": "jazz"}, 50, 50, rng, settings)["text"] == "a tone"
    assert text_of(dict(caption="", metadata={"genre": "jazz", "bpm": 90})) == "genre: jazz. bpm: 90"
    assert text_of(dict(caption="", metadata={"title": "Go!", "bpm": 90})) == "title: Go! bpm: 90"
    for caption in ("A cool song.", "A song...", 'He sings "go."', "Jazz!", "(Slow.)", "slow,", "静かな曲。", "lent…"):
        assert merge_text(caption, {"genre": "jazz"}, rng) == f"{caption} genre: jazz"
    assert merge_text("A song", {"genre": "jazz"}, rng) == "A song. genre: jazz"
    assert text_of(dict(caption="a tone", metadata={"genre": "jazz"})) == "a tone"


def test_an_egs_folder_of_audiocraft_is_read(tmp_path, monkeypatch):
    make_folder(tmp_path, json=b'{"description": "from a sidecar", "sample_rate": 22050}')
    music, egs = tmp_path / "music", tmp_path / "egs"
    egs.mkdir()
    lines = [dict(path=f"music/{number}.wav", duration=2.0, sample_rate=22_050, amplitude=None, weight=None,
                  info_path=None) for number in range(4)]  # fmt: skip
    lines[1]["path"] = str(music / "1.wav")
    (egs / "data.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    monkeypatch.chdir(tmp_path)
    tracks = tracks_in(egs)
    assert [tracks[f"{number}.wav"]["caption"] for number in range(2)] == ["from a sidecar", "plain tone 1"]
    assert len(tracks) == 4 and not any(track["metadata"] for track in tracks.values())
    (egs / "data.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(UserError, match="data.jsonl.gz: neither a folder of audio nor a JSONL manifest"):
        tracks_in(egs)


def test_the_report_names_problems_and_remedies(tmp_path, capsys):
    music, rng = tmp_path / "music", np.random.default_rng(0)
    music.mkdir()
    for number in range(6):
        soundfile.write(music / f"{number}.wav", rng.uniform(-0.3, 0.3, 44_100), 22_050)
        (music / f"{number}.txt").write_text("noise, noise")
    soundfile.write(music / "clipped.wav", (20 * TONE).clip(-1, 1), 22_050)
    soundfile.write(music / "quiet.wav", 0.005 * TONE, 22_050)
    soundfile.write(music / "paused.wav", np.concatenate([TONE, 0 * TONE, 0 * TONE, 0 * TONE]), 22_050)
    shutil.copy(music / "0.wav", music / "copy.wav")
    for name in ("x.m4a", "y.m4a"):
        (music / name).write_bytes(b"mp4")
    soundfile.write(music / "short.wav", TONE[:9000], 22_050)
    prepare.prepare(music, tmp_path / "out", workers=1)
    printed = capsys.readouterr().out
    for line in ("skipped: 3 files, listed in", "  2: ", "ffmpeg", "to WAV or FLAC (",
                 "  1: 0.41 s long, shorter than 1.0 s (", "Clipped: 1 tracks, for example clipped.wav. Use a better",
                 "% silence\n  Much silence: a model learns", "Very different levels: a model learns",
                 "duplicates: 1 tracks, for example ", ". Remove one of each pair",
                 "most frequent words: noise"):  # fmt: skip
        assert line in printed, line
    assert check(tmp_path / "out") == (" is the same music as " in capsys.readouterr().out)


def test_a_full_disk_is_not_a_reason_to_skip_a_track(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "write_file", lambda path, content: full(path))
    with pytest.raises(UserError, match="part: cannot be written"):
        prepare.prepare(make_folder(tmp_path), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_while_writing_shards_keeps_the_cache(tmp_path, monkeypatch):
    music, work = make_folder(tmp_path), tmp_path / "out.partial"

    def fill_disk(*args):  # instead of the last call before the shards are written
        work.mkdir(exist_ok=True)
        (work / "train_000.npy").unlink(missing_ok=True)
        (work / "train_000.npy").symlink_to("/dev/full")
        return b""

    monkeypatch.setattr(prepare, "train_tokenizer", fill_disk)
    with pytest.raises(UserError, match="partial: cannot be written .No space left on device.. Free disk space"):
        prepare.prepare(music, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob("encoded/*/*/*.npz"))) == 4


@pytest.mark.parametrize("error, message", [(PermissionError(13, "Permission denied"), "a.npz: cannot be read .Perm"),
                                            (MemoryError("no room"), "no room")])  # fmt: skip
def test_an_unreadable_cache_file_is_not_deleted(tmp_path, monkeypatch, error, message):
    (tmp_path / "a.npz").touch()

    def load(path):
        raise error

    monkeypatch.setattr(np, "load", load)
    with pytest.raises((UserError, MemoryError), match=message):
        prepare.read_cache(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").exists()


def full(path):
    raise UserError(f"{path}: cannot be written (No space left on device)")


@pytest.mark.slow
def test_ctrl_c_keeps_the_cache(corpus, tmp_path):
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        args = (corpus / "manifest.jsonl", "--out", folder / "out", "--workers", workers)
        run = Ranks(*args, ranks=1, main=prepare.main)
        while not any(folder.glob("encoded/*/*/*.npz")):
            assert run.processes[0].is_alive(), run.output()
            time.sleep(0.02)
        run.send(signal.SIGINT)
        assert "interrupted" in run.finish(status=130) and not (folder / "out").exists()


def test_a_dead_worker_is_reported(tmp_path):
    music = make_folder(tmp_path)
    args = (music, "--out", tmp_path / "out", "--workers", 2)
    run = Ranks(*args, ranks=1, main=prepare.main, before=die_in_worker)
    printed = run.finish(status=2)
    assert "a worker process died, perhaps out of memory. Run the command again" in printed and "than 2;" in printed


def die_in_worker():
    prepare.start_worker = die


def die(*args):
    os._exit(9)


def test_preparing_again_repairs_damage(tmp_path, capsys):
    music, out = make_folder(tmp_path), tmp_path / "data" / "out"
    prepare.prepare(music, out, workers=1)
    before = (out / "train_000.npy").read_bytes()
    (out / "train_000.npy").unlink()
    with pytest.raises(UserError, match="contains other data. Add --replace"):
        prepare.prepare(music, out, workers=1)
    prepare.prepare(music, out, workers=1, replace=True)
    assert (out / "train_000.npy").read_bytes() == before
    (out / "meta.json").write_text("{")
    prepare.prepare(music, out, workers=1, replace=True)
    soundfile.write(music / "0.wav", np.roll(TONE, 500)[::-1], 22_050)  # as long as before
    with pytest.raises(UserError, match="contains other data. Add --replace"):
        prepare.prepare(music, out, workers=1)
    for path in tmp_path.glob("data/encoded/*/*/*.npz"):
        content = bytearray(path.read_bytes())
        content[300] ^= 255  # within the codes
        path.write_bytes(content)
    capsys.readouterr()
    with pytest.raises(UserError, match="npz: was damaged and is deleted"):
        for _ in range(9):
            prepare.prepare(music, out, workers=1, replace=True)


def test_only_a_data_set_is_replaced(tmp_path):
    music, out = make_folder(tmp_path), tmp_path / "data" / "out"
    prepare.prepare(music, out, workers=1)
    (out / "notes.md").write_text("private")
    with pytest.raises(UserError, match="out: contains notes.md, which is not part of a data set. Choose"):
        prepare.prepare(music, out, workers=1, replace=True, captions=False)
    (tmp_path / "data" / "new.partial").mkdir()  # the folder to which new shards are written
    (tmp_path / "data" / "new.partial" / "thesis.txt").write_text("private")
    with pytest.raises(UserError, match="new.partial: contains thesis.txt"):
        prepare.prepare(music, tmp_path / "data" / "new", workers=1)
    assert (tmp_path / "data" / "new.partial" / "thesis.txt").read_text() == "private"
    with pytest.raises(UserError, match="--out .*encoded: reserved for the cache. Choose another name"):
        prepare.prepare(music, tmp_path / "data" / "encoded", workers=1)


def test_ranks_with_different_files_end_with_an_error(tmp_path):
    music = make_folder(tmp_path)
    shutil.copytree(music, tmp_path / "other")
    (tmp_path / "other" / "3.wav").unlink()
    folders = {0: [str(music)], 1: [str(tmp_path / "other")]}
    run = Ranks("--out", tmp_path / "out", "--workers", 1, main=prepare.main, more=folders)
    assert "need the same settings" in run.finish(status=2)


@pytest.mark.parametrize("captions", [["".join(map(chr, range(0x4E00 + 400 * i, 0x5190 + 400 * i))) for i in range(4)],
                                      ["\U0001f3b5 ♪ étude"]])  # fmt: skip
def test_captions_of_any_script_can_be_tokenized(captions):
    model = prepare.train_tokenizer([dict(caption=caption, metadata={}) for caption in captions], 1000)
    encode = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert all(encode.decode(encode.encode(caption)).strip() for caption in captions)
    with pytest.raises(UserError, match="--vocab_size 40: must be between 300 and 1,000,000"):
        prepare.train_tokenizer([], 40)


@pytest.mark.parametrize("entry, caption, metadata", [
    ({"caption": None, "description": "a pad"}, "a pad", {}),
    ({"caption": "x", "moods": [None, "", {"a": 1}, "calm"], "attributes": None}, "x", {"moods": "calm"}),
    ({"caption": float("nan"), "description": "a pad", "bpm": float("nan"), "key": "NaN", "year": float("inf"),
      "moods": ["calm", float("nan")], "split": float("nan"), "melody_from": float("nan")}, "a pad", {"moods": "calm"}),
    ({"caption": ["nan", None, "a pad"], "bpm": 1e999}, "a pad", {}),
    ({"caption": "x", "a\n": " \u200b", "b": {}, "c\u0000": "\ud83d jazz"}, "x", {"c": "jazz"}),
])  # fmt: skip
def test_the_valid_parts_of_odd_entries_are_used(tmp_path, entry, caption, metadata):
    track = tracks_in(make_folder(tmp_path, json=json.dumps(entry).encode(), txt=b" "))["0.wav"]
    assert track["caption"] == caption and track["metadata"] == metadata


def test_manifest_lines_without_text_use_sidecars(tmp_path):
    music = make_folder(tmp_path)
    lines = [dict(path="0.wav", melody_from="1.wav"), dict(path="1.wav", attributes={"genre": "jazz"})]
    (music / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tracks = tracks_in(music / "m.jsonl")
    assert tracks["0.wav"]["caption"] == "plain tone 0" and tracks["0.wav"]["melody_from"] == str(music / "1.wav")
    assert tracks["1.wav"]["caption"] == "plain tone 1" and tracks["1.wav"]["metadata"] == {"genre": "jazz"}


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"bpm": ' + b"9" * 5000 + b"}"])
def test_json_beyond_the_limits_of_python_raises_an_error(tmp_path, text):
    with pytest.raises(UserError, match="0.json: not JSON"):
        tracks_in(make_folder(tmp_path, json=text))


def test_broken_links_are_listed_and_folders_precede_links_to_them(tmp_path):
    music = make_folder(tmp_path)
    (music / "gone.wav").symlink_to("nowhere.wav")
    os.mkfifo(music / "pipe.wav")
    (tmp_path / "loop").symlink_to("loop")
    (music / "z").mkdir()
    shutil.move(music / "3.wav", music / "z" / "3.wav")
    (music / "a").symlink_to("z")
    prepare.prepare(music, tmp_path / "out", workers=1)
    gone, pipe = map(json.loads, open(tmp_path / "out" / "skipped.jsonl"))
    assert gone["path"].endswith("gone.wav") and "cannot be read" in gone["reason"]
    assert pipe["path"].endswith("pipe.wav") and "not a regular file" in pipe["reason"]
    with pytest.raises(UserError, match="loop"):
        prepare.prepare(music, tmp_path / "loop", workers=1)
    names = [t["name"] for t in tracks_of(tmp_path / "out")]
    assert sorted(names) == ["0.wav", "1.wav", "2.wav", "z/3.wav"]


def test_noise_has_no_tempo():
    rng = torch.Generator().manual_seed(0)
    tempi = [tempo_of(onset_strength(torch.randn(30 * 16_000, generator=rng), 16_000)) for _ in range(20)]
    assert sum(tempo > 0 for tempo in tempi) <= 2
