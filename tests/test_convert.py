"""Import and export of published weights, on fixtures made by audiocraft and transformers; fine-tuning."""

import collections
import json
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import ROOT, TOY, lines, load

import data
import prepare
import sample
import train
from codec import decode_stream, load_codec
from common import UserError
from config import Settings
from extras.lora import merge_lora
from generate import generate, load_model
from model import MusicLM
from tools import convert
from tools import published as publish
from tools.export import export_model

TOY_LM = dict(dim=32, heads=4, layers=3, segment=0.4)


@pytest.fixture(scope="module")
def published():
    return {
        name: torch.load(ROOT / "tests" / f"{name}_toy.pt", weights_only=True)
        for name in ("musicgen_lm", "encodec_32khz")
    }


@pytest.fixture
def folder(published, tmp_path):
    """Both models in both layouts, and in "hf_joint" both together in two shards, as on Hugging Face's hub."""
    lm, codec = published["musicgen_lm"], published["encodec_32khz"]
    for name in ("audiocraft", "hf", "hf_joint"):
        (tmp_path / name).mkdir()
    settings = "encodec:\n  renormalize: false\nseanet:\n  pad_mode: reflect\ntransformer_lm:\n  num_heads: 4\n"
    conditioner = {"condition_provider.conditioners.description.output_proj.weight": torch.zeros(32, 8)}
    states = {"state_dict.bin": lm["audiocraft"] | conditioner, "compression_state_dict.bin": codec["encodec"]}
    for file, state in states.items():
        torch.save({"best_state": state, "xp.cfg": settings}, tmp_path / "audiocraft" / file)
    safetensors.torch.save_file(lm["huggingface"], tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text('{"num_attention_heads": 4}')
    (tmp_path / "hf_joint" / "config.json").write_text(
        '{"decoder": {"num_attention_heads": 4}, "text_encoder": {"num_heads": 2}}'
    )
    joint = {f"decoder.{name}": tensor for name, tensor in lm["huggingface"].items()}
    joint |= {f"audio_encoder.{name}": tensor for name, tensor in codec["huggingface"].items()}
    joint |= {"text_encoder.shared.weight": torch.zeros(3, 3), "enc_to_dec_proj.weight": torch.zeros(3, 3)}
    for number, names in enumerate((list(joint)[::2], list(joint)[1::2]), 1):
        shard = {name: joint[name].clone() for name in names}  # cloned, because safetensors rejects shared memory
        safetensors.torch.save_file(shard, tmp_path / "hf_joint" / f"model-0000{number}-of-00002.safetensors")
    return tmp_path


def import_weights(path, model):
    """Read a published language model's decoder as a state dict for `model`."""
    return convert.import_weights(path, model, publish.read_lm(path)[:3])


def make_model(**settings):
    codec = dict(K=4, card=40, frame_rate=50, dim=8)
    return MusicLM(Settings(**{**TOY_LM, **settings}), codec, prepare.train_tokenizer([], 300)).eval()


@pytest.mark.parametrize("layout", ["audiocraft", "hf", "hf_joint"])
def test_imported_model_gives_the_logits_of_the_reference(folder, published, layout):
    reference, model = published["musicgen_lm"], make_model()
    keys = model.load_state_dict(import_weights(folder / layout, model), strict=False)
    assert keys.unexpected_keys == [] and all(name.startswith("conditioner.") for name in keys.missing_keys)
    assert torch.equal(model.pattern(20, training=True).build(reference["codes"], 40), reference["sequence"])

    def check(expected, states, mask, prefix):
        with torch.no_grad():
            logits = model.logits(model.hidden(reference["sequence"], states, mask, prefix)).transpose(1, 2)
        torch.testing.assert_close(logits, reference[expected], atol=1e-4, rtol=0)

    states, mask = reference["text_states"], reference["text_mask"]
    check("logits_unmasked", states, torch.ones_like(mask), states[:, :0])
    check("logits_masked", states, mask, states[:, :0])
    check("logits_unconditional", *model.conditioner(model.conditioner.tokenize([{}] * 3)))


@pytest.mark.parametrize("name, make_checkpoint", [
    ("checkpoint.th", lambda state: {"best_state": {"model": state}, "model": {}, "optimizer": {"state": {}}, "xp.cfg":
                                     "transformer_lm:\n  num_heads: 4\n"}),
    ("checkpoint.th", lambda state: {"model": state, "best_state": {}, "history": [{"train": {"ce": 1.0}}]}),
    ("epoch=3.ckpt", lambda state: {"state_dict": {f"lm.{name}": tensor for name, tensor in state.items()},
                                    "pytorch-lightning_version": "2.5", "hyper_parameters": {"lr": 1.0}}),
])  # fmt: skip
def test_checkpoints_of_other_trainers_are_read(published, tmp_path, name, make_checkpoint):
    state = published["musicgen_lm"]["audiocraft"]
    torch.save(make_checkpoint(state | {"condition_provider.x.weight": torch.zeros(2)}), tmp_path / name)
    path = tmp_path if name == "checkpoint.th" else tmp_path / name
    layout, weights, sizes, _ = publish.read_lm(path)
    sizes["heads"] = 4  # without settings the default is a width of 64
    model = make_model()
    model.load_state_dict(convert.import_weights(path, model, (layout, weights, sizes)), strict=False)
    assert torch.equal(model.norm.weight, state["out_norm.weight"])


def test_peft_adapter_is_refused(tmp_path):
    state = {"base_model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)}
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapter_model.safetensors: a PEFT adapter; pass the model that"):
        publish.read_lm(tmp_path)


def test_fine_tuning_starts_at_the_loss_of_the_published_model(folder, published):
    reference, model = published["musicgen_lm"], make_model()
    model.load_state_dict(import_weights(folder / "hf", model), strict=False)
    mask = torch.ones(3, 20, dtype=torch.bool)
    with torch.no_grad():
        ce_sum = model(reference["codes"], mask, mask, model.conditioner.tokenize([{}] * 3))
    targets = data.count_targets(mask, model.pattern(20, training=True))
    ce = torch.nn.functional.cross_entropy(
        reference["logits_unconditional"][:, :, :-1].flatten(0, 2), reference["sequence"][:, :, 1:].flatten(),
        ignore_index=40, reduction="none",
    ).view(3, 4, 20)  # fmt: skip
    assert torch.equal(targets, (ce > 0).sum((0, 2)).float())
    torch.testing.assert_close(ce_sum / targets, ce.sum((0, 2)) / targets, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["audiocraft", "hf"])
def test_import_then_export_changes_no_bit(folder, published, layout):
    model = make_model()
    model.load_state_dict(import_weights(folder / layout, model), strict=False)
    path = export_model(model, Settings(**TOY_LM), folder / "out", layout)
    expected = published["musicgen_lm"]["huggingface" if layout == "hf" else "audiocraft"]
    if layout == "hf":
        exported = safetensors.torch.load_file(path)
        config = json.loads((folder / "out" / "config.json").read_text())
        assert (config["vocab_size"], config["num_codebooks"], config["ffn_dim"]) == (40, 4, 128)
    else:
        saved = torch.load(path, weights_only=True)
        exported, config = saved["best_state"], json.loads(saved["xp.cfg"])
        assert config["codebooks_pattern"]["delay"]["delays"] == [0, 1, 2, 3]
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def melody_model(folder, published):
    """Write a published model without cross-attention, as musicgen-melody is, with a codec of its card."""
    state = {name: tensor for name, tensor in published["musicgen_lm"]["audiocraft"].items() if "cross" not in name}
    for k in range(4):
        state |= {f"emb.{k}.weight": torch.randn(65, 32).half(), f"linears.{k}.weight": torch.randn(64, 32).half()}
    state["condition_provider.conditioners.self_wav.output_proj.weight"] = torch.zeros(32, 12)
    (folder / "melody").mkdir()
    torch.save({"best_state": state, "xp.cfg": "num_heads: 4"}, folder / "melody" / "state_dict.bin")
    shutil.copy(folder / "audiocraft" / "compression_state_dict.bin", folder / "melody")
    return folder / "melody"


def test_melody_model_is_imported_without_text_and_generates(folder, published, tmp_path, command):
    out, source = tmp_path / "imported", melody_model(folder, published)
    status, output = command(convert, "import", source, out, "--segment=1")
    assert status == 0 and "ignores captions until it is trained" in output, output
    assert "ignored" in output and "self_wav" in output, "what is ignored is printed"
    soundfile.write(tmp_path / "prompt.wav", np.sin(np.arange(16_000) / 9) / 3, 32_000)
    options = {"unconditional": (), "continued": ("--continue", tmp_path / "prompt.wav"), "text": ("bells",)}
    for name, words in options.items():
        status, output = command(sample, out, *words, "--duration", 1, "--out", tmp_path / f"{name}.wav")
        assert status == 0 and soundfile.info(tmp_path / f"{name}.wav").samplerate == 32_000, output
    model = load_model(out)[0]
    without, with_text = (generate(model, [conditions], 20, seeds=[1]) for conditions in ({}, {"text": "bells"}))
    assert torch.equal(without, with_text) and without.unique().numel() > 10
    status, output = command(convert, "import", source, out)
    assert status == 2 and f"{out}: exists already; choose another folder" in output


def test_melody_model_gets_cross_attention_that_adds_nothing(folder, published):
    state = {name: tensor for name, tensor in published["musicgen_lm"]["audiocraft"].items()
             if "cross" not in name}  # fmt: skip
    torch.save({"best_state": state, "xp.cfg": "num_heads: 4"}, folder / "state_dict.bin")
    model = make_model()
    model.load_state_dict(import_weights(folder, model), strict=False)
    assert all(not block.cross_out.weight.any() and block.cross_kv.weight.any() for block in model.blocks)
    assert torch.equal(model.blocks[1].up.weight, state["transformer.layers.1.linear1.weight"])


def test_only_weights_and_settings_are_downloaded_from_the_hub(folder, monkeypatch):
    requests, hub = [], types.ModuleType("huggingface_hub")
    hub.snapshot_download = lambda name, allow_patterns: requests.append((name, allow_patterns)) or str(folder / "hf")
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    import_weights("hf:facebook/musicgen-small", make_model())
    (name, patterns), *others = requests
    assert name == "facebook/musicgen-small" and not others
    assert patterns == ["model*.safetensors", "config.json", "spiece.model", "tokenizer.json"]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="hf:a/b: cannot be downloaded .*; pip install huggingface_hub, or download it"):
        publish.read_lm("hf:a/b")


def test_stereo_model_is_exported_and_imported(tmp_path):
    codec = dict(K=8, card=40, frame_rate=50, dim=8, channels=2)
    model = MusicLM(Settings(**TOY_LM), codec, prepare.train_tokenizer([], 300))
    assert model.delays == (0, 0, 1, 1, 2, 2, 3, 3) and model.pattern(20).S == 24
    export_model(model, Settings(**TOY_LM), tmp_path, "hf")
    assert json.loads((tmp_path / "config.json").read_text())["audio_channels"] == 2
    imported = import_weights(tmp_path, model)
    assert all(torch.equal(imported[name], model.state_dict()[name]) for name in ("embed.weight", "heads.weight"))


def test_models_that_other_programs_cannot_run_are_not_exported(tmp_path):
    delays = make_model(delays=(0, 2, 2, 1))
    assert make_model().delays == (0, 1, 2, 3) and delays.delays == (0, 2, 2, 1)
    for model, layout, message in (
        (delays, "hf", r"delays \(0, 2, 2, 1\): not supported by Hugging Face; use --format audiocraft"),
        (make_model(positions="rope"), "audiocraft", "positions = 'rope': cannot be exported"),
        (make_model(pattern="parallel"), "audiocraft", "pattern = 'parallel': cannot be exported"),
    ):
        with pytest.raises(UserError, match=message):
            export_model(model, Settings(**TOY_LM), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


def test_unusable_weights_are_refused_with_the_reason(folder, published, tmp_path):
    toy = make_model()

    def message(path, model=toy):
        with pytest.raises(UserError) as error:
            import_weights(path, model)
        return str(error.value)

    state = dict(published["musicgen_lm"]["audiocraft"])
    state["extra"] = state.pop("transformer.layers.2.norm1.bias")
    torch.save({"best_state": state, "xp.cfg": "num_heads: 4"}, tmp_path / "partial.bin")
    assert "missing transformer.layers.2.norm1.bias; unknown extra" in message(tmp_path / "partial.bin")
    wider = make_model(dim=64, layers=2)
    assert "dim 32, not 64; layers 3, not 2" in message(folder / "hf", wider)
    for layout in ("hf", "audiocraft"):
        assert "heads 4, not 2" in message(folder / layout, make_model(heads=2))
    for name, tensor in (("out_norm.bias", torch.zeros(31)), ("linears.2.weight", torch.zeros(40, 31))):
        state = dict(published["musicgen_lm"]["audiocraft"], **{name: tensor})
        torch.save({"best_state": state, "xp.cfg": "num_heads: 4"}, tmp_path / "shape.bin")
        assert f"{name} is {list(tensor.shape)}, not" in message(tmp_path / "shape.bin")
    for content in ({"best_state": None}, {1: torch.zeros(1)}, [1]):
        torch.save(content, tmp_path / "odd.bin")
        assert "odd.bin: contains no weights; pass a published state_dict.bin" in message(tmp_path / "odd.bin")
    (tmp_path / "noise.bin").write_bytes(b"noise")
    assert "cannot be read (truncated, or not weights); pass safetensors" in message(tmp_path / "noise.bin")
    torch.save({"pretrained": "facebook/x"}, tmp_path / "name.bin")
    assert "a reference to facebook/x, without weights; pass hf:facebook/x" in message(tmp_path / "name.bin")
    torch.save({"best_state": {"a": torch.zeros(1)}}, tmp_path / "other.bin")
    assert "its tensors are a; if the model has several files, pass their folder" in message(tmp_path / "other.bin")
    assert "no such file, and no folder with model*.safetensors or" in message(tmp_path / "nowhere")


class Bomb:
    def __reduce__(self):
        return print, ("code was run",)


def test_pickles_run_no_code_and_omegaconf_settings_are_read(published, tmp_path, capsys, monkeypatch):
    state = published["musicgen_lm"]["audiocraft"]
    torch.save({"best_state": state, "xp.cfg": Bomb()}, tmp_path / "bomb.bin")
    with pytest.raises(UserError, match="it contains .*print, which may run code"):
        import_weights(tmp_path / "bomb.bin", make_model())
    assert "code was run" not in capsys.readouterr().out

    module = types.ModuleType("omegaconf.dictconfig")  # omegaconf is not installed here
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
    assert len(import_weights(tmp_path / "old.bin", make_model())) == 43


def convert_and_load(path):
    """Convert a published codec as a user does, and load it."""
    file = path.parent / f"{path.name}.converted"
    convert.convert_codec(path, file)
    return load_codec("musicgen_32khz", file)


@pytest.mark.parametrize("layout", ["audiocraft", "hf_joint"])
def test_converted_codec_equals_the_reference(folder, published, layout):
    reference, codec = published["encodec_32khz"], convert_and_load(folder / layout)
    assert (codec.sample_rate, codec.frame_rate, codec.hop, codec.K, codec.card) == (32_000, 50, 640, 4, 64)
    latents = codec.model.encoder(reference["wav"])  # not `encode`, because it scales a peak above 1
    assert torch.equal(codec.model.quantizer.vq.encode(latents, n_q=4).transpose(0, 1), reference["codes"])
    torch.testing.assert_close(codec.decode(reference["codes"]), reference["decoded"], atol=1e-4, rtol=0)
    quiet = reference["wav"] / 2
    assert torch.equal(codec.encode(quiet), codec.model.quantizer.vq.encode(codec.model.encoder(quiet)).transpose(0, 1))
    codes = torch.randint(0, 64, (1, 4, 130))
    streamed = torch.cat(list(decode_stream(codec, codes.split(7, dim=2))), dim=2)
    torch.testing.assert_close(streamed, codec.decode(codes), atol=1e-5, rtol=0)


def test_write_error_names_the_file_and_leaves_nothing(folder, tmp_path):
    target = tmp_path / "new" / "codec.safetensors"
    target.mkdir(parents=True)
    with pytest.raises(UserError, match="codec.safetensors: cannot be written .*; free disk space or choose another"):
        convert.convert_codec(folder / "audiocraft", target)
    assert list(target.parent.iterdir()) == [target]


def test_unusable_codecs_are_refused_with_the_reason(folder, published, tmp_path):
    def message(path):
        with pytest.raises(UserError) as error:
            publish.read_codec(path)
        return str(error.value)

    for weights in ("", folder / "audiocraft" / "compression_state_dict.bin"):
        with pytest.raises(UserError, match="Write the weights with: python -m tools.convert codec PUBLISHED"):
            load_codec("musicgen_32khz", weights)
    state = dict(published["encodec_32khz"]["encodec"])
    torch.save({"best_state": state, "xp.cfg": "encodec:\n  renormalize: true\n"}, tmp_path / "loud.bin")
    assert "normalizes loudness (48 kHz)" in message(tmp_path / "loud.bin")
    torch.save({"encoder.model.0.conv.norm.weight": torch.ones(4)}, tmp_path / "48khz.th")
    assert "normalizes loudness (48 kHz)" in message(tmp_path / "48khz.th")
    state["more"] = state.pop("encoder.model.0.conv.conv.bias")
    torch.save({"best_state": state}, tmp_path / "partial.bin")
    assert 'Missing key(s) in state_dict: "encoder.model.0.conv.conv.bias"' in message(tmp_path / "partial.bin")
    torch.save({"best_state": published["musicgen_lm"]["audiocraft"]}, tmp_path / "lm.bin")
    assert "not the weights of musicgen_32khz; its tensors are" in message(tmp_path / "lm.bin")
    (folder / "hf_joint" / "config.json").write_text('{"pad_mode": "constant"}')
    padded = convert_and_load(folder / "hf_joint")
    assert padded.id != convert_and_load(folder / "audiocraft").id
    assert not torch.equal(padded.decode(published["encodec_32khz"]["codes"]), published["encodec_32khz"]["decoded"])


def test_stereo_from_preparation_to_samples(corpus, tmp_path, command):
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


def test_fine_tuning_trains_what_is_not_frozen(toy_run, dataset, tmp_path, command):
    toy, out = toy_run[0] / "best.pt", tmp_path / "out"
    args = [*TOY, f"--data={dataset}", "--lr=1e-3", "--samples=0"]
    start = [*args, f"--init_from={toy}"]
    status, output = command(train, *start, f"--out={out}", "--freeze=embed*,blocks.*,heads*,norm*")
    assert status == 0, output
    base, tuned = load(toy)["ema"], load(out / "last.pt")["model"]
    unchanged = {name for name in base if torch.equal(base[name], tuned[name])}
    assert unchanged == {name for name in base if not name.startswith("conditioner.")}
    trained = sum(tensor.numel() for name, tensor in base.items() if name not in unchanged) / 1e6
    assert f"{trained:.1f}M of them trained" in output
    assert command(train, *args, f"--out={tmp_path / 'all'}", f"--init_from={out}")[0] == 0, "a folder: its best.pt"
    for change, message in ((["--freeze=*"], "no trainable parameter is left"), (["--freeze=1"], "must be names"),
                         (["--freeze=block.*"], "freeze: no parameter matches 'block.*'"),
                         (["--dim=64"], "dim was 32, is 64"), (["--layers=3"], "layers was 2, is 3")):  # fmt: skip
        status, output = command(train, *start, f"--out={tmp_path / 'x'}", *change)
        assert status == 2 and message in output, output


def test_lora_trains_only_its_matrices_and_merges(toy_run, dataset, tmp_path, command):
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
    codes, tensors = torch.randint(0, 512, (1, 4, 30)), tuned.conditioner.tokenize([{"text": "bells"}])
    with torch.no_grad():
        logits = [model.aligned_logits(codes, tensors) for model in (tuned, plain)]
    torch.testing.assert_close(*logits, equal_nan=True)
    more = [*TOY, f"--data={dataset}", f"--out={tmp_path / 'more'}", f"--init_from={out / 'best.pt'}", "--samples=0"]
    assert command(train, *more)[0] == 0, "a run without LoRA starts from the merged weights"
    status, output = command(train, *args, f"--out={tmp_path / 'x'}", "--lora_targets=query")
    assert status == 2 and "a block has no 'query'; choose from qkv, attn_out" in output
