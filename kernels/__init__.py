"""Device code: one folder a language or supplier, and what they share (the op's spec, the activation text)."""
