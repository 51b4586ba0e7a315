"""What paper_claims.py trains: the variants of the paper's ablations, a trial for each task, and the runs on disk."""

import json
import pathlib
from typing import Any, NamedTuple

import torch
from claims_corpus import fingerprint, prepare
from claims_digits import DigitsTask
from claims_text import TextTask
from claims_training import Record, train

FFN_SIZE = 96
MODEL = {"hidden_size": 48, "ffn_size": FFN_SIZE, "num_layers": 4, "num_heads": 3}


class Variant(NamedTuple):
    """A network of the grid, by what it has instead of WideNet's defaults: 4 experts, top-2, capacity factor 1.2."""

    label: str
    changes: dict[str, Any]


VARIANTS = {
    "widenet": Variant("WideNet", {}),
    "shared-norms": Variant("shared LayerNorms", {"share_norms": True}),
    "dense": Variant("dense FFN", {"dense": True}),
    "dense-shared-norms": Variant("dense FFN, shared LayerNorms (ALBERT)", {"dense": True, "share_norms": True}),
    "dense-wide": Variant("dense FFN, twice as wide", {"dense": True, "dense_ffn_size": 2 * FFN_SIZE}),
    "unshared-moe": Variant("nothing shared, experts in half (ViT-MoE)", {"share_blocks": False, "moe_layers": 2}),
    "unshared-dense": Variant("nothing shared, dense (ViT, BERT)", {"share_blocks": False, "dense": True}),
    "experts-8": Variant("8 experts", {"num_experts": 8}),
    "experts-16": Variant("16 experts", {"num_experts": 16}),
    "groups-2": Variant("2 routing groups", {"routing_groups": 2}),
    "groups-1": Variant("1 routing group", {"routing_groups": 1}),
    "top-1": Variant("top-1", {"k": 1}),
    "capacity-1.0": Variant("capacity factor 1.0", {"capacity_factor": 1.0}),
    "capacity-2.0": Variant("capacity factor 2.0", {"capacity_factor": 2.0}),
    "dropless": Variant("dropless", {"capacity_factor": None}),
}


class Trial(NamedTuple):
    """What is trained on a task: the variants, as often as there are seeds, and the sizes and the recipe of all."""

    variants: tuple[str, ...]
    seeds: int
    model: dict[str, Any]
    recipe: dict[str, Any]


Form = dict[str, Trial]  # of each task

FULL: Form = {
    "digits": Trial(
        variants=tuple(VARIANTS),
        seeds=3,
        model=MODEL,
        recipe={"steps": 500, "batch": 32, "learning_rate": 6e-3, "evaluations": 4, "held_out_batches": 45},
    ),
    "text": Trial(  # a run takes ten times as long
        variants=(
            *("widenet", "shared-norms", "dense", "dense-shared-norms", "unshared-dense"),
            *("experts-8", "experts-16", "top-1", "groups-1", "capacity-1.0"),
        ),
        seeds=3,
        model={**MODEL, "embedding_size": 48, "dropout": 0.0, "attention_dropout": 0.0},
        recipe={
            "steps": 2000,
            "batch": 48,
            "learning_rate": 4e-3,
            "evaluations": 4,
            "held_out_batches": 20,
            "vocabulary": 250,
            "positions": 48,
        },
    ),
}


def shortened(trial: Trial) -> Trial:
    """What shows in seconds that all of it works."""
    variants = ("widenet", "shared-norms", "dense", "unshared-dense")
    recipe = {**trial.recipe, "steps": 6, "evaluations": 2, "held_out_batches": 2}
    return trial._replace(variants=variants, seeds=1, recipe=recipe)


SHORT: Form = {task: shortened(trial) for task, trial in FULL.items()}


class Run(NamedTuple):
    """What decides every number of a run: its task with sizes and recipe, its variant and its seed."""

    folder: pathlib.Path
    settings: Record

    @property
    def path(self) -> pathlib.Path:
        name = "{task}-{variant}-{seed}.json".format(**self.settings)
        return self.folder / "runs" / name

    def result(self) -> Record | None:
        """What it left, if it is finished. Raises ValueError if other settings than these left it."""
        if not self.path.exists():
            return None
        result = json.loads(self.path.read_text())
        check_settings(self.path, result["settings"], self.settings)
        return result

    def task(self) -> DigitsTask | TextTask:
        if self.settings["task"] == "digits":
            return DigitsTask(self.settings)
        return TextTask(self.settings, json.loads(corpus_path(self.folder).read_text())["data"])

    def execute(self) -> None:
        torch.set_num_threads(1)  # a second thread makes networks so small no faster; a second run takes the other core
        result = train(self.task(), self.settings["changes"], self.settings["seed"], self.settings["recipe"])
        write(self.path, {"settings": self.settings, **result})


def check_settings(path: pathlib.Path, there: Record, wanted: Record) -> None:
    for name, value in wanted.items():
        if there.get(name) != value:
            raise ValueError(
                f"{path} has {name} = {there.get(name)}, this command {value}: take another folder (--out)"
            )


def write(path: pathlib.Path, content: Record) -> None:
    """All or nothing: whoever is interrupted while writing leaves no half of a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def corpus_path(folder: pathlib.Path) -> pathlib.Path:
    return folder / "corpus.json"


def corpus(folder: pathlib.Path, source: pathlib.Path | None, recipe: Record) -> Record:
    """The text in pieces, made once for all runs. Raises ValueError for too little, and for one made otherwise."""
    path = corpus_path(folder)
    settings = {"source": source and str(source), "vocabulary": recipe["vocabulary"], "positions": recipe["positions"]}
    if path.exists():
        there = json.loads(path.read_text())
        check_settings(path, there["settings"], settings)
        return there["data"]
    data = prepare(source, recipe["vocabulary"], recipe["positions"])
    counts, least = (len(data["train"]), len(data["held_out"])), recipe["batch"]
    if min(counts) < least:
        raise ValueError(
            f"corpus: expected {least} pairs of sentences, a batch, or more to learn from and as many held out, "
            f"got {counts[0]} and {counts[1]}"
        )
    write(path, {"settings": settings, "data": data})
    return data


def grid(
    folder: pathlib.Path,
    form: Form,
    tasks: list[str],
    variants: list[str] | None = None,
    seeds: int | None = None,
    source: pathlib.Path | None = None,
) -> list[Run]:
    """Every variant with one seed before any with the next: what an interruption leaves can be compared.

    ``variants`` and ``seeds`` take the place of the form's.
    """
    data = {task: None for task in tasks}
    if "text" in tasks:
        data["text"] = fingerprint(corpus(folder, source, form["text"].recipe))
    chosen = {task: form[task].seeds if seeds is None else seeds for task in tasks}
    return [
        Run(
            folder,
            {
                "task": task,
                "variant": variant,
                "seed": seed,
                "changes": VARIANTS[variant].changes,
                "data": data[task],
                "model": form[task].model,
                "recipe": form[task].recipe,
            },
        )
        for seed in range(max(chosen.values()))
        for task in tasks
        if seed < chosen[task]
        for variant in variants or form[task].variants
    ]
