"""Batches, steps, validation and best.pt of a run, computed again by hand from its checkpoints and logs."""

import numpy as np
import pytest
import torch
from conftest import TOY, Ranks, lines, load
from models import make_model, make_stub

import data
from config import Settings
from dataprep.shards import text_of
from generate import generate, load_model
from model import MusicLM

SETTINGS = (
    "--steps=8 --epoch=1 --keep_every=1 --samples=0 --lr=0.01 --min_lr=0.002 --warmup=2 --beta1=0.8 --beta2=0.9"
    " --weight_decay=3 --clip=0.36 --ema_decay=0.8 --micro_batch=2 --melody=True --style=True"
).split()
STEPS = range(2, 9)  # those with a checkpoint before and after them


class Run:
    """A toy run that keeps the checkpoint of each step."""

    def __init__(self, dataset, out, dtype):
        self.out, self.dataset = out, dataset
        Ranks(*TOY, *SETTINGS, f"--data={dataset}", f"--out={out}", f"--dtype={dtype}", ranks=1).finish()
        self.kept = {step: load(out / f"step_{step:06d}.pt") for step in range(1, 9)}
        self.log = {line["step"]: line for line in lines(out / "metrics.jsonl")}
        self.s = Settings(**self.kept[1]["settings"])

    def valid_line(self, step):
        return next(line for line in lines(self.out / "history.jsonl")
                    if (line["step"], line["stage"]) == (step, "valid"))  # fmt: skip

    def moment(self, step, name, key):
        return self.kept[step]["optimizer"][name][key]

    def received_gradient(self, step):
        """The gradient that AdamW received, {name: tensor}, from its first moments before and after the step."""
        beta = self.s.beta1
        return {name: (self.moment(step, name, "exp_avg") - beta * self.moment(step - 1, name, "exp_avg")) / (1 - beta)
                for name in self.kept[step]["optimizer"]}  # fmt: skip

    def model(self, step, key):
        saved = self.kept[step]
        model = MusicLM(self.s, saved["codec"], saved["tokenizer"])
        model.load_state_dict(saved[key])
        return model.train(key == "model")


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    return Run(dataset, tmp_path_factory.mktemp("run") / "float32", "float32")


@pytest.fixture(scope="module")
def half_run(dataset, tmp_path_factory):
    return Run(dataset, tmp_path_factory.mktemp("run") / "float16", "float16")


def norm_of(gradient):
    return torch.cat([g.flatten() for g in gradient.values()]).norm().item()


# Weights and batches before a step


def test_the_weights_of_later_layers_start_smaller():
    """The standard deviation is 1 / sqrt(2 l fan_in) in layer l, counted from 1. Cutting it off at 3 takes 1.4 %."""
    model = make_model(noise=0, dim=64, layers=4)
    for number, block in enumerate(model.blocks, 1):
        for name in ("qkv", "attn_out", "cross_q", "cross_kv", "cross_out", "up", "down"):
            weight = getattr(block, name).weight
            assert weight.std().item() == pytest.approx(0.986 / (2 * number * weight.shape[1]) ** 0.5, rel=0.05), name


def test_every_start_of_every_track_is_drawn_equally_often(dataset):
    """The first track, of 57 frames, is 8 frames longer than an item. The last start is a start too."""
    train_data = data.TokenDataset(dataset, "train")
    train_data.tracks[0]["frames"] = 57
    train_data.ends = np.cumsum([track["frames"] for track in train_data.tracks])
    items = sum((train_data.draw_items(step, 20, 49, Settings()) for step in range(150)), [])
    for track in train_data.tracks:
        drawn = [item for item in items if item.track is track]
        expected = len(items) * track["frames"] / train_data.ends[-1]
        assert abs(len(drawn) - expected) < 5 * expected**0.5, track["name"]
    assert {item.start for item in items if item.track is train_data.tracks[0]} == set(range(9))


def test_the_items_of_a_batch_drop_their_conditions_independently(dataset):
    s = Settings(melody=True, cfg_dropout=0.5, text_dropout=0.0, melody_dropout=0.0)
    train_data = data.TokenDataset(dataset, "train")
    dropped = [[item.choices["text"] is None for item in train_data.draw_items(step, 8, 50, s)] for step in range(60)]
    correlation = np.corrcoef(np.transpose(dropped))
    assert 0.4 < np.mean(dropped) < 0.6 and np.abs(correlation - np.eye(8)).max() < 0.5


def test_an_item_that_starts_later_gets_the_rest_of_the_melody(dataset):
    """100 frames of 50 per second are 16 notes of 8 per second."""
    train_data, differ = data.TokenDataset(dataset, "train"), 0
    for track in train_data.tracks:
        choices = {"text": None, "melody": True, "style": None}
        melodies = [train_data.collate([data.Item(track, first, choices)], frames)[1][0]["melody"].tolist()
                    for first, frames in ((0, 200), (100, 100))]  # fmt: skip
        assert melodies[1] == melodies[0][16:] and len(melodies[1]) == 16, track["name"]
        differ += melodies[1] != melodies[0][:16]
    assert differ > len(train_data.tracks) / 2


def test_validation_takes_evenly_spread_segments_with_their_captions(dataset):
    valid_data, every, spread = data.TokenDataset(dataset, "valid"), [], []
    for limit, parts in ((0, every), (4, spread)):
        for batch, names in data.valid_batches(valid_data, make_stub(50), 1, Settings(valid_items=limit)):
            parts.append((names[0], batch.codes.flatten().tolist(), batch.condition_tensors[0]["text"]))
    captions = {track["name"]: text_of(track) for track in valid_data.tracks}
    assert [captions[name] for name, _, text in every] == [text for _, _, text in every] and all(captions.values())
    place = [every.index(part) for part in spread]
    assert (place[0], place[-1]) == (0, len(every) - 1) and np.ptp(np.diff(place)) <= 1, place


# A step


def test_the_learning_rate_rises_linearly_and_falls_along_a_cosine(run):
    """2 steps of warm-up, then the cosine of 0, 30, ... 150 degrees, from 0.01 towards 0.002."""
    expected = [0.005, 0.01, 0.01, 0.009464102, 0.008, 0.006, 0.004, 0.002535898]
    assert [run.log[step]["lr"] for step in range(1, 9)] == pytest.approx(expected)


def test_a_step_is_that_of_adamw_with_the_logged_learning_rate_and_decays_matrices_only(run):
    for step in STEPS:
        lr, gradient = run.log[step]["lr"], run.received_gradient(step)
        for name, g in gradient.items():
            before, after = (run.kept[number]["model"][name] for number in (step - 1, step))
            mean, square = run.moment(step, name, "exp_avg"), run.moment(step, name, "exp_avg_sq")
            expected = 0.9 * run.moment(step - 1, name, "exp_avg_sq") + 0.1 * g**2
            torch.testing.assert_close(square, expected, rtol=1e-3, atol=1e-9, msg=name)
            direction = mean / (1 - 0.8**step) / ((square / (1 - 0.9**step)).sqrt() + 1e-8)
            decayed = before * (1 - 3 * lr if before.dim() > 1 else 1)
            torch.testing.assert_close(after, decayed - lr * direction, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("float16", 0.03)])
def test_the_gradient_is_that_of_the_mean_ce_over_codebooks_and_targets_of_the_whole_batch(dtype, tolerance, request):
    run = request.getfixturevalue("run" if dtype == "float32" else "half_run")
    train_data = data.TokenDataset(run.dataset, "train")
    for step in (2, 5):
        model = run.model(step - 1, "model")
        ce_sum, targets = torch.zeros(4), torch.zeros(4)
        for batch in data.TrainingBatches(train_data, model, run.s)[step - 1]:
            ce_sum = ce_sum + model(*batch[:4])
            targets += data.count_targets(batch.in_loss, model.pattern(batch.codes.shape[2], training=True))
        ce = ce_sum / targets
        (ce.sum() / 4).backward()
        by_hand = {name: p.grad for name, p in model.named_parameters()}
        line, received = run.log[step], run.received_gradient(step)
        assert [line[f"ce_q{k}"] for k in (1, 2, 3, 4)] == pytest.approx(ce.tolist(), rel=tolerance)
        assert line["grad_norm"] == pytest.approx(norm_of(by_hand), rel=tolerance)
        factor = min(1, 0.36 / norm_of(by_hand))
        difference = norm_of({name: received[name] - factor * g for name, g in by_hand.items()})
        assert difference < tolerance * norm_of(received), step


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_only_gradients_above_the_largest_norm_are_clipped_to_it(dtype, request):
    run = request.getfixturevalue("run" if dtype == "float32" else "half_run")
    logged = [run.log[step]["grad_norm"] for step in STEPS]
    assert min(logged) < 0.36 < max(logged) < 1, logged
    for step, norm in zip(STEPS, logged):
        assert norm_of(run.received_gradient(step)) == pytest.approx(min(norm, 0.36), rel=1e-3), step


def test_each_step_updates_the_style_codebooks_and_the_ema_copies_them(run):
    buffers = run.kept[1]["model"].keys() - run.kept[1]["optimizer"].keys()
    assert any("style.vq" in name for name in buffers)
    for step in STEPS:
        before, after, average = run.kept[step - 1]["model"], run.kept[step]["model"], run.kept[step]["ema"]
        assert all(torch.equal(average[name], after[name]) for name in buffers)
        assert not all(torch.equal(before[name], after[name]) for name in buffers)


# Validation, best.pt, evaluation and samples


@torch.no_grad()
def validate_by_hand(run, model):
    """Return the mean ce over codebooks with all conditions, and the gain, of the held-out segments."""
    sums = {"all": torch.zeros(4), "none": torch.zeros(4)}
    targets = torch.zeros(4)
    for batch, _ in data.valid_batches(data.TokenDataset(run.dataset, "valid"), model, 2, run.s):
        nothing = model.conditioner.tokenize([{}] * len(batch.codes))
        for key, tensors in (("all", batch.condition_tensors), ("none", nothing)):
            sums[key] += model(*batch[:3], tensors)
        targets += batch.targets_per_codebook
    ce, null_ce = ((sums[key] / targets).mean().item() for key in ("all", "none"))
    return ce, null_ce - ce


def test_validation_measures_the_ema(run):
    for step in (3, 8):
        line = run.valid_line(step)
        (ce, gain), (raw_ce, _) = (validate_by_hand(run, run.model(step, key).eval()) for key in ("ema", "model"))
        assert line["ce"] == pytest.approx(ce, abs=1e-5) and line["gain"] == pytest.approx(gain, abs=1e-5)
        assert abs(raw_ce - ce) > 1e-3 and abs(gain) > 1e-4, "it would differ for the weights of the last step"


def test_after_a_worse_epoch_evaluation_and_samples_are_those_of_best(tmp_path, train_toy, withhold_nothing):
    """The second epoch diverges. best.pt keeps the EMA of the first one, so its music stays the same."""
    args = ["--lr=0.01", "--evaluate_clips=2", "--keep_every=1", "--ema_decay=0.5"]
    train_toy(tmp_path, *args, "--steps=3")
    before = (tmp_path / "best.pt").read_bytes()
    best, kept = load(tmp_path / "best.pt"), load(tmp_path / "step_000003.pt")
    assert best["step"] == 3 and all(torch.equal(kept["ema"][name], weight) for name, weight in best["ema"].items())
    train_toy(tmp_path, *args, "--steps=6", "--lr=0.5")
    history = lines(tmp_path / "history.jsonl")
    valid = [line["ce"] for line in history if line["stage"] == "valid"]
    assert valid[2] > valid[1] and (tmp_path / "best.pt").read_bytes() == before
    first, second = ({key: value for key, value in line.items() if key not in ("step", "epoch", "rtf")}
                     for line in history if line["stage"] == "evaluate")  # fmt: skip
    assert first == second and first["fad"] > 0
    wavs = [sorted((tmp_path / "samples" / f"step_{step:06d}").glob("*.wav")) for step in (3, 6)]
    assert len(wavs[0]) == 2 and all(a.read_bytes() == b.read_bytes() for a, b in zip(*wavs))
    codes = [generate(load_model(tmp_path / name)[0], [{"text": "piano"}], 20) for name in ("best.pt", "last.pt")]
    assert not np.array_equal(*codes), "the weights of the second epoch generate other music"
