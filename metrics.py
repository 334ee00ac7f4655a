"""Measure a checkpoint: quality of the music, adherence to its conditions, speed. Also writes samples to listen to.

    python metrics.py out/demo [--clips 200] [--cfg 3] [--device cpu]
    python metrics.py out/demo_0 out/demo_1 out/demo_2      # runs of several seeds: mean and standard error
    torchrun --nproc_per_node=8 metrics.py out/small

Clips are generated for the captions of held-out tracks and compared with the first segment of these tracks. Real music
is decoded from its codes too, so the codec's losses are the same on both sides.

Fréchet distance   between Gaussians of codec latents; FAD (arXiv:1812.08466) uses those of VGGish
chroma similarity  mean cosine of the pitch classes, frame by frame, which compares melody and harmony
caption adherence  how often a probe detects the attributes of the conditions: instrument, tempo ... (tools/probe.py)
copying            share of clips that repeat training music nearly code for code (tools/copying.py)
real-time factor   seconds of music generated per second

Letters: N clips, K codebooks, T frames, T' chroma frames, D size of a vector.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import common  # before torch; it sets GOMP_SPINCOUNT
import distributed

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from audio import file_name, load_audio, write_audio
from common import UserError
from conditioning import SILENCE, chromagram
from dataprep import shards
from generate import cache_length, generate, load_model, optimize
from tools import copying, probe, tables, withhold
from tools.output import LOUDNESS, set_loudness

PROBE_CLIPS = 600  # minimum number of real clips that the probe learns from, if there are so many
FLOOR_DRAWS = 10  # maximum number of sets of real clips, whose Fréchet distances are averaged


# ------------------------------------------------------------------------------------------------------ distances


def gaussian(parts):
    """Fit a Gaussian to vectors in parts [D, n]: mean [D] and covariance [D, D], float64, by running sums."""
    count = total = outer = 0
    for x in parts:
        x = x.cpu().double()
        count, total, outer = count + x.shape[1], total + x.sum(1), outer + x @ x.T
    mean = total / count
    return mean, outer / count - torch.outer(mean, mean)


def frechet_distance(a, b):
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (mean [D], covariance [D, D])."""
    (mean1, cov1), (mean2, cov2) = a, b
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()  # C1 C2 has the same eigenvalues
    return max(0.0, float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross))


def latent_gaussian(codec, clips):
    """Fit a Gaussian to the latents of clips, codes [K, T] of any lengths.

    Each frame is stacked with the next one, because single frames of random codes resemble those of music.
    """
    latents = (codec.latents(codes[None])[0] for codes in clips)
    return gaussian(torch.cat([z[:, :-1], z[:, 1:]]) for z in latents)


def frechet_floor(codec, train_data, held_out, target):
    """Return the Fréchet distance from training clips to `target`, the Gaussian of the clips `held_out`.

    It is the mean over up to FLOOR_DRAWS sets of clips with the lengths of `held_out`, because a few clips vary much.
    """
    step = max(1, len(train_data.tracks) // len(held_out))  # a set is every step-th track
    distances = []
    for first in range(0, step, -(-step // FLOOR_DRAWS)):
        pairs = zip(train_data.tracks[first::step], held_out)
        clips = (read_clip(train_data, track, clip.shape[1]) for track, clip in pairs)
        distances.append(frechet_distance(latent_gaussian(codec, clips), target))
    return float(np.mean(distances))


def chroma_similarity(a, b):
    """Return the mean cosine of two chromagrams [12, T'] over the frames that sound in both, or 0 without any."""
    frames = min(a.shape[1], b.shape[1])
    a, b = a[:, :frames], b[:, :frames]
    is_sounding = (a.sum(0) > 0) & (b.sum(0) > 0)
    return float(F.cosine_similarity(a[:, is_sounding], b[:, is_sounding], dim=0).mean()) if is_sounding.any() else 0.0


def mean_similarity(chroma, others):
    """Return the mean similarity of two lists of chromagrams [1, 12, T'], pair by pair."""
    return float(np.mean([chroma_similarity(a[0], b[0]) for a, b in zip(chroma, others)]))


def melody_similarity(chroma, conditions):
    """Compare each clip's chroma [1, 12, T'] with its own melody, and with the next clip's ("shuffled")."""
    notes = [torch.as_tensor(sample["melody"]).long() for sample in conditions]
    melodies = [F.one_hot(melody, SILENCE + 1)[:, :SILENCE].T[None].float() for melody in notes]
    return dict(own=mean_similarity(chroma, melodies), shuffled=mean_similarity(chroma, melodies[1:] + melodies[:1]))


# ----------------------------------------------------------------------------------------------------------- clips


def clip_frames(s, codec):
    """Return the frames of a generated clip."""
    return round((s.clip_seconds or s.segment) * codec.frame_rate)


def read_clip(dataset, track, T, start=0):
    """Read T frames of a track, or the remaining ones if there are fewer: codes int64 [K, T]."""
    return torch.from_numpy(dataset.codes(track, start, T).T.astype(np.int64))


def read_conditions(dataset, places, T, s):
    """Return the conditions of T frames from each (track, first frame), a list of dicts."""
    _, conditions = dataset.collate(dataset.evaluation_items(places, T, s), T)
    return conditions


def measure_clips(codec, clips, measure, label="measuring"):
    """Decode clips, codes [K, T], one by one: return `measure(wav [1, samples], sample_rate)` of each on the CPU."""
    bar = tqdm(clips, desc=label, file=sys.stdout, mininterval=1, leave=False, unit="clip")
    return [measure(codec.decode(codes[None]).mean(1), codec.sample_rate).cpu() for codes in bar]


def load(checkpoint, device, text_encoder_weights=None):
    """Load a checkpoint's model to generate clips: in float32, or on a GPU in bfloat16 if it was trained in that."""
    model, s, _ = load_model(checkpoint, device, text_encoder_weights)
    uses_bfloat16 = device.type == "cuda" and s.dtype == "bfloat16" and common.has_fast_bfloat16("cuda")
    return optimize(model, torch.bfloat16) if uses_bfloat16 else model


def clips_per_batch(model):
    """Return how many clips can be generated together: KV caches may use 2 GiB, or 25 % of a GPU's memory."""
    device, groups = model.heads.weight.device, 3 if "style" in model.conditioner.prepended else 2
    D, S = model.embed.embedding_dim, model.pattern(model.trained_frames).S
    length = cache_length(model.conditioner.prefix_length + S)
    memory = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else 2**31
    return max(1, memory // (groups * 2 * len(model.blocks) * length * D * model.heads.weight.dtype.itemsize))


def generate_many(model, conditions, T, cfg, s, name, prompts=None):
    """Generate clips for N conditions with the seeds 0 to N - 1: return codes int64 [N, K, T] on the CPU of each rank.

    Rank r generates clips r, r + world size, ... Every rank must call this. prompts: codes [N, K, T'] to continue.
    """
    seeds, size = range(distributed.rank(), len(conditions), distributed.world_size()), clips_per_batch(model)
    batches = [seeds[first : first + size] for first in range(0, len(seeds), size)]
    options = {key: getattr(s, key) for key in ("cfg_beta", "temperature", "top_k", "top_p")}
    parts = [torch.zeros(0, model.K, T, dtype=torch.int64)]
    with tqdm(total=len(batches) * T, desc=f"generating, {name}", unit="frame", file=sys.stdout, mininterval=1,
              leave=False) as bar:  # fmt: skip
        for batch in batches:
            samples, prompt = [conditions[i] for i in batch], None if prompts is None else prompts[batch]
            codes = generate(model, samples, T, prompt, bar.update, cfg=cfg, seeds=batch, **options)
            parts.append(codes.cpu())
    shares = distributed.gather(torch.cat(parts))
    codes = torch.zeros(len(conditions), model.K, T, dtype=torch.int64)
    for rank, share in enumerate(shares):
        codes[rank :: len(shares)] = share
    return codes


# ------------------------------------------------------------------------------------------------------ evaluation


def make_variants(conditions, s):
    """Return the conditions and guidance to compare: {name: (N conditions, cfg)}; first all of them and s.cfg."""
    names = {name for sample in conditions for name in sample}
    variants = {f"cfg {s.cfg:g}": (conditions, s.cfg), "cfg 1": (conditions, 1.0)}
    if len(names) > 1:
        for name in sorted(names):
            variants[f"{name} alone"] = ([{name: sample.get(name)} for sample in conditions], s.cfg)
    if "style" in names:
        for number in {1, s.style_codebooks}:
            styles = [{"style": (sample["style"][0], number)} for sample in conditions]
            variants[f"style of {number} codebook{'s' * (number > 1)}"] = (styles, s.cfg)
    return variants | {"nothing": ([{} for _ in conditions], 1.0)}


def generate_variants(model, variants, T, s):
    """Generate the clips of each variant: return {name: codes [N, K, T]} and {name: seconds}."""
    generated, seconds = {}, {}
    for name, (conditions, cfg) in variants.items():
        distributed.barrier()
        start = time.perf_counter()
        generated[name] = generate_many(model, conditions, T, cfg, s, name)
        seconds[name] = time.perf_counter() - start  # of the slowest rank, because the others wait for it
    return generated, seconds


def caption_adherence(codec, attributes, train_data, train_tracks, tracks, clips, T):
    """Return the `detection_rates` of clips, {name: clips for the tracks}. The probes learn from training clips."""
    if not attributes:
        return {}
    train_clips = [read_clip(train_data, track, T) for track in train_tracks]
    train_x = torch.cat(measure_clips(codec, train_clips, probe.features, "features of training clips"))
    x = {name: torch.cat(measure_clips(codec, clips[name], probe.features, f"features of {name}")) for name in clips}
    return probe.detection_rates(attributes, train_tracks, train_x, tracks, x)


def evaluate(checkpoint, codec, train_data, valid_data, s):
    """Measure a checkpoint on the first `evaluate_clips` held-out tracks. Every rank must call this, and gets a dict:

    clips                  number of clips
    fad, fad_real          Fréchet distance to the held-out clips: of generated clips; of training clips, the floor
    chroma, chroma_chance  similarity of a held-out clip to the clip generated for it; to the next clip. Only the
                           difference is meaningful, because noise, with equal pitches, is similar to anything
    copied, copied_real    share of copies of training music: among generated clips; among held-out clips
    rtf                    seconds of music per second, on all ranks together, from conditions to codes
    adherence              {attribute: {"chance", "real", "cfg 3", "cfg 1", ..., "nothing"}}, shares of clips
    melody                 {"real", "cfg 3", ...: {"own", "shuffled"}}, chroma similarity to the given melody and to the
                           next clip's. {} for models without melody conditioning
    withheld               reasons and remedies for the metrics that are None or {}; "" if all were measured

    "cfg 3" stands for the cfg of the settings; "real" is held-out music; "nothing" is generated without conditions.
    adherence is {} without captions, or without attributes that training and held-out tracks share. The shares of
    copies are None if all clips are too short.
    """
    model, T = load(checkpoint, codec.device, s.text_encoder_weights), clip_frames(s, codec)
    places = [(track, 0) for track in valid_data.tracks[: s.evaluate_clips]]
    if few_clips := withhold.few_clips(len(places), len(valid_data.tracks)):
        places = valid_data.cut_into_segments(T, min(s.evaluate_clips, shards.MIN_HELD_OUT))  # for copying only
    tracks, conditions = [track for track, _ in places], read_conditions(valid_data, places, T, s)
    train_tracks = train_data.tracks[:: max(1, len(train_data.tracks) // PROBE_CLIPS)]
    attributes = probe.attributes_of(train_data) if not few_clips and any(map(shards.text_of, tracks)) else {}
    attributes, few_examples = withhold.few_examples(attributes, train_tracks, tracks)
    variants = make_variants(conditions, s)
    guided = next(iter(variants))
    if not attributes and (few_clips or not s.melody):  # no measure would compare the other variants
        variants = {guided: variants[guided]}
    generated, seconds = generate_variants(model, variants, T, s)
    if distributed.rank() > 0:
        return distributed.gather(None)[0]

    held_out = [read_clip(valid_data, track, T, start) for track, start in places]
    cut = {name: [clip[:, : real.shape[1]] for clip, real in zip(generated[name], held_out)] for name in generated}
    clips = {"real": held_out, **cut}
    few_frames = withhold.few_frames(held_out, 2 * codec.dim)
    target = None if few_clips or few_frames else latent_gaussian(codec, held_out)
    chroma = {name: measure_clips(codec, clips[name], chromagram, f"chroma of {name}")
              for name in (() if few_clips else clips if s.melody else ("real", guided))}  # fmt: skip
    result = {
        "clips": len(tracks),
        "fad": frechet_distance(latent_gaussian(codec, clips[guided]), target) if target else None,
        "fad_real": frechet_floor(codec, train_data, held_out, target) if target else None,
        "chroma": mean_similarity(chroma["real"], chroma[guided]) if chroma else None,
        "chroma_chance": mean_similarity(chroma["real"], chroma[guided][1:] + chroma[guided][:1]) if chroma else None,
        "copied": copying.copied_share(clips[guided], train_data),
        "copied_real": copying.copied_share(held_out, train_data),
        "rtf": len(tracks) * T / codec.frame_rate / seconds[guided],
        "adherence": caption_adherence(codec, attributes, train_data, train_tracks, tracks, clips, T),
        "melody": {name: melody_similarity(chroma[name], conditions) for name in chroma} if s.melody else {},
        "withheld": few_clips or " ".join(filter(None, (few_frames, few_examples))),
    }
    tables.print_results([result])
    return distributed.gather(result)[0]


def write_samples(checkpoint, codec, valid_data, step, s):
    """Write clips for the first held-out captions, with the same seeds every time. Every rank must call this.

    Each caption gets a clip from its conditions alone, and one that continues the first quarter of the held-out music.
    This music and its decoded codes are written too, and all with the loudness of sample.py's files. Return a dict of
    each clip's paths, relative to OUT, on rank 0.
    """
    model = load(checkpoint, codec.device, s.text_encoder_weights)
    T, tracks, out = clip_frames(s, codec), valid_data.tracks[: s.samples], Path(s.out)
    conditions = read_conditions(valid_data, [(track, 0) for track in tracks], T, s)
    held_out = [read_clip(valid_data, track, T) for track in tracks]
    prompt_frames = max(1, min(T // 4, *(clip.shape[1] for clip in held_out)))
    prompts = torch.stack([clip[:, :prompt_frames] for clip in held_out])
    free = generate_many(model, conditions, T, s.cfg, s, "samples")
    continued = generate_many(model, conditions, T, s.cfg, s, "continuations", prompts)
    if distributed.rank() > 0:
        return []
    step_folder, real_folder, clips = out / "samples" / f"step_{step:06d}", out / "samples" / "held_out", []
    for folder in (step_folder, real_folder):
        folder.mkdir(parents=True, exist_ok=True)
    for seed, (track, real) in enumerate(zip(tracks, held_out)):
        name = file_name(shards.text_of(track), seed)
        wavs = {
            "free": (step_folder / f"{name}.wav", codec.decode(free[seed][None])[0]),
            "continued": (step_folder / f"{name}_continued.wav", codec.decode(continued[seed][None])[0]),
            "codec": (real_folder / f"{name}_codec.wav", codec.decode(real[None])[0]),
        }
        with contextlib.suppress(UserError):  # the file may have moved since it was encoded
            wav = load_audio(track["path"], codec.sample_rate, codec.channels, real.shape[1] * codec.hop)
            wavs["reference"] = (real_folder / f"{name}.wav", wav)
        wavs = {key: (path, set_loudness(wav.cpu(), codec.sample_rate, LOUDNESS)) for key, (path, wav) in wavs.items()}
        paths = {key: write_audio(path, wav, codec.sample_rate).relative_to(out).as_posix()
                 for key, (path, wav) in wavs.items()}  # fmt: skip
        seconds = prompt_frames / codec.frame_rate
        clips.append(dict(caption=shards.text_of(track), seed=seed, prompt_seconds=seconds, **paths))
    return clips


def evaluate_run(run, args, device):
    """Evaluate a run's best.pt, or a checkpoint: write metrics.json next to it, and return its content."""
    path = common.checkpoint_path(run)
    _, s, codec_info = load_model(path, text_encoder_weights=args.text_encoder_weights)
    s.evaluate_clips, s.cfg = args.clips, s.cfg if args.cfg is None else args.cfg
    codec = shards.load_matching_codec(s.data, s.codec, args.codec_weights or s.codec_weights).to(device)
    if codec.id != codec_info["id"]:
        raise UserError(f"{path}: trained with codec {codec_info['id']}, but {s.data} has {codec.id}; train again")
    splits = (data.TokenDataset(s.data, split) for split in ("train", "valid"))
    result = evaluate(path, codec, *splits, s)
    if distributed.rank() == 0:
        common.write_json(path.with_name("metrics.json"), result)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder with best.pt, or a checkpoint")
    parser.add_argument("--clips", type=int, default=200, help="held-out captions to generate for (default 200)")
    parser.add_argument("--cfg", type=float, help="guidance (default: the run's setting)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the accelerator, if there is one)")
    parser.add_argument("--codec_weights", help="the codec's weights, if they have moved since training")
    parser.add_argument("--text_encoder_weights", help="T5's weights, if they have moved since training")
    args = parser.parse_args()
    if args.clips < 1:
        raise UserError(f"--clips {args.clips}: must be at least 1")
    if args.cfg is not None and not abs(args.cfg) < 1e6:
        raise UserError(f"--cfg {args.cfg}: must be a number, such as 3")
    device = distributed.init_distributed(common.pick_device(args.device)[0], timeout=3600)
    results = [evaluate_run(run, args, device) for run in args.runs]
    if len(results) > 1:
        tables.print_results(results)
    distributed.cleanup_distributed()


if __name__ == "__main__":
    common.run(main, lambda: "use --device cpu, or evaluate a run with a lower --clip_seconds")
