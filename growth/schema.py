"""The schema of a source as a file of model/families: what docs/families.md, "Add a family", wants.

outgrow schema source=DIR
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields

from outgrow.growth.resolve import derived_family
from outgrow.model.base.errors import UserError, unknown
from outgrow.model.checkpoint import Checkpoint
from outgrow.model.family import Family
from outgrow.model.locate import locate

KEYS = ("source", "revision")
HEAD = '''"""{name}: derived from transformers' own class, and not rehearsed.

The receipt of a first growth tells whether it is right.

Plain numbers are this checkpoint's own; name the space that they belong to
where another size of the family has other ones.
"""

'''


def print_schema(arguments: Sequence[str]) -> None:
    """Derive the family of `source=DIR` (`revision=` pins a commit of the hub) and print it.

    Raises:
        UserError: an argument is unknown or missing, or no schema can be derived.
    """
    settings: dict[str, str] = {}
    for argument in arguments:
        key, _, value = argument.partition("=")
        settings[key] = value
    for key in settings:
        if key not in KEYS:
            unknown("key of schema", key, KEYS)
    if not settings.get("source"):
        raise UserError("source: missing; outgrow schema source=DIR")
    folder = locate(settings["source"], settings.get("revision"))
    with Checkpoint(folder) as source:
        print(family_text(derived_family(source)))


def family_text(family: Family) -> str:
    """A family as Python: a module that registers it."""
    arguments = list(_arguments(family))
    imports = []
    if any("Fraction" in argument for argument in arguments):
        imports = ["from fractions import Fraction", ""]
    letters = [letter if letter.isalnum() else "_" for letter in family.name]
    name = "".join(letters).upper()
    lines = [
        *imports,
        "from outgrow.model.family import Family, register",
        "",
        f"{name} = register(",
        "    Family(",
    ]
    lines += [f"        {argument}," for argument in arguments]
    lines += [
        '        schema="""',
        *(f"        {line}" for line in _aligned(family.schema)),
        '        """,',
        "    )",
        ")",
    ]
    head = HEAD.format(name=family.name)
    return head + "\n".join(lines)


def _arguments(family: Family) -> Iterator[str]:
    """`key=value` for all but the schema, without what is by default so."""
    for field in fields(family):
        value = getattr(family, field.name)
        standard = field.default
        if field.default_factory is not MISSING:
            standard = field.default_factory()
        if field.name != "schema" and value != standard:
            yield f"{field.name}={value!r}"


def _aligned(schema: str) -> list[str]:
    """The lines of a schema with their axes one under the other."""
    rows = [line.split(maxsplit=1) for line in schema.splitlines()]
    names = [name for name, _ in rows]
    width = max(map(len, names))
    return [f"{name:<{width}}  {axes}" for name, axes in rows]
