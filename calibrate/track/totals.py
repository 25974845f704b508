"""Parameters that publishers state for their weight files, against what a config says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from calibrate.track import Row
from calibrate.track.case import Case
from calibrate.track.counted import Subject, counted, family, named, number, text
from calibrate.track.names import config_of
from lora_planner.ledger import DERIVED, Estimate
from lora_planner.model import Model

NAME = "published parameters"
COLUMNS = ("name", "published")


def cases(rows: Sequence[Row]) -> list[Case]:
    return [case for row in rows for case in _cases(row)]


def _cases(row: Row) -> Iterator[Case]:
    name = text(row, "name")
    if text(row, "measured"):
        subject = Subject("transformers 5.23 on the meta device", name, family=family(name))
        yield subject.case("parameters", name, "params", number(row, "measured"),
                           lambda: counted(named(name).total, "params", "model.Model.total"))  # fmt: skip
    subject = Subject("published totals of weight files", name, family=family(name))
    yield subject.case("published parameters", name, "params", number(row, "published"), lambda: stored(name))


def stored(name: str) -> Estimate:
    """What a weight file of this model holds.

        value = parameters + persistent buffers + modules that predict further tokens, where the config has them
        low = parameters,  high = value + V H where the unembedding is tied: some files store it again

    >>> e = stored("qwen3-0.6b")
    >>> int(e.value), int(e.high)                   # 751,632,384 are published
    (596049920, 751632384)
    >>> int(stored("glm-4.5-air").value)            # as published
    110468824832
    """
    model = named(name)
    found = config_of(name)
    value = float(model.total + model.buffers + (further_tokens(model, found[1]) if found else 0))
    again = model.head.d_in * model.head.d_out if model.tied else 0
    return Estimate(
        model.total, value, value + again, "params", DERIVED, "model.Model.total, buffers and further tokens"
    )


def further_tokens(model: Model, config: Mapping[str, Any]) -> int:
    """Modules that predict tokens after the next one: each a further layer like the last, a projection of two hidden
    states to one, and three norms; in DeepSeek's form also an embedding and an unembedding of its own.

        n (layer + 2 H^2 + 3 H + [own embeddings] 2 V H)        [params]

    transformers loads none of them. Source: reproduces the totals of GLM-4.5-Air, Qwen3.5-4B and Qwen3.5-35B-A3B.
    """
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    modules = text.get("num_nextn_predict_layers") or text.get("mtp_num_hidden_layers") or 0
    if not isinstance(modules, int) or modules < 0:
        return 0
    hidden, last = model.hidden_size, model.blocks[model.order[-1]]
    layer = sum(row.params for row in last.linears) + sum(weight.params for weight in last.weights)
    if last.experts:  # its share of the correction biases
        layer += model.buffers // sum(block.count for block in model.blocks if block.experts)
    shares = text.get("mtp_use_dedicated_embeddings") is False
    own = 0 if shares else model.embed.params + model.head.d_in * model.head.d_out
    return modules * (layer + 2 * hidden**2 + 3 * hidden + own)
