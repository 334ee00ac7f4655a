"""bench.py at toy size, its arithmetic against known times."""

import sys

import bench
import pytest
import torch

TOY = "--size tiny --train_batch 1 --train_frames 12 --generate_batch 2 --generate_frames 6 --dtype float32 --repeats 1"


def test_a_bench_prints_what_it_promises(command, monkeypatch):
    monkeypatch.setattr(bench, "ceilings", lambda device, dtype: (1e15, 1e9))
    monkeypatch.setitem(sys.modules, "transformers", None)  # as where they are not installed
    monkeypatch.setitem(sys.modules, "xformers", None)
    status, output = command(bench, *TOY.split(), "--work", "train,generate", "--peers")
    assert status == 0, output
    lines = [line.split() for line in output.splitlines() if line.startswith("  ours  ")]
    assert [line[2] for line in lines] == ["tokens/s", "frames/s"]
    model = bench.make_model(bench_arguments(), 12)[0]
    seconds = 1 * 4 * 12 / float(lines[0][1].replace(",", ""))
    assert float(lines[0][3]) == pytest.approx(100 * model.flops() / seconds / 1e15, abs=0.51)
    assert (
        "26 MB of weights a frame" in output and "x real time, all streams" in output and "first frame after" in output
    )
    assert "transformers is left out" in output and "audiocraft is left out" in output


def bench_arguments():
    class Given:
        size, card, activation_checkpointing = "tiny", 1024, False

    return Given


def test_medians_are_taken_in_turn_and_a_peer_may_fail(monkeypatch, capsys):
    now, order = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def work(name, *seconds):
        seconds = iter(seconds)

        def call():
            order.append(name)
            now[0] += next(seconds)

        return call

    def fail():
        raise ValueError("no such operator")

    calls = {("ours", False): work("a", 9, 1, 5, 2), ("transformers", False): work("b", 7, 4, 4, 8)}
    found = bench.in_turn({**calls, ("audiocraft", True): fail}, torch.device("cpu"), 3)
    assert found == {("ours", False): (9, 2), ("transformers", False): (7, 4)} and order == list("abababab")
    assert "audiocraft compiled is left out: no such operator" in capsys.readouterr().out
    with pytest.raises(ValueError):
        bench.in_turn({("ours", False): fail}, torch.device("cpu"), 3)
    bench.print_table("training", found, 100, "tokens/s", lambda rate: rate / 200)
    said = capsys.readouterr().out
    assert "50.0 tokens/s  25 % of ceiling" in said and "25.0 tokens/s  ours: 2.00 x" in said


def test_the_ceilings_are_those_of_what_is_run(monkeypatch):
    monkeypatch.setattr(bench, "in_turn", lambda calls, *_: [call() for call in calls.values()] and {
        "product": (0, 0.5), "copy": (0, 0.25)})  # fmt: skip
    product, copy = bench.ceilings(torch.device("cpu"), torch.float32)
    assert product == 2 * 2048**3 / 0.5 and copy == 2 * 2**28 / 0.25


def test_start_up_is_that_of_the_programs(command, monkeypatch):
    started = []
    monkeypatch.setattr(bench.subprocess, "run", lambda words, **how: started.append(words[1:]))
    status, output = command(bench, "--work", "start", "--repeats", 2)
    assert status == 0 and output.count(" s\n") == 3 and "import torch alone" in output
    assert [words for words in started if "train.py" in words] == 3 * [["train.py", "--help"]]


def test_bad_input_is_refused(command):
    status, output = command(bench, "--work", "trian")
    assert status == 2 and "there is no 'trian'" in output
    status, output = command(bench, "--generate_batch", "one")
    assert status == 2 and "invalid numbers value" in output
