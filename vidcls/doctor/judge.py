"""What is wrong with hosts, from the facts they told: pure functions, one a check."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from vidcls.doctor.findings import FAIL, WARN, Finding

GB = 1e9
CLOCK_WARN, CLOCK_FAIL = 2.0, 30.0  # seconds
MEMORY_WARN, MEMORY_FAIL = 3 * GB, 1 * GB  # of memory for each rank; importing DeepSpeed alone takes 0.7 GB
SHM_PER_RANK = 72e6  # DeepSpeed's buffer on CPU has 69 MB; NCCL's segments are about as large
SPACE_WARN, SPACE_FAIL = 10 * GB, 1 * GB
LINK_WARN = 100e6  # bytes a second: a gigabit
OPEN_FILES, PROCESSES = 1024, 4096
Facts = Mapping[str, Mapping[str, Any]]
"""host -> what probe's facts.gather told of it"""


def judge_code(facts: Facts, environment: str) -> Iterator[Finding]:
    """Versions and sources must be those of most hosts. environment: how an environment is made, for the fix."""
    kinds = {"Python": {host: told["python"] for host, told in facts.items()}}
    packages = next(iter(facts.values()))["packages"]
    kinds |= {name: {host: told["packages"][name] for host, told in facts.items()} for name in packages}
    kinds["vidcls' sources"] = {host: told["vidcls"]["digest"][:12] for host, told in facts.items()}
    for what, versions in kinds.items():
        usual = Counter(versions.values()).most_common(1)[0][0]  # of as many, the first host's
        example = next(host for host, version in versions.items() if version == usual)
        for host, version in versions.items():
            if version is None:
                yield Finding(host, "code", FAIL, f"{what} is not installed", environment)
            elif version != usual and usual is not None:
                same = what == "Python" and version.split(".")[:2] == usual.split(".")[:2]
                sources = what.startswith("vidcls")
                fix = f"copy the checkout of {example} there, with the same local changes" if sources else environment
                text = f"{what} {version}, but {usual} on {example}"
                yield Finding(host, "code", WARN if same else FAIL, text, fix)


def judge_same_machine(facts: Facts) -> Iterator[Finding]:
    seen: dict[tuple[str, str], str] = {}
    for host, told in facts.items():
        first = seen.setdefault((told["boot"], told["hostname"]), host)
        if first != host:
            text = f"{host} and {first} are one machine ({told['hostname']})"
            yield Finding(host, "launch", FAIL, text, "name it once in the hostfile, with all its slots")


def judge_clock(host: str, offset: float, uncertainty: float) -> Iterator[Finding]:
    """offset: seconds that the host is ahead of the coordinator, known to within `uncertainty`."""
    at_least = abs(offset) - uncertainty
    if at_least > CLOCK_WARN:
        text = f"its clock is {abs(offset):.1f} s {'ahead' if offset > 0 else 'behind'}"
        level = FAIL if at_least > CLOCK_FAIL else WARN
        yield Finding(host, "clock", level, text, "start its time service: timedatectl set-ntp true")


def judge_memory(host: str, told: Mapping[str, Any], ranks: int) -> Iterator[Finding]:
    """Memory, /dev/shm and what dead runs left in it. ranks: to be started there."""
    available, shm = told["memory"]["available"], told["shm"]
    share = available / ranks
    if share < MEMORY_WARN:
        text = f"{available / GB:.1f} GB of {told['memory']['total'] / GB:.1f} GB memory free for {ranks} ranks"
        level = FAIL if share < MEMORY_FAIL else WARN
        yield Finding(host, "memory", level, text, "end what else runs there, or lower its slots")
    if shm["free"] < ranks * SHM_PER_RANK:
        text = f"/dev/shm: {shm['free'] / 1e6:.0f} MB free, {ranks} ranks need {ranks * SHM_PER_RANK / 1e6:.0f} MB"
        fix = "mount it larger: docker run --shm-size 8g, in Kubernetes a volume of medium Memory"
        yield Finding(host, "memory", FAIL, text, fix)
    if shm["left"]:
        size = sum(shm["left"].values()) / 1e6
        text = f"/dev/shm: {len(shm['left'])} buffers of dead runs hold {size:.0f} MB of memory"
        more = " ..." if len(shm["left"]) > 3 else ""
        yield Finding(host, "memory", WARN, text, f"in /dev/shm there: rm {' '.join(sorted(shm['left'])[:3])}{more}")


def judge_limits(host: str, told: Mapping[str, Any]) -> Iterator[Finding]:
    limits, fix = told["limits"], "raise it for ssh sessions too: /etc/security/limits.conf, and `ssh HOST ulimit -a`"
    for name, least in (("open files", OPEN_FILES), ("processes", PROCESSES)):
        if limits[name] is not None and limits[name] < least:
            yield Finding(host, "limits", WARN, f"limit of {name}: {limits[name]}, less than {least}", fix)
    for name in ("address space", "file size", "processor time"):
        if limits[name] is not None:
            yield Finding(host, "limits", WARN, f"limit of {name}: {limits[name]} (ulimit); a run may end on it", fix)
    if told["infiniband"] and limits["locked memory"] is not None:
        text = f"limit of locked memory: {limits['locked memory']}; InfiniBand wants it unlimited"
        yield Finding(host, "limits", WARN, text, fix)
    if told["tasks_left"] is not None and told["tasks_left"] < PROCESSES // 4:
        text = f"its container or service may start {told['tasks_left']} more threads"
        yield Finding(host, "limits", WARN, text, "raise pids.max (docker --pids-limit, systemd TasksMax)")


def judge_build(host: str, told: Mapping[str, Any]) -> Iterator[Finding]:
    harm = "DeepSpeed's optimizer cannot be compiled, torch's takes its place"
    fixes = {
        "ninja": "make the environment anew: source launch/setup_env.sh",
        "nvcc": "install the CUDA toolkit of torch's version, and set CUDA_HOME",
    }
    for tool, fault in told["build"].items():
        if fault is not None and (tool != "nvcc" or told["accelerators"]):
            fix = fixes.get(tool, "install a C++ compiler and Python's headers: apt-get install g++ python3-dev")
            yield Finding(host, "build", WARN, f"{tool}: {fault}: {harm}", fix)


def judge_slots(facts: Facts, seen: Mapping[str, Mapping[str, Any]], slots: Mapping[str, int]) -> Iterator[Finding]:
    """Accelerators against slots. seen: what torch told of each host. slots: of the hostfile; {} without one."""
    counts = {host: told["count"] for host, told in seen.items() if "error" not in told}
    for host, told in seen.items():
        if "error" in told:
            yield Finding(host, "code", FAIL, told["error"], "install the environment there anew")
    for host, count in counts.items():
        devices, wanted = facts[host]["accelerators"], slots.get(host)
        if devices and not count:
            said = seen[host]["warnings"]
            text = f"{devices} accelerators, but torch sees none{': ' + said[-1] if said else ''}"
            yield Finding(host, "slots", FAIL, text, "make driver and torch's build fit; see nvidia-smi there")
        elif not count and any(counts.values()):
            yield Finding(host, "slots", FAIL, "no accelerator, but others have some", "take it out of the hostfile")
        elif count and wanted is not None and wanted != count:
            text = f"slots={wanted} for {count} accelerators"
            yield Finding(host, "slots", FAIL if wanted > count else WARN, text, f"write slots={count} in the hostfile")
        elif not count and wanted is not None and wanted > facts[host]["cpus"]:
            text = f"slots={wanted} on {facts[host]['cpus']} processors"
            yield Finding(host, "slots", WARN, text, "lower its slots: ranks that share a processor slow all down")


def judge_own_name(host: str, told: Mapping[str, Any], has_interface: bool) -> Iterator[Finding]:
    """gloo tells other ranks the address of the host's own name. has_interface: GLOO_SOCKET_IFNAME is given instead."""
    own, name = told["own_address"], told["hostname"]
    if has_interface or (own is not None and not ipaddress.ip_address(own.partition("%")[0]).is_loopback):
        return
    text = f"its own name {name} {'does not resolve' if own is None else f'is {own}, which others cannot reach'}"
    fix = f"give {name} its network address in /etc/hosts there, or set GLOO_SOCKET_IFNAME in .deepspeed_env"
    yield Finding(host, "peers", FAIL, text, fix)


def judge_master(host: str, told: str) -> Iterator[Finding]:
    """told: what `ssh HOST hostname -I` printed; DeepSpeed takes the first word for the rendezvous."""
    first = next(iter(told.split()), None)
    fix = f"launch with --master_addr {host.rpartition('@')[2]}"
    if first is None:
        yield Finding(host, "peers", FAIL, "hostname -I prints nothing: DeepSpeed finds no rendezvous address", fix)
        return
    try:
        ipaddress.ip_address(first)
    except ValueError:
        text = f"hostname -I over ssh begins with {first!r}, which DeepSpeed takes for the rendezvous address"
        fix = f"have the shell's start files print nothing without a terminal, or {fix}"
        yield Finding(host, "peers", FAIL, text, fix)


def judge_space(host: str, told: Mapping[str, Any]) -> Iterator[Finding]:
    """told: of folders.nearest"""
    if told["free"] < SPACE_WARN:
        level = FAIL if told["free"] < SPACE_FAIL else WARN
        text = f"{told['folder']}: {told['free'] / GB:.1f} GB of {told['total'] / GB:.1f} GB free"
        yield Finding(host, "folder", level, text, "make room: a checkpoint needs its size twice while it is written")


def judge_link(host: str, base: str, speed: Mapping[str, float], usual: float) -> Iterator[Finding]:
    """speed: bytes a second `up` and `down`. usual: the median of the other hosts' slower ways."""
    slow = min(speed.values())
    if slow < LINK_WARN or slow < usual / 4:
        text = f"{speed['up'] / 1e6:.0f} MB/s to {base}, {speed['down'] / 1e6:.0f} MB/s back"
        other = f" (other hosts: {usual / 1e6:.0f})" if slow < usual / 4 else " (a gigabit is 118)"
        yield Finding(host, "link", WARN, text + other, "look for a bad cable or port (ethtool), or another network")
