"""Options that commands share, and the words they bring turned into the planner's types."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from lora_planner import completion
from lora_planner.errors import BadInput, UsageError

if TYPE_CHECKING:
    from lora_planner.plan import Configuration, Job, Plan, Priced

METHODS = ["full", "lora", "qlora", "rslora", "dora", "lora-fa"]
EXPERTS = ["per-expert", "per-expert-over-active", "shared-outer", "fused", "none"]


def options(*decorators: Callable[..., Any]) -> Callable[..., Any]:
    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


MODEL = click.option(
    "--model",
    metavar="NAME|PATH",
    shell_complete=completion.models,
    help="Catalogue name, config.json, directory or hub id.",
)
GPU = click.option("--gpu", metavar="NAME", shell_complete=completion.gpus, help="Exact name, see `lora-plan gpus`.")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
PRICES = click.option(
    "--prices", metavar="FILE", shell_complete=completion.files, help="Your prices (TOML); wins for the GPUs it names."
)
OFFLINE = click.option("--offline", is_flag=True, help="Never ask the hub.")
ADAPTER = options(
    click.option("--method", type=click.Choice(METHODS), default="lora", show_default=True),
    click.option("--rank", type=int, default=16, show_default=True),
    click.option("--alpha", type=float, default=32.0, show_default=True),
    click.option("--targets", default="all-linear", show_default=True,
                 help="attention, mlp, ssm, all-linear, unembed, peft-all-linear or module names, with commas."),
    click.option("--experts", type=click.Choice(EXPERTS), default="per-expert-over-active", show_default=True),
)  # fmt: skip
STEP = options(
    click.option("--micro-batch", type=int, default=1, show_default=True),
    click.option("--seq-len", type=int, default=2048, show_default=True),
    click.option("--checkpointing", type=click.Choice(["none", "full"]), default="none", show_default=True),
    click.option("--attention", type=click.Choice(["eager", "sdpa", "flash"]), default="sdpa", show_default=True),
)  # fmt: skip
FINE = options(
    click.option("--optimizer", type=click.Choice(["adamw", "adamw-fused", "adamw-foreach", "adamw-8bit"]),
                 default="adamw", show_default=True),
    click.option("--loss", type=click.Choice(["full", "chunked"]), default="full", show_default=True,
                 help="Logits of all tokens at once, or in chunks."),
    click.option("--stack", help="Software whose speed to assume; default: lora-plan on a calibrated GPU, else hf-trl."),
)  # fmt: skip
#: what to train on and where, as every command that plans is told
WORK = options(
    click.option("--data", metavar="FILE", shell_complete=completion.files, help="JSONL or Parquet: messages, prompt/completion or text."),
    click.option("--tokens", metavar="N", help="Size of the data where there is no file yet: 10M."),
    click.option("--gpu", metavar="NAME[,NAME]", shell_complete=completion.gpus, help="Exact names, see `lora-plan gpus`."),
    click.option("--budget", type=float, metavar="USD"),
)  # fmt: skip
TERMS: dict[str, dict[str, Any]] = {
    "--tokenizer": {
        "metavar": "PATH",
        "shell_complete": completion.files,
        "help": "tokenizer.json or its directory: exact counts.",
    },
    "--max-length": {"type": int, "help": "Longest sample in tokens; longer ones are cut."},
    "--epochs": {"type": float, "default": 1.0, "show_default": True},
    "--deadline": {"type": float, "metavar": "HOURS"},
    "--experts": {
        "type": click.Choice(EXPERTS),
        "default": "per-expert-over-active",
        "show_default": True,
        "help": "Adapters of a mixture.",
    },
    "--first-epoch-loss": {"type": float, "metavar": "NATS", "help": "Measured, per trained token: sharpens capacity."},
    "--rl": {"is_flag": True, "help": "Reinforcement learning with a verifiable reward."},
    "--problems": {"type": int, "help": "RL: problems in the data."},
    "--group": {"type": int, "default": 16, "show_default": True, "help": "RL: samples per problem."},
    "--pass-rate": {"type": float, "help": "RL: share of samples solved at the start."},
    "--sample-tokens": {"type": float, "metavar": "N", "help": "RL: mean tokens of an answer; default: from the data."},
    "--engine": {
        "type": click.Choice(["vllm", "hf"]),
        "default": "vllm",
        "show_default": True,
        "help": "RL: what samples.",
    },
}


def terms(hidden: bool = False) -> Callable[..., Any]:
    """The finer terms of a job. `hidden`: they work, but would make the help two screens long."""
    return options(*(click.option(name, hidden=hidden, **more) for name, more in TERMS.items()))


RUNS = options(
    click.option("--model", metavar="DIR|ID", shell_complete=completion.files, help="Your model: a directory with safetensors, or a hub id."),
    click.option("--data", metavar="FILE", shell_complete=completion.files, help="Your data: JSONL or Parquet; default: text found on every machine."),
    click.option("--base", metavar="NAME", help="A small base, pre-trained here once: qwen3-1m, llama-1m, moe-2m ..."),
    click.option("--out", metavar="DIR", shell_complete=completion.files, default="lora-plan-runs", show_default=True, help="Where runs are recorded."),
)  # fmt: skip


# ---------------------------------------------------------------- words into types


def needed(words: dict[str, Any], name: str) -> Any:
    value = words.get(name)
    if value is None or value == "":
        raise UsageError(f"--{name.replace('_', '-')} is missing", "", f"See `lora-plan {name}s`.")
    return value


def _number(words: dict[str, Any], name: str, kind: type[int] | type[float]) -> Any:
    """Words from a JSON line have any type; those of the shell were checked by click."""
    value = words[name]
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise BadInput(f"{name}: expected a number, got {value!r}", "configuration", "Give a number.")
    return value


def _text(words: dict[str, Any], name: str) -> str:
    value = words[name]
    if not isinstance(value, str):
        raise BadInput(f"{name}: expected text, got {value!r}", "configuration", "Put it in quotes.")
    return value


def configuration_of(words: dict[str, Any]) -> Configuration:
    from lora_planner.facts import gpu
    from lora_planner.method import method
    from lora_planner.model_source import load_model
    from lora_planner.plan import Configuration
    from lora_planner.throughput import DEFAULT_STACK, default_stack

    name, targets = needed(words, "model"), _text(words, "targets")
    if not isinstance(name, str):
        raise BadInput(f"model: expected text, got {name!r}", "configuration", "Put it in quotes.")
    card = gpu(_text(words, "gpu")) if words.get("gpu") else None
    return Configuration(
        load_model(name, offline=bool(words.get("offline"))),
        method(
            _text(words, "method"),
            _number(words, "rank", int),
            float(_number(words, "alpha", float)),
            tuple(t.strip() for t in targets.split(",") if t.strip()),
            _text(words, "experts"),
        ),
        card,
        _number(words, "micro_batch", int),
        _number(words, "seq_len", int),
        checkpointing=_text(words, "checkpointing"),
        attention=_text(words, "attention"),
        optimizer=_text(words, "optimizer"),
        loss=_text(words, "loss"),
        stack=_text(words, "stack") if words.get("stack") else default_stack(card) if card else DEFAULT_STACK,
    )


def priced_of(words: dict[str, Any]) -> Priced:
    from lora_planner.data_file import parse_token_count
    from lora_planner.plan import PriceBook, price

    tokens = parse_token_count(str(words["tokens"])) if words.get("tokens") else None
    return price(configuration_of(words), PriceBook.load(words.get("prices")), tokens)


def plan_of(words: dict[str, Any]) -> Plan:
    """The plan of one explicit configuration, for `explain`."""
    from lora_planner.batch import recommend_batch
    from lora_planner.data_file import DataFacts, parse_token_count
    from lora_planner.plan import Job, PriceBook, make_plan

    c = configuration_of(words)
    assert c.gpu
    data = DataFacts.from_tokens(parse_token_count(words["tokens"]), c.seq_len)
    job = Job(c.model, data, (c.gpu,), PriceBook.load(words["prices"]))
    return make_plan(job, c, recommend_batch(data.examples, 1.0, c.seq_len))


def job_of(words: dict[str, Any]) -> Job:
    from lora_planner.data_file import DataFacts, parse_token_count, read_data
    from lora_planner.facts import gpu
    from lora_planner.model_source import load_model
    from lora_planner.plan import Job, PriceBook

    model = load_model(needed(words, "model"), offline=words["offline"])
    gpus = tuple(gpu(name.strip()) for name in needed(words, "gpu").split(",") if name.strip())
    if words["data"] and words["tokens"]:
        raise UsageError("--data and --tokens are two sizes of one data set", "", "Give one of them.")
    if words["rl"] and not words["problems"]:
        raise UsageError("--rl needs --problems", "", "How many problems are in the data?")
    if words["sample_tokens"] is not None and not words["rl"]:
        raise UsageError("--sample-tokens without --rl", "", "Only reinforcement learning samples.")
    length = words["max_length"]
    sampling = None
    if words["data"]:
        data = read_data(words["data"], tokenizer=words["tokenizer"], max_length=length)
    elif words["tokens"]:
        data = DataFacts.from_tokens(parse_token_count(words["tokens"]), length)
    elif words["rl"] and words["sample_tokens"] is not None:
        data = None
    else:
        raise UsageError("neither --data nor --tokens", "", "Give the data file, or its size: --tokens 10M.")
    if length and model.max_positions and length > model.max_positions:
        raise BadInput(
            f"--max-length {length} exceeds the model's {model.max_positions} positions",
            "--max-length",
            "Use a shorter length.",
        )
    if words["rl"]:
        from lora_planner.rollout import samples_of

        data, sampling = samples_of(data, words["problems"], words["group"], words["sample_tokens"],
                                    words["engine"], length)  # fmt: skip
    assert data
    return Job(
        model,
        data,
        gpus,
        PriceBook.load(words["prices"]),
        words["epochs"],
        length,
        words["budget"],
        words["deadline"] * 3600 if words["deadline"] is not None else None,
        words["first_epoch_loss"],
        words["rl"],
        words["problems"] or 0,
        words["group"],
        words["pass_rate"],
        sampling,
        words["experts"],
    )
