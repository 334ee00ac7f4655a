"""Trains a MusicGen, top to bottom: restore, then per epoch train, valid, best, evaluate, generate, commit.

    python train.py config/demo.py                   # text to music on a laptop, in twenty minutes
    torchrun --nproc_per_node=8 train.py config/small.py --data=data/music
    torchrun --nproc_per_node=8 train.py config/large.py --data=data/music
    python train.py --help                           # every setting

Ctrl-C saves a checkpoint after the step under way, and the same command resumes from it: on as many processes of a CPU,
bit for bit.
"""

import dataclasses
import faulthandler
import functools
import math
import shlex
import shutil
import signal
import sys
import time
from copy import deepcopy
from pathlib import Path

import common  # before torch, whose threads it tells how to wait

# isort: split
import numpy as np
import torch
from tqdm import tqdm

import config
import data
import metrics
from common import UserError
from demo.corpus import prepare_demo
from log import Log, Terminal, by_codebook, with_perplexity
from model import MusicLM, freeze, merge_lora, refuse_other_weights
from tools import estimate, report

DIVERGED = 100  # nats; blind guessing is ln(card), below 8
MOST_SKIPPED = 16  # steps in a row; float16's loss scale, 2^16 at first, is below 1 then
SAME_MODEL = (  # settings that must not change when a run resumes, or starts with another's weights
    "codec dim heads layers positions pattern delays text_dim text_heads text_layers text_max_tokens melody style"
    " style_dim style_heads style_layers style_codebooks style_bins style_seconds"
).split()
SAME_RUN = "lora_rank lora_targets".split()  # nor these, when it resumes


def learning_rate(step, s):
    """Linear warm-up, then a cosine from `lr` to `min_lr`."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_ema(ema, model, decay, updates):
    """Takes the model's weights into their EMA, another such model, the `updates`-th time, from 1.

    Corrected as in Adam (arXiv:1412.6980): the start leaves no trace. torch's AveragedModel would wait for a GPU.
    """
    weight = (1 - decay) / (1 - decay**updates)
    torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], weight)
    for averaged, buffer in zip(ema.buffers(), model.buffers()):
        averaged.copy_(buffer)


def codebook_weights(s, K):
    """What each codebook's cross-entropy counts in the loss, [K]; their mean is 1."""
    weights = torch.tensor(s.codebook_weights or [1] * K, dtype=torch.float32)
    if len(weights) != K:
        raise UserError(f"codebook_weights: {len(weights)} of them, and the codec has {K} codebooks")
    return weights / weights.mean()


def make_optimizer(model, s):
    """AdamW; weight decay is for matrices only."""
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault(s.weight_decay if p.dim() > 1 else 0.0, []).append(p)
    groups = [dict(params=params, weight_decay=decay) for decay, params in groups.items()]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), fused=True)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr


@torch.no_grad()
def validate(model, batches, device, autocast):
    """Cross-entropy by codebook of held-out batches, each rank its share: [K] with all conditions, [K] with none."""
    total = torch.zeros(3, model.K, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    for batch in batches:
        nothing = model.conditioner.prepare([{}] * len(batch.codes))
        batch, without = batch.to(device), batch._replace(inputs=nothing).to(device)
        with autocast():
            (ce_sum, count), (null_ce_sum, _) = model(*batch), model(*without)
        total += torch.stack([ce_sum, null_ce_sum, count])
    ce_sum, null_ce_sum, count = common.sum_over_ranks(total)
    return (ce_sum / count).tolist(), (null_ce_sum / count).tolist()


def refuse_another_model(saved, s, codec, path, same=SAME_MODEL):
    """Raises UserError where a checkpoint is of another model than this run's -> {what else has changed: in words}."""
    theirs, ours = {**saved["settings"], "codec": saved["codec"]["id"]}, {**vars(s), "codec": codec.id}
    changes = {key: f"{key} was {theirs.get(key)!r}, is {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]}
    other = [changes[key] for key in changes if key in same and (s.style or not key.startswith("style_"))]
    if other:
        instead = "--init_from" if same is SAME_MODEL else "--out"
        raise UserError(f"{path}: another model ({', '.join(other)}); give it the same settings, or another {instead}")
    return changes


def compiles(s, device):
    """Whether blocks are compiled; 'auto' takes it where it pays, in long runs on a GPU, if it can be done there."""
    if s.compile != "auto":
        return s.compile == "always"
    if device.type != "cuda" or s.steps < 1000:
        return False
    if not (can := common.has_compiler(device)):
        print("compile: triton or gcc is missing, so the run goes on without, more slowly")
    return can


def is_due(step, every, s):
    """Whether a stage that comes each `every` epochs, and at the end of the run, comes at this step."""
    return step >= s.steps or (step > 0 and every > 0 and step % (every * s.epoch) == 0)


def request_stop(signals, number, frame):
    """On a signal, remembers it for the next step; a second ctrl-C ends the program at once."""
    if number == signal.SIGINT and number in signals and common.world_size() == 1:  # torchrun sends several
        raise KeyboardInterrupt
    signals.append(number)


def catch_signals():
    """-> a list, to which ctrl-C, SIGTERM and the SIGHUP of a terminal that is closed add their numbers from now on.

    When a program that reads stdout ends, SIGTERM is added.
    """
    signals, numbers = [], [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # not on Windows or under nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        signal.signal(number, functools.partial(request_stop, signals))
    sys.stdout = Terminal(sys.stdout, lambda: signals.append(signal.SIGTERM))
    return signals


@dataclasses.dataclass
class Since:
    """What the next line of the log counts from."""

    start: float = dataclasses.field(default_factory=lambda: time.monotonic())
    waited: float = 0.0  # seconds, for the data
    frames: int = 0
    flops: float = 0.0


def main():
    s = config.load(sys.argv[1:], __doc__)
    device, dtype = common.pick_device(s.device, s.dtype)
    s.device, s.dtype = device.type, str(dtype).removeprefix("torch.")
    device = common.join(device, s.timeout)
    rank, world_size = common.rank(), common.world_size()
    torch.set_flush_denormal(True)
    if device.type == "cpu":
        common.keep_freed_memory()
    out, last, best = Path(s.out), Path(s.out, "last.pt"), Path(s.out, "best.pt")

    # Data
    if s.demo_clips:
        prepare_demo(s.data, s.demo_clips, s.codec, s.codec_weights)
    common.barrier()
    train_data, valid_data = data.Tokens(s.data, "train"), data.Tokens(s.data, "valid")
    codec = data.load_codec(s.data, s.codec, s.codec_weights).to(device)
    unigram = by_codebook("unigram", data.unigram_ce(s.data))

    # Model
    saved = common.load_checkpoint(last, ["last"]) if last.exists() else None
    size_and_mtime = common.size_and_mtime(last)
    if (saved and not s.resume) or (best.exists() and not saved):
        raise UserError(f"{out}: holds a run{'' if saved else ' without last.pt'}; choose another --out, or remove it")
    common.refuse_differences(**vars(s), step_of_last_pt=saved and saved["step"])
    start_from = saved or (common.load_checkpoint(s.init_from) if s.init_from else None)
    tokenizer, changes = data.read_tokenizer(s.data), {}
    if start_from:
        same = SAME_MODEL + SAME_RUN if saved else SAME_MODEL
        changes = refuse_another_model(start_from, s, codec, last if saved else s.init_from, same)
        if start_from["tokenizer"] != tokenizer:
            print(f"captions are tokenized as {last if saved else s.init_from} has it, not by {s.data}'s own tokenizer")
        tokenizer = start_from["tokenizer"]
    torch.manual_seed(s.seed)  # here, as making the data and the codec draws numbers too
    is_sharded = world_size > 1 and s.parallel == "fsdp"
    has_weights = not saved and rank == 0  # else they come from a file, or from rank 0
    with torch.device("cpu" if has_weights else "meta"):  # drawing takes half a minute for small, and 13 GB for large
        model = MusicLM(s, codec.describe(), tokenizer)
    T = model.trained_frames
    least = T // 2 if s.short_every else T
    if not least or not model.pattern(least, training=True, device="cpu").frame_mask.any(1).all():
        raise UserError(f"an item of {least} frames leaves a codebook without a target; lengthen the segment")
    if metrics.clip_frames(s, codec) < 2:
        raise UserError(f"clip_seconds = {s.clip_seconds:g}: clips of less than two frames of the codec; lengthen them")
    if s.style and has_weights:
        model.conditioner.prepended["style"].set_codec(codec)
    if saved:
        refuse_other_weights(model, saved["model"], last)
    elif start_from:
        averaged = merge_lora(start_from["ema"], start_from["settings"])
        refuse_other_weights(model, averaged, s.init_from)
        if has_weights:
            model.load_state_dict(averaged, strict=False)  # LoRA starts anew
    freeze(model, s.freeze)
    common.barrier()  # rank 0 may have drawn for minutes, more than a step may take
    if is_sharded:
        ema = deepcopy(model).eval().requires_grad_(False)
        common.shard(model, device, dtype, s.reshard_after_forward, broadcast=not saved)
        # the EMA has no backward pass, after which its weights would be spread again
        common.shard(ema, device, dtype, True, reshard_rest=True, broadcast=not saved)
        net = model
    else:
        model = model.to(device) if has_weights else model.to_empty(device=device)
        net = common.replicate(model, device) if world_size > 1 else model  # with rank 0's weights
        ema = deepcopy(model).eval().requires_grad_(False)
    if compiles(s, device):
        common.compile_blocks(model, device)
    loss_weights = codebook_weights(s, model.K).to(device)
    optimizer = make_optimizer(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)

    # Restore
    step, skipped, ema_updates = 0, 0, 0
    recent = []  # the losses since the last line of the log, by step and codebook
    if saved:
        common.set_state(model, saved["model"], optimizer, saved["optimizer"])
        common.set_state(ema, saved["ema"])
        scaler.load_state_dict(saved["scaler"] or scaler.state_dict())  # empty unless it was a float16 run
        step, skipped, ema_updates, recent = (saved[key] for key in ("step", "skipped", "ema_updates", "recent"))
        print("; ".join([f"resuming from {last} at step {step}", *changes.values()]))
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        common.lock(out)
        if size_and_mtime != common.size_and_mtime(last):
            raise UserError(f"{out}: another run has saved there meanwhile; start again")
        common.write_json(out / "config.json", vars(s))
        code = common.git("rev-parse", "HEAD") + common.git("status", "--short") + common.git("diff", "HEAD")
        common.write_file(out / f"code_{step:06d}.diff", code.encode())
    log = Log(s, step if saved else -1)
    best_ce = next((line["ce"] for line in reversed(log.history) if line["stage"] == "best"), math.inf)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.1f}M parameters on {world_size} x {common.describe_device(device, dtype)}")
    minutes = train_data.meta["train"]["frames"] / codec.frame_rate / 60
    print(f"{s.data}: {len(train_data.tracks)} tracks, {minutes:.0f} minutes, {len(valid_data.tracks)} tracks held out")
    if (padding := train_data.padding(T)) > 0.01:
        print(f"{padding:.0%} of its items is padding, as tracks are shorter than {s.segment:g} s; lower --segment")
    signals = catch_signals()
    prepare = model.conditioner.prepare
    micro_batch = s.micro_batch or s.batch_size // world_size
    batches = data.loader(data.TrainingSteps(train_data, prepare, T, s, rank, world_size), step, device)
    words = sorted({*train_data.words(), *(start_from or {}).get("words", ())}) if rank == 0 else []  # who alone saves
    described = dict(settings=vars(s), codec=codec.describe(), tokenizer=tokenizer, words=words,
                     data=train_data.meta.get("checksums"))  # in every checkpoint  # fmt: skip
    is_other_data = saved and saved.get("data") not in (None, described["data"])
    if is_other_data:
        print(f"{s.data} holds other data than before: what follows is not what an unbroken run would give")
    if is_other_data or changes.keys() & {"segment", "valid_items"}:
        best_ce = math.inf  # that of other pieces does not compare
    saved = start_from = None  # else the old file, which is mapped, would keep its room on the disk
    flops = functools.cache(model.flops)
    peak = world_size * (common.peak_flops(device, dtype) or math.inf)
    bar = tqdm(total=s.steps, initial=step, desc="training", file=sys.stdout, mininterval=1, smoothing=0.05)
    resumed_at, stopping, skipped_in_a_row, since = step, False, 0, Since()

    while True:
        # 1. Checkpoint, valid, best, evaluate, generate: at the top, as a resumed run does again what a kill cut off.
        #    To commit is to log that all are done; gain is ce without conditions less ce with them
        epoch, ends_epoch = math.ceil(step / s.epoch), step % s.epoch == 0 or step >= s.steps
        if (ends_epoch or stopping) and step > resumed_at:
            faulthandler.cancel_dump_traceback_later()  # from here to the next step, ranks may wait for rank 0
            (weights, moments), (averaged, _) = common.get_state(model, optimizer), common.get_state(ema)
            common.save_checkpoint(last, "last", model=weights, ema=averaged, ema_updates=ema_updates,
                                   optimizer=moments, scaler=scaler.state_dict(), step=step, skipped=skipped,
                                   recent=recent, **described)  # fmt: skip
        if ends_epoch and not stopping and not log.is_committed(step):
            held_out = data.valid_batches(valid_data, prepare, T, micro_batch, s, rank, world_size)
            ce_q, null_ce_q = validate(ema, held_out, device, autocast)
            valid = with_perplexity(by_codebook("ce", ce_q))
            log.stage("valid", step, epoch, **valid, **unigram, gain=float(np.mean(null_ce_q)) - valid["ce"])
            if not valid["ce"] < DIVERGED:
                raise UserError(f"step {step}: valid ce {valid['ce']:g}, it diverged; start again with a lower --lr")
            if 0 < step and valid["ce"] < best_ce:
                best_ce, (averaged, _) = valid["ce"], common.get_state(ema)
                common.save_checkpoint(best, "best", ema=averaged, step=step, ce=best_ce, **described)
                log.stage("best", step, epoch, ce=best_ce)
            if s.evaluate_clips and is_due(step, s.evaluate_every, s):
                log.stage("evaluate", step, epoch, **metrics.evaluate(best, codec, train_data, valid_data, s))
            if s.samples and is_due(step, s.generate_every, s):
                log.stage("generate", step, epoch, clips=metrics.write_samples(best, codec, valid_data, step, s))
            if rank == 0 and step and s.keep_every and epoch % s.keep_every == 0:
                shutil.copyfile(last, out / "step.tmp")
                (out / "step.tmp").replace(out / f"step_{step:06d}.pt")
            log.stage("commit", step, epoch)
            if rank == 0:
                report.write_page(out)
            stopping = any(common.gather(bool(signals)))
        if stopping or step >= s.steps:
            break
        since = Since() if ends_epoch else since

        # 2. Forward and backward, micro-batch by micro-batch, divided by the global count of targets
        if world_size > 1:
            faulthandler.dump_traceback_later(s.timeout, exit=True)
        drawing = time.monotonic()
        micro_batches, scored_items = next(batches)
        since.waited += time.monotonic() - drawing
        targets = model.count_targets(scored_items.to(device, non_blocking=True)).clamp(min=1)
        ce_q = torch.zeros(model.K, device=device)
        model.train()
        for number, batch in enumerate(micro_batches, 1):
            with common.without_sync(net, number == len(micro_batches)):
                with autocast():
                    ce_sum, _ = net(*batch.to(device))  # its own count is not used: the whole batch's is, on all ranks
                loss = (loss_weights * ce_sum / targets).mean()
                scaler.scale(loss * world_size).backward()  # DDP and FSDP average the gradients over the ranks
            ce_q += (ce_sum / targets).detach()
        scaler.unscale_(optimizer)
        grad_norm = common.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf))

        # 3. One small all-reduce, and the only time that the host waits for the device
        signalled = torch.full((1,), float(len(signals)), device=device)
        sums = common.sum_over_ranks(torch.cat([ce_q, signalled]))
        *ce_q, stopping, grad_norm = torch.cat([sums, grad_norm[None]]).tolist()
        step, is_finite = step + 1, math.isfinite(grad_norm)
        skipped += not is_finite
        skipped_in_a_row = 0 if is_finite else skipped_in_a_row + 1
        if not np.mean(ce_q) < DIVERGED or skipped_in_a_row == MOST_SKIPPED:
            raise UserError(f"step {step}: loss {np.mean(ce_q):g}, gradient norm {grad_norm:g}; a lower --lr may help."
                            f" The weights were not touched; any {last} is from an earlier step")  # fmt: skip

        # 4. Learning rate, optimizer, style's codebooks, EMA; nothing changes where the gradient is not finite
        if is_finite:
            set_learning_rate(optimizer, learning_rate(step - 1, s))
            scaler.step(optimizer)
            model.conditioner.update()
            if step % min(s.ema_every, s.epoch, s.steps) == 0:  # as often as it is used, or more
                ema_updates += 1
                update_ema(ema, model, s.ema_decay, ema_updates)
            recent.append(ce_q)
        else:
            model.conditioner.discard()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        # 5. A line of the log
        bar.update()
        since.frames += int(scored_items.sum())
        since.flops += world_size * sum(len(batch.codes) for batch in micro_batches) * flops(len(scored_items))
        if recent and (step % s.log_every == 0 or step == s.steps):
            seconds, losses = time.monotonic() - since.start, by_codebook("ce", np.mean(recent, axis=0))
            line = dict(step=step, epoch=math.ceil(step / s.epoch), **with_perplexity(losses),
                        lr=learning_rate(step - 1, s), grad_norm=grad_norm, skipped=skipped,
                        tokens_per_s=round(since.frames * model.K / seconds),
                        data_wait=round(since.waited / seconds, 4))  # fmt: skip
            if device.type == "cuda":
                line["memory"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)  # GiB, the most so far
            if peak < math.inf:
                line["mfu"] = round(since.flops / seconds / peak, 4)
            log.write("metrics", line)
            bar.set_postfix_str(f"ce {line['ce']:.3f}, grad {grad_norm:.2f}, {line['tokens_per_s']:,} tokens/s")
            recent, since = [], Since()

    bar.close()
    common.leave()
    if step < s.steps or not log.is_committed(step):
        print(f"stopped at step {step}; to resume: {common.launcher()} {shlex.join(sys.argv)}")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])
    print(f"\nlisten: {out / 'index.html'}")
    caption = shlex.quote(data.text_of(valid_data.tracks[0]))
    print(f"try:    python sample.py {best} {caption} --duration {s.clip_seconds or s.segment:g}")


if __name__ == "__main__":
    common.run(main, lambda: estimate.in_one_line(sys.argv[1:]))
