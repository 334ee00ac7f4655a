"""Text, a melody, a style, the beginning of a piece, or any of them together, to music.

python sample.py out/demo/best.pt "a slow piano melody in D minor, with drums" --duration 8
python sample.py out/demo/best.pt "fast bells" "calm strings, no drums" --cfg 3 --seed 7
python sample.py out/demo/best.pt "organ chords" --continue beginning.wav --duration 12
python sample.py out/demo_melody/best.pt "organ, with drums" --melody tune.wav
python sample.py out/demo_style/best.pt "a fast melody" --style excerpt.wav --style_codebooks 2 --cfg_beta 2
python sample.py out/demo/best.pt --file captions.txt --n 4 --format flac --spectrogram
python sample.py out/demo/best.pt --interactive
python sample.py out/demo/best.pt "fast bells" --duration 60 --stream | aplay -f S16_LE -r 16000 -c 1
python sample.py out/demo/best.pt "fast bells" --duration 60 --stream | ffplay -f s16le -sample_rate 16000 -nodisp -

Beside each file stands a .json of the options that made it. The first sample has the seed --seed, the next one the
next; a seed gives the same music alone or in a batch, up to rounding.

Letters: K codebooks, n frames.
"""

import argparse
import contextlib
import itertools
import math
import re
import sys
import time
from pathlib import Path

import common  # before torch, whose threads it tells how to wait

# isort: split
import soundfile
import torch
from tqdm import tqdm

import config
from codec import FORMATS, decode_stream, draw_spectrogram, encode_long, file_name, load_audio, load_codec, write_audio
from common import UserError
from conditioning import CHROMA_RATE, INFERENCE_CODEBOOKS, SILENCE, strongest
from data import words_of
from generate import generate, load_model, optimize, stream
from listen import chroma_of

OPTIONS = ("cfg", "cfg_beta", "temperature", "top_k", "top_p")  # that a run's settings have defaults for
PEAK = 10 ** (-1 / 20)  # no sample is louder than -1 dB of full scale, as lossy coding adds some tenths


def parse_arguments(words=None):
    """The options of the command line, or of `words` instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a best.pt, or any other checkpoint of a run")
    parser.add_argument("captions", nargs="*", default=[], help="what to play; none, or an empty one: unconditional")
    parser.add_argument("--file", help="more captions, a line each")
    parser.add_argument("--interactive", action="store_true", help="more captions, asked for one by one")
    parser.add_argument("--n", type=int, default=1, help="samples of each caption (default 1)")
    parser.add_argument("--duration", type=float, default=8.0, help="seconds, the prompt included (default 8)")
    parser.add_argument("--stride", type=float, help="past the trained length, seconds that each further window of that"
                        " length adds: the fewer, the more it hears of what was (default: half of it)")  # fmt: skip
    parser.add_argument("--continue", dest="prompt", metavar="AUDIO", help="continue this audio")
    parser.add_argument("--melody", metavar="AUDIO", help="follow its pitch classes, from its beginning")
    parser.add_argument("--style", metavar="AUDIO", help="sound like its middle")
    parser.add_argument("--style_codebooks", type=int, default=INFERENCE_CODEBOOKS, help="how closely, from 1 to the 6"
                        " or so of training (default 3)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next has the next (default 0)")
    parser.add_argument("--cfg", type=float, help="guidance; 1 switches it off (default: as in training's samples)")
    parser.add_argument("--cfg_beta", type=float, help="with text and style: above 1 the text counts more")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest code")
    parser.add_argument("--top_k", type=int, help="sample among so many codes; 0: all")
    parser.add_argument("--top_p", type=float, help="sample within this probability mass instead of top_k")
    parser.add_argument("--batch", type=int, default=8, help="samples made at once, at most (default 8)")
    parser.add_argument("--out", default="samples", help="folder (default samples), or for a single sample a file in"
                        f" {', '.join(FORMATS)}; no file is written over")  # fmt: skip
    parser.add_argument("--format", choices=[suffix[1:] for suffix in FORMATS], default="wav",
                        help="of the files in a folder (default wav)")  # fmt: skip
    parser.add_argument("--loudness", default="-23", help="in LUFS, or less where its peaks would pass -1 dB of full"
                        " scale; measured after BS.1770 where pyloudnorm is installed, else by RMS; none: as it is"
                        " (default -23, that of EBU R 128)")  # fmt: skip
    parser.add_argument("--spectrogram", action="store_true", help="a .png beside each file; needs Pillow")
    parser.add_argument("--stream", action="store_true", help="one sample to stdout while it is made: raw signed 16-bit"
                        " little-endian samples for a player, as above, as loud as the model has it")  # fmt: skip
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if there is one)")
    parser.add_argument("--dtype", choices=config.CHOICES["dtype"], default="auto", help="of the weights and of what is"
                        " computed (default auto: bfloat16 where it is faster, else float32)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile first, 10 to 40 s: worth it for long music, or"
                        " for much of it")  # fmt: skip
    parser.add_argument("--codec_weights", help="file, where the codec's own are elsewhere than in training")
    return parser.parse_intermixed_args(words)


def check_arguments(args):
    """Raises UserError for what can be seen to be wrong before a model is loaded."""
    if not 0 < args.duration <= 86_400:
        raise UserError(f"--duration {args.duration:g}: must be above 0 seconds, and a day at most")
    if not 0 <= args.seed < 2**62:
        raise UserError(f"--seed {args.seed}: must lie between 0 and 2^62")
    if args.n < 1 or args.batch < 1:
        raise UserError("--n and --batch must be 1 or above")
    if args.loudness != "none" and not re.fullmatch(r"-\d+(\.\d+)?", args.loudness):
        raise UserError(f"--loudness {args.loudness}: must be below 0 LUFS, -23 or so, or be none")
    suffix = Path(args.out).suffix.lower()
    if suffix in (".m4a", ".aac", ".opus", ".aiff", ".wma") or (suffix in FORMATS and Path(args.out).is_dir()):
        raise UserError(f"--out {args.out}: no format that can be written, or a folder; name a new folder, or a file in"
                        f" {', '.join(FORMATS)}")  # fmt: skip
    if args.stream and (args.interactive or len(args.captions) * args.n != 1):
        raise UserError("--stream is for one sample of one caption")
    if (args.stream and not sys.__stdout__) or (args.interactive and not sys.stdin):
        raise UserError("--stream needs a stdout, and --interactive a stdin; open what is closed")
    if args.stream and sys.__stdout__.isatty():
        raise UserError("--stream writes raw samples to stdout: pipe it into a player, as --help shows")
    if suffix in FORMATS and (args.interactive or len(args.captions) * args.n != 1):
        raise UserError(f"--out {args.out}: a file is for one sample of one caption; name a folder")


def read_captions(args):
    """Those of the command line, then those of --file; without either and nobody to ask, the empty one."""
    captions = [caption.encode(errors="replace").decode() for caption in args.captions]  # a terminal may send any bytes
    if args.file:
        try:
            lines = Path(args.file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(f"--file {args.file}: is not UTF-8 text; save it as that") from None
        captions += [line.strip() for line in lines if line.strip()]
        if not captions:
            raise UserError(f"--file {args.file}: holds no caption; write one on each line")
    return captions or ([] if args.interactive else [""])


def lists_of_captions(args):
    """Those that are given, at once; with --interactive then each that is typed, up to an empty line or the end."""
    if args.captions:
        yield args.captions
    if args.interactive:
        sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(EOFError):
            while caption := input("caption> ").strip():
                yield [caption]
        print()


# ---------------------------------------------------------------------------------------------- what is asked for


def load(args):
    """-> (the checkpoint's model, ready to generate, its Settings, its codec), on the device that is asked for."""
    device, dtype = common.pick_device(args.device, args.dtype)
    model, s, description = load_model(args.checkpoint, device)
    if device.type == "cpu" and s.dim <= 256:
        # A second thread gains such small steps nothing, and on a busy machine each of some hundred operations would
        # wait for it. Nor does bfloat16, unless the step is compiled.
        torch.set_num_threads(1)
        dtype = torch.float32 if args.dtype == "auto" and not args.compile else dtype
    optimize(model, dtype, args.compile)
    codec = load_codec(description["name"], s.codec_weights if args.codec_weights is None else args.codec_weights)
    if codec.id != description["id"]:
        raise UserError(f"{args.checkpoint} is of codec {description['id']}, not {codec.id}; give --codec_weights")
    return model, s, codec.to(device)


def generation_options(args, model, s, codec):
    """What `generate` and `stream` are told besides conditions and seeds: frames, prompt, stride, cfg ..."""
    options = {key: getattr(s, key) if getattr(args, key) is None else getattr(args, key) for key in OPTIONS}
    if not (options["top_k"] >= 0 and 0 <= options["temperature"] < math.inf and 0 <= options["top_p"] <= 1):
        raise UserError("--top_k and --temperature must be 0 or above, and --top_p between 0 and 1")
    for key in ("cfg", "cfg_beta"):
        if not abs(options[key]) < 1e6:
            raise UserError(f"--{key} {options[key]}: must be a number, 3 or so")
    frames, trained = max(1, round(args.duration * codec.frame_rate)), model.trained_frames
    stride = trained // 2
    if args.stride is not None:
        if not 0.5 < args.stride * codec.frame_rate < trained - 0.5:
            raise UserError(f"--stride {args.stride:g}: must be above 0 and below the {s.segment:g} s of training")
        stride = round(args.stride * codec.frame_rate)
    if frames > trained:
        print(f"{args.duration:g} s is past the {s.segment:g} s of training: continuing in windows of that length,"
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
    return dict(frames=frames, prompt=prompt, stride=stride, **options)


def load_condition(args, name, model, codec):
    """The wav of --melody or --style, [channels, samples]; raises UserError where it will not do."""
    path, embedders = getattr(args, name), model.conditioner.prepended
    if name not in embedders:
        takes = ", ".join(["text", *embedders])
        raise UserError(f"--{name}: {args.checkpoint} was not trained with it; its conditions are {takes}")
    wav, rate = load_audio(path, codec.sample_rate, codec.channels), soundfile.info(path).samplerate
    seconds = wav.shape[1] / codec.sample_rate
    if seconds * CHROMA_RATE < 1:
        raise UserError(f"--{name} {path}: {seconds:.3f} s long; at least {1 / CHROMA_RATE:g} s are needed")
    if wav.abs().max() < 1e-3:
        raise UserError(f"--{name} {path}: is silent, with no sample above -60 dBFS once it is mixed to mono")
    if rate != codec.sample_rate:
        print(f"--{name} {path}: resampled from {rate} to {codec.sample_rate} Hz")
    return wav


def melody_condition(args, model, s, codec):
    """The pitch classes of --melody, repeated or cut to the duration."""
    notes = strongest(chroma_of([load_condition(args, "melody", model, codec)], codec.sample_rate))
    if (notes == SILENCE).all():
        raise UserError(f"--melody {args.melody}: no note is heard in it, between C2 and B7 and above -60 dBFS")
    needed = math.ceil(args.duration * CHROMA_RATE)
    window = max(needed, math.ceil(s.segment * CHROMA_RATE))  # silence after it would ask for an ending
    if len(notes) != needed:
        print(f"--melody {args.melody}: {'repeated' if len(notes) < needed else 'cut'} to {args.duration:g} s")
    return notes.repeat(-(-window // len(notes)))[:window]


def style_condition(args, model, s, codec):
    """The codes of the middle of --style, no longer than any excerpt of training, and how many codebooks to keep."""
    if not 1 <= args.style_codebooks <= s.style_codebooks:
        raise UserError(f"--style_codebooks {args.style_codebooks}: must be from 1 to training's {s.style_codebooks}")
    codes = encode_long(codec, load_condition(args, "style", model, codec))
    most = min(model.conditioner.prepended["style"].frames, model.trained_frames // 2)
    if codes.shape[1] > most:
        print(f"--style {args.style}: its middle {most / codec.frame_rate:g} s are taken")
    elif codes.shape[1] < s.style_seconds[0] * codec.frame_rate:
        print(f"--style {args.style}: shorter than any in training, which were {s.style_seconds[0]:g} s or more")
    first = max(0, codes.shape[1] - most) // 2
    return codes[:, first:][:, :most], args.style_codebooks


def other_conditions(args, model, s, codec):
    """{name: condition} of those besides the text that are asked for."""
    others = {}
    if args.melody:
        others["melody"] = melody_condition(args, model, s, codec)
    if args.style:
        others["style"] = style_condition(args, model, s, codec)
    return others


def say_what_is_heard(captions, embedder, others):
    """Says which captions the model does not hear, or not to their end, and which words it never met in training."""
    for caption in dict.fromkeys(captions):
        tokens = len(embedder.tokenizer.encode(caption))
        if not tokens:
            print(f"no caption: {'by ' + ' and '.join(others) + ' alone' if others else 'unconditional music'}")
        elif tokens > embedder.max_tokens:
            print(f"'{caption[:40]}...': of its {tokens} tokens the model hears the first {embedder.max_tokens}")
    if embedder.words and (unseen := sorted(words_of(captions) - embedder.words)):
        print(f"in no caption that the model was trained with: {', '.join(unseen)}")


# -------------------------------------------------------------------------------------------------------- writing


def set_loudness(wav, sample_rate, lufs):
    """wav [channels, samples] -> the same at `lufs`, or as near as PEAK allows; silence stays silence."""
    try:
        import pyloudnorm  # measures after ITU-R BS.1770-4

        padded = torch.nn.functional.pad(wav, (0, max(0, sample_rate // 2 - wav.shape[1])))  # it needs 0.4 s
        loudness = pyloudnorm.Meter(sample_rate).integrated_loudness(padded.T.numpy())
    except ImportError:
        loudness = 10 * math.log10(max(1e-12, float(wav.square().sum(0).mean())))
    if not math.isfinite(loudness) or wav.abs().max() == 0:
        return wav
    return wav * min(10 ** ((lufs - loudness) / 20), PEAK / float(wav.abs().max()))


def write_sample(path, wav, codec, args, about):
    """A sample, its .json and maybe its .png; wav [channels, samples]."""
    if path.exists():
        raise UserError(f"{path}: is there already, by another program meanwhile; choose another --seed or --out")
    if args.loudness != "none":
        wav = set_loudness(wav, codec.sample_rate, float(args.loudness))
    write_audio(path, wav, codec.sample_rate)
    common.write_json(path.with_suffix(".json"), about)
    if args.spectrogram:
        try:
            draw_spectrogram(path, path.with_suffix(".png"), codec.sample_rate)
        except ImportError:
            raise UserError("--spectrogram: needs Pillow; pip install pillow, or leave it out") from None
    tqdm.write(f"wrote {path}", file=sys.stdout)


def to_pcm(wav):
    """wav [channels, samples] -> interleaved signed 16-bit little-endian samples, an array [samples, channels]."""
    return (32767 * wav.clamp(-1, 1)).round().T.cpu().numpy().astype("<i2")


def play(codec, parts):
    """Codes [1, K, n], as they come, to stdout as raw samples."""
    started, waited, samples = time.monotonic(), 0.0, 0
    try:
        for wav in decode_stream(codec, parts):
            pcm = to_pcm(wav[0])
            writing = time.monotonic()
            if not samples:
                print(f"first audio after {writing - started:.2f} s", flush=True)
            sys.__stdout__.buffer.write(pcm.tobytes())
            sys.__stdout__.flush()
            waited, samples = waited + time.monotonic() - writing, samples + len(pcm)
    except BrokenPipeError:
        common.drop_output(sys.__stdout__)  # with what is flushed when python ends
        print("the player has gone")
    seconds = samples / codec.sample_rate
    print(f"{seconds:.1f} s of music, {seconds / (time.monotonic() - started - waited):.1f} x real time")


def main():
    args = parse_arguments()
    args.captions = read_captions(args)
    check_arguments(args)
    if args.stream:
        sys.stdout = sys.stderr  # stdout is for the music
    model, s, codec = load(args)
    where = common.describe_device(model.heads.weight.device, model.heads.weight.dtype)
    print(f"on {where} by {type(model.heads).__name__}")  # torch's or linear.py's
    options = generation_options(args, model, s, codec)
    others = other_conditions(args, model, s, codec)
    if args.stream:
        say_what_is_heard(args.captions, model.conditioner.text, others)
        conditions = [{"text": args.captions[0], **others}]
        return play(codec, stream(model, conditions, seeds=[args.seed], **options))

    about = {
        **vars(args),
        **{key: options[key] for key in OPTIONS},
        "code": common.git("describe", "--always", "--dirty", "--abbrev=40").strip(),
        "settings": vars(s),
    }
    single = Path(args.out).suffix.lower() in FORMATS
    folder = Path(args.out).parent if single else Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = itertools.count(args.seed)
    for captions in lists_of_captions(args):
        say_what_is_heard(captions, model.conditioner.text, others)
        wanted = [(caption, next(seeds)) for caption in captions for _ in range(args.n)]
        paths = [Path(args.out) if single else folder / f"{file_name(*one)}.{args.format}" for one in wanted]
        suffixes = [".json", ".png"][: 1 + args.spectrogram]
        made = [path.with_suffix(suffix) for path in paths for suffix in (path.suffix, *suffixes)]
        if taken := next(filter(Path.exists, made), None):
            error = UserError(f"{taken}: is there already; choose another --seed or --out, or remove it")
            if not args.interactive:
                raise error
            print(error)
            continue
        frames = -(-len(wanted) // args.batch) * options["frames"]
        with tqdm(total=frames, desc="generating", unit="frame", file=sys.stdout) as bar:
            for first in range(0, len(wanted), args.batch):
                batch = wanted[first : first + args.batch]
                conditions = [{"text": caption, **others} for caption, _ in batch]
                seeds_of_batch = [seed for _, seed in batch]
                codes = generate(model, conditions, seeds=seeds_of_batch, progress=bar.update, **options)
                for path, (caption, seed), clip in zip(paths[first:], batch, codes):
                    wav = codec.decode(clip[None])[0].cpu()
                    write_sample(path, wav, codec, args, {**about, "caption": caption, "seed": seed})


if __name__ == "__main__":
    common.run(main)
