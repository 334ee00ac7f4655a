"""Generation: the KV cache, batches, windows, streaming, guidance, the choice of codes, and faster linear layers."""

import functools
import gc
import importlib
import platform

import pytest
import torch
import torch.nn.functional as F
from conftest import load, needs_compiler, slow
from models import EXCERPTS, ORGAN, PATTERNS, PIANO, make_model

import generate as generation
from common import UserError, has_fast_bfloat16
from extras import compiler
from extras.cpu_linear import PackedLinear, SummedLinear
from generate import choose_codes, condition_groups, generate, guide, load_model, optimize, stream
from model import attention, cached_pattern

each_pattern = pytest.mark.parametrize("pattern", PATTERNS)
each_kind_of_positions = pytest.mark.parametrize("positions", ["sinusoidal", "rope"])
needs_packing = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="needs an x86")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_does_not_change_when_its_file_is_overwritten(toy_run, tmp_path, dtype):
    """`cp other.pt best.pt` writes into the file that is in use."""
    saved, path = load(toy_run[0] / "best.pt"), tmp_path / "best.pt"
    torch.save({**saved, "ema": {name: tensor.to(dtype) for name, tensor in saved["ema"].items()}}, path)
    model, _, _ = load_model(path)
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, saved["ema"][name].to(dtype).to(tensor.dtype), atol=0, rtol=0)


def test_a_condition_that_the_model_was_not_trained_with_is_refused():
    with pytest.raises(UserError, match="not trained with 'style'; it supports text, melody"):
        generate(make_model(style=False), [PIANO], 3)


# Without and with a cache


@torch.no_grad()
def logits_without_cache(model, codes, conditions, cfg, beta=1.0):
    """Return the guided logits of full forward passes in the order of the codes, [B, K, T, card]."""
    pattern = model.pattern(codes.shape[2])
    sequence, logits = pattern.build(codes, model.special), []
    for names in (["text", "melody", "style"], ["melody", "style"], []):
        samples = [{name: sample[name] for name in names} for sample in conditions]
        hidden = model.hidden(sequence, *model.conditioner(model.conditioner.tokenize(samples)))
        logits.append(model.logits(hidden).transpose(1, 2))
    both, style, uncond = logits
    return pattern.align_logits(uncond + cfg * (style + beta * (both - style) - uncond))


@each_pattern
@each_kind_of_positions
@pytest.mark.parametrize("name", [None, "melody", "style"])
def test_fast_and_simple_generation_give_the_same_codes(pattern, positions, name):
    model = make_model(pattern=pattern, positions=positions, melody=name == "melody", style=name == "style")
    conditions = [{key: sample[key] for key in ("text", name) if key} for sample in (PIANO, ORGAN)]
    codes = generate(model, conditions, 20, cfg=2.5, cfg_beta=1.0, temperature=0)
    assert torch.equal(codes, model.generate(conditions, 20, cfg=2.5, temperature=0))
    assert codes.shape == (2, 4, 20) and codes.unique().numel() >= 10 and not torch.equal(codes[0], codes[1])


@each_pattern
@each_kind_of_positions
@pytest.mark.parametrize("prompted", [False, True])
def test_greedy_codes_are_the_likeliest_of_doubly_guided_full_forward_passes(pattern, positions, prompted):
    model = make_model(pattern=pattern, positions=positions)
    prompt = torch.randint(0, 64, (1, 4, 5)) if prompted else None
    codes = generate(model, [ORGAN], 14, prompt, cfg=2.5, cfg_beta=1.7, temperature=0)
    likeliest = logits_without_cache(model, codes, [ORGAN], 2.5, beta=1.7).argmax(-1)
    first = 5 if prompted else 0
    assert torch.equal(likeliest[:, :, first:], codes[:, :, first:])


@each_pattern
def test_sampled_codes_are_among_the_top_k(pattern):
    model, conditions = make_model(pattern=pattern), [PIANO, ORGAN]
    for codes in (generate(model, conditions, 20, cfg=2.5, top_k=3), model.generate(conditions, 20, cfg=2.5, top_k=3)):
        logits = logits_without_cache(model, codes, conditions, 2.5)
        likelier = (logits > logits.gather(-1, codes[..., None])).sum(-1)
        assert likelier.unique().tolist() == [0, 1, 2]
    greedy = generate(model, conditions, 20, cfg=2.5, temperature=0)
    for codes in (generate(model, conditions, 20, cfg=2.5, top_k=1), model.generate(conditions, 20, cfg=2.5, top_k=1)):
        assert torch.equal(codes, greedy)


def test_training_can_use_a_pattern_that_generation_cached():
    """Autograd cannot save tensors that were made in inference mode."""
    cached_pattern.cache_clear()
    model = make_model()
    generate(model, [PIANO], 14)
    pattern, logits = model.pattern(14), torch.randn(4, 18, requires_grad=True)
    logits.gather(1, pattern.position).sum().backward()
    assert logits.grad.sum() == 4 * 14


def test_logits_in_bfloat16_are_within_3_percent_of_those_in_float32(monkeypatch):
    logits, guided_logits = [], generation.guided_logits
    monkeypatch.setattr(generation, "guided_logits", lambda *args: logits.append(guided_logits(*args)) or logits[-1])
    for dtype in (torch.float32, torch.bfloat16):
        model = optimize(make_model(), dtype)
        assert model.blocks[0].up.weight.dtype == dtype and model.embed.weight.dtype == torch.float32
        generate(model, [ORGAN], 6, torch.zeros(1, 4, 5, dtype=torch.int64), cfg=1.0)
    exact, low = logits[0], logits[len(logits) // 2]  # of the first step after the prompt
    assert low.dtype == torch.float32 and not torch.equal(exact, low)
    assert (exact - low).norm() < 0.03 * exact.norm()


# Batches, prompts, windows and streaming


def test_a_sample_never_depends_on_its_batch():
    model = make_model()
    together = generate(model, [PIANO, ORGAN, {}], 15, seeds=[3, 4, 5])
    for sample, condition, seed in zip(together, (PIANO, ORGAN, {}), (3, 4, 5)):
        assert torch.equal(generate(model, [condition], 15, seeds=[seed])[0], sample)
    assert not torch.equal(generate(model, [PIANO], 15, seeds=[9])[0], together[0])


@pytest.mark.parametrize("temperature", [0, 1])
def test_within_the_trained_length_a_sample_never_depends_on_the_lengths_of_other_prompts(temperature):
    model, options = make_model(), dict(cfg=2.0, temperature=temperature)
    prompts, conditions, seeds = [torch.randint(0, 64, (4, T)) for T in (3, 12, 8)], [PIANO, ORGAN, {}], [3, 4, 5]
    together = generate(model, conditions, 15, prompts, seeds=seeds, **options)
    windows = generate(model, conditions, 33, prompts, seeds=seeds, **options)  # 33 is above the trained length
    for row, (condition, prompt, seed) in enumerate(zip(conditions, prompts, seeds)):
        for codes in (together, windows):
            assert torch.equal(codes[row, :, : prompt.shape[1]], prompt)
        assert torch.equal(together[row], generate(model, [condition], 15, prompt[None], seeds=[seed], **options)[0])


def test_the_prompt_is_kept_and_the_length_is_exact_past_the_trained_length():
    model = make_model()  # trained on 20 frames
    prompt = torch.randint(0, 64, (2, 4, 30))
    progress = []
    codes = generate(model, [PIANO, {}], 57, prompt, progress=progress.append)
    assert codes.shape == (2, 4, 57) and torch.equal(codes[:, :, :30], prompt)
    assert codes.min() >= 0 and codes.max() < 64
    assert progress == [30] + 27 * [1]
    assert torch.equal(codes, generate(model, [PIANO, {}], 57, prompt))


@each_kind_of_positions
def test_a_longer_sample_of_the_same_seed_begins_with_the_shorter_one(positions):
    """Except its last 3 frames: at the end of a sample, codebooks with less delay see special tokens."""
    model = make_model(positions=positions)
    longest = generate(model, [PIANO, ORGAN], 45, seeds=[3, 4])
    for frames in (7, 20, 33):
        shorter = generate(model, [PIANO, ORGAN], frames, seeds=[3, 4])
        assert torch.equal(shorter[:, :, :-3], longest[:, :, : frames - 3])
        assert torch.equal(shorter[:, 0], longest[:, 0, :frames])


@pytest.mark.parametrize("pattern, steps", [("delay", 4), ("parallel", 1), ("unrolled", 4)])
@pytest.mark.parametrize("prompted", [False, True])
def test_each_frame_is_streamed_as_soon_as_its_codes_are_known(monkeypatch, pattern, steps, prompted):
    """steps: decoding steps until the first frame is complete."""
    model = make_model(pattern=pattern)
    calls, decode_one_step = [], generation.decode_one_step
    monkeypatch.setattr(generation, "decode_one_step", lambda *args: calls.append(1) or decode_one_step(*args))
    prompt = torch.randint(0, model.card, (1, 4, 5)) if prompted else None
    conditions, options = [{"text": "bells"}, {}], dict(prompt=prompt, seeds=[3, 4], stride=6)
    codes = generate(model, conditions, 33, **options)
    calls.clear()
    parts = []
    for part in stream(model, conditions, 33, **options):
        parts.append(part)
        if len(parts) == 1 and not prompted:
            assert len(calls) == steps
    assert torch.equal(torch.cat(parts, dim=2), codes) and codes.unique().numel() > 20
    assert [part.shape[2] for part in parts] == ([5] + 28 * [1] if prompted else 33 * [1])


def test_each_window_continues_the_last_codes_and_adds_stride_frames(monkeypatch):
    model = make_model(segment=1.0)  # trained on 50 frames
    contexts, generate_window = [], generation.generate_window

    def record_context(model, codes, start, *args):
        contexts.append(codes[:, :, :start].clone())
        return generate_window(model, codes, start, *args)

    monkeypatch.setattr(generation, "generate_window", record_context)
    for stride, starts in ((None, [0, 50, 75, 100]), (30, [0, 50, 80]), (10, [0, 50, 60, 70, 80, 90, 100])):
        contexts.clear()
        codes = generate(model, [{"text": "bells"}], 110, stride=stride)
        overlap = 50 - (stride or 25)
        assert codes.shape == (1, 4, 110) and len(contexts) == len(starts)
        for start, context in zip(starts, contexts):
            assert torch.equal(context, codes[:, :, max(0, start - overlap) : start])
    for stride in (-1, 50, 60):
        with pytest.raises(UserError, match="must be above 0 and below the 50 frames of training"):
            generate(model, [{}], 60, stride=stride)


def test_the_melody_of_a_window_begins_where_the_window_does():
    model = make_model()  # trained on 20 frames
    notes = torch.arange(8) % 12
    melodies, tokenize = [], model.conditioner.tokenize
    model.conditioner.tokenize = lambda conditions: melodies.append(conditions[0]["melody"]) or tokenize(conditions)
    generate(model, [{"melody": notes}], 45, cfg=1.0)
    starts = [round(first * 8 / 50) for first in (0, 10, 20, 30)]
    assert [melody.tolist() for melody in melodies] == [notes[start:].tolist() for start in starts]


# Guidance and the choice of codes


def test_guidance_is_the_formula_of_the_papers():
    both, style, uncond = torch.randn(3, 2, 4, 8)
    torch.testing.assert_close(guide(torch.stack([both, uncond]), 3.0, None), uncond + 3 * (both - uncond))
    beta = torch.tensor([2.0, 1.0])[:, None, None]  # the second sample has no style, so its guidance is single
    guided = guide(torch.stack([both, style, uncond]), 3.0, beta)
    torch.testing.assert_close(guided[0], uncond[0] + 3 * (style[0] + 2 * (both[0] - style[0]) - uncond[0]))
    torch.testing.assert_close(guided[1], uncond[1] + 3 * (both[1] - uncond[1]))
    assert torch.equal(guide(both[None], 3.0, None), both)


def test_only_groups_that_guidance_needs_are_computed():
    def groups(conditions, cfg, beta):
        groups, betas = condition_groups(conditions, cfg, beta)
        return len(groups), betas.flatten().tolist()

    assert groups([{}, {"text": None}, {"text": ""}], 3.0, 2.0) == (1, [1, 1, 1])
    assert groups([PIANO, ORGAN], 1.0, 1.0) == (1, [1, 1])
    assert groups([PIANO, ORGAN], 3.0, 1.0) == (2, [1, 1])
    assert groups([PIANO, {"text": "organ"}], 3.0, 2.0) == (3, [2, 1])
    assert groups([{"text": "organ"}, {"style": (EXCERPTS[0], 1)}], 3.0, 2.0) == (2, [1, 1])
    (both, style, uncond), _ = condition_groups([PIANO], 3.0, 2.0)
    assert (both[0].keys(), style[0].keys(), uncond) == (PIANO.keys(), {"melody", "style"}, [{}])


def test_codes_follow_the_distribution_within_top_k_and_top_p():
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


# Compiled decoding and faster linear layers


def check_compiled_equals_eager(lengths, dtype=torch.float32, **settings):
    eager, compiled = (optimize(make_model(layers=1, **settings), dtype, compiled) for compiled in (False, True))
    assert eager.compiled_logits is None and compiled.compiled_logits
    for frames in lengths:
        options = dict(cfg=2.0, temperature=0, prompt=torch.ones(2, 4, 2, dtype=torch.int64))
        assert torch.equal(*(generate(model, [ORGAN, {}], frames, **options) for model in (eager, compiled)))


def test_a_decoding_step_is_one_graph_and_equals_eager(monkeypatch):
    """The backend "eager" traces a graph, but generates no code."""
    monkeypatch.setattr(compiler, "has_compiler", lambda device: True)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    check_compiled_equals_eager((9, 33), positions="rope")


@needs_compiler
@slow
def test_compiled_generation_equals_eager():
    """Also past the trained length, and for a second model of the same shapes."""
    check_compiled_equals_eager((9, 33), positions="rope")
    check_compiled_equals_eager((9,), positions="sinusoidal")


@needs_compiler
@needs_packing
@slow
def test_compiled_generation_equals_eager_with_packed_weights_of_two_models(monkeypatch):
    monkeypatch.setattr("extras.cpu_linear.is_amd", lambda: True)
    for noise in (0.2, 0):
        check_compiled_equals_eager((9,), positions="rope", dim=512, noise=noise)
    if has_fast_bfloat16("cpu"):
        check_compiled_equals_eager((9,), torch.bfloat16, positions="rope", dim=512)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=[slow, needs_compiler])])
@pytest.mark.parametrize(
    "dtype, rows, tolerance", [(torch.float32, 1, 1e-5), (torch.float32, 9, 1e-5), (torch.bfloat16, 4, 1e-2)]
)
def test_a_narrow_layer_equals_a_linear_layer_and_sums_up_to_8_rows(compiled, dtype, rows, tolerance, monkeypatch):
    """Traced only, or compiled too."""
    monkeypatch.setattr(compiler, "has_compiler", lambda device: True)
    model, x, graphs = optimize(make_model(layers=1), dtype, compiled=True), torch.randn(rows, 1, 32), []

    def record_graph(graph, inputs):
        graphs.append(graph.code)
        return torch._inductor.compile(graph, inputs) if compiled else graph

    for layer in (model.heads, model.blocks[0].up):
        assert type(layer) is SummedLinear
        y = torch.compile(layer, backend=record_graph, fullgraph=True)(x)
        torch.testing.assert_close(y, F.linear(x.to(dtype), layer.weight), rtol=tolerance, atol=tolerance)
        assert ("linear(" in graphs[-1]) == (rows > 8), graphs[-1]


def set_processor(monkeypatch, name, **capabilities):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: dict(cpu_name=name, **capabilities))


@needs_packing
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_of_a_wide_model_never_change_its_codes(dtype, monkeypatch):
    """They are packed in float32 on AMD, in bfloat16 if the processor supports it, and never in LoRA layers."""
    wide = dict(dim=512, layers=1, lora_rank=2, lora_targets=("qkv",))
    has_bfloat16, codes = has_fast_bfloat16("cpu"), []
    for name in ("AMD EPYC", "Intel Xeon"):
        set_processor(monkeypatch, name, avx512_bf16=has_bfloat16 and "AMD" in name)
        model = optimize(make_model(**wide), dtype)
        is_packed = "AMD" in name and (has_bfloat16 or dtype == torch.float32)
        assert isinstance(model.blocks[0].up, PackedLinear) == isinstance(model.heads, PackedLinear) == is_packed
        assert model.heads.weight.dtype == dtype and not isinstance(model.blocks[0].qkv, PackedLinear)
        codes.append(generate(model, [PIANO, ORGAN], 12, seeds=[1, 2]))
    assert torch.equal(*codes)


@needs_packing
def test_packed_models_generate_the_same_after_the_module_is_reloaded_in_a_notebook(monkeypatch):
    set_processor(monkeypatch, "AMD EPYC")
    model = optimize(make_model(dim=512, layers=1))
    codes = generate(model, [PIANO], 3)
    reloaded = importlib.reload(generation)
    other = reloaded.optimize(make_model(dim=512, layers=1, noise=0))
    assert torch.equal(reloaded.generate(model, [PIANO], 3), codes)
    assert not torch.equal(reloaded.generate(other, [PIANO], 3), codes)


@needs_packing
def test_packed_weights_are_freed_with_their_model(monkeypatch):
    set_processor(monkeypatch, "AMD EPYC")
    gc.collect()
    before = len(PackedLinear.by_number)
    model = optimize(make_model(dim=512, layers=1))
    assert len(PackedLinear.by_number) > before
    del model
    gc.collect()
    assert len(PackedLinear.by_number) == before


@pytest.mark.parametrize("name", ["AMD EPYC", "Intel"])
def test_column_major_weights_of_a_narrow_model_on_amd_never_change_its_codes(name, monkeypatch):
    set_processor(monkeypatch, name)
    model = make_model()
    codes = generate(model, [PIANO, ORGAN], 12, seeds=[1, 2])
    block = optimize(model).blocks[0]
    assert block.up.weight.is_contiguous() != (name == "AMD EPYC") and block.down.weight.is_contiguous()
    assert torch.equal(generate(model, [PIANO, ORGAN], 12, seeds=[1, 2]), codes)
    assert optimize(make_model(), torch.bfloat16).blocks[0].up.weight.is_contiguous()


def test_a_cpu_in_bfloat16_avoids_the_slow_attention_of_torch(monkeypatch):
    """Training uses products up to 512 positions. Generation keeps its cache in float32."""
    calls, torch_attention = [], F.scaled_dot_product_attention

    def record_dtypes(q, k, *args, **options):
        calls.append((q.dtype, k.dtype))
        return torch_attention(q, k, *args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record_dtypes)
    for S in (512, 513):
        attention(*torch.randn(3, 1, 2, S, 8).bfloat16(), None, is_causal=True)
    assert calls == [(torch.bfloat16, torch.bfloat16)], "products would need too much memory above 512 positions"
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float16, torch.float16)):
        model = optimize(make_model(), dtype)
        with torch.inference_mode(), generation.precision(model):
            cache = generation.KVCache(model.blocks[0], torch.randn(2, 5, 32), 8)
            attention(torch.randn(2, 2, 1, 16).to(dtype), cache.k, cache.v, torch.ones(1, 8, dtype=torch.bool))
        assert cache.k.dtype == cache.cross.dtype == expected and calls[-1] == (expected, expected)


# On a GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_gpu_agrees_with_cpu_and_compiled_with_eager():
    on_cpu = generate(make_model(), [PIANO], 45, temperature=0)
    on_gpu = generate(make_model().cuda(), [PIANO], 45, temperature=0)
    compiled = generate(optimize(make_model().cuda(), compiled=True), [PIANO], 45, temperature=0)
    for codes in (on_gpu, compiled):  # rounding may change one code, and then everything after it
        assert (codes.cpu() == on_cpu).float().mean() > 0.9


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.9, "cfg_beta": 2.0}])
def test_gpu_a_recorded_step_chooses_the_codes_of_an_eager_one(options, monkeypatch):
    recorded = generate(make_model().cuda(), [PIANO, {}], 45, **options)
    monkeypatch.setattr(generation, "CUDAGraph", lambda function, *inputs: function)
    assert torch.equal(generate(make_model().cuda(), [PIANO, {}], 45, **options), recorded)
