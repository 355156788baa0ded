"""A run's result in other hands: trained once on real clips, then exported, loaded in every way, and put to use."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import vidcls
from tests.support import launch
from tests.support.real import ucf101_shards
from tests.support.usable import difference, own, served, strangers
from tools.make_motion_clips import write_video
from tools.make_random_checkpoint import write_checkpoint

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def checkpoint(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of six UCF101 classes, in fp32, with a base model in a folder of its own."""
    folder = tmp_path_factory.mktemp("usable")
    recipe = {
        "model_name_or_path": str(write_checkpoint(folder / "base", "tiny")),
        "dataset": str(ucf101_shards(real_data, folder)["train"]),
        "num_action_classes": 6,
        "action_decoder_type": "mlp",
        "per_device_train_batch_size": 12,
        "max_steps": 50,
        "learning_rate": 3e-3,
        "bf16": False,
        "report_to": "none",
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = launch.run([launch.PYTHON, "launch/train.py", folder / "recipe.yaml"], log=folder / "train.log")
    assert done.code == 0, done.output[-3000:]
    return folder / "run" / "checkpoint-50"


def test_exported_and_loaded_in_every_way(real_data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """On 20 real clips of all containers at hand, a rotated one too."""
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    for out, more in ((adapter, []), (merged, ["--merge"])):
        words = [launch.PYTHON, "launch/export.py", checkpoint, "--out", out, *more]
        done = launch.run(words, log=tmp_path / "export.log")
        assert done.code == 0, done.output[-3000:]
        assert f"{out}: " in done.output
        assert "default: 6 classes" in done.output

    clips = sorted((real_data / "ucf101" / "videos").glob("*/*_g0[12]_*.avi"))[:12]
    clips += sorted((real_data / "ssv2" / "videos").iterdir())[:4]
    clips += [path for path in sorted((real_data / "clips").glob("*.m*")) if "corrupted" not in path.name]
    clips += [real_data / "clips" / "RATRACE_wave_f_nm_np1_fr_goo_37.avi"]
    assert len(clips) == 20
    expected = own(checkpoint, clips)
    # Clips that all get the same scores would show nothing.
    assert torch.tensor(expected).std(dim=0).min() > 0.1
    assert difference(own(adapter, clips), expected) == 0
    assert difference(served(adapter, clips), expected) < 1e-3  # scores are rounded to six digits
    assert difference(own(merged, clips), expected) < 1e-5
    # 1e-6 where vidcls decodes with PyAV, as the card does; decord's colours may differ by one in 255.
    assert difference(strangers(adapter, clips), expected) < 5e-4
    assert difference(strangers(merged, clips), expected) < 5e-4


def pictures(video: Path) -> np.ndarray:
    with av.open(str(video)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_timeline_of_two_clips_joined_end_to_end(real_data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Of the two classes that the model knows best, the clip that it is surest of; the change is within a window."""
    clips = sorted((real_data / "ucf101" / "videos").glob("*/*_g1[0-9]_c0[1-3].avi"))
    predictor = vidcls.load(checkpoint)
    surest: dict[str, tuple[float, Path]] = {}
    for found, clip in zip(predictor.predict_many(clips), clips, strict=True):
        name, score = found.ranked()[0]
        if name == clip.parent.name and score > surest.get(name, (0.0, clip))[0]:
            surest[name] = score, clip
    (_, first), (_, second) = sorted(surest.values(), reverse=True)[:2]
    before, after = pictures(first), pictures(second)
    joined = tmp_path / "joined.mp4"
    write_video(joined, np.concatenate([before, after]))
    with av.open(str(joined)) as container:
        rate = float(container.streams.video[0].average_rate)
    change, window = len(before) / rate, 1.5
    words = [launch.PYTHON, "launch/predict.py", checkpoint, joined, "--window", window, "--stride", 0.25, "--json"]
    done = launch.run([*words, "--timeline", tmp_path / "timelines"], log=tmp_path / "log")
    assert done.code == 0, done.output[-3000:]
    (line,) = [line for line in done.output.splitlines() if line.startswith("{")]
    told = json.loads(line)
    assert told["seconds"] == pytest.approx((len(before) + len(after)) / rate, abs=0.05)
    stretches = [each for each in told["stretches"] if each["end"] - each["start"] > 0.3]
    assert stretches[0]["class"] == first.parent.name
    assert stretches[-1]["class"] == second.parent.name
    ends = [each["end"] for each in told["stretches"] if each["class"] == first.parent.name]
    assert min(abs(end - change) for end in ends) <= window
    begins = next(each["start"] for each in told["stretches"] if each["class"] == second.parent.name)
    assert abs(begins - change) <= window
    assert json.loads((tmp_path / "timelines" / "1-joined.json").read_text()) == told
    picture = np.asarray(Image.open(tmp_path / "timelines" / "1-joined.png").convert("RGB"))
    assert picture.std() > 5
