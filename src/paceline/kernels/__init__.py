"""One op a file: `<op>_ref` in plain torch, the fast paths beside it, and a note of which is taken when."""
