"""Shards to batches: a pure function of (seed, step), the same on any number of ranks."""

import io
import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from models import PATTERNS, make_model, make_stub

import data
from audio import load_audio
from common import UserError
from conditioning import chromagram, strongest
from config import Settings
from data import TokenDataset, TrainingBatches, count_targets, ignore_signals, loader
from dataprep.shards import ArrayFile, unigram_ce


@pytest.fixture
def train_data(dataset):
    return TokenDataset(dataset, "train")


@pytest.fixture
def valid_data(dataset):
    return TokenDataset(dataset, "valid")


def settings(**overrides):
    return Settings(**{"batch_size": 6, **overrides})


def collate(dataset, step, T, **overrides):
    """Return a step's global batch (codes, not_padding, in_loss, conditions) and its tracks."""
    s = settings(**overrides)
    items = dataset.draw_items(step, s.batch_size, T, s)
    codes, conditions = dataset.collate(items, T)
    return codes, *dataset.masks(items, T), conditions, [item.track for item in items]


def test_a_batch_is_a_pure_function_of_seed_and_step(dataset, train_data):
    reopened = TokenDataset(dataset, "train")
    for step in (0, 7):
        (codes, not_padding, _, conditions, _), other = collate(train_data, step, 100), collate(reopened, step, 100)
        assert torch.equal(codes, other[0]) and torch.equal(not_padding, other[1]) and conditions == other[3]
    codes = collate(train_data, 0, 100)[0]
    assert not torch.equal(codes, collate(train_data, 1, 100)[0])
    assert not torch.equal(codes, collate(train_data, 0, 100, seed=1)[0])


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("world_size, micro_batch", [(1, 0), (1, 2), (2, 0), (2, 1), (3, 2)])
def test_ranks_and_micro_batches_share_one_batch_and_its_count_of_targets(train_data, world_size, micro_batch, pattern):
    model, s = make_stub(100, pattern), settings(micro_batch=micro_batch, style=True)
    codes, not_padding, in_loss, conditions, _ = collate(train_data, 5, 100, style=True)
    batches = [
        batch for rank in range(world_size) for batch in TrainingBatches(train_data, model, s, rank, world_size)[5]
    ]
    assert len(batches) == (6 // micro_batch if micro_batch else world_size)
    for number, expected in enumerate((codes, not_padding, in_loss)):
        assert torch.equal(torch.cat([batch[number] for batch in batches]), expected)
    texts = [sample["text"] for batch in batches for sample in batch.condition_tensors]
    assert texts == [sample["text"] for sample in conditions]
    training = model.make_pattern(T=100, training=True)
    targets = sum(count_targets(batch.in_loss, training) for batch in batches)
    assert torch.equal(targets, count_targets(in_loss, training)) and not in_loss.all()
    assert all(torch.equal(batch.targets_per_codebook, targets) for batch in batches)


@pytest.mark.parametrize("world_size, micro_batch", [(1, 0), (2, 1)])
def test_each_nth_step_has_twice_the_items_of_half_the_length(train_data, world_size, micro_batch):
    model, s = make_stub(101), settings(micro_batch=micro_batch, short_every=3)
    by_rank = [TrainingBatches(train_data, model, s, rank, world_size) for rank in range(world_size)]
    for step in range(6):
        factor, T = (2, 50) if step in (2, 5) else (1, 101)
        codes, _, in_loss, *_ = collate(train_data, step, T, batch_size=factor * s.batch_size)
        batches = [batch for rank_batches in by_rank for batch in rank_batches[step]]
        assert torch.equal(torch.cat([batch.codes for batch in batches]), codes) and codes.shape[2] == T
        targets = count_targets(in_loss, model.make_pattern(T=T, training=True))
        assert all(torch.equal(batch.targets_per_codebook, targets) for batch in batches)
        assert {len(batch.codes) for batch in batches} == {factor * (micro_batch or 6 // world_size)}


def test_the_loader_starts_at_any_step_and_can_repeat_one_batch(train_data):
    batches = TrainingBatches(train_data, make_stub(100), settings(steps=5))
    loaded = list(loader(batches, 2, torch.device("cpu")))
    assert len(loaded) == 3
    for step, (batch,) in zip((2, 3, 4), loaded):
        assert torch.equal(batch.codes, batches[step][0].codes)
    one_batch = TrainingBatches(train_data, make_stub(100), settings(steps=2, one_batch=True))
    (first,), (second,) = loader(one_batch, 0, torch.device("cpu"))
    assert torch.equal(first.codes, second.codes)


def test_short_tracks_are_padded_and_masked(train_data):
    for codes, not_padding, in_loss, _, track in zip(*collate(train_data, 0, 2000)):
        assert not_padding.sum() == track["frames"] and not_padding[: track["frames"]].all()
        assert torch.equal(not_padding, in_loss)
        assert np.array_equal(codes[:, not_padding].T.numpy(), train_data.codes(track))
        assert (codes[:, ~not_padding] == 0).all()


def test_style_excerpts_are_not_in_the_loss(train_data):
    codes, not_padding, in_loss, conditions, _ = collate(train_data, 0, 400, style=True, style_dropout=0.5)
    assert {"style" in sample for sample in conditions} == {True, False}
    for row, sample in enumerate(conditions):
        excluded = not_padding[row] & ~in_loss[row]
        if "style" in sample:
            excerpt, codebooks = sample["style"]
            assert torch.equal(codes[row][:, excluded], excerpt) and 75 <= excerpt.shape[1] <= 200
            assert excluded.nonzero().diff(dim=0).eq(1).all() and 1 <= codebooks <= 6
        else:
            assert not excluded.any()


def test_the_melody_of_an_item_is_that_of_its_audio(train_data):
    codes, not_padding, _, conditions, tracks = collate(train_data, 0, 400, melody=True, melody_dropout=0.5)
    assert {"melody" in sample for sample in conditions} == {True, False}
    for row, (sample, track) in enumerate(zip(conditions, tracks)):
        if "melody" in sample:
            notes = strongest(chromagram(load_audio(track["path"], 16_000), 16_000)[0])
            item_codes = codes[row, :, not_padding[row]].numpy()
            start = next(first for first in range(track["frames"])
                         if np.array_equal(train_data.codes(track, first, 400).T, item_codes))  # fmt: skip
            centres = (start / 50 + (np.arange(64) + 0.5) / 8) * 8
            expected = [int(notes[int(note)]) if note * 50 / 8 < track["frames"] else 12 for note in centres]
            assert np.mean(sample["melody"] == np.array(expected)) > 0.95


def test_validation_covers_each_held_out_frame_once_on_any_number_of_ranks(valid_data):
    model, frames = make_stub(100), sum(track["frames"] for track in valid_data.tracks)
    for world_size in (1, 2, 5):
        s = settings(valid_items=0)
        by_rank = [[batch for batch, _ in data.valid_batches(valid_data, model, 3, s, rank, world_size)]
                   for rank in range(world_size)]  # fmt: skip
        batches = sum(by_rank, [])
        assert sum(int(batch.not_padding.sum()) for batch in batches) == frames
        assert len({len(rank_batches) for rank_batches in by_rank}) == 1, "FSDP needs as many batches on each rank"
        for batch in batches:
            targets = count_targets(batch.in_loss, model.make_pattern(T=100, training=True))
            assert torch.equal(batch.targets_per_codebook, targets)
    assert sum(len(batch.codes) for batch, _ in data.valid_batches(valid_data, model, 3, settings(valid_items=4))) == 4


def test_unigram_ce_is_the_cross_entropy_of_the_training_histogram(dataset, train_data, valid_data):
    p, q = (
        np.bincount(np.concatenate([split.codes(track) for track in split.tracks])[:, 0], minlength=512)
        for split in (train_data, valid_data)
    )
    by_hand = -(q / q.sum() * np.log((p + 1) / (p + 1).sum())).sum()
    assert unigram_ce(dataset)[0] == pytest.approx(by_hand)
    entropy = -(q[q > 0] / q.sum() * np.log(q[q > 0] / q.sum())).sum()
    assert by_hand > entropy


def test_the_start_of_an_item_is_independent_of_the_choice_of_its_track(train_data):
    for row in (0, 1):
        chosen, starts = [], []
        for step in range(150):
            rng = np.random.default_rng([0, step])  # the generator that chooses the tracks of a batch
            chosen.append(rng.integers(train_data.ends[-1], size=6)[row])
            item = train_data.draw_items(step, 6, 20, settings())[row]
            starts.append(item.start / item.track["frames"])
        assert abs(np.corrcoef(chosen, starts)[0, 1]) < 0.3


def test_a_code_out_of_range_is_refused_with_its_number(dataset_copy):
    codes = np.load(dataset_copy / "train_000.npy")
    codes[:, 1] = 600
    np.save(dataset_copy / "train_000.npy", codes)
    with pytest.raises(UserError, match="has code 600, but tiny ends at 511"):
        collate(TokenDataset(dataset_copy, "train"), 0, 100)


def test_a_truncated_shard_is_refused(dataset_copy):
    path = dataset_copy / "train_000.npy"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="train_000.npy: cannot be read"):
        TokenDataset(dataset_copy, "train")


@pytest.mark.parametrize("change, message", [
    ({"format": 1, "codec": None}, "format 1, but this code reads 2"), ({"checksums": None}, "checksums must be"),
    ({"codec": dict(K=4, card=512, frame_rate=50, id="tiny")}, "damaged"), ({"train": {"frames": 0}}, "above 0"),
    ({"reconstruction": 3}, "not iterable"), ({"reconstruction": [["a.wav", 2.0, "x"]]}, "reconstruction must be"),
])  # fmt: skip
def test_a_damaged_meta_json_is_refused(dataset_copy, change, message):
    meta = json.loads((dataset_copy / "meta.json").read_text())
    (dataset_copy / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(UserError, match=f"meta.json: .*{message}.*prepare the data again"):
        TokenDataset(dataset_copy, "train")


@pytest.mark.parametrize("change", [
    {"captions": "loud"}, {"captions": []}, {"level": "x"}, {"clipped": None}, {"path": 5}, {"frames": 350.0},
    {"first": 0.0},
])  # fmt: skip
def test_a_damaged_line_of_a_track_is_refused(dataset_copy, change):
    first, *others = (dataset_copy / "train_000.jsonl").read_text().splitlines()
    (dataset_copy / "train_000.jsonl").write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]))
    with pytest.raises(UserError, match="train_000.jsonl: damaged"):
        TokenDataset(dataset_copy, "train")


def test_a_worker_survives_the_signals_that_end_a_run():
    """torchrun and SLURM send SIGTERM to all processes of a run, and the current step still needs its batch."""
    batches = iter(torch.utils.data.DataLoader(range(40), None, num_workers=1, worker_init_fn=ignore_signals))
    first = next(batches)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(batches._workers[0].pid, number)
    assert [first, *batches] == list(range(40))


@pytest.mark.parametrize("shape", [(1000, 4), (1000,)])
@pytest.mark.parametrize("missing", ["nothing", "pread"])
def test_an_array_file_reads_the_file_that_it_opened_even_after_its_replacement(shape, missing, tmp_path, monkeypatch):
    monkeypatch.delattr(os, missing, raising=False)
    array = np.random.default_rng(0).integers(1000, size=shape).astype(np.uint16)
    np.save(tmp_path / "a.npy", array)
    file = ArrayFile(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", array + 1)
    (tmp_path / "b.npy").replace(tmp_path / "a.npy")
    for part in (slice(10, 20), slice(None), slice(990, 2000), slice(7, 8)):
        assert np.array_equal(file[part], array[part]) and file[part].dtype == array.dtype


def test_a_shard_that_becomes_shorter_is_refused(dataset_copy):
    train_data = TokenDataset(dataset_copy, "train")
    first, last = train_data.tracks[0], train_data.tracks[-1]
    with open(dataset_copy / "train_000.npy", "r+b") as file:
        file.truncate((dataset_copy / "train_000.npy").stat().st_size - 1)
    assert len(train_data.codes(first)) == first["frames"]
    with pytest.raises(UserError, match="train_000.npy: shorter than when it was opened"):
        train_data.codes(last)


@pytest.mark.parametrize("conditions", [{}, dict(melody=True, style=True)])
def test_a_pickled_worker_gets_the_tokenizers_and_no_weights(train_data, conditions):
    model, s = make_model(**conditions), settings(**conditions)
    batches = TrainingBatches(train_data, model, s)
    tensors = []
    pickler = pickle.Pickler(io.BytesIO())
    pickler.persistent_id = lambda value: tensors.append(value) if isinstance(value, torch.Tensor) else None
    pickler.dump(batches)
    assert not tensors
    (batch,), (other,) = batches[1], pickle.loads(pickle.dumps(batches))[1]
    assert batch.condition_tensors.keys() == other.condition_tensors.keys() >= {"text", *conditions}
    for name, parts in batch.condition_tensors.items():
        assert all(map(torch.equal, parts, other.condition_tensors[name]))


def test_an_array_file_can_be_pickled_and_rejects_column_order(tmp_path):
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(pickle.loads(pickle.dumps(ArrayFile(tmp_path / "a.npy")))[1:], array[1:])
    np.save(tmp_path / "a.npy", np.asfortranarray(array))
    with pytest.raises(UserError, match="in column order"):
        ArrayFile(tmp_path / "a.npy")
