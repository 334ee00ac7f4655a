"""Test the report page: its content, its links to local files only, and the escaping of captions and logs."""

import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
import soundfile

import common
from audio import draw_spectrogram
from tools import report, summary

EVIL = '</script><img src=x onerror=alert(1)> "quoted" & ünïcode'
NAME = 'x <u>#1 "%41'  # of the audio files
RATE = 16_000


class Page(HTMLParser):
    """Collect the tags of a page in order, and the text outside style and script."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.element = [], "", ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.element = tag

    def handle_endtag(self, tag):
        self.element = ""

    def handle_data(self, data):
        if self.element not in ("style", "script"):
            self.text += data

    def all(self, tag, key=None):
        return [attrs if key is None else attrs[key] for name, attrs in self.tags if name == tag]


def wav(path, seconds=1.0, hertz=440):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * RATE)) / RATE), RATE)
    return path


def clip(step, name):
    folder = f"samples/step_{step:06d}"
    return dict(caption=EVIL, seed=0, free=f"{folder}/{name}.wav", continued=f"{folder}/{name}_continued.wav",
                prompt_seconds=0.25, reference=f"samples/held_out/{name}.wav",
                codec=f"samples/held_out/{name}_codec.wav")  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Write a run of two epochs whose names and captions contain HTML."""
    out = tmp_path / "a <u> & c"
    for path in ("held_out/{}", "held_out/{}_codec", "step_000003/{}", "step_000006/{}", "step_000006/{}_continued"):
        wav(out / "samples" / f"{path.format(NAME)}.wav")
    (out / "config.json").write_text(json.dumps({"steps": 12, "epoch": 3, "data": "<u>" + EVIL}, indent=1) + "\n")
    (out / "code_000000.diff").write_text(
        "0123456789abcdef\ndiff --git a/x b/x\n-if a < b:\n+<script>alert(2)</script>\n"
    )
    lines = [dict(step=step, epoch=1, ce=6 - step / 10, ppl=2.0, ce_q1=5.0, ce_q2=5.5, ce_q3=6.0 - step, lr=1e-3 / step,
                  grad_norm=float(step), tokens_per_s=1234, data_wait=0.1) for step in range(1, 7)]  # fmt: skip
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 77, "ce": 0.0')
    lines = []
    for step, ce in ((3, 4.321), (6, 4.567)):
        adherence = {"tempo <i>": {"chance": 0.2, "real": 1.0, "cfg 3": 0.6, "cfg 1": 0.5, "nothing": 0.2},
                     "drums": {"chance": 0.4, "real": 0.9, "cfg 3": 0.81, "cfg 1": 0.5, "nothing": 0.2}}  # fmt: skip
        lines += [
            dict(step=step, epoch=step // 3, stage="valid", ce=ce, ppl=70.0, ce_q1=3.0, ce_q2=4.0,
                 ce_q3=5.0, unigram=6.0, unigram_q1=5.0, unigram_q2=6.0, unigram_q3=7.0, gain=0.0371),
            dict(step=step, epoch=step // 3, stage="evaluate", clips=8, fad=2.345, fad_real=1.111, chroma=0.654,
                 chroma_chance=0.432, rtf=3.21, adherence=adherence),
            dict(step=step, epoch=step // 3, stage="generate", clips=[clip(step, NAME)]),
        ]  # fmt: skip
    (out / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return out


def test_the_page_shows_all_numbers_curves_settings_and_code(run):
    path = report.write(run)
    page = Page(path)
    assert path == run / "index.html"
    for number in ("step 6 of 12, epoch 2 of 4", "50 %", "4.321", "unigram 6.000, at step 3", "0.037", "0.705", "2.345",
                   "chance 0.300, real 0.950", "real against real 1.111", "0.654", "chance 0.432"):  # fmt: skip
        assert number in page.text, number
    for part in ("0123456789, with uncommitted changes", "0123456789abcdef", "-if a < b:", "steps12", "tempo <i>"):
        assert part in page.text, part
    curves = {attrs["aria-label"].removesuffix(" by step") for attrs in page.all("svg")}
    assert curves == {
        "loss", "loss q1", "loss q2", "loss q3", "learning rate", "gradient norm", "conditioning gain",
        "caption adherence", "Fréchet audio distance", "chroma similarity", "generation speed", "training speed",
        "waiting for data",
    }  # fmt: skip
    lines = [[point.split(",") for point in points.split()] for points in page.all("polyline", "points")]
    assert [[float(y) for _, y in line] for line in lines[:3]] == [
        pytest.approx([5.9, 5.8, 5.7, 5.6, 5.5, 5.4]), pytest.approx([4.321, 4.567]), [6, 6],
    ]  # fmt: skip
    assert "width:25.00%" in page.all("span", "style") and "prompt 0.25 s" in page.text


def valid(*ce, **other):
    return [dict(step=100 * i, stage="valid", ce=value, gain=0.08, **other) for i, value in enumerate(ce)]


def train(*ce):
    return [dict(step=100 * i, stage="train", ce=value) for i, value in enumerate(ce, 1)]


def one_sentence(history, start):
    (sentence,) = (sentence for sentence in summary.summarize(history) if sentence.startswith(start))
    return sentence


def test_the_gain_counts_from_two_standard_errors_on():
    matters = one_sentence(valid(6.0, 4.0, gain_se=0.01, tracks=12), "Captions matter")
    assert "0.080 ± 0.010 nats" in matters and "step 100" in matters
    assert "0.080 ± 0.050" in one_sentence(valid(6.0, 4.0, gain_se=0.05, tracks=12), "No sign that captions matter")
    harmful = [line | dict(gain=-0.08) for line in valid(6.0, 4.0, gain_se=0.01, tracks=12)]
    assert "by 0.080 ± 0.010" in one_sentence(harmful, "Captions harm")
    for older in (valid(6.0, 4.0), valid(6.0, 4.0, gain_se=None, tracks=12)):
        assert "0.080 nats" in one_sentence(older, "With captions") and "±" not in summary.summarize(older)[0]
    (sentence,) = summary.summarize(valid(6.0, 4.0, gain_se=0.01, tracks=12), "captions, melodies")
    assert sentence.startswith("Captions, melodies matter")
    best = [line | dict(gain=line["ce"]) for line in valid(6.0, 4.0, 5.0, gain_se=0.01, tracks=12)]
    assert "4.000" in one_sentence(best, "Captions matter"), "of the step whose weights best.pt has"


def test_overfitting_is_a_validation_loss_that_rises_above_the_training_loss():
    sentence = one_sentence(valid(6.0, 4.0, 3.5, 3.8, 4.2) + train(5.0, 4.0, 3.0, 2.0), "Overfitting since step 200")
    assert all(number in sentence for number in ("3.500", "4.200", "2.000"))
    for ce in ((6.0, 4.0), (6.0, 4.0, 4.01), (6.0, 4.5, 4.0, 4.015)):
        assert "training loss is 2.000" in one_sentence(valid(*ce) + train(3.0, 2.0), "No overfitting")
    assert "lower --lr" in one_sentence(valid(6.0, 3.0, 4.0) + train(5.0, 4.5), "No overfitting, but since step 100")
    assert "6.000" in one_sentence(valid(3.0, 6.0) + train(2.0), "Overfitting since step 0"), "a fine-tuning"


def test_copying_is_compared_with_held_out_music():
    def evaluated(copied, real, clips, **other):
        return [dict(step=1, stage="evaluate", clips=clips, copied=copied, copied_real=real, **other)]

    copying = one_sentence(evaluated(0.6, 0.05, 200), "Copying")
    assert "60 % of the 200 generated clips" in copying and "5 % of held-out" in copying
    for shares in ((0.03, 0.05, 200), (0.0, 0.0, 10), (1.0, 1.0, 10)):
        assert one_sentence(evaluated(*shares), "No sign of copying")
    assert one_sentence(evaluated(1.0, 0.0, 1), "Too few clips to judge copying")
    for shares in ((0.05, 0.03, 200), (0.3, 0.0, 10)):
        assert one_sentence(evaluated(*shares), "No clear sign of copying")
    assert one_sentence(evaluated(0.4, 0.0, 10), "Copying")
    assert summary.summarize(evaluated(None, None, 3)) == []
    assert summary.summarize(evaluated(None, None, 3, withheld="few: add tracks")) == ["few: add tracks"]


def test_a_history_without_numbers_has_no_summary():
    old = [dict(step=5, stage="evaluate", fad=3.0), dict(step=5, stage="commit"), dict(step=7, ce=3.0)]
    for history in ([], old, valid(6.0), train(3.0), [line | dict(ce=float("nan")) for line in valid(1.0, 2.0)]):
        assert summary.summarize(history) == []


def test_the_page_starts_with_the_summary_and_does_not_show_what_is_withheld(run):
    lines = [json.loads(line) for line in open(run / "history.jsonl")]
    for line in lines:
        if line["stage"] == "evaluate":
            line |= dict.fromkeys(("fad", "fad_real", "chroma", "chroma_chance"))
            line |= dict(adherence={}, melody={}, copied=0.25, copied_real=0.125, withheld="few <b>: add tracks")
    lines += train(5.0, 2.5)
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = Page(report.write(run)).text
    shown = text[text.index("What this run shows") : text.index("progress")]
    for part in ("With captions", "Overfitting since step 3", "25 % of the 8 generated", "few <b>: add tracks"):
        assert part in shown, part
    headlines = text[text.index("progress") : text.index("Glossary")]
    assert "copied clips0.250" in headlines and "held-out music 0.125" in headlines
    assert not any(name in headlines for name in ("Fréchet", "chroma", "adherence", "None", "nan"))
    for word in ("unigram", "conditioning gain", "nats"):
        assert word in text[text.index("Glossary") :]


def test_each_epoch_has_captions_players_and_pictures_newest_first(run):
    page = Page(report.write(run))
    kinds = [("audio", ".wav"), ("img", ".png")] if importlib.util.find_spec("PIL") else [("audio", ".wav")]
    for tag, suffix in kinds:
        sources = page.all(tag, "src")
        files = [unquote(source) for source in sources]
        assert [file.split("/")[1] for file in files] == ["held_out"] * 2 + ["step_000006"] * 2 + ["held_out"] * 2 + [
            "step_000003"
        ]
        assert all(file.endswith(suffix) and (run / file).is_file() for file in files)
    assert page.text.count(EVIL) == 3, "once per epoch, and once in the settings"
    assert {attrs["preload"] for attrs in page.all("audio")} == {"none"}
    assert {attrs["loading"] for attrs in page.all("img")} <= {"lazy"}
    with open(run / "history.jsonl", "a") as file:
        for epoch in (3, 4):
            line = dict(step=3 * epoch, epoch=epoch, stage="generate", clips=[clip(3 * epoch, "gone")])
            file.write(json.dumps(line) + "\n")
    assert re.findall(r"Epoch (\d), step", Page(report.write(run)).text) == ["4", "3", "2", "1"]


def test_missing_and_broken_clips_are_reported_and_have_no_player(run):
    (run / "samples/step_000006" / f"{NAME}.wav").write_bytes(b"RIFF")
    page = Page(report.write(run))
    assert f"file missing: samples/step_000003/{NAME}_continued.wav" in page.text
    assert f"cannot be read: samples/step_000006/{NAME}.wav" in page.text
    assert len(page.all("audio")) == 6


def test_text_is_escaped_and_all_links_are_local(run):
    page = Page(report.write(run))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == tags.count("style") == 1 and not {"u", "iframe", "link", "object"} & set(tags)
    for tag, attrs in page.tags:
        assert not any(key.startswith("on") for key in attrs), (tag, attrs)
        for key in {"src", "href"} & attrs.keys():
            assert attrs[key].startswith(("#", "samples/")), (tag, attrs)
    assert "url(" not in report.TEMPLATE and "import" not in report.TEMPLATE


def test_an_incomplete_last_line_is_ignored_and_other_damage_is_an_error(run):
    assert "step 6 of 12" in Page(report.write(run)).text
    (run / "metrics.jsonl").write_text('{"step": 1, "ce"\n{"step": 2, "ce": 3.0}\n')
    with pytest.raises(common.UserError, match="metrics.jsonl: not JSON"):
        report.write(run)
    (run / "metrics.jsonl").write_text('{"step": 1, "ce": "x"}\n')
    with pytest.raises(common.UserError, match="config.json or a log is damaged"):
        report.write(run)
    (run / "config.json").write_text("{")
    with pytest.raises(common.UserError, match="config.json: not JSON .* Repair or remove it"):
        report.write(run)


def test_epoch_means_of_the_training_loss_are_no_validation(run):
    old = Page(report.write(run))
    lines = [json.loads(line) for line in open(run / "history.jsonl")]
    means = [dict(step=step, epoch=step // 3, stage="train", ce=ce, ppl=2.0, ce_q1=ce, ce_q2=ce, ce_q3=ce, ppl_q1=2.0,
                  ppl_q2=2.0, ppl_q3=2.0) for step, ce in ((3, 0.123), (6, 0.456))]  # fmt: skip
    for order in (means + lines, lines + means):
        (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in order))
        page = Page(report.write(run))
        assert page.all("polyline") == old.all("polyline") and page.all("svg") == old.all("svg")
        table = page.text[page.text.rindex("Metrics by epoch") :]
        assert table.count("0.123") == table.count("0.456") == 1 and "train_ce" in table
        for number in ("best validation loss4.321", "4.567"):
            assert number in page.text and number in old.text
    assert "train_ce" not in old.text


def test_logs_of_an_older_version_and_a_run_without_logs(run):
    (run / "code_000000.diff").unlink()
    (run / "metrics.jsonl").write_text('{"step": 10, "ce": 6.2, "lr": 0.0001, "grad_norm": 0.7}\n')
    valid = dict(step=10, epoch=1, stage="valid", ce=5.4321, ppl=2.0, ce_q1=5.0, unigram=5.5, unigram_q1=5.5, gain=0.01)
    evaluate = dict(step=10, epoch=1, stage="evaluate", adherence={})
    (run / "history.jsonl").write_text(f"{json.dumps(valid)}\n{json.dumps(evaluate)}\n")
    text = Page(report.write(run)).text
    assert "no git commit" in text and "no samples" in text and "5.432" in text
    assert "caption adherence" not in text[: text.index("Glossary")]
    for name in ("metrics.jsonl", "history.jsonl"):
        (run / name).unlink()
    page = Page(report.write(run))
    assert "step 0 of 12" in page.text and not page.all("svg") and not page.all("audio")


def test_pictures_show_pitch_from_bottom_to_top_and_loudness_on_one_scale(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pictures = {}
    for hertz in (200, 4000):
        path = wav(tmp_path / f"{hertz}.wav", seconds=2, hertz=hertz)
        draw_spectrogram(path, path.with_suffix(".png"), RATE)
        pictures[hertz] = np.asarray(Image.open(path.with_suffix(".png"))).sum(2)
        assert pictures[hertz].shape == (80, 101)
    assert pictures[4000].mean(1).argmax() < 30 and pictures[200].mean(1).argmax() > 60
    soundfile.write(tmp_path / "quiet.wav", 0.1 * soundfile.read(tmp_path / "200.wav")[0], RATE, subtype="FLOAT")
    draw_spectrogram(tmp_path / "quiet.wav", tmp_path / "quiet.png", RATE)
    assert np.asarray(Image.open(tmp_path / "quiet.png")).sum(2).max() < pictures[200].max()


def test_without_pillow_the_page_has_no_pictures(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    page = Page(report.write(run))
    assert len(page.all("audio")) == 7 and not page.all("img") and not list(run.rglob("*.png"))


def test_pictures_are_drawn_once_and_again_if_the_clip_is_newer(run):
    pytest.importorskip("PIL")
    report.write(run)
    picture = run / "samples/step_000003" / f"{NAME}.png"
    first = picture.stat().st_mtime_ns, picture.read_bytes()
    report.write(run)
    assert picture.stat().st_mtime_ns == first[0]
    wav(picture.with_suffix(".wav"), hertz=2000)
    report.write(run)
    assert picture.read_bytes() != first[1]


def test_a_failed_write_keeps_the_old_page(run, command):
    report.write(run)
    before = (run / "index.html").read_bytes()
    (run / "index.html.tmp").mkdir()
    status, output = command(report, run)
    assert status == 2 and "cannot be written" in output and "Traceback" not in output
    assert (run / "index.html").read_bytes() == before
    (run / "index.html.tmp").rmdir()
    assert command(report, run) == (0, f"wrote {run / 'index.html'}\n") and not (run / "index.html.tmp").exists()


def test_a_folder_that_is_no_run_is_an_error(command, tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        status, output = command(report, folder)
        assert status == 2 and output.startswith("tools.report.py: error: ") and "not a run's folder" in output
        assert output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_thinned_curves_keep_the_ends_and_the_spikes():
    points = [(step, 1.0 + step % 7 / 100) for step in range(1, 20_001)]
    points[4321], points[17_000] = (4322, 99.0), (17_001, -5.0)
    thinned = report.thin(points)
    assert len(thinned) <= 302 and {points[0], points[-1], (4322, 99.0), (17_001, -5.0)} <= set(thinned)
    assert thinned == sorted(thinned)


@pytest.mark.parametrize("low, high, log", [(3.1, 6.2, 0), (0, 1e-3, 0), (5, 5, 0), (0, 0, 0), (-2e-3, 0.04, 0),
                                            (0.3, 0.9, 1), (1, 1, 1), (1e-6, 3e4, 1), (10, 10, 1)])  # fmt: skip
def test_ticks_are_few_round_numbers_that_cover_the_values(low, high, log):
    marks = report.ticks(low, high, bool(log))
    assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 12 and marks == sorted(set(marks))
    assert all(len(f"{mark:g}") <= 7 for mark in marks)
