"""Token shards on disk -> batches. A batch is a pure function of (seed, step), on any number of processes.

data/NAME/, as prepare.py writes it:

    meta.json                codec, counts, and what it was prepared from
    train_000.npy            uint16 [frames, K], of which what is drawn is read; a further shard every SHARD_FRAMES
    train_000_melody.npy     uint8 [frames], the strongest pitch class at each frame, 12 being silence
    train_000.jsonl          per track: path, first frame in the shard, frames, caption (several: captions), metadata
    valid_000.*              the held-out tracks
    counts.npy               int64 [2, K, card], how often each code occurs in train and in valid
    tokenizer.model          SentencePiece, trained on the captions

Letters: B batch, K codebooks, T frames.
"""

import json
import math
import os
import re
import signal
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch

import codec
from common import UserError, first_line
from conditioning import CHROMA_RATE, SILENCE, all_conditions, draw_conditions, to_device

DATA_FORMAT = 2


class Batch(NamedTuple):
    codes: torch.Tensor  # int64 [B, K, T], 0 on padding
    valid: torch.Tensor  # bool [B, T], False on padding
    scored: torch.Tensor  # bool [B, T], False where the loss does not count: padding, and the excerpt given as style
    inputs: dict  # what `Conditioner.prepare` makes of the items' conditions

    def to(self, device):
        tensors = (tensor.to(device, non_blocking=True) for tensor in self[:3])
        return Batch(*tensors, to_device(self.inputs, device))


class Step(NamedTuple):
    """What one rank needs for one step of the optimizer."""

    micro_batches: list  # of Batch
    scored_items: torch.Tensor  # int64 [T], how many items of the global batch are scored at each frame


def read_meta(folder):
    """What meta.json says of a data set; raises UserError if it is none, or is damaged."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a prepared data set; make one with: python prepare.py MUSIC --out {folder}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != DATA_FORMAT:
            raise UserError(f"{path}: format {meta['format']}, and this code reads {DATA_FORMAT}; prepare it again")
        sizes = [meta["codec"][key] for key in ("K", "card", "frame_rate")]
        sizes += [meta[split]["frames"] for split in ("train", "valid")]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError("a size is no number above 0")
        if not all(type(meta["codec"][key]) is str for key in ("name", "id")):
            raise ValueError("the codec has no name")
        if type(meta.get("checksums", {})) is not dict:
            raise ValueError("its checksums are no object")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); prepare the data again") from None
    return meta


def read_tokenizer(folder):
    """The bytes of a data set's SentencePiece model."""
    path = Path(folder, "tokenizer.model")
    try:
        content = path.read_bytes()
        sentencepiece.SentencePieceProcessor(model_proto=content).encode("music")  # an empty one fails only here
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); prepare the data again") from None
    return content


def read_tracks(path, frames):
    """The tracks of a shard's .jsonl, which must lie within its `frames`."""
    try:
        tracks = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for track in tracks:
            captions = captions_of(track)
            if type(captions) is not list or not captions:
                raise ValueError(f"{track['name']}: its captions are no list")
            texts = (track["name"], track["path"], track["caption"], *captions)
            if not all(type(track.get(key, 0)) in (int, float) for key in ("level", "clipped")):
                raise ValueError(f"{track['name']}: its level is no number")
            numbers = (track["first"], track["frames"])
            if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
                raise ValueError(f"{track['name']}: a value is of the wrong kind")
            if not 0 <= track["first"] < track["first"] + track["frames"] <= frames:
                raise ValueError(f"{track['name']}: is no part of its shard")
            if type(track["metadata"]) is not dict:
                raise ValueError(f"{track['name']}: its metadata are no object")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); prepare the data again") from None
    return tracks


def captions_of(track):
    """All captions of a track; the one empty text where it has none."""
    return track.get("captions", [track["caption"]])


def text_of(track):
    """What a held-out track asks for: its caption or, where it has none, its metadata."""
    return track["caption"] or ". ".join(f"{key}: {value}" for key, value in track["metadata"].items())


def words_of(texts):
    """The words of some texts, without case, as the tokenizer hears them."""
    folded = (unicodedata.normalize("NFKC", text).casefold() for text in texts)
    return {word for text in folded for word in re.findall(r"\w+", text)}


def read_array(path, **how):
    try:
        return np.load(path, **how)
    except Exception as error:  # what numpy says of a damaged header is of many kinds
        raise UserError(f"{path}: cannot be read ({first_line(error)}); prepare the data again") from None


class Rows:
    """The array of a .npy file, of which rows[a:b] is read when it is asked for, and no more.

    A memory map reads by pages, and many of them ahead: of a cold disk 1.2 ms an item for 0.1 (NOTES.md). The file is
    held, so that a data set that is replaced meanwhile stays what it was. Raises UserError if it is cut short.
    """

    def __init__(self, path):
        self.path, array = path, read_array(path, mmap_mode="r")
        if np.isfortran(array):
            raise UserError(f"{path}: its rows do not lie one after another; prepare the data again")
        self.shape, self.dtype, self.offset = array.shape, array.dtype, array.offset
        self.file = open(path, "rb", buffering=0)

    def __reduce__(self):  # for a worker that is no fork
        return Rows, (self.path,)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        first, end, _ = rows.indices(len(self))
        size = self.dtype.itemsize * math.prod(self.shape[1:])
        at, wanted = self.offset + first * size, (end - first) * size
        if hasattr(os, "pread"):  # leaves the file's position alone, which a worker shares
            content = os.pread(self.file.fileno(), wanted, at)
        else:
            self.file.seek(at)
            content = self.file.read(wanted)
        if len(content) < wanted:
            raise UserError(f"{self.path}: is shorter than when it was opened; prepare the data again")
        return np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])


def load_codec(folder, name, weights=""):
    """The codec called `name`, which must be the one that the data set was prepared with."""
    found, needed = codec.load_codec(name, weights), read_meta(folder)["codec"]["id"]
    if found.id != needed:
        raise UserError(f"{folder} was prepared with codec {needed}, not {found.id}, --codec={name}; prepare it again")
    return found


class Tokens:
    """One split, 'train' or 'valid', of a prepared data set."""

    def __init__(self, folder, split):
        self.folder, self.meta = Path(folder), read_meta(folder)
        self.K, self.card = self.meta["codec"]["K"], self.meta["codec"]["card"]
        self.frame_rate = self.meta["codec"]["frame_rate"]
        self.tracks, self.shards, self.melodies = [], [], []
        for number, path in enumerate(sorted(self.folder.glob(f"{split}_*.jsonl"))):
            shard, melody = Rows(path.with_suffix(".npy")), Rows(path.with_name(f"{path.stem}_melody.npy"))
            if (shard.dtype, shard.shape[1:], melody.dtype, melody.shape) != ("u2", (self.K,), "u1", shard.shape[:1]):
                raise UserError(f"{path}: its arrays do not agree with meta.json; prepare the data again")
            self.shards.append(shard)
            self.melodies.append(melody)
            self.tracks += [{**track, "shard": number} for track in read_tracks(path, len(shard))]
        if sum(track["frames"] for track in self.tracks) != self.meta[split]["frames"]:
            raise UserError(f"{folder}: the {split} shards do not agree with meta.json; prepare the data again")
        self.ends = np.cumsum([track["frames"] for track in self.tracks])

    def words(self):
        """All words of the captions and of what else is known of the tracks."""
        about = (f"{key} {value}" for track in self.tracks for key, value in track["metadata"].items())
        captions = (caption for track in self.tracks for caption in captions_of(track))
        return words_of(about) | words_of(captions)

    def padding(self, T):
        """The share of padding in items of T frames, which tracks shorter than that need."""
        frames = np.array([track["frames"] for track in self.tracks])
        return float((frames * np.maximum(0, 1 - frames / T)).sum() / frames.sum())

    def codes(self, track, start=0, frames=None):
        """Codes uint16 [frames, K] of one track; raises UserError for a token that the codec does not have."""
        frames = min(frames or track["frames"], track["frames"] - start)
        first = track["first"] + start
        codes = self.shards[track["shard"]][first : first + frames]
        if codes.max() >= self.card:
            raise UserError(
                f"{self.folder}: {track['name']} holds token {codes.max()}, and {self.meta['codec']['name']} ends at"
                f" {self.card - 1}; see: python prepare.py check {self.folder}"
            )
        return codes

    def melody(self, track, start, T):
        """The pitch classes of T frames, 8 a second: uint8 [M], silence past the track's end."""
        rows = np.arange(round(T * CHROMA_RATE / self.frame_rate))
        at = start + ((rows + 0.5) * self.frame_rate / CHROMA_RATE).astype(int)
        first, end = track["first"] + start, track["first"] + min(start + T, track["frames"])
        notes = self.melodies[track["shard"]][first:end][(at - start).clip(max=end - first - 1)]
        return np.where(at < track["frames"], notes, SILENCE)

    def collate(self, items, T):
        """Items (track, first frame, conditions as `draw_conditions` has them) -> (codes, valid, scored, [conditions]).

        The first three as in Batch; shorter tracks are padded.
        """
        codes = torch.zeros(len(items), self.K, T, dtype=torch.int64)
        valid = torch.zeros(len(items), T, dtype=torch.bool)
        scored, conditions = valid.clone(), []
        for row, (track, start, given) in enumerate(items):
            found = torch.from_numpy(self.codes(track, start, T).T.astype(np.int64))
            codes[row, :, : found.shape[1]] = found
            valid[row, : found.shape[1]] = scored[row, : found.shape[1]] = True
            conditions.append({"text": given["text"]})
            if given["melody"]:
                conditions[-1]["melody"] = self.melody(track, start, T)
            if given["style"]:
                first, end, codebooks = given["style"]
                scored[row, first:end] = False
                conditions[-1]["style"] = (found[:, first:end], codebooks)
        return codes, valid, scored, conditions

    def draw(self, step, size, T, s):
        """`size` items: (track, first frame, conditions). Tracks are drawn in proportion to their length."""
        rng, items = np.random.default_rng([s.seed, step]), []
        for row, frame in enumerate(rng.integers(self.ends[-1], size=size)):
            track = self.tracks[np.searchsorted(self.ends, frame, side="right")]
            draw = np.random.default_rng([s.seed, step, row + 1])  # row 0 would repeat the batch's own numbers
            start = int(draw.integers(max(0, track["frames"] - T) + 1))
            frames = min(T, track["frames"])
            captions = captions_of(track)
            caption = captions[draw.integers(len(captions))] if len(captions) > 1 else captions[0]
            given = draw_conditions(caption, track["metadata"], frames, self.frame_rate, draw, s)
            items.append((track, start, given))
        return items

    def whole_items(self, pieces, T, s):
        """Pieces (track, first frame) -> items with every condition that the settings have, and nothing dropped."""
        return [(track, start, all_conditions(text_of(track), min(T, track["frames"] - start), self.frame_rate, s))
                for track, start in pieces]  # fmt: skip

    def segments(self, T, most=0):
        """Every track in consecutive pieces of T frames, as (track, first frame); `most` of them, evenly spread."""
        pieces = [(track, start) for track in self.tracks for start in range(0, track["frames"], T)]
        if most and most < len(pieces):
            pieces = [pieces[i] for i in np.linspace(0, len(pieces) - 1, most).round().astype(int)]
        return pieces


class TrainingSteps(torch.utils.data.Dataset):
    """steps[n] is one rank's share of the n-th global batch, a pure function of (seed, n).

    prepare: the model's `conditioner.prepare`. T: frames of an item, half as many in the steps that are short.
    """

    def __init__(self, tokens, prepare, T, s, rank=0, world_size=1):
        self.tokens, self.prepare, self.T, self.s = tokens, prepare, T, s
        self.rank, self.share = rank, s.batch_size // world_size

    def __len__(self):
        return self.s.steps

    def __getitem__(self, step):
        is_short = self.s.short_every > 0 and (step + 1) % self.s.short_every == 0
        T, times = (self.T // 2, 2) if is_short else (self.T, 1)
        share, size = times * self.share, times * (self.s.micro_batch or self.share)
        items = self.tokens.draw(0 if self.s.one_batch else step, times * self.s.batch_size, T, self.s)
        scored_items = torch.zeros(T, dtype=torch.int64)
        for track, start, given in items:
            scored_items[: track["frames"] - start] += 1
            if given["style"]:
                first, end, _ = given["style"]
                scored_items[first:end] -= 1
        micro_batches = []
        for first in range(self.rank * share, (self.rank + 1) * share, size):
            *tensors, conditions = self.tokens.collate(items[first : first + size], T)
            micro_batches.append(Batch(*tensors, self.prepare(conditions)))
        return Step(micro_batches, scored_items)


def loader(steps, first, device):
    """An iterator over steps[first], steps[first + 1] ...; for a GPU they are drawn ahead by a worker, and pinned."""
    on_gpu = device.type == "cuda"
    return iter(torch.utils.data.DataLoader(
        steps, sampler=range(first, len(steps)), batch_size=None, num_workers=int(on_gpu), pin_memory=on_gpu,
        worker_init_fn=ignore_signals,
    ))  # fmt: skip


def ignore_signals(worker):
    """Ctrl-C and SIGTERM may reach the worker as well, and the step under way still needs it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def valid_batches(tokens, prepare, T, size, s, rank=0, world_size=1):
    """One rank's share of the held-out segments in Batches of `size`, each with all conditions and nothing dropped.

    Every rank gets the same number of batches, as FSDP needs; a rank that has none left gets one that counts nothing.
    """
    pieces = tokens.segments(T, s.valid_items)
    for first in range(0, len(pieces), size * world_size):
        mine = pieces[first + rank * size :][:size]
        codes, valid, scored, conditions = tokens.collate(tokens.whole_items(mine or pieces[:1], T, s), T)
        if not mine:
            valid, scored = torch.zeros_like(valid), torch.zeros_like(scored)
        yield Batch(codes, valid, scored, prepare(conditions))


def unigram_ce(folder):
    """Held-out cross-entropy in nats, float [K], of the best model that knows only how often each code occurs."""
    counts, about = read_array(Path(folder, "counts.npy")), read_meta(folder)["codec"]
    if counts.dtype != np.int64 or counts.shape != (2, about["K"], about["card"]) or counts.min() < 0:
        raise UserError(f"{folder}: counts.npy does not agree with meta.json; prepare the data again")
    train, valid = counts
    p = train + 1.0
    return -(valid * np.log(p / p.sum(1, keepdims=True))).sum(1) / valid.sum(1).clip(min=1)
