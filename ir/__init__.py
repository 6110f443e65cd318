"""The intermediate representation: Programs, their dialect, encodings, plans, capture and reference meaning."""

from .errors import SmeltError
from .interpret import interpret
from .program import Program, Record
from .weight import Weight

__all__ = ["Program", "Record", "SmeltError", "Weight", "interpret"]
