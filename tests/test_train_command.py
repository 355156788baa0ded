"""launch/train.py as a user meets it: what it writes, what it refuses, and that it leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support import launch
from tests.support.own_forwards import with_own_forwards

RECIPE = "launch/recipes/quickstart.yaml"


def arguments(shards: Path, output_dir: Path, *overrides: str) -> list[str]:
    return [
        RECIPE,
        f"dataset={shards}",
        f"output_dir={output_dir}",
        "per_device_train_batch_size=2",
        "max_steps=6",
        "save_steps=2",
        "save_total_limit=2",
        "logging_steps=2",
        *overrides,
    ]


@pytest.fixture(scope="module")
def finished_run(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    words = arguments(small_shards, folder / "run")
    done = launch.deepspeed(2, "launch/train.py", *words, log=folder / "log")
    assert done.code == 0, done.output[-3000:]
    return folder / "run"


@pytest.mark.launch
def test_the_output_folder_has_what_is_promised(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names == {
        "config.yaml",
        "train_log.jsonl",
        "training_loss.png",
        "report.html",
        "tensorboard",
        "outcome.json",
        "run.lock",
        "checkpoint-4",
        "checkpoint-6",
    }
    rows = [json.loads(line) for line in (finished_run / "train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    columns = {"step", "loss", "lr", "grad_norm", "top1", "samples_per_second", "data_wait_fraction"}
    assert all(row.keys() - {"save_stall_seconds"} == columns for row in rows)
    assert abs(rows[0]["loss"] - np.log(4)) < 0.7
    picture = np.asarray(Image.open(finished_run / "training_loss.png").convert("RGB"))
    assert picture.std() > 5
    top = finished_run / "checkpoint-6"
    checkpoint = {str(path.relative_to(top)) for path in top.rglob("*")}
    assert checkpoint >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "heads/default/action_decoder.safetensors",
        "action_token.safetensors",
        "heads/default/label_map.json",
        "tokenizer.json",
        "training_state-00001-of-00002.safetensors",
        "training_state-00002-of-00002.safetensors",
        "MANIFEST.json",
        "COMPLETE",
    }


@pytest.mark.launch
def test_tensorboard_reads_the_events(finished_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.launch
def test_plain_peft_and_transformers_load_the_checkpoint(finished_run: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    from vidcls.model.pretrained import load_model
    from vidcls.model.tiny import tiny_backbone

    checkpoint = finished_run / "checkpoint-6"
    tiny_backbone().save_pretrained(tmp_path / "base")
    base = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    plain = PeftModel.from_pretrained(base, str(checkpoint), autocast_adapter_dtype=False).get_base_model()
    ours: Any = with_own_forwards(load_model(checkpoint)[0].inner)
    base_alone = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    embeds = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        states = [m.language_model(inputs_embeds=embeds).last_hidden_state for m in (plain, ours, base_alone)]
    assert torch.equal(states[0], states[1])
    assert not torch.allclose(states[0].float(), states[2].float(), atol=0.01)  # the adapter does something
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer("<ACTION>", add_special_tokens=False).input_ids) == 1


@pytest.mark.launch
def test_a_flipped_bit_is_not_evaluated(finished_run: Path, small_shards: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "checkpoint-6"
    shutil.copytree(finished_run / "checkpoint-6", copy)
    data = bytearray((copy / "heads" / "default" / "action_decoder.safetensors").read_bytes())
    data[-3] ^= 1
    (copy / "heads" / "default" / "action_decoder.safetensors").write_bytes(data)
    words = [launch.PYTHON, "launch/evaluate.py", copy, "--data", small_shards, "--out", tmp_path / "out"]
    done = launch.run(words, log=tmp_path / "log")
    assert done.code == 2
    assert "action_decoder.safetensors is damaged" in done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.launch
def test_ready_to_use_mistakes_are_answered_once_and_nothing_is_written(small_shards: Path, tmp_path: Path) -> None:
    """Mistakes that only show once the launcher runs; both ranks find them, one speaks."""
    words = arguments(small_shards, tmp_path / "run", "num_action_classes=101")
    done = launch.deepspeed(2, "launch/train.py", *words, log=tmp_path / "log")
    assert done.code == 2
    assert done.output.count("error: num_action_classes: 101, but the shards in") == 1
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
def test_a_hostfile_that_does_not_exist_is_refused(small_shards: Path, tmp_path: Path) -> None:
    words = [launch.DEEPSPEED, "--hostfile", tmp_path / "nohosts", "--num_gpus", 1, "--master_port"]
    words += [launch.free_port(), "launch/train.py", *arguments(small_shards, tmp_path / "run")]
    done = launch.run(words, log=tmp_path / "log")
    assert done.code == 2
    assert "nohosts' is not a file; DeepSpeed would train on this host alone" in done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cutoff_len=20"], "needs .* tokens .* cutoff_len allows 20"),
        (["model_name_or_path=/nowhere"], "model is '/nowhere'; it must be 'tiny' or a local folder"),
        (["dataset=/nowhere"], "/nowhere/index.json: cannot be read"),
        (["resume_from_checkpoint=/nowhere"], "/nowhere is not a whole checkpoint"),
        (["flash_attn=fa2", "bf16=false"], "flash_attn: 'fa2' needs bf16"),
        (["lr_scheduler_kwargs={min_lr: 0.1}"], "lr_scheduler_kwargs"),
        (["val_size=26", "eval_strategy=epoch"], "val_size: 26 of 26 clips leaves none to train on"),
    ],
)
def test_mistakes_in_one_process(
    small_shards: Path, tmp_path: Path, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    from vidcls import distributed
    from vidcls.config import load_config
    from vidcls.training.setup import setup

    monkeypatch.setattr(distributed, "start", lambda *limits: None)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.chdir(launch.ROOT)
    words = arguments(small_shards, tmp_path / "run", *overrides)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is checked below
        setup(load_config(words[0], words[1:]))
    assert re.search(message, str(caught.value)), caught.value
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    from vidcls.config import load_config
    from vidcls.training.setup import setup

    copy = tmp_path / "shards"
    shutil.copytree(small_shards, copy)
    (copy / "shard-000001.tar").unlink()
    monkeypatch.chdir(launch.ROOT)
    words = arguments(copy, tmp_path / "run")
    with pytest.raises(ValueError, match=r"1 of 3 files cannot be used: shard-000001.tar is missing"):
        setup(load_config(words[0], words[1:]))


def start_long_run(shards: Path, folder: Path) -> tuple[int, int, Path]:
    """A run with far more steps than it will live for; (session id, master port, its log)."""
    overrides = ("max_steps=100000", "save_steps=100000", "logging_steps=1", "report_to=none")
    words = launch.launcher_words(2, "launch/train.py", *arguments(shards, folder / "run", *overrides))
    process = launch.start(words, log=folder / "log")
    deadline = time.monotonic() + 240
    while "step 3/" not in (folder / "log").read_text():
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
        assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
        time.sleep(0.3)
    return process.pid, int(str(words[4])), folder / "log"


def port_is_free(port: int, seconds: float) -> bool:
    """Whether a listener can be opened; the kernel closes a dying process's sockets a moment after it is gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return True
        time.sleep(0.2)
    return False


def is_rank(process: psutil.Process) -> bool:
    # The loader's workers are forks with the same command line; a rank's parent is the launcher.
    return "--local_rank=1" in process.cmdline() and "deepspeed.launcher.launch" in process.parent().cmdline()


@pytest.mark.launch
@pytest.mark.parametrize("victim", ["rank", "launcher", "interrupt"])
def test_a_killed_run_leaves_no_process_port_or_buffer(small_shards: Path, tmp_path: Path, victim: str) -> None:
    session, port, log = start_long_run(small_shards, tmp_path)
    try:
        assert not launch.shared_buffers(), "the buffers' names should be gone while the run is still going"
        if victim == "rank":
            [rank] = [p for p in launch.session_processes(session) if is_rank(p)]
            os.kill(rank.pid, signal.SIGKILL)
        elif victim == "launcher":
            os.kill(session, signal.SIGKILL)
        else:
            os.killpg(session, signal.SIGINT)  # Ctrl-C as a terminal sends it
        left = launch.wait_until_gone(session, 40)
        assert not left, f"{left}\n{log.read_text()[-2000:]}"
    finally:
        launch.end_session(session)
    assert not launch.shared_buffers()
    assert port_is_free(port, seconds=10)
