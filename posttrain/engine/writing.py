"""Files of a checkpoint on their way to the disk, on a thread that training needn't wait for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.engine.world import World

MANIFEST = "manifest.json"
File = tuple[str, Any]  # a name and what torch.save puts under it


def on_host(value: Any, copy: bool) -> Any:
    """`value` rebuilt, with its tensors on the host, copied where asked for. What is in it twice stays one thing."""
    seen: dict[int, Any] = {}

    def rebuilt(part: Any) -> Any:
        if id(part) in seen:
            return seen[id(part)]
        made = part
        if isinstance(part, Tensor):
            is_part = part.untyped_storage().nbytes() != part.numel() * part.element_size()  # all of the whole would be written
            made = part.detach().to("cpu", copy=copy or is_part)
        elif isinstance(part, dict):
            made = {key: rebuilt(item) for key, item in part.items()}
        elif isinstance(part, (list, tuple)):
            made = type(part)(rebuilt(item) for item in part)
        seen[id(part)] = made
        return made

    return rebuilt(value)


class Writing:
    """A checkpoint that is being written: each rank's files, read back, then the manifest and the rename once every rank has its own.

    One process does all of it on the thread. Ranks have to hear of each other, so `finish` does the last part there: a
    checkpoint of several ranks counts from the border between steps that comes after its files are written.
    """

    def __init__(self, world: World, folder: Path, files: Iterator[File], description: dict[str, Any], *, background: bool) -> None:
        """`files` are this rank's, drawn from now: collective. With `background` all of them first, and written after this returns."""
        self.world, self.folder = world, folder
        self.seconds = 0.0  # until the last of this rank's files was written
        self._description, self._began = description, time.monotonic()
        self._writer = Writer(temporary(folder))
        self._thread: threading.Thread | None = None
        if background:
            drawn = deque(files)
            # no daemon: a process that an exception ends writes what it has begun
            self._thread = threading.Thread(target=self._write, args=(_emptied(drawn),), name="checkpoint")
            self._thread.start()
        else:
            self._write(files)

    def _write(self, files: Iterator[File]) -> None:
        for name, value in files:
            self._writer.write(name, value)
        if self.world.size == 1 and not self._writer.error:
            self._commit(self._writer.digests)
        self.seconds = time.monotonic() - self._began

    def _commit(self, digests: Mapping[str, str]) -> str:
        """The last part, for one rank; what went wrong, or ""."""
        contents = {**self._description, "files": dict(sorted(digests.items()))}
        self._writer.attempt(MANIFEST, lambda: _finish(temporary(self.folder), self.folder, contents))
        return self._writer.error

    def wait_here(self) -> None:
        """Wait until this rank has written its files. Asks nobody, raises nothing."""
        if self._thread:
            self._thread.join()

    def is_written(self) -> bool:
        """Whether every rank has written its files. Collective."""
        writes = self._thread is not None and self._thread.is_alive()
        return not self.world.any(writes, "asking whether a checkpoint is written")

    def finish(self) -> None:
        """Wait for the files and let the checkpoint be one. Collective.

        Raises OSError on every rank when any rank couldn't write (a full disk); earlier checkpoints stay as they are, and nothing
        is left of this one.
        """
        with self.world.phase("writing a checkpoint"):
            self.wait_here()
        outcomes = self.world.gather((self._writer.digests, self._writer.error), "writing a checkpoint")
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(outcomes) if error]
        if self.world.size > 1 and not errors:
            digests = {name: digest for found, _ in outcomes for name, digest in found.items()}
            said = self.world.first_says(lambda: self._commit(digests), "finishing a checkpoint")
            errors = [f"rank 0: {said}"] if said else []
        if errors:
            if self.world.is_main:
                shutil.rmtree(temporary(self.folder), ignore_errors=True)
            raise OSError(f"{self.folder.name} could not be written, earlier checkpoints are untouched: {'; '.join(errors)}")


def _emptied(files: deque[File]) -> Iterator[File]:
    """The files one by one, of which nothing is held when they are written."""
    while files:
        yield files.popleft()


class Writer:
    """Writes this rank's files, flushed to the disk and read back, and keeps their digests; after an error it writes no more."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self.error = ""

    def write(self, name: str, value: Any) -> None:
        if not self.error:
            self.attempt(name, lambda: self._write(name, value))

    def attempt(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # torch reports a full disk as a RuntimeError; on a thread nobody else would hear of it
            self.error = f"{name}: {error}" if isinstance(error, (OSError, RuntimeError)) else f"{name}: {type(error).__name__}: {error}"

    def _write(self, name: str, value: Any) -> None:
        path = self.folder / name
        with path.open("wb") as file:
            stream = HashedFile(file)
            torch.save(value, stream)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        digest = stream.digest.hexdigest()
        if digest_of(path) != digest:
            raise OSError(f"{path} reads back as something else than was written")
        self.digests[name] = digest


class HashedFile:
    """A file to write to that knows the digest of what it was given, whatever the disk makes of it."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.writing")


def fresh(folder: Path) -> None:
    """Make `folder` anew; what killed runs left of theirs goes, as one checkpoint is written at a time."""
    for left in folder.parent.glob(temporary(Path("step_*")).name):
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(temporary: Path, folder: Path, contents: dict[str, Any]) -> None:
    with open(temporary / MANIFEST, "w") as file:
        json.dump(contents, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    directory = os.open(folder.parent, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)
