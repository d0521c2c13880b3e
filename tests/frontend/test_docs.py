"""Every code block of the pages on the command line and the report runs, in order, as it stands there."""

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from eva_lora import EvaReport
from eva_lora.cli import main
from support.files import paragraphs, save_tiny_model, write_jsonl
from support.pages import DOCS, blocks


def run_shell(code):
    """The lines of a block; each is an eva-lora command, with its output redirected or not."""
    for line in code.splitlines():
        command, _, target = line.partition(" > ")
        program, *arguments = shlex.split(command)
        assert program == "eva-lora"
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, f"{line}\n{done.output}"
        if target:
            Path(target).write_text(done.stdout, encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    save_tiny_model(folder / "base")
    texts = paragraphs(40)
    write_jsonl(folder / "train.jsonl", [{"text": text} for text in texts])
    chats = [[{"role": "user", "content": "what is"}, {"role": "assistant", "content": text}] for text in texts]
    write_jsonl(folder / "chat.jsonl", [{"messages": chat} for chat in chats])
    return folder


@pytest.mark.filterwarnings("ignore")  # the libraries' own
def test_the_pages_code_runs(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    scope = {"__name__": "page"}
    count = 0
    for page in ("cli.md", "report.md", "choosing.md"):
        for block in blocks(f"docs/{page}"):
            count += 1
            if block.language == "sh":
                run_shell(block.code)
            else:
                exec(compile(block.code, page, "exec"), scope)
    assert count >= 10
    assert EvaReport.load("report.json") == EvaReport.load("run/report")
    assert sum(EvaReport.load("smaller/report").ranks.values()) == 60
    assert {path.suffix for path in Path("figures").iterdir()} == {".pdf", ".png", ".html", ".json"}
    assert "_EVA_LORA_COMPLETE" in Path("eva-lora-completion.bash").read_text()
    assert Path("out/eva_report/report.html").is_file()


def test_the_page_names_every_command_and_exit_code():
    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    for name in main.list_commands(None):
        assert f"| `{name}` |" in text
    for code in (0, 1, 2, 3, 70, 130):
        assert f"| {code} |" in text
