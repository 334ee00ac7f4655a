"""Import MusicGen's published weights, and export models: audiocraft's and Hugging Face's layouts.

    python -m tools.convert codec PUBLISHED codec.safetensors      # for --codec_weights
    python -m tools.convert import PUBLISHED config/finetune.py --codec_weights=codec.safetensors --out=out/imported
    python -m tools.convert export out/NAME/best.pt FOLDER --format hf

PUBLISHED is a file, its folder, or hf:OWNER/NAME, which is downloaded if huggingface_hub is installed:

    audiocraft     state_dict.bin, compression_state_dict.bin: a pickle of {"best_state": tensors, "xp.cfg": settings}
    Hugging Face   *.safetensors of MusicgenForConditionalGeneration, MusicgenForCausalLM, or EncodecModel

`import` writes OUT/best.pt for sample.py and --init_from. The config file gives its settings, except the sizes, which
come from the weights. T5 is not imported. Instead a new text embedder outputs zeros until it is trained, so fine-tuning
starts at the loss of the published model without text.

Pickles are read with weights_only=True. Old ones store their settings as omegaconf objects. The classes in OMEGACONF
are replaced by Inert, which runs no code and only keeps the content.

Letters: B batch, L condition length, K codebooks, D model width; `card` is the codebook size.
"""

import argparse
import functools
import json
import re
import typing
from pathlib import Path

import safetensors.torch
import torch

import common
import config
from codec import build_musicgen_32khz, load_codec
from common import UserError, first_line
from dataprep import shards
from extras.lora import merge_lora
from generate import load_model
from model import MusicLM
from prepare import train_tokenizer

LAYOUTS = {  # names of the parts of MusicLM, and of the setting for the number of heads
    "audiocraft": dict(blocks="transformer.layers", norm="out_norm", embed="emb", heads="linears", n_heads="num_heads"),
    "hf": dict(blocks="model.decoder.layers", norm="model.decoder.layer_norm", embed="model.decoder.embed_tokens",
               heads="lm_heads", n_heads="num_attention_heads"),
}  # fmt: skip
# Tensors of a block in MusicLM, audiocraft and Hugging Face. The tensors of a cell, concatenated, are the same matrix.
BLOCK = (
    ("qkv.weight", "self_attn.in_proj_weight",
     "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight"),
    ("attn_out.weight", "self_attn.out_proj.weight", "self_attn.out_proj.weight"),
    ("cross_q.weight cross_kv.weight", "cross_attention.in_proj_weight",
     "encoder_attn.q_proj.weight encoder_attn.k_proj.weight encoder_attn.v_proj.weight"),
    ("cross_out.weight", "cross_attention.out_proj.weight", "encoder_attn.out_proj.weight"),
    ("up.weight", "linear1.weight", "fc1.weight"),
    ("down.weight", "linear2.weight", "fc2.weight"),
    ("norm1.weight", "norm1.weight", "self_attn_layer_norm.weight"),
    ("norm1.bias", "norm1.bias", "self_attn_layer_norm.bias"),
    ("norm2.weight", "norm_cross.weight", "encoder_attn_layer_norm.weight"),
    ("norm2.bias", "norm_cross.bias", "encoder_attn_layer_norm.bias"),
    ("norm3.weight", "norm2.weight", "final_layer_norm.weight"),
    ("norm3.bias", "norm2.bias", "final_layer_norm.bias"),
)  # fmt: skip
CROSS_ATTENTION = ("cross_", "norm2.")  # prefixes of its tensors in a block of MusicLM
NOT_IMPORTED = ("condition_provider.", "model.decoder.embed_positions.")


def matching_names(layout, n_layers, K):
    """Yield (names in MusicLM, published names) of tensors that, concatenated, are the same matrix."""
    parts, column = LAYOUTS[layout], 1 + [*LAYOUTS].index(layout)
    for layer in range(n_layers):
        for row in BLOCK:
            yield ([f"blocks.{layer}.{name}" for name in row[0].split()],
                   [f"{parts['blocks']}.{layer}.{name}" for name in row[column].split()])  # fmt: skip
    for kind in ("weight", "bias"):
        yield [f"norm.{kind}"], [f"{parts['norm']}.{kind}"]
    for part in ("embed", "heads"):
        yield [f"{part}.weight"], [f"{parts[part]}.{k}.weight" for k in range(K)]


# -------------------------------------------------------------------------------------------------------- reading


class Inert:
    """Replaces an object of omegaconf in a pickle: keeps its value and runs no code."""

    def __init__(self, *args, **kwargs):
        self.state = {}

    def __setstate__(self, state):
        self.state = state if isinstance(state, dict) else {}

    def __repr__(self):
        return repr(self.state.get("_content", self.state.get("_val")))


OMEGACONF = """dictconfig.DictConfig listconfig.ListConfig base.ContainerMetadata base.Metadata nodes.AnyNode
    nodes.StringNode nodes.IntegerNode nodes.FloatNode nodes.BooleanNode""".split()
SAFE_CLASSES = [dict, list, int, str, float, bool, tuple, typing.Any, (lambda *_: {}, "collections.defaultdict"),
                *((Inert, f"omegaconf.{name}") for name in OMEGACONF)]  # fmt: skip


def summarize(names):
    names = sorted(names)
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def find_files(path, patterns):
    """Return [path] if it is a file, otherwise the files in the folder that match the first pattern with a match."""
    folder = path
    if Path(path).is_file():
        return [Path(path)]
    for pattern in patterns:
        if str(path).startswith("hf:"):
            try:
                from huggingface_hub import snapshot_download

                folder = snapshot_download(str(path)[3:], allow_patterns=[pattern, "config.json"])
            except Exception as error:
                raise UserError(f"{path}: cannot be downloaded ({first_line(error)}); pip install huggingface_hub, or"
                                " download it on another machine and pass its folder") from None  # fmt: skip
        if files := sorted(Path(folder).glob(pattern)):
            return files
    raise UserError(f"{path}: no such file, and no folder with {' or '.join(patterns)}; pass one of them")


def read_file(file):
    """Return the content of a file, a dict. Raises UserError if it is damaged or its pickle may run code."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        with torch.serialization.safe_globals(SAFE_CLASSES):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it contains {unsafe[1]}, which may run code" if unsafe else "truncated, or not weights"
        raise UserError(f"{file}: cannot be read ({reason}); pass safetensors or another copy") from None
    return content if isinstance(content, dict) else {}


def read_weights(path, *patterns):
    """Return ({name: tensor}, settings as text) of published weights. Settings come from the pickle and config.json."""
    files, weights, settings = find_files(path, patterns), {}, ""
    for file in files:
        content = read_file(file)
        if name := content.get("pretrained"):
            raise UserError(f"{file}: contains no weights, only the name {name}; pass the weights, such as hf:{name}")
        settings += str(content.get("xp.cfg", "")).lower()
        for key in ("fsdp_best_state", "best_state", "state_dict", "model"):  # of trainers' checkpoints
            content = content[key] if isinstance(content.get(key), dict) and content[key] else content
        weights |= content
    if (config_file := files[0].with_name("config.json")).is_file():
        settings += config_file.read_text(encoding="utf-8", errors="replace")
    if any("lora_A" in str(name) for name in weights):
        raise UserError(f"{files[0]}: a PEFT adapter; pass the model that merge_and_unload() returns")
    if not weights or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise UserError(f"{files[0]}: contains no weights; pass a published state_dict.bin or safetensors")
    return weights, settings


# ------------------------------------------------------------------------------------------------- language model


def read_lm(path):
    """Read a published language model: return (layout, {published name: float32 tensor}, sizes).

    sizes: dim, heads, layers, K, card. Conditioners and codecs in the file are skipped. If the settings are missing,
    attention heads are 64 wide, as in the published models.
    """
    state, settings = read_weights(path, "state_dict.bin", "model*.safetensors", "checkpoint.th", "adapter_model*")
    for layout in LAYOUTS:
        parts = LAYOUTS[layout]
        embed = f"{parts['embed']}.0.weight"
        if prefixes := [name.removesuffix(embed) for name in state if name.endswith(embed) and state[name].dim() == 2]:
            break
    else:
        raise UserError(f"{path}: not a MusicGen language model, its tensors are {summarize(state)}; if the model has"
                        " several files, pass their folder")  # fmt: skip
    state = {name.removeprefix(prefixes[0]): tensor for name, tensor in state.items() if name.startswith(prefixes[0])}
    weights = {name: tensor.float() for name, tensor in state.items() if not name.startswith(NOT_IMPORTED)}

    def count(part):
        return len({match[1] for name in weights if (match := re.match(rf"{re.escape(part)}\.(\d+)\.", name))})

    rows, dim = weights[embed].shape
    heads = re.search(rf"\b{parts['n_heads']}\W+(\d+)", settings)
    heads = int(heads[1]) if heads else max(1, dim // 64)
    sizes = dict(dim=dim, heads=heads, layers=count(parts["blocks"]), K=count(parts["embed"]), card=rows - 1)
    return layout, weights, sizes


def import_weights(path, model, published=None):
    """Return published weights as a state dict for `model`, a MusicLM of the same sizes.

    The text embedder's output layer is zero, so that the model ignores captions until it is trained. musicgen-melody
    has no cross-attention, so the output layers of the cross-attention are zero too. published: from `read_lm`, if
    already read; its weights are removed. Raises UserError for other names, shapes or sizes.
    """
    layout, weights, sizes = published or read_lm(path)
    expected, missing = model.state_dict(), []
    model_sizes = dict(dim=model.embed.embedding_dim, heads=model.blocks[0].n_heads, layers=len(model.blocks),
                       K=model.K, card=model.card)  # fmt: skip
    if different := [f"{key} {sizes[key]}, not {model_sizes[key]}" for key in sizes if sizes[key] != model_sizes[key]]:
        raise UserError(f"{path}: other sizes than the settings and the codec: {'; '.join(different)}")
    zeros = ["conditioner.text.out.weight", "conditioner.text.out.bias"]
    imported, has_cross_attention = {}, any(re.search("cross_attention|encoder_attn", name) for name in weights)
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
        wrong = [f"missing {summarize(missing)}"] * bool(missing) + [f"unknown {summarize(weights)}"] * bool(weights)
        raise UserError(f"{path}: not the weights of a MusicGen: {'; '.join(wrong)}")
    return imported | {name: torch.zeros(expected[name].shape) for name in zeros}


def write_safetensors(tensors, path, metadata):
    try:
        safetensors.torch.save_file(tensors, path, metadata)  # renames a temporary file
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); free disk space or choose another") from None


def export_lm(model, settings, folder, layout):
    """Write the decoder of a MusicLM, LoRA merged, into `folder` and return the file's path.

    Load it with, hf: MusicgenForCausalLM.from_pretrained(folder); audiocraft: loaders.load_lm_model(folder), with
    condition_tensors={"description": (states [B, L, D], mask [B, L])}. Neither supports the conditioners.
    """
    if model.pattern_name != "delay":
        raise UserError(f"pattern = '{model.pattern_name}': cannot be exported, other programs support 'delay' only")
    if model.rotary:
        raise UserError("positions = 'rope': cannot be exported, other programs support 'sinusoidal' only")
    if layout == "hf" and model.delays != tuple(k // model.channels for k in range(model.K)):
        raise UserError(f"delays {model.delays}: not supported by Hugging Face; use --format audiocraft")
    folder = Path(folder)
    for name in ("state_dict.bin", "model.safetensors", "config.json", "generation_config.json"):
        if (folder / name).exists():
            raise UserError(f"{folder / name}: exists already; choose another folder, or remove it")
    layers, heads, D, weights = settings.layers, settings.heads, settings.dim, {}
    state = merge_lora(model.state_dict(), vars(settings))
    for names, published_names in matching_names(layout, layers, model.K):
        parts = torch.cat([state[name] for name in names]).chunk(len(published_names))
        weights |= {name: part.contiguous() for name, part in zip(published_names, parts)}
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "audiocraft":
        config = dict(
            device="cpu", dtype="float32", lm_model="transformer_lm", dataset=dict(segment_duration=settings.segment),
            transformer_lm=dict(
                dim=D, num_heads=heads, num_layers=layers, n_q=model.K, card=model.card, hidden_scale=4, dropout=0.0,
                emb_lr=None, activation="gelu", norm_first=True, bias_ff=False, bias_attn=False, bias_proj=False,
                past_context=None, causal=True, custom=False, memory_efficient=True, attention_as_float32=False,
                positional_embedding="sin", xpos=False, checkpointing="none", weight_init="gaussian",
                depthwise_init="current", zero_bias_init=True, norm="layer_norm", cross_attention=True,
                qk_layer_norm=False, qk_layer_norm_cross=False, attention_dropout=None, kv_repeat=1,
                two_step_cfg=False, layer_scale=None,
            ),
            codebooks_pattern=dict(modeling="delay", delay=dict(delays=list(model.delays), flatten_first=0,
                                                                empty_initial=0)),
            classifier_free_guidance=dict(training_dropout=settings.cfg_dropout, inference_coef=settings.cfg),
            attribute_dropout={}, conditioners={},
            fuser=dict(cross=["description"], sum=[], prepend=[], input_interpolate=[],
                       cross_attention_pos_emb=False, cross_attention_pos_emb_scale=1),
        )  # fmt: skip
        path = folder / "state_dict.bin"  # audiocraft reads xp.cfg as YAML, and JSON is YAML
        content = {"best_state": weights, "xp.cfg": json.dumps(config), "version": "1.3.0", "exported": True}
        common.write_file(path, functools.partial(torch.save, content))
        return path
    path = folder / "model.safetensors"
    write_safetensors(weights, path, {"format": "pt"})
    config = dict(
        architectures=["MusicgenForCausalLM"], model_type="musicgen_decoder", vocab_size=model.card,
        num_codebooks=model.K, hidden_size=D, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * D,
        activation_function="gelu", scale_embedding=False, max_position_embeddings=2048, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0, pad_token_id=model.card, bos_token_id=model.card,
        tie_word_embeddings=False, audio_channels=model.channels, torch_dtype="float32",
    )  # fmt: skip
    special = {f"{name}_token_id": model.card for name in ("pad", "bos", "decoder_start")}
    for file, content in (("config.json", config), ("generation_config.json", special)):
        (folder / file).write_text(json.dumps(content, indent=1) + "\n")
    return path


@torch.no_grad()
def null_effect(model):
    """Return how much a logit changes at most if zeros replace the learned null of the text, for random codes."""
    codes = torch.randint(model.card, (1, model.K, min(100, model.trained_frames)), generator=torch.Generator())
    condition_tensors, null = model.conditioner.tokenize([{}]), model.conditioner.text.null
    logits, learned = model.aligned_logits(codes, condition_tensors), null.clone()
    null.zero_()
    change = model.aligned_logits(codes, condition_tensors) - logits
    null.copy_(learned)
    return float(change.nan_to_num().abs().max())


# ---------------------------------------------------------------------------------------------------------- codec


def read_codec(path):
    """Read MusicGen's published codec: return (state dict in encodec's names, pad_mode 'reflect' or 'constant').

    Raises UserError for other weights, and for a codec that normalizes loudness.
    """
    state, settings = read_weights(path, "compression_state_dict.bin", "model*.safetensors")
    normalizes = re.search(r"\brenormalize\W+true|\"normalize\": true", settings)
    if normalizes or any(re.search(r"\.norm\.(weight|bias)$", name) for name in state):  # 48 kHz has group norms
        raise UserError(f"{path}: a codec that normalizes loudness (48 kHz), which MusicGen cannot use, because it has"
                        " no tokens for loudness; pass facebook/encodec_32khz")  # fmt: skip
    if any(name.startswith("audio_encoder.") for name in state):  # in one file with a language model
        state = {name: tensor for name, tensor in state.items() if name.startswith("audio_encoder.")}
    weights = {}
    for name, tensor in state.items():
        name = name.removeprefix("audio_encoder.")
        if not name.startswith(("encoder.model.", "decoder.model.", "quantizer.vq.")):  # Hugging Face's layout
            name = name.replace("parametrizations.weight.original0", "weight_g")
            name = name.replace("parametrizations.weight.original1", "weight_v")
            name = name.replace(".codebook.", "._codebook.").replace("quantizer.layers", "quantizer.vq.layers")
            name = re.sub(r"^(encoder|decoder)\.layers", r"\1.model", name)
            name = re.sub(r"^(decoder\.model\.(?:3|6|9|12))\.conv\.", r"\1.convtr.convtr.", name)
            name = re.sub(r"\.conv\.(bias|weight_.)$", r".conv.conv.\1", name)
        weights[name] = tensor.float().contiguous()
    pad_mode = re.search(r"pad_mode\W+(reflect|constant)", settings)
    pad_mode = pad_mode[1] if pad_mode else "reflect"
    try:
        build_musicgen_32khz(weights, pad_mode)
    except (KeyError, IndexError):
        raise UserError(f"{path}: not the weights of musicgen_32khz; its tensors are {summarize(state)}") from None
    except RuntimeError as error:  # torch lists missing and unexpected names, and wrong shapes
        raise UserError(f"{path}: not the weights of musicgen_32khz: {' '.join(str(error).split())[:300]}") from None
    return weights, pad_mode


# ------------------------------------------------------------------------------------------------------- commands


def convert_codec(path, file):
    """Write a published codec for `codec.load_musicgen_32khz`."""
    weights, pad_mode = read_codec(path)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(weights, file, {"pad_mode": pad_mode})
    print(f"wrote {file}; to use it: --codec=musicgen_32khz --codec_weights={file}")


def import_lm(path, s):
    """Write OUT/best.pt from a published language model and the settings `s`."""
    out, published = Path(s.out), read_lm(path)
    if (out / "best.pt").exists() or (out / "last.pt").exists():
        raise UserError(f"{out}: holds a run; choose another --out, or remove it")
    s.dim, s.heads, s.layers, K, card = published[2].values()
    s.lora_rank = 0
    codec = load_codec(s.codec, s.codec_weights)
    if (codec.K, codec.card) != (K, card):
        raise UserError(f"{path}: has K {K}, card {card}, but {s.codec} has K {codec.K}, card {codec.card}; pass the"
                        " model's --codec")  # fmt: skip
    has_tokenizer = Path(s.data, "tokenizer.model").exists()
    tokenizer = shards.read_tokenizer(s.data) if has_tokenizer else train_tokenizer([], 1000)
    model = MusicLM(s, codec.info(), tokenizer)
    model.load_state_dict(import_weights(path, model, published), strict=False)
    out.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(out / "best.pt", "best", ema=model.state_dict(), settings=vars(s), codec=codec.info(),
                           tokenizer=tokenizer, step=0)  # fmt: skip
    source = f"the tokenizer of {s.data}" if has_tokenizer else f"a default tokenizer, because {s.data} has none"
    print(f"wrote {out / 'best.pt'}, which ignores captions until it is trained, with {source}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    command = commands.add_parser("codec", help="convert a published codec for --codec_weights")
    command.add_argument("weights", help="a file, a folder, or hf:facebook/encodec_32khz")
    command.add_argument("file", help="the .safetensors file to write")
    command = commands.add_parser("import", help="make a best.pt from a published MusicGen, without its text encoder")
    command.add_argument("weights", help="a file, a folder, or hf:facebook/musicgen-small")
    command.add_argument("settings", nargs=argparse.REMAINDER, help="config files and --key=value, as for train.py")
    command = commands.add_parser("export", help="write a checkpoint's decoder for Hugging Face or audiocraft")
    command.add_argument("checkpoint", help="a best.pt")
    command.add_argument("folder", help="the folder to write")
    command.add_argument("--format", choices=list(LAYOUTS), default="hf", help="default: hf")
    args = parser.parse_args()
    if args.command == "codec":
        return convert_codec(args.weights, args.file)
    if args.command == "import":
        return import_lm(args.weights, config.load(args.settings, __doc__))
    model, settings, _ = load_model(args.checkpoint)
    path = export_lm(model, settings, args.folder, args.format)
    embedders = ", ".join(["text", *model.conditioner.prepended])
    print(f"wrote {path}, without the embedders that other programs do not support: {embedders}")
    print(f"without text, logits will differ by up to {null_effect(model):.2g}, because other programs use zeros for a"
          " missing caption, and this model a learned null")  # fmt: skip


if __name__ == "__main__":
    common.run(main)
