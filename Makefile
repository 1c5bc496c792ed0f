# Everything a fresh machine needs: `make join` trains, `make test` proves it works.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
ALONE := tests/bootstrap tests/e2e tests/netlab

.PHONY: join test setup check clean

join: setup
	@$(VENV)/bin/python -m peer join $(ARGS)

# Most tests fill the cores together; those with many processes or a kernel of their own have the
# machine to themselves. Status 5: ARGS chose none of the one kind or the other.
test: setup check
	@$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(addprefix --ignore=,$(ALONE)) $(ARGS) || test $$? -eq 5
	@$(VENV)/bin/python -m pytest $(ALONE) $(ARGS) || test $$? -eq 5

check: setup
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, and $(PYTHON) is older (or missing)."; \
	  echo "Next step: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "The virtual environment could not be made."; \
	  echo "Next step (Debian, Ubuntu): apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (once; torch is the large part) ..."
	@$(VENV)/bin/python -m pip install --quiet --upgrade-strategy only-if-needed -e '.[dev]'
	@$(VENV)/bin/python -c 'from tensorcodecs.backend import warm_up; warm_up(print)'
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache
