"""Which matrices of the actual model an adapter reaches, and which are trained in full beside it.

peft 0.21's matching: a pattern must match a module's whole path, a name in a list its ending; old names of experts
move onto the fused tensors of transformers 5; `target_parameters` reach bare parameters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from math import inf
from typing import NamedTuple

from lora_planner.errors import BadInput, UnsupportedAdapter, nearest
from lora_planner.handoff.recipe import LEAF_NAMES, PEFT_ALL, Lora, Recipe
from lora_planner.memory import ALONE, OPTIMIZERS, Split
from lora_planner.method import BY_NAME, DEFAULT_EXPERTS, Method, method
from lora_planner.method.adapter import Adapter
from lora_planner.method.targets import REWRITTEN, adapter_table, experts
from lora_planner.model import LINEAR, PARAMETER, Linear, Model
from lora_planner.params import BYTES, trainable_params

#: a pattern is a stranger's text: what backtracks for ever is refused before it runs
MAX_PATTERN = 500
NESTED = re.compile(r"\([^()]*[*+][^()]*\)[*+{]")


class Module(NamedTuple):
    """One module of the model as transformers names it; `layer` None outside the stack of layers."""

    path: str
    row: Linear
    layer: int | None
    part: str  # text, tower, head or embed


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of matrix with its adapters: in `copies` places, at `rank`."""

    name: str
    group: str
    copies: int
    of: int
    rank: int
    params: int


@dataclass(frozen=True, slots=True)
class Whole:
    """A module trained in full: a copy of its own, in the base's dtype."""

    name: str
    group: str
    params: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """`method` is what the planner prices; `exact`: it is these adapters to the last parameter, else `extra_bytes` makes
    up for the difference in states."""

    rows: tuple[Row, ...]
    missed: tuple[str, ...]
    saved: tuple[Whole, ...]
    frozen: tuple[str, ...]  # groups of matrices without any adapter
    method: Method
    exact: bool
    refused: str = ""
    nearest: tuple[str, ...] = ()

    @property
    def adapter_params(self) -> int:
        return sum(row.params for row in self.rows)

    @property
    def saved_params(self) -> int:
        return sum(whole.params for whole in self.saved)

    @property
    def modules(self) -> int:
        return sum(row.copies for row in self.rows)

    @property
    def groups(self) -> frozenset[str]:
        return frozenset(row.group for row in self.rows)


def modules(model: Model) -> Iterator[Module]:
    """Every matrix that is a module of its own, by its full path."""
    for layer, kind in enumerate(model.order):
        for row in model.blocks[kind].linears:
            if row.kind != PARAMETER:
                yield Module(f"{model.module_prefix}.{layer}.{row.name}", row, layer, "text")
    root = model.module_prefix.rpartition(".")[0]
    for row in model.extra_linears:
        yield Module(f"{root}.{row.name}", row, None, "text")
    for row in model.tower:
        stem, dot, rest = row.name.rpartition(".layers.")
        if not dot:
            stem, dot, rest = row.name.rpartition(".blocks.")
        for i in range(row.count if dot else 1):
            path = f"model.{stem}{dot}{i}.{rest}" if dot else f"model.{row.name}"
            yield Module(path, replace(row, count=1 if dot else row.count), None, "tower")
    yield Module(model.head.name, model.head, None, "head")
    width = model.embed.params // model.vocab_size
    yield Module(f"{root}.{model.embed.name}", Linear(model.embed.name, model.vocab_size, width, kind="embedding",
                                                      group="embed"), None, "embed")  # fmt: skip


def resolve(model: Model, recipe: Recipe) -> Manifest:
    """What will be trained. Full fine-tuning reaches everything."""
    lora = recipe.lora
    if lora is None:
        return Manifest((), (), (), (), method("full"), True)
    for pattern in (
        lora.pattern,
        lora.excluded_pattern,
        *(name for name, _ in (*lora.ranks, *lora.alphas)),
        *lora.saved,
    ):
        checked(pattern)
    lora = _with_default(model, lora)
    refused = ""
    try:
        bare = _parameters(model, lora)
    except UnsupportedAdapter as error:
        bare, refused = [], error.what
    hits = [found for found in modules(model) if _hit(found, lora, model)]
    rows = _rows(model, lora, hits, bare)
    missed = tuple(name for name in (*lora.targets, *lora.parameters) if _misses(name, model, lora, hits, bare))
    saved = tuple(_saved(model, lora.saved))
    reached = {row.group for row in rows}
    frozen = tuple(sorted({row.group for row in model.linears if row.group not in ("router", *reached)}))
    chosen, exact = _method(model, recipe, lora, rows)
    leaves = {found.row.name.rsplit(".", 1)[-1] for found in modules(model)}
    missed_saved = [name for name in lora.saved if not any(_named(w.name, name) for w in saved)]
    missed += tuple(f"{name} (modules_to_save)" for name in missed_saved)
    close = tuple(c for name in missed for c in nearest(name.split()[0].rsplit(".", 1)[-1], leaves, 1))
    return Manifest(rows, missed, saved, frozen, chosen, exact, refused, close)


def checked(pattern: str) -> re.Pattern[str]:
    """A pattern that is safe to run on a few hundred paths.

    >>> checked("(a+)+b")
    Traceback (most recent call last):
    lora_planner.errors.BadInput: the pattern '(a+)+b' repeats a repetition ...
    """
    if len(pattern) > MAX_PATTERN:
        raise BadInput(f"a pattern of {len(pattern):,} characters", "target_modules", "Write a shorter one.")
    if NESTED.search(pattern):
        raise BadInput(
            f"the pattern {pattern!r} repeats a repetition and may never end", "target_modules", "Simplify it."
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise BadInput(f"{pattern!r} is no regular expression: {error}", "target_modules", "Correct it.") from None


def _with_default(model: Model, lora: Lora) -> Lora:
    if lora.targets or lora.pattern or lora.everything or lora.parameters:
        return lora
    return replace(lora, targets=model.peft_default)


def _named(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _hit(found: Module, lora: Lora, model: Model) -> bool:
    """peft's `check_target_module_exists`."""
    if lora.excluded_pattern and re.fullmatch(lora.excluded_pattern, found.path):
        return False
    if any(_named(found.path, name) for name in lora.excluded):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", found.path) for name in lora.saved):
        return False
    if lora.text_only and found.part == "tower":
        return False
    rewritten = REWRITTEN.get(model.peft_experts, {})
    leaf = found.row.name.rsplit(".", 1)[-1]
    if lora.everything == PEFT_ALL:
        return found.part in ("text", "tower") and leaf not in rewritten
    if lora.pattern:
        return re.fullmatch(lora.pattern, found.path) is not None
    names = lora.targets + (tuple(_leaf_names(model, lora)) if lora.everything == LEAF_NAMES else ())
    if not any(_named(found.path, name) for name in names if name.rsplit(".", 1)[-1] not in rewritten):
        return False
    return not lora.layers or _in_layers(found.path, lora)


def _in_layers(path: str, lora: Lora) -> bool:
    patterns = [rf"(?:^|.*?\.){re.escape(p)}\.(?P<idx>\d+)\." for p in lora.layers_pattern]
    for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        if match := re.match(pattern, path):
            return int(match["idx"]) in lora.layers
    return False


def _leaf_names(model: Model, lora: Lora) -> set[str]:
    """Last parts of the paths of all nn.Linear except the head's, as axolotl and LLaMA-Factory collect them."""
    rows = [*model.linears, *(() if lora.text_only else model.tower)]
    return {row.name.rsplit(".", 1)[-1] for row in rows if row.kind == LINEAR}


def _parameters(model: Model, lora: Lora) -> list[Adapter]:
    """Adapters on bare parameters: through old names that peft moves, or through target_parameters."""
    names = lora.targets + (tuple(_leaf_names(model, lora)) if lora.everything == LEAF_NAMES else ())
    rewritten = REWRITTEN.get(model.peft_experts, {})
    asked = (
        ("peft-all-linear",)
        if lora.everything == PEFT_ALL
        else tuple(n for n in names if n.rsplit(".", 1)[-1] in rewritten)
    )
    found: list[Adapter] = []
    if asked:
        table = adapter_table(model, Method(rank=lora.rank, alpha=lora.alpha, targets=asked, experts="fused"))
        found += [a for a in table.adapters if a.linear.kind == PARAMETER]
    for row in model.linears:
        if row.kind == PARAMETER and any(_named(row.name, name.removesuffix(".weight")) for name in lora.parameters):
            rank = _ranked(lora, f"{model.module_prefix}.0.{row.name}")
            found.append(replace(Adapter.of(row, rank), fused=True))
    return found


def _ranked(lora: Lora, path: str) -> int:
    """peft's `get_pattern_key`: the first pattern that matches the end of the path."""
    return next((rank for name, rank in lora.ranks if re.match(rf"(.*\.)?({name})$", path)), lora.rank)


def _rows(model: Model, lora: Lora, hits: list[Module], bare: list[Adapter]) -> tuple[Row, ...]:
    count = BY_NAME["dora" if lora.dora else "lora"].trainable
    total = Counter((m.row.name, m.part) for m in modules(model))
    found: dict[tuple[str, str, int, int, int], list[Module]] = {}
    for hit in hits:
        key = (hit.row.name, hit.row.group, _ranked(lora, hit.path), hit.row.d_in, hit.row.d_out)
        found.setdefault(key, []).append(hit)
    rows = []
    for (name, group, rank, _, _), same in found.items():
        each = count(Adapter.of(replace(same[0].row, count=same[0].row.count, used=same[0].row.count), rank))
        rows.append(Row(name, group, len(same), total[name, same[0].part], rank, each * len(same)))
    for adapter in bare:
        copies = adapter.linear.count
        rows.append(Row(adapter.linear.name, adapter.linear.group, copies, copies, adapter.rank, count(adapter)))
    return tuple(rows)


def _misses(name: str, model: Model, lora: Lora, hits: list[Module], bare: list[Adapter]) -> bool:
    rewritten = REWRITTEN.get(model.peft_experts, {})
    leaf = name.rsplit(".", 1)[-1]
    if leaf in rewritten and any(a.linear.name.rsplit(".", 1)[-1] == rewritten[leaf] for a in bare):
        return False
    if any(_named(a.linear.name, name.removesuffix(".weight")) for a in bare):
        return False
    return not any(_named(hit.path, name) for hit in hits)


def _saved(model: Model, names: tuple[str, ...]) -> Iterator[Whole]:
    """Copies that modules_to_save makes, also of what is tied."""
    if not names:
        return
    copies: Counter[tuple[str, str]] = Counter()
    for found in modules(model):
        if any(_named(found.path, name) for name in names):
            copies[found.row.name, found.row.group] += found.row.params
    for block in model.blocks:
        for weight in block.weights:
            if any(_named(weight.name, name) for name in names):
                copies[weight.name, weight.group] += weight.params * block.count
    for weight in model.weights:
        if any(_named(weight.name, name) for name in names):
            copies[weight.name, weight.group] += weight.params
    for (name, group), params in copies.items():
        yield Whole(name, group, params)


# ---------------------------------------------------------------- what the planner can price


def _method(model: Model, recipe: Recipe, lora: Lora, rows: tuple[Row, ...]) -> tuple[Method, bool]:
    """The planner's method with these very adapters; else the one on the same matrices whose size is nearest."""
    name = "dora" if lora.dora else "rslora" if lora.rslora else "qlora" if recipe.weights == "nf4" else "lora"
    base = recipe.weights if recipe.weights != "int8" else "bfloat16"
    names = tuple(dict.fromkeys(row.name for row in rows if row.group != "embed"))
    ours = _signature((row.name, row.params) for row in rows)
    shapes = ("none", "fused") if experts(model) else (DEFAULT_EXPERTS,)
    choices: list[tuple[tuple[str, ...], str]] = [
        ((preset,), shape) for preset in ("all-linear", "attention", "mlp") for shape in shapes
    ]
    choices += [(("peft-all-linear",), "fused"), (lora.targets, "fused"), (names, "fused")]
    ranks = tuple(dict.fromkeys((lora.rank, *(row.rank for row in rows))))
    count = BY_NAME[name].trainable
    nearest_one, off = method(name, lora.rank, lora.alpha, ("all-linear",), DEFAULT_EXPERTS, base, lora.dtype), inf
    total = sum(row.params for row in rows)
    for targets, shape in choices:
        for rank in ranks if targets else ():
            chosen = method(name, rank, lora.alpha, targets, shape, base, lora.dtype)
            try:
                table = adapter_table(model, chosen)
            except UnsupportedAdapter:
                continue
            if _signature((a.linear.name, count(a)) for a in table.adapters) == ours:
                return chosen, True
            names_too = {a.linear.name for a in table.adapters} == set(names)
            missing = abs(total - sum(count(a) for a in table.adapters))
            if names_too and missing < off:
                nearest_one, off = chosen, missing
    return nearest_one, False


def _signature(pairs: Iterable[tuple[str, int]]) -> Counter[str]:
    found: Counter[str] = Counter()
    for name, params in pairs:
        found[name] += params
    return found


def extra_bytes(model: Model, manifest: Manifest, recipe: Recipe, split: Split = ALONE) -> float:
    """Bytes of what is trained beyond the priced method: modules in full, and adapters that it has too few (or too many).

        saved * t(width) + rest * t(width_a),   t(w) = w / split.weights + (w + states) / split.states        [B]
        states = OPTIMIZERS[...].per_dtype_byte * width + fixed

    Copy or adapter, gradient and AdamW's states; `width` is the base's, `width_a` the adapter's. Gradients that wait
    for the end of the step are whole.
    Source: peft's ModulesToSaveWrapper keeps the original too; torch's AdamW has its states in the weight's dtype.
    """
    lora = recipe.lora
    if lora is None or not manifest.rows:
        return 0.0

    def trained(width: float) -> float:
        states = OPTIMIZERS[recipe.optimizer]
        gradients = width / (1 if split.unsynced else split.states)
        return width / split.weights + gradients + (states.per_dtype_byte * width + states.fixed) / split.states

    rest = manifest.adapter_params - trainable_params(model, manifest.method)
    base = BYTES["float32" if recipe.weights == "float32" else "bfloat16"]
    return manifest.saved_params * trained(base) + rest * trained(BYTES[lora.dtype])
