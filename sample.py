"""Text, a melody, a style, the beginning of a piece, or any of them together, to music.

python sample.py out/demo/best.pt "a slow piano melody in a minor key, with drums" --duration 8
python sample.py out/demo/best.pt "fast bells" "calm strings, no drums" --cfg 4 --seed 7
python sample.py out/demo/best.pt "organ chords" --continue beginning.wav --duration 12
python sample.py out/demo_melody/best.pt "organ, with drums" --melody tune.wav
python sample.py out/demo_style/best.pt "a fast melody" --style excerpt.wav --style_books 2 --cfg_beta 2
python sample.py out/demo/best.pt --file captions.txt --n 4 --format flac --spectrogram
python sample.py out/demo/best.pt --interactive
python sample.py --again samples/fast_bells_7.json
python sample.py out/demo/best.pt "fast bells" --duration 60 --stream | aplay -f S16_LE -r 16000 -c 1
python sample.py out/demo/best.pt "fast bells" --duration 60 --stream | ffplay -f s16le -sample_rate 16000 -nodisp -

Beside each file stands a .json of all that it takes to make it again. The first take has the seed --seed, the next one
the next: a take is the same alone or among others, up to rounding.

Letters: K codebooks, n frames.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import soundfile
import torch
from tqdm import tqdm

import config
import distributed
import metrics
import report
from codec import FORMATS, decode_stream, encode_long, file_name, load_audio, load_codec, write_audio, write_wav
from conditioning import CHROMA_RATE, INFERENCE_BOOKS, SILENCE, melody_of
from config import UserError, first_line
from loudness import level
from model import load_model, pick_device

UNWRITTEN = {".m4a", ".aac", ".opus", ".aiff", ".aif", ".wma", ".mp4", ".webm"}  # audio, but not of FORMATS
CHOICES = ("cfg", "cfg_beta", "temperature", "top_k", "top_p")
FILES = ("checkpoint", "prompt", "melody", "style")  # what a clip is made from
AGAIN = (*FILES, "codec_weights", "seed", "duration", "stride", "style_books", "loudness", "format", "dtype", *CHOICES)
TEXTS, OPTIONAL = ("caption", "checkpoint", "format", "dtype"), ("prompt", "melody", "style", "codec_weights")
KINDS = {
    **dict.fromkeys(TEXTS, str),
    **dict.fromkeys(OPTIONAL, (str, type(None))),
    "loudness": (int, float, type(None)),
}


def arguments():
    """What the command line asks for, on top of what the .json given to --again does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a best.pt; it holds all that is needed")
    parser.add_argument("captions", nargs="*", default=[], help="what to play; none, or an empty one: unconditional")
    parser.add_argument("--file", help="more captions, a line each")
    parser.add_argument("--interactive", action="store_true", help="more captions, asked for one by one")
    parser.add_argument("--n", type=int, default=1, help="takes of each caption (default 1)")
    parser.add_argument("--duration", type=float, default=8.0, help="seconds, the prompt included (default 8)")
    parser.add_argument("--stride", type=float, help="past the trained length, seconds that each further window of that"
                        " length adds: fewer hear more of what was (default: half of it)")  # fmt: skip
    parser.add_argument("--continue", dest="prompt", metavar="AUDIO", help="go on from this audio")
    parser.add_argument("--melody", metavar="AUDIO", help="follow its pitch classes, from its beginning")
    parser.add_argument("--style", metavar="AUDIO", help="sound like its middle")
    parser.add_argument("--style_books", type=int, default=INFERENCE_BOOKS, help="how closely, from 1 to the 6 or so of"
                        " training (default 3)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the first take; the next has the next (default 0)")
    parser.add_argument("--cfg", type=float, help="guidance; 1 switches it off (default: as in training's samples)")
    parser.add_argument("--cfg_beta", type=float, help="with text and style: above 1 the text counts more")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest code")
    parser.add_argument("--top_k", type=int, help="sample among so many codes; 0: all")
    parser.add_argument("--top_p", type=float, help="sample within this probability mass instead of top_k")
    parser.add_argument("--batch", type=int, default=8, help="takes made at once, at most (default 8)")
    parser.add_argument("--out", default="samples", help="folder (default samples); or a single FILE.wav, .flac, .ogg"
                        " or .mp3, which several takes turn into FILE_0.wav, FILE_1.wav ...")  # fmt: skip
    parser.add_argument("--format", choices=[suffix[1:] for suffix in FORMATS], default="wav",
                        help="of the files in a folder (default wav)")  # fmt: skip
    parser.add_argument("--loudness", type=lufs, default=-23.0, help="integrated loudness after ITU-R"
                        " BS.1770-4, less where its true peak would pass -1 dBTP; none: as it is (default -23, that of"
                        " EBU R 128)")  # fmt: skip
    parser.add_argument("--spectrogram", action="store_true", help="a .png beside each file")
    parser.add_argument("--stream", action="store_true", help="one take to stdout while it is made: raw signed 16-bit"
                        " little-endian samples for a player, as above; how loud it will be is not known then, so its"
                        " level is as the model has it, clipped at full scale"
                        )  # fmt: skip
    parser.add_argument("--again", metavar="JSON", help="make again the clip that this file stands beside")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--dtype", choices=config.CHOICES["dtype"], default="auto", help="of the weights and of what is"
                        " computed (default auto: bfloat16 where the device computes in it, else float32)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile first, half a minute or less: worth it for long"
                        " music, or for much of it")  # fmt: skip
    parser.add_argument("--codec_weights", help="file or folder, where the codec's own are elsewhere than in training")
    args, record = parser.parse_intermixed_args(), {}
    if args.again:
        try:
            if args.checkpoint:
                raise ValueError("it has its own checkpoint and caption; give options only")
            record = json.loads(Path(args.again).read_text(encoding="utf-8"))
            record = {"dtype": "float32", **record}  # of clips made before there was a choice
            for key in ("caption", *AGAIN):
                if not isinstance(record[key], KINDS.get(key, (int, float))):
                    raise ValueError(f'"{key}" is {record[key]!r}')
            parser.set_defaults(captions=[record["caption"]], **{key: record[key] for key in AGAIN})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--again {args.again}: not the .json of a clip ({first_line(error)})") from None
        args = parser.parse_intermixed_args()
    suffix = Path(args.out).suffix.lower()
    args.format = suffix[1:] if suffix in FORMATS else args.format
    return args, record


def lufs(text):
    return None if text == "none" else float(text)


def captions_of(args):
    """Those of the command line, then those of --file; without either and nobody to ask, the empty one."""
    captions = [caption.encode(errors="replace").decode() for caption in args.captions]  # a terminal may send any bytes
    if args.file:
        try:
            lines = Path(args.file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"--file {args.file}: is not UTF-8 text; save it as that") from None
        except OSError as error:
            raise UserError(f"--file {args.file}: cannot be read ({error.strerror})") from None
        captions += [line.strip() for line in lines if line.strip()]
        if not captions:
            raise UserError(f"--file {args.file}: holds no caption; write one on each line")
    return captions or ([] if args.interactive else [""])


def asked():
    """Captions from the keyboard, or a pipe, one by one, [caption], up to an empty line or the end."""
    sys.stdin.reconfigure(errors="replace")
    with contextlib.suppress(EOFError):
        while caption := input("caption> ").strip():
            yield [caption]
    print()


def refuse(args, captions):
    """Raises UserError for what can be seen to be wrong before a model is loaded."""
    if not args.checkpoint:
        raise UserError("no checkpoint: give the best.pt of a run, or --again with the .json beside a clip")
    if not 0 < args.duration < math.inf:
        raise UserError(f"--duration {args.duration:g}: must be above 0 seconds")
    for key in ("checkpoint", "prompt", "melody", "style", "out"):
        if (path := getattr(args, key)) and any("\ud800" <= character <= "\udfff" for character in path):
            raise UserError(f"{path!r}: holds bytes that are no text; give the file or folder another name")
    if not 0 <= args.seed < 2**62:
        raise UserError(f"--seed {args.seed}: must lie between 0 and 2^62")
    if args.style_books != INFERENCE_BOOKS and not args.style:
        raise UserError("--style_books: says how closely to follow --style, which is not given")
    if args.n < 1 or args.batch < 1:
        raise UserError("--n and --batch must be 1 or above")
    if args.loudness is not None and not -70 <= args.loudness <= 0:
        raise UserError(f"--loudness {args.loudness:g}: must lie between -70 and 0 LUFS, -23 or so, or be none")
    suffix = Path(args.out).suffix.lower()
    if suffix in UNWRITTEN or (suffix in FORMATS and Path(args.out).is_dir()):
        what = "is a folder" if suffix in FORMATS else "is no format that can be written"
        raise UserError(f"--out {args.out}: {what}; name a new folder, or a file in {', '.join(FORMATS)}")
    if not args.stream:
        config.refuse_unwritable(folder_of(args.out), "--out")
    elif args.interactive or len(captions) * args.n != 1:
        raise UserError("--stream is for one take of one caption")
    elif sys.__stdout__.isatty():
        raise UserError("--stream writes raw samples to stdout: pipe it into a player, as --help shows")


def folder_of(out):
    return Path(out).parent if Path(out).suffix.lower() in FORMATS else Path(out)


def load(args):
    """-> (model, its settings, codec) on the device asked for."""
    device, dtype = pick_device(args.device, args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    model, s, about = load_model(args.checkpoint, device)
    model.for_generation(dtype, args.compile)
    codec = load_codec(about["name"], s.codec_weights if args.codec_weights is None else args.codec_weights)
    if codec.id != about["id"]:
        raise UserError(f"{args.checkpoint} was trained on codec {about['id']}, and the one found is {codec.id}")
    return model, s, codec.to(device)


def request(args, model, s, codec):
    """What `generate` and `stream` are asked for besides conditions and seeds: frames, prompt, stride, the choices."""
    choice = {key: getattr(s, key) if (given := getattr(args, key)) is None else given for key in CHOICES}
    if choice["top_k"] > codec.card:
        print(f"top_k {choice['top_k']} is more than the codec's {codec.card} codes: taken as {codec.card}")
    if not (choice["top_k"] >= 0 and 0 <= choice["temperature"] < math.inf and 0 <= choice["top_p"] <= 1):
        raise UserError("--top_k and --temperature must be 0 or above, and --top_p between 0 and 1")
    for key in ("cfg", "cfg_beta"):
        if not math.isfinite(choice[key]):
            raise UserError(f"--{key} {choice[key]}: must be a number, 3 or so")
    frames, trained = max(1, round(args.duration * codec.frame_rate)), model.trained_frames
    stride = trained // 2
    if args.stride is not None:
        if not 0.5 < args.stride * codec.frame_rate < trained - 0.5:
            raise UserError(f"--stride {args.stride:g}: must be above 0 and below the {s.segment:g} s of training")
        stride = round(args.stride * codec.frame_rate)
    if frames > trained:
        print(f"{args.duration:g} s is past the {s.segment:g} s of training: going on in windows of that length,"
              f" {stride / codec.frame_rate:g} s further each time")  # fmt: skip
    prompt = None
    if args.prompt:
        wav = load_audio(args.prompt, codec.sample_rate, codec.channels)
        if math.ceil(wav.shape[1] / codec.hop) >= frames:
            raise UserError(
                f"--continue {args.prompt}: {wav.shape[1] / codec.sample_rate:.1f} s long, and --duration is"
                f" {args.duration:g} s in all; make --duration longer"
            )
        wav = wav[:, : max(1, wav.shape[1] // codec.hop) * codec.hop]  # a frame that ends in silence would be an ending
        prompt = encode_long(codec, wav)[None]
    return dict(frames=frames, prompt=prompt, stride=stride, **choice)


def heard_from(args, model, s, codec):
    """What --melody and --style add to every take's conditions; says what was done to make the files fit."""
    shared, embedders = {}, model.conditioner.prepended
    for name in ("melody", "style"):
        if not (path := getattr(args, name)):
            continue
        if name not in embedders:
            takes = ", ".join(["text", *embedders])
            raise UserError(f"--{name}: {args.checkpoint} was not trained with it; its conditions are {takes}")
        wav = load_audio(path, codec.sample_rate, codec.channels)
        seconds, rate = wav.shape[1] / codec.sample_rate, soundfile.info(path).samplerate
        if seconds * CHROMA_RATE < 1:
            raise UserError(f"--{name} {path}: {seconds:.3f} s long; at least {1 / CHROMA_RATE:g} s are needed")
        if wav.abs().max() < 1e-3:
            channels = " when mixed to mono" if soundfile.info(path).channels > codec.channels else ""
            raise UserError(f"--{name} {path}: is silent{channels}, with no sample above -60 dBFS")
        done = [f"resampled from {rate} to {codec.sample_rate} Hz"] if rate != codec.sample_rate else []
        if name == "melody":
            notes = melody_of(wav.mean(0), codec.sample_rate)
            if (notes == SILENCE).all():
                raise UserError(f"--melody {path}: no note is heard in it, between C2 and B7 and above -60 dBFS")
            needed = math.ceil(args.duration * CHROMA_RATE)
            window = max(needed, math.ceil(s.segment * CHROMA_RATE))  # silence after it would ask for an ending
            shared["melody"] = notes.repeat(-(-window // len(notes)))[:window]
            if len(notes) != needed:
                done.append(f"{'repeated' if len(notes) < needed else 'cut'} to {args.duration:g} s")
        else:
            if not 1 <= args.style_books <= s.style_books:
                raise UserError(f"--style_books {args.style_books}: must be from 1 to the {s.style_books} of training")
            codes, shortest = encode_long(codec, wav), s.style_seconds[0]
            most = min(embedders["style"].frames, model.trained_frames // 2)  # no excerpt of training was longer
            first = max(0, codes.shape[1] - most) // 2
            shared["style"] = (codes[:, first:][:, :most], args.style_books)
            if codes.shape[1] > most:
                done.append(f"its middle {most / codec.frame_rate:g} s are taken")
            elif seconds < shortest:
                done.append(f"shorter than any in training, which were {shortest:g} s or more")
        if done:
            print(f"--{name} {path}, {seconds:.1f} s: {'; '.join(done)}")
    return shared


def tell_what_is_heard(captions, embedder, shared):
    """Says of each caption that the model does not hear, or not to its end, that it is so."""
    for caption in dict.fromkeys(captions):
        tokens = len(embedder.tokenizer.encode(caption))
        if not tokens:
            print(f"no caption: {'by ' + ' and '.join(shared) + ' alone' if shared else 'unconditional music'}")
        elif tokens > embedder.max_tokens:
            print(f"'{caption[:40]}...': of its {tokens} tokens the model hears the first {embedder.max_tokens}")


def generated(model, codec, takes, wanted, batch_size):
    """Takes [(conditions, seed)] -> (conditions, seed, wav [channels, samples]), each as soon as its batch is done."""
    have = 0 if wanted["prompt"] is None else wanted["prompt"].shape[2]
    new, started = wanted["frames"] - have, time.monotonic()
    with tqdm(total=len(takes) * new, desc="generating", unit="frame", file=sys.stdout, mininterval=0.5) as bar:
        for first in range(0, len(takes), batch_size):
            batch = takes[first : first + batch_size]

            def progress(done, before=first, batch=batch):
                bar.update(before * new + (done - have) * len(batch) - bar.n)
                speed = bar.n / codec.frame_rate / (time.monotonic() - started)
                bar.set_postfix_str(f"{speed:.1f} x real time", refresh=False)

            conditions, seeds = map(list, zip(*batch))
            codes = model.generate(conditions, seeds=seeds, progress=progress, **wanted)
            for take, clip in zip(batch, codes):
                yield *take, codec.decode(clip[None])[0].cpu()


def play(codec, parts):
    """Codes [1, K, n], as they come, to stdout as interleaved signed 16-bit little-endian samples."""
    channels = f" -ac {codec.channels}" if codec.channels > 1 else ""  # one is the default; newer ffplays lack -ac
    print(f"play it by: aplay -f S16_LE -r {codec.sample_rate} -c {codec.channels}, or by:"
          f" ffplay -f s16le -sample_rate {codec.sample_rate}{channels} -nodisp -")  # fmt: skip
    started, waited, samples = time.monotonic(), 0.0, 0
    try:
        for wav in decode_stream(codec, parts):
            pcm = (32767 * wav[0].clamp(-1, 1)).round().T.cpu().numpy().astype("<i2")
            writing = time.monotonic()
            if not samples:
                print(f"first audio after {writing - started:.2f} s", flush=True)
            sys.__stdout__.buffer.write(pcm.tobytes())
            sys.__stdout__.flush()
            waited, samples = waited + time.monotonic() - writing, samples + len(pcm)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())  # for what is flushed when python ends
        print("the player has gone")
    seconds = samples / codec.sample_rate
    print(f"{seconds:.1f} s of music, {seconds / (time.monotonic() - started - waited):.1f} x real time")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def describe(args, s, codec, wanted):
    """What the .json beside a clip says that is the same for all clips: all that it takes to make them again."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        code = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git on this machine
        code = ""
    paths = {key: getattr(args, key) for key in FILES}
    return dict(
        {key: wanted[key] for key in CHOICES}, duration=args.duration, stride=wanted["stride"] / codec.frame_rate,
        style_books=args.style_books, loudness=args.loudness, format=args.format, dtype=args.dtype, codec=codec.id,
        codec_weights=args.codec_weights,
        **{key: path and str(Path(path).resolve()) for key, path in paths.items()},
        **{f"{key}_sha256": path and sha256(path) for key, path in paths.items()},
        device=str(codec.device), torch=torch.__version__, code=code, settings=vars(s),
    )  # fmt: skip


def write_clip(path, wav, codec, caption, seed, common, spectrogram, keep):
    """A clip, its .json and maybe its .png, each whole or not at all; wav [channels, samples].

    keep: not to write over a clip of the same name that was made otherwise, but to number on.
    """
    levels, note = None, ""
    if common["loudness"] is not None:
        wav, levels = level(wav.numpy(), codec.sample_rate, common["loudness"])
        note = f", at {levels['reached']:.1f} LUFS, as its peaks allow no more" if levels["limited"] else ""
    about = {"caption": caption, "seed": seed, "level": levels, **common}
    text, stem = json.dumps(about, indent=1, ensure_ascii=False).encode(), path.stem
    for number in itertools.count(2) if keep else ():
        if not (there := path.with_suffix(".json")).exists() or there.read_bytes() == text:
            break
        path = path.with_stem(f"{stem}_{number}")
    write_audio(path, torch.as_tensor(wav), codec.sample_rate)
    config.write_file(path.with_suffix(".json"), text)
    if spectrogram:
        config.write_file(path.with_suffix(".png"), report.png(report.spectrogram(path, codec.sample_rate)))
    tqdm.write(f"wrote {path}{note}", file=sys.stdout)


def write_samples(out, step, model, codec, valid_data, s):
    """Clips for the first held-out captions, the same captions and seeds every time: generated freely, and going on
    from the first quarter of the held-out music; beside them, that music itself and what the codec makes of it.

    Returns what the listening page needs to know of each clip, on every rank; paths are relative to `out`.
    """
    T, tracks = model.trained_frames, valid_data.tracks[: s.samples]
    real = valid_data.whole([(track, 0) for track in tracks], T, s)
    lengths = real.valid.sum(1)
    prompt_frames = max(1, min(T // 4, int(lengths.min())))
    free = metrics.generate_many(model, real.conditions, T, s.cfg, s, "samples")
    prompts = real.codes[:, :, :prompt_frames]
    continued = metrics.generate_many(model, real.conditions, T, s.cfg, s, "continuations", prompts)
    if distributed.rank() > 0:
        return []
    folder, held_out, clips = out / "samples" / f"step_{step:06d}", out / "samples" / "held_out", []
    folder.mkdir(parents=True, exist_ok=True)
    held_out.mkdir(exist_ok=True)

    def write(folder, codes_or_wav, seed, suffix):
        distributed.beat("writing samples")
        wav = codes_or_wav if codes_or_wav.is_floating_point() else codec.decode(codes_or_wav[None])[0]
        path = write_wav(folder, tracks[seed]["caption"], seed, wav, codec.sample_rate, suffix)
        return path.relative_to(out).as_posix()

    for seed, track in enumerate(tracks):
        codes = real.codes[seed, :, : lengths[seed]]
        try:
            reference = load_audio(track["path"], codec.sample_rate, codec.channels)[:, : codes.shape[1] * codec.hop]
            reference = write(held_out, reference, seed, "")
        except UserError:  # the music may have been moved since it was encoded
            reference = None
        clips.append(dict(
            caption=track["caption"], seed=seed, free=write(folder, free[seed], seed, ""),
            continued=write(folder, continued[seed], seed, "_continued"),
            prompt_seconds=prompt_frames / codec.frame_rate, reference=reference,
            codec=write(held_out, codes, seed, "_codec"),
        ))  # fmt: skip
    return clips


def main():
    args, record = arguments()
    captions = captions_of(args)
    refuse(args, captions)
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack a caption's letters
    with contextlib.redirect_stdout(sys.stderr if args.stream else sys.stdout):
        model, s, codec = load(args)
        wanted, shared = request(args, model, s, codec), heard_from(args, model, s, codec)
        if args.stream:
            tell_what_is_heard(captions, model.conditioner.text, shared)
            return play(codec, model.stream([{"text": captions[0], **shared}], seeds=[args.seed], **wanted))
    common = describe(args, s, codec, wanted)
    for key in (f"{name}_sha256" for name in FILES):
        if record and record.get(key) != common[key]:
            print(f"{key} is not the one of {args.again}: this will be another clip")
    out, folder, number = Path(args.out), folder_of(args.out), 0
    folder.mkdir(parents=True, exist_ok=True)
    for group in itertools.chain([captions] if captions else [], asked() if args.interactive else []):
        tell_what_is_heard(group, model.conditioner.text, shared)
        wished = [{"text": caption, **shared} for caption in group for _ in range(args.n)]
        takes = list(zip(wished, itertools.count(args.seed + number)))
        for conditions, seed, wav in generated(model, codec, takes, wanted, args.batch):
            path = folder / f"{file_name(conditions['text'], seed)}.{args.format}"
            if folder != out:
                path = out.with_stem(f"{out.stem}_{number}") if args.interactive or len(takes) > 1 else out
            write_clip(path, wav, codec, conditions["text"], seed, common, args.spectrogram, folder == out)
            number += 1


if __name__ == "__main__":
    config.run(main)
