"""Music on disk -> token shards, which data.py reads.

    python prepare.py MUSIC --out data/NAME      # a folder of audio, or a JSONL manifest: see tracks.py
    python prepare.py check data/NAME            # what is in it, and what is wrong with it
    torchrun --nproc_per_node=8 prepare.py MUSIC --out data/NAME        # each rank its share, the same result

Each file is encoded once, into data/encoded/, where its content is its name: captions may change, tracks be added and
other data sets be made of the same music, and what is there is not encoded again. So a preparation that was stopped
resumes. Tracks are held out by a hash of their path, so that, from some hundred tracks on, adding others moves none to
the other split. What is left out is listed in skipped.jsonl with the reason.

Letters: K codebooks, T frames.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import unicodedata
import uuid
import zlib
from collections import Counter, deque
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tqdm import tqdm

import common
from check import check, checksum, find_damage, print_report
from codec import OTHER_SUFFIXES, load_codec, read_blocks
from common import UserError
from conditioning import CHROMA_RATE, SILENCE, strongest
from data import DATA_FORMAT, captions_of, read_meta
from listen import KEYS, chroma_of, listen
from tracks import TAGS, find_tracks, folder_of, read_tags

SHARD_FRAMES = 100_000_000
ENCODING = 1  # in the name of data/encoded/'s folders: another number where the same file would give other contents
DEFAULT_TAGS = ("genre", "title", "mood", "bpm", "key", "comment")


# -------------------------------------------------------------------------------------------------------- encoding


def start_worker(*how):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    get_ready(*how)


def get_ready(codec_name, weights, device):
    global codec
    torch.set_num_threads(1)  # as many workers as cores, each on its own, are three times as fast as all on one file
    codec = load_codec(codec_name, weights).to(device)


def end_with(parent):
    parent.join()
    os._exit(1)


def encode_track(job):
    """Listens to one track, unless data/encoded/ has it -> what is known of it but its codes, or why it is left out.

    An error in writing is none of the track's, and ends the run.
    """
    path, melody_from, folder, wanted_tags = job
    if Path(path).suffix.lower() in OTHER_SUFFIXES:
        return f"{Path(path).suffix} is read by no library here; convert it to flac or wav"
    try:
        name = "-".join(sha256(file) for file in dict.fromkeys((path, melody_from)))
        file = Path(folder, name[:2], f"{name}.npz")
        about = {}
        with contextlib.suppress(UserError):  # it is not encoded yet, or what is there is damaged
            about = read_encoded(file, without=("codes", "melody"))
        heard = {} if about else hear(path, melody_from, folder)
    except UserError as error:
        return str(error)
    if heard:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{uuid.uuid4().hex}.part")  # two processes may meet files of one content
        common.write_file(temporary, lambda opened: np.savez(opened, **heard))
        temporary.replace(file)
        about = {key: value for key, value in heard.items() if np.ndim(value) == 0}
    return dict(**about, file=str(file), tags=read_tags(path, wanted_tags))


def hear(path, melody_from, folder):
    """A track, and the file whose melody is its own -> what `listen` finds, with codes [T, K] and melody [T]."""
    folder.mkdir(parents=True, exist_ok=True)
    found = listen(path, codec, folder)
    chroma = found.pop("chroma")
    if melody_from != path:
        chroma = chroma_of(read_blocks(melody_from, codec.sample_rate, codec.channels), codec.sample_rate)
    codes, notes = found["codes"].T.numpy().astype(np.uint16), np.append(strongest(chroma), SILENCE)
    at = ((np.arange(len(codes)) + 0.5) * CHROMA_RATE / codec.frame_rate).astype(int)
    melody = notes[at.clip(max=len(notes) - 1)].astype(np.uint8)
    return {**found, "codes": codes, "melody": melody, "frames": len(codes)}


def sha256(path):
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path}: is no file")  # to read a pipe would be to wait for who writes it
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_encoded(file, without=()):
    """What `encode_track` wrote: arrays, and numbers."""
    try:
        with np.load(file) as found:
            arrays = {name: found[name] for name in found.files if name not in without}
    except FileNotFoundError:
        raise UserError(f"{file}: is gone; run this again, which encodes it") from None
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); mend that, or give another --encoded") from None
    except Exception as error:  # what zipfile and numpy say of damage is of many kinds
        Path(file).unlink(missing_ok=True)
        why = common.first_line(error)
        raise UserError(f"{file}: was damaged, and is removed ({why}); run this again, which encodes it") from None
    return {name: array if array.ndim else array.item() for name, array in arrays.items()}


def encode_all(jobs, codec_name, codec_weights, workers):
    """`encode_track` of every job, in order; under torchrun each rank does its share, and all of them know all."""
    mine, ranks = jobs[common.rank() :: common.world_size()], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    usual = max(1, os.cpu_count() // ranks) if device == "cpu" else 4  # each has a context of its own on the GPU
    workers = min(workers or usual, max(1, len(mine)))
    how, found, pool = (codec_name, codec_weights, device), [], None
    if workers > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, start_worker, how)
    else:
        get_ready(*how)
    with tqdm(total=len(mine), desc="encoding", unit="track", file=sys.stdout, mininterval=1) as bar:
        try:
            for about in pool.map(encode_track, mine, chunksize=4) if pool else map(encode_track, mine):
                found.append(about)
                bar.update()
        except concurrent.futures.BrokenExecutor:
            raise UserError("a worker died, maybe for want of memory; nothing is lost: run it again with fewer"
                            f" --workers than {workers}") from None  # fmt: skip
        finally:
            if pool:
                pool.shutdown(cancel_futures=True)  # else what is left would be encoded first
    shares = common.gather(found)
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(jobs))]


# --------------------------------------------------------------------------------------------------------- writing


def split_tracks(tracks, valid_fraction):
    """The names held out: those whose hash falls below the fraction, and never none nor all of them."""
    ranked = sorted(tracks, key=lambda track: (zlib.crc32(os.fsencode(track["name"])), track["name"]))
    below = sum(zlib.crc32(os.fsencode(track["name"])) < valid_fraction * 2**32 for track in ranked)
    return {track["name"] for track in ranked[: min(max(1, below), len(ranked) - 1)]}


def train_tokenizer(tracks, vocab_size):
    """SentencePiece (BPE, case folded, byte fallback) on every caption and 'key: value' of the metadata -> bytes."""
    if not 300 <= vocab_size <= 1_000_000:
        raise UserError(f"--vocab_size {vocab_size}: must be 300 or more, as 256 are bytes, and a million at most")
    sentences = [caption for track in tracks for caption in captions_of(track) if caption]
    sentences += sorted({f"{key}: {value}" for track in tracks for key, value in track["metadata"].items()})
    folded = [unicodedata.normalize("NFKC", sentence).casefold() for sentence in sentences]
    letters = Counter("".join(folded))
    if len(letters) > (most := (vocab_size - 259) // 2):  # the rarest are left to bytes, or no piece would have room
        kept = {letter for letter, _ in letters.most_common(most)}
        sentences = ["".join(letter if letter in kept else " " for letter in sentence) for sentence in folded]
    sentences = [sentence for sentence in sentences if sentence.strip()] or ["music"]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, vocab_size=vocab_size,
        model_type="bpe", normalization_rule_name="nmt_nfkc_cf", byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, max_sentence_length=2**30,
    )  # fmt: skip
    return model.getvalue()


def describe(track, about):
    """Adds to a track of which nothing is said what its file and folder tell, and what was heard: tempo and key."""
    folder, key, measured = folder_of(track["name"]), about["key"], []
    known = about["tags"] | ({"folder": folder} if folder else {})
    tempo = bpm_of(known.pop("bpm", ""))
    if not tempo and about["tempo"]:
        tempo = about["tempo"]
        measured.append("tempo")
    if tempo:
        bpm = 5 * round(tempo / 5)
        known["tempo"] = f"{'slow' if bpm < 85 else 'medium' if bpm < 125 else 'fast'}, {bpm} bpm"
    if key >= 0 and "key" not in known:
        known["key"] = KEYS[key]
        measured.append("key")
    return {**track, "metadata": known, "measured": measured}


def bpm_of(tag):
    """The beats a minute that a tag names; 0 where it names none."""
    found = re.fullmatch(r"(\d{2,3})([.,]\d+)?( ?bpm)?", tag.strip().lower())
    return float(found[1]) if found else 0.0


def write_split(folder, split, tracks, arrays, codec):
    """One split's shards; arrays: each track's codes uint16 [T, K] and melody uint8 [T]. -> counts int64 [K, card]."""
    counts = np.zeros((codec["K"], codec["card"]), dtype=np.int64)  # how often each code occurs
    shard, pending, arrays = 0, deque(tracks), iter(arrays)
    bar = tqdm(total=len(tracks), desc=f"writing {split}", unit="track", file=sys.stdout, mininterval=1, delay=5)
    while pending:
        chosen, frames = [], 0
        while pending and (not chosen or frames + pending[0]["frames"] <= SHARD_FRAMES):
            chosen.append(pending.popleft())
            frames += chosen[-1]["frames"]
        path, first = folder / f"{split}_{shard:03d}", 0
        with (open(f"{path}.jsonl", "w", encoding="utf-8") as lines, open(f"{path}.npy", "wb") as tokens,
              open(f"{path}_melody.npy", "wb") as melody):  # fmt: skip
            for file, kind, shape in ((tokens, "<u2", (frames, codec["K"])), (melody, "|u1", (frames,))):
                np.lib.format.write_array_header_1_0(file, dict(descr=kind, fortran_order=False, shape=shape))
            for track in chosen:
                codes, notes = next(arrays)
                tokens.write(codes.astype("<u2").tobytes())
                melody.write(notes.tobytes())
                for k, column in enumerate(codes.T):
                    counts[k] += np.bincount(column, minlength=codec["card"])
                lines.write(json.dumps({**track, "first": first}) + "\n")
                first += track["frames"]
                bar.update()
        shard += 1
    bar.close()
    return counts


def prepare(music, out, codec_name="tiny", codec_weights="", workers=0, valid_fraction=0.05, min_seconds=1.0,
            captions=True, vocab_size=1000, tags=DEFAULT_TAGS, replace=False, encoded=""):  # fmt: skip
    """Encodes what is not encoded yet, then writes all beside `out` and renames it at the end."""
    out = Path(os.path.realpath(out))
    encoded = Path(os.path.realpath(encoded or out.parent / "encoded"))
    if workers < 0 or not 0 <= valid_fraction <= 1 or not min_seconds >= 0:
        raise UserError("--workers and --min_seconds must be 0 or above, and --valid_fraction between 0 and 1")
    if out in (encoded, *encoded.parents) or encoded in out.parents:
        raise UserError(f"--out {out}: and the encoded tracks, {encoded}, must not lie in one another; choose others")
    if unknown := set(tags) - set(TAGS):
        raise UserError(f"--tags: {min(unknown)} is none of {', '.join(TAGS)}")
    codec, tracks = load_codec(codec_name, codec_weights), find_tracks(music)
    contents = [[t["name"], t["melody_from"], captions_of(t), t["metadata"],
                 *map(common.size_and_mtime, (t["path"], t["melody_from"]))] for t in tracks]  # fmt: skip
    digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    request = dict(music=os.path.realpath(music), tracks=digest, codec=codec.id, min_seconds=min_seconds,
                   valid_fraction=valid_fraction, captions=captions, vocab_size=vocab_size, tags=[*tags])  # fmt: skip
    common.refuse_differences(**request)
    if (out / "meta.json").exists() and not replace:
        if read_meta(out).get("request") == request and not find_damage(out):
            return print(f"{out} is prepared already")
        raise UserError(f"{out}: holds other data; add --replace to write it anew (what is encoded is kept), or choose"
                        " another --out")  # fmt: skip
    work = out.with_name(out.name + ".partial")
    for folder in (out, work):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; choose another --out")
        others = [path.name for path in folder.iterdir() if not is_ours(path)] if folder.exists() else []
        if others:
            raise UserError(f"{folder}: is there already and is no data set alone (holds {others[0]}); choose another"
                            " --out")  # fmt: skip
    train_tokenizer(tracks, vocab_size)  # captions that it cannot take are found now, before hours of encoding
    if common.rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
        common.lock(work)
    folder = encoded / f"{codec.id}-{ENCODING}"
    undescribed = {t["name"] for t in tracks if captions and not t["caption"] and not t["metadata"]}
    jobs = [(t["path"], t["melody_from"], folder, tags if t["name"] in undescribed else ()) for t in tracks]
    kept, skipped, files = [], [], {}
    for track, about in zip(tracks, encode_all(jobs, codec_name, codec_weights, workers)):
        reason = about if type(about) is str else why_left_out(about, min_seconds)
        if reason:
            skipped.append(dict(path=track["path"], reason=reason))
            continue
        if track["name"] in undescribed:
            track = describe(track, about)
        kept.append({**track, **{key: about[key] for key in ("frames", "level", "clipped")}})
        files[track["name"]] = about["file"]
    if len(kept) < 2:
        shutil.rmtree(work, ignore_errors=True)
        why = f"; the first was left out: {skipped[0]['path']}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(f"{music}: {len(kept)} usable tracks; at least 2 are needed, one to hold out{why}")
    if common.rank() == 0:
        try:
            write_data_set(work, out, kept, files, skipped, codec, valid_fraction, vocab_size, request)
        except OSError as error:
            why = error.strerror or common.first_line(error)
            raise UserError(f"{work}: cannot be written ({why}); make room, and run this again: what is"
                            " encoded is kept") from None  # fmt: skip
        print_report(out)
        print(f"wrote {out}")


def is_ours(path):
    """Whether a file in a data set's folder is one that `write_data_set` writes."""
    ours = r"(train|valid)_\d+.*|counts.npy|tokenizer.model|skipped.jsonl|meta.json(\.tmp)?|\.\w+"
    return bool(re.fullmatch(ours, path.name)) and not path.is_dir()


def why_left_out(about, min_seconds):
    if about["seconds"] < min_seconds:
        return f"{about['seconds']:.2f} s long, shorter than {min_seconds} s"
    return "silent: no sample above -60 dBFS" if about["peak"] < 1e-3 else ""


def write_data_set(work, out, kept, files, skipped, codec, valid_fraction, vocab_size, request):
    """The folder `out`, as data.py reads it, in the place of what it was; files: the file of each name's codes."""
    for path in work.iterdir():
        if path.name != ".lock":
            path.unlink()
    held_out = split_tracks(kept, valid_fraction)
    splits = {"train": [track for track in kept if track["name"] not in held_out],
              "valid": [track for track in kept if track["name"] in held_out]}  # fmt: skip
    (work / "tokenizer.model").write_bytes(train_tokenizer(splits["train"], vocab_size))
    counts = []
    for split, chosen in splits.items():
        found = (read_encoded(files[track["name"]]) for track in chosen)
        arrays = ((arrays["codes"], arrays["melody"]) for arrays in found)
        counts.append(write_split(work, split, chosen, arrays, codec.describe()))
    np.save(work / "counts.npy", counts)
    sizes = {split: dict(tracks=len(chosen), frames=sum(track["frames"] for track in chosen))
             for split, chosen in splits.items()}  # fmt: skip
    (work / "skipped.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in skipped), encoding="utf-8")
    (work / ".lock").unlink(missing_ok=True)
    checksums = {path.name: checksum(path) for path in sorted(work.iterdir()) if is_ours(path)}
    common.write_json(work / "meta.json", dict(format=DATA_FORMAT, codec=codec.describe(), **sizes, request=request,
                                               checksums=checksums))  # fmt: skip
    if out.exists():
        shutil.rmtree(out)  # a run that trains on it keeps what it has opened
    work.rename(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("music", nargs="+", metavar="MUSIC", help="a folder of audio, or a JSONL manifest; or: check"
                        " DATA, to look at a prepared data set")  # fmt: skip
    parser.add_argument("--out", help="the data set's new folder")
    parser.add_argument("--replace", action="store_true", help="write --out anew if it holds other data")
    parser.add_argument("--codec", default="tiny", help="tiny (default), encodec_24khz[:1.5|3|6|12] or musicgen_32khz;"
                        " any with :stereo")  # fmt: skip
    parser.add_argument("--codec_weights", default="", help="file with the codec's weights")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one for each core, or four a GPU)")
    parser.add_argument("--valid_fraction", type=float, default=0.05, help="share of tracks held out (default 0.05)")
    parser.add_argument("--min_seconds", type=float, default=1.0, help="shorter tracks are left out (default 1)")
    parser.add_argument("--vocab_size", type=int, default=1000, help="pieces that captions are spelled with")
    parser.add_argument("--tags", default=",".join(DEFAULT_TAGS), help="tags that tracks without any text are told by"
                        f" (default {','.join(DEFAULT_TAGS)}; there are {', '.join(TAGS)})")  # fmt: skip
    parser.add_argument("--no-captions", action="store_true", help="make no text for tracks that have none")
    parser.add_argument("--encoded", default="", help="where encoded tracks are kept (default: encoded/ beside --out)")
    args = parser.parse_args()
    if args.music[0] == "check" and len(args.music) == 2:
        sys.exit(1 if check(args.music[1]) else 0)
    if len(args.music) != 1 or not args.out:
        parser.error("give one folder or manifest, and --out; or: check DATA")
    common.join(torch.device("cuda" if torch.cuda.is_available() else "cpu"), timeout=600)
    tags = [tag for tag in map(str.strip, args.tags.split(",")) if tag]
    prepare(args.music[0], args.out, args.codec, args.codec_weights, workers=args.workers,
            valid_fraction=args.valid_fraction, min_seconds=args.min_seconds, captions=not args.no_captions,
            vocab_size=args.vocab_size, tags=tags, replace=args.replace, encoded=args.encoded)  # fmt: skip
    common.leave()


if __name__ == "__main__":
    common.run(main, lambda: "take fewer --workers")
