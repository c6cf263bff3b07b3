"""Shapes that cross a process boundary. No I/O, no state; every room may import it, it imports only errors."""
