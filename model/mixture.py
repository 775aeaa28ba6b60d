"""Mixtures of experts (MoE): how a family with routed experts differs from the dense family whose other
tensors it shares, as data.

A rule names, for each matrix of the dense MLP, what the experts' matrices are called, and the config keys of
the number of experts, of how many a token is sent to and of their units. From it and from the dense family's
schema follows the mixture's own, in the same notation:

    model.layers.*.mlp.gate_proj              ffn <- residual     (in the layers that stay dense)
    model.layers.*.mlp.experts.{0..7}.gate_proj   unit <- residual
    model.layers.*.mlp.gate                   expert <- residual  (the router)

The test suite compares each with the library's class, tensor by tensor and logit by logit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from outgrow.model.base.errors import UserError
from outgrow.model.family import Config, Family, families
from outgrow.model.keys import only
from outgrow.model.notation import Line

_Values = tuple[Any, ...]

# spaces: the units of a routed and of the shared expert; the experts
ROUTED, SHARED, EXPERT = "unit", "shared", "expert"


@dataclass(frozen=True)
class Mixture:
    """A family of mixtures of experts, by what its class does otherwise than a dense one.

    Args:
        name: the config's `model_type`.
        architecture: the library's class.
        of: `model_type`s of the dense families whose other tensors agree, the one with a schema here first.
        experts: module of the dense MLP → that of an expert, `#` for the expert's number.
        router: the module whose rows give an expert's logit each.
        count, top_k, units: the config keys of the number of experts, of those that a token is sent to, and
            of an expert's units.
        shared: module of the dense MLP → that of the expert that every token goes through.
        shared_units: the config key of that expert's units.
        shared_of: the config key of how many experts' units those are, where they have no key of their own.
        shared_gate: the module by whose sigmoid the shared expert is multiplied; None where it is added as it
            is.
        normalised: whether the weights of the chosen experts are divided by their sum, or the config key that
            decides it.
        softmax: whether the weights are a softmax over all experts, so that without that division those of
            all experts sum to 1.
        scaled: the config key by which the combined weights are multiplied.
        correction: the tensor that is added to the router's scores for choosing alone; it starts at zero.
        dense_layers: how the config says which layers stay dense: by a list, by how many come first, or not
            at all.
        aliases: other names under which the library saves the number of experts.
        adds: config values that make the other tensors those of the dense family.
        lacks: keys of a dense config that the class does not know → the values under which they do nothing;
            None: any value.
        needs: keys that both know and understand differently → the values under which they agree.
    """

    name: str
    architecture: str
    of: tuple[str, ...]
    experts: Mapping[str, str]
    router: str
    count: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    units: str = "moe_intermediate_size"
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_units: str | None = None
    shared_of: str | None = None
    shared_gate: str | None = None
    normalised: str | bool = "norm_topk_prob"
    softmax: bool = True
    scaled: str | None = None
    correction: str | None = None
    dense_layers: str | None = None
    aliases: tuple[str, ...] = ()
    adds: Mapping[str, Any] = field(default_factory=dict)
    lacks: Mapping[str, _Values | None] = field(default_factory=dict)
    needs: Mapping[str, _Values] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The config keys that a dense config does not have."""
        own = {
            self.count,
            self.top_k,
            self.units,
            self.shared_units,
            self.shared_of,
            self.scaled,
            self.dense_layers,
            *self.adds,
        }
        if isinstance(self.normalised, str):
            own.add(self.normalised)
        return {key for key in own if key is not None}

    def size(self, config: Config, key: str) -> int:
        """A positive whole number of the config.

        Raises:
            UserError: it is missing or no such number.
        """
        value = config.get(key)
        if type(value) is not int or value < 1:
            raise UserError(
                f"config of family {self.name!r}: {key} must be a positive whole number, found {value!r}"
            )
        return value

    def count_key(self, config: Config) -> str:
        """Find the name under which a config has the number of experts."""
        keys = [key for key in self.aliases if key in config]
        return keys[0] if keys else self.count

    def shared_size(self, config: Config) -> int:
        """The units of the shared expert; 0 where the family has none."""
        if self.shared_units is not None:
            return self.size(config, self.shared_units)
        return (
            self.size(config, self.shared_of) * self.size(config, self.units)
            if self.shared_of is not None
            else 0
        )

    def normalises(self, config: Config) -> bool:
        """Check whether the weights of the chosen experts are divided by their sum."""
        if isinstance(self.normalised, str):
            return bool(config.get(self.normalised))
        return self.normalised

    def sparse_layers(self, config: Config) -> tuple[int, ...]:
        """The layers with experts."""
        layers = range(self.size(config, "num_hidden_layers"))
        match self.dense_layers:
            case "mlp_only_layers":
                step = 1
                if config.get("decoder_sparse_step") is not None:
                    step = self.size(config, "decoder_sparse_step")
                dense = config.get("mlp_only_layers") or []
                self._check(config, "mlp_only_layers", _are_counts(dense), "a list of layers' numbers")
                others = [layer for layer in layers if layer not in dense]
                return tuple(layer for layer in others if (layer + 1) % step == 0)
            case "first_k_dense_replace":
                first = config.get("first_k_dense_replace") or 0
                is_count = _are_counts([first])
                self._check(config, "first_k_dense_replace", is_count, "a number of layers")
                return tuple(layers[first:])
        return tuple(layers)

    def _check(self, config: Config, key: str, fits: bool, condition: str) -> None:
        if not fits:
            raise UserError(
                f"config of family {self.name!r}: {key} must be {condition}; found {config[key]!r:.80}"
            )

    def said_of_layers(self, sparse: Sequence[int], count: int) -> dict[str, Any]:
        """Config entries on `count` layers of which these have experts.

        Raises:
            UserError: the class cannot have just these.
        """
        dense = [layer for layer in range(count) if layer not in sparse]
        if self.dense_layers == "mlp_only_layers":
            return {"mlp_only_layers": dense, "decoder_sparse_step": 1}
        first = list(range(len(dense)))
        if dense == first and self.dense_layers == "first_k_dense_replace":
            return {"first_k_dense_replace": len(dense)}
        if dense and self.dense_layers is not None:
            raise UserError(
                f"family {self.name!r}: only the first layers can stay dense, not layers {dense}; choose "
                "sparse=last_half or all"
            )
        if dense:
            raise UserError(
                f"family {self.name!r}: every layer has experts, so layers {dense} cannot stay dense; "
                "choose sparse=all"
            )
        return {}

    def family(self, config: Config, dense: Family | None = None) -> Family:
        """The schema of a checkpoint of `config`, made of that of the `dense` family.

        Raises:
            UserError: a size is missing, or no dense family of it has a schema here.
        """
        name = self.of[0]
        dense = dense or families().get(name)
        if dense is None:
            raise UserError(
                f"family {self.name!r}: made of {self.of[0]!r}, which has no schema here; give the dense "
                "family"
            )
        count_key = self.count_key(config)
        more = {EXPERT: (count_key, 1), ROUTED: (self.units, 1)}
        if self.shared:
            experts = 1
            if self.shared_of is not None:
                experts = self.size(config, self.shared_of)
            units = self.shared_units or self.units
            more[SHARED] = (units, experts)
        lines = "\n".join(self._lines(config, dense))
        words = set(re.findall(r"\w+", lines))
        used = only(more, words)
        spaces = {**dense.more, **used}
        kinds = dense.layer_types if "layer_types" not in self.lacks else None
        return replace(dense, name=self.name, also=(), schema=lines, more=spaces, layer_types=kinds)

    def _lines(self, config: Config, dense: Family) -> Iterator[str]:
        """The dense family's lines, those of its MLP followed or replaced by those of router and experts."""
        sparse = self.sparse_layers(config)
        layers = range(self.size(config, "num_hidden_layers"))
        some = len(sparse) < len(layers)
        inside = outside = ""
        if some:
            others = [layer for layer in layers if layer not in sparse]
            inside = f" in layers {','.join(map(str, sparse))}"
            outside = f" in layers {','.join(map(str, others))}"
        of_mlp = [line for line in dense.lines if line.name in self.experts]
        last = of_mlp[-1:]
        for line in dense.lines:
            if line.name not in self.experts:
                yield f"{line.name}  {line.text}"
                continue
            if some:
                yield f"{line.name}  {line.text}{outside}"
            if not sparse:
                continue
            count = self.size(config, self.count_key(config))
            numbers = f"{{0..{count - 1}}}"
            pattern = self.experts[line.name]
            name = pattern.replace("#", numbers)
            yield f"{name}  {_axes(line, ROUTED)}{inside}"
            if line.name in self.shared:
                shared_axes = _axes(line, SHARED)
                module = self.shared[line.name]
                yield f"{module}  {shared_axes}{inside}"
            if line in last:
                yield from (f"{text}{inside}" for text in self._routers())

    def _routers(self) -> Iterator[str]:
        yield f"{self.router}  {EXPERT} <- residual"
        if self.shared_gate is not None:
            yield f"{self.shared_gate}  1 <- residual"
        if self.correction is not None:
            yield f"{self.correction}  tensor {EXPERT}"


def _are_counts(values: Any) -> bool:
    """Check for a list of whole numbers from 0 on."""
    return isinstance(values, list | tuple) and all(type(value) is int and value >= 0 for value in values)


def _axes(line: Line, space: str) -> str:
    """A dense MLP's line with its units' space replaced, without its bias."""
    arrow = "->" if line.transposed else "<-"
    return " ".join(
        space if word == "ffn" else word for word in (str(line.axes[0]), arrow, str(line.axes[1]))
    )


_REGISTERED: dict[str, Mixture] = {}


def register_mixture(mixture: Mixture) -> Mixture:
    """Make a rule known under its `model_type`."""
    _REGISTERED[mixture.name] = mixture
    return mixture


@cache
def _load() -> None:
    families()  # imports every file of model/families, those of mixtures among them


def mixtures() -> dict[str, Mixture]:
    """Every known family of mixtures by `model_type`."""
    _load()
    return dict(_REGISTERED)
