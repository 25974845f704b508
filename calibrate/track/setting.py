"""One row of the table of measured runs, read into what the planner asks for.

A row is words of its publisher. `read` never fails: what it cannot understand stays None, and `reason` says why the row
is no setting that the planner can predict. What the trainer of a source does for all its rows (which gradient precision,
which loss) is a row of STACKS, with where that is from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

from calibrate.track import names
from lora_planner.errors import LoraPlanError
from lora_planner.facts import Gpu
from lora_planner.method import Method
from lora_planner.model import Attention, Model
from lora_planner.units import GIB

Row = Mapping[str, str]

#: text in `source` -> the publisher that is left out together; the first that is found
SOURCES = (
    ("fitcheck", "fitcheck"), ("litgpt", "litgpt"), ("qwenlm/qwen", "qwen-readme"), ("huggingface/peft", "peft"),
    ("fsdp_qlora", "fsdp-qlora"), ("torchtune", "torchtune"), ("axolotl", "axolotl"), ("llm-foundry", "mosaicml"),
    ("mosaicml", "mosaicml"), ("torchtitan", "torchtitan"), ("automodel", "nemo-automodel"),
    ("megatron-bridge", "megatron-bridge"), ("simumax", "simumax"), ("ms-swift", "ms-swift"), ("mlperf", "mlperf"),
    ("llamafactory", "llamafactory"), ("llama-factory", "llamafactory"), ("ktransformers", "ktransformers"),
    ("finlora", "finlora"), ("longlora", "longlora"), ("dpo", "dpo-issue"), ("unsloth", "unsloth"),
    ("ftune", "ftune"), ("nemo", "nemo"), ("megatron", "megatron"), ("trl", "trl"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stack:
    """How the trainer of a source runs, where a row does not say so.

    name            the software
    full            full_precision of lora_planner.memory for full fine-tuning
    adapter         dtype of adapters
    autocast        matrices cast to bf16
    keep_logits     the loop holds the model's output during backward
    upcast          the unquantised parameters of a 4-bit base become fp32
    loss            of lora_planner.memory
    optimizer       of lora_planner.memory
    checkpointing   where the row says nothing; "" where that is not known
    memory          what its peak is: "allocated", "reserved" or "process"
    attention       where the row says nothing
    quantised       dtype of a 4-bit base that is not named further
    old             of 2023: CUDA modules are loaded eagerly, whether they are used or not
    repeats         k and v are repeated for grouped queries although nothing is padded
    """

    name: str
    full: str = "mixed"
    adapter: str = "float32"
    autocast: bool = True
    keep_logits: bool = False
    upcast: bool = False
    loss: str = "full"
    optimizer: str = "adamw"
    checkpointing: str = ""
    memory: str = "process"
    attention: str = "sdpa"
    quantised: str = "nf4"
    repeats: bool = True
    old: bool = False
    why: str = ""


STACKS = {
    "fitcheck": Stack("hf", autocast=False, keep_logits=True, upcast=True, memory="allocated", quantised="nf4-single",
                      why="its probe: peft, prepare_model_for_kbit_training, out.loss.backward()"),
    "peft": Stack("hf", "bf16", autocast=False, keep_logits=True, memory="reserved", attention="sdpa",
                  why="method_comparison/MetaMathQA/run.py: the model in bfloat16, no autocast, loss.backward()"),
    "litgpt": Stack("litgpt", "bf16", "bfloat16", False, loss="rows", memory="allocated", attention="flash",
                    quantised="nf4-single", repeats=False,
                    why="litgpt/finetune: bf16-true, its own model, chunked_cross_entropy on bf16 logits"),
    "qwen-readme": Stack("hf-remote-code", "mixed", quantised="gptq", memory="process", old=True,
                         why="Qwen's finetune.py: Trainer(bf16=True), DeepSpeed where there are several GPUs"),
    "fsdp-qlora": Stack("fsdp-qlora", "bf16", "bfloat16", False, memory="reserved", keep_logits=True, loss="shifted",
                        why="train.py: bf16 adapters and buffers, sdpa, loss on the whole logits"),
    "torchtune": Stack("torchtune", "bf16", "bfloat16", False, loss="slices", memory="reserved",
                       attention="flash", why="its recipes: bf16 everywhere, CEWithChunkedOutputLoss"),
    "axolotl": Stack("hf", "bf16", memory="reserved", attention="flash", loss="chunked", repeats=False,
                     why="its examples: cut cross entropy or Liger, packed"),
    "mosaicml": Stack("llm-foundry", "mixed", memory="reserved", attention="flash", repeats=False,
                      why="FSDP PURE: bf16 compute, fp32 master weights"),
    "torchtitan": Stack("torchtitan", "mixed", memory="reserved", attention="flash", repeats=False,
                        why="FSDP2: bf16 compute, fp32 master weights"),
    "nemo-automodel": Stack("nemo", "bf16", "bfloat16", False, attention="flash", repeats=False),
    "megatron-bridge": Stack("megatron", "mixed", attention="flash", repeats=False),
    "simumax": Stack("megatron", "mixed", attention="flash", repeats=False, memory="allocated", checkpointing="none"),
    "ms-swift": Stack("hf", "mixed", attention="flash"),
    "mlperf": Stack("nemo", "bf16", attention="flash"),
    "llamafactory": Stack("hf", "mixed", checkpointing="full"),
    "longlora": Stack("hf", "mixed", attention="flash", memory="process", loss="shifted", old=True),
}  # fmt: skip
DEFAULT = Stack("hf")


@dataclass(frozen=True, slots=True)
class Parallel:
    """Over how many GPUs a copy is split: weights (FSDP, ZeRO-3), gradients and states (ZeRO-1, 2), matrices, layers,
    the sequence, experts. `offload`: what is not in use waits in host memory."""

    weights: int = 1
    states: int = 1
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    offload: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """A peak as published: what it counts, in bytes; `at_least`: it ran out of memory, so it is only a bound."""

    kind: str
    bytes: float
    at_least: bool = False


@dataclass(frozen=True, slots=True)
class Setting:
    """A run: what the planner needs to predict it, and what was measured. None is "not known".

    source          who published it, short
    method_name     the method in words that errors are grouped by; `method` has its ranks and targets
    how             the method as its publisher words it
    layout          whether a layout of Megatron's is stated
    variant         a method that the planner does not have, of which only the base and the activations are LoRA's
    saved           modules trained in full besides the adapters ("embed", "lm_head")
    seq_len         padded length of the longest batch
    mean_tokens     tokens of a mean sample without padding
    compute         "bf16", "fp16", "fp8", "fp4", "fp32"
    memory          peaks, several where a row has several
    tokens_per_s    of all GPUs together
    facts           the key=value pairs of the row's notes
    reason          why this is no setting; "" where it is one
    """

    source: str
    model_name: str
    model: Model | None
    family: str
    method_name: str
    method: Method | None
    gpu_name: str
    gpu: Gpu | None
    card_bytes: float | None
    gpus: int
    stack: Stack
    micro_batch: int | None = None
    accumulation: int | None = None
    global_batch: int | None = None
    seq_len: int | None = None
    mean_tokens: float | None = None
    checkpointing: str = ""
    attention: str = "sdpa"
    optimizer: str = "adamw"
    full_precision: str = "mixed"
    upcast: bool = False
    autocast: bool = True
    keep_logits: bool = False
    loss: str = "full"
    compute: str = "bf16"
    packed: bool = False
    compiled: bool = False
    in_backward: bool = False
    offloaded: bool = False
    how: str = ""
    layout: bool = False
    variant: str = ""
    saved: tuple[str, ...] = ()
    trainable: int | None = None
    parallel: Parallel = Parallel()
    memory: tuple[Measured, ...] = ()
    tokens_per_s: float | None = None
    seconds_per_step: float | None = None
    minutes: float | None = None
    notes: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""

    @property
    def label(self) -> str:
        """The row in a few words."""
        cards = f"{self.gpus} x {self.gpu_name}" if self.gpus > 1 else self.gpu_name
        shape = f"{self.micro_batch or '?'} x {self.seq_len or '?'}"
        return f"{self.source}: {self.model_name}, {self.method_name}, {shape}, {cards or 'GPU unstated'}"


# ---------------------------------------------------------------- small readers


def number(text: str | None) -> float | None:
    """The first number of a text, or None.

    >>> number("about 12,042,240 parameters"), number("<= 768 (padded)"), number("OOM")
    (12042240.0, 768.0, None)
    """
    found = re.search(r"-?\d[\d,]*(\.\d+)?([eE][-+]?\d+)?", text or "")
    if not found:
        return None
    value = float(found[0].replace(",", ""))
    return value if abs(value) < 1e18 else None


def whole(text: str | None, high: float = 1e9) -> int | None:
    """The first number, where it is one that can be counted with."""
    value = number(text)
    return int(value) if value is not None and 1 <= value <= high else None


def facts_of(extra: str) -> dict[str, str]:
    """The key=value pairs of a row's notes, keys in lower case.

    >>> facts_of("GBS=32; GA=16; alpha=32 dropout=0.1; 1.0s/it")["ga"]
    '16'
    """
    return {
        k.lower(): v.strip(" ;,")
        for k, v in re.findall(r"([A-Za-z_][\w./-]*)\s?=\s?([^;=\s]+(?:\s[A-Za-z0-9]+)?)", extra)
    }


def source_of(text: str) -> str:
    """The short name of a publisher; of an unknown one, the first word of what it calls itself.

    >>> source_of("huggingface/peft@5d602fd method_comparison/x.json"), source_of("Some/Repo@1 README")
    ('peft', 'some-repo')
    """
    low = text.lower()
    for part, name in SOURCES:
        if part in low:
            return name
    first = re.split(r"[@\s]", low.strip())[0]
    return re.sub(r"[^a-z0-9]+", "-", first).strip("-") or "unknown"


def _checkpointing(text: str, stack: Stack) -> str:
    """ "full", "none", or "" where it is selective or not known.

    >>> [_checkpointing(t, DEFAULT) for t in ("True", "FSDP Block", "False (1 GPU)", "selective", "offload")]
    ['full', 'full', 'none', '', 'full']
    """
    low = text.lower().strip()
    if not low:
        return stack.checkpointing
    if low.startswith("selective"):
        return "selective" if stack.name == "torchtitan" else ""
    if "selective" in low or "varies" in low or "recipe" in low or "config" in low:
        return ""
    if low.startswith(("false", "no", "none", "off ", "0")) or low == "off":
        return "none"
    if any(word in low for word in ("true", "full", "yes", "offload", "block", "unsloth", "on", "1", "checkpoint")):
        return "full"
    return stack.checkpointing


def _recomputing(cell: str, name: str) -> str:
    """The cell, or what a run's name says where the cell refers to it.

    >>> _recomputing("none unless in name", "llama3_8b_tp1_full_recompute"), _recomputing("True", "")
    ('full', 'True')
    """
    low = name.lower()
    if "in name" not in cell.lower() or "recomp" not in low:
        return cell
    return "full" if re.search(r"full_?recomp|recomp\w*_full", low) else "selective"


def _attention(text: str, stack: Stack) -> str:
    low = text.lower()
    if "eager" in low or "math" in low:
        return "eager"
    if stack.name == "litgpt":
        return "flash"  # sdpa with is_causal, no mask
    if (
        "sdpa flash" in low
        or "flash" in low
        or "fused" in low
        or "flex" in low
        or "xformers" in low
        or low.startswith("te")
    ):
        return "flash"
    return "sdpa" if "sdpa" in low else stack.attention


def _optimizer(text: str, default: str) -> str:
    """
    >>> _optimizer("opt=adamw_bnb_8bit; packing=true", "adamw"), _optimizer("", "adamw")
    ('adamw-8bit', 'adamw')
    """
    low = text.lower()
    if re.search(r"(adam|opt|lion)\S* ?.{0,8}8.?bit|8.?bit.{0,12}(adam|opt)|pagedadamw8bit", low):
        return "adamw-8bit"
    if re.search(r"(adam|opt)\S* ?.{0,8}4.?bit", low):
        return "adamw-4bit"
    if "fused" in low and "adamw_torch_fused" in low:
        return "adamw-fused"
    return default


def _compute(text: str, gpu: Gpu | None) -> str:
    low = text.lower()
    if "fp8" in low or "mxfp8" in low or "float8" in low:
        return "fp8"
    if "fp16" in low or ("float16" in low and "bfloat16" not in low):
        return "fp16"
    if "bf16" in low or "bfloat16" in low or "4bit" in low or not low:
        return "bf16" if gpu is None or "bf16" in gpu.peak_flops_per_s else "fp16"
    return "fp32" if "fp32" in low or "float32" in low else "bf16"


# ---------------------------------------------------------------- what is trained

#: each gradient is applied as soon as it is there
IN_BACKWARD = re.compile(r"optimizer[_ -]?in[_ -]?b|(opt\w*|step)[\w ]* (into|in) (the )?(bwd|backward)", re.IGNORECASE)
#: what is kept of the layers waits in host memory
OFFLOADED = re.compile(r"activation[s_ -]*offload|gc: ?offload|\bact offload", re.IGNORECASE)
#: a step of these holds sequences in pairs, a reference's outputs or rollouts
OTHER_OBJECTIVES = re.compile(r"\b(dpo|orpo|kto|simpo|grpo|ppo|rloo|rlhf|reward|distill\w*)\b", re.IGNORECASE)
#: other libraries' names of matrices -> the part that they play in a layer
ROLES = {
    "q": "q", "query": "q", "q_proj": "q", "k": "k", "key": "k", "k_proj": "k", "v": "v", "value": "v", "v_proj": "v",
    "o": "out", "projection": "out", "proj": "out", "o_proj": "out", "output_proj": "out", "dense": "out",
    "wo": "out", "mlp": "mlp", "gate": "gate", "gate_proj": "gate", "up": "up", "up_proj": "up", "down": "down",
    "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down", "head": "head", "lm_head": "head", "output": "head",
    "qkv": "qkv", "linear_qkv": "qkv", "linear_proj": "out", "linear_fc1": "up", "linear_fc2": "down",
}  # fmt: skip
ALL = re.compile(r"all[- _]?linear|^all\b|\*_proj|\blinear\b|see yaml|lora_target_linear|attn ?\+ ?mlp|all attn")


def targets_of(text: str, model: Model, source: str, method: str = "") -> tuple[str, ...]:
    """Targets as the planner names them; () where nothing is understood.

    >>> targets_of("q+k+v+up+down+gate (train.py \\"all\\")", names.model_of("Llama-2-7B"), "fsdp-qlora")
    ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'mlp.up_proj', 'mlp.down_proj', 'mlp.gate_proj')
    >>> targets_of("attention only (q,k,v,o)", names.model_of("Llama-2-70B"), "mlperf")
    ('attention',)
    """
    low = text.lower().strip()
    words = [w for w in re.split(r"[^a-z0-9_*]+", re.sub(r"\(.*?\)", "", low)) if w]
    if source == "qwen-readme":  # finetune.py: c_attn, attn.c_proj, w1, w2
        return ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    if "train.py default" in low:
        words = ["q", "k", "v", "up", "down", "gate"]
    if low.startswith("attention") or low in ("attn", "attn-only"):
        return ("attention",)
    parts = [ROLES[w] for w in words if w in ROLES]
    if parts and len(parts) >= len([w for w in words if w not in ("and", "only", "all")]) / 2:
        return tuple(dict.fromkeys(name for part in parts for name in _named(model, part)))
    if ALL.search(low):
        return ("peft-all-linear",) if "linear" in low and not names_experts(method + low) else ("all-linear",)
    if low.startswith("mlp"):
        return ("mlp",)
    if "attn" in low and "expert" in low:
        return ("all-linear",)
    if not low:
        return ("all-linear",)
    return tuple(w for w in words if any(row.name.endswith(w) for row in (*model.linears, model.head)))


def names_experts(text: str) -> bool:
    return "expert" in text.lower()


@cache
def _named(model: Model, part: str) -> tuple[str, ...]:
    """The model's matrices that play a part: "q", "out", "mlp" ..."""
    found: list[str] = []
    for block in model.blocks:
        mixer = block.mixer
        inner = [r for r in block.linears if r.group in ("mlp_dense", "shared", "experts")]
        if isinstance(mixer, Attention):
            found += {"q": mixer.q, "k": mixer.k, "v": mixer.v, "qkv": (*mixer.q, *mixer.k, *mixer.v)}.get(part, ())
            if part == "out":
                found += [r.name for r in block.linears if set(r.reads) & set(mixer.v) and r.name not in mixer.v]
        for row in inner:
            leaf = row.name.rsplit(".", 1)[-1]
            into = row.reads[0] in {r.name for r in inner}
            plays = {
                "mlp": True,
                "down": into,
                "gate": not into and "gate" in leaf,
                "up": not into and "gate" not in leaf,
            }
            plays["up"] = plays["up"] or (not into and leaf == "gate_up_proj")
            if plays.get(part, False):
                found.append(row.name)
    if part == "head":
        found.append(model.head.name)
    return tuple(dict.fromkeys(found))


def _kind(text: str) -> tuple[str, str]:
    """(planner's method, variant): a variant is a method of which the planner knows only the base.

    >>> [_kind(t) for t in ("Q-LoRA GPTQ-int4 base", "full (pretrain) FSDP", "c3a:default", "lora:rank32-lorafa")]
    [('qlora', ''), ('full', ''), ('lora', 'c3a'), ('lora-fa', '')]
    """
    low = text.lower().strip()
    head, _, tail = low.partition(":")
    if head == "miss" and "bat" in tail:
        return "lora", "bat"
    if tail and re.fullmatch(r"[a-z0-9_-]+", head) and head not in ("lora", "full", "full-finetuning", "qlora", "dora"):
        return "lora", head
    if re.match(r"full|sft\b|pre-?train|fft\b|full-finetun", low):
        return "full", ""
    if "lorafa" in low or "lora-fa" in low:
        return "lora-fa", ""
    if "rslora" in low:
        return "rslora", ""
    if "dora" in low:
        return "dora", ""
    if "qlora" in low or "q-lora" in low or ("lora" in low and ("4bit" in low or "nf4" in low or "int4" in low)):
        return "qlora", ""
    if "lora" in low:
        odd = re.search(r"mica|bdlora|pissa|olora|eva|corda|velora|arrow", tail)
        return "lora", odd[0] if odd else ""
    if "ful" in low and ("tun" in low or "param" in low or " ft" in low):
        return "full", ""
    return "", ""


def _base_dtype(text: str, stack: Stack) -> str:
    """
    >>> _base_dtype("QLoRA bnb.nf4-dq", STACKS["litgpt"]), _base_dtype("Q-LoRA GPTQ-int4 base", DEFAULT)
    ('nf4', 'gptq')
    """
    low = text.lower()
    if "gptq" in low or "int4" in low or "awq" in low:
        return "gptq"
    if "dq" in low or "double" in low:
        return "nf4"
    return stack.quantised


# ---------------------------------------------------------------- the row


def read(row: Row) -> Setting:
    """A row as a Setting; never raises.

    >>> read({"source": "x", "model": "nobody/heard-of-it", "method": "LoRA", "rank": "8"}).reason
    "the shape of the model 'nobody/heard-of-it' is not known here"
    """
    try:
        return _read({key: str(value or "").strip() for key, value in row.items() if isinstance(key, str)})
    except (LoraPlanError, ValueError, ArithmeticError, TypeError, KeyError, IndexError, AttributeError) as error:
        source = source_of(str(row.get("source") or ""))
        text = {k: str(row.get(k) or "") for k in ("model", "method", "gpu")}
        return Setting(source, text["model"], None, "", text["method"], None, text["gpu"], None, None, 1, DEFAULT,
                       reason=f"the row cannot be read: {type(error).__name__}: {str(error)[:100]}")  # fmt: skip


def _read(row: dict[str, str]) -> Setting:
    def cell(key: str) -> str:
        return row.get(key, "")

    publisher, extra, how = cell("source"), cell("extra"), cell("method")
    source = source_of(publisher)
    stack = STACKS.get(source, DEFAULT)
    everything = " ".join((publisher, how, cell("precision"), cell("targets"), extra))
    facts = facts_of(extra)
    gpu = names.gpu_of(cell("gpu"))
    gpus = whole(cell("n_gpus"), 1e6) or 1
    name = _model_name(row, source)
    model = names.model_of(name)
    kind, variant = _kind(how)
    setting = Setting(
        source=source,
        model_name=name,
        model=_fitted_to_stack(model, stack, how + " " + name) if model else None,
        family=_family(name, model),
        method_name=variant or kind or how[:30],
        method=None,
        gpu_name=cell("gpu"),
        gpu=gpu,
        card_bytes=names.card_bytes(cell("gpu")),
        gpus=gpus,
        stack=stack,
        micro_batch=whole(cell("micro_batch"), 1e5) or (1 if source == "mlperf" else None),
        seq_len=_length(cell("seq_len")),
        mean_tokens=_mean_tokens(cell("seq_len"), facts, cell("tokens_per_s")),
        checkpointing=_checkpointing(_recomputing(cell("grad_ckpt"), how), stack),
        attention=_attention(cell("attention impl"), stack),
        optimizer=_optimizer(everything, stack.optimizer),
        full_precision="fp32" if cell("precision").lower() in ("fp32", "float32", "32-true") else stack.full,
        upcast=stack.upcast,
        autocast=stack.autocast,
        keep_logits=stack.keep_logits,
        loss=_loss(everything, stack),
        compute=_compute(cell("precision"), gpu),
        packed="packing=true" in extra.lower() or re.search(r"\bpacked\b", everything.lower()) is not None,
        compiled="compile" in everything.lower(),
        in_backward=IN_BACKWARD.search(everything) is not None,
        offloaded=OFFLOADED.search(everything + " gc:" + cell("grad_ckpt")) is not None,
        how=how,
        layout=re.search(r"(^|[^a-z])(tp|pp)[ =_-]?\d", everything.lower()) is not None,
        variant=variant,
        saved=("embed", "lm_head") if "(emb)" in how.lower() or "wte+lm_head" in cell("targets").lower() else (),
        trainable=whole(facts.get("trainable"), 1e13),
        parallel=_parallel(everything + " " + cell("grad_ckpt"), facts, gpus, kind),
        memory=_memory(row, stack, extra, names.card_bytes(cell("gpu"))),
        tokens_per_s=_positive(cell("tokens_per_s")),
        seconds_per_step=_step_seconds(extra, facts, cell("time_min")),
        minutes=_positive(cell("time_min")),
        notes=extra,
        facts=facts,
        global_batch=whole(facts.get("gbs"), 1e7),
    )
    setting = replace(setting, accumulation=_accumulation(setting))
    if model is None:
        return replace(setting, reason=f"the shape of the model {name[:60]!r} is not known here")
    if OTHER_OBJECTIVES.search(how):
        return replace(
            setting, reason="the step of preference optimisation or RL is not that of one model and one loss"
        )
    if not kind:
        return replace(setting, reason=f"the method {how[:60]!r} is not known here")
    return _with_method(setting, row, kind)


def _with_method(setting: Setting, row: dict[str, str], kind: str) -> Setting:
    model, stack = setting.model, setting.stack
    assert model is not None
    if kind == "full":
        return replace(setting, method=Method("full", 0, 0.0, (), "none"))
    rank = whole(row.get("rank"), 1e5) or (
        1 if setting.variant else whole(re.sub(r".*r=?(\d+).*", r"\1", row.get("method", "")))
    )
    if rank is None:
        rank = 16
        setting = replace(setting, notes=setting.notes + "; rank 16 assumed")
    targets = targets_of(row.get("targets", ""), model, setting.source, row.get("method", ""))
    if not targets and not setting.variant:
        return replace(setting, reason=f"the targets {row.get('targets', '')[:60]!r} are not understood")
    experts = "fused" if names_experts(row.get("targets", "") + row.get("method", "")) else "none"
    words = row.get("method", "") + " " + row.get("precision", "")
    base = _base_dtype(words, stack) if kind == "qlora" or "4bit" in words.lower() else _float(setting.compute)
    if setting.source == "axolotl" and kind == "lora":
        base = "int8"  # its LoRA examples load the base in 8 bit
    alpha = number(setting.facts.get("alpha")) or 32.0
    adapter = "bfloat16" if "adapter bf16" in words.lower() else stack.adapter
    method = Method(kind, rank, alpha, targets or ("attention",), experts, base, adapter)
    return replace(setting, method=method)


def _float(compute: str) -> str:
    return {"fp32": "float32", "fp8": "float8"}.get(compute, "bfloat16")


def _model_name(row: dict[str, str], source: str) -> str:
    """The model column; where the file of a litgpt recipe names another model, the file's name (it was run)."""
    name = row.get("model", "")
    if source == "litgpt" and ".yaml" in row.get("source", ""):
        folder = re.search(r"([\w.-]+)/\w+\.yaml", row["source"])
        if folder and names.config_of(folder[1]):
            return folder[1]
    return name


def _fitted_to_stack(model: Model, stack: Stack, text: str) -> Model:
    """litgpt and others wrap q, k and v each on its own also where the hub's model has them in one matrix."""
    reduced = re.search(r"_l(\d+)_|_l(\d+)\b", text.lower())
    if reduced and "layer-reduced" in text:
        found = names.config_of(model.name)
        if found:
            layers = int(reduced[1] or reduced[2])
            model = names.build({**found[1], "num_hidden_layers": layers}, f"{model.name}, {layers} layers")
    if stack.name == "litgpt":  # its models never share the head with the embedding
        return replace(names.split(model), tied=False)
    return names.split(model) if stack.name == "torchtune" else model


def _family(name: str, model: Model | None) -> str:
    """What errors are grouped by: llama, qwen, gemma ..., from the name."""
    low = name.lower()
    known = ("tinyllama", "tiny-llama", "codellama", "llama", "qwen", "gemma", "mixtral", "mistral", "ministral", "smollm",
             "deepseek", "phi", "falcon", "stablelm", "mpt", "pythia", "gpt-oss", "glm", "granite", "lfm", "hunyuan",
             "kimi", "olmo", "yi", "afm")  # fmt: skip
    found = next((word for word in known if word in low), model.model_type if model else "")
    return "llama" if "llama" in found else found


def _length(text: str) -> int | None:
    """Tokens of the longest sample; None where only a cap is given that the data does not reach.

    >>> [_length(t) for t in ("2048", "Alpaca, longest sample 1079 tok", "2048 max (short self-cognition data)", "8k")]
    [2048, 1079, None, 8192]
    """
    low = text.lower()
    if "short" in low:
        return None
    thousands = re.fullmatch(r"\D*(\d+)k\b.*", low)
    if thousands:
        return int(thousands[1]) * 1024
    longest = re.search(r"longest\D*(\d+)", low)
    return whole(longest[1] if longest else low, 1e8)


def _mean_tokens(text: str, facts: Mapping[str, str], rate: str) -> float | None:
    found = re.search(r"mean ~?(\d+)", text.lower())
    return float(found[1]) if found else None


def _positive(text: str) -> float | None:
    value = number(text) if "oom" not in text.lower() else None
    return value if value is not None and value > 0 else None


def _loss(text: str, stack: Stack) -> str:
    low = text.lower()
    if "w/o cce" in low or "without cce" in low:
        return "full"
    if stack.name == "torchtune" and "chunk" not in low and re.search(r"baseline|packed|compile", low):
        return "full"  # steps of its ladder before chunking is switched on
    if "liger" in low or "cut cross entropy" in low or re.search(r"\bcce\b", low):
        return "chunked"
    return stack.loss


def _step_seconds(extra: str, facts: Mapping[str, str], minutes: str) -> float | None:
    """Seconds of an optimizer step.

    >>> _step_seconds("grad_accum=8; 1.4s/it", {}, ""), _step_seconds("real 843.0 ms/iter", {}, "")
    (1.4, 0.843)
    """
    for pattern, scale in ((r"([\d.]+) ?s/(?:it|step)\b", 1.0), (r"([\d.]+) ?ms/(?:it|iter|step)\b", 1e-3)):
        found = re.search(pattern, extra)
        if found and number(found[1]):
            return (number(found[1]) or 0.0) * scale
    if facts.get("step_s"):
        return _positive(facts["step_s"])
    if "time=one global step" in extra and _positive(minutes):
        return (_positive(minutes) or 0.0) * 60
    return None


def _parallel(text: str, facts: Mapping[str, str], gpus: int, kind: str) -> Parallel:
    """How a copy is split, from words and from tp2_pp1_dp4 in names.

    >>> _parallel("full DeepSpeed ZeRO2", {}, 8, "full").states, _parallel("LoRA FSDP", {}, 4, "lora").weights
    (8, 4)
    """
    low = text.lower()

    def ways(key: str) -> int:
        given = whole(facts.get(key), 1e5)
        found = re.search(rf"(?:^|[^a-z]){key}[= -]?(\d+)", low)
        return given or (int(found[1]) if found else 1)

    tensor, pipeline, context, expert = (ways(key) for key in ("tp", "pp", "cp", "ep"))
    copies = max(1, gpus // max(1, tensor * pipeline * context))
    weights = states = 1
    fsdp = whole(facts.get("fsdp"), 1e5)
    if re.search(r"zero[- ]?(stage[- ]?)?3", low) or ("fsdp" in low and "ddp" not in low):
        weights = states = (fsdp or copies) * (context if "torchtitan" in low else 1)  # its mesh has both
    elif re.search(r"zero[- ]?(stage[- ]?)?[12]", low):
        states = copies
    elif kind == "full" and "qwenlm/qwen" in low:
        weights = states = copies  # finetune_ds.sh: ZeRO-3
    elif "qwenlm/qwen" in low:
        states = copies  # finetune_lora_ds.sh: ZeRO-2
    elif kind == "full" and "megatron" in low:
        states = copies * context  # its distributed optimizer
    offload = "cpu offload" in low or "cpu/act offload" in low
    return Parallel(weights, states, tensor, pipeline, context, expert, offload)


def _accumulation(s: Setting) -> int | None:
    """Micro-batches of an optimizer step, stated or from the global batch."""
    for key in ("grad_accum", "ga", "gas", "grad_acc", "gradient_accumulation", "mbc"):
        given = whole(s.facts.get(key), 1e6)
        if given:
            return given
    stated = re.search(r"grad(?:ient)?[_ ]accum\w*\s?=?\s?(\d+)", s.notes.lower())
    if stated:
        return max(1, int(stated[1]))
    if s.global_batch and s.micro_batch:
        split = s.parallel.tensor * s.parallel.pipeline * s.parallel.context
        return max(1, round(s.global_batch * split / (s.micro_batch * s.gpus)))
    return None


def _memory(row: dict[str, str], stack: Stack, extra: str, card: float | None) -> tuple[Measured, ...]:
    """The peaks of a row. A row that ran out of memory is a bound: at least the card's memory.

    Values are in the unit of `_unit`.
    """
    text, low = row.get("peak_mem_GiB", ""), extra.lower()
    found: list[Measured] = []
    if "oom" in text.lower() or "out of memory" in text.lower():
        return (Measured("process", card, True),) if card else ()
    value = _positive(text)
    if value is not None and value < 1e5:
        found.append(Measured(_memory_kind(low, stack), value * _unit(value, low)))
    for key, kind in (("peak_reserved_gib", "reserved"), ("process_gib", "process")):
        also = _positive(facts_of(extra).get(key, ""))
        if also is not None:
            found.append(Measured(kind, also * GIB))
    allocated = re.search(r"allocated (\d+\.\d+)", low)
    if allocated and found and found[0].kind == "reserved":
        found.append(Measured("allocated", float(allocated[1]) * GIB))
    return tuple(found)


def _unit(value: float, low: str) -> float:
    """Bytes of the unit of a value: GiB, or GB where it was left as published in GB.

    A table that says "64.5GB as published" beside 60.07 has converted. Where it says that the unit was not stated it is
    GB: the largest of those rows is 81.0 on a card of 80 GiB.

    >>> _unit(60.07, "64.5gb as published") == GIB, _unit(25.7, "gb as published"), _unit(6.7, "unit as published")
    (True, 1000000000.0, 1000000000.0)
    """
    if any(abs(float(n) / value - GIB / 1e9) < 0.01 for n in re.findall(r"(\d+\.?\d*) ?gb", low)):
        return float(GIB)
    if re.search(r"gb as published|published in gb|unit as published", low):
        return 1e9
    return float(GIB)


def _memory_kind(low: str, stack: Stack) -> str:
    if stack.name == "hf" and "peak_reserved" in low:
        return "allocated"
    if "max_memory_allocated" in low or ("allocated" in low and "reserved" not in low):
        return "allocated"
    if "reserved" in low:
        return "reserved minus init" if "minus init" in low else "reserved"
    return "process" if "nvidia-smi" in low else stack.memory
