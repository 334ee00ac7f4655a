"""Music on disk -> token shards -> batches.

    python data.py prepare MUSIC --out data/NAME     # a folder with captions in .txt or .json, or a JSONL manifest
    python data.py check data/NAME                   # what is in it, and what is wrong with it

data/NAME/  meta.json        codec, counts, and what it was prepared from
            train_000.npy    uint16 [frames, K], read by memory map; a further shard every SHARD_FRAMES
            train_000_melody.npy  uint8 [frames], the strongest pitch class at each frame, 12 being silence
            train_000.jsonl  per track: path, first frame in the shard, frames, caption, metadata
            valid_000.*      held out by a hash of the path: adding tracks moves none to the other side
            counts.npy       int64 [2, K, card], how often each code occurs in train and in valid
            tokenizer.model  SentencePiece, trained on the captions;  skipped.jsonl: what was left out, and why

Letters: B batch, K codebooks, T frames.
"""

import argparse
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

import config
import distributed
from codec import SUFFIXES, encode_many, load_audio, load_codec
from conditioning import CHROMA_RATE, SILENCE, all_conditions, draw_conditions, melody_of, to_device
from config import UserError, first_line

SHARD_FRAMES = 100_000_000
DATA_FORMAT = 2


# ---------------------------------------------------------------------------------------------------- prepare


def tracks_of_manifest(manifest):
    """JSONL lines {"path", "caption", ...}; paths are relative to the manifest, other keys are metadata."""
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{manifest}: neither a folder of audio nor a JSONL manifest; give the folder") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{manifest}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg}); one object per line is needed") from None
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise UserError(f'{where}: has no "path"; needed is {{"path": "a.wav", "caption": "..."}}')
        if not isinstance(entry.get("attributes", {}), dict):
            raise UserError(f'{where}: "attributes" must be an object, {{"genre": "jazz"}}')
        path = manifest.parent / entry.pop("path")
        if not path.is_file():
            raise UserError(f"{where}: {path}: no such file")
        yield path, entry, where


def tracks_of_folder(folder):
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            entry, text, sidecar = {}, path.with_suffix(".txt"), path.with_suffix(".json")
            if sidecar.is_file():
                try:
                    entry = json.loads(sidecar.read_text(encoding="utf-8"))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    raise UserError(f"{sidecar}: not JSON ({error})") from None
                if not isinstance(entry, dict) or not isinstance(entry.get("attributes", {}), dict):
                    raise UserError(f'{sidecar}: must hold an object, {{"caption": "...", "genre": "jazz"}}')
            if text.is_file():
                entry["caption"] = text.read_text(encoding="utf-8", errors="replace")
            yield path, entry, sidecar


def find_tracks(music, captions_needed):
    """-> a list of {"path", "melody_from", "name", "caption", "metadata"}; the name is the path relative to the music.

    melody_from is the file whose melody is the track's: a stem that the entry names, relative to the manifest or the
    track's folder, or the track itself. The metadata are the other keys, those of an inner "attributes" among them.
    """
    music = Path(music)
    if not music.exists():
        raise UserError(f"{music}: no such folder or manifest")
    root = music if music.is_dir() else music.parent
    tracks = []
    for path, entry, where in tracks_of_folder(music) if music.is_dir() else tracks_of_manifest(music):
        caption = " ".join(str(entry.pop("caption", "") or "").split())
        attributes = entry.pop("attributes", {})
        stem = entry.pop("melody_from", None)
        stem = (path.parent if music.is_dir() else root) / str(stem) if stem else path
        if not stem.is_file():
            raise UserError(f"{where}: melody_from {stem}: no such file")
        name = os.path.relpath(path, root)
        tracks.append(dict(path=str(path), melody_from=str(stem), name=name, caption=caption,
                           metadata={**entry, **attributes}))  # fmt: skip
    if not tracks:
        raise UserError(f"{music}: holds no audio ({', '.join(sorted(SUFFIXES))})")
    name, times = Counter(track["name"] for track in tracks).most_common(1)[0]
    if times > 1:
        raise UserError(f"{music}: names {name} more than once; each track is needed once")
    if captions_needed and not any(track["caption"] for track in tracks):
        raise UserError(
            f"{music}: none of its {len(tracks)} tracks has a caption; put one beside each as a .txt of the same name,"
            f" or pass --no-captions to train without text"
        )
    return tracks


def split_tracks(tracks, valid_fraction):
    """The names held out: those whose hash falls below the fraction, and never none nor all of them."""
    ranked = sorted(tracks, key=lambda track: (zlib.crc32(track["name"].encode()), track["name"]))
    below = sum(zlib.crc32(track["name"].encode()) < valid_fraction * 2**32 for track in ranked)
    return {track["name"] for track in ranked[: min(max(1, below), len(ranked) - 1)]}


def start_worker(codec_name, weights):
    global codec
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # as many workers as cores, each on its own, are three times as fast as all on one file
    codec = load_codec(codec_name, weights)


def hear(job):
    """-> (wav float32 [channels, samples], melody uint8 [T]), or the reason why the track is left out."""
    path, melody_from, min_seconds = job
    try:
        wav = load_audio(path, codec.sample_rate, codec.channels)
        if wav.shape[1] < min_seconds * codec.sample_rate:
            return f"{wav.shape[1] / codec.sample_rate:.2f} s long, shorter than {min_seconds} s"
        if wav.abs().max() < 1e-3:
            return "silent: no sample above -60 dBFS"
        stem = wav if melody_from == path else load_audio(melody_from, codec.sample_rate, codec.channels)
        notes = melody_of(stem.mean(0), codec.sample_rate).numpy()
    except UserError as error:
        return str(error)
    at = ((np.arange(-(-wav.shape[1] // codec.hop)) + 0.5) * CHROMA_RATE / codec.frame_rate).astype(int)
    return wav.numpy(), np.append(notes, SILENCE).astype(np.uint8)[at.clip(max=len(notes))]


def encode(codec, found):
    """A list of what `hear` gives -> the same with codes uint16 [T, K] in the place of each wav."""
    heard = [each for each in found if type(each) is tuple]
    codes = iter(encode_many(codec, [torch.from_numpy(wav) for wav, _ in heard]))
    return [each if type(each) is str else (next(codes).T.cpu().numpy().astype(np.uint16), each[1]) for each in found]


def hear_and_encode(job):
    return encode(codec, [hear(job)])[0]


def encoded(jobs, codec, codec_name, codec_weights, workers):
    """What `encode` gives for each job, in order.

    Workers read the files. They encode them too, but for a GPU, which encodes those of many workers together.
    """
    on_gpu, together = codec.device.type == "cuda", 16
    ahead = threading.Semaphore(2 * workers + together)  # tracks that wait in memory, at most

    def allowed():
        for job in jobs:
            ahead.acquire()
            yield job

    with multiprocessing.get_context("spawn").Pool(workers, start_worker, (codec_name, codec_weights)) as pool:
        try:
            found = pool.imap(hear if on_gpu else hear_and_encode, allowed())
            while group := list(itertools.islice(found, together if on_gpu else 1)):
                ahead.release(len(group))
                yield from encode(codec, group) if on_gpu else group
        finally:
            ahead.release(len(jobs) + 1)  # the pool cannot end while its thread waits here


def write_json(path, value):
    config.write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def histogram(tokens, tracks, card):
    """How often each code occurs in tracks of `tokens`, uint16 [frames, K] -> int64 [K, card]."""
    counts = np.zeros((tokens.shape[1], card), dtype=np.int64)
    for track in tracks:
        distributed.beat("counting")
        for k, column in enumerate(tokens[track["first"] : track["first"] + track["frames"]].T):
            counts[k] += np.bincount(column, minlength=card)
    return counts


def train_tokenizer(tracks, vocab_size):
    """SentencePiece (unigram, byte fallback) on every caption and every 'key: value' of the metadata -> bytes."""
    sentences = [track["caption"] for track in tracks if track["caption"]]
    sentences += sorted({f"{key}: {value}" for track in tracks for key, value in track["metadata"].items()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences or ["music"]), model_writer=model, vocab_size=vocab_size,
        model_type="unigram", byte_fallback=True, hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def write_split(folder, split, tracks, tokens, melody):
    """One side's shards; `tokens` is uint16 [frames, K], `melody` uint8 [frames]; a track begins at its `first`."""
    shard, pending = 0, list(tracks)
    while pending:
        chosen, frames = [], 0
        while pending and (not chosen or frames + pending[0]["frames"] <= SHARD_FRAMES):
            chosen.append(pending.pop(0))
            frames += chosen[-1]["frames"]
        for source, suffix in ((tokens, ""), (melody, "_melody")):
            path, shape = folder / f"{split}_{shard:03d}{suffix}.npy", (frames, *source.shape[1:])
            array, first = np.lib.format.open_memmap(path, "w+", source.dtype, shape), 0
            for track in chosen:
                array[first : first + track["frames"]] = source[track["first"] : track["first"] + track["frames"]]
                first += track["frames"]
            array.flush()
        with open(folder / f"{split}_{shard:03d}.jsonl", "w", encoding="utf-8") as lines:
            first = 0
            for track in chosen:
                lines.write(json.dumps({**track, "first": first}) + "\n")
                first += track["frames"]
        shard += 1


def encode_all(work, tracks, codec, codec_name, codec_weights, min_seconds, workers):
    """Encodes the tracks that `work` does not hold yet, in order -> [{"frames", "skipped"}] for each.

    journal.jsonl has a line per finished track; tokens.bin and melody.bin may run ahead of it by what a crash cut off.
    """
    journal = work / "journal.jsonl"
    journal.touch()
    done = [json.loads(line) for line in journal.read_text().splitlines(True) if line.endswith("\n")]
    frames = sum(entry["frames"] for entry in done)
    bins = [open(work / name, "ab") for name in ("tokens.bin", "melody.bin")]
    with open(journal, "r+") as lines, bins[0], bins[1]:
        lines.truncate(sum(len(json.dumps(entry)) + 1 for entry in done))
        lines.seek(0, os.SEEK_END)
        for file, size in zip(bins, (frames * codec.K * 2, frames)):
            if file.tell() < size:
                raise UserError(f"{file.name}: is cut off; remove {work} to start again")
            file.truncate(size)
        workers = min(workers or os.cpu_count(), max(1, len(tracks) - len(done)))
        jobs = [(track["path"], track["melody_from"], min_seconds) for track in tracks[len(done) :]]
        bar = tqdm(total=len(tracks), initial=len(done), desc="encoding", unit="track", file=sys.stdout, mininterval=1)
        with bar:
            for found in encoded(jobs, codec, codec_name, codec_weights, workers):
                distributed.beat("encoding")
                skipped = found if type(found) is str else None
                entry = dict(frames=0 if skipped else len(found[0]), skipped=skipped)
                for file, array in zip(bins, () if skipped else found):
                    file.write(array.tobytes())
                    file.flush()
                frames += entry["frames"]
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
                done.append(entry)
                bar.update()
                bar.set_postfix(minutes=f"{frames / codec.frame_rate / 60:.1f}", refresh=False)
    return done


def prepare(music, out, codec_name="tiny", codec_weights="", workers=0, valid_fraction=0.05, min_seconds=1.0,
            captions=True, vocab_size=1000):  # fmt: skip
    """Encodes every track once. All is written beside `out` and renamed at the end; what is done survives a stop."""
    out = Path(out)
    if workers < 0 or not 0 <= valid_fraction <= 1:
        raise UserError("--workers must be 0 or above, and --valid_fraction between 0 and 1")
    codec = load_codec(codec_name, codec_weights).to("cuda" if torch.cuda.is_available() else "cpu")
    tracks = find_tracks(music, captions)
    contents = [[t["name"], t["melody_from"], t["caption"], t["metadata"], os.path.getsize(t["path"]),
                 os.path.getsize(t["melody_from"])] for t in tracks]  # fmt: skip
    digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    request = dict(music=str(Path(music).resolve()), tracks=digest, codec=codec.id, min_seconds=min_seconds,
                   valid_fraction=valid_fraction)  # fmt: skip
    if (out / "meta.json").exists():
        if json.loads((out / "meta.json").read_text())["request"] == request:
            return print(f"{out} is prepared already")
        raise UserError(f"{out}: holds other data; remove it or choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and is no data set; choose another --out")
    work = out.with_name(out.name + ".partial")
    if (work / "request.json").exists() and json.loads((work / "request.json").read_text()) != request:
        raise UserError(f"{work}: was begun with other tracks or another codec; remove it to start again")
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / "request.json", request)

    done = encode_all(work, tracks, codec, codec_name, codec_weights, min_seconds, workers)
    kept, skipped, first = [], [], 0
    for track, entry in zip(tracks, done):
        if entry["skipped"]:
            skipped.append(dict(path=track["path"], reason=entry["skipped"]))
        else:
            kept.append(dict(**track, first=first, frames=entry["frames"]))
            first += entry["frames"]
    if len(kept) < 2:
        shutil.rmtree(work)
        why = f"; the first was left out: {skipped[0]['path']}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(f"{music}: {len(kept)} usable tracks; at least 2 are needed, one to hold out{why}")
    held_out = split_tracks(kept, valid_fraction)
    sides = {
        "train": [t for t in kept if t["name"] not in held_out],
        "valid": [t for t in kept if t["name"] in held_out],
    }
    tokens = np.memmap(work / "tokens.bin", np.uint16, "r", shape=(first, codec.K))
    melody = np.memmap(work / "melody.bin", np.uint8, "r", shape=(first,))
    for split, side in sides.items():
        write_split(work, split, side, tokens, melody)
    (work / "skipped.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in skipped), encoding="utf-8")
    (work / "tokenizer.model").write_bytes(train_tokenizer(sides["train"], vocab_size))
    np.save(work / "counts.npy", [histogram(tokens, side, codec.card) for side in sides.values()])
    counts = {split: dict(tracks=len(side), frames=sum(t["frames"] for t in side)) for split, side in sides.items()}
    scratch = [work / name for name in ("tokens.bin", "melody.bin", "journal.jsonl", "request.json")]
    made = [*work.glob("train_*"), *work.glob("valid_*"), *map(work.joinpath, ("counts.npy", "tokenizer.model"))]
    checksums = {path.name: checksum(path) for path in sorted(made)}
    write_json(work / "meta.json", dict(format=DATA_FORMAT, codec=codec.about(), **counts, request=request,
                                        checksums=checksums))  # fmt: skip
    work.rename(out)
    for path in scratch:
        (out / path.name).unlink()
    for split, count in counts.items():
        print(f"{split}: {count['tracks']} tracks, {count['frames'] / codec.frame_rate / 60:.1f} minutes")
    if skipped:
        print(f"skipped: {len(skipped)} tracks, listed in {out / 'skipped.jsonl'}; the first: {skipped[0]['reason']}")
    print(f"wrote {out}")


# ---------------------------------------------------------------------------------------------------- batches


class Batch(NamedTuple):
    codes: torch.Tensor  # int64 [B, K, T], 0 on padding
    valid: torch.Tensor  # bool [B, T], False on padding
    scored: torch.Tensor  # bool [B, T], False where the loss does not count: padding, and the excerpt given as style
    conditions: list  # B dicts, see conditioning.py
    tracks: list  # B dicts, as in the shard's .jsonl
    everywhere: torch.Tensor  # `scored` of the global batch, of which these B may be a share

    def to(self, device):
        return self._replace(**{key: to_device(value, device) for key, value in self._asdict().items()
                                if isinstance(value, torch.Tensor)})  # fmt: skip


def load_meta(folder):
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: not a prepared data set; make one with: python data.py prepare MUSIC --out {folder}"
        )
    try:
        meta = json.loads(path.read_text())
        if meta["format"] == DATA_FORMAT:
            sizes = [meta["codec"][key] for key in ("K", "card", "frame_rate")]
            sizes += [meta[split]["frames"] for split in ("train", "valid")]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise ValueError("a size is no number above 0")
            if not all(type(meta["codec"][key]) is str for key in ("name", "id")):
                raise ValueError("the codec has no name")
            if type(meta.get("checksums", {})) is not dict:
                raise ValueError("no checksums")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); prepare the data again") from None
    if meta["format"] != DATA_FORMAT:
        raise UserError(f"{path}: format {meta['format']}, and this code reads {DATA_FORMAT}; prepare it again")
    return meta


def checksum(path):
    """CRC-32 of a file, at about a gigabyte a second."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            distributed.beat("checking the data")
            crc = zlib.crc32(block, crc)
    return crc


def damage(folder):
    """What is not as `prepare` has left it, a line a file: tokens that are wrong sound like any others."""
    expected = load_meta(folder).get("checksums", {}).items()
    wrong = [name for name, crc in expected if not Path(folder, name).is_file() or checksum(Path(folder, name)) != crc]
    return [f"{Path(folder, name)}: is gone, or not as it was prepared (its checksum differs)" for name in wrong]


def refuse_damage(folder):
    """Raises UserError if a file of a data set is damaged."""
    if found := damage(folder):
        raise UserError(f"{found[0]}; prepare the data again")


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
        tracks = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for track in tracks:
            texts, numbers = (track["name"], track["caption"]), (track["first"], track["frames"])
            if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
                raise ValueError(f"{track['name']}: a value is of the wrong kind")
            if (
                not 0 <= track["first"] < track["first"] + track["frames"] <= frames
                or type(track["metadata"]) is not dict
            ):
                raise ValueError(f"{track['name']}: is no part of its shard")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is damaged ({first_line(error)}); prepare the data again") from None
    return tracks


def read_array(path, **how):
    try:
        return np.load(path, **how)
    except Exception as error:  # what numpy says of a damaged header is of many kinds
        raise UserError(f"{path}: cannot be read ({first_line(error)}); prepare the data again") from None


class Tokens:
    """One side, 'train' or 'valid', of a prepared data set."""

    def __init__(self, folder, split):
        self.folder, self.meta = Path(folder), load_meta(folder)
        self.K, self.card = self.meta["codec"]["K"], self.meta["codec"]["card"]
        self.rate = self.meta["codec"]["frame_rate"]
        self.tracks, self.shards, self.melodies = [], [], []
        for path in sorted(self.folder.glob(f"{split}_*.jsonl")):
            for arrays, suffix in ((self.shards, ".npy"), (self.melodies, "_melody.npy")):
                file = path.with_name(path.stem + suffix)
                arrays.append(read_array(file, mmap_mode="r"))
            shard, melody, number = self.shards[-1], self.melodies[-1], len(self.shards) - 1
            if (shard.dtype, shard.shape[1:], melody.dtype, melody.shape) != ("u2", (self.K,), "u1", shard.shape[:1]):
                raise UserError(f"{file}: does not agree with meta.json or its melody; prepare the data again")
            self.tracks += [{**track, "shard": number} for track in read_tracks(path, len(shard))]
        if sum(track["frames"] for track in self.tracks) != self.meta[split]["frames"]:
            raise UserError(f"{folder}: the {split} shards do not agree with meta.json; prepare the data again")
        self.ends = np.cumsum([track["frames"] for track in self.tracks])

    def codes(self, track, start=0, frames=None):
        """Codes uint16 [frames, K] of one track; raises UserError for a token that the codec does not have."""
        frames = min(frames or track["frames"], track["frames"] - start)
        first = track["first"] + start
        codes = self.shards[track["shard"]][first : first + frames]
        if codes.max() >= self.card:
            raise UserError(
                f"{self.folder}: {track['name']} holds token {codes.max()}, and {self.meta['codec']['name']} ends at"
                f" {self.card - 1}; see: python data.py check {self.folder}"
            )
        return codes

    def melody(self, track, start, T):
        """The pitch classes of T frames, 8 a second: uint8 [M], silence past the track's end."""
        at = start + ((np.arange(round(T * CHROMA_RATE / self.rate)) + 0.5) * self.rate / CHROMA_RATE).astype(int)
        notes = self.melodies[track["shard"]][track["first"] + at.clip(max=track["frames"] - 1)]
        return np.where(at < track["frames"], notes, SILENCE)

    def collate(self, items, T, given, mine=None):
        """A Batch of T frames, shorter tracks padded, of those `items` of a global batch that are `mine`, or all.

        items: (track, first frame) each; given: which conditions each gets, see `draw_conditions`.
        """
        mine = range(len(items)) if mine is None else mine
        codes = torch.zeros(len(mine), self.K, T, dtype=torch.int64)
        valid, everywhere = torch.zeros(len(mine), T, dtype=torch.bool), torch.zeros(len(items), T, dtype=torch.bool)
        for row, (track, start) in enumerate(items):
            everywhere[row, : track["frames"] - start] = True
            if given[row]["style"]:
                first, end, _ = given[row]["style"]
                everywhere[row, first:end] = False
        conditions = []
        for row, item in enumerate(mine):
            (track, start), gets = items[item], given[item]
            found = torch.from_numpy(self.codes(track, start, T).T.astype(np.int64))
            codes[row, :, : found.shape[1]] = found
            valid[row, : found.shape[1]] = True
            conditions.append({"text": gets["text"]})
            if gets["melody"]:
                conditions[-1]["melody"] = self.melody(track, start, T)
            if gets["style"]:
                first, end, books = gets["style"]
                conditions[-1]["style"] = (found[:, first:end], books)
        return Batch(codes, valid, everywhere[list(mine)], conditions, [items[i][0] for i in mine], everywhere)

    def whole(self, items, T, settings):
        """As `collate`, with every condition that the settings have."""
        lengths = [min(T, track["frames"] - start) for track, start in items]
        return self.collate(items, T, [all_conditions(track["caption"], frames, self.rate, settings)
                                       for (track, _), frames in zip(items, lengths)])  # fmt: skip

    def batch(self, step, settings, T, rank=0, ranks=1):
        """One rank's share of a step's batch: a pure function of (seed, step), whatever the number of ranks.

        Tracks come up in proportion to their length.
        """
        rng = np.random.default_rng([settings.seed, step])
        items, given = [], []
        for row, frame in enumerate(rng.integers(self.ends[-1], size=settings.batch_size)):
            track = self.tracks[np.searchsorted(self.ends, frame, side="right")]
            draw = np.random.default_rng([settings.seed, step, row + 1])  # row 0 would repeat the batch's own numbers
            items.append((track, int(draw.integers(max(0, track["frames"] - T) + 1))))
            frames = min(T, track["frames"])
            given.append(draw_conditions(track["caption"], track["metadata"], frames, self.rate, draw, settings))
        share = settings.batch_size // ranks
        return self.collate(items, T, given, range(rank * share, (rank + 1) * share))

    def segments(self, T, most=0):
        """Every track in consecutive pieces of T frames, as (track, first frame); `most` of them, evenly spread."""
        pieces = [(track, start) for track in self.tracks for start in range(0, track["frames"], T)]
        if most and most < len(pieces):
            pieces = [pieces[i] for i in np.linspace(0, len(pieces) - 1, most).round().astype(int)]
        return pieces

    def batches(self, T, batch_size, settings, rank=0, ranks=1):
        """One rank's share of `segments` in batches, each with all conditions and nothing dropped.

        Every rank gets the same number of batches, as FSDP needs; a rank that has none left gets one all padding.
        """
        pieces = self.segments(T, settings.valid_items)
        for first in range(0, len(pieces), batch_size * ranks):
            chosen = pieces[first + rank * batch_size :][:batch_size]
            batch = self.whole(chosen or pieces[:1], T, settings)
            nothing = torch.zeros_like(batch.valid)
            yield batch if chosen else batch._replace(valid=nothing, scored=nothing)


def unigram_ce(folder):
    """Held-out cross-entropy in nats, float [K], of the best model that knows only how often each code occurs."""
    counts, codec = read_array(Path(folder, "counts.npy")), load_meta(folder)["codec"]
    if counts.dtype != np.int64 or counts.shape != (2, codec["K"], codec["card"]) or counts.min() < 0:
        raise UserError(f"{folder}: counts.npy does not agree with meta.json; prepare the data again")
    train, valid = counts
    p = train + 1.0
    return -(valid * np.log(p / p.sum(1, keepdims=True))).sum(1) / valid.sum(1).clip(min=1)


def fingerprint(folder):
    """A number that differs, as good as surely, between data sets; of a shard only the size and the counts go in."""
    crc = 0
    for path in sorted(path for path in Path(folder).iterdir() if path.is_file()):
        content = b"" if path.match("train_*.npy") or path.match("valid_*.npy") else path.read_bytes()
        crc = zlib.crc32(f"{path.name} {path.stat().st_size}".encode() + content, crc)
    return crc


# ---------------------------------------------------------------------------------------------------- check


def check(folder, codec_weights=""):
    """Prints what is in a data set; returns the number of problems found."""
    meta, problems, seen = load_meta(folder), [], {}
    rate, codec = meta["codec"]["frame_rate"], load_codec(meta["codec"]["name"], codec_weights)
    quiet = codec.encode(torch.zeros(1, codec.channels, codec.sample_rate))[0, :, codec.frame_rate // 2].cpu().numpy()
    problems += damage(folder)
    print(f"{folder}: {meta['codec']['id']}, card {meta['codec']['card']}, {rate} frames/s")
    for split in ("train", "valid"):
        side = Tokens(folder, split)
        seconds = np.array([track["frames"] for track in side.tracks]) / rate
        uncaptioned = sum(not track["caption"] for track in side.tracks)
        silent = total = 0
        for track in side.tracks:
            codes = side.shards[track["shard"]][track["first"] : track["first"] + track["frames"]]
            total += len(codes)
            silent += int((codes == quiet).all(1).sum())
            if codes.max() >= side.card:
                bad = int((codes >= side.card).any(1).argmax())
                problems.append(f"{track['name']}: token {codes[bad].max()} at frame {bad} is out of range")
            twin = seen.setdefault(hashlib.sha1(codes.tobytes()).digest(), (split, track["name"]))
            if twin[0] != split:
                problems.append(f"{track['name']} in {split} is the same music as {twin[1]} in {twin[0]}")
        print(
            f"{split}: {len(seconds)} tracks, {seconds.sum() / 60:.1f} minutes; seconds a track: {seconds.min():.1f} to"
            f" {seconds.max():.1f}, median {np.median(seconds):.1f}; {uncaptioned} without caption;"
            f" {100 * silent / total:.1f}% silent frames"
        )
    skipped = (Path(folder) / "skipped.jsonl").read_text().splitlines()
    print(f"skipped: {len(skipped)}")
    for problem in problems[:20]:
        print(f"problem: {problem}")
    print(f"{len(problems)} problems" if problems else "no problems")
    return len(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("prepare", help="encode a folder or a manifest into token shards",
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    command.add_argument("music", help="a folder of audio, or a JSONL manifest")
    command.add_argument("--out", required=True, help="the data set's new folder")
    command.add_argument("--codec", default="tiny", help="tiny, encodec_24khz[:1.5|3|6|12] or musicgen_32khz; any with"
                         " :stereo")  # fmt: skip
    command.add_argument("--codec_weights", default="", help="file or folder with the codec's weights")
    command.add_argument("--workers", type=int, default=0, help="processes; 0: one for each core")
    command.add_argument("--valid_fraction", type=float, default=0.05, help="share of the tracks held out")
    command.add_argument("--min_seconds", type=float, default=1.0, help="shorter tracks are skipped")
    command.add_argument("--no-captions", action="store_true", help="accept music of which no track has a caption")
    command = commands.add_parser("check", help="report durations, captions, silence, duplicates, bad tokens")
    command.add_argument("data", help="a prepared data set")
    command.add_argument("--codec_weights", default="", help="file or folder with the codec's weights")
    args = parser.parse_args()
    if "data" in args:
        sys.exit(1 if check(args.data, args.codec_weights) else 0)
    prepare(args.music, args.out, args.codec, args.codec_weights, args.workers, args.valid_fraction,
            args.min_seconds, captions=not args.no_captions)  # fmt: skip


if __name__ == "__main__":
    config.run(main)
