"""What the Hub answers, and what becomes of a request: one line, in which no token ever stands."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctconvert.errors import UsageError
from ctconvert.names import nearest_directory

#: What may be a secret in somebody else's words: tokens by their form, and what signs a URL.
_SECRETS = re.compile(r"\bhf_\w{6,}|(?<=Bearer )[^\s'\"<]+")
_SIGNATURES = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")


def redacted(text: str) -> str:
    """A text of the Hub's or of its client's without the user's token and without signatures."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "<token>")
    return _SIGNATURES.sub(r"\1", _SECRETS.sub("<token>", text))


class _Redacting(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


def redact_logs() -> None:
    """What huggingface_hub logs, servers' own words among it, has no secrets from now on either."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        if not any(isinstance(one, _Redacting) for one in handler.filters):
            handler.addFilter(_Redacting())


def first_line(error: BaseException) -> str:
    """What an error of huggingface_hub's says first, without secrets."""
    if "Timeout" in type(error).__name__:  # whichever HTTP library this version of it uses
        return "no answer in time"
    lines = [line for line in redacted(str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def hub_failures(model: str, path: bool = True) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line.

    Args:
        model: what the user named.
        path: whether that may have been a directory.

    Raises:
        UsageError: in the block was an error.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # of whichever HTTP library this version uses
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unknown = "no such directory, and " if path else ""
    try:
        yield
        return
    except GatedRepoError:
        reason = "the repository is gated: accept its terms and log in with `hf auth login`"
    except RepositoryNotFoundError:
        reason = f"{unknown}no such repository on the Hub (or log in: `hf auth login`)"
    except RevisionNotFoundError:
        reason = f"the repository has no revision {model.partition('@')[2]!r}"
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        reason = f"{unknown}the Hub cannot be reached, and the local cache has no copy"
    except EntryNotFoundError as error:
        reason = f"the Hub has no such file: {first_line(error)}"
    except (HFValidationError, HTTPError, OSError) as error:
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403):
            raise UsageError(
                f"{model}: the Hub does not let this token, or nobody, do that; log in with "
                "`hf auth login`"
            ) from None
        reason = f"{unknown}the Hub gave: {first_line(error)}"
    near = nearest_directory(Path(model)) if path else ""
    raise UsageError(f"{model}: {reason}{near}") from None
