"""Make examples/stdlib-docs.jsonl: the running Python's standard library as questions and answers.

    python examples/make_stdlib_docs.py [OUTPUT]

A user asks what a public function, class or method does; the assistant answers with its docstring.
The sources are parsed, never imported, and walked in sorted order: one Python version always gives
the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import json
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

#: test suites, vendored wheels and demos: nobody asks about them
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "site-packages", "__pycache__"}
SHORTEST, LONGEST = 40, 8000  # characters of a docstring
QUESTIONS = (
    "What does `{call}` do?",
    "Explain `{call}` from the Python standard library.",
    "I found `{call}` in some Python code. What is it for?",
    "How do I use `{call}`?",
    "Please document `{call}`.",
)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def sources(library: Path) -> Iterator[tuple[str, Path]]:
    """Public modules by name, sorted."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if parts and not any(part in SKIPPED or part.startswith("_") or "-" in part for part in parts):
            yield ".".join(parts), path


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Public functions, classes and their methods, in the order of the file."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{prefix}{node.name}.")


def signature(node: Definition) -> str:
    """What a caller writes between the parentheses: a class takes what its `__init__` takes."""
    if isinstance(node, ast.ClassDef):
        made = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return signature(made[0]) if made else ""
    arguments = node.args
    first = arguments.posonlyargs or arguments.args
    if first and first[0].arg in ("self", "cls"):
        del first[0]
        extra = len(arguments.defaults) - len(arguments.posonlyargs) - len(arguments.args)
        if extra > 0:  # `self` itself had a default
            del arguments.defaults[:extra]
    return ast.unparse(arguments)


def examples(library: Path) -> Iterator[dict[str, list[dict[str, str]]]]:
    """One chat per documented name; a docstring that was seen before is left out."""
    seen: set[str] = set()
    for module, path in sources(library):
        for name, node in definitions(ast.parse(path.read_bytes()).body):
            answer = (ast.get_docstring(node) or "").strip()
            if not SHORTEST <= len(answer) <= LONGEST or answer in seen:
                continue
            seen.add(answer)
            question = QUESTIONS[len(seen) % len(QUESTIONS)].format(call=f"{module}.{name}({signature(node)})")
            yield {
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            }


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("stdlib-docs.jsonl")
    rows = [json.dumps(row, ensure_ascii=False) for row in examples(Path(sysconfig.get_path("stdlib")))]
    data = ("\n".join(rows) + "\n").encode()
    out.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    print(f"{len(rows)} examples, {len(data)} bytes, Python {platform.python_version()}, sha256 {digest}")


if __name__ == "__main__":
    main()
