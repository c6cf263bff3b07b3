"""Measures this machine: our own figures through the SDK over HTTP, and the bare tool's in the same run.

Runs on the machine under measure, as root. The only room beside `standalone` that uses both the SDK and the host's
parts: the SDK to be measured, the host's command lines to drive runsc by hand for the comparison.
"""
