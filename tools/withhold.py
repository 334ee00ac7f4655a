"""Skip metrics that have too little data. Each function returns the reason, with a remedy, or ""."""

from dataprep import shards

FRAMES_PER_DIMENSION = 10  # minimum for a Gaussian; with one frame per dimension, its covariance is singular
MIN_EXAMPLES = 10  # minimum number of training clips of a value that a probe learns


def few_clips(clips, tracks):
    """Explain why this many clips, each of another held-out track, are too few to measure quality, or return ""."""
    least = shards.MIN_HELD_OUT
    remedy = f"set --evaluate_clips={least} (metrics.py: --clips {least})"
    if tracks < least:
        remedy = "prepare the data again with a larger --valid_fraction, or add music"
    reason = f"Quality metrics need {least} clips of different held-out tracks (here {clips}): {remedy}."
    return reason if clips < least else ""


def few_frames(clips, dimensions):
    """Explain why clips [K, T] have too few frames for Gaussians of this many dimensions, or return ""."""
    frames = sum(clip.shape[1] for clip in clips)
    reason = (f"The Fréchet distance is not measured, because {frames} frames are too few for Gaussians in"
              f" {dimensions} dimensions: use more or longer clips.")  # fmt: skip
    return reason if frames < FRAMES_PER_DIMENSION * dimensions else ""


def few_examples(attributes, train_tracks, tracks):
    """Return (the attributes that can be measured, with the values that occur often enough; the reason for the others).

    attributes: {name: values}. If all held-out tracks had the same value, chance would be 1.
    """
    chosen = {}
    for name, values in attributes.items():
        known, actual = ([track["metadata"].get(name) for track in split] for split in (train_tracks, tracks))
        values = [value for value in values if known.count(value) >= MIN_EXAMPLES]
        counts = [actual.count(value) for value in values]
        if sum(counts) >= shards.MIN_HELD_OUT and max(counts) < sum(counts):
            chosen[name] = values
    missing = ", ".join(name for name in attributes if name not in chosen)
    reason = (f"Adherence to {missing} is not measured. It needs two values with {MIN_EXAMPLES} training clips each,"
              f" and {shards.MIN_HELD_OUT} held-out clips that include both values. Add music.")  # fmt: skip
    return chosen, reason if missing else ""
