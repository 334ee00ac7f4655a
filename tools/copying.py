"""Measure copying: the share of clips that repeat part of the training music nearly code for code.

    copied_share(clips, data.TokenDataset("data/demo", "train"))

A clip is a copy if in one of its windows of 4 s at least THRESHOLD of the first codebook's codes equal the codes at the
same positions of a window of one training track. A window with fewer than MIN_CODES distinct codes per second, such as
silence or a held sound, does not count. Simple music can agree by chance, so compare with the share of held-out clips.
Only codes are compared: music that is decoded and encoded again gets other codes, and is not detected.

Search: two windows of 200 frames with 20 differences share at least 33 runs of GRAM equal frames, because the other 180
frames form at most 21 stretches. So only places that share runs with the clip are compared frame by frame. Runs of one
repeated code are ignored, and of a run that occurs more than MAX_PLACES times in CHUNK frames, the later places are.

Letters: K codebooks, T frames of a clip, W frames of a window.
"""

import math

import numpy as np

THRESHOLD = 0.9  # share of equal codes
MIN_CODES = 2  # distinct codes per second
GRAM = 8  # frames of a run
MIN_RUNS = 4  # a candidate shares at least this many runs with the clip
MAX_PLACES = 2000  # of a run in CHUNK frames, later places are ignored
MAX_CANDIDATES = 500  # per clip and chunk, those with the most equal runs
CHUNK = 2**20  # frames of training music in memory
MAX_HOURS = 100  # of training music; of a larger data set, evenly spread tracks are read
GAP = -1  # unequal to any code


def read_chunks(dataset, W):
    """Yield the first codebook of the tracks, int64 [about CHUNK], with a gap after each track that no copy spans."""
    gap = np.full(W - math.ceil(THRESHOLD * W) + 1, GAP)
    stride = math.ceil(dataset.ends[-1] / dataset.frame_rate / 3600 / MAX_HOURS)
    parts, frames = [gap], 0
    for track in dataset.tracks[::stride]:
        for start in range(0, track["frames"], CHUNK):
            parts += [dataset.codes(track, start, CHUNK + W)[:, 0].astype(np.int64), gap]
            frames += len(parts[-2])
            if frames >= CHUNK:
                yield np.concatenate(parts)
                parts, frames = [gap], 0
    if frames:
        yield np.concatenate(parts)


def hash_runs(codes):
    """Return the runs of GRAM codes in codes [T], without those of a single code: hashes uint64 and first frames."""
    runs = np.lib.stride_tricks.sliding_window_view(codes, GRAM)
    hashes = np.zeros(len(runs), np.uint64)
    for column in runs.T:
        hashes = hashes * np.uint64(6364136223846793005) + column.astype(np.uint64)
    frames = np.flatnonzero((runs != runs[:, :1]).any(1))
    return hashes[frames], frames


def find_candidates(clip, hashes, places):
    """Return the frames of the training music where the clip [T] may start.

    hashes: sorted, of the runs of the training music. places: the first frame of each run.
    """
    runs, frames = hash_runs(clip)
    first, end = hashes.searchsorted(runs, "left"), hashes.searchsorted(runs, "right")
    starts = [places[a : min(b, a + MAX_PLACES)] - frame for a, b, frame in zip(first, end, frames)]
    starts, counts = np.unique(np.concatenate([*starts, places[:0]]), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MAX_CANDIDATES]
    return starts[order[counts[order] >= MIN_RUNS]]


def has_copy(clip, music, starts, W, min_codes):
    """Return whether a window of the clip [T] is a copy, if the clip starts at one of `starts` in the music."""
    frames = starts[:, None] + np.arange(len(clip))
    is_equal = (music[frames.clip(0, len(music) - 1)] == clip) & (frames >= 0) & (frames < len(music))
    sums = np.pad(is_equal.cumsum(1), ((0, 0), (1, 0)))
    windows = np.flatnonzero((sums[:, W:] - sums[:, :-W] >= THRESHOLD * W).any(0))
    return any(len(np.unique(clip[first : first + W])) >= min_codes for first in windows)


def copied_share(clips, dataset, seconds=4.0):
    """Return the share of copies among clips, codes int64 [K, T], of a TokenDataset's music.

    Clips shorter than `seconds`, the length of a window, do not count. Return None if all clips are shorter.
    """
    W = round(seconds * dataset.frame_rate)
    clips = [np.asarray(clip[0]) for clip in clips if clip.shape[1] >= W]
    is_copied = [False] * len(clips)
    for music in read_chunks(dataset, W) if clips else ():
        hashes, places = hash_runs(music)
        order = hashes.argsort(kind="stable")  # places of equal runs stay in order
        hashes, places = hashes[order], places[order]
        for i, clip in enumerate(clips):
            is_copied[i] = is_copied[i] or has_copy(
                clip, music, find_candidates(clip, hashes, places), W, MIN_CODES * seconds
            )
    return sum(is_copied) / len(clips) if clips else None
