"""What `evaluate` measures: is it music, does it follow its caption, and how fast does it come?

    python metrics.py out/demo [--clips 200] [--cfg 3] [--device cpu]
    python metrics.py out/demo_0 out/demo_1 out/demo_2      # runs of several seeds: mean and standard error
    torchrun --nproc_per_node=8 metrics.py out/small

Clips are generated for the captions of held-out tracks, and compared with the first segment of those tracks. All real
music is decoded from its codes too, so that the codec's own losses are on both sides.

Fréchet distance   between Gaussians of the codec's latents; of VGGish's in FAD (arXiv:1812.08466). A frame is stacked
                   with the next one: by frames alone, codes drawn at random with the right frequency pass for music.
chroma similarity  mean cosine of the pitch classes, frame by frame: are melody and harmony the same? For a model that
                   takes a melody also to that melody, and to another clip's.
caption adherence  a probe, ridge regression on pooled features of real clips, learns to tell each attribute stored with
                   the data set: instrument, tempo, drums ... How often does it hear what the conditions ask for?
real-time factor   seconds of music generated in a second.

Letters: N clips, K codebooks, T frames, T' chroma frames, D size of a vector, F features, C classes.
"""

import argparse
import contextlib
import sys
import time
from pathlib import Path

import common  # before torch, whose threads it tells how to wait

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from codec import file_name, load_audio, mel_spectrogram, write_audio
from common import UserError
from conditioning import SILENCE, chromagram
from generate import cache_steps, generate, load_model, optimize
from listen import key_matches

LARGEST_CLASS_COUNT = 7  # an attribute with more values than this is no class to probe for
PROBE_CLIPS = 600  # real clips that the probe learns from, at least, where there are so many
FLOOR_DRAWS = 10  # sets of real clips whose Fréchet distances are averaged, at most


def progress(items, doing):
    """The items one by one, with a progress bar."""
    return tqdm(items, desc=doing, file=sys.stdout, mininterval=1, leave=False, unit="clip")


# ------------------------------------------------------------------------------------------------------ distances


def gaussian(parts):
    """Vectors in parts [D, n] -> their mean [D] and covariance [D, D], float64 from running sums, a part at a time."""
    count = total = outer = 0
    for x in parts:
        x = x.cpu().double()
        count, total, outer = count + x.shape[1], total + x.sum(1), outer + x @ x.T
    mean = total / count
    return mean, outer / count - torch.outer(mean, mean)


def frechet_distance(a, b):
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (mean [D], covariance [D, D])."""
    (mean1, cov1), (mean2, cov2) = a, b
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()  # C1 C2 has the same eigenvalues
    return max(0.0, float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross))


def latent_gaussian(codec, clips):
    """Clips, codes [K, T] of any lengths -> the Gaussian of their latents, each frame stacked with the next one."""
    latents = (codec.latents(codes[None])[0] for codes in clips)
    return gaussian(torch.cat([z[:, :-1], z[:, 1:]]) for z in latents)


def frechet_floor(codec, train_data, real, target):
    """Fréchet distance to `target`, the Gaussian of the clips `real`, from as many training clips of the same lengths.

    The mean over up to FLOOR_DRAWS sets of training tracks, because a few dozen clips may happen to be near or far.
    """
    step = max(1, len(train_data.tracks) // len(real))  # a set is every step-th track
    distances = []
    for first in progress(range(0, step, -(-step // FLOOR_DRAWS)), "real music against real"):
        pairs = zip(train_data.tracks[first::step], real)
        clips = (clip_of(train_data, track, held_out.shape[1]) for track, held_out in pairs)
        distances.append(frechet_distance(latent_gaussian(codec, clips), target))
    return float(np.mean(distances))


def chroma_similarity(a, b):
    """Mean cosine of two chromagrams [12, T'] over the frames that sound in both; 0 where none does."""
    frames = min(a.shape[1], b.shape[1])
    a, b = a[:, :frames], b[:, :frames]
    sound = (a.sum(0) > 0) & (b.sum(0) > 0)
    return float(F.cosine_similarity(a[:, sound], b[:, sound], dim=0).mean()) if sound.any() else 0.0


def mean_similarity(ours, theirs):
    """Of two lists of chromagrams [1, 12, T'], pair by pair."""
    return float(np.mean([chroma_similarity(a[0], b[0]) for a, b in zip(ours, theirs)]))


# ------------------------------------------------------------------------------------------------ caption adherence


def attributes_of(tokens):
    """The attributes to probe: metadata that is text and takes 2 to 7 values -> {name: [values]}."""
    values = {}
    for track in tokens.tracks:
        for key, value in track["metadata"].items():
            if isinstance(value, str):
                values.setdefault(key, set()).add(value)
    return {key: sorted(found) for key, found in values.items() if 2 <= len(found) <= LARGEST_CLASS_COUNT}


def features(wav, sample_rate):
    """wav [N, samples] -> [N, F]: mean and deviation of each mel band, autocorrelation of the onsets, matches of keys.

    All clips are brought to one loudness first, so that the probe cannot go by level.
    Onsets are the half-wave rectified rise of the log-mel spectrogram (spectral flux); their autocorrelation over lags
    of 0.1 to 2 s shows the beat whatever its place in the clip. The last two are of the best major and minor keys.
    """
    keys = torch.tensor(np.array([key_matches(chroma) for chroma in chromagram(wav, sample_rate).cpu()])).to(wav)
    wav = 0.1 * wav / wav.square().mean(1, keepdim=True).sqrt().clamp(min=1e-4)
    hop = sample_rate // 50
    mel = (mel_spectrogram(wav, sample_rate, n_fft=1024, hop=hop) + 0.1).log()
    flux = mel.diff(dim=-1).clamp(min=0).mean(1)
    flux = flux - flux.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(flux, n=max(202, 2 * flux.shape[1])).abs().square()  # lags past a short clip are 0
    correlation = torch.fft.irfft(spectrum)[:, :101]
    correlation = correlation[:, 5:] / correlation[:, :1].clamp(min=1e-8)
    return torch.cat([mel.mean(2), mel.std(2), correlation, keys.unflatten(1, (2, 12)).amax(2)], dim=1)


class Probe:
    """Ridge regression of one-hot classes on standardised features."""

    def __init__(self, x, labels, classes, penalty=10.0):
        self.classes, self.mean, self.std = classes, x.mean(0), x.std(0) + 1e-6
        x = self.expand(x)
        y = torch.eye(len(classes))[[classes.index(label) for label in labels]]
        self.weight = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)

    def expand(self, x):
        return torch.cat([(x - self.mean) / self.std, torch.ones(len(x), 1)], dim=1)

    def accuracy(self, x, labels):
        predicted = (self.expand(x) @ self.weight).argmax(1)
        return float(np.mean([self.classes[i] == label for i, label in zip(predicted, labels)]))


def adherence(attributes, known, x, asked, clips):
    """The share of clips in which the probe hears what is asked for: {attribute: {"chance", and every name in clips}}.

    The probe learns from the tracks `known`, with features x [N, F]; clips is {name: features [N, F]}, made for the
    tracks `asked`. Chance always names their commonest class. Tracks without the attribute are left out.
    """
    table = {}
    for attribute, classes in attributes.items():
        rows = [i for i, track in enumerate(known) if track["metadata"].get(attribute) in classes]
        asking = [i for i, track in enumerate(asked) if track["metadata"].get(attribute) in classes]
        if not rows or not asking:  # an attribute that only other tracks have
            continue
        probe = Probe(x[rows], [known[i]["metadata"][attribute] for i in rows], classes)
        labels = [asked[i]["metadata"][attribute] for i in asking]
        table[attribute] = {"chance": max(labels.count(c) for c in classes) / len(labels)}
        table[attribute] |= {name: probe.accuracy(found[asking], labels) for name, found in clips.items()}
    return table


# ----------------------------------------------------------------------------------------------------------- clips


def load(checkpoint, device):
    """A checkpoint's model, to generate many clips at once: in float32, but on a GPU in bfloat16 if that trained it."""
    model, s, _ = load_model(checkpoint, device)
    takes_bfloat16 = device.type == "cuda" and s.dtype == "bfloat16" and common.has_fast_bfloat16("cuda")
    return optimize(model, torch.bfloat16) if takes_bfloat16 else model


def clips_at_once(model):
    """How many clips may be generated together: their KV caches take 2 GiB, or a quarter of a GPU's memory."""
    device, groups = model.heads.weight.device, 3 if "style" in model.conditioner.prepended else 2
    D, S = model.embed.embedding_dim, model.pattern(model.trained_frames).S
    steps = cache_steps(model.conditioner.rows + S)
    room = torch.cuda.get_device_properties(device).total_memory // 4 if device.type == "cuda" else 2**31
    return max(1, room // (groups * 2 * len(model.blocks) * steps * D * model.heads.weight.dtype.itemsize))


def generate_many(model, conditions, T, cfg, s, name, prompts=None):
    """Codes int64 [N, K, T] for N conditions and seeds 0 to N - 1, on the CPU of every rank. All ranks must call it.

    Rank r makes clips r, r + world size, ...; a clip is the same whoever makes it. prompts: codes [N, K, T'] to go on
    from.
    """
    mine, batch_size = range(common.rank(), len(conditions), common.world_size()), clips_at_once(model)
    parts = [torch.zeros(0, model.K, T, dtype=torch.int64)]
    with tqdm(total=-(-len(mine) // batch_size) * T, desc=f"generating, {name}", unit="frame", file=sys.stdout,
              mininterval=1, leave=False) as bar:  # fmt: skip
        for first in range(0, len(mine), batch_size):
            seeds = mine[first : first + batch_size]
            codes = generate(
                model, [conditions[i] for i in seeds], T, prompt=None if prompts is None else prompts[seeds], cfg=cfg,
                cfg_beta=s.cfg_beta, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seeds=seeds,
                progress=bar.update,
            )  # fmt: skip
            parts.append(codes.cpu())
    shares = common.gather(torch.cat(parts))
    codes = torch.zeros(len(conditions), model.K, T, dtype=torch.int64)
    for rank, share in enumerate(shares):
        codes[rank :: len(shares)] = share
    return codes


def clip_frames(s, codec):
    """How long the clips are that are generated to listen to and to measure."""
    return round((s.clip_seconds or s.segment) * codec.frame_rate)


def clip_of(tokens, track, frames):
    """Codes int64 [K, T] of the first `frames` frames of a track, or of all of it if it is shorter."""
    return torch.from_numpy(tokens.codes(track, 0, frames).T.astype(np.int64))


def listen(codec, clips, measure):
    """Clips, codes [K, T] -> `measure(wav [1, samples], sample_rate)` of each on the CPU, decoded one by one."""
    return [measure(codec.decode(codes[None]).mean(1), codec.sample_rate).cpu() for codes in clips]


def what_to_generate(conditions, s):
    """{name: (N conditions, guidance)}; the first name has all conditions and the settings' cfg."""
    names = {name for sample in conditions for name in sample}
    wanted = {f"cfg {s.cfg:g}": (conditions, s.cfg), "cfg 1": (conditions, 1.0)}
    if len(names) > 1:
        for name in sorted(names):
            wanted[f"{name} alone"] = ([{name: sample.get(name)} for sample in conditions], s.cfg)
    if "style" in names:
        for number in {1, s.style_codebooks}:
            excerpts = [{"style": (sample["style"][0], number)} for sample in conditions]
            wanted[f"style of {number} codebook{'s' * (number > 1)}"] = (excerpts, s.cfg)
    return wanted | {"nothing": ([{} for _ in conditions], 1.0)}


def evaluate(checkpoint, codec, train_data, valid_data, s):
    """Measures a checkpoint on the first `evaluate_clips` held-out tracks. All ranks must call it, and get the same:

    clips                  how many
    fad, fad_real          Fréchet distance from the held-out clips to those generated for their conditions, cut to the
                           same lengths; and to training clips, which is the floor
    chroma, chroma_chance  similarity of each held-out clip to the one generated for it; and to the one for the next.
                           Only the difference tells: noise, whose pitches are all equal, is similar to anything
    rtf                    seconds of music a second, all ranks together, with the guidance of the settings: from
                           conditions to codes, the text encoder and the gathering of the codes included, decoding not
    adherence              {attribute: {"chance", "real", "cfg 3", "cfg 1", ..., "nothing"}}, shares of clips, with the
                           cfg of the settings in the place of 3. `real` is the held-out music; `nothing` is generated
                           without conditions, which is what conditioning has to beat. {} without captions, or without
                           an attribute that training and held-out tracks share
    melody                 {"real", "cfg 3", ...: {"own", "shuffled"}}, similarity of each clip's chroma to the melody
                           that it was given, and to the next clip's. {} if the model takes no melody
    """
    model = load(checkpoint, codec.device)
    T, asked = clip_frames(s, codec), valid_data.tracks[: s.evaluate_clips]
    attributes = attributes_of(train_data) if any(map(data.text_of, asked)) else {}
    *_, conditions = valid_data.collate(valid_data.whole_items([(track, 0) for track in asked], T, s), T)
    wanted = what_to_generate(conditions, s)
    guided = next(iter(wanted))
    if not attributes and not s.melody:  # nothing to compare the others by
        wanted = {guided: wanted[guided]}
    made, seconds = {}, {}
    for name, (given, cfg) in wanted.items():
        common.barrier()
        start = time.perf_counter()
        made[name] = generate_many(model, given, T, cfg, s, name)
        seconds[name] = time.perf_counter() - start  # the slowest rank's, for which the others wait
    if common.rank() > 0:
        return common.gather(None)[0]

    real = [clip_of(valid_data, track, T) for track in asked]
    clips = {"real": real}
    for name, codes in made.items():
        clips[name] = [clip[:, : held_out.shape[1]] for clip, held_out in zip(codes, real)]
    target = latent_gaussian(codec, real)
    chroma = {name: listen(codec, progress(clips[name], f"chroma of {name}"), chromagram)
              for name in clips if s.melody or name in ("real", guided)}  # fmt: skip
    result = {
        "clips": len(asked),
        "fad": frechet_distance(latent_gaussian(codec, clips[guided]), target),
        "fad_real": frechet_floor(codec, train_data, real, target),
        "chroma": mean_similarity(chroma["real"], chroma[guided]),
        "chroma_chance": mean_similarity(chroma["real"], chroma[guided][1:] + chroma[guided][:1]),
        "rtf": len(asked) * T / codec.frame_rate / seconds[guided],
        "adherence": {},
        "melody": {},
    }
    if s.melody:
        melodies = [F.one_hot(torch.as_tensor(sample["melody"]).long(), SILENCE + 1)[:, :SILENCE].T[None].float()
                    for sample in conditions]  # fmt: skip
        shuffled = melodies[1:] + melodies[:1]
        for name, found in chroma.items():
            result["melody"][name] = dict(
                own=mean_similarity(found, melodies), shuffled=mean_similarity(found, shuffled)
            )
    if attributes:
        x = {name: torch.cat(listen(codec, progress(codes, f"listening to {name}"), features))
             for name, codes in clips.items()}  # fmt: skip
        known = train_data.tracks[:: max(1, len(train_data.tracks) // PROBE_CLIPS)]
        codes = (clip_of(train_data, track, T) for track in progress(known, "listening to training clips"))
        result["adherence"] = adherence(attributes, known, torch.cat(listen(codec, codes, features)), asked, x)
    print_table(result)
    return common.gather(result)[0]


def write_samples(checkpoint, codec, valid_data, step, s):
    """Clips to listen to, for the first held-out captions, with the same seeds every time: generated freely, and
    continuing the first quarter of the held-out music; beside them, that music itself and what the codec makes of it.

    Returns what the listening page needs to know of each clip, on every rank; paths are relative to OUT.
    """
    model = load(checkpoint, codec.device)
    T, tracks, out = clip_frames(s, codec), valid_data.tracks[: s.samples], Path(s.out)
    codes, valid, _, conditions = valid_data.collate(valid_data.whole_items([(track, 0) for track in tracks], T, s), T)
    lengths = valid.sum(1)
    prompt_frames = max(1, min(T // 4, int(lengths.min())))
    free = generate_many(model, conditions, T, s.cfg, s, "samples")
    prompts = codes[:, :, :prompt_frames]
    continued = generate_many(model, conditions, T, s.cfg, s, "continuations", prompts)
    if common.rank() > 0:
        return []
    folder, held_out, clips = out / "samples" / f"step_{step:06d}", out / "samples" / "held_out", []
    for new in (folder, held_out):
        new.mkdir(parents=True, exist_ok=True)
    for seed, track in enumerate(tracks):
        name, real = file_name(data.text_of(track), seed), codes[seed, :, : lengths[seed]]
        wavs = {
            "free": (folder / f"{name}.wav", codec.decode(free[seed][None])[0]),
            "continued": (folder / f"{name}_continued.wav", codec.decode(continued[seed][None])[0]),
            "codec": (held_out / f"{name}_codec.wav", codec.decode(real[None])[0]),
        }
        with contextlib.suppress(UserError):  # the music may have been moved since it was encoded
            wav = load_audio(track["path"], codec.sample_rate, codec.channels, real.shape[1] * codec.hop)
            wavs["reference"] = (held_out / f"{name}.wav", wav)
        clip = dict(caption=data.text_of(track), seed=seed, prompt_seconds=prompt_frames / codec.frame_rate)
        for key, (path, wav) in wavs.items():
            clip[key] = write_audio(path, wav, codec.sample_rate).relative_to(out).as_posix()
        clips.append(clip)
    return clips


def print_table(result):
    print(f"\nmeasured on {result['clips']} clips, generated for held-out conditions")
    print(f"Fréchet distance of codec latents {result['fad']:9.2f}   floor, real music: {result['fad_real']:.2f}")
    print(f"chroma similarity to the held-out {result['chroma']:9.2f}   chance: {result['chroma_chance']:.2f}")
    print(f"real-time factor                  {result['rtf']:9.2f}   seconds of music in a second")
    columns = dict(result["adherence"])
    if result["melody"]:
        for key, title in (("own", "melody"), ("shuffled", "shuffled")):
            columns[title] = {name: row[key] for name, row in result["melody"].items()}
    if not result["adherence"]:
        print("caption adherence: not measured, without captions and attributes in both splits")
    if not columns:
        return
    print("\nadherence: share of clips in which a probe hears the attribute of the clip that gave the conditions")
    if result["melody"]:
        print("melody: similarity of chroma to the melody that was given, and to another clip's")
    print(f"{'':18}" + "".join(f"{title:>12}" for title in columns))
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        cells = [f"{column[name]:12.2f}" if name in column else f"{'':12}" for column in columns.values()]
        print(f"{name:18}" + "".join(cells))
    if result["adherence"]:
        guided = [*next(iter(result["adherence"].values()))][2]  # after chance and real
        shares = [row[guided] / row["real"] if row["real"] else 0.0 for row in result["adherence"].values()]
        print(f"{guided + ', % of real':18}" + "".join(f"{share:12.0%}" for share in shares))
        print(f"standard error of a share, by the number of clips alone: up to {0.5 / result['clips'] ** 0.5:.2f}")


def print_means(results):
    """Mean and standard error over runs, of seeds say, of the figures that `evaluate` gives."""

    def cell(values):
        error = np.std(values, ddof=1) / len(values) ** 0.5
        return f"{np.mean(values):8.2f} ± {error:.2f}"

    print(f"\nmean and standard error over {len(results)} runs")
    for name in ("fad", "chroma", "chroma_chance"):
        print(f"{name:18}{cell([result[name] for result in results])}")
    columns = {name: [result["adherence"][name] for result in results] for name in results[0]["adherence"]
               if all(name in result["adherence"] for result in results)}  # runs may be of other data  # fmt: skip
    print(f"{'':18}" + "".join(f"{title:>15}" for title in columns))
    rows = next(iter(columns.values()), [{}])
    for name in rows[0]:
        if all(name in row for row in rows):  # runs may differ in their guidance
            print(f"{name:18}" + "".join(cell([row[name] for row in found]) for found in columns.values()))


def measure(run, clips, cfg, device):
    """`evaluate` of a run's best.pt, or of a checkpoint; written beside it as metrics.json."""
    path = Path(run, "best.pt") if Path(run).is_dir() else Path(run)
    _, s, description = load_model(path)
    s.evaluate_clips, s.cfg = clips, s.cfg if cfg is None else cfg
    codec = data.load_codec(s.data, s.codec, s.codec_weights).to(device)
    if codec.id != description["id"]:
        raise UserError(f"{path} is of codec {description['id']}, and {s.data} holds that of {codec.id}; train again")
    result = evaluate(path, codec, data.Tokens(s.data, "train"), data.Tokens(s.data, "valid"), s)
    if common.rank() == 0:
        common.write_json(path.with_name("metrics.json"), result)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, with best.pt in it, or a checkpoint")
    parser.add_argument("--clips", type=int, default=200, help="held-out captions to generate for (default 200)")
    parser.add_argument("--cfg", type=float, help="guidance; by default the run's")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto: the accelerator where there is one")
    args = parser.parse_args()
    if args.clips < 1:
        raise UserError(f"--clips {args.clips}: must be at least 1")
    if args.cfg is not None and not abs(args.cfg) < 1e6:
        raise UserError(f"--cfg {args.cfg}: must be a number, 3 or so")
    device = common.join(common.pick_device(args.device)[0], timeout=3600)
    results = [measure(run, args.clips, args.cfg, device) for run in args.runs]
    if len(results) > 1:
        print_means(results)
    common.leave()


if __name__ == "__main__":
    common.run(main)
