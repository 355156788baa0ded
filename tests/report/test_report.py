"""report.html: what it is made of, and what a browser shows of it."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.browser import dom, find_chromium, screenshot
from vidcls.data.frames import Views
from vidcls.data.labels import LabelSpace
from vidcls.evaluation.evaluate import Evaluated, Prediction
from vidcls.evaluation.metrics import compute_details, compute_metrics
from vidcls.evaluation.results import write_results
from vidcls.report.content import collect
from vidcls.report.write import Reporter, add_evaluation, write_report

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>&amp;"
CLASSES = 174


def evaluation(folder: Path, names: tuple[str, ...], clips: int = 800, right: float = 2.0) -> None:
    """Random scores, in which each seventh class is taken for the next one."""
    rng = np.random.default_rng(0)
    labels_N = rng.integers(len(names), size=clips)
    logits_NC = rng.normal(size=(clips, len(names)))
    logits_NC[np.arange(clips), labels_N] += right
    for first in range(0, len(names) - 1, 7):
        logits_NC[labels_N == first, first + 1] += right + 3
    scores_NC = np.exp(logits_NC) / np.exp(logits_NC).sum(axis=1, keepdims=True)
    rows = zip(labels_N.tolist(), scores_NC, strict=True)
    predictions = [Prediction(f"clip{i}", label, scores) for i, (label, scores) in enumerate(rows)]
    found = Evaluated(compute_metrics(scores_NC, labels_N), predictions, {"lost": "cut short"})
    write_results(folder, found, compute_details(scores_NC, labels_N, names), [], LabelSpace(names), Views())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 30 log lines, and an evaluation of 174 classes whose first has a hostile name."""
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [
        {"step": step, "loss": 3 / step, "lr": 1e-4, "grad_norm": 1.0, "top1": step / 400, "samples_per_second": 40.0}
        for step in range(10, 310, 10)
    ]
    rows.append({"step": 300, "eval/top1": 0.5, "eval/loss": 1.0})
    (folder / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3')
    (folder / "config.yaml").write_text("dataset: data/x\nlearning_rate: 0.001\n")
    (folder / "outcome.json").write_text('{"outcome": "finished", "step": 300, "steps": 300}')
    place = folder / "checkpoint-300" / "evaluation"
    evaluation(place, (f"class 0 {HOSTILE}", *(f"class {i}" for i in range(1, CLASSES))))
    picture = io.BytesIO()
    Image.new("RGB", (64, 16), (200, 30, 30)).save(picture, "JPEG")
    mistake = {
        "key": f"clip {HOSTILE}",
        "true": "class 1",
        "predicted": "class 2",
        "confidence": 0.9,
        "true_score": 0.1,
    }
    mistake["jpeg"] = base64.b64encode(picture.getvalue()).decode()
    (place / "mistakes.json").write_text(json.dumps([mistake]))
    state = {"step": 300, "stream": {"default/data_digest": "abc", "data_sets": ["default"]}}
    (folder / "checkpoint-300" / "training_state.json").write_text(json.dumps(state))
    return folder


def test_a_report_is_made_of_what_there_is_by_now(tmp_path: Path) -> None:
    """From the first moment of a run; files that are being written are left out."""
    (tmp_path / "config.yaml").write_text("a: 1\n")
    found = collect(tmp_path)
    assert (found["log"], found["results"], found["recipe"]) == ([], [], {"a": 1})
    assert "not yet at its first log line" in found["state"]
    evaluation(tmp_path / "checkpoint-1" / "evaluation", ("a", "b"), clips=10)
    assert [each["title"] for each in collect(tmp_path)["results"]] == ["checkpoint-1/evaluation"]
    (tmp_path / "checkpoint-1" / "evaluation" / "confusion.csv").unlink()
    assert collect(tmp_path)["results"] == []


def test_the_numbers_are_those_of_the_files(run: Path) -> None:
    found = collect(run)
    assert len(found["log"]) == 31  # the line cut by a kill is left out
    (result,) = found["results"]
    metrics = json.loads((run / "checkpoint-300" / "evaluation" / "eval.json").read_text())
    assert result["metrics"] == metrics
    assert sum(map(sum, result["confusion"])) == metrics["seen"] == 800
    assert sum(result["confusion"][i][i] for i in range(CLASSES)) / 800 == pytest.approx(metrics["top1"])
    assert result["classes"][0]["class"] == f"class 0 {HOSTILE}"
    assert found["data"]["default/data_digest"] == "abc"
    assert found["versions"]["torch"]


def test_a_long_log_is_thinned_and_keeps_its_evaluations(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0} for step in range(1, 20_001)] + [{"step": 777, "eval/top1": 1.0}]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    log = collect(tmp_path)["log"]
    assert len(log) <= 4001
    assert {"step": 777, "eval/top1": 1.0} in log


def test_a_report_never_ends_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "report.html").mkdir()
    Reporter(run).refresh()
    assert "vidcls: no report: " in capsys.readouterr().out
    assert [path.name for path in run.glob("report.html*")] == ["report.html"]


def test_it_is_written_once_a_while(run: Path) -> None:
    (run / "report.html.tmp-1").touch()  # of a run that was killed
    reporter = Reporter(run, seconds=1000)
    assert not list(run.glob("report.html.tmp-*"))
    reporter.refresh()
    (run / "report.html").unlink()
    reporter.refresh()
    assert not (run / "report.html").exists()
    reporter.refresh(now=True)
    assert (run / "report.html").exists()


def test_tensorboard_has_the_pictures_too(run: Path) -> None:
    place = run / "checkpoint-300" / "evaluation"
    add_evaluation(run / "checkpoint-300", place)
    assert (run / "report.html").exists()
    assert not (run / "tensorboard").exists()
    (run / "tensorboard").mkdir()
    add_evaluation(run / "checkpoint-300", place)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert {*events.Tags()["images"]} == {"evaluation/confusion", "evaluation/calibration"}
    (seen,) = events.Images("evaluation/confusion")
    assert seen.step == 300
    assert np.asarray(Image.open(io.BytesIO(seen.encoded_image_string)).convert("L")).std() > 5


# In a real browser


@pytest.fixture(scope="module")
def chromium() -> str:
    return find_chromium()


def driven(page: Path, program: str) -> Path:
    """The page with a program that uses it as a reader would."""
    out = page.with_name("driven.html")
    out.write_text(page.read_text(encoding="utf-8") + f"<script>{{{program}}}</script>", encoding="utf-8")
    return out


def table(text: str, name: str) -> list[list[str]]:
    """The cells of a table's body."""
    (body,) = re.findall(rf'<table id="{name}".*?<tbody>(.*?)</tbody>', text, flags=re.DOTALL)
    return [re.findall(r"<td.*?>(.*?)</td>", row, flags=re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", body)]


def test_the_browser_shows_all_of_it_and_runs_nothing_hostile(chromium: str, run: Path, tmp_path: Path) -> None:
    page = write_report(run)
    outside = page.read_text(encoding="utf-8").partition("<body>")
    assert not re.search(r'(src|href)="https?:', outside[0][:2000] + outside[2])
    text = dom(chromium, page, tmp_path / "profile", seconds=5)
    assert 'data-ready="yes"' in text
    assert "owned" not in re.findall("<title>(.*?)</title>", text)[0]
    assert "<img src=x" not in text
    assert text.count('class="chart') >= 6
    assert "finished at step 300 of 300" in text
    assert text.count('src="data:image/jpeg;base64,') == 1
    found = json.loads((run / "checkpoint-300" / "evaluation" / "eval.json").read_text())
    assert f"{100 * found['top1']:.1f}" in text
    assert "1 could not be read" in text
    assert len(table(text, "classes")) == CLASSES
    assert ["learning_rate", "0.001"] in table(text, "recipe")
    # Drawn, not only asked for.
    assert 'class="heatmaplayer' in text


def test_sorting_and_searching(chromium: str, run: Path, tmp_path: Path) -> None:
    page = write_report(run)
    program = """
    document.querySelectorAll("#classes th button")[1].click();
    const search = document.getElementById("class-search");
    search.value = "CLASS 17"; search.dispatchEvent(new Event("input"));
    const confusion = document.getElementById("confusion-search");
    confusion.value = "class 14"; confusion.dispatchEvent(new Event("input"));
    const order = document.getElementById("order");
    order.value = "alike"; order.dispatchEvent(new Event("input"));
    document.body.dataset.shown = document.getElementById("confusion").data[0].y.length;
    """
    text = dom(chromium, driven(page, program), tmp_path / "profile", seconds=5)
    rows = table(text, "classes")
    assert {row[0] for row in rows} == {"class 17", "class 170", "class 171", "class 172", "class 173"}
    counts = [int(row[1]) for row in rows]
    assert counts == sorted(counts, reverse=True)
    assert 'aria-sort="descending"' in text
    assert "5 of 174 classes" in text
    pairs = table(text, "pairs")
    assert ["class 14", "class 15"] in [row[:2] for row in pairs]
    shown = int(re.findall(r'data-shown="(\d+)"', text)[0])
    assert 12 <= shown < CLASSES  # those that match, and those they are confused with


def test_on_a_phone_nothing_is_wider_than_the_screen(chromium: str, run: Path, tmp_path: Path) -> None:
    """In a frame of 390 pixels: the browser's own window has at least 500."""
    page = driven(write_report(run), "parent.postMessage(document.documentElement.scrollWidth, '*');")
    frame = tmp_path / "run" / "frame.html"
    frame.write_text(
        "<!doctype html><body><script>onmessage = (e) => { document.body.dataset.width = e.data; };</script>"
        f'<iframe src="{page.name}" style="width:390px;height:2000px;border:0"></iframe>'
    )
    text = dom(chromium, frame, tmp_path / "profile", seconds=5)
    assert re.findall(r'data-width="(\d+)"', text) == ["390"]


def test_pictures_of_it(chromium: str, run: Path, tmp_path: Path) -> None:
    page = write_report(run)
    for width in (1280, 500):
        out = screenshot(chromium, page, tmp_path / "profile", tmp_path / f"{width}.png", width=width, height=1400)
        pixels = np.asarray(Image.open(out).convert("RGB"))
        assert pixels.shape == (1400, width, 3)
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200
