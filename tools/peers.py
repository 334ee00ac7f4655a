"""MusicGen in other programs, at the shapes of bench.py: transformers' model, and audiocraft's language model.

    pip install transformers==5.24.0 einops omegaconf && pip install --no-deps audiocraft==1.3.0

Models, losses and generation are the peers' code. Weights and text states are random. A shape is a dict with dim,
heads, layers, card and K.

Letters: B batch, K codebooks, T frames, S sequence positions, L condition length, D model width.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F

from model import MusicLM
from patterns import make_pattern

NAMES = ("audiocraft", "transformers")


class PlaceholderImporter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports placeholders for packages that audiocraft imports but its language model does not use."""

    packages = (
        "av demucs dora flashy hydra julius laion_clap librosa num2words soundfile spacy torchaudio torchmetrics"
        " treetable xformers"
    ).split()

    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in self.packages:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(name=spec.name, unbind=torch.unbind)  # the model calls xformers' unbind
        module.__spec__, module.__path__, module.__name__ = spec, [], spec.name
        return module

    def exec_module(self, module):
        pass


def audiocraft_lm(shape):
    """Return audiocraft's LMModel with the settings of its musicgen_lm.yaml, but without dropout."""
    if not any(isinstance(finder, PlaceholderImporter) for finder in sys.meta_path):
        sys.meta_path.append(PlaceholderImporter())
    for name in ("audiocraft.solvers", "audiocraft.solvers.compression"):  # they import a trainer
        sys.modules.setdefault(name, MagicMock())
    import xformers.ops  # noqa: F401
    from audiocraft.models.lm import LMModel
    from audiocraft.modules.codebooks_patterns import DelayedPatternProvider
    from audiocraft.modules.conditioners import ConditionFuser

    fuser = ConditionFuser({"sum": [], "prepend": [], "cross": ["description"], "input_interpolate": []})
    return LMModel(
        DelayedPatternProvider(shape["K"]), None, fuser, shape["K"], shape["card"], shape["dim"], shape["heads"],
        norm_first=True, bias_proj=False, weight_init="gaussian", depthwise_init="current", zero_bias_init=True,
        num_layers=shape["layers"], dropout=0.0, activation="gelu", bias_ff=False, bias_attn=False, causal=True,
        memory_efficient=True, cross_attention=True,
    )  # fmt: skip


def transformers_musicgen(shape):
    """Return transformers' MusicgenForConditionalGeneration. Its text encoder and codec are small and never run."""
    import transformers as hf
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    D, card = shape["dim"], shape["card"]
    decoder = MusicgenDecoderConfig(
        vocab_size=card, hidden_size=D, ffn_dim=4 * D, num_hidden_layers=shape["layers"], dropout=0.0,
        num_attention_heads=shape["heads"], num_codebooks=shape["K"], pad_token_id=card, bos_token_id=card,
    )  # fmt: skip
    text = hf.T5EncoderModel(hf.T5Config(d_model=D, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32))
    codec = hf.EncodecModel(hf.EncodecConfig(num_filters=4, hidden_size=16, codebook_size=card, codebook_dim=16))
    decoder = hf.MusicgenForCausalLM(decoder)
    model = hf.MusicgenForConditionalGeneration(text_encoder=text, audio_encoder=codec, decoder=decoder)
    model.generation_config.update(pad_token_id=card, bos_token_id=card, decoder_start_token_id=card, eos_token_id=None)
    return model


def training(name, shape, B, T, L, device, dtype, compiled):
    """Return a function that trains one step: the peer's model and loss, fused AdamW, gradient clipping."""
    K, card = shape["K"], shape["card"]
    states, mask = torch.randn(B, L, shape["dim"], device=device), torch.ones(B, L, dtype=torch.int64, device=device)
    codes = torch.randint(card, (B, K, T), device=device)
    if name == "audiocraft":
        model = audiocraft_lm(shape).train().to(device)
        model.forward = torch.compile(model.forward) if compiled else model.forward

        def loss():  # as in audiocraft's MusicGenSolver
            output, ce = model.compute_predictions(codes, [], condition_tensors={"description": (states, mask)}), 0
            for k in range(K):
                in_loss = output.mask[:, k].flatten()
                ce = ce + F.cross_entropy(output.logits[:, k].flatten(0, 1)[in_loss], codes[:, k].flatten()[in_loss])
            return ce / K

    else:
        model = transformers_musicgen(shape).decoder.train().to(device)
        sequence = make_pattern("delay", K, T, training=True).to(device).build(codes, card)
        inputs, labels = sequence[:, :, :-1].flatten(0, 1), sequence[:, :, 1:].transpose(1, 2)
        labels = labels.masked_fill(labels == card, -100)
        predict = torch.compile(model) if compiled else model

        def loss():
            return predict(input_ids=inputs, encoder_hidden_states=states, encoder_attention_mask=mask,
                           labels=labels).loss  # fmt: skip

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            total = loss()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Learner(MusicLM):
    """MusicLM with a peer's decoder instead of its blocks and heads, for train.py's training step."""

    def __init__(self, name, settings, codec, tokenizer):
        super().__init__(settings, codec, tokenizer)
        shape = dict(dim=settings.dim, heads=settings.heads, layers=settings.layers, card=self.card, K=self.K)
        self.decoder = audiocraft_lm(shape) if name == "audiocraft" else transformers_musicgen(shape).decoder
        self.name, self.blocks, self.norm, self.heads = name, torch.nn.ModuleList(), None, None
        self.embed.requires_grad_(False)

    def hidden(self, sequence, text_states, text_mask, prefix):
        """sequence [B, K, S] -> logits [B, S, K, card]."""
        if self.name == "audiocraft":
            return self.decoder(sequence, [], {"description": (text_states, text_mask)}).transpose(1, 2)
        logits = self.decoder(input_ids=sequence.flatten(0, 1), encoder_hidden_states=text_states,
                              encoder_attention_mask=text_mask.long()).logits  # fmt: skip
        return logits.unflatten(0, (-1, self.K)).transpose(1, 2)

    def logits(self, hidden):
        return hidden


class CodesReady(Exception):
    """Ends transformers' generation before its codec decodes, because the codec is not measured."""


def generation(name, shape, B, T, L, device, dtype, cfg, top_k, compiled):
    """Return a function that generates B samples of T frames with guidance `cfg` and top-k sampling."""
    states = torch.randn(B, L, shape["dim"], device=device, dtype=dtype)
    states = torch.cat([states, torch.zeros_like(states)])  # conditions, then null conditions
    mask = torch.ones(2 * B, L, dtype=torch.int64, device=device)
    if name == "audiocraft":
        model = audiocraft_lm(shape).eval().to(device, dtype)
        from audiocraft.modules.conditioners import ConditioningAttributes

        class FixedConditions(torch.nn.Module):
            def tokenize(self, conditions):
                return conditions

            def forward(self, conditions):
                return {"description": (states, mask)}

        model.condition_provider = FixedConditions()
        if compiled:
            model.forward = torch.compile(model.forward, dynamic=True)
        conditions = [ConditioningAttributes(text={"description": "music"}) for _ in range(B)]
        return torch.no_grad()(lambda: model.generate(None, conditions, max_gen_len=T, top_k=top_k, cfg_coef=cfg))
    from transformers.modeling_outputs import BaseModelOutput

    model = transformers_musicgen(shape).eval().to(device, dtype)
    model.audio_encoder.decode = MagicMock(side_effect=CodesReady)
    if compiled:
        model.decoder.forward = torch.compile(model.decoder.forward, dynamic=True)

    def generate():
        with contextlib.suppress(CodesReady), torch.no_grad():
            model.generate(input_ids=torch.zeros(B, L, dtype=torch.int64, device=device), attention_mask=mask,
                           encoder_outputs=BaseModelOutput(last_hidden_state=states), guidance_scale=cfg,
                           do_sample=True, top_k=top_k, max_new_tokens=T + shape["K"] - 1, max_length=None)  # fmt: skip

    return generate
