"""Export a checkpoint for other programs: `python -m tools.convert export out/NAME/best.pt FOLDER --format hf`.

    model          format       FOLDER holds               loads with
    with T5        hf           decoder, T5 and codec      transformers: MusicgenForConditionalGeneration,
                                                           AutoProcessor, pipeline("text-to-audio", FOLDER)
    with T5        audiocraft   decoder, T5's projection   loaders.load_lm_model(FOLDER), which downloads T5
    own embedder   hf           decoder                    transformers: MusicgenForCausalLM
    own embedder   audiocraft   decoder                    loaders.load_lm_model(FOLDER), with condition_tensors=
                                                           {"description": (states [B, L, D], mask [B, L])}

LoRA is merged. Other programs do not support melody and style as they are here, rotary positions, or other patterns
than 'delay'.

Letters: B batch, L condition length, K codebooks, D model width; `card` is the codebook size.
"""

import functools
import json
import math
import re
import tempfile
from pathlib import Path

import sentencepiece
import torch

import common
from codec import load_codec
from common import UserError
from extras.lora import merge_lora
from generate import load_model
from tools.published import matching_names, write_safetensors

AUDIOCRAFT_T5 = {(512, 2048): "t5-small", (768, 3072): "t5-base", (1024, 4096): "t5-large"}  # by (d_model, d_ff)
CODEC_NAMES = (  # regular expressions for encodec's names, and Hugging Face's names
    (r"^(encoder|decoder)\.model\.", r"\1.layers."),
    (r"^quantizer\.vq\.layers\.(\d+)\._codebook\.", r"quantizer.layers.\1.codebook."),
    (r"\.(conv|convtr)\.\1\.", ".conv."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
)


def export_checkpoint(checkpoint, folder, layout="hf", codec_weights=None, text_encoder_weights=None):
    """Write a best.pt into `folder` in a layout, 'hf' or 'audiocraft', and print what other programs do differently.

    codec_weights, text_encoder_weights: files; by default, those that the checkpoint names. Raises UserError if the
    folder holds a model, if a file is missing, and for models that other programs cannot run.
    """
    model, settings, codec_info = load_model(checkpoint, text_encoder_weights=text_encoder_weights)
    codec, omitted = None, [*model.conditioner.prepended]
    if settings.text_encoder != "t5":
        omitted.insert(0, "text")
    elif layout == "hf":
        codec = load_codec(codec_info["name"], codec_weights or settings.codec_weights)
        if codec.id != codec_info["id"]:
            raise UserError(f"{checkpoint}: needs codec {codec_info['id']}, not {codec.id}; pass its --codec_weights")
    print(f"wrote {export_model(model, settings, folder, layout, codec)}")
    if omitted:
        print(f"not exported, because other programs do not support these embedders: {', '.join(omitted)}")
    if "text" in omitted:
        print(f"without text, logits will differ by up to {null_effect(model):.2g}, because other programs use zeros"
              " for a missing caption, and this model a learned null")  # fmt: skip


def export_model(model, settings, folder, layout, codec=None):
    """Write a MusicLM into `folder` and return the path of its weights. With a codec, T5 and the codec are included."""
    if model.pattern_name != "delay":
        raise UserError(f"pattern = '{model.pattern_name}': cannot be exported, other programs support 'delay' only")
    if model.rotary:
        raise UserError("positions = 'rope': cannot be exported, other programs support 'sinusoidal' only")
    if layout == "hf" and model.delays != tuple(k // model.channels for k in range(model.K)):
        raise UserError(f"delays {model.delays}: not supported by Hugging Face; use --format audiocraft")
    if codec and not codec.name.startswith("musicgen_32khz"):
        raise UserError(f"codec '{codec.name}': --format hf with T5 needs musicgen_32khz; use --format audiocraft")
    text, weights = model.conditioner.text, decoder_weights(model, settings, layout)
    if layout == "audiocraft":
        config = audiocraft_config(model, settings)
        if settings.text_encoder == "t5":
            weights |= t5_projection(model, "condition_provider.conditioners.description.output_proj")
        # audiocraft reads xp.cfg as YAML, and JSON is YAML
        content = {"best_state": weights, "xp.cfg": json.dumps(config), "version": "1.3.0", "exported": True}
        return write_folder(folder, {"state_dict.bin": content})
    config = dict(architectures=["MusicgenForCausalLM"], torch_dtype="float32") | decoder_config(model, settings)
    files = {"generation_config.json": generation_config(model, settings)}
    if codec:
        t5 = {f"{'' if name == 'shared.weight' else 'encoder.'}{name}": w for name, w in text.encoder.weights.items()}
        parts = {"decoder": weights, "text_encoder": t5, "audio_encoder": hf_codec(codec.model.state_dict())}
        weights = {f"{part}.{name}": tensor for part in parts for name, tensor in parts[part].items()}
        if text.encoder.dim != settings.dim:  # transformers has no projection between equal widths
            weights |= t5_projection(model, "enc_to_dec_proj")
        config = dict(
            architectures=["MusicgenForConditionalGeneration"], model_type="musicgen", torch_dtype="float32",
            is_encoder_decoder=True, text_encoder=t5_config(text.encoder.weights), audio_encoder=codec_config(codec),
            decoder=decoder_config(model, settings),
        )  # fmt: skip
        files |= processor_files(text, codec)
    return write_folder(folder, files | {"config.json": config, "model.safetensors": weights})


def write_folder(folder, files):
    """Write {name: JSON, bytes or weights} into `folder`, or nothing. Return the path of the last file, the weights."""
    folder = Path(folder)
    for name in ("state_dict.bin", "model.safetensors", "config.json", *files):
        if (folder / name).exists():
            raise UserError(f"{folder / name}: exists already; choose another folder, or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        for name, content in files.items():
            path = Path(temporary, name)
            if path.suffix == ".safetensors":
                write_safetensors(content, path, {"format": "pt"})
            elif path.suffix == ".bin":
                common.write_file(path, functools.partial(torch.save, content))
            else:
                (common.write_file if isinstance(content, bytes) else common.write_json)(path, content)
        folder.mkdir(exist_ok=True)
        for name in files:
            Path(temporary, name).replace(folder / name)
    return folder / name


# -------------------------------------------------------------------------------------------------------- weights


def decoder_weights(model, settings, layout):
    """Return the decoder of a MusicLM, LoRA merged, in published names."""
    state, weights = merge_lora(model.state_dict(), vars(settings)), {}
    for names, published_names in matching_names(layout, settings.layers, model.K):
        parts = torch.cat([state[name] for name in names]).chunk(len(published_names))
        weights |= {name: part.contiguous() for name, part in zip(published_names, parts)}
    return weights


def t5_projection(model, name):
    """Return weight and bias of T5's projection, which is the identity if T5 has the decoder's width."""
    state, D = model.state_dict(), model.embed.embedding_dim
    identity = {"weight": torch.eye(D), "bias": torch.zeros(D)}
    return {f"{name}.{kind}": state.get(f"conditioner.text.out.{kind}", identity[kind]) for kind in identity}


def hf_codec(state):
    """Rename a codec's state dict from encodec's names to Hugging Face's."""
    weights = {}
    for name, tensor in state.items():
        for pattern, replacement in CODEC_NAMES:
            name = re.sub(pattern, replacement, name)
        weights[name] = tensor
    return weights


@torch.no_grad()
def null_effect(model):
    """Return the largest change of a logit when zeros replace the learned null of the text, for random codes."""
    codes = torch.randint(model.card, (1, model.K, min(100, model.trained_frames)), generator=torch.Generator())
    condition_tensors, null = model.conditioner.tokenize([{}]), model.conditioner.text.null
    logits, learned = model.aligned_logits(codes, condition_tensors), null.clone()
    null.zero_()
    change = model.aligned_logits(codes, condition_tensors) - logits
    null.copy_(learned)
    return float(change.nan_to_num().abs().max())


# ------------------------------------- Hugging Face's files: the settings that differ from the defaults of transformers


def decoder_config(model, settings):
    return dict(
        model_type="musicgen_decoder", vocab_size=model.card, num_codebooks=model.K, audio_channels=model.channels,
        hidden_size=settings.dim, num_hidden_layers=settings.layers, num_attention_heads=settings.heads,
        ffn_dim=4 * settings.dim, dropout=0.0, pad_token_id=model.card, bos_token_id=model.card,
    )  # fmt: skip


def t5_config(weights):
    """Return the config of a T5Encoder's weights."""
    attention, dense = "block.0.layer.0.SelfAttention", "block.0.layer.1.DenseReluDense"
    vocab_size, d_model = weights["shared.weight"].shape
    n_buckets, n_heads = weights[f"{attention}.relative_attention_bias.weight"].shape
    return dict(
        model_type="t5", vocab_size=vocab_size, d_model=d_model, d_ff=weights[f"{dense}.wo.weight"].shape[1],
        d_kv=len(weights[f"{attention}.q.weight"]) // n_heads, num_heads=n_heads,
        num_layers=sum(name.endswith("SelfAttention.q.weight") for name in weights),
        feed_forward_proj="relu" if f"{dense}.wi.weight" in weights else "gated-gelu",
        relative_attention_num_buckets=n_buckets, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip


def codec_config(codec):
    """Return the config of a musicgen_32khz."""
    model, bits = codec.model, math.ceil(math.log2(codec.card))
    return dict(
        model_type="encodec", sampling_rate=codec.sample_rate, codebook_size=codec.card,
        target_bandwidths=[codec.mono_K * bits * codec.frame_rate / 1000], hidden_size=model.quantizer.dimension,
        num_filters=model.encoder.n_filters, upsampling_ratios=model.decoder.ratios, pad_mode=model.pad_mode,
        use_causal_conv=False, use_conv_shortcut=False,
    )  # fmt: skip


def generation_config(model, settings):
    """Return the checkpoint's sampling settings. In transformers, a top_k of 0 and a top_p of 1 mean off."""
    config = {f"{name}_token_id": model.card for name in ("decoder_start", "pad", "bos")}
    config |= dict(guidance_scale=settings.cfg, max_length=model.trained_frames, do_sample=settings.temperature > 0)
    if settings.temperature > 0:
        top_k = 0 if settings.top_p else settings.top_k
        config |= dict(temperature=settings.temperature, top_k=top_k, top_p=settings.top_p or 1.0)
    return config


def processor_files(text, codec):
    """Return the files of MusicgenProcessor: T5's tokenizer and the codec's input."""
    tokenizer = text.tokenizer_model
    if tokenizer.startswith(b"{"):
        file, has_extra_ids = "tokenizer.json", b"<extra_id_99>" in tokenizer
    else:  # the 100 extra tokens of T5 are not in spiece.model, but they have vectors
        pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer).vocab_size()
        file, has_extra_ids = "spiece.model", len(text.encoder.weights["shared.weight"]) >= pieces + 100
    tokenizer_config = dict(processor_class="MusicgenProcessor", tokenizer_class="T5Tokenizer",
                            model_max_length=text.max_tokens, extra_ids=100 * has_extra_ids)  # fmt: skip
    feature_extractor = dict(
        processor_class="MusicgenProcessor", feature_extractor_type="EncodecFeatureExtractor", padding_side="left",
        sampling_rate=codec.sample_rate, feature_size=codec.channels,
    )  # fmt: skip
    return {file: tokenizer, "tokenizer_config.json": tokenizer_config, "preprocessor_config.json": feature_extractor}


# ------------------------------------------------------------------------------------------------ audiocraft's file


def audiocraft_config(model, settings):
    conditioners = {}
    if settings.text_encoder == "t5":
        t5 = t5_config(model.conditioner.text.encoder.weights)
        if (t5["d_model"], t5["d_ff"]) not in AUDIOCRAFT_T5:
            raise UserError(f"text encoder of width {t5['d_model']}: cannot be exported, audiocraft supports"
                            f" {', '.join(AUDIOCRAFT_T5.values())}; use --format hf")  # fmt: skip
        name = AUDIOCRAFT_T5[t5["d_model"], t5["d_ff"]]
        conditioners = dict(description=dict(model="t5", t5=dict(
            name=name, finetune=False, normalize_text=False, word_dropout=settings.word_dropout)))  # fmt: skip
    return dict(
        device="cpu", dtype="float32", lm_model="transformer_lm", dataset=dict(segment_duration=settings.segment),
        transformer_lm=dict(
            dim=settings.dim, num_heads=settings.heads, num_layers=settings.layers, n_q=model.K, card=model.card,
            hidden_scale=4, dropout=0.0, emb_lr=None, activation="gelu", norm_first=True, bias_ff=False,
            bias_attn=False, bias_proj=False, past_context=None, causal=True, custom=False, memory_efficient=True,
            attention_as_float32=False, positional_embedding="sin", xpos=False, checkpointing="none",
            weight_init="gaussian", depthwise_init="current", zero_bias_init=True, norm="layer_norm",
            cross_attention=True, qk_layer_norm=False, qk_layer_norm_cross=False, attention_dropout=None, kv_repeat=1,
            two_step_cfg=False, layer_scale=None,
        ),
        codebooks_pattern=dict(modeling="delay", delay=dict(delays=list(model.delays), flatten_first=0,
                                                            empty_initial=0)),
        classifier_free_guidance=dict(training_dropout=settings.cfg_dropout, inference_coef=settings.cfg),
        attribute_dropout={}, conditioners=conditioners,
        fuser=dict(cross=["description"], sum=[], prepend=[], input_interpolate=[], cross_attention_pos_emb=False,
                   cross_attention_pos_emb_scale=1),
    )  # fmt: skip
