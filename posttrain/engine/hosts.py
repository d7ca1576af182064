"""Several hosts: what their launchers don't see, as each watches the processes of its own host only.

A rank that waits for one that is gone would wait for as long as for one that is slow: for ever, or until the watchdog
says so. So every rank keeps a line to rank 0, an idle TCP connection, over which nothing is said but last words.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOST_SECONDS = 60  # a host that doesn't answer the kernel's probes for so long is gone
HEAR_SECONDS = 2.0  # who feels first that another rank is gone waits so long for its last words
SEEN_SECONDS = 10.0  # network file systems show a new file to other hosts after a while
GOODBYE = "goodbye"
ELSEWHERE = "192.0.2.1"  # an address of nobody's (RFC 5737): what leads there is the default route


def several_hosts() -> bool:
    """Whether the launcher started ranks on other hosts too."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(os.environ.get("LOCAL_WORLD_SIZE", size)) < int(size)


def name_interface() -> None:
    """Tell gloo by which network interface the other hosts are reached, unless GLOO_SOCKET_IFNAME says so already.

    By itself it takes the one that this host's own name leads to, which on many systems is the loopback.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not several_hosts():
        return
    import psutil

    for target in (os.environ["MASTER_ADDR"], ELSEWHERE):  # on the first host its own name may lead to the loopback, too
        address = address_towards(target)
        names = [name for name, found in psutil.net_if_addrs().items() if address in (one.address for one in found)]
        if names and not ipaddress.ip_address(address).is_loopback:
            os.environ["GLOO_SOCKET_IFNAME"] = names[0]
            return


def address_towards(target: str) -> str:
    """This host's own address on the way to `target`, "" when there is no way. Nothing is sent."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return probe.getsockname()[0]
    except OSError:
        return ""


class Lines:
    """A line from rank 0 to each other rank. Whoever hears of an end calls `lost` with who ended and how; rank 0 passes it on.

    `share` broadcasts rank 0's value to all ranks. `lost` is called at most once, in a thread of its own.
    """

    def __init__(self, rank: int, size: int, share: Callable[[Any], Any], lost: Callable[[str], None]) -> None:
        self.name = f"rank {rank} on host {socket.gethostname()}"
        self._lost = lost
        self._what = ""
        self._heard = threading.Event()
        self._closed = threading.Event()
        self._others = self._wait_for_calls(size, share) if rank == 0 else self._call(share)
        for other in self._others:
            keep_alive(other)
        threading.Thread(target=self._listen, name="lines to other hosts", daemon=True).start()

    def _wait_for_calls(self, size: int, share: Callable[[Any], Any]) -> dict[socket.socket, str]:
        others: dict[socket.socket, str] = {}
        password = secrets.token_hex(16)
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=dual) as server:
            share((server.getsockname()[1], password, self.name))
            while len(others) < size - 1:
                line, _ = server.accept()
                said, _, name = introduction(line).partition(" ")
                if said == password:
                    others[line] = name
                else:
                    line.close()  # a stranger, who looked what listens here
        return others

    def _call(self, share: Callable[[Any], Any]) -> dict[socket.socket, str]:
        port, password, first = share(None)
        line = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=LOST_SECONDS)
        line.settimeout(None)
        line.sendall(f"{password} {self.name}\n".encode())
        return {line: first}

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for other in self._others:
                selector.register(other, selectors.EVENT_READ)
            while selector.get_map() and not self._closed.is_set():
                for key, _ in selector.select(timeout=0.5):
                    line: Any = key.fileobj
                    selector.unregister(line)
                    words = last_words(line)
                    if words != GOODBYE and not self._closed.is_set():
                        self._hear(words or f"{self._others[line]} is gone, or its host can't be reached any more")
                        return

    def _hear(self, what: str) -> None:
        self._say(what)
        self._what = what
        self._heard.set()
        self._lost(what)

    def _say(self, words: str) -> None:
        for line in self._others:
            try:
                line.sendall(words.encode())
                line.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # whoever is gone doesn't hear it

    def fail(self, error: BaseException) -> bool:
        """Tell the other ranks that this one ends by `error`. True when it only ends because another one has, which `lost` was told."""
        how = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if self._heard.wait(HEAR_SECONDS):
            return not self._what.endswith(how)  # what fails alike on all ranks is this one's own failure, too
        self._closed.set()
        self._say(f"{self.name} {how}")
        return False

    def close(self) -> None:
        """Part in good order, which all ranks have agreed on."""
        if not self._closed.is_set():
            self._closed.set()
            self._say(GOODBYE)


def introduction(line: socket.socket) -> str:
    """The first line that the other end says, "" when it says nothing for a while."""
    line.settimeout(LOST_SECONDS)
    try:
        return line.makefile().readline().rstrip("\n")
    except OSError:
        return ""
    finally:
        line.settimeout(None)


def keep_alive(line: socket.socket) -> None:
    """Let the kernel ask the other end of an idle line whether it is there; after LOST_SECONDS without an answer, reading fails."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, LOST_SECONDS // 2))
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, LOST_SECONDS // 6))
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)


def last_words(line: socket.socket) -> str:
    """What the other end says before it hangs up; "" when it is gone without a word."""
    words = b""
    try:
        while part := line.recv(4096):
            words += part
    except OSError:
        return ""
    return words.decode(errors="replace")


def appear(paths: list[Path]) -> bool:
    """Whether all these files are seen from here, at once or after a while."""
    deadline = time.monotonic() + SEEN_SECONDS
    while not all(path.exists() for path in paths):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
