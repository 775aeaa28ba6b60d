"""Steps of `bench_growth.py` that run in processes of their own: sources are made, results are checked, and a
mixture of experts is made by hand.

python benchmarks/growth_children.py make-source DIR 24 51200
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from growth_table import EXPERT_COUNT

GATED_UNITS = 5504  # two thirds of Phi-1.5's, as its MLP has two matrices and a gated one three: 1.4 B in all
# a mixture's matrix → the dense model's
OF_EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
FC1 = "model.layers.{}.mlp.fc1.weight"


def make_source(folder: Path, layers: int, vocabulary: int) -> None:
    """A checkpoint with Phi-1.5's shapes and random float16 weights."""
    from outgrow.model.presets import preset

    sizes = {"num_hidden_layers": layers, "vocab_size": vocabulary}
    write_random(folder, preset("phi_1_5") | sizes)


def make_dense(folder: Path, layers: int, vocabulary: int) -> None:
    """A Llama with Phi-1.5's sizes and random float16 weights, to be made a mixture of experts of.

    Its tokenizer knows a word: mergekit asks for one, and uses none where routers are random.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from outgrow.model.presets import preset

    sizes = {
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "intermediate_size": GATED_UNITS,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    write_random(folder, preset("phi_1_5") | sizes | {"rope_parameters": rope} | kind)
    words = Tokenizer(WordLevel({"<s>": 0}, unk_token="<s>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>")
    tokenizer.save_pretrained(folder)


def write_random(folder: Path, config: dict[str, Any]) -> None:
    """A checkpoint of `config` with random float16 weights."""
    import numpy as np

    from outgrow.growth.engine.shards import Entry, ShardWriter, layout
    from outgrow.model.family import family_of

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = list(family_of(config).tensors(config))
    entries = [Entry(tensor.name, "F16", tensor.shape) for tensor in tensors]
    writer = ShardWriter(folder, layout(entries))
    numbers = np.random.default_rng(0)
    for tensor in tensors:
        size = int(np.prod(tensor.shape))
        mean = "norm" in tensor.name  # 1 of a norm's scale
        values = numbers.standard_normal(size, np.float32) * 0.02 + mean
        writer.write(tensor.name, 0, values.astype(np.float16))
    writer.finish()
    writer.close()


def check_grown(source: Path, grown: Path) -> None:
    """Check that what growth copies without a factor is the source's bits: fc1's first rows and columns, in
    every layer that is a first copy.
    """
    import numpy as np

    from outgrow.model.checkpoint import Checkpoint

    layers = json.loads((grown / "growth.json").read_text())["plan"]["layers"]
    with Checkpoint(source) as small, Checkpoint(grown) as large:
        for number, layer in enumerate(layers):
            expected = small.read(FC1.format(layer))
            rows, columns = expected.shape
            inherited = large.read(FC1.format(number))[:rows, :columns]
            if not np.array_equal(inherited, expected):
                raise SystemExit(f"{grown}: fc1 of layer {number} is not that of source layer {layer}")


def check_experts(source: Path, mixture: Path) -> None:
    """Every expert of the first and the last layer of a mixture must be the source's MLP, bit for bit."""
    import numpy as np

    from outgrow.model.checkpoint import Checkpoint

    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    with Checkpoint(source) as small, Checkpoint(mixture) as large:
        for layer in (0, layers - 1):
            expected = {
                dense: small.read(f"model.layers.{layer}.mlp.{dense}.weight") for dense in OF_EXPERT.values()
            }
            for number in range(EXPERT_COUNT):
                for dense, matrix in expert_of(large, layer, number).items():
                    if not np.array_equal(matrix, expected[dense]):
                        raise SystemExit(
                            f"{mixture}: expert {number} of layer {layer} is not the source's {dense}"
                        )


def expert_of(mixture: Any, layer: int, number: int) -> dict[str, Any]:
    """An expert's matrices by the dense model's names; mergekit stacks a layer's, gate and up as one."""
    stacks = f"model.layers.{layer}.mlp.experts"
    if f"{stacks}.down_proj" not in mixture.tensors:
        expert = f"model.layers.{layer}.block_sparse_moe.experts.{number}"
        return {dense: mixture.read(f"{expert}.{own}.weight") for own, dense in OF_EXPERT.items()}

    def of_stack(name: str) -> Any:
        rows = mixture.tensors[f"{stacks}.{name}"].shape[1]
        return mixture.read(f"{stacks}.{name}", number * rows, (number + 1) * rows)

    both = of_stack("gate_up_proj")
    half = len(both) // 2
    return {"gate_proj": both[:half], "up_proj": both[half:], "down_proj": of_stack("down_proj")}


def copy_by_hand(source: Path, out: Path) -> None:
    """A mixture as one makes it by hand: load all, copy, save all. Only what PyTorch and safetensors do."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = {}
    for file in source.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            dense = next((key for key in OF_EXPERT.values() if f".mlp.{key}." in name), None)
            if dense is None:
                tensors[name] = weight
                continue
            own = next(key for key, value in OF_EXPERT.items() if value == dense)
            for expert in range(EXPERT_COUNT):
                place = f"block_sparse_moe.experts.{expert}.{own}"
                tensors[name.replace(f"mlp.{dense}", place)] = weight.clone()
    config = json.loads((source / "config.json").read_text())
    for layer in range(config["num_hidden_layers"]):
        router = torch.randn(EXPERT_COUNT, config["hidden_size"]) * 0.02
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = router.half()
    out.mkdir()
    save_file(tensors, out / "model.safetensors")
    sizes = {"num_local_experts": EXPERT_COUNT, "num_experts_per_tok": 2}
    kind = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    (out / "config.json").write_text(json.dumps(config | sizes | kind))


def check_equal(first: Path, second: Path) -> None:
    """Both checkpoints must hold the same tensors, bit for bit."""
    import numpy as np

    from outgrow.model.checkpoint import Checkpoint

    with Checkpoint(first) as a, Checkpoint(second) as b:
        if a.tensors.keys() != b.tensors.keys():
            raise SystemExit(
                f"{first} and {second} hold different tensors: "
                f"{sorted(a.tensors.keys() ^ b.tensors.keys())[:3]}"
            )
        for name in a.tensors:
            if not np.array_equal(a.read(name), b.read(name)):
                raise SystemExit(f"{name} differs between {first} and {second}")


CHILDREN: dict[str, Callable[..., None]] = {
    "make-source": make_source,
    "make-dense": make_dense,
    "check-grown": check_grown,
    "check-experts": check_experts,
    "copy-by-hand": copy_by_hand,
    "check-equal": check_equal,
}


def main() -> None:
    """Run the step of that name."""
    name, *words = sys.argv[1:]
    arguments = [int(word) if word.isdecimal() else Path(word) for word in words]
    CHILDREN[name](*arguments)


if __name__ == "__main__":
    main()
