"""Make training music for the `tiny` codec: composed at random or read from MIDI files, and played by fluidsynth.

    apt-get install fluidsynth fluid-soundfont-gm     # the sound font is Frank Wen's, under the MIT licence
    python -m demo.scores data/scores --midi freedoom1.wad freedoom2.wad

OUT/music: random music for General MIDI instruments. OUT/midi: the given files. OUT/tests: tones, sweeps and noise.
"""

import argparse
import functools
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import common
from audio import load_audio, write_audio
from demo.corpus import SAMPLE_RATE, pick

SECONDS, TICKS = 60, 480  # length of composed music, MIDI ticks per beat
SOUND_FONT = "/usr/share/sounds/sf2/FluidR3_GM.sf2"
SCALES = [(0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10), (0, 2, 3, 5, 7, 9, 10), (0, 2, 4, 5, 7, 9, 10)]
SHAPES = [(0, 2, 4), (0, 2, 4), (0, 2, 4, 6), (0, 1, 4), (0, 4, 9), (0, 2, 4, 8)]  # chords, in degrees of the scale
PROGRAMS = {  # General MIDI numbers, from 0, of the usual instruments of each role
    "bass": [32, 33, 33, 34, 35, 36, 38, 39, 43, 58, 67],
    "chords": [0, 0, 1, 2, 4, 5, 7, 16, 18, 19, 21, 24, 25, 26, 27, 28, 29, 30, 46, 48, 61],
    "pad": [48, 48, 49, 50, 51, 52, 53, 54, 88, 89, 90, 91, 92, 94, 95, 19, 60],
    "arpeggio": [0, 4, 6, 8, 10, 11, 12, 13, 24, 25, 45, 46, 80, 81, 99, 104, 108],
    "melody": [0, 11, 22, 27, 29, 30, 40, 41, 42, 52, 53, 56, 57, 59, 60, 64, 65, 66, 68, 71, 73, 75, 78, 80, 81, 82],
    "drums": [0, 0, 0, 8, 16, 24, 25, 26, 32, 40, 48],
}
DRUMS = [(35, 36), (37, 38, 38, 39, 40), (42, 42, 44, 46, 51, 70), (45, 47, 49, 50, 54, 56, 63)]


def compose(rng, role, chords, bar):
    """Compose a section, with a chord per bar: yield notes as (beat, length, scale degree or drum, loudness)."""
    grid = np.arange(0, bar, pick(rng, [0.5, 0.5, 1]))
    rhythm = grid[(rng.random(len(grid)) < rng.uniform(0.3, 1)) | (grid == 0)]
    lengths = np.diff([*rhythm, bar]) * rng.uniform(0.3, 1.1)
    step, order, degree = pick(rng, [0.25, 0.5]), rng.permutation(5)[: rng.integers(3, 6)], int(rng.integers(7, 11))
    hits = rng.random((4, 4 * bar)) < rng.uniform(0.05, [[0.25], [0.15], [0.15], [0.15]])
    hits[0, 0], hits[1, 4::8], hits[2, :: pick(rng, [1, 2, 2, 4])] = True, True, True
    kit = [pick(rng, drums) for drums in DRUMS]
    for start, chord in zip(np.arange(len(chords)) * bar, chords):
        played = list(zip(start + rhythm, lengths))
        if role == "pad":
            for tone in chord:
                yield start, bar, tone, 0.7
        elif role == "arpeggio":
            for i in range(int(bar / step)):
                yield start + i * step, 1.5 * step, [*chord, chord[0] + 7, chord[1] + 7][order[i % len(order)]], 0.8
        elif role == "drums":
            for drum, i in zip(*np.nonzero(hits != (rng.random(hits.shape) < 0.02))):
                yield start + i / 4, 0.2, kit[drum], (1, 0.9, 0.7, 0.6)[drum]
        elif role == "bass":
            for i, (beat, length) in enumerate(played):
                yield beat, length, chord[2 if i % 3 == 2 else 0] - 14, 1
        elif role == "chords":
            for beat, length in played:
                for j, tone in enumerate(chord):
                    yield beat + 0.02 * j, length, tone, 0.8  # strummed
        elif role == "melody":
            for beat, length in played:
                if rng.random() < 0.85:
                    yield beat, length, degree, 0.9
                    degree = int(np.clip(degree + pick(rng, [-4, -2, -1, -1, 1, 1, 2, 3]), -3, 12))


def make_midi(rng):
    """Compose SECONDS of music from three sections in random order: return a MIDI file, bytes."""
    bpm, bar, scale, low = rng.uniform(55, 180), pick(rng, [3, 4, 4, 4]), pick(rng, SCALES), int(rng.integers(54, 66))
    form, shape = rng.integers(0, 3, int(np.ceil(SECONDS * bpm / 60 / (4 * bar)))), pick(rng, SHAPES)
    progressions = [[[root + tone for tone in shape] for root in rng.integers(-3, 5, 4)] for _ in range(3)]
    counts = {"bass": [0, 1, 1], "melody": [0, 1, 1, 2], "drums": [0, 1, 1]}
    roles = [role for role in PROGRAMS for _ in range(pick(rng, counts.get(role, [0, 0, 1, 2])))] or ["melody"]
    events = [(0, 0, b"\xff\x51\x03" + struct.pack(">I", int(60e6 / bpm))[1:])]
    for channel, role in zip([*range(len(roles) - 1), 9 if "drums" in roles else len(roles) - 1], roles):
        program = int(rng.integers(120)) if role != "drums" and rng.random() < 0.25 else pick(rng, PROGRAMS[role])
        events.append((0, 1, bytes([0xC0 + channel, program])))
        for control, limit in ((7, 128), (91, 128), (93, 90), (1, 40)):  # volume, reverb, chorus, vibrato
            events.append((0, 1, bytes([0xB0 + channel, control, rng.integers(50 if control == 7 else 0, limit)])))
        lowest = low + (pick(rng, [-12, 0, 0, 12]) if role != "bass" else 0)
        parts = [list(compose(rng, role, chords, bar)) for chords in progressions]
        force, is_playing = rng.uniform(60, 127), rng.random(len(form)) < rng.uniform(0.5, 1.1)
        for i in np.flatnonzero(is_playing):
            for beat, length, key, loudness in parts[form[i]]:
                key = key if role == "drums" else lowest + 12 * (key // 7) + scale[key % 7]
                beat = 4 * bar * i + beat + abs(rng.normal(0, 0.01))
                note = bytes([np.clip(key, 20, 108), int(np.clip(force * loudness * rng.uniform(0.8, 1.1), 1, 127))])
                events.append((int(beat * TICKS), 3, bytes([0x90 + channel]) + note))
                events.append((int((beat + length) * TICKS), 2, bytes([0x80 + channel]) + note))
    track, now = b"", 0
    for tick, _, message in [*sorted(events), (int(SECONDS * bpm / 60 * TICKS), 0, b"\xff\x2f\x00")]:
        delta, now = max(0, tick - now), tick
        track += bytes([0x80 | delta >> 14 & 127, 0x80 | delta >> 7 & 127, delta & 127]) + message  # 7 bits per byte
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS) + b"MTrk" + struct.pack(">I", len(track)) + track


def read_midi(path):
    """Read a .mid file, or a Doom .wad with several: return [(name, bytes)]."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise common.UserError(f"{path}: cannot be read ({error.strerror})") from None
    if path.suffix.lower() != ".wad":
        return [(path.stem, content)]
    try:
        kind, count, directory = struct.unpack_from("<4sII", content)
        lumps = [struct.unpack_from("<II8s", content, directory + 16 * i) for i in range(count)]
    except struct.error:
        kind = b""
    if kind not in (b"IWAD", b"PWAD"):
        raise common.UserError(f"{path}: not a .wad file, or cut off; pass another, or .mid files")
    scores = [(name.split(b"\0")[0].decode("ascii", "replace"), content[start : start + size])
              for start, size, name in lumps]  # fmt: skip
    return [(f"{path.stem}_{name}", score) for name, score in scores if score.startswith(b"MThd")]


def render(name, score, seconds, rng):
    """Render a MIDI file, bytes, with random equalizer, compressor, saturation, level and hiss: float [samples]."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder, "score.mid"), Path(folder, "out.wav")
        path.write_bytes(score)
        options = f"-qni -g 0.3 -r 32000 -T wav -o synth.reverb.room-size={rng.uniform(0, 0.9):.2f} -F".split()
        subprocess.run(["fluidsynth", *options, out, SOUND_FONT, path], check=True, capture_output=True)
        wav = load_audio(out, SAMPLE_RATE)[0, : seconds * SAMPLE_RATE].numpy()
    if len(wav) < SAMPLE_RATE:
        raise common.UserError(f"{name}: fluidsynth plays less than a second; remove the file if it is damaged")
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(wav), 1 / SAMPLE_RATE), 31.25) / 31.25)
    curve = np.interp(octaves, range(9), rng.normal(0, 3, 9) - rng.uniform(0, 3) * np.arange(9))  # dB
    wav = np.fft.irfft(np.fft.rfft(wav) * 10 ** (curve / 20), len(wav))
    level = np.sqrt(np.convolve(wav**2, np.full(1600, 1 / 1600), "same")) + 1e-3 + 0.1 * wav.std()
    wav *= level ** -rng.uniform(0, 0.4)
    wav = np.tanh(wav / max(1e-6, wav.std()) * 10 ** rng.uniform(-2, -0.4))
    wav *= rng.uniform(0.3, 0.98) / max(1e-6, np.abs(wav).max())
    return wav + 10 ** rng.uniform(-5, -3) * rng.standard_normal(len(wav))


def make_test(rng):
    """Make 28 test sounds of 0.3 to 4 s and -46 to -1 dBFS, with silence between them: float [samples]."""
    sounds = []
    for kind in rng.integers(0, 8, 28):
        t = np.arange(int(SAMPLE_RATE * rng.uniform(0.3, 4))) / SAMPLE_RATE
        low, high = np.sort(30 * 250 ** rng.random(2))
        hertz = 30 * 250 ** rng.random((pick(rng, [1, 1, 1, 2, 3, 5]), 1))
        swing = t + pick(rng, [0, 0, 1e-3]) * np.sin(rng.uniform(5, 40) * t)
        wav = np.sin(2 * np.pi * (hertz * swing + rng.random(hertz.shape))).sum(0)
        if kind == 0:
            wav = np.sin(2 * np.pi * np.cumsum(np.geomspace(low, high, len(t))[:: pick(rng, [-1, 1])]) / SAMPLE_RATE)
        elif kind == 1:
            wav = np.float64(np.arange(len(t)) % int(SAMPLE_RATE / rng.uniform(1, 300)) == 0)
        elif kind == 2:
            bins = np.fft.rfftfreq(len(t), 1 / SAMPLE_RATE)
            wav = np.fft.irfft(np.fft.rfft(rng.standard_normal(len(t))) * (bins >= low) * (bins <= 1.1 * high), len(t))
        wav *= np.minimum(1, np.minimum(t, t[::-1]) / 0.003) / max(1e-6, np.abs(wav).max())
        wav *= np.exp(-t * pick(rng, [0, 0, 0, 3, 10])) * 10 ** (-rng.uniform(1, 46) / 20)
        sounds += [wav, np.zeros(rng.integers(8000))]
    return np.concatenate(sounds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder; existing files are kept")
    parser.add_argument("--minutes", type=int, default=240, help="minutes of composed music (default: %(default)s)")
    parser.add_argument("--midi", type=Path, nargs="+", default=[], metavar="FILE", help=".mid or .wad, to render too")
    args = parser.parse_args()
    for path in (shutil.which("fluidsynth") or "fluidsynth", SOUND_FONT):
        if not Path(path).exists():
            raise common.UserError(f"{path}: not found; apt-get install fluidsynth fluid-soundfont-gm")
    jobs = {f"tests/tests_{i:04d}": make_test for i in range(0, args.minutes, 10)}
    for i in range(args.minutes):
        jobs[f"music/music_{i:04d}"] = lambda rng: render("composed music", make_midi(rng), SECONDS, rng)
    for path in args.midi:
        for name, score in read_midi(path):
            jobs[f"midi/{name}"] = functools.partial(render, path, score, 150)
    for name, make in tqdm(jobs.items(), desc=str(args.out), file=sys.stdout, mininterval=1):
        path, rng = args.out / f"{name}.flac", np.random.default_rng(zlib.crc32(name.encode()))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_audio(path, torch.from_numpy(make(rng))[None], SAMPLE_RATE)


if __name__ == "__main__":
    common.run(main)
