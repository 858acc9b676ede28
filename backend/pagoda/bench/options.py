"""Options that several commands have: what could not work later is refused at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pagoda.errors import ConfigError


def writable(option: typer.CallbackParam, file: Path | None) -> Path | None:
    """An option's callback: a file that could not be written is refused before anything is measured, not after."""
    if file is not None:
        try:
            is_new = not file.exists()
            file.open("ab").close()
            if is_new:
                file.unlink()
        except OSError as error:
            name, remedy = option.opts[0].lstrip("-"), "give a file in a folder of yours"
            raise ConfigError(f"{name} = {str(file)!r} cannot be written: {error.strerror}; {remedy}") from None
    return file


def _sendable(key: str | None) -> str | None:
    """A header carries no other key, so nobody would get in with it. The message does not show a secret."""
    if key is not None and not re.fullmatch("[!-~]([ -~]*[!-~])?", key):
        raise typer.BadParameter("a key is printable ASCII without a space at an end, as an HTTP header carries it")
    return key


ApiKey = Annotated[
    str | None, typer.Option(envvar="PAGODA_API_KEY", callback=_sendable, help="Key the server asks for.")
]
