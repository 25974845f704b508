"""What the planner says about a run of our own loop, before it starts: from its spec, config and device alone.

The same function predicts again after a calibration, so that the two differ in their constants only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_planner.arch import from_config
from lora_planner.facts import CPU, Gpu
from lora_planner.ledger import Estimate, exact
from lora_planner.memory import MemoryPlan, constants, interval, memory
from lora_planner.model import Model, Scan
from lora_planner.params import trainable_params
from lora_planner.plan import matmul_dtype
from lora_planner.record import RunSpec
from lora_planner.throughput import OWN_STACK, Work, step_time
from lora_planner.throughput import stack as stack_of
from lora_planner.workload import work

PROBE = "probe"  # the task that the constants are fitted on
#: names of a prediction
MEAN_LENGTH, LONGEST = "mean_length", "longest_length"
#: tasks whose samples all have exactly `seq_len` tokens: no batch of them needs a mask
UNPADDED = (PROBE, "code", "shift")


def predict(
    spec: RunSpec, config: Mapping[str, Any], gpu: Gpu, stack: str = OWN_STACK,
    lengths: tuple[float, float] | None = None,
) -> dict[str, Estimate]:  # fmt: skip
    """trainable [params], peak_bytes, step_s, tokens_per_s (padded), each with its 90 % interval.

    `lengths`: tokens to which this run's micro-batches are padded, the mean (time) and the longest (memory); they
    are part of what is returned. Without them both are the spec's seq_len.
    An RL step also samples, which nothing here models: of such a run only the trainable parameters are known.
    """
    model = from_config(dict(config))
    found = {"trainable": exact(trainable_params(model, spec.plan_method()), "params", "params.trainable_params")}
    if spec.objective != "sft":
        return found
    mean, longest = lengths or (spec.seq_len, spec.seq_len)
    if lengths:
        found[MEAN_LENGTH] = exact(mean, "tokens", "the data, in the run's order")
        found[LONGEST] = exact(longest, "tokens", "the data")
    asked = step_work(replace(spec, seq_len=max(1, round(mean))), model, gpu)
    seconds = step_time(asked, gpu, stack_of(stack, gpu)).estimate()
    tokens = spec.batch * mean
    found["step_s"] = seconds
    found["tokens_per_s"] = Estimate(
        tokens / seconds.high, tokens / seconds.value, tokens / seconds.low, "tokens/s", seconds.basis, seconds.source
    )
    found["peak_bytes"] = peak_bytes(replace(spec, seq_len=int(longest)), model, gpu, stack)
    return found


def lengths_of(predicted: Mapping[str, Estimate]) -> tuple[float, float] | None:
    """What an earlier prediction knew of the run's data, to predict again with other constants."""
    if MEAN_LENGTH not in predicted:
        return None
    return predicted[MEAN_LENGTH].value, predicted[LONGEST].value


def step_work(spec: RunSpec, model: Model, gpu: Gpu) -> Work:
    """One step of this run, in the precision its matmuls have on this device."""
    return work(
        model,
        spec.plan_method(),
        micro_batch=spec.micro_batch,
        seq_len=spec.seq_len,
        accumulation=spec.accumulation,
        checkpointing=spec.checkpointing,
        attention=spec.attention,
        dtype=spec.precision if spec.precision in gpu.peak_flops_per_s else matmul_dtype(gpu),
    )


def memory_plan(spec: RunSpec, model: Model, gpu: Gpu) -> MemoryPlan:
    """Memory of a step as our loop takes it: trained weights fp32, AdamW as torch has it on this device."""
    how = spec.plan_method()
    bf16 = spec.precision == "bf16"
    return memory(
        model,
        how,
        micro_batch=spec.micro_batch,
        seq_len=spec.seq_len,
        checkpointing=spec.checkpointing,
        attention=spec.attention,
        optimizer="adamw-loop" if gpu.form == CPU else "adamw-foreach",
        full_precision="mixed" if bf16 else "fp32",
        autocast=bf16,
        padded=False if spec.task in UNPADDED else None,
        accumulate=spec.accumulation > 1,
    )


def peak_bytes(spec: RunSpec, model: Model, gpu: Gpu, stack: str = OWN_STACK) -> Estimate:
    """Most bytes of tensors alive: what torch.cuda.max_memory_allocated counts, or the profiler on a CPU.

        CPU:  allocated * (1 + unexplained)
        CUDA: the same + workspace          (cuBLAS takes its workspace from torch's allocator)

    The interval is that of `memory.interval`.
    """
    known = constants(gpu.name, stack)
    plan = memory_plan(spec, model, gpu)
    value = plan.allocated * (1 + known["unexplained"].value)
    if gpu.form != CPU:
        value += known["workspace_bytes"].value
    scans = any(isinstance(block.mixer, Scan) for block in model.blocks)
    return interval(value, plan.phases["load"]["weights"], scans, known)
