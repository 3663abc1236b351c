"""Where documents come from: `folder`."""
