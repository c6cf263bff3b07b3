module pandastack/guest

go 1.24
