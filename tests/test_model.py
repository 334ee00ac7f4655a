"""MusicLM: positions, attention, masks, loss, and the numbers that a run reports."""

import math

import pytest
import torch
from conftest import finish, start
from models import CODEC, ORGAN, PATTERNS, PIANO, make_batch, make_model

from conditioning import to_device
from data import count_targets
from model import attention, freeze, rotate, rotations

each_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@each_pattern
def test_a_note_has_the_position_of_its_frame_and_a_style_has_none(pattern):
    model = make_model(pattern=pattern, segment=2.0)
    P = model.conditioner.prepended["melody"].length
    prefix_positions = model.conditioner.prefix_positions("cpu")
    frames = ((torch.arange(P) + 0.5) * 50 / 8).long()
    assert P == 16 and (prefix_positions[:P] - frames).abs().max() < 1 and not prefix_positions[P:].any()
    shift = model.positions(7)[:P] - model.pattern(100).position[:, frames].float().mean(0)
    assert -6 <= shift.mean() <= 0 and shift.std() < 2, "about one frame before the frame's codes, for every note"
    assert model.positions(7)[model.conditioner.prefix_length :].tolist() == list(range(7))


@pytest.mark.parametrize("S, kind", [(1, "mask"), (40, "mask"), (40, "causal"), (600, "causal")])
@pytest.mark.parametrize("cached", [False, True])
def test_attention_in_bfloat16_equals_that_in_float32_in_values_and_gradients(S, kind, cached):
    q, k, v = torch.randn(3, 2, 4, S + 5, 16).bfloat16()
    q, mask = q[:, :, :S] if kind == "mask" else q, torch.rand(2, 1, 1, S + 5) > 0.3
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        cache_dtype = torch.float32 if cached else dtype
        leaves = [x.detach().to(to).requires_grad_() for x, to in ((q, dtype), (k, cache_dtype), (v, cache_dtype))]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = attention(*leaves, mask) if kind == "mask" else attention(*leaves, None, is_causal=True)
        results.append([out.detach(), *torch.autograd.grad((out * v[:, :, : out.shape[2]]).sum(), leaves)])
    for exact, rounded in zip(*results):
        torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.02 * float(exact.abs().max()))


def test_products_of_rotated_queries_and_keys_depend_only_on_their_distance():
    q, k = torch.randn(2, 1, 1, 1, 16)
    product = {}
    for m, n in ((0, 3), (40, 43), (1000, 1003), (0, 4)):
        rotated_q, rotated_k = (rotate(x, rotations(torch.tensor([position]), 16)) for x, position in ((q, m), (k, n)))
        product[m, n] = float((rotated_q * rotated_k).sum())
    assert product[0, 3] == pytest.approx(product[40, 43], abs=1e-4) == pytest.approx(product[1000, 1003], abs=1e-3)
    assert abs(product[0, 3] - product[0, 4]) > 1e-2
    torch.testing.assert_close(rotate(q, rotations(torch.tensor([0]), 16)), q)


def test_a_shift_of_all_positions_changes_logits_with_sinusoids_but_not_with_rotations(monkeypatch):
    codes, logits = torch.randint(0, 64, (2, 4, 12)), {}
    for kind in ("rope", "sinusoidal"):
        model = make_model(positions=kind)
        positions, tensors = model.positions, model.conditioner.tokenize([PIANO, ORGAN])
        for change, moved in dict(none=lambda x: x, shift=lambda x: x + 7, stretch=lambda x: 2 * x).items():
            monkeypatch.setattr(model, "positions", lambda S, moved=moved, positions=positions: moved(positions(S)))
            logits[kind, change] = model.aligned_logits(codes, tensors).nan_to_num()
    torch.testing.assert_close(logits["rope", "none"], logits["rope", "shift"], rtol=1e-3, atol=1e-3)
    for other in (("rope", "stretch"), ("sinusoidal", "none")):
        assert (logits["rope", "none"] - logits[other]).abs().max() > 0.1
    assert (logits["sinusoidal", "none"] - logits["sinusoidal", "shift"]).abs().max() > 0.1


@each_pattern
def test_loss_in_pattern_order_equals_loss_on_aligned_logits(pattern):
    model = make_model(pattern=pattern)
    codes, not_padding, in_loss, tensors, targets = make_batch(model)
    input_codes = codes.masked_fill(~not_padding[:, None], model.special)
    ce = -model.aligned_logits(input_codes, tensors).log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    mask = in_loss[:, None] & model.pattern(12, training=True).frame_mask
    assert targets.tolist() == mask.sum((0, 2)).tolist()
    torch.testing.assert_close(model(codes, not_padding, in_loss, tensors), ce.masked_fill(~mask, 0).sum((0, 2)))


@each_pattern
def test_the_loss_sums_over_targets_per_codebook(pattern):
    """A model with heads of zero has ce ln(card) at each target, so its loss counts them."""
    model = make_model(pattern=pattern)
    torch.nn.init.zeros_(model.heads.weight)
    *inputs, targets = make_batch(model, T=12)
    by_hand = torch.zeros(4)
    for item in inputs[2]:
        for t in range(12):
            for k in range(4):
                position = {"delay": 1 + t + k, "parallel": 1 + t, "unrolled": 1 + 4 * t + k}[pattern]
                last = {"delay": 12, "parallel": 12, "unrolled": 48}[pattern]
                by_hand[k] += item[t] and position <= last
    assert by_hand.tolist() == targets.tolist() and 0 < by_hand.min() < inputs[0][:, 0].numel()
    torch.testing.assert_close(model(*inputs), by_hand * math.log(64))


@pytest.mark.parametrize("card", [64, 512, 2048])
def test_loss_at_init_is_within_2_percent_of_uniform(card):
    model = make_model(noise=0, codec={**CODEC, "card": card}, dim=128)
    *inputs, targets = make_batch(model)
    assert (model(*inputs) / targets).mean().item() == pytest.approx(math.log(card), rel=0.02)


def test_padding_and_neighbours_never_change_a_sample():
    model = make_model()
    codes = torch.randint(0, 64, (2, 4, 12))
    together = model.aligned_logits(codes, model.conditioner.tokenize([PIANO, ORGAN]))
    alone = model.aligned_logits(codes[:1], model.conditioner.tokenize([PIANO]))
    torch.testing.assert_close(together[:1], alone, equal_nan=True, rtol=1e-4, atol=1e-5)
    padded = codes.clone()
    padded[:, :, 9:] = 0  # the delays spread this over the logits of frames 7 and later
    other = model.aligned_logits(padded, model.conditioner.tokenize([PIANO, ORGAN]))
    torch.testing.assert_close(together[:, :, :7], other[:, :, :7], rtol=1e-4, atol=1e-5)


def test_codes_of_padding_never_change_the_loss():
    model = make_model()
    codes, not_padding, in_loss, tensors, _ = make_batch(model)
    changed = codes.masked_fill(~not_padding[:, None], 5)
    assert not torch.equal(codes, changed)
    torch.testing.assert_close(
        model(codes, not_padding, in_loss, tensors), model(changed, not_padding, in_loss, tensors)
    )


def test_codebooks_whose_frames_are_all_cut_off_have_no_targets_and_no_loss():
    model, mask = make_model(), torch.ones(1, 2, dtype=torch.bool)
    ce_sum = model(torch.zeros(1, 4, 2, dtype=torch.int64), mask, mask, model.conditioner.tokenize([PIANO]))
    assert count_targets(mask, model.pattern(2, training=True)).tolist() == [2, 1, 0, 0]
    assert ce_sum[:2].all() and ce_sum[2:].tolist() == [0, 0]


def test_every_parameter_gets_a_gradient():
    model = make_model().train()
    *inputs, targets = make_batch(model)
    (model(*inputs) / targets).mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_null_condition_and_its_cross_attention_start_at_zero():
    model = make_model(noise=0)
    states, mask, prefix = model.conditioner(model.conditioner.tokenize([{}, {"text": ""}, PIANO]))
    assert prefix[:2].abs().max() == 0 and prefix[2].abs().max() > 0
    assert mask.sum(1).tolist()[:2] == [1, 1] and mask[2].sum() > 1
    assert states[:2].abs().max() == 0 and states[2].abs().max() > 0
    assert model.blocks[0].cross_kv(states)[0].abs().max() == 0


@pytest.mark.parametrize("name", ["text", "melody", "style"])
def test_each_condition_changes_the_logits(name):
    model = make_model()
    codes = torch.randint(0, 64, (1, 4, 12)).expand(3, -1, -1)
    tensors = model.conditioner.tokenize([{name: PIANO[name]}, {name: ORGAN[name]}, {}])
    first, second, null = model.aligned_logits(codes, tensors).nan_to_num()
    assert (first - second).abs().max() > 0.01 and (first - null).abs().max() > 0.01


def test_each_block_is_one_compiled_graph_for_any_length_of_caption():
    model = make_model()
    *inputs, _ = make_batch(model)
    eager = model(*inputs)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, fullgraph=True, backend="aot_eager")  # raises at a graph break
    torch.testing.assert_close(model(*inputs), eager)
    for text in ("a", PIANO["text"], ORGAN["text"]):
        model(*inputs[:3], model.conditioner.tokenize([{"text": text}] * 3)).sum().backward()


def test_importing_the_model_imports_no_module_for_audio_or_files():
    names = "codec audio encodec soundfile soxr safetensors prepare data".split()
    code = f"import model, sys; print([name for name in {names} if name in sys.modules])"
    assert finish(start("-c", code)) == "[]\n"


# Numbers that a run reports, for cases with a known answer


def make_plain_model():
    return make_model(noise=0, melody=False, style=False, dim=16)


def set_heads(model, heads):
    """Set the heads to [K, card] and the norm to output ones, so that the logits are 16 * heads for every input."""
    with torch.no_grad():
        model.norm.weight.zero_()
        model.norm.bias.fill_(1)
        model.heads.weight.copy_(heads.reshape(-1, 1).expand(-1, 16))


@torch.no_grad()
def ce_of(model, codes, in_loss=None):
    mask = torch.ones(len(codes), codes.shape[2], dtype=torch.bool)
    in_loss = mask if in_loss is None else in_loss
    targets = count_targets(in_loss, model.pattern(codes.shape[2], training=True))
    return model(codes, mask, in_loss, model.conditioner.tokenize([{}] * len(codes))) / targets


def test_ce_of_uniform_logits_is_ln_card_and_ce_of_certain_logits_is_0_or_their_difference():
    model = make_plain_model()
    set_heads(model, torch.zeros(4, 64))
    torch.testing.assert_close(ce_of(model, torch.randint(64, (3, 4, 20))), torch.full((4,), math.log(64)))
    set_heads(model, 50 / 16 * torch.eye(64)[10:14])  # codebook k predicts code 10 + k
    right = (10 + torch.arange(4))[None, :, None].expand(3, 4, 20)
    assert ce_of(model, right).max() < 1e-6
    torch.testing.assert_close(ce_of(model, right + 1), torch.full((4,), 50.0))
    half_right = torch.where(torch.arange(20) % 2 == 0, right, right + 1)
    share_wrong = torch.tensor([(torch.arange(20 - k) % 2).float().mean() for k in range(4)])  # k frames are cut off
    torch.testing.assert_close(ce_of(model, half_right), 50 * share_wrong)


def test_ce_is_the_mean_over_the_positions_in_the_loss_not_over_items():
    model = make_plain_model()
    set_heads(model, 20 / 16 * torch.eye(64)[[3, 3, 3, 3]])
    codes = torch.full((2, 4, 20), 3)
    codes[1] = 4
    in_loss = torch.ones(2, 20, dtype=torch.bool)
    in_loss[1, 5:] = False  # 20 right and 5 wrong positions
    ce_wrong = 20 + math.log1p(63 * math.exp(-20))
    expected = torch.tensor([5 * ce_wrong / (20 - k + 5) for k in range(4)])
    torch.testing.assert_close(ce_of(model, codes, in_loss), expected, rtol=1e-5, atol=1e-5)


def test_flops_equal_those_counted_by_hand():
    D, LAYERS, K, CARD, T = 32, 2, 4, 64, 50
    model = make_model(segment=1.0, melody=False, style=False)
    block = 3 * D * D + 3 * D * D + 8 * D * D + 3 * 2 * D  # qkv; attn_out, cross_q, cross_out; up, down; norms
    attention = 12 * LAYERS * D * T**2
    assert model.flops() == 6 * T * (LAYERS * block + K * CARD * D) + attention
    freeze(model, ["blocks.*"])
    assert model.flops() == 6 * T * K * CARD * D + 4 * T * LAYERS * block + attention


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_agrees_with_cpu():
    model = make_model()
    *inputs, tensors, _ = make_batch(model)
    on_cpu = model(*inputs, tensors)
    on_gpu = model.cuda()(*(tensor.cuda() for tensor in inputs), to_device(tensors, "cuda"))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-3)
