# Each target is a script of its own, so that it also works where make is missing: scripts/demo, scripts/test ...
.PHONY: help setup demo test check format lock openapi bench clean

help:
	@echo "make demo     install what is needed, start a server, run code in a sandbox, show what each step took"
	@echo "make test     the whole suite: lint, types, import contracts, unit, contract and system tests"
	@echo "make check    the fast part of it: no sandbox is started"
	@echo "make setup    only install what is needed"
	@echo "make bench    measure this machine"
	@echo "make format   format and sort imports"
	@echo "make lock     resolve the requirements files anew"
	@echo "make openapi  write openapi/public.json anew"
	@echo "make clean    remove what the targets above made in this folder"

setup demo test check lock bench:
	@scripts/$@

format: setup
	@.venv/bin/ruff format src tests && .venv/bin/ruff check --fix src tests

openapi: setup
	@.venv/bin/python -m pandastack.control.openapi

clean:
	@rm -rf .venv .cache build dist guest/dist
