"""gVisor (runsc, systrap): an application kernel in user space; works where no hardware virtualisation exists."""
