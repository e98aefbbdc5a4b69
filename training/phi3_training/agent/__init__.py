"""The same conversations on Microsoft Agent Framework, which lives in an environment of its own."""
