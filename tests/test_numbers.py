"""The figures that a run reports, on cases whose answers are known without it."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import TOY

import data
import train
from config import Settings
from model import MusicLM

D, LAYERS, K, CARD, T, B = 32, 2, 4, 512, 50, 4  # of TOY


def make_model(card=64):
    s = Settings(dim=16, heads=2, layers=1, text_dim=16, text_heads=2, text_layers=1, segment=0.4)
    return MusicLM(s, dict(K=4, card=card, frame_rate=50, dim=8), data.train_tokenizer([], 300)).eval()


def ce_of(model, codes, scored=None):
    valid = torch.ones(len(codes), codes.shape[2], dtype=torch.bool)
    inputs = model.conditioner.prepare([{}] * len(codes), "cpu")
    with torch.no_grad():
        ce_sum, count = model(codes, valid, valid if scored is None else scored, inputs)
    return ce_sum / count


def test_ce_of_a_model_that_guesses_and_of_one_that_knows():
    model = make_model()
    codes = torch.randint(64, (3, 4, 20))
    torch.nn.init.zeros_(model.heads.weight)
    torch.testing.assert_close(ce_of(model, codes), torch.full((4,), math.log(64)))
    with torch.no_grad():  # the heads read ones, whatever stood before, and every codebook is sure of its own code
        model.norm.weight.zero_()
        model.norm.bias.fill_(1)
        for k in range(4):
            model.heads.weight[k * 64 + 10 + k] = 50 / 16
    known = (10 + torch.arange(4))[None, :, None].expand(3, 4, 20)
    assert ce_of(model, known).max() < 1e-6
    torch.testing.assert_close(ce_of(model, known + 1), torch.full((4,), 50.0))
    half = torch.where(torch.arange(20) % 2 == 0, known, known + 1)  # in codebook k, 20 - k frames are left of 20
    wrong = torch.tensor([(torch.arange(20 - k) % 2).float().mean() for k in range(4)])
    torch.testing.assert_close(ce_of(model, half), 50 * wrong)


def test_ce_of_frames_that_do_not_count_is_not_in_the_mean():
    model = make_model()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1)
        model.heads.weight.zero_()
        model.heads.weight[3::64] = 20 / 16
    codes = torch.full((2, 4, 20), 3)
    codes[1] = 4
    scored = torch.ones(2, 20, dtype=torch.bool)
    scored[1, 5:] = False  # 20 right ones, 5 wrong ones: a mean over positions, not over items
    wrong = 20 + math.log1p(63 * math.exp(-20))
    expected = torch.tensor([5 * wrong / (20 - k + 5) for k in range(4)])
    torch.testing.assert_close(ce_of(model, codes, scored), expected, rtol=1e-5, atol=1e-5)


def test_operations_are_those_counted_by_hand():
    s = Settings(dim=D, heads=2, layers=LAYERS, text_dim=16, text_heads=2, text_layers=1, segment=1.0)
    model = MusicLM(s, dict(K=K, card=CARD, frame_rate=50, dim=8), data.train_tokenizer([], 300))
    block = (
        3 * D * D + D * D + D * D + D * D + 4 * D * D + 4 * D * D + 3 * 2 * D
    )  # qkv, 2 outs, cross q, up, down, norms
    attention = 12 * LAYERS * D * T**2
    assert model.flops() == 6 * T * (LAYERS * block + K * CARD * D) + attention


def test_speed_and_mfu_by_a_clock_that_is_known(dataset, tmp_path, command, monkeypatch):
    now, usual = [100.0], train.update

    def two_seconds(*args):
        now[0] += 2
        return usual(*args)

    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train, "update", two_seconds)
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: 1e10)
    status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}", "--log_every=2", "--samples=0")
    assert status == 0, output
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    flops = 6 * T * (LAYERS * (14 * D * D + 6 * D) + K * CARD * D) + 12 * LAYERS * D * T**2
    for line in lines:
        assert line["tokens_per_s"] == B * K * T / 2 and line["data_wait"] == 0
        assert line["mfu"] == pytest.approx(B * flops / 2 / 1e10, abs=1e-4)
        assert line["ppl"] == math.exp(line["ce"]) and line["ce"] == pytest.approx(np.mean(line["ce_q"]))
    history = [json.loads(line) for line in open(tmp_path / "history.jsonl")]
    assert all(line["ppl"] == math.exp(line["ce"]) for line in history if line["stage"] == "valid")
