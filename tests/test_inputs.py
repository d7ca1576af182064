"""Ranks that read different rows would train on different batches that each believes to be the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from posttrain.config import DataConfig
from posttrain.engine import Engine
from posttrain.inputs import load_texts, read_alike
from posttrain.run import Run
from posttrain.tracking import Tracker
from tests.pairs import run_pair
from tests.tiny import CHATML, tiny_tokenizer


def rows_of_this_process() -> list[dict[str, Any]]:
    """What an unseeded generator is to two ranks."""
    return [{"text": f"the sum of {os.getpid()}"}]


def rows_of_rank_0() -> list[dict[str, Any]]:
    """What a file is that one machine lacks."""
    if os.environ["RANK"] != "0":
        raise ValueError("there is no such file or folder")
    return [{"text": "the sum"}]


def same_rows() -> list[dict[str, Any]]:
    return [{"text": "the sum of three and four is seven"}] * 3


def read_on_every_rank(engine: Engine, *, function: str, folder: str) -> str:
    from posttrain.data.chat import Chat

    tracker = Tracker(Path(folder) / "stage", mode="disabled", is_main=engine.world.is_main)
    run = Run(name="stage", folder=Path(folder) / "stage", seed=0, engine=engine, tracker=tracker)
    data = DataConfig(path=f"tests.test_inputs:{function}")
    try:
        read_alike(run, data, "text")
        return f"{len(load_texts(run, data, Chat(tiny_tokenizer(CHATML)), 8))} windows"
    except ValueError as error:
        return str(error)


def test_rule_19_ranks_that_read_different_rows_are_refused_on_every_rank(tmp_path):
    said = run_pair("ddp", "tests.test_inputs:read_on_every_rank", function="rows_of_this_process", folder=str(tmp_path))
    assert said[0] == said[1] and "tests.test_inputs:rows_of_this_process (train) has other rows on rank 1 than on rank 0" in said[0]


def test_rule_19_what_one_rank_cannot_read_is_an_error_of_all(tmp_path):
    said = run_pair("ddp", "tests.test_inputs:read_on_every_rank", function="rows_of_rank_0", folder=str(tmp_path))
    assert said[0] == said[1] == "on rank 1: there is no such file or folder"


def test_ranks_that_read_the_same_go_on(tmp_path):
    said = run_pair("ddp", "tests.test_inputs:read_on_every_rank", function="same_rows", folder=str(tmp_path))
    assert said[0] == said[1] and said[0].endswith(" windows")
