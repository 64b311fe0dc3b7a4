"""When what happens in warm-up."""

from __future__ import annotations

# Shares of warm-up: before the windows, after them, the first window.
_EARLY, _LAST, _WINDOW = 0.15, 0.1, 0.05
_GATHER = (_EARLY, 0.3, 0.5)  # shares after which chains that are lost are fetched
_FEWEST = 20  # transitions of warm-up, below which nothing can be learnt but a step size (Stan)
_AFTER = 10  # transitions that finding a step size in new coordinates takes at least


def early(num_warmup: int) -> int:
    """The first transitions, in which chains are on their way from where they start."""
    return int(_EARLY * num_warmup)


def windows(num_warmup: int) -> list[int]:
    """Transitions after which a window ends: each window twice as long as the last, the last takes what is left.

    >>> windows(1000)
    [200, 300, 500, 900]
    """
    if num_warmup < _FEWEST:
        return []
    first, last = early(num_warmup), num_warmup - max(_AFTER, int(_LAST * num_warmup))
    length, ends = max(1, int(_WINDOW * num_warmup)), []
    end = first
    while end < last:
        end = end + length
        if end + 2 * length > last:
            end = last
        ends.append(end)
        length *= 2
    return ends


def gatherings(num_warmup: int) -> set[int]:
    """Transitions after which chains that are lost are fetched.

    >>> sorted(gatherings(1000))
    [150, 300, 500]
    """
    return {int(share * num_warmup) for share in _GATHER}
