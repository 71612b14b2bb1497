"""What the Hub answers, and what becomes of a request: one line, in which no token ever stands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ctconvert.errors import CtconvertError, UsageError

#: What may be a secret in somebody else's words: tokens by their form, and what signs a URL.
_SECRETS = re.compile(r"\bhf_\w{6,}|(?<=Bearer )[^\s'\"<]+")
_SIGNATURES = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\"]*")


def redacted(text: str) -> str:
    """A text of the Hub's or of its client's without the user's token and without signatures."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "<token>")
    return _SIGNATURES.sub(r"\1", _SECRETS.sub("<token>", text))


def first_line(error: BaseException) -> str:
    """What an error of huggingface_hub's says first, without secrets."""
    if "Timeout" in type(error).__name__:  # whichever HTTP library this version of it uses
        return "no answer in time"
    lines = [line for line in redacted(str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def hub_failures(model: str, kind: type[CtconvertError] = UsageError) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line.

    Args:
        model: what the user named.
        kind: what is raised; a conversion that is under way does not take the name for a path.
    """
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        HTTPError,  # of whichever HTTP library this version uses
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unknown = "no such directory, and " if kind is UsageError else ""
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
        reason = f"{unknown}the Hub cannot be reached and holds no cached copy"
    except EntryNotFoundError as error:
        reason = f"the Hub has no such file: {first_line(error)}"
    except (HFValidationError, HTTPError, OSError) as error:
        reason = f"{unknown}the Hub gave: {first_line(error)}"
    raise kind(f"{model}: {reason}") from None
