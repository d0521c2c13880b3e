#!/usr/bin/env bash
# Builds the sdist and from it the wheel, and checks them as a registry and a careful packager would: metadata (twine),
# contents (check_dist.py), the citation file (cffconvert). Everything stays in build/dist.
#   tools/check_dist.sh [python]      default: python3
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q --disable-pip-version-check build 'twine>=6.1' cffconvert
rm -rf build/dist
"$work/tools/bin/python" -m build -q --outdir build/dist .
"$work/tools/bin/python" -m twine check --strict build/dist/*
"$work/tools/bin/python" tools/check_dist.py build/dist/*
"$work/tools/bin/cffconvert" --validate -i CITATION.cff
