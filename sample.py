"""Text, and maybe the beginning of a piece, to wav.

python sample.py out/demo/best.pt "a slow piano melody in a minor key, with drums" --duration 8
python sample.py out/demo/best.pt "fast bells" "calm strings, no drums" --cfg 4 --seed 7
python sample.py out/demo/best.pt "organ chords" --continue beginning.wav --duration 12
"""

import argparse
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

import config
from codec import encode_long, load_audio, load_codec, write_wav
from config import UserError
from model import load_model, pick_device


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a best.pt; it holds all that is needed")
    parser.add_argument("captions", nargs="*", default=[""], help="one clip each; none, or an empty one: unconditional")
    parser.add_argument("--duration", type=float, default=8.0, help="seconds, the prompt included (default 8)")
    parser.add_argument("--continue", dest="prompt", metavar="WAV", help="go on from this audio")
    parser.add_argument("--out", default="samples", help="folder for the wavs (default samples)")
    parser.add_argument("--seed", type=int, default=0, help="of the first clip; the next has the next (default 0)")
    parser.add_argument("--cfg", type=float, help="guidance; 1 switches it off (default: as in training's samples)")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest code")
    parser.add_argument("--top_k", type=int, help="sample among so many codes; 0: all")
    parser.add_argument("--top_p", type=float, help="sample within this probability mass instead of top_k")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first that is there)")
    parser.add_argument("--codec_weights", help="file or folder, where the codec's own are elsewhere than in training")
    args = parser.parse_args()
    if not 0 < args.duration < math.inf:
        raise UserError(f"--duration {args.duration:g}: must be above 0 seconds")

    device, _ = pick_device(args.device)
    model, s, about = load_model(args.checkpoint, device)
    codec = load_codec(about["name"], s.codec_weights if args.codec_weights is None else args.codec_weights)
    if codec.id != about["id"]:
        raise UserError(f"{args.checkpoint} was trained on codec {about['id']}, and the one found is {codec.id}")
    codec.to(device)
    choice = {key: getattr(s, key) if (given := getattr(args, key)) is None else given
              for key in ("cfg", "temperature", "top_k", "top_p")}  # fmt: skip
    if choice["top_k"] > codec.card:
        print(f"top_k {choice['top_k']} is more than the codec's {codec.card} codes: taken as {codec.card}")
    if not (choice["top_k"] >= 0 and 0 <= choice["temperature"] < math.inf and 0 <= choice["top_p"] <= 1):
        raise UserError("--top_k and --temperature must be 0 or above, and --top_p between 0 and 1")
    if not math.isfinite(choice["cfg"]):
        raise UserError(f"--cfg {choice['cfg']}: must be a number, 3 or so")

    frames = max(1, round(args.duration * codec.frame_rate))
    prompt = None
    if args.prompt:
        wav = load_audio(args.prompt, codec.sample_rate, codec.channels)
        seconds = wav.shape[1] / codec.sample_rate
        if math.ceil(wav.shape[1] / codec.hop) >= frames:
            raise UserError(
                f"--continue {args.prompt}: {seconds:.1f} s long, and --duration is {args.duration:g} s in all;"
                f" make --duration longer"
            )
        prompt = encode_long(codec, wav).expand(len(args.captions), -1, -1)
    if frames > model.trained_frames:
        print(f"{args.duration:g} s is past the {s.segment:g} s of training: going on in windows of that length")
    config.refuse_unwritable(args.out, "--out")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    seeds = [args.seed + i for i in range(len(args.captions))]
    started = time.time()
    with tqdm(total=frames, desc="generating", unit="frame", file=sys.stdout, mininterval=0.5) as bar:
        codes = model.generate([{"text": caption} for caption in args.captions], frames, prompt, seeds=seeds,
                               progress=lambda done: bar.update(done - bar.n), **choice)  # fmt: skip
    seconds = time.time() - started
    for caption, seed, wav in zip(args.captions, seeds, codec.decode(codes)):
        print(f"wrote {write_wav(out, caption, seed, wav, codec.sample_rate)}")
    print(f"{len(args.captions) * args.duration / seconds:.1f} seconds of music a second")


if __name__ == "__main__":
    config.run(main)
