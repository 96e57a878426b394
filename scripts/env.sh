# Sourced by the other scripts: a virtual environment with the tested versions, made when missing.
#   VENV=.venv              where it is
#   PYTHON=python3          what makes it (3.11 or newer)
#   CONSTRAINTS=constraints.txt
#   NO_VENV=1               use the current environment as it is
#   EXTRA=                  optional dependencies to install too, such as dev

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ "${NO_VENV:-0}" != 1 ]; then
  VENV=${VENV:-.venv}
  CONSTRAINTS=${CONSTRAINTS:-constraints.txt}
  package=.${EXTRA:+[$EXTRA]}
  stamp=$(cat pyproject.toml "$CONSTRAINTS" | sha256sum | cut -c1-16)$package
  if ! grep -qxF "$stamp" "$VENV/.installed" 2>/dev/null; then
    echo "Setting up $VENV (once)"
    "${PYTHON:-python3}" -m venv "$VENV"
    "$VENV/bin/python" -m pip install -q -c "$CONSTRAINTS" -e "$package"
    echo "$stamp" >> "$VENV/.installed"
  fi
  PATH="$(cd "$VENV/bin" && pwd):$PATH"
fi
