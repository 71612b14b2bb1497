"""Byte ranges of a Hub commit's files: streamed, asked for again where an answer breaks off."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ctconvert.errors import ConversionError
from ctconvert.store.answers import first_line, hub_failures
from ctconvert.version import __version__

LOG = logging.getLogger("ctconvert")
#: How often a range is asked for, at most.
TRIES = 5
#: Seconds before it is asked for again, doubled each time.
PAUSE = 0.5
#: Answers that may be others in a moment.
_PASSING = (408, 429, 500, 502, 503, 504)
#: The longest wait that an answer may ask for, in seconds: the Hub counts requests by five minutes.
_LONGEST = 300
#: Seconds of a wait from which on there is a line about it.
_LONG = 5
#: Seconds until requests are counted anew (``draft-ietf-httpapi-ratelimit-headers``).
_RESET = re.compile(r";\s*t=([0-9]{1,9})")


class Remote:
    """The files of a commit.

    Args:
        repo: ``org/name``.
        commit: the commit's hash.
        where: what a message calls it.
    """

    def __init__(self, repo: str, commit: str, where: str) -> None:
        self.repo = repo
        self.commit = commit
        self.where = where
        #: Set, ends every stream soon.
        self.stop = threading.Event()

    def stream(self, name: str, offset: int, length: int) -> Iterator[bytes]:
        """A range of a file, in pieces of any size.

        It is asked for at most :data:`TRIES` times, from where it broke off, and not again when
        nothing came for about twice the time that huggingface_hub waits for an answer. Where the
        Hub limits requests, it is asked again when they are counted anew.

        Raises:
            UsageError: the Hub refuses it.
            ConversionError: the Hub does not give it.
        """
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError, HTTPError

        patience = 2 * constants.HF_HUB_DOWNLOAD_TIMEOUT
        done, tries, last = 0, 0, time.monotonic()
        while done < length:
            if self.stop.is_set():
                raise ConversionError(f"{self.where}/{name}: stopped")
            try:
                for data in self._asked(name, offset + done, length - done):
                    if self.stop.is_set():
                        raise ConversionError(f"{self.where}/{name}: stopped")
                    yield data
                    done += len(data)
                    last = time.monotonic()
            except (HTTPError, OSError) as error:
                tries += 1
                wait = PAUSE * 2 ** (tries - 1)
                if isinstance(error, HfHubHTTPError):
                    if error.response.status_code not in _PASSING:
                        with hub_failures(self.where, path=False):
                            raise
                    wait = max(wait, _asked_for(error.response))
                    last = time.monotonic() + wait  # it answers
                if tries == TRIES or time.monotonic() + wait - last > patience:
                    raise ConversionError(
                        f"{self.where}/{name}: the Hub gave: {first_line(error)}; run again, a "
                        "repack with --resume",
                        file=f"{self.where}/{name}",
                    ) from None
                if wait >= _LONG:
                    LOG.info("%s: the Hub asks to wait %.0f s", self.where, wait)
                self.stop.wait(wait)

    def _asked(self, name: str, offset: int, length: int) -> Iterator[bytes]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        url = hf_hub_url(self.repo, name, revision=self.commit)
        headers = build_hf_headers(library_name="ctconvert", library_version=__version__)
        headers |= {
            "Range": f"bytes={offset}-{offset + length - 1}",
            "Accept-Encoding": "identity",  # a range of the file, not of something packed
        }
        with _answer(url, headers, constants.HF_HUB_DOWNLOAD_TIMEOUT) as (response, body):
            hf_raise_for_status(response)
            given = response.headers.get("Content-Range", "")
            if response.status_code != 206 or not given.startswith(f"bytes {offset}-"):
                raise ConversionError(
                    f"{self.where}/{name}: the Hub does not give ranges of it; use --local-copy",
                    file=f"{self.where}/{name}",
                )
            left = length
            for data in body:
                yield data[:left]
                left -= len(data)
                if left <= 0:
                    return
            if left:
                raise OSError(f"{left} bytes less than were asked for")


@contextmanager
def _answer(
    url: str, headers: dict[str, str], timeout: float
) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """A response and its body, by huggingface_hub's HTTP library: httpx, below 1.0 requests."""
    from huggingface_hub.utils import get_session

    client: Any = get_session()
    if callable(client.stream):
        request = {"headers": headers, "timeout": timeout, "follow_redirects": True}
        with client.stream("GET", url, **request) as response:
            yield response, response.iter_raw()
    else:
        with client.get(url, headers=headers, timeout=timeout, stream=True) as response:
            yield response, response.iter_content(1 << 16)


def _asked_for(response: Any) -> float:
    """Seconds that an answer asks to wait."""
    text = response.headers.get("Retry-After", "")
    reset = _RESET.search(response.headers.get("RateLimit", ""))
    if response.status_code == 429 and reset is not None:
        text = reset[1]
    return min(int(text) + 1, _LONGEST) if text.isdecimal() else 0
