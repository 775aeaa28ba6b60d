"""Generation configs that contradict themselves are mended, and what was changed is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from outgrow.growth import grow
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model
from outgrow.model.generation import FILE, generation_config, mended

ENTRIES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 2]},
        {"do_sample": True, "temperature": 0.6, "eos_token_id": [1, 2]},
        "",
    ),
    (
        {"temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        "do_sample: true is added",
    ),
    (
        {"do_sample": False, "temperature": 0.6},
        {"do_sample": False, "temperature": None},
        "temperature: 0.6 left out",
    ),
    (
        {"temperature": 0.6, "pad_token_id": -1},
        {"do_sample": True, "temperature": 0.6, "pad_token_id": None},
        "pad_token_id: -1 left out",
    ),
    (
        {"length_penalty": 2.0, "eos_token_id": 3},
        {"length_penalty": None, "eos_token_id": 3},
        "length_penalty: 2.0 left out",
    ),
    ({"num_return_sequences": 3, "num_beams": 4}, {"num_return_sequences": 3, "num_beams": 4}, ""),
    (
        {"max_new_tokens": 0, "top_k": 5, "do_sample": True},
        {"max_new_tokens": None, "top_k": 5},
        "max_new_tokens: 0 left out",
    ),
    (
        {"cache_implementation": "unheard of"},
        {"cache_implementation": None},
        "cache_implementation: 'unheard of' left out",
    ),
    ({"early_stopping": "perhaps"}, {"early_stopping": None}, "early_stopping: 'perhaps' left out"),
]


@pytest.mark.parametrize(("entries", "wanted", "told"), ENTRIES)
def test_what_the_library_refuses_to_save_is_completed_or_dropped(
    entries: dict[str, Any], wanted: dict[str, Any], told: str, tmp_path: Path
) -> None:
    made, changes = mended(entries)
    assert {key: getattr(made, key) for key in wanted} == wanted
    assert told in "; ".join(changes)
    assert bool(told) == bool(changes)
    made.save_pretrained(tmp_path)
    assert (tmp_path / FILE).is_file()


def test_a_file_that_is_no_json_is_left_out_and_told(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    made, changes = generation_config(tmp_path, {"eos_token_id": 5})
    assert made.eos_token_id == 5
    assert "generation_config.json: not valid JSON" in changes[0]


def test_a_source_without_that_file_is_grown_with_its_receipt(phi_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    (source / FILE).unlink()
    grown = grow(source, tmp_path / "out", target={"hidden_size": 30})
    assert grown.receipt is not None
    assert grown.receipt.max_delta <= 1e-12
    assert load_model(grown.folder).generation_config.to_dict().keys() >= {"eos_token_id"}


def test_a_loaded_model_saves_again(phi_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    (source / FILE).write_text(json.dumps({"temperature": 0.6, "eos_token_id": 3}))
    load_model(source).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / FILE).read_text())
    assert (saved["do_sample"], saved["temperature"], saved["eos_token_id"]) == (True, 0.6, 3)


@pytest.mark.parametrize(
    ("content", "kept", "told"),
    [
        ('{"eos_token_id": 3}', {"eos_token_id": 3}, ""),
        ('{"temperature": 0.6, "eos_token_id": 3}', {"temperature": 0.6, "do_sample": True}, "do_sample: true is added"),
        ('{"early_stopping": "perhaps", "eos_token_id": 3}', {"eos_token_id": 3}, "early_stopping: 'perhaps' left out"),
        ("[1]", {}, "expected a JSON object, found list; left out"),
        ("{", {}, "not valid JSON"),
    ],
)  # fmt: skip
def test_a_grown_folder_has_one_that_the_library_saves(
    phi_folder: Path, tmp_path: Path, content: str, kept: dict[str, Any], told: str
) -> None:
    from transformers import GenerationConfig

    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    (source / FILE).write_text(content)
    grown = grow(source, tmp_path / "out", target={"intermediate_size": 80}, receipt=False)
    generation = GenerationConfig.from_pretrained(grown.folder)
    generation.save_pretrained(tmp_path / "again")
    assert {key: getattr(generation, key) for key in kept} == kept
    assert told in "; ".join(grown.notes)
    assert bool(told) == bool(grown.notes)


def test_without_the_library_it_is_copied_as_it_is_and_told(
    phi_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    (source / FILE).write_text('{"temperature": 0.6, "eos_token_id": 3}')
    monkeypatch.setattr("outgrow.growth.beside.find_spec", lambda name: None)
    grown = grow(source, tmp_path / "out", target={"intermediate_size": 80}, receipt=False)
    assert json.loads((grown.folder / FILE).read_text()) == {"temperature": 0.6, "eos_token_id": 3}
    assert "copied as it is" in "; ".join(grown.notes)
    (source / FILE).write_text("{")
    with pytest.raises(UserError, match=rf"source/{FILE}: not valid JSON"):
        grow(source, tmp_path / "again", target={"intermediate_size": 80}, receipt=False)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "preprocessor_config.json"])
def test_a_config_that_could_not_be_copied_is_told_before_anything_is_grown(
    phi_folder: Path, tmp_path: Path, name: str
) -> None:
    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    (source / name).write_text("{")
    told: list[int] = []
    with pytest.raises(UserError, match=rf"source/{name}: not valid JSON"):
        grow(
            source,
            tmp_path / "out",
            target={"intermediate_size": 80},
            receipt=False,
            progress=lambda done, _: told.append(done),
        )
    assert not told
