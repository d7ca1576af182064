"""Two hosts: the same numbers as one, an end that is told when one is lost, and a way on from there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from posttrain.engine import hosts as lines
from posttrain.engine.hosts import Lines, address_towards, name_interface
from posttrain.models.loading import Calibration
from tests.pairs import ROOT
from tests.runs import metrics, reward_folder, same, weights, write_rows
from tests.stages.test_ppo import policy_folder
from tests.stages.worlds import conversations, prompts
from tests.two_hosts import LOST_SECONDS, STANDS_STILL, Host, two_hosts

ENDS_WITHIN = 20.0  # seconds after a host was lost


@dataclass
class Launch:
    """What came of one launch: exit codes and logs of both hosts, and the seconds from the loss of one to the end."""

    codes: list[int]
    logs: list[str]
    seconds: float = 0.0


@dataclass
class Story:
    """A run on two hosts that is broken off twice, beside an unbroken one on one host."""

    folder: Path
    launches: dict[str, Launch] = field(default_factory=dict)


def command(file: str, folder: Path, output_dir: str, *options: str) -> list[str]:
    script = ["tests/two_hosts.py", "tiny", "--inputs", str(folder), "--output-dir", str(folder / output_dir)]
    return [sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{file}", *options, *script]


def environment(still: str = "") -> dict[str, str]:
    theirs = ("ACCELERATE_", "MASTER_", "GLOO_", "DS_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", STANDS_STILL: still}


def start(hosts: tuple[Host, Host], folder: Path, output_dir: str, still: str = "", mount: str = "") -> None:
    """The command of the launch file's header on each host; `mount` is the second one's own disk."""
    for host in hosts:
        machines = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(host.number)]
        meeting = ["--main_process_ip", hosts[0].address, "--main_process_port", "29500"]
        words = command("multi_node_zero2.yaml", folder, output_dir, *machines, *meeting)
        host.start(words, environment(still), mount=mount if host.number else "")


def finish(hosts: tuple[Host, Host], seconds: float) -> Launch:
    began = time.monotonic()
    codes = [host.wait(seconds) for host in hosts]
    return Launch(codes, [host.read() for host in hosts], time.monotonic() - began)


def wait_until_still(hosts: tuple[Host, Host], told: Path) -> None:
    deadline = time.monotonic() + 120
    while not told.exists():
        ended = [host.name for host in hosts if host.has_ended()]
        assert not ended and time.monotonic() < deadline, "\n".join([f"{ended} ended too early", *(host.read() for host in hosts)])
        time.sleep(0.1)
    told.unlink()


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Iterator[Story]:
    folder = tmp_path_factory.mktemp("two_hosts")
    policy_folder(folder / "policy")
    reward_folder(folder / "judge", calibration=Calibration(bias=0.3, mean=0.1, std=1.7))
    write_rows(folder / "conversations.jsonl", conversations(16))
    write_rows(folder / "prompts.jsonl", prompts(8))
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(two_hosts(folder))
        except OSError as error:
            pytest.skip(f"two hosts can't be made here: {error}")
        yield tell(hosts, folder)


def tell(hosts: tuple[Host, Host], folder: Path) -> Story:
    story, told = Story(folder), folder / "two.still"
    one = subprocess.Popen(
        command("cpu_zero2.yaml", folder, "one", "--main_process_port", "0"),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    try:
        (folder / "apart").mkdir()
        start(hosts, folder, "apart", mount=str(folder / "apart"))
        story.launches["apart"] = finish(hosts, 120)

        start(hosts, folder, "two", still="sft 3 rank 1")
        wait_until_still(hosts, told)
        hosts[1].plug_in(False)
        story.launches["cut"] = finish(hosts, LOST_SECONDS + ENDS_WITHIN)
        hosts[1].plug_in(True)

        start(hosts, folder, "two", still="ppo 3 rank 0")
        wait_until_still(hosts, told)
        hosts[0].kill()
        story.launches["killed"] = finish(hosts, ENDS_WITHIN)

        start(hosts, folder, "two")
        story.launches["last"] = finish(hosts, 120)
        assert one.wait(120) == 0
    finally:
        one.terminate()  # its launcher ends its two ranks
        one.wait(60)
    return story


def test_rule_8_two_hosts_broken_off_twice_train_to_one_hosts_numbers_bit_for_bit(story):
    assert story.launches["last"].codes == [0, 0], story.launches["last"].logs
    assert not any("is gone" in log for log in story.launches["last"].logs)
    for stage in ("sft", "ppo"):
        found, expected = metrics(story.folder / "two" / stage), metrics(story.folder / "one" / stage)
        assert len(found) == 4 and found == expected
    for model in ("sft/model", "ppo/model", "ppo/critic"):
        assert same(weights(story.folder / "two" / model), weights(story.folder / "one" / model)), model


def test_both_ends_of_a_cut_link_say_where_they_were_and_what_to_do(story):
    launch = story.launches["cut"]
    for rank, (code, log) in enumerate(zip(launch.codes, launch.logs, strict=True)):
        assert code == 1
        assert f"rank {1 - rank} on host host{1 - rank} is gone, or its host can't be reached any more\nrank {rank} was in: sft" in log
        assert "the same command, started again on each of them, goes on from the newest checkpoint" in log
    assert "rank 0 was in: sft > " in launch.logs[0]  # waiting for the other


def test_a_killed_host_is_told_of_by_the_other_at_once(story):
    launch = story.launches["killed"]
    assert launch.codes == [-9, 1] and launch.seconds < ENDS_WITHIN
    said = "rank 0 on host host0 is gone, or its host can't be reached any more\nrank 1 was in: ppo > "
    assert said in launch.logs[1] and "[gloo]" not in launch.logs[1].split(said)[1]


def test_the_same_command_goes_on_after_each_break(story):
    # the checkpoint of step 2 may not have been a whole one when step 3 was broken off
    assert re.search(r"sft: resumes at step [12] from", story.launches["killed"].logs[0])
    assert re.search(r"ppo: resumes at step [12] from", story.launches["last"].logs[0])


def test_hosts_with_a_disk_each_are_refused_before_anything_is_written(story):
    launch = story.launches["apart"]
    assert launch.codes == [1, 1]
    assert f"output_dir {story.folder / 'apart'} isn't one folder that all ranks share" in launch.logs[0]
    assert "rank 1 on host host1 doesn't see what others write there" in launch.logs[0]
    assert "a path on a file system that all hosts mount" in launch.logs[0]
    assert not any("is gone" in log for log in launch.logs)
    assert {path.name for path in (story.folder / "apart").iterdir()} <= {".digests.json"}  # what a look at the inputs found


# --- the parts, in one process


@pytest.fixture
def three(monkeypatch) -> tuple[list[Lines], list[list[str]]]:
    """Three ranks' lines, and what each is told of losses."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(lines, "HEAR_SECONDS", 0.5)
    box: list[tuple] = []
    shared = threading.Event()

    def share(value):
        if value is not None:
            box.append(value)
            shared.set()
        assert shared.wait(10)
        return box[0]

    told: list[list[str]] = [[], [], []]
    made: dict[int, Lines] = {}
    makers = [threading.Thread(target=lambda rank=rank: made.update({rank: Lines(rank, 3, share, told[rank].append)})) for rank in range(3)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    return [made[rank] for rank in range(3)], told


def wait_for(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_failure_is_told_to_every_rank_by_its_words(three):
    made, told = three
    assert made[2].fail(OSError("no space left\non the disk")) is False
    assert wait_for(lambda: told[0] and told[1])
    words = f"{made[2].name} failed: OSError: no space left on the disk"
    assert told == [[words], [words], []]
    assert made[1].fail(RuntimeError("connection closed by peer")) is True
    assert made[0].fail(OSError("no space left\non the disk")) is False  # the same on every rank: its own


def test_a_rank_that_goes_without_a_word_is_missed(three):
    made, told = three
    made[1]._closed.set()
    for line in made[1]._others:
        line.close()
    assert wait_for(lambda: told[0] and told[2])
    assert told[0] == told[2] == [f"{made[1].name} is gone, or its host can't be reached any more"]


def test_ranks_that_part_in_good_order_are_not_missed(three):
    made, told = three
    for one in made:
        one.close()
    time.sleep(0.7)
    assert told == [[], [], []]


def test_gloo_is_told_of_the_interface_to_the_first_host(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1").items():
        monkeypatch.setenv(name, value)
    name_interface()
    assert "GLOO_SOCKET_IFNAME" not in os.environ  # one host
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "mine0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    name_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "mine0"
    assert address_towards("127.0.0.1") == "127.0.0.1" and address_towards("no.such.host.invalid") == ""
