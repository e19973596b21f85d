"""Structured logs: JSON lines for machines, coloured lines on a terminal. Never image bytes."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Any, Literal

import structlog

# As data, and without the frames' variables: those hold images and whatever else clients send.
_TRACEBACKS = structlog.processors.ExceptionRenderer(structlog.tracebacks.ExceptionDictTransformer(show_locals=False))


def configure(level: str, style: Literal["auto", "json", "console"]) -> None:
    """Sets up structlog, and sends the standard library's records the same way, to stderr.

    Args:
        level: least level logged ("debug", "info", "warning", "error").
        style: `auto` takes `console` if stderr is a terminal.
    """
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    render: list[structlog.typing.Processor] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if console
        else [_TRACEBACKS, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        # Looked up for each line: whoever replaces sys.stderr gets the log, and no line goes to a closed stream.
        logger_factory=lambda *_: _Unfailing(),
        cache_logger_on_first_use=False,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    handler.addFilter(_is_news)
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)


class _Unfailing:
    """Writes lines to stderr, and loses them where nobody reads it, or its disk is full.

    A line that cannot be written must not end what it tells of: a stop, a load, the rounds of polling.
    """

    def msg(self, line: str) -> None:
        """One line."""
        stream = sys.stderr
        try:
            stream.write(f"{line}\n")
            stream.flush()
        except (OSError, ValueError):  # ValueError: it is closed
            with contextlib.suppress(OSError, ValueError):
                # It stays in the stream's buffer: Python would try it again at the end, fail, and exit with 120.
                number = stream.fileno()
                sys.stderr = os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace", closefd=False)

    debug = info = warning = error = critical = exception = log = msg


def _is_news(record: logging.LogRecord) -> bool:
    """False for grpc.aio's tracebacks of answers that could not be sent, since their client has gone.

    There is one for each such call, without bound and with nothing to act on: the interceptor has counted the call, and
    logged it within its bounds if it failed.
    """
    return not (
        record.name == "grpc._cython.cygrpc" and record.getMessage().startswith("ExecuteBatchError raised in core")
    )


def get(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger that carries the name of its component."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(component=name)
    return logger


def request_context(**values: Any) -> None:
    """Adds fields, such as the request id, to every line logged while this request is handled."""
    structlog.contextvars.bind_contextvars(**values)
