"""Work on a GPU, traced without one by tests/fake_cuda.py: no hidden wait, no float32 product, no slow attention."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TRAINING = ("bfloat16", "bfloat16, rope", "bfloat16, all conditions", "float16, all conditions")
INFERENCE = ("validation", "generation", "evaluation")


@pytest.fixture(scope="module")
def trace():
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    process = subprocess.run([sys.executable, "tests/fake_cuda.py"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def test_the_trace_counts_each_kind_of_mistake(trace):
    assert set(trace["mistakes"].values()) == {1} and len(trace["mistakes"]) == 9, trace["mistakes"]


@pytest.mark.parametrize("work", TRAINING)
def test_the_host_waits_once_per_training_step(trace, work):
    assert sum(trace[work]["waits"].values()) == 1, trace[work]["waits"]


@pytest.mark.parametrize("work", [*TRAINING, *INFERENCE])
def test_only_the_style_quantizer_multiplies_in_float32(trace, work):
    products, dtype = trace[work]["products"], "float16" if work.startswith("float16") else "bfloat16"
    of_quantizer = {"validation": 24, "generation": 12, "evaluation": 12}.get(work, 12 * ("all conditions" in work))
    assert products.pop("float32", 0) == of_quantizer and products.keys() == {dtype}, products


@pytest.mark.parametrize("work", [*TRAINING, *INFERENCE])
def test_attention_never_uses_the_math_kernel(trace, work):
    assert trace[work]["attention"].keys() <= {"flash", "efficient"}, trace[work]["attention"]
    if work not in ("generation", "evaluation"):  # decoding attends to a cache through a mask
        assert trace[work]["attention"]["flash"] > 0, "causal self-attention has no mask"


def test_validation_waits_once_per_result_not_per_batch(trace):
    waits = {line: count for line, count in trace["validation"]["waits"].items() if "patterns.py" not in line}
    assert sum(waits.values()) == 2, waits


def test_generation_never_waits_within_a_window(trace):
    waits = trace["generation"]["waits by frame"]
    first, second = waits[:20], waits[20:]  # each window copies its conditions to the device
    assert len(set(first)) == len(set(second)) == 1, waits


def test_evaluation_reads_the_codes_of_all_clips_at_once(trace):
    waits = [line for line in trace["evaluation"]["waits"] if "patterns.py" not in line]
    assert sum("cuda to cpu" in line for line in waits) == 1 and not any("item" in line for line in waits), waits


def test_each_clip_is_copied_and_read_in_one_part(trace):
    waits = trace["evaluation"]["measuring"]["waits"]
    assert set(waits.values()) == {2}, "there are 2 clips"
    assert all(line.startswith(("cpu to cuda", "cuda to cpu")) for line in waits), waits


def test_the_codec_computes_on_its_device(trace):
    assert trace["encoding"]["waits"] and trace["encoding"]["products"].keys() == {"float32"}
