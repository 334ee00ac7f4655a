"""Music to token shards: what is taken, what is left out and why, and that nothing encoded is lost."""

import gzip
import json
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import mutagen
import numpy as np
import pytest
import sentencepiece
import soundfile
import torch
from conftest import Ranks

import check
import codec as codec_module
import common
import demo.corpus as demo_corpus
import prepare
from codec import load_audio, load_codec
from common import UserError
from conditioning import chromagram, draw_conditions, strongest
from config import Settings
from data import Tokens, text_of
from listen import KEYS, key_of, listen, onset_strength, tempo_of
from tracks import find_tracks

TONE = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * 22_050) / 22_050)


def test_shards_hold_what_the_codec_says(corpus, dataset):
    codec = load_codec("tiny")
    manifest = {entry["path"]: entry for entry in map(json.loads, open(corpus / "manifest.jsonl"))}
    for split in ("train", "valid"):
        tokens = Tokens(dataset, split)
        for track in tokens.tracks:
            expected = codec.encode(load_audio(corpus / track["name"], 16_000)[None])[0].T.numpy()
            assert (tokens.codes(track) == expected).mean() > 0.999
            assert track["caption"] == manifest[track["name"]]["caption"]
            assert track["metadata"] == manifest[track["name"]]["attributes"]
    meta = json.loads((dataset / "meta.json").read_text())
    assert meta["train"]["tracks"] + meta["valid"]["tracks"] == 16 and meta["codec"]["id"] == codec.id


def test_a_melody_may_come_from_a_stem(tmp_path):
    low, high = (0.3 * np.sin(2 * np.pi * hertz * np.arange(64_000) / 16_000) for hertz in (220, 329.63))
    for name, wav in (("mix", low), ("stem", high[:32_000]), ("other", low)):
        soundfile.write(tmp_path / f"{name}.wav", wav, 16_000)
    lines = [dict(path="mix.wav", caption="x", melody_from="stem.wav"), dict(path="other.wav", caption="y")]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare.prepare(tmp_path / "m.jsonl", tmp_path / "out", workers=1)
    found = {}
    for tokens in (Tokens(tmp_path / "out", "train"), Tokens(tmp_path / "out", "valid")):
        found |= {Path(track["name"]).stem: tokens.melody(track, 0, 200) for track in tokens.tracks}
        assert "melody_from" not in tokens.tracks[0]["metadata"]
    assert set(found["mix"][:15]) == {4} and set(found["mix"][17:]) == {12} and set(found["other"]) == {9}
    (tmp_path / "m.jsonl").write_text(json.dumps({**lines[0], "melody_from": "gone.wav"}))
    with pytest.raises(UserError, match="line 1: melody_from .*gone.wav: no such file"):
        prepare.prepare(tmp_path / "m.jsonl", tmp_path / "more")


def test_folder_of_many_formats_with_bad_files_listed(tmp_path):
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
    tracks = {t["name"]: t for split in ("train", "valid") for t in Tokens(tmp_path / "out", split).tracks}
    assert set(tracks) == {"a.wav", "b.flac", "deep/c.mp3", "d.ogg", "e.opus"}
    assert tracks["a.wav"]["caption"] == "a pure tone" and tracks["a.wav"]["frames"] == 100
    assert tracks["b.flac"]["metadata"] == {"genre": "test"} and tracks["b.flac"]["frames"] == 50
    reasons = {json.loads(line)["path"].split("/")[-1]: json.loads(line)["reason"]
               for line in open(tmp_path / "out" / "skipped.jsonl")}  # fmt: skip
    assert set(reasons) == {"silent.wav", "short.wav", "nan.wav", "corrupt.wav"}
    assert "silent" in reasons["silent.wav"] and "shorter than" in reasons["short.wav"]
    assert "not numbers" in reasons["nan.wav"] and "cannot be read" in reasons["corrupt.wav"]


def test_adding_tracks_moves_none_to_the_other_split():
    tracks = [dict(name=f"{i}.wav") for i in range(300)]
    held_out = prepare.split_tracks(tracks, 0.1)
    assert 10 < len(held_out) < 60
    assert prepare.split_tracks(tracks[:150], 0.1) == held_out & {track["name"] for track in tracks[:150]}
    assert len(prepare.split_tracks(tracks[:2], 0.0)) == 1 == len(prepare.split_tracks(tracks[:2], 1.0))


def test_killed_in_the_middle_it_resumes_and_ends_the_same(corpus, dataset, tmp_path):
    out, args = tmp_path / "out", (corpus / "manifest.jsonl", "--workers", 1, "--valid_fraction", 0.2)
    run = Ranks(*args, "--out", out, ranks=1, main=prepare.main)
    while len(done := list(tmp_path.glob("encoded/*/*/*.npz"))) < 3:
        assert run.processes[0].is_alive(), run.output()
    run.send(signal.SIGKILL)
    run.wait()
    assert not out.exists() and len(done) < 16
    done[0].write_bytes(done[0].read_bytes()[:-9])  # cut off: encoded again
    kept = {path: path.stat().st_mtime_ns for path in done[1:]}
    Ranks(*args, "--out", out, ranks=1, main=prepare.main).finish()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert same_data(out, dataset)
    assert "is prepared already" in Ranks(*args, "--out", out, ranks=1, main=prepare.main).finish()


def same_data(a, b):
    made = [[*folder.glob("train_*"), *folder.glob("valid_*"), *folder.glob("*.npy"), folder / "tokenizer.model"]
            for folder in (a, b)]  # fmt: skip
    contents = [{path.name: path.read_bytes() for path in paths} for paths in made]
    return contents[0] == contents[1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_any_number_of_ranks_makes_the_same(corpus, dataset, tmp_path, ranks):
    args = (corpus / "manifest.jsonl", "--out", tmp_path / "out", "--valid_fraction", 0.2, "--workers", 1)
    assert "wrote" in Ranks(*args, ranks=ranks, main=prepare.main).finish()
    assert same_data(tmp_path / "out", dataset)


def test_music_is_encoded_once_whatever_is_said_of_it(tmp_path, monkeypatch, capsys):
    music, out, heard = folder_of(tmp_path), tmp_path / "data" / "out", []
    monkeypatch.setattr(prepare, "listen", lambda path, *how: heard.append(Path(path).name) or listen(path, *how))
    prepare.prepare(music, out, workers=1)
    assert sorted(heard) == ["0.wav", "1.wav", "2.wav", "3.wav"]
    heard.clear()
    (music / "0.txt").write_text("another caption")
    (music / "1.wav").unlink()
    os.rename(music / "2.wav", music / "moved.wav")
    with pytest.raises(UserError, match="out: holds other data; add --replace to write it anew"):
        prepare.prepare(music, out, workers=1)
    prepare.prepare(music, out, workers=1, replace=True, vocab_size=300, valid_fraction=0.5)
    tracks = {t["name"]: t["caption"] for split in ("train", "valid") for t in Tokens(out, split).tracks}
    assert set(tracks) == {"0.wav", "moved.wav", "3.wav"} and tracks["0.wav"] == "another caption"
    soundfile.write(music / "new.wav", TONE * 0.2, 22_050)
    prepare.prepare(music, tmp_path / "data" / "second", workers=1, captions=False)
    assert heard == ["new.wav"]
    assert "wrote" in capsys.readouterr().out


def test_stopped_at_its_last_moment_it_ends_with_data_that_is_whole(corpus, tmp_path, monkeypatch):
    usual = common.write_json

    def stop(path, value):
        usual(path, value)
        if path.name == "meta.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(common, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(corpus / "manifest.jsonl", tmp_path / "out", workers=1)
    (tmp_path / "out.partial" / ".DS_Store").write_bytes(b"")
    monkeypatch.setattr(common, "write_json", usual)
    prepare.prepare(corpus / "manifest.jsonl", tmp_path / "out", workers=1)
    assert check.find_damage(tmp_path / "out") == []


def test_a_file_in_pieces_is_heard_as_a_whole(tmp_path, monkeypatch):
    """Two channels to one, of another rate, in blocks and pieces that do not divide it."""
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "a.wav", rng.uniform(-1, 1, (90_000, 2)), 22_050)
    codec, wav = load_codec("tiny"), load_audio(tmp_path / "a.wav", 16_000)
    whole = listen(tmp_path / "a.wav", codec)
    assert torch.equal(whole["codes"], codec.encode(wav[None])[0]) and whole["seconds"] == wav.shape[1] / 16_000
    assert torch.equal(strongest(whole["chroma"]), strongest(chromagram(wav, 16_000)[0]))
    assert whole["level"] == pytest.approx(10 * wav.square().mean().log10().item(), abs=1e-3)
    reads, usual = [], soundfile.SoundFile.read
    monkeypatch.setattr("listen.PIECE", 1)
    monkeypatch.setattr(codec_module.read_blocks, "__defaults__", (1, 1))
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda *args, **how: reads.append(usual(*args, **how)) or reads[-1]
    )
    pieces = listen(tmp_path / "a.wav", codec)
    assert [len(read) for read in reads] == [22_050] * 4 + [1800], "never more of it in memory"
    assert torch.equal(pieces["codes"], whole["codes"]) and torch.equal(pieces["chroma"], whole["chroma"])
    assert pieces["tempo"] == whole["tempo"] and pieces["key"] == whole["key"]


def test_tempo_and_key_are_heard():
    """Of the demo's music: its tempo or an octave of it in each clip, its very key in most."""
    ratios, keys = [], []
    for index in range(40):
        wav, about = demo_corpus.make_clip(3, index)
        wav = torch.from_numpy(wav)
        tempo = tempo_of(onset_strength(wav / wav.square().mean().sqrt(), 16_000))
        ratios.append(tempo / about["bpm"])
        keys.append(KEYS[key_of(chromagram(wav[None], 16_000)[0])] == sharp(about["key"]))
    assert sum(abs(ratio - 1) < 0.02 for ratio in ratios) >= 26
    assert sum(min(abs(ratio / octave - 1) for octave in (0.5, 1, 2)) < 0.02 for ratio in ratios) >= 38
    assert sum(keys) >= 26
    assert tempo_of(torch.zeros(400)) == tempo_of(torch.rand(100)) == 0 and key_of(torch.zeros(12, 9)) == -1


def test_each_caption_of_the_demo_names_its_key_which_has_notes_of_its_own():
    for index in range(100):
        about = demo_corpus.draw_attributes(np.random.default_rng([3, index]))
        assert about["key"] in about["caption"] and not re.search(r"\ba [aeiouE]", about["caption"]), about
    notes = {frozenset((tonic + step) % 12 for step in scale) for tonic in demo_corpus.TONICS.values()
             for scale in demo_corpus.SCALES.values()}  # fmt: skip
    assert len(notes) == 6, "a key that has the notes of another could not be told from it"


def sharp(key):
    tonic, mode = key.split()
    return f"{dict(Db='C#', Eb='D#', Gb='F#', Ab='G#', Bb='A#').get(tonic, tonic)} {mode}"


def test_check_finds_what_is_wrong(own_dataset, capsys):
    assert check.check(own_dataset) == 0 and "no problems" in capsys.readouterr().out
    train = np.load(own_dataset / "train_000.npy")
    train[300, 2] = 512
    np.save(own_dataset / "train_000.npy", train)
    assert check.check(own_dataset) == 2
    said = capsys.readouterr().out
    assert "token 512 at frame" in said and "train_000.npy: is gone, or not as it was prepared" in said
    for damaged in ("[3]", '{"path": "a.wav"}', '{"reason": "\xff'):
        (own_dataset / "skipped.jsonl").write_text(damaged, encoding="latin-1")
        assert check.check(own_dataset) == 3
        said = capsys.readouterr().out
        assert "skipped.jsonl: is damaged, so what" in said and "skipped.jsonl: is gone, or not as it was" in said
    meta = json.loads((own_dataset / "meta.json").read_text())
    for suffix in (".npy", "_melody.npy", ".jsonl"):  # the training side stands on both sides
        shutil.copy(own_dataset / f"train_000{suffix}", own_dataset / f"valid_000{suffix}")
    (own_dataset / "meta.json").write_text(json.dumps({**meta, "valid": meta["train"]}))
    assert check.check(own_dataset) == 2 + 5 + meta["train"]["tracks"]
    assert "is the same music as" in capsys.readouterr().out


# What people have


def folder_of(tmp_path, **sidecars):
    """Four short tracks, the first of them with the sidecars {suffix: bytes}."""
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
def test_captions_are_read_as_they_were_meant(tmp_path, content, caption):
    assert tracks_in(folder_of(tmp_path, txt=content))["0.wav"]["caption"] == caption


@pytest.mark.parametrize("content", ["caf\xe9".encode("latin-1"), "calm".encode("utf-16-le"), b"\x00\x01"])
def test_captions_in_other_encodings_are_refused_by_name(tmp_path, content):
    with pytest.raises(UserError, match=r"0\.txt: is no text in UTF-8; save it as UTF-8"):
        tracks_in(folder_of(tmp_path, txt=content))


def test_the_layout_of_the_reference_is_read(tmp_path):
    entry = {"description": "a warm pad", "title": None, "moods": ["calm", "warm"], "bpm": "", "genre": "ambient"}
    track = tracks_in(folder_of(tmp_path, json=json.dumps(entry).encode("utf-8-sig")))["0.wav"]
    assert track["caption"] == "a warm pad" and track["metadata"] == {"moods": "calm, warm", "genre": "ambient"}
    with pytest.raises(UserError, match='0.json: "caption" must be text, or a list of texts, not 7'):
        (tmp_path / "music" / "0.json").write_text('{"caption": 7}')
        tracks_in(tmp_path / "music")


def test_line_separators_within_json_end_no_line(tmp_path):
    music = folder_of(tmp_path)
    lines = [json.dumps(dict(path=f"{number}.wav", caption="one\u2028two\u0085"), ensure_ascii=False)
             for number in range(4)]  # fmt: skip
    (music / "m.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    assert [track["caption"] for track in tracks_in(music / "m.jsonl").values()] == ["one two"] * 4


def test_several_captions_are_drawn_one_for_each_item(tmp_path):
    several = {"caption": ["a slow tone", "a sad sound"]}
    music = folder_of(tmp_path, json=json.dumps(several).encode())
    prepare.prepare(music, tmp_path / "out", workers=1, valid_fraction=0)
    texts, settings = Counter(), Settings(segment=1.0, batch_size=4, cfg_dropout=0.0)
    for split in ("train", "valid"):
        tokens = Tokens(tmp_path / "out", split)
        for step in range(30):
            draws = [tokens.draw(step, settings.batch_size, 50, settings) for _ in range(2)]
            first, again = ([given["text"] for _, _, given in items] for items in draws)
            assert first == again, "a pure function of the step"
            texts.update(first)
    assert texts["a slow tone"] > 5 and texts["a sad sound"] > 5 and texts["plain tone 1"] > 5
    assert set(texts) == {*several["caption"], *(f"plain tone {number}" for number in (1, 2, 3))}


def test_names_that_are_not_utf8_and_captions_of_any_length(tmp_path, capsys):
    music = folder_of(tmp_path, txt=b"long words " * 600)
    os.rename(music / "1.wav", os.fsencode(music) + b"/caf\xe9.wav")
    (music / "2.txt").write_text("\u200b\u200d")
    prepare.prepare(music, tmp_path / "out", workers=1)
    tracks = [*Tokens(tmp_path / "out", "train").tracks, *Tokens(tmp_path / "out", "valid").tracks]
    assert len(tracks) == 4 and "caf\udce9.wav" in [track["name"] for track in tracks]
    printed = capsys.readouterr().out
    assert "1 of 4 texts are longer than the 64 tokens that a model hears of them" in printed
    assert "--text_max_tokens=" in printed and "commonest words: long, words" in printed
    assert check.check(tmp_path / "out") == 0


def test_short_tracks_under_a_long_segment_are_said(tmp_path, capsys):
    prepare.prepare(folder_of(tmp_path), tmp_path / "out", workers=1, valid_fraction=0)
    seconds = [track["frames"] / 50 for track in Tokens(tmp_path / "out", "train").tracks]
    share = sum(s * (1 - s / 8) for s in seconds) / sum(seconds)  # tracks come in proportion to their length
    assert f"{share:.0%} of items of 8 s would be padding; train with a lower --segment" in capsys.readouterr().out
    assert Tokens(tmp_path / "out", "train").padding(10) == 0


def test_case_and_width_of_letters_change_no_token(tmp_path):
    tokenizer = prepare.train_tokenizer([dict(caption="slow piano without drums", metadata={})] * 9, 400)
    encode = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).encode
    assert encode("slow piano without drums") == encode("SLOW Piano Without ｄｒｕｍｓ")
    assert len(encode("slow piano without drums")) == 4, "whole words"


def test_captions_that_cannot_be_used_are_found_before_anything_is_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "encode_all", lambda *args, **how: pytest.fail("encoded first"))
    monkeypatch.setattr(prepare, "train_tokenizer", lambda *args: (_ for _ in ()).throw(UserError("no tokenizer")))
    with pytest.raises(UserError, match="no tokenizer"):
        prepare.prepare(folder_of(tmp_path), tmp_path / "out", workers=1)


def test_no_audio_is_passed_over(tmp_path):
    music = folder_of(tmp_path)
    for name in ("a.aiff", "b.AIF", "c.WAVE", "d.au"):
        kind = "WAV" if name == "c.WAVE" else "AU" if name == "d.au" else "AIFF"
        soundfile.write(music / name, TONE * 0.5, 22_050, format=kind)
    (music / "e.m4a").write_bytes(b"mp4")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    soundfile.write(elsewhere / "f.wav", TONE * 0.3, 22_050)
    (music / "linked").symlink_to(elsewhere)
    (elsewhere / "round").symlink_to(music)  # a circle
    prepare.prepare(music, tmp_path / "out", workers=1)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["train"]["tracks"] + meta["valid"]["tracks"] == 9
    (skipped,) = map(json.loads, open(tmp_path / "out" / "skipped.jsonl"))
    assert skipped["path"].endswith("e.m4a") and skipped["reason"].startswith(".m4a is read by no library here")


@pytest.mark.parametrize("channels, left, right", [
    (6, [0, 2, 4], [1, 2, 5]), (3, [0, 2], [1, 2]), (4, [0, 2], [1, 3]), (8, [0, 2, 4, 6], [1, 2, 5, 7]),
])  # fmt: skip
def test_surround_comes_out_on_its_sides(tmp_path, channels, left, right):
    """A tone for each channel: what a stereo codec is given holds those of its side, and nothing that clips."""
    hertz = 300 + 200 * np.arange(channels)
    wav = 0.9 * np.sin(2 * np.pi * hertz * np.arange(16_000)[:, None] / 16_000)
    soundfile.write(tmp_path / "a.wav", wav, 16_000)
    power = np.abs(np.fft.rfft(load_audio(tmp_path / "a.wav", 16_000, 2).numpy())) ** 2
    heard = [[i for i in range(channels) if power[side, hertz[i]] > 0.01 * power[side].max()] for side in (0, 1)]
    assert heard == [left, right]
    assert load_audio(tmp_path / "a.wav", 16_000, 2).abs().max() <= 1


def tag(path, **tags):
    file = mutagen.File(path, easy=True)
    if file.tags is None:
        file.add_tags()
    for key, value in tags.items():
        file[key] = value
    file.save()


def test_music_without_captions_is_told_by_its_tags_and_folders_and_by_ear(tmp_path, capsys):
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
    (music / "d.txt").write_text("said by hand")
    prepare.prepare(music, tmp_path / "out", workers=1)
    tracks = {Path(t["name"]).name: t for split in ("train", "valid") for t in Tokens(tmp_path / "out", split).tracks}
    a, b, c = (tracks[name]["metadata"] for name in ("a.mp3", "b.flac", "c.wav"))
    assert list(a.items())[:4] == [("genre", "Swing"), ("title", "Night Walk"), ("folder", "hot jazz"),
                                   ("tempo", "medium, 120 bpm")]  # fmt: skip
    assert b == {"mood": "calm, warm", "key": "Am", "tempo": "slow, 60 bpm"}, "what the file says is not measured"
    assert c["genre"] == "Polka" and c["tempo"] == "medium, 120 bpm"
    assert tracks["d.wav"]["metadata"] == {} and tracks["d.wav"]["caption"] == "said by hand"
    assert "tempo" in tracks["a.mp3"]["measured"] and tracks["b.flac"]["measured"] == []
    assert "1 of 4 tracks have captions; of the others this is heard:" in (said := capsys.readouterr().out)
    assert "tempo 3 (2 measured)" in said and "Someone" not in str(tracks)
    prepare.prepare(music, tmp_path / "named", workers=1, tags=["artist"])
    tracks = [t for split in ("train", "valid") for t in Tokens(tmp_path / "named", split).tracks]
    assert sum(t["metadata"].get("artist") == "Someone" for t in tracks) == 3
    prepare.prepare(music, tmp_path / "silent", workers=1, captions=False)
    assert not any(t["metadata"] for split in ("train", "valid") for t in Tokens(tmp_path / "silent", split).tracks)
    with pytest.raises(UserError, match="--tags: colour is none of genre, title, mood"):
        prepare.prepare(music, tmp_path / "more", tags=["colour"])


def test_metadata_is_heard_where_there_is_no_caption():
    settings, rng = Settings(cfg_dropout=0.0), np.random.default_rng(0)
    texts = {draw_conditions("", {"genre": "jazz", "bpm": 90}, 50, 50, rng, settings)["text"] for _ in range(20)}
    assert texts == {"genre: jazz. bpm: 90", "bpm: 90. genre: jazz"}
    assert draw_conditions("a tone", {"genre": "jazz"}, 50, 50, rng, settings)["text"] == "a tone"
    assert text_of(dict(caption="", metadata={"genre": "jazz", "bpm": 90})) == "genre: jazz. bpm: 90"
    assert text_of(dict(caption="a tone", metadata={"genre": "jazz"})) == "a tone"


def test_an_egs_folder_of_the_reference_is_read(tmp_path, monkeypatch):
    music, egs = folder_of(tmp_path, json=b'{"description": "told beside it", "sample_rate": 22050}'), tmp_path / "egs"
    egs.mkdir()
    lines = [dict(path=f"music/{number}.wav", duration=2.0, sample_rate=22_050, amplitude=None, weight=None,
                  info_path=None) for number in range(4)]  # fmt: skip
    lines[1]["path"] = str(music / "1.wav")
    (egs / "data.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    monkeypatch.chdir(tmp_path)
    tracks = tracks_in(egs)
    assert [tracks[f"{number}.wav"]["caption"] for number in range(2)] == ["told beside it", "plain tone 1"]
    assert len(tracks) == 4 and not any(track["metadata"] for track in tracks.values())
    (egs / "data.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match="data.jsonl.gz: neither a folder of audio nor a JSONL manifest"):
        tracks_in(egs)


def test_the_report_names_what_will_be_heard_and_its_remedy(tmp_path, capsys):
    music, rng = tmp_path / "music", np.random.default_rng(0)
    music.mkdir()
    for number in range(6):
        soundfile.write(music / f"{number}.wav", rng.uniform(-0.3, 0.3, 44_100), 22_050)
        (music / f"{number}.txt").write_text("noise, noise")
    soundfile.write(music / "clipped.wav", (20 * TONE).clip(-1, 1), 22_050)
    soundfile.write(music / "quiet.wav", 0.005 * TONE, 22_050)
    soundfile.write(music / "paused.wav", np.concatenate([TONE, 0 * TONE, 0 * TONE, 0 * TONE]), 22_050)
    shutil.copy(music / "0.wav", music / "twin.wav")
    for name in ("x.m4a", "y.m4a"):
        (music / name).write_bytes(b"mp4")
    soundfile.write(music / "short.wav", TONE[:9000], 22_050)
    prepare.prepare(music, tmp_path / "out", workers=1)
    said = capsys.readouterr().out
    for line in ("left out: 3 files, listed in", "  2: .m4a is read by no library here", "levels are far apart",
                 "  1: 0.41 s long, shorter than 1.0 s (", "clipped: 1 tracks, as clipped.wav",
                 "% silence\nthat is much silence", "the same music more than once: 1 tracks, as",
                 "commonest words: noise"):  # fmt: skip
        assert line in said, line
    assert check.check(tmp_path / "out") == (" is the same music as " in capsys.readouterr().out)


def test_a_full_disk_is_no_fault_of_a_track(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "write_file", lambda path, content: full(path))
    with pytest.raises(UserError, match="part: cannot be written"):
        prepare.prepare(folder_of(tmp_path), tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_at_a_shard_is_said_and_what_is_encoded_stays(tmp_path, monkeypatch):
    music, work = folder_of(tmp_path), tmp_path / "out.partial"

    def no_room(*args):  # what is called last before the shards are written
        work.mkdir(exist_ok=True)
        (work / "train_000.npy").unlink(missing_ok=True)
        (work / "train_000.npy").symlink_to("/dev/full")
        return b""

    monkeypatch.setattr(prepare, "train_tokenizer", no_room)
    with pytest.raises(UserError, match="partial: cannot be written .No space left on device.; make room, and run"):
        prepare.prepare(music, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob("encoded/*/*/*.npz"))) == 4


@pytest.mark.parametrize("error, message", [(PermissionError(13, "Permission denied"), "a.npz: cannot be read .Perm"),
                                            (MemoryError("no room"), "no room")])  # fmt: skip
def test_what_cannot_be_read_now_is_not_taken_for_damaged(tmp_path, monkeypatch, error, message):
    (tmp_path / "a.npz").touch()

    def load(path):
        raise error

    monkeypatch.setattr(np, "load", load)
    with pytest.raises((UserError, MemoryError), match=message):
        prepare.read_encoded(tmp_path / "a.npz")
    assert (tmp_path / "a.npz").exists()


def full(path):
    raise UserError(f"{path}: cannot be written (No space left on device)")


def test_ctrl_c_ends_it_and_what_is_encoded_stays(corpus, tmp_path):
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        args = (corpus / "manifest.jsonl", "--out", folder / "out", "--workers", workers)
        run = Ranks(*args, ranks=1, main=prepare.main)
        while not any(folder.glob("encoded/*/*/*.npz")):
            assert run.processes[0].is_alive(), run.output()
            time.sleep(0.02)
        run.send(signal.SIGINT)
        assert "interrupted" in run.finish(status=130) and not (folder / "out").exists()


def test_a_worker_that_dies_is_said_and_nothing_is_lost(tmp_path):
    music = folder_of(tmp_path)
    args = (music, "--out", tmp_path / "out", "--workers", 2)
    run = Ranks(*args, ranks=1, main=prepare.main, before=die_while_listening)
    assert "a worker died, maybe for want of memory; nothing is lost" in run.finish(status=2)


def die_while_listening():
    prepare.start_worker = die


def die(*args):
    os._exit(9)


def test_damage_and_other_content_are_mended_by_preparing_again(tmp_path, capsys):
    music, out = folder_of(tmp_path), tmp_path / "data" / "out"
    prepare.prepare(music, out, workers=1)
    before = (out / "train_000.npy").read_bytes()
    (out / "train_000.npy").unlink()
    with pytest.raises(UserError, match="holds other data; add --replace"):
        prepare.prepare(music, out, workers=1)
    prepare.prepare(music, out, workers=1, replace=True)
    assert (out / "train_000.npy").read_bytes() == before
    (out / "meta.json").write_text("{")
    prepare.prepare(music, out, workers=1, replace=True)
    soundfile.write(music / "0.wav", np.roll(TONE, 500)[::-1], 22_050)  # as long as before
    with pytest.raises(UserError, match="holds other data; add --replace"):
        prepare.prepare(music, out, workers=1)
    for path in tmp_path.glob("data/encoded/*/*/*.npz"):
        content = bytearray(path.read_bytes())
        content[300] ^= 255  # within the codes
        path.write_bytes(content)
    capsys.readouterr()
    with pytest.raises(UserError, match="npz: was damaged, and is removed"):
        for _ in range(9):
            prepare.prepare(music, out, workers=1, replace=True)


def test_nothing_but_a_data_set_is_replaced(tmp_path):
    music, out = folder_of(tmp_path), tmp_path / "data" / "out"
    prepare.prepare(music, out, workers=1)
    (out / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"is no data set alone \(holds notes.md\)"):
        prepare.prepare(music, out, workers=1, replace=True, captions=False)
    (tmp_path / "data" / "new.partial").mkdir()  # where it would write
    (tmp_path / "data" / "new.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"new.partial: .* \(holds thesis.txt\)"):
        prepare.prepare(music, tmp_path / "data" / "new", workers=1)
    assert (tmp_path / "data" / "new.partial" / "thesis.txt").read_text() == "mine"
    for place in (dict(encoded=tmp_path / "new" / "in"), dict(encoded=tmp_path), dict(encoded=tmp_path / "new")):
        with pytest.raises(UserError, match="must not lie in one another"):
            prepare.prepare(music, tmp_path / "new", workers=1, **place)


def test_ranks_that_find_other_files_are_refused(tmp_path):
    music = folder_of(tmp_path)
    shutil.copytree(music, tmp_path / "other")
    (tmp_path / "other" / "3.wav").unlink()
    run = Ranks(
        "--out",
        tmp_path / "out",
        "--workers",
        1,
        main=prepare.main,
        more={0: [str(music)], 1: [str(tmp_path / "other")]},
    )
    assert "need the same settings" in run.finish(status=2)


@pytest.mark.parametrize("captions", [["".join(map(chr, range(0x4E00 + 400 * i, 0x5190 + 400 * i))) for i in range(4)],
                                      ["\U0001f3b5 ♪ étude"]])  # fmt: skip
def test_captions_of_any_script_have_a_tokenizer(captions):
    model = prepare.train_tokenizer([dict(caption=caption, metadata={}) for caption in captions], 1000)
    encode = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert all(encode.decode(encode.encode(caption)).strip() for caption in captions)
    with pytest.raises(UserError, match="--vocab_size 40: must be 300 or more"):
        prepare.train_tokenizer([], 40)


@pytest.mark.parametrize("entry, caption, metadata", [
    ({"caption": None, "description": "a pad"}, "a pad", {}),
    ({"caption": "x", "moods": [None, "", {"a": 1}, "calm"], "attributes": None}, "x", {"moods": "calm"}),
    ({"caption": "x", "a\n": " \u200b", "b": {}, "c\u0000": "\ud83d jazz"}, "x", {"c": "jazz"}),
])  # fmt: skip
def test_odd_entries_say_what_they_can(tmp_path, entry, caption, metadata):
    track = tracks_in(folder_of(tmp_path, json=json.dumps(entry).encode(), txt=b" "))["0.wav"]
    assert track["caption"] == caption and track["metadata"] == metadata


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"bpm": ' + b"9" * 5000 + b"}"])
def test_json_that_python_cannot_hold_is_refused(tmp_path, text):
    with pytest.raises(UserError, match="0.json: not JSON"):
        tracks_in(folder_of(tmp_path, json=text))


def test_links_that_lead_nowhere_are_listed_and_real_folders_come_first(tmp_path):
    music = folder_of(tmp_path)
    (music / "gone.wav").symlink_to("nowhere.wav")
    os.mkfifo(music / "pipe.wav")
    (tmp_path / "around").symlink_to("around")
    (music / "z").mkdir()
    shutil.move(music / "3.wav", music / "z" / "3.wav")
    (music / "a").symlink_to("z")
    prepare.prepare(music, tmp_path / "out", workers=1)
    gone, pipe = map(json.loads, open(tmp_path / "out" / "skipped.jsonl"))
    assert gone["path"].endswith("gone.wav") and "cannot be read" in gone["reason"]
    assert pipe["path"].endswith("pipe.wav") and "is no file" in pipe["reason"]
    with pytest.raises(UserError, match="around"):
        prepare.prepare(music, tmp_path / "around", workers=1)
    names = [t["name"] for split in ("train", "valid") for t in Tokens(tmp_path / "out", split).tracks]
    assert sorted(names) == ["0.wav", "1.wav", "2.wav", "z/3.wav"]


def test_noise_has_no_tempo():
    rng = torch.Generator().manual_seed(0)
    tempi = [tempo_of(onset_strength(torch.randn(30 * 16_000, generator=rng), 16_000)) for _ in range(20)]
    assert sum(tempo > 0 for tempo in tempi) <= 2
