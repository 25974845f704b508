"""Ways in which an experiment on LoRA shows nothing, by number; a claim names those that its design has to avoid."""

from __future__ import annotations

TRAPS: dict[int, str] = {
    1: "a rank near the width is no low rank, and past break-even it costs more than full training",
    2: "on a base that knows nothing, or everything already, all arms look alike",
    3: "losses on trained text, or held-out windows of trained documents, reward memory",
    4: "a best learning rate at the end of its grid, or between points far apart, is not located",
    5: "one seed cannot tell a difference from noise",
    6: "weights kept in bf16 round small steps away in one arm only",
    7: "Adam's eps, and clipping by norm, act on LoRA's small gradients otherwise than on full ones",
    8: "matrices that silently got no adapter",
    9: "other scalings than alpha / r with one alpha depend on the rank by themselves",
    10: "the lowest curve over all rates is a curve that no run has",
    11: "one shared rate, or a ratio of rates set beforehand, cannot measure the ratio",
    12: "attention only with the unembedding trained is another arm than attention only",
    13: "at a fixed number of tokens a larger batch also means fewer steps",
    14: "not significantly different is not equal: equality needs a margin, and a gap that the design does see",
    15: "memorised bits counted by answers that can be guessed, or at too few exposures",
    16: "a reward that is always or never given teaches nothing, one for the format alone teaches a few bits",
    17: "weight decay and dropout mean different things for A and B than for W",
    18: "constants fitted on the runs that then test them",
    19: "a bit a token holds for large vocabularies, not for bytes: count it from the losses",
    20: "capacities measured elsewhere belong to their optimizer and number of exposures",
}
