"""What is sent and how an answer is read, for both clients: pure functions, no I/O. One file per noun."""
