"""The process that calls reward functions: `python -m posttrain.rewards.worker SOCKET PARENT`.

It gets batches of (row, response) over a socket, calls every function on each and answers value by value, at once: when
it hangs or dies, its parent knows in which call. It imports what the functions need and nothing else, sees no GPU and
none of the launcher's variables, and dies with the thread that started it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import numbers
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from typing import Any

from posttrain.config import resolve
from posttrain.rewards.config import read_options, requirements

LONGEST_FAILURE = 4000  # characters of a traceback that are passed on
SET_PARENT_DEATH_SIGNAL = 1  # linux/prctl.h

Call = tuple[Any, dict[str, Any]]  # a function and its options


def send(channel: socket.socket, message: Any) -> None:
    """One message, its length first. Pickled: only the trusted side, the parent, sends these."""
    packed = pickle.dumps(message)
    channel.sendall(struct.pack("!Q", len(packed)) + packed)


def receive(channel: socket.socket) -> Any:
    """The next message. Raises EOFError when the other side is gone."""
    (length,) = struct.unpack("!Q", receive_bytes(channel, 8))
    return pickle.loads(receive_bytes(channel, length))


def receive_bytes(channel: socket.socket, count: int) -> bytes:
    received = bytearray()
    while len(received) < count:
        chunk = channel.recv(min(count - len(received), 1 << 20))
        if not chunk:
            raise EOFError
        received += chunk
    return bytes(received)


def answer(channel: socket.socket, value: float | None, failure: str) -> None:
    """One line of JSON: never a pickle, as it comes from a process that ran a stranger's function."""
    channel.sendall(json.dumps([value, failure[-LONGEST_FAILURE:]]).encode() + b"\n")


def judge(call: Call, packed_row: bytes, response: str) -> tuple[float | None, str]:
    """(value, "") of one function on one response, or (None, why there is none)."""
    function, options = call
    try:
        # unpacked anew for each function: none sees what another did to the row
        value = function(pickle.loads(packed_row), response, **options)
        if not isinstance(value, numbers.Real):
            return None, f"returned {value!r:.200} of type {type(value).__name__}, not a number"
        value = float(value)
    except BaseException:  # SystemExit and KeyboardInterrupt too
        return None, traceback.format_exc()
    return (value, "") if math.isfinite(value) else (None, f"returned {value}, which is not finite")


def prepare(functions: list[tuple[str, tuple[str, ...]]]) -> list[Call]:
    """The functions by their names, with their options and everything that they import when called."""
    calls = []
    for name, texts in functions:
        function = resolve(name)
        for module in requirements(function).modules:
            importlib.import_module(module)
        options, found = read_options(function, texts)
        assert not found, found
        calls.append((function, options))
    return calls


def serve(channel: socket.socket) -> None:
    """Answers whether the functions could be made ready, then batch after batch until the parent hangs up."""
    try:
        calls = prepare(receive(channel))
    except BaseException:
        return answer(channel, None, traceback.format_exc())
    answer(channel, 0.0, "")
    while True:
        skipped, tasks = receive(channel)
        work = [(call, *task) for task in tasks for call in calls]
        for call, packed_row, response in work[skipped:]:
            answer(channel, *judge(call, packed_row, response))


def die_with_parent(parent: int) -> None:
    """Asks the kernel for SIGKILL when the thread that started this process ends."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before we could ask
        os._exit(1)


def main(descriptor: str, parent: str) -> None:
    die_with_parent(int(parent))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        serve(socket.socket(fileno=int(descriptor)))
    except (EOFError, ConnectionError):
        os._exit(0)  # whatever threads a function left behind


if __name__ == "__main__":
    main(*sys.argv[1:])
