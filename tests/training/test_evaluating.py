"""Evaluation while training: when, on what, which was the best, and that training does not notice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import nll_loss

from tests.support import launch
from tests.support.checkpoints import tiny_spec
from vidcls.config import Config, ConfigError, config_from_values
from vidcls.data.batch import ClipEncoder
from vidcls.data.frames import Views
from vidcls.data.index import ShardIndex
from vidcls.data.labels import LabelSpaceError
from vidcls.data.loader import ClipBatches, ClipSource, FrameChoice, Request
from vidcls.evaluation.heads import frame_choice
from vidcls.evaluation.metrics import Metrics
from vidcls.manifest import CheckpointError, verify
from vidcls.model.pretrained import build_encoder, load_model
from vidcls.training.data_sets import open_data_sets
from vidcls.training.evaluating import Evaluation, Evaluations, Schedule, open_eval_clips
from vidcls.training.sharded_state import StoredState

EVERY_TWO = Schedule(every=2, last=100, clips_per_epoch=26, global_batch=4)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidcls.distributed.world_size", lambda: 1)
    monkeypatch.setattr("vidcls.distributed.rank", lambda: 0)


@pytest.fixture(scope="module")
def encoder() -> ClipEncoder:
    return build_encoder(tiny_spec("default"))


def config(output_dir: Path, **values: Any) -> Config:
    content: dict[str, Any] = {
        "model_name_or_path": "tiny",
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "output_dir": str(output_dir),
        "dataloader_num_workers": 0,
    }
    return config_from_values(content | values)


def evaluations(config: Config, encoder: ClipEncoder) -> Evaluations:
    clips = open_eval_clips(config, open_data_sets(config))
    return Evaluations(config, clips, encoder, FrameChoice(4), EVERY_TWO)


def metrics(top1: float = 0.5, loss: float = 1.0, seen: int = 26) -> Metrics:
    return Metrics(top1=top1, top5=1.0, mean_class_accuracy=top1 / 2, loss=loss, seen=seen)


# When


def test_by_steps_and_always_after_the_last() -> None:
    schedule = Schedule(every=3, last=8, clips_per_epoch=10, global_batch=4)
    assert [step for step in range(1, 9) if schedule.due(step)] == [3, 6, 8]


@pytest.mark.parametrize(
    ("clips", "batch", "last", "expected"),
    [
        (10, 5, 6, [2, 4, 6]),
        (10, 4, 8, [3, 5, 8]),  # after 12, 20 and 32 clips; epochs end at 10, 20 and 30
        (3, 7, 3, [1, 2, 3]),  # several epochs a step
        (100, 1, 5, [5]),  # the run ends within the first epoch
    ],
)
def test_by_epochs(clips: int, batch: int, last: int, expected: list[int]) -> None:
    schedule = Schedule(every=None, last=last, clips_per_epoch=clips, global_batch=batch)
    assert [step for step in range(1, last + 1) if schedule.due(step)] == expected


def test_the_schedule_of_a_recipe(small_shards: Path, tmp_path: Path) -> None:
    def every(**values: Any) -> int | None:
        made = config(tmp_path, dataset=str(small_shards), val_size=5, **values)
        return Schedule.of(made, last=9, clips_per_epoch=21, global_batch=2).every

    assert every(eval_steps=7) == 7
    assert every(eval_steps=None, logging_steps=5) == 5
    assert every(eval_steps=None, eval_strategy="epoch") is None


# On what


def test_a_part_held_out_is_not_trained_on(small_shards: Path, tmp_path: Path) -> None:
    made = config(tmp_path, dataset=str(small_shards), val_size=0.25)
    data = open_data_sets(made)
    (held_out,) = open_eval_clips(made, data)
    assert held_out.name == "default"
    assert held_out.ids is not None
    drawn = {data.order.at(position).sample for position in range(100)}
    assert len(held_out.ids) == 6  # a quarter of 26 is 6.5
    assert drawn.isdisjoint(held_out.ids.tolist())
    assert drawn | {*held_out.ids.tolist()} == {*range(26)}


def test_data_sets_and_their_heads(small_shards: Path, up_down: Path, tmp_path: Path) -> None:
    entries = [
        {"name": "all", "dataset": str(small_shards), "eval_dataset": str(small_shards)},
        {"name": "some", "dataset": str(up_down), "eval_dataset": str(up_down), "prompt": "<video> Which? <ACTION>"},
    ]
    made = config(tmp_path, datasets=entries, val_size=3)
    clips = open_eval_clips(made, open_data_sets(made))
    assert [(each.name, each.source.head, len(each.source.index.labels)) for each in clips] == [
        ("all", 0, 4),
        ("some", 1, 2),
        ("all.val", 0, 4),
        ("some.val", 1, 2),
    ]
    assert [each.ids is None or len(each.ids) for each in clips] == [True, True, 3, 3]
    assert clips[1].source.prompt == clips[3].source.prompt == "<video> Which? <ACTION>"


def test_other_classes_than_the_heads_are_refused(small_shards: Path, up_down: Path, tmp_path: Path) -> None:
    made = config(tmp_path, dataset=str(small_shards), eval_dataset=str(up_down))
    with pytest.raises(LabelSpaceError, match=f"head default in training and eval_dataset {up_down}"):
        open_eval_clips(made, open_data_sets(made))


def test_a_share_that_holds_out_nothing_is_refused(small_shards: Path, tmp_path: Path) -> None:
    made = config(tmp_path, dataset=str(small_shards), val_size=0.01)
    with pytest.raises(ConfigError, match=r"val_size: 0.01 holds out none of the 26 clips of data set default"):
        open_eval_clips(made, open_data_sets(made))


# What is said of it


def test_rows_to_log() -> None:
    assert Evaluation(4, {"x": metrics(0.5, 2.0)}).log_row("top1") == {
        "step": 4,
        "eval/top1": 0.5,
        "eval/top5": 1.0,
        "eval/mean_class_accuracy": 0.25,
        "eval/loss": 2.0,
    }
    row = Evaluation(4, {"x": metrics(0.5, 2.0), "y": metrics(0.25, 1.0)}).log_row("loss")
    assert (row["eval/loss"], row["eval/x/loss"], row["eval/y/loss"], row["eval/y/top1"]) == (1.5, 2.0, 1.0, 0.25)
    assert "eval/top1" not in row


# The best so far


def rows_of(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()]


def history(run: Path, *found: Evaluation, checkpoints: tuple[int, ...] = ()) -> None:
    run.mkdir(exist_ok=True)
    (run / "evaluations.jsonl").write_text("".join(json.dumps(each.to_dict()) + "\n" for each in found))
    for step in checkpoints:
        (run / f"checkpoint-{step}").mkdir()
        (run / f"checkpoint-{step}" / "MANIFEST.json").write_text("{}")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("metric", "best"), [("top1", 4), ("eval_loss", 2), ("accuracy", 4)])
def test_a_resumed_run_knows_the_best_from_the_file(
    small_shards: Path, tmp_path: Path, encoder: ClipEncoder, metric: str, best: int
) -> None:
    """Steps beyond the one resumed at never were; of equals the earlier one is the best."""
    found = [metrics(0.2, 1.5), metrics(0.4, 1.1), metrics(0.6, 1.3), metrics(0.6, 1.1), metrics(0.9, 0.1)]
    history(tmp_path, *(Evaluation(step, {"default": m}) for step, m in zip((1, 2, 4, 6, 8), found, strict=True)))
    made = config(tmp_path, dataset=str(small_shards), eval_dataset=str(small_shards), metric_for_best_model=metric)
    run = evaluations(made, encoder)
    run.start(6)
    assert run.best is not None
    assert run.best.step == best
    assert rows_of(tmp_path) == [1, 2, 4, 6]
    assert run.best_checkpoint is None  # nobody asked to keep it
    assert not run.must_save(best)


@pytest.mark.usefixtures("one_rank")
def test_the_best_counts_only_on_the_same_clips_and_with_its_checkpoint(
    small_shards: Path, tmp_path: Path, encoder: ClipEncoder
) -> None:
    made = config(tmp_path, dataset=str(small_shards), eval_dataset=str(small_shards), load_best_model_at_end=True)
    others = {"default": metrics(0.9), "more": metrics(0.9)}
    found = [
        Evaluation(1, {"default": metrics(0.8)}),  # its checkpoint is gone
        Evaluation(2, {"default": metrics(0.3)}),
        Evaluation(3, {"default": metrics(0.9, seen=20)}),  # of other clips
        Evaluation(4, others),
        Evaluation(5, {"default": metrics(0.2)}),
    ]
    history(tmp_path, *found, checkpoints=(2, 3, 4, 5))
    run = evaluations(made, encoder)
    run.start(5)
    assert run.best_checkpoint == tmp_path / "checkpoint-2"
    assert rows_of(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("one_rank")
def test_early_stopping_patience(small_shards: Path, tmp_path: Path, encoder: ClipEncoder) -> None:
    """So many evaluations since the best; a resumed run counts those before it, on the same clips."""
    values = {"dataset": str(small_shards), "eval_dataset": str(small_shards), "early_stopping_patience": 2}

    def exhausted(step: int, *top1: float, seen: int = 26) -> bool:
        found = [metrics(each, seen=seen) for each in top1]
        history(tmp_path, *(Evaluation(2 * place + 2, {"default": m}) for place, m in enumerate(found)))
        run = evaluations(config(tmp_path, **values), encoder)
        run.start(step)
        return run.exhausted()

    assert not exhausted(0)
    assert not exhausted(8, 0.5, 0.4, 0.6, 0.6)
    assert exhausted(10, 0.5, 0.4, 0.6, 0.6, 0.5)  # an equal one is no better
    assert not exhausted(8, 0.5, 0.4, 0.6, 0.6, 0.5)  # the last one never was
    assert not exhausted(10, 0.5, 0.4, 0.3, 0.2, 0.1, seen=20)
    values["early_stopping_patience"] = None
    assert not exhausted(10, 0.5, 0.4, 0.3, 0.2, 0.1)


@pytest.mark.usefixtures("one_rank")
def test_views(small_shards: Path, tmp_path: Path, encoder: ClipEncoder) -> None:
    """views: of every clip, in evaluation only."""
    values = {"dataset": str(small_shards), "eval_dataset": str(small_shards)}
    run = evaluations(config(tmp_path, **values, views={"crops": 3}), encoder)
    assert run.batches["default"].views == Views(1, 3)
    assert evaluations(config(tmp_path, **values), encoder).batches["default"].views == Views()
    with pytest.raises(ConfigError, match=r"views: crops: 2; legal: 1, 3"):
        evaluations(config(tmp_path, **values, views={"crops": 2}), encoder)
    with pytest.raises(ConfigError, match=r"views: segments 2 would be one and the same: clips have at most 4 frames"):
        evaluations(config(tmp_path, **values, views={"segments": 2}), encoder)
    with pytest.raises(ConfigError, match=r"views: \{'angles': 2\} is not legal: keys are segments and crops"):
        config(tmp_path, **values, views={"angles": 2})
    with pytest.raises(ConfigError, match="early_stopping_patience: 3 needs eval_strategy"):
        config(tmp_path, dataset=str(small_shards), eval_strategy="no", eval_steps=None, early_stopping_patience=3)


@pytest.mark.usefixtures("one_rank")
def test_a_new_run_has_no_best_and_a_cut_row_is_none(small_shards: Path, tmp_path: Path, encoder: ClipEncoder) -> None:
    made = config(tmp_path, dataset=str(small_shards), eval_dataset=str(small_shards))
    run = evaluations(made, encoder)
    run.start(0)
    assert run.best is None
    assert run.finish() is None
    history(tmp_path, Evaluation(2, {"default": metrics()}), Evaluation(4, {"default": metrics()}))
    path = tmp_path / "evaluations.jsonl"
    path.write_text(path.read_text()[:-20])
    run.start(4)
    assert rows_of(tmp_path) == [2]
    path.write_text('{"step": 2, "top1": 0.5}\n')
    with pytest.raises(CheckpointError, match=r"evaluations.jsonl is damaged"):
        run.start(4)


class Scripted(torch.nn.Module):
    """Logits that are as wanted, whatever the clips show."""

    def __init__(self) -> None:
        super().__init__()
        self.predicted = 0
        self.modes: set[bool] = set()

    def forward(self, input_ids_BL: torch.Tensor, **_: Any) -> torch.Tensor:
        self.modes.add(self.training)
        logits_BC = torch.zeros(len(input_ids_BL), 4)
        logits_BC[:, self.predicted] = 1.0
        return logits_BC


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_of_it(small_shards: Path, tmp_path: Path, encoder: ClipEncoder, workers: int) -> None:
    """The four classes have 7, 6, 7 and 6 of the clips, in the order of their names."""
    made = config(
        tmp_path,
        dataset=str(small_shards),
        eval_dataset=str(small_shards),
        load_best_model_at_end=True,
        dataloader_num_workers=workers,
    )
    run, model = evaluations(made, encoder), Scripted().train()
    counts = torch.tensor(open_data_sets(made).parts[0].index.label.tolist()).bincount().tolist()
    assert sorted(counts) == [6, 6, 7, 7]
    rare, often = counts.index(6), counts.index(7)
    run.start(0)
    generator = torch.get_rng_state()
    must_save = []
    for step, model.predicted in ((2, rare), (4, often), (6, often), (8, rare)):
        assert run.due(step)
        row = run.run(model, step)
        assert row["eval/top1"] == counts[model.predicted] / 26
        must_save.append(run.must_save(step))
    assert must_save == [True, True, False, False]
    assert run.best_checkpoint == tmp_path / "checkpoint-4"
    assert rows_of(tmp_path) == [2, 4, 6, 8]
    assert torch.equal(torch.get_rng_state(), generator)
    assert model.modes == {False}
    assert model.training


# The whole, in training

STEPS = 4
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 4,
    "lora_dropout": 0.2,
    "train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "learning_rate": 2e-3,
    "max_steps": STEPS,
    "save_steps": STEPS,
    "logging_steps": 1,
    "plot_loss": False,
    "report_to": "none",
    "per_device_eval_batch_size": 3,  # 9 batches for 2 ranks: one runs a padding batch
}
# Thresholds for ZeRO-3: everything is partitioned; or what is small stays whole.
CASES: dict[str, dict[str, Any]] = {
    "zero2-averaged": {"stage": 2, "ema_decay": 0.9},
    "zero3": {"stage": 3, "threshold": 0},
    "zero3-averaged": {"stage": 3, "threshold": 300, "ema_decay": 0.9},
}


def write_recipe(folder: Path, name: str, *, stage: int, threshold: int = 0, **values: Any) -> Path:
    zero = {"stage": stage, **({"stage3_param_persistence_threshold": threshold} if stage == 3 else {})}
    content = {"zero_optimization": zero, "data_types": {"grad_accum_dtype": "fp32"}}
    (folder / f"{name}.json").write_text(json.dumps(content))
    recipe = {**RECIPE, "output_dir": str(folder / name), "deepspeed": str(folder / f"{name}.json"), **values}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def best_recipe(folder: Path, shards: Path, up_down: Path, **values: Any) -> Path:
    """Two heads, averaged weights, and a learning rate that ruins the model soon: the first evaluation is the best, and
    the second the last, though three steps are left."""
    entries = [
        {"name": "all", "dataset": str(shards), "eval_dataset": str(shards)},
        {"name": "some", "dataset": str(up_down), "eval_dataset": str(up_down)},
    ]
    ruin = {"learning_rate": 0.5, "warmup_ratio": 0.9, "lr_scheduler_type": "linear", "bf16": False}
    evaluation = {"eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "loss"}
    evaluation |= {"early_stopping_patience": 1, "views": {"crops": 3}}
    kept = {"load_best_model_at_end": True, "save_total_limit": 1, "save_steps": 2, "self_check": False}
    more = {**ruin, **evaluation, **kept, "max_steps": 9, "ema_decay": 0.5, **values}
    return write_recipe(folder, "best", stage=3, threshold=300, datasets=entries, **more)


@pytest.fixture(scope="module")
def runs(small_shards: Path, up_down: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of CASES with and without evaluations, and a run that keeps its best checkpoint; on 2 ranks."""
    folder = tmp_path_factory.mktemp("evaluating")
    recipes = [best_recipe(folder, small_shards, up_down)]
    for name, values in CASES.items():
        recipes.append(write_recipe(folder, name, dataset=str(small_shards), **values))
        evaluated = {"eval_dataset": str(small_shards), "eval_strategy": "steps", "eval_steps": 1}
        recipes.append(write_recipe(folder, f"{name}-evaluated", dataset=str(small_shards), **values, **evaluated))
    done = launch.deepspeed(2, "tests/support/trainings.py", *recipes, log=folder / "log", timeout=500)
    assert done.code == 0, done.output[-4000:]
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("case", CASES)
def test_training_does_not_notice_evaluations(runs: Path, case: str) -> None:
    """Masters, moments and averages are the same bits."""
    name = f"checkpoint-{STEPS}"
    alone, evaluated = StoredState.open(runs / case / name), StoredState.open(runs / f"{case}-evaluated" / name)
    assert alone.keys() == evaluated.keys()
    assert [key for key in alone if not torch.equal(alone[key], evaluated[key])] == []
    found = [json.loads(line) for line in (runs / f"{case}-evaluated" / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    losses = {row["metrics"]["default"]["loss"] for row in found}
    assert len(losses) == STEPS  # of weights that moved
    logged = [json.loads(line) for line in (runs / f"{case}-evaluated" / "train_log.jsonl").read_text().splitlines()]
    assert [row["eval/loss"] for row in logged if "eval/loss" in row] == [
        row["metrics"]["default"]["loss"] for row in found
    ]


@pytest.mark.launch
def test_the_best_is_kept_and_has_the_numbers_that_were_found(runs: Path, small_shards: Path, up_down: Path) -> None:
    """The model of best/, run over one clip after the other in this process, gives the metrics of the evaluation."""
    run = runs / "best"
    found = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found] == [3, 6]
    means = [sum(each["loss"] for each in row["metrics"].values()) / 2 for row in found]
    assert means.index(min(means)) == 0, means
    assert {path.name for path in run.glob("checkpoint*")} == {"checkpoint-3", "checkpoint-6"}
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["step"], outcome["steps"]) == ("finished", 6, 9)
    assert outcome["early_stopping"]
    verify(run / "best")
    about = json.loads((run / "best" / "best.json").read_text())
    assert about == {"metric": "loss", **found[0]}
    assert not list((run / "best").glob("training_state*"))
    model, encoder, spec = load_model(run / "best")
    for number, (name, place) in enumerate((("all", small_shards), ("some", up_down))):
        index = ShardIndex.open(place)
        clips = ClipBatches([ClipSource(index, spec.prompts[name], number)], encoder, frame_choice(spec))
        with torch.no_grad():
            views_3NC = torch.stack(
                [
                    torch.cat([model(**clips[Request((i,), crop=crop)].model_inputs()) for i in range(len(index))])
                    for crop in range(3)
                ]
            )[:, :, : len(index.labels)]
        scores_NC, labels_N = views_3NC.double().softmax(-1).mean(0), torch.from_numpy(index.label).long()
        expected = found[0]["metrics"][name]
        assert expected["seen"] == len(index)
        assert nll_loss(scores_NC.log(), labels_N).item() == pytest.approx(expected["loss"], abs=1e-4)
        assert (scores_NC.argmax(1) == labels_N).double().mean().item() == pytest.approx(expected["top1"])


@pytest.mark.launch
def test_a_resumed_run_goes_on_with_the_best_of_before(
    runs: Path, small_shards: Path, up_down: Path, tmp_path: Path
) -> None:
    """Killed after its first evaluation, whose checkpoint is whole, and half-way through a row of the second."""
    whole = (runs / "best" / "evaluations.jsonl").read_text()
    first, second = whole.splitlines(keepends=True)
    shutil.copytree(runs / "best" / "checkpoint-3", tmp_path / "best" / "checkpoint-3")
    (tmp_path / "best" / "evaluations.jsonl").write_text(first + second[:30])
    recipe = best_recipe(tmp_path, small_shards, up_down, resume_from_checkpoint="latest")
    done = launch.deepspeed(2, "launch/train.py", recipe, log=tmp_path / "log")
    assert done.code == 0, done.output[-4000:]
    assert "no better for 1 evaluations: stopped early" in done.output
    assert (tmp_path / "best" / "evaluations.jsonl").read_text() == whole
    assert {path.name for path in (tmp_path / "best").glob("checkpoint*")} == {"checkpoint-3", "checkpoint-6"}
    listed = [json.loads((top / "best" / "best" / "MANIFEST.json").read_text())["files"] for top in (runs, tmp_path)]
    for files in listed:
        del files["config.yaml"]  # names the folder
    assert listed[0] == listed[1]
