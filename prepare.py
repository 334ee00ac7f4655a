"""Prepare music for training: encode audio files and write them as token shards, which data.py reads.

    python prepare.py MUSIC --out data/NAME      # a folder of audio or a JSONL manifest, see dataprep/tracks.py
    python prepare.py MUSIC --out data/NAME --model out/NAME      # with a model's codec, to fine-tune this model
    python prepare.py check data/NAME            # report the contents and problems of a data set
    torchrun --nproc_per_node=8 prepare.py MUSIC --out data/NAME      # ranks share the work; the result is the same

Each file is encoded once and stored in the cache, data/encoded/, under the SHA-256 of its content. After a stop, a
changed caption or an added track, or for another data set of the same music, only new files are encoded.

A hash of its path, or of its group, decides whether a track is held out. So adding tracks to a data set of a few
hundred tracks moves no track to the other split. Skipped files are listed in skipped.jsonl with the reason.

Letters: K codebooks, T frames.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import uuid
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
import distributed
from audio import FFMPEG_SUFFIXES
from codec import load_codec
from common import UserError
from dataprep.analysis import analyse_track, count_cores
from dataprep.report import check, checksum, find_damage, measure_reconstruction, print_report
from dataprep.shards import DATA_FORMAT, captions_of, codec_of_model, read_meta, split_tracks
from dataprep.tracks import TAGS, add_metadata, find_tracks, read_tags, train_tokenizer

SHARD_FRAMES = 100_000_000
CACHE_VERSION = 1  # in the names of the cache's folders: change it when the same file would be encoded differently
DEFAULT_TAGS = ("genre", "title", "mood", "bpm", "key", "comment")


# ---------------------------------------------------------------------------------------------------- command line


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("music", nargs="+", metavar="MUSIC", help="a folder of audio or a JSONL manifest; or: check"
                        " DATA, to report on a prepared data set")  # fmt: skip
    parser.add_argument("--out", help="folder of the new data set")
    parser.add_argument("--replace", action="store_true", help="overwrite --out if it contains other data")
    parser.add_argument("--codec", help="tiny (default), encodec_24khz[:1.5|3|6|12] or musicgen_32khz;"
                        " any with :stereo")  # fmt: skip
    parser.add_argument("--codec_weights", help="file with the codec's weights")
    parser.add_argument("--model", help="checkpoint, or a run's folder, whose codec to use instead of --codec")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one per usable core, or 4 per GPU)")
    parser.add_argument("--valid_fraction", type=float, default=0.05, help="share of tracks held out (default 0.05)")
    parser.add_argument("--min_seconds", type=float, default=1.0, help="shorter tracks are skipped (default 1)")
    parser.add_argument("--max_seconds", type=float, default=math.inf, help="longer tracks are skipped (default: none)")
    parser.add_argument("--group", choices=["prefix", "folder"], default="", help="keep parts of a song in one split:"
                        ' files with the same name except a final number, or of a folder; a "group" of a manifest\'s'
                        " line counts without this option")  # fmt: skip
    parser.add_argument("--vocab_size", type=int, default=1000, help="size of the captions' tokenizer (default 1000)")
    parser.add_argument("--tags", default=",".join(DEFAULT_TAGS), help="tags used as text for uncaptioned tracks"
                        f" (default {','.join(DEFAULT_TAGS)}; available: {', '.join(TAGS)})")  # fmt: skip
    parser.add_argument("--no-captions", action="store_true", help="make no text for uncaptioned tracks")
    args = parser.parse_args()
    if args.music[0] == "check" and len(args.music) == 2:
        sys.exit(1 if check(args.music[1]) else 0)
    if len(args.music) != 1 or not args.out:
        parser.error("give one folder or manifest, and --out; or: check DATA")
    if args.model and args.codec:
        raise UserError("--model: its checkpoint names the codec. Omit --codec")
    codec, weights = args.codec or "tiny", args.codec_weights or ""
    if args.model:
        codec, weights = codec_of_model(args.model, weights)
    distributed.init_distributed(torch.device("cuda" if torch.cuda.is_available() else "cpu"), timeout=600)
    tags = [tag for tag in map(str.strip, args.tags.split(",")) if tag]
    prepare(args.music[0], args.out, codec, weights, workers=args.workers,
            valid_fraction=args.valid_fraction, min_seconds=args.min_seconds, captions=not args.no_captions,
            vocab_size=args.vocab_size, tags=tags, replace=args.replace, max_seconds=args.max_seconds,
            group_by=args.group)  # fmt: skip
    distributed.cleanup_distributed()


def prepare(music, out, codec_name="tiny", codec_weights="", workers=0, valid_fraction=0.05, min_seconds=1.0,
            captions=True, vocab_size=1000, tags=DEFAULT_TAGS, replace=False, max_seconds=math.inf,
            group_by=""):  # fmt: skip
    """Encode new tracks, then write the data set to OUT.partial and rename it. The parameters are those of `main`."""
    out = Path(os.path.realpath(out))
    cache, work = out.parent / "encoded", out.with_name(out.name + ".partial")
    if workers < 0 or not 0 <= valid_fraction <= 1 or not 0 <= min_seconds <= max_seconds:
        raise UserError("--workers and --min_seconds must be 0 or above, --max_seconds at least --min_seconds, and"
                        " --valid_fraction between 0 and 1")  # fmt: skip
    if out == cache:
        raise UserError(f"--out {out}: reserved for the cache. Choose another name")
    if unknown := set(tags) - set(TAGS):
        raise UserError(f"--tags: unknown tag {min(unknown)}. Choose from {', '.join(TAGS)}")
    codec, tracks = load_codec(codec_name, codec_weights), find_tracks(music, group_by)
    contents = [[t["name"], t["melody_from"], captions_of(t), t["metadata"],
                 *map(common.size_and_mtime, (t["path"], t["melody_from"])),
                 *[(key, t[key]) for key in ("split", "group") if key in t]] for t in tracks]  # fmt: skip
    digest = hashlib.sha256(json.dumps(contents).encode()).hexdigest()
    request = dict(music=os.path.realpath(music), tracks=digest, codec=codec.id, min_seconds=min_seconds,
                   valid_fraction=valid_fraction, captions=captions, vocab_size=vocab_size, tags=[*tags])  # fmt: skip
    if max_seconds < math.inf:
        request["max_seconds"] = max_seconds
    if any(Path(track["path"]).suffix.lower() in FFMPEG_SUFFIXES for track in tracks):
        request["ffmpeg"] = shutil.which("ffmpeg") is not None  # skipped files can be read once it is installed
    distributed.check_same_on_all_ranks(**request)
    if (out / "meta.json").exists() and not replace:
        if read_meta(out).get("request") == request and not find_damage(out):
            return print(f"{out}: already prepared")
        raise UserError(f"--out {out}: contains other data. Add --replace to overwrite it (the cache is kept), or"
                        " choose another --out")  # fmt: skip
    check_replaceable(out)
    check_replaceable(work)
    if len(tracks) > 1:
        split_tracks(tracks, valid_fraction)  # as below: errors before hours of encoding
    train_tokenizer(tracks, vocab_size)  # finds captions that it cannot use before hours of encoding
    if distributed.rank() == 0:
        work.mkdir(parents=True, exist_ok=True)
        common.lock(work)

    folder = cache / f"{codec.id}-{CACHE_VERSION}"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(track, folder, tags if captions else None, min_seconds, max_seconds) for track in tracks]
    results = encode_all(jobs, codec_name, codec_weights, workers)
    skipped = [dict(path=track["path"], reason=reason) for track, _, reason in results if reason]
    kept = [track for track, _, reason in results if not reason]
    files = {track["name"]: file for track, file, _ in results}
    if len(kept) < 2:
        shutil.rmtree(work, ignore_errors=True)
        example = f". The first skipped file: {skipped[0]['path']}: {skipped[0]['reason']}" if skipped else ""
        raise UserError(f"{music}: {len(kept)} usable tracks, but at least 2 are needed, one of them held out{example}")
    if distributed.rank() == 0:
        try:
            write_data_set(work, out, kept, files, skipped, codec, valid_fraction, vocab_size, request)
        except OSError as error:
            reason = error.strerror or common.first_line(error)
            raise UserError(f"{work}: cannot be written ({reason}). Free disk space and run the command again; the"
                            " cache is kept") from None  # fmt: skip
        print_report(out)
        print(f"wrote {out}")


def check_replaceable(folder):
    """Raise UserError if a folder contains anything except a data set, because it will be deleted."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: a file. Choose another --out")
    others = [path.name for path in folder.iterdir() if not is_data_set_file(path)] if folder.exists() else []
    if others:
        raise UserError(f"--out {folder}: contains {others[0]}, which is not part of a data set. Choose another --out")


def is_data_set_file(path):
    names = r"(train|valid)_\d+.*|counts.npy|tokenizer.model|skipped.jsonl|meta.json(\.tmp)?|\.\w+"
    return bool(re.fullmatch(names, path.name)) and not path.is_dir()


# -------------------------------------------------------------------------------------------------- encoding cache


def encode_all(jobs, codec_name, codec_weights, workers):
    """Call `encode_track` with each job and return the results in order, on every rank. The ranks share the jobs."""
    share = jobs[distributed.rank() :: distributed.world_size()]
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    default = max(1, count_cores() // ranks) if device == "cpu" else 4  # each worker needs a CUDA context
    workers = min(workers or default, max(1, len(share)))
    codec_args, pool = (codec_name, codec_weights, device), None
    if workers > 1:
        spawn = multiprocessing.get_context("spawn")
        pool = concurrent.futures.ProcessPoolExecutor(workers, spawn, start_worker, codec_args)
    else:
        load_worker_codec(*codec_args)
    try:
        results = pool.map(encode_track, share, chunksize=4) if pool else map(encode_track, share)
        results = list(tqdm(results, total=len(share), desc="encoding", unit="track", file=sys.stdout, mininterval=1))
    except concurrent.futures.BrokenExecutor:
        raise UserError("a worker process died, perhaps out of memory. Run the command again with fewer"
                        f" --workers than {workers}; the cache is kept") from None  # fmt: skip
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)  # otherwise, it would first encode the remaining tracks
    shares = distributed.gather(results)
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(jobs))]


def start_worker(*codec_args):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    threading.Thread(target=exit_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    load_worker_codec(*codec_args)


def exit_with(parent):
    parent.join()
    os._exit(1)


def load_worker_codec(codec_name, weights, device):
    global worker_codec
    torch.set_num_threads(1)  # one single-threaded worker per core is 3x faster than one worker on all cores
    worker_codec = load_codec(codec_name, weights).to(device)


def encode_track(job):
    """Encode and analyse a track, unless it is in the cache.

    job: (track, cache folder, tags to read, min_seconds, max_seconds). Tags are read if the track has no text; None
    makes no text.

    Returns (track, cache file, reason to skip it or ""). Raises UserError if the cache cannot be written.
    """
    track, folder, tags, min_seconds, max_seconds = job
    path, melody_from = track["path"], track["melody_from"]
    try:
        name = "-".join(sha256(file) for file in dict.fromkeys((path, melody_from)))
        file, cached = Path(folder, name[:2], f"{name}.npz"), {}
        with contextlib.suppress(UserError):  # not encoded yet, or damaged
            cached = read_cache(file, without=("codes", "melody"))
        analysis = cached or analyse_track(path, melody_from, worker_codec, folder)
    except UserError as error:
        return track, "", str(error)
    if not cached:
        file.parent.mkdir(exist_ok=True)
        temporary = file.with_name(f"{uuid.uuid4().hex}.part")  # unique: two processes may encode equal files
        common.write_file(temporary, lambda opened: np.savez(opened, **analysis))
        temporary.replace(file)
    if analysis["seconds"] < min_seconds:
        return track, "", f"{analysis['seconds']:.2f} s long, shorter than {min_seconds} s"
    if analysis["seconds"] > max_seconds:
        return track, "", f"{analysis['seconds']:.2f} s long, longer than {max_seconds} s"
    if analysis["peak"] < 1e-3:
        return track, "", "silent: no sample above -60 dBFS"
    if tags is not None and not track["caption"] and not track["metadata"]:
        track = add_metadata(track, read_tags(path, tags), analysis)
    if analysis.get("cancels"):  # missing in older caches
        track = {**track, "cancels": True}
    return {**track, **{key: analysis[key] for key in ("frames", "level", "clipped")}}, str(file), ""


def sha256(path):
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path}: not a regular file")  # opening a pipe would block
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_cache(file, without=()):
    """Return the arrays and numbers that `encode_track` wrote, by name. Delete a damaged file and raise UserError."""
    try:
        with np.load(file) as content:
            arrays = {name: content[name] for name in content.files if name not in without}
    except FileNotFoundError:
        raise UserError(f"{file}: missing. Run the command again to encode it") from None
    except MemoryError:
        raise
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}). Make it readable, or delete it") from None
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        Path(file).unlink(missing_ok=True)
        reason = common.first_line(error)
        raise UserError(f"{file}: was damaged and is deleted ({reason}). Run the command again to encode it") from None
    return {name: array if array.ndim else array.item() for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------------ writing the shards


def write_data_set(work, out, kept, files, skipped, codec, valid_fraction, vocab_size, request):
    """Write the data set to the folder `work` and replace `out` by it. files: name of a track -> its cache file."""
    for path in work.iterdir():
        if path.name != ".lock":
            path.unlink()
    held_out = split_tracks(kept, valid_fraction)
    splits = {"train": [track for track in kept if track["name"] not in held_out],
              "valid": [track for track in kept if track["name"] in held_out]}  # fmt: skip
    (work / "tokenizer.model").write_bytes(train_tokenizer(splits["train"], vocab_size))
    np.save(work / "counts.npy", [write_split(work, split, splits[split], files, codec) for split in splits])
    (work / "skipped.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in skipped), encoding="utf-8")
    (work / ".lock").unlink(missing_ok=True)
    sizes = {split: dict(tracks=len(tracks), frames=sum(track["frames"] for track in tracks))
             for split, tracks in splits.items()}  # fmt: skip
    checksums = {path.name: checksum(path) for path in sorted(work.iterdir()) if is_data_set_file(path)}
    meta = dict(format=DATA_FORMAT, codec=codec.info(), **sizes, request=request, checksums=checksums,
                reconstruction=measure_reconstruction(kept, files, codec))  # fmt: skip
    common.write_json(work / "meta.json", meta)
    if out.exists():
        shutil.rmtree(out)  # a training run that uses it keeps its files open
    work.rename(out)


def write_split(folder, split, tracks, files, codec):
    """Write the shards of a split. Return how often each code occurs, int64 [K, card]."""
    shards, frames = [], SHARD_FRAMES
    for track in tracks:
        if frames + track["frames"] > SHARD_FRAMES:
            shards.append([])
            frames = 0
        shards[-1].append(track)
        frames += track["frames"]
    counts = np.zeros((codec.K, codec.card), dtype=np.int64)
    bar = tqdm(total=len(tracks), desc=f"writing {split}", unit="track", file=sys.stdout, mininterval=1, delay=5)
    for number, shard in enumerate(shards):
        path, first = folder / f"{split}_{number:03d}", 0
        frames = sum(track["frames"] for track in shard)
        with (open(f"{path}.jsonl", "w", encoding="utf-8") as lines, open(f"{path}.npy", "wb") as tokens,
              open(f"{path}_melody.npy", "wb") as melody):  # fmt: skip
            for file, dtype, shape in ((tokens, "<u2", (frames, codec.K)), (melody, "|u1", (frames,))):
                np.lib.format.write_array_header_1_0(file, dict(descr=dtype, fortran_order=False, shape=shape))
            for track in shard:
                arrays = read_cache(files[track["name"]])
                tokens.write(arrays["codes"].astype("<u2").tobytes())
                melody.write(arrays["melody"].tobytes())
                for k, codes in enumerate(arrays["codes"].T):
                    counts[k] += np.bincount(codes, minlength=codec.card)
                file_hash = int(Path(files[track["name"]]).stem[:15], 16)
                lines.write(json.dumps({**track, "hash": file_hash, "first": first}) + "\n")
                first += track["frames"]
                bar.update()
    bar.close()
    return counts


if __name__ == "__main__":
    common.run(main, lambda: "use fewer --workers")
