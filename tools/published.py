"""Read MusicGen's published weights, in audiocraft's and Hugging Face's layouts; tools/convert.py is the program.

    audiocraft     state_dict.bin, compression_state_dict.bin: a pickle of {"best_state": tensors, "xp.cfg": settings}
    Hugging Face   *.safetensors or pytorch_model.bin of MusicgenForConditionalGeneration, EncodecModel, or T5

Pickles are read with weights_only=True. Old ones store their settings as omegaconf objects. The classes in OMEGACONF
are replaced by Inert, which runs no code and only keeps the content.

Letters: K codebooks, D model width; `card` is the codebook size.
"""

import re
import typing
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from codec import build_musicgen_32khz
from common import UserError, first_line

LAYOUTS = {  # names of the parts of MusicLM, and of the setting for the number of heads
    "audiocraft": dict(blocks="transformer.layers", norm="out_norm", embed="emb", heads="linears", n_heads="num_heads"),
    "hf": dict(blocks="model.decoder.layers", norm="model.decoder.layer_norm", embed="model.decoder.embed_tokens",
               heads="lm_heads", n_heads="num_attention_heads"),
}  # fmt: skip
# Tensors of a block in MusicLM, audiocraft and Hugging Face. A row is one matrix; several names are concatenated.
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
CODEC_FILES = ("model*.safetensors", "pytorch_model*.bin", "compression_state_dict.bin")
# facebook/musicgen-small has a state_dict.bin too, but T5 is not in it
LM_FILES = ("model*.safetensors", "pytorch_model*.bin", "state_dict.bin", "checkpoint.th", "adapter_model*")
T5_FILES = ("model*.safetensors", "pytorch_model*.bin")
TOKENIZERS = ("spiece.model", "tokenizer.json")  # of T5; the first that exists


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


def first_names(names):
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

                folder = snapshot_download(str(path)[3:], allow_patterns=[pattern, "config.json", *TOKENIZERS])
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
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it contains {unsafe[1]}, which may run code" if unsafe else "truncated, or not weights"
        raise UserError(f"{file}: cannot be read ({reason}); pass safetensors or another copy") from None
    return content if isinstance(content, dict) else {}


def read_weights(path, patterns):
    """Return ({name: tensor}, settings as text) of published weights. Settings come from the pickle and config.json."""
    files, weights, settings = find_files(path, patterns), {}, ""
    for file in files:
        content = read_file(file)
        if name := content.get("pretrained"):
            raise UserError(f"{file}: a reference to {name}, without weights; pass hf:{name}")
        settings += str(content.get("xp.cfg", "")).lower()
        for key in ("fsdp_best_state", "best_state", "state_dict", "model"):  # keys in trainers' checkpoints
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
    """Read a published language model: return (layout, weights, sizes, conditioners).

    weights: {published name: tensor} of the decoder. sizes: dim, heads, layers, K, card. conditioners: the other
    tensors, except those of codec and T5. Without settings, attention heads are 64 wide, as in the published models.
    """
    state, settings = read_weights(path, LM_FILES)
    if re.search(r"solver\W+audiogen|\bsample_rate\W+16000\b", settings):
        raise UserError(f"{path}: an AudioGen model, for sounds at 16 kHz; pass a MusicGen, such as"
                        " hf:facebook/musicgen-small")  # fmt: skip
    for layout in LAYOUTS:
        parts = LAYOUTS[layout]
        embed = f"{parts['embed']}.0.weight"
        if prefixes := [name.removesuffix(embed) for name in state if name.endswith(embed) and state[name].dim() == 2]:
            break
    else:
        raise UserError(f"{path}: not a MusicGen language model, its tensors are {first_names(state)}; if the model has"
                        " several files, pass their folder")  # fmt: skip
    weights, conditioners = {}, {}
    for name, tensor in state.items():
        part = name.removeprefix(prefixes[0])
        if not name.startswith(prefixes[0]) or part.startswith("condition_provider."):
            if not name.startswith(("text_encoder.", "audio_encoder.")):
                conditioners[name] = tensor
        elif not part.startswith("model.decoder.embed_positions."):  # sinusoids, which MusicLM computes
            weights[part] = tensor

    def count(part):
        return len({match[1] for name in weights if (match := re.match(rf"{re.escape(part)}\.(\d+)\.", name))})

    rows, dim = weights[embed].shape
    heads = re.search(rf"\b{parts['n_heads']}\W+(\d+)", settings)
    heads = int(heads[1]) if heads else max(1, dim // 64)
    sizes = dict(dim=dim, heads=heads, layers=count(parts["blocks"]), K=count(parts["embed"]), card=rows - 1)
    return layout, weights, sizes, conditioners


def read_t5(path):
    """Read the encoder of a published T5, or the one in a MusicGen: return (its tensors, the file of its tokenizer)."""
    remedy = "pass T5 by --text_encoder_weights=FOLDER, such as hf:google-t5/t5-base"
    try:
        file, (state, _) = find_files(path, T5_FILES)[0], read_weights(path, T5_FILES)
    except UserError as error:
        raise UserError(f"no text encoder: {error}; {remedy}") from None
    names = {name: name.removeprefix("text_encoder.") for name in state}
    parts = ("shared.", "encoder.embed_tokens.", "encoder.block.", "encoder.final_layer_norm.")
    tensors = {names[name]: tensor.clone() for name, tensor in state.items() if names[name].startswith(parts)}
    if not any("SelfAttention" in name for name in tensors):
        raise UserError(f"{path}: contains no text encoder, perhaps only a decoder; {remedy}")
    if "shared.weight" in tensors:
        tensors.pop("encoder.embed_tokens.weight", None)  # the same tensor
    return tensors, find_tokenizer(file)


def find_tokenizer(weights):
    """Return the path of T5's tokenizer next to its weights."""
    for path in (Path(weights).with_name(name) for name in TOKENIZERS):
        if path.is_file():
            return path
    raise UserError(f"{weights}: no {' or '.join(TOKENIZERS)} next to it; copy T5's spiece.model there")


def read_t5_tokenizer(weights):
    """Return the bytes of T5's tokenizer next to its weights."""
    return find_tokenizer(weights).read_bytes()


def read_codec(path):
    """Read MusicGen's published codec: return (state dict in encodec's names, pad_mode 'reflect' or 'constant').

    Raises UserError for other weights, and for a codec that normalizes loudness.
    """
    state, settings = read_weights(path, CODEC_FILES)
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
        raise UserError(f"{path}: not the weights of musicgen_32khz; its tensors are {first_names(state)}") from None
    except RuntimeError as error:  # torch lists missing and unexpected names, and wrong shapes
        raise UserError(f"{path}: not the weights of musicgen_32khz: {' '.join(str(error).split())[:300]}") from None
    return weights, pad_mode


def write_safetensors(tensors, path, metadata):
    try:
        safetensors.torch.save_file(tensors, path, metadata)  # renames a temporary file
        Path(path).chmod(0o644)  # save_file creates the file with mode 0600
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)}); free disk space or choose another") from None
