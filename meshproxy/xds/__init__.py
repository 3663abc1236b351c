"""Dynamic configuration from a control plane: empty until its issue."""
