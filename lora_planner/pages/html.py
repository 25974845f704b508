"""A document as one HTML page: no script, no request to anywhere, for phone, screen, dark screen and paper."""

from __future__ import annotations

import re
from html import escape

from lora_planner.pages.charts import dark_inks, svg
from lora_planner.pages.document import (
    Block,
    Document,
    Facts,
    Figure,
    Figures,
    Heading,
    Prose,
    Signature,
    Table,
    Warnings,
)
from lora_planner.render import one_line

STYLE = """
:root{--paper:#fff;--ink:#1c2126;--soft:#5b646e;--line:#dde1e5;--band:#f4f6f8;--accent:#0072b2;--alarm:#b3261e;
color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,
Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:64rem;margin:0 auto;padding:2rem 1.25rem 3rem}
h1{font-size:1.6rem;line-height:1.25;margin:0;font-weight:650;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:1.05rem;font-weight:650;margin:2.5rem 0 .6rem;padding-top:.9rem;border-top:1px solid var(--line)}
p{margin:.5rem 0;max-width:44rem;overflow-wrap:anywhere}
.sub{color:var(--soft);margin-top:.3rem}
.quiet{color:var(--soft);font-size:.875rem}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(13rem,1fr));gap:.75rem 2rem;margin:1.4rem 0 1rem}
.numbers b{display:block;font-size:1.75rem;line-height:1.2;font-weight:600;font-variant-numeric:tabular-nums}
.numbers div:first-child b{color:var(--accent)}
.numbers span{color:var(--soft);font-size:.875rem}
dl{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr;gap:.3rem 1.25rem;margin:.6rem 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin:.6rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;line-height:1.4}
th,td{text-align:left;vertical-align:top;padding:.4rem .9rem .4rem 0;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:500;white-space:nowrap}
.w{overflow-wrap:anywhere;min-width:9rem}
.k{white-space:nowrap}
th:last-child,td:last-child{padding-right:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.strong td{font-weight:600}
.dim td{color:var(--soft)}
.figures{display:flex;flex-wrap:wrap;gap:0 2.5rem;align-items:flex-start}
figure{margin:.8rem 0;flex:1 1 20rem;max-width:34rem}
figure svg{display:block;width:100%;height:auto}
ul{list-style:none;margin:.6rem 0;padding:0}
li{padding:.5rem .8rem;margin:.4rem 0;background:var(--band);border-left:3px solid var(--alarm);overflow-wrap:anywhere}
li code{font-size:.8rem;color:var(--alarm)}
code{font-family:ui-monospace,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.sign{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:1.5rem;margin:2.2rem 0 .5rem}
.sign span{border-top:1px solid var(--ink);padding-top:.3rem;color:var(--soft);font-size:.875rem}
footer{margin-top:2.5rem;color:var(--soft);font-size:.8rem;overflow-wrap:anywhere}
@media screen and (prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e6e8ea;--soft:#a3abb4;--line:#343a41;
--band:#1d2126;--accent:#56a8e0;--alarm:#ff8a80}}
@media (max-width:34rem){main{padding:1.25rem 1rem 2rem}.w{min-width:6rem}th,.k{white-space:normal}h1{font-size:1.35rem}
.stack thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.stack,.stack tbody,.stack tr,.stack td{display:block}
.stack tr{padding:.55rem 0;border-bottom:1px solid var(--line)}
.stack td{display:flex;justify-content:space-between;gap:1rem;border:0;padding:.1rem 0;text-align:right}
.stack td::before{content:attr(data-name);color:var(--soft);font-weight:400;text-align:left;white-space:nowrap}
.stack td:first-child{font-weight:600;justify-content:flex-start;text-align:left}
.stack td:first-child::before,.stack td:empty{display:none}
.stack .n,.stack .k{white-space:normal}.stack .w{min-width:0}
dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.5rem}dt:empty{display:none}}
@media print{table{font-size:8.5pt}:root{color-scheme:light}body{font-size:10pt}main{max-width:none;padding:0}h2{break-after:avoid}
figure,tr,li,.sign{break-inside:avoid}.scroll{overflow:visible}figure{max-width:12cm}@page{margin:18mm}}
"""
#: a table of more columns than this becomes a list of cards on a phone
NARROW = 3
#: characters; a longer word may break anywhere
LONG_WORD = 20
#: nothing is loaded and nothing runs, whatever the text in the page says
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def html(d: Document) -> str:
    """The page. Every piece of text is escaped; the policy would stop what escaping missed.

    >>> "<script" in html(Document("<script>", "", blocks=[Prose("<script>")]))
    False
    """
    parts = [
        "<!doctype html>",
        '<html lang="en">',
        '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{_e(d.title)}</title>",
        f"<style>{STYLE}{dark_inks()}</style></head>",
        f'<body><main><h1>{_e(d.title)}</h1><p class="sub">{_e(d.subtitle)}</p>',
        *(_block(block) for block in d.blocks),
        f"<footer>{_e(d.footer)}</footer></main></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _e(text: str) -> str:
    return escape(one_line(text))


def _said(text: str) -> str:
    """Prose: what stands between backquotes is a command."""
    return re.sub(r"`([^`]{1,200})`", r"<code>\1</code>", _e(text))


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h2>{_e(block.text)}</h2>"
    if isinstance(block, Prose):
        return f'<p class="quiet">{_said(block.text)}</p>' if block.quiet else f"<p>{_said(block.text)}</p>"
    if isinstance(block, Figures):
        return (
            '<div class="numbers">'
            + "".join(f"<div><b>{_e(n)}</b><span>{_e(w)}</span></div>" for n, w in block.rows)
            + "</div>"
        )
    if isinstance(block, Facts):
        return "<dl>" + "".join(f"<dt>{_e(a)}</dt><dd>{_e(b)}</dd>" for a, b in block.rows) + "</dl>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return (
            '<div class="figures">'
            + "".join(f"<figure>{svg(d, alone=False)}</figure>" for d in block.drawings)
            + "</div>"
        )
    if isinstance(block, Warnings):
        return (
            "<ul>"
            + "".join(f"<li><code>{_e(c)}</code> {_said(m)}. {_said(fix)}</li>" for c, m, fix in block.rows)
            + "</ul>"
        )
    assert isinstance(block, Signature)
    lines = "".join(f"<span>{word}</span>" for word in ("Approved by", "Date", "Amount"))
    return f'<p>{_e(block.sentence)}</p><div class="sign">{lines}</div>'


def _table(t: Table) -> str:
    def kinds(i: int, text: str) -> str:
        long = any(len(word) > LONG_WORD for word in text.split())
        names = ["n"] * (i in t.numeric) + ["w"] * long + ["k"] * (i in t.whole and len(text) <= LONG_WORD)
        return f' class="{" ".join(names)}"' if names else ""

    head = "".join(f'<th scope="col"{kinds(i, "")}>{_e(name)}</th>' for i, name in enumerate(t.columns))
    body = []
    for number, row in enumerate(t.rows):
        kind = "strong" if number in t.strong else "dim" if number in t.dim else ""
        cells = "".join(
            f'<td data-name="{_e(name)}"{kinds(i, cell)}>{_e(cell)}</td>'
            for i, (name, cell) in enumerate(zip(t.columns, row, strict=True))
        )
        body.append(f'<tr class="{kind}">{cells}</tr>' if kind else f"<tr>{cells}</tr>")
    stack = ' class="stack"' if len(t.columns) > NARROW else ""
    return (
        f'<div class="scroll"><table{stack}><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )
