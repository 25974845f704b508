"""Which matrices get an adapter, and of which shape.

`--targets` takes presets (attention, ssm, mlp, all-linear, unembed), module names as peft matches
them, and two conventions of others: "peft-all-linear" is whatever peft does when asked for
"all-linear"; "tinker" is the hosted trainer's choice of matrices.

For routed experts, which transformers 5 stores as 3-D parameters, the shape is a choice of its own:

| --experts              | gate and up                      | down                             |
|------------------------|----------------------------------|----------------------------------|
| per-expert             | 2 r (outer + inner) per expert   | r (inner + outer) per expert     |
| per-expert-over-active | the same at rank max(1, r // k)  |                                  |
| shared-outer           | one A for all, a B per expert    | an A per expert, one B for all   |
| fused                  | r (outer + 2 inner) per expert   | r (inner + outer) per expert     |
| none                   | 0                                | 0                                |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from lora_planner.errors import UnsupportedAdapter, nearest
from lora_planner.method import Method
from lora_planner.method.adapter import Adapter
from lora_planner.model import PARAMETER, Linear, Model, Scan

MLP_GROUPS = ("mlp_dense", "shared", "latent")
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ("attn",),
    "ssm": ("ssm",),
    "mlp": (*MLP_GROUPS, "experts"),
    "experts": ("experts",),
    "all-linear": ("attn", "ssm", *MLP_GROUPS, "experts", "other"),
    "unembed": ("lm_head",),
}
CONVENTIONS = ("peft-all-linear", "tinker")

#: names of matrices that peft moves onto the fused expert tensors, by the scheme of Model.peft_experts
REWRITTEN = {
    "mixtral": {"gate": "gate", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class AdapterTable:
    """What is adapted. `missed`: names that hit nothing; `warnings`: (code, sentence, fix)."""

    adapters: tuple[Adapter, ...]
    missed: tuple[str, ...] = ()
    warnings: tuple[tuple[str, str, str], ...] = ()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(a.linear.name for a in self.adapters)


@lru_cache(maxsize=4096)
def adapter_table(model: Model, method: Method) -> AdapterTable:
    """The adapters of a method on a model, or an error that says what hit nothing.

    >>> from lora_planner.arch import from_config
    >>> m = from_config({"model_type": "llama"})
    >>> sum(a.a_params + a.b_params for a in adapter_table(m, Method(rank=1)).adapters)
    2498560
    """
    if method.is_full:
        return AdapterTable(())
    presets = [t for t in method.targets if t in PRESETS]
    conventions = [t for t in method.targets if t in CONVENTIONS]
    names = [t for t in method.targets if t not in PRESETS and t not in CONVENTIONS]
    found: list[Adapter] = []
    missed: list[str] = []
    warnings: list[tuple[str, str, str]] = []
    groups = {group for preset in presets for group in PRESETS[preset]}
    for row in _rows(model, groups):
        found.extend(_expert(row, model, method) if row.group == "experts" else [Adapter.of(row, method.rank)])
    if "peft-all-linear" in conventions:
        found.extend(_peft_all_linear(model, method.rank))
    if "tinker" in conventions:
        found.extend(_tinker(model, method))
    if names:
        by_name, missed = _peft_names(model, names, method.rank)
        preset = {id(a.linear) for a in found}
        found.extend(a for a in by_name if id(a.linear) not in preset)
    if not found:
        modules = {row.name.rsplit(".", 1)[-1] for row in (*model.linears, model.head)}
        close = [c for name in missed for c in nearest(name, modules, 1)]
        raise UnsupportedAdapter(
            f"targets {','.join(method.targets)} hit no matrix of {model.name}",
            "--targets",
            f"Its modules: {', '.join(sorted(modules))}." + (f" Nearest: {', '.join(close)}." if close else ""),
        )
    warnings.extend(_refused(model, found, strict=bool(names or conventions) and "tinker" not in conventions))
    warnings.extend(_notes(model, method, found, missed))
    return AdapterTable(tuple(found), tuple(missed), tuple(warnings))


def _rows(model: Model, groups: set[str]) -> Iterator[Linear]:
    for row in model.linears:
        if row.group in groups:
            yield row
    if "lm_head" in groups:
        yield model.head


def _expert(row: Linear, model: Model, method: Method) -> list[Adapter]:
    """The adapters of one kind of expert matrix (table at the top of this file)."""
    rank, kind = method.rank, method.experts
    plain = replace(Adapter.of(row, rank), parts=row.parts)
    if kind == "none":
        return []
    if kind == "fused":
        return [replace(plain, parts=1, fused=True)]
    if kind == "per-expert-over-active":
        return [replace(plain, rank=max(1, rank // top_k(model)))]
    if kind == "shared-outer":
        layers = row.count // experts(model)
        if row.name.endswith("down_proj"):  # the outer (hidden) side of down is its output
            return [replace(plain, b_copies=layers, b_used=layers)]
        return [replace(plain, a_copies=layers, a_used=layers)]
    return [plain]


def experts(model: Model) -> int:
    """Experts of a layer that has them; 0 in a dense model."""
    return max((block.experts for block in model.blocks), default=0)


def top_k(model: Model) -> int:
    """Routed experts one token passes in a layer; 0 in a dense model."""
    return max((block.top_k for block in model.blocks), default=0)


def _wrappable(model: Model) -> Iterator[Linear]:
    """nn.Linear and Conv1D rows, towers included, without the unembedding."""
    yield from (row for row in (*model.linears, *model.tower) if row.kind != PARAMETER)


def _peft_all_linear(model: Model, rank: int) -> list[Adapter]:
    """peft 0.21 asked for "all-linear": every nn.Linear except the head; on the model types whose
    experts it maps onto fused tensors also these (gate and up at twice the rank) and the router,
    but then no other module that bears one of the mapped names (counting facts 2 to 5).
    """
    rewritten = REWRITTEN.get(model.peft_experts, {})
    found = [Adapter.of(row, rank) for row in _wrappable(model) if _leaf(row) not in rewritten]
    return found + _peft_parameters(model, set(rewritten.values()), rank, doubled=bool(rewritten))


def _peft_names(model: Model, names: Iterable[str], rank: int) -> tuple[list[Adapter], list[str]]:
    """peft's suffix matching of a list of module names, its rewriting of expert names included."""
    rewritten = REWRITTEN.get(model.peft_experts, {})
    found: list[Adapter] = []
    missed: list[str] = []
    moved: set[str] = set()
    taken: set[int] = set()
    for name in names:
        leaf = name.rsplit(".", 1)[-1]
        if leaf in rewritten:
            moved.add(leaf)
            continue
        hits = [
            row
            for row in (*model.linears, *model.tower, model.head)
            if (row.name == name or row.name.endswith("." + name))
            # a bare name reaches modules only; a path ("experts.down_proj") is one of `target_parameters`
            and (row.kind != PARAMETER or "." in name)
        ]
        fresh = [row for row in hits if id(row) not in taken]  # two kinds of layer may have equal rows
        taken.update(id(row) for row in hits)
        found += [replace(Adapter.of(row, rank), fused=row.group == "experts") for row in fresh]
        if not hits:
            missed.append(name)
    if moved:
        halves = {n for n, target in rewritten.items() if target == "gate_up_proj"}
        if 0 < len(halves & moved) < len(halves):
            raise UnsupportedAdapter(
                f"peft cannot adapt {', '.join(sorted(halves & moved))} without {', '.join(sorted(halves - moved))}",
                "--targets",
                "They are one fused tensor in this model: name both.",
            )
        found += _peft_parameters(model, {rewritten[n] for n in moved}, rank, doubled=True)
    return found, missed


def _peft_parameters(model: Model, targets: set[str], rank: int, doubled: bool) -> list[Adapter]:
    """`target_parameters`: an A and a B for each copy of a bare parameter, gate_up at 2 r after rewriting."""
    found = []
    for row in model.linears:
        if row.kind == PARAMETER and _leaf(row) in targets:
            twice = 2 if doubled and row.parts == 2 else 1
            found.append(replace(Adapter.of(row, rank * twice), fused=True))
    return found


def _tinker(model: Model, method: Method) -> list[Adapter]:
    """The hosted trainer's matrices: of low-rank attention only the first factors and the output;
    of a scan's input projection only its values, gates, keys and queries, each on its own.

    Source: reproduces the per-rank table of tinker-cookbook (August 2026) to the integer.
    """
    found = []
    for row in _rows(model, set(PRESETS["all-linear"])):
        if row.group == "experts":
            found.extend(_expert(row, model, replace(method, experts="shared-outer")))
            continue
        leaf = _leaf(row)
        parts: tuple[int, ...]
        if leaf in ("q_b_proj", "kv_b_proj", "in_proj_a", "in_proj_b", "in_proj_ba"):
            continue
        scan = next((b.mixer for b in model.blocks if isinstance(b.mixer, Scan)), None)
        values = scan.heads * scan.head_dim if scan else 0
        keys = scan.groups * scan.state if scan else 0
        if leaf == "in_proj_qkv":
            parts = (keys, keys, values)
        elif leaf == "in_proj_qkvz":
            parts = (keys, keys, values, values)
        elif leaf == "in_proj":
            parts = (values, values)
        else:
            parts = (row.d_out,)
        found.extend(Adapter.of(replace(row, d_out=width), method.rank) for width in parts)
    return found


def _refused(model: Model, found: list[Adapter], strict: bool) -> Iterator[tuple[str, str, str]]:
    """What peft will not wrap is an error where the user asked for what peft does, else a warning."""
    hit = sorted({_leaf(a.linear) for a in found} & set(model.peft_refuses))
    if hit and strict:
        raise UnsupportedAdapter(
            f"peft refuses to adapt {', '.join(hit)} in model_type {model.model_type}",
            "--targets",
            "Its fused kernels bypass the adapter: leave it out, or count it with all-linear.",
        )
    if hit:
        yield ("W-PEFT-REFUSES", f"peft refuses to wrap {', '.join(hit)} in {model.model_type} models",
               "Train with another library, or leave it out of --targets.")  # fmt: skip


def _notes(model: Model, method: Method, found: list[Adapter], missed: list[str]) -> Iterator[tuple[str, str, str]]:
    if missed:
        yield ("W-TARGET-MISSED", f"{', '.join(missed)} hit nothing", "Correct the names in --targets.")
    widest = max(min(a.linear.d_in, a.linear.d_out) for a in found)
    if method.rank > widest:
        raise UnsupportedAdapter(
            f"rank {method.rank} exceeds the width of every adapted matrix ({widest})", "--rank",
            f"Use at most {widest}; above it the adapter is larger than the matrix.",
        )  # fmt: skip
    k = top_k(model)
    if method.experts == "per-expert-over-active" and k and method.rank % k and _has_experts(found):
        yield ("W-EXPERT-RANK", f"rank {method.rank} is no multiple of the {k} active experts: each expert gets "
               f"rank {max(1, method.rank // k)}", f"Use a multiple of {k}.")  # fmt: skip
    if k and not _has_experts(found):
        yield ("W-EXPERTS-FROZEN", "the routed experts, most of this model, get no adapter",
               "Choose --experts, or accept attention-size capacity.")  # fmt: skip
    if _has_experts(found) and not any(a.fused for a in found) and method.experts != "none":
        yield ("W-EXPERTS-STACK", f"peft trains no {method.experts} adapters on fused expert tensors",
               "Use a library with grouped adapters, or --experts fused, which is peft's form.")  # fmt: skip
    if method.name == "dora" and any(a.fused for a in found):
        yield ("W-DORA-EXPERTS", "peft has no DoRA for fused expert tensors", "Use lora for the experts.")


def _has_experts(found: list[Adapter]) -> bool:
    return any(a.linear.group == "experts" for a in found)


def _leaf(row: Linear) -> str:
    return row.name.rsplit(".", 1)[-1]
