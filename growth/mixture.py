"""Plans that end in a mixture of experts: one within the source's own family, whose tensors are then handed
out to experts.

Within its family the source grows as any other does, by any operator, layer map and noise. The change to the
mixture's schema (`model.mixture`) is a mapping: every target tensor takes one tensor of that plan, cut to an
expert's units, times a factor. Router rows are fresh or copied. Nothing of it is known to the engine but a
step's maps and its `Finish`. `growth.routing` proves what it keeps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from outgrow.growth.certificate import NEUTRAL
from outgrow.growth.changes import CHANGES, ExpertCopy, Upcycling
from outgrow.growth.copying import copied
from outgrow.growth.plan import Plan
from outgrow.growth.upcycling import upcycled
from outgrow.model.base.errors import UserError, did_you_mean, in_one_line, reading
from outgrow.model.composite import flat
from outgrow.model.config import read_config
from outgrow.model.family import STANDARD, Config
from outgrow.model.keys import without
from outgrow.model.mixture import Mixture, mixtures
from outgrow.model.presets import PRESETS

Within = Callable[..., Plan]  # (target, operator, family=…): the plan in the source's own family


def changed_plan(
    source: Config, target: Any, operator: str, options: Mapping[str, Any], noise: float, within: Within
) -> Plan:
    """The plan of a growth into a mixture of experts.

    Args:
        source: the source's config.
        target: the mixture's config, a folder with one, or overrides with `model_type` and the number of
            experts.
        operator, options: of `growth.changes`.
        noise: as the plan within the family has it, for the record.
        within: makes the plan in the source's own family, of (target, operator).

    Raises:
        UserError: the families' other tensors differ, experts or units do not divide, a size is missing, …
    """
    request = _request(operator, options)
    sizes = _target_sizes(target)
    own_kind = source["model_type"] if isinstance(request, ExpertCopy) else None
    kind = sizes.pop("model_type", own_kind)
    mixture = _mixture(source, kind, sizes, request)

    def spelling(key: str) -> str:
        return mixture.count if key in mixture.aliases else key

    sizes = {spelling(key): value for key, value in sizes.items()}
    _check_keys(source, mixture, sizes)
    if isinstance(request, ExpertCopy):
        plan = copied(source, mixture, sizes, request, within)
    else:
        plan = upcycled(source, mixture, sizes, request, within)
    return replace(plan, operator=operator, options=dict(options), noise=noise)


def _request(operator: str, options: Mapping[str, Any]) -> Upcycling | ExpertCopy:
    """The operator's options, read.

    Raises:
        UserError: an option is unknown or out of range.
    """
    from outgrow.growth.operators import OPERATORS, options_of

    names = options_of(operator)
    faults = [
        f"unknown option of operator {operator!r}: {name!r}; {did_you_mean(name, names)}"
        for name in options
        if name not in names
    ]
    UserError.collect(faults)
    width = options.get("width", "lossless")
    if width not in OPERATORS:
        near = did_you_mean(str(width), OPERATORS)
        raise UserError(f"width {width!r}: no operator of this name; {near}")
    return CHANGES[operator](**options)


def _target_sizes(target: Any) -> dict[str, Any]:
    """Overrides that the target asks for."""
    if hasattr(target, "to_dict"):
        entries = flat(target.to_dict())
    elif isinstance(target, Mapping):
        entries = flat(target)
    elif str(target) in PRESETS:
        raise UserError(
            f"target {target!r}: a dense model's sizes; give "
            f"target={{model_type:mixtral,num_local_experts:8,…}} or a folder"
        )
    else:
        with reading(f"target {str(target)!r}"):
            is_folder = Path(target).is_dir()
        entries = read_config(Path(target)) if is_folder else {}
    if not entries:
        raise UserError(
            f"unknown target {str(target)!r}: no folder; give "
            f"target={{model_type:mixtral,num_local_experts:8,…}}"
        )
    return without(entries, NEUTRAL)


def _mixture(source: Config, kind: Any, sizes: Config, request: Upcycling | ExpertCopy) -> Mixture:
    """The rule of the target's family.

    Raises:
        UserError: there is none, or the other tensors of the two families differ; the message names them.
    """
    registry = mixtures()
    own = source["model_type"]
    copies = isinstance(request, ExpertCopy)
    if own in registry and not copies:
        raise UserError(
            f"upcycling: {own!r} has experts already; growth=expert_copy makes more of them, "
            "growth=lossless wider ones"
        )
    if copies:
        fits = [name for name in registry if name == own]
    else:
        fits = [name for name, rule in registry.items() if own in rule.of]
    if kind is None:
        raise UserError(
            f"target: model_type is missing, the family of the mixture; from {own!r}: "
            f"{', '.join(fits) or 'none is known'}"
        )
    if kind in fits:
        return registry[kind]
    if copies:
        raise UserError(
            "expert_copy: copies the experts of a family into itself, and knows "
            f"{', '.join(sorted(registry))}; found {own!r} → {kind!r}"
        )
    differing = _differing(source, str(kind), sizes)
    goes = f"into {' or '.join(fits)}" if fits else "into no mixture that is known here"
    fault = f"{own!r} cannot be upcycled into {kind!r}"
    raise UserError(f"{fault}: {differing}; {own!r} goes {goes}")


def _differing(source: Config, kind: str, sizes: Config) -> str:
    """The tensors outside the MLP by which two classes differ, in words."""
    from outgrow.model.build import to_hf_config
    from outgrow.model.derive import library_knows
    from outgrow.model.derive.probe import shapes

    if not library_knows({"model_type": kind}):
        return "transformers has no causal language model of that type"
    try:
        shared = without(source, NEUTRAL)
        complete = to_hf_config({**shared, **sizes, "model_type": kind})
        before = _starred(shapes(source))
        after = _starred(shapes(flat(complete.to_dict())))
    except Exception as fault:  # the library's classes raise every kind
        return f"its class does not build with the source's sizes ({in_one_line(fault, 160)})"
    alone = [f"{name} only in the source" for name in before - after]
    alone += [f"{name} only in the target" for name in after - before]
    if not alone:
        return "their other tensors have the same names, and no rule for the pair is known here"
    more = "; …" if len(alone) > 6 else ""
    first = "; ".join(sorted(alone)[:6])
    return f"their other tensors differ ({first}{more})"


def _starred(shapes: Mapping[str, Any]) -> set[str]:
    """Names with `*` for the layer, without those of MLPs, experts and routers."""
    names = set()
    for name in shapes:
        words = ["*" if word.isdigit() else word for word in name.split(".")]
        names.add(".".join(words))
    of_experts = re.compile(r"\.mlp\.|moe|expert|feed_forward|router")
    return {name for name in names if not of_experts.search(name)}


def _check_keys(source: Config, mixture: Mixture, sizes: Config) -> None:
    """Refuse keys that neither the source nor the mixture's class knows, with near matches."""
    keys = {*source, *mixture.keys, *STANDARD}
    if sizes.keys() - keys:  # the class is asked only then: importing it takes longer than planning
        from outgrow.model.derive import whole_config

        keys |= whole_config({"model_type": mixture.name}).keys()
    UserError.collect(
        f"target: unknown config key {key!r}; {did_you_mean(key, keys)}" for key in sizes if key not in keys
    )
