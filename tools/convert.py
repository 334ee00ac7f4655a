"""Import MusicGen's published weights, and export models for other programs.

    python -m tools.convert import hf:facebook/musicgen-small out/musicgen-small
    python -m tools.convert import FOLDER out/musicgen-small --text_encoder_weights=hf:google-t5/t5-base
    python -m tools.convert export out/NAME/best.pt FOLDER --format hf
    python -m tools.convert codec PUBLISHED codec.safetensors       # the codec alone, for --codec_weights
    python -m tools.convert halve out/NAME/best.pt FILE             # weights in float16, half the size

`import` writes a folder with everything that sampling and fine-tuning need: best.pt, codec.safetensors,
t5.safetensors and spiece.model. A published model is a file, its folder, or hf:OWNER/NAME, which is downloaded if
huggingface_hub is installed. Hugging Face's folders contain all parts. Audiocraft's have state_dict.bin and
compression_state_dict.bin; pass T5 with --text_encoder_weights. Further --key=value are settings of the model,
such as --segment, the default length of a clip.

musicgen-melody and musicgen-style condition in other ways, so only their decoder is imported: the new text embedder
outputs zeros until it is trained, and fine-tuning starts at the loss of the published model without text.
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path

import torch

import common
import config
from codec import load_codec
from common import UserError
from conditioning import T5Embedder
from model import MusicLM
from prepare import train_tokenizer
from tools.export import export_checkpoint
from tools.published import (
    LAYOUTS,
    first_names,
    matching_names,
    read_codec,
    read_lm,
    read_t5,
    write_safetensors,
)  # fmt: skip

CROSS_ATTENTION = ("cross_", "norm2.")  # prefixes of the cross-attention's tensors in a block of MusicLM
# settings that the published weights determine: how the model works, which config files may not change, and its parts
FIXED, PARTS = "positions pattern delays melody style".split(), "dim heads layers codec text_encoder init_from".split()
LICENCE = (
    "The published weights are for non-commercial use only (CC-BY-NC 4.0), and so are models fine-tuned from them."
)


def import_weights(path, model, published):
    """Return published weights as a state dict for `model`, a MusicLM of the same sizes, without its conditioner.

    published: (layout, weights, sizes) from `read_lm`; the weights are popped to save memory. Without cross-attention,
    as in musicgen-melody, cross_out is zero. Raises UserError for other names, shapes or sizes.
    """
    layout, weights, sizes = published
    expected, imported, zeros, missing = model.state_dict(), {}, [], []
    model_sizes = dict(dim=model.embed.embedding_dim, heads=model.blocks[0].n_heads, layers=len(model.blocks),
                       K=model.K, card=model.card)  # fmt: skip
    if different := [f"{key} {sizes[key]}, not {model_sizes[key]}" for key in sizes if sizes[key] != model_sizes[key]]:
        raise UserError(f"{path}: other sizes than the settings and the codec: {'; '.join(different)}")
    has_cross_attention = uses_cross_attention(weights)
    for names, published_names in matching_names(layout, sizes["layers"], sizes["K"]):
        if not has_cross_attention and names[0].split(".", 2)[-1].startswith(CROSS_ATTENTION):
            zeros += [name for name in names if name.endswith("cross_out.weight")]
        elif absent := [name for name in published_names if name not in weights]:
            missing += absent
        else:
            parts, rows = [weights.pop(name) for name in published_names], [len(expected[name]) for name in names]
            shape = (sum(rows) // len(parts), *expected[names[0]].shape[1:])
            for name, part in zip(published_names, parts):
                if part.shape != shape:
                    raise UserError(f"{path}: {name} is {list(part.shape)}, not {list(shape)}")
            imported |= dict(zip(names, torch.cat(parts).split(rows)))
    if missing or weights:
        wrong = [f"missing {first_names(missing)}"] * bool(missing) + [f"unknown {first_names(weights)}"] * bool(
            weights
        )
        raise UserError(f"{path}: not the weights of a MusicGen: {'; '.join(wrong)}")
    return imported | {name: torch.zeros(expected[name].shape) for name in zeros}


def uses_cross_attention(names):
    """Return whether published names include cross-attention, which musicgen-melody and musicgen-style lack."""
    return any(re.search("cross_attention|encoder_attn", name) for name in names)


def import_model(path, out, settings=(), codec_weights=None, text_encoder_weights=None):
    """Write a published model to the folder OUT: best.pt, codec.safetensors, and T5 if the model has cross-attention.

    settings: command-line words for `config.load`. codec_weights, text_encoder_weights: published files or folders; by
    default those in `path`.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; choose another folder, or remove it")
    layout, weights, sizes, conditioners = read_lm(path)
    has_text = uses_cross_attention(weights)
    projection = {name.rpartition(".")[2]: conditioners.pop(name) for name in [*conditioners] if has_text
                  and re.search(r"(^|\.)enc_to_dec_proj\.|conditioners\.description\.output_proj\.", name)}  # fmt: skip
    if conditioners:
        print(f"{path}: ignored, because this code conditions in another way: {first_names(conditioners)}")
    s = config.load(["--segment=30", *settings], __doc__, processes=1)
    defaults, typed = config.Settings(), {re.split("[-=]+", str(word))[1] for word in settings if str(word)[:2] == "--"}
    for key in (*FIXED, *PARTS):
        if key in typed or (key in FIXED and getattr(s, key) != getattr(defaults, key)):
            raise UserError(f"--{key}={getattr(s, key)}: does not fit the published weights; omit --{key}")
    s.dim, s.heads, s.layers, K, card = sizes.values()
    s.out, s.text_encoder, s.lora_rank, s.freeze = str(out), "t5" if has_text else "own", 0, ()

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        work = Path(temporary, out.name)
        work.mkdir()
        try:
            codec_state, pad_mode = read_codec(codec_weights or path)
        except UserError as error:
            raise UserError(f"{error}" + "; pass the codec with --codec_weights" * (not codec_weights)) from None
        write_safetensors(codec_state, work / "codec.safetensors", {"pad_mode": pad_mode})
        codec = load_codec("musicgen_32khz", str(work / "codec.safetensors"))
        if K == 2 * codec.K:
            codec = load_codec("musicgen_32khz:stereo", str(work / "codec.safetensors"))
        if (codec.K, codec.card) != (K, card):
            raise UserError(f"{path}: has K {K}, card {card}, but the codec has K {codec.K}, card {codec.card}; pass"
                            " this model's codec with --codec_weights")  # fmt: skip
        tokenizer = train_tokenizer([], 1000)
        if has_text:
            t5_state, tokenizer_path = read_t5(text_encoder_weights or path)
            write_safetensors(t5_state, work / "t5.safetensors", {})
            shutil.copyfile(tokenizer_path, work / tokenizer_path.name)
            s.text_encoder_weights, tokenizer = str(work / "t5.safetensors"), tokenizer_path.read_bytes()
        with torch.device("meta" if has_text else "cpu"):  # without text, the conditioner starts untrained
            model = MusicLM(s, codec.info(), tokenizer)
        state = {} if has_text else model.state_dict()
        state |= import_weights(path, model, (layout, weights, sizes))
        state |= import_projection(path, model.conditioner.text, projection)
        s.codec, s.codec_weights = codec.name, str(out / "codec.safetensors")
        s.text_encoder_weights = str(out / "t5.safetensors") if has_text else ""
        common.save_checkpoint(work / "best.pt", "best", ema=state, settings=vars(s), codec=codec.info(), step=0,
                               tokenizer=tokenizer, text_encoder=model.conditioner.text_encoder_id)  # fmt: skip
        if out.exists():
            out.rmdir()
        work.replace(out)
    print(f"wrote {out}: {', '.join(sorted(file.name for file in out.iterdir()))}\n{LICENCE}")
    note = "" if has_text else "It ignores captions until it is trained. "
    print(f"{note}Try: python sample.py {common.quote(out)}" + ' "80s pop with a catchy synth"' * has_text)


def import_projection(path, text, projection):
    """Return the weights of the text embedder's output layer as a state dict: the published projection, or zeros.

    projection: {"weight", "bias"}, or {} if T5 has the width of the decoder.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in text.out.state_dict().items()}
    if not isinstance(text, T5Embedder):
        projection = {name: torch.zeros(shape) for name, shape in expected.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in projection.items()}
    if shapes != expected:
        raise UserError(f"{path}: the projection has shapes {shapes or 'none'}, expected {expected or 'none'} for a T5"
                        f" of width {text.encoder.dim}; pass this model's T5 with --text_encoder_weights")  # fmt: skip
    return {f"conditioner.text.out.{name}": tensor for name, tensor in projection.items()}


def convert_codec(path, file):
    """Write a published codec for `codec.load_musicgen_32khz`."""
    weights, pad_mode = read_codec(path)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, file, {"pad_mode": pad_mode})
    print(f"wrote {file}; to use it: --codec=musicgen_32khz --codec_weights={file}")


def halve(checkpoint, file):
    """Write a checkpoint with float16 weights, except those above its range. `load_model` converts them to float32."""
    saved, weights = common.load_checkpoint(checkpoint, ["best"]), {}
    for name, tensor in saved["ema"].items():
        fits = tensor.is_floating_point() and tensor.half().isfinite().all()
        weights[name] = tensor.half() if fits else tensor
    kept = {key: saved[key] for key in saved if key not in ("nanomusicgen", "kind", "ema")}
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(file, "best", ema=weights, **kept)
    print(f"wrote {file}, {Path(file).stat().st_size / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    help_of_import = "write a folder for sample.py and --init_from from a published MusicGen"
    command = commands.add_parser("import", allow_abbrev=False, help=help_of_import)
    command.add_argument("weights", help="a file, a folder, or hf:facebook/musicgen-small")
    command.add_argument("out", help="the folder to write")
    command.add_argument("--codec_weights", help="the published codec, if it is not in the same folder")
    command.add_argument("--text_encoder_weights", help="the published T5, if it is not in the same folder")
    command = commands.add_parser("export", help="write a checkpoint for Hugging Face or audiocraft")
    command.add_argument("checkpoint", help="a best.pt or a run's folder")
    command.add_argument("folder", help="the folder to write")
    command.add_argument("--format", choices=list(LAYOUTS), default="hf", help="default: hf")
    command.add_argument("--codec_weights", help="the codec's weights, if they have moved since training")
    command.add_argument("--text_encoder_weights", help="T5's weights, if they have moved since training")
    command = commands.add_parser("codec", help="convert a published codec for --codec_weights")
    command.add_argument("weights", help="a file, a folder, or hf:facebook/encodec_32khz")
    command.add_argument("file", help="the .safetensors file to write")
    command = commands.add_parser("halve", help="write a best.pt with its weights in float16")
    command.add_argument("checkpoint", help="a best.pt or a run's folder")
    command.add_argument("file", help="the file to write")
    args, words = parser.parse_known_args()
    if words and args.command != "import":
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if args.command == "import":
        import_model(args.weights, args.out, words, args.codec_weights, args.text_encoder_weights)
    elif args.command == "export":
        export_checkpoint(args.checkpoint, args.folder, args.format, args.codec_weights, args.text_encoder_weights)
    elif args.command == "codec":
        convert_codec(args.weights, args.file)
    else:
        halve(args.checkpoint, args.file)


if __name__ == "__main__":
    common.run(main)
