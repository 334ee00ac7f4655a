import numpy as np
import pytest
import torch

from conditioning import SILENCE, all_conditions, chromagram, draw_conditions, melody_of
from config import Settings

CAPTION, METADATA = "a slow piano melody", {"genre": "jazz", "bpm": 68}


def draws(n=4000, caption=CAPTION, **settings):
    return [given["text"] for given in all_draws(n, caption, **settings)]


def all_draws(n=4000, caption=CAPTION, frames=400, **settings):
    s = Settings(**{"cfg_dropout": 0.0, "melody": True, "style": True, **settings})
    return [draw_conditions(caption, METADATA, frames, 50, np.random.default_rng([1, i]), s) for i in range(n)]


def test_nothing_is_drawn_when_every_probability_is_zero():
    assert set(draws(50)) == {CAPTION}


def test_each_dropout_is_drawn_per_sample_with_its_probability():
    given = all_draws(text_dropout=0.2, melody_dropout=0.4, style_dropout=0.6)
    dropped = np.array([[not sample[name] for name in ("text", "melody", "style")] for sample in given])
    assert dropped.mean(0) == pytest.approx([0.2, 0.4, 0.6], abs=0.03)
    assert np.abs(np.corrcoef(dropped.T) - np.eye(3)).max() < 0.06, "each on its own"
    assert len(set(map(tuple, dropped[:40].tolist()))) > 4


def test_cfg_dropout_drops_everything_together():
    given = all_draws(cfg_dropout=0.3)
    dropped = [[not sample[name] for name in ("text", "melody", "style")] for sample in given]
    assert all(row in ([True] * 3, [False] * 3) for row in dropped)
    assert np.mean(dropped) == pytest.approx(0.3, abs=0.03)


def test_a_model_without_melody_or_style_is_given_none():
    for given in (*all_draws(5, melody=False, style=False), all_conditions(CAPTION, 400, 50, Settings())):
        assert given == {"text": CAPTION, "melody": False, "style": None}


def test_the_excerpt_has_random_length_place_and_books():
    excerpts = np.array([sample["style"] for sample in all_draws(style_seconds=(1.0, 3.0))])
    first, end, books = excerpts.T
    lengths = end - first
    assert lengths.min() in (50, 51) and lengths.max() in (149, 150) and lengths.mean() == pytest.approx(100, abs=2)
    assert first.min() == 0 and end.max() in (399, 400) and first.mean() == pytest.approx(150, abs=6)
    assert (np.bincount(books)[1:] / len(books)) == pytest.approx(np.full(6, 1 / 6), abs=0.03)
    for frames in (2, 7, 60):
        for first, end, _ in (sample["style"] for sample in all_draws(50, frames=frames)):
            assert 0 <= first < end <= frames and end - first <= max(1, frames // 2)
    assert all_conditions(CAPTION, 400, 50, Settings(melody=True, style=True)) == {
        "text": CAPTION, "melody": True, "style": (125, 275, 3)}  # fmt: skip


def test_the_melody_of_a_scale_over_a_soft_bass():
    rate, notes = 16_000, [0, 2, 4, 5, 7, 9, 11]
    time = torch.arange(rate) / rate
    tones = [torch.sin(2 * torch.pi * 261.63 * 2 ** (note / 12) * time) for note in notes]
    bass = 0.2 * torch.sin(2 * torch.pi * 98 * torch.arange(8 * rate) / rate)
    wav = torch.cat([*tones, torch.zeros(rate)]) + bass * (torch.arange(8 * rate) < 7 * rate)
    melody = melody_of(0.3 * wav, rate)
    assert melody.dtype == torch.uint8 and len(melody) == 64
    for i, note in enumerate([*notes, SILENCE]):
        assert set(melody[8 * i + 2 : 8 * i + 6].tolist()) == {note}


def test_a_long_melody_is_heard_in_pieces_that_leave_no_seam():
    wav = torch.randn(150 * 4000, generator=torch.Generator().manual_seed(0)).cumsum(0)  # 150 s at 4 kHz
    wav = wav / wav.abs().max()
    chroma = chromagram(wav[None], 4000)[0]
    whole = torch.where(chroma.sum(0) > 0, chroma.argmax(0), SILENCE)
    assert torch.equal(melody_of(wav, 4000).long(), whole) and len(whole) == 1200


def test_metadata_merges_into_the_caption_in_any_order():
    texts = draws(merge_text_p=0.5)
    assert np.mean([text != CAPTION for text in texts]) == pytest.approx(0.5, abs=0.03)
    assert set(texts) == {CAPTION, f"{CAPTION}. genre: jazz. bpm: 68", f"{CAPTION}. bpm: 68. genre: jazz"}
    assert set(draws(caption="", merge_text_p=1.0)) == {"genre: jazz. bpm: 68", "bpm: 68. genre: jazz"}


def test_words_drop_out_one_by_one():
    texts = draws(word_dropout=0.25)
    assert np.mean([len(text.split()) for text in texts]) == pytest.approx(0.75 * 4, abs=0.06)
    assert all(set(text.split()) <= set(CAPTION.split()) for text in texts)
