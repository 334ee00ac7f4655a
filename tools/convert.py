"""The reference's weights, in and out: MusicGen's language model and codec, as audiocraft and Hugging Face have them.

    python -m tools.convert codec PUBLISHED codec.safetensors      # for --codec_weights
    python -m tools.convert import PUBLISHED config/finetune.py --codec_weights=codec.safetensors --out=out/imported
    python -m tools.convert export out/NAME/best.pt FOLDER --format hf

What `import` writes is for --init_from, and for sample.py.

PUBLISHED is a file, a folder that holds it, or hf:OWNER/NAME, which is downloaded where huggingface_hub is installed:

    audiocraft     state_dict.bin, compression_state_dict.bin: a pickle of {"best_state": tensors, "xp.cfg": settings}
    Hugging Face   *.safetensors of MusicgenForConditionalGeneration, MusicgenForCausalLM, or EncodecModel

`import` writes OUT/best.pt by the settings of the config file, but for the sizes, which are the weights' own. T5 has no
place here: the text embedder starts anew and says nothing until it is trained, so that a fine-tune starts at the loss
of the published model without text.

A pickle is read with weights_only=True. Older ones hold their settings as omegaconf's objects; the few classes that
those consist of (OMEGACONF) are let through, each as a stand-in that runs no code and keeps what it is given.

Letters: K codebooks, D model width, `card` codes in a codebook.
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
import data
from codec import build_musicgen_32khz, load_codec
from common import UserError, first_line
from generate import load_model
from model import MusicLM, merge_lora
from prepare import train_tokenizer

OMEGACONF = """dictconfig.DictConfig listconfig.ListConfig base.ContainerMetadata base.Metadata nodes.AnyNode
    nodes.StringNode nodes.IntegerNode nodes.FloatNode nodes.BooleanNode""".split()
PLAIN = [dict, list, int, str, float, bool, tuple, typing.Any]

# Groups of tensors in a block: ours, audiocraft's, Hugging Face's. One below another they are the same matrix.
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
CROSS = ("cross_", "norm2.")  # how the names of a block's cross-attention begin
LAYOUTS = {"audiocraft": 1, "hf": 2}  # which column of the table


class Inert:
    """Stands for an object of omegaconf's: keeps its state, and does nothing."""

    def __init__(self, *args, **kwargs):
        self.state = {}

    def __setstate__(self, state):
        self.state = state if isinstance(state, dict) else {}


def plain_dict(*args):
    """In place of collections.defaultdict, which torch fills with nothing."""
    return {}


def as_text(value):
    """Settings, plain or of Inert objects, as lines 'key: value'."""
    if isinstance(value, Inert):
        value = value.state.get("_content", value.state.get("_val"))
    if isinstance(value, dict):
        return "\n" + "".join(f"{key}: {as_text(part)}\n" for key, part in value.items())
    return ", ".join(map(as_text, value)) if isinstance(value, list) else str(value).lower()


def groups(layout, layers, K):
    """[(our names, their names)] of the whole language model."""
    column, found = LAYOUTS[layout], []
    block = ("", "transformer.layers.", "model.decoder.layers.")[column]
    embed = ("", "emb", "model.decoder.embed_tokens")[column]
    norm = ("", "out_norm", "model.decoder.layer_norm")[column]
    heads = ("", "linears", "lm_heads")[column]
    for layer in range(layers):
        for row in BLOCK:
            ours, theirs = ([f"{layer}.{name}" for name in row[side].split()] for side in (0, column))
            found.append(([f"blocks.{name}" for name in ours], [block + name for name in theirs]))
    found += [([f"norm.{part}"], [f"{norm}.{part}"]) for part in ("weight", "bias")]
    found += [([f"{ours}.weight"], [f"{theirs}.{k}.weight" for k in range(K)])
              for ours, theirs in (("embed", embed), ("heads", heads))]  # fmt: skip
    return found


def below(prefix, state):
    """What stands under a prefix in a state dict, without it; all of it if nothing does."""
    found = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return found or state


def locate(path, names):
    """The files that `path` means: itself, or those of its folder that match the first of the patterns to match any."""
    hub = str(path).startswith("hf:")
    if hub:
        try:
            from huggingface_hub import snapshot_download
        except ImportError:
            raise UserError(f"{path}: needs huggingface_hub; pip install it, or give a local path") from None
    elif Path(path).is_file():
        return [Path(path)]
    for pattern in names:
        folder = path
        if hub:
            try:
                folder = snapshot_download(str(path)[3:], allow_patterns=[pattern, "config.json"])
            except Exception as error:
                raise UserError(
                    f"{path}: cannot be downloaded ({first_line(error)}); fetch it on another machine and"
                    f" give the folder"
                ) from None
        if found := sorted(Path(folder).glob(pattern)):
            return found
    raise UserError(f"{path or 'nothing'}: no such file, nor a folder with {' or '.join(names)}; give either")


def read(path, *names):
    """Weights of either layout -> ({name: tensor}, the settings that lie in or beside them, as text)."""
    files, state, settings = locate(path, names), {}, ""
    for file in files:
        try:
            if file.suffix == ".safetensors":
                state |= safetensors.torch.load_file(file)
                continue
            allowed = [(Inert, f"omegaconf.{name}") for name in OMEGACONF]
            with torch.serialization.safe_globals([*PLAIN, (plain_dict, "collections.defaultdict"), *allowed]):
                saved = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            refused = re.search(r"GLOBAL (\S+)", str(error))
            why = (
                f"holds an object of {refused[1]}, which is not let through" if refused else "truncated, or no weights"
            )
            raise UserError(f"{file}: cannot be read as weights: {why}") from None
        saved = saved if isinstance(saved, dict) else {}
        if "pretrained" in saved:
            raise UserError(f"{file}: only names the weights, {saved['pretrained']}; give those")
        settings = as_text(saved.get("xp.cfg", ""))
        for key in ("fsdp_best_state", "best_state", "state_dict", "model"):  # a trainer's own, weights among much else
            saved = saved[key] if isinstance(saved.get(key), dict) and saved[key] else saved
        state |= saved
    if (beside := files[0].with_name("config.json")).is_file():
        settings += beside.read_text(encoding="utf-8", errors="replace")
    if any("lora_A" in str(name) for name in state):
        raise UserError(
            f"{files[0]}: a PEFT adapter; merge it into its model (merge_and_unload), and give what that saves"
        )
    if not state or not all(isinstance(k, str) and isinstance(tensor, torch.Tensor) for k, tensor in state.items()):
        raise UserError(f"{files[0]}: holds no weights; the reference's state_dict.bin or safetensors are needed")
    return state, settings


def some(names):
    names = sorted(names)
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


# ---------------------------------------------------------------------------------------------------- language model


def open_lm(path):
    """A published language model -> (its layout, {their name: float32 tensor}, sizes: dim, heads, layers, K, card).

    Conditioners in the file are passed over. The published models' heads are 64 wide, where no settings say otherwise.
    """
    state, settings = read(path, "state_dict.bin", "model*.safetensors", "checkpoint.th", "adapter_model*")
    first = re.compile(r"(.*?)(emb\.0\.weight|model\.decoder\.embed_tokens\.0\.weight)")
    for prefix in [match[1] for match in map(first.fullmatch, state) if match]:
        state = below(prefix, state)  # beside a text encoder and a codec, or as a trainer's module
    not_ours = ("condition_provider.", "model.decoder.embed_positions.")
    state = {name: tensor.float() for name, tensor in state.items() if not name.startswith(not_ours)}
    layout = "audiocraft" if "emb.0.weight" in state else "hf"
    first = state.get({"audiocraft": "emb.0.weight", "hf": "model.decoder.embed_tokens.0.weight"}[layout])
    if first is None or first.dim() != 2:
        raise UserError(
            f"{path}: not a MusicGen language model (of several files, give the folder); its names are {some(state)}"
        )

    def counted(pattern):
        return 1 + max((int(match[1]) for name in state if (match := re.match(pattern, name))), default=-1)

    card, dim = first.shape[0] - 1, first.shape[1]
    key = {"audiocraft": "num_heads", "hf": "num_attention_heads"}[layout]
    heads = re.search(rf'\b{key}"?: (\d+)', settings)
    return layout, state, dict(
        dim=dim, heads=int(heads[1]) if heads else max(1, dim // 64), layers=counted(r".*\blayers\.(\d+)\."),
        K=counted(r"(?:emb|model\.decoder\.embed_tokens)\.(\d+)\."), card=card,
    )  # fmt: skip


def read_lm(path, model, opened=None):
    """A published language model -> {our name: float32 tensor}, for `model`, a MusicLM of its sizes.

    opened: what `open_lm` gives, where that is known already; the weights in it are used up.

    The text embedder begins so that it says nothing: whatever the caption, the model is the published one without text.
    musicgen-melody has no cross-attention; it gets one that adds nothing.
    Raises UserError if names are missing or left over, or shapes differ, with the sizes that were found.
    """
    layout, state, theirs = opened or open_lm(path)
    ours = dict(dim=model.embed.embedding_dim, heads=model.blocks[0].heads, layers=len(model.blocks), K=model.K,
                card=model.card)  # fmt: skip
    if other := [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if ours[key] != theirs[key]]:
        raise UserError(f"{path}: holds a model of other sizes than the settings and the codec: {'; '.join(other)}")

    wanted, missing = model.state_dict(), []
    found = {f"conditioner.text.out.{part}": torch.zeros_like(wanted[f"conditioner.text.out.{part}"], device="cpu")
             for part in ("weight", "bias")}  # fmt: skip
    without_cross = not any("cross_attention" in name or "encoder_attn" in name for name in state)
    for mine, names in groups(layout, theirs["layers"], theirs["K"]):
        if without_cross and mine[0].split(".", 2)[-1].startswith(CROSS):
            if mine[0].endswith("cross_out.weight"):
                found[mine[0]] = torch.zeros(wanted[mine[0]].shape)
        elif absent := [name for name in names if name not in state]:
            missing += absent
        else:
            sizes, parts = [wanted[name].shape[0] for name in mine], [state.pop(name) for name in names]
            needed = (sum(sizes) // len(names), *wanted[mine[0]].shape[1:])
            for name, part in zip(names, parts):
                if part.shape != needed:
                    raise UserError(f"{path}: {name} is {list(part.shape)}, not {list(needed)}")
            found |= dict(zip(mine, torch.cat(parts).split(sizes)))
    if missing or state:
        wrong = [f"missing {some(missing)}"] * bool(missing) + [f"left over {some(state)}"] * bool(state)
        raise UserError(f"{path}: not the weights of a whole model: {'; '.join(wrong)}")
    return found


def save_tensors(tensors, path, about):
    """Whole or not at all, as safetensors renames too; raises UserError if they cannot be written."""
    try:
        safetensors.torch.save_file(tensors, path, about)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); make room, or choose another") from None


def export_lm(model, ours, settings, folder, layout):
    """Writes a MusicLM's decoder, with the weights `ours`, as `layout` has it into `folder`; returns the path.

    hf: MusicgenForCausalLM.from_pretrained(folder). audiocraft: loaders.load_lm_model(folder), whose text is given as
    condition_tensors={"description": (states [B, L, D], mask [B, L])}. Neither has a place for the conditioners.
    """
    if model.pattern_name != "delay":
        raise UserError(
            f"the '{model.pattern_name}' pattern: those programs generate in the delay pattern only; it stays here"
        )
    if model.rotary:
        raise UserError("positions = 'rope': those programs have MusicGen's sinusoids only; it stays here")
    if layout == "hf" and model.delays != tuple(k // model.channels for k in range(model.K)):
        raise UserError(f"delays {model.delays}: Hugging Face's program has those of MusicGen built in")
    folder, theirs = Path(folder), {}
    for name in ("state_dict.bin", "model.safetensors", "config.json", "generation_config.json"):
        if (folder / name).exists():
            raise UserError(f"{folder / name}: is there already; choose another folder, or remove it")
    layers, heads, D = settings.layers, settings.heads, settings.dim
    for mine, names in groups(layout, layers, model.K):
        whole = torch.cat([ours[name] for name in mine])
        theirs |= {name: part.contiguous() for name, part in zip(names, whole.chunk(len(names)))}
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
            codebooks_pattern=dict(
                modeling="delay", delay=dict(delays=list(model.delays), flatten_first=0, empty_initial=0)
            ),
            classifier_free_guidance=dict(training_dropout=settings.cfg_dropout, inference_coef=settings.cfg),
            attribute_dropout={}, conditioners={},
            fuser=dict(cross=["description"], sum=[], prepend=[], input_interpolate=[],
                       cross_attention_pos_emb=False, cross_attention_pos_emb_scale=1),
        )  # fmt: skip
        path = folder / "state_dict.bin"  # JSON is YAML, which is what the reference reads there
        whole = {"best_state": theirs, "xp.cfg": json.dumps(config), "version": "1.3.0", "exported": True}
        common.write_file(path, functools.partial(torch.save, whole))
        return path
    path = folder / "model.safetensors"
    save_tensors(theirs, path, {"format": "pt"})
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
def unconditional_difference(model):
    """The most that a logit moves where zeros take the place of the learned null, for random codes."""
    codes = torch.randint(model.card, (1, model.K, min(100, model.trained_frames)), generator=torch.Generator())
    inputs, null = model.conditioner.prepare([{}]), model.conditioner.text.null
    ours = model.aligned_logits(codes, inputs)
    kept = null.clone()
    null.zero_()
    theirs = model.aligned_logits(codes, inputs)
    null.copy_(kept)
    return float((ours - theirs).nan_to_num().abs().max())


# ---------------------------------------------------------------------------------------------------- codec


def read_codec(path):
    """MusicGen's codec of either layout -> (state dict as encodec names it, pad_mode, 'reflect' or 'constant').

    Raises UserError as `read_lm`, and for a codec that renormalises loudness.
    """
    state, settings = read(path, "compression_state_dict.bin", "model*.safetensors")
    renormalises = re.search(r"\brenormalize: true|\"normalize\": true", settings)
    if renormalises or any(re.search(r"\.norm\.(weight|bias)$", name) for name in state):  # 48 kHz has group norms
        raise UserError(
            f"{path}: a codec that renormalises loudness (48 kHz): it needs a scale beside its codes, for which the"
            f" language model has no place; musicgen_32khz needs facebook/encodec_32khz"
        )
    state = below("audio_encoder.", state)  # beside a language model
    found = {}
    for name, tensor in state.items():
        if not name.startswith(("encoder.model.", "decoder.model.", "quantizer.vq.")):  # Hugging Face's
            name = name.replace("parametrizations.weight.original0", "weight_g")
            name = name.replace("parametrizations.weight.original1", "weight_v")
            name = name.replace(".codebook.", "._codebook.").replace("quantizer.layers", "quantizer.vq.layers")
            name = re.sub(r"^(encoder|decoder)\.layers", r"\1.model", name)
            name = re.sub(r"^(decoder\.model\.(?:3|6|9|12))\.conv\.", r"\1.convtr.convtr.", name)
            name = re.sub(r"\.conv\.(bias|weight_.)$", r".conv.conv.\1", name)
        found[name] = tensor.float().contiguous()
    pads = re.search(r"pad_mode\W+(reflect|constant)", settings)
    pad_mode = pads[1] if pads else "reflect"
    if "encoder.model.0.conv.conv.weight_v" not in found:
        raise UserError(f"{path}: not the weights of musicgen_32khz; its names are {some(state)}")
    try:
        build_musicgen_32khz(found, pad_mode)
    except (RuntimeError, IndexError) as error:  # torch names what is missing, left over or of another shape
        raise UserError(f"{path}: not the weights of musicgen_32khz: {' '.join(str(error).split())[:300]}") from None
    return found, pad_mode


# ------------------------------------------------------------------------------------------------------- commands


def convert_codec(path, file):
    """Writes the published codec as `codec.load_musicgen_32khz` reads it."""
    state, pad_mode = read_codec(path)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_tensors(state, file, {"pad_mode": pad_mode})
    print(f"wrote {file}; to use it: --codec=musicgen_32khz --codec_weights={file}")


def import_lm(path, s):
    """Writes OUT/best.pt, which continues audio, or plays by itself, but hears no text yet."""
    out, opened = Path(s.out), open_lm(path)
    if (out / "best.pt").exists() or (out / "last.pt").exists():
        raise UserError(f"{out}: holds a run; choose another --out, or remove it")
    s.dim, s.heads, s.layers, K, card = (opened[2][key] for key in ("dim", "heads", "layers", "K", "card"))
    s.lora_rank = 0
    codec = load_codec(s.codec, s.codec_weights)
    if (codec.K, codec.card) != (K, card):
        raise UserError(f"{path}: has K {K}, card {card}, and {s.codec} K {codec.K}, card {codec.card}; give --codec")
    there = Path(s.data, "tokenizer.model").exists()
    tokenizer = data.read_tokenizer(s.data) if there else train_tokenizer([], 1000)
    model = MusicLM(s, codec.describe(), tokenizer)
    model.load_state_dict(read_lm(path, model, opened), strict=False)
    out.mkdir(parents=True, exist_ok=True)
    common.save_checkpoint(out / "best.pt", "best", ema=model.state_dict(), settings=vars(s), codec=codec.describe(),
                           tokenizer=tokenizer, step=0)  # fmt: skip
    words = f"with the tokenizer of {s.data}" if there else f"without a tokenizer, as {s.data} is not there"
    print(f"wrote {out / 'best.pt'}, which hears no text yet, {words}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    command = commands.add_parser("codec", help="make weights for --codec_weights of a published codec")
    command.add_argument("weights", help="a file, a folder, or hf:facebook/encodec_32khz")
    command.add_argument("file", help="the .safetensors to write")
    command = commands.add_parser("import", help="make a best.pt of a published MusicGen, without its text encoder")
    command.add_argument("weights", help="a file, a folder, or hf:facebook/musicgen-small")
    command.add_argument("settings", nargs=argparse.REMAINDER, help="config files and --key=value, as for train.py")
    command = commands.add_parser("export", help="write a checkpoint's decoder as Hugging Face or audiocraft names it")
    command.add_argument("checkpoint", help="a best.pt")
    command.add_argument("folder", help="where to")
    command.add_argument("--format", choices=list(LAYOUTS), default="hf", help="default: hf")
    args = parser.parse_args()
    if args.command == "codec":
        return convert_codec(args.weights, args.file)
    if args.command == "import":
        return import_lm(args.weights, config.load(args.settings, __doc__))
    model, settings, _ = load_model(args.checkpoint)
    differs = unconditional_difference(model)
    path = export_lm(model, merge_lora(model.state_dict(), vars(settings)), settings, args.folder, args.format)
    left_out = ", ".join(["text", *model.conditioner.prepended])
    print(f"wrote {path}; left out, as those programs have no place for them: the embedders of {left_out}")
    print(f"without text, logits differ by up to {differs:.2g}, as those programs have zeros for the null it learned")


if __name__ == "__main__":
    common.run(main)
