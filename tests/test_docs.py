"""What README and docs/ show is run, what they count is what scripts and studies wrote, and every link leads
somewhere."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from argparse import Namespace
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import pytest
import yaml

import outgrow.model.family
import outgrow.model.notation
from helpers.models import TINY
from outgrow.experiments.cost import half_interval
from outgrow.experiments.ends import RECORD, read_ends
from outgrow.experiments.horizon_answer import answer
from outgrow.experiments.horizons import worths
from outgrow.experiments.study_file import Job, load_study
from outgrow.experiments.table import check_table
from outgrow.growth import grow, plan
from outgrow.growth.__main__ import GrowthLeaf
from outgrow.growth.__main__ import settings_from as growth_settings
from outgrow.growth.changes import CHANGES
from outgrow.growth.layers import LAYER_MAPS, layer_map
from outgrow.growth.learned.lessons import LEARNED
from outgrow.growth.operators import OPERATORS
from outgrow.model.base.compose import compose_config, plain
from outgrow.model.base.errors import UserError
from outgrow.model.base.settings import read
from outgrow.model.build import to_hf_config
from outgrow.model.geometry import parameter_count
from outgrow.model.presets import PRESETS, preset
from outgrow.train.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
STUDIES = sorted(path.parent.name for path in ROOT.glob("experiments/*/study.yaml"))
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def flowing(page: str) -> str:
    """The page with its line breaks taken out, for sentences."""
    return " ".join(text_of(page).split())


def blocks(page: str, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(text_of(page)) if name == language]


def sections(page: str, level: int) -> dict[str, str]:
    """heading → what stands under it, up to the next heading of that level or above."""
    parts = re.split(rf"^(#{{1,{level}}}) (.+)$", FENCE.sub("", text_of(page)), flags=re.MULTILINE)
    found = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return {title: body for marks, title, body in found if len(marks) == level}


def rows(text: str) -> list[list[str]]:
    """The cells of every row of a Markdown table."""
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("| ")
    ]


def script(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of the repository as a module."""
    monkeypatch.syspath_prepend(str((ROOT / path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


# ---- links -------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *(f"experiments/{name}/README.md" for name in STUDIES)])
def test_every_relative_link_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text_of(page)))
    broken = []
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(text_of("README.md").splitlines()) <= 130
    assert {f"({page})" for page in PAGES if page != "README.md"} <= set(
        re.findall(r"\([\w/.]+\)", text_of("README.md"))
    )


# ---- commands ----------------------------------------------------------------------------------------------


def commands(page: str) -> Iterator[list[str]]:
    """Every command of the bash blocks as words, without its comment and its environment."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if words:
                yield words


# Each of these reads the arguments of one command as its door does, and returns what the door made of them.


def train_command(arguments: list[str]) -> list[Settings]:
    from outgrow.model.base.compose import sweep_points
    from outgrow.train.compose import compose

    overrides = [argument for argument in arguments if argument != "-m"]
    if "-m" not in arguments:
        return [compose(overrides)]
    first, *_, last = sweep_points(overrides)
    # what lies between differs in one leaf, and tests/test_conf.py composes every leaf
    return [compose(first), compose(last)]


def corpus_command(arguments: list[str]) -> Any:
    from outgrow.train.corpus.__main__ import FilterSettings, InspectSettings, PrepareSettings, settings_from
    from outgrow.train.corpus.writing.settings import settings_from as write_settings

    command, *overrides = arguments
    kinds: dict[str, tuple[Any, str]] = {
        "prepare": (PrepareSettings, "prepare"),
        "inspect": (InspectSettings, "inspect"),
        **dict.fromkeys(("label", "fit", "score"), (FilterSettings, "filter")),
    }
    return write_settings(overrides) if command == "write" else settings_from(*kinds[command], overrides)


def experiments_command(command: str, arguments: list[str]) -> Namespace:
    from outgrow.experiments.__main__ import parser

    options = parser().parse_args([command, *arguments])
    if options.command in ("study", "run") and options.study:
        load_study(options.study)
    return options


def select_command(arguments: list[str]) -> list[Job]:
    from outgrow.experiments.__main__ import parser
    from outgrow.experiments.halving import question
    from outgrow.experiments.selection import jobs_of

    options = parser().parse_args(["select", *arguments])
    asked = question(options.study, options.words)
    lag = [asked.halving.lag_tokens]
    return [job for candidate in asked.candidates for job in jobs_of(asked, candidate, lag)]


def schema_command(arguments: list[str]) -> str | None:
    (argument,) = arguments
    return argument.removeprefix("source=") if argument.startswith("source=") else None


def grow_command(arguments: list[str]) -> Any:
    if arguments == ["--help"]:
        return arguments
    settings = growth_settings(arguments)
    if settings.plan_only and settings.source in PRESETS:
        return plan(settings.source, settings.target, seed=settings.seed, **settings.growth.arguments())
    return settings


def pytest_command(arguments: list[str]) -> bool:
    return all((ROOT / argument).is_file() for argument in arguments if argument.endswith(".py"))


def cost_command(arguments: list[str]) -> Any:
    from outgrow.experiments.footprint.footprint import settings_from

    return settings_from([argument for argument in arguments if "=" in argument])


def evaluate_command(arguments: list[str]) -> Any:
    from outgrow.experiments.suite.evaluate import settings_from

    return settings_from([argument for argument in arguments if "=" in argument])


def launched_command(arguments: list[str]) -> list[Settings] | None:
    """What follows `torchrun --nproc_per_node`."""
    number, *module = arguments[:3]
    is_training = number.isdecimal() and module == ["-m", "outgrow.train"]
    return train_command(arguments[3:]) if is_training else None


DOORS = {
    "grow": grow_command,
    "schema": schema_command,
    "train": train_command,
    "corpus": corpus_command,
    "study": partial(experiments_command, "study"),
    "compare": partial(experiments_command, "compare"),
    "horizons": partial(experiments_command, "horizons"),
    "select": select_command,
    "frontier": partial(experiments_command, "frontier"),
    "family": partial(experiments_command, "family"),
    "predict": partial(experiments_command, "predict"),
    "same": partial(experiments_command, "same"),
    "evaluate": evaluate_command,
    "cost": cost_command,
}


def read_by_its_door(words: list[str]) -> Any:
    """What the door of a command makes of its words; nothing where no door takes it.

    Raises:
        UserError: the door refuses it.
    """
    match words:
        case ["outgrow", door, *arguments] if door in DOORS:
            return DOORS[door](arguments)
        case ["torchrun", "--nproc_per_node", *arguments]:
            return launched_command(arguments)
        case ["python", "-m", "outgrow.train.launch", "--nproc_per_node", *arguments]:
            return launched_command(arguments)
        case ["python", "-m", "pytest", *arguments]:
            return pytest_command(arguments)
        case ["python", path, *_]:
            return (ROOT / path).is_file()
        case ["make", target]:
            return re.search(rf"^{target}:", text_of("Makefile"), re.MULTILINE)
        case ["pip", "install", "-e", extra]:
            known = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
            return set(extra.removeprefix(".[").removesuffix("]").split(",")) <= known.keys()
        case ["source", ".venv/bin/activate"] | ["lm_eval", *_]:
            return words
        case _:
            return None


# one that two pages show is read once
COMMANDS = {shlex.join(words): words for page in PAGES for words in commands(page)}


@pytest.fixture(scope="module")
def conf_of_a_reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """conf/ with the file that README tells a reader to write."""
    folder = Path(shutil.copytree(CONF, tmp_path_factory.mktemp("reader") / "conf"))
    (mine,) = blocks("README.md", "yaml")
    (folder / mine.splitlines()[1].removeprefix("# conf/")).write_text(mine)
    return folder


@pytest.fixture
def as_a_reader(conf_of_a_reader: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Compose from that folder."""
    for room in ("model.base.compose", "train.start.naming", "train.compose"):
        monkeypatch.setattr(f"outgrow.{room}.CONF", conf_of_a_reader)
    return conf_of_a_reader


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_every_command_is_one_that_the_doors_take(words: list[str], as_a_reader: Path) -> None:
    assert read_by_its_door(words), f"no door takes this, or what it names is not there: {shlex.join(words)}"


@pytest.mark.slow
def test_what_the_readme_compares_is_what_it_trains(as_a_reader: Path) -> None:
    from outgrow.model.base.compose import sweep_points
    from outgrow.train.compose import compose

    trained: dict[str, str] = {}  # folder → arm
    compared = []
    for words in commands("README.md"):
        match words:
            case ["outgrow", "train", *overrides] if "dry_run=true" not in overrides:
                for point in sweep_points([word for word in overrides if word != "-m"]):
                    settings = compose(point)
                    trained[settings.out] = settings.growth.name
            case ["outgrow", "compare", pattern]:
                compared.append(pattern)
                arms = {arm for folder, arm in trained.items() if fnmatch(folder, pattern)}
                assert {"scratch", "lossless"} <= arms, pattern
    assert len(compared) == 2


@pytest.mark.parametrize(
    "line",
    ["rm -rf runs", "outgrow shrink", "python nothing.py", "make nothing", "outgrow schema sauce=DIR"],
)
def test_a_command_that_no_door_takes_is_found(line: str) -> None:
    assert not read_by_its_door(line.split())


@pytest.mark.parametrize("line", ["outgrow grow source=DIR targt=phi_2", "outgrow study nothing"])
def test_a_command_that_its_door_refuses_is_found(line: str) -> None:
    with pytest.raises(UserError):
        read_by_its_door(line.split())


# ---- snippets ----------------------------------------------------------------------------------------------


def imports(block: str) -> list[ast.ImportFrom | ast.Import]:
    """The import statements of a snippet."""
    return [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom | ast.Import)]


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_what_the_snippets_of_a_page_import_is_there_and_public(page: str) -> None:
    for block in blocks(page, "python"):
        for statement in imports(block):
            names = [alias.name for alias in statement.names]
            assert not [name for name in names if name.startswith("_")]
            exec(ast.unparse(statement))


def test_an_import_of_what_is_not_there_is_found() -> None:
    (statement,) = imports("if True:\n    from outgrow.growth import nothing")
    with pytest.raises(ImportError):
        exec(ast.unparse(statement))


SMALL = PRESETS["tiny_source"] | TINY | {"num_key_value_heads": 3}
LARGE = (
    PRESETS["tiny_target"]
    | TINY
    | {"num_key_value_heads": 3, "hidden_size": 30, "intermediate_size": 50, "num_hidden_layers": 4}
)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_maker: Any) -> Path:
    """Where a reader stands: a tiny checkpoint under the name of a large one, presets of its sizes,
    registries that forget."""
    outgrow.model.family.families()
    monkeypatch.setattr(outgrow.model.family, "_REGISTERED", dict(outgrow.model.family._REGISTERED))
    for name in list(OPERATORS):
        monkeypatch.setitem(OPERATORS, name, OPERATORS[name])
    monkeypatch.setitem(PRESETS, "phi_1_5", SMALL)
    monkeypatch.setitem(PRESETS, "phi_2", LARGE)
    checkpoint_maker(tmp_path / "path" / "to" / "phi-1_5", preset("phi_1_5") | {"dtype": "float64"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_snippets_of_a_page_run_in_their_order(page: str, reader: Path) -> None:
    known = set(OPERATORS)
    try:
        namespace: dict[str, Any] = {}
        for block in blocks(page, "python"):
            exec(compile(block, page, "exec"), namespace)
    finally:
        for name in set(OPERATORS) - known:
            del OPERATORS[name]
    if "grown" in namespace:
        assert namespace["grown"].certificate.lossless


def test_the_schema_of_ones_own_is_right(tmp_path: Path, checkpoint_maker: Any, monkeypatch: Any) -> None:
    (example,) = (block for block in blocks("docs/families.md", "python") if "register(" in block)
    outgrow.model.family.families()
    monkeypatch.setattr(outgrow.model.family, "_REGISTERED", dict(outgrow.model.family._REGISTERED))
    exec(example, {})
    sizes = {
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
    }
    config = to_hf_config(
        {"model_type": "starcoder2", "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 1, **sizes}
    ).to_dict()
    source = checkpoint_maker(tmp_path / "source", config)
    target = {
        "hidden_size": 40,
        "num_attention_heads": 10,
        "num_key_value_heads": 5,
        "num_hidden_layers": 3,
        "intermediate_size": 31,
    }
    grown = grow(source, tmp_path / "out", target=target, noise=0.3)
    assert grown.plan.notes == ()
    assert grown.certificate.lossless, grown.certificate.reasons
    assert grown.receipt is not None
    assert grown.receipt.max_delta <= 1e-12


def test_the_leaf_of_the_operator_that_is_added_is_read(tmp_path: Path) -> None:
    (leaf,) = blocks("docs/add_an_operator.md", "yaml")
    (tmp_path / "growth").mkdir()
    (tmp_path / "growth" / "mirror.yaml").write_text(leaf)
    (tmp_path / "grow.yaml").write_text(
        (CONF / "grow.yaml").read_text().replace("growth: lossless", "growth: mirror")
    )
    faults: list[str] = []
    cfg, faults = compose_config(tmp_path, "grow", ["source=x", "target=y"])
    arm = read(GrowthLeaf, plain(cfg, faults)["growth"], "growth.", faults)
    assert not faults
    assert arm is not None
    own: dict[str, Any] = {"operator": "mirror", "depth": "identity", "noise": 0.0, "split": True}
    assert arm.arguments() == {**own, "fresh": "init"}  # which conf/grow.yaml says for every leaf


# ---- operators.md ------------------------------------------------------------------------------------------

PAGE = "docs/operators.md"
BLOCKS = {title.strip("`"): body for title, body in sections(PAGE, 3).items()}
LEAVES = sorted(path.stem for path in (CONF / "growth").glob("*.yaml"))
EVERYTHING = {
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 512,
}
DOUBLED = {"intermediate_size": 512}


def test_every_operator_has_its_block() -> None:
    known = (set(OPERATORS) | set(CHANGES) | set(LEARNED)) - {"none"}
    described = set(BLOCKS) - {"source", "Growth on the way"}
    assert described == known, (
        "docs/add_an_operator.md shows the block that an operator needs in operators.md"
    )
    assert "`growth.operator=none`" in BLOCKS["scratch"]


@pytest.mark.parametrize(
    "name", [*sorted((set(OPERATORS) | set(CHANGES) | set(LEARNED)) - {"none"}), "source"]
)
def test_a_block_tells_idea_use_options_losslessness_and_paper(name: str) -> None:
    assert re.findall(r"^\* \*\*(\w+)\.\*\*", BLOCKS[name], re.MULTILINE) == [
        "Idea",
        "When",
        "Options",
        "Lossless",
        "Paper",
    ]
    if name != "source":
        parameters = inspect.signature((OPERATORS | CHANGES | LEARNED)[name]).parameters.values()
        options = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        assert (
            set(re.findall(r"`(\w+)=\w", BLOCKS[name].split("**Options.**")[1].split("**Lossless.**")[0]))
            == options
        )


@pytest.mark.parametrize("name", sorted(set(OPERATORS) - {"none"}))
def test_what_a_block_says_of_losslessness_is_what_the_certificate_proves(name: str) -> None:
    word = re.search(r"\*\*Lossless\.\*\* (Yes|No|On spaces without a norm)", BLOCKS[name])
    assert word is not None
    proved = {
        target: plan("tiny_source", sizes, name).certificate.lossless
        for target, sizes in (("all", EVERYTHING), ("ffn", DOUBLED))
    }
    assert proved == {"all": word[1] == "Yes", "ffn": word[1] != "No"}


@pytest.mark.parametrize("name", CHANGES)
def test_what_a_block_says_of_a_mixture_is_what_the_certificate_proves(name: str) -> None:
    config = PRESETS["tiny_source"] | {"model_type": "llama", "rms_norm_eps": 1e-6}
    target = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    if name == "expert_copy":
        config, target = plan(config, target, "upcycle").target_config, {"num_local_experts": 8}
    word = re.search(r"\*\*Lossless\.\*\* (Yes|No)", BLOCKS[name])
    assert word is not None
    assert plan(config, target, name).certificate.lossless == (word[1] == "Yes")


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_operator_promises_nothing(name: str) -> None:
    assert "**Lossless.** No" in BLOCKS[name]
    how: dict[str, Any] = {"text": __file__}
    target = DOUBLED
    if name == "lesa":
        how, target = {"depth": "neighbours"}, {"num_hidden_layers": 5}
    learned = plan("tiny_source", target, name, **how)
    assert not learned.certificate.lossless
    assert "is measured and not proved" in learned.certificate.reasons[0]


def test_the_table_of_leaves_is_written_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = script("docs/write_leaves.py", monkeypatch)
    held = text_of(PAGE).split(leaves.MARKS[0])[1].split(leaves.MARKS[1])[0]
    assert held == leaves.table(), "run python docs/write_leaves.py"
    assert all(f"| `{name}` |" in held for name in LEAVES)


@pytest.mark.parametrize("name", LEAVES)
def test_every_leaf_has_its_paper(name: str) -> None:
    leaf = (CONF / "growth" / f"{name}.yaml").read_text()
    block = BLOCKS["Growth on the way" if "stages:" in leaf else yaml.safe_load(leaf)["operator"]]
    papers = re.findall(r"\d{4}\.\d{5}", leaf.splitlines()[0])
    assert all(paper in block or paper in sections(PAGE, 2)["Layer maps"] for paper in papers)
    assert f"**`{name}`**" in block or "stages:" not in leaf


def layers_row(name: str) -> str:
    """How a layer map's row begins."""
    layers = layer_map(name, 4, 6)
    return f"| `{name}` | {' '.join(layers.shown)} | {'yes' if layers.is_lossless else 'no'} |"


@pytest.mark.parametrize("name", sorted(LAYER_MAPS))
def test_every_layer_map_is_drawn(name: str) -> None:
    assert layers_row(name) in text_of(PAGE)


# ---- grow.md, notation.md ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_table_of_sizes_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = script("benchmarks/grow_sizes.py", monkeypatch)
    peaks, bench = (json.loads(text_of(f"benchmarks/{name}.json")) for name in ("grow_sizes", "bench_growth"))
    held = text_of("docs/grow.md").split(sizes.MARKS[0])[1].split(sizes.MARKS[1])[0]
    assert held == sizes.table(peaks, bench)
    assert all(sizes.figures(name)["lossless"] for name in sizes.SOURCES)
    assert sizes.minutes(bench["bytes"]["growth"], bench) == pytest.approx(bench["seconds"]["growth"] / 60)


def test_what_is_said_of_learning_rates_and_losses_is_what_the_study_found() -> None:
    best = {
        row["arm"]: row
        for row in json.loads(text_of("experiments/tiny_short_budget/comparison.json"))["rows"]
        if row["best"]
    }
    ratios = {
        arm: row["learning_rate"] / best["scratch"]["learning_rate"]
        for arm, row in best.items()
        if arm not in ("scratch", "source")
    }
    said = flowing("docs/grow.md")
    for ratio, words in (
        (1, "× 1 for `random_pad`, `tile` and `lossless_proportional`"),
        (2, "× 2 for `lossless`, `lossless_stack` and `tile_flat`"),
    ):
        assert words in said
        assert set(re.findall(r"`(\w+)`", words)) == {
            arm for arm, found in ratios.items() if found == pytest.approx(ratio)
        }
    near = ("random_pad", "lossless_stack", "lossless", "lossless_proportional")
    ends = [best[arm]["final_loss"] for arm in near]
    assert max(ends) - min(ends) < 0.02
    grown = {arm: row["final_loss"] for arm, row in best.items() if arm not in ("scratch", "source")}
    assert min(grown, key=lambda arm: grown[arm]) == "random_pad"
    assert f"a Phi of {parameter_count(preset('tiny_target')) / 1e6:.2f} M parameters" in said


def test_the_picture_of_the_notation_shows_four_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    drawing = script("docs/draw_notation.py", monkeypatch)
    figure = drawing.build()
    assert len(figure.axes) == 2 * len(drawing.MODULES)
    labels = [label.get_text() for label in figure.axes[3].get_yticklabels()]
    assert labels == ["0", "1", "2", "3", "0", "1"]  # q_proj: the third head is a copy of the first
    assert drawing.PICTURE.is_file()


@pytest.mark.slow
def test_the_schema_of_the_example_is_the_derived_one() -> None:
    indented = re.findall(
        r"^   ```schema\n(.*?)^   ```", text_of("docs/families.md"), re.DOTALL | re.MULTILINE
    )
    config = to_hf_config({"model_type": "falcon"}).to_dict()
    falcon = plan(config, {"hidden_size": 9088, "num_attention_heads": 142})
    assert outgrow.model.notation.parse_schema(indented[0]) == falcon.family.lines
    assert falcon.certificate.lossless
    assert any(note.startswith("confirmed: a tiny random model of the family") for note in falcon.notes)
    assert config["num_attention_heads"] == 71


# ---- what is counted ---------------------------------------------------------------------------------------


def test_what_is_said_of_training_is_what_the_study_found() -> None:
    """The sentence about experiments/tiny_transfer against its comparison.json."""
    found = json.loads(text_of("experiments/tiny_transfer/comparison.json"))["changes"]
    untold = "no change that the seeds can tell"
    assert {(change["plain"], change["arm"]): change["verdict"] for change in found} == {
        **{("lossless", arm): untold for arm in ("continued", "distilled", "slower")},
        ("lossless", "frozen"): "higher",
        **{("scratch", arm): untold for arm in ("g_stack", "gradual_stacking")},
    }
    assert all(change["flops"] < 1 for change in found if change["plain"] == "scratch")
    assert all(len(change["seeds"]) == 3 for change in found)
    said = flowing("docs/train.md")
    for sentence in (
        "three seeds tell neither `continued` nor `distilled` nor slower inherited entries from plain "
        "training, and `frozen` ends higher",
        "nor do they tell `g_stack` and `gradual_stacking` from scratch, which paid more FLOPs",
    ):
        assert sentence in said


def test_the_count_of_architectures_is_the_one_that_was_measured() -> None:
    """The numbers of `python benchmarks/count_architectures.py`, and that they count what the file lists."""
    result = json.loads(text_of("benchmarks/count_architectures.json"))
    confirmed = [story["axes"] for story in result["types"].values() if "refused" not in story]
    counts = result["summary"]
    assert counts["types"] == len(result["types"])
    assert (
        counts["hidden width"]
        == len(confirmed)
        == sum("confirmed" in axes["hidden width"] for axes in confirmed)
    )
    assert all(axes["hidden width"]["error"] <= 2e-5 for axes in confirmed)
    version = result["versions"]["transformers"].rpartition(".")[0]
    said = flowing("docs/families.md")
    for sentence in (
        f"Of the {counts['types']} causal language model types of transformers {version}",
        f"confirmed for **{counts['hidden width']}**; for {counts['hidden width at any ratio']} of them",
        (
            f"Heads grow too in {counts['heads too']}, feed-forward or expert sizes in "
            f"{counts['feed-forward too']},"
        ),
        f"depth in {counts['depth too']}.",
        f"{counts['held against the default config']} of the schemas were also held against",
    ):
        assert sentence in said


def test_the_families_with_a_schema_are_those_named() -> None:
    written = next(
        cells[1] for cells in rows(text_of("docs/families.md")) if cells[0].startswith("[written]")
    )
    assert set(re.findall(r"`(\w+)`", written)) == set(outgrow.model.family.families())


def test_the_tour_names_files_that_are_there() -> None:
    tour = sections("CONTRIBUTING.md", 2)["A tour of the rooms"]
    for paragraph in re.split(r"^\*\*", tour, flags=re.MULTILINE)[1:]:
        room = ROOT / paragraph.split("/")[0]
        files = re.findall(r"`([\w/]+\.py)`", paragraph)
        assert [name for name in files if not (room / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES)
def test_the_tests_that_a_page_names_are_there(page: str) -> None:
    functions = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    assert set(re.findall(r"`(test_\w+)`", text_of(page))) <= functions
    assert all((ROOT / path).is_file() for path in re.findall(r"`(tests/[\w/]+\.py)`", text_of(page)))


@pytest.mark.parametrize("page", PAGES)
def test_the_extras_that_a_page_names_are_there(page: str) -> None:
    known = tomllib.loads(text_of("pyproject.toml"))["project"]["optional-dependencies"]
    assert set(re.findall(r"'\.\[([\w-]+)\]'", text_of(page))) <= known.keys()


def test_the_hash_that_contributing_shows_is_todays() -> None:
    leaf = yaml.safe_load((CONF / "growth" / "lossless.yaml").read_text())
    assert (
        f"hash: {plan('phi_1_5', 'phi_2', 'lossless', depth=leaf['depth'], noise=leaf['noise']).hash}"
        in text_of("CONTRIBUTING.md")
    )


def test_the_first_sentence_is_what_when_growth_pays_found() -> None:
    record = ROOT / "experiments" / "when_growth_pays" / RECORD
    check_table(ROOT / "README.md", f"**{answer(worths(read_ends(record)))}**")


# ---- studies -----------------------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """True for a study that has results."""
    return any((folder / record).is_file() for record in (RECORD, "comparison.json", "results.json"))


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_its_row(name: str) -> None:
    (row,) = (cells for cells in rows(text_of("experiments/README.md")) if cells[0].startswith(f"[{name}]"))
    folder = ROOT / "experiments" / name
    assert row[1] == yaml.safe_load((folder / "study.yaml").read_text())["question"]
    if not is_run(folder):
        assert row[2:] == ["**Not run yet.**", "–", "–"]
        assert "**Not run yet.**" in (folder / "README.md").read_text()
        return
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", row[3])
    if (comparison := folder / "comparison.json").is_file():
        result = json.loads(comparison.read_text())
        opening, found, _ = row[2].partition(result["answer"])
        assert found
        if opening:  # the question is about changes: these come first, with what the seeds tell of each
            for change in result["changes"]:
                size = f"{change['difference']:+.3f} ± {change['interval']:.3f}".replace("-", "−")
                assert re.search(rf"{change['verdict']}[^`]* \(`{change['arm']}`, {re.escape(size)}", opening)
            assert len(re.findall(r"\d\.\d", opening)) == 2 * len(result["changes"])
        assert all(f"`{change['arm']}`" in row[2] for change in result["changes"])
    log = subprocess.run(
        ["git", "log", "--format=%h %as", "--", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if (
        log.returncode == 0 and len(log.stdout.splitlines()) > 1
    ):  # a shallow clone has one commit, an archive none
        assert any(line.startswith(row[4][:7]) and line.endswith(row[3]) for line in log.stdout.splitlines())


def test_in_bfloat16_says_how_far_its_losses_are_from_those_of_float32() -> None:
    exact = {
        (end.arm, end.tokens, end.seed): end.val_loss
        for end in read_ends(ROOT / "experiments" / "when_growth_pays" / RECORD)
        if end.batch_tokens == 2048 and end.learning_rate == 0.012
    }
    apart: dict[tuple[str, int], list[float]] = {}
    for end in read_ends(ROOT / "experiments" / "in_bfloat16" / RECORD):
        if (point := (end.arm, end.tokens, end.seed)) in exact:
            apart.setdefault(point[:2], []).append(end.val_loss - exact[point])
    assert sum(map(len, apart.values())) == 21  # pairs of one arm, horizon and seed
    page = text_of("experiments/in_bfloat16/README.md")
    for point in apart.keys() - {("scratch", 2_162_688), ("small", 2_162_688)}:
        told = f"{mean(apart[point]):+.4f} ± {half_interval(apart[point]):.4f}"
        assert told.replace("-", "−") in page, point


def test_every_ready_combination_is_an_arm_of_operators_or_said_why_not() -> None:
    arms = yaml.safe_load(text_of("experiments/operators/study.yaml"))["arms"]
    asked = {(arm or {}).get("growth", name) for name, arm in arms.items()}
    (reasons,) = re.findall(
        r"\*\*Not among the arms\.\*\*(.*?)\n\* ", text_of("experiments/operators/README.md"), re.S
    )
    assert [name for name in LEAVES if name not in asked and f"`{name}`" not in reasons] == []


def test_the_citation_names_the_project_and_its_version() -> None:
    citation = yaml.safe_load(text_of("CITATION.cff"))
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert [author["name"] for author in citation["authors"]] == [
        re.search(r"\d{4} (.+)", text_of("LICENSE"))[1]
    ]  # type: ignore[index]
