import numpy as np
import pytest
import torch

import data
import demo_music
import metrics
from model import load_model


def test_attributes_are_texts_of_few_values(dataset):
    found = metrics.attributes_of(data.Tokens(dataset, "train"))
    assert found["drums"] == ["no", "yes"] and set(found["instrument"]) <= set(demo_music.ATTRIBUTES["instrument"])
    assert "bpm" not in found and all(2 <= len(values) <= 7 for values in found.values())


def test_tracks_may_lack_attributes_or_hold_other_types(own_dataset, toy_run):
    """Real metadata is patchy: an attribute is scored on the tracks that have it, and left out where none has."""
    train, valid = data.Tokens(own_dataset, "train"), data.Tokens(own_dataset, "valid")
    for i, track in enumerate(train.tracks + valid.tracks):
        track["metadata"] = [{"genre": "jazz", "mood": 3}, {"genre": "rock"}, {"genre": 7}, {}][i % 4]
    for track in valid.tracks[:1]:
        track["metadata"] = {"genre": "rock"}
    train.tracks[0]["metadata"] = {"only_in_training": "a"}
    train.tracks[1]["metadata"] = {"only_in_training": "b", "genre": "rock"}
    model, settings, about = load_model(toy_run[0] / "best.pt")
    settings.evaluate_clips = 2
    table = metrics.adherence(model, data.load_codec("tiny"), train, valid, settings)
    assert list(table) == ["genre"] and 0 <= table["genre"]["real"] <= 1


def test_the_probe_hears_instrument_tempo_and_drums_and_not_noise():
    clips = [demo_music.make_clip(17, i) for i in range(160)]
    wav = torch.stack([torch.from_numpy(clip[:90_000]) for clip, _ in clips])
    x = metrics.features(wav, 16_000)
    for attribute, least in (("instrument", 0.8), ("tempo", 0.9), ("drums", 0.9)):
        labels = [about[attribute] for _, about in clips]
        probe = metrics.Probe(x[:120], labels[:120], demo_music.ATTRIBUTES[attribute])
        assert probe.accuracy(x[120:], labels[120:]) >= least, attribute
        shuffled = list(np.random.default_rng(0).permutation(labels[120:]))
        assert probe.accuracy(x[120:], shuffled) < least - 0.15, attribute


def test_onsets_show_the_beat():
    wav = torch.zeros(1, 16_000 * 6)
    wav[:, :: 16_000 // 2] = 1  # 120 clicks a minute: a lag of 25 frames
    correlation = metrics.features(wav, 16_000)[0, 160:]
    assert int(correlation.argmax()) + 5 == pytest.approx(25, abs=1)
