"""What `evaluate` measures: is it music, does it follow its caption, and how fast does it come?

    python metrics.py out/demo [--clips 60] [--cfg 3] [--device cpu]
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
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import config
import data
import distributed
from codec import load_codec, mel_spectrogram
from conditioning import SILENCE, chromagram
from config import UserError
from model import load_model, pick_device

LARGEST_CLASS_COUNT = 7  # an attribute with more values than this is no class to probe for
PROBE_CLIPS = 600  # real clips that the probe learns from, at least, where there are so many
FLOOR_DRAWS = 10  # sets of real clips whose Fréchet distances are averaged, at most


def watched(items, doing, **bar):
    """The items one by one, with a progress bar and a beat for the watchdog."""
    for item in tqdm(items, desc=doing, file=sys.stdout, mininterval=1, leave=False, **{"unit": "clip", **bar}):
        distributed.beat("evaluating")
        yield item


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


def chroma_similarity(a, b):
    """Mean cosine of two chromagrams [12, T'] over the frames that sound in both; 0 where none does."""
    frames = min(a.shape[1], b.shape[1])
    a, b = a[:, :frames], b[:, :frames]
    sound = (a.sum(0) > 0) & (b.sum(0) > 0)
    return float(F.cosine_similarity(a[:, sound], b[:, sound], dim=0).mean()) if sound.any() else 0.0


def attributes_of(tokens):
    """The attributes to probe: metadata that is text and takes 2 to 7 values -> {name: [values]}."""
    values = {}
    for track in tokens.tracks:
        for key, value in track["metadata"].items():
            if isinstance(value, str):
                values.setdefault(key, set()).add(value)
    return {key: sorted(found) for key, found in values.items() if 2 <= len(found) <= LARGEST_CLASS_COUNT}


def features(wav, sample_rate):
    """wav [N, samples] -> [N, F]: mean and deviation of each mel band, and the autocorrelation of the onsets.

    All clips are brought to one loudness first, so that the probe cannot go by level.
    Onsets are the half-wave rectified rise of the log-mel spectrogram (spectral flux); their autocorrelation over lags
    of 0.1 to 2 s shows the beat whatever its place in the clip.
    """
    wav = 0.1 * wav / wav.square().mean(1, keepdim=True).sqrt().clamp(min=1e-4)
    hop = sample_rate // 50
    mel = (mel_spectrogram(wav, sample_rate, n_fft=1024, hop=hop) + 0.1).log()
    flux = mel.diff(dim=-1).clamp(min=0).mean(1)
    flux = flux - flux.mean(1, keepdim=True)
    spectrum = torch.fft.rfft(flux, n=max(202, 2 * flux.shape[1])).abs().square()  # lags past a short clip are 0
    correlation = torch.fft.irfft(spectrum)[:, :101]
    correlation = correlation[:, 5:] / correlation[:, :1].clamp(min=1e-8)
    return torch.cat([mel.mean(2), mel.std(2), correlation], dim=1)


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
        heard = (self.expand(x) @ self.weight).argmax(1)
        return float(np.mean([self.classes[i] == label for i, label in zip(heard, labels)]))


def adherence(attributes, known, x, asked, heard):
    """The share of clips in which the probe hears what is asked for: {attribute: {"chance", and every name in heard}}.

    The probe learns from the tracks `known`, with features x [N, F]; heard is {name: features [N, F]} of clips for the
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
        table[attribute] |= {name: probe.accuracy(clips[asking], labels) for name, clips in heard.items()}
    return table


def generate_many(model, conditions, T, cfg, s, name, prompts=None, batch_size=32):
    """Codes int64 [N, K, T] for N conditions and seeds 0 to N - 1, on the CPU of every rank. All ranks must call it.

    Rank r makes clips r, r + size, ...; a clip is the same whoever makes it. prompts: codes [N, K, T'] to go on from.
    """
    mine = range(distributed.rank(), len(conditions), distributed.size())
    bar = tqdm(total=len(mine) * T, desc=f"generating, {name}", unit="frame", file=sys.stdout, mininterval=1,
               leave=False, disable=distributed.rank() > 0)  # fmt: skip
    parts = [torch.zeros(0, model.K, T, dtype=torch.int64)]
    for first in range(0, len(mine), batch_size):
        seeds = mine[first : first + batch_size]

        def progress(done, before=first, clips=seeds):
            bar.update(before * T + done * len(clips) - bar.n)
            distributed.beat("evaluating")

        codes = model.generate(
            [conditions[i] for i in seeds], T, prompt=None if prompts is None else prompts[seeds], cfg=cfg,
            cfg_beta=s.cfg_beta, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seeds=seeds,
            progress=progress,
        )  # fmt: skip
        parts.append(codes.cpu())
    bar.close()
    shares = distributed.gather(torch.cat(parts))
    codes = torch.zeros(len(conditions), model.K, T, dtype=torch.int64)
    for rank, share in enumerate(shares):
        codes[rank :: len(shares)] = share
    return codes


def clip_of(tokens, track, frames):
    """Codes int64 [K, T] of the first `frames` frames of a track, or of all of it if it is shorter."""
    return torch.from_numpy(tokens.codes(track, 0, frames).T.astype(np.int64))


def listen(codec, clips, hear):
    """Clips, codes [K, T] -> `hear(wav [1, samples], sample_rate)` of each on the CPU, decoded one by one."""
    return [hear(codec.decode(codes[None]).mean(1), codec.sample_rate).cpu() for codes in clips]


def frechet_floor(codec, train_data, real, target):
    """Fréchet distance to `target`, the Gaussian of the clips `real`, from as many training clips of the same lengths.

    The mean over up to FLOOR_DRAWS sets of training tracks, because a few dozen clips may happen to be near or far.
    """
    step = max(1, len(train_data.tracks) // len(real))  # a set is every step-th track
    distances = []
    for first in watched(range(0, step, -(-step // FLOOR_DRAWS)), "real music against real", unit="set"):
        pairs = zip(train_data.tracks[first::step], real)
        clips = (clip_of(train_data, track, held_out.shape[1]) for track, held_out in pairs)
        distances.append(frechet_distance(latent_gaussian(codec, clips), target))
    return float(np.mean(distances))


def requests(conditions, s):
    """What to generate: {name: (N conditions, guidance)}; the first name has all conditions and the settings' cfg."""
    names = {name for sample in conditions for name in sample}

    def alone(name, **change):
        return [{name: change.get(name, sample[name])} if name in sample else {} for sample in conditions]

    made = {f"cfg {s.cfg:g}": (conditions, s.cfg), "cfg 1": (conditions, 1.0)}
    if len(names) > 1:
        made |= {f"{name} alone": (alone(name), s.cfg) for name in sorted(names)}
    if "style" in names:
        for books in {1, s.style_books}:
            excerpts = [{"style": (sample["style"][0], books)} for sample in conditions]
            made[f"style of {books} book{'s' * (books > 1)}"] = (excerpts, s.cfg)
    return made | {"nothing": ([{} for _ in conditions], 1.0)}


def evaluate(model, codec, train_data, valid_data, s):
    """Measures the model on the first `evaluate_clips` held-out tracks. All ranks must call it, and get the same dict:

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
    T, asked = model.trained_frames, valid_data.tracks[: s.evaluate_clips]
    attributes = attributes_of(train_data) if any(track["caption"] for track in asked) else {}

    conditions = valid_data.whole([(track, 0) for track in asked], T, s).conditions
    made, seconds = {}, 0.0
    for name, (given, cfg) in requests(conditions, s).items():
        if made and not attributes and not s.melody:
            break
        distributed.wait()
        start = time.perf_counter()
        made[name] = generate_many(model, given, T, cfg, s, name)
        seconds = seconds or time.perf_counter() - start  # the slowest rank's, for which the others wait
    if distributed.rank() > 0:
        return distributed.gather(None)[0]

    real = [clip_of(valid_data, track, T) for track in asked]
    made = {name: [codes[:, : held_out.shape[1]] for codes, held_out in zip(clips, real)]
            for name, clips in {"real": real, **made}.items()}  # fmt: skip
    guided = f"cfg {s.cfg:g}"
    target = latent_gaussian(codec, real)
    chroma = {name: listen(codec, watched(clips, f"chroma of {name}"), chromagram)
              for name, clips in made.items() if s.melody or name in ("real", guided)}  # fmt: skip

    def similarity(ours, theirs):
        return float(np.mean([chroma_similarity(a[0], b[0]) for a, b in zip(ours, theirs)]))

    def shuffled(clips):
        return clips[1:] + clips[:1]

    result = {
        "clips": len(asked),
        "fad": frechet_distance(latent_gaussian(codec, made[guided]), target),
        "fad_real": frechet_floor(codec, train_data, real, target),
        "chroma": similarity(chroma["real"], chroma[guided]),
        "chroma_chance": similarity(chroma["real"], shuffled(chroma[guided])),
        "rtf": len(asked) * T / codec.frame_rate / seconds,
        "adherence": {},
        "melody": {},
    }
    if s.melody:
        melodies = [F.one_hot(torch.as_tensor(sample["melody"]).long(), SILENCE + 1)[:, :SILENCE].T[None].float()
                    for sample in conditions]  # fmt: skip
        others = shuffled(melodies)
        result["melody"] = {name: {"own": similarity(clips, melodies), "shuffled": similarity(clips, others)}
                            for name, clips in chroma.items()}  # fmt: skip
    if attributes:
        heard = {name: torch.cat(listen(codec, watched(clips, f"listening to {name}"), features))
                 for name, clips in made.items()}  # fmt: skip
        known = train_data.tracks[:: max(1, len(train_data.tracks) // PROBE_CLIPS)]
        clips = (clip_of(train_data, track, T) for track in watched(known, "listening to training clips"))
        result["adherence"] = adherence(attributes, known, torch.cat(listen(codec, clips, features)), asked, heard)
    return distributed.gather(result)[0]


def print_table(result):
    print(f"\nmeasured on {result['clips']} clips, generated for held-out conditions")
    print(f"Fréchet distance of codec latents {result['fad']:9.2f}   floor, real music: {result['fad_real']:.2f}")
    print(f"chroma similarity to the held-out {result['chroma']:9.2f}   chance: {result['chroma_chance']:.2f}")
    print(f"real-time factor                  {result['rtf']:9.2f}   seconds of music in a second")
    columns = {f"{name}": row for name, row in result["adherence"].items()}
    if result["melody"]:
        for key, title in (("own", "melody"), ("shuffled", "shuffled")):
            columns[title] = {name: of[key] for name, of in result["melody"].items()}
    if not result["adherence"]:
        print("caption adherence: not measured, without captions and attributes on both sides")
    if not columns:
        return
    print("\nadherence: share of clips in which a probe hears the attribute of the clip that gave the conditions")
    if result["melody"]:
        print("melody: similarity of chroma to the melody that was given, and to another clip's")
    print(f"{'':18}" + "".join(f"{title:>12}" for title in columns))
    for name in dict.fromkeys(name for column in columns.values() for name in column):
        cells = [f"{column[name]:12.2f}" if name in column else f"{'':12}" for column in columns.values()]
        print(f"{name:18}" + "".join(cells))
    for row in list(result["adherence"].values())[:1]:
        guided = list(row)[2]
        shares = [of[guided] / of["real"] if of["real"] else 0.0 for of in result["adherence"].values()]
        print(f"{guided + ', % of real':18}" + "".join(f"{share:12.0%}" for share in shares))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run's folder, with best.pt in it")
    parser.add_argument("--clips", type=int, default=60, help="held-out captions to generate for")
    parser.add_argument("--cfg", type=float, help="guidance; by default the run's")
    parser.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto: the first of them that is there")
    args = parser.parse_args()
    if args.clips < 1:
        raise UserError(f"--clips {args.clips}: must be at least 1")
    device = distributed.join(pick_device(args.device)[0], seconds=600)
    model, s, about = load_model(Path(args.run, "best.pt"), device)
    s.evaluate_clips, s.cfg = args.clips, s.cfg if args.cfg is None else args.cfg
    codec = load_codec(s.codec, s.codec_weights).to(device)
    train_data, valid_data = data.Tokens(s.data, "train"), data.Tokens(s.data, "valid")
    if codec.id != about["id"] or train_data.meta["codec"]["id"] != about["id"]:
        raise UserError(
            f"{args.run} was trained on codec {about['id']}, and {s.data} holds {train_data.meta['codec']['id']}"
        )
    result = evaluate(model, codec, train_data, valid_data, s)
    print_table(result)
    if distributed.rank() == 0:
        data.write_json(Path(args.run, "metrics.json"), result)
    distributed.leave()


if __name__ == "__main__":
    config.run(main, distributed.first_to_report, distributed.exit)
