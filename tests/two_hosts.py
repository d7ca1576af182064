"""Two hosts on one machine: network namespaces with a cable between them, each with a name, shared memory and processes of its own.

Run as a script it is what they train: a tiny recipe of SFT and PPO, in which one rank can be made to stand still.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config import CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig, SamplingConfig
from posttrain.pipeline import Pipeline
from posttrain.pipeline.command import main
from tests.pairs import ROOT

LOST_SECONDS = 6
STANDS_STILL = "STANDS_STILL"  # environment variable: "ppo 3 rank 1" stands still at the end of that step


class Host:
    """One of two hosts, which runs one command at a time and keeps what that prints in a log in `folder`."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number = number
        self.name = f"host{number}"
        self.namespace = f"posttrain-{os.getpid()}-{number}"
        self.plug = f"plug{number}"
        self.address = f"10.77.0.{number + 1}"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], environment: dict[str, str], mount: str = "") -> None:
        """Start a command; over the folder `mount` the host has a disk of its own."""
        disks = " && ".join(f"mount -t tmpfs tmpfs {place}" for place in ("/dev/shm", mount) if place)
        inside = ["unshare", "--uts", "--ipc", "sh", "-c", f'hostname {self.name} && {disks} && exec "$@"', "sh"]
        with open(self.folder / f"{self.name}.log", "wb") as log:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *inside, *command],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def has_ended(self) -> bool:
        return self.process is not None and self.process.poll() is not None

    def wait(self, seconds: float) -> int:
        """The exit code; fails when it isn't there in time, or when processes are left."""
        assert self.process is not None
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {seconds:.0f} s\n{self.read()}") from None
        assert not self.processes(), f"{self.name} left processes behind\n{self.read()}"
        return code

    def read(self) -> str:
        return (self.folder / f"{self.name}.log").read_text(errors="replace")

    def processes(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.namespace).split()]

    def kill(self) -> None:
        """End all that it runs at once, as a power cut does."""
        for pid in self.processes():
            with suppress(ProcessLookupError):  # gone by itself in between
                os.kill(pid, signal.SIGKILL)

    def plug_in(self, isin: bool) -> None:
        ip("-n", self.namespace, "link", "set", self.plug, "up" if isin else "down")


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Two hosts that reach each other and nobody else. Raises OSError, saying why, where they can't be made."""
    if shutil.which("ip") is None:
        raise OSError("there is no `ip`; apt-get install -y iproute2 brings it")
    hosts = Host(0, folder), Host(1, folder)
    try:
        for host in hosts:
            ip("netns", "add", host.namespace)
        first, second = hosts
        ip("link", "add", first.plug, "netns", first.namespace, "type", "veth", "peer", "name", second.plug, "netns", second.namespace)
        for host in hosts:
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.plug)
            ip("-n", host.namespace, "link", "set", "lo", "up")
            host.plug_in(True)
        yield hosts
    except subprocess.CalledProcessError as error:
        raise OSError(f"`{' '.join(error.cmd)}` says: {error.stderr.strip()}") from error
    finally:
        for host in hosts:
            if Path("/run/netns", host.namespace).exists():
                host.kill()
                ip("netns", "delete", host.namespace)


# --- the recipe


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SFT and PPO of a tiny random model."""

    inputs: str = ""
    """The folder with models and rows."""
    output_dir: str = ""
    """Where the run's folders go."""


def build(recipe: Recipe) -> Pipeline:
    from posttrain.stages import ppo, sft

    given = Path(recipe.inputs)
    optimizer, each_step = OptimizerConfig(lr=1e-3), CheckpointConfig(every=1)
    pipeline = Pipeline("two_hosts", recipe.output_dir)
    policy = pipeline.stage(
        "sft",
        sft.train,
        sft.SFTConfig(
            model=ModelConfig(path=str(given / "policy")),
            data=DataConfig(path=str(given / "conversations.jsonl")),
            optimizer=optimizer,
            batch_size=8,
            epochs=2.0,
            max_length=200,
            max_tokens_per_micro_batch=200,
            checkpoint=each_step,
        ),
    )
    pipeline.stage(
        "ppo",
        ppo.train,
        ppo.PPOConfig(
            policy=ModelConfig(path=policy),
            reward_model=ModelConfig(path=str(given / "judge")),
            prompts=DataConfig(path=str(given / "prompts.jsonl")),
            policy_optimizer=optimizer,
            critic_optimizer=optimizer,
            sampling=SamplingConfig(max_new_tokens=9),
            num_iterations=4,
            rollout_batch_size=8,
            minibatch_size=8,
            ptx_coef=0.0,
            max_prompt_length=60,
            max_tokens_per_micro_batch=100,
            checkpoint=each_step,
        ),
    )
    return pipeline


def standing_still(log: Callable[..., None], where: str, told: Path) -> Callable[..., None]:
    """`Run.log`, after which the rank that `where` names stands still, and says so by the file `told`."""

    def patched(run: Any, *args: Any, **kwargs: Any) -> None:
        log(run, *args, **kwargs)
        if where == f"{run.name} {run.step} rank {run.engine.world.rank}":
            told.touch()
            time.sleep(600)

    return patched


if __name__ == "__main__":
    from posttrain.engine import hosts
    from posttrain.run import Run

    hosts.LOST_SECONDS, hosts.SEEN_SECONDS = LOST_SECONDS, 2.0
    output_dir = Path(sys.argv[sys.argv.index("--output-dir") + 1])
    Run.log = standing_still(Run.log, os.environ.get(STANDS_STILL, ""), output_dir.with_suffix(".still"))  # type: ignore[method-assign]
    main(build, {"tiny": Recipe()})
