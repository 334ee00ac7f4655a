"""Report the contents of a prepared data set and its problems, each with a remedy."""

import hashlib
import json
import re
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import sentencepiece

from conditioning import SILENCE
from config import FIELDS
from data import TokenDataset
from dataprep.shards import captions_of, read_meta, read_tokenizer, text_of


def check(folder):
    """Print a report on a data set and its problems. Return the number of problems."""
    n = 0
    for find_problems in (find_damage, print_report):
        problems = find_problems(folder)
        for problem in problems[:20]:
            print(f"problem: {problem}")
        n += len(problems)
    print(f"{n} problems" if n else "no problems")
    return n


def find_damage(folder):
    """Return one line for each file that is missing or has another checksum than when it was written."""
    checksums = read_meta(folder).get("checksums", {})
    paths = [Path(folder, name) for name in checksums]
    return [f"{path}: missing, or changed since it was prepared (wrong checksum). Prepare the data again"
            for path in paths if not path.is_file() or checksum(path) != checksums[path.name]]  # fmt: skip


def checksum(path):
    """Return the CRC-32 of a file. It reads about 1 GB/s."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def print_report(folder):
    """Print the contents of a data set. Return its problems: invalid codes, and duplicates across the splits."""
    splits = {split: TokenDataset(folder, split) for split in ("train", "valid")}
    codec, rate = read_meta(folder)["codec"], splits["train"].frame_rate
    tracks = [track for dataset in splits.values() for track in dataset.tracks]
    print(f"{folder}: codec {codec['id']}, {codec['card']} codes per codebook, {rate} frames/s")
    for split, dataset in splits.items():
        seconds = np.array([track["frames"] for track in dataset.tracks]) / rate
        print(f"{split}: {len(seconds)} tracks, {seconds.sum() / 60:.1f} minutes; seconds per track:"
              f" {seconds.min():.1f} to {seconds.max():.1f}, median {np.median(seconds):.1f}")  # fmt: skip
    print_skipped(folder)
    print_padding(splits["train"])
    print_captions(tracks, read_tokenizer(folder))
    print_sound(splits)
    return check_codes(splits)


def print_skipped(folder):
    """Print how many files were skipped, by reason, with one example each."""
    path, groups = Path(folder, "skipped.jsonl"), {}
    try:
        skipped = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for entry in skipped:
            reason = entry["reason"].replace(f"{entry['path']}: ", "")
            groups.setdefault(re.sub(r"[\d.]+", "N", reason), []).append((entry["path"], reason))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return print(f"{path}: damaged, so the skipped files are unknown. Prepare the data again")
    print(f"skipped: {len(skipped)} files" + (f", listed in {path}" if skipped else ""))
    for group in sorted(groups.values(), key=len, reverse=True):
        print(f"  {len(group)}: {group[0][1]} ({group[0][0]})")


def print_padding(dataset):
    """Print the share of padding in training items of the default length, if it is above 1 %."""
    segment, frames = FIELDS["segment"].default, [track["frames"] for track in dataset.tracks]
    if (padding := dataset.padding_share(segment * dataset.frame_rate)) > 0.01:
        print(f"padding: {100 * padding:.0f} % of training items of {segment:g} s; the median track lasts"
              f" {np.median(frames) / dataset.frame_rate:.1f} s. Train with a lower --segment")  # fmt: skip


def print_captions(tracks, tokenizer):
    """Print how many tracks have captions, which metadata the other tracks use, and tokenizer statistics."""
    uncaptioned = [track for track in tracks if not track["caption"]]
    line = f"captions: {len(tracks) - len(uncaptioned)} of {len(tracks)} tracks"
    if uncaptioned:
        keys = Counter(key for track in uncaptioned for key in track["metadata"])
        estimated = Counter(key for track in uncaptioned for key in track.get("measured", ()))
        counts = (f"{key} ({n}" + f", {estimated[key]} estimated" * (key in estimated) + ")"
                  for key, n in keys.most_common(12))  # fmt: skip
        line += f"; the other {len(uncaptioned)} " + (f"use metadata: {', '.join(counts)}" if keys else "have no text")
    print(line)
    texts = [caption for track in tracks for caption in captions_of(track) if caption]
    texts += [text_of(track) for track in uncaptioned if track["metadata"]]
    if not texts:
        return
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    tokens = [processor.encode(text, out_type=str) for text in texts]
    lengths, limit = [len(pieces) for pieces in tokens], FIELDS["text_max_tokens"].default
    is_spelled = [bool(re.fullmatch("[a-zA-Z]|<0x..>", piece)) for pieces in tokens for piece in pieces]
    spelled = np.mean(is_spelled or [0])
    words = Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    print(f"tokens: median {np.median(lengths):.0f} per text, 95 % have at most {np.percentile(lengths, 95):.0f};"
          f" {100 * spelled:.0f} % are single letters or bytes;"
          f" most frequent words: {', '.join(word for word, _ in words.most_common(10))}")  # fmt: skip
    if spelled > 0.3:
        print("  Too many letters and bytes: prepare with a higher --vocab_size, or use fewer different words")
    if n_cut := sum(length > limit for length in lengths):
        print(f"  {n_cut} of {len(texts)} texts have more than {limit} tokens and are cut. Shorten them, or train with"
              f" --text_max_tokens={max(lengths)}")  # fmt: skip


def print_sound(splits):
    """Print levels, silence and clipping."""
    tracks = [track for dataset in splits.values() for track in dataset.tracks if "level" in track]
    if not tracks:
        return  # data sets of older versions have no levels
    melodies = [notes for dataset in splits.values() for notes in dataset.melodies]
    silent = sum(int((notes[:] == SILENCE).sum()) for notes in melodies) / sum(map(len, melodies))
    low, middle, high = np.percentile([track["level"] for track in tracks], (5, 50, 95))
    print(f"sound: median level {middle:.0f} dB (5 % below {low:.0f}, 5 % above {high:.0f});"
          f" {100 * silent:.1f} % silence")  # fmt: skip
    if silent > 0.1:
        print("  Much silence: a model learns to generate it. Cut it from the tracks")
    if high - low > 20:
        print("  Very different levels: a model learns to generate them. Normalize the loudness of the tracks")
    if clipped := [track["name"] for track in tracks if track["clipped"] > 1e-3]:
        print(f"  Clipped: {len(clipped)} tracks, for example {clipped[0]}. Use a better source")


def check_codes(splits):
    """Print the number of duplicates. Return the problems: invalid codes, and duplicates across the splits."""
    tracks_by_hash, problems = defaultdict(list), []
    for split, dataset in splits.items():
        for track in dataset.tracks:
            codes = dataset.shards[track["shard"]][track["first"] : track["first"] + track["frames"]]
            if codes.max() >= dataset.card:
                frame = int((codes >= dataset.card).any(1).argmax())
                problems.append(f"{track['name']}: code {codes[frame].max()} at frame {frame} is out of range")
            tracks_by_hash[hashlib.sha1(codes.tobytes()).digest()].append((split, track["name"]))
    duplicates = [(first, other) for first, *others in tracks_by_hash.values() for other in others]
    if duplicates:
        (_, a), (_, b) = duplicates[0]
        print(f"duplicates: {len(duplicates)} tracks, for example {b} = {a}. Remove one of each pair")
    problems += [f"{b} in {b_split} is the same music as {a} in {a_split}. Remove one"
                 for (a_split, a), (b_split, b) in duplicates if a_split != b_split]  # fmt: skip
    return problems
