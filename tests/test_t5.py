"""Published weights with text: T5, the import, and the model's equality with transformers on toys of the same layout.

tests/musicgen_text/{mono,stereo,equal_width} hold toys as transformers' save_pretrained leaves them, and expected.pt
with what transformers computes from them.
"""

import copy
import pickle
import shutil
import sys

import pytest
import safetensors.torch
import torch
from conftest import ROOT, TOY, Ranks, lines, load

import prepare
import sample
import train
from codec import load_codec
from common import UserError
from extras.t5 import T5Encoder
from generate import generate, load_model
from tools import convert, export
from tools.convert import import_model

TOYS = ROOT / "tests" / "musicgen_text"
NAMES = ("mono", "stereo", "equal_width")


def publish(name, folder):
    """Copy a toy to `folder` as it would be published, with its tokenizer."""
    shutil.copytree(TOYS / name, folder, ignore=shutil.ignore_patterns("expected.pt"))
    shutil.copyfile(TOYS / "spiece.model", folder / "spiece.model")
    return folder


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """{name: the folder that `import` writes}."""
    root = tmp_path_factory.mktemp("imported")
    for name in NAMES:
        import_model(publish(name, root / "hf" / name), root / name)
    return {name: root / name for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_text_becomes_the_states_of_the_reference(imported, name):
    expected, (model, _, _) = load(TOYS / name / "expected.pt"), load_model(imported[name])
    text = model.conditioner.text
    ids, mask = text.tokenize(expected["captions"])
    states, _ = text(ids, mask)
    for row, caption in enumerate(expected["captions"]):
        L = len(expected["ids"][row])
        assert text.encode(caption) == expected["ids"][row].tolist()
        assert ids[row, :L].tolist() == expected["ids"][row].tolist() and mask[row].sum() == (L if caption else 0)
        alone = text.encoder(ids[row : row + 1, :L], torch.ones(1, L, dtype=torch.bool))
        torch.testing.assert_close(alone[0], expected["states"][row], atol=2e-5, rtol=0)
        if caption:  # the model treats an empty caption as null
            torch.testing.assert_close(states[row, :L], expected["projected"][row], atol=2e-5, rtol=0)
    assert expected["captions"][2] == "" and (states[2] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_reference_with_and_without_text(imported, name):
    expected, (model, _, _) = load(TOYS / name / "expected.pt"), load_model(imported[name])
    pattern = model.pattern(expected["codes"].shape[2])
    assert torch.equal(pattern.build(expected["codes"], model.special), expected["sequence"])
    captions = [{"text": caption} for caption in expected["captions"][:2]]
    nothing = [{}, {"text": ""}]
    for conditions, key in ((captions, "logits"), (nothing, "logits_unconditional")):
        states, mask, prefix = model.conditioner(model.conditioner.tokenize(conditions))
        with torch.no_grad():
            logits = model.logits(model.hidden(expected["sequence"][:, :, :-1], states, mask, prefix)).transpose(1, 2)
        torch.testing.assert_close(logits, expected[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_codes_and_their_sound_equal_the_reference(imported, name):
    expected, (model, s, codec_info) = load(TOYS / name / "expected.pt"), load_model(imported[name])
    codec = load_codec(codec_info["name"], s.codec_weights)
    assert (codec.id, codec.channels) == (codec_info["id"], 2 if name == "stereo" else 1)
    for row in range(2):
        T = expected[f"greedy_{row}"].shape[1]
        conditions = [{"text": expected["captions"][row]}]
        codes = generate(model, conditions, T, cfg=3.0, temperature=0)
        assert torch.equal(codes[0], expected[f"greedy_{row}"])
        assert torch.equal(model.generate(conditions, T, cfg=3.0, temperature=0), codes), "the simple generation"
    wav = codec.decode(expected["greedy_0"][None])[0]
    torch.testing.assert_close(wav, expected["audio_0"], atol=1e-5, rtol=0)


def test_a_gated_t5_of_other_sizes_equals_the_reference(tmp_path):
    """t5_gated.pt: 200 tokens, weights of transformers' T5EncoderModel by the name encoder.embed_tokens."""
    reference = load(ROOT / "tests" / "t5_gated.pt")
    safetensors.torch.save_file(reference["weights"], tmp_path / "t5.safetensors")
    states = T5Encoder(tmp_path / "t5.safetensors")(reference["ids"], reference["mask"])
    difference = (states - reference["states"])[reference["mask"]]
    assert difference.abs().max() < 1e-5


def test_a_long_caption_is_cut_before_its_end_token(imported):
    text = load_model(imported["mono"])[0].conditioner.text
    ids, mask = text.tokenize(["a calm piano melody " * 200, "a calm piano melody"])
    assert ids.shape == (2, 512) and mask[0].all() and ids[0, -1] == 1 and (ids[0, :-1] != 1).all()
    assert ids[0, :511].tolist() == text.encode("a calm piano melody " * 200)[:511]


def test_neighbours_and_padding_never_change_a_sample(imported):
    text = load_model(imported["mono"])[0].conditioner.text
    captions = ["a calm piano melody", "80s electronic track with melodic synthesizers, catchy beat " * 3, None]
    together, mask = text(*text.tokenize(captions))
    for row, caption in enumerate(captions):
        alone, own_mask = text(*text.tokenize([caption]))
        assert mask[row].sum() == own_mask.sum()
        torch.testing.assert_close(together[row][mask[row]], alone[0][own_mask[0]], atol=1e-5, rtol=0)


def test_all_copies_of_a_model_share_one_frozen_t5(imported):
    (model, _, _), (other, _, _) = load_model(imported["mono"]), load_model(imported["mono"])
    encoder = model.conditioner.text.encoder
    assert copy.deepcopy(model).conditioner.text.encoder is encoder is other.conditioner.text.encoder
    names = [name for name, _ in model.named_parameters() if "text" in name]
    assert names == ["conditioner.text.out.weight", "conditioner.text.out.bias"]
    assert {name for name in model.state_dict() if "text" in name} == {*names}
    saved = load(imported["mono"] / "best.pt")
    assert saved["text_encoder"] == encoder.id and not any("encoder" in name for name in saved["ema"])
    assert not any(tensor.requires_grad for tensor in encoder.weights.values())
    pickled = pickle.dumps(model.conditioner.tokenize)  # as a data worker gets it that is not forked
    assert b"load_encoder" not in pickled, "the encoder stays in the main process"
    tokenize = pickle.loads(pickled)
    assert torch.equal(
        tokenize([{"text": "calm"}])["text"][0], model.conditioner.tokenize([{"text": "calm"}])["text"][0]
    )
    with torch.autocast("cpu", torch.bfloat16):
        ids, mask = model.conditioner.text.tokenize(["calm"])
        assert encoder(ids, mask).dtype == torch.float32


SHORT = "--steps=4 --segment=1 --samples=1 --valid_items=4 --evaluate_clips=0 --micro_batch=2 --device=cpu".split()


@pytest.fixture(scope="module")
def mine(imported, corpus, tmp_path_factory):
    """A data set of the toy corpus, encoded by the codec of the imported model."""
    out = tmp_path_factory.mktemp("mine") / "data"
    saved, codec = load(imported["mono"] / "best.pt"), str(imported["mono"] / "codec.safetensors")
    prepare.prepare(corpus / "manifest.jsonl", out, saved["codec"]["name"], codec, workers=1, valid_fraction=0.2)
    return out


def test_four_commands_from_published_weights_to_a_fine_tune(corpus, tmp_path, command):
    model, mine, out = (tmp_path / name for name in ("musicgen", "data", "out"))
    for module, *words in (
        (convert, "import", publish("mono", tmp_path / "hf"), model, "--segment=1"),
        (prepare, corpus / "manifest.jsonl", "--out", mine, "--model", model, "--valid_fraction=0.2", "--workers=1"),
        (train, "config/lora.py", f"--data={mine}", f"--init_from={model / 'best.pt'}", f"--out={out}", *SHORT),
        (sample, out, "a calm piano melody", "--duration", 1, "--out", tmp_path / "clip.wav"),
    ):
        status, output = command(module, *words)
        assert status == 0, output
    assert (tmp_path / "clip.wav").stat().st_size > 10_000
    published, tuned = load(model / "best.pt")["ema"], load(out / "best.pt")["ema"]
    assert all(torch.equal(tuned[name], published[name]) for name in published), "LoRA changes no published weight"
    assert any(tensor.any() for name, tensor in tuned.items() if name.endswith("lora_b"))
    first = lines(out / "history.jsonl")[0]
    assert (first["stage"], first["step"], first["tracks"]) == ("valid", 0, 3) and first["gain_se"] > 0


def test_the_first_validation_is_that_of_the_published_model(imported, mine, tmp_path, command):
    ce = {}
    for name in ("finetune", "lora"):
        out = tmp_path / name
        words = [f"config/{name}.py", f"--data={mine}", f"--init_from={imported['mono']}", f"--out={out}", *SHORT]
        status, output = command(train, *words, "--dtype=float32", "--lr=0.01")
        assert status == 0, output
        ce[name] = [line["ce"] for line in lines(out / "history.jsonl") if line["stage"] == "valid"]
        projection = [load(path)["ema"]["conditioner.text.out.weight"] for path in (imported["mono"] / "best.pt",
                                                                                 out / "best.pt")]  # fmt: skip
        assert torch.equal(*projection) == (name == "lora"), "only config/finetune.py trains the projection"
    assert ce["finetune"][0] == ce["lora"][0] > ce["finetune"][-1]


@pytest.mark.parametrize("name", ["mono", "equal_width"])
def test_a_t5_run_resumes_bit_for_bit(imported, mine, tmp_path, command, name):
    codec = f"--codec_weights={imported[name] / 'codec.safetensors'}"
    common = ["config/lora.py", f"--init_from={imported[name]}", f"--data={mine}", codec, *SHORT, "--samples=0"]
    if name == "equal_width":  # its codec has other weights, but the same sizes
        common += [f"--codec_weights={imported['mono'] / 'codec.safetensors'}"]
        saved = load(imported[name] / "best.pt")
        saved["codec"] = load(imported["mono"] / "best.pt")["codec"]
        folder = tmp_path / "with_codec_of_mono"
        shutil.copytree(imported[name], folder)
        torch.save(saved, folder / "best.pt")
        common[1] = f"--init_from={folder}"
    parts = tmp_path / "parts"
    for steps in (2, 4):
        status, output = command(train, *common, f"--out={parts}", f"--steps={steps}", "--epoch=2", "--min_lr=3e-4")
        assert status == 0, output
    reference = tmp_path / "reference"
    assert command(train, *common, f"--out={reference}", "--epoch=2", "--min_lr=3e-4")[0] == 0
    a, b = load(parts / "last.pt")["model"], load(reference / "last.pt")["model"]
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_from_scratch_may_use_t5(imported, dataset, tmp_path, command):
    t5 = f"--text_encoder_weights={imported['mono'] / 't5.safetensors'}"
    status, output = command(train, *TOY, f"--data={dataset}", f"--out={tmp_path}", "--text_encoder=t5", t5, "--dim=64")
    assert status == 0, output
    saved = load(tmp_path / "best.pt")
    assert saved["text_encoder"].startswith("t5-32-") and saved["tokenizer"] == (TOYS / "spiece.model").read_bytes()
    assert saved["ema"]["conditioner.text.out.bias"].any(), "the projection is trained"
    assert "no training caption" not in command(sample, tmp_path, "unseen", "--out", tmp_path / "clip.wav")[1]


def test_a_moved_folder_is_used_from_its_new_place(imported, tmp_path, command):
    folder, clip = tmp_path / "moved", tmp_path / "clip.wav"
    shutil.copytree(imported["mono"], folder)
    saved = load(folder / "best.pt")
    saved["settings"] |= dict(codec_weights="gone/codec.safetensors", text_encoder_weights="gone/t5.safetensors")
    torch.save(saved, folder / "best.pt")
    assert command(sample, folder, "calm", "--duration", 0.2, "--out", clip)[0] == 0
    (folder / "t5.safetensors").rename(tmp_path / "elsewhere.safetensors")
    status, output = command(sample, folder, "calm", "--duration", 0.2, "--out", tmp_path / "b.wav")
    assert status == 2 and "gone/t5.safetensors" in output and "--text_encoder_weights" in output
    words = ["--text_encoder_weights", tmp_path / "elsewhere.safetensors", "--out", tmp_path / "b.wav"]
    assert command(sample, folder, "calm", "--duration", 0.2, *words)[0] == 0
    (folder / "codec.safetensors").rename(tmp_path / "codec.elsewhere")
    status, output = command(sample, folder, "calm", *words)
    assert status == 2 and "--codec_weights" in output


def test_a_t5_that_has_changed_is_refused(imported, mine, tmp_path, command):
    folder = tmp_path / "changed"
    shutil.copytree(imported["mono"], folder)
    weights = safetensors.torch.load_file(folder / "t5.safetensors")
    weights["encoder.final_layer_norm.weight"] *= 2
    safetensors.torch.save_file(weights, folder / "t5.safetensors")
    t5 = ["--text_encoder_weights", folder / "t5.safetensors"]
    status, output = command(sample, imported["mono"], "calm", *t5, "--out", tmp_path / "x.wav")
    assert status == 2 and "needs the text encoder t5-32-" in output and "--text_encoder_weights" in output
    words = [f"--init_from={imported['mono']}", f"--data={mine}", f"--out={tmp_path / 'x'}", *SHORT]
    status, output = command(train, "config/lora.py", *words, *t5)
    assert status == 2 and "text_encoder was 't5-32-" in output and "--text_encoder_weights" in output


def edit(folder, change):
    """Apply `change` to the tensors of a published folder."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(change(weights), folder / "model.safetensors")


def test_unusable_published_folders_are_refused_in_one_line(tmp_path, command, monkeypatch):
    def refused(folder, *words):
        status, output = command(convert, "import", folder, tmp_path / "out", *words)
        assert status == 2 and not list(tmp_path.glob("out*")), output
        assert len(output.strip().splitlines()) == 1, output
        return output

    folder = publish("mono", tmp_path / "no_tokenizer")
    (folder / "spiece.model").unlink()
    assert "no spiece.model or tokenizer.json next to it" in refused(folder)
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "tokenizer.json; pip install tokenizers" in refused(folder)

    folder = publish("mono", tmp_path / "bad_tokenizer")
    for content in (b"", b"version https://git-lfs.github.com/spec/v1"):
        (folder / "spiece.model").write_bytes(content)
        output = refused(folder)
        assert "T5's tokenizer cannot be read" in output and "spiece.model" in output
    (folder / "spiece.model").write_bytes(prepare.train_tokenizer([], 300))
    assert "T5 has 160 tokens, but its tokenizer" in refused(folder)

    folder = publish("mono", tmp_path / "decoder_alone")
    edit(folder, lambda w: {name: tensor for name, tensor in w.items() if not name.startswith(("text_", "enc_"))})
    output = refused(folder)
    assert "contains no text encoder" in output and "--text_encoder_weights" in output

    other = publish("equal_width", tmp_path / "other_size")
    folder = publish("mono", tmp_path / "mono")
    output = refused(folder, "--text_encoder_weights", other)
    assert "projection" in output and "48" in output and "--text_encoder_weights" in output
    assert "--positions=rope: does not fit the published weights; omit --p" in refused(folder, "--positions=rope")
    assert "--pattern=parallel: does not fit the published weights; omit --p" in refused(folder, "--pattern=parallel")
    for word in ("--dim=64", "--melody=True", "--style=True", "--codec=tiny", "--text_encoder=own"):
        assert f"{word}: does not fit the published weights; omit --" in refused(folder, word)
    edit(folder, lambda w: {name: tensor for name, tensor in w.items() if not name.startswith("audio_encoder")})
    assert "pass the codec with --codec_weights" in refused(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused("hf:facebook/musicgen-small")

    torch.save({"best_state": {"emb.0.weight": torch.zeros(3, 4)}, "xp.cfg": "solver: audiogen"}, tmp_path / "a.bin")
    assert "an AudioGen model" in refused(tmp_path / "a.bin")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    status, output = command(convert, "import", folder, tmp_path / "out")
    assert status == 2 and "exists already; choose another folder" in output


def test_hugging_faces_files_are_preferred_to_audiocrafts(imported, tmp_path):
    """facebook/musicgen-small has a state_dict.bin too, without T5."""
    folder = publish("mono", tmp_path / "hf")
    torch.save({"best_state": {"emb.0.weight": torch.zeros(3, 4)}}, folder / "state_dict.bin")
    import_model(folder, tmp_path / "a")
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    import_model(folder, tmp_path / "b")
    expected = load(imported["mono"] / "best.pt")["ema"]
    for name in "ab":
        state = load(tmp_path / name / "best.pt")["ema"]
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


def test_audiocrafts_files_with_a_t5_folder_give_the_same_model(imported, tmp_path, monkeypatch):
    """The decoder in audiocraft's layout, its codec apart, and T5 in a folder of its own."""
    source = publish("mono", tmp_path / "t5")
    weights = safetensors.torch.load_file(source / "model.safetensors")
    t5 = {name.removeprefix("text_encoder."): tensor for name, tensor in weights.items() if name.startswith("text_")}
    t5["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()  # both names, as in t5-base's pickle
    t5["decoder.final_layer_norm.weight"] = torch.zeros(3)
    safetensors.torch.save_file(t5, source / "model.safetensors")
    monkeypatch.setitem(export.AUDIOCRAFT_T5, (32, 64), "t5-toy")
    export.export_checkpoint(imported["mono"], tmp_path / "audiocraft", "audiocraft")
    codec = {name: tensor for name, tensor in weights.items() if name.startswith("audio_encoder.")}
    torch.save({"best_state": codec}, tmp_path / "audiocraft" / "compression_state_dict.bin")
    import_model(tmp_path / "audiocraft", tmp_path / "out", text_encoder_weights=source)
    states = [load(folder / "best.pt") for folder in (imported["mono"], tmp_path / "out")]
    assert states[0]["ema"].keys() == states[1]["ema"].keys() and states[0]["text_encoder"] == states[1]["text_encoder"]
    assert all(torch.equal(states[0]["ema"][name], states[1]["ema"][name]) for name in states[0]["ema"])
    status = pytest.raises(UserError, import_model, tmp_path / "audiocraft", tmp_path / "other")
    assert "--text_encoder_weights=FOLDER" in str(status.value)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one_with_t5(imported, mine, tmp_path, parallel):
    words = ["config/finetune.py", f"--init_from={imported['mono']}", f"--data={mine}", *SHORT, "--samples=0",
             "--dtype=float32", f"--parallel={parallel}", "--lr=0.001"]  # fmt: skip
    for ranks in (1, 2):
        Ranks(*words, f"--out={tmp_path / str(ranks)}", ranks=ranks).finish()
    one, two = (load(tmp_path / str(ranks) / "last.pt") for ranks in (1, 2))
    assert one["model"].keys() == two["model"].keys() and one["text_encoder"] == two["text_encoder"]
    for name, tensor in one["model"].items():
        torch.testing.assert_close(tensor, two["model"][name], atol=1e-5, rtol=0, msg=name)


def test_halved_weights_keep_what_float16_cannot_hold(imported, tmp_path, command):
    saved = load(imported["mono"] / "best.pt")
    saved["ema"]["norm.weight"][0] = 1e6
    torch.save(saved, tmp_path / "best.pt")
    status, output = command(convert, "halve", tmp_path, tmp_path / "half.pt")
    assert status == 0 and "MB" in output
    half = load(tmp_path / "half.pt")["ema"]
    assert half["norm.weight"].dtype == torch.float32 and half["norm.bias"].dtype == torch.float16
    shutil.copytree(imported["mono"], tmp_path / "folder")
    shutil.copy(tmp_path / "half.pt", tmp_path / "folder" / "best.pt")
    model = load_model(tmp_path / "folder")[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.norm.bias, saved["ema"]["norm.bias"], atol=1e-3, rtol=1e-3)
