"""MusicLM: MusicGen's decoder (arXiv:2306.05284), its training loss, and a simple `generate`.

    ce_sum = model(codes, not_padding, in_loss, condition_tensors)     # cross-entropy per codebook, summed
    loss = (ce_sum / targets_per_codebook).mean()
    codes = model.generate([{"text": "slow piano"}], T=100)            # simple; generate.py is the fast version

Letters: B batch, K codebooks, T frames, S sequence positions, D model width, H attention heads, L condition length,
P prefix positions, conditions that are prepended to the sequence.
codes int64 [B, K, T] in [0, card); sequence [B, K, S] in [0, card], where `card` is the special token.
"""

import fnmatch
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import patterns
from common import UserError
from conditioning import Conditioner, to_device
from extras.cpu_linear import cpu_attention


def sinusoids(position, dim):
    """Positions [S] -> [S, dim], cosines first as in MusicGen. Always float32: bfloat16 rounds 1001 by more than 1."""
    rate = torch.exp(torch.arange(dim // 2, device=position.device) * (-math.log(10_000) / (dim // 2 - 1)))
    angle = position.float()[:, None] * rate
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)


def rotations(position, dim):
    """Positions [S] -> cosine and sine of the angles of rotary positions (arXiv:2104.09864): [2, S, dim / 2]."""
    rate = torch.exp(torch.arange(dim // 2, device=position.device) * (-math.log(10_000) / (dim // 2)))
    angle = position.float()[:, None] * rate
    return torch.stack([torch.cos(angle), torch.sin(angle)])


def rotate(x, rotation):
    """Rotate queries and keys x [..., S, d], pair by pair, by the `rotations` of their positions."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32, because FSDP gathers weights in bfloat16 and a CPU's layer_norm rejects mixed dtypes."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


def attention(q, k, v, mask, is_causal=False):
    """softmax(q k^T / sqrt(d)) v: q [B, H, S, d], k and v [B, H, W, d].

    mask bool [..., S, W], True for keys that count; None if is_causal.
    """
    if q.device.type == "cpu":
        return cpu_attention(q, k, v, mask, is_causal)  # the same result, but faster
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


class Block(nn.Module):
    """Pre-norm transformer block: causal self-attention, cross-attention to the text, GELU feed-forward of 4 D."""

    def __init__(self, D, n_heads):
        super().__init__()
        self.n_heads = n_heads
        self.norm1 = LayerNorm(D)
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.attn_out = nn.Linear(D, D, bias=False)
        self.norm2 = LayerNorm(D)
        self.cross_q = nn.Linear(D, D, bias=False)
        self.cross_kv = nn.Linear(D, 2 * D, bias=False)
        self.cross_out = nn.Linear(D, D, bias=False)
        self.norm3 = LayerNorm(D)
        self.up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(4 * D, D, bias=False)

    def split_heads(self, x, parts):
        """[B, S, parts * D] -> `parts` tensors [B, H, S, D / H], stacked."""
        B, S, _ = x.shape
        return x.view(B, S, parts, self.n_heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, text_states, text_mask, rotation=None, cache=None, input_slots=None, causal_mask=None):
        """x [B, S, D] -> [B, S, D].

        text_states [B, L, D] with text_mask bool [B, 1, 1, L]. rotation: `rotations`, if positions are rotary. S
        includes the prefix. For generation, `cache` is this block's KVCache of generate.py, which replaces text_states:
        x is stored in its slots input_slots [S] and attends to its first W slots where causal_mask [S, W] is True.
        """
        qk, (v,) = self.split_heads(self.qkv(self.norm1(x)), 3).split([2, 1])
        q, k = qk if rotation is None else rotate(qk, rotation)
        if cache is not None:
            k, v = cache.update(input_slots, k, v, causal_mask.shape[1])
        y = attention(q, k, v, causal_mask, is_causal=cache is None)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))

        (q,) = self.split_heads(self.cross_q(self.norm2(x)), 1)
        k, v = self.split_heads(self.cross_kv(text_states), 2) if cache is None else cache.cross
        y = attention(q, k, v, text_mask)
        x = x + self.cross_out(y.transpose(1, 2).flatten(2))

        return x + self.down(F.gelu(self.up(self.norm3(x))))


@functools.lru_cache(maxsize=32)  # cached, because building it would synchronize with the GPU
@torch.inference_mode(False)  # because training may use a pattern that generation cached
def cached_pattern(make_pattern, T, training, device):
    return make_pattern(T=T, training=training).to(device)


class MusicLM(nn.Module):
    """settings: config.Settings; codec_info: from `Codec.info`; tokenizer: the bytes of a SentencePiece model."""

    def __init__(self, settings, codec_info, tokenizer):
        super().__init__()
        self.K, self.card = codec_info["K"], codec_info["card"]
        self.special, self.frame_rate = self.card, codec_info["frame_rate"]
        self.channels = codec_info.get("channels", 1)
        self.pattern_name = settings.pattern
        # stereo codecs interleave codebooks, so left and right of one codebook get the same delay
        self.delays = tuple(settings.delays or (k // self.channels for k in range(self.K)))
        self.make_pattern = functools.partial(patterns.make_pattern, self.pattern_name, self.K, delays=self.delays)
        self.trained_frames = round(settings.segment * self.frame_rate)
        shortest = self.trained_frames // (2 if settings.short_every else 1)
        with torch.device("cpu"):  # the model itself may be on "meta"
            has_targets = shortest > 0 and self.make_pattern(T=shortest, training=True).frame_mask.any(1).all()
        if not has_targets:
            raise UserError(f"segment = {settings.segment:g}: {shortest} frames leave a codebook without a target;"
                            " use a longer segment")  # fmt: skip
        self.rotary = settings.positions == "rope"
        self.activation_checkpointing = settings.activation_checkpointing
        D = settings.dim
        self.conditioner = Conditioner(settings, codec_info, tokenizer)
        self.embed = nn.Embedding(self.K * (self.card + 1), D)  # the K tables in one
        self.blocks = nn.ModuleList(Block(D, settings.heads) for _ in range(settings.layers))
        if settings.lora_rank:
            from extras.lora import add_lora

            add_lora(self.blocks, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
        self.norm = LayerNorm(D)
        self.heads = nn.Linear(D, self.K * self.card, bias=False)  # the K output layers in one
        self.compiled_logits = None  # a compiled `guided_logits`, set by `optimize` in generate.py
        self.init_weights()

    def init_weights(self):
        """Truncated normal with sigma = 1/sqrt(fan_in), scaled by 1/sqrt(2(l+1)) in layer l, from 0.

        The embeddings are larger than MusicGen's, because small ones learn nothing for hundreds of steps (dev/LOG.md).
        """

        def init(weight, scale=1.0):
            std = scale / math.sqrt(weight.shape[1])
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

        D = self.embed.embedding_dim
        init(self.embed.weight, math.sqrt(D / (2 * self.K)))  # the sum of K embeddings is as large as the positions
        init(self.heads.weight, 0.1)  # the first predictions are nearly uniform, ce = ln(card)
        for layer, block in enumerate(self.blocks):
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    init(module.weight, 1 / math.sqrt(2 * (layer + 1)))

    def pattern(self, T, training=False, device=None):
        """Return the pattern of T frames, by default on the model's device."""
        return cached_pattern(self.make_pattern, T, training, device or self.embed.weight.device)

    def embed_sequence(self, sequence):
        """sequence [B, K, S] -> the sum of its K embeddings, [B, S, D]."""
        table = torch.arange(self.K, device=sequence.device)[:, None] * (self.card + 1)
        return self.embed(sequence + table).sum(1)

    def positions(self, S):
        """Return the positions of prefix and sequence, float [P + S]. A prefix position is that of its frame."""
        positions_per_frame = self.pattern(self.trained_frames, training=True).S // self.trained_frames
        prefix = self.conditioner.prefix_positions(self.embed.weight.device) * positions_per_frame
        return torch.cat([prefix, torch.arange(S, device=prefix.device)])

    def add_positions(self, x, position):
        """x [B, S, D], position [S] -> (x with sinusoids added, None), or (x, `rotations`) if positions are rotary."""
        if self.rotary:
            return x, rotations(position, x.shape[2] // self.blocks[0].n_heads)
        return x + sinusoids(position, x.shape[2]), None

    def hidden(self, sequence, text_states, text_mask, prefix):
        """sequence [B, K, S] -> inputs of the heads, [B, S, D].

        The other arguments come from the conditioner: text_states [B, L, D], text_mask [B, L], prefix [B, P, D].
        """
        S, text_mask = sequence.shape[2], text_mask[:, None, None, :]
        x = self.embed_sequence(sequence)
        x, rotation = self.add_positions(torch.cat([prefix.to(x.dtype), x], dim=1), self.positions(S))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, text_states, text_mask, rotation, use_reentrant=False)
            else:
                x = block(x, text_states, text_mask, rotation)
        return self.norm(x[:, -S:])

    def logits(self, hidden):
        """[B, S, D] -> [B, S, K, card]."""
        return self.heads(hidden).unflatten(-1, (self.K, self.card))

    def forward(self, codes, not_padding, in_loss, condition_tensors, per_item=False):
        """Return the sum of cross-entropies per codebook, in nats, float32 [K], or [B, K] if `per_item`.

        Sums of micro-batches can be added.
        codes int64 [B, K, T]; not_padding bool [B, T]; in_loss bool [B, T], False on padding and style excerpts;
        condition_tensors: from `conditioner.tokenize`. The loss divides by `targets_per_codebook` of data.Batch.
        """
        pattern = self.pattern(codes.shape[2], training=True)
        codes = codes.masked_fill(~not_padding[:, None], self.special)
        sequence = pattern.build(codes, self.special)
        loss_mask = pattern.build(in_loss[:, None].expand_as(codes).long(), special=0)[:, :, 1:].bool()
        target = sequence[:, :, 1:].masked_fill(~loss_mask, -100).transpose(1, 2)
        logits = self.logits(self.hidden(sequence[:, :, :-1], *self.conditioner(condition_tensors)))
        ce = F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), ignore_index=-100, reduction="none")
        return ce.view(len(codes), -1, self.K).sum(1) if per_item else ce.view(-1, self.K).sum(0)

    @torch.no_grad()
    def generate(self, conditions, T, cfg=3.0, temperature=1.0, top_k=250):
        """Generate codes int64 [B, K, T] for B dicts of conditions, by one full forward pass per position.

        Simple code to teach from, for T up to the trained length. generate.py is faster and has the same distribution.
        temperature 0 takes the likeliest code; top_k 0 draws from all.
        """
        pattern, B = self.pattern(T), len(conditions)
        holds_code = pattern.build(torch.ones_like(pattern.position)[None], special=0)[0].bool()  # [K, S]
        sequence = torch.full((B, self.K, pattern.S), self.special, device=holds_code.device)
        tensors, null_tensors = (to_device(self.conditioner.tokenize(samples), sequence.device)
                                 for samples in (conditions, [{}] * B))  # fmt: skip
        for position in range(1, pattern.S):
            past = sequence[:, :, :position]
            cond = self.logits(self.hidden(past, *self.conditioner(tensors)))[:, -1]  # [B, K, card]
            uncond = self.logits(self.hidden(past, *self.conditioner(null_tensors)))[:, -1]
            logits = uncond + cfg * (cond - uncond)  # classifier-free guidance
            if temperature == 0:
                codes = logits.argmax(-1)
            else:
                smallest = logits.topk(min(top_k or self.card, self.card)).values[..., -1:]
                probs = (logits / temperature).masked_fill(logits < smallest, -math.inf).softmax(-1)
                codes = probs.flatten(0, 1).multinomial(1).view(B, self.K)
            sequence[:, :, position] = torch.where(holds_code[:, position], codes, self.special)
        return pattern.revert(sequence, self.special)

    def aligned_logits(self, codes, condition_tensors):
        """Return logits in the order of the codes, [B, K, T, card], NaN where training cuts them off."""
        pattern = self.pattern(codes.shape[2], training=True)
        hidden = self.hidden(pattern.build(codes, self.special), *self.conditioner(condition_tensors))
        return pattern.align_logits(self.logits(hidden).transpose(1, 2))

    def flops(self, T=None):
        """Return floating-point operations, forward and backward, of one training item of T frames (arXiv:2204.02311).

        Each weight of blocks and heads costs 6 operations per position, or 4 if frozen; self-attention 12 D S^2 per
        block, masked half included. Text encoder and cross-attention are not counted. T: by default the trained length.
        """
        S = self.pattern(T or self.trained_frames, training=True).S - 1 + self.conditioner.prefix_length
        parts = [self.heads, *self.blocks]
        weights = [p for part in parts for name, p in part.named_parameters() if "cross_kv" not in name]
        per_position = sum((6 if p.requires_grad else 4) * p.numel() for p in weights)
        return per_position * S + 12 * len(self.blocks) * self.embed.embedding_dim * S**2


def freeze(model, name_patterns):
    """Freeze the parameters whose names match a pattern such as 'blocks.*'. LoRA's matrices stay trainable."""
    parameters = dict(model.named_parameters())
    for pattern in name_patterns:  # a module may have no parameters, such as the projection of a T5 of width D
        if not fnmatch.filter([*parameters, *dict(model.named_modules())], pattern):
            raise UserError(f"freeze: no parameter matches '{pattern}'; names are {', '.join([*parameters][:3])} ...")
    for name, parameter in parameters.items():
        is_frozen = any(fnmatch.fnmatch(name, pattern) for pattern in name_patterns)
        parameter.requires_grad_(".lora_" in name or not is_frozen)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError("freeze: no trainable parameter is left; freeze fewer")


def check_weights(model, state, path, may_be_missing=(".lora_",)):
    """Raise UserError if a state dict does not fit the model by names and shapes.

    may_be_missing: parts of the names that the state dict may lack.
    """
    expected, actual = ({name: tensor.shape for name, tensor in d.items()} for d in (model.state_dict(), state))
    for name in sorted(expected.keys() | actual.keys()):
        is_new = name not in actual and any(part in name for part in may_be_missing)
        if expected.get(name) != actual.get(name) and not is_new:
            raise UserError(f"{path}: {name} does not fit the model; use the code and settings of its training")
