import urllib.error

import demo_music
import pytest
import torch
from encodec import EncodecModel
from train_codec import distances

from codec import TINY_WEIGHTS, encode_long, load_codec
from config import UserError


@pytest.fixture(scope="module")
def codec():
    return load_codec("tiny")


@pytest.fixture(scope="module")
def wav():
    """Four demo clips that the codec never saw, [4, 1, 5 s]."""
    clips = [demo_music.make_clip(999, index)[0][:80_000] for index in range(4)]
    return torch.stack([torch.from_numpy(clip) for clip in clips])[:, None]


def test_shapes_and_what_the_codec_says_of_itself(codec, wav):
    assert (codec.sample_rate, codec.frame_rate, codec.K, codec.channels) == (16_000, 50, 4, 1)
    codes = codec.encode(wav[:, :, :16_010])
    assert codes.shape == (4, 4, 51) and codes.dtype == torch.int64 and 0 <= codes.min() <= codes.max() < codec.card
    assert codec.decode(codes).shape == (4, 1, 51 * 320)
    assert codec.latents(codes).shape == (4, codec.dim, 51)
    assert not any(p.requires_grad for p in codec.model.parameters())


def test_it_carries_the_demo_music_it_never_saw(codec, wav):
    log_mel, relative = distances(codec.decode(codec.encode(wav))[:, 0], wav[:, 0])
    others, _ = distances(wav.roll(1, 0)[:, 0], wav[:, 0])
    assert log_mel < 0.6 < others and relative < 0.6


def test_neighbours_and_autocast_change_nothing(codec, wav):
    codes = codec.encode(wav)
    with torch.autocast("cpu", torch.bfloat16):
        assert (codec.encode(wav[:1]) == codes[:1]).float().mean() > 0.999
        assert codec.decode(codes).dtype == torch.float32


def test_a_wav_that_peaks_above_one_is_scaled_down(codec, wav):
    loud = wav / wav.abs().amax((1, 2), keepdim=True)
    assert torch.equal(codec.encode(loud * 4), codec.encode(loud))


def test_long_audio_in_pieces_equals_whole(codec, wav):
    assert torch.equal(encode_long(codec, wav[0], piece=1.5, context=1.0), codec.encode(wav[:1])[0])


def test_the_id_names_the_weights(codec, tmp_path):
    assert codec.id == load_codec("tiny").id
    saved = torch.load(TINY_WEIGHTS, weights_only=True)
    saved["model"]["encoder.out.bias"] += 1
    torch.save(saved, tmp_path / "other.pt")
    assert load_codec("tiny", tmp_path / "other.pt").id != codec.id


def test_the_shipped_weights_are_small():
    assert TINY_WEIGHTS.stat().st_size <= 6_000_000


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Random weights in the layout, and under the name, of the published file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encodec_24khz-d7cc33bc.th"
    torch.save(EncodecModel.encodec_model_24khz(pretrained=False).state_dict(), path)
    return path


@pytest.mark.parametrize("name, K", [("encodec_24khz", 8), ("encodec_24khz:1.5", 2), ("encodec_24khz:3", 4)])
def test_encodec_24khz_equals_the_package(published, name, K):
    codec = load_codec(name, published.parent)
    model = EncodecModel.encodec_model_24khz(pretrained=False)
    model.load_state_dict(torch.load(published, weights_only=True))
    model.set_target_bandwidth(K * 0.75)
    wav = torch.randn(1, 1, 12_000) * 0.1
    codes = codec.encode(wav)
    assert (codec.K, codec.card, codec.frame_rate, codec.sample_rate) == (K, 1024, 75, 24_000)
    assert torch.equal(codes, model.encode(wav)[0][0])
    torch.testing.assert_close(codec.decode(codes), model.decode([(codes, None)]).detach())


def test_what_cannot_be_had_is_said(monkeypatch, published, tmp_path):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(UserError, match="cannot be downloaded.*--codec_weights=FILE, or use --codec=tiny"):
        load_codec("encodec_24khz")
    with pytest.raises(UserError, match="no such file"):
        load_codec("encodec_24khz", tmp_path)
    with pytest.raises(UserError, match="not the weights of encodec_24khz"):
        load_codec("encodec_24khz", TINY_WEIGHTS)
    with pytest.raises(UserError, match="cannot be read as a tiny codec"):
        load_codec("tiny", published)
    with pytest.raises(UserError, match="unknown codec 'mp3'"):
        load_codec("mp3")
    with pytest.raises(UserError, match="bandwidth must be one of 1.5, 3, 6, 12"):
        load_codec("encodec_24khz:5")
