"""The one exception that users see: bad input or a refused step, in one line that names the place and the way out."""

import difflib
from collections.abc import Iterable


class SmeltError(Exception):
    """A fault in what the user gave (recipe, model, artefact, prompt) or a step that a contract refuses.

    The command line prints the message alone and exits with code 2; everything else is a bug in smelt.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint ` (did you mean 'x'?)`, or an empty string when nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""
