"""Trains a MusicGen, top to bottom: restore -> (train, commit, valid, best, evaluate, generate) per epoch.

    python train.py config/demo.py                   # text to music on a laptop, in a quarter of an hour
    torchrun --nproc_per_node=8 train.py config/small.py --data=data/mine
    torchrun --nproc_per_node=8 train.py config/large.py --data=data/mine --parallel=fsdp
    python train.py --help                           # every setting

Ctrl-C commits at the next step, and the same command goes on from there; on as many processes of a CPU, bit for bit.
"""

import collections
import concurrent.futures
import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import config
import data
import demo_music
import distributed
import estimate
import metrics
import report
import sample
from checkpoint import read_checkpoint, save_checkpoint
from codec import load_codec
from config import UserError
from model import MusicLM, can_compile, load_model, merge_lora, peak_flops, pick_device
from weights import read_lm

SHAPE_SETTINGS = "dim heads layers pattern delays text_dim text_heads text_layers text_max_tokens melody style".split()
STYLE_SETTINGS = "style_dim style_heads style_layers style_books style_bins style_seconds".split()
DIVERGED = 100  # nats; blind guessing is ln(card), below 8
MOST_SKIPPED = 16  # steps in a row of a float16 run: the loss scale, 2^16 at first, is below 1 then
BEHIND = {"cuda": 1}  # steps that the host goes on before it hears of one, to wait for none (style still makes it wait)
TUNING_SETTINGS = "freeze lora_rank lora_alpha lora_targets".split()  # not to change when a run goes on


def learning_rate(step, s):
    """Linear warm-up, then a cosine from `lr` to `min_lr`."""
    if step < s.warmup:
        return s.lr * (step + 1) / s.warmup
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.min_lr + (s.lr - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def changed_settings(saved, ours):
    """{setting: 'what it was and is'} between a checkpoint and this run."""
    theirs = {**dataclasses.asdict(config.Settings()), **saved["settings"]}
    theirs |= dict(codec=saved["codec"]["id"])
    return {key: f"{key} was {theirs[key]!r}, is {ours[key]!r}" for key in ours if theirs[key] != ours[key]}


@torch.no_grad()
def validate(model, valid_data, s, T, size, device, autocast):
    """Cross-entropy per codebook over the held-out segments, each rank its share: [K] with all conditions and none."""
    total = torch.zeros(3, model.K, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
    for batch in valid_data.batches(T, size, s, distributed.rank(), distributed.size()):
        distributed.beat("validating")
        batch = batch.to(device)
        for row, conditions in enumerate((batch.conditions, [{} for _ in batch.conditions])):
            with autocast():
                inputs = model.conditioner.prepare(conditions, device)
                ce_sum, count = model(batch.codes, batch.valid, batch.scored, inputs)
            total[row] += ce_sum
        total[2] += count
    total = distributed.sum_over_ranks(total)
    return (total[0] / total[2]).tolist(), (total[1] / total[2]).tolist()


def prepare_to_compute(model, device, dtype, compiled):
    """Chooses how attention is computed, and has the blocks compiled at their first use."""
    if device.type == "cpu" and dtype != torch.float32 and model.trained_frames <= 512:
        torch.backends.cuda.enable_flash_sdp(False)  # of CPUs too; it is slow there, but a longer S x S costs memory
    for block in model.blocks if compiled else ():
        block.forward = torch.compile(block.forward, fullgraph=True)  # and not FSDP's hooks around it


def make_optimizer(model, s):
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]
    groups = [dict(params=matrices, weight_decay=s.weight_decay), dict(params=vectors, weight_decay=0.0)]
    fused = trained[0].device.type != "mps"  # where it does not look at `found_inf`
    return torch.optim.AdamW(groups, lr=s.lr, betas=(s.beta1, s.beta2), fused=fused)


def accumulate(net, model, batch, inputs, size, scaler, autocast):
    """Forward and backward of this rank's share of a batch, `size` items at a time -> its part of the loss, [K].

    batch: on the device; inputs: what `conditioner.prepare` makes of each `size` items' conditions.
    By the whole batch's count: micro-batches and ranks add up to its loss.
    """
    count = model.loss_mask(batch.everywhere).sum((0, 2)).clamp(min=1)  # [K], over all ranks
    ce_q = torch.zeros(model.K, device=count.device)
    for part, conditions in enumerate(inputs):
        distributed.beat("forward and backward")
        items = slice(part * size, (part + 1) * size)
        with distributed.without_sync(net, part + 1 < len(inputs)):
            with autocast():
                ce_sum, _ = net(batch.codes[items], batch.valid[items], batch.scored[items], conditions)
            loss = (ce_sum / count).mean()
            scaler.scale(loss * distributed.size()).backward()  # gradients are averaged over the ranks
        ce_q += (ce_sum / count).detach()
    return ce_q


def update(model, ema, optimizer, scaler, ce_q, step, s):
    """One step of the optimizer and of the averaged weights -> the gradient's norm before clipping, a tensor.

    Neither waits for the device. Where loss or gradient is not finite, or the loss has diverged, the weights stay as
    they are: torch's fused optimizers look at `found_inf` on the device. With float16 GradScaler sets it, by the
    gradient alone.
    """
    scaler.unscale_(optimizer)
    norm = distributed.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip or math.inf))
    bad = 1 - (torch.isfinite(norm) & (ce_q.mean() < DIVERGED)).float()
    if optimizer.defaults["fused"]:
        optimizer.found_inf = bad
    elif bad.item():
        optimizer.zero_grad(set_to_none=True)  # without gradients a step does nothing
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    updates, rest = divmod(step, s.ema_every)
    if rest == 0:
        weight = (1 - s.ema_decay) / (1 - s.ema_decay**updates)  # as in Adam, for the start to leave no trace
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), weight)
            for average, buffer in zip(ema.buffers(), model.buffers()):  # the style's codebooks
                average.copy_(buffer)
    return norm


class Later:
    """A tensor's values, that are sent to the host behind the work queued before them, and not after any other."""

    def __init__(self, tensor):
        self.values, self.sent = tensor.detach().to("cpu", non_blocking=tensor.is_cuda), None
        if tensor.is_cuda:
            self.sent = torch.cuda.Event()
            self.sent.record()

    def read(self):
        """A list of numbers; waits for these alone."""
        if self.sent:
            self.sent.synchronize()
        return self.values.tolist()


def append(path, line):
    if distributed.rank() == 0:
        try:
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); started again, the run goes on from its last commit"
            ) from None


def lines_until(path, step):
    """The lines of a log up to the step that the run goes on from; rank 0 drops later ones from the file."""
    if not path.exists() or distributed.rank() > 0:
        return []
    lines = [line for line in report.read(path, log=True) if line["step"] <= step]
    config.write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines


def record_code(out, step):
    """The git hash, the changes on top of it, the names of new files: what code the run began with, or goes on with."""
    here = dict(cwd=Path(__file__).parent, capture_output=True)
    commands = (["git", "rev-parse", "HEAD"], ["git", "status", "--short"], ["git", "diff", "HEAD"])
    try:
        code = b"".join(subprocess.run(command, **here).stdout for command in commands)
    except OSError:  # no git on this machine
        return
    known = sorted(out.glob("code_*.diff"))
    if not known or known[-1].read_bytes() != code:
        config.write_file(out / f"code_{step:06d}.diff", code)


def describe(line):
    """A line of history.jsonl in words."""
    start = f"epoch {line['epoch']}, step {line['step']}: "
    if line["stage"] == "valid":
        return (f"{start}valid ce {line['ce']:.3f} (unigram {np.mean(line['unigram_q']):.3f}), by codebook "
                + " ".join(f"{q:.2f}" for q in line["ce_q"]) + f"; conditions gain {line['gain']:.3f}")  # fmt: skip
    if line["stage"] == "evaluate":
        return f"{start}Fréchet distance {line['fad']:.2f} (real music {line['fad_real']:.2f})"
    return f"{start}{len(line['clips'])} samples"


def main():
    s = config.load(sys.argv[1:], __doc__)
    if s.estimate:
        return print("\n".join(estimate.estimate(s)[1]))
    device, dtype = pick_device(s.device, s.dtype)
    s.device, s.dtype = device.type, str(dtype).removeprefix("torch.")
    device = distributed.join(device, s.watchdog)
    rank, ranks = distributed.rank(), distributed.size()
    size = s.micro_batch or s.batch_size // ranks  # items that one device holds at once
    torch.set_flush_denormal(True)
    out, last, best = Path(s.out), Path(s.out, "last.pt"), Path(s.out, "best.pt")
    config.refuse_unwritable(out, "--out")
    held = config.lock(out) if rank == 0 and out.is_dir() else None
    saved = read_checkpoint(last, "last") if last.exists() else None
    if saved and not s.resume:
        raise UserError(f"{last}: a run is there; choose another --out, or remove that folder, or drop --resume=False")
    if not saved and (strays := [*out.glob("best.pt"), *out.glob("step_*.pt")]):
        raise UserError(f"{strays[0]}: of a run whose last.pt is gone; choose another --out, or remove the folder")
    report.import_logger(s.logger)
    inherits = bool(s.init_from) and not s.init_from.startswith("musicgen:")  # a tokenizer too, from a best.pt
    parent = read_checkpoint(s.init_from, "best") if inherits and not saved else None
    distributed.refuse_differences(
        **dataclasses.asdict(s), torch_version=torch.__version__, step_of_last_pt=saved and saved["step"]
    )

    # Data
    if s.demo_clips and rank == 0 and not Path(s.data, "meta.json").exists():
        demo_music.write_corpus(s.data + "_audio", s.demo_clips, progress=lambda: distributed.beat("synthesising"))
        data.prepare(f"{s.data}_audio/manifest.jsonl", s.data, s.codec, s.codec_weights)
    if rank == 0:
        data.refuse_damage(s.data)
    distributed.wait()
    train_data, valid_data = data.Tokens(s.data, "train"), data.Tokens(s.data, "valid")
    distributed.refuse_differences(content_of_the_data=data.fingerprint(s.data))
    codec, about = load_codec(s.codec, s.codec_weights).to(device), train_data.meta["codec"]
    if codec.id != about["id"]:
        raise UserError(
            f"{s.data} was prepared with codec {about['id']}, and --codec={s.codec} is {codec.id}; prepare it again"
        )
    unigram = data.unigram_ce(s.data).tolist()
    T = round(s.segment * codec.frame_rate)
    tokenizer = data.read_tokenizer(s.data)
    if saved or parent:
        other_tokenizer = tokenizer != (saved or parent)["tokenizer"]
        if other_tokenizer and inherits:
            print(f"captions are tokenized as {s.init_from} does, not by {s.data}'s own tokenizer")
        tokenizer = (saved or parent)["tokenizer"]
        same = SHAPE_SETTINGS + (STYLE_SETTINGS if s.style else []) + (TUNING_SETTINGS if saved else [])
        changes = changed_settings(saved or parent, {**dataclasses.asdict(s), "codec": codec.id})
        contradictions = [changes[key] for key in [*same, "codec"] if key in changes]
        if other_tokenizer and not inherits:
            contradictions.append(f"the tokenizer is not that of {s.data}")
        if contradictions:
            raise UserError(f"{last if saved else s.init_from}: holds another model ({', '.join(contradictions)});"
                            f" {'choose another --out' if saved else 'give it the same settings'}")  # fmt: skip

    # Model
    distributed.beat("building the model")
    torch.manual_seed(s.seed)  # here, as making the data and the codec draws numbers too
    model = MusicLM(s, about, tokenizer)
    if s.style:
        model.conditioner.prepended["style"].set_codec(codec)
    if s.init_from and not saved:  # what the file lacks stays as it is: the conditioners, or what LoRA adds
        state = merge_lora(parent["model"], parent["settings"]) if parent else read_lm(s.init_from[9:], model)
        model.load_state_dict(state, strict=False)
        print(f"beginning with the weights of {s.init_from}")
    model.freeze(s.freeze)
    worth_it = s.compile == "auto" and device.type == "cuda" and s.steps >= 1000 and can_compile(device)
    if s.compile == "always" and not can_compile(device):
        raise UserError("compile = 'always': needs a C++ compiler, g++ or clang++; install one, or leave it out")
    prepare_to_compute(model, device, dtype, s.compile == "always" or worth_it)
    with torch.device("meta"):
        ema = MusicLM(s, about, tokenizer)
    distributed.beat("spreading the model")
    if ranks > 1 and s.parallel == "fsdp":
        distributed.shard(model, device, dtype, s.reshard_after_forward)
        distributed.shard(ema, device, dtype, True, True)  # no backward pass would spread it again
        net = model
    else:
        model.to(device)
        net = distributed.replicate(model, device) if ranks > 1 else model
    ema.to_empty(device=device).eval().requires_grad_(False)
    ema.load_state_dict(model.state_dict())
    distributed.beat("making the optimizer")
    optimizer = make_optimizer(model, s)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def autocast():
        return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)

    # Restore
    distributed.beat("restoring")
    step, skipped = 0, 0
    ce_total, since_log, grad_norm = np.zeros(codec.K), 0, 0.0  # of the steps since the last line of the log
    if saved:
        distributed.load_model_state(model, saved["model"])
        distributed.load_model_state(ema, saved["ema"])
        distributed.load_optimizer_state(optimizer, saved["optimizer"])
        if saved["scaler"]:  # empty unless it was a float16 run
            scaler.load_state_dict(saved["scaler"])
        step, skipped = saved["step"], saved["skipped"]
        ce_total, since_log, grad_norm = np.array(saved["ce_total"]), saved["since_log"], saved["grad_norm"]
    del saved, parent

    def commit():
        state = dict(model=distributed.model_state(model), ema=distributed.model_state(ema),
                     optimizer=distributed.optimizer_state(optimizer), scaler=scaler.state_dict())  # fmt: skip
        if rank == 0:
            save_checkpoint(
                last, "last", **state, step=step, skipped=skipped, ce_total=ce_total.tolist(), since_log=since_log,
                grad_norm=grad_norm, settings=dataclasses.asdict(s), codec=about, tokenizer=tokenizer,
            )  # fmt: skip

    def keep():
        """A second name for each `keep_every`-th epoch's last.pt, which is replaced and never written into.

        Done again when the run goes on, as it may have been killed between the commit and this.
        """
        kept = out / f"step_{step:06d}.pt"
        if rank == 0 and step and s.keep_every and step % (s.epoch * s.keep_every) == 0 and not kept.exists():
            try:
                os.link(last, kept)
            except OSError:  # a file system without hard links
                shutil.copyfile(last, kept.with_suffix(".tmp"))
                kept.with_suffix(".tmp").replace(kept)

    def stopping():
        """Whether any rank got a signal."""
        return distributed.sum_over_ranks(torch.tensor([float(len(signals))], device=device)).item() > 0

    def note(stage, **found):
        line = dict(step=step, epoch=epoch, stage=stage, **found)
        history.append(line)
        append(out / "history.jsonl", line)
        log(line)
        tqdm.write(describe(line), file=sys.stdout)

    def finish_epoch():
        """What follows the commit that ends an epoch. A run that goes on begins with what a kill has left undone."""
        nonlocal best_ce
        done = {line["stage"] for line in history if line["step"] == step}

        def due(stage, every):
            return stage not in done and (step >= s.steps or (every > 0 and epoch % every == 0)) and not stopping()

        if due("valid", 1):  # with the averaged weights
            ce_q, null_q = validate(ema, valid_data, s, T, size, device, autocast)
            ce, gain = float(np.mean(ce_q)), float(np.mean(null_q) - np.mean(ce_q))
            if not ce < DIVERGED:
                raise UserError(f"step {step}: the held-out loss is {ce:g}, it diverged; to begin again from the best:"
                                f" --init_from={best}, another --out and a lower --lr")  # fmt: skip
            if ce < best_ce:
                best_ce, state = ce, distributed.model_state(ema)
                if rank == 0:
                    save_checkpoint(best, "best", model=state, settings=dataclasses.asdict(s), codec=about,
                                    tokenizer=tokenizer, step=step, ce=ce, ce_q=ce_q, gain=gain)  # fmt: skip
                distributed.wait()  # all go on with what rank 0 has written
            note("valid", ce=ce, ppl=math.exp(ce), ce_q=ce_q, unigram_q=unigram, gain=gain)
        if s.evaluate_clips and due("evaluate", s.evaluate_every):
            note("evaluate", **metrics.evaluate(load_model(best, device)[0], codec, train_data, valid_data, s))
        if s.samples and due("generate", s.generate_every):
            note("generate", clips=sample.write_samples(out, step, load_model(best, device)[0], codec, valid_data, s))

    def draw(step):
        """A step's batch, its conditions by micro-batch, both on the device, and how many frames count in all.

        In a thread, while the step before it is under way.
        """
        batch = train_data.batch(0 if s.one_batch else step, s, T, rank, ranks)
        parts = [batch.conditions[i : i + size] for i in range(0, len(batch.codes), size)]
        inputs = [model.conditioner.prepare(part, device) for part in parts]
        return batch.to(device), inputs, int(batch.everywhere.sum())

    def take_in(step, frames, later):
        """What a step has come to, once the device is that far: ends a run that has diverged, adds to the log."""
        nonlocal asked, skipped, in_a_row, ce_total, since_log, grad_norm, clock, waited, steps_done, frames_done
        *ce_q, signalled, norm = later.read()
        asked, finite = signalled > 0, math.isfinite(norm)
        in_a_row = 0 if finite else in_a_row + 1
        if not np.mean(ce_q) < DIVERGED or in_a_row > (MOST_SKIPPED if scaler.is_enabled() else 0):
            raise UserError(
                f"step {step}: loss {np.mean(ce_q):g}, gradient norm {norm:g}; a lower --lr may help. The weights"
                f" were not touched, and {f'{last} is whole' if last.exists() else 'nothing was saved yet'}"
            )
        if finite:
            ce_total, since_log, grad_norm = ce_total + ce_q, since_log + 1, norm
        skipped += not finite
        steps_done, frames_done = steps_done + 1, frames_done + frames
        bar.update()
        if since_log and (step % s.log_every == 0 or step == s.steps):
            ce, seconds = ce_total.mean() / since_log, time.monotonic() - clock
            line = dict(step=step, epoch=math.ceil(step / s.epoch), ce=ce, ppl=math.exp(min(ce, 700)),
                        ce_q=(ce_total / since_log).tolist(), lr=learning_rate(step - 1, s), grad_norm=grad_norm,
                        tokens_per_s=round(frames_done * codec.K / seconds),
                        data_wait=round(waited / seconds, 4))  # fmt: skip
            text = (f"epoch {line['epoch']}, ce {ce:.3f}, lr {line['lr']:.1e}, grad {grad_norm:.2f},"
                    f" {line['tokens_per_s']:,} tokens/s, {100 * line['data_wait']:.0f}% waiting")  # fmt: skip
            if peak < math.inf:
                line["mfu"] = round(steps_done * flops / seconds / peak, 4)
                text += f", MFU {100 * line['mfu']:.0f}%"
            if scaler.is_enabled():
                line["skipped"] = skipped
                text += f", {skipped} skipped"
            append(out / "metrics.jsonl", line)
            log(line)
            bar.set_postfix_str(text)
            ce_total, since_log = np.zeros(codec.K), 0
            clock, waited, steps_done, frames_done = time.monotonic(), 0.0, 0, 0

    def write_page():
        if rank == 0:
            try:
                report.write(out)
            except (OSError, UserError) as error:  # a page is not worth a run
                tqdm.write(f"the listening page was not written: {error}", file=sys.stdout)

    def leave_if_asked():
        if stopping():
            bar.close()
            print(f"stopped and committed at step {step}; to go on: {distributed.launcher()} {shlex.join(sys.argv)}")
            distributed.leave()
            sys.exit(128 + (signals or [signal.SIGTERM])[0])

    # A signal asks for a commit at the next step; in one process a second one ends the program, torchrun repeats them.
    signals = []

    def on_signal(number, frame):
        signals.append(number)
        if ranks == 1:
            signal.signal(number, signal.SIG_DFL)

    usual = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}

    # Look back, and around
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        held = held or config.lock(out)
        data.write_json(out / "config.json", dataclasses.asdict(s))
        record_code(out, step)
    distributed.refuse_unshared(out)
    log = report.open_logger(s, out) if rank == 0 else lambda line: None
    past, history = lines_until(out / "metrics.jsonl", step), lines_until(out / "history.jsonl", step)
    for line in sorted(past + history, key=lambda line: line["step"]):
        log(line)
        if "stage" in line:
            print(describe(line))
    history = distributed.gather(history)[0]
    best_ce = min([line["ce"] for line in history if line["stage"] == "valid" and best.exists()], default=math.inf)
    if step:
        print(f"going on from {last} at step {step}" + "".join(f"; {change}" for change in changes.values()))
    parameters = sum(p.numel() for p in model.parameters())
    minutes = train_data.meta["train"]["frames"] / codec.frame_rate / 60
    print(f"{parameters / 1e6:.1f}M parameters on {ranks} x {device.type} in {str(dtype).removeprefix('torch.')}")
    print(f"{s.data}: {len(train_data.tracks)} tracks, {minutes:.0f} minutes, {len(valid_data.tracks)} tracks held out")
    bar = tqdm(total=s.steps, initial=step, desc="training", file=sys.stdout, mininterval=1, smoothing=0.05)
    flops, peak = model.flops() * s.batch_size, (peak_flops(device, dtype) or math.inf) * ranks
    epoch = math.ceil(step / s.epoch)
    keep()
    if step and (step % s.epoch == 0 or step >= s.steps):
        finish_epoch()
        write_page()
        leave_if_asked()
    drawer = concurrent.futures.ThreadPoolExecutor(1, "batches")
    drawn, under_way, asked, in_a_row = drawer.submit(draw, step), collections.deque(), False, 0
    behind = BEHIND.get(device.type, 0)
    clock, waited, steps_done, frames_done = time.monotonic(), 0.0, 0, 0

    while step < s.steps:
        distributed.beat("drawing a batch", step + 1)
        drawing = time.monotonic()
        batch, inputs, frames = drawn.result()
        waited += time.monotonic() - drawing
        drawn = drawer.submit(draw, step + 1)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, s)
        model.train()
        ce_q = accumulate(net, model, batch, inputs, size, scaler, autocast)
        distributed.beat("optimizer")
        signalled = torch.full((1,), float(len(signals)), device=device)
        found = distributed.sum_over_ranks(torch.cat([ce_q, signalled]))
        if s.style:
            model.conditioner.prepended["style"].update(distributed.sum_over_ranks, distributed.gather)
        norm = update(model, ema, optimizer, scaler, found[:-1], step + 1, s)
        step += 1
        epoch = math.ceil(step / s.epoch)
        under_way.append((step, frames, Later(torch.cat([found, norm[None]]))))

        ending = step % s.epoch == 0 or step == s.steps
        while under_way and (ending or asked or len(under_way) > behind):
            take_in(*under_way.popleft())
        if ending or asked:
            commit()
            keep()
            if ending:
                finish_epoch()
            write_page()
            leave_if_asked()
            clock, waited, steps_done, frames_done = time.monotonic(), 0.0, 0, 0
    drawer.shutdown(cancel_futures=True)
    bar.close()
    for number, handler in usual.items():
        signal.signal(number, handler)
    distributed.leave()

    summary = read_checkpoint(best, "best")
    print(f"\nbest at step {summary['step']}: valid ce {summary['ce']:.3f}, ppl {math.exp(summary['ce']):.1f};"
          f" conditioning gain ce(null) - ce(conditioned) {summary['gain']:.3f}")  # fmt: skip
    print("codebook   " + "".join(f"{f'q{k + 1}':>8}" for k in range(codec.K)))
    print("valid ce   " + "".join(f"{ce:8.3f}" for ce in summary["ce_q"]))
    print("unigram ce " + "".join(f"{ce:8.3f}" for ce in unigram))
    for line in report.read(out / "history.jsonl", log=True):
        if line["stage"] == "evaluate" and line["step"] == step:
            metrics.print_table(line)
    print(f"\nlisten: {out / 'index.html'}")
    caption = shlex.quote(valid_data.tracks[0]["caption"])
    print(f"try:    python sample.py {best} {caption} --duration {s.segment:g}")


if __name__ == "__main__":
    config.run(main, distributed.first_to_report, distributed.exit)
