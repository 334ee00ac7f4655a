"""Read and check the files of a prepared data set, data/NAME/.

    meta.json                codec, sizes, checksums, the request that made it, and `reconstruction`, the codec's error
    train_000.npy            uint16 [frames, K]; a shard has at most 100 million frames, or one track
    train_000_melody.npy     uint8 [frames], the strongest pitch class of each frame, 12 for silence
    train_000.jsonl          one line per track: name, path, file hash, first frame in the shard, frames, caption,
                             metadata ...
    valid_000.*              the held-out tracks
    counts.npy               int64 [2, K, card], how often each code occurs in train and in valid
    tokenizer.model          SentencePiece, trained on the captions

Letters: K codebooks, `card` their size.
"""

import json
import math
import os
import re
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import sentencepiece

import codec
from common import UserError, find_beside, first_line, load_checkpoint, quote
from conditioning import join_sentences

DATA_FORMAT = 2
MIN_HELD_OUT = 10  # tracks that the metrics need; with fewer, chance decides


def read_meta(folder):
    """Read meta.json. Raises UserError if it is missing or damaged."""
    path = Path(folder) / "meta.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a prepared data set; make one with: python prepare.py MUSIC --out"
                        f" {quote(folder)}")  # fmt: skip
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != DATA_FORMAT:
            raise ValueError(f"format {meta['format']}, but this code reads {DATA_FORMAT}")
        sizes = [meta["codec"][key] for key in ("K", "card", "frame_rate")]
        sizes += [meta[split]["frames"] for split in ("train", "valid")]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"sizes must be integers above 0, not {sizes}")
        if not type(meta["codec"]["name"]) is type(meta["codec"]["id"]) is str:
            raise ValueError("the codec has no name or id")
        if type(meta.get("checksums", {})) is not dict:
            raise ValueError("checksums must be an object")
        for name, *figures in meta.get("reconstruction", []):  # data sets of older versions have none
            if type(name) is not str or [type(figure) for figure in figures] != [float, float]:
                raise ValueError("reconstruction must be a list of a name and two figures per track")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: damaged or of another version ({first_line(error)}); prepare the data again"
        ) from None
    return meta


def read_tokenizer(folder):
    """Return the bytes of a data set's SentencePiece model."""
    path = Path(folder, "tokenizer.model")
    try:
        content = path.read_bytes()
        sentencepiece.SentencePieceProcessor(model_proto=content).encode("music")  # an empty model fails only here
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); prepare the data again") from None
    return content


def read_tracks(path, frames):
    """Read a shard's .jsonl. Raises UserError if it is damaged or a track is outside the shard's `frames`."""
    try:
        tracks = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for track in tracks:
            captions, numbers = captions_of(track), [track.get(key, 0) for key in ("level", "clipped")]
            first, frames_of_track = track["first"], track["frames"]
            has_schema = (
                type(captions) is list and captions and type(track["metadata"]) is dict
                and all(type(text) is str for text in (track["name"], track["path"], track["caption"], *captions))
                and type(track.get("group", "")) is str
                and all(type(number) in (int, float) for number in numbers) and type(track.get("hash", 0)) is int
                and type(first) is type(frames_of_track) is int
            )  # fmt: skip
            if not has_schema:
                raise ValueError(f"{track['name']}: a value has the wrong type")
            if not 0 <= first < first + frames_of_track <= frames:
                raise ValueError(f"{track['name']}: outside its shard")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({first_line(error)}); prepare the data again") from None
    return tracks


def captions_of(track):
    """Return all captions of a track, or [""]."""
    return track.get("captions", [track["caption"]])


def text_of(track):
    """Return the caption of a track or, without one, its metadata."""
    return track["caption"] or join_sentences(f"{key}: {value}" for key, value in track["metadata"].items())


def clean_text(text):
    """Return text as one line, without invisible characters: controls, zero-width characters, direction marks.

    Joiners (U+200C, U+200D) stay after letters of scripts that need them, and within emoji.
    """
    cleaned = ""
    for c in text:
        category, is_joiner = unicodedata.category(c), c in "\u200c\u200d"
        if c.isspace() or category in ("Cs", "Co", "Cn"):
            cleaned += " "
        elif category not in ("Cc", "Cf") or is_joiner and cleaned[-1:] > "\u036f":  # beyond Latin
            cleaned += c
    return " ".join(cleaned.split())


def words_of(texts):
    """Return the set of words in the texts, with the tokenizer's normalization and case folding."""
    folded = (unicodedata.normalize("NFKC", text).casefold() for text in texts)
    return {word for text in folded for word in re.findall(r"\w+", text)}


def read_array(path, **options):
    try:
        return np.load(path, **options)
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(f"{path}: cannot be read ({first_line(error)}); prepare the data again") from None


class ArrayFile:
    """An array in a .npy file, read in slices: file[a:b]. Raises UserError if the file becomes shorter.

    A memory map would read far ahead: 1.2 ms per item from a cold disk instead of 0.1 ms (dev/LOG.md). The file stays
    open, so a running training keeps its data when the data set is replaced.
    """

    def __init__(self, path):
        self.path, array = path, read_array(path, mmap_mode="r")
        if np.isfortran(array):
            raise UserError(f"{path}: in column order; prepare the data again")
        self.shape, self.dtype, self.offset = array.shape, array.dtype, array.offset
        self.file = open(path, "rb", buffering=0)

    def __reduce__(self):  # for workers that are not forked
        return ArrayFile, (self.path,)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, rows):
        first, end, _ = rows.indices(len(self))
        row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        offset, size = self.offset + first * row_bytes, (end - first) * row_bytes
        if hasattr(os, "pread"):  # leaves the file's position alone, which forked workers share
            content = os.pread(self.file.fileno(), size, offset)
        else:
            self.file.seek(offset)
            content = self.file.read(size)
        if len(content) < size:
            raise UserError(f"{self.path}: shorter than when it was opened; prepare the data again")
        return np.frombuffer(content, self.dtype).reshape(-1, *self.shape[1:])


def split_tracks(tracks, valid_fraction):
    """Return the names of held-out tracks: those whose hash is below the fraction, but never none or all tracks.

    Tracks with the same "group" stay together. The "split" of a track, train or valid, overrides the fraction.
    """
    fixed, hashes = {track["split"] for track in tracks if "split" in track}, hash_groups(tracks)
    n = sum(value < valid_fraction * 2**32 for value in hashes.values())
    n = min(max("valid" not in fixed, n), len(hashes) - ("train" not in fixed))
    groups = set(list(hashes)[: max(0, n)])
    names = {track["name"] for track in tracks
             if (track["split"] == "valid" if "split" in track else group_name(track) in groups)}  # fmt: skip
    if not 0 < len(names) < len(tracks):
        raise UserError(f"{len(names)} of {len(tracks)} tracks would be held out, because of their group or split. Use"
                        ' other groups (--group), or mark tracks with "split": "train" or "valid"')  # fmt: skip
    return names


def group_name(track):
    return track.get("group", track["name"])


def group_of(name, by):
    """Return the group of a track: by "folder" or, by "prefix", its name without a part's number: song_01 -> song."""
    path = Path(name)
    if by == "folder":
        return str(path.parent)
    words = "part|pt|seg|segment|chunk|clip|cut|slice|take|excerpt|section|v"
    part = rf"[ _.\-(\[]+({words})?[ _.\-]*\d+s?[)\]]?$"
    return str(path.parent / (re.sub(part, "", path.stem, flags=re.IGNORECASE) or path.stem))


def hash_groups(tracks):
    """Return {group of tracks without a "split": 32-bit hash}, in the order of the hashes."""
    groups = {group_name(track) for track in tracks if "split" not in track}
    hashes = {group: zlib.crc32(os.fsencode(group)) for group in groups}
    return dict(sorted(hashes.items(), key=lambda item: (item[1], item[0])))


def propose_fraction(tracks):
    """Return (a --valid_fraction, the number of tracks that it holds out).

    The number is MIN_HELD_OUT, or 1 of 3 tracks if there are fewer than 2 * MIN_HELD_OUT.
    """
    n = MIN_HELD_OUT if len(tracks) >= 2 * MIN_HELD_OUT else max(1, len(tracks) // 3)
    values = list(hash_groups(tracks).values())
    value = values[min(n, len(values)) - 1] if values else 0
    for digits in range(2, 10):
        fraction = (value * 10**digits // 2**32 + 1) / 10**digits
        if len(split_tracks(tracks, fraction)) == n:
            break
    return fraction, len(split_tracks(tracks, fraction))


def codec_of_model(checkpoint, weights=""):
    """Return (name, weights) of the codec of a checkpoint. Raises UserError if the weights are not the model's."""
    saved = load_checkpoint(checkpoint)
    name = saved["codec"]["name"]
    weights = weights or find_beside(saved["settings"]["codec_weights"], checkpoint)
    if (loaded := codec.load_codec(name, weights).id) != saved["codec"]["id"]:
        raise UserError(f"--model {checkpoint}: needs codec {saved['codec']['id']}, but {weights or name} is {loaded};"
                        " pass its --codec_weights")  # fmt: skip
    return name, weights


def load_matching_codec(folder, name, weights=""):
    """Load the codec called `name`. Raises UserError if the data set was prepared with another one."""
    loaded, expected = codec.load_codec(name, weights), read_meta(folder)["codec"]["id"]
    if loaded.id != expected:
        raise UserError(f"{folder} was prepared with codec {expected}, but --codec={name} is {loaded.id};"
                        " pass the same --codec and --codec_weights, or prepare the data again")  # fmt: skip
    return loaded


def unigram_ce(folder):
    """Return the held-out cross-entropy in nats, float [K], of predicting codes by their frequency alone."""
    counts, info = read_array(Path(folder, "counts.npy")), read_meta(folder)["codec"]
    if counts.dtype != np.int64 or counts.shape != (2, info["K"], info["card"]) or counts.min() < 0:
        raise UserError(f"{folder}: counts.npy does not match meta.json; prepare the data again")
    train, valid = counts
    p = train + 1.0
    return -(valid * np.log(p / p.sum(1, keepdims=True))).sum(1) / valid.sum(1).clip(min=1)
