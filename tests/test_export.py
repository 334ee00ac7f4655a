"""Export to transformers and audiocraft, of models imported from folders that transformers wrote."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from conftest import ROOT

import common
from codec import load_codec
from common import UserError
from config import Settings
from generate import load_model
from model import MusicLM
from tools import convert, export

PUBLISHED = ROOT / "tests" / "musicgen_text"
NAMES = ("mono", "stereo", "equal_width")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Folders of the imported toys, by name."""
    folder = tmp_path_factory.mktemp("imported")
    for name in NAMES:
        source = shutil.copytree(PUBLISHED / name, folder / f"{name}_published")
        shutil.copy(PUBLISHED / "spiece.model", source)
        convert.import_model(source, folder / name)
    return {name: folder / name for name in NAMES}


@pytest.fixture
def mono(imported, tmp_path):
    """A copy of the mono toy, to be changed; its checkpoint still names the files of the original."""
    return shutil.copytree(imported["mono"], tmp_path / "mono")


def change(folder, ema=None, **settings):
    """Change settings, and weights, of FOLDER/best.pt."""
    saved = common.load_checkpoint(folder)
    state = {key: saved[key] for key in saved if key not in ("nanomusicgen", "kind")}
    state |= dict(settings=saved["settings"] | settings, ema=ema or saved["ema"])
    common.save_checkpoint(folder / "best.pt", "best", **state)


def read(path):
    return json.loads(path.read_text()) if path.suffix == ".json" else safetensors.torch.load_file(path)


@pytest.mark.parametrize("name", NAMES)
def test_import_then_export_changes_no_bit(imported, name, tmp_path, command):
    status, output = command(convert, "export", imported[name] / "best.pt", tmp_path / "new" / "out", "--format", "hf")
    out = tmp_path / "new" / "out"
    assert status == 0 and str(out / "model.safetensors") in output and "without" not in output, output
    published, exported = read(PUBLISHED / name / "model.safetensors"), read(out / "model.safetensors")
    assert published.keys() == exported.keys()
    for tensor, expected in ((exported[key], published[key]) for key in published):
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)
    assert (out / "spiece.model").read_bytes() == (PUBLISHED / "spiece.model").read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"], "no temporary file is left"

    published, exported = read(PUBLISHED / name / "config.json"), read(out / "config.json")
    assert exported["model_type"] == "musicgen" and exported["architectures"] == published["architectures"]
    for part in ("text_encoder", "audio_encoder", "decoder"):
        assert {key: published[part].get(key) for key in exported[part]} == exported[part]
    processor = read(out / "preprocessor_config.json")
    assert (processor["sampling_rate"], processor["feature_size"]) == (32_000, 2 if name == "stereo" else 1)


def test_generation_settings_are_those_of_the_checkpoint(mono, tmp_path):
    def exported(folder, **settings):
        change(mono, **settings)
        export.export_checkpoint(mono, folder)
        return read(folder / "generation_config.json")

    tokens = dict(decoder_start_token_id=32, pad_token_id=32, bos_token_id=32)
    assert exported(tmp_path / "a") == tokens | dict(
        guidance_scale=3.0, max_length=1500, do_sample=True, temperature=1.0, top_k=250, top_p=1.0)  # fmt: skip
    assert exported(tmp_path / "b", segment=10.0, cfg=2.0, temperature=0.8, top_p=0.9) == tokens | dict(
        guidance_scale=2.0, max_length=500, do_sample=True, temperature=0.8, top_k=0, top_p=0.9)  # fmt: skip
    greedy = exported(tmp_path / "c", temperature=0.0)
    assert greedy == tokens | dict(guidance_scale=2.0, max_length=500, do_sample=False)


def test_lora_is_merged(mono, tmp_path):
    saved = common.load_checkpoint(mono)
    base, lora = saved["ema"], dict(lora_rank=2, lora_alpha=6.0, lora_targets=("qkv",))
    model = MusicLM(Settings(**saved["settings"] | lora), saved["codec"], saved["tokenizer"])
    model.load_state_dict(base, strict=False)
    with torch.no_grad():
        model.blocks[1].qkv.lora_b.normal_()
    change(mono, model.state_dict(), **lora)
    export.export_checkpoint(mono, tmp_path / "out")
    exported = read(tmp_path / "out" / "model.safetensors")
    merged = base["blocks.1.qkv.weight"] + 3.0 * model.blocks[1].qkv.lora_b @ model.blocks[1].qkv.lora_a
    assert not torch.equal(merged, base["blocks.1.qkv.weight"])
    for part, letter in zip(merged.chunk(3), "qkv"):
        name = f"decoder.model.decoder.layers.1.self_attn.{letter}_proj.weight"
        torch.testing.assert_close(exported[name], part, atol=1e-6, rtol=0)
    published = read(PUBLISHED / "mono" / "model.safetensors")
    assert {name for name in published if not torch.equal(published[name], exported[name])} == {
        f"decoder.model.decoder.layers.1.self_attn.{letter}_proj.weight" for letter in "qkv"}  # fmt: skip


def test_tokenizer_json_is_exported_where_there_is_no_spiece_model(mono, tmp_path):
    model, settings, _ = load_model(mono)
    codec = load_codec(settings.codec, settings.codec_weights)
    model.conditioner.text.tokenizer_model = b'{"version": "1.0"}'
    export.export_model(model, settings, tmp_path / "out", "hf", codec)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b'{"version": "1.0"}'
    assert not (tmp_path / "out" / "spiece.model").exists()


@pytest.mark.parametrize("name, width", [("mono", 32), ("equal_width", 48)])
def test_audiocraft_gets_the_projection_and_the_name_of_t5(imported, name, width, tmp_path, command, monkeypatch):
    args = (convert, "export", imported[name], tmp_path / "out", "--format", "audiocraft")
    status, output = command(*args)
    assert status == 2 and f"width {width}" in output and "--format hf" in output and not list(tmp_path.iterdir())
    monkeypatch.setitem(export.AUDIOCRAFT_T5, (width, 64), "t5-base")
    status, output = command(*args)
    assert status == 0, output
    saved, published = torch.load(tmp_path / "out" / "state_dict.bin", weights_only=True), torch.eye(48)
    conditioners = json.loads(saved["xp.cfg"])["conditioners"]
    assert conditioners["description"]["model"] == "t5" and conditioners["description"]["t5"]["name"] == "t5-base"
    if name == "mono":
        published = read(PUBLISHED / name / "model.safetensors")["enc_to_dec_proj.weight"]
    projection = "condition_provider.conditioners.description.output_proj"
    assert torch.equal(saved["best_state"][f"{projection}.weight"], published)
    assert saved["best_state"][f"{projection}.bias"].shape == (48,)


def test_moved_folder_and_moved_files_are_read(imported, tmp_path):
    moved, t5 = tmp_path / "moved", tmp_path / "t5.safetensors"
    shutil.copytree(imported["mono"], moved)
    change(moved, codec_weights="gone/codec.safetensors", text_encoder_weights="gone/t5.safetensors")
    export.export_checkpoint(moved, tmp_path / "beside")
    shutil.move(moved / "t5.safetensors", t5)
    shutil.move(moved / "codec.safetensors", tmp_path)
    files = dict(codec_weights=str(tmp_path / "codec.safetensors"), text_encoder_weights=str(t5))
    export.export_checkpoint(moved, tmp_path / "named", **files)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "beside" / file).read_bytes() == (tmp_path / "named" / file).read_bytes()


def test_missing_and_wrong_files_are_named_with_the_option(mono, imported, tmp_path, command):
    def message(**settings):
        change(mono, **settings)
        status, output = command(convert, "export", mono, tmp_path / "out")
        assert status == 2 and sorted(path.name for path in tmp_path.iterdir()) == ["mono"], output
        return output

    other = imported["stereo"] / "codec.safetensors"
    assert str(mono) in (output := message(codec_weights=str(other))) and "--codec_weights" in output
    (mono / "codec.safetensors").unlink()
    output = message(codec_weights="gone/codec.safetensors")
    assert "gone/codec.safetensors" in output and "--codec_weights" in output
    (mono / "t5.safetensors").unlink()
    output = message(text_encoder_weights="gone/t5.safetensors")
    assert "gone/t5.safetensors" in output and "--text_encoder_weights" in output


def test_models_that_transformers_cannot_run_are_refused(mono, tmp_path, command):
    for settings, message in (
        (dict(positions="rope"), "positions = 'rope'"),
        (dict(positions="sinusoidal", pattern="unrolled"), "pattern = 'unrolled'"),
        (dict(pattern="delay", delays=(0, 2, 2, 1)), "--format audiocraft"),
    ):
        change(mono, **settings)
        status, output = command(convert, "export", mono, tmp_path / "out")
        assert status == 2 and message in output and not (tmp_path / "out").exists(), output


def test_existing_model_is_kept_and_other_files_do_not_matter(imported, tmp_path, command):
    (tmp_path / "README.md").write_text("my model")
    assert command(convert, "export", imported["mono"], tmp_path)[0] == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    status, output = command(convert, "export", imported["stereo"], tmp_path)
    assert status == 2 and f"{tmp_path / 'model.safetensors'}: exists already" in output
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_failed_export_leaves_nothing(imported, tmp_path, monkeypatch):
    def fail(*args):
        raise UserError("the disk is full")

    monkeypatch.setattr(export, "write_safetensors", fail)
    with pytest.raises(UserError, match="the disk is full"):
        export.export_checkpoint(imported["mono"], tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_the_reference_from_an_exported_folder(imported, name, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    reference = torch.load(PUBLISHED / name / "expected.pt", weights_only=True)
    export.export_checkpoint(imported[name], tmp_path / "out")
    model, loading = transformers.MusicgenForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True)  # fmt: skip
    assert not any(loading.values())
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert [processor.tokenizer(text).input_ids for text in reference["captions"]] == [
        ids.tolist() for ids in reference["ids"]]  # fmt: skip
    inputs = processor(text=reference["captions"][:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=reference["sequence"][:, :, :-1].flatten(0, 1)).logits
    torch.testing.assert_close(logits.view_as(reference["logits"]), reference["logits"], atol=1e-4, rtol=0)
    inputs = processor(text=reference["captions"][:1], return_tensors="pt")
    wav = model.generate(**inputs, do_sample=False, guidance_scale=3.0, max_length=reference["greedy_0"].shape[1] + 4)
    torch.testing.assert_close(wav[0], reference["audio_0"], atol=1e-4, rtol=0)
    clip = transformers.pipeline("text-to-audio", str(tmp_path / "out"))(
        "a calm piano melody", generate_kwargs={"max_new_tokens": 40})  # fmt: skip
    assert clip["sampling_rate"] == 32_000 and clip["audio"].shape[-1] > 16_000
