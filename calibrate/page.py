"""The verdicts on published claims as one page of Markdown, with the runs behind each. It decides nothing.

The same entries give the same bytes: no dates, no paths, and runs in an order of their own. Text that comes from
data is inert: it is no tag, no table cell, no link, no emphasis and no formula.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from calibrate.family import Entry, adjusted, corrected
from lora_planner import units
from lora_planner.ledger import Estimate
from lora_planner.record import FAILS, HOLDS, NOT_RUN, UNDECIDED
from lora_planner.render import interval, one_line

STATUSES = (HOLDS, FAILS, UNDECIDED, NOT_RUN)


# ---------------------------------------------------------------- text


def inert(text: str) -> str:
    r"""Text of a stranger as Markdown that shows just that text, in a paragraph, a table or a link.

    What can begin a tag, a cell, code or a formula becomes an entity; what else Markdown reads gets a backslash.
    It is never put at the start of a line, where more signs mean something.

    >>> inert("a|b <i>R&D</i>"), inert("$x_1$"), inert("[0.9, 1.1]")
    ('a&#124;b &lt;i&gt;R&amp;D&lt;/i&gt;', '&#36;x\\_1&#36;', '\\[0.9, 1.1\\]')
    """
    return "".join(ENTITIES.get(c) or (f"\\{c}" if c in r"\*_[]~" else c) for c in one_line(text).strip())


ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "`": "&#96;", "$": "&#36;"}


def code_block(text: str) -> list[str]:
    """One line of code between fences that are longer than any run of backticks in it."""
    line = one_line(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return [fence, line, fence]


def number(x: float) -> str:
    """Four digits; a large whole number has all of its digits.

    >>> number(0.98765), number(3.5e-6), number(2753792), number(float("inf"))
    ('0.9877', '3.5e-06', '2,753,792', 'inf')
    """
    return f"{x:,.0f}" if 1e4 <= abs(x) < 1e15 and x == round(x) else f"{x:.4g}"


def effect(e: Estimate | None) -> str:
    r"""Value, 95 % interval and unit; "-" where nothing was measured.

    >>> print(effect(Estimate(7.1, 9.8, 13.5, "ratio", "fitted")))
    9.8 \[7.1, 13.5\] ratio
    """
    return inert(f"{interval(e, number)} {e.unit}") if e else "-"


def anchors(entries: Sequence[Entry]) -> list[str]:
    """A link target an entry, of id and size; the second of a kind has a 2 behind it."""
    found: list[str] = []
    seen: Counter[str] = Counter()
    for entry in entries:
        name = re.sub("[^a-z0-9]+", "-", f"{entry.id} {entry.size}".lower()).strip("-")
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found


# ---------------------------------------------------------------- the page

READING = """\
Each section puts one published sentence to runs of our own, by a rule that was fixed in advance. \
**holds**: the rule was met. **fails**: the runs contradict the sentence. **undecided**: they do not tell, \
for instance because intervals are wide, an optimum lies at the edge of its grid or a control went wrong. \
**not run**: there are no runs to judge. \
Arms are compared over three seeds or more, in pairs that see the same data in the same order. That two things are \
equal is shown by two one-sided tests (TOST) against a margin fixed in advance, never by the absence of a difference. \
An optimum counts only if two finite points on each side bracket it. \
Intervals are 95 %, of each claim alone; p-values are corrected after Holm over all tests on this page ({tests}), and \
what is not significant then is undecided. A rule that was written or changed after its runs had begun is \
exploratory, and its section says so. Every run is listed, also those that diverged or failed."""


def verification(entries: Sequence[Entry], environment: Mapping[str, str]) -> str:
    """The page. `environment`: what the runs ran on and with, by name; the correction is applied here."""
    found = adjusted(entries)
    entries = corrected(entries)
    names = anchors(entries)
    counted = Counter(entry.verdict.status for entry in entries)
    known = {key: value for key, value in sorted(environment.items()) if value}
    lines = ["# Published claims, put to the test", "", READING.format(tests=len(found)), ""]
    if known:
        listed = "; ".join(f"{inert(key)} {inert(value)}" for key, value in known.items())
        lines += [f"The runs were made with: {listed}.", ""]
    lines += [f"{len(entries)} claims: " + ", ".join(f"{counted[s]} {s}" for s in STATUSES) + ".", "",
              "| | claim | published | ours \\[95 %\\] | runs | size | verdict |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for entry, name in zip(entries, names, strict=True):
        v = entry.verdict
        lines.append(f"| [{inert(entry.id)}](#{name}) | {inert(entry.sentence)} | {inert(entry.published)} "
                     f"| {effect(v.effect)} | {v.n} | {inert(entry.size)} | **{inert(v.status)}** |")  # fmt: skip
    for i, (entry, name) in enumerate(zip(entries, names, strict=True)):
        lines += ["", *_section(entry, name, found.get(i), len(found))]
    return "\n".join([*lines, ""])


def _section(entry: Entry, name: str, p: float | None, tests: int) -> list[str]:
    v = entry.verdict
    measured = effect(v.effect) + (f", {v.n} runs" if v.n else "")
    facts = [
        ("claim", inert(entry.sentence)),
        ("source", inert(entry.source)),
        ("published", inert(entry.published)),
        ("ours", measured),
        ("verdict", f"**{inert(v.status)}**: {inert(v.sentence)}"),
        ("control", inert(v.control)),
        ("metric", inert(entry.metric)),
        ("rule", inert(entry.rule)),
        ("p", f"{p:.2g} after Holm over {tests} tests, {v.p:.2g} alone" if p is not None and v.p is not None else ""),
    ]
    registration = [
        ("pre-registration", ", ".join(inert(t) for t in (entry.registered or "none", entry.registration) if t)),
        ("cost", f"{units.duration(entry.cost_s)} of processor time" if entry.cost_s else ""),
    ]
    lines = [f'<a id="{name}"></a>', "", f"## {inert(entry.id)} {inert(entry.title)} ({inert(entry.size)})", ""]
    lines += [f"- {word}: {text}" for word, text in facts if text]
    if entry.traps:
        lines += ["- traps that it has to avoid:", *(f"  - {at}: {inert(text)}" for at, text in entry.traps)]
    lines += [f"- {word}: {text}" for word, text in registration if text]
    if entry.command:
        lines += ["", "To repeat it:", "", *code_block(entry.command)]
    if entry.picture:
        lines += ["", _image(entry)]
    return [*lines, "", *_runs(entry)]


def _image(entry: Entry) -> str:
    title = entry.verdict.plot.title if entry.verdict.plot else entry.title
    return f"![{inert(title)}]({quote(entry.picture)})"


def _runs(entry: Entry) -> list[str]:
    """Every run of a claim, folded; those that its verdict names in bold."""
    if not entry.runs:
        return ["No runs stand behind it."]
    counted = ", ".join(f"{n} {inert(status)}" for status, n in sorted(Counter(r.status for r in entry.runs).items()))
    named = set(entry.verdict.keys)
    rows = []
    for run in sorted(entry.runs, key=lambda r: (r.label, r.key)):
        key = f"**{inert(run.key)}**" if run.key in named else inert(run.key)
        rows.append(f"| {key} | {inert(run.label)} | {inert(run.status)} | {_nats(run.first)} | {_nats(run.last)} "
                    f"| {units.duration(run.seconds)} |")  # fmt: skip
    bold = " In bold: the runs that the verdict names." if named & {r.key for r in entry.runs} else ""
    return ["<details>", f"<summary>All {len(entry.runs)} runs</summary>", "",
            f"By status: {counted}. Held-out nats per token before the first and after the last step.{bold}", "",
            "| run | what | status | first | last | time |", "|---|---|---|---|---|---|", *rows, "",
            "</details>"]  # fmt: skip


def _nats(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4f}"
