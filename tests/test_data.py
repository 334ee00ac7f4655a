"""Shards to batches: a pure function of (seed, step), the same for any number of ranks."""

import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch

from codec import load_audio
from common import UserError
from conditioning import chromagram, strongest
from config import Settings
from data import Rows, Tokens, TrainingSteps, ignore_signals, loader, unigram_ce, valid_batches


def settings(**overrides):
    return Settings(**{"batch_size": 6, **overrides})


def drawn(tokens, step, T, **overrides):
    """A step's whole batch: (codes, valid, scored, conditions), and the tracks that it is from."""
    s = settings(**overrides)
    items = tokens.draw(step, s.batch_size, T, s)
    return *tokens.collate(items, T), [track for track, _, _ in items]


def test_a_batch_is_a_pure_function_of_seed_and_step(dataset):
    tokens, again = Tokens(dataset, "train"), Tokens(dataset, "train")
    for step in (0, 7):
        (a, valid, _, conditions, _), (b, *rest) = drawn(tokens, step, 100), drawn(again, step, 100)
        assert torch.equal(a, b) and torch.equal(valid, rest[0]) and conditions == rest[2]
    assert not torch.equal(drawn(tokens, 0, 100)[0], drawn(tokens, 1, 100)[0])
    assert not torch.equal(drawn(tokens, 0, 100)[0], drawn(tokens, 0, 100, seed=1)[0])


@pytest.mark.parametrize("world_size, micro_batch", [(1, 0), (1, 2), (2, 0), (2, 1), (3, 2)])
def test_ranks_and_micro_batches_share_out_the_same_batch(dataset, world_size, micro_batch):
    tokens, s = Tokens(dataset, "train"), settings(micro_batch=micro_batch, style=True)
    codes, valid, scored, conditions, _ = drawn(tokens, 5, 100, style=True)
    shares = [TrainingSteps(tokens, list, 100, s, rank, world_size)[5] for rank in range(world_size)]
    parts = [batch for share in shares for batch in share.micro_batches]
    assert len(parts) == (6 // micro_batch if micro_batch else world_size)
    for number, whole in enumerate((codes, valid, scored)):
        assert torch.equal(torch.cat([batch[number] for batch in parts]), whole)
    assert [sample["text"] for batch in parts for sample in batch.inputs] == [sample["text"] for sample in conditions]
    assert all(torch.equal(share.scored_items, scored.sum(0)) for share in shares)


@pytest.mark.parametrize("world_size, micro_batch", [(1, 0), (2, 1)])
def test_each_nth_step_has_twice_the_items_of_half_the_length(dataset, world_size, micro_batch):
    tokens, s = Tokens(dataset, "train"), settings(micro_batch=micro_batch, short_every=3)
    shares = [TrainingSteps(tokens, list, 101, s, rank, world_size) for rank in range(world_size)]
    for step in range(6):
        times, T = (2, 50) if step in (2, 5) else (1, 101)
        codes = drawn(tokens, step, T, batch_size=times * s.batch_size)[0]
        parts = [batch.codes for share in shares for batch in share[step].micro_batches]
        assert torch.equal(torch.cat(parts), codes) and codes.shape[2] == T
        assert len(shares[0][step].scored_items) == T and len(parts[0]) == times * (micro_batch or 6 // world_size)


def test_the_loader_gives_the_steps_from_the_first_on(dataset):
    steps = TrainingSteps(Tokens(dataset, "train"), list, 100, settings(steps=5))
    found = list(loader(steps, 2, torch.device("cpu")))
    assert len(found) == 3
    for step, ours in zip((2, 3, 4), found):
        assert torch.equal(ours.micro_batches[0].codes, steps[step].micro_batches[0].codes)
    repeated = list(
        loader(TrainingSteps(steps.tokens, list, 100, settings(steps=2, one_batch=True)), 0, torch.device("cpu"))
    )
    assert torch.equal(repeated[0].micro_batches[0].codes, repeated[1].micro_batches[0].codes)


def test_short_tracks_are_padded_and_masked(dataset):
    tokens = Tokens(dataset, "train")
    for codes, valid, scored, _, track in zip(*drawn(tokens, 0, 2000)):
        assert valid.sum() == track["frames"] and valid[: track["frames"]].all() and torch.equal(valid, scored)
        assert np.array_equal(codes[:, valid].T.numpy(), tokens.codes(track))
        assert (codes[:, ~valid] == 0).all()


def test_a_style_excerpt_leaves_the_loss_and_a_melody_is_the_segments_own(dataset):
    tokens = Tokens(dataset, "train")
    with_all = dict(melody=True, style=True, style_dropout=0.5, melody_dropout=0.5)
    codes, valid, scored, conditions, tracks = drawn(tokens, 0, 400, **with_all)
    assert {"style" in sample for sample in conditions} == {True, False}
    for row, (sample, track) in enumerate(zip(conditions, tracks)):
        left_out = valid[row] & ~scored[row]
        if "style" in sample:
            excerpt, codebooks = sample["style"]
            assert torch.equal(codes[row][:, left_out], excerpt) and 75 <= excerpt.shape[1] <= 200
            assert left_out.nonzero().diff(dim=0).eq(1).all() and 1 <= codebooks <= 6
        else:
            assert not left_out.any()
        if "melody" in sample:
            whole = strongest(chromagram(load_audio(track["path"], 16_000), 16_000)[0])
            ours = codes[row, :, valid[row]].numpy()
            start = next(first for first in range(track["frames"])
                         if np.array_equal(tokens.codes(track, first, 400).T, ours))  # fmt: skip
            middles = (start / 50 + (np.arange(64) + 0.5) / 8) * 8
            expected = [int(whole[int(at)]) if at * 50 / 8 < track["frames"] else 12 for at in middles]
            assert np.mean(sample["melody"] == np.array(expected)) > 0.95


def test_validation_covers_every_held_out_frame_once_on_any_number_of_ranks(dataset):
    tokens = Tokens(dataset, "valid")
    frames = sum(track["frames"] for track in tokens.tracks)
    for world_size in (1, 2, 5):
        shares = [list(valid_batches(tokens, list, 100, 3, settings(valid_items=0), rank, world_size))
                  for rank in range(world_size)]  # fmt: skip
        assert sum(int(batch.valid.sum()) for share in shares for batch in share) == frames
        assert len({len(share) for share in shares}) == 1, "FSDP needs as many batches on every rank"
    some = valid_batches(tokens, list, 100, 3, settings(valid_items=4))
    assert sum(len(batch.codes) for batch in some) == 4


def test_unigram_ce_is_the_entropy_of_the_histogram(dataset):
    sides = [np.concatenate([tokens.codes(track) for track in tokens.tracks])[:, 0]
             for tokens in (Tokens(dataset, "train"), Tokens(dataset, "valid"))]  # fmt: skip
    p, q = (np.bincount(side, minlength=512) for side in sides)
    by_hand = -(q / q.sum() * np.log((p + 1) / (p + 1).sum())).sum()
    assert unigram_ce(dataset)[0] == pytest.approx(by_hand)
    assert by_hand > -(q[q > 0] / q.sum() * np.log(q[q > 0] / q.sum())).sum(), "the held-out side's own entropy"


def test_where_a_row_begins_does_not_follow_from_which_track_it_is(dataset):
    """Over many steps, place in the data and place in the track are unrelated: each row has numbers of its own."""
    tokens = Tokens(dataset, "train")
    for row in (0, 1):
        tracks, starts = [], []
        for step in range(150):
            rng = np.random.default_rng([0, step])
            tracks.append(rng.integers(tokens.ends[-1], size=6)[row])
            batch, *_, of = drawn(tokens, step, 20)
            codes, track = batch[row].T.numpy(), of[row]
            windows = np.lib.stride_tricks.sliding_window_view(tokens.codes(track), 20, axis=0).transpose(0, 2, 1)
            starts.append(int((windows == codes).all((1, 2)).argmax()) / track["frames"])
        assert abs(np.corrcoef(tracks, starts)[0, 1]) < 0.3


def test_token_out_of_range_is_refused_by_name(own_dataset):
    train = np.load(own_dataset / "train_000.npy")
    train[:, 1] = 600
    np.save(own_dataset / "train_000.npy", train)
    with pytest.raises(UserError, match="holds token 600, and tiny ends at 511"):
        drawn(Tokens(own_dataset, "train"), 0, 100)


def test_a_truncated_shard_is_refused(own_dataset):
    path = own_dataset / "train_000.npy"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="cannot be read"):
        Tokens(own_dataset, "train")


@pytest.mark.parametrize("change", [
    {"captions": "loud"}, {"captions": []}, {"level": "x"}, {"clipped": None}, {"path": 5},
])  # fmt: skip
def test_a_track_that_is_damaged_is_refused_by_name(own_dataset, change):
    first, *others = (own_dataset / "train_000.jsonl").read_text().splitlines()
    (own_dataset / "train_000.jsonl").write_text("\n".join([json.dumps({**json.loads(first), **change}), *others]))
    with pytest.raises(UserError, match="train_000.jsonl: is damaged"):
        Tokens(own_dataset, "train")


def test_a_worker_that_draws_batches_outlives_the_signals_that_end_a_run():
    """Torchrun and SLURM send SIGTERM to a run's whole group, and the step under way still needs its batch."""
    numbers = torch.utils.data.DataLoader(range(40), None, num_workers=1, worker_init_fn=ignore_signals)
    batches = iter(numbers)
    found = [next(batches)]
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(batches._workers[0].pid, number)
    assert found + list(batches) == list(range(40))


@pytest.mark.parametrize("shape", [(1000, 4), (1000,)])
@pytest.mark.parametrize("without", ["nothing", "pread"])
def test_rows_are_those_of_the_array_as_it_was_when_it_was_opened(shape, without, tmp_path, monkeypatch):
    monkeypatch.delattr(os, without, raising=False)
    array = np.random.default_rng(0).integers(1000, size=shape).astype(np.uint16)
    np.save(tmp_path / "a.npy", array)
    rows = Rows(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", array + 1)
    (tmp_path / "b.npy").replace(tmp_path / "a.npy")
    for part in (slice(10, 20), slice(None), slice(990, 2000), slice(7, 8)):
        assert np.array_equal(rows[part], array[part]) and rows[part].dtype == array.dtype


def test_a_shard_that_is_cut_short_is_not_trained_on(own_dataset):
    tokens = Tokens(own_dataset, "train")
    last = tokens.tracks[-1]
    with open(own_dataset / "train_000.npy", "r+b") as file:
        file.truncate((own_dataset / "train_000.npy").stat().st_size - 1)
    assert len(tokens.codes(tokens.tracks[0])) == tokens.tracks[0]["frames"]
    with pytest.raises(UserError, match="train_000.npy: is shorter than when it was opened"):
        tokens.codes(last)


def test_rows_go_to_a_worker_that_is_no_fork_and_lie_one_after_another(tmp_path):
    array = np.arange(12, dtype=np.uint16).reshape(3, 4)
    np.save(tmp_path / "a.npy", array)
    assert np.array_equal(pickle.loads(pickle.dumps(Rows(tmp_path / "a.npy")))[1:], array[1:])
    np.save(tmp_path / "a.npy", np.asfortranarray(array))
    with pytest.raises(UserError, match="do not lie one after another"):
        Rows(tmp_path / "a.npy")
