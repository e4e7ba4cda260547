"""The two forms of a log: text for people, and JSON, an object a line, for programs."""

from __future__ import annotations

import json
import logging
import time
from typing import TextIO

TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonFormatter(logging.Formatter):
    """time (UTC, ISO 8601), level, logger, message, and error where there is a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def handler(stream: TextIO, form: str) -> logging.StreamHandler[TextIO]:
    """``form``: "text" or "json"."""
    made = logging.StreamHandler(stream)
    made.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(TEXT))
    return made
