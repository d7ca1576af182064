from __future__ import annotations

import itertools

import pytest
import torch

from posttrain.data.chat import Chat
from posttrain.data.tokenized import Kept, comparison_trees, demonstration_trees, judgement_trees, prompt_ids, text_windows
from posttrain.packing import Tree
from tests.data.families import FAMILIES, TOOLS, byte_level, spaced
from tests.data.test_chat import MULTI, SINGLE, WITH_TOOLS, chats, random_conversation
from tests.tiny import CHATML, tiny_tokenizer


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat.load(tiny_tokenizer())


def same(ours: list[Tree], theirs: list[Tree]) -> bool:
    def parts(tree: Tree) -> list:
        return [tree.index, tree.ranks, *((part.input_ids.tolist(), part.trainable.tolist()) for part in tree.segments)]

    return [parts(tree) for tree in ours] == [parts(tree) for tree in theirs]


def trained_text(chat: Chat, tree: Tree) -> list[str]:
    return [chat.decode(part.input_ids[part.trainable].tolist()) for part in tree.segments]


# --- demonstrations


@pytest.mark.parametrize("family", chats())
def test_rule_12_every_function_gives_the_same_tokens(family):
    chat = Chat.load(FAMILIES[family]())
    prompt, response = MULTI[:3], MULTI[3]["content"]
    ids, trained = chat.conversation(MULTI)
    [demonstration], _ = demonstration_trees([{"messages": MULTI}], chat, 1000)
    [comparison], _ = comparison_trees([{"prompt": prompt, "responses": [response, "no"]}], chat, 1000)
    [prompted], _ = prompt_ids([{"prompt": prompt}], chat, 1000)
    assert demonstration.root.input_ids.tolist() == ids and demonstration.root.trainable.tolist() == trained
    assert comparison.root.input_ids.tolist() + comparison.children[0].input_ids.tolist() == ids
    assert comparison.children[1].input_ids.tolist() == chat.response("no")
    assert prompted == comparison.root.input_ids.tolist() == chat.prompt(prompt)


def test_demonstrations_by_hand(chat):
    rows = [{"messages": SINGLE}, {"messages": [MULTI[0], {**MULTI[1], "train": False}, *MULTI[2:]]}]
    trees, kept = demonstration_trees(rows, chat, 1000)
    assert [trained_text(chat, tree) for tree in trees] == [["three and four is seven<|im_end|>"], ["fig, pear:\n  apple<|im_end|>"]]
    assert [tree.index for tree in trees] == [0, 1] and not any(tree.children for tree in trees)
    tokens = sum(tree.num_tokens for tree in trees)
    assert kept == Kept("conversations", 2, (0, 1), tokens=tokens, trained_tokens=sum(tree.num_trainable for tree in trees))


def test_tool_results_are_not_trained():
    chat = Chat.load(byte_level(TOOLS))
    [tree], _ = demonstration_trees([{"messages": WITH_TOOLS}], chat, 1000)
    [text] = trained_text(chat, tree)
    assert text.startswith("<tool_call>") and text.endswith("three and four is seven<|im_end|>") and text.count("seven") == 1


def test_turns_after_the_last_trained_one_are_left_out(chat):
    ends = [{"messages": [*SINGLE, MULTI[2]]}, {"messages": [*MULTI[:3], {**MULTI[3], "train": False}]}, {"messages": SINGLE}]
    trees, kept = demonstration_trees(ends, chat, 1000)
    assert len({tuple(tree.root.input_ids.tolist()) for tree in trees}) == 1 and kept.cut == 0


@pytest.mark.parametrize("family", ["chatml", "mistral", "chatml_system"])
def test_over_long_conversations_are_cut_by_whole_turns(family):
    chat = Chat.load(FAMILIES[family]())
    messages = random_conversation(3, 4)
    lengths = [len(chat.conversation(messages[: 2 * n])[0]) for n in range(1, 5)]
    for limit in {length + change for length in lengths for change in (-1, 0, 1)}:
        fitting = [n for n, length in enumerate(lengths, 1) if length <= limit]
        if not fitting:
            with pytest.raises(ValueError, match=f"1 dropped as too long.*needs max_tokens={lengths[0]}"):
                demonstration_trees([{"messages": messages}], chat, limit)
            continue
        [tree], kept = demonstration_trees([{"messages": messages}], chat, limit)
        ids, trained = chat.conversation(messages[: 2 * fitting[-1]])
        assert tree.root.input_ids.tolist() == ids and tree.root.trainable.tolist() == trained
        assert kept.cut == (fitting[-1] < 4)


def test_rule_13_rows_with_nothing_to_train_on_are_dropped_counted_and_fail_above_a_threshold(chat):
    silent = [{"messages": [SINGLE[0]]}, {"messages": [SINGLE[0], {**SINGLE[1], "train": False}]}]
    rows = [silent[0], {"messages": SINGLE}, silent[1], {"messages": MULTI}]
    trees, kept = demonstration_trees(rows, chat, 1000, max_dropped_fraction=0.5)
    assert len(trees) == 2 and kept.untrainable == kept.dropped == 2 and kept.indices == (1, 3)
    assert "2 dropped with nothing to train on" in str(kept)
    with pytest.raises(ValueError, match=r"rows 1, 3 are lost, 50% of all, above max_dropped_fraction=0\.4"):
        demonstration_trees(rows, chat, 1000, max_dropped_fraction=0.4)


def test_rule_13_no_row_at_all_is_an_error_whatever_the_threshold(chat):
    with pytest.raises(ValueError, match="rows 1 are lost, 100%"):
        demonstration_trees([{"messages": [SINGLE[0]]}], chat, 1000, max_dropped_fraction=1.0)
    with pytest.raises(ValueError, match="there are no conversations"):
        demonstration_trees([], chat, 1000)


def test_rule_02_rows_that_are_all_trained_raise_with_their_number():
    raw = Chat.load(tiny_tokenizer(), "raw")
    with pytest.raises(ValueError, match="row 2: the conversation begins with the assistant's words"):
        demonstration_trees([{"messages": SINGLE}, {"messages": SINGLE[1:]}], raw, 1000)


def test_rows_that_cannot_be_rendered_are_reported_together():
    chat = Chat.load(FAMILIES["gemma"]())
    bad = {"messages": [SINGLE[0], *SINGLE]}
    with pytest.raises(ValueError, match=r"row 2: .*roles must alternate\nrow 3: .*roles must alternate"):
        demonstration_trees([{"messages": SINGLE}, bad, bad], chat, 1000)


# --- comparisons


def test_comparisons_by_hand(chat):
    rows = [{"prompt": "what is 3 + 4?", "responses": ["seven", "four", "three"], "ranks": [0, 1, 1], "extra": 1}]
    [tree], kept = comparison_trees(rows, chat, 1000)
    assert tree.ranks == (0, 1, 1) and kept.indices == (0,)
    assert chat.decode(tree.root.input_ids.tolist()) == "<|im_start|>user\nwhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"
    assert not tree.root.trainable.any()
    assert trained_text(chat, tree)[1:] == ["seven<|im_end|>", "four<|im_end|>", "three<|im_end|>"]
    assert all(child.trainable.all() for child in tree.children)


def test_ranks_default_to_best_first_and_ties_are_dropped(chat):
    rows = [{"prompt": "a", "responses": ["b", "c"]}, {"prompt": "a", "responses": ["b", "c"], "ranks": [2, 2]}]
    [tree], kept = comparison_trees(rows, chat, 1000, max_dropped_fraction=0.5)
    assert tree.ranks == (0, 1) and kept.tied == 1 and kept.indices == (0,)


def test_judgements_by_hand(chat):
    rows = [{"prompt": SINGLE[:1], "response": "seven", "desirable": False}, {"prompt": "a", "response": SINGLE[1:], "desirable": True}]
    trees, kept = judgement_trees(rows, chat, 1000)
    assert [tree.root.input_ids.tolist() for tree in trees] == [chat.prompt(row["prompt"]) for row in rows]
    assert [[child.input_ids.tolist() for child in tree.children] for tree in trees] == [[chat.response(row["response"])] for row in rows]
    assert [tree.ranks for tree in trees] == [(1,), (0,)] and all(bool(tree.children[0].trainable.all()) for tree in trees)
    assert (kept.what, kept.kept, kept.tied) == ("judgements", 2, 0)
    with pytest.raises(ValueError, match="1 dropped as too long"):
        judgement_trees([*rows, {"prompt": "a", "response": "word " * 300, "desirable": True}], chat, 300)


def test_over_long_comparisons_and_prompts_are_dropped_whole(chat):
    rows = [{"prompt": "three and four", "responses": ["seven", "sort these words " * n]} for n in (1, 2, 3)]
    length = len(chat.prompt("three and four")) + len(chat.response("sort these words " * 2))
    trees, kept = comparison_trees(rows, chat, length, max_dropped_fraction=0.5)
    assert len(trees) == 2 and kept.too_long == 1 and kept.cut == 0
    limit = len(chat.prompt("three and four"))
    prompts = [{"prompt": "three and four"}, {"prompt": "three and four words"}]
    assert prompt_ids(prompts, chat, limit, max_dropped_fraction=0.5)[1].too_long == 1
    with pytest.raises(ValueError, match=f"2 dropped as too long.*the longest needs max_tokens={len(chat.prompt('three and four words'))}"):
        prompt_ids(prompts, chat, limit - 1)


def test_responses_may_be_messages_with_tools():
    chat = Chat.load(byte_level(TOOLS))
    [tree], _ = comparison_trees([{"prompt": WITH_TOOLS[:1], "responses": [WITH_TOOLS[1:], "seven"]}], chat, 1000)
    ids, trained = chat.conversation(WITH_TOOLS)
    start = len(tree.root)
    assert tree.children[0].input_ids.tolist() == ids[start:] and tree.children[0].trainable.tolist() == trained[start:]


def test_an_empty_response_is_its_end_of_turn(chat):
    [tree], _ = comparison_trees([{"prompt": "a", "responses": ["b", ""]}], chat, 1000)
    assert tree.children[1].input_ids.tolist() == [chat.end_of_turn_ids[0]]


def test_prompts_take_a_system_prompt(chat):
    [ids], _ = prompt_ids([{"prompt": "a"}], chat, 1000, "Be brief.")
    assert ids == chat.prompt("a", "Be brief.") and "Be brief." in chat.decode(ids)


# --- text


@pytest.mark.parametrize("make", [tiny_tokenizer, spaced])
@pytest.mark.parametrize("window", [2, 3, 7, 16, 500])
def test_windows_are_the_documents_end_to_end(make, window):
    chat = Chat.load(make())
    rows = [{"text": f"the sum of three and {n} is seven " * n} for n in range(1, 6)]
    trees, kept = text_windows(rows, chat, window)
    begin = [] if chat.bos_id is None else [chat.bos_id]
    stream = list(itertools.chain(*(chat.text(row["text"])[len(begin) :] for row in rows)))
    got = [tree.root.input_ids.tolist() for tree in trees]
    assert all(len(ids) == window for ids in got[:-1]) and all(2 <= len(ids) <= window for ids in got)
    assert all(ids[: len(begin)] == begin and ids.count(chat.bos_id) == len(begin) for ids in got)
    joined = list(itertools.chain(*(ids[len(begin) :] for ids in got)))
    assert joined == stream[: len(joined)] and len(stream) - len(joined) <= 1
    assert all(tree.root.trainable.tolist() == [False] + [True] * (len(tree.root) - 1) for tree in trees)
    assert stream.count(chat.document_end_id) == len(rows) and kept.total == 5


def test_a_window_has_two_tokens(chat):
    with pytest.raises(ValueError, match="window=1"):
        text_windows([{"text": "a"}], chat, 1)


# --- the cache


ROWS = {
    demonstration_trees: [{"messages": SINGLE}, {"messages": MULTI}, {"messages": [SINGLE[0]]}],
    judgement_trees: [{"prompt": "a", "response": "b", "desirable": True}, {"prompt": "c", "response": "d e", "desirable": False}],
    comparison_trees: [{"prompt": "a", "responses": ["b", "c", "d"], "ranks": [1, 0, 1]}, {"prompt": "a", "responses": ["b", "c"]}],
    text_windows: [{"text": "three and four is seven"}] * 3,
}


@pytest.mark.parametrize("function", ROWS, ids=lambda f: f.__name__)
def test_what_the_cache_gives_is_what_was_made(function, chat, tmp_path, monkeypatch):
    options = {} if function is text_windows else {"max_dropped_fraction": 0.5}
    made = function(ROWS[function], chat, 40, **options)
    first = function(ROWS[function], chat, 40, **options, cache=tmp_path)
    monkeypatch.setattr(Chat, "encode", None)  # nothing is tokenised any more
    again = function(ROWS[function], chat, 40, **options, cache=tmp_path)
    assert same(made[0], first[0]) and same(made[0], again[0])
    assert made[1] == first[1] == again[1]
    assert all(part.input_ids.dtype == torch.int64 for tree in again[0] for part in tree.segments)
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"], "no temporary file stays"


def test_the_cache_knows_rows_limits_chat_and_function_apart(chat, tmp_path):
    rows = [{"messages": MULTI, "prompt": "a"}]
    demonstration_trees(rows, chat, 1000, cache=tmp_path)
    demonstration_trees(rows, chat, 1001, cache=tmp_path)
    demonstration_trees(rows, chat, 1000, max_dropped_fraction=0.2, cache=tmp_path)
    demonstration_trees([{"messages": SINGLE, "prompt": "a"}], chat, 1000, cache=tmp_path)
    demonstration_trees(rows, Chat.load(tiny_tokenizer(), system_prompt="x"), 1000, cache=tmp_path)
    demonstration_trees(rows, Chat.load(tiny_tokenizer(), CHATML.replace("\\n", " ")), 1000, cache=tmp_path)
    prompt_ids(rows, chat, 1000, cache=tmp_path)
    prompt_ids(rows, chat, 1000, "x", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 8


def test_only_the_main_rank_writes_and_the_others_wait(chat, tmp_path):
    calls: list[str] = []

    class Rank:
        def __init__(self, is_main: bool) -> None:
            self.is_main = is_main

        def first_says(self, decide, phase: str):
            result = decide() if self.is_main else None
            calls.append(f"{'main' if self.is_main else 'other'} {phase}: {len(list(tmp_path.iterdir()))} files")
            return result

    rows = [{"messages": MULTI}]
    expected, _ = demonstration_trees(rows, chat, 1000)
    alone, _ = demonstration_trees(rows, chat, 1000, cache=tmp_path, world=Rank(False))  # a folder that is not shared
    main, _ = demonstration_trees(rows, chat, 1000, cache=tmp_path, world=Rank(True))
    other, _ = demonstration_trees(rows, chat, 1000, cache=tmp_path, world=Rank(False))
    assert calls == ["other tokenising: 0 files", "main tokenising: 1 files", "other tokenising: 1 files"]
    assert same(alone, expected) and same(main, expected) and same(other, expected)
