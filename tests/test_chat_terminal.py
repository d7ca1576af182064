from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification

from posttrain.__main__ import main
from posttrain.chat_terminal import Scorer, Talker, find_model, open_model, run
from tests.tiny import tiny_config, tiny_folder, tiny_tokenizer


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Path:
    """A stage's folder with a causal LM in it."""
    folder = tmp_path_factory.mktemp("sft")
    tiny_folder(folder / "model")
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reward_model")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(tiny_config(num_labels=1))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "reward_calibration.json").write_text(json.dumps({"bias": 0.25, "mean": 0.5, "std": 2.0}))
    return folder


def conversation(folder: Path, *lines: str, **settings) -> str:
    """What the terminal shows when a user types these lines and then presses Ctrl-D."""
    output, typed = io.StringIO(), iter(lines)

    def ask(label: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    run(folder, console=Console(file=output, width=200), ask=ask, **{"max_new_tokens": 8, **settings})
    return output.getvalue()


def close(opened: Talker | Scorer) -> None:
    opened.engine.close()
    opened.engine.world.close()


def test_the_same_seed_says_the_same_and_greedy_has_no_seed(stage):
    said = conversation(stage, "hello", "and?", seed=1)
    assert said.count("model> ") == 2
    assert said == conversation(stage, "hello", "and?", seed=1)
    assert conversation(stage, "hello", temperature=0.0, seed=1) == conversation(stage, "hello", temperature=0.0, seed=2)


def test_an_answer_is_what_the_model_says_to_the_whole_conversation(stage):
    """Greedy answers equal transformers' own argmax over the rendered conversation, turn after turn."""
    from transformers import AutoModelForCausalLM

    talker = open_model(stage)
    assert isinstance(talker, Talker)
    talker.temperature, talker.max_new_tokens, talker.system = 0.0, 6, "be brief"
    model = AutoModelForCausalLM.from_pretrained(stage / "model")
    for text in ("what is 3 + 4?", "why?"):
        before = list(talker.messages)
        answer = talker.answer(text)
        ids = talker.chat.prompt([{"role": "system", "content": "be brief"}, *before, {"role": "user", "content": text}])
        start = len(ids)
        for _ in range(6):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in talker.chat.end_of_turn_ids:
                break
        assert answer.removesuffix(" [...]") == talker.chat.decode_response(ids[start:])
    assert [message["role"] for message in talker.messages] == ["user", "assistant"] * 2
    close(talker)


def test_commands(stage):
    said = conversation(stage, "/temperature 0", "/temperature warm", "/system be kind", "/system", "/reset", "/dance", "/quit", "never")
    for words in ("temperature 0", "'warm' must be a number", "system: be kind", "no system message", "forgotten", "/dance is no command"):
        assert words in said
    assert "model>" not in said


def test_a_reset_forgets(stage):
    talker = open_model(stage)
    talker.temperature, talker.max_new_tokens = 0.0, 5
    first = talker.answer("hello")
    talker.answer("more")
    talker.reset()
    assert talker.answer("hello") == first
    close(talker)


def test_a_conversation_that_does_not_fit_says_so_and_goes_on(stage):
    said = conversation(stage, "word " * 400, "/reset", "hi")
    assert "/reset begins anew" in said and said.count("model> ") == 1


def test_a_reward_model_scores_what_is_typed(judge):
    scorer = open_model(judge)
    assert isinstance(scorer, Scorer)
    value = scorer.score("what is 3 + 4?", "seven")
    ids = scorer.chat.prompt("what is 3 + 4?") + scorer.chat.response("seven")
    model = AutoModelForSequenceClassification.from_pretrained(judge)
    assert value == pytest.approx(model(torch.tensor([ids])).logits.item() - 0.25, abs=1e-5)
    close(scorer)
    said = conversation(judge, "what is 3 + 4?", "seven", "/quit")
    assert "it scores a response to a prompt" in said
    assert f"score {value:.4f}, {(value - 0.5) / 2:+.2f} standard deviations" in said


def test_a_folder_without_a_model_says_what_is_there(tmp_path, stage):
    with pytest.raises(ValueError, match="does not exist"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no model"):
        find_model(tmp_path)
    (tmp_path / "ppo" / "model").mkdir(parents=True)
    (tmp_path / "ppo" / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several models.*ppo"):
        find_model(tmp_path)
    assert find_model(stage) == find_model(stage / "model") == stage / "model"


def test_the_command_line_says_a_mistake_without_a_traceback(tmp_path, capsys):
    assert main(["chat", str(tmp_path)]) == 2
    assert main(["report", str(tmp_path)]) == 2
    errors = capsys.readouterr().err
    assert "has no model" in errors and "has no pipeline.json" in errors and "Traceback" not in errors


def test_the_command_line_writes_a_report(tmp_path, capsys):
    (tmp_path / "pipeline.json").write_text(json.dumps({"name": "p", "stages": []}))
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").exists() and "report.html" in capsys.readouterr().out


def test_help_is_quick():
    code = "import sys, posttrain.__main__; sys.exit(bool({'torch', 'transformers', 'wandb'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
