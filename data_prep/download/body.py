"""Reading a response's body: never more than allowed, judged by its first bytes, decoded where somebody compressed it."""

import asyncio
import io
import zlib
from collections.abc import Callable

import aiohttp

from data_prep.download.budget import ByteBudget, Claim
from data_prep.download.deadline import Deadline
from data_prep.download.retry import Failed
from data_prep.reasons import Drop

DRAIN_BYTES = 64 * 2**10
"""A connection whose response has at most this left is read to the end and kept; opening another costs more."""

DRAIN_S = 1.0
"""For no longer than this."""

_STEP_BYTES = 256 * 2**10

Judge = Callable[[bytes, int | None], None]
"""Takes the first bytes of a file and its whole size, if that is known; raises `Drop` if the rest is not wanted."""


class BodyReader:
    """Reads one kind of body: images, or robots.txt.

    Args:
        max_bytes: a larger body is refused, as soon as that is known.
        header_bytes: after so many the judge is asked.
        cuts: read `max_bytes` of a larger body in place of refusing it.
    """

    def __init__(self, budget: ByteBudget, *, max_bytes: int, header_bytes: int, judge: Judge, cuts: bool = False) -> None:
        self._budget = budget
        self._max_bytes = max_bytes
        self._header_bytes = header_bytes
        self._judge = judge
        self._cuts = cuts

    async def read(self, response: aiohttp.ClientResponse, claim: Claim, deadline: Deadline) -> bytes:
        """The whole decoded body.

        Raises:
            Failed: it is too large, not wanted, or compressed in a way that was not asked for. The connection is cleaned up.
            aiohttp.ClientError: it broke off.
        """
        decode = decoder_of(response)
        size = announced(response) if decode is None else None
        if size is not None:
            if size > self._max_bytes and not self._cuts:
                raise Failed("file_too_large", f"{size} bytes announced", status=response.status)
            if size > claim.held:
                await self._budget.grow(claim, min(size, self._max_bytes), deadline)
        content = response.content
        first, more = b"", None
        received = 0
        is_judged = False
        while True:
            chunk = await content.readany()
            if not chunk:
                break
            deadline.num_bytes += len(chunk)
            for piece in (chunk,) if decode is None else decode(chunk):
                received += len(piece)
                if received > self._max_bytes and not self._cuts:
                    raise Failed("file_too_large", f"more than {self._max_bytes} bytes", status=response.status)
                if received > claim.held and not claim.in_lane:
                    await self._budget.grow(claim, min(2 * received, self._max_bytes), deadline)
                if not first:
                    first = piece
                    continue
                if more is None:
                    more = io.BytesIO()
                    more.write(first)
                more.write(piece)
            if not is_judged and received >= self._header_bytes:
                is_judged = True
                self._ask_judge(first if len(first) >= self._header_bytes or more is None else more.getvalue(), size, response.status)
            if content.at_eof():
                break
            if self._cuts and received >= self._max_bytes:
                response.close()
                return (first if more is None else more.getvalue())[: self._max_bytes]
        if decode is not None and not decode.is_complete:
            raise Failed("wrong_length", "the compressed body ends too early", status=response.status)
        data = first if more is None else more.getvalue()  # shares the buffer: no second copy of a large body
        if not is_judged:
            self._ask_judge(data, len(data), response.status)
        return data

    def _ask_judge(self, data: bytes, size: int | None, status: int) -> None:
        try:
            self._judge(data[: self._header_bytes], size)
        except Drop as drop:
            raise Failed(drop.reason, drop.detail, status=status, is_final=True) from None


class Decoder:
    """Undoes gzip or deflate, which we did not ask for, a piece at a time, so that a bomb meets the size limit early."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either header

    @property
    def is_complete(self) -> bool:
        """Whether the end mark was seen."""
        return self._stream.eof

    def __call__(self, chunk: bytes) -> "_Pieces":
        return _Pieces(self._stream, chunk)


class _Pieces:
    """Iterates over the decoded pieces of one chunk, none larger than `_STEP_BYTES`."""

    def __init__(self, stream: "zlib._Decompress", chunk: bytes) -> None:
        self._stream = stream
        self._rest = chunk

    def __iter__(self) -> "_Pieces":
        return self

    def __next__(self) -> bytes:
        while self._rest and not self._stream.eof:
            try:
                piece = self._stream.decompress(self._rest, _STEP_BYTES)
            except zlib.error as error:
                raise Failed("protocol", f"content-encoding: {error}") from None
            self._rest = self._stream.unconsumed_tail
            if piece:
                return piece
        raise StopIteration


def decoder_of(response: aiohttp.ClientResponse) -> Decoder | None:
    """What undoes the response's Content-Encoding; None if there is nothing to undo.

    Raises:
        Failed: `protocol`, for an encoding that we do not know and did not ask for.
    """
    encoding = response.headers.get("Content-Encoding", "").strip().lower()
    if encoding in ("", "identity", "none"):
        return None
    if encoding in ("gzip", "x-gzip", "deflate"):
        return Decoder()
    raise Failed("protocol", f"content-encoding {encoding} was not asked for", status=response.status)


def announced(response: aiohttp.ClientResponse) -> int | None:
    """The length of the body as the server announced it, in bytes as they come over the network."""
    return None if "Transfer-Encoding" in response.headers else response.content_length


async def discard(response: aiohttp.ClientResponse, deadline: Deadline) -> None:
    """Gets rid of what is left of a response: reads it if that is little, so that the connection can be used again, or closes it."""
    size = announced(response)
    if size is None or size - response.content.total_bytes <= DRAIN_BYTES:
        read = 0
        giving_up = asyncio.get_running_loop().call_later(DRAIN_S, response.close)
        try:
            while read <= DRAIN_BYTES and (chunk := await response.content.readany()):
                read += len(chunk)
                deadline.num_bytes += len(chunk)
        except (aiohttp.ClientError, OSError):
            pass  # then the connection is of no use; the verdict stands
        except asyncio.CancelledError:
            response.close()
            if not deadline.is_over:
                raise
        finally:
            giving_up.cancel()
    response.close()  # changes nothing if it was read to the end
