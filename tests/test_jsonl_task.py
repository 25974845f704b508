"""The user's file as a task: what is trained on is checked by decoding it, what is left out by its count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lora_planner.errors import BadInput
from runner.tasks import IGNORED, Sample, Task, jsonl

HEAD = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
ASK = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = HEAD + "{{ m.content }}<|im_end|>\n" + ASK
MARKED = (
    HEAD + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}" + ASK
)
#: as reasoning models do: the thought of an answer is dropped once another turn follows
FORGETS = HEAD + "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n" + ASK
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}" + CHATML
TWO_TURNS = [("user", "hi"), ("assistant", "Hello."), ("user", "2+2?"), ("assistant", "4")]


def words(template: str | None = None) -> Any:
    """A token a byte, two for the ends of a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    found.chat_template = template
    return found


def chat(turns: list[tuple[str, str]]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def text(i: int) -> dict[str, str]:
    return {"text": f"row {i:03}"}


def one(i: int = 0) -> dict[str, object]:
    return chat([("user", f"say {i}"), ("assistant", f"it is {i}")])


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Task]:
    def build(rows: list[object], template: str | None = None, seq_len: int = 512, seed: int = 0) -> Task:
        path = tmp_path / "data.jsonl"
        path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
        return jsonl.build(words(template), seq_len, seed, sha256=jsonl.register(path))

    return build


def row(task: Task, line: int) -> Sample:
    return next(s for s in task.train + task.held_out if s.id == f"data.jsonl:{line}")


def learnt(sample: Sample) -> str:
    """What the loss is on, in plain text; a bar where trained tokens are interrupted."""
    parts: list[list[int]] = [[]]
    for label in sample.labels:
        if label == IGNORED:
            parts += [[]] if parts[-1] else []
        else:
            parts[-1].append(label)
    return "|".join(words().decode(p) for p in parts if p)


# --- what is trained on ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "trained"),
    [(CHATML, "Hello.<|im_end|>\n|4<|im_end|>\n"), (MARKED, "Hello.<|im_end|>|4<|im_end|>")],
)
def test_only_the_answers_of_a_chat(built: Callable[..., Task], template: str, trained: str) -> None:
    """Every answer of a chat with its end, no question and no header, with and without marks in the template."""
    task = built([chat(TWO_TURNS), one(1), one(2)], template)
    assert learnt(row(task, 1)) == trained
    assert words().decode(row(task, 1).tokens).startswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nHel")
    assert all(label in (IGNORED, t) for s in task.train for t, label in zip(s.tokens, s.labels, strict=True))


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_answers_in_a_prompt_are_context(built: Callable[..., Task], template: str) -> None:
    """A prompt of messages may hold answers: they are not trained on, the completion is."""
    messages = chat(TWO_TURNS)["messages"]
    task = built([{"prompt": messages[:3], "completion": messages[3:]}, one(1), one(2)], template)
    assert learnt(row(task, 1)).strip() == "4<|im_end|>"


@pytest.mark.parametrize(
    ("data", "trained"),
    [
        ({"text": "caf\u00e9"}, "café<|im_end|>"),
        ({"prompt": "2+2=", "completion": "4"}, "4<|im_end|>"),
        ({"instruction": "Add", "input": "1 1", "output": "2"}, "2<|im_end|>\n"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "a<|im_end|>\n"),
    ],
)
def test_other_schemas(built: Callable[..., Task], data: dict[str, object], trained: str) -> None:
    """Text is trained whole and ends; a completion after its prompt; ShareGPT's human is the template's user."""
    task = built([data, one(1), one(2)], STRICT)
    assert learnt(row(task, 1)) == trained


def test_cut_rows(built: Callable[..., Task]) -> None:
    """A row is cut at seq_len and counted; what is left of its answer is trained on."""
    task = built([{"prompt": "ab", "completion": "cdef"}, *[{"prompt": "x", "completion": c} for c in "yz"]], None, 4)
    assert learnt(row(task, 1)) == "cd"
    assert task.facts["truncated"] == 1


# --- what is left out -----------------------------------------------------------------------------


def test_few_bad_rows_are_counted(built: Callable[..., Task]) -> None:
    """Broken JSON, an unknown schema and a question longer than seq_len: skipped, with reasons and the first line."""
    bad = ["{", {"a": 1}, {"prompt": "p" * 600, "completion": "c"}]
    task = built([text(0), *bad, *map(text, range(1, 100))])
    assert task.facts["rows"] == 103
    assert task.facts["skipped"] == {"not JSON": 1, "unknown schema": 1, "all truncated": 1}
    assert task.facts["first_skipped"].startswith("line 2: not JSON")
    assert len(task.train) + len(task.held_out) == 100


def test_many_bad_rows_are_refused(built: Callable[..., Task]) -> None:
    """Above 5 % the file is refused, naming the first line; at 5 % it is not."""
    assert built([*map(text, range(95)), *["{"] * 5]).facts["skipped"] == {"not JSON": 5}
    with pytest.raises(BadInput, match=r"6 of 100 rows cannot be trained on, first line 95: not JSON"):
        built([*map(text, range(94)), *["{"] * 6])


def test_all_truncated_is_refused(built: Callable[..., Task]) -> None:
    """Where no answer survives the cut there is no task."""
    with pytest.raises(BadInput, match="first line 1: all truncated"):
        built([one(1), one(2)], CHATML, 16)


def test_a_template_that_forgets(built: Callable[..., Task]) -> None:
    """It drops an earlier thought, so that no sequence shows both answers as they are given: the last is trained."""
    thinking = chat([("user", "a"), ("assistant", "<think>hm</think>b"), ("user", "c"), ("assistant", "d")])
    task = built([thinking, *map(one, range(30))], FORGETS)
    assert task.facts["skipped"] == {}
    assert learnt(row(task, 1)) == "d<|im_end|>\n"
    assert "hm" not in words().decode(row(task, 1).tokens)
    assert learnt(row(task, 2)) == "it is 0<|im_end|>\n"


def test_a_template_that_rewrites(built: Callable[..., Task]) -> None:
    """Where even the last answer continues no prompt, the row is skipped and counted, and a file of such is refused."""
    counts = "{{ messages | length }}" + CHATML
    with pytest.raises(BadInput, match="line 1: the chat template rewrites earlier turns: turn 2"):
        built([*map(one, range(3))], counts)


def test_a_template_that_raises(built: Callable[..., Task]) -> None:
    """Its refusal of one row is that row's reason, not the end of the run."""
    task = built([chat([("system", "s"), ("user", "u"), ("assistant", "a")]), *map(one, range(30))], STRICT)
    assert task.facts["skipped"] == {"tokenizer or chat template failed": 1}
    assert "a user must begin" in task.facts["first_skipped"]


def test_a_chat_without_template_is_refused(built: Callable[..., Task]) -> None:
    """No template is made up for a tokenizer that has none; text needs none."""
    with pytest.raises(BadInput, match=r"no chat template \(data.jsonl:2\)"):
        built([text(0), one(1)])


# --- held out, identity ---------------------------------------------------------------------------


def test_a_tenth_is_held_out(built: Callable[..., Task]) -> None:
    """A tenth of the different rows; copies, and rows that are equal once cut, fall on one side; seeds differ."""
    rows = [text(i) for i in range(100)]
    task = built([*rows, *rows, *[{"text": f"row {i:03} and more"} for i in range(100)]], None, 7)
    train, held_out = ({s.tokens for s in part} for part in (task.train, task.held_out))
    assert (len(train), len(held_out), len(train & held_out)) == (90, 10, 0)
    assert (len(task.train), len(task.held_out), task.facts["duplicates"]) == (270, 30, 200)
    assert task.facts["trained_tokens"] == 270 * 6  # seven bytes, the first has nothing before it
    assert {s.tokens for s in built(rows, None, 7, seed=1).held_out} != held_out
    assert {s.tokens for s in built(rows, None, 7).held_out} == held_out


def test_something_is_left_on_both_sides(built: Callable[..., Task]) -> None:
    """Two rows are one to train on and one held out; copies of a single row are refused."""
    task = built([text(0), text(1)])
    assert (len(task.train), len(task.held_out)) == (1, 1)
    with pytest.raises(BadInput, match="all rows are the same"):
        built([text(0)] * 3)


def test_the_file_must_not_change(tmp_path: Path) -> None:
    """A file is found by its hash; one that was edited, moved or never named is refused, not trained on."""
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    sha256 = jsonl.register(path)
    task = jsonl.build(words(), 16, 0, sha256=sha256)
    assert task.facts["sha256"] == sha256
    assert jsonl.build(words(), 16, 0, path=str(path)) == task
    path.write_text('{"text": "one"}\n{"text": "2"}\n')
    with pytest.raises(BadInput, match="has changed"):
        jsonl.build(words(), 16, 0, sha256=sha256)
    path.unlink()
    with pytest.raises(BadInput, match="cannot read"):
        jsonl.build(words(), 16, 0, sha256=sha256)
    with pytest.raises(BadInput, match="no file with sha256 000000000000 was given"):
        jsonl.build(words(), 16, 0, sha256="0" * 64)
