"""Decision of a growth: the plan, built from configs alone, with its certificate; frozen and printable."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, Protocol

from outgrow.growth import words
from outgrow.growth.certificate import Certificate, certify
from outgrow.growth.decision import Decision, LineKey, Step, followed, source_name
from outgrow.growth.expansion import AxisMap, Fill
from outgrow.growth.layers import LayerMap, among_kinds, layer_map
from outgrow.growth.operators import recipe
from outgrow.growth.recipe import Growth, Recipe
from outgrow.growth.remarks import remarks
from outgrow.model.base.errors import UserError, names_of
from outgrow.model.config import rope_of, value_faults
from outgrow.model.dtypes import is_float
from outgrow.model.family import Config, Family, Tensor, initial_deviation
from outgrow.model.headers import Stored

_Fault = tuple[str, str]  # (name with `*` for the layer, what is wrong)

# Prefixes under which a causal language model keeps the model without its head.
TRUNKS = ("model", "transformer", "gpt_neox", "model.decoder")


class Plan(Decision):
    """A decision with its certificate, its remarks and its words."""

    def __repr__(self) -> str:
        lines = words.summary(self, self.certificate.reasons)
        return "\n".join(lines)

    def describe(self) -> str:
        """The plan in words: spaces, layers, one line per module, certificate with its reasons, notes,
        remarks.
        """
        return words.describe(self, self.certificate.reasons, self.remarks)

    @cached_property
    def certificate(self) -> Certificate:
        """Lossless, or every reason why not; decided from the plan alone."""
        return certify(self)

    @cached_property
    def remarks(self) -> tuple[str, ...]:
        """Further notes: rounding, copies that stay equal, sizes that hardware dislikes
        (`growth.remarks`)."""
        return remarks(self, lossless=self.certificate.lossless)


def decide(
    growth: Growth,
    operator: str,
    options: Mapping[str, Any],
    *,
    depth: str | Sequence[int],
    noise: float,
    held: Held | None = None,
    notes: tuple[str, ...] = (),
    fresh: str = "init",
) -> Plan:
    """Decide a growth whose family is known.

    Args:
        operator, options, depth, noise, fresh: as `growth.plan` takes them.
        held: the source's tensors, where they are at hand.
        notes: on the family.

    Raises:
        UserError: unknown names (with near matches), a target smaller than the source, tensors that do not
            match the schema, …
    """
    check_growable(growth, noise)
    source_depth = growth.source["layer"]
    target_depth = growth.target["layer"]
    layers = layer_map(depth, source_depth, target_depth)
    _check_depth(layers, growth.family)
    layers = _among_kinds(layers, growth)
    decided = recipe(operator, growth, options)
    steps = tuple(_steps(growth, decided, layers))
    _check_sources(growth, steps)
    dtypes: dict[str, str] = {}
    if held is not None:
        dtypes = check_tensors(held, growth, steps)
    if fresh != "init" and not decided.inherits:
        raise UserError(f"fresh {fresh!r}: operator {operator!r} inherits nothing to match; leave it out")
    return Plan(growth, operator, options, noise, decided, layers, steps, dtypes, notes, fresh=fresh)


def check_growable(growth: Growth, noise: float) -> None:
    """Refuse a target that no operator grows this source into.

    Raises:
        UserError: another family, smaller sizes, a head that would be lost, or values that are none.
    """
    family = growth.family
    source_type = growth.source_config["model_type"]
    target_type = growth.target_config.get("model_type")
    if target_type != source_type:
        raise UserError(
            f"target: model_type {target_type!r} differs from the source's {family.name!r}; a family grows "
            "into itself only"
        )
    faults = growth.smaller
    if growth.tied and not family.ties(growth.source_config):
        faults.append(
            "target: tie_word_embeddings is true, but the source has an output head of its own that would "
            "be lost; leave it false"
        )
    if not 0 <= noise < 10:
        faults.append(
            f"noise {noise}: expected a strength relative to each tensor's root mean square, between 0 and 10"
        )
    configs = (growth.source_config, growth.target_config)
    values = dict.fromkeys(chain.from_iterable(value_faults(config, family) for config in configs))
    if not values:  # what follows computes with them
        faults += _class_faults(growth)
    UserError.collect([*faults, *values])


def _class_faults(growth: Growth) -> Iterator[str]:
    """Yield what the library's class for the target would refuse, before anything is written.

    Raises:
        UserError: a value is no size at all.
    """
    family = growth.family
    config = growth.target_config
    family.optional(config, "max_position_embeddings")
    initial_deviation(config)
    hidden = family.field_name("hidden_size")
    heads = family.field_name("num_attention_heads")
    divides = config["model_type"] in family.whole_heads
    if divides and config[hidden] % config[heads]:
        yield (
            f"target: {hidden} {config[hidden]} is no multiple of {heads} {config[heads]}, which "
            "transformers' class insists on"
        )
    for key, standard in family.follows.items():
        size = family.field_name(standard)
        source = growth.source_config
        followed_before = source.get(key) == source[size]
        if not followed_before:
            continue
        if config.get(key) not in (None, config[size]):
            yield (
                f"target: {key} {config[key]} must be {size} {config[size]}, as in the source; leave it "
                "out and it follows"
            )
    turned = family.rotary_dims(config)
    turned_before = family.rotary_dims(growth.source_config)
    if turned % 2 and turned != turned_before:
        yield (
            f"target: {turned} dims of each head would be turned by rotary positions, which turn pairs; "
            "choose an even head dim"
        )
    for key, factors in rope_of(config).items():
        is_per_pair = key in ("short_factor", "long_factor")
        if is_per_pair and isinstance(factors, list) and len(factors) != turned // 2:
            yield (
                f"target: rope_parameters.{key} has {len(factors)} entries, wanted is one for each pair of "
                f"{turned} rotary dims"
            )


def _check_depth(layers: LayerMap, family: Family) -> None:
    if any(layers.identity) and not family.spaces:
        raise UserError(
            f"depth {layers.rule!r}: new layers start as the identity where what writes to the residual "
            f"stream is zero, and family {family.name!r} has no schema that says what does; choose "
            "growth.depth=stack, interleave, proportional, top, solar, midas or a list of layers"
        )


def _check_sources(growth: Growth, steps: Sequence[Step]) -> None:
    """Look for target tensors that the source has none for: a switch of the target's adds them."""
    own = {tensor.name for tensor in growth.source_family.tensors(growth.source_config)}
    lacking = [step.tensor for step in steps if step.source is not None and step.source not in own]
    if not lacking:
        return
    names = names_of(tensor.name for tensor in lacking)
    # The switches that add them, and how the source has each.
    biases = {tensor.line.bias_if for tensor in lacking if tensor.is_bias}
    switches = biases | {tensor.line.condition for tensor in lacking}
    keys = sorted(switch.lstrip("!") for switch in switches if switch is not None)
    config = growth.source_config
    each = [f"{key}:{str(config.get(key)).lower()}" for key in keys]
    way = f"leave it as in the source ({', '.join(each)})" if each else "leave its switches as in the source"
    raise UserError(f"target: would have {names}, which the source has nothing for; {way}")


def deepened(growth: Growth, depth: str | Sequence[int]) -> dict[str, Any]:
    """The target's config with the source's lists of layers (`layer_types`) as a growth by the layer map
    leaves them; of a target with fewer layers, the first of them.
    """
    source = growth.source["layer"]
    target = growth.target["layer"]
    if target < source:
        first = tuple(range(target))
        layers = LayerMap("first", source, first, (False,) * target)
    else:
        layers = _among_kinds(layer_map(depth, source, target), growth)
    return followed(dict(growth.target_config), growth, Recipe({}), layers)


def _among_kinds(layers: LayerMap, growth: Growth) -> LayerMap:
    """Put new identity layers after their own kind, where the class makes kinds by place (leading dense
    layers).
    """
    family = growth.family
    has_kinds = any(line.only is not None for line in family.lines)
    is_deeper = layers.source != layers.target
    if layers.rule != "identity" or not has_kinds or not is_deeper:
        return layers
    copied = dict(growth.target_config)
    config = followed(copied, growth, Recipe({}), layers)
    source = _kinds_in_class(family, growth.source_config)
    target = _kinds_in_class(family, config)
    if len(target) != layers.target:
        return layers
    inherited = [source[layer] for layer in layers.layers]
    if target == inherited:
        return layers
    return among_kinds(source, target) or layers


def _kinds_in_class(family: Family, config: Config) -> list[frozenset[str]]:
    """List the names of each layer's tensors, without its prefix, as the library's class makes them of a
    config.
    """
    from outgrow.model.derive import shapes

    layered = [line.name for line in family.lines if line.only is not None]
    prefix = layered[0].partition("*")[0]
    kinds: dict[int, set[str]] = {}
    for name in shapes(config):
        in_layers = name.removeprefix(prefix)
        number, _, rest = in_layers.partition(".")
        if name.startswith(prefix) and number.isdigit():
            tensors = kinds.setdefault(int(number), set())
            tensors.add(rest)
    return [frozenset(kinds[number]) for number in sorted(kinds)]


def _steps(growth: Growth, recipe: Recipe, layers: LayerMap) -> Iterator[Step]:
    """Yield a step for every stored target tensor."""
    maps_of: dict[LineKey, tuple[AxisMap, ...]] = {}  # every layer shares its line's maps
    family = growth.family
    for tensor in family.tensors(growth.target_config, layers.layers):
        if tensor.tied:
            continue
        line = tensor.line
        key = (line.name, line.text, tensor.is_bias)
        if key not in maps_of:
            maps_of[key] = recipe.maps(tensor)
        maps = maps_of[key]
        # An identity layer passes the residual stream on: what writes to it there is zero.
        layer = tensor.layer
        passes_on = layer is not None and layers.identity[layer]
        idle = recipe.inherits and passes_on and family.writes_residual(tensor)
        source_layer = None if layer is None else layers.layers[layer]
        name = source_name(tensor, growth, source_layer)
        yield Step(
            tensor,
            source=name if recipe.inherits and not idle else None,
            maps=maps,
            zero=idle,
            next_source=_next_source(tensor, growth, layers, maps),
            beside=_beside(tensor, growth, layers) if recipe.inherits else None,
            diagonal=recipe.diagonal and _copied_both_ways(tensor, maps),
        )


def _next_source(tensor: Tensor, growth: Growth, layers: LayerMap, maps: Sequence[AxisMap]) -> str | None:
    """Name the source of indices that come from the next layer: the next one that has the tensor.

    The last of them, and tensors outside the layers, stand in for themselves.
    """
    has_next = [(axis.fill == Fill.NEXT).any() for axis in maps]
    if not any(has_next):
        return None
    if tensor.layer is None:
        return source_name(tensor, growth, None)
    own = layers.layers[tensor.layer]
    following = _of_next_layer(tensor, growth, layers, own)
    return following or source_name(tensor, growth, own)


def _beside(tensor: Tensor, growth: Growth, layers: LayerMap) -> str | None:
    """Name the second of the two tensors whose mean a layer between them takes."""
    number = tensor.layer
    if number is None or number not in layers.between:
        return None
    own = layers.layers[number]
    return _of_next_layer(tensor, growth, layers, own)


def _of_next_layer(tensor: Tensor, growth: Growth, layers: LayerMap, own: int) -> str | None:
    """Name a tensor of the next source layer after `own` that has it; None where none has."""
    having = tensor.line.layers_of(layers.source)
    later = [layer for layer in having if layer > own]
    return source_name(tensor, growth, later[0]) if later else None


def _copied_both_ways(tensor: Tensor, maps: Sequence[AxisMap]) -> bool:
    """Check whether a matrix both writes and reads copies."""
    is_matrix = len(maps) == 2
    is_linear = tensor.line.kind == "linear"
    return is_matrix and is_linear and all(axis.repeats for axis in maps)


class Held(Protocol):
    """Tensors that a growth reads, on disk or in memory."""

    @property
    def folder(self) -> Any:
        """The place of the tensors, for messages."""

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Name → format and shape."""


def _misfits(
    tensors: Iterable[Tensor], stored: Mapping[str, Stored], changed: Container[str]
) -> Iterator[str]:
    """Tell of stored tensors of another shape than the schema's, or of a format that no growth computes in.

    Args:
        changed: the patterns of the tensors that are computed; others are copied, of any format.
    """
    names_with: dict[_Fault, list[str]] = defaultdict(list)  # one of every layer is told once
    for tensor in tensors:
        entry = stored[tensor.name]
        if tensor.shape != entry.shape:
            expectation = f"{tensor.line.text!r} and config.json give shape {tensor.shape}"
            fault = f"{expectation}, the file has {entry.shape}"
            names_with[tensor.pattern, fault].append(tensor.name)
        elif not is_float(entry.dtype) and tensor.pattern in changed:
            formats = "F64, F32, F16 and BF16"
            fault = f"dtype {entry.dtype}; growth computes on {formats} weights (dequantise first)"
            names_with[tensor.pattern, fault].append(tensor.name)
    for (pattern, fault), names in names_with.items():
        everywhere = f"{pattern} ({len(names)} tensors)"
        where = names[0] if len(names) == 1 else everywhere
        yield f"{where}: {fault}"


def _wrapper(missing: Sequence[str], stored: Mapping[str, Stored]) -> str:
    """What stands before the names of all tensors that are missing; "" where that is not so."""
    if not missing:
        return ""
    first = missing[0]
    longer = [name for name in stored if name.endswith(f".{first}")]
    for name in longer:
        prefix = name.removesuffix(first)
        if all(prefix + other in stored for other in missing):
            return prefix
    return ""


def _refuse_part(checkpoint: Held, missing: list[str], schema: Container[str]) -> None:
    """Refuse a checkpoint without its head, and one whose names a wrapper has put its own before.

    Raises:
        UserError: it is one of these.
    """
    stored = checkpoint.tensors
    in_trunk = [f"{trunk}.{name}" for name in stored for trunk in TRUNKS]
    if any(name in schema for name in in_trunk):
        raise UserError(
            f"{checkpoint.folder}: holds the trunk alone ({names_of(stored)}), as a model without its head "
            "saves it; give the checkpoint of the causal language model, saved by the class that "
            "AutoModelForCausalLM takes for it"
        )
    wrapper = _wrapper(missing, stored)
    if wrapper:
        raise UserError(
            f"{checkpoint.folder}: every tensor's name begins with {wrapper!r}, as a wrapper (torch.compile, "
            "DDP, PEFT) saves what it holds; load it into the model itself and write that with "
            "save_pretrained"
        )


def check_tensors(checkpoint: Held, growth: Growth, steps: Sequence[Step]) -> dict[str, str]:
    """Check the stored tensors against the schema; return their dtypes."""
    stored = checkpoint.tensors
    family = growth.family
    tensors = family.tensors(growth.source_config)
    schema = {tensor.name: tensor for tensor in tensors}
    faults = []
    # What the schema wants and the file lacks; a tied tensor need not be stored.
    absent = [tensor for name, tensor in schema.items() if name not in stored]
    missing = [tensor.name for tensor in absent if not tensor.tied]
    if missing:
        _refuse_part(checkpoint, missing, schema)
        faults.append(
            f"{checkpoint.folder}: missing {names_of(missing)}, which the {family.name} schema and this "
            "config require"
        )
    # What the file has besides.
    outside = [name for name in stored if name not in schema]
    if strange := [name for name in outside if not family.ignores(name)]:
        faults.append(
            f"{checkpoint.folder}: unknown {names_of(strange)}, which the {family.name} schema does not have"
        )
    # Shapes and dtypes of what both have.
    present = [tensor for name, tensor in schema.items() if name in stored]
    computed = [step.tensor for step in steps if not step.is_copy]
    changed = {tensor.pattern for tensor in computed}
    faults += _misfits(present, stored, changed)
    UserError.collect(faults)
    named = [name for name in stored if name in schema]
    dtypes = {name: stored[name].dtype for name in named}
    wide = [name for name, dtype in dtypes.items() if dtype == "F64"]
    if growth.dtype is not None and wide:
        raise UserError(
            f"dtype {growth.dtype}: {names_of(wide)} are stored in float64, which would lose digits; leave "
            "dtype out"
        )
    return dtypes
