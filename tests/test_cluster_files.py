"""The files for cluster managers: run against stand-ins for the managers' commands, and Kubernetes' schemas."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.support import fake_deepspeed
from tests.support.launch import PYTHON, ROOT, run, start
from vidcls.faults.exits import Exit
from vidcls.options import RunOptions

SLURM = ROOT / "launch" / "slurm.sbatch"
NODE = ROOT / "launch" / "kubernetes" / "node.sh"
JOB = ROOT / "launch" / "kubernetes" / "job.yaml"
KUBERNETES = "1.37"
RECIPE = {
    "model_name_or_path": "tiny",
    "output_dir": "out",
    "per_device_train_batch_size": 1,
    "train_batch_size": 16,
    "max_steps": 100,
}
# What stand-ins for commands are told is written beside them.
COMMANDS = {
    "scontrol": """
if [ "$1" = show ]; then printf 'node1\\nnode2\\n'; else echo "$@" >>"$(dirname "$0")/told"; fi
""",
    "ssh": """
exit 0
""",
}


@pytest.fixture
def checkout(tmp_path: Path, small_shards: Path) -> Path:
    """A repository of links, whose environment puts a folder of stand-ins in front of PATH."""
    folder = tmp_path / "checkout"
    (folder / "launch").mkdir(parents=True)
    (folder / "commands").mkdir()
    for name in ("vidcls", "tools", "ds_configs", "launch/supervise.py", "launch/train.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "launch" / "setup_env.sh").write_text(
        f'cd "{folder}"\nexport PATH="{folder}/deepspeed:{folder}/commands:{Path(PYTHON).parent}:$PATH"\n'
    )
    for name, program in COMMANDS.items():
        (folder / "commands" / name).write_text(f"#!/bin/sh{program}")
        (folder / "commands" / name).chmod(0o755)
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, "dataset": str(small_shards)}))
    return folder


@pytest.fixture
def slurm(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The command Slurm would run, in its environment: the second job in a row, of two nodes with four GPUs."""
    for name, value in {
        "SLURM_SUBMIT_DIR": str(checkout),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "42",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_RESTART_COUNT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    copied = shutil.copy(SLURM, checkout / "slurm_script")  # as slurmd does
    return ["bash", copied, "recipe.yaml", "seed=7"]


def told(checkout: Path) -> str:
    path = checkout / "commands" / "told"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("script", [SLURM, NODE])
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=60)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "--external-sources", "--source-path", ROOT, script], check=True, timeout=60)


@pytest.mark.launch
def test_slurm_runs_to_the_end(
    checkout: Path, slurm: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first job looks at its nodes before the launch; what is wrong there (no probe answers here) is only told."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    fake_deepspeed.install(checkout / "deepspeed", [{"steps": 2, "outcome": "finished"}])
    done = run(slurm, log=tmp_path / "log")
    assert done.code == 0, done.output
    assert "FAIL node2 code: the probe ended" in done.output
    assert "the doctor found faults; going on" in done.output
    (launch,) = fake_deepspeed.launches(checkout / "deepspeed")
    assert launch["hosts"] == ["node1 slots=4", "node2 slots=4"]
    assert told(checkout) == ""


@pytest.mark.launch
@pytest.mark.parametrize(
    ("sent", "requeued"), [(signal.SIGUSR1, "requeue 42\n"), (signal.SIGTERM, ""), (None, "")], ids=str
)
def test_slurm_saves_and_goes_on_in_a_new_job(
    checkout: Path, slurm: list[object], tmp_path: Path, sent: signal.Signals | None, requeued: str
) -> None:
    """The time limit's signal: saved, 75, requeued. Anyone else who wants it to stop gets just that."""
    fake_deepspeed.install(checkout / "deepspeed", [{"steps": 2, "hangs": True}])
    process = start(slurm, log=tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while not (checkout / "out" / "checkpoint-2" / "MANIFEST.json").exists() and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.1)
        if sent is None:
            (checkout / "out" / "STOP").touch()
        else:
            os.kill(process.pid, sent)  # the batch shell alone, as --signal=B: does
        assert process.wait(120) == Exit.STOPPED, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert told(checkout) == requeued
    assert json.loads((checkout / "out" / "outcome.json").read_text())["outcome"] == "stopped"


@pytest.mark.launch
def test_slurm_does_not_repeat_a_mistake(checkout: Path, slurm: list[object], tmp_path: Path) -> None:
    fake_deepspeed.install(checkout / "deepspeed", [{}])
    done = run([*slurm, "learning_rat=1"], log=tmp_path / "log")
    assert done.code == Exit.USER_ERROR
    assert "learning_rat" in done.output
    assert fake_deepspeed.launches(checkout / "deepspeed") == []
    done = run(slurm[:2], log=tmp_path / "log")
    assert (done.code, done.output) == (2, "error: no recipe; sbatch launch/slurm.sbatch RECIPE.yaml [key=value ...]\n")
    assert told(checkout) == ""


def test_slurm_gives_the_run_time_to_save() -> None:
    text = SLURM.read_text()
    notice = int(re.search(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)[1])  # type: ignore[index]
    limit = int(re.search(r"--stop-timeout (\d+)", text)[1])  # type: ignore[index]
    assert RunOptions.model_fields["stop_timeout"].default <= limit < notice


def node(checkout: Path, deepspeed: str, tmp_path: Path) -> tuple[int, str]:
    """(exit code, output) of node.sh as pod 1 of 2, with this program as deepspeed."""
    (checkout / "launch" / "kubernetes").mkdir()
    script = Path(shutil.copy(NODE, checkout / "launch" / "kubernetes"))
    (checkout / "commands" / "deepspeed").write_text(f"#!/bin/sh\n{deepspeed}\n")
    (checkout / "commands" / "deepspeed").chmod(0o755)
    (checkout / "commands" / "sleep").write_text("#!/bin/sh\n")  # the waits are counted, not waited for
    (checkout / "commands" / "sleep").chmod(0o755)
    environment = {
        "PATH": f"{checkout}/commands:{os.environ['PATH']}",
        "NODES": "2",
        "SLOTS": "8",
        "NODE_RANK": "1",
        "MASTER_ADDR": "localhost",
        "OUTPUT_DIR": str(tmp_path / "out"),
    }
    done = subprocess.run(
        ["bash", script, "r.yaml", "prompt=a  b"], env=environment, capture_output=True, text=True, cwd="/", timeout=60
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("outcome", "left_with", "code"),
    [
        ("finished", 0, 0),
        ("stopped", 0, 71),  # deepspeed leaves with 0 when its launcher was killed
        (None, 0, 71),
        ("finished", 76, 76),
        (None, 2, 2),
    ],
)
def test_a_pod_succeeds_only_when_the_run_has_finished(
    checkout: Path, tmp_path: Path, outcome: str | None, left_with: int, code: int
) -> None:
    program = f'for word in "$@"; do echo "<$word>"; done; cat "$2"; pwd; exit {left_with}'
    if outcome:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "outcome.json").write_text(json.dumps({"outcome": outcome, "step": 3}))
    found, output = node(checkout, program, tmp_path)
    assert found == code, output
    assert "node0 slots=8\nnode1 slots=8\n" + str(checkout) in output
    words = re.findall("<(.*)>", output)
    assert words[2:8] == ["--no_ssh", "--node_rank", "1", "--master_addr", "localhost", "--master_port"]
    assert words[9:] == [
        "launch/train.py",
        "r.yaml",
        "prompt=a  b",
        "resume_from_checkpoint=latest",
        f"output_dir={tmp_path / 'out'}",
    ]


def documents() -> dict[str, Any]:
    return {document["kind"]: document for document in yaml.safe_load_all(JOB.read_text())}


def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["spec"]["template"]["spec"]


def test_the_manifest_is_what_kubernetes_takes() -> None:
    found = documents()
    assert list(found) == ["Service", "PersistentVolumeClaim", "Job"]
    for document in found.values():
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def rename(place: dict[str, Any], old: str, new: str) -> None:
    place[new] = place.pop(old)


@pytest.mark.parametrize(
    "break_it",
    [
        lambda job: rename(job["spec"], "completionMode", "completionmode"),
        lambda job: job["spec"].update(completions="two"),
        lambda job: job["spec"].pop("template"),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][0].pop("action"),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"].update(values=["2"]),
        lambda job: pod(job).update(restartPolicy=0),
        lambda job: pod(job).update(terminationGracePeriodSeconds="360s"),
        lambda job: pod(job).pop("containers"),
        lambda job: pod(job)["containers"][0].pop("name"),
        lambda job: pod(job)["containers"][0]["env"].append({"name": "X", "value": 8}),
        lambda job: pod(job)["containers"][0].update(command="bash node.sh"),
        lambda job: pod(job)["containers"][0]["volumeMounts"][0].pop("mountPath"),
        lambda job: rename(pod(job)["volumes"][1]["emptyDir"], "sizeLimit", "sizelimit"),
        lambda job: rename(pod(job)["containers"][0]["lifecycle"], "preStop", "prestop"),
        lambda job: pod(job)["containers"][0]["resources"]["limits"].update({"nvidia.com/gpu": [8]}),
    ],
)
def test_a_broken_manifest_is_refused(break_it: Callable[[dict[str, Any]], object]) -> None:
    job = copy.deepcopy(documents()["Job"])
    break_it(job)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def test_the_manifest_agrees_with_itself_and_with_the_run() -> None:
    """What no schema sees: numbers and names that must be the same in two places."""
    found = documents()
    job, service, claim = found["Job"], found["Service"], found["PersistentVolumeClaim"]
    (train,) = pod(job)["containers"]
    environment = {entry["name"]: entry.get("value") for entry in train["env"]}
    name = job["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(environment["NODES"])
    assert train["resources"]["limits"]["nvidia.com/gpu"] == int(environment["SLOTS"])
    assert service["spec"]["selector"] == {"job-name": name}  # a label that the Job's controller sets
    assert service["metadata"]["name"] == pod(job)["subdomain"]
    assert environment["MASTER_ADDR"] == f"{name}-0.{pod(job)['subdomain']}"
    mounts = {mount["name"]: mount["mountPath"] for mount in train["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(job)["volumes"]}
    assert set(mounts) == set(volumes)
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert mounts["shm"] == "/dev/shm"
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert environment["OUTPUT_DIR"].startswith(f"{mounts['runs']}/")
    assert pod(job)["terminationGracePeriodSeconds"] > RunOptions.model_fields["stop_timeout"].default
    ends = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (ends["containerName"], ends["values"]) == (train["name"], [Exit.USER_ERROR, Exit.DIVERGED])
    needed = set(re.findall(r"\$\{?([A-Z]+(?:_[A-Z]+)*)\b", NODE.read_text())) - {"BASH_SOURCE"}
    assert needed <= set(environment)
    assert (ROOT / train["command"][1]).is_file()
    assert (ROOT / train["args"][0]).is_file()
