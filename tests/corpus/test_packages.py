"""The corpus of installed distributions: the files that pip recorded, under names that carry no path of the
machine."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from outgrow.model.base.errors import UserError
from outgrow.train.corpus.read.document import Tally
from outgrow.train.corpus.read.files import packages, stdlib
from outgrow.train.data.settings import DataSettings, disagreements

EINOPS = metadata.version("einops")


def settings(*distributions: str) -> DataSettings:
    return DataSettings("packages", "packages", distributions=distributions)


def test_documents_are_the_files_that_the_distribution_recorded() -> None:
    corpus = packages(settings(f"einops=={EINOPS}"))
    recorded = [file for file in metadata.distribution("einops").files or () if file.suffix == ".py"]
    texts = {
        document.name: document.text
        for document in corpus.documents(Tally())
        if document.name.startswith("einops/")
    }
    kept = [file for file in recorded if not {"test", "tests", "testing", "_vendor"} & set(file.parts)]
    assert sorted(texts) == sorted(f"einops/{file.as_posix()}" for file in kept if file.read_text().strip())
    assert 0 < len(texts) < len(recorded)
    assert (
        texts["einops/einops/einops.py"]
        == Path(str(metadata.distribution("einops").locate_file("einops/einops.py"))).read_text()
    )


def test_the_standard_library_comes_with_them() -> None:
    library = [f"stdlib/{file.name}" for file in stdlib(DataSettings("stdlib", "stdlib")).files]
    assert [
        file.name for file in packages(settings(f"einops=={EINOPS}")).files if file.name.startswith("stdlib/")
    ] == library


def test_all_that_is_missing_or_of_another_version_is_told_at_once() -> None:
    with pytest.raises(UserError) as fault:
        packages(settings("einops==0.0.1", "no-such-distribution==1.0"))
    assert f"einops==0.0.1 is asked for, {EINOPS} installed; pip install einops==0.0.1" in str(fault.value)
    assert "no-such-distribution is not installed; pip install no-such-distribution==1.0" in str(fault.value)


@pytest.mark.parametrize(
    ("distributions", "named"),
    [((), "none"), (("numpy",), "['numpy']"), (("numpy==1==2",), "['numpy==1==2']")],
)
def test_a_distribution_without_a_version_is_refused(distributions: tuple[str, ...], named: str) -> None:
    fault = f"data.distributions: name each with its version, numpy==2.4.6; found {named}"
    assert disagreements(settings(*distributions)) == [fault]
