"""The library under evaluate.py, calibrate.py, train_lookahead.py and witness.py."""
