"""Counter-based hashing in numpy: a random number is a function of what it is for, never of what was drawn before it."""

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix(values: UInt64Array) -> UInt64Array:
    """The finaliser of SplitMix64 (Steele et al. 2014): a bijection of 64-bit words in which every input bit reaches every output bit."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(_MULTIPLIERS[0])
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(_MULTIPLIERS[1])
    return values ^ (values >> np.uint64(31))


def key(*parts: int | str) -> int:
    """One 64-bit key from a few integers and names, e.g. `key(seed, "order", epoch)`. Order and kind of the parts matter."""
    state = _GOLDEN
    for part in parts:
        words = _words(part)
        for word in (len(words), *words):
            state = _mix_int(state + _GOLDEN + _mix_int(word))
    return state


def hash_counters(key: int, counters: npt.NDArray[np.integer]) -> UInt64Array:
    """64 random bits for each counter (any integers, e.g. global sample positions) under one key."""
    words = np.atleast_1d(counters).astype(np.uint64)
    return mix(mix(words * np.uint64(_GOLDEN)) ^ np.uint64(key))


def _words(part: int | str) -> list[int]:
    if isinstance(part, int):
        return [part & _MASK]
    data = part.encode()
    return [int.from_bytes(data[start : start + 8], "little") for start in range(0, len(data), 8)] + [len(data)]


def _mix_int(value: int) -> int:
    return int(mix(np.array([value & _MASK], dtype=np.uint64))[0])
