"""Before anything is loaded: what a model takes, what fits, how fast it can be; and what training it would take."""
