import math

import pytest
import torch
from conftest import finish, start
from models import CODEC, ORGAN, PIANO, make_batch, make_model

from conditioning import to_device
from model import attention, freeze, rotate, rotations, sinusoids


@pytest.mark.parametrize("pattern", ["delay", "parallel", "unrolled"])
def test_a_melody_stands_where_its_frames_do_and_a_style_nowhere(pattern):
    model = make_model(pattern=pattern, segment=2.0)
    rows = model.conditioner.prepended["melody"].rows
    places = model.conditioner.positions("cpu")
    frames = ((torch.arange(rows) + 0.5) * 50 / 8).long()
    assert rows == 16 and (places[:rows] - frames).abs().max() < 1 and not places[rows:].any()
    steps = model.pattern(100).step[:, frames].float().mean(0)
    prefix, _ = model.add_positions(torch.zeros(1, model.conditioner.rows + 7, 32), model.positions(7))
    shifts = [(prefix[0, :rows] - sinusoids(steps + shift, 32)).abs().mean() for shift in range(-8, 9)]
    assert -6 <= range(-8, 9)[int(torch.stack(shifts).argmin())] <= 0, "within a frame of where its codes stand"


@pytest.mark.parametrize("S, kind", [(1, "mask"), (40, "mask"), (40, "causal"), (600, "causal")])
@pytest.mark.parametrize("cached", [False, True])
def test_attention_in_bfloat16_is_that_of_float32(S, kind, cached):
    """Values and gradients, where torch's own is called and where it is not, and with a cache in float32."""
    q, k, v = torch.randn(3, 2, 4, S + 5, 16).bfloat16()
    q, mask = q[:, :, :S] if kind == "mask" else q, torch.rand(2, 1, 1, S + 5) > 0.3
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        kv_dtype = torch.float32 if cached else dtype
        leaves = [x.detach().to(to).requires_grad_() for x, to in ((q, dtype), (k, kv_dtype), (v, kv_dtype))]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = attention(*leaves, mask) if kind == "mask" else attention(*leaves, None, is_causal=True)
        found.append([out.detach(), *torch.autograd.grad((out * v[:, :, : out.shape[2]]).sum(), leaves)])
    for exact, rounded in zip(*found):
        torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def test_rotary_positions_are_relative():
    """The product of a query and a key depends on how far apart they stand, not on where."""
    q, k = torch.randn(2, 1, 1, 1, 16)
    product = {}
    for m, n in ((0, 3), (40, 43), (1000, 1003), (0, 4)):
        q_at, k_at = (rotate(x, rotations(torch.tensor([position]), 16)) for x, position in ((q, m), (k, n)))
        product[m, n] = float((q_at * k_at).sum())
    assert product[0, 3] == pytest.approx(product[40, 43], abs=1e-4) == pytest.approx(product[1000, 1003], abs=1e-3)
    assert abs(product[0, 3] - product[0, 4]) > 1e-2
    torch.testing.assert_close(rotate(q, rotations(torch.tensor([0]), 16)), q)


def test_a_rotary_model_knows_how_far_apart_steps_stand_and_not_where(monkeypatch):
    """With sinusoids, the other way of settings.positions, a shift of all steps changes the logits."""
    codes, logits = torch.randint(0, 64, (2, 4, 12)), {}
    for positions in ("rope", "sinusoidal"):
        model = make_model(positions=positions)
        usual, inputs = model.positions, model.conditioner.prepare([PIANO, ORGAN])
        for way, move in dict(usual=lambda x: x, shifted=lambda x: x + 7, stretched=lambda x: 2 * x).items():
            monkeypatch.setattr(model, "positions", lambda S, move=move, usual=usual: move(usual(S)))
            logits[positions, way] = model.aligned_logits(codes, inputs).nan_to_num()
    torch.testing.assert_close(logits["rope", "usual"], logits["rope", "shifted"], rtol=1e-3, atol=1e-3)
    for other in (("rope", "stretched"), ("sinusoidal", "usual")):
        assert (logits["rope", "usual"] - logits[other]).abs().max() > 0.1
    assert (logits["sinusoidal", "usual"] - logits["sinusoidal", "shifted"]).abs().max() > 0.1


@pytest.mark.parametrize("pattern", ["delay", "parallel", "unrolled"])
def test_loss_in_pattern_order_equals_loss_on_aligned_logits(pattern):
    model = make_model(pattern=pattern)
    codes, valid, scored, inputs = make_batch(model)
    ce_sum, count = model(codes, valid, scored, inputs)
    shown = codes.masked_fill(~valid[:, None], model.special)  # padding is no code
    nll = -model.aligned_logits(shown, inputs).log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    mask = scored[:, None] & model.pattern(12, training=True).frame_mask
    assert count.tolist() == mask.sum((0, 2)).tolist()
    torch.testing.assert_close(ce_sum, nll.masked_fill(~mask, 0).sum((0, 2)))


@pytest.mark.parametrize("card", [64, 512, 2048])
def test_loss_at_init_is_within_2_percent_of_uniform(card):
    model = make_model(lively=False, codec={**CODEC, "card": card}, dim=128)
    ce_sum, count = model(*make_batch(model))
    assert (ce_sum / count).mean().item() == pytest.approx(math.log(card), rel=0.02)


def test_padding_and_neighbours_never_change_a_sample():
    model = make_model()
    codes = torch.randint(0, 64, (2, 4, 12))
    together = model.aligned_logits(codes, model.conditioner.prepare([PIANO, ORGAN]))
    alone = model.aligned_logits(codes[:1], model.conditioner.prepare([PIANO]))
    torch.testing.assert_close(together[:1], alone, equal_nan=True, rtol=1e-4, atol=1e-5)
    padded = codes.clone()
    padded[:, :, 9:] = 0  # seen from frame 10 - k of codebook k on
    later = model.aligned_logits(padded, model.conditioner.prepare([PIANO, ORGAN]))
    torch.testing.assert_close(together[:, :, :7], later[:, :, :7], rtol=1e-4, atol=1e-5)


def test_padded_frames_leave_the_loss():
    model = make_model()
    codes, *rest = make_batch(model)
    changed = codes.clone()
    changed[1, :, 7:] = 5
    torch.testing.assert_close(model(codes, *rest), model(changed, *rest))


def test_a_codebook_without_valid_positions_counts_none():
    model = make_model()
    both = torch.ones(1, 2, dtype=torch.bool)
    ce_sum, count = model(torch.zeros(1, 4, 2, dtype=torch.int64), both, both, make_batch(model, 1)[3])
    assert count.tolist() == [2, 1, 0, 0] and ce_sum[2:].tolist() == [0, 0]


def test_every_parameter_gets_gradient():
    model = make_model().train()
    ce_sum, count = model(*make_batch(model))
    (ce_sum / count).mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []


def test_the_null_starts_at_zero_and_so_does_its_cross_attention():
    model = make_model(lively=False)
    states, mask, prefix = model.conditioner(model.conditioner.prepare([{}, {"text": ""}, PIANO]))
    assert prefix[:2].abs().max() == 0 and prefix[2].abs().max() > 0
    assert mask.sum(1).tolist()[:2] == [1, 1] and mask[2].sum() > 1
    assert states[:2].abs().max() == 0 and states[2].abs().max() > 0
    assert model.blocks[0].cross_kv(states)[0].abs().max() == 0


@pytest.mark.parametrize("name", ["text", "melody", "style"])
def test_each_condition_changes_the_logits(name):
    model = make_model()
    codes = torch.randint(0, 64, (1, 4, 12)).expand(3, -1, -1)
    conditions = [{name: PIANO[name]}, {name: ORGAN[name]}, {}]
    logits = model.aligned_logits(codes, model.conditioner.prepare(conditions)).nan_to_num()
    for a, b in ((0, 1), (0, 2)):
        assert (logits[a] - logits[b]).abs().max() > 0.01


def test_targets_are_counted_over_all_parts_of_a_batch():
    for pattern in ("delay", "parallel", "unrolled"):
        model = make_model(pattern=pattern)
        codes, valid, scored, inputs = make_batch(model)
        assert torch.equal(model.count_targets(scored.sum(0)), model(codes, valid, scored, inputs)[1])


def test_blocks_are_one_graph_in_training_whatever_the_length_of_captions():
    """fullgraph would raise at a break."""
    model = make_model()
    *tensors, inputs = make_batch(model)
    ce = model(*tensors, inputs)[0]
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(*tensors, inputs)[0], ce)
    for text in ("a", PIANO["text"], ORGAN["text"]):
        model(*tensors, model.conditioner.prepare([{"text": text}] * 3))[0].sum().backward()


def test_importing_the_model_imports_nothing_of_audio_or_files():
    names = "codec encodec soundfile soxr safetensors prepare data".split()
    code = f"import model, sys; print([name for name in {names} if name in sys.modules])"
    assert finish(start("-c", code)) == "[]\n"


# The figures that a run reports, on cases whose answers are known without it.


def make_guesser():
    return make_model(lively=False, melody=False, style=False, dim=16)


def ce_of(model, codes, scored=None):
    valid = torch.ones(len(codes), codes.shape[2], dtype=torch.bool)
    inputs = model.conditioner.prepare([{}] * len(codes))
    with torch.no_grad():
        ce_sum, count = model(codes, valid, valid if scored is None else scored, inputs)
    return ce_sum / count


def test_ce_of_a_model_that_guesses_and_of_one_that_knows():
    model = make_guesser()
    codes = torch.randint(64, (3, 4, 20))
    torch.nn.init.zeros_(model.heads.weight)
    torch.testing.assert_close(ce_of(model, codes), torch.full((4,), math.log(64)))
    with torch.no_grad():  # the heads read ones, whatever stood before, and every codebook is sure of its own code
        model.norm.weight.zero_()
        model.norm.bias.fill_(1)
        for k in range(4):
            model.heads.weight[k * 64 + 10 + k] = 50 / 16
    known = (10 + torch.arange(4))[None, :, None].expand(3, 4, 20)
    assert ce_of(model, known).max() < 1e-6
    torch.testing.assert_close(ce_of(model, known + 1), torch.full((4,), 50.0))
    half = torch.where(torch.arange(20) % 2 == 0, known, known + 1)  # in codebook k, 20 - k frames are left of 20
    wrong = torch.tensor([(torch.arange(20 - k) % 2).float().mean() for k in range(4)])
    torch.testing.assert_close(ce_of(model, half), 50 * wrong)


def test_ce_of_frames_that_do_not_count_is_not_in_the_mean():
    model = make_guesser()
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1)
        model.heads.weight.zero_()
        model.heads.weight[3::64] = 20 / 16
    codes = torch.full((2, 4, 20), 3)
    codes[1] = 4
    scored = torch.ones(2, 20, dtype=torch.bool)
    scored[1, 5:] = False  # 20 right ones, 5 wrong ones: a mean over positions, not over items
    wrong = 20 + math.log1p(63 * math.exp(-20))
    expected = torch.tensor([5 * wrong / (20 - k + 5) for k in range(4)])
    torch.testing.assert_close(ce_of(model, codes, scored), expected, rtol=1e-5, atol=1e-5)


def test_operations_are_those_counted_by_hand():
    D, LAYERS, K, CARD, T = 32, 2, 4, 64, 50
    model = make_model(segment=1.0, melody=False, style=False)
    block = 3 * D * D + 3 * D * D + 8 * D * D + 3 * 2 * D  # qkv, both outs and cross_q, up and down, norms
    attention = 12 * LAYERS * D * T**2
    assert model.flops() == 6 * T * (LAYERS * block + K * CARD * D) + attention
    freeze(model, ["blocks.*"])
    assert model.flops() == 6 * T * K * CARD * D + 4 * T * LAYERS * block + attention


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu():
    model = make_model()
    *tensors, inputs = make_batch(model)
    on_cpu = model(*tensors, inputs)[0]
    on_gpu = model.cuda()(*(tensor.cuda() for tensor in tensors), to_device(inputs, "cuda"))[0]
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
