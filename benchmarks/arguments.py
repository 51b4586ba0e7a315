"""Types of the arguments that several commands take: what is wrong is an error of the command line, before any work."""

import math
import os
from argparse import ArgumentTypeError
from pathlib import Path

import torch

DEVICES = ("cpu", "cuda")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def nonnegative(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ArgumentTypeError(f"expected a finite number from 0 on, got {text!r}")
    return value


def device(text: str) -> str:
    """That torch can use; what is none at all is left to the argument's choices."""
    if text == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError("there is no GPU that torch can use")
    return text


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def folder(text: str) -> Path:
    """A folder, which is made."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentTypeError(f"{path} cannot be made: {error.strerror}") from error
    return path


def output(text: str) -> Path:
    """A file that can be written; its folder is made."""
    path = Path(text)
    folder(str(path.parent))
    if path.is_dir():
        raise ArgumentTypeError(f"{path} is a folder, expected a file")
    if not os.access(path.parent, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ArgumentTypeError(f"{path} cannot be written")
    return path
