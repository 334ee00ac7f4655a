"""Conditions: how they are drawn, dropped and embedded, and the residual quantizer of the style."""

import threading

import numpy as np
import pytest
import torch

import distributed
from codec import load_codec
from conditioning import SILENCE, all_conditions, chromagram, draw_conditions, strongest
from config import Settings
from dataprep.analysis import chroma_of
from extras.style import ResidualVQ, StyleEmbedder

CAPTION, METADATA = "a slow piano melody", {"genre": "jazz", "bpm": 68}


def draw(n=4000, caption=CAPTION, frames=400, **settings):
    s = Settings(**{"cfg_dropout": 0.0, "melody": True, "style": True, **settings})
    return [draw_conditions(caption, METADATA, frames, 50, np.random.default_rng([1, i]), s) for i in range(n)]


def draw_texts(n=4000, caption=CAPTION, **settings):
    return [sample["text"] for sample in draw(n, caption, **settings)]


def draw_dropped(**settings):
    """Return which conditions are dropped, bool [n, 3]."""
    return np.array([[not sample[name] for name in ("text", "melody", "style")] for sample in draw(**settings)])


def test_the_caption_is_unchanged_if_all_probabilities_are_zero():
    assert set(draw_texts(50)) == {CAPTION}


def test_each_attribute_is_dropped_independently_with_its_probability():
    dropped = draw_dropped(text_dropout=0.2, melody_dropout=0.4, style_dropout=0.6)
    assert dropped.mean(0) == pytest.approx([0.2, 0.4, 0.6], abs=0.03)
    assert np.abs(np.corrcoef(dropped.T) - np.eye(3)).max() < 0.06
    assert len(set(map(tuple, dropped[:40].tolist()))) > 4


def test_cfg_dropout_drops_all_conditions_together():
    dropped = draw_dropped(cfg_dropout=0.3)
    assert (dropped == dropped[:, :1]).all() and dropped.mean() == pytest.approx(0.3, abs=0.03)


def test_a_model_without_melody_or_style_gets_neither():
    for sample in (*draw(5, melody=False, style=False), all_conditions(CAPTION, 400, 50, Settings())):
        assert sample == {"text": CAPTION, "melody": False, "style": None}


def test_excerpts_have_random_length_place_and_codebooks():
    excerpts = np.array([sample["style"] for sample in draw(style_seconds=(1.0, 3.0))])
    first, end, codebooks = excerpts.T
    lengths = end - first
    assert lengths.min() in (50, 51) and lengths.max() in (149, 150) and lengths.mean() == pytest.approx(100, abs=2)
    assert first.min() == 0 and end.max() in (399, 400) and first.mean() == pytest.approx(150, abs=6)
    assert (np.bincount(codebooks)[1:] / len(codebooks)) == pytest.approx(np.full(6, 1 / 6), abs=0.03)
    for frames in (2, 7, 60):
        for first, end, _ in (sample["style"] for sample in draw(50, frames=frames)):
            assert 0 <= first < end <= frames and end - first <= max(1, frames // 2)


def test_evaluation_takes_all_conditions_and_the_middle_excerpt():
    expected = {"text": CAPTION, "melody": True, "style": (125, 275, 3)}
    assert all_conditions(CAPTION, 400, 50, Settings(melody=True, style=True)) == expected


def test_metadata_is_merged_into_the_caption_in_random_order():
    texts = draw_texts(merge_text_p=0.5)
    assert np.mean([text != CAPTION for text in texts]) == pytest.approx(0.5, abs=0.03)
    assert set(texts) == {CAPTION, f"{CAPTION}. genre: jazz. bpm: 68", f"{CAPTION}. bpm: 68. genre: jazz"}
    assert set(draw_texts(caption="", merge_text_p=1.0)) == {"genre: jazz. bpm: 68", "bpm: 68. genre: jazz"}


def test_each_word_is_dropped_with_its_probability():
    texts = draw_texts(word_dropout=0.25)
    assert np.mean([len(text.split()) for text in texts]) == pytest.approx(0.75 * 4, abs=0.06)
    assert all(set(text.split()) <= set(CAPTION.split()) for text in texts)


# Melody


def test_the_melody_of_a_scale_over_a_soft_bass_is_the_scale():
    rate, notes = 16_000, [0, 2, 4, 5, 7, 9, 11]
    time = torch.arange(rate) / rate
    tones = [torch.sin(2 * torch.pi * 261.63 * 2 ** (note / 12) * time) for note in notes]
    bass = 0.2 * torch.sin(2 * torch.pi * 98 * torch.arange(8 * rate) / rate)
    wav = torch.cat([*tones, torch.zeros(rate)]) + bass * (torch.arange(8 * rate) < 7 * rate)
    melody = strongest(chromagram(0.3 * wav[None], rate)[0])
    assert melody.dtype == torch.uint8 and len(melody) == 64
    for i, note in enumerate([*notes, SILENCE]):
        assert set(melody[8 * i + 2 : 8 * i + 6].tolist()) == {note}


def test_the_melody_of_a_long_track_equals_that_of_one_chromagram():
    wav = torch.randn(150 * 4000, generator=torch.Generator().manual_seed(0)).cumsum(0)  # 150 s at 4 kHz
    wav = wav / wav.abs().max()
    by_blocks, at_once = chroma_of([wav[None]], 4000), chromagram(wav[None], 4000)[0]
    assert torch.equal(strongest(by_blocks), strongest(at_once)) and at_once.shape[1] == 1200


# Style

CODEC = dict(K=4, card=512, frame_rate=50, dim=64)  # the codec `tiny`
D, FRAMES, P = 24, 75, 8  # 1.5 s


@pytest.fixture(scope="module")
def codec():
    return load_codec("tiny")


@pytest.fixture
def embedder(codec):
    """A StyleEmbedder in eval mode, with a trained quantizer and a null that is not zero."""
    embedder = make_embedder(codec)
    train(embedder, [[style(seed) for seed in range(step, step + 6)] for step in range(8)])
    torch.nn.init.normal_(embedder.null)
    return embedder.eval()


def make_embedder(codec=None):
    torch.manual_seed(0)
    embedder = StyleEmbedder(D, CODEC, dim=16, n_heads=2, n_layers=1, codebooks=4, bins=16, max_seconds=1.5)
    if codec:
        embedder.set_codec(codec)
    return embedder


def style(seed, n=None, codebooks=None):
    """Make an excerpt of n frames, by default 40 to 75, in which each sound lasts 10 frames."""
    rng = np.random.default_rng(seed)
    sounds = np.random.default_rng(1).integers(512, size=(8, 4))[rng.integers(8, size=8)]
    return sounds.repeat(10, 0)[: n or rng.integers(40, 76)].T, codebooks


def train(embedder, batches):
    """batches: for each step a list of micro-batches, or one micro-batch, a list of styles."""
    embedder.train()
    for micro_batches in batches:
        for styles in micro_batches if isinstance(micro_batches[0], list) else [micro_batches]:
            embedder(*embedder.tokenize(styles))
        embedder.vq.update()


def state_of(embedder):
    return {name: tensor.clone() for name, tensor in embedder.vq.state_dict().items()}


def test_the_tables_sum_to_the_latents_of_the_codec(codec):
    embedder, codes = make_embedder(codec), torch.randint(512, (2, 4, 30))
    latents = sum(embedder.tables[k][codes[:, k]] for k in range(4))
    torch.testing.assert_close(latents.transpose(1, 2), codec.latents(codes))


def test_tokenize_pads_and_cuts_arrays_and_tensors():
    excerpt = style(0, 30)[0]
    styles = [(excerpt.astype(np.uint16), 2), None, (torch.tensor(style(1, 75)[0]).repeat(1, 2), None)]
    codes, mask, codebooks = make_embedder().tokenize(styles)
    assert codes.shape == (3, 4, FRAMES) and codes.dtype == codebooks.dtype == torch.int64
    assert mask.sum(1).tolist() == [30, 0, FRAMES] and codebooks.tolist() == [2, 4, 4]
    assert codes[0, :, :30].tolist() == excerpt.tolist() and not codes[0, :, 30:].any()


def test_the_prefix_has_one_vector_per_stride_and_then_null(embedder):
    prefix = embedder(*embedder.tokenize([style(0, 41), None, style(1, 75), style(2, 1)]))
    assert prefix.shape == (4, P, D)
    null = (prefix == embedder.null).all(2)
    assert null.sum(1).tolist() == [3, 8, 0, 7] and null[0, 5:].all() and null[3, 1:].all()
    with torch.no_grad():  # torch uses its fast path then
        assert torch.equal(embedder(*embedder.tokenize([None])), embedder.null.expand(1, P, D))
        torch.testing.assert_close(embedder(*embedder.tokenize([style(0, 41), None])), prefix[:2])


def test_padding_and_neighbours_never_change_a_sample(embedder):
    for training in (True, False):
        embedder.train(training)
        together = embedder(*embedder.tokenize([style(0, 40), None, style(1, 75)]))
        torch.testing.assert_close(together[:1], embedder(*embedder.tokenize([style(0, 40)])))
        torch.testing.assert_close(together[2:], embedder(*embedder.tokenize([style(1, 75)])))


def test_nulls_and_eval_mode_never_change_the_quantizer(codec, embedder):
    before = state_of(embedder)
    embedder(*embedder.tokenize([style(0), style(1)]))
    train(embedder, [[None, None], [[None], [None]]])
    torch.testing.assert_close(state_of(embedder), before, rtol=0, atol=0)
    one, other = make_embedder(codec), make_embedder(codec)
    train(one, [[style(0, 50), style(1, 60)]])
    train(other, [[None, style(0, 50), None, style(1, 60)]])
    assert one.vq.counts.sum() > 0
    torch.testing.assert_close(state_of(one), state_of(other))


def test_every_parameter_gets_a_gradient(embedder):
    embedder.train()
    (embedder(*embedder.tokenize([style(0), None])) * torch.randn(2, P, D)).sum().backward()
    assert [name for name, p in embedder.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_a_batch_of_nulls_has_finite_gradients(embedder):
    embedder.train()
    embedder(*embedder.tokenize([None, None])).sum().backward()
    assert all(p.grad.isfinite().all() for p in embedder.parameters())
    assert embedder.null.grad.tolist() == [2 * P] * D


def squared_error(vq, x, quantized):
    """Return the mean squared error relative to the variance."""
    mean, square = vq.moments[1:] / vq.moments[0]
    return ((x - mean) / (square - mean.square()).sqrt() - quantized).square().mean().item()


def test_each_codebook_reduces_the_error_and_all_codes_are_used():
    torch.manual_seed(0)
    centres = torch.randn(40, 8) * 3 + 5
    vq, mask = ResidualVQ(8, 4, 32), torch.ones(4, 60, dtype=torch.bool)
    for _ in range(80):
        x = centres[torch.randint(40, (4, 60))] + 0.3 * torch.randn(4, 60, 8)
        vq(x, mask, torch.ones(4))
        vq.update()
    counts = vq.counts.clone()
    error = [squared_error(vq, x, vq.eval()(x, mask, torch.full((4,), number))) for number in range(6)]
    assert error[0] == pytest.approx(1, abs=0.1) and error[4] == error[5]  # 5 codebooks of 4: all of them
    assert error[1] < 0.2 and error[2] < error[1] / 3 and error[2] > error[3] > error[4]
    vq.train()(x, mask, torch.ones(4))
    assert counts.min() > 0 and ((vq.collected[1][:2] > 0).sum(1) > 20).all()


def test_codes_that_no_vector_chooses_any_more_are_replaced():
    def codes_in_use(dead):
        torch.manual_seed(0)
        vq, mask = ResidualVQ(4, 1, 8), torch.ones(4, 30, dtype=torch.bool)
        vq.dead = dead
        for centres, steps in ((torch.randn(8, 4), 100), (torch.randn(8, 4) + 4, 500)):
            for _ in range(steps):
                vq(centres[torch.randint(8, (4, 30))] + 0.05 * torch.randn(4, 30, 4), mask, torch.ones(4))
                chosen = vq.collected[1]
                vq.update()
        return int((chosen > 0).sum())

    assert codes_in_use(ResidualVQ.dead) >= 7 and codes_in_use(1e-6) <= 5


@pytest.fixture
def train_two_ranks(monkeypatch):
    """A function that trains two embedders as two ranks, which are threads. Each trains on its half of every batch."""
    barrier, values, thread = threading.Barrier(2, timeout=30), [None, None], threading.local()

    def gather(value):
        values[thread.rank] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    def run(rank, embedder, batches):
        thread.rank = rank
        train(embedder, [batch[3 * rank : 3 * rank + 3] for batch in batches])

    def train_both(embedders, batches):
        monkeypatch.setattr(distributed, "sum_over_ranks", lambda tensor: sum(gather(tensor)))
        monkeypatch.setattr(distributed, "concat_over_ranks", lambda tensor: torch.cat(gather(tensor)))
        threads = [threading.Thread(target=run, args=(rank, embedders[rank], batches)) for rank in range(2)]
        for started in threads:
            started.start()
        for started in threads:
            started.join()

    return train_both


def test_micro_batches_and_ranks_never_change_the_quantizer(codec, train_two_ranks):
    batches = [[style(6 * step + i) if (step, i) != (1, 1) else None for i in range(6)] for step in range(4)]
    batches += [[None] * 3 + [style(90 + i) for i in range(3)], [None] * 6, [style(i) for i in range(6)]]
    full, micro, first, second = (make_embedder(codec) for _ in range(4))
    train(full, batches)
    train(micro, [[batch[:2], batch[2:]] for batch in batches])
    train_two_ranks([first, second], batches)
    assert (full.vq.counts > 0).all()
    for other in (micro, first):
        torch.testing.assert_close(state_of(full), state_of(other), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state_of(first), state_of(second), rtol=0, atol=0)


def test_a_discarded_step_never_changes_the_quantizer(embedder):
    before = state_of(embedder)
    embedder.train()
    embedder(*embedder.tokenize([style(0), style(1)]))
    embedder.vq.discard()
    torch.testing.assert_close(state_of(embedder), before, rtol=0, atol=0)
    train(embedder, [[None, None]])
    torch.testing.assert_close(state_of(embedder), before, rtol=0, atol=0)


def test_an_embedder_resumes_bit_for_bit_from_its_state_dict(embedder):
    styles = [style(3), None, style(4, codebooks=2)]
    with torch.device("meta"):
        resumed = make_embedder()
    resumed.to_empty(device="cpu")
    resumed.load_state_dict(embedder.state_dict())
    for copy in (embedder, resumed):
        train(copy, [styles, styles])
    assert set(state_of(embedder)) == {"moments", "counts", "sums"}
    torch.testing.assert_close(resumed.state_dict(), embedder.state_dict(), rtol=0, atol=0)
    assert torch.equal(*(copy.eval()(*copy.tokenize(styles)) for copy in (embedder, resumed)))


def test_fewer_codebooks_change_the_prefix_and_too_many_or_none_mean_all(embedder):
    one, four, nine, default = embedder(*embedder.tokenize([style(0, 75, n) for n in (1, 4, 9, None)]))
    assert not torch.allclose(one, four)
    torch.testing.assert_close(nine, four)
    torch.testing.assert_close(default, four)


def test_the_quantizer_stays_in_float32_under_autocast(embedder):
    moments = state_of(embedder)["moments"]
    with torch.autocast("cpu", torch.bfloat16):
        train(embedder, [[style(0), None]])
        prefix = embedder(*embedder.tokenize([style(0), None]))
    prefix.float().square().sum().backward()
    assert prefix.isfinite().all() and all(p.grad.isfinite().all() for p in embedder.parameters())
    assert all(tensor.dtype == torch.float32 for tensor in state_of(embedder).values())
    frames = int(embedder.tokenize([style(0)])[1].sum())
    torch.testing.assert_close(embedder.vq.moments[0], 0.99 * moments[0] + frames)
