"""Real text without a download: the standard library's docstrings, cut into pieces and pairs as ALBERT has them.

A document is the docstrings of one module, in their order, or one file of a folder. ALBERT is Lan et al. 2020 (arXiv
1909.11942), BERT Devlin et al. 2019 (arXiv 1810.04805).
"""

import ast
import hashlib
import json
import pathlib
import random
import re
import string
import sysconfig
import zlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

PAD, UNKNOWN, CLS, SEP, MASK = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROOM = 3  # of the positions are for CLS and two SEP
HELD_OUT = 8  # one document of so many is held out

MASKED = 0.15
NGRAMS = (1, 2, 3)
NGRAM_WEIGHTS = (6, 3, 2)  # p(n) is proportional to 1 / n (ALBERT, section 4.1)

Pieces = list[int]
Pair = tuple[Pieces, Pieces]


def docstrings() -> Iterator[tuple[str, str]]:
    """Name and docstrings of each module of the running Python's standard library, tests and packages left out."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(name.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # what lib2to3 is tested with
            continue
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
        yield str(name), "\n\n".join(found)


def text_files(folder: pathlib.Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.rglob("*")):
        if path.suffix in {".txt", ".md", ".rst"}:
            yield str(path.relative_to(folder)), path.read_text(encoding="utf-8", errors="replace")


def sentences(text: str) -> list[str]:
    """Ended by a full stop or an empty line; what has no letters in it is none."""
    parts = re.split(r"(?<=[.!?])\s+|\n\s*\n", text)
    return [part for part in parts if re.search("[a-zA-Z]", part)]


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    """WordPiece on lower-cased ASCII; the same texts give the same numbers to the same pieces.

    The trainer meets words in an order that is another one in each process, and numbers the letters behind "##" as it
    meets them. It does not where they have their numbers already, as its "special tokens".
    """
    tokenizer = Tokenizer(WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    letters = string.ascii_lowercase + string.digits  # nothing else stands inside a word
    alphabet = list(letters + string.punctuation)
    trainer = WordPieceTrainer(
        vocab_size=vocabulary,
        special_tokens=[*SPECIAL, *(f"##{letter}" for letter in letters)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return load_tokenizer(tokenizer.get_vocab())


def load_tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """To which "##a" and "[MASK]" in a text are as any other letters."""
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    return tokenizer


def pairs(document: list[Pieces], room: int) -> Iterator[Pair]:
    """Consecutive sentences, as many as there is room for, in two halves; a single sentence has no order and is left.

    Both halves are whole sentences: where a text is cut in the middle of one, the cut would give away the order.
    """
    chunk: list[Pieces] = []
    for sentence in [*document, None]:
        if sentence is None or sum(map(len, chunk)) + min(len(sentence), room // 2) > room:
            if len(chunk) > 1:
                yield halves(chunk)
            chunk = []
        if sentence is not None:
            chunk.append(sentence[: room // 2])


def halves(chunk: list[Pieces]) -> Pair:
    """Parted between two sentences, as near to the middle as can be."""
    total = sum(map(len, chunk))
    middle = min(range(1, len(chunk)), key=lambda cut: abs(2 * sum(map(len, chunk[:cut])) - total))
    return list(chain(*chunk[:middle])), list(chain(*chunk[middle:]))


def prepare(folder: pathlib.Path | None, vocabulary: int, positions: int) -> dict[str, Any]:
    """Vocabulary and pairs of the standard library's docstrings, or of a folder's text files; for a JSON file."""
    documents = dict(docstrings() if folder is None else text_files(folder))
    held_out = {name for name in documents if zlib.crc32(name.encode()) % HELD_OUT == 0}
    tokenizer = train_tokenizer([text for name, text in documents.items() if name not in held_out], vocabulary)
    data: dict[str, Any] = {"vocabulary": tokenizer.get_vocab(), "train": [], "held_out": []}
    for name, text in documents.items():
        encoded = [sentence.ids for sentence in tokenizer.encode_batch(sentences(text))]
        data["held_out" if name in held_out else "train"].extend(pairs(encoded, positions - ROOM))
    return data


def fingerprint(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def choose_ngrams(places: list[int], budget: int, rng: random.Random) -> list[list[int]]:
    """Runs of one to three neighbours, ``budget`` of the places in all or a few less, each at most once.

    A run for which there is no room is cut short from behind.
    """
    chosen: list[list[int]] = []
    taken: set[int] = set()
    for start in rng.sample(range(len(places)), len(places)):
        (length,) = rng.choices(NGRAMS, NGRAM_WEIGHTS)
        ngram = places[start : start + length]
        while ngram and (len(ngram) > budget or taken.intersection(ngram)):
            ngram.pop()
        if ngram:
            chosen.append(ngram)
            taken.update(ngram)
            budget -= len(ngram)
    return chosen


def corrupted(piece: int, mask: int, count: int, rng: random.Random) -> int:
    """What stands in the place of a piece that is to be predicted: 80 % MASK, 10 % any piece, 10 % itself (BERT)."""
    draw = rng.random()
    if draw < 0.8:
        return mask
    return rng.randrange(len(SPECIAL), count) if draw < 0.9 else piece
