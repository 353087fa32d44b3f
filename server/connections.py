"""Close the connections of clients that keep the server waiting, so that others are answered."""

import asyncio
import errno
import functools
import logging
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 30.0  # seconds to send the whole head of a request, or to take 48 KiB of an answer
MOST_FILES = 10240  # open at once: macOS allows no more


class Connection(H11Protocol):
    """uvicorn's connection, closed if its client is too slow, or keeps too many others out."""

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self.writing: asyncio.TimerHandle | None = None
        self.expect_request()
        if self.limit_concurrency and len(self.connections) >= self.limit_concurrency:
            self.make_room(self.limit_concurrency)

    def make_room(self, limit: int) -> None:
        others, waiting = 0, []
        for each in self.connections:
            if each is not self and not each.transport.is_closing():
                others += 1
                if isinstance(each, Connection) and each.is_waiting():
                    waiting.append(each)
        if waiting and others + 1 >= limit:
            min(waiting, key=lambda each: each.deadline.when()).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.deadline.cancel()
        self.resume_writing()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.deadline.cancel()
        self.expect_request()
        super().on_response_complete()

    def expect_request(self) -> None:
        self.deadline = self.loop.call_later(PATIENCE, self.end_waiting)

    def is_waiting(self) -> bool:
        """Tell whether no request is under way: the head of the next one has not come whole."""
        return self.cycle is None or self.cycle.response_complete

    def end_waiting(self) -> None:
        if self.is_waiting():
            self.transport.abort()

    def pause_writing(self) -> None:
        self.writing = self.loop.call_later(PATIENCE, self.transport.abort)
        super().pause_writing()

    def resume_writing(self) -> None:
        if self.writing is not None:
            self.writing.cancel()
            self.writing = None
        super().resume_writing()


def open_files_limit() -> int:
    """Raise the number of files that this process may open as far as it may; return it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MOST_FILES
    if most != resource.RLIM_INFINITY:
        limit = min(most, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    return limit


def report(loop: asyncio.AbstractEventLoop, context: dict) -> None:
    """Handle an error of the event loop; say only once that no connection can be accepted."""
    error = context.get("exception")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        _warn_once("too many files are open: new connections wait; raise `ulimit -n`")
    else:
        loop.default_exception_handler(context)


@functools.cache
def _warn_once(sentence: str) -> None:
    logging.warning(sentence)
