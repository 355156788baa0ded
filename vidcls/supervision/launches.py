"""What each launch is told: where to go on from, on which hosts, with which batch, at which port."""

from __future__ import annotations

import random
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidcls.batch_plan import BatchPlan, batch_plan
from vidcls.config import Config, ConfigError
from vidcls.options import OptimOptions
from vidcls.supervision.command import Command
from vidcls.supervision.elastic import Layout, fit
from vidcls.supervision.folder import global_batch_of, step_of
from vidcls.supervision.places import Places

PORTS = (20000, 29999)  # below those that the kernel gives to outgoing connections
SSH_OPTIONS = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o ConnectTimeout=5 -o BatchMode=yes"
THIS_HOST = "localhost"


def start_from(config: Config, *, begun: bool, newest: Path | None) -> dict[str, Any]:
    """The keys that say where a launch goes on from.

    Args:
        begun: an earlier launch of this supervisor has opened the output folder; what was in it before is gone.
        newest: the newest checkpoint in it.
    """
    wanted, overwrite = config.run.resume_from_checkpoint, config.run.overwrite_output_dir
    latest = {"resume_from_checkpoint": "latest", "overwrite_output_dir": "false"}
    as_given = {"resume_from_checkpoint": wanted, "overwrite_output_dir": str(overwrite).lower()}
    if wanted is None or wanted == "latest":
        return latest if begun or not overwrite else as_given
    inside = Path(wanted).resolve().parent == Path(config.run.output_dir).resolve()
    if begun and newest is not None and (inside or step_of(newest) > step_of(Path(wanted))):
        return latest
    # From another folder's checkpoint, before the first one of its own: nothing is deleted in a resume.
    return {**as_given, "overwrite_output_dir": "true"} if begun and not inside else as_given


@dataclass(frozen=True)
class Batch:
    """The global batch, which no change of hosts may change, and the most clips that a rank takes at once: all, where a
    budget of tokens divides them."""

    global_: int
    micro: int

    @classmethod
    def of(cls, optim: OptimOptions, ranks: int | None, resumed: Path | None) -> Batch | None:
        """None where it cannot be known before the run: DeepSpeed counts this host's devices.

        Raises:
            ConfigError: the recipe's batch keys do not fit the ranks.
        """
        if ranks is None:
            return None
        stored = None if optim.train_batch_size is not None else global_batch_of(resumed)
        plan = batch_plan(optim, ranks)
        assert plan is not None
        return cls(stored or plan.global_, plan.micro if optim.max_tokens_per_batch is None else plan.global_)

    def layout(self, hosts: Mapping[str, int]) -> Layout:
        return fit(hosts, self.global_, self.micro)


def batch_keys(optim: OptimOptions, layout: Layout) -> dict[str, Any]:
    """The batch keys for a launch; {} when the recipe's own come to the same."""
    try:
        if batch_plan(optim, layout.ranks) == layout.plan:
            return {}
    except ConfigError:
        pass
    return keys_of(layout.plan)


def keys_of(plan: BatchPlan) -> dict[str, Any]:
    return {
        "train_batch_size": plan.global_,
        "per_device_train_batch_size": plan.micro,
        "gradient_accumulation_steps": plan.accumulation,
    }


def launcher_options(
    command: Command, places: Places | None, hosts: Mapping[str, int], hostfile: Path, port: int
) -> dict[str, Any]:
    """The launcher's options for a launch on `hosts`, which `hostfile` holds."""
    if places is None:
        ranks = {"num_gpus": hosts[THIS_HOST]} if THIS_HOST in hosts else {}
        return {"master_port": port, **ranks}
    options: dict[str, Any] = {"hostfile": str(hostfile), "num_nodes": None, "num_gpus": None, "master_port": port}
    if len(hosts) == 1 and len(places.hosts) > 1:
        options["force_multi"] = True  # or DeepSpeed starts the ranks here instead of there
    if "master_addr" in command.options and next(iter(hosts)) != next(iter(places.hosts)):
        options["master_addr"] = None  # that of the hostfile's first host, which does not take part
    return options


def free_port(used: set[int]) -> int:
    """A port that nothing listens on here, and none of `used`: a rank of an earlier launch may still be there."""
    while True:
        port = random.randint(*PORTS)
        if port in used:
            continue
        with socket.socket() as trial:
            try:
                trial.bind(("", port))
            except OSError:
                continue
        used.add(port)
        return port


def launch_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """With ssh options that notice a lost host within seconds; the user's own follow, and ssh takes the first."""
    own = environment.get("PDSH_SSH_ARGS_APPEND", "")
    return {**environment, "PDSH_SSH_ARGS_APPEND": f"{SSH_OPTIONS} {own}".strip()}
