"""Reading data sets: counts made by hand, tokenizers as oracles, and every bad file of the list."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import os
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_planner import data_file
from lora_planner.data_file import DataFacts, parse_token_count, read_data
from lora_planner.errors import BadInput, EnvironmentMissing, UsageError
from lora_planner.ledger import ASSUMED, DERIVED, EXACT
from lora_planner.lengths import Histogram, clipped, expected_longest, packed_rows, percentile

HERE = Path(__file__).parent
EXAMPLE = HERE.parent / "examples" / "stdlib-docs.jsonl"
GOOD = {"messages": [{"role": "user", "content": "a" * 42}, {"role": "assistant", "content": "b" * 84}]}
RENDER = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "llama-3": "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}",
    "gemma": "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}",
}


def write(folder: Path, *rows: object, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return path


def chat(*texts: str) -> dict[str, object]:
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]}


# --- golden: counted by hand --------------------------------------------------------------------


def test_plain_text_by_hand(tmp_path: Path) -> None:
    """420 letters are 100 tokens at 4.2 bytes, and a begin and an end token are added."""
    facts = read_data(write(tmp_path, {"text": "a" * 420}, {"text": "b" * 840}))
    assert (facts.kind, facts.rows, facts.examples) == ("text", 2, 2)
    assert facts.histogram == ((102, 1), (202, 1))
    assert facts.tokens.value == 304
    assert facts.trained_tokens.value == 302  # all but the begin tokens
    assert (facts.longest, facts.longest_line) == (202, 2)
    assert facts.basis == ASSUMED
    assert facts.tokens.low < 304 < facts.tokens.high


def test_chat_by_hand(tmp_path: Path) -> None:
    """Only the answer and its end token are trained on; each message brings 5 tokens around it."""
    facts = read_data(write(tmp_path, GOOD))
    assert facts.tokens.value == 1 + (10 + 5) + (20 + 5)
    assert facts.trained_tokens.value == 21


@pytest.mark.parametrize(
    ("row", "kind", "trained", "total"),
    [
        ({"prompt": "a" * 42, "completion": "b" * 84}, "prompt_completion", 21, 32),
        ({"prompt": GOOD["messages"][:1], "completion": GOOD["messages"][1:]}, "prompt_completion", 21, 41),
        ({"instruction": "a" * 42, "input": "", "output": "b" * 84}, "instruction", 21, 41),
        ({"instruction": "a" * 42, "output": "b" * 84}, "instruction", 21, 41),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b" * 84}]},
         "conversations", 21, 31),
        ({"messages": [{"role": "assistant", "content": [{"type": "text", "text": "b" * 84}]}]},
         "messages", 21, 26),
        ({"messages": None, "text": "b" * 84}, "text", 21, 22),
        (chat("q", "b" * 42, "q", "b" * 42), "messages", 22, 41),
    ],
)  # fmt: skip
def test_schemas(tmp_path: Path, row: dict[str, object], kind: str, trained: int, total: int) -> None:
    """Every schema is told by its keys and trains on the answer alone."""
    facts = read_data(write(tmp_path, row))
    assert (facts.kind, facts.trained_tokens.value, facts.tokens.value) == (kind, trained, total)


def test_percentiles_by_hand() -> None:
    """Nearest rank: of 100 examples, p99 is the 99th."""
    histogram = ((1, 50), (2, 40), (3, 9), (4, 1))
    assert [percentile(histogram, q) for q in (0.5, 0.9, 0.99, 1.0)] == [1, 2, 3, 4]


def test_truncation_by_hand(tmp_path: Path) -> None:
    """A cut at 32 of 41 tokens costs 9, and trained ones among them are counted as lost."""
    facts = read_data(write(tmp_path, GOOD), max_length=32)
    assert (facts.truncated, facts.tokens_lost, facts.tokens.value) == (1, 9, 32)
    assert facts.trained_tokens.value == 32 - 1 - 15 - 3  # begin, question, head of the answer


def test_padding_by_hand(tmp_path: Path) -> None:
    """Lengths 102 and 202 fill 304 of 404 padded tokens, and a row of 304 when packed at 304."""
    path = write(tmp_path, {"text": "a" * 420}, {"text": "b" * 840})
    assert read_data(path).pad_efficiency == read_data(path).batch_efficiency == 304 / 404
    packed = read_data(path, max_length=304)
    assert (packed.packing_efficiency, packed.pad_efficiency) == (1.0, 0.5)


def test_bytes_per_token_contain_published_values() -> None:
    """The assumed interval for plain text contains what vocabularies' authors publish."""
    with open(HERE / "golden" / "bytes_per_token.csv", newline="") as file:
        for row in csv.DictReader(file):
            low, _, high = data_file.BYTES_PER_TOKEN["ascii"]
            assert low < float(row["value"]) < high, row["what"]


def test_scripts_are_told_apart() -> None:
    """Chinese takes more tokens per character than Russian, and Russian more than English."""
    per_character = [
        data_file.estimate_tokens(text)[1] / len(text) for text in ("plain words", "простые слова", "简单的词语")
    ]
    assert per_character == sorted(per_character)


def test_example_file_is_what_its_readme_says() -> None:
    """The checked-in example has the rows and the sha256 that examples/README.md states."""
    readme = (EXAMPLE.parent / "README.md").read_text()
    facts = read_data(EXAMPLE)
    assert facts.sha256 in readme
    assert facts.sha256 == hashlib.sha256(EXAMPLE.read_bytes()).hexdigest()
    assert f"{facts.rows:,} chats" in readme
    assert (facts.bad_rows, facts.duplicates, facts.kind, facts.warnings) == (0, 0, "messages", ())


@pytest.mark.parametrize(
    ("text", "n"),
    [("10M", 10**7), ("1.5B", 1_500_000_000), ("20k", 20_000), ("123456", 123_456), ("1_000", 1000)],
)
def test_token_counts(text: str, n: int) -> None:
    """Numbers of tokens are read as people write them."""
    assert parse_token_count(text) == n


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "10,000", "1e6", "nan", "10MB", "9" * 30, "٣", "0.0001k", "M"])
def test_bad_token_counts(text: str) -> None:
    """What is no whole number of tokens is refused, not rounded."""
    with pytest.raises(BadInput):
        parse_token_count(text)


def test_from_tokens() -> None:
    """A bare number of tokens is exact; lengths and the trained share are assumed, and said so."""
    facts = DataFacts.from_tokens(10_000_000)
    assert (facts.tokens.value, facts.tokens.basis) == (10_000_000, EXACT)
    assert (facts.trained_tokens.value, facts.trained_tokens.basis) == (10_000_000, ASSUMED)
    assert facts.longest == facts.p50 == 2048
    assert facts.examples == 4883
    assert facts.warnings
    assert DataFacts.from_tokens(5).longest == 5
    with pytest.raises(BadInput):
        DataFacts.from_tokens(0)


# --- oracles ------------------------------------------------------------------------------------

lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def histogram_of(values: list[int]) -> Histogram:
    return tuple(sorted(Counter(values).items()))


@given(lengths, st.integers(1, 50))
def test_packing_is_best_fit_decreasing(values: list[int], capacity: int) -> None:
    """Grouping equal lengths gives the rows that placing one example after another gives."""
    free: list[int] = []
    for length in sorted((min(v, capacity) for v in values), reverse=True):
        fitting = [i for i, room in enumerate(free) if room >= length]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= length
        else:
            free.append(capacity - length)
    assert packed_rows(histogram_of(values), capacity) == len(free)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 8))
def test_expected_longest_is_the_mean_over_all_batches(values: list[int], batch: int) -> None:
    """The closed form equals the mean over every possible batch."""
    drawn = list(itertools.combinations(values, min(batch, len(values))))
    mean = sum(max(one) for one in drawn) / len(drawn)
    assert expected_longest(histogram_of(values), batch) == pytest.approx(mean)


def train_tokenizer(folder: Path, template: str = "", bos: bool = False) -> Path:
    """A small BPE with the marks of all known templates, saved as a model folder has it."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    marks = sorted({mark for _, a, b in data_file.TEMPLATES for mark in data_file.MARK.findall(a + b)})
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", *marks],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        m["content"] for line in EXAMPLE.read_text("utf-8").splitlines()[:200] for m in json.loads(line)["messages"]
    ]
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    tokenizer.enable_truncation(8)  # what somebody's last run left behind must not matter
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} if template else {}))
    return folder


TEXTS = ["Return the sum of a start value.", "x = 17  # naïve 好", "\n\n", "a" * 300, "<|im_start|> twice"]


@pytest.mark.parametrize("bos", [False, True])
def test_plain_text_is_counted_exactly(tmp_path: Path, bos: bool) -> None:
    """With a tokenizer, lengths are those of encode() and one end token: exact, without interval."""
    folder = train_tokenizer(tmp_path, bos=bos)
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    expected = [len(tokenizer.encode(text).ids) + 1 for text in TEXTS]
    path = write(tmp_path, *({"text": text} for text in TEXTS))
    for given_path in (folder, folder / "tokenizer.json"):
        facts = read_data(path, tokenizer=str(given_path))
        assert facts.histogram == histogram_of(expected)
        assert facts.tokens.low == facts.tokens.value == facts.tokens.high == sum(expected)
        assert facts.tokens.basis == EXACT


@pytest.mark.parametrize("template", list(RENDER))
def test_chat_lengths_equal_transformers(tmp_path: Path, template: str) -> None:
    """Without running the template, lengths equal those of transformers, which does run it."""
    transformers = pytest.importorskip("transformers")
    folder = train_tokenizer(tmp_path, RENDER[template])
    oracle = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    oracle.chat_template = RENDER[template]
    rows = [
        chat("Hi", "Hello there."),
        chat("sum(a)?", "Return it.", "and b?", "x = 17 好"),
        chat("q", "a" * 99),
    ]
    expected = [
        len(oracle.apply_chat_template(r["messages"], truncation=False, padding=False)["input_ids"]) for r in rows
    ]
    facts = read_data(write(tmp_path, *rows), tokenizer=str(folder))
    assert facts.template.startswith(template)
    assert facts.histogram == histogram_of(expected)
    assert facts.basis == DERIVED  # a real template may add a system prompt
    assert facts.tokens.low == facts.tokens.value < facts.tokens.high


def test_prompt_and_completion_are_tokenised_joined(tmp_path: Path) -> None:
    """Wherever a text is split, its tokens are those of the whole; what is not the prompt is trained on."""
    folder = train_tokenizer(tmp_path)
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    text = "Return the sum of a start value."
    splits = [(text[:at], text[at:]) for at in range(1, len(text))]
    facts = read_data(write(tmp_path, *({"prompt": a, "completion": b} for a, b in splits)), tokenizer=str(folder))
    whole = len(tokenizer.encode(text).ids) + 1
    assert facts.histogram == ((whole, len(splits)),)
    assert facts.trained_tokens.value == sum(whole - min(whole - 1, len(tokenizer.encode(a).ids)) for a, _ in splits)
    assert facts.basis == EXACT


def test_unknown_template_is_assumed(tmp_path: Path) -> None:
    """A template without known marks is not guessed from the vocabulary: its tokens are assumed."""
    folder = train_tokenizer(tmp_path, "{{ evil() }}")
    facts = read_data(write(tmp_path, GOOD), tokenizer=str(folder))
    assert facts.basis == ASSUMED
    assert "assumed" in facts.template


def test_parquet_equals_json_lines(tmp_path: Path) -> None:
    """The same rows give the same facts in both formats, optional columns included."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [GOOD, chat("q", "好" * 9), chat("no answer"), {"text": "plain"}]
    table = pa.Table.from_pylist([{"messages": None, "text": None, "id": i} | r for i, r in enumerate(rows)])
    parquet.write_table(table, tmp_path / "data.parquet")
    a = read_data(write(tmp_path, *rows), max_length=30)
    b = read_data(tmp_path / "data.parquet", max_length=30)
    for name in DataFacts.__slots__:
        if name not in ("path", "sha256", "warnings"):
            assert getattr(a, name) == getattr(b, name), name
    assert b.sha256 == hashlib.sha256((tmp_path / "data.parquet").read_bytes()).hexdigest()
    assert [w.replace("row 3", "line 3") for w in b.warnings] == list(a.warnings)


# --- relations ----------------------------------------------------------------------------------

words = st.text(st.sampled_from("ab 9好é\n"), min_size=1, max_size=80)
row_lists = st.lists(st.one_of(st.builds(chat, words, words), st.builds(lambda t: {"text": t}, words)), min_size=1)


@given(rows=row_lists, seed=st.integers(0, 99))
def test_order_changes_nothing(
    rows: list[dict[str, object]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Permuted rows have the same tokens, lengths and efficiencies."""
    folder = tmp_path_factory.mktemp("order")
    a = read_data(write(folder, *rows), max_length=40)
    random.Random(seed).shuffle(rows)
    b = read_data(write(folder, *rows), max_length=40)
    for name in DataFacts.__slots__:
        if name not in ("path", "sha256", "longest_line", "tokens", "trained_tokens"):
            assert getattr(a, name) == getattr(b, name), name
    for x, y in ((a.tokens, b.tokens), (a.trained_tokens, b.trained_tokens)):
        assert (x.low, x.value, x.high) == pytest.approx((y.low, y.value, y.high))


@given(rows=row_lists, limits=st.tuples(st.integers(20, 90), st.integers(0, 90)))
def test_more_rows_and_longer_limits(
    rows: list[dict[str, object]], limits: tuple[int, int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """More rows never have fewer tokens; a longer limit never loses more; efficiencies stay within 0 to 1."""
    folder = tmp_path_factory.mktemp("more")
    rows.insert(0, {"text": "always trained"})
    short, longer = limits[0], sum(limits)
    a, b = (read_data(write(folder, *rows), max_length=n) for n in (short, longer))
    fewer = read_data(write(folder, *rows[: len(rows) // 2 + 1]), max_length=short)
    assert fewer.tokens.value <= a.tokens.value <= b.tokens.value
    assert fewer.trained_tokens.value <= a.trained_tokens.value <= b.trained_tokens.value
    assert a.truncated >= b.truncated
    assert a.tokens_lost - b.tokens_lost == b.tokens.value - a.tokens.value
    for facts in (a, b):
        assert facts.trained_tokens.value <= facts.tokens.value
        assert facts.tokens.low <= facts.tokens.value <= facts.tokens.high
        for efficiency in (facts.pad_efficiency, facts.batch_efficiency, facts.packing_efficiency):
            assert 0 < efficiency <= 1 + 1e-12
        assert facts.pad_efficiency <= facts.batch_efficiency + 1e-12


@given(lengths, st.integers(1, 50))
def test_clipping_keeps_examples(values: list[int], limit: int) -> None:
    """Truncation shortens examples, it drops none."""
    after = clipped(histogram_of(values), limit)
    assert after == histogram_of([min(v, limit) for v in values])


# --- bad files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\n \n\n", "no rows"),
        (b"\x00\x01\x02binary", "binary"),
        (b"\x1f\x8b\x08\x00", "compressed"),
        (b"\xff\xfe{", "line 1: not UTF-8"),
        (b'{"text": "\xe9"}\n', "line 1: not UTF-8 at byte 10"),
        (b"hello\n", "line 1: not JSON"),
        (b'[\n  {"text": "a"}\n]\n', "jq -c"),
        (b'{"text": ' + b"[" * 100_000, "nested too deep"),
        (b'{"text": ' + b"1" * 6000 + b"}", "number too long"),
        (b'{"text": "\\ud800"}\n', "lone surrogate"),
        (b'{"text": 5}\n', "expected text, got int"),
        (b'{"text": ""}\n', "empty"),
        (b'{"chosen": "a", "rejected": "b"}\n', "unknown schema: 'chosen', 'rejected'"),
        (b'{"messages": {"role": "user"}}\n', "list of messages"),
        (b'{"messages": ["hi"]}\n', "message object"),
        (b'{"messages": [{"content": "hi"}]}\n', "without a 'role'"),
        (b'{"messages": [{"role": "user", "content": "hi"}]}\n', "no assistant turn"),
        (b'{"messages": []}\n', "no assistant turn"),
        (b'{"messages": [{"role": "assistant", "content": ""}]}\n', "nothing to train on"),
        (b'{"messages": [{"role": "assistant", "content": [{"type": "image_url"}]}]}\n', "not text"),
        (b'{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}\n', "must both"),
    ],
)  # fmt: skip
def test_files_without_a_usable_row(tmp_path: Path, content: bytes, says: str) -> None:
    """A file with nothing to train on is refused in one line that names the first bad line."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInput) as caught:
        read_data(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_bad_rows_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    """Some bad rows are left out, with their number and the first one's line."""
    facts = read_data(write(tmp_path, GOOD, "", "{broken", chat("only a question"), chat("q", "a")))
    assert (facts.rows, facts.examples, facts.bad_rows) == (4, 2, 2)
    assert facts.first_bad is not None
    assert facts.first_bad[0] == 3
    assert "line 3: not JSON" in facts.warnings[0]


def test_single_row_warns(tmp_path: Path) -> None:
    """One example is accepted, with a warning."""
    assert "single example" in read_data(write(tmp_path, GOOD)).warnings[0]


def test_duplicates_are_counted(tmp_path: Path) -> None:
    """An example that repeats an earlier one counts once, however its JSON is spaced."""
    facts = read_data(write(tmp_path, GOOD, json.dumps(GOOD, indent=None, separators=(",", ":")), chat("q", "a")))
    assert facts.duplicates == 1
    assert any("repeat" in warning for warning in facts.warnings)


def test_mixed_schemas_are_reported(tmp_path: Path) -> None:
    """Two schemas in one file are read, counted and reported."""
    facts = read_data(write(tmp_path, GOOD, {"text": "a"}, {"text": "b"}))
    assert (facts.kind, facts.kinds) == ("mixed", (("text", 2), ("messages", 1)))
    assert "mixed schemas: text 2, messages 1" in facts.warnings


def test_rendered_templates_are_reported(tmp_path: Path) -> None:
    """A chat whose content already carries a template's tokens is the wrong input for a template."""
    facts = read_data(write(tmp_path, chat("<|im_start|>user\nhi<|im_end|>", "a"), GOOD))
    assert "1 examples already contain" in facts.warnings[-1]


def test_all_truncated(tmp_path: Path) -> None:
    """Every example cut is a warning; every answer cut off is an error that names the first line."""
    path = write(tmp_path, GOOD, chat("a" * 42, "b" * 90))
    assert "every example longer than 32 tokens" in read_data(path, max_length=32).warnings[0]
    with pytest.raises(BadInput, match=r"no trained token is left.*:1\)"):
        read_data(path, max_length=10)
    with pytest.raises(UsageError):
        read_data(path, max_length=0)


def test_answers_cut_off_are_counted(tmp_path: Path) -> None:
    """An example whose question alone fills max_length trains on nothing, and is reported."""
    facts = read_data(write(tmp_path, chat("a" * 4200, "b"), GOOD), max_length=100)
    assert facts.untrained == 1
    assert any("no trained token" in warning for warning in facts.warnings)


def test_endless_lines_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line over the limit is a bad row, is never held whole, and the next line is read."""
    monkeypatch.setattr(data_file, "LONGEST_LINE", 1000)
    path = write(tmp_path, {"text": "a" * 5000}, {"text": "b" * 420}, {"text": "c" * 3_000_000}, {"text": "d" * 420})
    facts = read_data(path)
    assert (facts.bad_rows, facts.examples, facts.longest_line) == (2, 2, 2)
    assert facts.first_bad is not None
    assert "longer than" in facts.first_bad[1]
    assert facts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_byte_order_mark_is_read(tmp_path: Path) -> None:
    """A byte order mark at the start, as some editors write it, is no error."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n")
    assert read_data(path).bad_rows == 0


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """Folders, pipes, devices, loops of links and missing files are refused without being opened."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "loop", tmp_path / "none", "/dev/zero", "a\0b"):
        with pytest.raises(BadInput):
            read_data(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (json.dumps(GOOD).encode(), "no Parquet file"),
        (b"PAR1 and no end", "without its end"),
        (b"PAR1 nothing inside PAR1", "cannot be read"),
    ],
)
def test_broken_parquet(tmp_path: Path, content: bytes, says: str) -> None:
    """A file that is not what its name or its first bytes say is refused."""
    pytest.importorskip("pyarrow")
    (tmp_path / "data.parquet").write_bytes(content)
    with pytest.raises(BadInput, match=says):
        read_data(tmp_path / "data.parquet")


def test_parquet_without_a_known_column(tmp_path: Path) -> None:
    """Unknown columns are named, and so are the known ones."""
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"question": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(BadInput, match=re.escape("'question'") + ".*messages"):
        read_data(tmp_path / "d.parquet")


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_broken_tokenizers(tmp_path: Path, content: str) -> None:
    """A file that is no tokenizer is refused, as is a folder without one."""
    pytest.importorskip("tokenizers")
    data = write(tmp_path, GOOD)
    with pytest.raises(BadInput):
        read_data(data, tokenizer=str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadInput, match=r"not a tokenizer\.json"):
        read_data(data, tokenizer=str(tmp_path))


@pytest.mark.parametrize(("module", "extra"), [("tokenizers", "tokenizer"), ("pyarrow.parquet", "parquet")])
def test_missing_libraries_name_their_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, extra: str
) -> None:
    """Without the optional library the error says what to install, with exit code 6."""
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / "data"
    path.write_bytes(b"PAR1PAR1" if extra == "parquet" else json.dumps(GOOD).encode())
    with pytest.raises(EnvironmentMissing, match=re.escape(f"lora-plan[{extra}]")) as caught:
        read_data(path, tokenizer=str(tmp_path) if extra == "tokenizer" else None)
    assert caught.value.exit_code == 6
