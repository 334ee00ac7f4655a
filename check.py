"""What is in a prepared data set, what a model will hear of it, and what is wrong with it, each with its remedy."""

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
from data import Tokens, captions_of, read_meta, read_tokenizer, text_of


def print_report(folder):
    """What is in a data set and what a model hears of it -> the problems found, each with its remedy."""
    splits = {split: Tokens(folder, split) for split in ("train", "valid")}
    codec, rate = read_meta(folder)["codec"], splits["train"].frame_rate
    tracks = [track for tokens in splits.values() for track in tokens.tracks]
    print(f"{folder}: {codec['id']}, card {codec['card']}, {rate} frames/s")
    for split, tokens in splits.items():
        seconds = np.array([track["frames"] for track in tokens.tracks]) / rate
        print(f"{split}: {len(seconds)} tracks, {seconds.sum() / 60:.1f} minutes; seconds a track:"
              f" {seconds.min():.1f} to {seconds.max():.1f}, median {np.median(seconds):.1f}")  # fmt: skip
    print_left_out(folder)
    print_padding(splits["train"])
    print_captions(tracks, read_tokenizer(folder))
    print_sound(splits)
    return look_at_codes(splits)


def print_left_out(folder):
    """By reason, the numbers in it apart, with one example."""
    path, kinds = Path(folder, "skipped.jsonl"), {}
    try:
        skipped = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for entry in skipped:
            reason = entry["reason"].replace(f"{entry['path']}: ", "")
            kinds.setdefault(re.sub(r"[\d.]+", "N", reason), []).append((entry["path"], reason))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return print(f"{path}: is damaged, so what was left out is not known")
    print(f"left out: {len(skipped)} files" + (f", listed in {path}" if skipped else ""))
    for alike in sorted(kinds.values(), key=len, reverse=True):
        print(f"  {len(alike)}: {alike[0][1]} ({alike[0][0]})")


def print_padding(tokens):
    """How much of training items would be padding, as tracks are shorter, if they were as long as usual."""
    segment, frames = FIELDS["segment"].default, [track["frames"] for track in tokens.tracks]
    if (padding := tokens.padding(segment * tokens.frame_rate)) > 0.01:
        median = np.median(frames) / tokens.frame_rate
        print(f"tracks are short, half of them below {median:.1f} s: {padding:.0%} of items of {segment:g} s would be"
              f" padding; train with a lower --segment")  # fmt: skip


def print_captions(tracks, tokenizer):
    """What a model hears of the texts: how many tracks have which, their tokens, how many are cut or spelled out."""
    texts = [caption for track in tracks for caption in captions_of(track) if caption]
    uncaptioned = [track for track in tracks if not track["caption"]]
    print(f"text: {len(tracks) - len(uncaptioned)} of {len(tracks)} tracks have captions", end="")
    if uncaptioned:
        keys = Counter(key for track in uncaptioned for key in track["metadata"])
        measured = Counter(key for track in uncaptioned for key in track.get("measured", ()))
        names = (f"{key} {n}" + f" ({measured[key]} measured)" * (key in measured) for key, n in keys.most_common(12))
        print(f"; of the others this is heard: {', '.join(names) or 'nothing'}", end="")
    print()
    texts += [text_of(track) for track in uncaptioned if track["metadata"]]
    if not texts:
        return
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    pieces = [processor.encode(text, out_type=str) for text in texts]
    lengths, limit = [len(one) for one in pieces], FIELDS["text_max_tokens"].default
    spelled = sum(is_spelled(piece) for one in pieces for piece in one) / max(1, sum(lengths))
    words = Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    print(f"{len(texts)} texts, of {np.median(lengths):.0f} tokens (95 % of them of at most"
          f" {np.percentile(lengths, 95):.0f}), {100 * spelled:.0f} % single letters or bytes;"
          f" commonest words: {', '.join(word for word, _ in words.most_common(10))}")  # fmt: skip
    if spelled > 0.3:
        print("so many letters say little; prepare with a higher --vocab_size, or give captions in fewer words")
    if cut := sum(length > limit for length in lengths):
        print(f"{cut} of {len(texts)} texts are longer than the {limit} tokens that a model hears of them;"
              f" train with --text_max_tokens={max(lengths)}, or shorten them")  # fmt: skip


def is_spelled(piece):
    return piece.startswith("<0x") or (len(piece) == 1 and piece.isascii() and piece.isalpha())


def print_sound(splits):
    """Levels, clipping and silence."""
    tracks = [track for tokens in splits.values() for track in tokens.tracks if "level" in track]
    if not tracks:
        return  # of a data set as it was prepared before levels were
    melodies = [notes for tokens in splits.values() for notes in tokens.melodies]
    silent = sum(int((notes[:] == SILENCE).sum()) for notes in melodies) / sum(map(len, melodies))
    low, middle, high = np.percentile([track["level"] for track in tracks], (5, 50, 95))
    print(f"sound: level {middle:.0f} dB (5 % below {low:.0f}, 5 % above {high:.0f}); {100 * silent:.1f} % silence")
    if silent > 0.1:
        print("that is much silence, and a model will learn it; cut it from the tracks")
    if high - low > 20:
        print("levels are far apart, and a model will learn all of them; bring the tracks to one loudness")
    if clipped := [track["name"] for track in tracks if track["clipped"] > 1e-3]:
        print(f"clipped: {len(clipped)} tracks, as {clipped[0]}; a better source of them will sound better")


def look_at_codes(splits):
    """Says which tracks are the same music -> the problems: such music in both splits, and tokens out of range."""
    alike, problems = defaultdict(list), []
    for split, tokens in splits.items():
        for track in tokens.tracks:
            codes = tokens.shards[track["shard"]][track["first"] : track["first"] + track["frames"]]
            if codes.max() >= tokens.card:
                bad = int((codes >= tokens.card).any(1).argmax())
                problems.append(f"{track['name']}: token {codes[bad].max()} at frame {bad} is out of range")
            alike[hashlib.sha1(codes.tobytes()).digest()].append((split, track["name"]))
    twins = [tracks for tracks in alike.values() if len(tracks) > 1]
    if twins:
        print(f"the same music more than once: {sum(map(len, twins)) - len(twins)} tracks, as {twins[0][1][1]}, which"
              f" is {twins[0][0][1]}; keep one")  # fmt: skip
    problems += [f"{name} in {split} is the same music as {first[1]} in {first[0]}; remove one"
                 for first, *others in twins for split, name in others if split != first[0]]  # fmt: skip
    return problems


def find_damage(folder):
    """What is not as `prepare` has left it, a line a file: tokens that are wrong sound like any others."""
    expected = read_meta(folder).get("checksums", {}).items()
    wrong = [name for name, crc in expected if not Path(folder, name).is_file() or checksum(Path(folder, name)) != crc]
    return [f"{Path(folder, name)}: is gone, or not as it was prepared (its checksum differs)" for name in wrong]


def check(folder):
    """Prints what is in a data set and what is wrong with it; returns the number of problems found."""
    problems = find_damage(folder)
    for problem in problems:
        print(f"problem: {problem}")
    found = print_report(folder)
    for problem in found[:20]:
        print(f"problem: {problem}")
    problems += found
    print(f"{len(problems)} problems" if problems else "no problems")
    return len(problems)


def checksum(path):
    """CRC-32 of a file, at about a gigabyte a second."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc
