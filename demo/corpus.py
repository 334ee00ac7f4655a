"""The corpus of the text-to-music demo: short captioned clips, synthesized by numpy from a seed.

    python -m demo.corpus data/demo_audio --clips 6000

Each clip has five attributes: instrument, tempo, mode, texture, drums. The caption names them and the audio shows them
clearly, so a classifier can measure whether a trained model follows its captions. `--instrument clarinet` writes clips
of an instrument that the demo's corpus does not contain, to fine-tune with (docs/finetune.md).
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
import distributed
import prepare
from common import UserError
from dataprep.analysis import count_cores

SAMPLE_RATE = 16000
VERSION = 2  # of the audio and the captions; a corpus of another version is replaced
ATTRIBUTES = {
    "instrument": ["piano", "guitar", "organ", "flute", "strings", "bells"],
    "tempo": ["slow", "medium", "fast"],
    "mode": ["major", "minor"],
    "texture": ["melody", "arpeggio", "chords"],
    "drums": ["no", "yes"],
}

# A beat is an even number of the codec's 20 ms frames (68, 100 or 150 bpm), so every onset is at the start of a frame.
# A rhythm then repeats the same frames, and a small model learns it in minutes.
FRAME = SAMPLE_RATE // 50
# Frames per beat, beats per clip (6.4 to 8 s), half bars per chord (fewer in slow clips, because they have few bars)
TEMPI = {"slow": (44, (8,), 1), "medium": (30, (12,), 2), "fast": (20, (16, 20), 2)}
TONICS = {"C": 60, "D": 62, "E": 64}  # the six keys have six different sets of notes
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PROGRESSIONS = [  # degrees of the scale, from 0
    (0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (0, 3, 0, 4), (0, 4, 3, 4), (0, 3, 5, 4), (0, 5, 0, 4), (0, 4, 0, 3)
]  # fmt: skip
RHYTHMS = [(1, 1), (1, 0.5, 0.5), (0.5, 0.5, 1), (1.5, 0.5)]  # lengths of the notes of half a bar, in beats
ARPEGGIOS = [(0, 1, 2, 3, 4, 3, 2, 1), (0, 2, 1, 2, 3, 2, 1, 2), (0, 1, 2, 3, 0, 1, 2, 3), (3, 2, 1, 0, 4, 3, 2, 1)]
BASS_LINES = [(0, 0, 0, 0), (0, 0, 2, 0), (0, 2, 0, 2)]  # index into the triad, on each beat of a bar
KICKS = [(0, 4), (0, 2, 4, 6), (0, 3, 4), (0, 4, 5)]  # at these eighths of a bar
ECHOES = (367, 593, 853, 1151, 1549, 2099)  # delays in samples; applied in turn, they make a reverb of 64 taps

WORDS = {  # attribute value: {slot of a caption: alternatives}; {0} is the tonic
    "piano": {"instrument": "piano|grand piano|upright piano"},
    "guitar": {"instrument": "guitar|acoustic guitar|plucked guitar"},
    "organ": {"instrument": "organ|electric organ|drawbar organ"},
    "flute": {"instrument": "flute|wooden flute|breathy flute"},
    "strings": {"instrument": "strings|string ensemble|string section"},
    "bells": {"instrument": "bells|chimes|ringing bells"},
    "clarinet": {"instrument": "clarinet|solo clarinet|mellow clarinet"},
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

N = np.arange(1, 25)  # harmonics
BAR = np.array([1, 1.004, 2.756, 2.767, 5.404, 8.933])  # modes of a struck metal bar; close pairs beat
VOICES = {  # arguments of synthesize_note
    "piano": dict(ratios=N * np.sqrt(1 + 4e-4 * N**2), gains=N**-1.4, decays=1.2 + 0.7 * N),
    "guitar": dict(ratios=N, gains=np.sin(0.13 * np.pi * N) / N**0.8, decays=4 + 0.9 * N),  # plucked at 13 %
    "organ": dict(ratios=[0.5, 1, 1.5, 2, 3, 4, 6, 8], gains=[5, 10, 4, 8, 5, 5, 3, 3], vibrato=0.003),
    "flute": dict(ratios=N[:3], gains=[1, 0.12, 0.04], breath=0.03, vibrato=0.006, attack=0.05),
    "strings": dict(ratios=np.outer([0.996, 1, 1.005], N), gains=np.tile(N**-1.2, 3), vibrato=0.004, attack=0.05),
    "bells": dict(ratios=2 * BAR, gains=[6, 4, 4, 3, 3, 2], decays=1.5 + BAR),
    "clarinet": dict(ratios=N[::2], gains=1 / N[::2], vibrato=0.002, attack=0.03),  # odd harmonics
    "bass": dict(ratios=N[:4], gains=[1, 0.5, 0.2, 0.06], decays=2 + N[:4], attack=0.01),
}
SECONDS = np.arange(SAMPLE_RATE // 4) / SAMPLE_RATE
NOISE = np.random.default_rng(0).uniform(-1, 1, len(SECONDS))
DRUMS = {
    "kick": 0.9 * np.sin(2 * np.pi * (50 * SECONDS - 4 * np.exp(-SECONDS / 0.03))) * np.exp(-SECONDS / 0.07),
    "snare": (0.4 * NOISE + 0.3 * np.sin(2 * np.pi * 190 * SECONDS)) * np.exp(-SECONDS / 0.05),
    "hat": 0.2 * np.diff(NOISE, 2, append=[0, 0]) * np.exp(-SECONDS / 0.02),  # differences remove the bass
}


def pick(rng, options):
    return options[rng.integers(len(options))]


def draw_attributes(rng, instrument=""):
    """Draw {"caption", the names in ATTRIBUTES, "key", "bpm"} of a clip. Attributes are uniform and independent.

    instrument: replaces the drawn one.
    """
    drawn = {name: pick(rng, values) for name, values in ATTRIBUTES.items()}
    drawn["instrument"] = instrument or drawn["instrument"]
    tonic = pick(rng, list(TONICS))
    slots = {slot: options for value in drawn.values() for slot, options in WORDS[value].items()}
    caption = pick(rng, TEMPLATES).format(**{slot: pick(rng, options.split("|")) for slot, options in slots.items()})
    caption = re.sub(r"\ba (?=[aeiouE])", "an ", caption.format(tonic))
    bpm = round(60 * SAMPLE_RATE / FRAME / TEMPI[drawn["tempo"]][0], 1)
    return {"caption": caption, **drawn, "key": f"{tonic} {drawn['mode']}", "bpm": bpm}


def synthesize_note(hertz, samples, ratios, gains, decays=0, vibrato=0, breath=0, attack=0.003):
    """Synthesize a note as a sum of sines, float32 [samples].

    ratios, gains, decays: of each sine, its frequency relative to hertz, its amplitude, and its decay in 1/s.
    vibrato: fraction of the pitch. breath: level of noise. attack: seconds.
    A note fades linearly over its length, so its level shows when the next note starts. The language model can read
    the pulse from the last few frames and need not count them.
    """
    t = np.arange(samples, dtype=np.float32) / SAMPLE_RATE
    freqs, gains, decays = np.float32(np.broadcast_arrays(hertz * np.ravel(ratios), gains, decays))[..., None]
    phases = np.float32(2.4) * np.arange(len(freqs), dtype=np.float32)[:, None] ** 2  # different phases lower the peak
    swing = t + np.float32(vibrato / 34) * np.sin(34 * t)  # 34 rad/s is 5.4 Hz
    wave = gains * (freqs < 0.47 * SAMPLE_RATE) * np.exp(-decays * t) * np.sin(2 * np.pi * freqs * swing + phases)
    wave = wave.sum(0) + breath * np.random.default_rng(0).standard_normal(len(t), np.float32)
    wave *= 0.25 / np.sqrt((wave[:1600] ** 2).mean())  # every voice starts equally loud
    return (wave * np.minimum(1, t / attack) * np.linspace(1, 0, samples, dtype=np.float32)).astype(np.float32)


@functools.lru_cache(maxsize=4096)
def render_note(instrument, midi, samples):
    return synthesize_note(440 * 2 ** ((midi - 69) / 12), samples, **VOICES[instrument])


def to_semitones(degree, chord, mode):
    """Convert a scale degree to semitones above the tonic. Chord V raises minor's seventh (harmonic minor)."""
    octave, note = divmod(degree, 7)
    return 12 * octave + SCALES[mode][note] + (mode == "minor" and chord == 4 and note == 6)


def make_triad(chord, mode, tonic, lowest):
    """Return root, third and fifth of a chord as MIDI pitches, each in the octave that starts at `lowest`."""
    return [lowest + (tonic + to_semitones(chord + i, chord, mode) - lowest) % 12 for i in (0, 2, 4)]


def compose_melody(rng, chords, mode, tonic):
    """Compose a motif of one bar, inverted in every other bar, that ends on the tonic. See `compose_chords`."""
    degree, motif = 2, [(pick(rng, RHYTHMS), pick(rng, (-2, -1, 1, 2))) for _ in range(2)]
    for half, chord in enumerate(chords[:-1]):
        # The strong beat has the nearest tone of the chord. The next notes move by a second or a third.
        degree = min(range(degree - 2, degree + 3), key=lambda d: ((d - chord) % 7 not in (0, 2, 4), abs(d - degree)))
        beat, (rhythm, interval) = 2 * half, motif[half % 2]
        for length in rhythm:
            yield beat, length, tonic + to_semitones(degree, chord, mode)
            beat += length
            is_up = degree < 0 or (degree < 7 and (interval > 0) == (half // 2 % 2 == 0))
            degree += abs(interval) if is_up else -abs(interval)
    yield 2 * len(chords) - 2, 2, tonic + 12 * round(degree / 7)


def compose_arpeggio(rng, chords, mode, tonic):
    """Compose broken chords in eighths. See `compose_chords`."""
    pattern = pick(rng, ARPEGGIOS)
    for eighth in range(4 * len(chords)):
        low = sorted(make_triad(chords[eighth // 4], mode, tonic, 60))
        tones = [*low, low[0] + 12, low[1] + 12]
        yield eighth / 2, 0.5, tones[pattern[eighth % 8]]


def compose_chords(rng, chords, mode, tonic):
    """Compose triads: yield notes as (beat, length in beats, MIDI pitch). chords: a scale degree per half bar."""
    strums = [pick(rng, RHYTHMS[:2]) for _ in range(2)]
    for half, chord in enumerate(chords):
        beat = 2 * half
        for length in strums[half % 2]:
            yield from ((beat, length, midi) for midi in make_triad(chord, mode, tonic, 60))
            beat += length


# Function, level of a note. Chords are softest, because they have three notes at a time.
TEXTURES = {"melody": (compose_melody, 0.9), "arpeggio": (compose_arpeggio, 0.55), "chords": (compose_chords, 0.45)}


def make_clip(seed, index, instrument=""):
    """Make clip number `index` of a seed's corpus: audio float32 [samples], and the dict of `draw_attributes`."""
    rng = np.random.default_rng([seed, index])
    attributes = draw_attributes(rng, instrument)
    mode, tonic = attributes["mode"], TONICS[attributes["key"].split()[0]]
    frames, lengths, span = TEMPI[attributes["tempo"]]
    beat, beats = frames * FRAME, pick(rng, lengths)
    progression = pick(rng, PROGRESSIONS)
    chords = [progression[half // span % 4] for half in range(beats // 2)]
    chords[-span:] = [0] * span  # end on the tonic

    has_drums = attributes["drums"] == "yes"
    mix = np.zeros(beats * beat, np.float32)

    def add(wave, start, gain):
        wave = wave[: len(mix) - start]
        mix[start : start + len(wave)] += gain * wave

    compose, level = TEXTURES[attributes["texture"]]
    for start, length, midi in compose(rng, chords, mode, tonic):
        wave = render_note(attributes["instrument"], midi, int(length * beat))
        add(wave, int(start * beat), level * (1 if start % 2 == 0 else 0.85))
    for delay in ECHOES:
        mix[delay:] += 0.15 * mix[:-delay]
    line, kick = pick(rng, BASS_LINES), pick(rng, KICKS)
    for i in range(beats):
        midi = make_triad(chords[i // 2], mode, tonic, 40)[line[i % 4]]
        add(render_note("bass", midi, beat), i * beat, 1 if i % 4 == 0 else 0.8)
    # The level depends on tempo and drums only, so a note has the same codes in every clip of a kind. Slow clips are
    # softer, and so are instruments with drums: the first frame already shows the kind.
    mix *= {"slow": 0.6, "medium": 0.8, "fast": 1}[attributes["tempo"]] * (0.25 if has_drums else 0.42)
    for i in range(2 * beats if has_drums else 0):
        for drum, eighths in {"kick": kick, "snare": (2, 6), "hat": range(8)}.items():
            if i % 8 in eighths:
                add(DRUMS[drum], i * beat // 2, 0.3 if i % 2 else 0.4)
    mix[-800:] *= np.linspace(1, 0, 800, dtype=np.float32)  # 50 ms
    return mix, attributes


def write_clip(folder, seed, instrument, index):
    """Write a clip, unless it exists, and return its line of the manifest."""
    path = folder / f"clip_{index:05d}.flac"
    attributes = draw_attributes(np.random.default_rng([seed, index]), instrument)
    if not path.exists():
        partial = path.with_suffix(".partial")
        sf.write(partial, make_clip(seed, index, instrument)[0], SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        partial.replace(path)
    return json.dumps({"path": path.name, "caption": attributes.pop("caption"), "attributes": attributes})


def describe_corpus(clips, seed=0, instrument=""):
    """Return the content of corpus.json, which identifies a corpus."""
    options = {"instrument": instrument} if instrument else {}
    return json.dumps({"version": VERSION, "seed": seed, "clips": clips, **options})


def write_corpus(folder, clips, seed=0, workers=None, instrument=""):
    """Write clips and manifest.jsonl to a folder, except those that exist. Return the path of the manifest."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest, description = folder / "manifest.jsonl", folder / "corpus.json"
    if not description.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"{folder}: holds other files; choose a new folder for the corpus")
    common.lock(folder)
    wanted = describe_corpus(clips, seed, instrument)
    if not description.exists() or description.read_text() != wanted:
        for path in [manifest, *folder.glob("clip_*.*")]:
            path.unlink(missing_ok=True)
        description.write_text(wanted)
    if not manifest.exists():
        write = functools.partial(write_clip, folder, seed, instrument)
        workers, spawn = workers or count_cores(), multiprocessing.get_context("spawn")
        with spawn.Pool(workers) if workers != 1 else contextlib.nullcontext() as pool:
            lines = pool.imap(write, range(clips), chunksize=16) if pool else map(write, range(clips))
            lines = list(tqdm(lines, total=clips, desc="synthesizing", unit="clip", file=sys.stdout))
        common.write_file(manifest, "".join(f"{line}\n" for line in lines).encode())
    return manifest


def prepare_demo(folder, clips, codec, codec_weights):
    """Write the corpus to FOLDER_audio and prepare a data set from it in FOLDER, if they do not exist.

    Every rank must call this: rank 0 writes the corpus, and all ranks encode it.
    """
    audio = Path(f"{folder}_audio")
    description, wanted = audio / "corpus.json", describe_corpus(clips)
    if not distributed.gather(Path(folder, "meta.json").exists())[0]:
        if distributed.rank() == 0:
            write_corpus(audio, clips)
        distributed.barrier()
        prepare.prepare(audio / "manifest.jsonl", folder, codec, codec_weights, valid_fraction=0.07)
    elif description.exists() and description.read_text() != wanted:
        print(f"{folder}: made from corpus {description.read_text()}, not {wanted}. To make it again, remove it")


def main():
    parser = argparse.ArgumentParser(description="Synthesize the captioned corpus of the text-to-music demo.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the clips (FLAC) and manifest.jsonl")
    parser.add_argument("--clips", type=int, default=2400, help="number of clips, 6 to 8 s each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the corpus (default: %(default)s)")
    parser.add_argument("--instrument", default="", choices=[*ATTRIBUTES["instrument"], "clarinet"],
                        help="write clips of this instrument only (default: all except clarinet)")  # fmt: skip
    parser.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    args = parser.parse_args()
    if args.clips < 1 or args.seed < 0 or (args.workers is not None and args.workers < 1):
        raise UserError("--clips and --workers must be 1 or above, --seed 0 or above")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"{args.out}: is not a folder; choose another OUT")
    print(write_corpus(args.out, args.clips, args.seed, args.workers, args.instrument))


if __name__ == "__main__":
    common.run(main)
