"""Where a stage's numbers go: metrics.jsonl, which is the truth; Weights & Biases, which is a view; the console.

The only file that knows wandb. It lives on a thread of its own, so that a training step never waits for it: a server
that can't be reached, hangs or answers nonsense costs one line on the console and no training time.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MODES = ("auto", "online", "offline", "disabled")
INIT_SECONDS = 30.0  # how long wandb may look for its server before the run goes offline
FINISH_SECONDS = 60.0  # how long the end of a stage waits for uploads; what is left is on disk for `wandb sync`


class Tracker:
    """One stage's numbers, in `folder/metrics.jsonl` and as one W&B run; a context manager, so that it always ends.

    `name` is what the run is called, `group` the pipeline, `job_type` the stage, `run_id` the id that the caller keeps
    over resumes. `mode`: "auto" is online with a key and offline without one, and obeys WANDB_MODE; also "online",
    "offline", "disabled". Ranks other than 0 pass `is_main=False`: all methods then do nothing.
    Raises ValueError for an unknown mode; afterwards nothing that goes wrong here reaches the training.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        project: str = "",
        name: str = "",
        group: str = "",
        job_type: str = "",
        config: Mapping[str, Any] | None = None,
        run_id: str = "",
        mode: str = "auto",
        upload: bool = False,
        is_main: bool = True,
    ) -> None:
        mode = _effective_mode(mode)
        self.folder = Path(folder)
        self.is_main = is_main
        self.last_step = -1
        self._group, self._upload = group, upload
        self._rewound = False
        self._silent = False
        self._board: _Board | None = None
        if not is_main:
            return
        self._reached = self._reached_before(run_id)
        if mode != "disabled":
            options: dict[str, Any] = dict(
                project=project or os.environ.get("WANDB_PROJECT", "posttrain"), name=name or None, group=group or None
            )
            options |= dict(job_type=job_type or None, config=dict(config or {}), id=run_id or None)
            self._board = _Board(self.folder, mode, options, self._warn)

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step`, where this session goes on. Call it once, when a checkpoint is loaded."""
        if not self.is_main:
            return
        self._rewound = True
        self.last_step = step
        try:
            cut_after(self.metrics_path, step)
            _write(self.folder / "tracker.json", json.dumps({"run_id": self._run_id, "reached": self._reached}))
        except OSError as problem:
            self._warn(f"{self.metrics_path} can't be cut: {problem}")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record `metrics` (numbers, strings or 0-d tensors) at `step`, which never decreases.

        A number that isn't finite becomes null and its name goes to "nonfinite": a chart would draw it as 0 or hide it.
        """
        if not self.is_main:
            return
        if not self._rewound:
            self.rewind(step - 1)
        assert step >= self.last_step, f"steps only increase: {step} after {self.last_step}"
        self.last_step = step
        values = {key: _plain(value) for key, value in metrics.items()}
        finite = {key: value for key, value in values.items() if _is_finite(value)}
        lost = [key for key in values if key not in finite]
        line = {"step": step, "time": round(time.time(), 3), **{key: finite.get(key) for key in values}}
        try:
            with self.metrics_path.open("a") as file:
                file.write(json.dumps(line | ({"nonfinite": lost} if lost else {})) + "\n")
        except OSError as problem:
            self._warn(f"{self.metrics_path} can't be written: {problem}")
        # steps that an interrupted session had reached are there already, and W&B refuses to go back
        if self._board and step > self._reached:
            self._board.do(lambda run: run.log(finite, step=step))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int | None = None) -> None:
        """Show rows (dicts) as a W&B table called `name` at `step` (default: the last one logged)."""
        step = self.last_step if step is None else step
        if not self._board or not rows or step <= self._reached:
            return
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[_cell(row.get(key)) for key in columns] for row in rows]
        self._board.do(lambda run: run.log({name: _wandb().Table(columns=columns, data=data)}, step=max(step, 0)))

    def link_input(self, name: str, path: Path | str, digest: str, kind: str = "model") -> None:
        """Say that this stage was made from `name` with content `digest`: an artifact when online, always in the config."""
        self._link("inputs", name, str(path), digest, kind)

    def link_output(self, name: str, path: Path | str, digest: str, kind: str = "model") -> None:
        """Say that this stage made `name`. Files are referred to where they are; they are copied only with `upload`."""
        self._link("outputs", name, str(path), digest, kind)

    def _link(self, side: str, name: str, path: str, digest: str, kind: str) -> None:
        if not self._board:
            return
        group, upload = self._group, self._upload

        def link(run: Any) -> None:
            # dicts in a run's config are replaced whole, so one flat key for each link
            run.config.update({f"lineage/{side}/{name}": {"path": path, "digest": digest, "kind": kind}}, allow_val_change=True)
            if side == "outputs":
                run.log_artifact(_artifact(group, name, path, digest, kind, upload), aliases=["latest", digest[:12] or "unknown"])
            elif not run.offline:  # use_artifact raises offline
                run.use_artifact(_artifact(group, name, path, digest, kind, upload))

        self._board.do(link)

    def finish(self, exit_code: int = 0) -> None:
        """End the W&B run, waiting for uploads for a minute at most. A second call does nothing."""
        board, self._board = self._board, None
        if board:
            board.close(exit_code)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, trace: object) -> None:
        code = problem.code if isinstance(problem, SystemExit) else 1
        self.finish(0 if kind is None else code if isinstance(code, int) else 1)

    def _reached_before(self, run_id: str) -> int:
        """The last step that earlier sessions of this W&B run have logged, or -1."""
        self._run_id = run_id
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = json.loads((self.folder / "tracker.json").read_text())
            logged = [line["step"] for line in read_lines(self.metrics_path)]
        except (OSError, ValueError):
            return -1
        return max([*logged, known["reached"]]) if known["run_id"] == run_id else -1

    def _warn(self, text: str) -> None:
        if not self._silent:
            self._silent = True
            print(f"tracking: {text} (training goes on; said once)", file=sys.stderr, flush=True)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl file; a torn last line, left by a crash, is passed over. No file is no records."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except ValueError as problem:
            if any(rest.strip() for rest in lines[number:]):
                raise ValueError(f"{path}, line {number}: {problem}; each line is one JSON object") from None
    return records


def cut_after(path: Path, step: int) -> None:
    """Remove the records of a jsonl file whose "step" is above `step`, and a torn last line, in one atomic replacement."""
    if path.exists():
        kept = [record for record in read_lines(path) if record.get("step", 0) <= step]
        _write(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def _write(path: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(name, path)


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _cell(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else json.dumps(value, ensure_ascii=False, default=str)


# ---- Weights & Biases -------------------------------------------------------------------------------------------------


class _Board(threading.Thread):
    """The thread on which every call to wandb is made, in the order in which it was asked for."""

    def __init__(self, folder: Path, mode: str, options: dict[str, Any], warn: Callable[[str], None]) -> None:
        super().__init__(daemon=True, name="wandb")
        self._folder, self._mode, self._options, self._say = folder, mode, options, warn
        self._jobs: queue.SimpleQueue[Callable[[Any], None] | None] = queue.SimpleQueue()
        self._exit_code = 0
        self._wanted = True
        self.start()

    def do(self, job: Callable[[Any], None]) -> None:
        if self._wanted:
            self._jobs.put(job)

    def close(self, exit_code: int) -> None:
        self._exit_code = exit_code
        self._jobs.put(None)
        self.join(INIT_SECONDS + FINISH_SECONDS)
        if self.is_alive():
            self._say(f"W&B doesn't answer; its files stay in {self._folder / 'wandb'}")

    def run(self) -> None:
        try:
            board = self._open()
        except Exception as problem:
            self._wanted = False
            self._say(f"W&B could not start: {_first_line(problem)}")
            return
        while (job := self._jobs.get()) is not None:
            self._attempt(job, board)
        self._attempt(lambda board: board.finish(exit_code=self._exit_code), board)

    def _attempt(self, job: Callable[[Any], None], board: Any) -> None:
        try:
            job(board)
        except Exception as problem:
            self._say(f"W&B: {_first_line(problem)}")

    def _open(self) -> Any:
        wandb = _wandb()
        wandb.setup(wandb.Settings(silent=True))
        if self._mode != "offline":
            try:
                # without a key wandb.init would stop and ask for one at the terminal
                if wandb.login(prompt=False, timeout=int(INIT_SECONDS)):
                    board = self._init("online")
                    print(f"W&B: {board.url}", flush=True)
                    return board
                if self._mode == "online":
                    self._say("W&B has no key, so that the run is kept offline; `wandb login` gives it one")
            except Exception as problem:
                self._say(f"W&B can't be reached, so that the run is kept offline: {_first_line(problem)}")
        board = self._init("offline")
        print(f"W&B: offline; `wandb sync {self._folder / 'wandb'}/offline-run-*` uploads this run", flush=True)
        return board

    def _init(self, mode: str) -> Any:
        wandb = _wandb()
        settings = wandb.Settings(
            silent=True,
            console="off",  # its capture fights with the progress bar for the terminal
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
            reinit="create_new",  # never the run that the user's own script has open
            save_code=False,
        )
        return wandb.init(dir=str(self._folder), mode=mode, resume="allow", settings=settings, **self._options)


def _wandb() -> Any:
    import wandb

    return wandb


def _effective_mode(mode: str) -> str:
    if mode not in MODES:
        raise ValueError(f"tracking mode={mode!r} is none of {', '.join(MODES)}; 'auto' works with and without a key")
    said = {"dryrun": "offline", "run": "online"}.get(os.environ.get("WANDB_MODE", ""), os.environ.get("WANDB_MODE", ""))
    if said == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes"):
        return "disabled"
    return said if mode == "auto" and said in MODES else mode


def _artifact(group: str, name: str, path: str, digest: str, kind: str, upload: bool) -> Any:
    """An artifact that is the same version wherever it is made from the same path and content."""
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{group}-{name}" if group else name)[:128]
    artifact = _wandb().Artifact(label, type=kind, metadata={"path": path, "digest": digest})
    # a reference without checksum is only its address: the digest beside it makes new content a new version
    with artifact.new_file("content.json") as file:
        json.dump({"path": path, "digest": digest}, file)
    place = Path(path)
    if not place.exists():  # a hub id, a generator
        return artifact
    if not upload:
        artifact.add_reference(place.resolve().as_uri(), checksum=False)
    elif place.is_dir():
        artifact.add_dir(str(place))
    else:
        artifact.add_file(str(place))
    return artifact


def _first_line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
