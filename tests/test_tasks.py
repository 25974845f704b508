"""The runner's data: what it is made of, what is held out, which tokens count, and what counting alone predicts."""

from __future__ import annotations

import ast
import inspect
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from lora_planner.errors import BadInput, EnvironmentMissing
from runner import corpus
from runner.baselines import bigram_nats, unigram_nats
from runner.corpus import Document, code_documents, digest, divide, modules, prose_documents, split
from runner.tasks import IGNORED, Sample, build
from runner.tasks.code import windows
from runner.tokenizer import save, train_tokenizer

torch.set_num_threads(1)
VOCAB = 1027  # 1,024 tokens and three special ones: a random token holds exactly 10 bits
KINDS = pytest.mark.parametrize("documents", [code_documents, prose_documents])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    save(train_tokenizer(VOCAB), folder)
    return AutoTokenizer.from_pretrained(folder)


def runs(text: str, words: int = 10) -> set[tuple[str, ...]]:
    """Every run of so many words, whatever the line breaks."""
    split_text = text.split()
    return set(zip(*(split_text[i:] for i in range(words)), strict=False))


class WithoutStrings(ast.NodeTransformer):
    """Takes out every statement that is only a string; a block that this empties gets `pass`."""

    def generic_visit(self, node: ast.AST) -> ast.AST:
        super().generic_visit(node)
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_string = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_string else node


def test_code_is_the_program_without_its_docstrings_and_comments() -> None:
    """The syntax tree is the source's own, string statements taken out."""
    checked = modules()[::25]
    for module in checked:
        source = (corpus.library() / module.path).read_text("utf-8")
        assert ast.dump(ast.parse(module.code)) == ast.dump(WithoutStrings().visit(ast.parse(source))), module.path
    assert not any("\n    # " in module.code for module in checked)


def test_every_docstring_is_found() -> None:
    """All that `ast.get_docstring` finds is among a module's docstrings."""
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    checked = modules()[::25]
    for module in checked:
        tree = ast.parse((corpus.library() / module.path).read_text("utf-8"))
        found = {ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, holders)} - {None}
        assert found <= set(module.docstrings), module.path
    assert sum(len(m.docstrings) for m in checked) > 100


@pytest.mark.parametrize(
    ("source", "code", "docstrings"),
    [
        ('"""One."""\nx = "not one"  # why\n', 'x = "not one"\n', ("One.",)),
        ('def f(): "On one line."\n', "def f(): pass\n", ("On one line.",)),
        ('class A:\n    x = 1\n    "Of x."\n', "class A:\n    x = 1\n", ("Of x.",)),
        ('f = lambda: "a value"\n', 'f = lambda: "a value"\n', ()),
        ('x = """# no comment"""\n', 'x = """# no comment"""\n', ()),
        ('b"bytes"\n', 'b"bytes"\n', ()),
    ],
)
def test_what_a_docstring_is(source: str, code: str, docstrings: tuple[str, ...]) -> None:
    """A string that is a whole statement, and no other."""
    assert divide(source) == (code, docstrings)


def test_python_without_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No .py files: the missing environment is said; a file that does not tokenize is left out."""
    monkeypatch.setattr(corpus, "library", lambda: tmp_path)
    with pytest.raises(EnvironmentMissing, match="no source"):
        modules.__wrapped__()
    (tmp_path / "broken.py").write_text("x = (\n", "utf-8")
    (tmp_path / "good.py").write_text("x = 1\n", "utf-8")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_good.py").write_text("x = 1\n", "utf-8")
    assert [m.path for m in modules.__wrapped__()] == ["good.py"]
    assert corpus.topics() == {}


def test_topics_are_those_that_help_shows() -> None:
    """Read as data, they are what the module holds."""
    from pydoc_data.topics import topics

    assert corpus.topics() == topics
    assert sum(d.id.startswith("topics/") for d in prose_documents()) > 40


@KINDS
def test_documents_are_ordered_and_stay_the_same(documents: Any) -> None:
    """Sorted by id, each id once, the same digest from a second reading."""
    ids = [d.id for d in documents()]
    assert ids == sorted(set(ids))
    assert len(ids) > 200
    first = digest(documents())
    assert digest(documents.__wrapped__()) == first != digest(documents()[1:])


@KINDS
def test_no_document_is_on_both_sides(documents: Any) -> None:
    """Each document is in one part, and about a tenth is held out."""
    train, held_out = split(documents())
    assert not {d.id for d in train} & {d.id for d in held_out}
    assert sorted([*train, *held_out], key=lambda d: d.id) == list(documents())
    assert 0.05 < len(held_out) / len(documents()) < 0.15
    assert {d.id for d in held_out} <= {d.id for d in split(documents(), held_out=0.3)[1]}


def test_prose_is_new_to_who_knows_the_code() -> None:
    """No line of 50 characters is in both; of runs of ten words, hardly one in a thousand."""
    code, prose = ({line.strip() for d in kind() for line in d.text.split("\n")} for kind in KINDS.args[1])
    assert not [line for line in code & prose if len(line) >= 50]
    known = set().union(*(runs(d.text) for d in code_documents()))
    told = set().union(*(runs(d.text) for d in prose_documents()))
    assert len(told) > 100_000
    assert len(told & known) < 0.001 * len(told)


def test_held_out_prose_is_new_to_who_knows_the_rest() -> None:
    """Topics that contain each other and inherited docstrings would show here: one run in a hundred at most."""
    train, held_out = (set().union(*(runs(d.text) for d in part)) for part in split(prose_documents()))
    assert len(held_out & train) < 0.01 * len(held_out)


def test_tokenizer_is_the_same_each_time(tokenizer: Any) -> None:
    """Trained again it is identical; any text comes back from its tokens; the special ones are single tokens."""
    again = train_tokenizer(VOCAB)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert len(tokenizer) == VOCAB
    text = "  def f(x):\n\treturn 'Äö €' # \x00\n"
    assert tokenizer.decode(again.encode(text).ids) == text
    assert [len(again.encode(word).ids) for word in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [1, 1, 1]
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


def test_tokenizer_needs_its_bytes() -> None:
    """Fewer tokens than bytes and special tokens are refused."""
    with pytest.raises(BadInput, match="259 or more"):
        train_tokenizer(258)


def test_chat_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    """The mask covers each answer with its end, and nothing else."""
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four, naïvely."},
        {"role": "user", "content": "And three?"},
        {"role": "assistant", "content": "Five."},
    ]
    out = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = out["input_ids"], out["assistant_masks"]
    said = tokenizer.decode([t for t, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
    assert said == "Four, naïvely.<|im_end|>Five.<|im_end|>"
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n")
    prompt = tokenizer.apply_chat_template(chat[:2], add_generation_prompt=True, tokenize=False)
    assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt)


def test_windows_are_the_documents_cut(tokenizer: Any) -> None:
    """Put together again they are the text, with eos after each document; only a short rest is missing."""
    documents = [Document("a", "first one. " * 20), Document("b", "2"), Document("c", "and a third. " * 9)]
    cut = list(windows(documents, tokenizer, 16))
    whole = "<|endoftext|>".join([*(d.text for d in documents), ""])
    text = tokenizer.decode([t for s in cut for t in s.tokens], skip_special_tokens=False)
    assert whole.startswith(text)
    assert len(tokenizer.encode(whole)) - 16 < 16 * len(cut) <= len(tokenizer.encode(whole))
    assert {len(s.tokens) for s in cut} == {16}
    assert cut[0].id == "a, window 0"
    assert cut[-1].id.startswith("c, ")


@pytest.mark.parametrize("name", ["code", "shift"])
def test_text_tasks(tokenizer: Any, name: str) -> None:
    """Every token is trained; the seed draws only the held-out windows, of other documents than those trained on."""
    args = {"max_train_windows": 200, "held_out_windows": 40}
    task, again, other = (build(name, tokenizer, 64, seed, args) for seed in (0, 0, 1))
    assert (task.train, task.held_out, task.facts) == (again.train, again.held_out, again.facts)
    assert task.train == other.train
    assert task.held_out != other.held_out
    assert all(s.labels == s.tokens and len(s.tokens) == 64 for s in [*task.train, *task.held_out])
    sides = [{s.id.rsplit(", ", 1)[0] for s in part} for part in (task.train, task.held_out)]
    parts = split(code_documents() if name == "code" else prose_documents())
    assert all(side <= {d.id for d in part} for side, part in zip(sides, parts, strict=True))
    assert len({s.id for s in task.held_out}) == 40
    assert task.facts["train_windows"] == 200
    assert task.facts["held_out_windows"] == 40
    assert task.facts["trained_tokens"] == 200 * 63
    assert build(name, tokenizer, 64, 0, {**args, "max_train_windows": 50}).train == task.train[:50]


@pytest.mark.parametrize("name", ["code", "shift"])
def test_pairs_predict_better_than_frequencies(tokenizer: Any, name: str) -> None:
    """On real text: bigram < unigram < guessing."""
    task = build(name, tokenizer, 128, 0, {"max_train_windows": 1500})
    unigram, bigram = (f(task.train, task.held_out, VOCAB) for f in (unigram_nats, bigram_nats))
    assert bigram < unigram - 0.5 < log(VOCAB) - 1.0


def test_facts_train_only_the_value(tokenizer: Any) -> None:
    """Keys differ, the value alone counts, and the bits are those of the draw: 10 a token here."""
    task = build("facts", tokenizer, 32, 0, {"n": 50, "value_tokens": 3})
    assert task.facts["information_bits"] == 50 * 3 * 10
    assert task.facts["trained_tokens"] == sum(s.trained for s in task.train) == 150
    assert len({s.tokens[:4] for s in task.train}) == 50
    for s in task.train:
        assert s.labels == (IGNORED,) * (len(s.tokens) - 3) + s.tokens[-3:]
        assert " ->" in tokenizer.decode(s.tokens)
        assert not set(s.tokens) & set(tokenizer.all_special_ids)
    assert task.held_out == task.train
    assert build("facts", tokenizer, 32, 0, {"n": 50, "value_tokens": 3}) == task
    assert build("facts", tokenizer, 32, 1, {"n": 50, "value_tokens": 3}).train != task.train


def test_probe_has_no_padding(tokenizer: Any) -> None:
    """Samples of exactly the length asked for, every token trained but the first."""
    task = build("probe", tokenizer, 48, 0, {"n": 7})
    assert [len(s.tokens) for s in [*task.train, *task.held_out]] == [48] * 8
    assert task.facts["trained_tokens"] == 7 * 47
    assert build("probe", tokenizer, 48, 0, {"n": 7}) == task != build("probe", tokenizer, 48, 1, {"n": 7})


@pytest.mark.parametrize("name", ["code", "shift", "facts", "probe"])
def test_every_task_says_what_it_is_made_of(tokenizer: Any, name: str) -> None:
    """The facts that a record needs are in every task."""
    facts = build(name, tokenizer, 64, 0, {"max_train_windows": 9} if name in ("code", "shift") else {}).facts
    assert {"documents", "train_windows", "held_out_windows", "trained_tokens", "corpus_sha256"} <= set(facts)
    assert len(facts["corpus_sha256"]) == 64


@pytest.mark.parametrize(
    ("name", "seq_len", "args"),
    [
        ("code", 1, {}),
        ("code", 64, {"max_train_windows": 0}),
        ("shift", 64, {"held_out_windows": 0}),
        ("facts", 32, {"n": 0}),
        ("facts", 8, {"value_tokens": 8}),
        ("facts", 32, {"n": 1024**4}),
        ("probe", 32, {"n": 0}),
        ("probe", 1, {}),
    ],
)
def test_impossible_arguments_are_refused(tokenizer: Any, name: str, seq_len: int, args: dict[str, int]) -> None:
    """Before anything is drawn, on one line."""
    with pytest.raises(BadInput) as error:
        build(name, tokenizer, seq_len, 0, args)
    assert "\n" not in str(error.value)


def sample(*tokens: int, labels: tuple[int, ...] = ()) -> Sample:
    return Sample("s", tokens, labels or tokens)


def test_baselines_by_hand() -> None:
    """Three tokens, five training pairs.

    p(v) = (1+1, 4+1, 0+1) / (5+3). The weight maximises 2 ln(.6 + .4 w) + ln(.2 (1 - w)), which are the second
    sample's pairs under the first sample's counts: w = 1/6, and .15 is the nearest on the grid.
    """
    train, held_out = [sample(0, 1, 1), sample(0, 1, 0, 1)], [sample(0, 1, 2, 0)]
    assert unigram_nats(train, held_out, 3) == pytest.approx(-(log(5 / 8) + log(1 / 8) + log(2 / 8)) / 3, rel=1e-12)
    by_hand = -(log(0.15 + 0.85 * 5 / 8) + log(0.85 / 8) + log(2 / 8)) / 3
    assert bigram_nats(train, held_out, 3) == pytest.approx(by_hand, rel=1e-12)


def test_baselines_count_only_trained_positions() -> None:
    """A masked label is in no count and in no mean; without any label there is nothing to say."""
    train = [sample(0, 1, 1), sample(2, 2, 0, 1, 0, 1, labels=(IGNORED,) * 3 + (1, 0, 1))]
    held_out = [sample(2, 0, 1, 2, 0, labels=(0, IGNORED, 1, 2, 0))]
    plain = [sample(0, 1, 1), sample(0, 1, 0, 1)], [sample(0, 1, 2, 0)]
    assert unigram_nats(train, held_out, 3) == unigram_nats(*plain, 3)
    assert bigram_nats(train, held_out, 3) == bigram_nats(*plain, 3)
    with pytest.raises(BadInput, match="without a trained token"):
        unigram_nats(train, [sample(0, 1, labels=(0, IGNORED))], 3)


def test_docstrings_are_read_as_help_shows_them() -> None:
    """Indentation of the source is no part of the prose."""
    found = next(m for m in modules() if m.path == "inspect.py").docstrings
    assert inspect.getdoc(inspect.cleandoc) in found
