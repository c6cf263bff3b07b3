"""The commands, in this process and as programs of their own."""
