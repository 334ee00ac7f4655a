"""Generate music from captions, a melody, a style, the beginning of a recording, or several of these together.

    python sample.py out/demo "a slow piano melody in D minor, with drums" --duration 8
    python sample.py out/demo/best.pt "fast bells" "calm strings, no drums" --cfg 3 --seed 7
    python sample.py out/demo/best.pt "organ chords" --continue song.mp3 --from 0:45 --duration 12
    python sample.py out/demo_melody/best.pt "organ, with drums" --melody tune.wav
    python sample.py out/demo_style/best.pt "a fast melody" --style excerpt.wav --style_codebooks 2 --cfg_beta 2
    python sample.py out/demo/best.pt --file captions.txt --n 4 --format flac --spectrogram
    python sample.py out/demo/best.pt "fast bells" --duration 60 --stream | aplay -f S16_LE -r 16000 -c 1
    python sample.py out/demo/best.pt "fast bells" --duration 60 --stream | ffplay -f s16le -sample_rate 16000 -nodisp -

A .json with the options and settings is written next to each file. The first sample has the seed --seed, the second
--seed + 1, and so on. A seed gives the same music alone and in a batch, up to rounding.

Audio is read from WAV, FLAC, MP3, OGG, Opus, AIFF and others; M4A, AAC, WMA, MP4 and WebM need ffmpeg on the PATH.

In the order of this file: parse, check, load, conditions, generate, write. Letters: K codebooks, T frames.
"""

import argparse
import contextlib
import importlib.util
import itertools
import math
import re
import sys
from pathlib import Path

import common  # before torch; it sets GOMP_SPINCOUNT

# isort: split
import torch
from tqdm import tqdm

import config
from audio import FORMATS, draw_spectrogram, load_audio, open_audio, write_audio
from codec import encode_long, load_codec
from common import UserError
from conditioning import CHROMA_RATE, INFERENCE_CODEBOOKS, SILENCE, strongest
from dataprep.analysis import chroma_of
from dataprep.shards import clean_text, words_of
from dataprep.tracks import read_text
from generate import generate, load_model, optimize, stream
from tools.output import LOUDNESS, decode_long, plan_clips, set_loudness, write_stream

# ranges of the options whose default is the run's setting
RANGES = {"cfg": (-1e6, 1e6), "cfg_beta": (-1e6, 1e6), "temperature": (0, 1e6), "top_k": (0, 1e12), "top_p": (0, 1)}


def parse_arguments(words=None):
    """Parse the command line, or the list `words`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="a run's folder, which means its best.pt, or a checkpoint file")
    add("captions", nargs="*", default=[], help="descriptions of the music; without one, or empty: unconditional")
    add("--file", help="a text file with more captions, one per line")
    add("--interactive", action="store_true", help="read more captions from the terminal, until an empty line or q")
    add("--n", type=int, default=1, help="samples per caption (default 1)")
    add("--duration", type=float, default=8.0, help="seconds, including the prompt (default 8)")
    add("--stride", type=float, help="seconds between windows (default half of one); smaller strides keep more context")
    add("--continue", dest="prompt", metavar="AUDIO", help="prompt: an audio file to continue. If it is not shorter"
        " than --duration, it is cut to half of --duration, so that music is left to generate")  # fmt: skip
    add("--from", dest="start", metavar="TIME", default="0", help="start of the prompt in the file of --continue: 45,"
        " 45.5, 0:45 or 1:02:03 (default 0)")  # fmt: skip
    add("--melody", metavar="AUDIO", help="an audio file whose pitch classes to follow, from its beginning")
    add("--style", metavar="AUDIO", help="an audio file whose middle to use as the style")
    add("--style_codebooks", type=int, default=INFERENCE_CODEBOOKS, help="larger numbers follow it closer (default 3)")
    add("--seed", type=int, default=0, help="seed of the first sample; each further sample adds 1 (default 0)")
    add("--cfg", type=float, help="guidance, 1: none (this and the next 4 options default to the run's settings)")
    add("--cfg_beta", type=float, help="with text and style: values above 1 give the text more weight")
    add("--temperature", type=float, help="0 always takes the likeliest code")
    add("--top_k", type=int, help="sample from the k likeliest codes; 0: from all")
    add("--top_p", type=float, help="sample from the likeliest codes with this total probability, instead of top_k")
    add("--batch", type=int, default=8, help="most samples to generate together (default 8)")
    add("--out", default="samples", help="folder or, for one sample, file. Existing files are never overwritten,"
        " and those of the same options are skipped, so that a stopped list can be continued")  # fmt: skip
    add("--format", choices=[suffix[1:] for suffix in FORMATS], help="format in a folder (default wav)")
    add("--loudness", default=str(LOUDNESS), help="in LUFS, or none; lower if peaks would exceed -1 dB of full scale;"
        " without pyloudnorm, measured by RMS (default -23, as in EBU R 128)")  # fmt: skip
    add("--spectrogram", action="store_true", help="also write a .png next to each file; needs Pillow")
    add("--stream", action="store_true", help="write one sample to stdout while it is generated, for a player as above:"
        " raw signed 16-bit little-endian samples, without --loudness")  # fmt: skip
    add("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if there is one)")
    add("--dtype", choices=config.CHOICES["dtype"], default="auto", help="default auto: bfloat16 if it is faster")
    add("--compile", action="store_true", help="compile first, for 10 to 40 s; pays off for minutes of music")
    add("--codec_weights", help="the codec's weights, if they have moved since training")
    add("--text_encoder_weights", help="T5's weights, if they have moved since training")
    args = parser.parse_intermixed_args(words)
    args.checkpoint = str(common.checkpoint_path(args.checkpoint))
    return args


def parse_time(text):
    """Return the seconds of a time such as 45, 45.5, 0:45 or 1:02:03. Raises UserError."""
    if not re.fullmatch(r"\d{1,6}(:[0-5]?\d){0,2}(\.\d+)?", text):
        raise UserError(f"--from {text}: not a time; write 45, 45.5, 0:45 or 1:02:03")
    return sum(float(part) * 60**i for i, part in enumerate(reversed(text.split(":"))))


def read_captions(args):
    """Return the captions of the command line and of --file. Without any, and not --interactive: an empty one."""
    captions = [clean_text(caption) for caption in args.captions]  # as in prepare.py
    if args.file:
        captions += filter(None, map(clean_text, re.split(r"[\r\n]", read_text(Path(args.file)))))
        if not captions:
            raise UserError(f"--file {args.file}: contains no caption; write one per line")
    return captions or ([] if args.interactive else [""])


def check_arguments(args):
    """Check all arguments that can be checked without the model. Raises UserError."""
    suffix, is_single = Path(args.out).suffix.lower(), not args.interactive and len(args.captions) * args.n == 1
    is_file, is_terminal = suffix in FORMATS, not sys.__stdout__ or sys.__stdout__.isatty()
    for is_wrong, message in (
        (not 0 < args.duration <= 86_400, f"--duration {args.duration:g}: must be above 0 seconds and at most a day"),
        (not 0 <= args.seed < 2**62, f"--seed {args.seed}: must lie between 0 and 2^62"),
        (args.n < 1 or args.batch < 1, "--n and --batch must be 1 or above"),
        (args.loudness != "none" and not re.fullmatch(r"-\d+(\.\d+)?", args.loudness),
         f"--loudness {args.loudness}: must be below 0 LUFS, such as -23, or none"),
        (suffix in (".m4a", ".aac", ".opus", ".aiff", ".wma"),
         f"--out {args.out}: this format cannot be written; use a folder, or a file in {', '.join(FORMATS)}"),
        (is_file and Path(args.out).is_dir(), f"--out {args.out}: an existing folder; use another name"),
        (is_file and not is_single, f"--out {args.out}: a file is for one sample of one caption; use a folder"),
        (args.stream and not is_single, "--stream is for one sample of one caption"),
        (args.stream and is_terminal, "--stream writes raw samples: pipe stdout into a player, as --help shows"),
        (args.top_k and args.top_p, "--top_k and --top_p: each replaces the other; pass one of them"),
        (is_file and args.format not in (None, suffix[1:]), f"--format {args.format}: {args.out} ends in {suffix};"
         " use the same suffix, or a folder"),
        (args.stream and (args.spectrogram or args.format),
         "--stream writes raw samples; omit --format and --spectrogram"),
        (args.start != "0" and not args.prompt, f"--from {args.start}: needs --continue, the file to start from"),
        (args.interactive and not sys.stdin, "--interactive reads captions from stdin, which is closed; open it"),
        (args.spectrogram and not importlib.util.find_spec("PIL"), "--spectrogram: needs Pillow; pip install pillow"),
    ):  # fmt: skip
        if is_wrong:
            raise UserError(message)
    parse_time(args.start)


def load(args):
    """Load a checkpoint for generation: return (model, its Settings, its codec), on the device of the options."""
    device, dtype = common.pick_device(args.device, args.dtype)
    model, s, codec_info = load_model(args.checkpoint, device, args.text_encoder_weights)
    if device.type == "cpu" and s.dim <= 256:
        # such small steps gain nothing from a second thread, nor from bfloat16 unless they are compiled
        torch.set_num_threads(1)
        dtype = torch.float32 if args.dtype == "auto" and not args.compile else dtype
    optimize(model, dtype, args.compile)
    weights = s.codec_weights if args.codec_weights is None else args.codec_weights
    if weights and not Path(weights).exists():
        raise UserError(f"{weights}: no such file; pass the weights of codec {codec_info['name']} with --codec_weights")
    codec = load_codec(codec_info["name"], weights)
    if codec.id != codec_info["id"]:
        raise UserError(f"{args.checkpoint}: needs codec {codec_info['id']}, not {codec.id}; pass its --codec_weights")
    return model, s, codec.to(device)


def generation_options(args, model, s, codec):
    """Return the arguments of `generate` and `stream`, except conditions and seeds."""
    options = {key: getattr(s, key) if getattr(args, key) is None else getattr(args, key) for key in RANGES}
    if args.top_k is not None and args.top_p is None:
        options["top_p"] = 0.0  # the typed option replaces the run's
    elif args.top_p and args.top_k is None:
        options["top_k"] = 0
    for key, (low, high) in RANGES.items():
        if not low <= options[key] <= high:
            raise UserError(f"--{key} {options[key]}: must be a number from {low:,.0f} to {high:,.0f}")
    frames, window, rate = max(1, round(args.duration * codec.frame_rate)), model.trained_frames, codec.frame_rate
    if args.stride is not None and not 0.5 < args.stride * rate < window - 0.5:
        raise UserError(f"--stride {args.stride:g}: must be above 0 and below the {s.segment:g} s of training")
    stride = window // 2 if args.stride is None else round(args.stride * rate)
    if frames > window:
        print(f"{args.duration:g} s is longer than the {s.segment:g} s of training: windows {stride / rate:g} s apart")
    if args.cfg_beta is not None and not args.style:
        print(f"--cfg_beta {args.cfg_beta:g}: not used without --style")
    if args.stride is not None and frames <= window:
        print(f"--stride {args.stride:g}: not used, because {args.duration:g} s need only one window")
    prompt = load_prompt(args, codec, frames) if args.prompt else None
    return dict(frames=frames, prompt=prompt, stride=stride, **options)


def load_prompt(args, codec, frames):
    """Load the audio of --continue as codes [1, K, T], without an incomplete last frame, which would end in silence."""
    first = round(parse_time(args.start) * codec.sample_rate)
    wav = load_audio(args.prompt, codec.sample_rate, codec.channels, frames * codec.hop, first)
    length = wav.shape[1] // codec.hop
    if math.ceil(wav.shape[1] / codec.hop) >= frames:
        length = frames // 2  # with a prompt of almost --duration, there would be almost nothing to generate
        print(f"--continue {args.prompt}: cut to {length / codec.frame_rate:g} s, from {args.start} on, because"
              f" --duration {args.duration:g} includes the prompt")  # fmt: skip
    return encode_long(codec, wav[:, : max(1, length) * codec.hop])[None]


def load_condition(args, name, model, codec):
    """Load the audio of --melody or --style as wav [channels, samples]. Raises UserError if it cannot be used."""
    path, embedders = getattr(args, name), model.conditioner.prepended
    if name not in embedders:
        raise UserError(f"--{name}: {args.checkpoint} was not trained with it; its conditions are"
                        f" {', '.join(['text', *embedders])}")  # fmt: skip
    wav = load_audio(path, codec.sample_rate, codec.channels)
    with open_audio(path) as file:
        rate = file.samplerate
    seconds = wav.shape[1] / codec.sample_rate
    if seconds * CHROMA_RATE < 1:
        raise UserError(f"--{name} {path}: {seconds:.3f} s long; at least {1 / CHROMA_RATE:g} s are needed")
    if wav.abs().max() < 1e-3:
        raise UserError(f"--{name} {path}: is silent, all samples are below -60 dBFS; choose another file")
    if rate != codec.sample_rate:
        print(f"--{name} {path}: resampled from {rate} to {codec.sample_rate} Hz")
    return wav


def melody_condition(args, model, s, codec):
    """Return the pitch classes of --melody, repeated or cut to the duration."""
    notes = strongest(chroma_of([load_condition(args, "melody", model, codec)], codec.sample_rate))
    if (notes == SILENCE).all():
        raise UserError(f"--melody {args.melody}: has no note from C2 to B7 above -60 dBFS; choose another file")
    needed = math.ceil(args.duration * CHROMA_RATE)
    window = max(needed, math.ceil(s.segment * CHROMA_RATE))  # silence after the duration would request an ending
    if len(notes) != needed:
        print(f"--melody {args.melody}: {'repeated' if len(notes) < needed else 'cut'} to {args.duration:g} s")
    return notes.repeat(-(-window // len(notes)))[:window]


def style_condition(args, model, s, codec):
    """Return the codes of the middle of --style, and how many codebooks to keep."""
    if not 1 <= args.style_codebooks <= s.style_codebooks:
        raise UserError(f"--style_codebooks {args.style_codebooks}: must be from 1 to {s.style_codebooks}")
    codes = encode_long(codec, load_condition(args, "style", model, codec))
    length = min(model.conditioner.prepended["style"].frames, model.trained_frames // 2)
    if codes.shape[1] > length:
        print(f"--style {args.style}: using the middle {length / codec.frame_rate:g} s")
    elif codes.shape[1] < s.style_seconds[0] * codec.frame_rate:
        print(f"--style {args.style}: shorter than the excerpts of training, {s.style_seconds[0]:g} s or more")
    first = max(0, codes.shape[1] - length) // 2
    return codes[:, first : first + length], args.style_codebooks


def other_conditions(args, model, s, codec):
    """Return the conditions besides text, {"melody": ..., "style": ...}, if given."""
    functions = {"melody": melody_condition, "style": style_condition}
    return {name: function(args, model, s, codec) for name, function in functions.items() if getattr(args, name)}


def report_captions(captions, embedder, others):
    """Print which captions are empty or cut off, and which words no training caption contains."""
    for caption in dict.fromkeys(captions):
        tokens = len(embedder.encode(caption))
        if tokens == len(embedder.encode("")):
            print(f"no caption: {'conditioned on ' + ' and '.join(others) if others else 'unconditional music'}")
        elif tokens > embedder.max_tokens:
            print(f"'{caption[:40]}...': {tokens} tokens, but the model reads only the first {embedder.max_tokens}")
    if embedder.words and (unseen := sorted(words_of(captions) - embedder.words)):
        print(f"words that no training caption contains: {', '.join(unseen)}")


def write_sample(path, wav, codec, args, info):
    """Write wav [channels, samples], `info` as .json, and the .png if requested."""
    if path.exists():
        raise UserError(f"{path}: was written by another program meanwhile; choose another --seed or --out")
    wav = wav if args.loudness == "none" else set_loudness(wav, codec.sample_rate, float(args.loudness))
    write_audio(path, wav, codec.sample_rate)
    common.write_json(path.with_suffix(".json"), info)
    if args.spectrogram:
        draw_spectrogram(path, path.with_suffix(".png"), codec.sample_rate)
    tqdm.write(f"wrote {path}", file=sys.stdout)


def caption_lists(args):
    """Yield the given captions as one list. With --interactive, then yield each typed one until an empty line or q."""
    if args.captions:
        yield args.captions
    if args.interactive:
        sys.stdin.reconfigure(errors="replace")
        with contextlib.suppress(EOFError):
            while (caption := clean_text(input("caption> "))).strip("/:\\()").lower() not in ("", "q", "quit", "exit"):
                yield [caption]
        print()


def main():
    args = parse_arguments()
    args.captions = read_captions(args)
    check_arguments(args)
    if args.stream:
        sys.stdout = sys.stderr  # for messages, because stdout is for the samples
    model, s, codec = load(args)
    where = common.describe_device(model.heads.weight.device, model.heads.weight.dtype)
    print(f"on {where}, linear layers: {type(model.heads).__name__}")
    options, others = generation_options(args, model, s, codec), other_conditions(args, model, s, codec)
    if args.stream:
        report_captions(args.captions, model.conditioner.text, others)
        parts = stream(model, [{"text": args.captions[0], **others}], seeds=[args.seed], **options)
        return write_stream(codec, parts)

    code = common.git("describe", "--always", "--dirty", "--abbrev=40").strip()
    info = {**vars(args), **{key: options[key] for key in RANGES}, "code": code, "settings": vars(s)}
    out, seeds = Path(args.out), itertools.count(args.seed)
    (out.parent if out.suffix.lower() in FORMATS else out).mkdir(parents=True, exist_ok=True)
    for captions in caption_lists(args):
        report_captions(captions, model.conditioner.text, others)
        clips = plan_clips(captions, seeds, args, info)
        frames = -(-len(clips) // args.batch) * options["frames"]
        with tqdm(total=frames, desc="generating", unit="frame", file=sys.stdout, disable=not clips) as bar:
            for first in range(0, len(clips), args.batch):
                paths, infos = zip(*clips[first : first + args.batch])
                conditions, batch_seeds = zip(*[({"text": i["caption"], **others}, i["seed"]) for i in infos])
                codes = generate(model, conditions, seeds=batch_seeds, progress=bar.update, **options)
                for path, clip_info, clip in zip(paths, infos, codes):
                    write_sample(path, decode_long(codec, clip), codec, args, clip_info)


if __name__ == "__main__":
    common.run(main)
