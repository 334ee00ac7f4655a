"""Every setting with its default and its comment, and the loader.

A config file is Python that assigns some of the settings, and may begin with `from config.small import *`.
On the command line `--key=value` or `--key value` overrides it:

    python train.py config/demo.py --steps=200 --lr 1e-3
"""

import ast
import difflib
import inspect
import re
import runpy
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from common import UserError, world_size


@dataclass
class Settings:
    # The run
    out: str = "out/run"  # folder for checkpoints, logs and samples
    resume: bool = True  # continue from OUT/last.pt where there is one; False refuses to write over it
    init_from: str = ""  # a new run starts with the weights of this checkpoint, another run's or an imported one
    seed: int = 0  # fixes the weights, the batches and every dropout draw
    device: str = "auto"  # cuda, mps, cpu, or auto: the accelerator where there is one
    dtype: str = "auto"  # float32, bfloat16, float16, or auto: bfloat16 where the device computes in it
    compile: str = "auto"  # the blocks: always, never, or auto: on GPUs, for 1000 steps or more; it takes a minute
    parallel: str = "ddp"  # several processes: ddp, weights on each; fsdp, weights, EMA and optimizer spread over them
    reshard_after_forward: bool = True  # fsdp: free a block's weights until its backward; False: more memory, faster
    activation_checkpointing: bool = False  # compute each block again in the backward pass, to save memory
    timeout: float = 600.0  # seconds that a step of several processes may take before the run ends, with their stacks
    # Data
    data: str = "data/demo"  # folder made by `python prepare.py`
    demo_clips: int = 0  # where DATA is missing, synthesise the demo's corpus of so many clips and prepare it
    codec: str = "tiny"  # tiny, encodec_24khz[:1.5|3|6|12] (kbps) or musicgen_32khz; any with :stereo
    codec_weights: str = ""  # file with the codec's weights; empty: shipped or downloaded
    segment: float = 8.0  # seconds of music in a training item; shorter tracks are padded
    batch_size: int = 8  # items in one optimizer step, over all processes
    short_every: int = 0  # each n-th step takes twice the items of half the length: more beginnings; 0: none does
    one_batch: bool = False  # train on the first batch again and again, whose loss must go to zero
    micro_batch: int = 0  # items that one device holds at once, gradients accumulate over them; 0: its whole share
    # Model
    dim: int = 256  # width D
    heads: int = 4  # attention heads; divides dim
    layers: int = 6  # blocks
    positions: str = "sinusoidal"  # sinusoidal, MusicGen's; or rope, rotary ones, relative to one another
    pattern: str = "delay"  # delay, parallel or unrolled
    delays: tuple = ()  # one number per codebook for the delay pattern; empty: 0,1,2,...
    text_dim: int = 128  # width of the text embedder
    text_heads: int = 4  # its attention heads; divides text_dim
    text_layers: int = 2  # its blocks
    text_max_tokens: int = 64  # captions are cut off after so many tokens
    melody: bool = False  # condition on the melody too, the strongest pitch class 8 times a second
    style: bool = False  # condition on the sound of an excerpt too
    style_dim: int = 128  # width of the style embedder
    style_heads: int = 4  # its attention heads; divides style_dim
    style_layers: int = 2  # its blocks
    style_codebooks: int = 6  # of its residual quantiser
    style_bins: int = 256  # vectors in each of them
    style_seconds: tuple = (1.5, 4.5)  # shortest and longest excerpt, at most half of the item
    # Fine-tuning
    freeze: tuple = ()  # patterns of the names of parameters that stay as they are, blocks.*,heads.*
    lora_rank: int = 0  # learn matrices of this rank beside the weights of each block; 0: none
    lora_alpha: float = 16.0  # what they learn counts alpha / rank times
    lora_targets: tuple = ("qkv", "attn_out")  # beside which of a block's weights: cross_q, up, down ...
    # Conditioning, per sample and in training only
    cfg_dropout: float = 0.1  # probability to drop all conditions together, for guidance
    text_dropout: float = 0.0  # probability to drop the text on its own
    melody_dropout: float = 0.0  # probability to drop the melody on its own
    style_dropout: float = 0.0  # probability to drop the style on its own
    merge_text_p: float = 0.0  # probability that a track's other metadata joins its caption
    word_dropout: float = 0.0  # probability to drop each word of the caption
    # Optimisation
    codebook_weights: tuple = ()  # how much each codebook counts in the loss, over their mean; empty: all the same
    steps: int = 1000  # optimizer steps in the whole run
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # AdamW's, on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    ema_decay: float = 0.99  # of the EMA of the weights, which validation and generation use; 0: no averaging
    ema_every: int = 1  # steps between updates of the EMA; an epoch at most
    # The cycle
    epoch: int = 500  # steps in an epoch; after each: checkpoint, validate, keep the best
    keep_every: int = 0  # epochs between checkpoints that are kept for good, as step_NNNNNN.pt; 0: none
    valid_items: int = 256  # held-out segments validated after each epoch; 0: all
    generate_every: int = 1  # epochs between rounds of samples; 0: only at the end
    samples: int = 4  # clips in a round of samples, for held-out captions
    evaluate_every: int = 0  # epochs between evaluations by metrics.py; 0: only at the end
    clip_seconds: float = 0.0  # of samples and of the clips of an evaluation; 0: as long as a training item
    evaluate_clips: int = 60  # held-out captions that an evaluation generates for; 0: no evaluation
    log_every: int = 10  # steps between lines of metrics.jsonl
    logger: str = ""  # tensorboard or wandb, where it is installed; metrics.jsonl is written anyway
    # Generation
    cfg: float = 3.0  # guidance; 1 switches it off
    cfg_beta: float = 1.0  # how much more the text counts than the style, where both are given; 1: as much
    temperature: float = 1.0  # 0 takes the likeliest code
    top_k: int = 250  # sample among so many codes; 0: all
    top_p: float = 0.0  # sample within this probability mass instead; 0: off


FIELDS = {field.name: field for field in fields(Settings)}
CHOICES = {
    "positions": ("sinusoidal", "rope"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "always", "never"),
    "parallel": ("ddp", "fsdp"),
    "logger": ("", "tensorboard", "wandb"),
}
NOT_NEGATIVE = (
    "seed demo_clips short_every micro_batch min_lr warmup weight_decay clip valid_items keep_every generate_every"
    " samples evaluate_every clip_seconds evaluate_clips temperature top_k lora_rank"
)
POSITIVE = (
    "segment batch_size dim heads layers text_dim text_heads text_layers text_max_tokens style_dim style_heads"
    " style_layers style_codebooks style_bins steps lr ema_every epoch log_every timeout"
)
PROBABILITIES = (
    "cfg_dropout text_dropout melody_dropout style_dropout merge_text_p word_dropout beta1 beta2 ema_decay top_p"
)


def typed(key, value, where):
    """`value` as the type of the setting `key`; raises UserError for a key or a type that is not one."""
    if key not in FIELDS:
        close = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else "see --help"
        raise UserError(f"{where}: unknown setting '{key}'; {hint}")
    kind = FIELDS[key].type
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if kind is tuple and type(value) is str:
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    if kind is tuple and type(value) in (list, int):
        value = tuple(value) if type(value) is list else (value,)
    if type(value) is not kind:
        raise UserError(f"{where}: {key} must be {kind.__name__}, not {value!r}")
    parts, limit = value if kind is tuple else (value,), 2**62 if key == "seed" else 10**12
    if any(type(part) in (int, float) and not abs(part) < limit for part in parts):
        raise UserError(f"{where}: {key} must be a number below {limit:,}, not {value!r}")
    return value


def from_file(path):
    """The settings that a config file assigns."""
    if not Path(path).is_file():
        known = ", ".join(str(p) for p in sorted(Path("config").glob("[!_]*.py")))
        raise UserError(f"{path}: no such config file; there are {known}")
    try:
        assigned = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    public = {k: v for k, v in assigned.items() if not k.startswith("_") and not inspect.ismodule(v)}
    return {key: typed(key, value, path) for key, value in public.items()}


def from_text(key, text):
    """The value of one setting as typed on the command line."""
    if key in FIELDS and FIELDS[key].type is str:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def check(s, processes):
    """Raises UserError for values that no run could use."""
    for key, choices in CHOICES.items():
        if getattr(s, key) not in choices:
            raise UserError(f"{key} = {getattr(s, key)!r}: choose one of {', '.join(choices)}")
    for key in POSITIVE.split():
        if not getattr(s, key) > 0:
            raise UserError(f"{key} = {getattr(s, key)}: must be above 0")
    for key in NOT_NEGATIVE.split():
        if not getattr(s, key) >= 0:
            raise UserError(f"{key} = {getattr(s, key)}: must be 0 or above")
    for key in PROBABILITIES.split():
        if not 0 <= getattr(s, key) <= 1:
            raise UserError(f"{key} = {getattr(s, key)}: must lie between 0 and 1")
    for width, heads in (("dim", "heads"), ("text_dim", "text_heads"), ("style_dim", "style_heads")):
        if getattr(s, width) % getattr(s, heads) or getattr(s, width) // getattr(s, heads) % 2:
            raise UserError(f"{width} = {getattr(s, width)}: must be an even multiple of {heads} = {getattr(s, heads)}")
    for key in ("freeze", "lora_targets"):
        if not all(type(value) is str for value in getattr(s, key)):
            raise UserError(f"{key} = {getattr(s, key)}: must be names, blocks.*,heads*")
    if not all(type(value) in (int, float) and value >= 0 for value in s.codebook_weights) or (
        s.codebook_weights and not sum(s.codebook_weights)
    ):
        raise UserError(
            f"codebook_weights = {s.codebook_weights}: must be one number of 0 or above a codebook, 2,1,1,1"
        )
    numbers = all(type(value) in (int, float) for value in s.style_seconds)
    if not (numbers and len(s.style_seconds) == 2 and 0 < s.style_seconds[0] <= s.style_seconds[1]):
        raise UserError(f"style_seconds = {s.style_seconds}: must be the shortest and the longest, 1.5,4.5")
    for key in ("beta1", "beta2", "ema_decay"):
        if getattr(s, key) == 1:
            raise UserError(f"{key} = 1: an average that never changes; 0.99 is usual")
    if s.positions == "sinusoidal" and s.dim < 4:
        raise UserError(f"dim = {s.dim}: must be 4 or above for sinusoidal positions")
    if s.timeout > 10**9:
        raise UserError(f"timeout = {s.timeout:g}: must be a billion seconds at most")
    if not s.out or "\0" in s.out:
        raise UserError(f"out = {s.out!r}: must name a folder")
    check_batch(s.batch_size, s.micro_batch, processes)


def check_batch(batch_size, micro_batch, processes):
    """Refuses a batch that does not divide into equal micro-batches on every process; names the nearest that does."""
    unit = processes * (micro_batch or 1)
    if batch_size % unit == 0:
        return
    below, above = batch_size // unit * unit, (batch_size // unit + 1) * unit
    near = " or ".join(f"--batch_size={size}" for size in (below, above) if size)
    if micro_batch and batch_size % processes == 0:
        share = batch_size // processes
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        near += f" or --micro_batch={min(sizes, key=lambda size: abs(size - micro_batch))}"
    parts = [f"{processes} processes"] * (processes > 1) + [f"micro_batch = {micro_batch}"] * bool(micro_batch)
    raise UserError(f"batch_size = {batch_size} does not divide by {' x '.join(parts)}; the nearest that fit: {near}")


def load(argv, usage, processes=None):
    """argv (without the program) -> Settings: config files first, in turn, then `--key=value` and `--key value`.

    usage: what --help prints before the settings. processes: of the run; by default as many as torchrun has started.
    """
    values, given, words = {}, set(), list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(usage + "\n\n" + describe_settings())
            sys.exit(0)
        if not word.startswith("--"):
            values.update(from_file(word))
            continue
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{key}: needs a value, --{key}=VALUE")
            text = words.pop(0)
        values[key] = typed(key, from_text(key, text), "command line")
        given.add(key)
    if "data" in given and "demo_clips" not in given:
        values["demo_clips"] = 0  # who names their own data and mistypes it must not get the demo's
    s = Settings(**values)
    check(s, processes or world_size())
    return s


def describe_settings():
    """Every setting, its default and its comment, read from the source above."""
    rows = []
    for line in inspect.getsource(Settings).splitlines():
        if match := re.match(r"    (\w+): \w+ = (.+?)  # (.+)", line):
            rows.append("  --{:<16} {:<12}  {}".format(*match.groups()))
        elif line.startswith("    # "):
            rows.append(f"\n{line.strip('# ')}")
    return "\n".join(rows)
