"""torch.compile: whether it works here, its limits, and compiling the blocks of a model."""

import importlib.util
import shutil

import torch

from common import UserError


def has_compiler(device):
    """Return whether torch.compile can generate code for this device."""
    if device.type == "cuda":
        return bool(importlib.util.find_spec("triton")) and any(map(shutil.which, ("gcc", "clang", "cc")))
    return any(map(shutil.which, ("g++", "clang++", "cl")))


def prepare_to_compile(device):
    """Set torch.compile's limits. Raises UserError without a compiler for this device."""
    if not has_compiler(device):
        raise UserError("compile: needs g++ or clang++, and triton on a GPU. Install them, or train with"
                        " --compile=never and sample without --compile")  # fmt: skip
    torch._dynamo.config.recompile_limit = 64  # all blocks share one code object, recompiled for new shapes
    torch._dynamo.config.optimize_ddp = False  # otherwise DDP splits each block into several graphs


def compile_blocks(model, device):
    """Compile each block at its first use. FSDP's hooks stay outside."""
    prepare_to_compile(device)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True)


def is_enabled(s, device):
    """Return whether the settings ask for compiled blocks. 'auto' compiles long runs on a GPU, if a compiler exists."""
    if s.compile != "auto":
        return s.compile == "always"
    if device.type != "cuda" or s.steps < 1000:
        return False
    if not (is_possible := has_compiler(device)):
        print("compile: triton or gcc is missing, so blocks are not compiled and the run is slower")
    return is_possible
