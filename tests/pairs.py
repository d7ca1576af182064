"""Two-process tests as ordinary tests: one persistent pair of workers per backend takes test functions as jobs.

    results = run_pair("zero3", "tests.engine.jobs:job", steps=3)      # [result of rank 0, result of rank 1]

A job is a module-level function `job(engine, **kwargs)`, run by both ranks at once, each in its own process with the
environment that `accelerate launch` would have set; the engine is new for every job and closed after it. Arguments and
results are pickled. A job that raises on any rank fails the test with that rank's traceback; a job that takes longer than
`timeout` seconds fails it with every thread's stack, and the pair is started anew for the next one.
"""

from __future__ import annotations

import atexit
import faulthandler
import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BACKENDS = ("ddp", "zero1", "zero2", "zero3")
START_SECONDS = 180  # importing torch, transformers and DeepSpeed on a busy machine
TIMEOUT = 120.0
_pairs: dict[str, Pair] = {}


def run_pair(backend: str, job: str, *, timeout: float = TIMEOUT, **kwargs: Any) -> list[Any]:
    """Run `module:function` on both ranks of the backend's pair -> [result of rank 0, result of rank 1]."""
    pair = _pairs.get(backend)
    if pair is None:
        pair = _pairs[backend] = Pair(backend)
    return pair.run(job, timeout, kwargs)


def launch_environment(backend: str, rank: int, port: int) -> dict[str, str]:
    """What `accelerate launch --config_file accelerate_configs/cpu_{backend}.yaml` sets for one of two processes."""
    assert backend in BACKENDS, f"{backend} is none of {BACKENDS}"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_"))}
    env |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    env |= dict(OMP_NUM_THREADS="1", ACCELERATE_MIXED_PRECISION="no", ACCELERATE_USE_CPU="False", WANDB_MODE="disabled")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    if backend.startswith("zero"):
        env |= dict(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE=backend[-1])
    return env


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def send(connection: Connection, value: Any) -> None:
    # Connection.send would pass tensors by shared memory, which ends with the process that made them
    connection.send_bytes(pickle.dumps(value))


def receive(connection: Connection) -> Any:
    return pickle.loads(connection.recv_bytes())


class Pair:
    """Two workers of one backend. They end when the test session does, or when their connection closes."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.folder = Path(tempfile.mkdtemp(prefix=f"pair-{backend}-"))
        port = free_port()
        address = str(self.folder / "socket")
        with Listener(address, "AF_UNIX") as listener:
            listener._listener._socket.settimeout(START_SECONDS)  # type: ignore[attr-defined]
            self.workers = [self._start(rank, port, address) for rank in range(2)]
            atexit.register(self.kill)
            arrived = {}
            for _ in range(2):
                connection = listener.accept()
                arrived[receive(connection)] = connection
        self.connections: list[Connection] = [arrived[0], arrived[1]]
        self._answers(START_SECONDS, "starting")

    def _start(self, rank: int, port: int, address: str) -> subprocess.Popen:
        with open(self.folder / f"rank{rank}.log", "w") as log:
            command = [sys.executable, "-m", "tests.pairs", address, str(rank)]
            env = launch_environment(self.backend, rank, port)
            return subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)

    def run(self, job: str, timeout: float, kwargs: dict[str, Any]) -> list[Any]:
        for connection in self.connections:
            send(connection, (job, timeout, kwargs))
        return self._answers(timeout, job)

    def _answers(self, timeout: float, what: str) -> list[Any]:
        """Both ranks' results. When one rank has failed, the other gets a moment and then both are ended."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout + 3  # the workers print their stacks at `timeout`
        while len(answers) < 2 and time.monotonic() < deadline:
            for rank, connection in enumerate(self.connections):
                if rank in answers or not connection.poll(0.01):
                    continue
                try:
                    answers[rank] = receive(connection)
                except EOFError:
                    answers[rank] = (False, f"the worker ended with code {self.workers[rank].wait()}\n{self._log(rank)}")
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + 3)
        failures = [f"rank {rank}: {text}" for rank, (fine, text) in sorted(answers.items()) if not fine]
        if len(answers) < 2:
            late = [rank for rank in range(2) if rank not in answers]
            failures += [f"rank {rank} gave no answer\n{self._log(rank)}" for rank in late]
            self.kill()
        if failures:
            raise AssertionError(f"{what} on {self.backend}\n" + "\n".join(failures))
        return [answers[rank][1] for rank in range(2)]

    def _log(self, rank: int) -> str:
        return (self.folder / f"rank{rank}.log").read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()
        if _pairs.get(self.backend) is self:
            del _pairs[self.backend]


def work(address: str, rank: int) -> None:
    """A worker: take jobs until the connection closes."""
    connection = Client(address, "AF_UNIX")
    send(connection, rank)
    import torch

    from posttrain.engine import Engine, World

    torch.set_num_threads(1)
    world = World.from_launch()
    send(connection, (True, None))
    while True:
        try:
            job, timeout, kwargs = receive(connection)
        except EOFError:
            return
        print(f"--- {job}", flush=True)
        faulthandler.dump_traceback_later(timeout)
        engine = Engine(world)
        try:
            module, name = job.split(":")
            result = getattr(importlib.import_module(module), name)(engine, **kwargs)
            engine.close()
            send(connection, (True, result))
        except BaseException:
            send(connection, (False, traceback.format_exc()))
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
    os._exit(0)  # DeepSpeed's and gloo's exit handlers may wait for a rank that is gone
