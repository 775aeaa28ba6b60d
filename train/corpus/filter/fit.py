"""A filter from labels: embed labelled texts, fit a random forest on most of them, judge it on the rest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.model.base.errors import UserError
from outgrow.model.base.files import whole_file, whole_folder
from outgrow.model.base.machine import cores
from outgrow.train.corpus.filter import embed
from outgrow.train.corpus.filter.forest import Forest
from outgrow.train.corpus.filter.rules import label
from outgrow.train.corpus.read.corpora import documents, open_corpus
from outgrow.train.data.settings import DataSettings

if TYPE_CHECKING:
    from sklearn.ensemble import RandomForestClassifier

FEWEST = 10  # samples of either label
BINS = 10  # of the calibration
SHARES = (0.1, 0.25, 0.5)  # kept, whose precision is reported


@dataclass(frozen=True)
class FitSettings:
    """The fitting of a forest; conf/filter.yaml."""

    encoder: str  # a folder or hub name
    revision: str | None
    max_tokens: int  # that are read of a text
    trees: int
    min_samples_leaf: int
    held_out: float  # of the labels
    seed: int


# ---- labels ------------------------------------------------------------------------------------------------


def write_labels(data: DataSettings, target: Path) -> dict[int, int]:
    """Label the documents of a corpus of Python modules by the demonstration rules, one JSON object a line;
    count both labels."""
    counts = {0: 0, 1: 0}
    with whole_file(target) as partial, partial.open("w") as file:
        for document in documents(data, open_corpus(data)):
            value, measured, broken = label(document.text)
            counts[value] += 1
            file.write(
                json.dumps(
                    {
                        "document": document.name,
                        "label": value,
                        "measured": measured,
                        "rules_that_do_not_hold": broken,
                    }
                )
                + "\n"
            )
    return counts


def read_labels(path: Path) -> dict[str, int]:
    """The labels of a file: a JSON object a line, with `document`, a name in the corpus, and `label`, 0 or 1;
    other fields are the annotator's own.

    Raises:
        UserError: a line is something else, or names a document again with another label.
    """
    labels: dict[str, int] = {}
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"labels={path}: cannot be read ({error}); write one with outgrow corpus label"
        ) from error
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error})") from error
        if row is None:
            continue
        is_row = isinstance(row, dict) and isinstance(row.get("document"), str)
        if not is_row or row.get("label") not in (0, 1):
            raise UserError(
                f'{path}:{number}: expected {{"document": NAME, "label": 0 or 1}}; found {line[:60]}'
            )
        name = row["document"]
        value = int(row["label"])
        if labels.setdefault(name, value) != value:
            raise UserError(f"{path}:{number}: {name} has another label above; keep one of them")
    return labels


# ---- fitting -----------------------------------------------------------------------------------------------


def fit(settings: FitSettings, data: DataSettings, labels: Path, out: Path) -> dict[str, Any]:
    """Fit a filter on the labelled documents of a corpus and write it into the folder `out`; return its card,
    with the report.

    Raises:
        UserError: labels that cannot be read, that name no document, or too few of either kind; an encoder
        that cannot be loaded.
    """
    answers = read_labels(labels)
    name = settings.encoder
    revision = settings.revision
    encoder = embed.load_encoder(name, revision, settings.max_tokens)
    every = documents(data, open_corpus(data))
    labelled = ((name, text) for name, text, _ in every if name in answers)
    names, features = _embedded(encoder, labelled)
    if missing := sorted(set(answers) - set(names)):
        raise UserError(
            f"labels={labels}: {len(missing)} of its documents are not in data={data.name}, such as "
            f"{missing[0]}"
        )
    values = np.array([answers[name] for name in names], np.int64)
    held_out = np.array([_is_held_out(name, settings) for name in names], bool)
    fitted_on = ~held_out
    parts = {"to fit on": fitted_on, "held out": held_out}
    for use, part in parts.items():
        counts = np.bincount(values[part], minlength=2)
        if counts.min() < FEWEST:
            raise UserError(
                f"labels={labels}: {counts[1]} samples labelled 1 and {counts[0]} labelled 0 {use}, at "
                f"least {FEWEST} of each are needed; label more, or change held_out"
            )
    classifier = _classifier(settings)
    fitted = classifier.fit(features[fitted_on], values[fitted_on])
    forest = Forest.of(fitted)
    card = {
        "embedding": embed.card(encoder, settings.encoder, settings.revision),
        "forest": {
            "trees": settings.trees,
            "min_samples_leaf": settings.min_samples_leaf,
            "seed": settings.seed,
        },
        "labels": {
            "sha256": hashlib.sha256(labels.read_bytes()).hexdigest(),
            "samples": len(names),
            "positive": int(values.sum()),
        },
        "held_out": report(values[held_out], forest.scores(features[held_out])),
    }
    with whole_folder(out) as partial:
        forest.save(partial, card)
    return card


def _embedded(encoder: embed.Encoder, texts: Iterable[tuple[str, str]]) -> tuple[list[str], np.ndarray]:
    names: list[str] = []
    part: list[str] = []
    shape = (0, encoder.dimensions)
    features = [np.empty(shape, np.float32)]
    for name, text in texts:
        names.append(name)
        part.append(text)
        if len(part) == 256:
            features.append(encoder.embed(part))
            part = []
    features.append(encoder.embed(part))
    return names, np.concatenate(features)


def _is_held_out(name: str, settings: FitSettings) -> bool:
    raw = name.encode("utf-8", "surrogateescape")
    key = f"held out {settings.seed}".encode()
    digest = hashlib.blake2b(raw, key=key, digest_size=8).digest()
    return int.from_bytes(digest, "big") < settings.held_out * 2**64


def _classifier(settings: FitSettings) -> RandomForestClassifier:
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise UserError("fitting a filter needs scikit-learn: pip install -e '.[corpus]'") from error
    return RandomForestClassifier(
        settings.trees,
        min_samples_leaf=settings.min_samples_leaf,
        random_state=settings.seed,
        n_jobs=cores(),
    )


# ---- judging -----------------------------------------------------------------------------------------------


def report(labels: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    """Judge scores (n,) in [0, 1] against labels (n,): precision and recall at 0.5 and of the best so many
    per cent, and calibration.

    `brier` is the mean squared difference of score and label (0.25 for a constant 0.5), `calibration_error`
    the mean difference of score and frequency over BINS bins of score, weighted by their samples.
    """
    samples = len(labels)
    positive = int(labels.sum())
    chosen = scores >= 0.5
    right = (chosen & (labels == 1)).sum()

    order = np.argsort(-scores, kind="stable")
    best = []
    for share in SHARES:
        count = max(1, round(share * samples))
        top = labels[order[:count]]
        hits = top.sum()
        precision = _share(hits, len(top))
        recall = _share(hits, positive)
        best.append({"kept": share, "precision": precision, "recall": recall})

    last = BINS - 1
    bins = (scores * BINS).astype(int).clip(max=last)
    calibration = []
    error = 0.0
    for i in range(BINS):
        in_bin = bins == i
        count = int(in_bin.sum())
        if not count:
            continue
        mean_score = round(float(scores[in_bin].mean()), 4)
        frequency = round(float(labels[in_bin].mean()), 4)
        calibration.append({"samples": count, "mean_score": mean_score, "share_positive": frequency})
        error += count * abs(mean_score - frequency)
    squares = (scores - labels) ** 2
    return {
        "samples": samples,
        "positive": positive,
        "precision": _share(right, chosen.sum()),
        "recall": _share(right, positive),
        "best": best,
        "brier": round(float(squares.mean()), 4),
        "calibration_error": round(error / samples, 4),
        "calibration": calibration,
    }


def _share(part: float, total: float) -> float | None:
    return round(float(part) / float(total), 4) if total else None
