"""The SDK, without a server and against one in this process."""
