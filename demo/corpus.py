"""The corpus of the text-to-music demo: short captioned pieces, synthesised by numpy from a fixed seed.

    python -m demo.corpus data/demo_audio --clips 6000

Each clip has five attributes (instrument, tempo, mode, texture, drums), stated in its caption and plain in its sound,
so that a probe can tell whether a model trained on the corpus does what its captions ask.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import re
import sys
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm

import common
import prepare
from common import UserError

SAMPLE_RATE = 16000
VERSION = 2  # of the sound and the captions: what another version wrote is made anew
ATTRIBUTES = {
    "instrument": ["piano", "guitar", "organ", "flute", "strings", "bells"],
    "tempo": ["slow", "medium", "fast"],
    "mode": ["major", "minor"],
    "texture": ["melody", "arpeggio", "chords"],
    "drums": ["no", "yes"],
}

# A beat is a whole, even number of the codec's 20 ms frames (68, 100 or 150 bpm): every onset falls on its frame grid,
# so a rhythm is the same frames over and over, which is what lets a small model learn it in minutes.
FRAME = SAMPLE_RATE // 50
# Frames in a beat, beats in a clip (6.4 to 8 s in all) and half bars on a chord, for slow clips have few bars:
TEMPI = {"slow": (44, (8,), 1), "medium": (30, (12,), 2), "fast": (20, (16, 20), 2)}
TONICS = {"C": 60, "D": 62, "E": 64}  # no two of their six keys have the same seven notes
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PROGRESSIONS = [  # degrees of the scale, from 0
    (0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (0, 3, 0, 4), (0, 4, 3, 4), (0, 3, 5, 4), (0, 5, 0, 4), (0, 4, 0, 3)
]  # fmt: skip
RHYTHMS = [(1, 1), (1, 0.5, 0.5), (0.5, 0.5, 1), (1.5, 0.5)]  # beats of the notes in half a bar
ARPEGGIOS = [(0, 1, 2, 3, 4, 3, 2, 1), (0, 2, 1, 2, 3, 2, 1, 2), (0, 1, 2, 3, 0, 1, 2, 3), (3, 2, 1, 0, 4, 3, 2, 1)]
BASS_LINES = [(0, 0, 0, 0), (0, 0, 2, 0), (0, 2, 0, 2)]  # tone of the triad on each beat of a bar
KICKS = [(0, 4), (0, 2, 4, 6), (0, 3, 4), (0, 4, 5)]  # eighths of a bar
ECHOES = (367, 593, 853, 1151, 1549, 2099)  # samples; together they make a reverb of 64 taps

WORDS = {  # for each value of an attribute, what may fill the slots of a caption
    "piano": {"instrument": "piano|grand piano|upright piano"},
    "guitar": {"instrument": "guitar|acoustic guitar|plucked guitar"},
    "organ": {"instrument": "organ|electric organ|drawbar organ"},
    "flute": {"instrument": "flute|wooden flute|breathy flute"},
    "strings": {"instrument": "strings|string ensemble|string section"},
    "bells": {"instrument": "bells|chimes|ringing bells"},
    "slow": {"tempo": "slow|unhurried|leisurely", "pace": "at a slow tempo|at 68 bpm|played slowly|at a slow pace"},
    "medium": {"tempo": "moderate|mid-tempo|medium-tempo", "pace": "at a moderate tempo|at 100 bpm|at a walking pace"},
    "fast": {"tempo": "fast|quick|up-tempo|lively", "pace": "at a fast tempo|at 150 bpm|played fast|at a quick pace"},
    "major": {"mode": "{0} major|happy {0} major", "key": "in {0} major|in the key of {0} major|in a happy {0} major"},
    "minor": {"mode": "{0} minor|sad {0} minor", "key": "in {0} minor|in the key of {0} minor|in a sad {0} minor"},
    "melody": {"texture": "melody|tune|single-line melody", "playing": "a melody|a tune|a single-line melody"},
    "arpeggio": {"texture": "arpeggio|broken-chord pattern", "playing": "arpeggios|broken chords|rolling arpeggios"},
    "chords": {"texture": "chord progression|block-chord pattern", "playing": "block chords|steady block chords"},
    "no": {"drums": "no drums|without drums|drumless|with no drums"},
    "yes": {"drums": "with drums|over a drum beat|with a drum kit|backed by drums"},
}
TEMPLATES = [
    "a {tempo} {instrument} {texture} {key}, {drums}",
    "{tempo} {instrument} {texture} {key}, {drums}",
    "a {tempo} {mode} {instrument} {texture}, {drums}",
    "a {instrument} {texture} {key} {pace}, {drums}",
    "{instrument} playing {playing} {pace} {key}, {drums}",
    "{pace}, {instrument} playing {playing} {key}, {drums}",
    "{playing} on {instrument} {key}, {tempo}, {drums}",
    "{instrument}, {tempo}, {mode}, {texture}, {drums}",
    "a {mode} {texture} for {instrument}, {pace}, {drums}",
    "a {tempo} piece {key}, {instrument} playing {playing}, {drums}",
    "{tempo} {mode} music, {playing} on {instrument}, {drums}",
    "{drums}, a {tempo} {instrument} {texture} {key}",
]

K = np.arange(1, 25)
BAR = np.array([1, 1.004, 2.756, 2.767, 5.404, 8.933])  # modes of a struck metal bar; the close pairs shimmer
VOICES = {  # the keywords of play
    "piano": dict(ratios=K * np.sqrt(1 + 4e-4 * K**2), gains=K**-1.4, decays=1.2 + 0.7 * K),
    "guitar": dict(ratios=K, gains=np.sin(0.13 * np.pi * K) / K**0.8, decays=4 + 0.9 * K),  # plucked at 13 %
    "organ": dict(ratios=[0.5, 1, 1.5, 2, 3, 4, 6, 8], gains=[5, 10, 4, 8, 5, 5, 3, 3], vibrato=0.003),
    "flute": dict(ratios=K[:3], gains=[1, 0.12, 0.04], breath=0.03, vibrato=0.006, attack=0.05),
    "strings": dict(ratios=np.outer([0.996, 1, 1.005], K), gains=np.tile(K**-1.2, 3), vibrato=0.004, attack=0.05),
    "bells": dict(ratios=2 * BAR, gains=[6, 4, 4, 3, 3, 2], decays=1.5 + BAR),
    "bass": dict(ratios=K[:4], gains=[1, 0.5, 0.2, 0.06], decays=2 + K[:4], attack=0.01),
}
SECONDS = np.arange(SAMPLE_RATE // 4) / SAMPLE_RATE
HISS = np.random.default_rng(0).uniform(-1, 1, len(SECONDS))
DRUMS = {
    "kick": 0.9 * np.sin(2 * np.pi * (50 * SECONDS - 4 * np.exp(-SECONDS / 0.03))) * np.exp(-SECONDS / 0.07),
    "snare": (0.4 * HISS + 0.3 * np.sin(2 * np.pi * 190 * SECONDS)) * np.exp(-SECONDS / 0.05),
    "hat": 0.2 * np.diff(HISS, 2, append=[0, 0]) * np.exp(-SECONDS / 0.02),  # differences leave its treble
}


def pick(rng, options):
    return options[rng.integers(len(options))]


def draw_attributes(rng):
    """The caption and the attributes of a clip; those in ATTRIBUTES are uniform and independent."""
    drawn = {name: pick(rng, values) for name, values in ATTRIBUTES.items()}
    tonic = pick(rng, list(TONICS))
    slots = {slot: options for value in drawn.values() for slot, options in WORDS[value].items()}
    caption = pick(rng, TEMPLATES).format(**{slot: pick(rng, options.split("|")) for slot, options in slots.items()})
    caption = re.sub(r"\ba (?=[aeiouE])", "an ", caption.format(tonic))
    bpm = round(60 * SAMPLE_RATE / FRAME / TEMPI[drawn["tempo"]][0], 1)
    return {"caption": caption, **drawn, "key": f"{tonic} {drawn['mode']}", "bpm": bpm}


def play(hertz, samples, ratios, gains, decays=0, vibrato=0, breath=0, attack=0.003):
    """A note as a sum of sines -> float32 wave [samples]

    One of ratios (to hertz), gains and decays (1/s) per sine; vibrato as a fraction of the pitch; breath, the level of
    noise; attack in seconds. Every note fades over its whole length, so that its level tells when the next one is due:
    the language model reads the pulse from the last few frames, where else it would have to count.
    """
    t = np.arange(samples, dtype=np.float32) / SAMPLE_RATE
    freqs, gains, decays = np.float32(np.broadcast_arrays(hertz * np.ravel(ratios), gains, decays))[..., None]
    phases = np.float32(2.4) * np.arange(len(freqs), dtype=np.float32)[:, None] ** 2  # scattered, for a lower peak
    swing = t + np.float32(vibrato / 34) * np.sin(34 * t)  # 34 rad/s is 5.4 Hz
    wave = gains * (freqs < 0.47 * SAMPLE_RATE) * np.exp(-decays * t) * np.sin(2 * np.pi * freqs * swing + phases)
    wave = wave.sum(0) + breath * np.random.default_rng(0).standard_normal(len(t), np.float32)
    wave *= 0.25 / np.sqrt((wave[:1600] ** 2).mean())  # as loud at its start in every voice
    return (wave * np.minimum(1, t / attack) * np.linspace(1, 0, samples, dtype=np.float32)).astype(np.float32)


@functools.lru_cache(maxsize=4096)
def render_note(instrument, midi, samples):
    return play(440 * 2 ** ((midi - 69) / 12), samples, **VOICES[instrument])


def semitones(degree, chord, mode):
    """Height of a degree above the tonic; wherever the chord is V, minor's seventh is raised to lead home."""
    octave, step = divmod(degree, 7)
    return 12 * octave + SCALES[mode][step] + (mode == "minor" and chord == 4 and step == 6)


def triad(chord, mode, tonic, lowest):
    """Root, third and fifth of a chord as MIDI pitches, each in the octave from lowest"""
    return [lowest + (tonic + semitones(chord + i, chord, mode) - lowest) % 12 for i in (0, 2, 4)]


def compose_melody(rng, chords, mode, tonic):
    """A motif of one bar, upside down in every other bar, that comes home to the tonic; see compose_chords"""
    degree, motif = 2, [(pick(rng, RHYTHMS), pick(rng, (-2, -1, 1, 2))) for _ in range(2)]
    for half, chord in enumerate(chords[:-1]):
        # The strong beat takes the nearest tone of the chord, the notes after it move by a step or a third.
        degree = min(range(degree - 2, degree + 3), key=lambda d: ((d - chord) % 7 not in (0, 2, 4), abs(d - degree)))
        beat, (rhythm, step) = 2 * half, motif[half % 2]
        for length in rhythm:
            yield beat, length, tonic + semitones(degree, chord, mode)
            beat += length
            upward = degree < 0 or (degree < 7 and (step > 0) == (half // 2 % 2 == 0))
            degree += abs(step) if upward else -abs(step)
    yield 2 * len(chords) - 2, 2, tonic + 12 * round(degree / 7)


def compose_arpeggio(rng, chords, mode, tonic):
    """Broken chords in eighths; see compose_chords"""
    pattern = pick(rng, ARPEGGIOS)
    for eighth in range(4 * len(chords)):
        low = sorted(triad(chords[eighth // 4], mode, tonic, 60))
        tones = [*low, low[0] + 12, low[1] + 12]
        yield eighth / 2, 0.5, tones[pattern[eighth % 8]]


def compose_chords(rng, chords, mode, tonic):
    """Triads on every beat; chords has one degree per half bar -> notes as (beat, length in beats, MIDI pitch)"""
    strums = [pick(rng, RHYTHMS[:2]) for _ in range(2)]
    for half, chord in enumerate(chords):
        beat = 2 * half
        for length in strums[half % 2]:
            yield from ((beat, length, midi) for midi in triad(chord, mode, tonic, 60))
            beat += length


# What composes each, and the level of a note: a melody sings out, an arpeggio accompanies, a chord has three notes.
TEXTURES = {"melody": (compose_melody, 0.9), "arpeggio": (compose_arpeggio, 0.55), "chords": (compose_chords, 0.45)}


def make_clip(seed, index):
    """Clip number index of a seed's corpus -> audio float32 [samples], {"caption", the attributes, "key", "bpm"}"""
    rng = np.random.default_rng([seed, index])
    attributes = draw_attributes(rng)
    mode, texture = attributes["mode"], attributes["texture"]
    tonic = TONICS[attributes["key"].split()[0]]
    frames, lengths, span = TEMPI[attributes["tempo"]]
    beat, beats = frames * FRAME, pick(rng, lengths)
    progression = pick(rng, PROGRESSIONS)
    chords = [progression[half // span % 4] for half in range(beats // 2)]
    chords[-span:] = [0] * span  # ends on the tonic

    drummed = attributes["drums"] == "yes"
    mix = np.zeros(beats * beat, np.float32)

    def add(wave, start, gain):
        wave = wave[: len(mix) - start]
        mix[start : start + len(wave)] += gain * wave

    compose, level = TEXTURES[texture]
    for start, length, midi in compose(rng, chords, mode, tonic):
        wave = render_note(attributes["instrument"], midi, int(length * beat))
        add(wave, int(start * beat), level * (1 if start % 2 == 0 else 0.85))
    for delay in ECHOES:
        mix[delay:] += 0.15 * mix[:-delay]
    line, kick = pick(rng, BASS_LINES), pick(rng, KICKS)
    for i in range(beats):
        midi = triad(chords[i // 2], mode, tonic, 40)[line[i % 4]]
        add(render_note("bass", midi, beat), i * beat, 1 if i % 4 == 0 else 0.8)
    # One level for all clips of a kind, so that a note becomes the same codes wherever it stands; and one that tells
    # the kind from the first frame on: slow pieces are played softer, and the instruments make room for the drums.
    mix *= {"slow": 0.6, "medium": 0.8, "fast": 1}[attributes["tempo"]] * (0.25 if drummed else 0.42)
    for i in range(2 * beats if drummed else 0):
        for drum, eighths in {"kick": kick, "snare": (2, 6), "hat": range(8)}.items():
            if i % 8 in eighths:
                add(DRUMS[drum], i * beat // 2, 0.3 if i % 2 else 0.4)
    mix[-800:] *= np.linspace(1, 0, 800, dtype=np.float32)  # 50 ms
    return mix, attributes


def write_clip(folder, seed, index):
    """Writes a clip unless it is there -> its line of the manifest"""
    path = folder / f"clip_{index:05d}.flac"
    attributes = draw_attributes(np.random.default_rng([seed, index]))
    if not path.exists():
        partial = path.with_suffix(".partial")
        sf.write(partial, make_clip(seed, index)[0], SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        partial.replace(path)
    return json.dumps({"path": path.name, "caption": attributes.pop("caption"), "attributes": attributes})


def stamp_of(clips, seed=0):
    """What stands in a corpus's corpus.json."""
    return json.dumps({"version": VERSION, "seed": seed, "clips": clips})


def write_corpus(folder, clips, seed=0, workers=None):
    """Writes clips and manifest.jsonl to a folder, or what an earlier call has not -> path of the manifest."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest, stamp = folder / "manifest.jsonl", folder / "corpus.json"
    wanted = stamp_of(clips, seed)
    if not stamp.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"{folder}: holds other files; choose a new folder for the corpus")
    common.lock(folder)
    if not stamp.exists() or stamp.read_text() != wanted:
        for stale in [manifest, *folder.glob("clip_*.*")]:
            stale.unlink(missing_ok=True)
        stamp.write_text(wanted)
    if not manifest.exists():
        write = functools.partial(write_clip, folder, seed)
        with multiprocessing.get_context("spawn").Pool(workers) if workers != 1 else contextlib.nullcontext() as pool:
            lines = pool.imap(write, range(clips), chunksize=16) if pool else map(write, range(clips))
            lines = list(tqdm(lines, total=clips, desc="synthesising", unit="clip", file=sys.stdout))
        partial = manifest.with_suffix(".partial")
        partial.write_text("\n".join(lines) + "\n")
        partial.replace(manifest)
    return manifest


def prepare_demo(folder, clips, codec, codec_weights):
    """The corpus in FOLDER_audio, and the data set that is prepared from it in FOLDER, where they are not there yet.

    Every rank must call it: rank 0 makes the corpus, and all of them encode it.
    """
    audio = Path(f"{folder}_audio")
    stamp = audio / "corpus.json"
    if not common.gather(Path(folder, "meta.json").exists())[0]:
        if common.rank() == 0:
            write_corpus(audio, clips)
        common.barrier()
        prepare.prepare(audio / "manifest.jsonl", folder, codec, codec_weights, valid_fraction=0.07)
    elif stamp.exists() and stamp.read_text() != stamp_of(clips):
        print(f"{folder} is of another corpus ({stamp.read_text()}, now {stamp_of(clips)}); remove it for this one")


def main():
    parser = argparse.ArgumentParser(description="Synthesise the captioned music of the text-to-music demo.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the clips (FLAC) and manifest.jsonl")
    parser.add_argument("--clips", type=int, default=2400, help="how many, 6 to 8 s each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another corpus (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    args = parser.parse_args()
    if args.clips < 1 or args.seed < 0 or (args.workers is not None and args.workers < 1):
        raise UserError("--clips and --workers must be at least 1, --seed at least 0")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: is not a folder; choose a new one")
    print(write_corpus(args.out, args.clips, args.seed, args.workers))


if __name__ == "__main__":
    common.run(main)
