"""Fast generation: prefill, decoding with a KV cache, guidance, choice of codes, windows, streaming.

    model, settings, codec_info = load_model("out/demo/best.pt")
    codes = generate(model, [{"text": "slow piano"}], frames=400)           # int64 [B, K, T]
    for part in stream(model, [{"text": "slow piano"}], frames=400): ...    # the same codes, frame by frame

`generate` -> `stream` cuts long music into windows -> `generate_window` -> `prefill` once, then `decode_one_step` for
each position of the pattern -> `guided_logits`, `choose_codes`. MusicLM.generate in model.py is the simple version.

Letters: B samples, G groups of conditions that guidance compares, R = G B rows (row = group * B + sample), K codebooks,
T frames, S sequence positions, D model width, H attention heads, P prefix positions, W slots that are read.
A position counts in the sequence. A slot counts in the KV cache, where the prefix comes first: slot = P + position.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn

import common
import config
from common import UserError
from conditioning import CHROMA_RATE, to_device
from extras import compiler
from extras.cpu_linear import cache_dtype, optimize_for_cpu, slots_to_read
from extras.cuda_graph import CUDAGraph
from model import MusicLM, check_weights

UNKNOWN = -1  # marks codes that are to be generated


def load_model(path, device="cpu", text_encoder_weights=None):
    """Load a checkpoint for use: return (MusicLM with the EMA weights in eval mode, its Settings, its codec's info).

    path: the file, or a run's folder. text_encoder_weights: T5's file, if it is neither at the path that the checkpoint
    names nor next to the checkpoint.
    """
    saved = common.load_checkpoint(path)
    settings = config.from_checkpoint(saved["settings"], path)
    settings.codec_weights = common.find_beside(settings.codec_weights, path)
    t5_file = text_encoder_weights or common.find_beside(settings.text_encoder_weights, path)
    settings.text_encoder_weights = t5_file
    with torch.device("meta"):  # initializing weights that are replaced anyway takes 30 s for small
        model = MusicLM(settings, saved["codec"], saved["tokenizer"])
    if model.conditioner.text_encoder_id != saved.get("text_encoder"):
        raise UserError(f"{path}: needs the text encoder {saved.get('text_encoder')}, but {t5_file} is"
                        f" {model.conditioner.text_encoder_id}; pass its --text_encoder_weights")  # fmt: skip
    check_weights(model, saved["ema"], path)
    weights = saved["ema"]
    for name, tensor in weights.items():  # copied, because the file is mapped and another program may overwrite it
        dtype = torch.float32 if tensor.dtype in (torch.half, torch.bfloat16) else tensor.dtype
        weights[name] = tensor.to(device, dtype, copy=True)
    model.load_state_dict(weights, assign=True)
    model.conditioner.text.words = frozenset(saved.get("words", ()))
    return model.eval().requires_grad_(False).to(device), settings, saved["codec"]


class Sampling(NamedTuple):
    """The options that choose the next codes; see `stream`."""

    cfg: float
    beta: torch.Tensor  # [B, 1, 1], 1 for samples without text or style
    temperature: float
    top_k: int
    top_p: float


def generate(model, conditions, frames, prompt=None, progress=None, **options):
    """Generate codes int64 [B, K, frames]. Options: see `stream`. progress: called with the number of new frames."""
    parts = []
    for part in stream(model, conditions, frames, prompt, **options):
        parts.append(part)
        if progress:
            progress(part.shape[2])
    return torch.cat(parts, dim=2)


@torch.inference_mode()
def stream(model, conditions, frames, prompt=None, cfg=3.0, cfg_beta=1.0, temperature=1.0, top_k=250, top_p=0.0,
           seeds=None, stride=None):  # fmt: skip
    """Yield codes int64 [B, K, n] for B dicts of conditions: first the shortest prompt, then frame by frame.

    frames       number of frames, prompt included
    prompt       codes to continue: [1, K, T] for all samples, or B codes [K, T] of any lengths
    cfg          guidance scale: uncond + cfg * (cond - uncond); 1: no guidance, at half the cost
    cfg_beta     weight of the text beside the style, if both are given: see `guide`; 1: equal, at 2/3 of the cost
    temperature  0 takes the likeliest code; otherwise codes are drawn from the top_p mass, if set, or from the top_k
    seeds        B integers, by default 0 to B - 1; a sample depends on its own seed only, and after the first window on
                 the shortest prompt, which decides where windows start
    stride       frames that each window after the first adds; default: half of the trained length
    """
    B, window, device = len(conditions), model.trained_frames, model.embed.weight.device
    rngs = [torch.Generator().manual_seed(seed) for seed in (seeds or range(B))]
    overlap = window - (stride or window // 2)
    if not 0 < overlap < window:
        raise UserError(f"stride {stride}: must be above 0 and below the {window} frames of training")
    codes = torch.full((B, model.K, frames), UNKNOWN)
    prompts = [codes[0, :, :0]] if prompt is None else list(prompt)
    prompts = prompts * B if len(prompts) == 1 else prompts
    for sample, known in zip(codes, prompts):
        sample[:, : known.shape[1]] = known[:, :frames]
    codes, done = codes.to(device), min(frames, *(known.shape[1] for known in prompts))
    if done:
        yield codes[:, :, :done]
    groups, beta = condition_groups(conditions, cfg, cfg_beta)
    sampling = Sampling(cfg, beta.to(device), temperature, min(top_k, model.card), top_p)
    while done < frames:
        start = 0 if done < window else done - overlap
        end = min(start + window, frames)
        rows = [cut_melody(sample, start / model.frame_rate) for group in groups for sample in group]
        new_frames = generate_window(model, codes[:, :, start:end], done - start, rows, rngs, sampling)
        for t, frame in enumerate(new_frames, done):
            codes[:, :, t : t + 1] = frame
            yield frame
        done = end


def condition_groups(conditions, cfg, beta):
    """B dicts -> (the groups that `guide` compares, a list of G lists of B dicts; beta per sample [B, 1, 1]).

    The groups are [all], without guidance or conditions; [all, none]; or [all, without text, none], if beta differs
    from 1 and a sample has both text and style.
    """
    conditions = [{k: v for k, v in sample.items() if v is not None and len(v)} for sample in conditions]
    betas = torch.tensor([beta if {"text", "style"} <= sample.keys() else 1.0 for sample in conditions])
    groups = [conditions]
    if any(conditions) and (cfg != 1 or (betas != 1).any()):
        if (betas != 1).any():
            groups.append([{name: sample[name] for name in sample if name != "text"} for sample in conditions])
        groups.append([{} for _ in conditions])
    return groups, betas[:, None, None]


def cut_melody(sample, seconds):
    """Return a sample's conditions for a window that starts at `seconds`."""
    start = round(seconds * CHROMA_RATE)
    return {name: value[start:] if name == "melody" else value for name, value in sample.items()}


def generate_window(model, codes, start, conditions, rngs, sampling):
    """codes [B, K, T], UNKNOWN where they are to be generated -> yield the frames from `start` on, [B, K, 1] each.

    conditions: R dicts. rngs: B torch Generators on the CPU.
    """
    pattern, device = model.pattern(codes.shape[2]), codes.device
    positions = model.pattern(codes.shape[2], device="cpu").position  # a copy that is read without waiting for a GPU
    frame_completed_at = {position: t for t, position in enumerate(positions.amax(0).tolist())}
    first = int(positions[:, start].min())  # the first position with an UNKNOWN code
    sequence = pattern.build(codes, model.special)
    uniform = torch.stack([torch.rand(pattern.S, model.K, generator=rng) for rng in rngs], dim=1).to(device)
    with precision(model):
        # position first - 1 is not prefilled, because it is the input of the first decoding step
        cache = prefill(model, sequence[:, :, : first - 1], conditions, pattern.S)
    decode = functools.partial(decode_one_step, model, cache, sampling)
    for position in range(first, pattern.S):
        previous = cache.slots[position - 1 : position]  # position - 1 as a tensor, without a copy to the GPU
        slots = slots_to_read(cache.prefix_length + position, cache.slots)
        inputs = sequence[:, :, position - 1], previous, slots, uniform[position]
        if position == first and device.type == "cuda":
            decode = CUDAGraph(decode, *inputs)  # new_codes is then overwritten by the next call
        new_codes = decode(*inputs)
        is_unknown = sequence[:, :, position] == UNKNOWN
        sequence[:, :, position] = torch.where(is_unknown, new_codes, sequence[:, :, position])
        if (t := frame_completed_at.get(position, -1)) >= start:
            yield sequence.gather(2, pattern.position[:, t : t + 1].expand(len(codes), -1, -1))


class KVCache:
    """Keys and values of one block, [R, H, length, D / H], and those of the text, computed once."""

    def __init__(self, block, text_states, length):
        cross = block.split_heads(block.cross_kv(text_states), 2).contiguous()
        self.cross = cross.to(cache_dtype(cross))
        R, H, _, d = self.cross[0].shape
        self.k, self.v = self.cross.new_zeros(R, H, length, d), self.cross.new_zeros(R, H, length, d)

    def update(self, input_slots, k, v, W):
        """Store k and v [R, H, S, D / H] in the slots input_slots [S]; return the first W keys and values."""
        self.k.index_copy_(2, input_slots, k.to(self.k.dtype))
        self.v.index_copy_(2, input_slots, v.to(self.v.dtype))
        return self.k[:, :, :W], self.v[:, :, :W]


class Cache(NamedTuple):
    """Everything that decoding reads besides the last tokens."""

    blocks: list  # of KVCache
    text_mask: torch.Tensor  # bool [R, 1, 1, L]
    prefix_length: int  # P
    slots: torch.Tensor  # int64: 0, 1, ... up to the length of the caches


def cache_length(S):
    """Return the length of caches for S positions, prefix included: a multiple of 512, so few shapes are compiled."""
    return -(-S // 512) * 512


def prefill(model, sequence, conditions, S):
    """Make caches for S positions, and fill them with the conditions [R dicts] and the sequence [B, K, positions]."""
    condition_tensors = to_device(model.conditioner.tokenize(conditions), sequence.device)
    text_states, text_mask, prefix = model.conditioner(condition_tensors)
    slots = torch.arange(cache_length(prefix.shape[1] + S), device=sequence.device)
    blocks = [KVCache(block, text_states, len(slots)) for block in model.blocks]
    cache = Cache(blocks, text_mask[:, None, None, :], prefix.shape[1], slots)
    sequence = sequence.repeat(len(conditions) // len(sequence), 1, 1)
    if filled := prefix.shape[1] + sequence.shape[2]:
        x = torch.cat([prefix, model.embed_sequence(sequence)], dim=1)
        x, rotation = model.add_positions(x, model.positions(sequence.shape[2]))
        input_slots = slots[:filled]
        causal_mask = input_slots <= input_slots[:, None]
        for block, kv_cache in zip(model.blocks, cache.blocks):
            x = block(x, None, cache.text_mask, rotation, kv_cache, input_slots, causal_mask)
    return cache


def decode_one_step(model, cache, sampling, codes, position, slots, uniform):
    """Choose the codes of the next position, int64 [B, K], from the `codes` [B, K] at `position` [1].

    slots [W]: those of the cache to read. uniform [B, K] in [0, 1): see `choose_codes`.
    """
    with precision(model):
        next_logits = model.compiled_logits or guided_logits
        logits = next_logits(model, codes, position, slots, cache, sampling.cfg, sampling.beta)
    return choose_codes(logits, uniform, sampling.temperature, sampling.top_k, sampling.top_p)


def guided_logits(model, codes, position, slots, cache, cfg, beta):
    """codes [B, K] at `position` [1] -> guided logits of the next position, float32 [B, K, card]."""
    n_groups = len(cache.text_mask) // len(codes)
    x, rotation = model.add_positions(model.embed_sequence(codes[:, :, None]), position)
    x = x.repeat(n_groups, 1, 1)
    input_slots = position + cache.prefix_length
    causal_mask = (slots <= input_slots)[None]
    for block, kv_cache in zip(model.blocks, cache.blocks):
        x = block(x, None, cache.text_mask, rotation, kv_cache, input_slots, causal_mask)
    logits = model.logits(model.norm(x))[:, 0].float()
    return guide(logits.unflatten(0, (n_groups, -1)), cfg, beta)


def guide(logits, cfg, beta):
    """Move the logits away from the unconditional ones by `cfg` (classifier-free guidance, arXiv:2207.12598).

    With text and style, `beta` [B, 1, 1] first moves the style's logits towards those of both (MusicGen-Style,
    arXiv:2407.12563, section 3.3). logits [G, B, K, card] of the groups -> [B, K, card].
    """
    if len(logits) == 1:
        return logits[0]
    if len(logits) == 2:
        cond, uncond = logits
        return uncond + cfg * (cond - uncond)
    both, style, uncond = logits
    return uncond + cfg * (style + beta * (both - style) - uncond)


def choose_codes(logits, uniform, temperature, top_k, top_p):
    """logits [B, K, card], uniform [B, K] in [0, 1) -> codes [B, K], by inverting the cumulative distribution.

    The uniform numbers come from each sample's own generator, so a sample does not depend on its batch.
    """
    if temperature < 1e-6:  # the quotients would overflow
        return logits.argmax(-1)
    dtype = torch.float32 if logits.device.type == "mps" else torch.float64
    probs = torch.softmax(logits.to(dtype) / temperature, dim=-1)
    if top_p:
        ranked, codes = probs.sort(dim=-1, descending=True)
        probs = torch.zeros_like(probs).scatter(-1, codes, ranked * (ranked.cumsum(-1) - ranked < top_p))
    elif top_k:
        probs = probs * (logits >= logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True))
    cumulative = probs.cumsum(-1)  # not sorted, because rounding could swap codes of nearly equal probability
    code = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1)
    last_possible = (cumulative < cumulative[..., -1:]).sum(-1)
    return torch.minimum(code, last_possible)


# --------------------------------------------------------------------------------------------------------------- speed


def precision(model):
    """Return the autocast context of the weights' dtype, as `optimize` left it."""
    device, dtype = model.heads.weight.device.type, model.heads.weight.dtype
    return torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False)


def optimize(model, dtype=torch.float32, compiled=False):
    """Convert the linear layers of blocks and heads to `dtype`. If `compiled`, compile decoding at its first use.

    Returns the model, which is for generation on its device only from now on.
    """
    device = model.embed.weight.device
    for parent in (model, *model.blocks):
        for module in parent.children():
            if isinstance(module, nn.Linear):
                module.to(dtype)
    if device.type == "cpu":
        optimize_for_cpu(model, dtype, compiled)
    if compiled:
        compiler.prepare_to_compile(device)
        # skipping module guards makes a step 5 % faster, so the code must be isolated from that of other models
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        model.compiled_logits = torch.compile(guided_logits, fullgraph=True, options=options, isolate_recompiles=True)
    return model
