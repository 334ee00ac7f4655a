"""Every setting with its default and its help text, and the loader.

A config file is Python that assigns settings, and may begin with `from config.small import *`.
On the command line, `--key=value` or `--key value` overrides it:

    python train.py config/demo.py --steps=200 --lr 1e-3
"""

import ast
import difflib
import inspect
import math
import re
import runpy
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from common import UserError, expand_home, find_beside, load_checkpoint
from distributed import rank, world_size


@dataclass
class Settings:
    # Run
    out: str = "out/run"  # folder for checkpoints, logs and samples
    resume: bool = True  # continue from OUT/last.pt if it exists; False: an error if OUT holds a run
    init_from: str = ""  # run or checkpoint whose weights, sizes and conditions a new run starts from
    seed: int = 0  # seed of the weights, the batches and the dropout
    device: str = "auto"  # cuda, mps or cpu; auto: the accelerator if there is one
    dtype: str = "auto"  # float32, bfloat16 or float16; auto: bfloat16 if the hardware supports it
    compile: str = "auto"  # compile the blocks, in about a minute: always, never, or auto: on a GPU if steps >= 1000
    parallel: str = "ddp"  # ddp: each process holds all weights; fsdp: split weights, EMA and optimizer over processes
    reshard_after_forward: bool = True  # fsdp: gather weights again for backward; False: faster, more memory
    activation_checkpointing: bool = False  # compute each block again in the backward pass, which saves memory
    timeout: float = 600.0  # with several processes: seconds a step may take before the run ends and prints its stacks
    # Data
    data: str = "data/demo"  # folder written by `python prepare.py`
    demo_clips: int = 0  # if DATA is missing, synthesize this many clips of the demo's corpus and prepare them; 0: off
    codec: str = "tiny"  # tiny, encodec_24khz[:1.5|3|6|12] (kbps) or musicgen_32khz, optionally followed by :stereo
    codec_weights: str = ""  # file with the codec's weights; empty: shipped or downloaded
    segment: float = 8.0  # seconds of music in a training item; shorter tracks are padded
    batch_size: int = 8  # items in one optimizer step, over all processes
    short_every: int = 0  # every n-th step uses twice as many items of half the length; 0: never
    one_batch: bool = False  # train on the first batch only, as a test: the loss must approach 0
    micro_batch: int = 0  # items in one forward pass of a device; gradients accumulate over passes; 0: one pass
    # Model
    dim: int = 256  # width D
    heads: int = 4  # attention heads; dim must be a multiple of 2 * heads
    layers: int = 6  # transformer blocks
    positions: str = "sinusoidal"  # sinusoidal, as in MusicGen; or rope, rotary and relative
    pattern: str = "delay"  # order of the codebooks: delay, parallel or unrolled
    delays: tuple = ()  # delay pattern: delay of each codebook in frames; empty: 0,1,2,..., in stereo 0,0,1,1,...
    # Conditions
    text_encoder: str = "own"  # own: trained with the model; t5: a frozen T5, as in the published models
    text_encoder_weights: str = ""  # t5: safetensors file of its weights, with spiece.model next to it
    text_dim: int = 128  # width of the text embedder
    text_heads: int = 4  # attention heads of the text embedder
    text_layers: int = 2  # blocks of the text embedder
    text_max_tokens: int = 64  # maximum length of a caption in tokens; the rest is cut off
    melody: bool = False  # also condition on the melody: the strongest pitch class, 8 times a second
    style: bool = False  # also condition on the sound of an excerpt
    style_dim: int = 128  # width of the style embedder
    style_heads: int = 4  # attention heads of the style embedder
    style_layers: int = 2  # blocks of the style embedder
    style_codebooks: int = 6  # codebooks of the style embedder's residual quantizer
    style_bins: int = 256  # vectors in each codebook of the style embedder
    style_seconds: tuple = (1.5, 4.5)  # shortest and longest excerpt; at most half of the training item
    # Fine-tuning
    freeze: tuple = ()  # parameters that are not trained, as patterns of names: blocks.*,heads.*
    lora_rank: int = 0  # rank of the LoRA matrices that are trained beside each block's weights; 0: no LoRA
    lora_alpha: float = 16.0  # LoRA updates are multiplied by alpha / rank
    lora_targets: tuple = ("qkv", "attn_out")  # any of qkv, attn_out, cross_q, cross_kv, cross_out, up, down
    # Dropout of conditions, drawn for each item, in training only
    cfg_dropout: float = 0.1  # probability to drop all conditions together, for classifier-free guidance
    text_dropout: float = 0.0  # probability to drop the text, independently of the other conditions
    melody_dropout: float = 0.0  # probability to drop the melody, independently of the other conditions
    style_dropout: float = 0.0  # probability to drop the style, independently of the other conditions
    merge_text_p: float = 0.0  # probability to add the track's other metadata to its caption
    word_dropout: float = 0.0  # probability to drop each word of the caption
    # Optimization
    codebook_weights: tuple = ()  # weight of each codebook in the loss, divided by their mean; empty: all equal
    steps: int = 1000  # optimizer steps in the whole run
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # AdamW: weight decay, of matrices only
    beta1: float = 0.9  # AdamW: decay of the average gradient
    beta2: float = 0.95  # AdamW: decay of the average squared gradient
    clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    ema_decay: float = 0.99  # decay of the EMA of the weights per update; validation and generation use it; 0: none
    ema_every: int = 1  # steps between updates of the EMA; at most one epoch
    # Epochs and logs
    epoch: int = 0  # steps in an epoch, which ends with a checkpoint and a validation; 0: 20 % of the run
    keep_every: int = 0  # epochs between checkpoints that are kept, as step_NNNNNN.pt; 0: keep none
    valid_items: int = 256  # held-out items in a validation; 0: all
    generate_every: int = 1  # epochs between sets of samples; 0: only at the end
    samples: int = 4  # clips in a set of samples, generated for held-out captions
    evaluate_every: int = 0  # epochs between evaluations by metrics.py; 0: only at the end
    clip_seconds: float = 0.0  # length of generated clips, in samples and evaluations; 0: as long as a training item
    evaluate_clips: int = 60  # clips in an evaluation, generated for held-out captions; 0: no evaluation
    log_every: int = 10  # steps between lines of metrics.jsonl
    logger: str = ""  # tensorboard or wandb, if installed, in addition to metrics.jsonl
    # Generation
    cfg: float = 3.0  # guidance scale; 1: no guidance
    cfg_beta: float = 1.0  # weight of the text in the guidance relative to the style, if both are given; 1: equal
    temperature: float = 1.0  # sampling temperature; 0: always take the likeliest code
    top_k: int = 250  # sample from this many of the likeliest codes; 0: from all
    top_p: float = 0.0  # sample from the likeliest codes with this total probability, instead of top_k; 0: off

    def __post_init__(self):
        self.epoch = self.epoch or max(1, math.ceil(self.steps / 5))


FIELDS = {field.name: field for field in fields(Settings)}
MODEL_SETTINGS = (  # must equal those of the checkpoint that a run starts from
    "codec dim heads layers positions pattern delays text_encoder text_dim text_heads text_layers text_max_tokens"
    " melody style style_dim style_heads style_layers style_codebooks style_bins style_seconds"
).split()
WEIGHT_FILES = ("codec_weights", "text_encoder_weights")
PATHS = (*WEIGHT_FILES, "data", "out", "init_from")
# taken from the checkpoint too, unless a config file or the command line sets them
OTHER_INHERITED = "segment clip_seconds cfg cfg_beta temperature top_k top_p".split()
LORA_SETTINGS = "lora_rank lora_targets".split()  # must be equal too if a run resumes
CHOICES = {
    "positions": ("sinusoidal", "rope"),
    "text_encoder": ("own", "t5"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "always", "never"),
    "parallel": ("ddp", "fsdp"),
    "logger": ("", "tensorboard", "wandb"),
}
NOT_NEGATIVE = (
    "seed demo_clips epoch short_every micro_batch min_lr warmup weight_decay clip valid_items keep_every"
    " generate_every samples evaluate_every clip_seconds evaluate_clips temperature top_k lora_rank"
)
POSITIVE = (
    "segment batch_size dim heads layers text_dim text_heads text_layers text_max_tokens style_dim style_heads"
    " style_layers style_codebooks style_bins steps lr ema_every log_every timeout"
)
PROBABILITIES = (
    "cfg_dropout text_dropout melody_dropout style_dropout merge_text_p word_dropout beta1 beta2 ema_decay top_p"
)


def convert(key, value, source):
    """Convert a value to the type of the setting `key`. Raises UserError for an unknown key or a wrong type."""
    if key not in FIELDS:
        names = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.5)
        hint = f"did you mean '{names[0]}'?" if names else "see --help"
        raise UserError(f"{source}: unknown setting '{key}'; {hint}")
    kind = FIELDS[key].type
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if kind is tuple and type(value) is str:
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    if kind is tuple and type(value) in (list, int):
        value = tuple(value) if type(value) is list else (value,)
    if key in PATHS and type(value) is str:
        value = expand_home(value)
    if type(value) is not kind:
        raise UserError(f"{source}: {key} must be {kind.__name__}, not {value!r}")
    parts, limit = value if kind is tuple else (value,), 2**62 if key == "seed" else 10**12
    if any(type(part) in (int, float) and not abs(part) < limit for part in parts):
        raise UserError(f"{source}: {key} must be a number below {limit:,}, not {value!r}")
    return value


def read_file(path):
    """Return the settings that a config file assigns."""
    if not Path(path).is_file():
        names = ", ".join(str(p) for p in sorted(Path("config").glob("[!_]*.py")))
        raise UserError(f"{path}: no such config file; choose one of {names}")
    try:
        assigned = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    public = {k: v for k, v in assigned.items() if not k.startswith("_") and not inspect.ismodule(v)}
    return {key: convert(key, value, path) for key, value in public.items()}


def parse(key, text):
    """Parse the value of a setting on the command line. Text that is no Python literal stays text."""
    if key in FIELDS and FIELDS[key].type is str:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def check(s, processes):
    """Raise UserError for values that no run can use."""

    def require(is_valid, key, message):
        if not is_valid:
            raise UserError(f"{key} = {getattr(s, key)!r}: {message}")

    for key, choices in CHOICES.items():
        require(getattr(s, key) in choices, key, f"choose one of {', '.join(choices)}")
    for key in POSITIVE.split():
        require(getattr(s, key) > 0, key, "must be above 0")
    for key in NOT_NEGATIVE.split():
        require(getattr(s, key) >= 0, key, "must be 0 or above")
    for key in PROBABILITIES.split():
        require(0 <= getattr(s, key) <= 1, key, "must be between 0 and 1")
    for key in ("beta1", "beta2", "ema_decay"):
        require(getattr(s, key) < 1, key, "must be below 1, or the average never changes; 0.99 is usual")
    for prefix in ("", "text_", "style_"):
        dim, n_heads = getattr(s, f"{prefix}dim"), getattr(s, f"{prefix}heads")
        require(dim % (2 * n_heads) == 0, f"{prefix}dim", f"must be a multiple of 2 * {prefix}heads = {2 * n_heads}")
    require(s.positions == "rope" or s.dim >= 4, "dim", "must be 4 or above for sinusoidal positions")
    for key in ("freeze", "lora_targets"):
        require(all(type(name) is str for name in getattr(s, key)), key, "must be names, such as blocks.*,heads*")
    weights, seconds = s.codebook_weights, s.style_seconds
    is_valid = all(type(weight) in (int, float) and weight >= 0 for weight in weights) and (not weights or sum(weights))
    require(is_valid, "codebook_weights", "must be a number for each codebook, 0 or above and not all 0: 2,1,1,1")
    is_valid = len(seconds) == 2 and all(type(x) in (int, float) for x in seconds) and 0 < seconds[0] <= seconds[1]
    require(is_valid, "style_seconds", "must be the shortest and the longest excerpt, such as 1.5,4.5")
    require(s.timeout <= 10**9, "timeout", "must be 1e9 seconds or less")
    require(s.out and "\0" not in s.out, "out", "must be the name of a folder")
    check_batch(s.batch_size, s.micro_batch, processes)


def check_batch(batch_size, micro_batch, processes):
    """Raise UserError unless every process gets the same number of full micro-batches. Suggest the nearest sizes."""
    unit = processes * (micro_batch or 1)
    if batch_size % unit == 0:
        return
    smaller = batch_size // unit * unit
    options = [f"--batch_size={size}" for size in (smaller, smaller + unit) if size]
    if micro_batch and batch_size % processes == 0:
        share = batch_size // processes
        sizes = [size for size in range(1, share + 1) if share % size == 0]
        options.append(f"--micro_batch={min(sizes, key=lambda size: abs(size - micro_batch))}")
    parts = [f"{processes} processes"] * (processes > 1) + [f"micro_batch = {micro_batch}"] * bool(micro_batch)
    raise UserError(f"batch_size = {batch_size} is not a multiple of {' x '.join(parts)}; use {' or '.join(options)}")


def load(argv, usage, processes=None):
    """Return the Settings of a command line: config files, `--key=value` and `--key value`, applied in their order.

    argv: without the program. usage: printed by --help, before the settings.
    processes: number of processes in the run; default: as many as torchrun has started.
    """
    values, typed, words = {}, set(), list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(usage + "\n\n" + describe_settings())
            sys.exit(0)
        if not word.startswith("--"):
            values.update(read_file(word))
            continue
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{key}: needs a value, --{key}=VALUE")
            text = words.pop(0)
        values[key] = convert(key, parse(key, text), "command line")
        typed.add(key)
    if "data" in typed and "demo_clips" not in typed:
        values["demo_clips"] = 0  # a misspelt --data must not be filled with the demo's corpus
    last = Path(values.get("out", Settings.out), "last.pt")
    resumed = vars(from_checkpoint(load_checkpoint(last)["settings"], last)) if last.exists() else {}
    if values.get("init_from"):
        values = inherit(values, typed, resumed, last)
    s = Settings(**values)
    if "epoch" not in typed and ("steps" in typed or "epoch" not in values):  # the file's epoch may exceed a short run
        s.epoch = resumed.get("epoch") or min(s.epoch, math.ceil(s.steps / 5))
    check(s, processes or world_size())
    return s


def inherit(values, typed, resumed, last):
    """Replace the model's settings in `values` by those of --init_from or, if the run resumes, of OUT/last.pt.

    typed: the names of the settings on the command line, which take precedence. resumed: the settings of `last`, or {}.
    Raises UserError if the run to resume started from another model.
    """
    sources = [Path(path).parent if Path(path).name == "best.pt" else Path(path)
               for path in (values["init_from"], resumed.get("init_from", values["init_from"]))]  # fmt: skip
    if sources[0] != sources[1]:
        raise UserError(f"{last}: this run started from '{resumed['init_from']}', not '{values['init_from']}'; choose"
                        " another --out")  # fmt: skip
    path = str(last) if resumed else values["init_from"]
    saved = resumed or vars(from_checkpoint(load_checkpoint(path)["settings"], path))
    kept = {*typed, *(values.keys() & OTHER_INHERITED), *(("codec_weights",) if "codec" in typed else ())}
    inherited = {key: saved[key] for key in (*MODEL_SETTINGS, *OTHER_INHERITED) if key not in kept}
    for key in {*WEIGHT_FILES} - kept:  # if they were moved, next to either checkpoint
        inherited[key] = find_beside(find_beside(saved[key], path), values["init_from"])
    replaced = [f"{key} = {inherited[key]!r} (config file: {values[key]!r})" for key in inherited.keys() & values.keys()
                if inherited[key] != values[key]]  # fmt: skip
    if replaced and rank() == 0:
        print(f"using the settings of {path}: {', '.join(sorted(replaced))}")
    return values | inherited


def check_same_model(checkpoint, s, ids, path, resumes):
    """Raise UserError if a checkpoint is of another model than `s`; return the other changes, {setting: in words}.

    ids: {"codec": id, "text_encoder": T5's id, or "own"}. resumes: whether the run continues, so that LoRA must be
    equal too. A new run may add a melody or a style to the model.
    """
    before, now = vars(from_checkpoint(checkpoint["settings"], path)), vars(s) | ids
    before |= dict(codec=checkpoint["codec"]["id"], text_encoder=checkpoint.get("text_encoder") or "own")
    changes = {key: f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in now if before.get(key) != now[key]}
    fixed = MODEL_SETTINGS + LORA_SETTINGS if resumes else MODEL_SETTINGS
    unused = [key for key in fixed if key.startswith("style_") and not s.style]
    unused += [key for key in fixed if key.startswith("text_") and key != "text_encoder" and s.text_encoder != "own"]
    added = [] if resumes else [key for key in ("melody", "style") if getattr(s, key) and not before.get(key)]
    added += [key for key in fixed if key.startswith("style_") and "style" in added]
    different = [changes[key] for key in changes if key in fixed and key not in (*unused, *added)]
    if different:
        files = " and ".join(f"--{key}_weights" for key in ids if before[key] != now[key])
        raise UserError(f"{path}: a different model ({', '.join(different)}); use the settings of the checkpoint"
                        f"{files and ', with matching ' + files}, or choose another"
                        f" {'--out' if resumes else '--init_from'}")  # fmt: skip
    return changes


def from_checkpoint(settings, path):
    """Return the Settings of a checkpoint. Missing settings get their defaults. Raises UserError for unknown ones."""
    if unknown := settings.keys() - FIELDS.keys():
        raise UserError(f"{path}: unknown settings {', '.join(sorted(unknown))}; use the code that trained it")
    return Settings(**settings)


def describe_settings():
    """Return the text of --help: each setting, its default and its comment, read from the source above."""
    rows = []
    for line in inspect.getsource(Settings).splitlines():
        if match := re.match(r"    (\w+): \w+ = (.+?)  # (.+)", line):
            rows.append("  --{:<16} {:<12}  {}".format(*match.groups()))
        elif line.startswith("    # "):
            rows.append(f"\n{line.strip('# ')}")
    return "\n".join(rows)
