"""A run's checkpoints on disk: last.pt, to go on from, and best.pt, for use. Each is whole or not there."""

import os
import shutil
import zipfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

import distributed
from config import UserError, first_line

CHECKPOINT_FORMAT = 2


class WatchedFile:
    """A file that beats at each write, so that the watchdog sees a long save go on; the last `sync` is short."""

    def __init__(self, file):
        self.file, self.unsynced, self.error = file, 0, None

    def write(self, content):
        distributed.beat("saving")
        try:
            self.unsynced += self.file.write(content)
            if self.unsynced > 2**28:
                self.sync()
        except OSError as error:  # which torch.save would turn into another
            self.error = error
            raise
        return len(content)

    def flush(self):
        self.file.flush()

    def sync(self):
        self.flush()
        os.fsync(self.file.fileno())
        self.unsynced = 0


def save_checkpoint(path, kind, **state):
    """Writes to a temporary name, syncs, renames: whatever happens, `path` holds a whole checkpoint or the old one."""
    path, temporary, watched = Path(path), Path(path).with_suffix(".tmp"), None
    try:
        with open(temporary, "wb") as file:
            watched = WatchedFile(file)
            torch.save({"nanomusicgen": CHECKPOINT_FORMAT, "kind": kind, **state}, watched)
            watched.sync()
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        reason = first_line(watched and watched.error or error)
        temporary.unlink(missing_ok=True)
        tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        before = "the one before it is whole" if path.exists() else "there is none before it"
        raise UserError(
            f"{path}: cannot be written ({reason}); {needed:,} bytes and some more are needed, and {free:,} are free"
            f" there. Mend that, start again; {before}"
        ) from None


def refuse_wrong_checksums(path):
    """Reads it all, as torch.load does not look at the checksums that torch.save writes; raises BadZipFile."""
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as content:
                while content.read(2**24):
                    distributed.beat("checking the checkpoint")


def read_checkpoint(path, kind):
    """The dict that `save_checkpoint` wrote; raises UserError for a file that is missing, broken or not ours."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; train one with: python train.py config/demo.py")
    try:
        if distributed.rank() == 0:
            refuse_wrong_checksums(path)
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise UserError(
            f"{path}: truncated, or not a checkpoint ({first_line(error)}); make it again, or go back to an older one"
        ) from None
    if not isinstance(saved, dict) or "nanomusicgen" not in saved:
        raise UserError(f"{path}: not a checkpoint of nanoMusicGen; give the best.pt of a run")
    if saved["nanomusicgen"] > CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: format {saved['nanomusicgen']}, newer than this code's {CHECKPOINT_FORMAT}; update the code"
        )
    if kind == "last" and saved["nanomusicgen"] < 2:
        raise UserError(
            f"{path}: format 1, of an older version of this code, which alone can go on from it; to begin a new run"
            f" with its weights: --init_from={Path(path).with_name('best.pt')} and another --out"
        )
    if saved["kind"] != kind:
        raise UserError(f"{path}: is a '{saved['kind']}' checkpoint, and '{kind}' is needed; try {kind}.pt beside it")
    return saved
