"""Every page: its code is run by a test, its commands exist, its links lead somewhere, its tables are measured."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

import eva_kernels
import eva_lora
from eva_lora.cli import main
from support.pages import DOCS, ROOT, blocks, commands, pages

#: Blocks that are shown and not run, with the reason; each says so in a comment before it.
NOT_RUN = set()

SHOWN = {"", "text", "json", "yaml", "toml", "{toctree}", "{include}", "{eval-rst}"}  # languages that nothing runs
SHELL = {".", "cd", "mkdir", "touch"}  # of the shell; what they name, the page's own test finds


@pytest.fixture(scope="module")
def extras():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))


@pytest.fixture(scope="module")
def targets():
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def code_blocks():
    return [(page, block) for page in pages() for block in blocks(page) if block.language not in SHOWN]


def test_code_is_python_or_shell():
    assert {block.language for _, block in code_blocks()} == {"python", "sh"}


def test_every_page_with_python_is_named_by_the_test_that_runs_it():
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    with_code = {page for page, block in code_blocks() if block.language == "python" and not block.not_run}
    missing = []
    for page in sorted(with_code):
        folder = Path(page).parent  # a test may take all pages of a folder below docs/
        names = [f'{Path(page).name}"', *([f'"{folder.name}"'] if folder.parent.name else [])]
        if not any(name in text for name in names for text in tests):
            missing.append(page)
    assert missing == []


def test_blocks_that_are_not_run_are_known_with_their_reason():
    assert {(page, block.not_run) for page, block in code_blocks() if block.not_run} == NOT_RUN


def test_python_blocks_are_python():
    for page, block in code_blocks():
        if block.language == "python":
            compile(block.code, f"{page}:{block.line}", "exec")


def test_every_command_exists(extras, targets):
    checked = 0
    for page, block in code_blocks():
        saved = {b.code.splitlines()[0].removeprefix("# ") for b in blocks(page) if b.language == "python"}
        for command in commands(block.code) if block.language == "sh" else ():
            while "=" in command[0]:  # a variable of the environment
                command = command[1:]
            check(command, saved, extras, targets)
            checked += 1
    assert checked > 30


def check(command, saved, extras, targets):
    program, *arguments = command
    if program == "make":
        assert {a for a in arguments if "=" not in a} <= targets, command
    elif program == "pip":
        assert arguments[0] == "install", command
        assert set(re.findall(r"[\w-]+", " ".join(re.findall(r"\[(.+?)\]", " ".join(arguments))))) <= extras, command
    elif program == "eva-lora":
        check_options(arguments)
    elif program in ("python", "python3", "torchrun", "accelerate"):
        check_script(program, arguments, saved)
    elif program not in SHELL:
        assert (ROOT / program).is_file(), command


def check_options(arguments):
    """Parsed by click, but not converted: files that are named need not be here."""
    if arguments[0].startswith("-"):
        main.make_parser(click.Context(main)).parse_args([*arguments, "doctor"])
        return
    command = main.get_command(click.Context(main), arguments[0])
    assert command is not None, arguments
    command.make_parser(click.Context(command)).parse_args(arguments[1:])


def check_script(program, arguments, saved):
    if arguments[:1] == ["-c"]:
        compile(arguments[1], "-c", "exec")
    elif arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1]) is not None, arguments
    else:
        scripts = [a for a in arguments if a.endswith(".py")]
        assert scripts, (program, arguments)
        assert all(script in saved or (ROOT / script).is_file() for script in scripts), arguments


@pytest.mark.parametrize(
    "command",
    [
        ["make", "coffee"], ["pip", "install", ".[everything]"], ["eva-lora", "brew"],
        ["eva-lora", "init", "--no-such"], ["python", "no_such.py"], ["python", "-m", "no_such"], ["tools/no_such.sh"],
    ],
)  # fmt: skip
def test_a_command_that_does_not_exist_is_found(command, extras, targets):
    with pytest.raises((AssertionError, click.UsageError)):
        check(command, set(), extras, targets)


def test_a_block_is_cut_into_its_commands():
    code = "make a  # why\nA=1 b 'c d' > e && f |\\\n g\n\nh -c \"\ni\n\" < k\n"
    assert list(commands(code)) == [["make", "a"], ["A=1", "b", "c d"], ["f"], ["g"], ["h", "-c", "\ni\n"]]


def test_links_lead_somewhere():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_links.py", *map(str, (ROOT / page for page in pages()))],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("link", "message"),
    [
        ("other.md#a-heading", None), ("other.md", None), ("#here", None), ("https://example.org/x", None),
        ("missing.md", "there is no"), ("other.md#no-heading", "no such anchor"), ("#nowhere", "no such anchor"),
        ("http://example.org", "https"), ("https://nowhere", "https"),
    ],
)  # fmt: skip
def test_a_link_that_leads_nowhere_is_found(link, message, tmp_path):
    (tmp_path / "other.md").write_text("# A heading\n", encoding="utf-8")
    (tmp_path / "page.md").write_text(f"# Here\n\n[text]({link})\n", encoding="utf-8")
    checker = [sys.executable, ROOT / "tools" / "check_links.py", tmp_path / "page.md"]
    done = subprocess.run(checker, capture_output=True, text=True)
    assert (done.returncode == 0) == (message is None), done.stdout + done.stderr
    assert message is None or message in done.stdout


def test_figures_and_tables_are_what_the_results_say():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "draw_measured.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", [eva_lora, eva_kernels], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    text = (DOCS / "api" / f"{package.__name__}.md").read_text(encoding="utf-8")
    for name in package.__all__:
        assert re.search(rf"\b{package.__name__}\.{name}\b", text), name
        assert getattr(package, name).__doc__.strip(), name
