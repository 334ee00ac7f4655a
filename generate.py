"""Conditions in, codes out: prefill, one step after another with a KV cache, guidance, windows past the trained length.

    model, settings, codec = load_model("out/demo/best.pt")
    codes = generate(model, [{"text": "slow piano"}], frames=400)           # int64 [B, K, T]
    for part in stream(model, [{"text": "slow piano"}], frames=400): ...    # the same, each frame once it is final

Letters: B streams, G groups of conditions for each, R = G B rows, K codebooks, T frames, S sequence steps, D model
width, H heads, L condition length, P rows prepended, W steps of the cache in use.
"""

import types

import torch
from torch import nn

import common
from common import UserError
from conditioning import CHROMA_RATE, to_device
from config import FIELDS, Settings
from linear import PackedLinear, SummedLinear, can_pack
from model import MusicLM, refuse_other_weights

UNKNOWN = -1  # in the place of a code that is to be found


def load_model(path, device="cpu"):
    """A checkpoint -> (MusicLM with the averaged weights in eval mode, its Settings, the codec's description)."""
    saved = common.load_checkpoint(path)
    settings = Settings(**{key: value for key, value in saved["settings"].items() if key in FIELDS})
    with torch.device("meta"):  # to draw weights that are replaced takes half a minute for small
        model = MusicLM(settings, saved["codec"], saved["tokenizer"])
    refuse_other_weights(model, saved["ema"], path)
    model.load_state_dict(saved["ema"], assign=True)
    model.conditioner.text.words = frozenset(saved.get("words", ()))
    return model.eval().requires_grad_(False).to(device), settings, saved["codec"]


class KVCache:
    """One block's keys and values, in buffers of a fixed size [R, H, steps, D / H]; the text's, computed once.

    In bfloat16 on a CPU they are float32, for `model.attention`.
    """

    def __init__(self, block, states, steps):
        self.cross = block.split(block.cross_kv(states), 2).contiguous()
        if states.device.type == "cpu" and self.cross.dtype == torch.bfloat16:
            self.cross = self.cross.float()
        R, H, _, d = self.cross[0].shape
        self.k, self.v = self.cross.new_zeros(R, H, steps, d), self.cross.new_zeros(R, H, steps, d)

    def update(self, input_pos, k, v, W):
        """Puts k and v [R, H, S, D / H] at the steps `input_pos` [S]; returns what the first W steps hold."""
        self.k.index_copy_(2, input_pos, k.to(self.k.dtype))
        self.v.index_copy_(2, input_pos, v.to(self.v.dtype))
        return self.k[:, :, :W], self.v[:, :, :W]


def cache_steps(S):
    """The size of buffers for S steps, prepended rows among them: rounded up, so that few shapes occur."""
    return -(-S // 512) * 512


def prefill(model, sequence, prefix, states_mask, caches):
    """Puts the prefix [R, P, D] and then the sequence [R, K, S] into the caches."""
    x = torch.cat([prefix, model.embed_sequence(sequence)], dim=1)
    x, rotation = model.add_positions(x, model.positions(sequence.shape[2]))
    input_pos = torch.arange(x.shape[1], device=x.device)
    causal_mask = input_pos <= input_pos[:, None]
    for block, cache in zip(model.blocks, caches):
        x = block(x, None, states_mask, rotation, cache, input_pos, causal_mask)


def decode_one_step(model, tokens, position, states_mask, caches, P, steps, cfg, beta):
    """The tokens [B, K] at `position` [1] of the sequence -> guided logits of the next ones, [B, K, card].

    steps: arange(W), where W is as far as the caches are filled, or more.
    """
    groups = len(states_mask) // len(tokens)
    x, rotation = model.add_positions(model.embed_sequence(tokens[:, :, None]), position)
    x = x.repeat(groups, 1, 1)
    input_pos = position + P
    causal_mask = (steps <= input_pos)[None]
    for block, cache in zip(model.blocks, caches):
        x = block(x, None, states_mask, rotation, cache, input_pos, causal_mask)
    logits = model.logits(model.norm(x))[:, 0].float()
    return guide(logits.unflatten(0, (groups, -1)), cfg, beta)


def condition_groups(conditions, cfg, beta):
    """B dicts -> the groups whose logits `guide` needs, each B dicts, and beta by sample, [B, 1, 1]: one group where
    there is nothing to guide, two where beta is 1 or no sample has both text and style.
    """
    conditions = [{k: v for k, v in sample.items() if v is not None and len(v)} for sample in conditions]
    betas = torch.tensor([beta if {"text", "style"} <= sample.keys() else 1.0 for sample in conditions])
    groups = [conditions]
    if any(conditions) and (cfg != 1 or (betas != 1).any()):
        if (betas != 1).any():
            groups.append([{name: sample[name] for name in sample if name != "text"} for sample in conditions])
        groups.append([{} for _ in conditions])
    return groups, betas[:, None, None]


def guide(logits, cfg, beta):
    """Classifier-free guidance (arXiv:2207.12598), and MusicGen-Style's double one (arXiv:2407.12563, section 3.3).

    logits [G, B, K, card] of the groups -> [B, K, card]. beta [B, 1, 1] is 1 for a sample without text or style.
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

    One uniform number a code, drawn ahead from the sample's own generator, keeps a sample the same in any batch.
    """
    if temperature < 1e-6:  # the quotients below would overflow, and the likeliest is drawn long before that
        return logits.argmax(-1)
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    probs = torch.softmax(logits.to(exact) / temperature, dim=-1)
    if top_p:
        ranked, codes = probs.sort(dim=-1, descending=True)
        probs = torch.zeros_like(probs).scatter(-1, codes, ranked * (ranked.cumsum(-1) - ranked < top_p))
    elif top_k:
        probs = probs * (logits >= logits.topk(top_k, sorted=False).values.amin(-1, keepdim=True))
    cumulative = probs.cumsum(-1)  # not sorted: rounding can swap two codes nearly as likely, and with them the draw
    code = (cumulative <= uniform[..., None] * cumulative[..., -1:]).sum(-1)
    last = (cumulative < cumulative[..., -1:]).sum(-1)
    return torch.minimum(code, last)


def generate(model, conditions, frames, prompt=None, progress=lambda frames: None, **options):
    """All that `stream` yields, in one: codes int64 [B, K, frames]. progress: told how many frames each part has."""
    parts = []
    for part in stream(model, conditions, frames, prompt, **options):
        parts.append(part)
        progress(part.shape[2])
    return torch.cat(parts, dim=2)


@torch.inference_mode()
def stream(model, conditions, frames, prompt=None, cfg=3.0, cfg_beta=1.0, temperature=1.0, top_k=250, top_p=0.0,
           seeds=None, stride=None):  # fmt: skip
    """B dicts of conditions -> codes int64 [B, K, n] as they become final: the prompt, then frame by frame.

    frames       how many there are in all
    prompt       codes [B, K, T] to go on from, [1, K, T] for all, or B of any lengths, [K, T]; they stay as they are
    cfg          see `guide`; cfg 1 costs half as much, cfg_beta 1 a third less where text and style are given
    temperature  0 takes the likeliest code; else it is drawn within top_p if set, else top_k if set, else from all
    seeds        B integers; a sample depends on its own alone (and on the shortest prompt, where windows begin)
    stride       past the trained length, windows of that length each add so many frames; by default half of it
    """
    B, window, device = len(conditions), model.trained_frames, model.embed.weight.device
    rngs = [torch.Generator().manual_seed(seed) for seed in (seeds or range(B))]
    kept = window - (stride or window // 2)
    if not 0 < kept < window:
        raise UserError(f"stride {stride}: must be above 0 and below the {window} frames of training")
    codes = torch.full((B, model.K, frames), UNKNOWN)
    prompts = [codes[0, :, :0]] if prompt is None else list(prompt)
    prompts = prompts * B if len(prompts) == 1 else prompts
    for row, one in zip(codes, prompts):
        row[:, : one.shape[1]] = one[:, :frames]
    codes, done = codes.to(device), min(frames, *(one.shape[1] for one in prompts))
    if done:
        yield codes[:, :, :done]
    groups, beta = condition_groups(conditions, cfg, cfg_beta)
    options = dict(cfg=cfg, beta=beta.to(device), temperature=temperature, top_k=min(top_k, model.card), top_p=top_p)
    while done < frames:
        first = 0 if done < window else done - kept
        last = min(first + window, frames)
        rows = [from_second(first / model.frame_rate, sample) for group in groups for sample in group]
        found = continue_window(model, codes[:, :, first:last], done - first, rows, rngs, **options)
        for t, part in enumerate(found, done):
            codes[:, :, t : t + 1] = part
            yield part
        done = last


def from_second(start, sample):
    """A sample's conditions for the window that begins there: the melody is cut."""
    return {name: value[round(start * CHROMA_RATE) :] if name == "melody" else value for name, value in sample.items()}


def continue_window(model, codes, done, rows, rngs, cfg, beta, temperature, top_k, top_p):
    """codes [B, K, T], UNKNOWN where one is to be found -> the frames from `done` on, [B, K, 1] each."""
    pattern, device = model.pattern(codes.shape[2]), codes.device
    plan = model.pattern(codes.shape[2], device="cpu").step  # the same, to read it without waiting for a GPU
    sequence = pattern.build(codes, model.special)
    uniform = torch.stack([torch.rand(pattern.S, model.K, generator=rng) for rng in rngs], dim=1).to(device)
    completes = {step: t for t, step in enumerate(plan.amax(0).tolist())}  # the step that completes a frame
    first = int(plan[:, done].min())  # the first step that may hold an UNKNOWN
    with precision(model):
        states, mask, prefix = model.conditioner(to_device(model.conditioner.prepare(rows), device))
        P, states_mask = prefix.shape[1], mask[:, None, None, :]
        steps = torch.arange(cache_steps(P + pattern.S), device=device)
        caches = [KVCache(block, states, len(steps)) for block in model.blocks]
        past = sequence[:, :, : first - 1].repeat(len(rows) // len(codes), 1, 1)
        if past.shape[2] + P:
            prefill(model, past, prefix, states_mask, caches)
    decode = getattr(model, "compiled_step", decode_one_step)

    def next_codes(tokens, position, seen, uniform):
        with precision(model):
            logits = decode(model, tokens, position, states_mask, caches, P, seen, cfg, beta)
        return choose_codes(logits, uniform, temperature, top_k, top_p)

    for step in range(first, pattern.S):
        W = len(steps)  # for a GPU one shape, as a step is recorded once; for a CPU few
        if device.type == "cpu":
            W = P + step + (P + step) % 2
        inputs = sequence[:, :, step - 1], steps[step - 1 : step], steps[:W], uniform[step]
        if step == first and device.type == "cuda":
            next_codes = CUDAGraph(next_codes, *inputs)
        found = next_codes(*inputs)
        sequence[:, :, step] = torch.where(sequence[:, :, step] == UNKNOWN, found, sequence[:, :, step])
        if (t := completes.get(step, -1)) >= done:
            yield sequence.gather(2, pattern.step[:, t : t + 1].expand(len(codes), -1, -1))


def precision(model):
    """The context in which products are made in the type of the weights that `optimize` has left."""
    device, dtype = model.heads.weight.device.type, model.heads.weight.dtype
    return torch.autocast(device, dtype, enabled=dtype != torch.float32, cache_enabled=False)


# --------------------------------------------------------------------------------------------------------------- speed


def optimize(model, dtype=torch.float32, compiled=False):
    """Keeps the weights of the products in `dtype`, and has a step compiled at its first use; returns the model.

    From then on it is for generation alone, on its device: packed weights are no parameters of it.
    """
    device, is_wide = model.embed.weight.device, model.embed.weight.shape[1] >= 512
    packs = can_pack(device, dtype)
    for parent in (model, *model.blocks):
        for name, module in [*parent.named_children()]:
            if isinstance(module, nn.Linear):
                module.to(dtype)
            if type(module) is not nn.Linear:  # LoRA's has another forward
                continue
            if packs and is_wide:
                setattr(parent, name, PackedLinear(module))
            elif compiled and device.type == "cpu" and module.in_features < 512:
                setattr(parent, name, SummedLinear(module))
            elif packs and dtype == torch.float32 and module.out_features >= module.in_features:
                module.weight.data = module.weight.data.t().contiguous().t()  # by columns MKL is quicker on AMD's
    if compiled:
        common.prepare_to_compile(device)
        # Not to look for changed modules saves a twentieth of a step, but then no other model may use what this one has
        # compiled. So it has a copy of the function: torch keeps what it compiles by the code.
        step = types.FunctionType(decode_one_step.__code__.replace(), globals())
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe}
        model.compiled_step = torch.compile(step, fullgraph=True, options=options)
    return model


class CUDAGraph:
    """A function of tensors, recorded for GPUs, which launch its hundreds of kernels as one from then on.

    It is called a few times with `inputs` first, which must not matter; its output is overwritten by the next call.
    """

    def __init__(self, function, *inputs):
        self.inputs, self.graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()  # recording needs all that is set up at first use, made on another stream
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):  # others load data meanwhile
            self.output = function(*self.inputs)

    def __call__(self, *inputs):
        for tensor, new in zip(self.inputs, inputs):
            tensor.copy_(new)
        self.graph.replay()
        return self.output
