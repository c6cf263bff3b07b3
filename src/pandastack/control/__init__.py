"""The control plane: requests in, decisions, then records and hosts. Runs on the control-plane machine."""
