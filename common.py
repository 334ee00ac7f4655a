"""Shared by all programs: one-line errors, files, the device, checkpoints."""

import builtins
import contextlib
import ctypes
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # torch's waiting threads sleep soon; it must be set before torch loads

import filelock
import torch

CHECKPOINT_FORMAT = 3
LOCKS = []  # keeps file locks alive, because a garbage-collected lock is released


class UserError(ValueError):
    """Bad input. The message is one line: the problem, the place, and the remedy to type."""

    def __str__(self):  # escape control characters, so that user input cannot break the line or steer a terminal
        text = super().__str__()
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def first_line(error):
    """Return the message of an exception as one line of at most 100 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:100]


def run(main, out_of_memory_advice=lambda: "use --device cpu if there is that option, or close other programs"):
    """Call a program's main. Bad input ends it with one line and status 2, Ctrl-C with status 130.

    out_of_memory_advice: returns the end of the out-of-memory message: memory by part, and settings that lower it.
    """
    sys.stdout = stdout = sys.stdout or open(os.devnull, "w")  # None if the shell closed it
    if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be UTF-8; terminals may lack letters
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return main()
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except BrokenPipeError:
        message, status = "", 1
    except UserError as error:
        message, status = f"error: {error}", 2
    except OSError as error:  # a full disk, a read-only folder ...
        message, status = f"error: {error.filename or 'a file'}: {error.strerror or first_line(error)}", 2
    except (MemoryError, RuntimeError) as error:
        causes = ("allocate memory", "out of memory", "ALLOC_FAILED")  # a CPU's, CUDA's and cuBLAS's messages
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(x in str(error) for x in causes):
            raise
        request = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        detail = request[0].lower() if request else first_line(error)
        message, status = f"error: out of memory ({detail}); {out_of_memory_advice()}", 2
    finally:
        if hasattr(builtins, "__IPYTHON__"):  # a notebook's process runs other programs next
            sys.stdout = stdout
            LOCKS.clear()
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        time.sleep(3)  # torchrun ends the other ranks once rank 0 ends, so an error of all ranks is printed once
    if message:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(status)  # a normal exit would wait for the other ranks
    sys.exit(status)


def quote(*words):
    """Return words as a command for a shell. Letters that cannot be printed are written as bytes: $'a\\xfcs'."""

    def quote_word(word):
        if word.isprintable():
            return shlex.quote(word)
        letters = re.sub(r"[^\w /.=-]", lambda match: "".join(f"\\x{b:02x}" for b in os.fsencode(match[0])), word)
        return f"$'{letters}'"

    return " ".join(quote_word(str(word)) for word in words)


# --------------------------------------------------------------------------------------------------------- files


def expand_home(word):
    """Replace ~ by the home folder in PATH and in --option=PATH, where a shell keeps it."""
    option, path = re.fullmatch(r"(--\w+=)?(.*)", word, re.DOTALL).groups(default="")
    return option + os.path.expanduser(path) if re.fullmatch(r"~[\w.-]*(/.*)?", path, re.DOTALL) else word


def write_file(path, content):
    """Write to a temporary name, sync and rename: `path` holds the new content completely, or its old content.

    content: bytes, or a function that writes to the open file. Raises UserError if the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save and libsndfile turn disk errors into RuntimeErrors
        size = f"; {temporary.stat().st_size:,} bytes were written" if temporary.is_file() else ""
        free = f", {shutil.disk_usage(path.parent).free:,} are free" if size else ""
        with contextlib.suppress(OSError):
            temporary.unlink()
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(
            f"{path}: cannot be written ({reason}{size}{free}). Free disk space or choose another folder;"
            " an older file of this name is unchanged"
        ) from None


def to_json(value, **options):
    """Return `json.dumps`, with null for inf and nan, which JSON lacks."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), **options)


def write_json(path, value):
    text = to_json(value, indent=1, ensure_ascii=False) + "\n"
    write_file(path, text.encode(errors="backslashreplace"))  # file names need not be UTF-8; JSON has the same escapes


def size_and_mtime(path):
    """Return (size, mtime) to detect a changed file, or None for a missing file or a broken link."""
    try:
        info = os.stat(path)
        return info.st_size, info.st_mtime_ns
    except OSError:
        return None


def checkpoint_path(path):
    """Return the file of a checkpoint. A run's folder means its best.pt."""
    return Path(path, "best.pt") if Path(path).is_dir() else Path(path)


def find_beside(file, checkpoint):
    """Return `file` or, if it no longer exists because the run was moved, its namesake next to the checkpoint."""
    moved = checkpoint_path(checkpoint).parent / Path(file).name
    return str(moved) if file and not Path(file).exists() and moved.exists() else file


def drop_output(stream):
    """Redirect a stream to /dev/null, after its reader closed the pipe."""
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), stream.fileno())


def git(*command):
    """Return the output of a git command about this code, or "" without git."""
    try:
        return subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True,
                              errors="replace").stdout  # fmt: skip
    except OSError:
        return ""


def describe_code(limit=10**6):
    """Return commit, changes and diff of this folder's Python files, at most `limit` bytes.

    Other files may hold secrets, such as those of a larger repository that contains this folder.
    """
    files = ("--", "*.py")
    changes = git("status", "--short", *files) + git("diff", "--no-ext-diff", "--no-color", "HEAD", *files)
    return (git("rev-parse", "HEAD") + changes).encode()[:limit]


def lock(folder):
    """Lock a folder until this process ends. Raises UserError if another process holds the lock."""
    LOCKS.append(filelock.FileLock(Path(folder, ".lock")))
    try:
        LOCKS[-1].acquire(blocking=False)
    except filelock.Timeout:
        raise UserError(f"{folder}: in use by another run; wait for it, or choose another --out") from None
    except (OSError, NotImplementedError):  # a file system without locks
        pass


# -------------------------------------------------------------------------------------------------------- device


def pick_device(name="auto", dtype="auto"):
    """Return (device, dtype). 'auto' is the accelerator, if any, and bfloat16 where the hardware supports it.

    For a GPU this also sets the torch switches that these models need.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    available = [accelerator.type, "cpu"] if accelerator else ["cpu"]
    name = available[0] if name == "auto" else name
    if name not in available:
        raise UserError(f"device = '{name}': not on this machine; choose {' or '.join(available)}")
    if name == "cuda":
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # before the first allocation
        torch.set_float32_matmul_precision("high")  # TF32 for products that autocast leaves in float32
        torch.backends.cuda.enable_cudnn_sdp(False)  # NaN gradients under some masks on H100 (pytorch issue 196678)
    if dtype == "auto":
        dtype = "bfloat16" if has_fast_bfloat16(name) else "float32"
    if dtype == "bfloat16" and name == "cuda" and not has_fast_bfloat16(name):
        raise UserError("dtype = 'bfloat16': this GPU only emulates it; use --dtype=float16 or --dtype=auto")
    return torch.device(name), getattr(torch, dtype)


def describe_device(device, dtype):
    """Return device, threads and dtype in words: 'cpu (2 threads) in bfloat16'."""
    n = torch.get_num_threads()
    threads = f" ({n} thread{'s' * (n > 1)})" if device.type == "cpu" else ""
    return f"{device.type}{threads} in {str(dtype).removeprefix('torch.')}"


def keep_freed_memory():
    """Make the C library keep freed memory, because returning it to the system at each step is slow."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: allocate every tensor on the heap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: never shrink the heap


def has_fast_bfloat16(device_type):
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpu = torch.cpu.get_capabilities() if device_type == "cpu" else {}
    return cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)


# --------------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(path, kind, **state):
    """Write a checkpoint. kind: 'last', to resume from, or 'best', for use. Raises UserError on disk errors."""
    write_file(Path(path), lambda file: torch.save({"nanomusicgen": CHECKPOINT_FORMAT, "kind": kind, **state}, file))


def load_checkpoint(path, kinds=("last", "best")):
    """Load what `save_checkpoint` wrote, memory-mapped. `path`: the file, or a run's folder, which means its best.pt.

    Raises UserError for a missing, broken or foreign file.
    """
    path = checkpoint_path(path)
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train one with: python train.py config/demo.py, or import one"
                        " with: python -m tools.convert import")  # fmt: skip
    is_utf8 = str(path) == str(path).encode(errors="replace").decode()  # torch cannot map files of other names
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=is_utf8)
    except PermissionError:
        raise UserError(f"{path}: permission denied; change its permissions") from None
    except Exception as error:
        raise UserError(f"{path}: truncated or not a checkpoint ({first_line(error)}); use another one") from None
    if not isinstance(saved, dict) or "nanomusicgen" not in saved:
        raise UserError(f"{path}: not a nanoMusicGen checkpoint; pass the best.pt of a run")
    if saved["nanomusicgen"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path}: checkpoint format {saved['nanomusicgen']}, but this code reads format"
                        f" {CHECKPOINT_FORMAT}; train it again")  # fmt: skip
    if saved.get("kind") not in kinds:
        raise UserError(f"{path}: a '{saved.get('kind')}' checkpoint; pass a '{kinds[0]}' one, such as {kinds[0]}.pt")
    return saved
