"""The daemon on each machine that runs sandboxes: machines, disks, and the stream to the daemon inside each sandbox."""
