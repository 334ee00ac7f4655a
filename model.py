"""MusicLM: MusicGen's decoder (arXiv:2306.05284), its loss, and how it generates.

    forward    codes, conditions -> summed cross-entropy per codebook, in pattern order
    generate   conditions, maybe a prompt -> codes, with a KV cache and classifier-free guidance
    stream     the same, each frame as soon as it is final

    python model.py export out/NAME/best.pt DIR --format hf     # for other programs
    python model.py import WEIGHTS best.pt --codec_weights CODEC     # from them

Letters: B batch, K codebooks, T frames, S sequence steps, D model width, H heads, L condition length, P rows of
conditions that are prepended to the sequence.
codes int64 [B, K, T] in [0, card); sequence [B, K, S] in [0, card], where `card` is the special token.
"""

import argparse
import fnmatch
import functools
import importlib.util
import math
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
from checkpoint import read_checkpoint, save_checkpoint
from codec import load_codec
from conditioning import CHROMA_RATE, Conditioner
from config import FIELDS, Settings, UserError, nearest, refuse_unwritable, run
from patterns import make_pattern
from weights import LAYOUTS, export_lm, open_lm, read_lm

UNKNOWN = -1  # in the place of a code that is to be found


def pick_device(name="auto", dtype="auto"):
    """(device, dtype to compute in): bfloat16 by itself only where the hardware multiplies in it."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if name == "auto" else name
    if not there.get(name):
        raise UserError(f"device = '{name}': not on this machine; there is {', '.join(n for n in there if there[n])}")
    cpu = torch.cpu.get_capabilities() if name == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    fast = {"cuda": torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False), "mps": False,
            "cpu": cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)}  # fmt: skip
    dtype = "bfloat16" if dtype == "auto" and fast[name] else "float32" if dtype == "auto" else dtype
    return torch.device(name), getattr(torch, dtype)


def can_compile(device):
    """Whether there is the compiler that torch.compile needs for code on this device."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("gcc", "clang", "cc")))
    return any(map(shutil.which, ("g++", "clang++", "cl")))


# Dense bfloat16 and float16 matrix products, 1e12 operations a second, by the maker's data sheets.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312,
               "L40S": 362, "L40": 181}  # fmt: skip


def peak_flops(device, dtype):
    """Floating-point operations that the device could do in a second, or None where that is not known."""
    if device.type != "cuda" or dtype == torch.float32:
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * peak for known, peak in PEAK_TFLOPS.items() if known in name), None)


def sinusoids(position, dim):
    """Positions [S] -> [S, dim], cosines first as in MusicGen. Always float32: bfloat16 errs by more than 1."""
    rate = torch.exp(torch.arange(dim // 2, device=position.device) * (-math.log(10_000) / (dim // 2 - 1)))
    angle = position.float()[:, None] * rate
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)


class KVCache:
    """Every layer's keys and values [R, H, steps, D / H], and those of the conditions, computed once.

    The place of the next steps is a tensor and shapes seldom change, so that one compiled step, or one CUDA graph, does
    for many: `position` int64 [S] is where the next S steps stand, and `span` = 0, 1 ... W - 1 what they might see. W
    may be rounded up, as `bias` hides what is not there yet.
    """

    def __init__(self, blocks, steps, states, mask):
        """states [R, L, D], mask bool [R, L]: what to attend to."""
        self.cross = [block.split(block.cross_kv(states), 2).contiguous() for block in blocks]
        self.keys, self.values = ([cross.new_zeros(*cross.shape[1:3], steps, cross.shape[4]) for cross in self.cross]
                                  for _ in range(2))  # fmt: skip
        self.cross_bias = self.cross[0].new_zeros(mask.shape).masked_fill(~mask, -math.inf)[:, None, None, :]

    def __len__(self):
        return self.keys[0].shape[2]

    def bias(self):
        """0 or -inf, [S, W]."""
        hidden = self.span > self.position[:, None]
        return self.cross_bias.new_zeros(hidden.shape).masked_fill(hidden, -math.inf)

    def extend(self, layer, k, v):
        """Puts k and v [R, H, S, D / H] where `position` says; returns all keys and values that are in sight."""
        for store, new in ((self.keys[layer], k), (self.values[layer], v)):
            store.index_copy_(2, self.position, new)
        return self.keys[layer][:, :, : len(self.span)], self.values[layer][:, :, : len(self.span)]


def attend(q, k, v, bias):
    """q [R, H, S, d], k and v [R, H, L, d], bias [.., S, L] -> [R, H, S, d]."""
    if torch.compiler.is_compiling() and q.shape[2] == 1 and q.device.type == "cpu":  # 1.3 times as fast there, or more
        weights = torch.softmax(((q * q.shape[-1] ** -0.5) * k).sum(-1)[:, :, None] + bias, dim=-1)
        return (weights.transpose(2, 3) * v).sum(2, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class LayerNorm(nn.LayerNorm):
    """In float32 even where FSDP gathers the weights in less, as autocast has it on GPUs; CPUs refuse mixed types."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


class LoRALinear(nn.Linear):
    """W plus a low-rank map learned beside it: W + alpha / rank * B A (arXiv:2106.09685), which is W at first."""

    def __init__(self, like, rank, alpha):
        super().__init__(like.in_features, like.out_features, bias=False)
        self.scale = alpha / rank
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features) / math.sqrt(self.in_features))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))

    def forward(self, x):
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


def merge_lora(state, settings):
    """The state dict of the same model without LoRA: what was learned beside a weight is added to it.

    settings: the checkpoint's, a dict.
    """
    scale = settings["lora_alpha"] / max(1, settings["lora_rank"]) if "lora_rank" in settings else 0
    merged = {name: tensor for name, tensor in state.items() if ".lora_" not in name}
    for name in state:
        if name.endswith(".lora_a"):
            linear = name.removesuffix(".lora_a")
            merged[f"{linear}.weight"] = state[f"{linear}.weight"] + scale * state[f"{linear}.lora_b"] @ state[name]
    return merged


class Block(nn.Module):
    """Pre-norm: causal self-attention, cross-attention to the conditions, GELU feed-forward of 4 D."""

    def __init__(self, D, heads, layer):
        super().__init__()
        self.layer, self.heads = layer, heads
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

    def forward(self, x, states, mask, cache=None):
        """x [B, S, D], states [B, L, D], mask bool [B, 1, 1, L] -> [B, S, D].

        With a cache the S steps that are next, which has what else there is to attend to; mask is `cache.bias()`.
        """
        q, k, v = self.split(self.qkv(self.norm1(x)), 3)
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = attend(q, *cache.extend(self.layer, k, v), mask)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))

        (q,) = self.split(self.cross_q(self.norm2(x)), 1)
        if cache is None:
            k, v = self.split(self.cross_kv(states), 2)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            y = attend(q, *cache.cross[self.layer], cache.cross_bias)
        x = x + self.cross_out(y.transpose(1, 2).flatten(2))

        return x + self.down(F.gelu(self.up(self.norm3(x))))


@functools.lru_cache(maxsize=32)  # a table is used several times a step, and making it waits for the device
def pattern_on(device, *description):
    return make_pattern(*description).to(device)


class MusicLM(nn.Module):
    """settings: see config/__init__.py; codec: a dict with K, card, frame_rate, dim; tokenizer: SentencePiece bytes."""

    def __init__(self, settings, codec, tokenizer):
        super().__init__()
        self.K, self.card = codec["K"], codec["card"]
        self.special, self.frame_rate = self.card, codec["frame_rate"]
        channels = codec.get("channels", 1)  # whose codebooks interleave, and of which both stand at the same step
        self.channels, self.pattern_name = channels, settings.pattern
        self.delays = tuple(settings.delays or (k // channels for k in range(self.K)))
        self.activation_checkpointing = settings.activation_checkpointing
        self.trained_frames = round(settings.segment * self.frame_rate)
        self.check_pattern()
        D = settings.dim
        self.conditioner = Conditioner(settings, codec, tokenizer)
        self.embed = nn.Embedding(self.K * (self.card + 1), D)  # the K tables, one after another
        self.blocks = nn.ModuleList(Block(D, settings.heads, layer) for layer in range(settings.layers))
        for block in self.blocks if settings.lora_rank else ():
            for name in settings.lora_targets:
                if not isinstance(linear := getattr(block, name, None), nn.Linear):
                    known = [name for name, part in block.named_children() if isinstance(part, nn.Linear)]
                    raise UserError(f"lora_targets: a block has no '{name}'; it has {', '.join(known)}")
                setattr(block, name, LoRALinear(linear, settings.lora_rank, settings.lora_alpha))
        self.norm = nn.LayerNorm(D)
        self.heads = nn.Linear(D, self.K * self.card, bias=False)  # the K heads, one after another
        self.low, self.compiled = None, False
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
        for block in self.blocks:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    init(module.weight, 1 / math.sqrt(2 * (block.layer + 1)))

    def freeze(self, patterns):
        """No gradient for the parameters whose names match one of the patterns, 'blocks.*.weight'."""
        names = [name for name, _ in self.named_parameters()]
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                raise UserError(f"freeze: no parameter is called '{pattern}'{nearest(pattern, names)}")
        for name, p in self.named_parameters():
            p.requires_grad_(not any(fnmatch.fnmatch(name, pattern) for pattern in patterns))
        free = [name for name, p in self.named_parameters() if p.requires_grad]
        if not free:
            raise UserError("freeze: nothing is left to train")
        if any(".lora_" in name for name in names) and not any(".lora_" in name for name in free):
            raise UserError("freeze: the matrices of lora_rank are frozen too; blocks.*weight,blocks.*bias spares them")
        out = [block.cross_out.weight for block in self.blocks]
        if not out[0].is_meta and not any(map(torch.any, out)) and not any("cross_out" in name for name in free):
            raise UserError("freeze: cross_out is all zero, as in a model without text, and would stay so; spare it")

    def check_pattern(self):
        with torch.device("cpu"):  # where the weights may be on none yet
            training = make_pattern(self.pattern_name, self.K, max(1, self.trained_frames), self.delays, training=True)
        if self.trained_frames < 2 or not training.frame_mask.any(1).all():
            raise UserError(
                f"a segment of {self.trained_frames} frames leaves a codebook without a target; lengthen it"
            )

    def pattern(self, T, training=False):
        return pattern_on(self.embed.weight.device, self.pattern_name, self.K, T, self.delays, training)

    def embedded(self, sequence, position):
        """sequence [B, K, S], position [S] -> [B, S, D]."""
        table = torch.arange(self.K, device=sequence.device)[:, None] * (self.card + 1)
        return self.embed(sequence + table).sum(1) + sinusoids(position, self.embed.embedding_dim)

    def hidden(self, sequence, states, mask, prefix, cache=None):
        """sequence [B, K, S] -> what the heads read, [B, S, D], after filling the cache if there is one.

        The rest are the conditions: states [B, L, D] and mask [B, L] to attend to, prefix [B, P, D] to stand before.
        """
        S = sequence.shape[2]
        x = self.embedded(sequence, torch.arange(S, device=sequence.device))
        before = prefix + sinusoids(self.conditioner.positions(x.device), x.shape[2])
        x = torch.cat([before.to(x.dtype), x], dim=1)
        if cache is not None:
            cache.position = cache.span = torch.arange(x.shape[1], device=x.device)
        mask = mask[:, None, None, :] if cache is None else cache.bias()
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, states, mask, use_reentrant=False)
            else:
                x = block(x, states, mask, cache)
        return self.norm(x[:, x.shape[1] - S :])

    def step(self, tokens, place, cache, weights):
        """The tokens [B, K] of one step, the `place`-th of its sequence, int64 [1] -> logits of the next, [B, K, card].

        weights [G, B]: how the logits of the G groups of conditions add up.
        """
        x, bias = self.embedded(tokens[:, :, None], place).repeat(len(weights), 1, 1), cache.bias()
        for block in self.blocks:
            x = block(x, None, bias, cache)
        logits = self.logits(self.norm(x))[:, 0].float()
        return (weights[:, :, None, None] * logits.unflatten(0, weights.shape)).sum(0)

    def logits(self, hidden):
        """[B, S, D] -> [B, S, K, card]."""
        return self.heads(hidden).unflatten(-1, (self.K, self.card))

    def loss_mask(self, scored):
        """scored bool [B, T] -> bool [B, K, S - 1]: the targets that are codes of these frames."""
        frames = scored[:, None].expand(-1, self.K, -1).long()
        return self.pattern(scored.shape[1], training=True).build(frames, special=0)[:, :, 1:].bool()

    def forward(self, codes, valid, scored, inputs):
        """The training objective, as sums so that batches of any make-up can be added.

        codes [B, K, T]; bool [B, T]: valid, False on padding, and scored, False also where the loss is not to count;
        inputs from `conditioner.prepare`.
        Returns (ce_sum, count), float32 [K] each: cross-entropy in nats over the positions that count, and their
        number. The loss is (ce_sum / count).mean().
        """
        codes = codes.masked_fill(~valid[:, None], self.special)  # as after the end of a generated sequence
        sequence = self.pattern(codes.shape[-1], training=True).build(codes, self.special)
        mask = self.loss_mask(scored)
        target = sequence[:, :, 1:].masked_fill(~mask, -100).transpose(1, 2)
        logits = self.logits(self.hidden(sequence[:, :, :-1], *self.conditioner(inputs)))
        ce = F.cross_entropy(logits.flatten(0, 2).float(), target.flatten(), ignore_index=-100, reduction="none")
        return ce.view(-1, self.K).sum(0), mask.sum((0, 2)).float()

    def flops(self):
        """Floating-point operations, forward and backward, of training on one item of the trained length.

        Six for each weight of the blocks and heads at each step, or four for a frozen one, and 12 D S^2 of
        self-attention a block, its masked half counted in, as is the custom (arXiv:2204.02311, appendix B). The text's
        own are left out.
        """
        S = make_pattern(self.pattern_name, self.K, self.trained_frames, self.delays, training=True).S - 1
        S += self.conditioner.rows
        parts = [self.heads, *self.blocks]
        weights = [p for part in parts for name, p in part.named_parameters() if "cross_kv" not in name]
        per_step = sum((6 if p.requires_grad else 4) * p.numel() for p in weights)
        return per_step * S + 12 * len(self.blocks) * self.embed.embedding_dim * S**2

    def aligned_logits(self, codes, inputs):
        """Logits in the order of the codes, [B, K, T, card]; NaN where training's cut leaves none. For people."""
        pattern = self.pattern(codes.shape[-1], training=True)
        hidden = self.hidden(pattern.build(codes, self.special), *self.conditioner(inputs))
        return pattern.align_logits(self.logits(hidden).transpose(1, 2))

    def for_generation(self, dtype=torch.float32, compiled=False):
        """Has `generate` and `stream` compute in `dtype`, and compile a step at its first use; returns the model.

        The weights of the matrix products are kept in `dtype` from then on. Raises UserError where nothing can compile.
        """
        if compiled and not can_compile(self.embed.weight.device):
            raise UserError("--compile: needs a C++ compiler, g++ or clang++; install one, or leave the option out")
        self.low = dtype if dtype != torch.float32 else None
        for module in (*self.blocks.modules(), self.heads):
            if isinstance(module, nn.Linear):
                module.to(dtype)
        self.compiled = compiled
        if compiled:  # without looking each time whether a module has changed, which takes a twentieth of a frame
            torch._dynamo.config.recompile_limit = 64  # one for each number of groups, of streams, of conditions
            unguarded = dict(guard_filter_fn=torch.compiler.skip_guard_on_all_nn_modules_unsafe)
            self.step = torch.compile(MusicLM.step, fullgraph=True, options=unguarded).__get__(self)
        return self

    def precision(self):
        device = self.embed.weight.device.type
        return torch.autocast(device, self.low, enabled=self.low is not None, cache_enabled=False)

    def generate(self, conditions, frames, prompt=None, progress=None, **choice):
        """All that `stream` yields, in one: B dicts of conditions -> codes int64 [B, K, frames].

        progress is called with the number of frames that are done.
        """
        parts, done = [], 0
        for part in self.stream(conditions, frames, prompt, **choice):
            parts.append(part)
            done += part.shape[-1]
            if progress:
                progress(done)
        return torch.cat(parts, dim=2)

    @torch.no_grad()
    def stream(self, conditions, frames, prompt=None, cfg=3.0, cfg_beta=1.0, temperature=1.0, top_k=250, top_p=0.0,
               seeds=None, stride=None):  # fmt: skip
        """B dicts of conditions -> codes int64 [B, K, n] as they become final: the prompt, then frame by frame.

        frames   how many there are in all
        prompt   codes [B, K, T] to go on from, [1, K, T] for all, or B of any lengths, [K, T]; they stay as they are
        cfg      guidance: null + cfg * (conditioned - null); 1 costs half as much
        cfg_beta null + cfg * (no_text + cfg_beta * (conditioned - no_text) - null) for samples with text and style
                 (arXiv:2407.12563, section 3.3); but for 1, costs half as much again
        choice   temperature 0 takes the likeliest; else top_p if set, else top_k if set, else the whole distribution
        seeds    B integers; a sample depends on its own seed and condition alone, not on its neighbours, but that past
                 the trained length the windows go by the shortest prompt
        stride   past the trained length, windows of that length each add so many frames; by default half of it
        """
        B, device = len(conditions), self.embed.weight.device
        rngs = [torch.Generator().manual_seed(seed) for seed in (seeds or range(B))]
        window = self.trained_frames
        kept = window - (stride or window // 2)
        if not 0 < kept < window:
            raise UserError(f"stride {stride}: must be above 0 and below the {window} frames of training")
        prompts = [torch.zeros(self.K, 0)] * B if prompt is None else list(prompt) * (B if len(prompt) == 1 else 1)
        codes = torch.full((B, self.K, frames), UNKNOWN, dtype=torch.int64)
        for row, one in zip(codes, prompts):
            row[:, : one.shape[-1]] = one[:, :frames]
        codes, have = codes.to(device), min(frames, *(one.shape[-1] for one in prompts))
        groups, weights = guidance(conditions, cfg, cfg_beta)
        weights = weights.to(device)
        choose = dict(temperature=temperature, top_k=min(top_k, self.card), top_p=top_p)
        if have:
            yield codes[:, :, :have]
        while have < frames:
            first = have - (have if have < window else kept)
            rows = [from_second(first / self.frame_rate, sample) for group in groups for sample in group]
            with self.precision():
                fused = self.conditioner(self.conditioner.prepare(rows, device))
            last = min(first + window, frames)
            longer = self.continue_codes(codes[:, :, first:last], have - first, fused, weights, choose, rngs)
            codes[:, :, have:last] = yield from longer
            have = last

    def continue_codes(self, context, T, fused, weights, choose, rngs):
        """context [B, K, length], UNKNOWN where a code is to be found -> all codes after the first T frames.

        Each frame is yielded too, [B, K, 1], once all its K are there. Nothing in a step waits for the device.
        fused: the conditioner's output for G B rows; weights [G, B]: how their logits add up.
        """
        B, K, length = context.shape
        pattern, device = self.pattern(length), context.device
        frame_at = {step: t for t, step in enumerate(pattern.step.amax(0).tolist())}  # the step that completes it
        sequence = pattern.build(context, self.special)
        first = int((sequence == UNKNOWN).any(1).any(0).nonzero()[0])
        uniform = torch.stack([torch.rand(pattern.S, K, generator=rng) for rng in rngs], dim=1).to(device)
        states, mask, prefix = fused
        P = prefix.shape[1]
        place = torch.tensor([first - 1], device=device)
        with self.precision():
            cache = KVCache(self.blocks, round_up(P + pattern.S + 1, 512), states, mask)
            if first > 1 or P:
                self.hidden(sequence[:, :, : first - 1].repeat(len(weights), 1, 1), *fused, cache)

        def advance():
            """Finds the codes of the step after `place`, and moves there."""
            cache.position = place + P
            with self.precision():
                logits = self.step(sequence.index_select(2, place)[:, :, 0], place, cache, weights)
            following = place + 1
            slot = sequence.index_select(2, following)[:, :, 0]
            chosen = choose_codes(logits, uniform.index_select(0, following)[0], **choose)
            sequence.index_copy_(2, following, torch.where(slot == UNKNOWN, chosen, slot)[:, :, None])
            place.add_(1)

        unit = 1 if not self.compiled else 512 if device.type == "cuda" else 2  # a graph each; none takes a size of 1
        everywhere, runs, move = torch.arange(len(cache), device=device), 0, advance
        for step in range(first, pattern.S):
            sight = round_up(P + step, unit)
            if runs == 0 or sight != len(cache.span):
                cache.span, runs, move = everywhere[:sight], 0, advance
                if self.compiled:  # or else not even imported, which takes a second
                    torch._dynamo.maybe_mark_dynamic(cache.span, 0)
            if runs == 2 and self.compiled and device.type == "cuda":  # all is compiled and has run by now
                move = recorded(advance)
            move()
            runs += 1
            if (t := frame_at.get(step, -1)) >= T:
                yield sequence.gather(2, pattern.step[:, t : t + 1].expand(B, -1, -1))
        return pattern.revert(sequence, self.special)[:, :, T:]


def round_up(steps, unit):
    return -(-steps // unit) * unit


def recorded(call):
    """-> a call that replays, as a CUDA graph, what `call` would do on the device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def guidance(conditions, cfg, beta):
    """Groups of B conditions, and float weights [G, B]: guided logits are the weighted sum of the groups' logits."""
    conditions = [{key: value for key, value in sample.items() if value is not None and len(value)}
                  for sample in conditions]  # fmt: skip
    if not any(conditions):
        return [conditions], torch.ones(1, len(conditions))
    without_text = [{key: value for key, value in sample.items() if key != "text"} for sample in conditions]
    beta = torch.tensor([beta if {"text", "style"} <= sample.keys() else 1.0 for sample in conditions])
    weights = torch.stack([cfg * beta, cfg * (1 - beta), torch.full_like(beta, 1 - cfg)])
    used = weights.abs().sum(1) > 0
    groups = [conditions, without_text, [{}] * len(conditions)]
    return [group for group, needed in zip(groups, used) if needed], weights[used]


def from_second(start, sample):
    """A sample's conditions for the window that begins there: what has a place in time is cut off before it."""
    return {key: value[round(start * CHROMA_RATE) :] if key == "melody" else value for key, value in sample.items()}


def choose_codes(logits, uniform, temperature, top_k, top_p):
    """logits [B, K, card], uniform [B, K] in [0, 1) -> codes [B, K], by inverting the cumulative distribution.

    One uniform number a code, drawn ahead from the sample's own generator, keeps a take the same in any batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    probs = torch.softmax(logits.to(exact) / temperature, dim=-1)
    if top_p:
        ranked, codes = probs.sort(dim=-1, descending=True)
        probs = torch.zeros_like(probs).scatter(-1, codes, ranked * (ranked.cumsum(-1) - ranked < top_p))
    elif top_k:
        probs = probs * (logits >= logits.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True))
    cumulative = probs.cumsum(-1)  # in the order of the codes, which rounding never changes, as it does that of ranks
    code = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1)
    last = (cumulative < cumulative[..., -1:]).sum(-1)
    return torch.minimum(code, last)


def load_model(path, device="cpu"):
    """best.pt -> (MusicLM in eval mode, its Settings, the codec's description)."""
    saved = read_checkpoint(path, "best")
    settings = Settings(**{key: value for key, value in saved["settings"].items() if key in FIELDS})
    model = MusicLM(settings, saved["codec"], saved["tokenizer"])
    model.load_state_dict(saved["model"])
    return model.eval().requires_grad_(False).to(device), settings, saved["codec"]


def import_lm(path, checkpoint, codec_weights):
    """A published language model -> a best.pt that goes on from audio, or plays by itself, but hears no text."""
    opened = open_lm(path)
    dim, heads, layers, K, card = (opened[2][key] for key in ("dim", "heads", "layers", "K", "card"))
    codec = load_codec("musicgen_32khz" + ":stereo" * (K == 8), codec_weights)
    if (codec.K, codec.card) != (K, card):
        raise UserError(f"{path}: has K {K}, card {card}, and the codec K {codec.K}, card {codec.card}")
    settings = Settings(dim=dim, heads=heads, layers=layers, segment=30.0, codec=codec.name,
                        codec_weights=str(codec_weights))  # fmt: skip
    tokenizer = data.train_tokenizer([], 1000)
    model = MusicLM(settings, codec.about(), tokenizer)
    model.load_state_dict(read_lm(path, model, opened), strict=False)
    save_checkpoint(checkpoint, "best", model=model.state_dict(), settings=vars(settings), codec=codec.about(),
                    tokenizer=tokenizer, step=0)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description="Models from and for other programs; see weights.py.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("import", help="make a best.pt of a published MusicGen, without its text encoder")
    command.add_argument("weights", help="a file, a folder, or hf:facebook/musicgen-small")
    command.add_argument("checkpoint", help="the best.pt to write")
    command.add_argument("--codec_weights", required=True, help="of musicgen_32khz: a file, a folder, or hf:...")
    command = commands.add_parser("export", help="write a best.pt's decoder as Hugging Face or audiocraft names it")
    command.add_argument("checkpoint", help="a best.pt")
    command.add_argument("folder", help="where to")
    command.add_argument("--format", choices=list(LAYOUTS), default="hf", help="default: hf")
    args = parser.parse_args()
    if "weights" in args:
        refuse_unwritable(Path(args.checkpoint).parent, "import")
        Path(args.checkpoint).parent.mkdir(parents=True, exist_ok=True)
        import_lm(args.weights, args.checkpoint, args.codec_weights)
        return print(f"wrote {args.checkpoint}, which hears no text yet; for that: config/finetune.py")
    model, settings, _ = load_model(args.checkpoint)
    refuse_unwritable(args.folder, "export")
    path = export_lm(model, merge_lora(model.state_dict(), vars(settings)), settings, args.folder, args.format)
    aside = ", ".join(["text", *model.conditioner.prepended])
    print(f"wrote {path}; left out, as those programs have no place for them: the embedders of {aside}")


if __name__ == "__main__":
    run(main)
