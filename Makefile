# Each target is a script of its own, so that it also works where make is missing: scripts/demo, scripts/test ...
.PHONY: help setup demo test test-nested check format lock openapi bench clean

help:
	@echo "make demo     install what is needed, start a server, run code in a sandbox, show what each step took"
	@echo "make test     the whole suite: lint, types, import contracts, unit, contract and system tests"
	@echo "make test-nested  the contract of QEMU microVMs on an emulated KVM, where this machine has none that works"
	@echo "make check    the fast part of it: no sandbox is started"
	@echo "make setup    only install what is needed"
	@echo "make bench    measure this machine"
	@echo "make format   format and sort imports"
	@echo "make lock     resolve the requirements files anew"
	@echo "make openapi  write openapi/public.json anew"
	@echo "make clean    remove what the targets above made in this folder"

setup demo test test-nested check lock bench:
	@scripts/$@

format: setup
	@.venv/bin/ruff format src tests && .venv/bin/ruff check --fix src tests

openapi: setup
	@.venv/bin/python -m pandastack.control.openapi

clean:
	@rm -rf .venv .cache build dist guest/dist
