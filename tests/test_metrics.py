"""Metrics on cases with known answers, evaluation of models, and the printed tables."""

import json
import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from conftest import TOY, lines

import common
import config
import data
import distributed
import metrics
import train
from codec import load_codec
from conditioning import chromagram
from dataprep import shards
from demo import corpus as demo_corpus
from generate import generate, load_model
from model import MusicLM
from prepare import train_tokenizer
from tools import copying, probe, tables, withhold

SHARES = ["chance", "real", "cfg 3", "cfg 1", "nothing"]


@pytest.fixture(scope="module")
def codec():
    return load_codec("tiny")


@pytest.fixture
def evaluate(toy_run, codec, withhold_nothing, monkeypatch):
    """Return a function that calls `metrics.evaluate` for the toy run, or for another model, on a data set."""

    def call(folder, change=lambda train, valid: None, model=None, **settings):
        toy, s, _ = load_model(toy_run[0] / "best.pt")
        monkeypatch.setattr(metrics, "load_model", lambda path, device, text_encoder_weights: (model or toy, s, None))
        for key, value in {"evaluate_clips": 3, **settings}.items():
            setattr(s, key, value)
        train, valid = data.TokenDataset(folder, "train"), data.TokenDataset(folder, "valid")
        change(train, valid)
        return metrics.evaluate(toy_run[0] / "best.pt", codec, train, valid, s)

    return call


# Fréchet distance


def test_frechet_distance_equals_the_closed_form():
    def diagonal(mean, variances):
        return torch.tensor(mean).double(), torch.diag(torch.tensor(variances).double())

    a, b = diagonal([1.0, 2.0, 0.0], [4.0, 1.0, 0.0]), diagonal([0.0, 0.0, 0.0], [1.0, 9.0, 0.25])
    assert metrics.frechet_distance(a, b) == pytest.approx(5 + 1 + 4 + 0.25)  # sum of (sigma1 - sigma2)^2
    rotation = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double())[0]
    rotated = [(rotation @ mean, rotation @ cov @ rotation.T) for mean, cov in (a, b)]
    assert metrics.frechet_distance(*rotated) == pytest.approx(10.25)
    assert metrics.frechet_distance(*rotated[::-1]) == pytest.approx(10.25)
    # covariances that do not commute: in two dimensions tr (C1 C2)^(1/2) = sqrt(tr C1 C2 + 2 sqrt(det C1 C2)).
    c1, c2 = torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(), torch.tensor([[5.0, -2.0], [-2.0, 1.0]]).double()
    trace = math.sqrt(float((c1 @ c2).trace()) + 2 * math.sqrt(5 * 1))
    zero = torch.zeros(2).double()
    assert metrics.frechet_distance((zero, c1), (zero, c2)) == pytest.approx(5 + 6 - 2 * trace)


def test_running_sums_give_the_gaussian_of_all_vectors():
    x = 1000 + torch.randn(5, 60, generator=torch.Generator().manual_seed(0))
    mean, cov = metrics.gaussian(x.split((1, 9, 50), dim=1))
    torch.testing.assert_close(mean, x.double().mean(1))
    torch.testing.assert_close(cov, torch.cov(x.double(), correction=0))


def test_frechet_distance_orders_music_shuffled_music_noise_and_silence(dataset, codec):
    """Held-out music is nearest; then the same frames in another order, and codes drawn by frequency; then silence."""
    train, valid = data.TokenDataset(dataset, "train"), data.TokenDataset(dataset, "valid")
    rng = torch.Generator().manual_seed(0)
    real, held_out = ([metrics.read_clip(split, track, 320) for track in split.tracks] for split in (train, valid))
    shuffled = [clip[:, torch.randperm(clip.shape[1], generator=rng)] for clip in held_out]
    weights = torch.from_numpy(np.load(dataset / "counts.npy")[0]).double()
    noise = [torch.multinomial(weights, 320, True, generator=rng) for _ in held_out]
    silence = [codec.encode(torch.zeros(1, 1, 16_000 * 6))[0]]
    target = metrics.latent_gaussian(codec, real)
    distances = [metrics.frechet_distance(metrics.latent_gaussian(codec, clips), target)
                 for clips in (real, held_out, shuffled, noise, silence)]  # fmt: skip
    assert distances[0] < 1e-3 and 1 < distances[1] < 0.8 * min(distances[2:4])
    assert 2 * max(distances[2:4]) < distances[4], distances


def test_the_floor_compares_clips_of_the_same_lengths(dataset, codec, monkeypatch):
    train, valid = data.TokenDataset(dataset, "train"), data.TokenDataset(dataset, "valid")
    held_out = [metrics.read_clip(valid, valid.tracks[0], T) for T in (50, 80)]
    target, sets, measure = metrics.latent_gaussian(codec, held_out), [], metrics.latent_gaussian

    def remember(codec, clips):
        sets.append(list(clips))
        return measure(codec, sets[-1])

    monkeypatch.setattr(metrics, "latent_gaussian", remember)
    assert 0 < metrics.frechet_floor(codec, train, held_out, target) < math.inf
    assert len(sets) == min(metrics.FLOOR_DRAWS, len(train.tracks) // 2)
    assert all([clip.shape[1] for clip in clips] == [50, 80] for clips in sets)
    assert len({clip.numpy().tobytes() for clips in sets for clip in clips}) == 2 * len(sets)


# Chroma


def make_tones(*hertz, seconds=2.0, rate=16_000):
    t = torch.arange(round(seconds * rate)) / rate
    return 0.1 * sum(torch.sin(2 * math.pi * f * t) for f in hertz)[None]


@pytest.mark.parametrize("rate", [16_000, 32_000, 44_100])
def test_chroma_of_every_semitone_from_c2_to_b7(rate):
    wav = torch.cat([make_tones(440 * 2 ** ((midi - 69) / 12), rate=rate, seconds=1) for midi in range(36, 108)])
    chroma = chromagram(wav, rate)
    assert chroma.shape == (72, 12, math.ceil(rate / (rate // 8)))
    torch.testing.assert_close(chroma.sum(1), torch.ones(72, chroma.shape[2]))
    for midi, frames in enumerate(chroma[:, :, 2:6], 36):
        assert frames[midi % 12].min() > 0.8, midi


def test_chroma_of_notes_and_a_chord():
    assert int(chromagram(make_tones(440.0), 16_000)[0].mean(1).argmax()) == 9
    assert int(chromagram(make_tones(523.25), 16_000)[0].mean(1).argmax()) == 0
    chord = chromagram(make_tones(261.63, 329.63, 392.0), 16_000)[0].mean(1)  # C major
    torch.testing.assert_close(chord[[0, 4, 7]], torch.full((3,), 1 / 3), atol=0.03, rtol=0)


def test_chroma_changes_with_the_note():
    """A frame is centred on its 0.125 s, and does not depend on the rest of the batch."""
    wav = torch.cat([make_tones(440.0, seconds=1), make_tones(523.25, seconds=1.01)], dim=1)
    chroma = chromagram(torch.cat([0 * wav, wav]), 16_000)
    assert chroma.shape == (2, 12, 17) and chroma[0].abs().max() == 0
    assert chroma[1].argmax(0).tolist() == [9] * 8 + [0] * 9
    torch.testing.assert_close(chroma[1:], chromagram(wav, 16_000))


def test_silence_has_no_chroma():
    noise = torch.randn(1, 32_000, generator=torch.Generator().manual_seed(0))
    assert chromagram(1e-4 * noise, 16_000).abs().max() == 0
    assert chromagram(make_tones(30.0), 16_000)[:, :, 2:-2].max() == 0
    assert chromagram(1e-2 * noise, 16_000).sum(1).min() == pytest.approx(1)
    half = chromagram(torch.cat([make_tones(440.0), torch.zeros(1, 32_000)], dim=1), 16_000)[0].sum(0)
    assert half[:16].min() == pytest.approx(1) and half[19:].max() == 0


def test_chroma_similarity():
    c, a, both = (chromagram(make_tones(*hertz), 16_000)[0] for hertz in ([261.63], [440.0], [261.63, 440.0]))
    silent = torch.zeros_like(c)
    assert metrics.chroma_similarity(both, both) == pytest.approx(1)
    assert metrics.chroma_similarity(c, a) < 0.02
    assert metrics.chroma_similarity(c, both) == pytest.approx(math.sqrt(0.5), abs=0.02)
    assert metrics.chroma_similarity(c, silent) == 0
    assert metrics.chroma_similarity(torch.cat([c, c], 1), torch.cat([silent, both], 1)) == pytest.approx(
        math.sqrt(0.5), abs=0.02
    )
    assert metrics.chroma_similarity(torch.cat([both, a], 1), both) == pytest.approx(1)


# Caption adherence


def test_attributes_are_texts_with_2_to_7_values(dataset):
    attributes = probe.attributes_of(data.TokenDataset(dataset, "train"))
    assert attributes["drums"] == ["no", "yes"]
    assert set(attributes["instrument"]) <= set(demo_corpus.ATTRIBUTES["instrument"])
    assert "bpm" not in attributes and all(2 <= len(values) <= 7 for values in attributes.values())


def test_tracks_may_lack_attributes_or_have_other_types(dataset_copy, evaluate):
    """An attribute is measured on the tracks that have it, if two of its values occur in held-out tracks."""

    def remove_some(train, valid):
        for i, track in enumerate(train.tracks + valid.tracks):
            track["metadata"] = [{"genre": "jazz", "mood": 3}, {"genre": "rock"}, {"genre": 7}, {}][i % 4]
        for track, genre in zip(valid.tracks, ("rock", "jazz", 5)):
            track["metadata"] = {"genre": genre}
        train.tracks[0]["metadata"] = {"only_in_training": "a"}
        train.tracks[1]["metadata"] = {"only_in_training": "b", "genre": "rock"}

    result = evaluate(dataset_copy, remove_some)
    table = result["adherence"]
    assert "only_in_training" in result["withheld"] and "genre" not in result["withheld"]
    assert list(table) == ["genre"] and list(table["genre"]) == SHARES and 0 <= table["genre"]["real"] <= 1


def test_the_probe_detects_the_attributes_of_captions():
    clips = [demo_corpus.make_clip(17, i) for i in range(160)]
    wav = torch.stack([torch.from_numpy(clip[:90_000]) for clip, _ in clips])
    x = probe.features(wav, 16_000)
    for attribute, minimum in (("instrument", 0.8), ("tempo", 0.9), ("drums", 0.9)):
        labels = [metadata[attribute] for _, metadata in clips]
        fitted = probe.Probe(x[:120], labels[:120], demo_corpus.ATTRIBUTES[attribute])
        assert fitted.accuracy(x[120:], labels[120:]) >= minimum, attribute
        shuffled = list(np.random.default_rng(0).permutation(labels[120:]))
        assert fitted.accuracy(x[120:], shuffled) < minimum - 0.15, attribute
    is_major = np.array([metadata["mode"] == "major" for _, metadata in clips])
    assert np.mean((x[:, -2] > x[:, -1]).numpy() == is_major) > 0.65


def test_the_autocorrelation_of_onsets_peaks_at_the_beat():
    wav = torch.zeros(1, 16_000 * 6)
    wav[:, :: 16_000 // 2] = 1  # 120 clicks a minute: a lag of 25 frames
    correlation = probe.features(wav, 16_000)[0, 160:-2]
    assert int(correlation.argmax()) + 5 == pytest.approx(25, abs=1)


def test_silence_has_features():
    assert probe.features(torch.zeros(1, 16_000 * 3), 16_000).isfinite().all()


# evaluate


def test_evaluate(dataset, evaluate, capsys):
    result = evaluate(dataset)
    keys = "clips fad fad_real chroma chroma_chance copied copied_real rtf adherence melody withheld".split()
    assert list(result) == keys and result["clips"] == 3
    numbers = [result[key] for key in keys[:5] + ["rtf"]]
    numbers += [share for row in result["adherence"].values() for share in row.values()]
    assert all(math.isfinite(value) and value >= 0 for value in numbers) and result["rtf"] > 0
    assert {"instrument", "drums"} <= set(result["adherence"]) and list(result["adherence"]["drums"]) == SHARES
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    printed = capsys.readouterr().out
    for part in (f"{result['fad_real']:.2f}", f"{result['chroma_chance']:.2f}", "instrument", "cfg 3 / real"):
        assert part in printed


class Replay:
    """A model that returns the held-out clips, and noise after the end of shorter ones."""

    K, trained_frames = 4, 400

    def __init__(self, dataset):
        self.dataset = dataset

    def generate(self, conditions, frames, seeds):
        codes = noise(conditions, seeds, frames)
        for clip, seed in zip(codes, seeds):
            real = metrics.read_clip(self.dataset, self.dataset.tracks[seed], frames)
            clip[:, : real.shape[1]] = real
        return codes


class Noise:
    """A model that draws every code from the seed and the caption."""

    K, trained_frames = 4, 400

    def generate(self, conditions, frames, seeds):
        return noise(conditions, seeds, frames)


@pytest.fixture(autouse=True)
def fake_models(monkeypatch):
    """Let `generate` return the codes of a fake model, if it gets one."""

    def call(model, conditions, frames, prompt=None, progress=None, seeds=None, **options):
        if isinstance(model, (Replay, Noise)):
            return model.generate(conditions, frames, seeds)
        return generate(model, conditions, frames, prompt, progress, seeds=seeds, **options)

    monkeypatch.setattr(metrics, "generate", call)
    clips_per_batch = metrics.clips_per_batch
    monkeypatch.setattr(
        metrics, "clips_per_batch", lambda model: 32 if type(model) in (Replay, Noise) else clips_per_batch(model)
    )


def noise(conditions, seeds, frames):
    rngs = [
        np.random.default_rng([seed, *str(sample).encode()]) for seed, sample in zip(seeds, conditions, strict=True)
    ]
    return torch.from_numpy(np.stack([rng.integers(512, size=(4, frames)) for rng in rngs]))


def test_replayed_music_and_noise(dataset, evaluate):
    """The noise after the end of a shorter clip does not count."""
    valid = data.TokenDataset(dataset, "valid")
    assert min(track["frames"] for track in valid.tracks[:3]) < 400, "the test is about clips shorter than T"
    replayed, random = evaluate(dataset, model=Replay(valid)), evaluate(dataset, model=Noise())
    assert replayed["fad"] < 1e-3 < replayed["fad_real"] == random["fad_real"] < random["fad"]
    assert replayed["chroma"] == pytest.approx(1) and replayed["chroma_chance"] < 0.9
    assert random["chroma"] == pytest.approx(random["chroma_chance"], abs=0.05)


def test_clips_are_more_similar_to_their_melody_than_to_others(dataset, evaluate):
    replay = Replay(data.TokenDataset(dataset, "valid"))
    melody = evaluate(dataset, model=replay, melody=True, clip_seconds=6.0)["melody"]
    assert list(melody) == ["real", "cfg 3", "cfg 1", "melody alone", "text alone", "nothing"]
    assert melody["cfg 3"] == melody["real"] and melody["real"]["own"] > melody["real"]["shuffled"] + 0.2
    assert evaluate(dataset, model=Noise())["melody"] == {}


@pytest.mark.parametrize("missing", ["attributes", "captions", "both"])
def test_without_attributes_or_captions(missing, dataset_copy, evaluate, capsys):
    def strip(train, valid):
        for track in train.tracks + valid.tracks:
            track["metadata"] = {"bpm": 120.0} if missing in ("attributes", "both") else track["metadata"]
            track["caption"] = "" if missing in ("captions", "both") else track["caption"]

    result = evaluate(dataset_copy, strip)
    if missing == "captions":  # the metadata replaces the captions
        assert set(result["adherence"]) >= {"instrument", "tempo", "mode", "texture", "drums"}
        return
    assert result["adherence"] == {} and all(math.isfinite(result[key]) for key in ("fad", "fad_real", "chroma", "rtf"))
    assert "caption adherence: not measured" in capsys.readouterr().out


def test_one_clip_and_more_clips_than_held_out_tracks(dataset, evaluate):
    one = evaluate(dataset, evaluate_clips=1)
    assert one["clips"] == 1 and all(math.isfinite(one[key]) for key in ("fad", "fad_real", "chroma", "rtf"))
    assert one["copied"] is one["copied_real"] is None, "they are shorter than 4 s"
    assert one["adherence"] == {} and "instrument" in one["withheld"], "one clip has one value, so chance would be 1"
    tracks = len(data.TokenDataset(dataset, "valid").tracks)
    assert evaluate(dataset, evaluate_clips=tracks + 5)["clips"] == tracks


def test_few_held_out_tracks_withhold_quality_and_still_show_copying(dataset, evaluate, monkeypatch, capsys):
    """Then the clips are segments of all held-out tracks, and only clips with all conditions are generated."""
    monkeypatch.setattr(shards, "MIN_HELD_OUT", 4)
    train, valid = data.TokenDataset(dataset, "train"), data.TokenDataset(dataset, "valid")
    assert len(valid.tracks) == 3
    names, generate_many = [], metrics.generate_many
    monkeypatch.setattr(metrics, "generate_many", lambda *args: names.append(args[5]) or generate_many(*args))
    for clips in (60, 2):
        result = evaluate(dataset, model=Replay(train), evaluate_clips=clips, clip_seconds=5.0, melody=True)
        assert {key for key in result if result[key] is None} == {"fad", "fad_real", "chroma", "chroma_chance"}
        assert result["adherence"] == result["melody"] == {} and result["clips"] == min(clips, 4)
        assert result["copied"] == 1 and result["rtf"] > 0 and "--valid_fraction" in result["withheld"]
        assert json.loads(json.dumps(result, allow_nan=False)) == result
        assert result["withheld"] in capsys.readouterr().out
    assert set(names) == {"cfg 3"}
    monkeypatch.setattr(shards, "MIN_HELD_OUT", 3)
    assert None not in [evaluate(dataset)[key] for key in ("fad", "fad_real", "chroma")]
    result = evaluate(dataset, evaluate_clips=2)
    assert result["fad"] is None and "3 clips" in result["withheld"], "there are enough tracks, but not clips"


def test_a_gaussian_of_few_frames_and_an_attribute_with_few_examples_are_withheld(dataset, evaluate, monkeypatch):
    monkeypatch.setattr(withhold, "FRAMES_PER_DIMENSION", 10)
    monkeypatch.setattr(withhold, "MIN_EXAMPLES", 4)
    result = evaluate(dataset)
    assert result["fad"] is result["fad_real"] is None and 0 <= result["chroma"] <= 1
    assert "150 frames" in result["withheld"] and "128 dimensions" in result["withheld"]
    assert "instrument" in result["withheld"] and "instrument" not in result["adherence"]
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_attributes_need_two_values_that_both_splits_have():
    tracks = {name: [dict(metadata=dict(key=name))] for name in ("a", "b", "rare")}
    train_tracks, values = 10 * tracks["a"] + 10 * tracks["b"] + 9 * tracks["rare"], {"key": ["a", "b", "rare"]}
    chosen, reason = withhold.few_examples(values, train_tracks, 9 * tracks["a"] + tracks["b"])
    assert chosen == {"key": ["a", "b"]} and reason == ""
    for held_out in (8 * tracks["a"] + tracks["b"], 20 * tracks["a"], 9 * tracks["a"] + tracks["rare"]):
        chosen, reason = withhold.few_examples(values, train_tracks, held_out)
        assert chosen == {} and "key" in reason


# Copying


def read_all(split):
    return [metrics.read_clip(split, track, track["frames"]) for track in split.tracks]


def change(codes, share, rng):
    """Change this share of the codes, each to another one."""
    is_changed = torch.from_numpy(rng.permutation(codes.shape[1]) < share * codes.shape[1])
    return torch.where(is_changed, (codes + 1) % 512, codes)


def test_excerpts_of_training_music_are_copies(dataset):
    """From any frame, with 5 % of the codes changed, and with other music before and after it."""
    train, rng = data.TokenDataset(dataset, "train"), np.random.default_rng(0)
    tracks = read_all(train)
    noise = torch.from_numpy(rng.integers(512, size=(4, 70)))
    for start in (0, 13, 57):
        cut = [track[:, start : start + 220] for track in tracks]
        assert copying.copied_share(cut, train) == 1
        assert copying.copied_share([change(clip, 0.05, rng) for clip in cut], train) == 1
        assert copying.copied_share([torch.cat([noise, clip, noise], 1) for clip in cut], train) == 1
        assert copying.copied_share([change(clip, 0.3, rng) for clip in cut], train) == 0


def test_random_codes_and_joined_halves_are_no_copies(dataset):
    """No track has more than half of the window: the last 2 s of a track and the first 2 s of the next one."""
    train, rng = data.TokenDataset(dataset, "train"), np.random.default_rng(0)
    clips = [torch.from_numpy(rng.integers(512, size=(4, 400))) for _ in range(5)]
    tracks = [track[0] for track in read_all(train)]
    joined = [torch.cat([a[-100:], b[:100]]).expand(4, -1) for a, b in zip(tracks, tracks[1:])]
    assert copying.copied_share(clips, train) == 0
    assert copying.copied_share(joined, train) == 0
    assert copying.copied_share(clips + joined + [tracks[0].expand(4, -1)], train) == 1 / (len(clips + joined) + 1)


def test_clips_shorter_than_the_window_do_not_count(dataset):
    train = data.TokenDataset(dataset, "train")
    copy = read_all(train)[0]
    noise = torch.from_numpy(np.random.default_rng(0).integers(512, size=(4, 300)))
    assert copying.copied_share([copy[:, :199]], train) is None and copying.copied_share([], train) is None
    assert copying.copied_share([copy[:, :199], noise, copy[:, :200]], train) == 0.5
    assert copying.copied_share([copy[:, :199]], train, seconds=3.0) == 1


def test_silence_and_held_sounds_are_no_copies(dataset_copy):
    path = dataset_copy / "train_000.npy"
    codes = np.load(path)
    codes[:300], codes[300:600] = 7, np.arange(300)[:, None] % 5 + 20  # a sound that changes among 5 codes
    np.save(path, codes)
    train = data.TokenDataset(dataset_copy, "train")
    silence, held = (torch.from_numpy(codes[first : first + 250].T.astype(np.int64)) for first in (0, 310))
    assert copying.copied_share([silence, held], train) == 0
    music = torch.from_numpy(codes[-250:].T.astype(np.int64))
    assert copying.copied_share([torch.cat([silence, music], 1)], train) == 1


def test_large_data_sets_are_read_in_parts(dataset, monkeypatch):
    """Parts of a long track overlap. Of more music than MAX_HOURS, evenly spread tracks are read."""
    train = data.TokenDataset(dataset, "train")
    cut = [track[:, start : start + 200] for track, start in zip(read_all(train), range(0, 100, 7))]
    monkeypatch.setattr(copying, "CHUNK", 30)
    assert copying.copied_share(cut, train) == 1
    monkeypatch.setattr(copying, "MAX_HOURS", train.ends[-1] / 50 / 3600 / 2)
    assert copying.copied_share(cut[::2], train) == 1 and copying.copied_share(cut, train) < 1


@pytest.mark.parametrize("ranks", [2, 5])
def test_several_ranks_get_the_result_of_one(ranks, dataset, evaluate, monkeypatch):
    """Each rank is a thread here. With more ranks than clips, some ranks generate nothing."""
    single = evaluate(dataset, model=Noise())
    local, barrier, values = threading.local(), threading.Barrier(ranks, timeout=60), [None] * ranks

    def gather(value):
        values[local.rank] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    def run(rank):
        local.rank = rank
        return evaluate(dataset, model=Noise())

    monkeypatch.setattr(distributed, "rank", lambda: local.rank)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    monkeypatch.setattr(distributed, "gather", gather)
    monkeypatch.setattr(distributed, "barrier", barrier.wait)
    with ThreadPoolExecutor(ranks) as pool:
        results = list(pool.map(run, range(ranks)))
    assert all(result == results[0] for result in results)
    for result in (single, results[0]):
        assert result.pop("rtf") > 0
    assert results[0] == single


def test_batches_of_clips_equal_clips_generated_one_by_one(toy_run, monkeypatch):
    model, s, _ = load_model(toy_run[0] / "best.pt")
    s.temperature = 0.0  # after 6 steps, codes are nearly equally likely, so rounding would change sampled ones
    conditions = [{"text": text} for text in ("slow piano", "fast organ", "bells")]
    prompts = torch.randint(512, (3, 4, 10), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(metrics, "clips_per_batch", lambda model: 2)
    together = metrics.generate_many(model, conditions, 50, 3.0, s, "clips", prompts)
    for i in range(3):
        alone = generate(model, conditions[i : i + 1], 50, prompt=prompts[i : i + 1], cfg=3.0, temperature=0)
        assert torch.equal(together[i : i + 1], alone) and torch.equal(together[i, :, :10], prompts[i])


@pytest.mark.parametrize("device, dtype", [("cpu", "float32"), ("cuda", "float32"), ("cuda", "bfloat16")])
def test_a_model_trained_in_bfloat16_generates_in_it_on_a_gpu(device, dtype, toy_run, monkeypatch):
    model, s, _ = load_model(toy_run[0] / "best.pt")
    s.dtype = "bfloat16" if device == "cpu" else dtype
    monkeypatch.setattr(metrics, "load_model", lambda path, device, text_encoder_weights: (model, s, None))
    monkeypatch.setattr(common, "has_fast_bfloat16", lambda kind: True)
    assert metrics.load("best.pt", torch.device(device)).heads.weight.dtype == getattr(torch, dtype)


def test_the_caches_of_a_batch_stay_within_2_gib():
    with torch.device("meta"):
        codec, tokenizer = dict(K=4, card=2048, frame_rate=50, dim=8), train_tokenizer([], 300)
        small = MusicLM(config.load(["config/small.py", "--dim=256"], ""), codec, tokenizer)
    assert metrics.cache_length(1500 + 4) == 1536
    groups = 2  # with and without conditions
    assert metrics.clips_per_batch(small) == 2**31 // (groups * 2 * 24 * 1536 * 256 * 4) == 14
    small.heads.bfloat16()
    assert metrics.clips_per_batch(small) == 2**31 // (groups * 2 * 24 * 1536 * 256 * 2) == 28


def test_the_command_line(toy_run, tmp_path, command, withhold_nothing):
    (tmp_path / "best.pt").write_bytes((toy_run[0] / "best.pt").read_bytes())
    status, output = command(metrics, tmp_path, "--clips", 2, "--device", "cpu")
    assert status == 0 and "Fréchet" in output and "real-time factor" in output, output
    result = json.loads((tmp_path / "metrics.json").read_text())
    assert result["clips"] == 2 and list(result["adherence"]["drums"]) == SHARES
    status, output = command(metrics, tmp_path, tmp_path / "best.pt", "--clips", 3, "--device", "cpu")
    assert status == 0 and "mean and standard error over 2 runs" in output
    assert re.search(r"\nreal( +\d\.\d\d ± 0\.00){4,}\n", output), "the same model twice: no error"
    status, output = command(metrics, tmp_path, "--clips", 0)
    assert status == 2 and "--clips 0: must be at least 1" in output
    assert "--cfg nan: must be a number" in command(metrics, tmp_path, "--cfg", "nan")[1]


def make_result(fad, share, melody=None):
    adherence = {"drums": {"chance": 0.5, "real": 0.8, "cfg 3": share}}
    return dict(clips=25, fad=fad, fad_real=2.0, chroma=0.5, chroma_chance=0.4, rtf=3.0, adherence=adherence,
                melody=melody or {}, copied=0.25, copied_real=None, withheld="")  # fmt: skip


def test_the_table_of_one_result(capsys):
    tables.print_results([make_result(10.0, 0.6, {"real": dict(own=0.9, shuffled=0.3)})])
    printed = " ".join(capsys.readouterr().out.split())
    for part in ("25 clips", "latents 10.00", "real music 2.00", "music 0.50", "chance 0.40", "factor 3.00"):
        assert part in printed, printed
    assert "at most 0.10" in printed  # 0.5 / sqrt(25)
    assert "drums melody shuffled chance 0.50 real 0.80 0.90 0.30 cfg 3 0.60 cfg 3 / real 0.75" in printed


def test_means_and_standard_errors_over_runs(capsys):
    results = [make_result(fad, share) for fad, share in ((10.0, 0.7), (12.0, 0.8), (14.0, 0.9))]
    results[0]["adherence"]["drums"]["cfg 4"] = 0.5  # missing in the other runs
    results[0]["adherence"]["tempo"] = {"chance": 0.5, "real": 1.0, "cfg 3": 0.5}
    tables.print_results(results)
    printed = " ".join(capsys.readouterr().out.split())
    assert "cfg 4" not in printed and "tempo" not in printed and "over 3 runs" in printed
    assert "latents 12.00 ± 1.15" in printed and "0.80 ± 0.06" in printed  # 2 / sqrt(3), 0.1 / sqrt(3)
    assert "1.00 ± 0.07" in printed  # 0.1 / 0.8 / sqrt(3), of the ratio to real music


def test_the_table_without_the_measures_that_are_withheld(capsys):
    withheld = dict.fromkeys(("fad", "fad_real", "chroma", "chroma_chance"))
    result = make_result(None, 0) | withheld | dict(adherence={}, withheld="too few: add tracks")
    tables.print_results([result, result])
    printed = " ".join(capsys.readouterr().out.split())
    assert "copies of training music 0.25 ± 0.00" in printed and printed.count("too few: add tracks") == 1
    assert not any(word in printed for word in ("Fréchet", "chroma", "None", "of real music"))


def test_clips_may_be_longer_than_the_trained_length(dataset, tmp_path, command, withhold_nothing):
    args = [*TOY, f"--data={dataset}", f"--out={tmp_path}", "--positions=rope", "--clip_seconds=1.8"]
    assert command(train, *args, "--evaluate_clips=2")[0] == 0
    (clip,) = lines(tmp_path / "history.jsonl")[-2]["clips"]
    assert soundfile.info(tmp_path / clip["free"]).duration == pytest.approx(1.8)
    (result,) = (line for line in lines(tmp_path / "history.jsonl") if line["stage"] == "evaluate")
    assert result["clips"] == 2 and 0 <= result["adherence"]["drums"]["cfg 3"] <= 1


def test_no_sample_of_the_pages_music_is_at_full_scale(toy_run, dataset, tmp_path, monkeypatch):
    """The codec's music is 20 times as loud, and the held-out track is clipped."""
    codec, valid = load_codec("tiny"), data.TokenDataset(dataset, "valid")
    decode = codec.decode
    monkeypatch.setattr(codec, "decode", lambda codes: 20 * decode(codes))
    soundfile.write(tmp_path / "clipped.wav", np.ones(32_000) * (-1) ** (np.arange(32_000) // 20), 16_000)
    valid.tracks[0]["path"] = str(tmp_path / "clipped.wav")
    s = load_model(toy_run[0] / "best.pt")[1]
    s.out = str(tmp_path)
    (clip,) = metrics.write_samples(toy_run[0] / "best.pt", codec, valid, 3, s)
    for key in ("free", "continued", "codec", "reference"):
        wav, _ = soundfile.read(tmp_path / clip[key])
        assert 0.01 < np.abs(wav).max() < 0.95 and np.square(wav).mean() ** 0.5 < 0.2, key
