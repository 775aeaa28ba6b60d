"""Hugging Face models from a config or a folder, with the right attention backend and dtype."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outgrow.model.base.errors import UserError, in_one_line, loading_faults, unknown
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.composite import nested
from outgrow.model.family import Config, family_of
from outgrow.model.fp8 import dequantised
from outgrow.model.generation import generation_config

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

ATTENTION = ("auto", "flash_attention_2", "sdpa", "flex_attention", "eager")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def to_hf_config(config: Config) -> PretrainedConfig:
    """The `transformers` config of a plain dict, for families that the library itself defines (never remote
    code).

    Raises:
        UserError: the library has no such family, or refuses a value.
    """
    from transformers import CONFIG_MAPPING

    fields = nested(config)
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        unknown("model_type", str(model_type), CONFIG_MAPPING.keys())
    config_class = CONFIG_MAPPING[model_type]
    # as it does with files that it opens itself (`{"__float__": "Infinity"}`)
    try:
        return config_class.from_dict(config_class._decode_special_floats(fields))
    except Exception as fault:  # the library's classes raise every kind
        raise UserError(
            f"config: transformers refuses it for model_type {model_type!r} ({in_one_line(fault, 300)}); "
            "correct config.json, or the target's value"
        ) from None


def library_class(config: PretrainedConfig) -> Any:
    """The library's auto class whose models hold every tensor of a checkpoint of `config`.

    That is the causal language model's; where that one takes the text model alone out of a composite config
    (Llama 4), or there is none, it is the multimodal one's.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    kind: Any = type(config)
    if kind not in AutoModelForMultimodalLM._model_mapping:
        return AutoModelForCausalLM
    mapping: Any = AutoModelForCausalLM._model_mapping
    return (
        AutoModelForCausalLM
        if kind in mapping and mapping[kind].config_class is kind
        else AutoModelForMultimodalLM
    )


def known_size(config: Config, name: str) -> int | None:
    """A size of the text model under its standard name, as its class fills it in where the config leaves it
    out; None where it has none.

    `known_size({"model_type": "gpt2"}, "max_position_embeddings")` → 1024, which a GPT-2 calls n_positions.
    """
    if type(config.get(name)) is int:
        return int(config[name])
    text = to_hf_config(config).get_text_config(decoder=True)
    size = getattr(text, name, None)
    return size if type(size) is int else None


def attention_backend(requested: str = "auto") -> tuple[str, str]:
    """Choose an attention implementation, and say why.

    Returns:
        (a `transformers` attn_implementation, the reason in words). "auto" takes flash-attn where it is
        installed on a GPU that supports it (compute capability ≥ 8.0), else PyTorch's
        scaled_dot_product_attention, whose GPU kernel is FlashAttention.

    Raises:
        UserError: the name is unknown, or flash-attn was asked for where it cannot run.
    """
    if requested not in ATTENTION:
        unknown("attention backend", requested, ATTENTION)
    if requested not in ("auto", "flash_attention_2"):
        return requested, "asked for"
    obstacle = _flash_obstacle()
    if obstacle is None:
        return "flash_attention_2", "flash-attn is installed and the GPU supports it"
    if requested == "auto":
        return "sdpa", f"no flash-attn: {obstacle}"
    raise UserError(
        f"attention flash_attention_2: {obstacle}; use attention=auto, or install the extra: pip install "
        "-e '.[flash]'"
    )


def _flash_obstacle() -> str | None:
    """Reason why flash-attn cannot be used here, or None."""
    import torch

    if not torch.cuda.is_available():
        return "no CUDA GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash_attn is not installed"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return None


def build_model(
    config: Config, *, seed: int, dtype: str = "float32", attention: str = "auto"
) -> PreTrainedModel:
    """A freshly initialised model: the library's own initialisation, drawn under `seed`, the global RNG left
    as it was.

    Raises:
        UserError: the library has no such family, or cannot build it with these sizes.
    """
    import torch

    hf_config = to_hf_config(config)
    with torch.random.fork_rng(devices=[]), _building(hf_config):
        torch.manual_seed(seed)
        return library_class(hf_config).from_config(
            hf_config,
            dtype=_torch_dtype(dtype),
            attn_implementation=_implementation(attention),
            trust_remote_code=False,
        )


def empty_model(
    config: Config, *, dtype: torch.dtype, device: torch.device | str = "cpu", attention: str | None = None
) -> PreTrainedModel:
    """A model whose parameters hold nothing yet (its buffers do), tied where its config ties, on `device`.

    Raises:
        UserError: the library has no such family, or cannot build it with these sizes.
    """
    import torch
    from transformers.initialization import no_init_weights

    hf_config = to_hf_config(config)
    with no_init_weights(), torch.device(device), _building(hf_config):
        model = library_class(hf_config).from_config(
            hf_config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()
    return model


@contextmanager
def _building(config: PretrainedConfig) -> Iterator[None]:
    """Tell a user whose sizes the library's class cannot be built with: most classes check none of them, and
    end in a division by zero or an assertion.
    """
    try:
        yield
    except (ZeroDivisionError, AssertionError, TypeError, AttributeError, IndexError, KeyError) as fault:
        raise UserError(
            f"config: transformers cannot build model_type {config.model_type!r} with it "
            f"({in_one_line(fault, 300)}); give every size that its class needs, such that they go together: "
            "heads, key and value heads, head sizes, and special tokens below vocab_size"
        ) from fault


def load_model(
    folder: Path | str, *, dtype: str = "float32", attention: str = "auto", config: Config | None = None
) -> PreTrainedModel:
    """A model from a local folder of safetensors weights, every tensor accounted for; with `config`, the
    folder needs none of its own.

    FP8 weights with scales are dequantised (`model.fp8`), on any device alike.

    Raises:
        UserError: the folder is missing, its family unknown, or a tensor missing, unexpected or of another
            shape.
    """
    if not Path(folder).is_dir():
        raise UserError(f"model {str(folder)!r}: no such folder")
    state: dict[str, torch.Tensor] | None = None
    weights: str | None = None
    if config is None:
        with Checkpoint(folder) as opened:
            plain = dequantised(opened)
            config = opened.config
            weights = opened.weights
            if plain is not None:
                config = plain.config
                state = plain.state_dict()
    hf_config = to_hf_config(config)
    if weights is not None:
        hf_config.transformers_weights = weights
    kind: Any = library_class(hf_config)
    own: Any = kind if state is None else kind._model_mapping[type(hf_config)]
    loaded: Any = own.from_pretrained(
        str(folder) if state is None else None,
        state_dict=state,
        dtype=_torch_dtype(dtype),
        attn_implementation=_implementation(attention),
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # told below, with everything else
        output_loading_info=True,
        config=hf_config,
        generation_config=generation_config(Path(folder), config)[0],
        # the fused kernels know no float64
        **({"experts_implementation": "eager"} if dtype == "float64" else {}),
    )
    model, report = loaded
    if weights is not None:
        del model.config.transformers_weights  # what is saved has the usual names
    faults = loading_faults(report)
    UserError.collect(f"model {folder}: {fault}" for fault in faults)
    return model


@contextmanager
def computing_in(dtype: str) -> Iterator[None]:
    """Make new tensors in `dtype` unless they say otherwise: some of the library's classes compare them with
    those of their weights.
    """
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(_torch_dtype(dtype))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """Parameter name → the name under which a checkpoint of this model stores it; `transformers` renames a
    few when it loads.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    parameters = [name for name, _ in model.named_parameters()]
    config = model.config.to_dict()
    tensors = family_of(config).tensors(config)
    stored = [tensor.name for tensor in tensors if not tensor.tied]
    names = {name: name for name in stored}
    others = [name for name in stored if name not in parameters]
    for renaming in get_model_conversion_mapping(model, add_legacy=False):
        names |= {renaming.rename_source_key(name)[0]: name for name in others}
    # what the schema has no line for (a cross-attention) keeps its name, and is told as unknown
    return {name: names.get(name, name) for name in parameters}


def meta_model(config: Config) -> PreTrainedModel:
    """A model of `config` without memory for its parameters, which have shapes and no values."""
    import torch

    hf_config = to_hf_config(config)
    with torch.device("meta"):
        return library_class(hf_config).from_config(hf_config, trust_remote_code=False)


def _implementation(attention: str) -> str | None:
    """Attention to ask the library for; None lets it choose, since some families have no SDPA (Gemma 2's
    capped logits).
    """
    chosen, _ = attention_backend(attention)
    return None if attention == "auto" and chosen == "sdpa" else chosen


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        unknown("dtype", name, DTYPES)
    return getattr(torch, name)
