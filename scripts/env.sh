# Sourced by the other scripts: a virtual environment with the tested versions, made when missing.
#   VENV=<repository>/.venv   where it is
#   PYTHON=python3            what makes it (3.11 or newer)
#   CONSTRAINTS=<repository>/constraints.txt
#   EXTRA=                    optional dependencies to install too, such as dev
#   NO_VENV=1                 use the current environment as it is
# Sets ROOT, the repository.

ROOT=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
if [ "${NO_VENV:-0}" != 1 ]; then
  VENV=${VENV:-$ROOT/.venv}
  CONSTRAINTS=${CONSTRAINTS:-$ROOT/constraints.txt}
  versions=$(cat "$ROOT/pyproject.toml" "$CONSTRAINTS" | sha256sum | cut -c1-16)
  # The first line names the versions, the others the extras that were installed with them.
  if [ "$(head -n 1 "$VENV/.installed" 2>/dev/null)" != "$versions" ]; then
    echo "Setting up $VENV (once)"
    "${PYTHON:-python3}" -m venv "$VENV"
    rm -f "$VENV/.installed"
  fi
  if ! grep -qxF "extra:${EXTRA:-}" "$VENV/.installed" 2>/dev/null; then
    "$VENV/bin/python" -m pip install -q -c "$CONSTRAINTS" -e "$ROOT${EXTRA:+[$EXTRA]}"
    [ -f "$VENV/.installed" ] || echo "$versions" > "$VENV/.installed"
    echo "extra:${EXTRA:-}" >> "$VENV/.installed"
  fi
  PATH="$(cd "$VENV/bin" && pwd):$PATH"
fi
