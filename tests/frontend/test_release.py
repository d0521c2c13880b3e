"""What a release is made of: one version, a citation, templates, and archives that hold what they should."""

import importlib.util
import io
import re
import subprocess
import tarfile
import zipfile
from importlib.metadata import version

import pytest
import yaml
from click.testing import CliRunner

import eva_lora
from eva_lora.cli import main
from support.pages import ROOT

TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"


@pytest.fixture(scope="module")
def check_dist():
    spec = importlib.util.spec_from_file_location("check_dist", ROOT / "tools" / "check_dist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_one_version(check_dist):
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    released = re.findall(r"^## \[(.+?)\] - (unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert released[0][0] == check_dist.version()
    assert len(released) == changelog.count("\n## ")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == check_dist.version()
    assert CliRunner().invoke(main, ["--version"]).stdout.split()[-1] == version("eva-kernels")


def test_the_changelog_uses_the_headings_of_keep_a_changelog():
    headings = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings
    assert set(headings) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "type", "license"} <= citation.keys()
    (paper,) = citation["references"]
    assert [author["family-names"] for author in paper["authors"]][::5] == ["Paischer", "Hochreiter"]
    assert paper["identifiers"][0]["value"] == "arXiv:2410.07170"


def test_issue_templates_are_forms_that_ask_for_what_doctor_prints():
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in TEMPLATES.glob("*.yml")}
    assert forms.pop("config") == {"blank_issues_enabled": True}
    assert set(forms) == {"bug_report", "feature_request"}
    for form in forms.values():
        assert {"name", "description", "body"} <= form.keys()
        assert all(part["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes") for part in form["body"])
        fields = [part for part in form["body"] if part["type"] != "markdown"]
        assert len({part["id"] for part in fields}) == len(fields)
        assert all(part["attributes"]["label"] for part in fields)
    (doctor,) = (part for part in forms["bug_report"]["body"] if part.get("id") == "doctor")
    assert doctor["validations"]["required"]
    shown = {line.split()[0] for line in doctor["attributes"]["placeholder"].splitlines()}
    assert shown <= {line.split()[0] for line in CliRunner().invoke(main, ["doctor"]).stdout.splitlines()}


def test_the_security_policy_names_functions_that_exist():
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for name in re.findall(r"`(Eva\w+)\.load`", text):
        assert callable(getattr(eva_lora, name).load)
    for command in re.findall(r"`eva-lora (\w+)", text):
        assert command in main.list_commands(None)


def archive(check_dist, kind, path, change):
    """An sdist or wheel that holds what is expected, but for ``change(contents)``."""
    files, number = check_dist.tracked(), check_dist.version()
    if kind == "sdist":
        contents = {f"eva_kernels-{number}/{name}": b"" for name in check_dist.expected_in_sdist(files)}
        contents[f"eva_kernels-{number}/PKG-INFO"] = b""
    else:
        info = f"eva_kernels-{number}.dist-info/"
        contents = dict.fromkeys(check_dist.expected_in_wheel(files), b"")
        contents |= {info + name: b"" for name in check_dist.METADATA} | {"eva_kernels/_build_record.json": b"{}"}
        contents["eva_kernels/_core.cpython-311-x86_64-linux-gnu.so"] = b""
        lines = f"Version: {number}\nLicense-Expression: Apache-2.0\nLicense-File: LICENSE\n"
        contents |= {info + "METADATA": lines.encode(), info + "licenses/LICENSE": (ROOT / "LICENSE").read_bytes()}
        contents[info + "entry_points.txt"] = b"[console_scripts]\neva-lora = eva_lora.cli:main\n"
    change(contents)
    if kind == "sdist":
        with tarfile.open(path, "w:gz") as tar:
            for name, data in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        with zipfile.ZipFile(path, "w") as wheel:
            for name, data in contents.items():
                wheel.writestr(name, data)
    return path


def without(ending):
    def change(contents):
        (name,) = (name for name in contents if name.endswith(ending))
        del contents[name]

    return change


def with_more(name):
    return lambda contents: contents.update({name: b""})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("sdist", lambda contents: None, ""),
        ("sdist", without("csrc/tracker.h"), "missing: csrc/tracker.h"),
        ("sdist", without("CITATION.cff"), "missing: CITATION.cff"),
        ("sdist", with_more("eva_kernels-0.1.0/.github/x"), "not expected: .github/x"),
        ("sdist", with_more("elsewhere/LICENSE"), "expected everything in"),
        ("wheel", lambda contents: None, ""),
        ("wheel", without("eva_lora/reporting/report.schema.json"), "missing: eva_lora/reporting/report.schema.json"),
        ("wheel", without("licenses/LICENSE"), "LICENSE"),
        ("wheel", without("_build_record.json"), "doctor"),
        ("wheel", with_more("tests/conftest.py"), "not expected: tests/conftest.py"),
        ("wheel", lambda c: c.update({n: b"MIT" for n in c if n.endswith("LICENSE")}), "expected the repository's"),
        ("wheel", lambda c: c.update({n: b"" for n in c if n.endswith("METADATA")}), "expected the line 'Version"),
    ],
)
def test_an_archive_is_held_against_what_it_should_hold(kind, change, message, check_dist, tmp_path):
    if subprocess.run(["git", "-C", ROOT, "rev-parse"], capture_output=True).returncode:
        pytest.skip("no git checkout: nothing says which files there should be")
    path = archive(check_dist, kind, tmp_path / ("x.tar.gz" if kind == "sdist" else "x.whl"), change)
    check = check_dist.check_sdist if kind == "sdist" else check_dist.check_wheel
    found = check(path, check_dist.tracked())
    assert bool(found) == bool(message), found
    assert any(message in line for line in found) or not message
