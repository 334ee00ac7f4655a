"""What a GPU would be asked to do, found without one (tests/fake_cuda.py): no hidden wait, no product in float32."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TRAINING = ("bfloat16", "bfloat16, rope", "bfloat16, everything", "float16, everything")
WITHOUT_GRADIENT = ("validation", "generation", "evaluation")


@pytest.fixture(scope="module")
def found():
    if not shutil.which("g++"):
        pytest.skip("needs g++, for what a CPU build of torch lacks")
    ended = subprocess.run([sys.executable, "tests/fake_cuda.py"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_the_trace_finds_one_mistake_of_each_kind(found):
    assert set(found["mistakes"].values()) == {1} and len(found["mistakes"]) == 9, found["mistakes"]


@pytest.mark.parametrize("work", TRAINING)
def test_the_host_waits_once_in_a_step(found, work):
    assert sum(found[work]["waits"].values()) == 1, found[work]["waits"]


@pytest.mark.parametrize("work", [*TRAINING, *WITHOUT_GRADIENT])
def test_only_the_quantiser_of_styles_computes_products_in_float32(found, work):
    products, dtype = found[work]["products"], "float16" if work.startswith("float16") else "bfloat16"
    quantiser = {"validation": 24, "generation": 12, "evaluation": 12}.get(work, 12 * ("everything" in work))
    assert products.pop("float32", 0) == quantiser and products.keys() == {dtype}, products


@pytest.mark.parametrize("work", [*TRAINING, *WITHOUT_GRADIENT])
def test_attention_is_never_the_slow_one(found, work):
    assert found[work]["attention"].keys() <= {"flash", "efficient"}, found[work]["attention"]
    if work not in ("generation", "evaluation"):  # whose steps attend to a cache by a mask
        assert found[work]["attention"]["flash"] > 0, "causal self-attention has no mask"


def test_validation_waits_once_for_each_result_and_not_for_each_batch(found):
    waits = {where: n for where, n in found["validation"]["waits"].items() if "patterns.py" not in where}
    assert sum(waits.values()) == 2, waits


def test_a_frame_of_generation_waits_for_nothing(found):
    waits = found["generation"]["waits by frame"]
    first, second = waits[:20], waits[20:]  # the windows, each of which has its own conditions to send
    assert len(set(first)) == len(set(second)) == 1, waits


def test_evaluation_sends_what_generation_does_and_reads_its_codes_once(found):
    waits = [where for where in found["evaluation"]["waits"] if "patterns.py" not in where]
    assert sum("cuda to cpu" in where for where in waits) == 1 and not any("item" in where for where in waits), waits


def test_each_clip_is_sent_and_read_whole(found):
    waits = found["evaluation"]["listening"]["waits"]
    assert set(waits.values()) == {2}, "there are two clips"
    assert all(where.startswith(("cpu to cuda", "cuda to cpu")) for where in waits), waits


def test_the_codec_computes_on_the_device_it_is_on(found):
    assert found["encoding"]["waits"] and found["encoding"]["products"].keys() == {"float32"}
