"""The promises about state (pause, hibernate, wake, snapshot, fork), over the real host on every runtime of this machine.

Every runtime inherits these texts: a line here that only one of them can keep is wrong. What each of them needs is said in
`test_runtime`. What only a real kernel can show (randomness, clocks, listeners) is in `tests/system`.
"""
