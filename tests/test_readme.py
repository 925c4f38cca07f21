"""The README's commands parse, its files exist, and its quick start is what CI runs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

import fineweb
import train_gpt2

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line
]
OF_SCRIPTS = [command for command in COMMANDS if re.search(r"\w+\.py", command)]


def test_the_readme_has_commands_for_every_script():
    named = {match for command in OF_SCRIPTS for match in re.findall(r"(\w+)\.py", command)}
    scripts = {path.stem for path in ROOT.glob("*.py")}
    libraries = {"model"}
    assert named == scripts - libraries


@pytest.mark.parametrize("command", OF_SCRIPTS)
def test_every_command_parses(command):
    for part in re.split(r"&&|\|", command):
        words = shlex.split(part)
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            continue
        flags = words[words.index(script) + 1 :]
        module = importlib.import_module(Path(script).stem)
        cfg = train_gpt2.read_flags(flags) if module is train_gpt2 else tyro.cli(module.Config, args=flags)
        assert isinstance(cfg, module.Config)


def test_every_file_of_the_tree_exists():
    (tree,) = re.findall(r"^```text\n(model\.py.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    names = [line.split()[0] for line in tree.splitlines() if line.strip()]
    assert len(names) > 12 and not [name for name in names if not (ROOT / name).exists()]


def test_every_picture_and_link_into_the_repository_exists():
    targets = [t for t in re.findall(r"\]\(([^)#]+)", README) if not t.startswith("http")]
    assert targets and not [target for target in targets if not (ROOT / target).exists()]


def test_ci_runs_the_two_commands_of_the_quick_start():
    quick_start = [line for line in BLOCKS[0].splitlines() if line]
    assert len(quick_start) == 2 and "train_gpt2.py demo" in quick_start[0] and "pytest" in quick_start[1]
    assert "quick_start" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_every_source_is_in_the_table_and_in_the_help():
    (table,) = re.findall(r"^\| `--source` .*?\n\n", README, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`([a-z][\w.-]*)`", table.replace("`-", "`fineweb-")))
    sources = {*fineweb.HUB_SOURCES, *fineweb.TOKENIZED_SOURCES, "tiny-shakespeare", "pydocs"}
    long = {name for name in sources if not name.endswith(("-100BT", "-350BT"))}
    assert long <= named
    assert not [name for name in long if name not in (fineweb.__doc__ or "")]
