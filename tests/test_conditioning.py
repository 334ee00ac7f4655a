import numpy as np
import pytest

from conditioning import draw_conditions
from config import Settings

CAPTION, METADATA = "a slow piano melody", {"genre": "jazz", "bpm": 68}


def draws(n=4000, caption=CAPTION, **settings):
    s = Settings(**{"cfg_dropout": 0.0, **settings})
    return [draw_conditions(caption, METADATA, np.random.default_rng([1, i]), s)["text"] for i in range(n)]


def test_nothing_is_drawn_when_every_probability_is_zero():
    assert set(draws(50)) == {CAPTION}


@pytest.mark.parametrize("which", ["cfg_dropout", "text_dropout"])
def test_dropout_is_drawn_per_sample_with_its_probability(which):
    dropped = [text is None for text in draws(**{which: 0.3})]
    assert np.mean(dropped) == pytest.approx(0.3, abs=0.03)
    assert len(set(dropped[:20])) == 2


def test_metadata_merges_into_the_caption_in_any_order():
    texts = draws(merge_text_p=0.5)
    assert np.mean([text != CAPTION for text in texts]) == pytest.approx(0.5, abs=0.03)
    assert set(texts) == {CAPTION, f"{CAPTION}. genre: jazz. bpm: 68", f"{CAPTION}. bpm: 68. genre: jazz"}
    assert set(draws(caption="", merge_text_p=1.0)) == {"genre: jazz. bpm: 68", "bpm: 68. genre: jazz"}


def test_words_drop_out_one_by_one():
    texts = draws(word_dropout=0.25)
    assert np.mean([len(text.split()) for text in texts]) == pytest.approx(0.75 * 4, abs=0.06)
    assert all(set(text.split()) <= set(CAPTION.split()) for text in texts)
