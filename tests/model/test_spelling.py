"""Folders that transformers 4 and 5 read alike: against a pinned transformers 4 in an environment of its
own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from outgrow.model.build import to_hf_config
from outgrow.model.spelling import FULL, SLIDING, both_spellings, spell_folder, spell_tokenizer

PINNED = "transformers==4.57.6"  # the last of its kind; configs and tokenizers need no torch
UNREACHABLE = (
    "ConnectionError",
    "connection broken",
    "Network is unreachable",
    "Name or service not known",
    "Temporary failure in name",
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16.0},
    "llama3": LLAMA3,
}

# Prints, for every folder, what transformers 4 makes of its config and tokenizer; of a config, the rotary
# keys that its class takes.
READER = """
import inspect, json, sys
from pathlib import Path
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer
STARTS = ("rope_", "rotary_", "partial_", "time_step_limit")
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in CONFIG_MAPPING:
        continue
    kind = CONFIG_MAPPING[config["model_type"]]
    try:
        read = kind.from_pretrained(folder)
    except Exception as fault:
        found[folder.name] = {"fault": str(fault)}
        continue
    keys = [key for key in inspect.signature(kind.__init__).parameters if key.startswith(STARTS) or "theta" in key or "freq" in key]
    found[folder.name] = {key: getattr(read, key, None) for key in keys} | {"dtype": str(read.dtype)}
    if (folder / "tokenizer_config.json").exists():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found[folder.name] |= {"ids": tokenizer("a b <mark>")["input_ids"], "special": tokenizer.all_special_tokens}
print(json.dumps(found))
"""


@pytest.fixture(scope="session")
def transformers4() -> Path:
    """The interpreter of an environment with transformers 4, made once and kept outside of the repository."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaled-knowledge-transfer"
    folder = cache / PINNED.replace("==", "-")
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
            install = [
                folder / "bin" / "python",
                "-m",
                "pip",
                "install",
                "--quiet",
                "--retries",
                "1",
                "--timeout",
                "20",
                PINNED,
            ]
            done = subprocess.run(install, capture_output=True, text=True)
            if done.returncode and any(sign in done.stderr for sign in UNREACHABLE):
                pytest.skip(f"the package index cannot be reached, so {PINNED} is not here to read with")
            assert done.returncode == 0, done.stderr
            (folder / "complete").touch()
    return folder / "bin" / "python"


def read_by(interpreter: Path, folders: Path) -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    done = subprocess.run(
        [interpreter, "-c", READER, folders], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# What the classes of transformers 4 do not take in any spelling: other keys than those of rotary positions,
# and such a scaling.
REFUSED = {(name, kind) for name in ("dbrx", "granitemoehybrid") for kind in SCALINGS} | {
    *((name, kind) for name in ("olmo", "olmo2") for kind in ("yarn", "llama3")),
}


@cache
def turning() -> dict[str, dict[str, Any]]:
    """Rotary positions by default of every causal model type of the library that keeps them as
    `rope_parameters`."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = {}
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with suppress(Exception):  # some want other towers or packages
            if rope := getattr(CONFIG_MAPPING[name](), "rope_parameters", None):
                found[name] = rope
    return found


def unusual(rope: dict[str, Any], scaling: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions by no class's defaults: other bases and shares, and scaled so."""
    if FULL in rope:
        return {
            FULL: {**rope[FULL], **scaling, "rope_theta": 54321.0},
            SLIDING: {**(rope.get(SLIDING) or {}), "rope_theta": 1234.0},
        }
    share = {"partial_rotary_factor": 0.75} if "partial_rotary_factor" in rope else {}
    return {"rope_type": "default", **scaling, "rope_theta": 54321.0, **share}


@cache
def respelt(kind: str) -> dict[str, tuple[dict[str, Any], Any]]:
    """Model type → (a config in both spellings, the library's own of it), of every class that scales its
    positions so."""
    from transformers import CONFIG_MAPPING

    found = {}
    for name, rope in turning().items():
        with suppress(Exception):  # not every class scales so
            config = CONFIG_MAPPING[name](rope_parameters=unusual(rope, SCALINGS[kind]), dtype="bfloat16")
            config.validate_rope()
            found[name] = both_spellings(json.loads(config.to_json_string())), config
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCALINGS)
def test_the_library_reads_of_both_spellings_what_it_wrote(kind: str) -> None:
    read = {name: dict(to_hf_config(spelt).rope_parameters) for name, (spelt, _) in respelt(kind).items()}
    assert len(read) > 50
    for rope in read.values():
        rope.pop("type", None)  # the oldest name of the kind, which stands beside today's
    assert read == {name: own.rope_parameters for name, (_, own) in respelt(kind).items()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCALINGS)
def test_transformers_4_turns_as_transformers_5_does(transformers4: Path, tmp_path: Path, kind: str) -> None:
    for name, (spelt, _) in respelt(kind).items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(spelt))
    read = read_by(transformers4, tmp_path)
    assert len(read) > 40
    differ = {}
    for name, found in read.items():
        if "fault" in found:
            differ |= {} if (name, kind) in REFUSED else {name: found}
            continue
        rope = respelt(kind)[name][1].rope_parameters
        full, sliding = (rope.get(layers) or rope for layers in (FULL, SLIDING))
        wanted = dict.fromkeys(("rope_theta", "rotary_emb_base", "global_rope_theta"), full["rope_theta"])
        wanted |= dict.fromkeys(("rope_local_base_freq", "local_rope_theta"), sliding["rope_theta"])
        wanted |= dict.fromkeys(
            ("partial_rotary_factor", "rotary_pct"),
            full.get("partial_rotary_factor", found.get("partial_rotary_factor")),
        )
        wrong = {key: found[key] for key in wanted if key in found and found[key] != wanted[key]}
        scaling = found.get("rope_scaling") or {}
        entries = {
            key: scaling.get(key, scaling.get("type") if key == "rope_type" else None)
            for key in SCALINGS[kind]
        }
        if "rope_scaling" in found and entries != SCALINGS[kind]:
            wrong["rope_scaling"] = scaling
        if found["dtype"] not in ("bfloat16", "torch.bfloat16"):
            wrong["dtype"] = found["dtype"]
        differ |= {name: wrong} if wrong else {}
    assert differ == {}


LINEAR = {"rope_type": "linear", "factor": 2.0}
LONG = {"short_factor": [1.0], "long_factor": [2.0]}
OLDER: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "phi",
        {"rope_theta": 5.0, "partial_rotary_factor": 0.4},
        {"rope_theta": 5.0, "partial_rotary_factor": 0.4},
    ),
    (
        "gpt_neox",
        {"rope_theta": 5.0, "partial_rotary_factor": 0.25},
        {"rotary_emb_base": 5.0, "rotary_pct": 0.25},
    ),
    ("gpt_oss", {"rope_theta": 5.0}, {"rope_theta": 5.0, "rope_scaling": None}),
    ("llama", {"rope_theta": 5.0, **LLAMA3}, {"rope_theta": 5.0, "rope_scaling": LLAMA3}),
    ("llama", {"rope_theta": 5.0, **LINEAR}, {"rope_theta": 5.0, "rope_scaling": LINEAR}),
    (
        "phi3",
        {"rope_theta": 5.0, "rope_type": "longrope", "original_max_position_embeddings": 64, **LONG},
        {
            "rope_theta": 5.0,
            "rope_scaling": {"type": "longrope", **LONG},
            "original_max_position_embeddings": 64,
        },
    ),
    (
        "gemma3_text",
        {FULL: {"rope_theta": 1e6, **LINEAR}, SLIDING: {"rope_theta": 1e4}},
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": LINEAR},
    ),
]


@pytest.mark.parametrize(("name", "rope", "older"), OLDER)
def test_the_older_spelling_of_rotary_positions(
    name: str, rope: dict[str, Any], older: dict[str, Any]
) -> None:
    # what an older file said, and was then changed
    config = {"model_type": name, "rope_parameters": rope, "rope_theta": 1.0}
    assert both_spellings(config) == {"rope_theta": 1.0} | config | older
    assert both_spellings({"text_config": config, "dtype": "float16"}) == {
        "text_config": {"rope_theta": 1.0} | config | older, "dtype": "float16", "torch_dtype": "float16",
    }  # fmt: skip


def test_a_config_in_the_older_spelling_alone_stays_as_it_is() -> None:
    config = {"model_type": "llama", "rope_theta": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert both_spellings(config) == config


def test_half_a_surrogate_pair_of_a_token_stays_as_json_spells_it(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_text(r'{"extra_special_tokens": ["\ud83d", "größe"]}')
    spell_folder(tmp_path)
    assert json.loads(file.read_bytes()) == {"additional_special_tokens": ["\ud83d", "größe"]}


def test_a_tokenizer_is_named_as_both_know_it() -> None:
    config = {
        "tokenizer_class": "TokenizersBackend",
        "extra_special_tokens": ["<mark>"],
        "eos_token": "<end>",
    }
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<mark>"],
        "eos_token": "<end>",
    }
    assert spell_tokenizer(config) == named
    assert spell_tokenizer(
        {"tokenizer_class": "GPT2Tokenizer", "extra_special_tokens": {"mark": "<mark>"}}
    ) == {
        "tokenizer_class": "GPT2Tokenizer",
        "extra_special_tokens": {"mark": "<mark>"},
    }


@pytest.mark.slow
def test_transformers_4_reads_the_tokenizer_of_a_folder(transformers4: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2, "<mark>": 3}, unk_token="<end>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    own = PreTrainedTokenizerFast(
        tokenizer_object=plain, eos_token="<end>", unk_token="<end>", extra_special_tokens=["<mark>"]
    )
    own.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text('{"model_type": "phi"}')
    assert (
        json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "TokenizersBackend"
    )
    spell_folder(tmp_path / "folder")
    read, again = (
        read_by(transformers4, tmp_path)["folder"],
        AutoTokenizer.from_pretrained(tmp_path / "folder"),
    )
    assert read["ids"] == again("a b <mark>")["input_ids"] == own("a b <mark>")["input_ids"] == [1, 2, 3]
    assert (
        set(read["special"])
        == set(again.all_special_tokens) | set(again.extra_special_tokens)
        == {"<end>", "<mark>"}
    )
