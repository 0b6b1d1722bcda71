"""What goes into the downloader and what comes out of it."""

from dataclasses import dataclass

from data_prep.reasons import Drop


@dataclass(frozen=True, slots=True)
class Request:
    """One address to fetch; `number` is the caller's own and comes back in the answer."""

    number: int
    url: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request: `data`, or the `drop` that says why there is none. The rest is for statistics."""

    number: int
    data: bytes = b""
    drop: Drop | None = None
    status: int = 0
    """HTTP status of the last response; 0 if there was none."""
    seconds: float = 0.0
    """From the start of the first attempt to the end of the last, with the pauses between."""
    num_attempts: int = 0
    """0 where nothing was asked: a bad address, robots.txt, an open circuit."""
    num_bytes: int = 0
    """Of all bodies, as they came over the network."""
    final_url: str = ""
    """Where the last redirect led."""
