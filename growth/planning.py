"""Planning a growth: what the source is (`growth.resolve`), then what becomes of it (`growth.plan`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from outgrow.growth.arguments import check_arguments
from outgrow.growth.changes import CHANGES
from outgrow.growth.learned.lessons import LEARNED
from outgrow.growth.learned.planned import learned_plan
from outgrow.growth.learned.text import check_there
from outgrow.growth.mixture import changed_plan
from outgrow.growth.operators import default_noise, options_of
from outgrow.growth.plan import Plan, check_growable, decide, deepened
from outgrow.growth.recipe import Growth
from outgrow.growth.resolve import Resolved, known_family, plain_source, resolve_family
from outgrow.model.base.errors import UserError, names_of, reading
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.composite import flat
from outgrow.model.config import DTYPES, Target, resolve_target
from outgrow.model.family import Config, Family, has_schema
from outgrow.model.locate import locate
from outgrow.model.presets import PRESETS, preset

INHERIT_NOTHING = ("scratch", "source")  # arms that may train a network of another family


def plan(
    source: str | Path | Config | Checkpoint,
    target: Target,
    operator: str = "lossless",
    *,
    depth: str | Sequence[int] = "identity",
    noise: float | None = None,
    seed: int = 0,
    dtype: Literal["float32"] | None = None,
    family: Family | None = None,
    fresh: Literal["init", "match"] = "init",
    **options: Any,
) -> Plan:
    """Decide a growth without reading weights.

    Args:
        source: a checkpoint, a folder, a preset's name, or a config as a dict.
        target: a preset's name, a folder, a `transformers` config, or a dict of config overrides under their
            Hugging Face names.
        operator, options: the width recipe by name and its options (`growth.operators`).
        depth: a layer map's name, or a list with one source layer per target layer (`growth.layers`).
        noise: strength of symmetry-breaking noise on what was copied, normal, relative to each tensor's root
            mean square (that of every eighth stretch of 32 rows where there are more than 1,024); where the
            readers of copies were divided it sums to zero over them, so that a lossless growth stays
            lossless. None is the operator's own (`growth.operators.NOISE`).
        seed: of every random entry.
        dtype: what the result is stored in; None keeps the source's.
        fresh: the deviation at which a matrix's fresh entries are drawn: the class's own, or the root mean
            square of the source tensor that they stand beside (where that is not zero).
        family: the schema to go by; None takes the one of the config's `model_type`, and derives one where
            there is none.

    Raises:
        UserError: unknown names (with near matches), a target smaller than the source, tensors that do not
            match the schema, a text to learn on that is not there (where the source is more than a config), …
    """
    check_arguments(target=target, operator=operator, depth=depth, noise=noise, seed=seed, dtype=dtype)
    check_arguments(fresh=fresh)
    checkpoint = _opened(source)
    if isinstance(checkpoint, Checkpoint):
        checkpoint = plain_source(checkpoint, target, depth)
    strength = default_noise(operator) if noise is None else noise
    plan_of = partial(plan, checkpoint, depth=depth, noise=strength, seed=seed, dtype=dtype, fresh=fresh)
    config = _config_of(checkpoint)
    if operator in CHANGES:
        return changed_plan(config, target, operator, options, strength, plan_of)
    if operator in LEARNED:
        fixed = partial(plan_of, target, family=family)
        learned = learned_plan(operator, options, fixed)
        is_on_paper = isinstance(source, Mapping)  # a config alone
        if not is_on_paper:
            _check_text(learned)
        return learned
    if isinstance(target, Mapping):
        target = _said_elsewhere(flat(target), dtype)
    if family is None:
        resolved = resolve_family(checkpoint, target, depth, operator, options)
    else:
        resolved = Resolved(family)
    source_config = resolved.config or config
    target_config = resolve_target(target, source_config, resolved.family)
    target_config = _in_dtype(target_config, dtype)
    growth = Growth(resolved.family, source_config, target_config, seed, dtype)
    held = checkpoint if isinstance(checkpoint, Checkpoint) else None
    decided = decide(
        growth,
        operator,
        options,
        depth=depth,
        noise=strength,
        held=held,
        notes=resolved.notes,
        fresh=fresh,
    )
    if resolved.config is None:
        return decided
    called = _hold_against_class(decided)
    return _as_the_class_starts(decided, called)


def _config_of(source: Checkpoint | Config) -> Config:
    return source.config if isinstance(source, Checkpoint) else source


def _check_text(plan: Plan) -> None:
    """Check that the text a plan learns on is there."""
    text = None if plan.lesson is None else plan.lesson.text
    if text is not None:
        check_there(text)


def mixture_target(
    source: Config, target: Any, operator: str, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The whole config of a target that is a mixture of experts of another family, or of more experts; None
    of any other target.

    Args:
        options: of the arm, its `depth` too; an arm that is no change of family (scratch) takes those of
            `upcycle` by default.

    Raises:
        UserError: as `plan`.
    """
    is_change = operator in CHANGES
    kind = target.get("model_type") if isinstance(target, Mapping) else None
    same_family = kind in (None, source["model_type"])
    may_differ = operator in INHERIT_NOTHING and not same_family
    if not is_change and not may_differ:
        return None
    changing = operator if is_change else "upcycle"
    names = options_of(changing) if is_change else ()
    own = {name: options[name] for name in names if name in options}
    depth = options.get("depth", "identity")
    changed = plan(source, target, changing, depth=depth, noise=0.0, **own)
    return changed.target_config


def wanted_config(source: Config, target: Any) -> dict[str, Any]:
    """The whole config of a target, which may be a mixture of experts of another family, for a run that does
    not grow into it itself: a control.

    Raises:
        UserError: as `plan`.
    """
    return mixture_target(source, target, "scratch", {}) or laid_over(flat(source), target)


def laid_over(
    source: Checkpoint | Config,
    target: Target,
    operator: str = "scratch",
    depth: str | Sequence[int] = "identity",
    options: Mapping[str, Any] | None = None,
    *,
    grows: bool = False,
) -> dict[str, Any]:
    """The whole config of a target over the source's, by a schema that is derived where the source's family
    has none, with the lists of its layers as the layer map `depth` leaves them.

    Args:
        operator, options: that the derived schema is rehearsed with.
        grows: refuse what no source of this kind grows into.

    Raises:
        UserError: as `plan`.
    """
    config = source.config if isinstance(source, Checkpoint) else source
    if has_schema(config) or operator == "scratch":
        resolved = known_family(config)
    else:
        resolved = resolve_family(source, target, depth, operator, options)
    own = resolved.config or config
    complete = resolve_target(target, own, resolved.family)
    growth = Growth(resolved.family, own, complete)
    if grows:
        check_growable(growth, 0.0)
    same_family = complete.get("model_type") == own["model_type"]
    return deepened(growth, depth) if same_family else complete


def _said_elsewhere(target: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A target without the dtype that it names, where that is the one asked for; another is refused as the
    source's contradiction.
    """
    return {key: value for key, value in target.items() if not _names_dtype(key) or value != dtype}


def _names_dtype(key: str) -> bool:
    """Check for a config key of a dtype, of any part of the config."""
    last = key.rpartition(".")[2]
    return last in DTYPES


def _in_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A config that names another dtype for its weights, wherever it names one."""
    if dtype is None:
        return config
    names = set(filter(_names_dtype, config)) or {"dtype"}
    return config | dict.fromkeys(names, dtype)


def _opened(source: str | Path | Config | Checkpoint) -> Checkpoint | Config:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return flat(source)
    if not isinstance(source, str | Path):
        raise UserError(
            f"source {source!r:.80}: expected a folder, a preset's name, a checkpoint or a config as a "
            f"dict; found {type(source).__name__}"
        )
    name = str(source)
    path = Path(source)
    with reading(f"source {name!r}"):
        is_there = path.exists()
        is_folder = path.is_dir()
    if name in PRESETS and not is_folder:
        return preset(name)
    folder = locate(source) if is_there else source
    return Checkpoint(folder)


def _as_the_class_starts(plan: Plan, called: Mapping[str, str]) -> Plan:
    """A plan whose fresh entries start as the library's own class starts them, tensor by tensor."""
    from outgrow.model.derive.starts import starts

    fresh = [step.name for step in plan.steps if step.is_fresh]
    if not fresh:
        return plan
    by_name = starts(plan.target_config)
    followed = {}
    for name in fresh:
        library_name = called[name]
        if library_name in by_name:
            followed[name] = by_name[library_name]
    unknown = [name for name in fresh if name not in followed]
    notes = plan.notes
    if unknown:
        note = f"how the class starts {names_of(unknown)} could not be followed"
        notes = (*notes, f"{note}: drawn with the config's deviation")
    return replace(plan, starts=followed, notes=notes)


def _hold_against_class(plan: Plan) -> Mapping[str, str]:
    """The library's own class, built of the target's config, must have exactly the planned tensors: what it
    calls each of them.

    Tensors that its class does not have for the source either (buffers that older files carry along) are let
    pass.

    Raises:
        UserError: it has others, or others' shapes; the message names the first ones.
    """
    from outgrow.model.derive import named_shapes

    sources = {step.name: plan.source_name(step.tensor) for step in plan.steps}
    names = set(sources.values())
    source, was_called = named_shapes(plan.source_config, names)
    built, called = named_shapes(plan.target_config, sources)
    planned = {}
    for step in plan.steps:
        source_name = was_called[sources[step.name]]
        if source_name in source:
            library_name = called[step.name]
            planned[library_name] = step.shape
    differ = [name for name, shape in planned.items() if built.get(name) != shape]
    if differ:
        first = min(differ)
        raise UserError(
            f"family {plan.family.name!r} has no schema here, and {first} would become {planned[first]} "
            f"where transformers' class wants {built.get(first, 'none')} ({names_of(differ)}); what "
            "follows the sizes or layers that change was not recognised"
        )
    lacking = [name for name in built if name not in planned]
    if lacking:
        raise UserError(
            f"family {plan.family.name!r} has no schema here, and transformers' class would want "
            f"{names_of(lacking)} too, which no source layer in that place has; choose another "
            "growth.depth, such as identity_top"
        )
    return called
