"""A corpus of one instrument, and the study of fine-tuning that uses it, at toy size."""

import json
from types import SimpleNamespace

import numpy as np
import torch
from conftest import TOY, lines, slow

import train
from demo import corpus as demo_corpus
from dev import finetune


def test_a_corpus_of_one_instrument(command, tmp_path):
    """Its clips differ from those of the default corpus in the instrument only, and corpus.json names it."""
    folder = tmp_path / "clarinet"
    args = (folder, "--clips", 5, "--seed", 5, "--workers", 1)
    assert command(demo_corpus, *args, "--instrument", "clarinet")[0] == 0
    for index, track in enumerate(lines(folder / "manifest.jsonl")):
        expected = demo_corpus.draw_attributes(np.random.default_rng([5, index]))
        del expected["caption"]
        assert "clarinet" in track["caption"] and track["attributes"] == expected | {"instrument": "clarinet"}
    description = json.loads((folder / "corpus.json").read_text())
    assert description.pop("instrument") == "clarinet"
    assert command(demo_corpus, *args)[0] == 0  # replaces it by the default corpus
    assert json.loads((folder / "corpus.json").read_text()) == description
    assert {track["attributes"]["instrument"] for track in lines(folder / "manifest.jsonl")} != {"clarinet"}


def test_naming_an_instrument_changes_no_other_draw():
    for index in range(5):
        wav, attributes = demo_corpus.make_clip(3, index)
        same_wav, same_attributes = demo_corpus.make_clip(3, index, attributes["instrument"])
        assert np.array_equal(wav, same_wav) and attributes == same_attributes
        assert not np.array_equal(wav, demo_corpus.make_clip(3, index, "clarinet")[0])


@slow
def test_the_study_of_fine_tuning(command, dataset, toy_run, tmp_path, monkeypatch):
    """It trains and measures every variant once, prints a row for each, and skips them the second time."""
    runs = []

    def run(words, check):
        runs.append(words)
        assert command(train, *words[2:], *TOY, "--steps=2", "--epoch=1", "--evaluate_clips=0", "--samples=0")[0] == 0

    monkeypatch.setattr(finetune, "subprocess", SimpleNamespace(run=run))
    args = ("--init_from", toy_run[0] / "best.pt", "--old", dataset, "--work", tmp_path, "--steps", "1,2", "--seeds", 1,
            "--clips", 2, "--seconds", 1)  # fmt: skip
    for _ in range(2):
        status, output = command(finetune, *args)
        assert status == 0, output
        assert len(runs) == 4
        table = [line for line in output.splitlines() if line.startswith("|")]
        assert len({line.split("|")[1] for line in table}) == 2 + 2 + 4 * 2  # head, rule, real, demo, 4 variants
    measured = torch.load(tmp_path / "full_new_0_2.pt", weights_only=True)
    assert measured["new"]["codes"].shape == (2, 4, 50)
    mixed = lines(tmp_path / "mixed_audio" / "manifest.jsonl")
    share = sum(line["attributes"]["instrument"] != "clarinet" for line in mixed) / len(mixed)
    assert abs(share - 0.1) < 0.03
