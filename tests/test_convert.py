"""Published weights in and out, on the fixtures made with the packages that they come from; fine-tuning."""

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
from conftest import ROOT, TOY, lines, load

import prepare
import sample
import train
from codec import decode_stream, load_codec
from common import UserError
from config import Settings
from generate import generate, load_model
from model import MusicLM, merge_lora
from tools import convert
from tools.convert import export_lm, read_lm

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
    return MusicLM(Settings(**{**TOY_LM, **settings}), codec, prepare.train_tokenizer([], 300)).eval()


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
    nothing = ours.conditioner(ours.conditioner.prepare([{}] * 3))
    with torch.no_grad():
        torch.testing.assert_close(logits(states, torch.ones_like(mask)), theirs["logits_unmasked"], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits(states, mask), theirs["logits_masked"], atol=1e-4, rtol=0)
        torch.testing.assert_close(logits(*nothing), theirs["logits_unconditional"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name, trainer", [
    ("checkpoint.th", lambda state: {"best_state": {"model": state}, "model": {}, "optimizer": {"state": {}}, "xp.cfg":
                                     "transformer_lm:\n  num_heads: 4\n"}),
    ("checkpoint.th", lambda state: {"model": state, "best_state": {}, "history": [{"train": {"ce": 1.0}}]}),
    ("epoch=3.ckpt", lambda state: {"state_dict": {f"lm.{name}": tensor for name, tensor in state.items()},
                                    "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 1.0}}),
])  # fmt: skip
def test_what_other_trainers_leave_is_read(published, tmp_path, name, trainer):
    state = published["musicgen_lm"]["audiocraft"]
    torch.save(trainer(state | {"condition_provider.x.weight": torch.zeros(2)}), tmp_path / name)
    where = tmp_path if name == "checkpoint.th" else tmp_path / name
    opened = convert.open_lm(where)
    opened[2]["heads"] = 4  # where the file tells nothing, 64 wide heads are taken for granted
    model = make_model()
    model.load_state_dict(read_lm(where, model, opened), strict=False)
    assert torch.equal(model.norm.weight, state["out_norm.weight"])


def test_an_adapter_is_told_from_a_model(tmp_path):
    state = {"base_model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)}
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapter_model.safetensors: a PEFT adapter; merge it"):
        convert.open_lm(tmp_path)


def test_it_is_said_how_much_zeros_for_the_null_change():
    model = make_model()
    assert convert.unconditional_difference(model) == 0, "before training the null is zero"
    with torch.no_grad():
        model.conditioner.text.null.fill_(0.5)
    assert convert.unconditional_difference(model) > 1e-4 and (model.conditioner.text.null == 0.5).all()


def test_a_fine_tune_starts_at_the_loss_of_the_weights_it_begins_with(folder, published):
    theirs, ours = published["musicgen_lm"], make_model()
    ours.load_state_dict(read_lm(folder / "hf", ours), strict=False)
    frames = torch.ones(3, 20, dtype=torch.bool)
    with torch.no_grad():
        ce_sum, count = ours(theirs["codes"], frames, frames, ours.conditioner.prepare([{}] * 3))
    nll = torch.nn.functional.cross_entropy(
        theirs["logits_unconditional"][:, :, :-1].flatten(0, 2), theirs["sequence"][:, :, 1:].flatten(),
        ignore_index=40, reduction="none",
    ).view(3, 4, 20)  # fmt: skip
    torch.testing.assert_close(ce_sum / count, nll.sum((0, 2)) / (nll > 0).sum((0, 2)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["audiocraft", "hf"])
def test_in_and_out_again_changes_no_bit(folder, published, layout):
    ours = make_model()
    ours.load_state_dict(read_lm(folder / layout, ours), strict=False)
    path = export_lm(ours, ours.state_dict(), Settings(**TOY_LM), folder / "out", layout)
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
    half = {name: tensor.half() for name, tensor in published["musicgen_lm"]["huggingface"].items()}
    for k in range(4):  # of the toy codec's card
        half[f"model.decoder.embed_tokens.{k}.weight"] = torch.randn(65, 32).half()
        half[f"lm_heads.{k}.weight"] = torch.randn(64, 32).half()
    safetensors.torch.save_file(half, folder / "hf" / "model.safetensors")
    codec, out = tmp_path / "codec.safetensors", tmp_path / "imported"
    status, output = command(convert, "codec", folder / "hf_whole", codec)
    assert status == 0 and f"--codec=musicgen_32khz --codec_weights={codec}" in output, output
    settings = ("config/finetune.py", f"--out={out}", f"--codec_weights={codec}", f"--data={tmp_path}")
    status, output = command(convert, "import", folder / "hf", *settings)
    assert status == 0 and "hears no text yet" in output, output
    soundfile.write(tmp_path / "begin.wav", np.sin(np.arange(16_000) / 9) / 3, 32_000)
    for name, more in (("alone", ()), ("on", ("--continue", tmp_path / "begin.wav")), ("text", ("bells",))):
        status, output = command(sample, out / "best.pt", *more, "--duration", 1, "--out", tmp_path / f"{name}.wav")
        assert status == 0 and soundfile.info(tmp_path / f"{name}.wav").samplerate == 32_000, output
    ours = load_model(out / "best.pt")[0]
    alone, text = (generate(ours, [given], 20, seeds=[1]) for given in ({}, {"text": "bells"}))
    assert torch.equal(alone, text) and alone.unique().numel() > 10
    status, output = command(convert, "import", folder / "hf", *settings)
    assert status == 2 and f"{out}: holds a run; choose another --out" in output
    status, output = command(convert, "import", folder / "audiocraft", *settings, f"--out={tmp_path / 'other'}")
    assert status == 2 and "has K 4, card 40, and musicgen_32khz K 4, card 64" in output


def test_a_melody_model_has_no_cross_attention(folder, published):
    state = {name: tensor for name, tensor in published["musicgen_lm"]["audiocraft"].items()
             if "cross" not in name}  # fmt: skip
    torch.save({"best_state": state, "xp.cfg": "num_heads: 4"}, folder / "state_dict.bin")
    ours = make_model()
    ours.load_state_dict(read_lm(folder, ours), strict=False)
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
    ours = MusicLM(Settings(**TOY_LM), codec, prepare.train_tokenizer([], 300))
    assert ours.delays == (0, 0, 1, 1, 2, 2, 3, 3) and ours.pattern(20).S == 24
    export_lm(ours, ours.state_dict(), Settings(**TOY_LM), tmp_path, "hf")
    assert json.loads((tmp_path / "config.json").read_text())["audio_channels"] == 2
    back = read_lm(tmp_path, ours)
    assert all(torch.equal(back[name], ours.state_dict()[name]) for name in ("embed.weight", "heads.weight"))
    with pytest.raises(UserError, match="has those of MusicGen built in"):
        export_lm(make_model(delays=(0, 2, 2, 1)), {}, Settings(**TOY_LM), tmp_path, "hf")
    with pytest.raises(UserError, match="have MusicGen's sinusoids only"):
        export_lm(make_model(positions="rope"), {}, Settings(**TOY_LM), tmp_path, "audiocraft")
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


def convert_and_load(path):
    """A published codec as a user gets it."""
    file = path.parent / f"{path.name}.converted"
    convert.convert_codec(path, file)
    return load_codec("musicgen_32khz", file)


@pytest.mark.parametrize("layout", ["audiocraft", "hf_whole"])
def test_the_codec_is_that_of_the_reference(folder, published, layout):
    theirs, codec = published["encodec_32khz"], convert_and_load(folder / layout)
    assert (codec.sample_rate, codec.frame_rate, codec.hop, codec.K, codec.card) == (32_000, 50, 640, 4, 64)
    latents = codec.model.encoder(theirs["wav"])  # `encode` would scale it down, as it peaks above 1
    assert torch.equal(codec.model.quantizer.vq.encode(latents, n_q=4).transpose(0, 1), theirs["codes"])
    torch.testing.assert_close(codec.decode(theirs["codes"]), theirs["decoded"], atol=1e-4, rtol=0)
    quiet = theirs["wav"] / 2
    assert torch.equal(codec.encode(quiet), codec.model.quantizer.vq.encode(codec.model.encoder(quiet)).transpose(0, 1))
    codes = torch.randint(0, 64, (1, 4, 130))
    streamed = torch.cat(list(decode_stream(codec, codes.split(7, dim=2))), dim=2)
    torch.testing.assert_close(streamed, codec.decode(codes), atol=1e-5, rtol=0)


def test_what_cannot_be_written_is_said(folder, tmp_path):
    target = tmp_path / "new" / "codec.safetensors"
    target.mkdir(parents=True)
    with pytest.raises(UserError, match="codec.safetensors: cannot be written .*; make room, or choose another"):
        convert.convert_codec(folder / "audiocraft", target)
    assert list(target.parent.iterdir()) == [target]


def test_a_codec_that_will_not_do(folder, published, tmp_path):
    def said(path):
        with pytest.raises(UserError) as error:
            convert.read_codec(path)
        return str(error.value)

    for weights in ("", folder / "audiocraft" / "compression_state_dict.bin"):
        with pytest.raises(UserError, match="make them with: python -m tools.convert codec PUBLISHED"):
            load_codec("musicgen_32khz", weights)
    state = dict(published["encodec_32khz"]["encodec"])
    torch.save({"best_state": state, "xp.cfg": "encodec:\n  renormalize: true\n"}, tmp_path / "loud.bin")
    assert "renormalises loudness (48 kHz)" in said(tmp_path / "loud.bin")
    torch.save({"encoder.model.0.conv.norm.weight": torch.ones(4)}, tmp_path / "48khz.th")
    assert "renormalises loudness (48 kHz)" in said(tmp_path / "48khz.th")
    state["more"] = state.pop("encoder.model.0.conv.conv.bias")
    torch.save({"best_state": state}, tmp_path / "partial.bin")
    assert 'Missing key(s) in state_dict: "encoder.model.0.conv.conv.bias"' in said(tmp_path / "partial.bin")
    torch.save({"best_state": published["musicgen_lm"]["audiocraft"]}, tmp_path / "lm.bin")
    assert "not the weights of musicgen_32khz; its names are" in said(tmp_path / "lm.bin")
    (folder / "hf_whole" / "config.json").write_text('{"pad_mode": "constant"}')
    padded = convert_and_load(folder / "hf_whole")
    assert padded.id != convert_and_load(folder / "audiocraft").id
    assert not torch.equal(padded.decode(published["encodec_32khz"]["codes"]), published["encodec_32khz"]["decoded"])


def test_stereo_from_music_to_music(corpus, tmp_path, command):

    prepare.prepare(corpus / "manifest.jsonl", tmp_path / "data", "tiny:stereo", workers=1, valid_fraction=0.2)
    args = [*TOY, f"--data={tmp_path / 'data'}", f"--out={tmp_path / 'out'}", "--codec=tiny:stereo", "--style=True"]
    status, output = command(train, *args, "--evaluate_clips=2")
    assert status == 0, output
    assert "ce_q8" in lines(tmp_path / "out" / "metrics.jsonl")[-1]
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
    export_lm(ours, ours.state_dict(), settings, folder, "hf")
    return folder


def test_fine_tuning_by_the_command_line(toy_run, exported, dataset, tmp_path, command):
    toy, out, imported = toy_run[0] / "best.pt", tmp_path / "out", tmp_path / "imported"
    status, output = command(convert, "export", toy, toy_run[0])
    assert status == 2 and f"{toy_run[0] / 'config.json'}: is there already; choose another folder" in output
    status, output = command(convert, "export", toy, "--format", "audiocraft", tmp_path / "other")
    assert status == 0 and "left out, as those programs have no place for them: the embedders of text" in output
    args = [*TOY, f"--data={dataset}", "--lr=1e-3", "--samples=0"]
    status, output = command(convert, "import", exported, *args, f"--out={imported}", "--dim=64")
    assert status == 0 and f"with the tokenizer of {dataset}" in output, output
    assert load_model(imported / "best.pt")[1].dim == 32, "the sizes are those of the weights"
    begin = [*args, f"--init_from={imported / 'best.pt'}"]
    status, output = command(train, *begin, f"--out={out}", "--freeze=embed*,blocks.*,heads*,norm*")
    assert status == 0, output
    theirs, tuned = load(toy)["ema"], load(out / "last.pt")["model"]
    same = {name for name in theirs if torch.equal(theirs[name], tuned[name])}
    assert same == {name for name in theirs if not name.startswith("conditioner.")}
    back = read_lm(tmp_path / "other", load_model(toy)[0])
    assert all(torch.equal(back[name], theirs[name]) for name in same)
    assert command(train, *args, f"--out={tmp_path / 'all'}", f"--init_from={out / 'best.pt'}")[0] == 0
    for change, said in ((["--freeze=*"], "nothing is left to train"), (["--freeze=1"], "must be names"),
                         (["--freeze=block.*"], "freeze: no parameter is called 'block.*'"),
                         (["--dim=64"], "dim was 32, is 64"), (["--layers=3"], "layers was 2, is 3")):  # fmt: skip
        status, output = command(train, *begin, f"--out={tmp_path / 'x'}", *change)
        assert status == 2 and said in output, output


def test_low_rank_matrices_are_learned_beside_frozen_weights(toy_run, dataset, tmp_path, command):
    out = tmp_path / "out"
    args = [*TOY, f"--data={dataset}", f"--out={out}", "--lora_rank=2", "--lora_targets=qkv,up", "--lr=1e-2"]
    args += [f"--init_from={toy_run[0] / 'best.pt'}", "--freeze=embed*,blocks.*weight,blocks.*bias,heads*,norm*"]
    assert command(train, *args)[0] == 0
    base = load(toy_run[0] / "best.pt")["ema"]
    tuned, settings, _ = load_model(out / "best.pt")
    state = tuned.state_dict()
    assert torch.equal(state["blocks.0.qkv.weight"], base["blocks.0.qkv.weight"])
    assert state["blocks.1.up.lora_b"].abs().max() > 1e-4 and "blocks.1.down.lora_b" not in state
    merged = merge_lora(state, vars(settings))
    assert merged.keys() == base.keys()
    plain = MusicLM(Settings(**{**vars(settings), "lora_rank": 0}), dict(K=4, card=512, frame_rate=50, dim=64),
                    tuned.conditioner.text.tokenizer.serialized_model_proto()).eval()  # fmt: skip
    plain.load_state_dict(merged)
    codes, inputs = torch.randint(0, 512, (1, 4, 30)), tuned.conditioner.prepare([{"text": "bells"}])
    with torch.no_grad():
        ours, theirs = tuned.aligned_logits(codes, inputs), plain.aligned_logits(codes, inputs)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    more = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'more'}", f"--init_from={out / 'best.pt'}", "--samples=0"]
    assert command(train, *more)[0] == 0, "what was learned is merged where a run without LoRA begins with it"
    status, output = command(train, *args[:-3], f"--out={tmp_path / 'x'}", "--lora_targets=query")
    assert status == 2 and "a block has no 'query'; it has qkv, attn_out" in output
