"""Lengths of examples: percentiles, truncation, padding and packing.

A data set is a histogram here, so that a million rows cost what their distinct lengths cost.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate

#: (length in tokens, examples of this length), ascending
Histogram = tuple[tuple[int, int], ...]


def percentile(histogram: Histogram, share: float) -> int:
    """The smallest length that at least this share of the examples does not exceed.        [tokens]

    >>> percentile(((10, 9), (500, 1)), 0.9), percentile(((10, 9), (500, 1)), 0.91)
    (10, 500)
    """
    needed = share * sum(count for _, count in histogram)
    reached = accumulate(count for _, count in histogram)
    return next(length for (length, _), n in zip(histogram, reached, strict=True) if n >= needed - 1e-9)


def clipped(histogram: Histogram, max_length: int | None) -> Histogram:
    """Lengths after truncation.

    >>> clipped(((10, 3), (20, 2), (30, 1)), 15)
    ((10, 3), (15, 3))
    """
    if max_length is None:
        return histogram
    short = tuple(row for row in histogram if row[0] < max_length)
    cut = sum(count for length, count in histogram if length >= max_length)
    return (*short, (max_length, cut)) if cut else short


def expected_longest(histogram: Histogram, batch: int) -> float:
    """Mean length of the longest of `batch` examples drawn without replacement.

        sum_l l * (C(n_l, b) - C(n_{l-1}, b)) / C(n, b)        [tokens]

    n_l: examples no longer than l. It does not depend on the order of the file, as a shuffled epoch
    does not. With fewer examples than `batch`, all of them are one batch.

    >>> expected_longest(((1, 1), (3, 1)), batch=1), expected_longest(((1, 1), (3, 1)), batch=2)
    (2.0, 3.0)
    """
    examples = sum(count for _, count in histogram)
    batch = min(batch, examples)
    longest = seen = 0.0
    below = 0.0
    for length, count in histogram:
        seen += count
        within = 1.0  # chance that a batch has nothing longer than this
        for drawn in range(batch):
            within *= max(seen - drawn, 0) / (examples - drawn)
        longest += length * (within - below)
        below = within
    return longest


def packed_rows(histogram: Histogram, capacity: int) -> int:
    """Rows of `capacity` tokens that hold all examples, by best-fit decreasing.

    Longest first, each into the fullest row that still has room. Equal lengths go together, so that
    millions of examples cost no more than their distinct lengths.
    Source: what TRL calls packing_strategy="bfd"; Johnson 1973, near-optimal bin packing.

    >>> packed_rows(((3, 2), (5, 2)), 8), packed_rows(((3, 1), (5, 2)), 8)
    (2, 2)
    """
    rows = 0
    room: Counter[int] = Counter()  # free tokens -> rows with that much room
    sizes: list[int] = []  # its keys, ascending
    for length, left in reversed(clipped(histogram, capacity)):
        while left:
            at = bisect_left(sizes, length)
            if at == len(sizes):
                rows += (new := -(-left // (capacity // length)))
                room[capacity] += new
                sizes.append(capacity)
            size = sizes[at]
            # row after row: once touched, a row is the fullest that fits until it is full
            each, available = size // length, room[size]
            whole, rest = (available, 0) if left >= available * each else divmod(left, each)
            left -= whole * each + rest
            room[size] -= whole + (rest > 0)
            if not room[size]:
                del sizes[at]
            for free, n in ((size - each * length, whole), (size - rest * length, int(rest > 0))):
                if n and free:
                    if not room[free]:
                        insort(sizes, free)
                    room[free] += n
    return rows


def kept_tokens(spans: Iterable[tuple[float, bool]], max_length: int) -> int:
    """Trained tokens among the first `max_length`.        [tokens]

    >>> kept_tokens([(10, False), (20, True), (5, False), (20, True)], 40)
    25
    """
    kept = at = 0.0
    for n, trained in spans:
        if trained:
            kept += max(0.0, min(at + n, max_length) - at)
        at += n
    return int(kept)
