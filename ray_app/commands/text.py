"""Text of strangers on a terminal: on one line, harmless, and no wider than there is room."""

from rich.cells import cell_len, set_cell_size

__all__ = ["cut", "cut_start", "printable"]


def printable(text: str) -> str:
    """Text on one line, without characters that a terminal would obey."""
    return "".join(char if char.isprintable() else " " for char in " ".join(text.split()))


def cut(text: str, width: int) -> str:
    """The beginning of a text that is wider than `width` columns, else all of it."""
    return text if cell_len(text) <= width else set_cell_size(text, width - 1).rstrip() + "…"


def cut_start(text: str, width: int) -> str:
    """The end of a text that is wider than `width` columns, else all of it."""
    return cut(text[::-1], width)[::-1]
