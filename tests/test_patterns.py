"""patterns.py against patterns.json, which was made with audiocraft 1.3.0."""

import json
from pathlib import Path

import pytest
import torch
from models import PATTERNS

from patterns import make_pattern

CASES = json.loads((Path(__file__).parent / "patterns.json").read_text())["cases"]


def name(case):
    return f"{case['pattern']}-K{case['K']}-T{case['T']}-{case['delays'] or 'default'}"


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("kind", ["generation", "training"])
def test_positions_sequences_and_masks_equal_the_reference(case, kind):
    K, T = case["K"], case["T"]
    pattern = make_pattern(case["pattern"], K, T, case["delays"], training=kind == "training")
    sequence = pattern.build(torch.arange(K * T).view(1, K, T), special=-1)[0]
    assert pattern.position.tolist() == case["step"]
    assert sequence.tolist() == case[f"{kind}_sequence"]
    assert (sequence != -1).int().tolist() == case[f"{kind}_mask"]


@pytest.mark.parametrize("case", CASES, ids=name)
def test_aligned_logits_equal_the_reference_and_are_nan_where_cut_off(case):
    K, T = case["K"], case["T"]
    pattern = make_pattern(case["pattern"], K, T, case["delays"], training=True)
    logits = torch.arange(pattern.S, dtype=torch.float32)[None, None, :, None].expand(1, K, -1, 2)
    aligned = pattern.align_logits(logits)[0, :, :, 0]
    expected = torch.tensor(
        [[float(s) if s is not None else torch.nan for s in row] for row in case["aligned_logit_step"]]
    )
    torch.testing.assert_close(aligned, expected, equal_nan=True)
    assert pattern.frame_mask.int().tolist() == case["loss_mask"]


@pytest.mark.parametrize("pattern_name", PATTERNS)
def test_revert_undoes_build(pattern_name):
    codes = torch.randint(0, 100, (3, 4, 9))
    full = make_pattern(pattern_name, 4, 9)
    assert torch.equal(full.revert(full.build(codes, 100), 100), codes)
    cut = make_pattern(pattern_name, 4, 9, training=True)
    reverted = cut.revert(cut.build(codes, 100), 100)
    assert torch.equal(reverted, codes.masked_fill(~cut.frame_mask, 100))


def test_unknown_patterns_and_wrong_delays_are_refused():
    with pytest.raises(ValueError, match="unknown pattern 'zigzag'"):
        make_pattern("zigzag", 4, 9)
    with pytest.raises(ValueError, match="pass 4 integers of 0 or above"):
        make_pattern("delay", 4, 9, [0, 1])
