"""The client library: runs in the user's program. `calls/` builds requests and reads answers without I/O; the rest sends."""
