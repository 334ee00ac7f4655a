"""Published weights in and out, on the fixtures made with the packages that they come from; fine-tuning; estimates."""

import collections
import json
import pickle
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import ROOT, TOY
from estimate import activation_bytes, estimate
from test_train import lines
from weights import read_lm

import data
import model
import sample
import train
from codec import build_musicgen_32khz, decode_stream, describe_codec, encode_long, load_codec
from config import Settings, UserError
from model import Block, MusicLM, load_model, merge_lora

TOY_LM = dict(dim=32, heads=4, layers=3, segment=0.4)


@pytest.fixture(scope="module")
def published():
    return {
        name: torch.load(ROOT / "tests" / f"{name}_toy.pt", weights_only=True)
        for name in ("musicgen_lm", "encodec_32khz")
    }


@pytest.fixture
def folder(published, tmp_path):
    """Both models in both layouts, and one file in which Hugging Face's stand together, as in its repositories."""
    lm, codec = published["musicgen_lm"], published["encodec_32khz"]
    for name in ("audiocraft", "hf", "hf_whole"):
        (tmp_path / name).mkdir()
    settings = "encodec:\n  renormalize: false\nseanet:\n  pad_mode: reflect\ntransformer_lm:\n  num_heads: 4\n"
    aside = {"condition_provider.conditioners.description.output_proj.weight": torch.zeros(32, 8)}
    for file, state in (("state_dict.bin", lm["audiocraft"] | aside), ("compression_state_dict.bin", codec["encodec"])):
        torch.save({"best_state": state, "xp.cfg": settings}, tmp_path / "audiocraft" / file)
    safetensors.torch.save_file(lm["huggingface"], tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text('{"num_attention_heads": 4}')
    (tmp_path / "hf_whole" / "config.json").write_text(
        '{"decoder": {"num_attention_heads": 4}, "text_encoder": {"num_heads": 2}}'
    )
    whole = {f"decoder.{name}": tensor for name, tensor in lm["huggingface"].items()}
    whole |= {f"audio_encoder.{name}": tensor for name, tensor in codec["huggingface"].items()}
    whole |= {"text_encoder.shared.weight": torch.zeros(3, 3), "enc_to_dec_proj.weight": torch.zeros(3, 3)}
    parts = list(whole)[::2], list(whole)[1::2]
    for number, names in enumerate(parts, 1):
        part = {name: whole[name].clone() for name in names}  # of tensors that are not shared
        safetensors.torch.save_file(part, tmp_path / "hf_whole" / f"model-0000{number}-of-00002.safetensors")
    return tmp_path


def make_model(**settings):
    codec = dict(K=4, card=40, frame_rate=50, dim=8)
    return MusicLM(Settings(**{**TOY_LM, **settings}), codec, data.train_tokenizer([], 300)).eval()


@pytest.mark.parametrize("layout", ["audiocraft", "hf", "hf_whole"])
def test_a_published_model_gives_the_logits_of_the_reference(folder, published, layout):
    theirs, ours = published["musicgen_lm"], make_model()
    begin = ours.load_state_dict(read_lm(folder / layout, ours), strict=False)
    assert begin.unexpected_keys == [] and all(name.startswith("conditioner.") for name in begin.missing_keys)
    assert torch.equal(ours.pattern(20, training=True).build(theirs["codes"], 40), theirs["sequence"])

    def logits(states, mask, prefix=None):
        prefix = states[:, :0] if prefix is None else prefix
        return ours.logits(ours.hidden(theirs["sequence"], states, mask, prefix)).transpose(1, 2)

    states, mask = theirs["text_states"], theirs["text_mask"]
    nothing = ours.conditioner(ours.conditioner.prepare([{}] * 3, "cpu"))
    with torch.no_grad():
        torch.testing.assert_close(logits(states, torch.ones_like(mask)), theirs["logits_unmasked"], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits(states, mask), theirs["logits_masked"], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits(*nothing), theirs["logits_unconditional"], atol=1e-4, rtol=0)


def test_a_fine_tune_starts_at_the_loss_of_the_weights_it_begins_with(folder, published):
    theirs, ours = published["musicgen_lm"], make_model()
    ours.load_state_dict(read_lm(folder / "hf", ours), strict=False)
    frames = torch.ones(3, 20, dtype=torch.bool)
    with torch.no_grad():
        ce_sum, count = ours(theirs["codes"], frames, frames, ours.conditioner.prepare([{}] * 3, "cpu"))
    nll = torch.nn.functional.cross_entropy(
        theirs["logits_unconditional"][:, :, :-1].flatten(0, 2), theirs["sequence"][:, :, 1:].flatten(),
        ignore_index=40, reduction="none",
    ).view(3, 4, 20)  # fmt: skip
    torch.testing.assert_close(ce_sum / count, nll.sum((0, 2)) / (nll > 0).sum((0, 2)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["audiocraft", "hf"])
def test_in_and_out_again_changes_no_bit(folder, published, layout):
    ours = make_model()
    ours.load_state_dict(read_lm(folder / layout, ours), strict=False)
    path = model.export_lm(ours, ours.state_dict(), Settings(**TOY_LM), folder / "out", layout)
    wanted = published["musicgen_lm"]["huggingface" if layout == "hf" else "audiocraft"]
    if layout == "hf":
        found = safetensors.torch.load_file(path)
        config = json.loads((folder / "out" / "config.json").read_text())
        assert (config["vocab_size"], config["num_codebooks"], config["ffn_dim"]) == (40, 4, 128)
    else:
        saved = torch.load(path, weights_only=True)
        found, config = saved["best_state"], json.loads(saved["xp.cfg"])
        assert config["codebooks_pattern"]["delay"]["delays"] == [0, 1, 2, 3]
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_published_model_plays_at_once(folder, published, tmp_path, command):
    whole = {name: tensor.half() for name, tensor in published["musicgen_lm"]["huggingface"].items()}
    theirs = dict(whole, **{f"model.decoder.embed_tokens.{k}.weight": torch.randn(65, 32).half() for k in range(4)},
                  **{f"lm_heads.{k}.weight": torch.randn(64, 32).half() for k in range(4)})  # fmt: skip
    safetensors.torch.save_file(
        theirs, folder / "hf" / "model.safetensors"
    )  # in half precision, for the toy codec's card
    args = (folder / "hf", tmp_path / "run" / "best.pt", "--codec_weights", folder / "hf_whole")
    status, output = command(model, "import", *args)
    assert status == 0 and "hears no text yet" in output, output
    soundfile.write(tmp_path / "begin.wav", np.sin(np.arange(16_000) / 9) / 3, 32_000)
    for name, more in (("alone", ()), ("on", ("--continue", tmp_path / "begin.wav")), ("text", ("bells",))):
        status, output = command(sample, args[1], *more, "--duration", 1, "--out", tmp_path / f"{name}.wav")
        assert status == 0 and soundfile.info(tmp_path / f"{name}.wav").samplerate == 32_000, output
    ours = load_model(args[1])[0]
    alone, text = (ours.generate([given], 20, seeds=[1]) for given in ({}, {"text": "bells"}))
    assert torch.equal(alone, text) and alone.unique().numel() > 10
    status, output = command(model, "import", folder / "audiocraft", *args[1:])
    assert status == 2 and "has K 4, card 40, and the codec K 4, card 64" in output


def test_a_melody_model_has_no_cross_attention(folder, published):
    state = {name: tensor for name, tensor in published["musicgen_lm"]["audiocraft"].items()
             if "cross" not in name}  # fmt: skip
    torch.save({"best_state": state, "xp.cfg": "num_heads: 4"}, folder / "state_dict.bin")
    ours = make_model()
    ours.load_state_dict(read_lm(folder, ours), strict=False)
    with pytest.raises(UserError, match="cross_out is all zero"):
        ours.freeze(["blocks.*"])
    ours.freeze(["blocks.*.qkv*"])
    assert all(not block.cross_out.weight.any() and block.cross_kv.weight.any() for block in ours.blocks)
    assert torch.equal(ours.blocks[1].up.weight, state["transformer.layers.1.linear1.weight"])


def test_the_hub_is_asked_for_what_is_needed_and_no_more(folder, monkeypatch):
    asked, hub = [], types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(folder / "hf")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    read_lm("hf:facebook/musicgen-small", make_model())
    patterns = (["state_dict.bin", "config.json"], ["model*.safetensors", "config.json"])
    assert asked == [("facebook/musicgen-small", pattern) for pattern in patterns]


def test_stereo_weights_stand_in_pairs(tmp_path):
    codec = dict(K=8, card=40, frame_rate=50, dim=8, channels=2)
    ours = MusicLM(Settings(**TOY_LM), codec, data.train_tokenizer([], 300))
    assert ours.delays == (0, 0, 1, 1, 2, 2, 3, 3) and ours.pattern(20).S == 24
    model.export_lm(ours, ours.state_dict(), Settings(**TOY_LM), tmp_path, "hf")
    assert json.loads((tmp_path / "config.json").read_text())["audio_channels"] == 2
    back = read_lm(tmp_path, ours)
    assert all(torch.equal(back[name], ours.state_dict()[name]) for name in ("embed.weight", "heads.weight"))
    with pytest.raises(UserError, match="has those of MusicGen built in"):
        model.export_lm(make_model(delays=(0, 2, 2, 1)), {}, Settings(**TOY_LM), tmp_path, "hf")
    assert make_model().delays == (0, 1, 2, 3) and make_model(delays=(0, 2, 2, 1)).delays == (0, 2, 2, 1)


def test_weights_that_will_not_do(folder, published, tmp_path):
    ours = make_model()

    def said(path, wanted=ours):
        with pytest.raises(UserError) as error:
            read_lm(path, wanted)
        return str(error.value)

    state = dict(published["musicgen_lm"]["audiocraft"])
    state["extra"] = state.pop("transformer.layers.2.norm1.bias")
    torch.save({"best_state": state, "xp.cfg": "num_heads: 4"}, tmp_path / "partial.bin")
    assert "missing transformer.layers.2.norm1.bias; left over extra" in said(tmp_path / "partial.bin")
    wider = make_model(dim=64, layers=2)
    assert "dim 32, not 64; layers 3, not 2" in said(folder / "hf", wider)
    for layout in ("hf", "audiocraft"):
        assert "heads 4, not 2" in said(folder / layout, make_model(heads=2))
    for name, tensor in (("out_norm.bias", torch.zeros(31)), ("linears.2.weight", torch.zeros(40, 31))):
        state = dict(published["musicgen_lm"]["audiocraft"], **{name: tensor})
        torch.save({"best_state": state, "xp.cfg": "num_heads: 4"}, tmp_path / "shape.bin")
        assert f"{name} is {list(tensor.shape)}, not" in said(tmp_path / "shape.bin")
    for content in ({"best_state": None}, {1: torch.zeros(1)}, [1]):
        torch.save(content, tmp_path / "odd.bin")
        assert "holds no weights" in said(tmp_path / "odd.bin")
    (tmp_path / "noise.bin").write_bytes(b"noise")
    assert "cannot be read as weights: truncated, or no weights" in said(tmp_path / "noise.bin")
    torch.save({"pretrained": "facebook/encodec_32khz"}, tmp_path / "name.bin")
    assert "only names the weights" in said(tmp_path / "name.bin")
    torch.save({"best_state": {"a": torch.zeros(1)}}, tmp_path / "other.bin")
    assert "give the folder); its names are a" in said(tmp_path / "other.bin")
    assert "no such file, nor a folder with state_dict.bin" in said(tmp_path / "nowhere")
    assert "pip install" in said("hf:facebook/musicgen-small") or "cannot be downloaded" in said("hf:facebook/no")


class Bomb:
    def __reduce__(self):
        return print, ("it went off",)


def test_pickles_run_no_code_and_settings_as_objects_are_passed_over(published, tmp_path, capsys, monkeypatch):
    state = published["musicgen_lm"]["audiocraft"]
    torch.save({"best_state": state, "xp.cfg": Bomb()}, tmp_path / "bomb.bin")
    with pytest.raises(UserError, match="holds an object of .*print, which is not let through"):
        read_lm(tmp_path / "bomb.bin", make_model())
    assert "went off" not in capsys.readouterr().out

    module = types.ModuleType("omegaconf.dictconfig")  # as in a file of the package's own, which is not installed here
    DictConfig = type("DictConfig", (), {"__module__": "omegaconf.dictconfig", "__qualname__": "DictConfig"})
    module.DictConfig = DictConfig
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))
        patch.setitem(sys.modules, "omegaconf.dictconfig", module)
        config = DictConfig()
        config.__dict__["_content"] = {
            "transformer_lm": {"num_heads": 4},
            "resolvers": collections.defaultdict(dict, a={}),
        }
        torch.save({"best_state": state, "xp.cfg": config}, tmp_path / "old.bin", pickle_module=pickle)
    assert len(read_lm(tmp_path / "old.bin", make_model())) == 45


@pytest.mark.parametrize("layout", ["audiocraft", "hf_whole"])
def test_the_codec_is_that_of_the_reference(folder, published, layout):
    theirs, codec = published["encodec_32khz"], load_codec("musicgen_32khz", folder / layout)
    assert (codec.sample_rate, codec.frame_rate, codec.hop, codec.K, codec.card) == (32_000, 50, 640, 4, 64)
    latents = codec.model.encoder(theirs["wav"])  # `encode` would scale it down, as it peaks above 1
    assert torch.equal(codec.model.quantizer.vq.encode(latents, n_q=4).transpose(0, 1), theirs["codes"])
    torch.testing.assert_close(codec.decode(theirs["codes"]), theirs["decoded"], atol=1e-4, rtol=0)
    quiet = theirs["wav"] / 2
    assert torch.equal(codec.encode(quiet), codec.model.quantizer.vq.encode(codec.model.encoder(quiet)).transpose(0, 1))
    codes = torch.randint(0, 64, (1, 4, 130))
    streamed = torch.cat(list(decode_stream(codec, codes.split(7, dim=2))), dim=2)
    torch.testing.assert_close(streamed, codec.decode(codes), atol=1e-5, rtol=0)


def test_a_codec_that_will_not_do(folder, published, tmp_path):
    def said(path):
        with pytest.raises(UserError) as error:
            load_codec("musicgen_32khz", path)
        return str(error.value)

    assert "--codec_weights=PATH" in said("")
    state = dict(published["encodec_32khz"]["encodec"])
    torch.save({"best_state": state, "xp.cfg": "encodec:\n  renormalize: true\n"}, tmp_path / "loud.bin")
    assert "renormalises loudness (48 kHz)" in said(tmp_path / "loud.bin")
    torch.save({"encoder.model.0.conv.norm.weight": torch.ones(4)}, tmp_path / "48khz.th")
    assert "renormalises loudness (48 kHz)" in said(tmp_path / "48khz.th")
    state["more"] = state.pop("encoder.model.0.conv.conv.bias")
    torch.save({"best_state": state}, tmp_path / "partial.bin")
    assert "missing encoder.model.0.conv.conv.bias; left over more" in said(tmp_path / "partial.bin")
    torch.save({"best_state": published["musicgen_lm"]["audiocraft"]}, tmp_path / "lm.bin")
    assert "not the weights of musicgen_32khz; its names are" in said(tmp_path / "lm.bin")
    (folder / "hf_whole" / "config.json").write_text('{"pad_mode": "constant"}')
    padded = load_codec("musicgen_32khz", folder / "hf_whole")
    assert padded.id != load_codec("musicgen_32khz", folder / "audiocraft").id
    assert not torch.equal(padded.decode(published["encodec_32khz"]["codes"]), published["encodec_32khz"]["decoded"])
    sizes = {name: tensor.shape for name, tensor in build_musicgen_32khz().state_dict().items()}
    assert sizes["encoder.model.15.conv.conv.weight_v"] == (128, 1024, 7)
    assert sizes["quantizer.vq.layers.3._codebook.embed"] == (2048, 128)


def test_stereo_passes_left_and_right_through_the_same_codec():
    mono, stereo = load_codec("tiny"), load_codec("tiny:stereo")
    wav = 0.3 * torch.randn(3, 2, 16_000).cumsum(2).sin()
    codes = stereo.encode(wav)
    assert codes.shape == (3, 8, 50) and stereo.id != mono.id and stereo.about()["channels"] == 2
    left, right = wav[:, :1], wav[:, 1:]
    assert torch.equal(codes[:, 0::2], mono.encode(left)) and torch.equal(codes[:, 1::2], mono.encode(right))
    torch.testing.assert_close(stereo.decode(codes)[:, 1:], mono.decode(codes[:, 1::2]))
    latents = stereo.latents(codes)
    torch.testing.assert_close(latents[:, :64], mono.latents(codes[:, 0::2]))
    summed = sum(table[codes[:, k]] for k, table in enumerate(stereo.vectors()))
    torch.testing.assert_close(summed.transpose(1, 2), latents)
    assert torch.equal(encode_long(stereo, wav[0], piece=0.5, context=1.0), codes[0])
    loud = torch.cat([left, 4 * right], dim=1) / wav.abs().max()
    assert torch.equal(stereo.encode(loud), stereo.encode(loud / loud.abs().amax((1, 2), keepdim=True).clamp(min=1)))


def test_stereo_from_music_to_music(corpus, tmp_path, command):

    data.prepare(corpus / "manifest.jsonl", tmp_path / "data", "tiny:stereo", workers=1, valid_fraction=0.2)
    args = [*TOY, f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}", "--codec=tiny:stereo", "--style=True"]
    status, output = command(train, *args, "--evaluate_clips=2")
    assert status == 0, output
    assert len(lines(tmp_path / "out" / "metrics.jsonl")[-1]["ce_q"]) == 8
    assert load_model(tmp_path / "out" / "best.pt")[0].delays == (0, 0, 1, 1, 2, 2, 3, 3)
    clip = tmp_path / "clip.wav"
    status, output = command(sample, tmp_path / "out" / "best.pt", "bells", "--duration", 0.5, "--out", clip)
    assert status == 0 and soundfile.info(clip).channels == 2, output
    wav, _ = soundfile.read(clip)
    assert np.abs(wav[:, 0] - wav[:, 1]).max() > 0.01
    status, output = command(train, *args[:-2], "--codec=tiny", f"--out={tmp_path / 'mono'}")
    assert status == 2 and "was prepared with codec tiny-stereo-K8-" in output


@pytest.fixture(scope="module")
def exported(toy_run, tmp_path_factory):
    """The toy run's decoder as Hugging Face has it."""
    folder = tmp_path_factory.mktemp("exported")
    ours, settings, _ = load_model(toy_run[0] / "best.pt")
    model.export_lm(ours, ours.state_dict(), settings, folder, "hf")
    return folder


def test_fine_tuning_by_the_command_line(toy_run, exported, dataset, tmp_path, command):
    out = tmp_path / "out"
    status, output = command(model, "export", toy_run[0] / "best.pt", "--format", "audiocraft", tmp_path / "other")
    assert status == 0 and "left out, as those programs have no place for them: the embedders of text" in output
    args = [*TOY, f"--data={dataset}", f"--out={out}", "--lr=1e-3", "--samples=0"]
    status, output = command(train, *args, f"--init_from=musicgen:{exported}", "--freeze=embed*,blocks.*,heads*,norm*")
    assert status == 0 and f"beginning with the weights of musicgen:{exported}" in output, output
    theirs = torch.load(toy_run[0] / "best.pt", weights_only=True)["model"]
    tuned = torch.load(out / "last.pt", weights_only=True)["model"]
    same = {name for name in theirs if torch.equal(theirs[name], tuned[name])}
    assert same == {name for name in theirs if not name.startswith("conditioner.")}
    back = read_lm(tmp_path / "other", load_model(toy_run[0] / "best.pt")[0])
    assert all(torch.equal(back[name], theirs[name]) for name in same)
    status, output = command(train, *args, "--freeze=heads*", "--steps=9")
    assert status == 2 and "freeze was ['embed*', 'blocks.*'" in output.replace("(", "[")
    free = [*args[:-3], f"--out={tmp_path / 'all'}", f"--init_from={out / 'best.pt'}"]
    assert command(train, *free, "--freeze=")[0] == 0
    status, output = command(train, *free, f"--out={tmp_path / 'x'}", "--freeze=block.*")
    assert status == 2 and "freeze: no parameter is called 'block.*'; see --help" in output
    for change, said in ((["--freeze=*"], "nothing is left to train"), (["--freeze=1"], "must be names"),
                         (["--lora_rank=2", "--freeze=blocks.*"], "the matrices of lora_rank are frozen too"),
                         (["--lora_rank=2", "--lora_targets="], "lora_targets: none")):  # fmt: skip
        status, output = command(train, *free, f"--out={tmp_path / 'x'}", *change)
        assert status == 2 and said in output
    status, output = command(
        train, *args[:-3], f"--out={tmp_path / 'x'}", f"--init_from=musicgen:{exported}", "--dim=64"
    )
    assert status == 2 and "dim 32, not 64" in output


def test_low_rank_matrices_are_learned_beside_frozen_weights(toy_run, dataset, tmp_path, command):
    out = tmp_path / "out"
    args = [*TOY, f"--data={dataset}", f"--out={out}", "--lora_rank=2", "--lora_targets=qkv,up", "--lr=1e-2"]
    args += [f"--init_from={toy_run[0] / 'best.pt'}", "--freeze=embed*,blocks.*weight,blocks.*bias,heads*,norm*"]
    assert command(train, *args)[0] == 0
    base = torch.load(toy_run[0] / "best.pt", weights_only=True)["model"]
    tuned, settings, _ = load_model(out / "best.pt")
    state = tuned.state_dict()
    assert torch.equal(state["blocks.0.qkv.weight"], base["blocks.0.qkv.weight"])
    assert state["blocks.1.up.lora_b"].abs().max() > 1e-4 and "blocks.1.down.lora_b" not in state
    merged = merge_lora(state, vars(settings))
    assert merged.keys() == base.keys()
    plain = MusicLM(Settings(**{**vars(settings), "lora_rank": 0}), dict(K=4, card=512, frame_rate=50, dim=64),
                    tuned.conditioner.text.tokenizer.serialized_model_proto()).eval()  # fmt: skip
    plain.load_state_dict(merged)
    codes, inputs = torch.randint(0, 512, (1, 4, 30)), tuned.conditioner.prepare([{"text": "bells"}], "cpu")
    with torch.no_grad():
        ours, theirs = tuned.aligned_logits(codes, inputs), plain.aligned_logits(codes, inputs)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    more = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'more'}", f"--init_from={out / 'best.pt'}", "--samples=0"]
    assert command(train, *more)[0] == 0, "what was learned is merged where a run without LoRA begins with it"
    status, output = command(train, *args[:-3], f"--out={tmp_path / 'x'}", "--lora_targets=query")
    assert status == 2 and "a block has no 'query'; it has qkv, attn_out" in output


@pytest.mark.parametrize("low, dtype", [(4, torch.float32), (2, torch.bfloat16)])
def test_the_estimate_of_activations_is_what_autograd_keeps(low, dtype):
    B, S, s, kept = 2, 200, Settings(dim=128, heads=2), {}
    block = Block(s.dim, s.heads, 1)
    x, states, mask = torch.randn(B, S, s.dim, requires_grad=True), torch.randn(B, 4, s.dim), torch.ones(B, 1, 1, 4) > 0
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if (
            storage.data_ptr() not in weights and B in tensor.shape or B * S in tensor.shape
        ):  # not a weight, nor its cast
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", dtype, enabled=low == 2):
        block(x, states, mask)
    assert sum(kept.values()) == pytest.approx(B * activation_bytes(s, S, low), rel=0.05)


def test_the_estimate_allocates_nothing_and_knows_small(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to_empty", None)
    args = ["config/large.py", "--parallel=fsdp", "--dtype=bfloat16", f"--out={tmp_path / 'out'}"]
    status, output = command(train, *args, "--estimate=8")
    assert status == 0 and "3,252.8M parameters" in output and "codec encodec_24khz:3, K 4, card 1024" in output
    assert not (tmp_path / "out").exists()
    settings = Settings(dim=1024, heads=16, layers=24, codec="musicgen_32khz", data=str(tmp_path), segment=30, steps=10,
                        batch_size=8, dtype="bfloat16", estimate=1)  # fmt: skip
    memory, _ = estimate(settings)
    assert memory["weights"] == memory["EMA"] == memory["optimizer"] / 2 == memory["gradients"]
    spread, _ = estimate(Settings(**{**vars(settings), "parallel": "fsdp", "estimate": 4}))
    assert spread["weights"] == memory["weights"] / 4 and spread["activations"] == memory["activations"] / 4
    frozen, printed = estimate(Settings(**{**vars(settings), "freeze": ("embed*", "blocks.*weight", "blocks.*bias"),
                                           "lora_rank": 16}))  # fmt: skip
    assert frozen["gradients"] < memory["gradients"] / 10 and "M of them trained" in printed[0]
    assert command(train, "config/demo.py", "--estimate", "--steps=10")[0] == 0
    status, output = command(train, "config/demo.py", "--estimate=3", "--batch_size=8")
    assert status == 2 and "batch_size = 8 does not divide by 3 processes" in output


def test_tokens_of_another_bandwidth_are_another_codec():
    assert [describe_codec(f"encodec_24khz:{kbps}")["K"] for kbps in ("1.5", "3", "6", "12")] == [2, 4, 8, 16]
    assert describe_codec("encodec_24khz:3:stereo")["K"] == 8 and describe_codec("musicgen_32khz")["card"] == 2048
    for name in ("encodec_24khz:5", "tiny:3", "musicgen_32khz:3", "mp3", "tiny:stereo:stereo", "encodec_48khz"):
        with pytest.raises(UserError):
            describe_codec(name)
