"""The frozen codec, mono and stereo, of complete and of streamed audio; the music that `tiny` is trained on."""

import math
import os
import shutil
import struct
import types
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from encodec import EncodecModel

from codec import codec_info, decode_stream, encode_long, load_codec
from common import UserError
from conditioning import chromagram
from demo import corpus, scores, train_tiny
from demo.tiny import TONES, WEIGHTS, TinyCodec, tone_levels
from demo.train_tiny import distances


@pytest.fixture(scope="module")
def codec():
    return load_codec("tiny")


@pytest.fixture(scope="module")
def wav():
    """Four demo clips that the codec was not trained on, [4, 1, 5 s]."""
    clips = [corpus.make_clip(999, index)[0][:80_000] for index in range(4)]
    return torch.stack([torch.from_numpy(clip) for clip in clips])[:, None]


def test_shapes_and_attributes(codec, wav):
    assert (codec.sample_rate, codec.frame_rate, codec.K, codec.channels) == (16_000, 50, 4, 1)
    codes = codec.encode(wav[:, :, :16_010])
    assert codes.shape == (4, 4, 51) and codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < codec.card
    assert codec.decode(codes).shape == (4, 1, 51 * 320)
    assert codec.latents(codes).shape == (4, codec.dim, 51)
    assert not any(p.requires_grad for p in codec.model.parameters())


def test_new_demo_music_is_reproduced(codec, wav):
    log_mel, relative = distances(codec.decode(codec.encode(wav))[:, 0], wav[:, 0])
    others, _ = distances(wav.roll(1, 0)[:, 0], wav[:, 0])
    assert log_mel < 0.6 < others and relative < 0.6


def test_codes_do_not_depend_on_other_items_or_autocast(codec, wav):
    codes = codec.encode(wav)
    with torch.autocast("cpu", torch.bfloat16):
        assert (codec.encode(wav[:1]) == codes[:1]).float().mean() > 0.999
        assert codec.decode(codes).dtype == torch.float32


def test_a_wav_with_a_peak_above_one_is_scaled_down(codec, wav):
    loud = wav / wav.abs().amax((1, 2), keepdim=True)
    assert torch.equal(codec.encode(loud * 4), codec.encode(loud))


def test_encoding_in_chunks_equals_encoding_at_once(codec, wav):
    assert torch.equal(encode_long(codec, wav[0], chunk=1.5), codec.encode(wav[:1])[0])


def test_the_id_depends_on_the_weights(codec, tmp_path):
    assert codec.id == load_codec("tiny").id
    saved = torch.load(WEIGHTS, weights_only=True)
    saved["model"]["encoder.out.bias"] += 1
    torch.save(saved, tmp_path / "other.pt")
    assert load_codec("tiny", tmp_path / "other.pt").id != codec.id


def test_the_shipped_weights_are_small():
    assert WEIGHTS.stat().st_size <= 6_000_000


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Write random weights with the layout and the name of the published file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encodec_24khz-d7cc33bc.th"
    torch.save(EncodecModel.encodec_model_24khz(pretrained=False).state_dict(), path)
    return path


@pytest.mark.parametrize("name, K", [("encodec_24khz", 8), ("encodec_24khz:1.5", 2), ("encodec_24khz:3", 4)])
def test_encodec_24khz_equals_the_encodec_package(published, name, K):
    codec = load_codec(name, published)
    model = EncodecModel.encodec_model_24khz(pretrained=False)
    model.load_state_dict(torch.load(published, weights_only=True))
    model.set_target_bandwidth(K * 0.75)
    wav = torch.randn(1, 1, 12_000) * 0.1
    codes = codec.encode(wav)
    assert (codec.K, codec.card, codec.frame_rate, codec.sample_rate) == (K, 1024, 75, 24_000)
    assert torch.equal(codes, model.encode(wav)[0][0])
    torch.testing.assert_close(codec.decode(codes), model.decode([(codes, None)]).detach())


def test_errors_name_the_codec_and_the_remedy(monkeypatch, published, tmp_path):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    with pytest.raises(UserError, match="cannot be downloaded.*--codec_weights=FILE, or use --codec=tiny"):
        load_codec("encodec_24khz")
    with pytest.raises(UserError, match="none.th: no such file. Download https:"):
        load_codec("encodec_24khz", tmp_path / "none.th")
    with pytest.raises(UserError, match="not the weights of encodec_24khz .*. Download https:.* --codec_weights=FILE"):
        load_codec("encodec_24khz", WEIGHTS)
    with pytest.raises(UserError, match="cannot be read as a tiny codec"):
        load_codec("tiny", published)
    with pytest.raises(UserError, match="unknown codec 'mp3'"):
        load_codec("mp3")
    with pytest.raises(UserError, match="bandwidth must be one of 1.5, 3, 6, 12"):
        load_codec("encodec_24khz:5")


def test_a_download_is_checked_by_its_hash_even_if_cached_and_runs_no_code(monkeypatch, published, tmp_path):
    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    cached = tmp_path / "checkpoints" / "encodec_24khz-d7cc33bc.th"
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, expected: shutil.copy(published, path))
    for _ in range(2):  # downloaded, then cached
        with pytest.raises(UserError, match=f"{cached}: damaged .*d7cc33bc.*; remove it to download"):
            load_codec("encodec_24khz")
    torch.save({"a": Code()}, cached)
    digest = types.SimpleNamespace(hexdigest=lambda: "d7cc33bc")
    with monkeypatch.context() as patch:
        patch.setattr("codec.hashlib.sha256", lambda content: digest)
        with pytest.raises(UserError, match=f"{cached}: not the weights of encodec_24khz"):
            load_codec("encodec_24khz")
    assert not (tmp_path / "ran").exists()


def test_stereo_encodes_left_and_right_with_the_same_codec():
    mono, stereo = load_codec("tiny"), load_codec("tiny:stereo")
    wav = 0.3 * torch.randn(3, 2, 16_000).cumsum(2).sin()
    codes = stereo.encode(wav)
    assert codes.shape == (3, 8, 50) and stereo.id != mono.id and stereo.info()["channels"] == 2
    left, right = wav[:, :1], wav[:, 1:]
    assert torch.equal(codes[:, 0::2], mono.encode(left)) and torch.equal(codes[:, 1::2], mono.encode(right))
    torch.testing.assert_close(stereo.decode(codes)[:, 1:], mono.decode(codes[:, 1::2]))
    latents = stereo.latents(codes)
    torch.testing.assert_close(latents[:, :64], mono.latents(codes[:, 0::2]))
    total = sum(vectors[codes[:, k]] for k, vectors in enumerate(stereo.vectors()))
    torch.testing.assert_close(total.transpose(1, 2), latents)
    assert torch.equal(encode_long(stereo, wav[0], chunk=0.5), codes[0])
    loud = torch.cat([left, 4 * right], dim=1) / wav.abs().max()
    assert torch.equal(stereo.encode(loud), stereo.encode(loud / loud.abs().amax((1, 2), keepdim=True).clamp(min=1)))


def test_codec_info_and_invalid_names():
    assert [codec_info(f"encodec_24khz:{kbps}")["K"] for kbps in ("1.5", "3", "6", "12")] == [2, 4, 8, 16]
    assert codec_info("encodec_24khz:3:stereo")["K"] == 8 and codec_info("musicgen_32khz")["card"] == 2048
    for name in ("encodec_24khz:5", "tiny:3", "musicgen_32khz:3", "mp3", "tiny:stereo:stereo", "encodec_48khz"):
        with pytest.raises(UserError):
            codec_info(name)


def test_chroma_is_preserved(codec):
    wav = torch.stack([torch.from_numpy(corpus.make_clip(17, i)[0][:80_000]) for i in range(16)])
    decoded = codec.decode(codec.encode(wav[:, None]))[:, 0]
    before, after = (chromagram(x, codec.sample_rate) for x in (wav, decoded))
    assert torch.cosine_similarity(before, after, dim=1).mean() > 0.86


def test_an_oscillator_is_continuous_from_frame_to_frame():
    decoder, n = TinyCodec().decoder, 60
    with torch.no_grad():
        for layer in (decoder.out, decoder.tones):
            layer.weight.zero_()
            layer.bias.fill_(-30)
        decoder.tones.bias[n] = math.log(0.5)
        wav = decoder.synthesize(torch.zeros(1, 100, 192))[0, 0]
    radians = 2 * math.pi * TONES[n] / 16_000 * (torch.arange(len(wav)) + (1024 - 320) // 2)
    torch.testing.assert_close(wav[1000:-1000], 0.5 * radians.cos()[1000:-1000], atol=1e-3, rtol=0)


def test_a_decoded_stream_has_no_seams():
    codec = load_codec("tiny")
    codes = torch.randint(0, 512, (1, 4, 130))
    expected = codec.decode(codes)
    for n in (1, 7, 50):
        for part in (1, 50):
            wavs = list(decode_stream(codec, codes.split(part, dim=2), n))
            torch.testing.assert_close(torch.cat(wavs, dim=2), expected, atol=1e-5, rtol=0)
            assert wavs[0].shape[2] == n * codec.hop
    for T in (1, 5, 24):
        (wav,) = decode_stream(codec, [codes[:, :, :T]])
        torch.testing.assert_close(wav, codec.decode(codes[:, :, :T]))
    codec.future = 2
    difference = torch.cat(list(decode_stream(codec, [codes], 7)), dim=2) - expected
    assert difference.abs().max() > 1e-3


# -------------------------------------------------------------------------------- the training music of `tiny`


def test_composed_music_is_a_midi_file():
    score = scores.make_midi(np.random.default_rng(3))
    assert score == scores.make_midi(np.random.default_rng(3)) != scores.make_midi(np.random.default_rng(4))
    assert score[:4] == b"MThd" and score[14:18] == b"MTrk"
    assert struct.unpack(">I", score[18:22])[0] == len(score) - 22 and score.endswith(b"\xff\x2f\x00")


def test_midi_files_are_read_from_a_wad(tmp_path):
    lumps = {b"PLAYPAL": b"colours", b"D_E1M1": b"MThd first", b"D_INTRO": b"MThd second", b"D_OLD": b"MUS\x1a"}
    content, directory = b"", b""
    for name, lump in lumps.items():
        directory += struct.pack("<II8s", 12 + len(content), len(lump), name)
        content += lump
    path = tmp_path / "free.wad"
    path.write_bytes(b"IWAD" + struct.pack("<II", len(lumps), 12 + len(content)) + content + directory)
    assert scores.read_midi(path) == [("free_D_E1M1", b"MThd first"), ("free_D_INTRO", b"MThd second")]
    for broken in (b"", b"IWAD", b"PWAD" + struct.pack("<II", 5, 12), b"RIFF" + bytes(100)):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="free.wad: not a .wad file, or cut off"):
            scores.read_midi(path)


def test_test_sounds_are_loud_and_silent_and_never_clipped():
    wav = scores.make_test(np.random.default_rng(0))
    assert np.isfinite(wav).all() and 0.5 < np.abs(wav).max() <= 1 and (wav == 0).mean() > 0.05


def test_a_missing_synthesizer_is_named(tmp_path, command, monkeypatch):
    monkeypatch.setattr(scores.shutil, "which", lambda name: None)
    status, output = command(scores, tmp_path)
    assert status == 2 and "fluidsynth: not found; apt-get install fluidsynth fluid-soundfont-gm" in output


@pytest.mark.skipif(not shutil.which("fluidsynth") or not Path(scores.SOUND_FONT).exists(), reason="needs fluidsynth")
def test_existing_music_is_not_rendered_again(tmp_path, command):
    assert command(scores, tmp_path, "--minutes=1")[0] == 0
    paths = sorted(tmp_path.rglob("*.flac"))
    assert [path.parent.name for path in paths] == ["music", "tests"]
    written = [path.stat().st_mtime_ns for path in paths]
    wav, rate = soundfile.read(paths[0])
    assert 50 < len(wav) / rate <= 60 and 0.1 < np.abs(wav).max() <= 1
    assert command(scores, tmp_path, "--minutes=1")[0] == 0
    assert [path.stat().st_mtime_ns for path in paths] == written
    Path(tmp_path, "broken.mid").write_bytes(b"MThd cut")
    status, output = command(scores, tmp_path, "--minutes=0", "--midi", tmp_path / "broken.mid")
    assert status == 2 and "broken.mid: fluidsynth plays less than a second" in output


def test_unused_vectors_are_replaced_and_remain_in_use():
    torch.manual_seed(0)
    quantizer, latents = TinyCodec(latent=8, card=16).quantizer.train(), torch.randn(4, 8, 100)
    quantizer(latents, 50)  # the first batch initializes the codebooks
    for layer in quantizer.vq.layers:
        codebook = layer._codebook
        codebook.embed[:5], codebook.embed_avg[:5], codebook.cluster_size[:5] = 99.0, 0.0, 0.0  # far from all latents
    for _ in range(3):
        train_tiny.replace_unused(quantizer, latents, quantizer(latents, 50).codes)
    for layer in quantizer.vq.layers:
        assert (layer._codebook.cluster_size[:5] > 0.9).all() and (layer._codebook.embed[:5].abs() < 10).all()


@pytest.mark.parametrize("shares", ["1", "1 -1", "2 -1", "0 0", "nan 1"])
def test_every_folder_needs_a_share(shares, tmp_path, command):
    status, output = command(train_tiny, "train", "a", "b", f"--out={tmp_path / 'codec'}", "--shares", *shares.split())
    assert status == 2 and "for 2 folders: pass one of 0 or above for each" in output
    assert not (tmp_path / "codec").exists()


def test_the_tone_loss_rises_for_a_missing_tone():
    wav = 0.5 * torch.cos(2 * math.pi * TONES[60] / 16_000 * torch.arange(32_000))[None]
    levels = tone_levels(wav).transpose(1, 2)
    assert train_tiny.tone_loss(levels, wav) == 0
    levels[:, :, 60] = -30
    assert train_tiny.tone_loss(levels, wav) > 0.1


@pytest.mark.parametrize("part", [pytest.param("replace_unused", marks=pytest.mark.slow), "tone_loss"])
def test_every_training_step_replaces_unused_vectors_and_uses_the_tone_loss(
    part, request, tmp_path, command, monkeypatch
):
    function, calls = getattr(train_tiny, part), []
    monkeypatch.setattr(train_tiny, part, lambda *args: calls.append(args) or function(*args))
    small = "--steps=2 --batch_size=2 --valid_every=2 --shares=1".split()
    status, output = command(train_tiny, "train", request.getfixturevalue("corpus"), f"--out={tmp_path}", *small)
    assert status == 0 and len(calls) == 2, output
