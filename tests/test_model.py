import io
import math
import shutil

import pytest
import sentencepiece
import torch

from config import Settings, UserError
from model import MusicLM, choose_codes

CODEC = dict(K=4, card=64, frame_rate=50, dim=8)
EXCERPTS = torch.randint(64, (2, 4, 10), generator=torch.Generator().manual_seed(0))
PIANO = {"text": "a slow piano melody", "melody": [0, 4, 12], "style": (EXCERPTS[0], 2)}
ORGAN = {"text": "fast organ chords with drums and a long coda", "melody": [11, 11, 2, 5, 5], "style": (EXCERPTS[1], 3)}


@pytest.fixture(scope="session")
def tokenizer():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PIANO["text"], ORGAN["text"]] * 5), model_writer=model, vocab_size=400,
        model_type="unigram", byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def make_model(tokenizer, lively=True, codec=CODEC, **settings):
    """A small model; `lively` gives it weights large enough that every path shows in the logits."""
    torch.manual_seed(0)
    sizes = dict(
        dim=32,
        heads=2,
        layers=2,
        text_dim=32,
        text_heads=2,
        text_layers=1,
        segment=0.4,
        melody=True,
        style=True,
        style_dim=16,
        style_heads=2,
        style_layers=1,
        style_bins=8,
        style_seconds=(0.1, 0.2),
    )
    model = MusicLM(Settings(**{**sizes, **settings}), codec, tokenizer)
    style = model.conditioner.prepended["style"]
    style.tables.normal_()
    for _ in range(20):
        style(*style.prepare([(codes, None) for codes in EXCERPTS % codec["card"]], "cpu"))
        style.update(lambda tensor: tensor, lambda value: [value])
    model.eval()
    if lively:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.2)
    return model


def batch(model, B=3, T=12):
    codes = torch.randint(0, model.card, (B, model.K, T))
    valid = torch.ones(B, T, dtype=torch.bool)
    valid[1:2, 7:] = False
    scored = valid.clone()
    scored[:1, 3:5] = False
    return codes, valid, scored, model.conditioner.prepare([PIANO, {}, ORGAN][:B], "cpu")


@pytest.mark.parametrize("pattern", ["delay", "parallel", "unrolled"])
def test_a_melody_stands_where_its_frames_do_and_a_style_nowhere(tokenizer, pattern):
    model = make_model(tokenizer, pattern=pattern, segment=2.0)
    rows = model.conditioner.prepended["melody"].rows
    places = model.conditioner.positions("cpu")
    frames = ((torch.arange(rows) + 0.5) * 50 / 8).long()
    steps = model.pattern(100).step[:, frames].float().mean(0)
    assert rows == 16 and (places[:rows] - steps).abs().max() < 1.5 * model.K and not places[rows:].any()


@pytest.mark.parametrize("pattern", ["delay", "parallel", "unrolled"])
def test_loss_in_pattern_order_equals_loss_on_aligned_logits(tokenizer, pattern):
    model = make_model(tokenizer, pattern=pattern)
    codes, valid, scored, inputs = batch(model)
    ce_sum, count = model(codes, valid, scored, inputs)
    shown = codes.masked_fill(~valid[:, None], model.special)  # padding is no code
    nll = -model.aligned_logits(shown, inputs).log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    mask = scored[:, None] & model.pattern(12, training=True).frame_mask
    assert count.tolist() == mask.sum((0, 2)).tolist()
    torch.testing.assert_close(ce_sum, nll.masked_fill(~mask, 0).sum((0, 2)))


@pytest.mark.parametrize("card", [64, 512, 2048])
def test_loss_at_init_is_within_2_percent_of_uniform(tokenizer, card):
    model = make_model(tokenizer, lively=False, codec={**CODEC, "card": card}, dim=128)
    ce_sum, count = model(*batch(model))
    assert (ce_sum / count).mean().item() == pytest.approx(math.log(card), rel=0.02)


def test_padding_and_neighbours_never_change_a_sample(tokenizer):
    model = make_model(tokenizer)
    codes = torch.randint(0, 64, (2, 4, 12))
    together = model.aligned_logits(codes, model.conditioner.prepare([PIANO, ORGAN], "cpu"))
    alone = model.aligned_logits(codes[:1], model.conditioner.prepare([PIANO], "cpu"))
    torch.testing.assert_close(together[:1], alone, equal_nan=True, rtol=1e-4, atol=1e-5)
    padded = codes.clone()
    padded[:, :, 9:] = 0  # seen from frame 10 - k of codebook k on
    later = model.aligned_logits(padded, model.conditioner.prepare([PIANO, ORGAN], "cpu"))
    torch.testing.assert_close(together[:, :, :7], later[:, :, :7], rtol=1e-4, atol=1e-5)


def test_padded_frames_leave_the_loss(tokenizer):
    model = make_model(tokenizer)
    codes, *rest = batch(model)
    changed = codes.clone()
    changed[1, :, 7:] = 5
    torch.testing.assert_close(model(codes, *rest), model(changed, *rest))


def test_a_codebook_without_valid_positions_counts_none(tokenizer):
    model = make_model(tokenizer)
    both = torch.ones(1, 2, dtype=torch.bool)
    ce_sum, count = model(torch.zeros(1, 4, 2, dtype=torch.int64), both, both, batch(model, 1)[3])
    assert count.tolist() == [2, 1, 0, 0] and ce_sum[2:].tolist() == [0, 0]


def test_every_parameter_gets_gradient(tokenizer):
    model = make_model(tokenizer).train()
    ce_sum, count = model(*batch(model))
    (ce_sum / count).mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_the_null_starts_at_zero_and_so_does_its_cross_attention(tokenizer):
    model = make_model(tokenizer, lively=False)
    states, mask, prefix = model.conditioner(model.conditioner.prepare([{}, {"text": ""}, PIANO], "cpu"))
    assert prefix[:2].abs().max() == 0 and prefix[2].abs().max() > 0
    assert mask.sum(1).tolist()[:2] == [1, 1] and mask[2].sum() > 1
    assert states[:2].abs().max() == 0 and states[2].abs().max() > 0
    assert model.blocks[0].cross_kv(states)[0].abs().max() == 0


@pytest.mark.parametrize("name", ["text", "melody", "style"])
def test_each_condition_changes_the_logits(tokenizer, name):
    model = make_model(tokenizer)
    codes = torch.randint(0, 64, (1, 4, 12)).expand(3, -1, -1)
    conditions = [{name: PIANO[name]}, {name: ORGAN[name]}, {}]
    logits = model.aligned_logits(codes, model.conditioner.prepare(conditions, "cpu")).nan_to_num()
    for a, b in ((0, 1), (0, 2)):
        assert (logits[a] - logits[b]).abs().max() > 0.01


def test_a_condition_that_the_model_was_not_trained_with_is_refused(tokenizer):
    model = MusicLM(Settings(dim=32, heads=2, layers=1, melody=True), CODEC, tokenizer)
    with pytest.raises(UserError, match="not trained with 'style'; it takes text, melody"):
        model.generate([PIANO], 3)


def test_a_melody_goes_on_where_the_window_does(tokenizer):
    """Past the trained length of 20 frames, the second window hears what its own frames are to follow."""
    model = make_model(tokenizer)
    notes = torch.arange(8) % 12
    heard = []
    prepare = model.conditioner.prepare
    model.conditioner.prepare = lambda conditions, device: (
        heard.append(conditions[0]["melody"]) or prepare(conditions, device)
    )
    model.generate([{"melody": notes}], 45, cfg=1.0)
    assert [row.tolist() for row in heard] == [notes[round(first * 8 / 50) :].tolist() for first in (0, 10, 20, 30)]


@pytest.mark.parametrize("pattern", ["delay", "parallel", "unrolled"])
@pytest.mark.parametrize("prompted", [False, True])
def test_cached_generation_equals_uncached(tokenizer, pattern, prompted):
    """Greedy generation with the cache, against the likeliest code of a full forward pass at every step.

    Guided twice over, by style and text: u + cfg (s + beta (c - s) - u).
    """
    model = make_model(tokenizer, pattern=pattern)
    prompt = torch.randint(0, 64, (1, 4, 5)) if prompted else None
    codes = model.generate([ORGAN], 14, prompt, cfg=2.5, cfg_beta=1.7, temperature=0)
    whole = model.pattern(14)
    sequence = whole.build(codes, model.special)
    logits = []
    for condition in (ORGAN, {**ORGAN, "text": None}, {}):
        fused = model.conditioner(model.conditioner.prepare([condition], "cpu"))
        logits.append(model.logits(model.hidden(sequence, *fused)).transpose(1, 2))
    c, s, u = logits
    guided = whole.align_logits(u + 2.5 * (s + 1.7 * (c - s) - u))
    first = 5 if prompted else 0
    assert torch.equal(guided.argmax(-1)[:, :, first:], codes[:, :, first:])


def test_prompts_of_different_lengths_in_one_batch(tokenizer):
    model = make_model(tokenizer)
    prompts = [torch.randint(0, 64, (4, T)) for T in (3, 12, 8)]
    conditions, choice = [PIANO, ORGAN, {}], dict(cfg=2.0, temperature=0)
    for frames in (15, 33):  # within the trained length, and past it
        together = model.generate(conditions, frames, prompts, **choice)
        for row, (condition, prompt) in enumerate(zip(conditions, prompts)):
            assert torch.equal(together[row, :, : prompt.shape[1]], prompt)
            if frames == 15:
                assert torch.equal(together[row], model.generate([condition], frames, prompt[None], **choice)[0])
    sampled = dict(cfg=2.0, temperature=1.0)
    together = model.generate(conditions, 15, prompts, seeds=[3, 4, 5], **sampled)
    for row, (condition, prompt) in enumerate(zip(conditions, prompts)):
        assert torch.equal(together[row], model.generate([condition], 15, prompt[None], seeds=[3 + row], **sampled)[0])


def test_lower_precision_in_generation_stays_close(tokenizer):
    """The logits of a step after a prompt, weights in bfloat16 against float32."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        model = make_model(tokenizer).for_generation(dtype)
        assert model.blocks[0].up.weight.dtype == dtype and model.embed.weight.dtype == torch.float32
        usual = model.step
        model.step = lambda *args, usual=usual: found.append(usual(*args)) or found[-1]
        model.generate([ORGAN], 6, torch.zeros(1, 4, 5, dtype=torch.int64), cfg=1.0)
    exact, low = found[0], found[len(found) // 2]
    assert low.dtype == torch.float32 and not torch.equal(exact, low)
    assert (exact - low).norm() < 0.03 * exact.norm()


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_generation_equals_eager(tokenizer):
    eager, compiled = (make_model(tokenizer, layers=1).for_generation(compiled=compiled) for compiled in (False, True))
    for frames in (9, 33):  # within the trained length, and past it
        choice = dict(cfg=2.0, temperature=0, prompt=torch.ones(2, 4, 2, dtype=torch.int64))
        assert torch.equal(eager.generate([ORGAN, {}], frames, **choice),
                           compiled.generate([ORGAN, {}], frames, **choice))  # fmt: skip


def test_blocks_are_one_graph_in_training_and_in_generation(tokenizer):
    """Without a break, whatever the lengths of captions: fullgraph would raise."""
    model = make_model(tokenizer)
    *tensors, inputs = batch(model)
    ce = model(*tensors, inputs)[0]
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(*tensors, inputs)[0], ce)
    for text in ("a", PIANO["text"], ORGAN["text"]):
        model(*tensors, model.conditioner.prepare([{"text": text}] * 3, "cpu"))[0].sum().backward()


def test_a_take_is_the_same_alone_and_in_a_batch(tokenizer):
    model = make_model(tokenizer)
    together = model.generate([PIANO, ORGAN, {}], 15, seeds=[3, 4, 5])
    for row, (condition, seed) in enumerate(((PIANO, 3), (ORGAN, 4), ({}, 5))):
        assert torch.equal(model.generate([condition], 15, seeds=[seed])[0], together[row])
    assert not torch.equal(model.generate([PIANO], 15, seeds=[9])[0], together[0])


def test_prompt_is_kept_and_length_is_as_asked_past_the_trained_length(tokenizer):
    model = make_model(tokenizer)  # trained on 20 frames
    prompt = torch.randint(0, 64, (2, 4, 30))
    reports = []
    codes = model.generate([PIANO, {}], 57, prompt, progress=reports.append)
    assert codes.shape == (2, 4, 57) and torch.equal(codes[:, :, :30], prompt)
    assert codes.min() >= 0 and codes.max() < 64
    assert reports == sorted(reports) and reports[-1] == 57
    assert torch.equal(codes, model.generate([PIANO, {}], 57, prompt))


def test_without_conditions_or_with_cfg_1_the_batch_is_not_doubled(tokenizer, monkeypatch):
    model = make_model(tokenizer)
    rows = []
    original = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda sequence, *rest: rows.append(len(sequence)) or original(sequence, *rest)
    )
    model.generate([{}, {}], 3, cfg=3.0)
    model.generate([PIANO, ORGAN], 3, cfg=1.0)
    assert set(rows) == {2}
    model.generate([PIANO, ORGAN], 3, cfg=3.0)
    assert rows[-1] == 4
    model.generate([PIANO, ORGAN], 3, cfg=3.0, cfg_beta=2.0)
    assert rows[-1] == 6
    model.generate([{"text": "organ"}, {"style": (EXCERPTS[0], 1)}], 3, cfg=3.0, cfg_beta=2.0)
    assert rows[-1] == 4


def test_choice_follows_the_distribution_within_top_k_and_top_p():
    probs = torch.tensor([0.1, 0.4, 0.2, 0.3])
    logits = probs.log().expand(20_000, 1, 4)
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))

    def frequencies(**choice):
        codes = choose_codes(logits, uniform, **{"temperature": 1.0, "top_k": 0, "top_p": 0.0, **choice})
        return torch.bincount(codes[:, 0], minlength=4) / 20_000

    torch.testing.assert_close(frequencies(), probs, atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(top_k=2), torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.6), torch.tensor([0, 4 / 7, 0, 3 / 7]), atol=0.015, rtol=0)
    torch.testing.assert_close(frequencies(top_p=0.3, top_k=3), torch.tensor([0, 1.0, 0, 0]))
    assert frequencies(temperature=0)[1] == 1
    sharp = probs**2 / (probs**2).sum()
    torch.testing.assert_close(frequencies(temperature=0.5), sharp, atol=0.015, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu(tokenizer):
    model = make_model(tokenizer)
    *tensors, inputs = batch(model)
    on_cpu = model(*tensors, inputs)[0]
    model.cuda()
    inputs = {key: tuple(tensor.cuda() for tensor in of) for key, of in inputs.items()}
    on_gpu = model(*(tensor.cuda() for tensor in tensors), inputs)[0]
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
    greedy = model.generate([PIANO], 45, temperature=0)  # past the trained length, and so twice over
    recorded = model.for_generation(compiled=True).generate([PIANO], 45, temperature=0)
    assert (greedy == recorded).float().mean() > 0.9  # rounding may tip a choice, and with it those after it
