"""An API process that is one of several: the application, and a client of an engine that another process owns."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker is to serve. `options`: pickled WorkerOptions, opened once the environment is right. `log_levels`:
    of paceline's loggers. `metrics_directory`: where all workers keep what they count."""

    options: bytes
    log_levels: Mapping[str, int]
    metrics_directory: str


def run_worker(spec: WorkerSpec, name: bytes, listener: socket.socket, connection: Connection) -> None:
    """The process's main function."""
    # Ctrl-C and a service manager's SIGTERM reach the whole group: the owner says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.addLevelName(logging.WARNING, "warning")
    for logger, level in spec.log_levels.items():
        logging.getLogger(logger).setLevel(level)
    # prometheus_client looks at it once, when it is imported: so nothing that imports it stands at this file's head.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = spec.metrics_directory
    from paceline.serve.worker_server import serve_as_worker

    failed = serve_as_worker(pickle.loads(spec.options), name, listener, connection)
    sys.exit(1 if failed else 0)
