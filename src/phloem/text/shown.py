"""What in a chat template shows that a model writes a format."""

from __future__ import annotations


class Shown:
    """Texts of which every one stands in the template, and others (`absent`) of which none does."""

    def __init__(self, *texts: str, absent: tuple[str, ...] = ()) -> None:
        self.texts, self.absent = texts, absent

    def stands_in(self, template: str) -> bool:
        return all(text in template for text in self.texts) and not any(text in template for text in self.absent)

    def __str__(self) -> str:
        return " and ".join(map(repr, self.texts))
