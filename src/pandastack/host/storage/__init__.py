"""Bytes on this host: the images sandboxes start from."""
