"""MusicLM: MusicGen's decoder (arXiv:2306.05284) and its training loss.

    ce_sum, count = model(codes, valid, scored, inputs)      # cross-entropy by codebook, in pattern order
    loss = (ce_sum / count).mean()

How it generates is in generate.py.

Letters: B batch, K codebooks, T frames, S sequence steps, D model width, H heads, L condition length, P rows of
conditions that are prepended to the sequence.
codes int64 [B, K, T] in [0, card); sequence [B, K, S] in [0, card], where `card` is the special token.
"""

import fnmatch
import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from common import UserError
from conditioning import Conditioner
from patterns import make_pattern


def sinusoids(position, dim):
    """Positions [S] -> [S, dim], cosines first as in MusicGen. Always float32.

    In bfloat16 a position such as 1001 would be rounded by more than 1.
    """
    rate = torch.exp(torch.arange(dim // 2, device=position.device) * (-math.log(10_000) / (dim // 2 - 1)))
    angle = position.float()[:, None] * rate
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)


def rotations(position, dim):
    """Positions [S] -> [2, S, dim / 2], cosine and sine of the angles of rotary positions (arXiv:2104.09864)."""
    rate = torch.exp(torch.arange(dim // 2, device=position.device) * (-math.log(10_000) / (dim // 2)))
    angle = position.float()[:, None] * rate
    return torch.stack([torch.cos(angle), torch.sin(angle)])


def rotate(x, rotation):
    """Turns queries and keys x [..., S, d], pair by pair, by the `rotations` of their positions."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Always in float32: FSDP may hand it weights in bfloat16, and a CPU refuses a mix."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


def attention(q, k, v, mask, is_causal=False):
    """softmax(q k^T / sqrt(d)) v over the keys where `mask` [..., S, W] says: q [B, H, S, d], k and v [B, H, W, d].

    mask: None where is_causal. torch's own is slow in bfloat16 on a CPU: in training, up to some 512 steps, it takes
    twice the time of separate products, and in generation four times that of float32, so the KV cache is float32 there.
    A compiled step of generation, S = 1, takes sums for products, as the compiler fuses those.
    """
    if q.device.type == "cpu" and q.shape[2] == 1 and not is_causal and torch.compiler.is_compiling():
        scores = (q * k).sum(-1, keepdim=True) / math.sqrt(q.shape[3])
        return (torch.softmax(scores.masked_fill(~mask.mT, -math.inf), dim=2) * v).sum(2, keepdim=True)
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or q.shape[2] > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
    if k.dtype == torch.float32:
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k, v, attn_mask=mask, is_causal=is_causal)
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf)
    return torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[3]) + bias, dim=-1) @ v


class Block(nn.Module):
    """Pre-norm: causal self-attention, cross-attention to the text, GELU feed-forward of 4 D."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
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

    def split(self, x, parts):
        """[B, S, parts * D] -> `parts` tensors [B, H, S, D / H]."""
        B, S, _ = x.shape
        return x.view(B, S, parts, self.heads, -1).permute(2, 0, 3, 1, 4)

    def forward(self, x, states, states_mask, rotation=None, cache=None, input_pos=None, causal_mask=None):
        """x [B, S, D] -> [B, S, D].

        states [B, L, D] are attended to where states_mask [B, 1, 1, L] says. rotation: rotary positions, if any. In
        generation the S steps stand at `input_pos` [S] of this block's `cache`, and attend to its first W steps where
        `causal_mask` [S, W] says.
        """
        qk, (v,) = self.split(self.qkv(self.norm1(x)), 3).split([2, 1])
        q, k = qk if rotation is None else rotate(qk, rotation)
        if cache is not None:
            k, v = cache.update(input_pos, k, v, causal_mask.shape[1])
        y = attention(q, k, v, causal_mask, is_causal=cache is None)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))

        (q,) = self.split(self.cross_q(self.norm2(x)), 1)
        k, v = self.split(self.cross_kv(states), 2) if cache is None else cache.cross
        y = attention(q, k, v, states_mask)
        x = x + self.cross_out(y.transpose(1, 2).flatten(2))

        return x + self.down(F.gelu(self.up(self.norm3(x))))


@functools.lru_cache(maxsize=32)  # a table is used at every step, and making it waits for the device
@torch.inference_mode(False)  # what generation asks for first, training may use
def pattern_on(device, *description):
    return make_pattern(*description).to(device)


class MusicLM(nn.Module):
    """settings: see config/__init__.py; codec: a dict with K, card, frame_rate, dim; tokenizer: SentencePiece bytes."""

    def __init__(self, settings, codec, tokenizer):
        super().__init__()
        self.K, self.card = codec["K"], codec["card"]
        self.special, self.frame_rate = self.card, codec["frame_rate"]
        self.channels = codec.get("channels", 1)
        self.pattern_name = settings.pattern
        # The codebooks of two channels interleave; left and right of one codebook stand at the same step.
        self.delays = tuple(settings.delays or (k // self.channels for k in range(self.K)))
        self.trained_frames = round(settings.segment * self.frame_rate)
        if self.trained_frames < 1:
            raise UserError(f"segment = {settings.segment:g}: less than a frame of the codec; lengthen it")
        self.rotary = settings.positions == "rope"
        self.activation_checkpointing = settings.activation_checkpointing
        D = settings.dim
        self.conditioner = Conditioner(settings, codec, tokenizer)
        self.embed = nn.Embedding(self.K * (self.card + 1), D)  # the K tables, one after another
        self.blocks = nn.ModuleList(Block(D, settings.heads) for _ in range(settings.layers))
        if settings.lora_rank:
            add_lora(self.blocks, settings.lora_rank, settings.lora_alpha, settings.lora_targets)
        self.norm = nn.LayerNorm(D)
        self.heads = nn.Linear(D, self.K * self.card, bias=False)  # the K heads, one after another
        self.init_weights()

    def init_weights(self):
        """Truncated normal, sigma = 1/sqrt(fan_in), in layer l (from 0) scaled by 1/sqrt(2(l+1)).

        The embeddings are larger than in MusicGen, where the positions drown them for hundreds of steps (NOTES.md).
        """

        def init(weight, scale=1.0):
            std = scale / math.sqrt(weight.shape[1])
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

        D = self.embed.embedding_dim
        init(self.embed.weight, math.sqrt(D / (2 * self.K)))  # so that the sum of K weighs as much as the positions
        init(self.heads.weight, 0.1)  # so that the first predictions are all but uniform, ce = ln(card)
        for layer, block in enumerate(self.blocks):
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    init(module.weight, 1 / math.sqrt(2 * (layer + 1)))

    def pattern(self, T, training=False, device=None):
        """The pattern of T frames, by default on the model's device."""
        device = device or self.embed.weight.device
        return pattern_on(device, self.pattern_name, self.K, T, self.delays, training)

    def embed_sequence(self, sequence):
        """sequence [B, K, S] -> the sum of its K embeddings, [B, S, D]."""
        table = torch.arange(self.K, device=sequence.device)[:, None] * (self.card + 1)
        return self.embed(sequence + table).sum(1)

    def positions(self, S):
        """Where the P prepended rows and the S steps stand, float [P + S]: a row with the step of its own frame."""
        steps_per_frame = self.pattern(self.trained_frames, training=True).S // self.trained_frames
        rows = self.conditioner.positions(self.embed.weight.device) * steps_per_frame
        return torch.cat([rows, torch.arange(S, device=rows.device)])

    def add_positions(self, x, position):
        """x [B, S, D], which stands at `position` [S] -> what the blocks take: x, and its rotation or None."""
        if self.rotary:
            return x, rotations(position, x.shape[2] // self.blocks[0].heads)
        return x + sinusoids(position, x.shape[2]), None

    def hidden(self, sequence, states, mask, prefix):
        """sequence [B, K, S] -> what the heads read, [B, S, D].

        The rest is the conditioner's: states [B, L, D] and mask [B, L] to attend to, prefix [B, P, D] to stand before.
        """
        S = sequence.shape[2]
        x = self.embed_sequence(sequence)
        x, rotation = self.add_positions(torch.cat([prefix.to(x.dtype), x], dim=1), self.positions(S))
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, states, mask[:, None, None, :], rotation, use_reentrant=False)
            else:
                x = block(x, states, mask[:, None, None, :], rotation)
        return self.norm(x[:, x.shape[1] - S :])

    def logits(self, hidden):
        """[B, S, D] -> [B, S, K, card]."""
        return self.heads(hidden).unflatten(-1, (self.K, self.card))

    def forward(self, codes, valid, scored, inputs):
        """The training objective, as sums so that batches of any make-up can be added.

        codes [B, K, T]; bool [B, T]: valid, False on padding, and scored, False also where the loss does not count.
        inputs: what `conditioner.prepare` makes of the items' conditions.
        Returns (ce_sum, count), float32 [K] each: cross-entropy in nats over the positions that count, and their
        number. The loss is (ce_sum / count).mean().
        """
        pattern = self.pattern(codes.shape[2], training=True)
        codes = codes.masked_fill(~valid[:, None], self.special)  # as after the end of a generated sequence
        sequence = pattern.build(codes, self.special)
        loss_mask = pattern.build(scored[:, None].expand_as(codes).long(), special=0)[:, :, 1:].bool()
        target = sequence[:, :, 1:].masked_fill(~loss_mask, -100).transpose(1, 2)
        logits = self.logits(self.hidden(sequence[:, :, :-1], *self.conditioner(inputs)))
        ce = F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), ignore_index=-100, reduction="none")
        return ce.view(-1, self.K).sum(0), loss_mask.sum((0, 2)).float()

    def count_targets(self, items):
        """items int64 [T], how many items of a batch are scored at each frame -> their targets by codebook, float [K].

        The sum of `forward`'s counts over all parts of the batch.
        """
        return (self.pattern(len(items), training=True).frame_mask * items).sum(1).float()

    def aligned_logits(self, codes, inputs):
        """Logits in the order of the codes, [B, K, T, card]; NaN where training's cut leaves none.

        For tests and pictures; training does without.
        """
        pattern = self.pattern(codes.shape[2], training=True)
        hidden = self.hidden(pattern.build(codes, self.special), *self.conditioner(inputs))
        return pattern.align_logits(self.logits(hidden).transpose(1, 2))

    def flops(self, T=None):
        """Floating-point operations, forward and backward, of training on one item of T frames, or the trained length.

        Six for each weight of the blocks and heads at each step, or four for a frozen one, and 12 D S^2 of
        self-attention a block, its masked half counted in, as is the custom (arXiv:2204.02311, appendix B). The text's
        own are left out.
        """
        S = self.pattern(T or self.trained_frames, training=True).S - 1 + self.conditioner.rows
        parts = [self.heads, *self.blocks]
        weights = [p for part in parts for name, p in part.named_parameters() if "cross_kv" not in name]
        per_step = sum((6 if p.requires_grad else 4) * p.numel() for p in weights)
        return per_step * S + 12 * len(self.blocks) * self.embed.embedding_dim * S**2


# ---------------------------------------------------------------------------------------------------- fine-tuning


def freeze(model, patterns):
    """No gradient for the parameters whose names match one of the patterns, 'blocks.*', but for LoRA's own."""
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not fnmatch.filter(parameters, pattern):
            raise UserError(f"freeze: no parameter is called '{pattern}'; there are {', '.join([*parameters][:3])} ...")
    for name, parameter in parameters.items():
        frozen = any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
        parameter.requires_grad_(".lora_" in name or not frozen)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError("freeze: nothing is left to train")


def refuse_other_weights(model, state, path):
    """Raises UserError where a checkpoint's state dict is not of this model, by names and shapes; LoRA may be new."""
    ours, theirs = ({name: tensor.shape for name, tensor in of.items()} for of in (model.state_dict(), state))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name) and (".lora_" not in name or name in theirs):
            raise UserError(f"{path}: its {name} does not fit; use the code and the settings that it was trained with")


class LoRALinear(nn.Linear):
    """W plus a low-rank map learned beside it: W + alpha / rank * B A (arXiv:2106.09685), which is W at first."""

    def __init__(self, like, rank, alpha):
        super().__init__(like.in_features, like.out_features, bias=False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features) / math.sqrt(self.in_features))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(blocks, rank, alpha, targets):
    """Low-rank matrices beside the weights `targets` of each block, 'qkv', 'up' ..."""
    for block in blocks:
        linears = {name: part for name, part in block.named_children() if isinstance(part, nn.Linear)}
        for name in targets:
            if name not in linears:
                raise UserError(f"lora_targets: a block has no '{name}'; it has {', '.join(linears)}")
            setattr(block, name, LoRALinear(linears[name], rank, alpha))


def merge_lora(state, settings):
    """A state dict with LoRA -> that of the same model without: what was learned beside a weight is added to it."""
    merged = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    for name in state:
        if name.endswith(".lora_a"):
            linear = name.removesuffix(".lora_a")
            scale = settings["lora_alpha"] / settings["lora_rank"]
            merged[f"{linear}.weight"] = state[f"{linear}.weight"] + scale * state[f"{linear}.lora_b"] @ state[name]
    return merged
