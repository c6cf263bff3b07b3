"""`python -m pandastack.cli`"""

from pandastack.cli.main import app

app(prog_name="pandastack")
