import importlib
import itertools
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

for package in ("sklearn", "matplotlib", "tokenizers"):
    pytest.importorskip(package, reason="the example's data, pictures and pieces of words")

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
MODULES = ("paper_claims", "claims_grid", "claims_report", "claims_training", "claims_corpus", "claims_text")
TEXTS = [f"The {name} of a {thing} is returned, unbelievably. It never fails!" for name in "abc" for thing in "xyz"]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return SimpleNamespace(**{name.removeprefix("claims_"): importlib.import_module(name) for name in MODULES})


@pytest.fixture
def text_task(claims):
    """On a corpus of nothing but numbered words of one to three pieces."""
    words = [f"w{number}" for number in range(20)]
    vocabulary = {piece: n for n, piece in enumerate([*claims.corpus.SPECIAL, *words, "##a", "##b"])}
    first, last = vocabulary["##a"], vocabulary["##b"]
    pieces = [piece for word in words for piece in [vocabulary[word], first, last][: 1 + vocabulary[word] % 3]]
    pair = (pieces[:18], pieces[18:34])
    settings = {"model": claims.grid.FULL["text"].model, "recipe": {"batch": 4, "positions": 40}}
    settings["recipe"]["held_out_batches"] = 1
    return claims.text.TextTask(settings, {"vocabulary": vocabulary, "train": [pair] * 4, "held_out": [pair] * 4})


def test_a_sentence_ends_with_a_stop_or_an_empty_line(claims) -> None:
    text = "Return x. See y!\nDoes it?  It\ndoes.\n\n>>> 1\n2\n\n-----\n\nEnd"
    assert claims.corpus.sentences(text) == ["Return x.", "See y!", "Does it?", "It\ndoes.", "End"]


def test_pairs_are_whole_consecutive_sentences(claims) -> None:
    document = [[n] * length for n, length in enumerate([3, 4, 2, 6, 1, 5, 5, 20, 2])]
    made = list(claims.corpus.pairs(document, room=10))
    assert [first + second for first, second in made] == [
        [0] * 3 + [1] * 4 + [2] * 2,
        [3] * 5 + [4] * 1,  # a sentence has half of the room at most
        [5] * 5 + [6] * 5,
        [7] * 5 + [8] * 2,
    ]
    assert made[0] == ([0, 0, 0], [1] * 4 + [2] * 2)  # as near to the middle as a sentence ends; the first of equals
    assert not list(claims.corpus.pairs([[1, 2]], room=10)), "a single sentence has no order"


def test_vocabulary_is_the_same_in_every_process(claims) -> None:
    """The trainer by itself would number the pieces differently in each."""
    here = claims.corpus.train_tokenizer(TEXTS, 120).get_vocab()
    code = "import claims_corpus, json, sys; "
    code += "print(json.dumps(claims_corpus.train_tokenizer(json.loads(sys.argv[1]), 120).get_vocab()))"
    command = [sys.executable, "-c", code, json.dumps(TEXTS)]
    there = subprocess.run(command, cwd=EXAMPLES, capture_output=True, text=True, check=True)
    assert json.loads(there.stdout) == here
    assert [here[piece] for piece in claims.corpus.SPECIAL] == [0, 1, 2, 3, 4]
    encoded = claims.corpus.load_tokenizer(here).encode("Unbelievably [MASK] é")
    assert "".join(encoded.tokens[:-3]).replace("##", "").startswith("unbelievably")
    assert here["[MASK]"] not in encoded.ids, "what stands in a text is text"


def test_standard_library_has_documents_without_its_tests(claims) -> None:
    documents = dict(itertools.islice(claims.corpus.docstrings(), 60))
    assert "Abstract Base Classes (ABCs) according to PEP 3119." in documents["abc.py"]
    assert not any("test" in pathlib.Path(name).parts for name in documents)


def test_folder_of_texts_is_split_by_file(claims, tmp_path: pathlib.Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"The file {number} says so. It says {number} again.")
    (tmp_path / "no.py").write_text("Nor this. Nor that.")
    data = claims.corpus.prepare(tmp_path, vocabulary=100, positions=48)
    assert len(data["train"]) + len(data["held_out"]) == 40
    assert 1 <= len(data["held_out"]) <= 12
    again = claims.corpus.prepare(tmp_path, vocabulary=100, positions=48)
    assert claims.corpus.fingerprint(data) == claims.corpus.fingerprint(again)


def test_corpus_too_small_for_a_batch_is_refused(claims, tmp_path: pathlib.Path, capsys) -> None:
    (tmp_path / "one.txt").write_text("The file says so. It says so again.")
    with pytest.raises(SystemExit):
        claims.paper_claims.main(["--tasks", "text", "--corpus", str(tmp_path), "--out", str(tmp_path / "out")])
    expected = "corpus: expected 48 pairs of sentences, a batch, or more to learn from and as many held out, got "
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ngrams_are_neighbours_within_the_budget(claims) -> None:
    places = [*range(1, 40), *range(41, 90)]  # two sentences with a separator between them
    budget = round(0.15 * len(places))
    lengths, sizes = [], []
    for seed in range(500):
        chosen = claims.corpus.choose_ngrams(places, budget, random.Random(seed))
        for ngram in chosen:
            start = places.index(ngram[0])
            assert ngram == places[start : start + len(ngram)]
        flat = list(itertools.chain(*chosen))
        assert len(set(flat)) == len(flat)
        lengths.extend(len(ngram) for ngram in chosen)
        sizes.append(len(flat))
    assert set(sizes) == {budget}
    shares = [lengths.count(length) / len(lengths) for length in (1, 2, 3)]
    assert set(lengths) == {1, 2, 3}
    assert shares[0] > 6 / 11 > 3 / 11 + 0.1 > shares[1] > shares[2]  # some are cut to fit the budget


def test_masked_pieces_are_15_percent_and_labelled(claims, text_task) -> None:
    vocabulary = text_task.vocabulary
    pieces = text_task.join(*text_task.pairs[0])
    count = {"asked": 0, "mask": 0, "same": 0}
    for seed in range(600):
        seen, labels = text_task.mask(pieces, random.Random(seed))
        asked = [n for n, label in enumerate(labels) if label != -100]
        assert len(asked) == round(0.15 * (len(pieces) - 3))
        assert all(labels[n] == pieces[n] for n in asked)
        assert all(seen[n] == pieces[n] for n in range(len(pieces)) if n not in asked)
        assert not {labels[n] for n in asked} & text_task.special
        assert not {seen[n] for n in asked} & {vocabulary[name] for name in ("[PAD]", "[CLS]", "[SEP]")}
        count["asked"] += len(asked)
        count["mask"] += sum(seen[n] == vocabulary["[MASK]"] for n in asked)
        count["same"] += sum(seen[n] == pieces[n] for n in asked)
    assert count["mask"] / count["asked"] == pytest.approx(0.8, abs=0.03)
    chance = 1 / (len(vocabulary) - 5)  # that any piece is the same one
    assert count["same"] / count["asked"] == pytest.approx(0.1 + 0.1 * chance, abs=0.03)


def test_half_of_the_pairs_are_swapped(text_task) -> None:
    batches = list(itertools.islice(text_task.batches(seed=3), 100))
    ids, types, labels = (
        torch.cat([batch.inputs[name] for batch in batches]) for name in ("input_ids", "token_type_ids", "labels")
    )
    order = torch.cat([batch.order for batch in batches])
    assert order.float().mean().item() == pytest.approx(0.5, abs=0.1)
    for swapped, (first, second) in enumerate([text_task.pairs[0], text_task.pairs[0][::-1]]):
        rows = order == swapped
        whole = text_task.join(first, second)
        padding = [0] * (text_task.positions - len(whole))
        unmasked = torch.where(labels == -100, ids, labels)[rows]
        assert (unmasked == torch.tensor(whole + padding)).all()
        segments = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        assert (types[rows] == torch.tensor(segments + padding)).all()


def test_score_without_context(claims, text_task) -> None:
    """By Bayes, literally: a piece of frequency f, seen as s, has the weight f * ([s is the piece] + 1 / any)."""
    (batch,) = text_task.held_out
    pieces = [piece for pair in text_task.pairs for half in pair for piece in half]
    size, mask = len(text_task.vocabulary), text_task.vocabulary["[MASK]"]
    losses, right = [], 0
    for n, position in (batch.labels != -100).nonzero().tolist():
        seen, label = batch.inputs["input_ids"][n, position].item(), batch.labels[n, position].item()
        weights = [
            (pieces.count(piece) + 1) * ((piece == seen and seen != mask) + 1 / (size - 5)) for piece in range(size)
        ]
        losses.append(-math.log(weights[label] / sum(weights)))
        right += weights.index(max(weights)) == label
    score = text_task.without_context()
    assert score["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-5)
    assert score["accuracy"] == pytest.approx(right / len(losses))


def test_batches_depend_on_the_seed_alone(text_task) -> None:
    batches = [next(text_task.batches(seed)).inputs for seed in (1, 1, 2)]
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
    assert not torch.equal(batches[0]["input_ids"], batches[2]["input_ids"])


def test_shuffled_brings_each_index_before_any_again(claims) -> None:
    batches = claims.training.shuffled(7, 3, torch.Generator().manual_seed(0))
    stream = torch.cat(list(itertools.islice(batches, 14))).view(6, 7)
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in stream)


def test_divergence_is_the_formula_of_the_paper(claims) -> None:
    vectors = torch.randn(3, 5, dtype=torch.float64)
    rows, width = vectors.shape
    expected = [
        sum(
            abs(vectors[i, j] - vectors[m, n])
            for j in range(width)
            for m in range(rows)
            for n in range(width)
            if j != n
        )
        / (rows * width**2)
        for i in range(rows)
    ]
    torch.testing.assert_close(claims.training.divergence(vectors), torch.stack(expected))


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ([0.2, 0.3, 0.25], "shows"),
        ([-0.2, -0.3, -0.25], "opposite"),
        ([0.2, -0.3, 0.25], "not decided"),
        ([0.02, 0.3, 0.4], "not decided"),  # 0.24 ± 0.49: two standard errors are not enough with three seeds
        ([0.0, 0.0, 0.0], "not decided"),
        ([0.5], "not decided"),
    ],
)
def test_verdict(claims, differences: list[float], word: str) -> None:
    verdict = claims.report.judge(differences)
    assert verdict.word == word
    assert verdict.mean == pytest.approx(statistics.fmean(differences))
    assert (verdict.p <= 0.05) == (word != "not decided")
    if len(differences) == 3:
        assert verdict.margin == pytest.approx(4.3027 * statistics.stdev(differences) / math.sqrt(3), rel=1e-4)


def test_p_is_students(claims) -> None:
    """Two-sided, of two degrees of freedom, where it has the closed form 1 - t / sqrt(t^2 + 2)."""
    for differences in ([0.2, 0.3, 0.25], [-0.02, -0.3, -0.4]):
        t = abs(statistics.fmean(differences)) / (statistics.stdev(differences) / math.sqrt(3))
        assert claims.report.judge(differences).p == pytest.approx(1 - t / math.sqrt(t**2 + 2), rel=1e-9)


@pytest.mark.parametrize(
    ("ps", "bound"),
    [
        ([0.03, 0.001, 0.02, 0.012], 0.03),  # 0.05/4, 0.05/3, 0.05/2, 0.05 are asked of them from the least on
        ([0.03, 0.001, 0.03, 0.012], 0.012),  # the third fails, and with it all behind it
        ([0.013, 0.013, 0.013, 0.013], 0.0),
        ([0.04], 0.04),
        ([0.0, 1.0], 0.0),
        ([], 0.0),
    ],
)
def test_what_holds_for_all_comparisons_together(claims, ps: list[float], bound: float) -> None:
    verdicts = [claims.report.Verdict(1.0, 0.5, p, "shows") for p in ps]
    assert claims.report.joint_bound(verdicts) == bound


def invented(variant: str, seed: int, accuracy: float, loss: float) -> dict:
    last = {"accuracy": accuracy, "loss": loss, "train_accuracy": 0.5, "train_loss": 1.0}
    return {
        "settings": {
            "task": "digits",
            "variant": variant,
            "seed": seed,
            "model": {"hidden_size": 48},
            "recipe": {"steps": 500},
        },
        "parameters": 1234,
        "history": [{"accuracy": 0.0, "loss": 9.0, "train_accuracy": 0.0, "train_loss": 9.0}, last],
        "load": None,
        "dropped": [0.01, 0.03] if variant == "widenet" else None,
        "divergence": {"gamma": [0.001, 0.003], "beta": [0.0, 0.0]},
        "seconds": 2.0,
    }


def test_report_of_invented_runs(claims) -> None:
    results = [invented("widenet", seed, 0.90 + 0.01 * seed, 0.3) for seed in range(3)]
    results += [invented("dense", seed, 0.88 + 0.01 * seed, 0.2 + 0.001 * seed) for seed in range(3)]
    for seed, less in enumerate([0.0173, 0.0250, 0.0327]):
        results.append(invented("shared-norms", seed, 0.90 + 0.01 * seed - less, 0.3))
    text = claims.report.report(results, None)
    assert "## digits, 3 seeds\n" in text
    assert "hidden size 48, steps 500.\n" in text
    assert "| WideNet | 1,234 | 91.0 ± 1.0 | 0.300 ± 0.000 | 50.0 ± 0.0 | 1.000 ± 0.000 | 2.0% | 2 |" in text
    assert "| dense FFN | 1,234 | 89.0 ± 1.0 | 0.201 ± 0.001 | 50.0 ± 0.0 | 1.000 ± 0.000 | - | 2 |" in text
    claim = "| experts beat a dense FFN where blocks share | WideNet vs dense FFN | L 79.5 > 76.9, H 80.1 > 79.0 "
    assert claim + "| accuracy +2.0 ± 0.0: **shows** | loss -0.099 ± 0.002: **opposite** |" in text
    assert "- accuracy shows, loss opposite: experts beat a dense FFN where blocks share\n" in text
    assert "| accuracy +2.5 ± 1.9: shows | loss +0.000 ± 0.000: not decided |" in text, "not among four comparisons"
    assert "top-2 beats" not in text, "no runs, no verdict"
    assert "no other piece" not in text
    assert "By chance alone that would be so for 0 of the 4 comparisons" in text


def test_every_claim_is_about_variants_of_the_grid(claims) -> None:
    for claim in claims.report.CLAIMS:
        assert {claim.better, claim.worse} <= set(claims.grid.VARIANTS)
        assert set(claim.paper) <= set(claims.grid.FULL)
    for trial in claims.grid.FULL.values():
        assert trial.model["ffn_size"] == claims.grid.FFN_SIZE


@pytest.fixture(scope="module")
def short_form(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, str]:
    """The folder that the program leaves, and what it says."""
    folder = tmp_path_factory.mktemp("short")
    command = [sys.executable, str(EXAMPLES / "paper_claims.py"), "--short", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_short_form_leaves_runs_table_and_pictures(claims, short_form) -> None:
    folder, said = short_form
    names = {f"{task}-{variant}-0" for task, trial in claims.grid.SHORT.items() for variant in trial.variants}
    assert {path.stem for path in (folder / "runs").iterdir()} == names
    assert said.startswith(f"8 runs, 0 of them in {folder} already\n")
    assert (folder / "claims.md").read_text() in said
    assert "Who looks at no other piece than the one asked for" in said
    assert "0 of 4 networks have a lower loss." in said, "after six steps"
    for name in ("parameters", "load", "divergence"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    result = json.loads((folder / "runs" / "text-widenet-0.json").read_text())
    assert [record["step"] for record in result["history"]] == [3, 6]
    assert 0 < result["history"][-1]["loss"] < 8
    torch.testing.assert_close(torch.tensor(result["load"]).sum(dim=1), torch.ones(len(result["load"])))
    assert len(result["dropped"]) == len(result["load"]) == len(result["divergence"]["gamma"])


def test_finished_runs_are_not_run_again(claims, short_form, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder, said = short_form
    monkeypatch.setattr(claims.grid.Run, "execute", None)
    assert claims.paper_claims.main(["--short", "--out", str(folder)]) == 0
    assert capsys.readouterr().out == said.replace("8 runs, 0 of", "8 runs, 8 of")


@pytest.fixture
def own_threads():
    """A run takes one thread for itself; the tests behind this one have theirs again."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("own_threads")
def test_same_run_gives_the_same_numbers(claims, short_form, tmp_path: pathlib.Path) -> None:
    folder, _ = short_form
    for run in claims.grid.grid(folder, claims.grid.SHORT, ["digits", "text"], ["widenet"]):
        (tmp_path / "corpus.json").write_bytes((folder / "corpus.json").read_bytes())
        again = run._replace(folder=tmp_path)
        again.execute()
        first, second = run.result(), again.result()
        for result in (first, second):
            del result["seconds"], result["cpu_seconds"]
        assert first == second


@pytest.mark.parametrize("changed", [["--corpus", str(EXAMPLES)], []], ids=["corpus", "recipe"])
def test_other_settings_are_refused(claims, short_form, changed, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    folder, _ = short_form
    if not changed:
        recipe = claims.grid.SHORT["digits"].recipe
        monkeypatch.setitem(recipe, "steps", 7)
    with pytest.raises(SystemExit):
        claims.paper_claims.main(["--short", "--out", str(folder), *changed])
    error = capsys.readouterr().err
    assert ("source = None" if changed else "'steps': 6") in error
    assert "take another folder" in error


@pytest.mark.parametrize(
    ("end", "status", "word"),
    [("signal.raise_signal(signal.SIGINT)", 130, "interrupted"), ("os.kill(worker.pid, 9)", 1, "a worker died")],
    ids=["ctrl-c", "killed"],
)
def test_what_is_finished_is_kept(short_form, tmp_path: pathlib.Path, end: str, status: int, word: str) -> None:
    """Ctrl-C of the program, and the end of a worker that has too little memory, each behind the first run."""
    code = f"""
import multiprocessing, os, signal, sys
import paper_claims

def tqdm(runs, **_):
    for run in runs:
        yield run
        for worker in multiprocessing.active_children():
            {end}

if __name__ == "__main__":
    paper_claims.tqdm = tqdm
    sys.exit(paper_claims.main(sys.argv[1:]))
"""
    program = tmp_path / "program.py"
    program.write_text(code)
    (tmp_path / "corpus.json").write_bytes((short_form[0] / "corpus.json").read_bytes())
    command = [sys.executable, str(program), "--short", "--seeds", "9", "--tasks", "digits", "--out", str(tmp_path)]
    path = os.pathsep.join([str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == status, done.stderr
    kept = len(list((tmp_path / "runs").glob("*.json")))
    assert 1 <= kept < 36
    assert done.stdout.splitlines()[-1].startswith(f"{word}: {kept} of 36 runs are done; the same command goes on")
