"""Kill a run at random moments, again and again, and prove that nothing was lost.

    python benchmarks/random_kill.py [--kills 100] [--seed 0] [--keep DIR]       about half a minute a kill on two cores

The tiny model trains on 2 ranks (bf16, dropout, augmentation, averaged weights) through the deepspeed launcher: once
straight through, and then in lives. A life starts launch/train.py with resume_from_checkpoint=latest and ends by
SIGKILL; when the kills are used up, or when a life is through before its kill comes, the run finishes. A run that is
finished is compared, and the next begins in a new folder. What is killed, and when, is drawn from --seed:

    when    save    a few milliseconds after a folder of a checkpoint that is being written appears, the first to third
                    of a life
            step    anywhere in the time that some ten steps and three saves take
            start   anywhere before the first step: imports, rendezvous, reading the checkpoint
    whom    rank 0, rank 1, launch.py above them, the `deepspeed` command, or all of them at one blow

Now and then a bit of the newest checkpoint is flipped between two lives, so that there is something to pass over.

After each life: every logged row (loss, grad_norm, lr, top1) and the clips of every step are those of the straight run,
steps that are done again included; the run went on from the newest whole checkpoint, whole by digests taken here, and
passed over damaged ones only; every process is gone; no exit code 0 before the end, except where launch.py was killed:
DeepSpeed's command (0.19.8) drops negative codes, which is why only outcome.json says that a run has finished. Of a
finished run: each clip was taken exactly once in every epoch; weights, averages and Adam moments equal the straight
run's bit for bit. In the end: nothing is left in /dev/shm, but buffers of ranks killed as they started, younger than
the minute after which a later start removes them.

Exit codes: 0 nothing was lost, 1 something was (logs are kept, and named), 2 wrong options.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from processes import ROOT, launched
from rounds import RESULTS, conditions, table, write_json

sys.path.append(str(ROOT))  # tools and tests are no packages that are installed
from tests.support import kills
from tests.support.launch import session_processes, shared_buffers, wait_until_gone
from tests.support.shards import make_shards
from tools.make_motion_clips import make_motion_clips

RANKS, BATCH, PER_CLASS = 2, 6, 7  # 28 clips: every 14 steps are three epochs, whose borders lie within batches
AIMS = {"save": 0.45, "step": 0.4, "start": 0.15}
VICTIMS = {"rank 0": 0.3, "rank 1": 0.3, "launch.py": 0.15, "deepspeed": 0.15, "all": 0.1}
SAVE_SECONDS = 0.08  # from a save's first sign to the kill, at most; a save takes 0.15 s and more
STEP_SECONDS = 2.0
DAMAGE_SHARE = 0.12
BUFFER_SECONDS = 60.0  # after which a start removes what no process has mapped
GONE_SECONDS = 60.0
LIFE_SECONDS = 900.0
TEMPORARY = "checkpoint.tmp-"
Saving = Callable[[], set[str]]  # the folders of checkpoints that this life is writing: one or none
TRAINING = "training  "  # how the line begins after which steps follow
RECIPE: dict[str, Any] = {
    "model_name_or_path": "tiny",
    "lora_rank": 8,
    "lora_dropout": 0.1,
    "train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "learning_rate": 2e-3,
    "bf16": True,
    "ema_decay": 0.9,
    "horizontal_flip": 0.5,
    "random_resized_crop": 0.5,
    "color_jitter": 0.4,
    "save_steps": 3,
    "save_total_limit": 3,
    "logging_steps": 1,
    "log_order": True,
    "plot_loss": False,
    "report_to": "none",
    "deepspeed": "ds_configs/zero2.json",
    "seed": 7,
}
NOTICE_SECONDS = 10.0  # within which ranks whose launcher is gone have left


@dataclass
class Life:
    """From a start to a kill or to the end."""

    number: int
    log: str
    aim: str = "none"
    victim: str = "none"
    killed: bool = False
    hit_a_save: bool = False  # a checkpoint was being written when the kill came
    cut_a_save_short: bool = False  # and never came to be
    damage_planted: str | None = None  # in the newest checkpoint, before this life
    resumed_at: int | None = None
    steps_logged: int = 0  # of the run, when this life was over
    exit_code: int | None = None
    false_success: bool = False  # 0, and outcome.json does not say that the run finished
    seconds: float = 0.0
    seconds_to_gone: float = 0.0  # from the kill until the last process was
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """What all lives share."""

    work: Path
    recipe: Path
    straight: Path
    clips: list[str]
    steps: int
    aims: random.Random
    damages: random.Random
    buffers: dict[str, float] = field(default_factory=dict)  # that lives left in /dev/shm, and when they were over
    starts: list[float] = field(default_factory=list)  # when lives that came as far as training began


@dataclass
class Aim:
    """When one life is to end, and by whose death."""

    when: str
    victim: str
    save: int  # which of the life's
    share: float  # of the time that `when` leaves open

    @classmethod
    def draw(cls, rng: random.Random) -> "Aim":
        when, victim = (rng.choices(list(odds), list(odds.values()))[0] for odds in (AIMS, VICTIMS))
        return cls(when, victim, rng.randint(1, 3), rng.random())


def live(bench: Bench, run: Path, number: int, aim: Aim | None, start_seconds: float) -> Life:
    """Start the run, or go on with it; kill it as `aim` says, or let it end."""
    log = run.with_name(f"{run.name}-life-{number:03d}.log")
    life = Life(number, str(log))
    if aim:
        life.aim = aim.when
    before = kills.checkpoints(run)
    stale, there = _names(run, TEMPORARY), set[str]()

    def saving() -> set[str]:
        return _names(run, TEMPORARY) - stale

    begun, clock = time.monotonic(), time.time()
    with launched(RANKS, [bench.recipe, f"output_dir={run}", "resume_from_checkpoint=latest"], log) as launcher:
        if aim and _wait_for(aim, launcher, saving, log, start_seconds):
            there = _names(run, "checkpoint-")
            _kill(aim, launcher, saving, life)
        killed_at = time.monotonic()
        wait_until_gone(launcher.pid, GONE_SECONDS if life.killed else LIFE_SECONDS)
        for left in session_processes(launcher.pid):
            with contextlib.suppress(psutil.Error):
                about = left.as_dict(["pid", "ppid", "status", "num_threads", "create_time", "cmdline"])
                life.faults.append(f"still there {time.monotonic() - killed_at:.0f} s later: {about}")
    life.seconds_to_gone = round(time.monotonic() - killed_at, 2) if life.killed else 0.0
    life.exit_code = launcher.wait()
    life.seconds = round(time.monotonic() - begun, 1)
    if life.hit_a_save:
        life.cut_a_save_short = _names(run, "checkpoint-") <= there
    said = log.read_text(encoding="utf-8", errors="replace")
    if f"\n{TRAINING}" in said:
        bench.starts.append(clock)
    if port := re.search(r"--master_port=(\d+)", said):
        bench.buffers.update({name: time.time() for name in shared_buffers() if f"_{port[1]}_" in name})
    _check(bench, run, life, before, said)
    return life


def _wait_for(aim: Aim, launcher: psutil.Popen, saving: Saving, log: Path, start_seconds: float) -> bool:
    """Return when the moment has come; False when the life was over first."""
    begun = time.monotonic()

    def until(is_there: Callable[[], bool], pause: float) -> bool:
        while not is_there():
            if launcher.poll() is not None or time.monotonic() > begun + LIFE_SECONDS:
                return False
            time.sleep(pause)
        return True

    if aim.when == "start":
        moment = begun + aim.share * start_seconds
        return until(lambda: time.monotonic() >= moment and aim.victim in ("all", *_family(launcher)), 0.01)
    if not until(lambda: f"\n{TRAINING}" in log.read_text(errors="replace"), 0.02):
        return False
    if aim.when == "step":
        moment = time.monotonic() + aim.share * STEP_SECONDS
        return until(lambda: time.monotonic() >= moment, 0.002)
    seen: set[str] = set()

    def is_nth() -> bool:
        seen.update(saving())
        return len(seen) >= aim.save

    if not until(is_nth, 0.0005):
        return False
    time.sleep(aim.share * SAVE_SECONDS)
    return True


def _names(run: Path, prefix: str) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        return {name for name in os.listdir(run) if name.startswith(prefix) and "superseded" not in name}
    return set()


def _kill(aim: Aim, launcher: psutil.Popen, saving: Saving, life: Life) -> None:
    """SIGKILL, with a look at the folder right before and right after."""
    family = _family(launcher)
    victims = family.values() if aim.victim == "all" else [family[aim.victim]] if aim.victim in family else []
    writing = saving()
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
            life.killed = True
    life.victim = aim.victim
    life.hit_a_save = life.killed and bool(writing & saving())


def _family(launcher: psutil.Popen) -> dict[str, psutil.Process]:
    """By name, who can be killed: as many as there are already."""
    family: dict[str, psutil.Process] = {"deepspeed": launcher}
    with contextlib.suppress(psutil.Error):
        for child in launcher.children():
            if "deepspeed.launcher.launch" in child.cmdline():
                family["launch.py"] = child
                for rank in child.children():
                    for word in rank.cmdline():
                        if word.startswith("--local_rank="):
                            family[f"rank {word.partition('=')[2]}"] = rank
    return family


def _check(bench: Bench, run: Path, life: Life, before: dict[int, str | None], said: str) -> None:
    """All that must hold after any life, which `said` this."""
    resumed = kills.RESUMING.search(said)
    life.resumed_at = int(resumed[2]) if resumed else None
    life.steps_logged = len(kills.log_rows(run))
    life.faults += kills.row_faults(run, bench.straight)
    order, again = kills.read_order(run, RANKS)
    life.faults += again + kills.order_faults(order, kills.read_order(bench.straight, RANKS)[0])
    life.faults += kills.choice_faults(said, run, before)
    new = {n: wrong for n, wrong in kills.checkpoints(run).items() if wrong and n not in before}
    life.faults += [f"checkpoint-{n}: {wrong}" for n, wrong in new.items()]
    life.false_success = life.exit_code == 0 and not finished(run)
    if life.false_success and life.victim != "launch.py":
        life.faults.append("exit code 0, and the run is not finished")
    # A run that has three steps left may end in the moment that it takes to notice.
    if life.killed and life.aim == "start" and finished(run) and life.seconds_to_gone > NOTICE_SECONDS:
        life.faults.append(f"{life.victim} was killed before the first step, and the others trained to the end")
    if not life.killed and life.exit_code != 0:
        life.faults.append(f"exit code {life.exit_code}, and nobody killed it")


def check_finished(bench: Bench, run: Path) -> list[str]:
    order, _ = kills.read_order(run, RANKS)
    faults = kills.completeness_faults(run, bench.steps)
    faults += kills.epoch_faults(order, bench.clips, bench.steps, BATCH)
    last = f"checkpoint-{bench.steps}"
    return faults + kills.tensor_faults(run / last, bench.straight / last)


def finished(run: Path) -> bool:
    path = run / "outcome.json"
    return path.is_file() and json.loads(path.read_text())["outcome"] == "finished"


def plant_damage(run: Path, rng: random.Random) -> str | None:
    """Flip a bit of the newest checkpoint, where there is a whole one below it to go on from."""
    found = kills.checkpoints(run)
    if len(found) < 2 or any(found.values()):
        return None
    newest = run / f"checkpoint-{next(iter(found))}"
    files = sorted(json.loads((newest / "MANIFEST.json").read_text())["files"])
    path = newest / rng.choice([*files, "MANIFEST.json"])
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return str(path.relative_to(run))


def prepare(work: Path, steps: int, seed: int) -> tuple[Bench, Life, float]:
    """Shards, recipe and the straight run; and the seconds from its start to its first step."""
    videos = make_motion_clips(work / "videos", PER_CLASS, frames=8, size=56)
    shards = make_shards(videos, work / "shards", frames=4, short_side=56, samples_per_shard=10)
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "dataset": str(shards), "max_steps": steps}), encoding="utf-8")
    clips = [f"{path.parent.name}_{path.stem}" for path in sorted(videos.glob("*/*.mp4"))]
    bench = Bench(work, recipe, work / "straight", clips, steps, random.Random(seed), random.Random(seed))
    life = live(bench, bench.straight, 0, None, 0.0)
    life.faults += check_finished(bench, bench.straight)
    order = bench.straight / "order"  # made just before the first step
    return bench, life, order.stat().st_ctime - (time.time() - life.seconds) if order.is_dir() else 0.0


def kill_again_and_again(bench: Bench, count: int, start_seconds: float) -> tuple[list[Life], dict[str, list[str]]]:
    """Lives until `count` kills are done and the last run is finished; faults of finished runs, by folder."""
    lives: list[Life] = []
    runs: dict[str, list[str]] = {}
    done = 0
    while done < count:
        run = bench.work / f"run-{len(runs) + 1:02d}"
        while not finished(run):
            planted = plant_damage(run, bench.damages) if bench.damages.random() < DAMAGE_SHARE else None
            aim = Aim.draw(bench.aims) if done < count else None
            life = live(bench, run, len(lives) + 1, aim, start_seconds)
            life.damage_planted = planted
            lives.append(life)
            done += life.killed
            print(_line(life, run, done, count), flush=True)
            if life.faults and not life.killed:
                return lives, runs  # it cannot go on
        runs[run.name] = check_finished(bench, run)
    return lives, runs


def _line(life: Life, run: Path, done: int, count: int) -> str:
    death = f"{life.victim} killed ({life.aim})" if life.killed else "to its end"
    saves = " in a save, cut short" if life.cut_a_save_short else " in a save" if life.hit_a_save else ""
    begun = "from the start" if life.resumed_at is None else f"from step {life.resumed_at}"
    what = f"{begun:>14} to row {life.steps_logged:3}  {death}{saves}, {life.seconds:.0f} s"
    return "\n   FAULT  ".join([f"{done:3}/{count}  {run.name}  {what}", *life.faults])


def check_buffers(bench: Bench) -> list[str]:
    """Buffers that ought to be gone. The young ones are removed here, and are no fault."""
    faults = []
    for name, since in bench.buffers.items():
        path = Path("/dev/shm") / name
        if path.exists():
            if bench.starts[-1] - since > BUFFER_SECONDS:
                faults.append(f"{path} is still there")
            path.unlink(missing_ok=True)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=84, help="of each run; a multiple of 14 ends with an epoch")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims")
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it; otherwise one that goes")
    parser.add_argument("--json", type=Path, default=RESULTS / "random_kill.json")
    options = parser.parse_args()
    if options.kills < 1 or options.steps < 6:
        parser.error(f"--kills {options.kills}, --steps {options.steps}: at least 1 kill and 6 steps")
    os.environ["OMP_NUM_THREADS"] = "1"
    work = options.keep or Path(tempfile.mkdtemp(prefix="vidcls-random-kill-"))
    work.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    bench, straight, start_seconds = prepare(work, options.steps, options.seed)
    print(f"straight run: {options.steps} steps, {straight.seconds:.0f} s, of which {start_seconds:.0f} s to start")
    count = 0 if straight.faults else options.kills  # against a broken one nothing can be compared
    lives, runs = kill_again_and_again(bench, count, start_seconds)
    faults = [f"{life.log}: {fault}" for life in [straight, *lives] for fault in life.faults]
    faults += [f"{work / run}: {fault}" for run, found in runs.items() for fault in found] + check_buffers(bench)
    report(lives, runs, faults, time.monotonic() - begun, options)
    if faults:
        print("\n".join(["", *faults, f"logs are kept in {work}"]))
        return 1
    if options.keep is None:
        shutil.rmtree(work)
    return 0


def report(lives: list[Life], runs: dict[str, list[str]], faults: list[str], seconds: float, options: Any) -> None:
    """The table and the JSON file."""
    killed = [life for life in lives if life.killed]
    by = Counter((life.aim, life.victim) for life in killed)
    table("kills", ("victim", *AIMS), [(victim, *(by[aim, victim] for aim in AIMS)) for victim in VICTIMS])
    counts = {
        "kills": len(killed),
        "kills while a checkpoint was written": sum(life.hit_a_save for life in killed),
        "of them: that checkpoint never came to be": sum(life.cut_a_save_short for life in killed),
        "exit code 0 from DeepSpeed's command, launch.py killed": sum(life.false_success for life in lives),
        "lives that went on from a checkpoint": sum(life.resumed_at is not None for life in lives),
        "checkpoints damaged between lives": sum(life.damage_planted is not None for life in lives),
        "runs finished and equal to the straight one": sum(not found for found in runs.values()),
        "slowest end of all processes after a kill, s": max((life.seconds_to_gone for life in killed), default=0.0),
        "violations": len(faults),
        "minutes": round(seconds / 60, 1),
    }
    table("nothing is lost" if not faults else "SOMETHING IS LOST", ("what", "number"), list(counts.items()))
    results = {"counts": counts, "faults": faults, "runs": runs, "lives": lives}
    choices = {"seed": options.seed, "steps": options.steps}
    write_json(options.json, {**results, **choices, **conditions("torch", "deepspeed")})
    print(f"written: {options.json}")


if __name__ == "__main__":
    sys.exit(main())
