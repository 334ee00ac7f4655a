"""Audio files: interrupted recordings, MP3s with a wrong length, files that ffmpeg reads, writing."""

import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import torch
from mutagen.mp3 import MPEGFrame

from audio import FFMPEG_SUFFIXES, load_audio, mp3_seconds, open_audio, write_audio
from common import UserError


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".ogg", ".mp3"])
def test_written_audio_is_read_again(suffix, tmp_path):
    wav = 0.5 * torch.stack([torch.arange(16_000).mul(rate).sin() for rate in (0.05, 0.1)])
    assert write_audio(tmp_path / f"a{suffix}", wav, 16_000) == tmp_path / f"a{suffix}"
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]
    difference = (load_audio(tmp_path / f"a{suffix}", 16_000, 2)[:, :16_000] - wav).abs()
    assert difference.max() < (1e-4 if suffix in (".wav", ".flac") else 0.2)


def test_a_sample_rate_that_a_format_lacks_is_refused(tmp_path):
    with pytest.raises(UserError, match="a.mp3: cannot be encoded as MP3 .*. Choose another format"):
        write_audio(tmp_path / "a.mp3", torch.zeros(1, 100), 96_000)
    assert not any(tmp_path.iterdir())


def test_long_ogg_files_are_written(tmp_path):
    write_audio(tmp_path / "long.ogg", torch.zeros(1, 16_000 * 600), 16_000)
    assert soundfile.info(tmp_path / "long.ogg").duration == 600


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile.SoundFile, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_audio(tmp_path / "a.wav", torch.zeros(1, 100), 16_000)
    assert not any(tmp_path.iterdir())


def test_a_wav_of_an_interrupted_recording_is_read_completely(tmp_path):
    path, rng = tmp_path / "interrupted.wav", np.random.default_rng(0)
    soundfile.write(path, rng.uniform(-0.5, 0.5, (16_000, 2)), 16_000)
    expected, content = load_audio(path, 16_000, 2), bytearray(path.read_bytes())
    data = content.index(b"data")
    content[4:8] = content[data + 4 : data + 8] = bytes(4)
    path.write_bytes(content)
    assert torch.equal(load_audio(path, 16_000, 2), expected)
    path.write_bytes(content[: data + 8])
    with pytest.raises(UserError, match="interrupted.wav: contains no samples"):
        load_audio(path, 16_000)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "MS_ADPCM"])
def test_a_wav_with_a_size_that_is_too_small_is_read_to_its_end(subtype, tmp_path):
    """Chunks, tags and zeros after the samples are no samples, even if their own sizes are wrong."""
    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 20 * 16_000), 16_000, subtype=subtype)
    expected, content = load_audio(path, 16_000), path.read_bytes()
    place = content.index(b"data") + 4
    stated = 3 * int.from_bytes(content[place : place + 4], "little") // 20 // 2048 * 2048
    path.write_bytes(content[:place] + stated.to_bytes(4, "little") + content[place + 4 :])
    assert load_audio(path, 16_000).shape[1] == pytest.approx(expected.shape[1], abs=2100)
    for start in (b"LIST", b"id3 \xff", b"ID3\x04", b"APETAGEX", b"<?xml", bytes(8), b"\0id3 "):
        path.write_bytes(content + start + bytes(range(256)) * 1000)
        assert torch.equal(load_audio(path, 16_000), expected), start
    path.write_bytes(content[:place] + b"\xff" * 4 + content[place + 4 :])  # ffmpeg, into a pipe
    assert torch.equal(load_audio(path, 16_000), expected)


def test_a_flac_without_a_length_is_read(tmp_path):
    path = tmp_path / "a.flac"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 20 * 16_000), 16_000)
    expected, content = load_audio(path, 16_000), path.read_bytes()
    block = int.from_bytes(content[18:26], "big") >> 36 << 36
    path.write_bytes(content[:18] + block.to_bytes(8, "big") + content[26:])  # recorded from a pipe
    assert torch.equal(load_audio(path, 16_000), expected)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_one_channel_is_used_if_the_mix_would_cancel(suffix, tmp_path):
    left = 0.3 * np.sin(np.arange(30 * 16_000) / 10) * (np.arange(30 * 16_000) > 5 * 16_000)  # after 5 s of silence
    for right, expected in ((-left, left), (-0.9 * left, left), (-1.1 * left, 1.1 * left), (0 * left, 0.5 * left)):
        soundfile.write(tmp_path / f"a.{suffix}", np.stack([left, right], 1), 16_000)
        level = load_audio(tmp_path / f"a.{suffix}", 16_000).square().mean().sqrt()
        assert level == pytest.approx((expected**2).mean() ** 0.5, rel=0.05)
    assert load_audio(tmp_path / f"a.{suffix}", 16_000, 2)[1].abs().max() < 0.01, "stereo stays as it is"


@pytest.mark.parametrize("rate", [48_000, 44_100, 32_000, 22_050, 16_000, 8_000])
def test_an_mp3_that_libsndfile_reads_only_in_part_is_refused(rate, tmp_path):
    """libsndfile uses the header: it reads the first of two joined files, and a part of a file without header."""
    path, time = tmp_path / "a.mp3", np.arange(5 * rate) / rate
    tone = 0.3 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(path, tone, rate)
    content, seconds = path.read_bytes(), mp3_seconds(path)
    assert seconds == pytest.approx(5, abs=0.3)
    assert load_audio(path, 16_000).shape[1] == pytest.approx(80_000, abs=5000)

    picture = np.random.default_rng(0).integers(256, size=500_000).astype(np.uint8)
    picture[::9], picture[1::9], picture[2::9] = 255, 251, 144  # looks like frame headers
    size = bytes([len(picture) >> 21 & 127, len(picture) >> 14 & 127, len(picture) >> 7 & 127, len(picture) & 127])
    tag = b"ID3\x04\x00\x00" + size + picture.tobytes()
    for changed in (tag + content, content + b"APETAGEX" + picture.tobytes(), bytes(1000) + content + bytes(1000)):
        path.write_bytes(changed)
        assert mp3_seconds(path) == seconds
        load_audio(path, 16_000)

    path.write_bytes(b"no audio" * 1000)
    with pytest.raises(UserError, match="a.mp3: cannot be read as audio .not audio"):
        load_audio(path, 16_000)

    id3v1 = b"TAG" + bytes(125)
    far = (content + bytes(2_000_000) + content, content + id3v1 + 3 * tag + content)  # MPEGInfo alone gives up
    for changed in (2 * content, content + tag + content, *far):
        path.write_bytes(changed)
        match = r"a.mp3: the header says 5.\d s but the stream has (9.9|10.\d) s. Convert it to WAV or FLAC"
        with pytest.raises(UserError, match=match):
            load_audio(path, 16_000)


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
def test_an_mp3_without_header_is_read_completely_or_refused(mode, tmp_path):
    """Without the header in the first frame, libsndfile extrapolates from the bitrate of the next frame."""
    path, rate = tmp_path / "a.mp3", 44_100
    wav = 0.3 * np.sin(2 * np.pi * 440 * np.arange(20 * rate) / rate)
    wav[:rate] += np.random.default_rng(0).normal(0, 0.1, rate)  # a high bitrate at the start
    with soundfile.SoundFile(path, "w", rate, 1, bitrate_mode=mode, compression_level=0.5) as file:
        file.write(wav)
    with open(path, "rb") as file:
        MPEGFrame(file)
        frames = file.read()
    path.write_bytes(frames)
    assert mp3_seconds(path) == pytest.approx(20, abs=0.1)
    if mode == "CONSTANT":
        assert load_audio(path, 16_000).shape[1] == pytest.approx(20 * 16_000, abs=2000)
    else:
        with pytest.raises(UserError, match=r"the header says \d.\d s but the stream has (19.9|20.\d) s"):
            load_audio(path, 16_000)


def test_a_part_of_a_file_equals_this_part_of_all(tmp_path):
    path, n = tmp_path / "a.wav", 25 * 16_000  # several blocks, resampled
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 25 * 22_050), 22_050)
    wav = load_audio(path, 16_000)
    for first, samples in ((0, n), (0, 5), (170_000, 1000), (159_000, 200_000), (n - 5, 100), (161_000, None)):
        part = load_audio(path, 16_000, samples=samples, first=first)
        assert torch.equal(part, wav[:, first:][:, :samples])
    with pytest.raises(UserError, match="a.wav: only 25.0 s long.* 30 s.*--from"):
        load_audio(path, 16_000, first=30 * 16_000)


def write_au(path, seconds=12, rate=22_050):
    wav = np.random.default_rng(1).uniform(-0.5, 0.5, (seconds * rate, 2))
    soundfile.write(path, wav, rate, format="AU", subtype="FLOAT")


def test_ffmpeg_reads_the_formats_that_libsndfile_lacks(fake_ffmpeg, tmp_path):
    write_au(tmp_path / "a.au")
    expected = load_audio(tmp_path / "a.au", 16_000, 2)
    for suffix in (*FFMPEG_SUFFIXES, ".M4A"):
        path = shutil.copy(tmp_path / "a.au", tmp_path / f"http:-a b{suffix}")
        assert torch.equal(load_audio(path, 16_000, 2), expected)
        assert torch.equal(load_audio(path, 16_000, 2, samples=500, first=900), expected[:, 900:1400])
        with open_audio(path) as file:
            assert file.samplerate == 22_050


def test_a_file_that_ffmpeg_cannot_read_is_refused(fake_ffmpeg, tmp_path, monkeypatch):
    messages = {"broken.m4a": "moov atom not found", "damaged.m4a": "stream 0, offset 0x30: partial file"}
    for name, message in messages.items():
        write_au(tmp_path / name)
        with pytest.raises(UserError, match="WAV") as error:
            load_audio(tmp_path / name, 16_000)
        assert f"{tmp_path / name}: cannot be read as audio (ffmpeg: {message})" in str(error.value)
    assert load_audio(tmp_path / "damaged.m4a", 16_000, samples=100).shape == (1, 100)  # the beginning is not damaged
    write_au(tmp_path / "empty.m4a", seconds=0)
    with pytest.raises(UserError, match="empty.m4a: contains no samples"):
        load_audio(tmp_path / "empty.m4a", 16_000)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="empty.m4a: .*ffmpeg.* Install it, or .* WAV"):
        load_audio(tmp_path / "empty.m4a", 16_000)


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="needs ffmpeg")
def test_audio_encoded_by_ffmpeg_is_read_back(tmp_path):
    wav, rate = np.random.default_rng(0).normal(0, 0.1, (22_050 * 12, 2)), 22_050
    wav = np.cumsum(wav, axis=0) - np.cumsum(np.roll(wav, 50, axis=0), axis=0)  # mostly low frequencies
    soundfile.write(tmp_path / "a.wav", 0.5 * wav / np.abs(wav).max(), rate)
    expected = load_audio(tmp_path / "a.wav", 16_000, 2)
    for name in ("a.m4a", "a.mp4", "a.mka"):
        command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "aac", tmp_path / name]
        subprocess.run(command, check=True)
        read = load_audio(tmp_path / name, 16_000, 2)
        assert read.shape[1] == pytest.approx(expected.shape[1], abs=2000)
        n = min(read.shape[1], expected.shape[1])
        assert np.corrcoef(read[0, :n], expected[0, :n])[0, 1] > 0.95
    content = (tmp_path / "a.m4a").read_bytes()
    (tmp_path / "half.m4a").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="half.m4a: cannot be read as audio .ffmpeg: "):
        load_audio(tmp_path / "half.m4a", 16_000)
