"""Token shards on disk -> batches. A batch is a pure function of (seed, step), on any number of processes.

An item is a segment of a track, with its conditions. dataprep/shards.py describes the files of data/NAME/.

Letters: B batch, K codebooks, T frames of an item.
"""

import gc
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import UserError, quote
from conditioning import CHROMA_RATE, SILENCE, all_conditions, draw_conditions, to_device
from dataprep.shards import ArrayFile, captions_of, read_meta, read_tracks, text_of, words_of


class Item(NamedTuple):
    track: dict  # a line of the shard's .jsonl, and "shard", the shard's number
    start: int  # first frame in the track
    choices: dict  # the conditions that the item gets, from `draw_conditions`


class Batch(NamedTuple):
    codes: torch.Tensor  # int64 [B, K, T], 0 on padding
    not_padding: torch.Tensor  # bool [B, T]
    in_loss: torch.Tensor  # bool [B, T], False on padding and style excerpts
    condition_tensors: dict  # from `Conditioner.tokenize`
    targets_per_codebook: torch.Tensor  # float [K], codes in the loss; training: of the whole global batch, at least 1

    def to(self, device):
        condition_tensors = to_device(self.condition_tensors, device)
        tensors = [tensor.to(device, non_blocking=True) for tensor in (*self[:3], self.targets_per_codebook)]
        return Batch(*tensors[:3], condition_tensors, tensors[3])


def count_targets(in_loss, pattern):
    """in_loss bool [B, T] -> targets of each codebook, float [K]. A pattern leaves some frames without a target."""
    return (pattern.frame_mask * in_loss.sum(0)).sum(1).float()


# ------------------------------------------------------------------------------------------------------ data set


class TokenDataset:
    """One split of a prepared data set, 'train' or 'valid'."""

    def __init__(self, folder, split):
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.K, self.card = self.meta["codec"]["K"], self.meta["codec"]["card"]
        self.frame_rate = self.meta["codec"]["frame_rate"]
        self.tracks, self.shards, self.melodies = [], [], []
        for number, path in enumerate(sorted(self.folder.glob(f"{split}_*.jsonl"))):
            shard, melody = ArrayFile(path.with_suffix(".npy")), ArrayFile(path.with_name(f"{path.stem}_melody.npy"))
            if (shard.dtype, shard.shape[1:], melody.dtype, melody.shape) != ("u2", (self.K,), "u1", shard.shape[:1]):
                raise UserError(f"{path}: its arrays do not match meta.json; prepare the data again")
            self.shards.append(shard)
            self.melodies.append(melody)
            self.tracks += [{**track, "shard": number} for track in read_tracks(path, len(shard))]
        if sum(track["frames"] for track in self.tracks) != self.meta[split]["frames"]:
            raise UserError(f"{folder}: the {split} shards do not match meta.json; prepare the data again")
        self.ends = np.cumsum([track["frames"] for track in self.tracks])

    def words(self):
        """Return the set of words in captions and metadata."""
        metadata = (f"{key} {value}" for track in self.tracks for key, value in track["metadata"].items())
        captions = (caption for track in self.tracks for caption in captions_of(track))
        return words_of(metadata) | words_of(captions)

    def track_hashes(self):
        """Return the set of the hashes of the tracks' audio files, integers. Data sets of older versions have none."""
        return {track["hash"] for track in self.tracks if "hash" in track}

    def padding_share(self, T):
        """Return the share of padding in items of T frames, caused by shorter tracks."""
        frames = np.array([track["frames"] for track in self.tracks])
        return float((frames * np.maximum(0, 1 - frames / T)).sum() / frames.sum())

    def codes(self, track, start=0, frames=None):
        """Read codes uint16 [frames, K] of a track. Raises UserError for a code that the codec does not have."""
        frames = min(frames or track["frames"], track["frames"] - start)
        first = track["first"] + start
        codes = self.shards[track["shard"]][first : first + frames]
        if codes.max() >= self.card:
            raise UserError(
                f"{self.folder}: {track['name']} has code {codes.max()}, but {self.meta['codec']['name']} ends at"
                f" {self.card - 1}; to find all damage: python prepare.py check {quote(self.folder)}"
            )
        return codes

    def melody(self, track, start, T):
        """Read the pitch classes of T frames, 8 per second: uint8 [M], SILENCE after the track's end."""
        number = np.arange(round(T * CHROMA_RATE / self.frame_rate))
        frame = start + ((number + 0.5) * self.frame_rate / CHROMA_RATE).astype(int)
        first, end = track["first"] + start, track["first"] + min(start + T, track["frames"])
        notes = self.melodies[track["shard"]][first:end][(frame - start).clip(max=end - first - 1)]
        return np.where(frame < track["frames"], notes, SILENCE)

    def draw_items(self, step, size, T, s):
        """Draw `size` items of T frames. Tracks are drawn in proportion to their length."""
        rng, items = np.random.default_rng([s.seed, step]), []
        for row, frame in enumerate(rng.integers(self.ends[-1], size=size)):
            track = self.tracks[np.searchsorted(self.ends, frame, side="right")]
            item_rng = np.random.default_rng([s.seed, step, row + 1])  # [seed, step, 0] would equal [seed, step]
            start = int(item_rng.integers(max(0, track["frames"] - T) + 1))
            captions = captions_of(track)
            caption = captions[item_rng.integers(len(captions))] if len(captions) > 1 else captions[0]
            frames = min(T, track["frames"])
            choices = draw_conditions(caption, track["metadata"], frames, self.frame_rate, item_rng, s)
            items.append(Item(track, start, choices))
        return items

    def evaluation_items(self, places, T, s):
        """Places (track, first frame) -> items with all conditions of the settings; nothing is dropped."""
        return [Item(track, start, all_conditions(text_of(track), min(T, track["frames"] - start), self.frame_rate, s))
                for track, start in places]  # fmt: skip

    def cut_into_segments(self, T, limit=0):
        """Return (track, first frame) of consecutive segments, at most `limit` of them, evenly spread; 0: all."""
        places = [(track, start) for track in self.tracks for start in range(0, track["frames"], T)]
        if limit and limit < len(places):
            places = [places[i] for i in np.linspace(0, len(places) - 1, limit).round().astype(int)]
        return places

    def masks(self, items, T):
        """Return not_padding and in_loss of the items, bool [B, T] each, without reading codes."""
        lengths = torch.tensor([[item.track["frames"] - item.start] for item in items])
        not_padding = torch.arange(T) < lengths
        in_loss = not_padding.clone()
        for row, item in enumerate(items):
            if item.choices["style"]:
                first, end, _ = item.choices["style"]
                in_loss[row, first:end] = False
        return not_padding, in_loss

    def collate(self, items, T):
        """Read the items: return codes int64 [B, K, T], 0 on padding, and the conditions, a list of B dicts."""
        codes, conditions = torch.zeros(len(items), self.K, T, dtype=torch.int64), []
        for row, (track, start, choices) in enumerate(items):
            item_codes = torch.from_numpy(self.codes(track, start, T).T.astype(np.int64))
            codes[row, :, : item_codes.shape[1]] = item_codes
            conditions.append({"text": choices["text"]})
            if choices["melody"]:
                conditions[-1]["melody"] = self.melody(track, start, T)
            if choices["style"]:
                first, end, codebooks = choices["style"]
                conditions[-1]["style"] = (item_codes[:, first:end], codebooks)
        return codes, conditions


# ------------------------------------------------------------------------------------------------------- batches


class TrainingBatches(torch.utils.data.Dataset):
    """batches[step] is a list of micro-batches, this rank's share of a global batch: a function of (seed, step)."""

    def __init__(self, dataset, model, s, rank=0, world_size=1):
        self.dataset, self.s, self.rank, self.world_size = dataset, s, rank, world_size
        # not the whole model, because a worker that is not forked copies these
        self.tokenize, self.make_pattern, self.T = model.conditioner.tokenize, model.make_pattern, model.trained_frames

    def __len__(self):
        return self.s.steps

    def __getitem__(self, step):
        s, T, batch_size, micro_batch = self.s, self.T, self.s.batch_size, self.s.micro_batch
        if s.short_every and (step + 1) % s.short_every == 0:  # twice as many items of half the length
            T, batch_size, micro_batch = T // 2, 2 * batch_size, 2 * micro_batch
        items = self.dataset.draw_items(0 if s.one_batch else step, batch_size, T, s)
        not_padding, in_loss = self.dataset.masks(items, T)
        targets = count_targets(in_loss, self.make_pattern(T=T, training=True)).clamp(min=1)
        share = batch_size // self.world_size
        size = micro_batch or share
        micro_batches = []
        for first in range(self.rank * share, (self.rank + 1) * share, size):
            rows = slice(first, first + size)
            codes, conditions = self.dataset.collate(items[rows], T)
            micro_batches.append(Batch(codes, not_padding[rows], in_loss[rows], self.tokenize(conditions), targets))
        return micro_batches


def loader(batches, first, device):
    """Iterate over batches[first], batches[first + 1] ... For a GPU, a worker loads ahead into pinned memory."""
    on_gpu = device.type == "cuda"
    gc.collect()  # a forked worker would keep the mapped last.pt and its disk space, which a reference cycle holds
    return iter(torch.utils.data.DataLoader(
        batches, sampler=range(first, len(batches)), batch_size=None, num_workers=int(on_gpu), pin_memory=on_gpu,
        worker_init_fn=ignore_signals,
    ))  # fmt: skip


def ignore_signals(worker):
    """Ignore Ctrl-C, SIGTERM and SIGHUP in a worker, because the current step still needs it."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def valid_batches(dataset, model, size, s, rank=0, world_size=1):
    """Yield this rank's share of the held-out segments, with all conditions: (Batch of `size`, the tracks' names).

    Every rank gets the same number of batches, because FSDP needs that; a rank without segments gets 0 targets.
    """
    T = model.trained_frames
    pattern = model.make_pattern(T=T, training=True)
    places = dataset.cut_into_segments(T, s.valid_items)
    for first in range(0, len(places), size * world_size):
        share = places[first + rank * size :][:size]
        items = dataset.evaluation_items(share or places[:1], T, s)
        codes, conditions = dataset.collate(items, T)
        not_padding, in_loss = dataset.masks(items, T)
        if not share:
            not_padding, in_loss = torch.zeros_like(not_padding), torch.zeros_like(in_loss)
        tensors = model.conditioner.tokenize(conditions)
        names = [item.track["name"] for item in items]
        yield Batch(codes, not_padding, in_loss, tensors, count_targets(in_loss, pattern)), names
