"""One model over several devices: what each rank holds (split.py, parts.py), what the ranks tell each other
(communicator.py), and the processes that they are (processes.py)."""
