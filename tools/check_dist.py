"""What an sdist and a wheel hold is what they should: nothing missing, nothing more.

    python tools/check_dist.py DIST...       run in a git checkout; `make dist-check` builds them first

An sdist holds every tracked file but those about the repository itself. A wheel holds the two packages, the compiled
module if there is one, and its metadata; the license, the version and the command are looked at too.
"""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ABOUT_THE_REPOSITORY = (".ci/", ".github/", ".gitignore", ".editorconfig", ".pre-commit-config.yaml")
MADE_BY_SDIST = {"PKG-INFO", "setup.cfg"}
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
IN_WHEEL = re.compile(
    r"(.*\.(py|pyi|typed)|eva_kernels/.*/README\.md|eva_lora/reporting/(templates/[^/]+|[^/]+\.json))"
)
BUILT = re.compile(r"eva_kernels/(_core\.[\w.-]+\.(so|pyd)|_build_record\.json)|eva_kernels\.libs/.*")


def tracked() -> set[str]:
    """Files that git knows or would add."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


def expected_in_sdist(files: set[str]) -> set[str]:
    return {name for name in files if not name.startswith(ABOUT_THE_REPOSITORY)}


def expected_in_wheel(files: set[str]) -> set[str]:
    packages = {name.removeprefix("python/") for name in files if name.startswith(("eva_kernels/", "python/eva_lora/"))}
    return {name for name in packages if IN_WHEEL.fullmatch(name)}


def version() -> str:
    """The one in pyproject.toml, where it is kept."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def differences(names: set[str], expected: set[str]) -> list[str]:
    return [f"missing: {name}" for name in sorted(expected - names)] + [
        f"not expected: {name}" for name in sorted(names - expected)
    ]


def check_sdist(path: Path, files: set[str]) -> list[str]:
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive if member.isfile()}
        roots = {member.name.partition("/")[0] for member in archive}
    names = {name for name in members if ".egg-info/" not in name} - MADE_BY_SDIST
    wrong = differences(names, expected_in_sdist(files))
    if roots != {f"eva_kernels-{version()}"}:
        wrong.append(f"expected everything in eva_kernels-{version()}/, got {sorted(roots)}")
    return wrong


def check_wheel(path: Path, files: set[str]) -> list[str]:
    info = f"eva_kernels-{version()}.dist-info/"
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    names = {name for name in content if not BUILT.fullmatch(name)}
    wrong = differences(names, expected_in_wheel(files) | {info + name for name in METADATA})
    if not any(name.endswith("_build_record.json") for name in content):
        wrong.append("missing: eva_kernels/_build_record.json, from which `eva-lora doctor` knows what was built")
    metadata = content.get(info + "METADATA", b"").decode()
    for line in (f"Version: {version()}", "License-Expression: Apache-2.0", "License-File: LICENSE"):
        if line not in metadata.splitlines():
            wrong.append(f"METADATA: expected the line {line!r}")
    if content.get(info + "licenses/LICENSE") != (ROOT / "LICENSE").read_bytes():
        wrong.append("licenses/LICENSE: expected the repository's")
    if "eva-lora = eva_lora.cli:main" not in content.get(info + "entry_points.txt", b"").decode():
        wrong.append("entry_points.txt: expected the command eva-lora")
    return wrong


def main(arguments: list[str]) -> None:
    if not arguments:
        raise SystemExit("expected the files to check")
    files, wrong = tracked(), []
    for path in map(Path, arguments):
        check = check_wheel if path.suffix == ".whl" else check_sdist
        found = check(path, files)
        print(f"{path.name}: {len(found)} differences" if found else f"{path.name}: as expected")
        wrong += found
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main(sys.argv[1:])
