"""Train a MusicGen. Each epoch: train, checkpoint, valid, best, evaluate, generate, commit.

    python train.py config/demo.py                   # text to music on a laptop, in twenty minutes
    torchrun --nproc_per_node=8 train.py config/small.py --data=data/music
    torchrun --nproc_per_node=8 train.py config/large.py --data=data/music
    python train.py --help                           # every setting

Ctrl-C saves a checkpoint after the current step, and the same command resumes from it: bit for bit on a CPU, if the
number of processes is the same.
"""

# This file reads from top to bottom: the state, optimization, setup in the order in which it runs, validation and the
# end of an epoch, one training step, the loop. `s` is the config.Settings. K is the number of codebooks.

import faulthandler
import functools
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import common  # before torch; it sets GOMP_SPINCOUNT
import distributed

# isort: split
import numpy as np
import torch
from tqdm import tqdm

import config
import data
import metrics
from common import UserError
from conditioning import to_device
from dataprep import shards
from demo.corpus import prepare_demo
from distributed import rank, world_size
from extras import compiler
from extras.t5 import load_encoder
from log import Interval, Log, by_codebook, error_over_tracks, with_perplexity
from model import MusicLM, check_weights, freeze
from tools import estimate, report
from tools.published import read_t5_tokenizer
from tools.signals import catch_signals

DIVERGED = 100  # nats; a uniform guess has ln(card), which is below 8
MAX_SKIPPED = 16  # skipped steps in a row, after which float16's initial loss scale of 2^16 is 1
SAVED_FIELDS = "step skipped ema_updates recent epoch_ce epoch_steps".split()  # of TrainState, in last.pt


@dataclass
class TrainState:
    """The state that a training step reads and changes."""

    device: torch.device
    model: MusicLM
    net: torch.nn.Module  # the model, or its DDP wrapper
    ema: MusicLM  # exponential moving average of the model's weights, for validation and generation
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    autocast: Callable  # returns the context of the forward pass
    loss_weights: torch.Tensor  # [K], mean 1
    step: int = 0
    skipped: int = 0  # steps without an update, because the gradient was not finite
    skipped_in_a_row: int = 0
    ema_updates: int = 0
    recent: list = field(default_factory=list)  # [K] cross-entropies of each step since the last log line
    epoch_ce: list = field(default_factory=list)  # [K] sums over the steps of the epoch
    epoch_steps: int = 0


# -------------------------------------------------------------------------------------------------- optimization


def learning_rate(step, s):
    """Linear warm-up, then a cosine from `lr` to `min_lr`."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def codebook_weights(s, K):
    """Return the weight of each codebook in the loss, [K], with mean 1."""
    weights = torch.tensor(s.codebook_weights or [1] * K, dtype=torch.float32)
    if len(weights) != K:
        raise UserError(f"codebook_weights: {len(weights)} numbers, but the codec has {K} codebooks; pass {K}")
    return weights / weights.mean()


def make_optimizer(model, s):
    """AdamW; weight decay applies to matrices only."""
    groups = {}
    for p in model.parameters():
        if p.requires_grad:
            groups.setdefault(s.weight_decay if p.dim() > 1 else 0.0, []).append(p)
    groups = [dict(params=params, weight_decay=decay) for decay, params in groups.items()]
    return torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), fused=True)


@torch.no_grad()
def update_ema(state, s):
    """Update the EMA every `ema_every` steps, with Adam's bias correction (arXiv:1412.6980).

    torch's AveragedModel would make the host wait for the GPU.
    """
    if state.step % min(s.ema_every, s.epoch, s.steps):  # at least once per epoch
        return
    state.ema_updates += 1
    weight = (1 - s.ema_decay) / (1 - s.ema_decay**state.ema_updates)
    torch._foreach_lerp_([*state.ema.parameters()], [*state.model.parameters()], weight)
    for averaged, buffer in zip(state.ema.buffers(), state.model.buffers()):
        averaged.copy_(buffer)


# --------------------------------------------------------------------------------------------------------- setup


def setup_device(s):
    """Replace 'auto' in the settings, join the other ranks and check that they agree: return (device, dtype)."""
    device, dtype = common.pick_device(s.device, s.dtype)
    s.device, s.dtype = device.type, str(dtype).removeprefix("torch.")
    torch.set_flush_denormal(True)  # denormal numbers are slow on a CPU
    if device.type == "cpu":
        common.keep_freed_memory()
    device = distributed.init_distributed(device, s.timeout)
    distributed.check_same_on_all_ranks(**vars(s))
    return device, dtype


def load_data(s, device):
    """Return (training data, validation data, codec). Synthesizes the demo's data if they are missing."""
    if s.demo_clips:
        prepare_demo(s.data, s.demo_clips, s.codec, s.codec_weights)
    distributed.barrier()  # rank 0 writes the demo's data
    codec = shards.load_matching_codec(s.data, s.codec, s.codec_weights).to(device)
    return data.TokenDataset(s.data, "train"), data.TokenDataset(s.data, "valid"), codec


class Start(NamedTuple):
    """The starting point of a run: OUT/last.pt to resume, the weights of --init_from, or nothing."""

    checkpoint: dict | None
    signature: tuple | None  # size and mtime of last.pt
    resumes: bool
    changes: dict  # {setting: its change in words}
    trained: set  # hashes of all tracks that the checkpoint was trained on


def find_start(s, codec):
    """Load the checkpoint to start from and check that it fits the settings."""
    out, last = Path(s.out), Path(s.out, "last.pt")
    signature, resumes = common.size_and_mtime(last), last.exists()
    if (resumes and not s.resume) or (Path(s.out, "best.pt").exists() and not resumes):
        raise UserError(
            f"{out}: holds a run{'' if resumes else ' without last.pt'}; choose another --out or remove the folder"
        )
    path = last if resumes else s.init_from
    checkpoint = common.load_checkpoint(path, ["last"] if resumes else ["best", "last"]) if path else None
    distributed.check_same_on_all_ranks(step_of_last_pt=resumes and checkpoint["step"])  # disks may differ
    if not checkpoint and s.lora_rank:
        raise UserError(f"lora_rank = {s.lora_rank}: needs --init_from, the model to adapt, such as demo/demo.pt")
    if not checkpoint:
        return Start(None, signature, False, {}, set())
    text_encoder = load_encoder(s.text_encoder_weights).id if s.text_encoder == "t5" else "own"
    changes = config.check_same_model(checkpoint, s, dict(codec=codec.id, text_encoder=text_encoder), path, resumes)
    trained = set(checkpoint["train_tracks"].tolist()) if "train_tracks" in checkpoint else set()
    return Start(checkpoint, signature, resumes, changes, trained)


def build_model(s, codec, start):
    """Build the model. Rank 0 of a new run initializes weights. Others are on "meta" and receive theirs later."""
    if s.text_encoder == "t5":
        tokenizer = start.checkpoint["tokenizer"] if start.checkpoint else read_t5_tokenizer(s.text_encoder_weights)
    else:
        tokenizer = shards.read_tokenizer(s.data)
    if start.checkpoint and start.checkpoint["tokenizer"] != tokenizer:
        print(f"using the tokenizer of the checkpoint, not the one in {s.data}")
        tokenizer = start.checkpoint["tokenizer"]
    torch.manual_seed(s.seed)  # here, because synthesizing data and loading the codec draw random numbers too
    has_weights = rank() == 0 and not start.resumes
    with torch.device("cpu" if has_weights else "meta"):  # initializing takes 30 s for small, and 13 GB for large
        model = MusicLM(s, codec.info(), tokenizer)
    if metrics.clip_frames(s, codec) < 2:
        raise UserError(f"clip_seconds = {s.clip_seconds:g}, segment = {s.segment:g}: fewer than 2 frames of the codec;"
                        " use longer clips")  # fmt: skip
    if s.style and has_weights:
        model.conditioner.prepended["style"].set_codec(codec)
    if start.resumes:
        check_weights(model, start.checkpoint["model"], Path(s.out, "last.pt"))
    elif start.checkpoint:
        from extras.lora import merge_lora

        weights = merge_lora(start.checkpoint["ema"], start.checkpoint["settings"])
        added = [f"conditioner.prepended.{name}." for name in ("melody", "style") if name in start.changes]
        check_weights(model, weights, s.init_from, may_be_missing=[".lora_", *added])
        if has_weights:
            model.load_state_dict(weights, strict=False)  # new LoRA matrices keep their initial values
    freeze(model, s.freeze)
    return model


def wrap_model(model, s, device, dtype, resumes):
    """Put the model on the device, with DDP or FSDP if there are several ranks: return (model, net, EMA)."""
    distributed.barrier()  # rank 0 may have initialized weights for minutes, longer than a step may take
    if world_size() > 1 and s.parallel == "fsdp":
        ema = deepcopy(model).eval().requires_grad_(False)
        distributed.shard(model, device, dtype, s.reshard_after_forward, broadcast=not resumes)
        # the EMA has no backward pass, so its gathered weights are freed right after each forward pass
        distributed.shard(ema, device, dtype, True, reshard_rest=True, broadcast=not resumes)
        net = model
    else:
        model = model.to_empty(device=device) if next(model.parameters()).is_meta else model.to(device)
        net = distributed.replicate(model, device) if world_size() > 1 else model  # DDP sends rank 0's weights
        ema = deepcopy(model).eval().requires_grad_(False)
    if compiler.is_enabled(s, device):
        compiler.compile_blocks(model, device)
    return model, net, ema


def make_state(model, net, ema, s, device, dtype):
    """Return the TrainState of a new run."""
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    loss_weights = codebook_weights(s, model.K).to(device)
    return TrainState(device=device, model=model, net=net, ema=ema, optimizer=make_optimizer(model, s), scaler=scaler,
                      autocast=autocast, loss_weights=loss_weights, epoch_ce=[0.0] * model.K)  # fmt: skip


def restore(state, start, s):
    """Load last.pt into the state."""
    saved = start.checkpoint
    distributed.set_state(state.model, saved["model"], state.optimizer, saved["optimizer"])
    distributed.set_state(state.ema, saved["ema"])
    state.scaler.load_state_dict(
        saved["scaler"] or state.scaler.state_dict()
    )  # {} if the saved run did not use float16
    for key in SAVED_FIELDS:
        setattr(state, key, saved.get(key, getattr(state, key)))  # checkpoints of older code have no epoch means
    finished = f"{s.out}: finished at step {state.step}; raise --steps to train further"
    resumes = f"resuming from {s.out}/last.pt at step {state.step}"
    print("; ".join([resumes if state.step < s.steps else finished, *start.changes.values()]))


def start_run(s, state, codec, train_data, valid_data, start):
    """Lock OUT, write config.json and the code's diff, open the log: return (log, constant part of the checkpoints)."""
    if rank() == 0:
        Path(s.out).mkdir(parents=True, exist_ok=True)
        common.lock(s.out)
        if start.signature != common.size_and_mtime(Path(s.out, "last.pt")):
            raise UserError(f"{s.out}: another run has saved last.pt meanwhile; run the command again")
        common.write_json(Path(s.out, "config.json"), vars(s))
        common.write_file(Path(s.out, f"code_{state.step:06d}.diff"), common.describe_code())
    saved = start.checkpoint or {}
    has_words = rank() == 0 and s.text_encoder == "own"  # only rank 0 saves; for T5, words are not reported
    words = sorted({*train_data.words(), *saved.get("words", ())}) if has_words else []
    checkpoint_info = dict(settings=vars(s), codec=codec.info(), words=words, data=train_data.meta.get("checksums"),
                           text_encoder=state.model.conditioner.text_encoder_id,
                           tokenizer=state.model.conditioner.text.tokenizer_model,
                           train_tracks=torch.tensor(sorted(start.trained | train_data.track_hashes())))  # fmt: skip
    log = Log(s, state.step if start.resumes else -1)  # -1 drops an old log
    data_changed = start.resumes and saved.get("data") not in (None, checkpoint_info["data"])
    if data_changed:
        print(f"{s.data} has changed since {s.out}/last.pt, so results will differ from an uninterrupted run's")
    if start.resumes and state.step < s.steps and (data_changed or start.changes.keys() & {"segment", "valid_items"}):
        log.restart(state.step)  # validation losses on different music do not compare
    if n_leaked := len((start.trained - train_data.track_hashes()) & valid_data.track_hashes()):
        print(f"{n_leaked} of {len(valid_data.tracks)} held-out tracks were trained on before, so the validation loss"
              " is too low; prepare with the --valid_fraction of that training, or use other weights")  # fmt: skip
    return log, checkpoint_info


def print_sizes(s, state, train_data, valid_data, dtype):
    """Print the sizes of model and data."""
    model, minutes = state.model, train_data.meta["train"]["frames"] / train_data.frame_rate / 60
    where = common.describe_device(state.device, dtype)
    total = sum(p.numel() for p in model.parameters()) / 1e6
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"{total:.1f}M parameters, {trained:.1f}M of them trained, on {world_size()} x {where}")
    print(f"{s.data}: {len(train_data.tracks)} tracks, {minutes:.0f} minutes, {len(valid_data.tracks)} tracks held out")
    if (padding := train_data.padding_share(model.trained_frames)) > 0.01:
        print(f"{padding:.0%} of items is padding, because tracks are shorter than {s.segment:g} s; lower --segment")


# ------------------------------------------------------------------------------------------------------ training


def save_last(state, s, checkpoint_info):
    """Write OUT/last.pt, to resume from."""
    weights, moments = distributed.get_state(state.model, state.optimizer)
    counters = {key: getattr(state, key) for key in SAVED_FIELDS}
    distributed.save_on_rank_0(Path(s.out, "last.pt"), "last", model=weights, optimizer=moments,
                                ema=distributed.get_state(state.ema)[0], scaler=state.scaler.state_dict(), **counters,
                                **checkpoint_info)  # fmt: skip


@torch.no_grad()
def validate(model, batches, device, autocast):
    """Return (ce [K] with all conditions, ce [K] without, standard error of the gain or None, number of tracks).

    The gain is the mean ce without conditions minus the mean ce with them. Its error is over the held-out tracks,
    because the items of one track resemble one another.
    """
    total = torch.zeros(3, model.K, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    names, gains = [], []  # the track, and (gain in nats, frames), of each item
    for batch, tracks in batches:
        null_tensors = to_device(model.conditioner.tokenize([{}] * len(batch.codes)), device)
        codes, not_padding, in_loss, condition_tensors, targets = batch.to(device)
        with autocast():
            ce = model(codes, not_padding, in_loss, condition_tensors, per_item=True)
            null_ce = model(codes, not_padding, in_loss, null_tensors, per_item=True)
        total += torch.stack([ce.sum(0), null_ce.sum(0), targets])
        names += tracks
        gains.append(torch.stack([(null_ce - ce).sum(1), in_loss.sum(1)], 1))
    ce_sum, null_ce_sum, targets = np.array(distributed.sum_over_ranks(total).tolist())
    items = sum(distributed.gather([*zip(names, torch.cat(gains).tolist())]), [])
    error, n_tracks = error_over_tracks(items)
    gain_se = None if error is None else error / targets.sum()
    return (ce_sum / targets).tolist(), (null_ce_sum / targets).tolist(), gain_se, n_tracks


def is_due(step, every, s):
    """Return whether a stage that runs every `every` epochs, and at the end of the run, runs at this step."""
    return step >= s.steps or (step > 0 and every > 0 and step % (every * s.epoch) == 0)


def end_of_epoch(state, codec, train_data, valid_data, unigram, checkpoint_info, log, s):
    """Log the epoch's training loss, validate, save best.pt if it improved, evaluate, generate samples, commit.

    A run that was killed here repeats all of them. Step 0 validates the untrained model. The logged `gain` is the
    validation ce without conditions minus the ce with conditions.
    """
    step, epoch, best = state.step, math.ceil(state.step / s.epoch), Path(s.out, "best.pt")
    if state.epoch_steps:
        mean_ce_q = np.divide(state.epoch_ce, state.epoch_steps)
        log.stage("train", step, epoch, **with_perplexity(by_codebook("ce", mean_ce_q)))
    batch_size = s.micro_batch or s.batch_size // world_size()
    held_out = data.valid_batches(valid_data, state.ema, batch_size, s, rank(), world_size())
    ce_q, null_ce_q, gain_se, n_tracks = validate(state.ema, held_out, state.device, state.autocast)
    valid = with_perplexity(by_codebook("ce", ce_q))
    gain = float(np.mean(null_ce_q)) - valid["ce"]
    log.stage("valid", step, epoch, **valid, **unigram, gain=gain, gain_se=gain_se, tracks=n_tracks)
    if not valid["ce"] < DIVERGED:
        raise UserError(f"step {step}: valid ce {valid['ce']:g}, it diverged; start again with a lower --lr")
    is_missing = not distributed.gather(best.exists())[0]  # removed; the stages below read it
    if step > 0 and (valid["ce"] < log.best_ce or is_missing):
        log.best_ce = valid["ce"]
        averaged, _ = distributed.get_state(state.ema)
        distributed.save_on_rank_0(best, "best", ema=averaged, step=step, ce=log.best_ce, **checkpoint_info)
        log.stage("best", step, epoch, ce=log.best_ce)
    if s.evaluate_clips and is_due(step, s.evaluate_every, s):
        log.stage("evaluate", step, epoch, **metrics.evaluate(best, codec, train_data, valid_data, s))
    if s.samples and is_due(step, s.generate_every, s):
        log.stage("generate", step, epoch, clips=metrics.write_samples(best, codec, valid_data, step, s))
    if rank() == 0 and step and s.keep_every and epoch % s.keep_every == 0:
        with open(Path(s.out, "last.pt"), "rb") as last:
            common.write_file(Path(s.out, f"step_{step:06d}.pt"), functools.partial(shutil.copyfileobj, last))
    log.stage("commit", step, epoch)
    if rank() == 0:
        report.write_page(Path(s.out))


def training_step(state, micro_batches, lr, s, signals=()):
    """Train on one global batch: return (cross-entropy per codebook [K], gradient norm, whether a rank got a signal).

    micro_batches: this rank's share, `data.Batch`es. signals: this rank's. Raises UserError if the loss diverges.
    """
    state.model.train()
    ce_q = torch.zeros(state.model.K, device=state.device)
    for number, batch in enumerate(micro_batches, 1):
        codes, not_padding, in_loss, condition_tensors, targets_per_codebook = batch.to(state.device)
        with distributed.no_sync(state.net, is_last=number == len(micro_batches)):
            with state.autocast():
                ce_sum = state.net(codes, not_padding, in_loss, condition_tensors)
            loss = (state.loss_weights * ce_sum / targets_per_codebook).mean()
            loss = state.scaler.scale(loss * world_size())  # because DDP and FSDP divide by the number of ranks
            loss.backward()
        ce_q += (ce_sum / targets_per_codebook).detach()  # the targets are those of the global batch, so parts add up
    state.scaler.unscale_(state.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), s.clip or math.inf)

    # the only time that the host waits for the GPU
    sums = torch.cat([ce_q, torch.full((1,), float(len(signals)), device=state.device)])
    sums = torch.cat([distributed.sum_over_ranks(sums), distributed.full_tensor(grad_norm)[None]])
    *ce_q, n_signals, grad_norm = sums.tolist()
    state.step, is_finite = state.step + 1, math.isfinite(grad_norm)
    state.skipped += not is_finite
    state.skipped_in_a_row = 0 if is_finite else state.skipped_in_a_row + 1
    if not np.mean(ce_q) < DIVERGED or state.skipped_in_a_row == MAX_SKIPPED:
        raise UserError(f"step {state.step}: ce {np.mean(ce_q):g}, gradient norm {grad_norm:g}; try a lower --lr."
                        f" This step did not change the weights; {s.out}/last.pt, if any, is older")  # fmt: skip
    if is_finite:
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.scaler.step(state.optimizer)
        state.model.conditioner.update()  # style codebooks
        update_ema(state, s)
    else:
        state.model.conditioner.discard()
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return ce_q, grad_norm, n_signals > 0


def main():
    s = config.load(sys.argv[1:], __doc__)
    device, dtype = setup_device(s)
    train_data, valid_data, codec = load_data(s, device)
    unigram = by_codebook("unigram", shards.unigram_ce(s.data))  # the loss of predicting codes by frequency alone
    start = find_start(s, codec)
    model, net, ema = wrap_model(build_model(s, codec, start), s, device, dtype, start.resumes)
    state = make_state(model, net, ema, s, device, dtype)
    if start.resumes:
        restore(state, start, s)
    log, checkpoint_info = start_run(s, state, codec, train_data, valid_data, start)
    print_sizes(s, state, train_data, valid_data, dtype)
    del start  # unmap the old checkpoint, so that its disk space is freed when it is replaced
    signals = catch_signals()  # before the loader's worker starts, and before the bar, which keeps sys.stdout
    batches = data.loader(data.TrainingBatches(train_data, state.model, s, rank(), world_size()), state.step, device)
    flops, peak = functools.cache(state.model.flops), estimate.peak_flops(device, dtype)
    bar = tqdm(total=s.steps, initial=state.step, desc="training", file=sys.stdout, mininterval=1, smoothing=0.05)
    first_step, stop, interval = state.step, False, Interval()

    while True:
        if stop or state.step % s.epoch == 0 or state.step >= s.steps:
            faulthandler.cancel_dump_traceback_later()  # until the next step, ranks may wait for rank 0
            if state.step > first_step:
                save_last(state, s, checkpoint_info)
            if not stop and not log.is_committed(state.step):
                end_of_epoch(state, codec, train_data, valid_data, unigram, checkpoint_info, log, s)
                stop = any(distributed.gather(bool(signals)))
            if stop or state.step >= s.steps:
                break
            state.epoch_ce, state.epoch_steps, interval = [0.0] * state.model.K, 0, Interval()
        if world_size() > 1:
            faulthandler.dump_traceback_later(s.timeout, exit=True)  # restarts the timer at each step

        wait_start = time.monotonic()
        micro_batches = next(batches)
        interval.waited += time.monotonic() - wait_start
        lr = learning_rate(state.step, s)
        ce_q, grad_norm, stop = training_step(state, micro_batches, lr, s, signals)

        bar.update()
        interval.targets += float(micro_batches[0].targets_per_codebook.sum())  # of the global batch
        interval.flops += world_size() * sum(len(batch.codes) * flops(batch.codes.shape[2]) for batch in micro_batches)
        if math.isfinite(grad_norm):
            state.recent.append(ce_q)
            state.epoch_ce, state.epoch_steps = np.add(state.epoch_ce, ce_q).tolist(), state.epoch_steps + 1
        if state.recent and (state.step % s.log_every == 0 or state.step == s.steps):
            losses = with_perplexity(by_codebook("ce", np.mean(state.recent, axis=0)))
            line = dict(step=state.step, epoch=math.ceil(state.step / s.epoch), **losses, lr=lr, grad_norm=grad_norm,
                        skipped=state.skipped, **interval.rates(device, peak and peak * world_size()))  # fmt: skip
            log.write("metrics", line)
            bar.set_postfix_str(f"ce {line['ce']:.3f}, grad {grad_norm:.2f}, {line['tokens_per_s']:,} tokens/s")
            state.recent, interval = [], Interval()

    bar.close()
    distributed.cleanup_distributed()
    if state.step < s.steps or not log.is_committed(state.step):
        command = f"{distributed.launch_command()} {common.quote(*sys.argv)}"
        note = " (on each node, with its rendezvous options)" if "--nnodes" in command else ""
        print(f"stopped at step {state.step}; to resume: {command}{note}")
        sys.exit(128 + (signals or [signal.SIGTERM])[0])  # SIGTERM if only another rank got a signal
    print(f"\nlisten: {Path(s.out, 'index.html')}")
    words = common.quote(Path(s.out, "best.pt"), shards.text_of(valid_data.tracks[0]))
    print(f"try:    python sample.py {words} --duration {s.clip_seconds or s.segment:g}")


if __name__ == "__main__":
    common.run(main, lambda: estimate.advise_on_memory(sys.argv[1:]))
