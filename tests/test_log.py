"""The two logs of a run: flat names, cut back on resuming, told alike everywhere."""

import json
import math

import pytest

import log
from common import UserError
from config import Settings
from log import Log, by_codebook, in_words, read_log, with_perplexity


def test_names_are_flat_and_those_of_the_reference():
    line = with_perplexity(by_codebook("ce", [1.0, 2.0, 3.0]))
    assert line == {
        "ce": 2.0, "ce_q1": 1.0, "ce_q2": 2.0, "ce_q3": 3.0,
        "ppl": math.exp(2), "ppl_q1": math.exp(1), "ppl_q2": math.exp(2), "ppl_q3": math.exp(3),
    }  # fmt: skip
    assert with_perplexity(by_codebook("ce", [1e6]))["ppl"] == math.exp(700), "a diverged loss is logged too"


def stage(step, name):
    return dict(step=step, epoch=step // 10, stage=name, ce=3.0)


@pytest.mark.parametrize("committed", [False, True])
def test_the_logs_are_cut_back_to_the_step_that_a_run_resumes_at(tmp_path, committed, capsys):
    """An epoch that was not committed is done again; one that was is not."""
    history = [stage(0, "valid"), stage(0, "commit"), stage(10, "valid"), stage(20, "valid")]
    history[3:3] = [stage(10, "commit")] if committed else []
    for name, content in (("history", history), ("metrics", [dict(step=step) for step in (5, 10, 15)])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content) + '{"step": 2')
    run = Log(Settings(out=str(tmp_path)), 10)
    kept = [("valid", 0), ("commit", 0)] + ([("valid", 10), ("commit", 10)] if committed else [])
    assert [(line["stage"], line["step"]) for line in run.history] == kept and run.is_committed(10) == committed
    assert read_log(tmp_path / "history.jsonl") == run.history
    assert [line["step"] for line in read_log(tmp_path / "metrics.jsonl")] == [5, 10]
    assert capsys.readouterr().out == "".join(in_words(line) + "\n" for line in run.history)
    run.stage("valid", 20, 2, ce=2.5)
    run.write("metrics", dict(step=20, ce=2.5))
    assert read_log(tmp_path / "history.jsonl")[-1] == dict(step=20, epoch=2, stage="valid", ce=2.5)
    assert read_log(tmp_path / "metrics.jsonl")[-1]["step"] == 20
    assert Log(Settings(out=str(tmp_path)), -1).history == [] == read_log(tmp_path / "metrics.jsonl")


def test_a_log_that_is_none_is_refused(tmp_path):
    assert read_log(tmp_path / "none.jsonl") == []
    for content, said in ((b"{\n", "not JSON"), (b"3\n", "an object with its step"), (b'{"step": 1.5}\n', "an object")):
        (tmp_path / "a.jsonl").write_bytes(content)
        with pytest.raises(UserError, match=said):
            read_log(tmp_path / "a.jsonl")


def test_a_logger_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match="logger = 'wandb': not installed; pip install wandb"):
        log.open_logger(Settings(out=str(tmp_path), logger="wandb"), 0)
