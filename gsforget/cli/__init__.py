"""The command line: one file per command, no logic; `app.py` is the frame around them."""
