"""A fitted random forest as plain arrays: stored in safetensors and JSON, never pickled, scored as
scikit-learn scores it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from outgrow.model.base.errors import UserError

if TYPE_CHECKING:
    from sklearn.ensemble import RandomForestClassifier

ARRAYS, CARD = "forest.safetensors", "filter.json"
FORMAT = 1
LEAF = -1


@dataclass(frozen=True)
class Forest:
    """Binary decision trees, one after another; each array is 1-D over all their nodes, but `roots`.

    At an inner node a sample goes left where its `feature` is ≤ `threshold`; `left` and `right` are nodes,
    LEAF at a leaf, whose `value` is the share of positive samples that came there in fitting.
    """

    roots: np.ndarray  # int64, (trees,)
    left: np.ndarray  # int64
    right: np.ndarray  # int64
    feature: np.ndarray  # int64
    threshold: np.ndarray  # float64
    value: np.ndarray  # float64

    @classmethod
    def of(cls, fitted: RandomForestClassifier) -> Forest:
        """The arrays of a classifier that was fitted on labels 0 and 1."""
        trees = [estimator.tree_ for estimator in fitted.estimators_]
        sizes = [tree.node_count for tree in trees]
        roots = np.cumsum([0, *sizes])[:-1]

        def moved(name: str) -> np.ndarray:
            parts = []
            for tree, root in zip(trees, roots, strict=True):
                nodes = np.asarray(getattr(tree, name), np.int64)
                is_leaf = nodes == LEAF
                parts.append(np.where(is_leaf, LEAF, nodes + root))
            return np.concatenate(parts)

        return cls(
            roots=roots.astype(np.int64),
            left=moved("children_left"),
            right=moved("children_right"),
            feature=np.concatenate([np.asarray(tree.feature, np.int64) for tree in trees]),
            threshold=np.concatenate([np.asarray(tree.threshold, np.float64) for tree in trees]),
            value=np.concatenate([np.asarray(tree.value[:, 0, 1], np.float64) for tree in trees]),
        )

    def scores(self, features: np.ndarray) -> np.ndarray:
        """The probability that each sample is positive: float64 (n,), from float32 features (n, d)."""
        features = np.asarray(features, np.float32)
        rows = np.arange(len(features))
        total = np.zeros(len(features))
        for root in self.roots:
            node = np.full(len(features), root)
            while (inner := self.left[node] != LEAF).any():
                feature = np.where(inner, self.feature[node], 0)
                values = features[rows, feature]
                goes_left = values <= self.threshold[node]
                left = self.left[node]
                right = self.right[node]
                child = np.where(goes_left, left, right)
                node = np.where(inner, child, node)
            total += self.value[node]
        return total / len(self.roots)

    def save(self, folder: Path, card: dict[str, Any]) -> None:
        """Write the arrays, and a JSON card about them, into `folder`."""
        from safetensors.numpy import save_file

        names = [field.name for field in fields(self)]
        arrays = {name: getattr(self, name) for name in names}
        save_file(arrays, folder / ARRAYS)
        text = json.dumps({"format": FORMAT, **card}, indent=1)
        (folder / CARD).write_text(f"{text}\n")


def load(folder: Path) -> tuple[Forest, dict[str, Any]]:
    """A forest and its card. The file may be a stranger's: every node is checked before one is followed.

    Raises:
        UserError: something is missing, or is no forest.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        card = json.loads((folder / CARD).read_text())
        arrays = load_file(folder / ARRAYS)
        forest = Forest(**arrays)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UserError(f"{folder}: no filter ({error}); fit one with outgrow corpus fit") from error
    embedding = card.get("embedding") if isinstance(card, dict) else None
    if not isinstance(embedding, dict) or card.get("format") != FORMAT:
        raise UserError(
            f"{folder / CARD}: no card of a filter of format {FORMAT}; fit it again with outgrow corpus fit"
        )
    if fault := _fault(forest, embedding.get("dimensions")):
        raise UserError(f"{folder / ARRAYS}: damaged ({fault}); fit it again with outgrow corpus fit")
    return forest, card


def filter_identity(folder: str) -> str:
    """A hash of a filter's files."""
    digest = hashlib.sha256()
    for name in (CARD, ARRAYS):
        path = Path(folder).expanduser() / name
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _fault(forest: Forest, dimensions: Any) -> str | None:
    nodes = len(forest.left)
    arrays = (forest.right, forest.feature, forest.threshold, forest.value)
    if any(array.shape != (nodes,) for array in arrays):
        return "its arrays differ in length"
    roots = forest.roots
    if not len(roots) or not _within(roots, 0, nodes - 1):
        return "a root is no node"
    inner = np.flatnonzero(forest.left != LEAF)
    for children in (forest.left[inner], forest.right[inner]):
        # a child comes after its parent, so every path ends
        if (children <= inner).any() or (children >= nodes).any():
            return "a child is no node that follows"
    if not isinstance(dimensions, int):
        return "a feature is none of the embedding's"
    if not _within(forest.feature[inner], 0, dimensions - 1):
        return "a feature is none of the embedding's"
    values = forest.value
    if not np.isfinite(values).all() or not _within(values, 0, 1):
        return "a value is no probability"
    return None


def _within(values: np.ndarray, least: int, most: int) -> bool:
    """Check that no value is below `least` or above `most`."""
    outside = (values < least) | (values > most)
    return not outside.any()
