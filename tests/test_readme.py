"""README.md and docs/*.md: commands parse, links and named files exist, the quick start is what CI runs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import fineweb
import train_gpt2
from lib import cli, sources

ROOT = Path(__file__).resolve().parent.parent
PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
PAGES_WITH_LINKS = PAGES | {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "log/README.md", "log/gpt2-fast/README.md")
}
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"model"}


def sh_blocks(text: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def script_commands(text: str) -> list[str]:
    """The commands in a page that run one of our scripts, in its sh blocks and between backticks, from the
    script's name on."""
    # The first line of a block may keep a command in a variable: train="python ...".
    lines = re.sub(r'^\w+="(.*)"$', r"\1", "\n".join(sh_blocks(text)), flags=re.MULTILINE).split("\n")
    inline = re.findall(r"`((?:python|torchrun) [^`]+)`", text)
    lines += [code for code in inline if "..." not in code and "--version" not in code]
    found = []
    for part in re.split(r"&&|\||\n", "\n".join(line.split("  #")[0] for line in lines)):
        words = shlex.split(part)
        start = next((n for n, word in enumerate(words) if re.fullmatch(r"\w+\.py", word)), None)
        if start is not None:
            found.append(shlex.join(words[start:]))
    return found


COMMANDS = [(name, command) for name, text in PAGES.items() for command in script_commands(text)]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


def test_the_pages_have_commands_for_every_script():
    assert {Path(command.split()[0]).stem for _, command in COMMANDS} == SCRIPTS


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_parses(page, command):
    script, *argv = shlex.split(command)
    assert (ROOT / script).is_file()
    module = importlib.import_module(Path(script).stem)
    cfg = train_gpt2.read_flags(argv) if module is train_gpt2 else cli.parse(module.Config, "", argv)
    assert isinstance(cfg, module.Config)


@pytest.mark.parametrize("page", PAGES_WITH_LINKS)
def test_every_link_within_the_repository_leads_somewhere(page):
    text = PAGES_WITH_LINKS[page]
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text)
    for target in ("".join(pair) for pair in targets):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


# This page names the files of others, too.
@pytest.mark.parametrize("page", [name for name in PAGES if name != "docs/coming-from.md"])
def test_every_named_file_exists(page):
    names = re.findall(r"`((?:lib/|tests/)?\w+\.(?:py|ipynb|sbatch))`", PAGES[page])
    folders = (ROOT, ROOT / "lib") if page == "README.md" else (ROOT,)
    assert not [name for name in names if not any((folder / name).is_file() for folder in folders)]


def test_every_name_in_the_tour_stands_in_the_code():
    code = "\n".join(p.read_text(encoding="utf-8") for f in ("", "lib") for p in (ROOT / f).glob("*.py"))
    names = re.findall(r"`([A-Za-z_][\w.]*)`", PAGES["docs/tour.md"])
    missing = {name for name in names if not re.search(rf"\b{name.split('.')[-1]}\b", code)}
    assert not {name for name in missing if not (ROOT / name).exists()}


def test_the_readme_lists_the_files_that_exist():
    (tree,) = re.findall(r"^```text\n(model\.py.*?)^```", PAGES["README.md"], flags=re.DOTALL | re.MULTILINE)
    names = {line.split()[0] for line in tree.splitlines() if line.strip()}
    assert not [name for name in names if not (ROOT / name).exists()]
    assert {f"{script}.py" for script in SCRIPTS} <= names
    rooms = {path.name for path in (ROOT / "lib").glob("*.py")} - {"__init__.py"}
    assert not [room for room in rooms if f"`{room}`" not in PAGES["README.md"]]


def test_the_readme_is_short_and_names_every_page():
    assert len(PAGES["README.md"].encode()) <= 12_000
    assert not [name for name in PAGES if name != "README.md" and f"]({name})" not in PAGES["README.md"]]


def test_ci_runs_the_two_commands_of_the_quick_start():
    quick_start = [line for line in sh_blocks(PAGES["README.md"])[0].splitlines() if line]
    assert len(quick_start) == 2 and "train_gpt2.py demo" in quick_start[0] and "pytest" in quick_start[1]
    assert "quick_start" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_source_is_in_the_table_and_in_the_help():
    (table,) = re.findall(r"^\| `--source` .*?\n\n", PAGES["docs/data.md"], flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`([a-z][\w.-]*)`", table))
    names = {*sources.HUB_SOURCES, *sources.TOKENIZED_SOURCES, "tiny-shakespeare", "pydocs"}
    long = {name for name in names if not name.endswith(("-100BT", "-350BT"))}
    assert long <= named
    assert not [name for name in long if name not in (fineweb.__doc__ or "")]
