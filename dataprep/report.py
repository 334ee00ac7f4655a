"""Report the contents of a prepared data set and its problems, each with a remedy."""

import hashlib
import json
import re
import sys
import zlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

from audio import load_audio, mel_spectrogram
from common import UserError
from conditioning import SILENCE, chromagram, strongest
from config import FIELDS
from data import TokenDataset
from dataprep.shards import MIN_HELD_OUT, captions_of, group_of, propose_fraction, read_meta, read_tokenizer, text_of

COMPARED_TRACKS, COMPARED_SECONDS = 8, 5  # MusicGen's codec decodes 5 s in 2 s on one core
DEMO_FIGURES = "2.3 dB and 69 %"  # by `measure_reconstruction` with 200 held-out clips
KHZ = {"tiny": 16, "encodec_24khz": 24, "musicgen_32khz": 32}


def check(folder):
    """Print a report on a data set and its problems. Return the number of problems."""
    n = 0
    for find_problems in (find_damage, print_report):
        problems = find_problems(folder)
        for problem in problems[:20]:
            print(f"problem: {problem}")
        n += len(problems)
    print(f"{n} problems" if n else "no damage")
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
    meta, rate = read_meta(folder), splits["train"].frame_rate
    codec = meta["codec"]
    tracks = [track for dataset in splits.values() for track in dataset.tracks]
    print(f"{folder}: codec {codec['id']}, {codec['card']} codes per codebook, {rate} frames/s")
    for split, dataset in splits.items():
        seconds = np.array([track["frames"] for track in dataset.tracks]) / rate
        print(f"{split}: {len(seconds)} tracks, {seconds.sum() / 60:.1f} minutes; seconds per track:"
              f" {seconds.min():.1f} to {seconds.max():.1f}, median {np.median(seconds):.1f}")  # fmt: skip
    n_skipped = print_skipped(folder)
    print_padding(splits["train"])
    print_captions(tracks, read_tokenizer(folder))
    print_songs(splits)
    print_sound(splits)
    print_codec(codec, meta.get("reconstruction"))
    problems = check_codes(splits)
    print_verdict(splits, codec["name"], n_skipped)
    return problems


def print_skipped(folder):
    """Print how many files were skipped, by reason, with one example each. Return the number, or 0 if it is unknown."""
    path, groups = Path(folder, "skipped.jsonl"), {}
    try:
        skipped = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        for entry in skipped:
            reason = entry["reason"].replace(f"{entry['path']}: ", "")
            groups.setdefault(re.sub(r"[\d.]+", "N", reason), []).append((entry["path"], reason))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        print(f"{path}: damaged, so the skipped files are unknown. Prepare the data again")
        return 0
    print(f"skipped: {len(skipped)} files" + (f", listed in {path}" if skipped else ""))
    for group in sorted(groups.values(), key=len, reverse=True):
        print(f"  {len(group)}: {group[0][1]} ({group[0][0]})")
    return len(skipped)


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


def print_songs(splits):
    """Print how many songs seem to have files in both splits, by names that differ only in a final number."""
    songs = {split: defaultdict(list) for split in splits}
    for split, dataset in splits.items():
        for track in dataset.tracks:
            if "group" not in track:
                songs[split][group_of(track["name"], "prefix")].append(track["name"])
    shared = songs["train"].keys() & songs["valid"].keys()
    if shared and len(songs["train"].keys() | songs["valid"].keys()) > 1:  # one group: numbers instead of names
        train, valid = (songs[split][min(shared)][0] for split in ("train", "valid"))
        print(f"names: {len(shared)} songs seem to be in both splits, for example {train} in train and {valid} in"
              " valid, so the validation loss is too low. If these are parts of songs, prepare again with --replace"
              " and --group prefix, --group folder or a \"group\" in the manifest's lines")  # fmt: skip


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
    if cancelled := [track["name"] for track in tracks if track.get("cancels")]:
        print(f"  Channels cancel in a mix: {len(cancelled)} tracks, for example {', '.join(cancelled[:3])}. One"
              " channel is used for mono. Use a better source")  # fmt: skip
    if clipped := [track["name"] for track in tracks if track["clipped"] > 1e-3]:
        print(f"  Clipped: {len(clipped)} tracks, for example {clipped[0]}. Use a better source")


def measure_reconstruction(tracks, files, codec):
    """Compare excerpts of tracks with their codes, decoded. Return a list of [name, dB, share], one per track.

    dB       mean difference of the log-mel spectra, as in demo/README.md, but in dB
    share    of the chroma frames whose strongest pitch class stays the same

    files: {name of a track: its cache file}. The tracks are spread over the data set. Those whose audio file has been
    moved or changed are skipped.
    """
    numbers = np.linspace(0, len(tracks) - 1, min(COMPARED_TRACKS, len(tracks))).round().astype(int)
    bar = tqdm(numbers, desc="measuring the codec", unit="track", file=sys.stdout, delay=5)
    T, results = COMPARED_SECONDS * codec.frame_rate, []
    for track in (tracks[number] for number in bar):
        first = min(max(0, track["frames"] - T) // 2, 30 * codec.frame_rate)  # the middle, but read 35 s at most
        with np.load(files[track["name"]]) as cached:
            codes = torch.from_numpy(cached["codes"][first : first + T].T.astype(np.int64))
            scale = max(1, float(cached["peak"]))
        try:
            wav = load_audio(track["path"], codec.sample_rate, codec.channels, (first + T) * codec.hop)
        except UserError:
            continue
        decoded = codec.decode(codes[None])[0]
        wav = wav[:, first * codec.hop :][:, : decoded.shape[1]] / scale
        if wav.shape[1]:
            results.append([track["name"], *compare(wav, decoded[:, : wav.shape[1]], codec.sample_rate)])
    return results


def compare(wav, decoded, rate):
    """Return (dB, share), see `measure_reconstruction`, of two wavs [channels, samples]."""
    n_fft = rate * 64 // 1000
    pair = [torch.nn.functional.pad(x, (0, max(0, n_fft - x.shape[1]))) for x in (wav, decoded)]
    a, b = (mel_spectrogram(x, rate, n_fft, rate // 50) + 1e-4 * n_fft for x in pair)
    notes, decoded_notes = (strongest(chromagram(x.mean(0)[None], rate)[0]) for x in pair)
    return round(20 * (a / b).log10().abs().mean().item(), 2), round((notes == decoded_notes).float().mean().item(), 3)


def print_codec(codec, reconstruction):
    """Print how well the codec reconstructs this music, and its limits. reconstruction: as in meta.json, or None."""
    name, is_mono = codec["name"].split(":")[0], codec.get("channels", 1) == 1
    if reconstruction:
        names, errors, shares = zip(*reconstruction)
        print(f"codec: mean spectral error {np.mean(errors):.1f} dB (lower is better); the strongest pitch is kept in"
              f" {100 * np.mean(shares):.0f} % of frames ({len(names)} tracks; worst: {names[np.argmax(errors)]},"
              f" {max(errors):.1f} dB)")  # fmt: skip
        print(f"  For comparison, `tiny` on the demo's synthetic corpus: {DEMO_FIGURES}. The codec limits the quality"
              ' of a model: listen to the clips called "codec reconstruction" in the index.html of a run')  # fmt: skip
    else:
        print("codec: not compared with this music. To measure it, prepare the data again with --replace")
    if name in KHZ:
        print(f"  {KHZ[name]} kHz {'mono' if is_mono else 'stereo'}: nothing above {KHZ[name] // 2} kHz"
              + ", no stereo" * is_mono + "; not trained on voices" * (name == "tiny"))  # fmt: skip


def print_verdict(splits, codec_name, n_skipped):
    """Print the use that the data set is large enough for, and its limits."""
    tracks, n_held_out = splits["train"].tracks + splits["valid"].tracks, len(splits["valid"].tracks)
    minutes = sum(dataset.ends[-1] / dataset.frame_rate for dataset in splits.values()) / 60
    fine_tune = f"enough to fine-tune a model with codec {codec_name} (config/lora.py)"
    if codec_name == "tiny":
        fine_tune = ("enough to fine-tune demo/demo.pt (config/lora.py --init_from=demo/demo.pt; for a published model,"
                     " prepare again with --model)")  # fmt: skip
    if minutes < 10 or len(tracks) < 10:
        verdict = "enough to try the commands, too little to train on. Add music: at least 10 minutes and 10 tracks"
    elif minutes < 120:
        verdict = f"{fine_tune}, not to train from scratch"
    elif minutes < 6000:
        verdict = f"{fine_tune}, or to train a small model from scratch (config/demo.py)"
    else:
        verdict = "enough to train from scratch (config/small.py); MusicGen was trained on 20,000 hours"
    print(f"verdict, a rule of thumb: {minutes:.0f} minutes in {len(tracks)} tracks are {verdict}")
    if n_held_out < MIN_HELD_OUT:
        fraction, n = propose_fraction(tracks)
        remedy = f"Prepare again with --valid_fraction {fraction} --replace, which holds out {n} of {len(tracks)}"
        print(f"  held-out tracks: {n_held_out}. The metrics need {MIN_HELD_OUT}; with fewer, the validation loss is"
              f" noisy. {remedy if n > n_held_out else 'Add music'}"
              + f" (to hold out {MIN_HELD_OUT}, add tracks up to {2 * MIN_HELD_OUT})" * (n < MIN_HELD_OUT))  # fmt: skip
    if not any(track["caption"] for track in tracks):
        control = "only the metadata above" if any(track["metadata"] for track in tracks) else "no text"
        print(f"  no captions: {control} can steer the model. Write captions into NAME.txt next to each track")
    if n_skipped > 0.1 * (n_skipped + len(tracks)):
        print(f"  skipped: {n_skipped} of {n_skipped + len(tracks)} music files, for the reasons above")


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
