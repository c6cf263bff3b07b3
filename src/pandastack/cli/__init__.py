"""The `pandastack` command: runs in a terminal; a user of the SDK, nothing more."""
