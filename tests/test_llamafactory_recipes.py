"""Recipes as users of a LLaMA-Factory fork have them: they run as they are, on real clips."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file

from tests.support import launch
from vidcls.config import load_config
from vidcls.training.data_sets import open_data_sets

RECIPES = launch.ROOT / "tests" / "support"
STEPS = 30
launched = [pytest.mark.launch, pytest.mark.real, pytest.mark.timeout(600)]


@dataclass(frozen=True)
class Job:
    """A recipe, the name that it gives its data set, and how many clips it is evaluated on."""

    recipe: str
    dataset: str
    test_clips: int


JOBS = {
    "ucf101": Job("llamafactory_ucf101.yaml", "ucf101_action", 42),
    "sthsthv2": Job("llamafactory_sthsthv2.yaml", "sthsthv2_action", 2),
}


@dataclass(frozen=True)
class Finished:
    output: str
    run: Path
    shards: Path

    @property
    def rows(self) -> list[dict[str, float]]:
        lines = (self.run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        return [row for row in map(json.loads, lines) if "loss" in row]

    @property
    def checkpoint(self) -> Path:
        return self.run / f"checkpoint-{STEPS}"


def shard(out: Path, *arguments: object) -> None:
    words = ["tools/make_shards.py", *arguments, "--out", out, "--frames", 8]
    done = launch.run([launch.PYTHON, *words], log=out.parent / f"{out.name}.log")
    assert done.code == 0, done.output


@pytest.fixture(scope="module")
def shards(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for `dataset_dir`: shards and datasets.yaml; below test/ those to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    ucf, ssv2 = real_data / "ucf101", real_data / "ssv2"
    (folder / "test").mkdir()
    for out, split in ((folder / "ucf101", "train"), (folder / "test" / "ucf101", "test")):
        lists = ucf / "annotations"
        words = ("--list", lists / f"subset6_{split}list01.txt", "--classes", lists / "classInd.txt")
        shard(out, "ucf101", "--videos", ucf / "videos", *words)
    for out, split in ((folder / "sthsthv2", "train"), (folder / "test" / "sthsthv2", "validation")):
        lists = ssv2 / "annotations"
        words = ("--list", lists / f"subset_{split}.json", "--labels", lists / "something-something-v2-labels.json")
        shard(out, "ssv2", "--videos", ssv2 / "videos", *words)
    registry = {job.dataset: name for name, job in JOBS.items()}
    (folder / "datasets.yaml").write_text(yaml.safe_dump(registry), encoding="utf-8")
    return folder


@pytest.fixture(scope="module", params=[pytest.param("ucf101", marks=pytest.mark.long), "sthsthv2"])
def finished(request: pytest.FixtureRequest, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    job = JOBS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    changes = ("model_name_or_path=tiny", f"dataset_dir={shards}", f"output_dir={folder / 'run'}", f"max_steps={STEPS}")
    done = launch.deepspeed(2, "launch/train.py", RECIPES / job.recipe, *changes, log=folder / "log")
    assert done.code == 0, done.output[-4000:]
    return Finished(done.output, folder / "run", shards / "test" / request.param)


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_every_key_is_accepted(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing replaced: the data set is found by its name in dataset_dir, which is data/ unless told otherwise."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "datasets.yaml").write_text(f"{job.dataset}: shards/train\n", encoding="utf-8")
    (tmp_path / "ds_configs").symlink_to(launch.ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)
    config = load_config(RECIPES / job.recipe)
    assert config.train_sets[0].place == "data/shards/train"
    values = yaml.safe_load((RECIPES / job.recipe).read_text(encoding="utf-8"))
    lists = {"lora_target": config.model.lora_target, "max_steps": None}
    assert {key: config.flat()[key] for key in values} == {k: lists.get(k, value) for k, value in values.items()}


@pytest.mark.launch
def test_a_dataset_info_in_two_lines(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """make_shards.py reads the entry, a line of datasets.yaml gives its name to the recipe."""
    videos, data = small_shards.parent / "videos", tmp_path / "data"
    data.mkdir()
    names = ["left", "right"]
    rows = [
        {
            "messages": [{"role": "user", "content": "<video>What is done? <ACTION>"}],
            "videos": [str(clip)],
            "action_label": label,
        }
        for label, name in enumerate(names)
        for clip in sorted((videos / name).iterdir())[:3]
    ]
    (data / "clips.json").write_text(json.dumps(rows))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "clips.json", "formatting": "sharegpt", "tags": tags}
    columns = {"messages": "messages", "videos": "videos", "action_label": "action_label"}
    (data / "dataset_info.json").write_text(json.dumps({"ucf101_action": {**entry, "columns": columns}}))
    (data / "classes.txt").write_text("\n".join(names))
    words = ("--dataset-info", data / "dataset_info.json", "--dataset", "ucf101_action")
    shard(data / "ucf101_action", "sharegpt", *words, "--classes", data / "classes.txt")
    (data / "datasets.yaml").write_text("ucf101_action: ucf101_action\n")

    (tmp_path / "ds_configs").symlink_to(launch.ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)
    sets = open_data_sets(load_config(RECIPES / "llamafactory_ucf101.yaml", ["num_action_classes=2"]))
    (part,) = sets.parts
    assert (sets.clips, part.index.labels.names) == (6, ("left", "right"))
    assert [*part.index.prompts] == ["<video>What is done? <ACTION>"]


class TestLaunched:
    pytestmark = launched

    def test_a_checkpoint_and_a_picture(self, finished: Finished) -> None:
        assert {"config.yaml", "training_loss.png", "train_log.jsonl"} <= {path.name for path in finished.run.iterdir()}
        assert not (finished.run / "tensorboard").exists()  # report_to: none
        assert (finished.checkpoint / "training_state.json").is_file()  # save_only_model: false
        adapter = load_file(finished.checkpoint / "adapter_model.safetensors")
        assert any("lora_magnitude_vector" in name for name in adapter)  # use_dora
        assert {t.shape[0] for name, t in adapter.items() if "lora_A" in name} == {16}

    def test_the_loss_falls(self, finished: Finished) -> None:
        losses = [row["loss"] for row in finished.rows]
        assert [row["step"] for row in finished.rows] == list(range(5, STEPS + 1, 5))
        assert np.isfinite(losses).all()
        assert np.mean(losses[-2:]) < losses[0] - 0.1, losses

    def test_what_a_machine_without_gpu_uses_instead(self, finished: Finished) -> None:
        told = [line for line in finished.output.splitlines() if line.startswith("instead")]
        assert len(told) == 2, finished.output[:4000]
        assert "flash_attn: fa2 needs" in told[0]
        assert "sdpa is used" in told[0]
        assert "enable_liger_kernel: needs" in told[1]

    def test_eval_strategy_and_the_best(self, finished: Finished) -> None:
        """The second recipe holds out a clip of eleven and evaluates every 10 steps; the first does not evaluate."""
        path = finished.run / "evaluations.jsonl"
        if finished.shards.name == "ucf101":
            assert not path.exists()
            return
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert [row["step"] for row in rows] == [10, 20, 30]
        assert {row["metrics"]["default"]["seen"] for row in rows} == {1}
        best = min(rows, key=lambda row: row["metrics"]["default"]["loss"])  # metric_for_best_model: eval_loss
        assert json.loads((finished.run / "best" / "best.json").read_text(encoding="utf-8"))["step"] == best["step"]

    def test_it_is_evaluated(self, finished: Finished, tmp_path: Path) -> None:
        words = ["launch/evaluate.py", finished.checkpoint, "--data", finished.shards, "--out", tmp_path / "out"]
        done = launch.run([launch.PYTHON, *words], log=tmp_path / "log")
        assert done.code == 0, done.output[-3000:]
        metrics = json.loads((tmp_path / "out" / "eval.json").read_text())
        assert metrics["seen"] == JOBS[finished.shards.name].test_clips
        assert np.isfinite(metrics["loss"])
        print(f"{finished.shards.name}: losses {[round(row['loss'], 3) for row in finished.rows]}, {metrics}")
