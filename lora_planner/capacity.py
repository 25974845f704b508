"""How much there is to learn, how much an adapter can hold, and which rank follows.

The sources disagree by a factor of forty, so a capacity is a table of sources and the verdict says
where they part. "Fits" means no source sees the adapter full; it does not mean that a higher rank
would not be better: `rank_penalty` says what the low rank still costs.

    N total parameters of the base   p trainable parameters   r rank
    LWR: "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025)
    NG: "Capacity of a LoRA Adapter" (Nguyen 2026)   BTC: "Bits That Count" (ICML 2026)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

from lora_planner.errors import BadInput, UsageError
from lora_planner.learning_rate import RL, SFT, constants
from lora_planner.ledger import ASSUMED, BASES, DERIVED, FITTED, Estimate, around
from lora_planner.units import BITS_PER_NAT

#: what a source counts as "to learn"
DESCRIPTION, EXCESS, TOKENS = "description bits", "excess bits", "tokens"
FITS, CONTESTED, OVER = "surely fits", "contested", "surely over"

#: a description length of one bit a trained token (LWR). The ends are *final test* losses of 23 tuned
#: models on Tulu3 (0.44 to 0.82 nat), for want of published first-epoch losses, which are higher
BITS_PER_TOKEN = Estimate(0.63, 1.0, 1.19, "bit/token", ASSUMED, "LWR; ends: tinker-cookbook final test losses")
#: first-epoch losses of repeated runs differ by at most this, relatively
LOSS_NOISE = 0.016
#: excess description length per token without a pilot run: a latent skill, a new one. Nobody published
#: typical values: these are ours, x3 either way, so that BTC's thresholds can be asked at all
EXCESS_PER_TOKEN = {
    "elicitation": around(0.02, 3, "bit/token", ASSUMED, "a guess; run a pilot to measure it"),
    "teaching": around(0.5, 3, "bit/token", ASSUMED, "a guess; run a pilot to measure it"),
}

#: ranks that a vLLM server takes as max_lora_rank (vllm-project/vllm#22782)
SERVABLE_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
#: SFT at rank 4 cost 0.3 to 5 % of loss at 100k examples; RL needs little but rank 1 is reported to
#: bottleneck (arXiv:2512.23165), and rank 8 is as servable
FLOOR_RANK = {SFT: 16, RL: 8}
#: a penalty below this passes as "no penalty": the usual equivalence margin
PENALTY_MARGIN = 0.005
#: the sweep compared ranks up to 128, and ranks above 4 only in models of this size
PENALTY_TOP_RANK, PENALTY_PARAMS = 128, (1e9, 35e9)
#: models between which NG fitted its law
NG_PARAMS = (20e6, 1e9)

COLLAPSE_RANK = 64
RANK_ONE_CAUTION = (
    "few bits do not make a rank trainable: rank 1 was a bottleneck in DAPO on 1.5B and 7B "
    "(arXiv:2512.23165), though it matched full fine-tuning in LWR and two replications"
)
COLLAPSE_CAUTION = (
    "GRPO on 8B collapsed at ranks 128 and 256 (batch 64 to 256) and at rank 64 above batch 64 "
    "(Structure over Scale, ICML-W 2026)"
)


@dataclass(frozen=True, slots=True)
class Need:
    """What there is to learn. `bits` is an upper bound (to memorise); `excess` what generalises, by regime.

    `tokens` is None in RL, where the vendor's token rule and BTC's thresholds say nothing.
    """

    bits: Estimate
    tokens: float | None = None
    excess: tuple[tuple[str, Estimate], ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def objective(self) -> str:
        return RL if self.tokens is None else SFT


@dataclass(frozen=True, slots=True)
class Source:
    """What one source says p trainable parameters hold: coefficient * p^exponent, low to high."""

    name: str
    counts: str
    low: float
    value: float
    high: float
    regime: str
    basis: str
    source: str
    exponent: float = 1.0

    def holds(self, trainable_params: float) -> Estimate:
        """Capacity in the unit that the source counts.

        >>> ceiling(), round(ceiling().holds(2_753_792).value)
        (Source(name='knowledge ceiling', counts='description bits', low=1.0, value=2.0, high=2.3, \
regime='100 to 1000 exposures of every fact, full training', basis='fitted', \
source='Allen-Zhu & Li, arXiv:2404.05405', exponent=1.0), 5507584)
        """
        p = trainable_params**self.exponent
        return Estimate(self.low * p, self.value * p, self.high * p, self.counts, self.basis, self.source)

    def params_for(self, need: Estimate) -> Estimate:
        """Trainable parameters that hold `need`: the inverse of `holds`, ends crossed.

        (need / coefficient)^(1 / exponent)        [params]
        """
        low, value, high = (
            (bits / c) ** (1 / self.exponent)
            for bits, c in ((need.low, self.high), (need.value, self.value), (need.high, self.low))
        )
        return Estimate(low, value, high, "params", max(need.basis, self.basis, key=BASES.index), self.source)


@dataclass(frozen=True, slots=True)
class Judgement:
    """One source's answer for one adapter."""

    source: Source
    need: Estimate
    capacity: Estimate
    verdict: str
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """All sources' answers. `capacity` spans the sources that count description bits."""

    verdict: str
    need: Estimate
    capacity: Estimate
    judgements: tuple[Judgement, ...]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RankAdvice:
    """`smallest`: over the sources, the rank that just holds the need; `rank`: what we would train.

    `penalty` is None in RL: nobody swept it there.
    """

    rank: int
    smallest: Estimate
    penalty: Estimate | None
    reasons: tuple[str, ...]
    warnings: tuple[str, ...] = ()


# ---------------------------------------------------------------- what there is to learn


def sft_need(trained_tokens: float, first_epoch_nats: float | None = None, excess_bits: float | None = None) -> Need:
    """Upper bound on what supervised data teach: their description length.

        bits = tokens * loss of the first epoch / ln 2        [bit]

    `trained_tokens`: tokens with a loss, each once; later epochs add nothing. Without the user's own
    first-epoch loss, one bit a token is assumed. `excess_bits`: measured by a pilot, what of it is
    learned for other data (first-epoch loss minus n times the final test loss).
    Source: LWR, "How much capacity is needed"; BTC sec. 6.4.

    >>> sft_need(10e6).bits.value, round(sft_need(10e6, first_epoch_nats=0.69).bits.value, -4)
    (10000000.0, 9950000.0)
    """
    if not 0 < trained_tokens < float("inf"):
        raise BadInput(f"{trained_tokens:g} trained tokens teach nothing", "--data",
                       "Check that the data have assistant turns.")  # fmt: skip
    if first_epoch_nats is None:
        bits = BITS_PER_TOKEN.scaled(float(trained_tokens), "bit")
    elif 0 < first_epoch_nats < 30:
        value = trained_tokens * first_epoch_nats * BITS_PER_NAT
        bits = around(value, 1 + LOSS_NOISE, "bit", DERIVED, "first-epoch loss (prequential code length)")
    else:
        raise BadInput(f"a loss of {first_epoch_nats:g} nat/token is no loss", "--first-epoch-nats",
                       "Give the first epoch's mean training loss; usually 0.3 to 3 nats.")  # fmt: skip
    if excess_bits is None:
        # no more can generalise than there is
        excess = tuple((k, _at_most(e.scaled(float(trained_tokens), "bit"), bits)) for k, e in EXCESS_PER_TOKEN.items())
    elif 0 < excess_bits < float("inf"):
        pilot = around(float(excess_bits), 1 + LOSS_NOISE, "bit", DERIVED, "pilot run")
        excess = tuple((regime, pilot) for regime in EXCESS_PER_TOKEN)
    else:
        raise BadInput(f"{excess_bits:g} excess bits are no measurement", "--excess-bits", "Give a positive number.")
    return Need(bits, float(trained_tokens), excess)


def binary_entropy(p: float) -> float:
    """Entropy of a coin.

        -p log2 p - (1 - p) log2 (1 - p)        [bit]

    Source: Shannon 1948.

    >>> binary_entropy(0.5), round(binary_entropy(0.1), 2), binary_entropy(1.0)
    (1.0, 0.47, 0.0)
    """
    return sum((-q * log2(q) for q in (p, 1 - p) if 0 < q < 1), 0.0)


def rl_need(problems: int, group: int, pass_rate: float | None = None, passes: float = 1.0) -> Need:
    """Upper bound on what policy gradient with a binary reward at the end can learn.

        bits <= problems * group * passes * H_b(pass rate)        [bit]

    An episode's advantage carries at most its reward's entropy. With a pass rate per problem the mean
    rate still bounds it (H_b is concave). Unknown rate: 0 to 1 bit an episode.
    Source: LWR, "How much capacity is needed by supervised and reinforcement learning" (an upper bound,
    not of what model-based methods could learn).

    >>> rl_need(10_000, 32).bits.high, rl_need(10_000, 32, pass_rate=0.5).bits.value
    (320000.0, 320000.0)
    """
    if group == 1:
        raise BadInput("a group of 1 has zero advantage: its mean is its only reward", "--group",
                       "Use 4 or more samples a problem; 8 to 32 is usual.")  # fmt: skip
    if problems < 1 or group < 1 or not 0 < passes < float("inf"):
        raise BadInput(f"{problems} problems x {group} samples x {passes:g} passes are no run", "--problems",
                       "Use positive numbers.")  # fmt: skip
    episodes = float(problems) * group * passes
    if pass_rate is None:
        return Need(Estimate(0.0, episodes, episodes, "bit", ASSUMED, "LWR: at most 1 bit an episode"))
    if not 0 <= pass_rate <= 1:
        raise BadInput(f"pass rate {pass_rate:g} is no share", "--pass-rate", "Use 0 to 1.")
    most = episodes * binary_entropy(pass_rate)
    warnings: tuple[str, ...] = ()
    if most == 0:
        word = "never" if pass_rate == 0 else "always"
        warnings = (f"the reward is {word} given: every advantage is zero, nothing is learned",)
    return Need(Estimate(0.0, most, most, "bit", DERIVED, "LWR: reward entropy bounds the signal"), warnings=warnings)


# ---------------------------------------------------------------- what an adapter holds


def ceiling() -> Source:
    """Facts stored per parameter after 100 (1 bit) to 1000 exposures (2 bit), never above 2.3.

    Source: Allen-Zhu & Li, arXiv:2404.05405. All parameters trained, so a ceiling for an adapter.
    """
    return Source("knowledge ceiling", DESCRIPTION, 1.0, 2.0, 2.3,
                  "100 to 1000 exposures of every fact, full training", FITTED,
                  "Allen-Zhu & Li, arXiv:2404.05405")  # fmt: skip


def adapter_law(total_params: float) -> Source:
    """Facts stored by LoRA, fitted on bases of 20M to 1B.

        C = 3.9e-5 N^0.377 p^1.075        [bit], held out at 1B within 0.8 to 1.4 x

    Beyond 1B the low end stays at the largest fitted base: nobody measured that it grows on. (8B at
    rank 16: 0.79 bit a parameter by the law, 0.29 at its low end.)
    Source: NG.

    >>> law = adapter_law(1e9)
    >>> round(law.holds(5e6).value / 5e6, 2), adapter_law(8e9).low < law.value
    (0.31, True)
    """
    coefficient = 3.9e-5 * total_params**0.377
    nearest_fitted = 3.9e-5 * min(max(total_params, NG_PARAMS[0]), NG_PARAMS[1]) ** 0.377
    inside = NG_PARAMS[0] <= total_params <= NG_PARAMS[1]
    regime = "random key-value facts, rank 1 to 16" + ("" if inside else "; EXTRAPOLATED: bases of 20M to 1B")
    return Source("adapter law", DESCRIPTION, 0.8 * min(coefficient, nearest_fitted), coefficient,
                  1.4 * max(coefficient, nearest_fitted), regime, FITTED, "NG", exponent=1.075)  # fmt: skip


def sources(total_params: float) -> tuple[Source, ...]:
    """Everything that is published on how much p adapter parameters hold, as rows.

    >>> [s.name for s in sources(8e9)][:3]
    ['knowledge ceiling', 'adapter memorisation', 'adapter law']
    """
    return (
        ceiling(),
        Source("adapter memorisation", DESCRIPTION, 1.71, 2.1, 2.75,
               "bases of 2M and 8M, random strings, 16k to 40k steps", FITTED, "Tan, arXiv:2607.21351"),
        adapter_law(total_params),
        Source("vendor rule", TOKENS, 1.0, 1.0, 1.0,
               "rule of thumb: parameters >= completion tokens", ASSUMED, "tinker docs, LoRA primer"),
        Source("elicitation", EXCESS, 0.01, 0.03, 0.1,
               "the skill is latent: thresholds 0.004 to 0.07 bit a parameter", FITTED, "BTC thresholds"),
        Source("teaching", EXCESS, 0.7, 1.0, 2.2,
               "the skill is new: thresholds 0.70 to 2.2 bit a parameter", FITTED, "BTC thresholds"),
    )  # fmt: skip


def capacity(total_params: float, trainable_params: float) -> Estimate:
    """Description bits that an adapter holds, from the lowest to the highest source.

        value: geometric mean of the sources' values        [bit]

    The sources differ in exposures, steps and bases; which of them is right is open.
    Source: `sources`.

    >>> c = capacity(8e9, 44e6)
    >>> round(c.low / 44e6, 2), round(c.high / 44e6, 2)
    (0.29, 2.75)
    """
    _positive(total_params, trainable_params)
    held = [s.holds(trainable_params) for s in sources(total_params) if s.counts == DESCRIPTION]
    product = 1.0
    for h in held:
        product *= h.value ** (1 / len(held))
    names = ", ".join(h.source for h in held)
    return Estimate(min(h.low for h in held), product, max(h.high for h in held), "bit", FITTED, names)


def verdict(need: Need, total_params: float, trainable_params: float) -> Verdict:
    """Does it fit? "surely" only where every source agrees over its whole interval.

    Source: `sources`; each is asked in the unit it counts.

    >>> verdict(rl_need(10_000, 32), 8.03e9, 2_753_792).verdict
    'surely fits'
    >>> verdict(sft_need(1e9), 8.03e9, 2_753_792).verdict
    'surely over'
    """
    held = capacity(total_params, trainable_params)
    judgements = []
    for source, asked in _asked(need, total_params):
        holds = source.holds(trainable_params)
        word = FITS if asked.high <= holds.low else OVER if asked.low > holds.high else CONTESTED
        ratio = holds.value / asked.value if asked.value else float("inf")
        reason = f"{source.name}: holds {ratio:.2g}x the need ({source.regime}; {source.source})"
        judgements.append(Judgement(source, asked, holds, word, reason))
    words = {j.verdict for j in judgements}
    overall = words.pop() if len(words) == 1 else CONTESTED
    return Verdict(overall, need.bits, held, tuple(judgements), need.warnings)


# ---------------------------------------------------------------- which rank


def rank_penalty(rank: int, total_params: float, top_rank: int = PENALTY_TOP_RANK) -> Estimate:
    """Loss of a low rank above that of the top rank, each at its best LR, relative.

        0.040 (N / 8e9)^-0.46 (r^-0.71 - top^-0.71)        [1], constants in data/lr_constants.json

    Measured at about 100k chat examples; fewer examples should cost less, more cost more. Outside 1B to
    35B almost only ranks 1 to 4 were swept: the source then says EXTRAPOLATED and the band is squared.
    It runs low for small models: at 1B and 3B every published penalty is above the value.
    Source: our fit to the tinker-cookbook sweep. Of 59 comparisons, each model predicted by the others,
    71 % are within x2 and the median error is 0.17 % of the loss; of assuming no penalty it is 0.52 %.

    >>> p = rank_penalty(16, 8.03e9)
    >>> p.low < 0.0058 < p.high, rank_penalty(128, 8.03e9).value
    (True, 0.0)
    """
    if rank < 1:
        raise BadInput(f"rank {rank} is no rank", "--rank", "Use 1 or more.")
    _positive(total_params, 1)
    fit = constants()
    b = fit["penalty.rank_exponent"].value
    size = (total_params / 8e9) ** -fit["penalty.size_exponent"].value
    value = fit["penalty.scale"].value * size * max(0.0, rank**-b - top_rank**-b)
    band = fit["penalty.band"].value
    inside = PENALTY_PARAMS[0] <= total_params <= PENALTY_PARAMS[1] and rank <= PENALTY_TOP_RANK
    note = "" if inside else "EXTRAPOLATED outside 1B to 35B and rank 128; "
    return penalty_within(value, band if inside else band**2, note + fit["penalty.scale"].source)


def penalty_within(value: float, band: float, source: str) -> Estimate:
    """A penalty with its band, which is a factor except near zero, where losses cannot be told apart.

        low, high: (value + floor) / band - floor,  (value + floor) * band - floor        [1]

    >>> round(penalty_within(0.01, 2.0, "").high, 4), penalty_within(0.0, 2.0, "").low
    (0.0205, 0.0)
    """
    floor = constants()["penalty.floor"].value
    low, high = max(0.0, (value + floor) / band - floor), (value + floor) * band - floor
    return Estimate(low, value, high, "relative loss", FITTED, source)


def servable_rank(rank: float) -> int:
    """The smallest rank that servers accept and that is not below this one.

    Source: vLLM's choices of max_lora_rank, vllm-project/vllm#22782.

    >>> servable_rank(17), servable_rank(1), servable_rank(9.2)
    (32, 1, 16)
    """
    for accepted in SERVABLE_RANKS:
        if rank <= accepted:
            return accepted
    raise BadInput(f"rank {ceil(rank)} is above what servers accept", "--rank",
                   f"Use at most {SERVABLE_RANKS[-1]}, merge the adapter, or fine-tune in full.")  # fmt: skip


def smallest_rank(need: Need, total_params: float, params_per_rank: float) -> Estimate:
    """The rank that just holds the need: lowest and highest over the sources, and the strictest centre.

        max over sources of params_for(need) / params_per_rank, at least 1        [rank]

    BTC's two regimes exclude each other and which one holds needs a pilot: teaching gives the centre,
    elicitation counts only towards the interval.
    Source: `sources`.

    >>> smallest_rank(rl_need(10_000, 32), 8.03e9, 2_753_792).value
    1.0
    >>> 3 < smallest_rank(sft_need(10e6), 8.03e9, 2_753_792).value < 8
    True
    """
    _positive(total_params, params_per_rank)
    low, value, high = float("inf"), 1.0, 1.0
    for source, asked in _asked(need, total_params):
        ranks = source.params_for(asked).scaled(1 / params_per_rank)
        low, high = min(low, ranks.low), max(high, ranks.high)
        if source.name != "elicitation":
            value = max(value, ranks.value)
    return Estimate(max(1.0, low), value, max(high, value), "rank", ASSUMED, "strictest of the sources")


def recommend_rank(need: Need, total_params: float, params_per_rank: float) -> RankAdvice:
    """The rank to train: what holds the need, not below a floor, snapped up to what servers accept.

        max(smallest sufficient, floor, smallest with a penalty below 0.5 %)        [rank]

    More data never lower it. The floor is 16 in SFT and 8 in RL; the penalty counts in SFT only.
    Source: the functions above; vendor default is 32.

    >>> recommend_rank(rl_need(10_000, 16), 8.19e9, 2.73e6).rank
    8
    >>> recommend_rank(sft_need(10e6), 8.03e9, 2_753_792).rank
    16
    """
    objective = need.objective
    smallest = smallest_rank(need, total_params, params_per_rank)
    wanted, reasons = max(smallest.value, FLOOR_RANK[objective]), []
    reasons.append(f"held from rank {ceil(smallest.value)} (sources: {smallest.low:.0f} to {smallest.high:.0f})")
    if wanted > smallest.value:
        why = "low ranks still cost loss" if objective == SFT else "cheap insurance against an untrainable rank"
        reasons.append(f"not below {FLOOR_RANK[objective]}: {why}")
    if objective == SFT:
        free = next(r for r in SERVABLE_RANKS if rank_penalty(r, total_params).value <= PENALTY_MARGIN)
        if free > wanted:
            wanted = free
            reasons.append(f"rank {free} is the first with a predicted penalty below 0.5 % at this size")
    warnings = list(need.warnings)
    if wanted > SERVABLE_RANKS[-1]:
        warnings.append(f"rank {ceil(wanted)} would be needed: compare with full fine-tuning")
        wanted = SERVABLE_RANKS[-1]
    if objective == RL:
        warnings.append(RANK_ONE_CAUTION)
        if wanted >= COLLAPSE_RANK:
            warnings.append(COLLAPSE_CAUTION)
    rank = servable_rank(wanted)
    penalty = rank_penalty(rank, total_params) if objective == SFT else None
    return RankAdvice(rank, smallest, penalty, tuple(reasons), tuple(warnings))


def _asked(need: Need, total_params: float) -> list[tuple[Source, Estimate]]:
    """The sources that have something to say about this need, and what each is asked to hold."""
    excess = dict(need.excess)
    found = []
    for source in sources(total_params):
        if source.counts == DESCRIPTION:
            found.append((source, need.bits))
        elif source.counts == TOKENS and need.tokens is not None:
            found.append((source, Estimate(need.tokens, need.tokens, need.tokens, "token", DERIVED)))
        elif source.name in excess:
            found.append((source, excess[source.name]))
    return found


def _at_most(a: Estimate, bound: Estimate) -> Estimate:
    return Estimate(
        min(a.low, bound.low), min(a.value, bound.value), min(a.high, bound.high), a.unit, a.basis, a.source
    )


def _positive(total_params: float, trainable_params: float) -> None:
    if not (0 < total_params < 1e15 and 0 < trainable_params < 1e15):
        raise UsageError(f"{trainable_params:g} of {total_params:g} parameters hold nothing", "capacity",
                         "Give positive counts; full fine-tuning has no capacity question.")  # fmt: skip
