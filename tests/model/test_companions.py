"""What goes with a model beside its weights, in a folder and in a repository to download; which weights are
taken where there are two."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from outgrow.growth import grow
from outgrow.model.base.errors import UserError
from outgrow.model.build import load_model
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.companions import is_companion
from outgrow.model.headers import INDEX, SINGLE
from outgrow.model.locate import locate

GOES = [
    "tokenizer.json", "tokenizer_config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json", "chat_template.json", "chat_template.jinja", "other.jinja", "additional_chat_templates/tool.jinja",
    "source.spm", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "merges.txt", "qwen.tiktoken",
]  # fmt: skip
STAYS = [
    "config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", "consolidated.safetensors", "params.json",
    "modeling_own.py", "adapter_config.json", "adapter_model.safetensors", "original/params.json", "original/tokenizer.model",
    "onnx/model.onnx", "onnx/config.json", "model.fp16.safetensors", "trainer_state.json", "all_results.json", "pytorch_model.bin",
    "README.md", "growth.json", "ledger.json",
]  # fmt: skip
CARD = ["README.md", "LICENSE"]


@pytest.mark.parametrize("name", GOES)
def test_tokenizers_processors_and_templates_go_with_a_model(name: str) -> None:
    assert is_companion(name)


@pytest.mark.parametrize("name", STAYS)
def test_weights_code_and_records_stay_behind(name: str) -> None:
    assert not is_companion(name)


def test_a_grown_folder_has_every_companion_and_says_what_it_has_not(
    phi_folder: Path, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    for name in ({*GOES, *STAYS} - {path.name for path in source.iterdir()}) - {INDEX}:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(
            '{"auto_map": {"AutoX": "own.X"}, "a": 1}' if name.endswith("config.json") else "{}"
        )
    config = json.loads((source / "config.json").read_text()) | {"auto_map": {"AutoConfig": "own.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    grown = grow(source, tmp_path / "out", target={"hidden_size": 30}, receipt=False)
    names = {path.relative_to(grown.folder).as_posix() for path in grown.folder.rglob("*") if path.is_file()}
    assert names == {*GOES, "config.json", "growth.json", "README.md", SINGLE}
    assert all(
        "auto_map" not in (grown.folder / name).read_text() for name in names if name.endswith("config.json")
    )
    notes = "\n".join(grown.notes)
    assert "left behind: modeling_own.py; code of a checkpoint is never run" in notes
    assert "auto_map is dropped" in notes
    assert json.loads((grown.folder / "growth.json").read_text())["source"]["notes"] == list(grown.notes)


def test_of_a_single_file_and_an_index_the_librarys_choice_is_taken_and_told(
    phi_folder: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    other = {name: tensor + 1 for name, tensor in load_file(folder / SINGLE).items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(other, "model-00001-of-00001.safetensors")})
    )
    with Checkpoint(folder) as checkpoint:
        assert {stored.file.name for stored in checkpoint.tensors.values()} == {SINGLE}
        assert "model.safetensors.index.json is passed over" in checkpoint.notes[0]
    loaded = load_model(folder, dtype="float64").get_input_embeddings().weight
    assert torch.equal(loaded, load_file(phi_folder / SINGLE)["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["other.safetensors", "other.safetensors.index.json"])
def test_weights_that_the_config_names_are_taken_as_the_library_takes_them(
    phi_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    other = {key: tensor * 1.5 for key, tensor in load_file(folder / SINGLE).items()}
    save_file(other, folder / "other.safetensors", {"format": "pt"})
    (folder / "other.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(other, "other.safetensors")})
    )
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": name}
    (folder / "config.json").write_text(json.dumps(config))
    by_library = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).lm_head.weight
    ours = load_model(folder, dtype="float64")
    assert torch.equal(by_library, other["lm_head.weight"])
    assert torch.equal(ours.lm_head.weight, by_library)
    grown = grow(folder, tmp_path / "out", target={"vocab_size": 101})
    assert f"config.json names {name}" in grown.notes[0]
    assert grown.receipt is not None
    assert grown.receipt.max_delta < 1e-10
    assert torch.equal(load_file(grown.folder / SINGLE)["lm_head.weight"][: len(by_library)], by_library)
    for written in (grown.folder, ours.save_pretrained(tmp_path / "saved") or tmp_path / "saved"):
        assert "transformers_weights" not in (written / "config.json").read_text()


@pytest.mark.parametrize(
    "name", ["../source/model.safetensors", 3, "pytorch_model.bin", "absent.safetensors"]
)
def test_weights_that_the_config_may_not_name_are_told(phi_folder: Path, tmp_path: Path, name: Any) -> None:
    folder = Path(shutil.copytree(phi_folder, tmp_path / "source"))
    (folder / "pytorch_model.bin").touch()
    config = json.loads((folder / "config.json").read_text()) | {"transformers_weights": name}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="transformers_weights must name a safetensors file"):
        Checkpoint(folder)


@pytest.mark.parametrize("single", [True, False])
def test_a_download_takes_one_format_of_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}))
    weights = [SINGLE] if single else [INDEX, *shards]
    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *_, **__: [*GOES, *STAYS, *CARD, *shards, *weights]
    )
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / INDEX))
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *_, **how: asked.extend(how["allow_patterns"]) or tmp_path,
    )
    assert locate("someone/some-model") == tmp_path
    assert set(asked) == {*GOES, *CARD, *weights, "config.json"}
