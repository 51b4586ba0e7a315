"""Stands in for tqdm where that is not installed: no bar is drawn."""

import contextlib
from collections.abc import Iterator
from typing import Any


class Progress(contextlib.nullcontext):
    def __init__(self, steps: list, **options: Any) -> None:
        super().__init__(self)
        self.steps = steps

    def __iter__(self) -> Iterator[Any]:
        return iter(self.steps)

    def set_description(self, text: str) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass

    @staticmethod
    def write(text: str) -> None:
        print(text)
