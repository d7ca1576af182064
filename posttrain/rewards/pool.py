"""Reward functions in worker processes: whatever one does, it costs its own row and never the run.

    with Rewards(config.rewards) as rewards:
        rewards.submit(key, row, response)      # returns at once; judged while generation goes on
        values = rewards.collect()              # {key: {part: value}}, NaN where a function failed

A function that raises, hangs, crashes, or returns no finite number leaves NaN in its part of that row, and a text in
`failures`. Each worker is served by a thread of this process that sleeps until an answer or a deadline comes.
"""

from __future__ import annotations

import math
import pickle
import tempfile
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from posttrain.config import gather_problems
from posttrain.rewards.config import RewardsConfig
from posttrain.rewards.process import LostError, UnavailableError, Worker

LARGEST_BATCH = 32  # tasks that a worker gets at once; all workers share what is left when fewer wait
EXCERPT = 300  # characters of a row and of a response in a failure's text


@dataclass
class Task:
    """A response to judge, and what the functions said about it so far."""

    key: int
    packed_row: bytes
    response: str
    values: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def excerpt(self) -> str:
        return f"{pickle.loads(self.packed_row)!r:.{EXCERPT}}, response {self.response!r:.{EXCERPT}}"


class Rewards:
    """The worker processes of one rank. Raises ValueError for a config that could not work, before any process starts."""

    def __init__(self, config: RewardsConfig) -> None:
        found = gather_problems(config, "rewards")
        if not config.functions:
            found.append("rewards.functions is empty; (RewardConfig(function='posttrain.rewards.verifiers:gsm8k'),) works")
        if found:
            raise ValueError("\n".join(found))
        self.config = config
        self.failures: list[str] = []
        """What went wrong in the responses that the last `collect` returned, in the order of their keys."""
        self._tasks: dict[int, Task] = {}
        self._waiting: deque[Task] = deque()
        self._unfinished = 0
        self._closing = False
        self._unavailable = ""
        lock = threading.Lock()
        self._work, self._done = threading.Condition(lock), threading.Condition(lock)
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Rewards:
        """Starts the workers. Raises RuntimeError when the functions can't be imported in a fresh process."""
        self._scratch = tempfile.TemporaryDirectory(prefix="posttrain_", ignore_cleanup_errors=True)
        self._workers = [Worker(self.config, self._scratch.name) for _ in range(self.config.workers)]
        try:
            self._workers[0].start()
        except UnavailableError as error:
            self._scratch.cleanup()
            raise RuntimeError(str(error)) from None
        self._threads = [threading.Thread(target=self._serve, args=(worker,), daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._work:
            self._closing = True
            self._work.notify_all()
        for worker, thread in zip(self._workers, self._threads):
            while thread.is_alive():
                worker.end()  # whatever it is judging; again, if the thread had just started another
                thread.join(0.1)
        self._scratch.cleanup()

    def submit(self, key: int, row: dict[str, Any], response: str) -> None:
        """Has a response judged; `key` names it in what `collect` returns."""
        task = Task(key=key, packed_row=pickle.dumps(row), response=response)
        with self._work:
            assert self._threads and not self._closing, "rewards are judged inside `with Rewards(config) as rewards`"
            assert key not in self._tasks, f"{key} was submitted twice"
            self._tasks[key] = task
            self._unfinished += 1
            self._waiting.append(task)
            self._work.notify()

    def collect(self) -> dict[int, dict[str, float]]:
        """Waits for all that was submitted since the last call: key -> part -> value, NaN where there is none."""
        with self._done:
            while self._unfinished and any(thread.is_alive() for thread in self._threads):
                self._done.wait(1.0)
            tasks = [self._tasks[key] for key in sorted(self._tasks)]
            self._tasks, self._unfinished = {}, 0
            self._waiting.clear()
        for task in tasks:
            for _ in range(len(self.config.parts) - len(task.values)):  # no worker is left
                self._record(task, math.nan, self._unavailable)
        self.failures = [text for task in tasks for text in task.failures]
        return {task.key: dict(zip(self.config.parts, task.values)) for task in tasks}

    def _record(self, task: Task, value: float, failure: str) -> None:
        if failure:
            function = self.config.functions[len(task.values)].function
            task.failures.append(f"{function} failed on {task.excerpt()}:\n{failure}")
        task.values.append(value)

    # --- one thread per worker

    def _serve(self, worker: Worker) -> None:
        batch: list[Task] = []
        try:
            if not worker.process:
                worker.start()
            while batch := self._take():
                self._judge(worker, batch)
        except UnavailableError as error:
            self._give_back(batch, str(error))
        worker.kill()

    def _take(self) -> list[Task]:
        """The next tasks for one worker; none when the pool closes."""
        with self._work:
            while not self._waiting and not self._closing:
                self._work.wait()
            if self._closing:
                return []
            fair = -(-len(self._waiting) // len(self._workers))
            return [self._waiting.popleft() for _ in range(min(LARGEST_BATCH, fair, len(self._waiting)))]

    def _judge(self, worker: Worker, batch: list[Task]) -> None:
        """All functions on all tasks; a lost worker costs the call it was in. Raises UnavailableError."""
        parts = len(self.config.parts)
        done = 0
        while done < len(batch) * parts and not self._closing:
            try:
                for value, failure in worker.ask([(task.packed_row, task.response) for task in batch], skipped=done):
                    self._finish(batch[done // parts], value, failure)
                    done += 1
            except LostError as lost:
                self._finish(batch[done // parts], math.nan, str(lost))
                done += 1

    def _finish(self, task: Task, value: float, failure: str) -> None:
        self._record(task, value, failure)
        if len(task.values) == len(self.config.parts):
            with self._done:
                self._unfinished -= 1
                if not self._unfinished:
                    self._done.notify_all()

    def _give_back(self, batch: list[Task], reason: str) -> None:
        """Leaves a batch to the other workers, as this one can't be started again."""
        with self._work:
            self._unavailable = reason
            for task in batch:
                if len(task.values) < len(self.config.parts):
                    task.values, task.failures = [], []
                    self._waiting.append(task)
            self._work.notify_all()
