"""How several GPUs share one model: read from a config, and said in the terms of memory.py and workload.py.

Three places can say it: a trainer's own keys (`deepspeed`, `fsdp`), an accelerate file, the words of a launcher.
A DeepSpeed file is read where it lies inside the config's folder; elsewhere its well-known name tells the stage,
which is then assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_planner.checked import Node
from lora_planner.checkpoint import read_json
from lora_planner.errors import BadInput
from lora_planner.memory import ALONE, Split
from lora_planner.workload import Division

MAX_BYTES = 1024**2
#: what waits in host memory is a share of nothing: as if it were split over this many GPUs
HOST = 10**9
BF16 = 2
#: elements of a bucket, and buffers of one, where the file is not there: what calibrate/memory.py assumes of ZeRO-1, 2
ASSUMED_BUCKET, ASSUMED_BUFFERS = 2e8, 2
#: DeepSpeed's default of reduce_bucket_size
DEFAULT_BUCKET = 5e8
#: "auto" in a DeepSpeed file, which transformers makes hidden_size squared
AUTO = -1.0
#: GPUs of one machine, and of one rack of the GB cards, which its links join as if it were one
MACHINE, RACK = 8, 72
#: `trl sft --accelerate_config NAME`. Source: trl/accelerate_configs of TRL 1.16
TRL_LAUNCHES: dict[str, dict[str, Any]] = {
    "single_gpu": {"distributed_type": "NO", "num_processes": 8},
    "multi_gpu": {"distributed_type": "MULTI_GPU", "num_processes": 8},
    "zero1": {"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": {"zero_stage": 1}},
    "zero2": {"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": {"zero_stage": 2}},
    "zero3": {"distributed_type": "DEEPSPEED", "num_processes": 8, "deepspeed_config": {"zero_stage": 3}},
    "fsdp1": {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 1}},
    "fsdp2": {"distributed_type": "FSDP", "num_processes": 8, "fsdp_config": {"fsdp_version": 2}},
}
#: keys of an accelerate file that no training config has
ACCELERATE = frozenset({"distributed_type", "compute_environment", "num_machines", "machine_rank", "rdzv_backend"})
STRATEGIES = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
NO_DEVICE = ("", "none")


@dataclass(frozen=True, slots=True)
class Sharding:
    """What the GPUs of one copy share out; all False: a whole copy on each, as DDP has it.

    engine      "", "fsdp" or "deepspeed";  `name`: the same in words
    weights     frozen and trained ones;  gradients, states: of what is trained
    kept        gathered weights stay until the backward pass has used them (SHARD_GRAD_OP, reshard_after_forward: false)
    host        "params", "optimizer": in host memory
    group       GPUs that share a copy; 0: all there are
    synced      gradients are scattered after every micro-batch, not once a step
    bucket      elements of a buffer of gradients (AUTO: hidden_size squared), `buffers` of them
    processes   how many the launch starts; 0: nobody says
    batch       train_batch_size of the DeepSpeed file, sequences of a step on all GPUs; 0: none is stated
    floats      4-bit weights are stored as floats, which can be split
    recomputes  fsdp_config's own activation checkpointing
    refused     what no formula here counts
    notes       what is assumed
    """

    engine: str = ""
    name: str = ""
    weights: bool = False
    gradients: bool = False
    states: bool = False
    kept: bool = False
    host: frozenset[str] = frozenset()
    group: int = 0
    synced: bool = False
    bucket: float = 0.0
    buffers: int = 0
    processes: int = 0
    batch: int = 0
    version: int = 0
    floats: bool = True
    recomputes: bool = False
    refused: str = ""
    notes: tuple[str, ...] = field(default=())

    def share(self, gpus: int) -> int:
        """GPUs that share one copy."""
        return min(gpus, self.group or gpus)

    def split(self, gpus: int, accumulation: int, hidden_size: int) -> Split:
        """One GPU's share, as memory.py counts it.

        What is in host memory is as good as split over HOST GPUs. ZeRO-1 leaves gradients whole, and so does FSDP while
        micro-batches accumulate (transformers' Trainer calls no_sync).

        >>> zero(3, "ZeRO-3").split(8, 1, 4096).weights, zero(2, "ZeRO-2").split(8, 4, 4096).weights
        (8, 1)
        >>> zero(1, "ZeRO-1").split(8, 1, 4096).unsynced, Sharding().split(8, 1, 4096) == ALONE
        (True, True)
        """
        n = self.share(gpus)
        weights = HOST if "params" in self.host else n if self.weights else 1
        states = HOST if "optimizer" in self.host else n if self.states else 1
        whole = self.states and not self.gradients
        waits = self.engine == "fsdp" and accumulation > 1 and not self.synced and not self.host
        elements = float(hidden_size) ** 2 if self.bucket == AUTO else self.bucket
        buckets = BF16 * elements * self.buffers
        if (weights, states) == (1, 1) and not buckets:
            return ALONE
        return Split(weights, states, unsynced=whole or waits, buckets=buckets)

    def division(self, gpus: int, card: str) -> Division:
        """The same for workload.py."""
        n = self.share(gpus)
        nodes = -(-gpus // (RACK if card.startswith("gb") else MACHINE))
        return Division(
            gpus, n if self.weights else 1, n if self.states else 1, nodes=nodes, offload="params" in self.host
        )


#: a whole copy on each GPU
WHOLE = Sharding()


def zero(stage: int, name: str, host: frozenset[str] = frozenset(), **more: Any) -> Sharding:
    """DeepSpeed's stages: 1 splits states, 2 gradients too, 3 weights too."""
    return Sharding("deepspeed", name, stage > 2, stage > 1, stage > 0, host=host, synced=True, **more)


# ---------------------------------------------------------------- DeepSpeed


def deepspeed(w: Node, key: str, folder: Path | None) -> Sharding:
    """`deepspeed: FILE.json`, or the object itself."""
    value = w.value.get(key)
    if isinstance(value, dict):
        return _deepspeed(w[key].table())
    named = w[key].text("")
    file = _beside(folder, named)
    if file is not None and folder is not None:
        document = read_json(file, Path(named).name, folder.resolve(), MAX_BYTES)
        return _deepspeed(Node(document, Path(named).name, lenient=True))
    return _by_name(named, w[key].place)


def _beside(folder: Path | None, named: str) -> Path | None:
    """The file where it lies inside the folder; nothing outside of it is looked at.

    >>> _beside(Path("/tmp"), "../etc/passwd") is None
    True
    """
    if folder is None or "\0" in named:
        return None
    root = folder.resolve()
    try:
        path = (root / named).resolve()
        return path if path.is_relative_to(root) and (root / named).exists() else None
    except (OSError, RuntimeError):
        return None


def _by_name(named: str, place: str) -> Sharding:
    """The stage in a well-known name: axolotl's zero3_bf16_cpuoffload_all.json, LLaMA-Factory's ds_z2_config.json.

    >>> _by_name("deepspeed_configs/zero3_bf16_cpuoffload_params.json", "x").host
    frozenset({'params'})
    >>> _by_name("examples/deepspeed/ds_z2_offload_config.json", "x").name
    'ZeRO-2, optimizer in host memory'
    """
    stem = re.split(r"[/\\]", named)[-1].lower()
    found = re.search(r"(?:zero|(?:^|_)z)[-_]?(?:stage[-_]?)?([0-3])(?![0-9])", stem)
    if not found:
        raise BadInput(f"the DeepSpeed file {named[:80]!r} is not inside the config's folder, and its name tells no stage", place,
                       "Copy it beside the config.")  # fmt: skip
    stage = int(found[1])
    host: frozenset[str] = frozenset()
    if "offload" in stem:
        params = stage == 3
        only = params and "param" in stem and "all" not in stem
        host = frozenset({"params"} if only else {"params", "optimizer"} if params else {"optimizer"})
    known = zero(stage, _words(stage, host), host)
    if stage in (1, 2):
        known = replace(known, bucket=ASSUMED_BUCKET, buffers=ASSUMED_BUFFERS)
    return replace(
        known, notes=(f"{named[:80]} is not beside the config: {known.name} and its buffers are assumed from its name",)
    )


def _words(stage: int, host: frozenset[str]) -> str:
    where = f", {' and '.join(sorted(host))} in host memory" if host else ""
    return (f"ZeRO-{stage}" if stage else "DeepSpeed without ZeRO") + where


def _deepspeed(w: Node) -> Sharding:
    """A DeepSpeed file.

    Buffers: ZeRO-1 and 2 hold one bucket of gradients, two with overlap_comm; ZeRO-3 one.
    """
    z = w["zero_optimization"].table()
    stage = z["stage"].integer(0, 3, default=0)
    host = {name for name, key in (("optimizer", "offload_optimizer"), ("params", "offload_param"))
            if z[key].table()["device"].text("none").lower() not in NO_DEVICE}  # fmt: skip
    if z["cpu_offload"].flag():
        host.add("optimizer")
    if "params" in host and stage < 3:
        raise BadInput(
            f"offload_param at stage {stage}: DeepSpeed takes it at stage 3 only",
            z["offload_param"].place,
            "Remove it.",
        )
    if "optimizer" in host and stage < 1:
        raise BadInput(
            "offload_optimizer without ZeRO has no effect", z["offload_optimizer"].place, "Set stage 1, 2 or 3."
        )
    refused = next((f"{key} of {w.where}" for key in ("zero_hpz_partition_size", "mics_shard_size")
                    if z[key].there and z[key].integer(-1, default=1) > 1), "")  # fmt: skip
    ways = w["tensor_parallel"].table()["autotp_size"].integer(0, default=0)
    if ways > 1:
        refused = f"tensor parallelism of {w.where}"
    auto = z.value.get("reduce_bucket_size") == "auto"
    bucket = AUTO if auto else z["reduce_bucket_size"].number(0.0, 1e11, default=DEFAULT_BUCKET)
    buffers = 0 if stage == 0 else 1 if stage == 3 or not z["overlap_comm"].flag() else 2
    batch = 0 if w.value.get("train_batch_size") == "auto" else w["train_batch_size"].integer(0, default=0)
    return zero(
        stage,
        _words(stage, frozenset(host)),
        frozenset(host),
        bucket=bucket,
        buffers=buffers,
        batch=batch,
        refused=refused,
    )


# ---------------------------------------------------------------- FSDP


def fsdp(config: Node, options: tuple[str, ...], version: int) -> Sharding:
    """`fsdp` and `fsdp_config` of transformers, axolotl or accelerate, whose keys may begin with `fsdp_`."""

    def key(*names: str) -> str:
        spelled = [form for name in names for form in (name, f"fsdp_{name}")]
        return next((name for name in spelled if config[name].there), names[0])

    version = config[key("version")].integer(1, 2, default=version)
    said = [word.upper() for word in options if word.upper() in STRATEGIES]
    strategy = said[0] if said else "FULL_SHARD"
    reshard = config.value.get(key("reshard_after_forward"))
    if isinstance(reshard, str) and reshard.upper() in STRATEGIES:
        strategy = reshard.upper()
    elif reshard is not None and not config[key("reshard_after_forward")].flag(True):
        strategy = "SHARD_GRAD_OP"
    stated = config.value.get(key("sharding_strategy"))
    if stated is not None:
        strategy = _strategy(stated, config[key("sharding_strategy")].place)
    unknown = [word for word in options if word.upper() not in (*STRATEGIES, "AUTO_WRAP", "OFFLOAD")]
    if unknown:
        raise BadInput(
            f"fsdp {unknown[0][:40]!r} is not known", config.where, f"Known: {', '.join(STRATEGIES).lower()}."
        )
    if strategy == "NO_SHARD":
        return Sharding("", "FSDP NO_SHARD: a whole copy on each GPU")
    off = config[key("offload_params", "cpu_offload")].flag() or any(word.upper() == "OFFLOAD" for word in options)
    host = frozenset({"params", "optimizer"} if off else ())
    hybrid = strategy.startswith("HYBRID")
    notes = (f"{strategy}: a copy is assumed to be split over the {MACHINE} GPUs of a machine",) if hybrid else ()
    name = f"FSDP{version} {strategy}" + (", weights and states in host memory" if off else "")
    return Sharding(
        "fsdp", name, True, True, True, strategy in ("SHARD_GRAD_OP", "HYBRID_SHARD_ZERO2"), host, MACHINE if hybrid else 0,
        config["sync_each_batch"].flag(), version=version, recomputes=config[key("activation_checkpointing")].flag(), notes=notes,
    )  # fmt: skip


def _strategy(value: Any, place: str) -> str:
    """A strategy by its name or its number in torch."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= len(STRATEGIES):
        return STRATEGIES[value - 1]
    if isinstance(value, str) and value.upper() in STRATEGIES:
        return value.upper()
    if isinstance(value, str) and value.isdigit() and 1 <= int(value) <= len(STRATEGIES):
        return STRATEGIES[int(value) - 1]
    raise BadInput(f"sharding strategy {value!r:.40} is not known", place, f"Known: {', '.join(STRATEGIES)}.")


# ---------------------------------------------------------------- who says it


def of_trainer(w: Node, folder: Path | None = None, launch: Mapping[str, Any] | None = None) -> Sharding:
    """The keys of transformers' TrainingArguments; where they are silent, the launch."""
    launched = of_launch(Node(launch, "launch", lenient=True), folder) if launch else Sharding()
    own = Sharding()
    if _on(w, "deepspeed") and _on(w, "fsdp"):
        raise BadInput("deepspeed and fsdp both share the model out", w["fsdp"].place, "Keep one of them.")
    if _on(w, "deepspeed"):
        own = deepspeed(w, "deepspeed", folder)
    elif _on(w, "fsdp"):
        own = fsdp(_config(w, folder), _options(w), 2)
    elif _on(w, "fsdp_config") and not launched.engine:
        own = Sharding(notes=("fsdp_config has no effect without fsdp",))
    if own.engine and launched.engine and own.engine != launched.engine:
        raise BadInput(
            f"the config shares the model out with {own.engine}, its launch with {launched.engine}",
            w.where,
            "Keep one.",
        )
    if own.engine or not launch:
        return replace(own, processes=launched.processes, refused=own.refused or launched.refused)
    return replace(launched, notes=(*launched.notes, *own.notes))


def of_axolotl(w: Node, folder: Path | None = None, launch: Mapping[str, Any] | None = None) -> Sharding:
    """axolotl's: `fsdp_config` alone is enough, `fsdp_version` stands beside it, sizes of groups have keys of their own."""
    for key in ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "expert_parallel_size"):
        if w[key].there and w[key].integer(1, 10**6, default=1) > 1:
            return Sharding(refused=key)
    if w["dp_replicate_size"].integer(1, 10**6, default=1) > 1 and not w["dp_shard_size"].there:
        return Sharding(refused="dp_replicate_size without dp_shard_size")
    if _on(w, "deepspeed") and (_on(w, "fsdp") or _on(w, "fsdp_config")):
        raise BadInput("deepspeed and fsdp both share the model out", w["fsdp"].place, "Keep one of them.")
    if (_on(w, "fsdp") or _on(w, "fsdp_config")) and not _on(w, "deepspeed"):
        found = fsdp(w["fsdp_config"].table(), _options(w), w["fsdp_version"].integer(1, 2, default=1))
        launched = of_launch(Node(launch, "launch", lenient=True), folder) if launch else Sharding()
        return replace(found, group=w["dp_shard_size"].integer(1, 10**6, default=found.group or 1) if w["dp_shard_size"].there else found.group,
                       processes=launched.processes)  # fmt: skip
    return of_trainer(Node({"deepspeed": w.value.get("deepspeed")}, w.where, w.path, lenient=True), folder, launch)


def inlined(launch: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An accelerate file with the DeepSpeed file that it names in place of the name: names are relative to its own folder."""
    inner = launch.get("deepspeed_config")
    named = inner.get("deepspeed_config_file") if isinstance(inner, dict) else None
    file = _beside(folder, named) if isinstance(named, str) else None
    if file is None or not isinstance(inner, dict):
        return launch
    read = read_json(file, Path(str(named)).name, folder.resolve(), MAX_BYTES)
    return launch | {"deepspeed_config": inner | {"deepspeed_config_file": read}}


def of_launch(w: Node, folder: Path | None = None) -> Sharding:
    """An accelerate file, or the same words on the command line of `accelerate launch`."""
    kind = w["distributed_type"].text("").upper()
    zero_words, fsdp_words = w["deepspeed_config"].table(), w["fsdp_config"].table()
    processes = w["num_processes"].integer(0, 10**6, default=0)
    processes = min(processes, 1) if kind == "NO" else processes  # accelerate starts one, whatever their number
    machines = w["nnodes"].integer(1, 10**6, default=1) if str(w.value.get("nnodes", "")).isdigit() else 1
    if not processes and (w["nproc_per_node"].there or w["num_gpus"].there):
        each = next(key for key in ("nproc_per_node", "num_gpus") if w[key].there)
        processes = machines * w[each].integer(1, 10**6, default=1) if str(w.value[each]).isdigit() else 0
    flat = Node({k: v for k, v in w.value.items() if not isinstance(v, dict)}, w.where, lenient=True)
    found = Sharding()
    if kind == "DEEPSPEED" or w["use_deepspeed"].flag():
        found = _launched_zero(zero_words if zero_words.value else flat, folder)
    elif kind == "FSDP" or w["use_fsdp"].flag():
        found = fsdp(fsdp_words if fsdp_words.value else flat, (), 1)
    elif kind not in ("", "NO", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU"):
        found = Sharding(refused=f"distributed_type {kind}")
    mesh = w["parallelism_config"].table()
    if any(
        mesh.value.get(key) not in (None, 1, "1")
        for key in mesh.value
        if key.endswith(("tp_size", "cp_size", "sp_size"))
    ):
        found = Sharding(refused=f"parallelism_config of {w.where}")
    elif mesh["parallelism_config_dp_shard_size"].there:
        found = replace(found, group=mesh["parallelism_config_dp_shard_size"].integer(1, 10**6, default=1))
    return replace(found, processes=processes)


def _launched_zero(w: Node, folder: Path | None) -> Sharding:
    if w["deepspeed_config_file"].there:
        return deepspeed(w, "deepspeed_config_file", folder)
    stage = w["zero_stage"].integer(0, 3, default=2)
    devices = {"optimizer": "offload_optimizer_device", "params": "offload_param_device"}
    host = frozenset(name for name, key in devices.items() if w[key].text("none").lower() not in NO_DEVICE)
    found = zero(stage, _words(stage, host), host)
    return replace(found, bucket=ASSUMED_BUCKET, buffers=ASSUMED_BUFFERS) if stage in (1, 2) else found


def _on(w: Node, key: str) -> bool:
    value = w.value.get(key)
    return value not in (None, False, "", [], {}) and not (
        isinstance(value, str) and value.lower() in ("false", "no", "none")
    )


def _options(w: Node) -> tuple[str, ...]:
    """`fsdp`: true, a text with blanks, or a list."""
    value = w.value.get("fsdp")
    if value is True or (isinstance(value, str) and value.lower() in ("true", "yes", "1")):
        return ()
    return tuple(word for name in w["fsdp"].names() for word in name.replace(",", " ").split())


def _config(w: Node, folder: Path | None) -> Node:
    """`fsdp_config`: the object, or the JSON file that holds it."""
    value = w.value.get("fsdp_config")
    if not isinstance(value, str) or value.lstrip().startswith("{"):
        return w["fsdp_config"].table()
    file = _beside(folder, value)
    if file is None or folder is None:
        raise BadInput(
            f"fsdp_config {value[:80]!r} is not inside the config's folder",
            w["fsdp_config"].place,
            "Copy it beside the config.",
        )
    return Node(read_json(file, Path(value).name, folder.resolve(), MAX_BYTES), Path(value).name, lenient=True)
