"""The table of the variants, and what the runs say about each claim of the paper (arXiv 2107.11817)."""

import math
import statistics
from typing import NamedTuple

from claims_grid import VARIANTS
from claims_training import Record
from scipy.stats import t as student

CONFIDENCE = 0.95
NO_NUMBER = "no number"


class Claim(NamedTuple):
    """That a variant does better than another, and what the paper has for it: top-1 in Tables 1, 3 and 4, averages of
    Table 2, Figures 2 to 5."""

    text: str
    better: str
    worse: str
    paper: dict[str, str]  # of each task that it is about
    measures: tuple[str, ...] = ("accuracy", "loss")


CLAIMS = (
    Claim(
        "individual LayerNorms beat shared ones",
        "widenet",
        "shared-norms",
        {"digits": "B 77.5 > 76.3, L 79.5 > 78.3, H 80.1 > 76.6", "text": NO_NUMBER},
    ),
    Claim("and so they do without experts", "dense", "dense-shared-norms", {"digits": NO_NUMBER, "text": NO_NUMBER}),
    Claim(
        "experts beat a dense FFN where blocks share",
        "widenet",
        "dense",
        {"digits": "L 79.5 > 76.9, H 80.1 > 79.0", "text": NO_NUMBER},
    ),
    Claim("and one with as many FLOPs", "widenet", "dense-wide", {"digits": "L 79.5 > 75.8", "text": NO_NUMBER}),
    Claim("WideNet beats ALBERT", "widenet", "dense-shared-norms", {"text": "84.7 > 84.0"}),
    Claim(
        "WideNet beats ViT-MoE, which shares nothing",
        "widenet",
        "unshared-moe",
        {"digits": "L 79.5 > 77.4, but B 77.5 < 77.9", "text": NO_NUMBER},
    ),
    Claim(
        "WideNet beats ViT and BERT, which share nothing",
        "widenet",
        "unshared-dense",
        {"digits": "L 79.5 > 77.5, but B 77.5 < 78.6", "text": "84.7 < 85.0; with 8 experts 85.2 > 85.0"},
    ),
    Claim("on images 16 experts do worse than 4", "widenet", "experts-16", {"digits": "77.8 > 76.6"}),
    Claim(
        "though better in training: they overfit",
        "experts-16",
        "widenet",
        {"digits": "70.2 > 66.8"},
        ("train_accuracy", "train_loss"),
    ),
    Claim("on text 8 experts do better than 4", "experts-8", "widenet", {"text": "85.2 > 84.7"}),
    Claim("on text 16 experts do better than 4", "experts-16", "widenet", {"text": "85.8 > 84.7"}),
    Claim(
        "a routing for each block beats one for each two",
        "widenet",
        "groups-2",
        {"digits": "77.5 > 76.1 (12 against 6 groups)", "text": NO_NUMBER},
    ),
    Claim(
        "and one for all blocks",
        "widenet",
        "groups-1",
        {"digits": "77.5 > 72.0 (12 against 2 groups)", "text": NO_NUMBER},
    ),
    Claim("top-2 beats top-1", "widenet", "top-1", {"digits": NO_NUMBER, "text": NO_NUMBER}),
    Claim("capacity factor 1.2 beats 1.0", "widenet", "capacity-1.0", {"digits": NO_NUMBER, "text": NO_NUMBER}),
    Claim("2.0 beats 1.2", "capacity-2.0", "widenet", {"digits": NO_NUMBER, "text": NO_NUMBER}),
    Claim("to drop nothing beats 1.2", "dropless", "widenet", {"digits": NO_NUMBER, "text": NO_NUMBER}),
    Claim(
        "WideNet's LayerNorms differ more than ViT's",
        "widenet",
        "unshared-dense",
        {"digits": "gamma 3.5e-4 > 2.6e-4, beta 1.9e-4 > 1.0e-4", "text": NO_NUMBER},
        ("gamma", "beta"),
    ),
)


class Verdict(NamedTuple):
    mean: float
    margin: float  # half of the confidence interval
    p: float  # how often a mean is so far from 0, or farther, where nothing is different
    word: str


def judge(differences: list[float]) -> Verdict:
    """Positive differences speak for the claim, one for each seed.

    It shows, or its opposite does, where 0 is outside of Student's confidence interval of the mean difference.
    """
    mean, count = statistics.fmean(differences), len(differences)
    if count == 1:
        return Verdict(mean, math.inf, 1.0, "not decided")
    error = statistics.stdev(differences) / math.sqrt(count)
    margin = float(student.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    p = 2 * float(student.sf(abs(mean) / error, count - 1)) if error else float(mean == 0)
    word = "shows" if mean > margin else "opposite" if mean < -margin else "not decided"
    return Verdict(mean, margin, p, word)


Judged = tuple[Claim, dict[str, Verdict]]  # a verdict for each measure


def joint_bound(verdicts: list[Verdict]) -> float:
    """The largest p of those that hold for all comparisons together, by Holm's step-down procedure (1979).

    Where nothing is different, one or more of them hold in 5 % of all reports, not of all comparisons.
    """
    bound = 0.0
    for rank, p in enumerate(sorted(verdict.p for verdict in verdicts)):
        if p > (1 - CONFIDENCE) / (len(verdicts) - rank):
            break
        bound = p
    return bound


def measured(result: Record, name: str) -> float:
    """A number of a run's end; the divergence of its LayerNorms is the mean over depths."""
    if name in ("gamma", "beta"):
        return statistics.fmean(result["divergence"][name])
    return result["history"][-1][name]


def by_seed(results: list[Record], task: str, variant: str, name: str) -> dict[int, float]:
    return {
        result["settings"]["seed"]: measured(result, name)
        for result in results
        if (result["settings"]["task"], result["settings"]["variant"]) == (task, variant)
    }


def judge_claim(results: list[Record], task: str, claim: Claim, name: str) -> Verdict | None:
    """None where a variant of the claim was not run."""
    better, worse = (by_seed(results, task, variant, name) for variant in (claim.better, claim.worse))
    sign = -1 if name.endswith("loss") else 1
    differences = [sign * (better[seed] - worse[seed]) for seed in better.keys() & worse.keys()]
    return judge(differences) if differences else None


def number(name: str, value: float, margin: float | None = None, sign: str = "") -> str:
    """A measure in its unit: accuracies in per cent, divergences in 1e-3, losses as they are."""
    scale, digits = (100, 1) if name.endswith("accuracy") else (1000, 1) if name in ("gamma", "beta") else (1, 3)
    text = f"{scale * value:{sign}.{digits}f}"
    return text if margin is None or math.isinf(margin) else f"{text} ± {scale * margin:.{digits}f}"


def spread(name: str, values: list[float]) -> str:
    return number(name, statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(results: list[Record], task: str) -> str:
    """A line for each variant."""
    names = ["accuracy", "loss", "train_accuracy", "train_loss"]
    heads = ["variant", "parameters", "accuracy, %", "loss", "in training, %", "loss"]
    if task == "text":
        names.append("order_accuracy")
        heads.append("order, % (chance 50)")
    rows = []
    for variant, (label, _) in VARIANTS.items():
        runs = [run for run in results if (run["settings"]["task"], run["settings"]["variant"]) == (task, variant)]
        if not runs:
            continue
        dropped = [statistics.fmean(run["dropped"]) for run in runs if run["dropped"] is not None]
        rows.append(
            [label, f"{runs[0]['parameters']:,}"]
            + [spread(name, [measured(run, name) for run in runs]) for name in names]
            + [f"{statistics.fmean(dropped):.1%}" if dropped else "-"]
            + [f"{statistics.fmean(run['seconds'] for run in runs):.0f}"]
        )
    return markdown([*heads, "dropped", "s/run"], rows)


def in_common(settings: Record) -> str:
    """The sizes and the recipe of all runs of a task."""
    given = {**settings["model"], **settings["recipe"]}
    return RECIPE + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items()) + "."


def summed_up(verdicts: dict[str, Verdict]) -> str:
    """One word where all measures agree, else each measure's."""
    words = {verdict.word for verdict in verdicts.values()}
    return words.pop() if len(words) == 1 else ", ".join(f"{name} {verdict.word}" for name, verdict in verdicts.items())


def judge_all(results: list[Record], task: str) -> list[Judged]:
    """The claims about this task whose variants were run."""
    judged = []
    for claim in CLAIMS:
        verdicts = {name: judge_claim(results, task, claim, name) for name in claim.measures if task in claim.paper}
        found = {name: verdict for name, verdict in verdicts.items() if verdict is not None}
        if found:
            judged.append((claim, found))
    return judged


def claims_table(judged: list[Judged], task: str, bound: float) -> str:
    """What is said of each claim; bold: with a p up to ``bound``."""
    rows = []
    for claim, verdicts in judged:
        cells = [claim.text, f"{VARIANTS[claim.better].label} vs {VARIANTS[claim.worse].label}", claim.paper[task]]
        for name, verdict in verdicts.items():
            word = f"**{verdict.word}**" if verdict.p <= bound else verdict.word
            said = number(name, verdict.mean, verdict.margin, "+")
            cells.append(f"{name.removeprefix('train_')} {said}: {word}")
        rows.append(cells)
    return markdown(["claim", "compared", "paper", "here", "here"], rows)


def sorted_claims(judged: list[Judged]) -> str:
    """Which claims each verdict holds for."""
    words: dict[str, list[str]] = {}
    for claim, verdicts in judged:
        words.setdefault(summed_up(verdicts), []).append(claim.text)
    return "\n".join(f"- {word}: {'; '.join(texts)}" for word, texts in words.items())


def learned_context(results: list[Record], floor: Record) -> str:
    """How many of the networks do better on texts than ``floor``."""
    losses = [measured(result, "loss") for result in results if result["settings"]["task"] == "text"]
    accuracy, loss = (number(name, floor[name]) for name in ("accuracy", "loss"))
    better = sum(one < floor["loss"] for one in losses)
    return CONTEXT.format(accuracy=accuracy, loss=loss, better=better, all=len(losses))


def report(results: list[Record], without_context: Record | None) -> str:
    """Markdown: for each task the variants, the claims, and the claims sorted by what became of them.

    ``without_context``: the score on texts of who looks at no other word; None where no texts were learned.
    """
    tasks = dict.fromkeys(result["settings"]["task"] for result in results)
    judged = {task: judge_all(results, task) for task in tasks}
    everything = [verdict for claims in judged.values() for _, verdicts in claims for verdict in verdicts.values()]
    bound = joint_bound(everything)
    parts = []
    for task, claims in judged.items():
        settings = [result["settings"] for result in results if result["settings"]["task"] == task]
        seeds = len({one["seed"] for one in settings})
        parts += [f"## {task}, {seeds} seed{'s' if seeds > 1 else ''}", in_common(settings[0])]
        parts += [table(results, task), SPREAD]
        if task == "text" and without_context is not None:
            parts.append(learned_context(results, without_context))
        if claims:
            parts += [claims_table(claims, task, bound), sorted_claims(claims)]
    if everything:
        parts += ["## How it is judged", RULE.format(count=len(everything), chance=(1 - CONFIDENCE) * len(everything))]
    return "\n\n".join(parts) + "\n"


RECIPE = "All with one recipe, AdamW with a warm-up and a cosine, and what else their names do not say: "
SPREAD = (
    "Mean ± standard deviation over the seeds, at the end of the training; in training: on the batches of its last "
    "quarter, as the network gets them; dropped: of the choices on held-out data, those that found their expert full."
)
CONTEXT = (
    "Who looks at no other piece than the one asked for, which in one case of ten stands there as it is, can have an "
    "accuracy of {accuracy} % and a loss of {loss}. {better} of {all} networks have a lower loss. Where one has no "
    "lower loss, nothing shows that it learned how pieces go together, and its difference from another says nothing of "
    "what such learning takes."
)
RULE = (
    "Differences are in favour of the claim where positive; accuracy in points, gamma and beta in 1e-3. They are "
    f"paired by seed: mean ± half of the {CONFIDENCE:.0%} confidence interval (Student's t). A claim shows, or its "
    "opposite does, where 0 is outside of it. By chance alone that would be so for {chance:.0f} of the {count} "
    "comparisons of this report; what holds for all of them together (Holm's correction, 5 %) is bold. A seed decides "
    "the initial values, the batches and what is drawn in training; the data is the same for all, so nothing is said "
    "of how another corpus or other images would decide."
)
