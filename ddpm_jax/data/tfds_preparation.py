"""Download and prepare one set of TensorFlow Datasets: `python -m ddpm_jax.data.tfds_preparation NAME`.

It runs in a process of its own, since it may import TensorFlow. Progress goes to stderr, one line on what failed to stdout.
"""

import contextlib
import logging
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import requests

CONNECT_SECONDS, READ_SECONDS = 10.0, 20.0
RETRIES = 2  # the library's ten, with its pauses, take 200 seconds


def main(name: str) -> None:
    """Prepare a set, or end with status 2 and one line that names what failed."""
    import tensorflow_datasets as tfds

    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    builder = None
    try:
        with contextlib.redirect_stdout(sys.stderr), _bounded_waiting():
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare(download_config=tfds.download.DownloadConfig(try_download_gcs=False))
    except Exception as error:  # whatever a builder's code raises
        by_hand = builder.MANUAL_DOWNLOAD_INSTRUCTIONS if builder else None
        folder = Path(tfds.core.constants.DATA_DIR).expanduser() / "downloads" / "manual"
        print(_reason(error) + (f"; files are to be put by hand into {folder}: {_one_line(by_hand)}" if by_hand else ""))
        sys.exit(2)


@contextlib.contextmanager
def _bounded_waiting() -> Iterator[None]:
    """No connection is waited for without end, as the library would, nor tried more than a few times."""
    from tensorflow_datasets.core.download import downloader

    adapter = requests.adapters.HTTPAdapter
    send = adapter.send

    def send_in_time(self: Any, request: Any, timeout: Any = None, **options: Any) -> Any:
        return send(self, request, timeout=timeout or (CONNECT_SECONDS, READ_SECONDS), **options)

    socket_seconds = socket.getdefaulttimeout()
    socket.setdefaulttimeout(READ_SECONDS)  # for FTP
    try:
        with patch.object(downloader, "MAX_RETRIES", RETRIES), patch.object(adapter, "send", send_in_time):
            yield
    finally:
        socket.setdefaulttimeout(socket_seconds)


def _reason(error: Exception) -> str:
    request = getattr(error, "request", None)
    if isinstance(error, requests.RequestException) and request is not None:
        cause = getattr(error.args[0], "reason", None) if error.args else None
        return f"{request.url} can't be reached ({type(cause or error).__name__})"
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())[:400]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: give the name of a set, such as cifar10")
    main(sys.argv[1])
