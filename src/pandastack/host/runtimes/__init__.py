"""Runtime drivers: each knows only its contract (`base`), never another driver."""
