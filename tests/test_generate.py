"""Conditions to codes: what is cached, batched, streamed, guided and drawn changes nothing that it should not."""

import gc
import importlib
import platform

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler
from models import CODEC, EXCERPTS, ORGAN, PIANO, TOKENIZER, make_model

import generate as generation
from common import UserError, has_fast_bfloat16
from config import Settings
from generate import choose_codes, condition_groups, generate, guide, optimize, stream
from linear import PackedLinear, SummedLinear
from model import MusicLM, attention, pattern_on

can_be_packed = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="needs an x86")


def test_a_condition_that_the_model_was_not_trained_with_is_refused():
    model = MusicLM(Settings(dim=32, heads=2, layers=1, melody=True), CODEC, TOKENIZER)
    with pytest.raises(UserError, match="not trained with 'style'; it takes text, melody"):
        generate(model, [PIANO], 3)


def test_a_melody_continues_where_the_window_does():
    """Past the trained length of 20 frames, the second window hears what its own frames are to follow."""
    model = make_model()
    notes = torch.arange(8) % 12
    given, prepare = [], model.conditioner.prepare
    model.conditioner.prepare = lambda conditions: given.append(conditions[0]["melody"]) or prepare(conditions)
    generate(model, [{"melody": notes}], 45, cfg=1.0)
    assert [row.tolist() for row in given] == [notes[round(first * 8 / 50) :].tolist() for first in (0, 10, 20, 30)]


@pytest.mark.parametrize("pattern", ["delay", "parallel", "unrolled"])
@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("positions", ["sinusoidal", "rope"])
def test_cached_generation_equals_uncached(pattern, prompted, positions):
    """Greedy generation with the cache, against the likeliest code of a full forward pass at every step.

    Guided twice over, by style and text: u + cfg (s + beta (c - s) - u).
    """
    model = make_model(pattern=pattern, positions=positions)
    prompt = torch.randint(0, 64, (1, 4, 5)) if prompted else None
    codes = generate(model, [ORGAN], 14, prompt, cfg=2.5, cfg_beta=1.7, temperature=0)
    whole = model.pattern(14)
    sequence = whole.build(codes, model.special)
    logits = []
    for condition in (ORGAN, {**ORGAN, "text": None}, {}):
        fused = model.conditioner(model.conditioner.prepare([condition]))
        logits.append(model.logits(model.hidden(sequence, *fused)).transpose(1, 2))
    c, s, u = logits
    guided = whole.align_logits(u + 2.5 * (s + 1.7 * (c - s) - u))
    first = 5 if prompted else 0
    assert torch.equal(guided.argmax(-1)[:, :, first:], codes[:, :, first:])


def test_autograd_takes_a_pattern_that_generation_asked_for_first():
    """Its table is cached, and one made in inference mode could not be saved for a backward pass."""
    pattern_on.cache_clear()
    model = make_model()
    generate(model, [PIANO], 14)
    pattern, logits = model.pattern(14), torch.randn(4, 18, requires_grad=True)
    logits.gather(1, pattern.step).sum().backward()
    assert logits.grad.sum() == 4 * 14


def test_prompts_of_different_lengths_in_one_batch():
    model = make_model()
    prompts = [torch.randint(0, 64, (4, T)) for T in (3, 12, 8)]
    conditions, options = [PIANO, ORGAN, {}], dict(cfg=2.0, temperature=0)
    for frames in (15, 33):  # within the trained length, and past it
        together = generate(model, conditions, frames, prompts, **options)
        for row, (condition, prompt) in enumerate(zip(conditions, prompts)):
            assert torch.equal(together[row, :, : prompt.shape[1]], prompt)
            if frames == 15:
                assert torch.equal(together[row], generate(model, [condition], frames, prompt[None], **options)[0])
    sampled = dict(cfg=2.0, temperature=1.0)
    together = generate(model, conditions, 15, prompts, seeds=[3, 4, 5], **sampled)
    for row, (condition, prompt) in enumerate(zip(conditions, prompts)):
        assert torch.equal(together[row], generate(model, [condition], 15, prompt[None], seeds=[3 + row], **sampled)[0])


def test_lower_precision_in_generation_stays_close(monkeypatch):
    """The logits of a step after a prompt, weights in bfloat16 against float32."""
    found, usual = [], generation.decode_one_step
    monkeypatch.setattr(generation, "decode_one_step", lambda *args: found.append(usual(*args)) or found[-1])
    for dtype in (torch.float32, torch.bfloat16):
        model = optimize(make_model(), dtype)
        assert model.blocks[0].up.weight.dtype == dtype and model.embed.weight.dtype == torch.float32
        generate(model, [ORGAN], 6, torch.zeros(1, 4, 5, dtype=torch.int64), cfg=1.0)
    exact, low = found[0], found[len(found) // 2]
    assert low.dtype == torch.float32 and not torch.equal(exact, low)
    assert (exact - low).norm() < 0.03 * exact.norm()


def equal_when_compiled(lengths, dtype=torch.float32, **settings):
    eager, compiled = (optimize(make_model(layers=1, **settings), dtype, compiled) for compiled in (False, True))
    for frames in lengths:
        options = dict(cfg=2.0, temperature=0, prompt=torch.ones(2, 4, 2, dtype=torch.int64))
        ours, theirs = (generate(model, [ORGAN, {}], frames, **options) for model in (eager, compiled))
        assert torch.equal(ours, theirs)


@needs_compiler
def test_compiled_generation_equals_eager():
    """Within the trained length and past it; also where another model of the same shapes was compiled before."""
    equal_when_compiled((9, 33), positions="rope")
    equal_when_compiled((9,), positions="sinusoidal")


@needs_compiler
@pytest.mark.parametrize(
    "dtype, rows, within", [(torch.float32, 1, 1e-5), (torch.float32, 9, 1e-5), (torch.bfloat16, 4, 1e-2)]
)
def test_a_compiled_narrow_layer_sums_what_a_linear_layer_multiplies(dtype, rows, within):
    model, x = optimize(make_model(layers=1), dtype, compiled=True), torch.randn(rows, 1, 32)
    graphs = []

    def remember(graph, inputs):
        graphs.append(graph.code)
        return graph

    for layer in (model.heads, model.blocks[0].up):
        assert type(layer) is SummedLinear
        found, expected = torch.compile(layer, fullgraph=True)(x), F.linear(x.to(dtype), layer.weight)
        torch.testing.assert_close(found, expected, rtol=within, atol=within)
        torch.compile(layer, backend=remember, fullgraph=True)(x)
        assert ("linear(" in graphs[-1]) == (rows > 8), graphs[-1]


@needs_compiler
@can_be_packed
def test_compiled_generation_equals_eager_with_packed_weights(monkeypatch):
    """Each model's own, where two have the same shapes; and in bfloat16, where the processor has it."""
    monkeypatch.setattr("linear.is_amd", lambda: True)
    for lively in (True, False):
        equal_when_compiled((9,), positions="rope", dim=512, lively=lively)
    if has_fast_bfloat16("cpu"):
        equal_when_compiled((9,), torch.bfloat16, positions="rope", dim=512)


def test_a_sample_is_the_same_alone_and_in_a_batch():
    model = make_model()
    together = generate(model, [PIANO, ORGAN, {}], 15, seeds=[3, 4, 5])
    for row, (condition, seed) in enumerate(((PIANO, 3), (ORGAN, 4), ({}, 5))):
        assert torch.equal(generate(model, [condition], 15, seeds=[seed])[0], together[row])
    assert not torch.equal(generate(model, [PIANO], 15, seeds=[9])[0], together[0])


def test_prompt_is_kept_and_length_is_as_asked_past_the_trained_length():
    model = make_model()  # trained on 20 frames
    prompt = torch.randint(0, 64, (2, 4, 30))
    reports = []
    codes = generate(model, [PIANO, {}], 57, prompt, progress=reports.append)
    assert codes.shape == (2, 4, 57) and torch.equal(codes[:, :, :30], prompt)
    assert codes.min() >= 0 and codes.max() < 64
    assert reports == [30] + 27 * [1]
    assert torch.equal(codes, generate(model, [PIANO, {}], 57, prompt))


@pytest.mark.parametrize("positions", ["sinusoidal", "rope"])
def test_a_longer_sample_of_the_same_seed_begins_with_the_shorter_one(positions):
    """But for the last three frames: where a sample ends, the delayed codebooks see special tokens in the first one."""
    model = make_model(positions=positions)
    longest = generate(model, [PIANO, ORGAN], 45, seeds=[3, 4])
    for frames in (7, 20, 33):
        shorter = generate(model, [PIANO, ORGAN], frames, seeds=[3, 4])
        assert torch.equal(shorter[:, :, :-3], longest[:, :, : frames - 3])
        assert torch.equal(shorter[:, 0], longest[:, 0, :frames])


@pytest.mark.parametrize("pattern, steps", [("delay", 4), ("parallel", 1), ("unrolled", 4)])
@pytest.mark.parametrize("prompted", [False, True])
def test_frames_are_streamed_as_soon_as_they_are_final(monkeypatch, pattern, steps, prompted):
    model = make_model(pattern=pattern)
    calls, usual = [], generation.decode_one_step
    monkeypatch.setattr(generation, "decode_one_step", lambda *args: calls.append(1) or usual(*args))
    prompt = torch.randint(0, model.card, (1, 4, 5)) if prompted else None
    conditions, options = [{"text": "bells"}, {}], dict(prompt=prompt, seeds=[3, 4], stride=6)
    whole = generate(model, conditions, 33, **options)
    calls.clear()
    parts = []
    for part in stream(model, conditions, 33, **options):
        parts.append(part)
        if len(parts) == 1 and not prompted:
            assert len(calls) == steps
    assert torch.equal(torch.cat(parts, dim=2), whole) and whole.unique().numel() > 20
    assert [part.shape[2] for part in parts] == ([5] + 28 * [1] if prompted else 33 * [1])


def test_windows_continue_by_the_stride(monkeypatch):
    model = make_model(segment=1.0)  # trained on 50 frames
    contexts, usual = [], generation.continue_window

    def watched(model, codes, done, *rest, **options):
        contexts.append(codes[:, :, :done].clone())
        return usual(model, codes, done, *rest, **options)

    monkeypatch.setattr(generation, "continue_window", watched)
    for stride, starts in ((None, [0, 50, 75, 100]), (30, [0, 50, 80]), (10, [0, 50, 60, 70, 80, 90, 100])):
        contexts.clear()
        codes = generate(model, [{"text": "bells"}], 110, stride=stride)
        kept = 50 - (stride or 25)
        assert codes.shape == (1, 4, 110) and len(contexts) == len(starts)
        for first, context in zip(starts, contexts):
            assert torch.equal(context, codes[:, :, max(0, first - kept) : first])
    for stride in (-1, 50, 60):
        with pytest.raises(UserError, match="must be above 0 and below the 50 frames of training"):
            generate(model, [{}], 60, stride=stride)


def test_guidance_is_the_formula_of_the_blackboard():
    both, style, uncond = torch.randn(3, 2, 4, 8)
    torch.testing.assert_close(guide(torch.stack([both, uncond]), 3.0, None), uncond + 3 * (both - uncond))
    beta = torch.tensor([2.0, 1.0])[:, None, None]  # the second sample has no style: single guidance is left
    found = guide(torch.stack([both, style, uncond]), 3.0, beta)
    torch.testing.assert_close(found[0], uncond[0] + 3 * (style[0] + 2 * (both[0] - style[0]) - uncond[0]))
    torch.testing.assert_close(found[1], uncond[1] + 3 * (both[1] - uncond[1]))
    assert torch.equal(guide(both[None], 3.0, None), both)


def test_only_the_groups_that_guidance_needs_are_computed():
    def groups(conditions, cfg, beta):
        found, betas = condition_groups(conditions, cfg, beta)
        return len(found), betas.flatten().tolist()

    assert groups([{}, {"text": None}, {"text": ""}], 3.0, 2.0) == (1, [1, 1, 1])
    assert groups([PIANO, ORGAN], 1.0, 1.0) == (1, [1, 1])
    assert groups([PIANO, ORGAN], 3.0, 1.0) == (2, [1, 1])
    assert groups([PIANO, {"text": "organ"}], 3.0, 2.0) == (3, [2, 1])
    assert groups([{"text": "organ"}, {"style": (EXCERPTS[0], 1)}], 3.0, 2.0) == (2, [1, 1])
    (both, style, uncond), _ = condition_groups([PIANO], 3.0, 2.0)
    assert (both[0].keys(), style[0].keys(), uncond) == (PIANO.keys(), {"melody", "style"}, [{}])


def test_choice_follows_the_distribution_within_top_k_and_top_p():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probs.log().expand(20_000, 1, 4)
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))

    def frequencies(**options):
        codes = choose_codes(logits, uniform, **{"temperature": 1.0, "top_k": 0, "top_p": 0.0, **options})
        return torch.bincount(codes[:, 0], minlength=4) / 20_000

    torch.testing.assert_close(frequencies(), probs, atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.6), torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.3, top_k=3), torch.tensor([0, 1.0, 0, 0]))
    assert frequencies(temperature=0)[1] == frequencies(temperature=1e-309)[1] == 1
    sharp = probs**2 / (probs**2).sum()
    torch.testing.assert_close(frequencies(temperature=0.5), sharp, atol=0.015, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu_and_compiled_with_eager():
    on_cpu = generate(make_model(), [PIANO], 45, temperature=0)  # past the trained length, and so in windows
    on_gpu = generate(make_model().cuda(), [PIANO], 45, temperature=0)
    compiled = generate(optimize(make_model().cuda(), compiled=True), [PIANO], 45, temperature=0)
    for codes in (on_gpu, compiled):  # rounding may tip a choice, and with it those after it
        assert (codes.cpu() == on_cpu).float().mean() > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.9, "cfg_beta": 2.0}])
def test_gpu_a_recorded_step_chooses_the_codes_of_an_eager_one(options, monkeypatch):
    recorded = generate(make_model().cuda(), [PIANO, {}], 45, **options)
    monkeypatch.setattr(generation, "CUDAGraph", lambda function, *inputs: function)
    assert torch.equal(generate(make_model().cuda(), [PIANO, {}], 45, **options), recorded)


def on_processor(monkeypatch, name, **capabilities):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: dict(cpu_name=name, **capabilities))


@can_be_packed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wide_model_has_packed_weights_which_choose_the_same_codes(dtype, monkeypatch):
    """In float32 on AMD's processors, in bfloat16 on those that have it; but for LoRA's layers, which are more."""
    wide = dict(dim=512, layers=1, lora_rank=2, lora_targets=("qkv",))
    usual, codes = has_fast_bfloat16("cpu"), []
    for name in ("AMD EPYC", "Intel Xeon"):
        on_processor(monkeypatch, name, avx512_bf16=usual and "AMD" in name)
        model, packed = optimize(make_model(**wide), dtype), "AMD" in name and (usual or dtype == torch.float32)
        assert isinstance(model.blocks[0].up, PackedLinear) == isinstance(model.heads, PackedLinear) == packed
        assert model.heads.weight.dtype == dtype and not isinstance(model.blocks[0].qkv, PackedLinear)
        codes.append(generate(model, [PIANO, ORGAN], 12, seeds=[1, 2]))
    assert torch.equal(*codes)


@can_be_packed
def test_a_packed_model_still_plays_when_generate_is_loaded_again_as_in_a_notebook(monkeypatch):
    on_processor(monkeypatch, "AMD EPYC")
    model = optimize(make_model(dim=512, layers=1))
    codes = generate(model, [PIANO], 3)
    again = importlib.reload(generation)
    other = again.optimize(make_model(dim=512, layers=1, lively=False))
    assert torch.equal(again.generate(model, [PIANO], 3), codes)
    assert not torch.equal(again.generate(other, [PIANO], 3), codes)


@can_be_packed
def test_packed_weights_go_with_their_model(monkeypatch):
    on_processor(monkeypatch, "AMD EPYC")
    gc.collect()
    before = len(PackedLinear.by_number)
    model = optimize(make_model(dim=512, layers=1))
    assert len(PackedLinear.by_number) > before
    del model
    gc.collect()
    assert len(PackedLinear.by_number) == before


@pytest.mark.parametrize("make", ["AMD EPYC", "Intel"])
def test_weights_in_columns_choose_the_same_codes(make, monkeypatch):
    """So they lie in a narrow model in float32 on AMD's processors."""
    on_processor(monkeypatch, make)
    model = make_model()
    codes = generate(model, [PIANO, ORGAN], 12, seeds=[1, 2])
    block = optimize(model).blocks[0]
    assert block.up.weight.is_contiguous() != (make == "AMD EPYC") and block.down.weight.is_contiguous()
    assert torch.equal(generate(model, [PIANO, ORGAN], 12, seeds=[1, 2]), codes)
    assert optimize(make_model(), torch.bfloat16).blocks[0].up.weight.is_contiguous()


def test_in_bfloat16_a_cpu_attends_by_products_in_training_and_in_float32_in_generation(monkeypatch):
    """torch's own gives the same numbers, only later (NOTES.md), so what it is called with is watched."""
    called, torchs_own = [], F.scaled_dot_product_attention

    def watched(q, k, *rest, **options):
        called.append((q.dtype, k.dtype))
        return torchs_own(q, k, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for S in (512, 513):
        attention(*torch.randn(3, 1, 2, S, 8).bfloat16(), None, is_causal=True)
    assert called == [(torch.bfloat16, torch.bfloat16)], "beyond 512 steps the memory of the products counts"
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        model = optimize(make_model(), dtype)
        with torch.inference_mode(), generation.precision(model):
            cache = generation.KVCache(model.blocks[0], torch.randn(2, 5, 32), 8)
            attention(torch.randn(2, 2, 1, 16).to(dtype), cache.k, cache.v, torch.ones(1, 8, dtype=torch.bool))
        assert cache.k.dtype == cache.cross.dtype == kept and called[-1] == (kept, kept)
