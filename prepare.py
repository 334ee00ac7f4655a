"""Music on disk -> token shards, which data.py reads.

    python prepare.py MUSIC --out data/NAME      # a folder with captions in .txt or .json, or a JSONL manifest
    python prepare.py check data/NAME            # what is in it, and what is wrong with it

Tracks are held out by a hash of their path, so that adding tracks moves none to the other split. What is left out is
listed in skipped.jsonl with the reason. A preparation that was stopped resumes where it was.

Letters: K codebooks, T frames.
"""

import argparse
import codecs
import collections
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
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

import common
from codec import OTHER_SUFFIXES, SUFFIXES, encode_many, load_audio, load_codec
from common import UserError
from conditioning import CHROMA_RATE, SILENCE, melody_of
from config import FIELDS
from data import DATA_FORMAT, Tokens, captions_of, read_meta, read_tokenizer

SHARD_FRAMES = 100_000_000


# -------------------------------------------------------------------------------------------------- finding tracks


def read_text(path):
    """A text file in UTF-8, or in UTF-16 with its mark; raises UserError for what is neither."""
    content = path.read_bytes()
    is_utf16 = content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path}: is no text in UTF-8; save it as UTF-8")
    return text


def plain(text):
    """A caption on one line, without letters that nobody sees: controls, zero-width ones, marks of direction."""
    unseen = ("Cc", "Cf", "Cs", "Co", "Cn")
    return " ".join("".join(" " if unicodedata.category(c) in unseen else c for c in text).split())


def take_captions(entry, where):
    """Takes "caption", or "description" as audiocraft has it, out of an entry -> its captions, none empty."""
    found = entry.pop("description", None)
    found = entry.pop("caption", found)
    found = found if isinstance(found, list) else [found or ""]
    if not all(isinstance(caption, str) for caption in found):
        raise UserError(f'{where}: "caption" must be text, or a list of texts, not {found[0]!r}')
    return [caption for caption in map(plain, found) if caption]


def metadata_of(entry):
    """What an entry says besides: lists become text, and what is null or empty is left out."""
    texts = {key: ", ".join(map(str, value)) if isinstance(value, list) else value for key, value in entry.items()}
    return {key: value for key, value in texts.items() if value not in (None, "")}


def tracks_of_manifest(manifest):
    """JSONL lines {"path", "caption", ...}; paths are relative to the manifest, other keys are metadata."""
    try:
        lines = read_text(manifest).split("\n")
    except UserError:
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


def files_under(folder):
    """Every file in a folder, and in folders that are linked there, each once."""
    seen = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(root))
        yield from (Path(root, name) for name in files)


def tracks_of_folder(folder):
    for path in sorted(files_under(folder)):
        if path.suffix.lower() in SUFFIXES | OTHER_SUFFIXES:
            entry, text, sidecar = {}, path.with_suffix(".txt"), path.with_suffix(".json")
            if sidecar.is_file():
                try:
                    entry = json.loads(read_text(sidecar))
                except json.JSONDecodeError as error:
                    raise UserError(f"{sidecar}: not JSON ({error})") from None
                if not isinstance(entry, dict) or not isinstance(entry.get("attributes", {}), dict):
                    raise UserError(f'{sidecar}: must hold an object, {{"caption": "...", "genre": "jazz"}}')
            if text.is_file():
                entry["caption"] = read_text(text)
            yield path, entry, sidecar


def find_tracks(music, captions_needed):
    """-> a list of {"path", "melody_from", "name", "caption", "metadata"}; the name is the path relative to the music.

    A track of several captions has "captions" too, and the first of them is its "caption". melody_from is the file
    whose melody is the track's: a stem that the entry names, relative to the manifest or the track's folder, or the
    track itself. The metadata are the other keys, those of an inner "attributes" among them.
    """
    music = Path(music)
    if not music.exists():
        raise UserError(f"{music}: no such folder or manifest")
    root = music if music.is_dir() else music.parent
    tracks = []
    for path, entry, where in tracks_of_folder(music) if music.is_dir() else tracks_of_manifest(music):
        captions = take_captions(entry, where)
        attributes = entry.pop("attributes", {})
        stem = entry.pop("melody_from", None)
        stem = (path.parent if music.is_dir() else root) / str(stem) if stem else path
        if not stem.is_file():
            raise UserError(f"{where}: melody_from {stem}: no such file")
        name = os.path.relpath(path, root)
        track = dict(path=str(path), melody_from=str(stem), name=name, caption=captions[0] if captions else "",
                     metadata=metadata_of({**entry, **attributes}))  # fmt: skip
        tracks.append(track | ({"captions": captions} if len(captions) > 1 else {}))
    if not tracks:
        raise UserError(f"{music}: holds no audio ({', '.join(sorted(SUFFIXES))})")
    name, times = Counter(track["name"] for track in tracks).most_common(1)[0]
    if times > 1:
        raise UserError(f"{music}: names {name} more than once; each track is needed once")
    if captions_needed and not any(track["caption"] for track in tracks):
        raise UserError(
            f"{music}: none of its {len(tracks)} tracks has a caption; put one beside each as a .txt of the same name"
            f' (in a manifest, as "caption"), or pass --no-captions to train without text'
        )
    return tracks


def split_tracks(tracks, valid_fraction):
    """The names held out: those whose hash falls below the fraction, and never none nor all of them."""
    ranked = sorted(tracks, key=lambda track: (zlib.crc32(os.fsencode(track["name"])), track["name"]))
    below = sum(zlib.crc32(os.fsencode(track["name"])) < valid_fraction * 2**32 for track in ranked)
    return {track["name"] for track in ranked[: min(max(1, below), len(ranked) - 1)]}


# ------------------------------------------------------------------------------------------------------- encoding


def start_worker(codec_name, weights):
    global codec
    if multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)  # as many workers as cores, each on its own, are three times as fast as all on one file
    codec = load_codec(codec_name, weights)


def read_track(job):
    """-> (wav float32 [channels, samples], melody uint8 [T]), or the reason why the track is left out."""
    path, melody_from, min_seconds = job
    if Path(path).suffix.lower() in OTHER_SUFFIXES:
        return f"{Path(path).suffix} is read by no library here; convert it to flac or wav"
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


def encode(codec, tracks):
    """A list of what `read_track` gives -> the same with codes uint16 [T, K] in the place of each wav."""
    readable = [track for track in tracks if type(track) is tuple]
    codes = iter(encode_many(codec, [torch.from_numpy(wav) for wav, _ in readable]))
    return [track if type(track) is str else (next(codes).T.cpu().numpy().astype(np.uint16), track[1])
            for track in tracks]  # fmt: skip


def read_and_encode(job):
    return encode(codec, [read_track(job)])[0]


def encode_in_parallel(jobs, codec, codec_name, codec_weights, workers):
    """What `encode` gives for each job, in order.

    Workers read the files. They encode them too, but for a GPU, which encodes those of many workers together. A single
    worker is this process.
    """
    if workers == 1 and codec.device.type == "cpu":
        start_worker(codec_name, codec_weights)
        yield from map(read_and_encode, jobs)
        return
    on_gpu, together = codec.device.type == "cuda", 16
    room = threading.Semaphore(2 * workers + together)  # tracks that wait in memory, at most

    def jobs_as_there_is_room():
        for job in jobs:
            room.acquire()
            yield job

    with multiprocessing.get_context("spawn").Pool(workers, start_worker, (codec_name, codec_weights)) as pool:
        try:
            found = pool.imap(read_track if on_gpu else read_and_encode, jobs_as_there_is_room())
            while group := list(itertools.islice(found, together if on_gpu else 1)):
                room.release(len(group))
                yield from encode(codec, group) if on_gpu else group
        finally:
            room.release(len(jobs) + 1)  # the pool cannot end while its thread waits here


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
            for found in encode_in_parallel(jobs, codec, codec_name, codec_weights, workers):
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


# -------------------------------------------------------------------------------------------------------- writing


def count_codes(tokens, tracks, card):
    """How often each code occurs in tracks of `tokens`, uint16 [frames, K] -> int64 [K, card]."""
    counts = np.zeros((tokens.shape[1], card), dtype=np.int64)
    for track in tracks:
        for k, column in enumerate(tokens[track["first"] : track["first"] + track["frames"]].T):
            counts[k] += np.bincount(column, minlength=card)
    return counts


def train_tokenizer(tracks, vocab_size):
    """SentencePiece (BPE, case folded, byte fallback) on every caption and 'key: value' of the metadata -> bytes."""
    sentences = [caption for track in tracks for caption in captions_of(track) if caption]
    sentences += sorted({f"{key}: {value}" for track in tracks for key, value in track["metadata"].items()})
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences or ["music"]), model_writer=model, vocab_size=vocab_size,
        model_type="bpe", normalization_rule_name="nmt_nfkc_cf", byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, max_sentence_length=2**30,
    )  # fmt: skip
    return model.getvalue()


def write_split(folder, split, tracks, tokens, melody):
    """One split's shards; `tokens` is uint16 [frames, K], `melody` uint8 [frames]; a track begins at its `first`."""
    shard, pending = 0, collections.deque(tracks)
    while pending:
        chosen, frames = [], 0
        while pending and (not chosen or frames + pending[0]["frames"] <= SHARD_FRAMES):
            chosen.append(pending.popleft())
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


def checksum(path):
    """CRC-32 of a file, at about a gigabyte a second."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**24):
            crc = zlib.crc32(block, crc)
    return crc


def prepare(music, out, codec_name="tiny", codec_weights="", workers=0, valid_fraction=0.05, min_seconds=1.0,
            captions=True, vocab_size=1000):  # fmt: skip
    """Encodes every track once. All is written beside `out` and renamed at the end; what is done survives a stop."""
    out = Path(out)
    if workers < 0 or not 0 <= valid_fraction <= 1:
        raise UserError("--workers must be 0 or above, and --valid_fraction between 0 and 1")
    codec = load_codec(codec_name, codec_weights).to("cuda" if torch.cuda.is_available() else "cpu")
    tracks = find_tracks(music, captions)
    contents = [[t["name"], t["melody_from"], captions_of(t), t["metadata"],
                 os.path.getsize(t["path"]), os.path.getsize(t["melody_from"])] for t in tracks]  # fmt: skip
    digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    request = dict(music=str(Path(music).resolve()), tracks=digest, codec=codec.id, min_seconds=min_seconds,
                   valid_fraction=valid_fraction)  # fmt: skip
    if (out / "meta.json").exists():
        if read_meta(out).get("request") == request:
            return print(f"{out} is prepared already")
        raise UserError(f"{out}: holds other data; remove it or choose another --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already and is no data set; choose another --out")
    work = out.with_name(out.name + ".partial")
    if (work / "request.json").exists() and json.loads((work / "request.json").read_text()) != request:
        raise UserError(f"{work}: was begun with other tracks or another codec; remove it to start again")
    held_out = split_tracks(tracks, valid_fraction)  # drawn again once it is known which tracks can be used
    tokenizer = train_tokenizer([track for track in tracks if track["name"] not in held_out], vocab_size)
    work.mkdir(parents=True, exist_ok=True)
    common.write_json(work / "request.json", request)

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
    splits = {"train": [track for track in kept if track["name"] not in held_out],
              "valid": [track for track in kept if track["name"] in held_out]}  # fmt: skip
    tokens = np.memmap(work / "tokens.bin", np.uint16, "r", shape=(first, codec.K))
    melody = np.memmap(work / "melody.bin", np.uint8, "r", shape=(first,))
    for split, chosen in splits.items():
        write_split(work, split, chosen, tokens, melody)
    (work / "skipped.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in skipped), encoding="utf-8")
    (work / "tokenizer.model").write_bytes(tokenizer)
    np.save(work / "counts.npy", [count_codes(tokens, chosen, codec.card) for chosen in splits.values()])
    counts = {split: dict(tracks=len(chosen), frames=sum(track["frames"] for track in chosen))
              for split, chosen in splits.items()}  # fmt: skip
    made = [*work.glob("train_*"), *work.glob("valid_*"), *map(work.joinpath, ("counts.npy", "tokenizer.model"))]
    checksums = {path.name: checksum(path) for path in sorted(made)}
    common.write_json(work / "meta.json", dict(format=DATA_FORMAT, codec=codec.describe(), **counts, request=request,
                                        checksums=checksums))  # fmt: skip
    work.rename(out)
    for name in ("tokens.bin", "melody.bin", "journal.jsonl", "request.json"):
        (out / name).unlink()
    for split, count in counts.items():
        print(f"{split}: {count['tracks']} tracks, {count['frames'] / codec.frame_rate / 60:.1f} minutes")
    print_padding(Tokens(out, "train"))
    print_captions(kept, tokenizer)
    if skipped:
        print(f"skipped: {len(skipped)} tracks, listed in {out / 'skipped.jsonl'}; the first: {skipped[0]['reason']}")
    print(f"wrote {out}")


def print_padding(tokens):
    """How much of training items would be padding, as tracks are shorter, if they were as long as usual."""
    segment, frames = FIELDS["segment"].default, [track["frames"] for track in tokens.tracks]
    if (padding := tokens.padding(segment * tokens.frame_rate)) > 0.01:
        median = np.median(frames) / tokens.frame_rate
        print(f"tracks are short, half of them below {median:.1f} s: {padding:.0%} of items of {segment:g} s would be"
              f" padding; train with a lower --segment")  # fmt: skip


def print_captions(tracks, tokenizer):
    """What a model hears of the captions: their lengths in tokens, how many are cut, how much is spelled in letters."""
    captions = [caption for track in tracks for caption in captions_of(track) if caption]
    if not captions:
        return
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
    pieces = [processor.encode(caption, out_type=str) for caption in captions]
    lengths, limit = [len(one) for one in pieces], FIELDS["text_max_tokens"].default
    total = max(1, sum(lengths))
    spelled = [
        piece
        for one in pieces
        for piece in one
        if piece.startswith("<0x") or (len(piece) == 1 and piece.isascii() and piece.isalpha())
    ]
    words = Counter(word for caption in captions for word in caption.lower().split())
    print(f"captions: {len(captions)}, of {np.median(lengths):.0f} tokens (95 % of them of at most"
          f" {np.percentile(lengths, 95):.0f}), {100 * len(spelled) / total:.0f} % single letters or bytes;"
          f" commonest words: {', '.join(word for word, _ in words.most_common(10))}")  # fmt: skip
    if cut := sum(length > limit for length in lengths):
        print(f"{cut} of {len(captions)} captions are longer than the {limit} tokens that a model hears of them;"
              f" train with --text_max_tokens={max(lengths)}, or shorten them")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- check


def find_damage(folder):
    """What is not as `prepare` has left it, a line a file: tokens that are wrong sound like any others."""
    expected = read_meta(folder).get("checksums", {}).items()
    wrong = [name for name, crc in expected if not Path(folder, name).is_file() or checksum(Path(folder, name)) != crc]
    return [f"{Path(folder, name)}: is gone, or not as it was prepared (its checksum differs)" for name in wrong]


def check(folder, codec_weights=""):
    """Prints what is in a data set; returns the number of problems found."""
    meta, problems, seen = read_meta(folder), find_damage(folder), {}
    rate, codec = meta["codec"]["frame_rate"], load_codec(meta["codec"]["name"], codec_weights)
    quiet = codec.encode(torch.zeros(1, codec.channels, codec.sample_rate))[0, :, codec.frame_rate // 2].cpu().numpy()
    print(f"{folder}: {meta['codec']['id']}, card {meta['codec']['card']}, {rate} frames/s")
    for split in ("train", "valid"):
        tokens = Tokens(folder, split)
        seconds = np.array([track["frames"] for track in tokens.tracks]) / rate
        uncaptioned = sum(not track["caption"] for track in tokens.tracks)
        print_padding(tokens)
        print_captions(tokens.tracks, read_tokenizer(folder))
        silent = total = 0
        for track in tokens.tracks:
            codes = tokens.shards[track["shard"]][track["first"] : track["first"] + track["frames"]]
            total += len(codes)
            silent += int((codes == quiet).all(1).sum())
            if codes.max() >= tokens.card:
                bad = int((codes >= tokens.card).any(1).argmax())
                problems.append(f"{track['name']}: token {codes[bad].max()} at frame {bad} is out of range")
            twin = seen.setdefault(hashlib.sha1(codes.tobytes()).digest(), (split, track["name"]))
            if twin[0] != split:
                problems.append(f"{track['name']} in {split} is the same music as {twin[1]} in {twin[0]}")
        print(
            f"{split}: {len(seconds)} tracks, {seconds.sum() / 60:.1f} minutes; seconds a track: {seconds.min():.1f} to"
            f" {seconds.max():.1f}, median {np.median(seconds):.1f}; {uncaptioned} without caption;"
            f" {100 * silent / total:.1f}% silent frames"
        )
    skipped = (Path(folder) / "skipped.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    print(f"skipped: {len(skipped)}")
    for problem in problems[:20]:
        print(f"problem: {problem}")
    print(f"{len(problems)} problems" if problems else "no problems")
    return len(problems)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("music", nargs="+", metavar="MUSIC", help="a folder of audio, or a JSONL manifest; or: check"
                        " DATA, to look at a prepared data set")  # fmt: skip
    parser.add_argument("--out", help="the data set's new folder")
    parser.add_argument("--codec", default="tiny", help="tiny (default), encodec_24khz[:1.5|3|6|12] or musicgen_32khz;"
                        " any with :stereo")  # fmt: skip
    parser.add_argument("--codec_weights", default="", help="file with the codec's weights")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one for each core)")
    parser.add_argument("--valid_fraction", type=float, default=0.05, help="share of tracks held out (default 0.05)")
    parser.add_argument("--min_seconds", type=float, default=1.0, help="shorter tracks are left out (default 1)")
    parser.add_argument("--no-captions", action="store_true", help="accept music of which no track has a caption")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8
    if args.music[0] == "check" and len(args.music) == 2:
        sys.exit(1 if check(args.music[1], args.codec_weights) else 0)
    if len(args.music) != 1 or not args.out:
        parser.error("give one folder or manifest, and --out; or: check DATA")
    prepare(args.music[0], args.out, args.codec, args.codec_weights, args.workers, args.valid_fraction,
            args.min_seconds, captions=not args.no_captions)  # fmt: skip


if __name__ == "__main__":
    common.run(main)
