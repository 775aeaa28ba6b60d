"""A dry run against counts that were made in other ways: a meta-device model, real saved tensors, real
allocations, arithmetic by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.profiler import profile

from helpers.families import config_of
from outgrow.model.base.compose import CONF
from outgrow.model.base.errors import UserError
from outgrow.model.build import build_model, to_hf_config
from outgrow.model.geometry import flops_per_token
from outgrow.model.hollow import hollow, size_of
from outgrow.model.presets import preset
from outgrow.model.twin import tiny_twin
from outgrow.train.compose import compose
from outgrow.train.loss import fused_cross_entropy
from outgrow.train.machine.activations import _kept, kept_by, on_fakes
from outgrow.train.machine.compile import fuse_activations, layers_of
from outgrow.train.machine.device import MEMORY_GIB, PEAK_BF16_FLOPS, named
from outgrow.train.machine.forecast import GIB, forecast, sustained, target, tell
from outgrow.train.machine.memory import gathered, logits
from outgrow.train.optimizer import build_optimizer
from outgrow.train.settings import Settings
from outgrow.train.start.stages import stages_of
from outgrow.train.start.way import find_attention

PHI_2 = ["experiment=phi_1b", "growth=lossless", "dry_run=true"]


def phi_2(gpus: int, *more: str) -> Settings:
    return compose([*PHI_2, f"forecast.gpus={gpus}", "train.batch_tokens=786432", *more])


@pytest.fixture(scope="module")
def on_meta() -> Any:
    """Phi-2 as transformers builds it, without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(to_hf_config(preset("phi_2")))


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "sharding"), [(1, "none"), (8, "none"), (8, "full"), (96, "full")])
def test_phi_2_on_a100s_is_what_a_meta_device_counts(on_meta: Any, gpus: int, sharding: str) -> None:
    found = forecast(phi_2(gpus, f"sharding={sharding}", "train.checkpointing=true"))
    count = sum(p.numel() for p in on_meta.parameters())
    shards = gpus if sharding == "full" else 1
    assert found.parameters == count == sum(entries for _, entries in found.groups.values()) == 2_779_683_840
    several = found.pieces > 1
    states = (found.memory.weights, found.memory.gradients, found.memory.optimizer)
    assert states == (4 * count / shards, 4 * count / shards if several else 0.0, 8 * count / shards)
    assert found.pieces == {1: 96, 8: 12, 96: 1}[gpus]
    assert found.steps == 1_000_000_000 // 786432
    ends = 51200 * 2560 * 2 + 51200 + 2 * 2560
    layer, head = (count - ends) / 32, 51200 * 2560
    tokens, width = 4 * 2048, 2 if shards > 1 else 4
    inputs_of_layers, one_layer = 32 * tokens * 2560 * width, tokens * (20 * 2560 * width + 2 * 10240 * 4)
    if shards > 1:  # the peak is in the last layer's backward pass
        assert found.memory.gathered == 2 * (2 * layer + ends) + 4 * layer
        assert found.memory.logits == 0
        kept = found.memory.activations - 2 * (layer + head)
        assert inputs_of_layers + one_layer / 2 < kept < inputs_of_layers + 2 * one_layer
    else:  # at the end of the forward pass, when autocast still has its copies of the weights
        assert found.memory.gathered == 0
        assert found.memory.logits == 4 * 1024 * 51200 + 4 * head + 2 * 4 * tokens * 2560
        kept = found.memory.activations - 2 * 32 * layer
        assert inputs_of_layers <= kept < inputs_of_layers + 2 * tokens * 2560 * 4 + 2**20
    assert found.hours == pytest.approx(found.flops / gpus / 312e12 / 0.5 / 3600)
    matrices = 32 * (4 * 2560**2 + 2 * 2560 * 10240) + 51200 * 2560
    assert found.flops_per_token == pytest.approx(6 * matrices + 3 * 2 * 32 * 32 * 160 * 2049 / 2)


@pytest.mark.slow
def test_a_run_on_one_gpu_fits_only_with_checkpointing() -> None:
    eight = ("train.micro_batch=8",)
    said = {option: tell(phi_2(1, f"train.checkpointing={option}", *eight)) for option in ("true", "false")}
    assert ", fits in 80 GiB" in said["true"]
    assert "does not fit in 80 GiB" in said["false"]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", ["phi", "llama", "gpt2"])
def test_activations_are_what_a_real_forward_pass_keeps(family: str, bf16: bool) -> None:
    network: Any = build_model(config_of(family), seed=0, attention="eager").train()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with (
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        network.base_model(input_ids=torch.zeros(3, 16, dtype=torch.int64), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    with FakeTensorMode():
        fake = build_model(config_of(family), seed=0, attention="eager")
    assert kept_by(fake, 3, 16, bf16=bf16).loss == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("fused", [True, False])
def test_the_losses_peak_is_what_pytorch_allocates(fused: bool) -> None:
    vocab, tokens, width = 4000, 4096, 64
    head, hidden = nn.Linear(width, vocab), torch.randn(tokens, width, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.int64)
    with profile(profile_memory=True) as profiled:
        if fused:
            fused_cross_entropy(hidden, head, targets, "mean").backward()
        else:
            functional.cross_entropy(head(hidden), targets).backward()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    peak = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    told = max(logits({"vocab_size": vocab, "hidden_size": width}, tokens, fused=fused))
    assert told == pytest.approx(peak, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizers_state_takes_what_is_told(name: str) -> None:
    settings = compose(["growth=scratch", "target=tiny_target", f"optimizer={name}", "forecast.gpus=1"])
    network = build_model(preset("tiny_target"), seed=0)
    optimizer = build_optimizer(network, settings.optimizer)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    real = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    assert forecast(settings).memory.optimizer == real


def test_a_sharded_model_holds_two_layers_and_the_ends_whole() -> None:
    network = build_model(config_of("phi", num_hidden_layers=4), seed=0)
    layer = sum(p.numel() for p in layers_of(network)[0].parameters())
    ends = sum(p.numel() for name, p in network.named_parameters() if ".layers." not in name)
    head = network.get_output_embeddings().weight.numel()
    exchanged = 4 * layer  # one layer's gradients, in float32
    held, kept = gathered(network, 2, reshard=True), gathered(network, 2, reshard=False)
    assert (held.loss, held.backward) == (2 * (layer + ends), 2 * (2 * layer + ends) + exchanged)
    assert (kept.loss, kept.backward) == (2 * (4 * layer + ends), 2 * (4 * layer + ends) + exchanged)
    assert held.gradients == 2 * (layer + head)
    assert held.reduced == (2 + 4) * ends + exchanged


@pytest.mark.slow
def test_phi_2s_budget_in_the_documents_is_computed() -> None:
    """1.4 T tokens on 96 A100 in 14 days: the rate and the utilisation that they mean."""
    settings = phi_2(96, "forecast.days=14", "train.budget_tokens=1_400_000_000_000")
    flops = 1_400_000_000_000 // 786432 * 786432 * forecast(settings).flops_per_token
    rate, mfu = sustained(flops, 96, 14, 312e12)
    assert rate == pytest.approx(flops / 96 / 14 / 24 / 3600)
    said = tell(settings)
    numbers = [f"{rate / 1e12:.1f} TFLOP/s", f"{mfu:.1%}", f"{flops:.4g}"]
    page = " ".join((Path(__file__).parents[2] / "docs" / "train.md").read_text().split())
    assert all(number in said for number in numbers)
    assert all(number in page for number in numbers)


@pytest.mark.slow
def test_a_dry_run_needs_no_source_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    from outgrow.train.__main__ import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train", *PHI_2])
    main()
    said = capsys.readouterr().out
    assert "2,779,683,840 parameters" in said
    assert "(8 × 8 × 4 windows of 2048)" in said
    assert not list(tmp_path.iterdir())
    assert float(re.search(r"= ([\d.]+), (fits|does not fit) in 80 GiB", said)[1]) == pytest.approx(  # type: ignore[index]
        forecast(compose(PHI_2)).memory.total / GIB, abs=0.06
    )


@pytest.mark.slow
def test_a_dry_run_tells_what_dropout_makes_of_processes() -> None:
    start = ["growth=scratch", "forecast.gpus=1", "train.context=8", "train.batch_tokens=16"]
    gpt2 = "target={model_type:gpt2,vocab_size:64,n_embd:16,n_layer:1,n_head:2,n_positions:8}"
    line = next(line for line in tell(compose([*start, gpt2])).splitlines() if line.startswith("dropout "))
    assert "dropout 0.1: masks are drawn for each micro-batch" in line
    assert "dropout" not in tell(compose([*start, "target=tiny_target"]))


@pytest.mark.slow
def test_what_cannot_be_forecast_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"forecast.gpus: 96 do not divide the 256 windows .* try train.batch_tokens=589824"
    ):
        forecast(compose([*PHI_2, "forecast.gpus=96"]))
    with pytest.raises(UserError, match="no folder here"):
        forecast(compose([*PHI_2, "growth=source"]))
    # what the target leaves out is the source's: never the class's own default
    with pytest.raises(
        UserError, match="changes the config of the source 'runs/none', and that is no folder"
    ):
        forecast(compose(["growth=upcycle", "source=runs/none", "target={model_type:mixtral}"]))
    # a target with every size is whole by itself, in its family's own spelling too
    sizes = "vocab_size:64,n_embd:16,n_layer:2,n_head:2"
    spelled = compose(["growth=scratch", "source=runs/none", f"target={{model_type:gpt2,{sizes}}}"])
    assert target(spelled)["n_embd"] == 16
    tiny = ["growth=scratch", "target=tiny_target", "forecast.gpus=1"]
    assert "not known for Abacus; known: B200" in tell(compose([*tiny, "forecast.device=Abacus"]))
    hours = {
        device: forecast(compose([*tiny, f"forecast.device={device}"])).hours for device in ("A100", "H100")
    }
    assert hours["H100"] == pytest.approx(hours["A100"] * 312 / 989)  # type: ignore[operator]


@pytest.mark.slow
def test_a_run_that_grows_on_its_way_is_cheaper_by_what_its_smaller_networks_save() -> None:
    common = [
        "source=x",
        "target=phi_2",
        "train.context=2048",
        "train.batch_tokens=16384",
        "train.budget_tokens=1638400",
        "dry_run=true",
    ]
    leaf = next(
        path.stem for path in sorted((CONF / "growth").glob("*.yaml")) if "stages:" in path.read_text()
    )
    staged = compose([*common, f"growth={leaf}"])
    whole = forecast(compose([*common, "growth=lossless"]))
    stages = stages_of(staged, preset("phi_2"))
    assert len(stages) > 1
    told = forecast(staged)
    by_hand = sum(
        (stage.last - stage.first) * 16384 * flops_per_token(stage.config, 2048) for stage in stages
    )
    assert told.flops == pytest.approx(by_hand)
    assert told.flops < whole.flops
    assert told.memory == whole.memory  # of the last, the largest


@pytest.mark.slow
def test_a_teacher_is_told_to_be_left_out() -> None:
    leaf = next(
        path.stem for path in sorted((CONF / "transfer").glob("*.yaml")) if "teacher:\n" in path.read_text()
    )
    assert "not counted   the teacher" in tell(compose([*PHI_2, f"transfer={leaf}"]))
    assert "not counted" not in tell(compose(PHI_2))


@pytest.mark.slow
def test_what_is_frozen_is_told_to_be_counted_whole() -> None:
    assert "too much      what is frozen" in tell(compose([*PHI_2, "transfer=frozen"]))
    assert "too much" not in tell(compose(PHI_2))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["phi", "llama"])
def test_with_checkpointing_the_layer_that_is_computed_again_is_counted(family: str, attention: str) -> None:
    """Against the peak of what PyTorch allocates in a forward and a backward pass."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = config_of(family, num_hidden_layers=4, max_position_embeddings=128, **sizes)
    network: Any = build_model(config, seed=0, attention=attention).train()
    fuse_activations(network)  # as in a run
    network.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with profile(profile_memory=True) as profiled:
        out = network.base_model(
            input_ids=torch.zeros(32, 64, dtype=torch.int64), use_cache=False
        ).last_hidden_state
        out.backward(torch.ones_like(out))
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    peak = max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    with FakeTensorMode():
        fake = build_model(config, seed=0, attention=attention)
        fuse_activations(fake)
    assert 0.93 < kept_by(fake, 32, 64, bf16=False, checkpointing=True).backward / peak < 1.1


@pytest.mark.parametrize(
    ("device", "peak", "memory"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12, 80),
        ("NVIDIA A100-PCIE-40GB", 312e12, 40),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA L40", 181e12, 45),
        ("NVIDIA L40S", 362e12, 45),
        ("NVIDIA L4", 121e12, None),
        ("NVIDIA RTX A1000", None, None),
        ("NVIDIA A10G", None, None),
        ("NVIDIA H100 PCIe", 756e12, 80),
        ("NVIDIA H100 80GB HBM3", 989e12, 80),
        ("NVIDIA GeForce RTX 4090", 165e12, 24),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None),
        ("NVIDIA GeForce RTX 3090 Ti", None, None),
        ("NVIDIA A40-48Q", None, None),
        ("NVIDIA A100-SXM-64GB", None, None),
        ("NVIDIA H100 NVL", 835e12, 87),
        ("NVIDIA H200 NVL", 835e12, 131),
        ("NVIDIA RTX 4000 Ada Generation", None, None),
    ],
)
def test_devices_are_told_by_their_exact_names(device: str, peak: float | None, memory: float | None) -> None:
    assert (named(PEAK_BF16_FLOPS, device), named(MEMORY_GIB, device)) == (peak, memory)


@pytest.mark.slow
def test_the_experiment_fits_and_what_does_not_is_told_the_way_out() -> None:
    assert ", fits in 80 GiB" in tell(compose(PHI_2))
    whole = [*PHI_2, "train.checkpointing=false", "train.micro_batch=8"]
    said = tell(compose(whole))
    assert "does not fit in 80 GiB" in said
    for key in ("sharding=full", "train.checkpointing=true", "train.micro_batch=4"):
        assert f"with {key}: {forecast(compose([*whole, key])).memory.total / GIB:.1f} GiB, fits" in said


def test_a_dry_run_says_what_decays_and_which_machine_it_assumes() -> None:
    given = ["growth=scratch", "target=tiny_target", "forecast.gpus=2", "forecast.device=L4"]
    said = tell(compose([*given, "optimizer.weight_decay=0.3"])).splitlines()
    assert "assumed       2 × L4, whatever this machine has (forecast.gpus, forecast.device)" in said
    groups = {line.split()[0]: line for line in said if line.startswith("  ")}
    assert groups["decayed"].endswith(" in 1 tensor: the output head; weight decay 0.3")
    decays = {name: line.rpartition("; ")[2] for name, line in groups.items()}
    decayed = "weight decay 0.3"
    assert decays == {"hidden": decayed, "decayed": decayed, "untouched": "no weight decay"}


@pytest.mark.slow
def test_a_device_of_unknown_memory_is_said_to_be_one() -> None:
    given = ["growth=scratch", "target=tiny_target", "forecast.gpus=1"]
    said = tell(compose([*given, "forecast.device=L4"]))
    assert "; how much memory L4 has is not known (sharding none)" in said
    assert "FLOP/s × MFU" in said
    assert "hours         not known for A40-48Q" in tell(compose([*given, "forecast.device=A40-48Q"]))


VALUES: dict[str, dict[str, Any]] = {  # classes that ask for values in their forward pass
    "dbrx": {"attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000.0}},
    "jetmoe": {},
    "longcat_flash": {"zero_expert_num": 0},
    "xlm": {"causal": True},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
}


@contextlib.contextmanager
def as_it_is(network: Any) -> Iterator[None]:
    yield


@pytest.mark.slow
@pytest.mark.parametrize("kind", VALUES)
def test_where_a_class_asks_for_values_a_hollow_network_keeps_what_a_real_one_does(kind: str) -> None:
    config = tiny_twin(to_hf_config({"model_type": kind, **VALUES[kind]}).to_dict()).config
    with FakeTensorMode():
        fake = build_model(config, seed=0, attention="eager")
    with pytest.raises(UserError, match="depends on values"):
        _kept(fake, 3, 32, bf16=False, checkpointing=False, world=on_fakes, size=size_of)
    real: Any = build_model(config, seed=0, attention="eager")
    here = _kept(real, 3, 32, bf16=False, checkpointing=False, world=as_it_is, size=size_of)
    hollow = kept_by(fake, 3, 32, bf16=False)
    assert hollow.loss == pytest.approx(here.loss, rel=0.02)  # xlm's indices beside it
    assert hollow.backward == pytest.approx(here.backward, rel=0.02)
    assert hollow.end == pytest.approx(here.end, rel=0.02)


@pytest.mark.slow
def test_short_passes_of_a_hollow_network_continue_to_the_context() -> None:
    config = tiny_twin(
        to_hf_config({"model_type": "jetmoe", "max_position_embeddings": 512}).to_dict()
    ).config
    with FakeTensorMode():
        fake = build_model(config, seed=0, attention="eager")
    long = _kept(fake, 2, 400, bf16=True, checkpointing=True, world=hollow, size=size_of)
    short = kept_by(fake, 2, 400, bf16=True, checkpointing=True)
    assert astuple(short) == pytest.approx(astuple(long), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dbrx", "xmod"])
def test_what_a_class_cannot_train_is_refused_by_a_dry_run_as_by_a_run(kind: str) -> None:
    config = tiny_twin(to_hf_config({"model_type": kind, **VALUES[kind]}).to_dict()).config
    with pytest.raises(UserError) as by_run:
        find_attention(config, "auto", torch.device("cpu"), "bf16")
    assert str(by_run.value).startswith(f"train.precision=bf16: {kind} does not train in it")
    sizes = ["train.precision=bf16", "train.context=32", "train.batch_tokens=128"]
    settings = compose(["growth=scratch", "target=tiny_target", "forecast.gpus=1", *sizes])
    with pytest.raises(UserError) as by_dry_run:
        forecast(dataclasses.replace(settings, target=config))
    assert str(by_dry_run.value) == str(by_run.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixtral", "gemma3_text"])
def test_a_dry_run_of_other_classes_needs_no_weights(kind: str) -> None:
    config = tiny_twin(to_hf_config({"model_type": kind}).to_dict()).config
    settings = compose(
        [
            "growth=scratch",
            "target=tiny_target",
            "forecast.gpus=1",
            "train.context=32",
            "train.batch_tokens=128",
        ]
    )
    assert forecast(dataclasses.replace(settings, target=config)).memory.activations > 0


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("smollm3", "transformers cannot build model_type 'smollm3' with it (AssertionError: Padding_idx"),
        ("nemotron", "transformers cannot build model_type 'nemotron' with it (TypeError: "),
        ("minicpm3", "of which one is 0 here; are there more key and value heads than heads?"),
        ("stablelm", "the sizes of its config do not go together"),
    ],
)
def test_sizes_that_a_class_cannot_have_are_told_in_one_line(kind: str, told: str) -> None:
    """A target of four sizes whose class has others by default: 32 key and value heads, say."""
    sizes = "vocab_size:320,hidden_size:64,num_attention_heads:4,num_hidden_layers:4"
    target = f"target={{model_type:{kind},{sizes}}}"
    settings = compose(["experiment=tiny", "growth=stack_in_trunk", "source=null", target])
    with pytest.raises(UserError, match=re.escape(told)):
        forecast(settings)
