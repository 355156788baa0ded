"""What each launch is told."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from vidcls.config import Config, config_from_values
from vidcls.supervision.command import parse_command
from vidcls.supervision.launches import SSH_OPTIONS, free_port, launch_environment, launcher_options, start_from
from vidcls.supervision.places import Places

DEEPSPEED = str(Path(sys.executable).parent / "deepspeed")
LATEST = ("latest", "false")


def config(tmp_path: Path, **values: Any) -> Config:
    base = {
        "model_name_or_path": "tiny",
        "dataset": "data/x",
        "num_action_classes": 4,
        "per_device_train_batch_size": 2,
    }
    return config_from_values({**base, "max_steps": 4, "output_dir": str(tmp_path / "run"), **values})


def checkpoint(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "training_state.json").write_text(f'{{"step": {step}}}')
    return folder


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path, begun: bool) -> None:
    for given in ({}, {"resume_from_checkpoint": "latest"}):
        keys = start_from(config(tmp_path, **given), begun=begun, newest=None)
        assert tuple(keys.values()) == LATEST


def test_an_earlier_run_is_deleted_once(tmp_path: Path) -> None:
    """Also when the first launch did not come so far: `latest` would then go on with what should be deleted."""
    options = config(tmp_path, overwrite_output_dir=True)
    old = checkpoint(tmp_path / "run" / "checkpoint-9", 9)
    keys = start_from(options, begun=False, newest=old)
    assert tuple(keys.values()) == (None, "true")
    assert tuple(start_from(options, begun=True, newest=None).values()) == LATEST


def test_a_checkpoint_of_the_same_folder_is_gone_on_from_once(tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "run" / "checkpoint-4", 4)
    later = checkpoint(tmp_path / "run" / "checkpoint-8", 8)
    options = config(tmp_path, resume_from_checkpoint=str(given))
    assert tuple(start_from(options, begun=False, newest=later).values()) == (str(given), "false")
    assert tuple(start_from(options, begun=True, newest=given).values()) == LATEST


def test_a_checkpoint_of_another_folder_is_gone_on_from_until_there_is_a_newer_one(tmp_path: Path) -> None:
    given = checkpoint(tmp_path / "other" / "checkpoint-4", 4)
    options = config(tmp_path, resume_from_checkpoint=str(given))
    assert tuple(start_from(options, begun=False, newest=None).values()) == (str(given), "false")
    # the folder has files by now; with a resume nothing in it is deleted
    assert tuple(start_from(options, begun=True, newest=None).values()) == (str(given), "true")
    newer = checkpoint(tmp_path / "run" / "checkpoint-5", 5)
    assert tuple(start_from(options, begun=True, newest=newer).values()) == LATEST


def options_for(words: list[str], places: Places | None, hosts: dict[str, int]) -> dict[str, Any]:
    command = parse_command([DEEPSPEED, *words, "launch/train.py", "r.yaml"])
    return launcher_options(command, places, hosts, Path("/tmp/h"), 1234)


def test_the_launcher_gets_the_hosts_of_the_launch() -> None:
    places = Places({"a": 2, "b": 2}, lambda hosts: dict.fromkeys(hosts))
    given = ["-H", "hosts", "--num_nodes=2", "--num_gpus=2", "--master_addr=10.0.0.1"]
    both = options_for(given, places, {"a": 2, "b": 2})
    assert both == {"hostfile": "/tmp/h", "num_nodes": None, "num_gpus": None, "master_port": 1234}
    # one host left: without force_multi DeepSpeed would start its ranks on this host
    left = options_for(given, places, {"b": 2})
    assert left == {**both, "force_multi": True, "master_addr": None}
    assert options_for(["--num_gpus=4"], None, {"localhost": 3}) == {"num_gpus": 3, "master_port": 1234}
    assert options_for([], None, {}) == {"master_port": 1234}


def test_ports_are_free_and_never_used_again() -> None:
    used: set[int] = set()
    with socket.socket() as busy:
        busy.bind(("", 0))
        ports = [free_port(used) for _ in range(50)]
        assert busy.getsockname()[1] not in ports
    assert len(set(ports)) == 50
    assert all(20000 <= port < 30000 for port in ports)


def test_the_users_ssh_options_follow_ours() -> None:
    assert launch_environment({"A": "1"}) == {"A": "1", "PDSH_SSH_ARGS_APPEND": SSH_OPTIONS}
    assert launch_environment({"PDSH_SSH_ARGS_APPEND": "-p 22"})["PDSH_SSH_ARGS_APPEND"] == f"{SSH_OPTIONS} -p 22"
