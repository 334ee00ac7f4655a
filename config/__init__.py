"""Every setting with its default, and the loader.

A config file is Python that assigns some of the settings, and may begin with `from config.small import *`.
On the command line `--key=value` or `--key value` overrides it:

    python train.py config/demo.py --steps=200 --lr 1e-3
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path


class UserError(ValueError):
    """Bad input. The message is one line that says what was wrong, where, and what to do."""

    def __str__(self):  # of what was typed or read, nothing may break the line or steer a terminal
        text = super().__str__()
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def first_line(error):
    """What an exception says, on one line of at most 100 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


@dataclass
class Settings:
    # The run
    out: str = "out/run"  # folder for checkpoints, logs and samples
    resume: bool = True  # go on from OUT/last.pt where there is one; False refuses to write over it
    init_from: str = ""  # a new run begins with the weights of a best.pt, or musicgen:PATH; unlike resuming, at step 0
    seed: int = 0  # fixes the weights, the batches and every dropout draw
    device: str = "auto"  # cuda, mps, cpu, or auto: the first of them that is there
    dtype: str = "auto"  # float32, bfloat16, float16, or auto: bfloat16 where the device computes in it
    compile: str = "auto"  # the blocks: always, never, or auto: on GPUs, for 1000 steps or more; it takes a minute
    parallel: str = "ddp"  # several processes: ddp, weights on each; fsdp, weights, EMA and optimizer spread over them
    reshard_after_forward: bool = True  # fsdp: free a block's weights until its backward; False: more memory, faster
    activation_checkpointing: bool = False  # compute each block again in the backward pass, to save memory
    watchdog: float = 600.0  # seconds without progress after which a run of several processes is ended; 0: never
    # Data
    data: str = "data/demo"  # folder made by `python data.py prepare`
    demo_clips: int = 0  # where DATA is missing, synthesise the demo's corpus of so many clips and prepare it
    codec: str = "tiny"  # tiny, encodec_24khz[:1.5|3|6|12] (kbps) or musicgen_32khz; any with :stereo
    codec_weights: str = ""  # file or folder with the codec's weights; empty: shipped or downloaded
    segment: float = 8.0  # seconds of music in a training item; shorter tracks are padded
    batch_size: int = 8  # items in one optimizer step, over all processes
    one_batch: bool = False  # train on the first batch again and again, whose loss must go to zero
    micro_batch: int = 0  # items that one device holds at once, gradients accumulate over them; 0: its whole share
    # Model
    dim: int = 256  # width D
    heads: int = 4  # attention heads; divides dim
    layers: int = 6  # blocks
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
    style_books: int = 6  # residual codebooks that its output passes
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
    steps: int = 1000  # optimizer steps in the whole run
    lr: float = 1e-3  # peak learning rate
    min_lr: float = 0.0  # learning rate at the end of the cosine
    warmup: int = 100  # steps of linear warm-up
    weight_decay: float = 0.1  # AdamW's, on matrices only
    beta1: float = 0.9  # AdamW
    beta2: float = 0.95  # AdamW
    clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    ema_decay: float = 0.99  # of the averaged weights that validation and generation use; 0: no averaging
    ema_every: int = 1  # steps between updates of that average
    # The cycle
    epoch: int = 500  # steps in an epoch; after each: commit, validate, keep the best
    keep_every: int = 0  # epochs between commits that are kept for good, as step_NNNNNN.pt; 0: none
    valid_items: int = 256  # held-out segments validated after each epoch; 0: all
    generate_every: int = 1  # epochs between sample rounds; 0: only at the end
    samples: int = 4  # clips in a sample round, for held-out captions
    evaluate_every: int = 0  # epochs between evaluations by metrics.py; 0: only at the end
    evaluate_clips: int = 60  # held-out captions that an evaluation generates; 0: no evaluation
    log_every: int = 10  # steps between lines of metrics.jsonl
    estimate: int = 0  # print what the run would take on so many processes (memory, time), and end; alone: on one
    mfu: float = 0.4  # share of the device's peak that the estimate takes for granted
    logger: str = ""  # tensorboard or wandb, where it is installed; metrics.jsonl is written anyway
    # Generation
    cfg: float = 3.0  # guidance; 1 switches it off
    cfg_beta: float = 1.0  # how much more the text counts than the style, where both are given; 1: as much
    temperature: float = 1.0  # 0 takes the likeliest code
    top_k: int = 250  # sample among so many codes; 0: all
    top_p: float = 0.0  # sample within this probability mass instead; 0: off


FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "compile": ("auto", "always", "never"),
    "parallel": ("ddp", "fsdp"),
    "pattern": ("delay", "parallel", "unrolled"),
    "logger": ("", "tensorboard", "wandb"),
}
SWITCHES = ("estimate",)  # that may stand without a value
NOT_NEGATIVE = (
    "estimate seed demo_clips micro_batch min_lr warmup weight_decay clip valid_items keep_every generate_every samples"
    " evaluate_every evaluate_clips watchdog temperature top_k lora_rank"
)
POSITIVE = (
    "segment batch_size dim heads layers text_dim text_heads text_layers text_max_tokens style_dim style_heads"
    " style_layers style_books style_bins steps lr ema_every epoch log_every mfu"
)
PROBABILITIES = (
    "cfg_dropout text_dropout melody_dropout style_dropout merge_text_p word_dropout beta1 beta2 ema_decay top_p"
)


def nearest(name, names):
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else "; see --help"


def checked(key, value, where):
    """`value` as the type of the setting `key`; raises UserError for a key or a type that is not one."""
    if key not in FIELDS:
        raise UserError(f"{where}: unknown setting '{key}'{nearest(key, FIELDS)}")
    kind = FIELDS[key].type
    if kind is float and type(value) is int:
        value = float(value)
    if kind is tuple and type(value) is str:
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    if kind is tuple and type(value) in (list, int):
        value = tuple(value) if type(value) is list else (value,)
    if type(value) is not kind:
        raise UserError(f"{where}: {key} must be {kind.__name__}, not {value!r}")
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
    return {key: checked(key, value, path) for key, value in public.items()}


def from_text(key, text):
    """The value of one setting as typed on the command line."""
    if key in FIELDS and FIELDS[key].type is str:
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def validate(s):
    """Refuses values that no run could use."""
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
    if s.lora_rank and not s.lora_targets:
        raise UserError("lora_targets: none, though lora_rank is set; qkv,attn_out is usual")
    numbers = all(type(value) in (int, float) for value in s.style_seconds)
    if not (numbers and len(s.style_seconds) == 2 and 0 < s.style_seconds[0] <= s.style_seconds[1]):
        raise UserError(f"style_seconds = {s.style_seconds}: must be the shortest and the longest, 1.5,4.5")
    if s.ema_decay == 1:
        raise UserError("ema_decay = 1: an average that never changes; 0.99 is usual")
    check_sizes(s.batch_size, s.micro_batch, s.estimate or int(os.environ.get("WORLD_SIZE", 1)))
    return s


def check_sizes(batch_size, micro_batch, processes):
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


def load(argv, usage):
    """argv (without the program) -> Settings: config files first, in turn, then `--key=value` and `--key value`."""
    values, typed, words = {}, set(), list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print(usage + "\n\n" + table())
            sys.exit(0)
        if not word.startswith("--"):
            values.update(from_file(word))
            continue
        key, equals, text = word[2:].partition("=")
        if not equals:
            alone = not words or words[0].startswith("--") or (key in SWITCHES and not words[0].isdigit())
            if alone and key not in SWITCHES:
                raise UserError(f"--{key}: needs a value, --{key}=VALUE")
            text = "1" if alone else words.pop(0)
        values[key] = checked(key, from_text(key, text), "command line")
        typed.add(key)
    if "data" in typed and "demo_clips" not in typed:
        values["demo_clips"] = 0  # who names their own data and mistypes it must not get the demo's
    return validate(Settings(**values))


def table():
    """Every setting, its default and its comment, read from the source above."""
    rows = []
    for line in inspect.getsource(Settings).splitlines():
        if match := re.match(r"    (\w+): \w+ = (.+?)  # (.+)", line):
            rows.append("  --{:<16} {:<12}  {}".format(*match.groups()))
        elif line.startswith("    # "):
            rows.append(f"\n{line.strip('# ')}")
    return "\n".join(rows)


def refuse_unwritable(path, setting):
    """Raises UserError if no files could be written into the folder `path`, which need not be there yet."""
    there = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "may not be written to" if there.is_dir() else "is a file"
        raise UserError(f"{setting} {path}: cannot be written to, {there} {why}; choose another folder")


def lock(folder):
    """Raises UserError if another process on this machine holds the folder; it is held until this one ends."""
    try:
        import fcntl
    except ImportError:  # not on this system
        return None
    file = open(Path(folder) / ".lock", "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another run is under way there; wait for it, or choose another --out") from None
    except OSError:  # a file system without locks
        pass
    return file


def write_file(path, content):
    """Writes bytes under a temporary name first, so that the file is always whole; raises UserError if it cannot."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path}: cannot be written ({error.strerror}); make room, or choose another folder") from None


def run(main, first_to_report=lambda message: True, exit=sys.exit):
    """Calls a program's main; bad input ends it with one line and status 2, ctrl-C with status 130.

    first_to_report: of a message, whether this process is the one to print it.  exit: ends this process.
    """
    program = Path(sys.argv[0]).name
    try:
        main()
    except BrokenPipeError:
        exit(1)
    except (UserError, OSError) as error:  # an OSError: a full disk, a folder that may not be written ...
        message = (
            f"{error.filename or 'a file'}: {error.strerror or error}" if isinstance(error, OSError) else str(error)
        )
        if first_to_report(message):
            print(f"{program}: error: {message}", file=sys.stderr, flush=True)
        exit(2)
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        exit(130)
