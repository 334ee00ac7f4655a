"""log.py: the names of the numbers, and both files, cut back to the step where a run resumes."""

import json
import math
import sys

import pytest

from common import UserError
from config import Settings
from log import Log, by_codebook, in_words, read_log, with_perplexity


def test_names_are_flat():
    line = with_perplexity(by_codebook("ce", [1.0, 2.0, 3.0]))
    assert line == {
        "ce": 2.0, "ce_q1": 1.0, "ce_q2": 2.0, "ce_q3": 3.0,
        "ppl": math.exp(2), "ppl_q1": math.exp(1), "ppl_q2": math.exp(2), "ppl_q3": math.exp(3),
    }  # fmt: skip
    assert with_perplexity(by_codebook("ce", [1e6]))["ppl"] == math.exp(700), "a diverged loss does not overflow"


def stage(step, name):
    return dict(step=step, epoch=step // 10, stage=name, ce=3.0)


@pytest.mark.parametrize("is_committed", [False, True])
def test_both_files_are_cut_back_to_the_step_where_a_run_resumes(tmp_path, is_committed, capsys):
    """Lines of an epoch without its commit line are dropped too, because the run repeats its stages."""
    history = [stage(0, "valid"), stage(0, "commit"), stage(10, "train"), stage(10, "valid"), stage(20, "valid")]
    history[4:4] = [stage(10, "commit")] if is_committed else []
    for name, content in (("history", history), ("metrics", [dict(step=step) for step in (5, 10, 15)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content) + '{"step": 2')
    log = Log(Settings(out=str(tmp_path)), 10)
    assert log.history == history[: 5 if is_committed else 2] and log.is_committed(10) == is_committed
    assert read_log(tmp_path / "history.jsonl") == log.history
    assert [line["step"] for line in read_log(tmp_path / "metrics.jsonl")] == [5, 10]
    assert capsys.readouterr().out == "".join(in_words(line) + "\n" for line in log.history)
    log.stage("valid", 20, 2, ce=2.5)
    log.write("metrics", dict(step=20, ce=2.5))
    assert read_log(tmp_path / "history.jsonl")[-1] == dict(step=20, epoch=2, stage="valid", ce=2.5)
    assert read_log(tmp_path / "metrics.jsonl")[-1]["step"] == 20
    assert Log(Settings(out=str(tmp_path)), -1).history == [] == read_log(tmp_path / "metrics.jsonl"), "a new run"


def test_numbers_that_are_not_finite_are_null(tmp_path):
    log = Log(Settings(out=str(tmp_path)), -1)
    log.write("metrics", dict(step=3, ce=2.0, grad_norm=math.inf, skipped=1))
    log.stage("evaluate", 3, 1, fad=math.nan, parts=[{"x": -math.inf}])
    for name in ("metrics", "history"):
        (line,) = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert json.loads(line, parse_constant=pytest.fail) == read_log(tmp_path / f"{name}.jsonl")[0]
    assert read_log(tmp_path / "metrics.jsonl") == [dict(step=3, ce=2.0, grad_norm=None, skipped=1)]
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "grad_norm": Infinity}\n')  # written by older code
    Log(Settings(out=str(tmp_path)), 3)
    assert read_log(tmp_path / "metrics.jsonl") == [dict(step=3, grad_norm=None)]


def test_a_file_that_is_not_a_log_is_refused(tmp_path):
    assert read_log(tmp_path / "missing.jsonl") == []
    for content, message in (
        (b"{\n", "not JSON .*; repair or remove it"),
        (b"3\n", "an object with a step on each line; remove it"),
        (b'{"step": 1.5}\n', "an object with a step on each line; remove it"),
    ):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=f"a.jsonl: .*{message}"):
            read_log(tmp_path / "a.jsonl")


def test_a_logger_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="logger = 'wandb': not installed; pip install wandb"):
        Log(Settings(out=str(tmp_path), logger="wandb"), 0)
